"""Checks that every source of pairs must pass, and the report of what was read."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "file_name", "image_path", "filename", "image_file", "filepath", "path", "img", "jpg")
CAPTION_COLUMNS = ("captions", "caption", "text", "texts", "title", "sentences", "blip_caption", "description")

MISSING = "images missing"
NO_CAPTION_FILE = "images without a .txt file"
REMEDIES = {
    MISSING: "Check image_root and the paths",
    NO_CAPTION_FILE: "Next to each image, write its captions into a .txt of the same name",
}


class DataError(ValueError):
    """A data source can't be used. The message names the file and row, and says what to do."""


@dataclass
class SourceReport:
    """What was read from one source, for the log and the model card.

    Attributes:
        path: the path of the source, as written in the recipe.
        revision: the commit of a Hub data set, or `sha256:...` of a captions or data file. None for a folder without a
            metadata file, and for a Hub data set whose commit is unknown.
        split: the split of a Hub data set, None for local sources.
        pairs: number of pairs in use.
        captions: number of captions in use.
        skipped: reason → number of pairs skipped. The reasons are the keys of `REMEDIES`.
        first_skipped: reason → name of the first pair skipped for it.
    """

    path: str
    revision: str | None = None
    split: str | None = None
    pairs: int = 0
    captions: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first_skipped: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> None:
        """Count one skipped pair."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.first_skipped.setdefault(reason, name)

    @property
    def num_skipped(self) -> int:
        """Number of pairs skipped, for any reason."""
        return sum(self.skipped.values())

    def line(self) -> str:
        """The report as one line, for the log."""
        skipped = "".join(f", {count:,} left out: {reason}" for reason, count in self.skipped.items())
        return f"{self.path}: {self.pairs:,} pairs, {self.captions:,} captions{skipped}"

    def check_skipped(self, total: int, max_broken_share: float) -> None:
        """Log a warning if some of `total` pairs were skipped.

        Raises:
            DataError: more than `max_broken_share` of the pairs were skipped, or all of them.
        """
        if not self.skipped:
            return
        parts = [
            f"{count} of {total} {reason} (the first: {self.first_skipped[reason]})"
            for reason, count in self.skipped.items()
        ]
        message = f"{self.path}: {'; '.join(parts)}"
        remedies = ". ".join(REMEDIES[reason] for reason in self.skipped)
        if self.num_skipped == total:
            raise DataError(f"{message}: no pairs are left. {remedies}")
        if self.num_skipped > max_broken_share * total:
            raise DataError(
                f"{message}: over data.max_broken_share ({max_broken_share:.2%}). {remedies}, or raise max_broken_share"
            )
        logger.warning("%s. They are left out.", message)


def find_column(place: str, columns: Iterable[str], asked: str | None, known: tuple[str, ...], argument: str) -> str:
    """
    Find a column by its name.

    Args:
        place: the file or table, for the error message.
        columns: the names of all columns.
        asked: the name that the user chose, or None.
        known: names to look for if the user chose none, the preferred ones first.
        argument: the argument with which the user chooses, such as `image_column`.

    Raises:
        DataError: there is no such column. The message lists the columns and names the argument.
    """
    columns = list(columns)
    if asked is not None:
        if asked not in columns:
            raise DataError(
                f"{place}: there is no column {asked!r}, but {argument} names it. Columns: {', '.join(columns)}"
            )
        return asked
    for name in known:
        if name in columns:
            return name
    raise DataError(
        f"{place}: no column has a known name for the {argument.split('_')[0]} ({', '.join(known)}). "
        f"Columns: {', '.join(columns)}. Set {argument} to the right one"
    )


def check_captions(value: object, place: str) -> list[str]:
    """The captions of one row as a list of texts, without white space around them.

    Raises:
        DataError: a caption is missing, blank or not text, or has half of a surrogate pair; or there are no captions.
    """
    captions = [value] if value is None or isinstance(value, str) else value
    if not isinstance(captions, (list, tuple)):
        raise DataError(
            f"{place}: the caption is {_short(value)}, not a text or a list of texts; correct it, or set caption_column"
        )
    if not captions:
        raise DataError(f"{place}: the list of captions is empty; add a caption or remove the row")
    for caption in captions:
        if caption is not None and not isinstance(caption, str):
            raise DataError(f"{place}: the caption {_short(caption)} is not text; put it in quotes, or correct the row")
        if caption is None or not caption.strip():
            raise DataError(f"{place}: the caption is empty; write one, or remove the row")
        check_encodable(caption, "caption", place)
    return [caption.strip() for caption in captions]


def check_encodable(text: str, what: str, place: str) -> None:
    """Check that `text` can be encoded as UTF-8.

    A text can't be encoded, and so neither stored nor tokenised, if it has only half of a surrogate pair. Such texts
    come from JSON in which an escape like `\\ud83d\\ude00` was cut, and from file names that are not UTF-8.

    Raises:
        DataError: the text, which the message calls `what`, can't be encoded.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: the {what} {_short(text)} has {text[error.start]!r} in it, which is not a character; "
            "correct it, or rename the file"
        ) from error


class UniqueIds:
    """Remembers the place of each id, to find ids that occur twice."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def add(self, pair_id: object, place: str) -> str:
        """Add an id and return it as text.

        Raises:
            DataError: the id is empty, or was added before.
        """
        if pair_id is None or pair_id == "" or (isinstance(pair_id, float) and math.isnan(pair_id)):
            raise DataError(
                f"{place}: the id is empty; write one, or set id_column to a column that has an id in each row"
            )
        pair_id = str(pair_id)
        check_encodable(pair_id, "id", place)
        if pair_id in self._places:
            raise DataError(
                f"{place}: the id {pair_id!r} is already used in {self._places[pair_id]}, and ids must be unique. "
                "Correct it, or set id_column to another column"
            )
        self._places[pair_id] = place
        return pair_id


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
