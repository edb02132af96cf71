"""A gallery: captioned pictures in a folder, searched as one pool of pictures, captions, and pictures with captions.

The files of the folder are:

- `gallery.json`: `name`; `contents`, a hash of the pictures and captions; `models`, a list of `label`, `name` and
  `revision`; `entries`, a list of `id` and `caption`.
- `pictures/00000.jpg`, …: a small picture for each entry.
- `embeddings/LABEL.safetensors`: the embeddings by one model, with the keys `image`, `text` and `image+text`. Each is
  (N, D) float16 with unit norm.

`application.gallery_folder` writes the folder. A Space has a copy of this file, without most of our package and without
`modeling_gcl`. So this file must not import them. It may import `retrieval.search`, which a Space also has.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from universal_gcl.retrieval.search import exact_top_k

# the modality of a candidate, as in the files → what the page calls one such candidate, and several
NAMES = {
    "image": ("image", "images"),
    "text": ("text", "texts"),
    "image+text": ("image + text", "image + text"),
}
MODALITIES = tuple(NAMES)


@dataclass(frozen=True)
class Hit:
    """A candidate that a search found.

    Attributes:
        entry: the number of the entry in the gallery.
        modality: one of `MODALITIES`.
        score: the cosine of the candidate and the query.
    """

    entry: int
    modality: str
    score: float


class Gallery:
    """
    N captioned pictures, with their embeddings by one or more models.

    Attributes:
        folder: the folder of the gallery.
        name: the name of the data.
        models: for each model, label → `{"name": …, "revision": …}`.
        entries: for each picture, `{"id": …, "caption": …}`.

    Raises:
        FileNotFoundError: there is no gallery in the folder.
        ValueError: there are more or fewer embeddings than entries.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / "gallery.json"
        if not file.is_file():
            raise FileNotFoundError(f"{self.folder} holds no gallery: there is no gallery.json")
        described = json.loads(file.read_text(encoding="utf-8"))
        self.name, self.entries = described["name"], described["entries"]
        self.models = {model.pop("label"): model for model in described["models"]}
        self._embeddings = {label: load_file(embeddings_file(self.folder, label)) for label in self.models}
        for label, embeddings in self._embeddings.items():
            if {len(embeddings[modality]) for modality in MODALITIES} != {len(self)}:
                raise ValueError(
                    f"{embeddings_file(self.folder, label)} does not hold the embeddings of the {len(self)} entries of "
                    f"{file}: write the gallery again"
                )

    def __len__(self) -> int:
        return len(self.entries)

    def picture(self, entry: int) -> Path:
        """The file of an entry's small picture, a JPEG."""
        return picture_file(self.folder, entry)

    def search(self, label: str, query: torch.Tensor, k: int, modalities: Sequence[str] = MODALITIES) -> list[Hit]:
        """
        Find the k best candidates by exact search.

        Args:
            label: the label of the model whose embeddings are searched.
            query: (D,), the embedding of the query by the same model.
            k: number of candidates. If there are fewer, all are returned.
            modalities: the modalities of the candidates.
        """
        pool = torch.cat([self._embeddings[label][modality] for modality in modalities])
        scores, places = exact_top_k(query[None], pool, min(k, len(pool)))
        return [
            Hit(place % len(self), modalities[place // len(self)], score)
            for score, place in zip(scores[0].tolist(), places[0].tolist())
        ]


def picture_file(folder: Path, entry: int) -> Path:
    """The file of an entry's small picture."""
    return folder / "pictures" / f"{entry:05}.jpg"


def embeddings_file(folder: Path, label: str) -> Path:
    """The file of the embeddings by the model with this label."""
    return folder / "embeddings" / f"{label}.safetensors"
