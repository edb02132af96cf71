"""Writes a gallery (`application.gallery`) of captioned images, embedded by one model or several.

Embeddings are kept in stores (`retrieval.embed`), so that a second call with the same images and models embeds nothing.
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

PICTURE_SIZE = 256  # pixels of the longer side


@dataclass
class LoadedModel:
    """A model with its processor, where they came from, and the label under which the page shows it."""

    label: str
    name: str
    revision: str | None
    model: GCLModel
    processor: GCLProcessor

    @classmethod
    def load(cls, label: str, name: str, revision: str | None = None) -> "LoadedModel":
        """Onto this process's device. Raises as `GCLModel.from_encoder` does."""
        processor = GCLProcessor.from_encoder(name, revision=revision)
        model = GCLModel.from_encoder(name, processor=processor, revision=revision).eval()
        return cls(label, str(name), revision, model.to(own_device()), processor)

    @classmethod
    def load_all(cls, model: str, base: str | None, *, revision=None, base_revision=None) -> list["LoadedModel"]:
        """`model` as "GCL" and, if there is one, `base` as "base"."""
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
    Write a gallery, or bring one up to date. Of several captions, the first is used.

    Args:
        pairs: as `sources.pairs.load_pairs` gives them.
        models: that embed them; their labels differ.
        folder: is made.
        name: of the data, for the page.
        stores: folder of the stores. Default: `folder/stores`.

    Raises:
        ImageError: (a ValueError) an image can't be read; its pair is named.
        ValueError: the stores hold embeddings of other images: as `embed_rows`.
    """
    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / "embeddings").mkdir(exist_ok=True)
    stores = folder / "stores" if stores is None else Path(stores)
    for loaded in models:
        store = _embed(pairs, loaded, stores, batch_size, show_progress)
        vectors = store.embeddings().astype(np.float16).reshape(len(MODALITIES), len(pairs), -1)
        content = save(dict(zip(MODALITIES, vectors)))
        write_whole(embeddings_file(folder, loaded.label), lambda file, content=content: file.write(content))
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


class PoolRows(Sequence):
    """
    The candidates that N pairs make, as rows for `embed_rows`: N images, N first captions, N images fused with them.

    Their ids are those of `sources.rows.PairRows`: `cat.jpg`, `cat.jpg#0`, `cat.jpg#0+image`.
    """

    def __init__(self, pairs: datasets.Dataset):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(MODALITIES) * len(self.pairs)

    def __getitem__(self, number: int) -> tuple[str, dict]:
        modality, place = divmod(range(len(self))[number], len(self.pairs))
        pair = self.pairs[place]
        name, image, text = pair["id"], {"image": pair["image"]}, {"text": pair["captions"][0]}
        return ((name, image), (f"{name}#0", text), (f"{name}#0+image", image | text))[modality]


def _embed(pairs, loaded, stores, batch_size, show_progress) -> Store:
    """The model's store, in a folder of its own."""
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


def _write_pictures(pairs, folder, show_progress):
    """Decoded and encoded anew, so that nothing but pixels goes into the gallery: no place where a photo was taken."""
    with Progress("small pictures", len(pairs), "pictures", shown=show_progress) as progress:
        for number, pair in enumerate(pairs):
            try:
                image = load_image(pair["image"])
            except ImageError as error:
                raise ImageError(f"pair {pair['id']!r}: {error}") from error
            image.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
            image.save(picture_file(folder, number), quality=80, optimize=True)
            progress.update(1)
