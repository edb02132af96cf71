"""A Gradio Space: the page of `gcl demo` over a gallery whose embeddings are made beforehand.

The folder holds `app.py`, `requirements.txt`, `README.md` with the Space's metadata, the gallery, and those files of
`retrieval` that the page consists of, unchanged. A Space can't import the rest: the models come from the Hub at the
commits that made the embeddings, and GCL's code with them.
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
from universal_gcl.application.gallery_folder import LoadedModel, write_gallery
from universal_gcl.retrieval.new_folder import check_is_new, new_folder

COPIED = (  # of the package `universal_gcl`
    "__init__.py",
    "application/__init__.py",
    "application/demo.py",
    "application/demo.css",
    "application/gallery.py",
    "retrieval/__init__.py",
    "retrieval/search.py",
)
REQUIREMENTS = ("torch", "transformers", "safetensors", "numpy", "pillow")  # gradio comes with the Space
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

Each of the {count:,} entries of {name} is a candidate three times: its picture alone, its caption alone, and both
together. Search by a text, a picture, or both; each hit shows its modality.

{models}

Written by `gcl convert space`, the page of `gcl demo`. GCL: Generalized Contrastive Learning for universal multimodal
retrieval, [arXiv 2509.25638](https://arxiv.org/abs/2509.25638). Pictures and captions keep the licence of their source.
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
    Write the folder; it appears whole or not at all.

    Args:
        model: Hub id of a GCL checkpoint.
        pairs: what is searched, as `sources.pairs.load_pairs` gives them.
        out_dir: folder to write; must be absent or empty.
        name: of the data, for the page.
        base: Hub id of another model to compare.
        revision, base_revision: branch, tag or commit; the Space is pinned to its commit.

    Returns:
        A report of a few lines, with the command that pushes the Space.

    Raises:
        ValueError: no id of the Hub, no such model there, `model` is no GCL checkpoint.
        ImageError: (a ValueError) an image can't be read; its pair is named.
        FileExistsError: `out_dir` is not empty.
    """
    out_dir = Path(out_dir)
    check_is_new(out_dir)
    revision = commit_of(model, revision)
    base_revision = None if base is None else commit_of(base, base_revision)
    # without its code: for a GCL checkpoint ours is registered
    if AutoConfig.from_pretrained(model, revision=revision).model_type != "gcl":
        raise ValueError(f"{model} is no GCL checkpoint: a Space takes GCL's code from it. Give another model as base")
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
            f"{out_dir}: {len(gallery):,} entries, {3 * len(gallery):,} candidates, their pictures and captions in it",
            *(f"{label}: {source['name']} at {source['revision'][:12]}" for label, source in gallery.models.items()),
            f"try it:  python {out_dir / 'app.py'}",
            f"push it: hf upload --repo-type space ORGANISATION_OR_USER/NAME {out_dir} .",
        ]
    )


def commit_of(name: str, revision: str | None) -> str:
    """
    The commit of a model on the Hub.

    Raises:
        ValueError: it is a folder, or not on the Hub.
        OSError: the Hub can't be reached.
    """
    if Path(name).is_dir():
        raise ValueError(
            f"{name} is a folder, and a Space loads its models from the Hub: gcl push it, then give its id"
        )
    try:
        return HfApi().model_info(name, revision=revision).sha
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder nor an id of the Hub: {error}") from error
    except HfHubHTTPError as error:
        at = f" at {revision}" if revision else ""
        raise ValueError(f"the Hub does not give {name}{at}, or not to this user: {error}") from error


def _card(title, gallery):
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


def _public_version(package):
    """Without what says for which accelerator it was built."""
    return version(package).split("+")[0]
