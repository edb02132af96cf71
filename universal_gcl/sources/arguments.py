"""What may be said of one source of pairs: in a recipe's `data:` section, and in the `gcl` commands."""

import math
from dataclasses import dataclass


@dataclass
class SourceArguments:
    """One source of pairs (image, captions).

    Args:
        > Source (each entry of data.train, and data.eval)

        path (`str`):
            A folder of images (with `metadata.csv`, `metadata.jsonl` or one `.txt` beside each image), a `.parquet`,
            `.jsonl`, `.csv` or `.json` (LLaVA-Pretrain) file, or the id of a data set on the Hub. Relative paths
            start from the working directory.
        name (`str`, *optional*):
            Configuration of a Hub data set.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub data set. Pin a commit to make a run repeatable.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub data set. A local file or folder is one split.
        image_root (`str`, *optional*):
            Folder that image paths are relative to. By default the folder of the captions file.
        image_column (`str`, *optional*):
            Column of the images or their paths. By default the first known name (image, file_name, image_path, ...).
        caption_column (`str`, *optional*):
            Column of the caption (string) or captions (list of strings). By default the first known name (captions,
            caption, text, ...).
        id_column (`str`, *optional*):
            Column of unique pair ids. By default `id` where there is one, else the image path or the row number.
        weight (`float`, *optional*):
            Share of this source in training, relative to the other sources' weights.
        limit (`int`, *optional*):
            Only the first `limit` pairs are used.
        licence (`str`, *optional*):
            Licence of the data, for the model card.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    image_root: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    id_column: str | None = None
    weight: float | None = None
    limit: int | None = None
    licence: str | None = None

    def __post_init__(self):
        if not self.path:
            raise ValueError("path of a data source is empty: give a folder, a file or a Hub data set id")
        if self.weight is not None:
            positive(f"weight of {self.path}", self.weight)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit of {self.path} is {self.limit}: use 1 or more, or leave it out for all pairs")


def positive(name: str, value: float):
    """Raise ValueError if `value` of the field `name` is not finite and over 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}: use a number over 0")
