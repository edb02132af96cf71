"""A gallery on disk that is searched as one mixed pool: each picture alone, its caption alone, and both together.

- `gallery.json`: `name`; `contents`, a hash of pictures and captions; `models`, each with `label`, `name`, `revision`;
  `entries`, each with `id` and `caption`
- `pictures/00000.jpg`, …: a small one of each entry, in their order
- `embeddings/LABEL.safetensors`: `image`, `text` and `image+text`, (N, D) float16 each, unit norm

`application.gallery_folder` writes it; a Space holds it beside this file, which therefore imports none but `search`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from universal_gcl.retrieval.search import exact_top_k

MODALITIES = ("image", "text", "image+text")


@dataclass(frozen=True)
class Hit:
    """A candidate that was found: the number of its entry, its modality, and its cosine with the query."""

    entry: int
    modality: str
    score: float


class Gallery:
    """
    N entries, and the embeddings that each of some models made of them.

    Attributes:
        folder: where it is.
        name: of the data.
        models: label → `{"name": …, "revision": …}`, of what made the embeddings.
        entries: `{"id": …, "caption": …}` each.

    Raises:
        FileNotFoundError: the folder holds no gallery.
        ValueError: embeddings and entries differ in number.
    """

    def __init__(self, folder: str | Path):
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

    def __len__(self):
        return len(self.entries)

    def picture(self, entry: int) -> Path:
        """The small picture of an entry, a JPEG."""
        return picture_file(self.folder, entry)

    def search(self, label: str, query: torch.Tensor, k: int, modalities: Sequence[str] = MODALITIES) -> list[Hit]:
        """
        The k best candidates of some modalities, exactly; all, if there are fewer.

        Args:
            label: whose embeddings are searched.
            query: (D,), by the same model.
        """
        pool = torch.cat([self._embeddings[label][modality] for modality in modalities])
        scores, places = exact_top_k(query[None], pool, min(k, len(pool)))
        return [
            Hit(place % len(self), modalities[place // len(self)], score)
            for score, place in zip(scores[0].tolist(), places[0].tolist())
        ]


def picture_file(folder: Path, entry: int) -> Path:
    return folder / "pictures" / f"{entry:05}.jpg"


def embeddings_file(folder: Path, label: str) -> Path:
    return folder / "embeddings" / f"{label}.safetensors"
