"""Writes a Gradio Space that shows the page of `gcl demo`, with a gallery that is embedded beforehand.

The folder of the Space has `app.py`, `requirements.txt`, `README.md` with the metadata of the Space, the gallery, and
copies of those files of our package that the page needs. Our package need not be installed in the Space. The models are
loaded from the Hub, at the commits that embedded the gallery, and GCL's code comes with the checkpoint.
"""

import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import datasets
from huggingface_hub import HfApi, SpaceCard, SpaceCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig

import universal_gcl
from universal_gcl.application.gallery import Gallery
from universal_gcl.application.gallery_folder import LoadedModel, write_gallery
from universal_gcl.retrieval.new_folder import check_is_new, new_folder

COPIED = (  # the files of universal_gcl that the page needs
    "__init__.py",
    "application/__init__.py",
    "application/demo.py",
    "application/demo.css",
    "application/gallery.py",
    "retrieval/__init__.py",
    "retrieval/search.py",
)
REQUIREMENTS = ("torch", "transformers", "safetensors", "numpy", "pillow")  # gradio is installed in every Gradio Space
APP = '''"""Search images, texts and both in one pool. Written by `gcl convert space`."""

from pathlib import Path

from universal_gcl.application.demo import build_app, launch, load_encoders
from universal_gcl.application.gallery import Gallery

gallery = Gallery(Path(__file__).parent)
app = build_app(gallery, load_encoders(gallery))

if __name__ == "__main__":
    print(launch(app))
    app.block_thread()
'''
CARD = """\
# {title}

The pool holds each of the {count:,} entries of {name} three times: as a picture, as a caption, and as both together.
Search it by a text, a picture, or both. Each hit shows its modality.

{models}

This Space was written by `gcl convert space`. It shows the page of `gcl demo`. GCL is Generalized Contrastive Learning
for universal multimodal retrieval, [arXiv 2509.25638](https://arxiv.org/abs/2509.25638). The pictures and captions have
the licence of their source.
"""


def write_space(
    model: str,
    pairs: datasets.Dataset,
    out_dir: str | Path,
    *,
    name: str,
    base: str | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    title: str = "GCL search",
    batch_size: int = 64,
    show_progress: bool = False,
) -> str:
    """
    Write the folder of a Space. After an error, there is no folder.

    Args:
        model: Hub id of a GCL checkpoint.
        pairs: the captioned images to search, from `sources.pairs.load_pairs`.
        out_dir: the folder to write. It must be empty or not exist yet.
        name: the name of the data, for the page.
        base: Hub id of another model to compare.
        revision, base_revision: branch, tag or commit of the models. The Space always uses the present commit.
        title: the title of the Space.
        batch_size: number of rows embedded at once.
        show_progress: show the progress on stderr.

    Returns:
        A report of a few lines, with the command that pushes the Space.

    Raises:
        ValueError: there is no such model on the Hub, or `model` is not a GCL checkpoint.
        ImageError: (a ValueError) an image can't be read. The message names its pair.
        FileExistsError: `out_dir` is not empty.
    """
    out_dir = Path(out_dir)
    check_is_new(out_dir)
    revision = commit_of(model, revision)
    base_revision = None if base is None else commit_of(base, base_revision)
    # works without the code in the checkpoint, because our own code is registered in this process
    if AutoConfig.from_pretrained(model, revision=revision).model_type != "gcl":
        raise ValueError(
            f"{model} is not a GCL checkpoint, so it has no code of GCL for the Space. Give other models as base"
        )
    models = LoadedModel.load_all(model, base, revision=revision, base_revision=base_revision)
    with new_folder(out_dir) as folder, tempfile.TemporaryDirectory() as stores:
        gallery = write_gallery(
            pairs, models, folder, name=name, stores=stores, batch_size=batch_size, show_progress=show_progress
        )
        package = Path(universal_gcl.__file__).parent
        for file in COPIED:
            copy = folder / "universal_gcl" / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package / file, copy)
        (folder / "app.py").write_text(APP, encoding="utf-8")
        pinned = [f"{package}=={_public_version(package)}\n" for package in REQUIREMENTS]
        (folder / "requirements.txt").write_text("".join(pinned), encoding="utf-8")
        _card(title, gallery).save(folder / "README.md")
    return "\n".join(
        [
            f"{out_dir}: {len(gallery):,} entries, {3 * len(gallery):,} candidates, with their pictures and captions",
            *(f"{label}: {source['name']} at {source['revision'][:12]}" for label, source in gallery.models.items()),
            f"try it:  python {out_dir / 'app.py'}",
            f"push it: hf upload --repo-type space ORGANISATION_OR_USER/NAME {out_dir} .",
        ]
    )


def commit_of(name: str, revision: str | None) -> str:
    """
    Ask the Hub for the commit of a model.

    Args:
        name: Hub id.
        revision: branch, tag or commit.

    Raises:
        ValueError: `name` is a folder, or there is no such model on the Hub.
        OSError: the Hub can't be reached.
    """
    if Path(name).is_dir():
        raise ValueError(
            f"{name} is a folder, but a Space loads its models from the Hub: upload it with gcl push, then give its id"
        )
    try:
        commit = HfApi().model_info(name, revision=revision).sha
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder nor a Hub id: {error}") from error
    except HfHubHTTPError as error:
        at = f" at {revision}" if revision else ""
        raise ValueError(f"the Hub has no {name}{at}, or you may not read it: {error}") from error
    assert commit is not None  # the Hub always names it
    return commit


def _card(title: str, gallery: Gallery) -> SpaceCard:
    models = [source["name"] for source in gallery.models.values()]
    data = SpaceCardData(
        title=title,
        emoji="🔎",
        colorFrom="blue",
        colorTo="purple",
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        short_description="Images, texts and both in one pool",
        models=models,
        tags=["gcl", "multimodal-retrieval"],
    )
    listed = "\n".join(
        f"- {label}: [{source['name']}](https://huggingface.co/{source['name']}), commit `{source['revision']}`"
        for label, source in gallery.models.items()
    )
    text = CARD.format(title=title, count=len(gallery), name=gallery.name, models=listed)
    return SpaceCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _public_version(package: str) -> str:
    """The version without the local part, such as `+cpu`."""
    return version(package).split("+")[0]
