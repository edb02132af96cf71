"""The description of one source of pairs, used by the `data:` section of a recipe and by the `gcl` commands."""

import math
from dataclasses import dataclass


@dataclass
class SourceArguments:
    """One source of pairs: images, each with one or more captions.

    Args:
        > Source (each entry of data.train, and data.eval)

        path (`str`):
            One of: a folder of images with `metadata.csv`, `metadata.jsonl` or one `.txt` next to each image; a
            `.parquet`, `.jsonl`, `.csv` or `.json` (LLaVA-Pretrain) file; the id of a data set on the Hub. A relative
            path starts from the working directory.
        name (`str`, *optional*):
            Configuration of a Hub data set.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub data set. Pin a commit to make a run repeatable.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub data set. Local files and folders have no splits, so this is ignored for them.
        image_root (`str`, *optional*):
            Folder that image paths are relative to. Defaults to the folder of the captions file.
        image_column (`str`, *optional*):
            Column with the images or their paths. Defaults to the first column with a known name (image, file_name,
            image_path, ...).
        caption_column (`str`, *optional*):
            Column with the caption (a string) or captions (a list of strings). Defaults to the first column with a
            known name (captions, caption, text, ...).
        id_column (`str`, *optional*):
            Column with unique pair ids. Defaults to the column `id`. Without that column, the id is the image path, or
            the row number if the images are stored in the table.
        weight (`float`, *optional*):
            How often training draws from this source, relative to the weights of the other sources.
        limit (`int`, *optional*):
            Use only the first `limit` pairs.
        licence (`str`, *optional*):
            Licence of the data, for the model card.

    Raises:
        ValueError: a field has a value that is not allowed. The message names the field and the allowed values.
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

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("the path of a data source is empty: give a folder, a file or the id of a Hub data set")
        if self.weight is not None:
            positive(f"the weight of {self.path}", self.weight)
        if self.limit is not None and self.limit < 1:
            raise ValueError(
                f"the limit of {self.path} is {self.limit}: use 1 or more, or leave it out to use all pairs"
            )


def positive(name: str, value: float) -> None:
    """Raise ValueError unless `value`, the value of the field `name`, is finite and greater than 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}: use a number over 0")
