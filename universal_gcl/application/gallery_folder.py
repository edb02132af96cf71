"""Writes a gallery (`application.gallery`) of captioned images, embedded by one or more models.

The embeddings are also kept in stores (`retrieval.embed`). So a second call with the same images and models embeds
nothing.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from safetensors.numpy import save

from modeling_gcl import GCLModel, GCLProcessor, ImageError, load_image
from universal_gcl.application.gallery import MODALITIES, Gallery, embeddings_file, picture_file
from universal_gcl.retrieval.embed import embed_rows
from universal_gcl.retrieval.fingerprint import model_fingerprint
from universal_gcl.retrieval.processes import own_device
from universal_gcl.retrieval.progress import Progress
from universal_gcl.retrieval.store import Store, write_json, write_whole

PICTURE_SIZE = 256  # pixels on the longer side


@dataclass
class LoadedModel:
    """
    A model with its processor.

    Attributes:
        label: the name of the model on the page.
        name, revision: folder or Hub id from which the model was loaded, and branch, tag or commit there.
    """

    label: str
    name: str
    revision: str | None
    model: GCLModel
    processor: GCLProcessor

    @classmethod
    def load(cls, label: str, name: str, revision: str | None = None) -> "LoadedModel":
        """Load a model onto the device of this process. Raises the errors of `GCLModel.from_encoder`."""
        processor = GCLProcessor.from_encoder(name, revision=revision)
        model = GCLModel.from_encoder(name, processor=processor, revision=revision).eval()
        return cls(label, str(name), revision, model.to(own_device()), processor)

    @classmethod
    def load_all(
        cls, model: str, base: str | None, *, revision: str | None = None, base_revision: str | None = None
    ) -> list["LoadedModel"]:
        """Load `model` with the label "GCL" and, if given, `base` with the label "base"."""
        loaded = [cls.load("GCL", model, revision)]
        return loaded if base is None else [*loaded, cls.load("base", base, base_revision)]


def write_gallery(
    pairs: datasets.Dataset,
    models: Sequence[LoadedModel],
    folder: str | Path,
    *,
    name: str,
    stores: str | Path | None = None,
    batch_size: int = 64,
    show_progress: bool = False,
) -> Gallery:
    """
    Write a gallery, or update an existing one. If a pair has several captions, the first is used.

    Args:
        pairs: the captioned images, from `sources.pairs.load_pairs`.
        models: one or more models, with different labels.
        folder: the folder of the gallery. It is created if needed.
        name: the name of the data, for the page.
        stores: the folder of the stores. Defaults to `folder/stores`.
        batch_size: number of rows embedded at once.
        show_progress: show the progress on stderr.

    Raises:
        ImageError: (a ValueError) an image can't be read. The message names its pair.
        ValueError: the stores hold embeddings of other images.
    """
    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / "embeddings").mkdir(exist_ok=True)
    stores = folder / "stores" if stores is None else Path(stores)
    for loaded in models:
        store = _embed(pairs, loaded, stores, batch_size, show_progress)
        _write_embeddings(embeddings_file(folder, loaded.label), store)
    contents = store.manifest["contents"]
    described = folder / "gallery.json"
    if not described.is_file() or json.loads(described.read_text(encoding="utf-8"))["contents"] != contents:
        described.unlink(missing_ok=True)
        _write_pictures(pairs, folder, show_progress)
    captions = pairs.select_columns(["id", "captions"])
    write_json(
        described,
        {
            "name": name,
            "contents": contents,
            "models": [{"label": it.label, "name": it.name, "revision": it.revision} for it in models],
            "entries": [{"id": pair["id"], "caption": pair["captions"][0]} for pair in captions],
        },
    )
    return Gallery(folder)


class PoolRows:
    """
    The candidates in a gallery of N pairs, as rows for `embed_rows`.

    First come N images, then N captions (the first of each pair), then N images with these captions. The ids are the
    same as in `sources.rows.PairRows`: `cat.jpg`, `cat.jpg#0`, `cat.jpg#0+image`.
    """

    def __init__(self, pairs: datasets.Dataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(MODALITIES) * len(self.pairs)

    def __getitem__(self, number: int) -> tuple[str, dict]:
        modality, place = divmod(range(len(self))[number], len(self.pairs))
        pair = self.pairs[place]
        name, image, text = pair["id"], {"image": pair["image"]}, {"text": pair["captions"][0]}
        return ((name, image), (f"{name}#0", text), (f"{name}#0+image", image | text))[modality]


def _embed(pairs: datasets.Dataset, loaded: LoadedModel, stores: Path, batch_size: int, show_progress: bool) -> Store:
    """Embed the candidates into a store. Each model has its own."""
    if show_progress:
        print(f"{loaded.label}: {loaded.name}", file=sys.stderr)
    fingerprint = model_fingerprint(loaded.model, loaded.processor)
    own = stores / "-".join(fingerprint[part][:8] for part in ("weights", "config", "processor"))
    return embed_rows(
        loaded.model,
        loaded.processor,
        PoolRows(pairs),
        own,
        batch_size=batch_size,
        shard_rows=1024,
        show_progress=show_progress,
    )


def _write_embeddings(file: Path, store: Store) -> None:
    """Write the embeddings of a store of `PoolRows` to a file of the gallery."""
    vectors = store.embeddings().astype(np.float16).reshape(len(MODALITIES), len(store) // len(MODALITIES), -1)
    content = save(dict(zip(MODALITIES, vectors)))
    write_whole(file, lambda opened: opened.write(content))


def _write_pictures(pairs: datasets.Dataset, folder: Path, show_progress: bool) -> None:
    """Write the small pictures. They have no metadata, such as the place where a photo was taken."""
    with Progress("small pictures", len(pairs), "pictures", shown=show_progress) as progress:
        for number, pair in enumerate(pairs):
            try:
                image = load_image(pair["image"])
            except ImageError as error:
                raise ImageError(f"pair {pair['id']!r}: {error}") from error
            image.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
            image.save(picture_file(folder, number), quality=80, optimize=True)
            progress.update(1)
