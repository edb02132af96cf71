"""A gallery of plain colours and a model that knows them, so that what a search must find can be worked out by hand."""

from io import BytesIO
from types import SimpleNamespace

import datasets
import numpy as np
from PIL import Image

from modeling_gcl import ImageError, load_image
from tests.support.backbones import tiny_processor
from tests.support.planted import PlantedModel
from universal_gcl.application.gallery_folder import LoadedModel

COLOURS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}  # fmt: skip
NASTY = "${1 + 1} {{value}} <b onclick='alert(1)'>bold</b> \"quoted\""  # in the caption of magenta


def picture(colour, **options) -> bytes:
    file = BytesIO()
    Image.new("RGB", (300, 200), COLOURS[colour]).save(file, "JPEG", **options)
    return file.getvalue()


def colour_pairs(colours=tuple(COLOURS)) -> datasets.Dataset:
    """One pair a colour, as `load_pairs` gives them; the second caption must not be used."""
    captions = {colour: f"{colour} {NASTY}" if colour == "magenta" else colour for colour in colours}
    rows = [
        {"id": f"{colour}.jpg", "image": {"bytes": picture(colour), "path": None}, "captions": [captions[colour], "no"]}
        for colour in colours
    ]
    return datasets.Dataset.from_list(rows)


class ColourModel(PlantedModel):
    """Embeds the colour that a row shows or names first; a row of both, the sum. Vectors of the modalities lie `gap`
    apart in directions of their own, so that with a large one hits are sorted by modality."""

    def __init__(self, gap: float):
        super().__init__(self.colour)
        self.gap, self.rows = gap, 0
        self.config = SimpleNamespace(to_dict=lambda: {"gap": gap})

    def encode(self, rows, processor=None, **options):
        self.rows += len(rows)
        return super().encode(rows, processor, **options)

    def colour(self, row):
        seen = np.zeros(3)
        if "image" in row:
            try:
                seen += np.asarray(load_image(row["image"]), dtype=float).mean((0, 1)) / 127.5 - 1
            except ImageError as error:
                raise KeyError(str(error)) from error
        if "text" in row:
            seen += np.array(COLOURS[row["text"].split()[0]]) / 127.5 - 1
        kind = np.eye(3)[("image" in row) + 2 * ("text" in row) - 1]
        return [*(seen / np.linalg.norm(seen)), *(self.gap * kind)]


def colour_models(**gaps) -> list[LoadedModel]:
    """A model for each label."""
    return [
        LoadedModel(label, f"org/{label}", None, ColourModel(gap), tiny_processor("clip"))
        for label, gap in gaps.items()
    ]
