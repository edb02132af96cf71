"""What every source of pairs must satisfy, and the report of what was read."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "file_name", "image_path", "filename", "image_file", "filepath", "path", "img", "jpg")
CAPTION_COLUMNS = ("captions", "caption", "text", "texts", "title", "sentences", "blip_caption", "description")

MISSING = "images missing"
NO_CAPTION_FILE = "images without a .txt beside them"
REMEDIES = {
    MISSING: "Check image_root and the paths",
    NO_CAPTION_FILE: "Write a .txt with the captions beside each image, of the same name",
}


class DataError(ValueError):
    """A source that can't be used; the message names the file and row, and what to do."""


@dataclass
class SourceReport:
    """What was read from one source, for the log and the model card.

    Attributes:
        path: as the recipe names it.
        revision: commit of a Hub data set, `sha256:...` of a captions or data file, or None.
        split: split of a Hub data set, None for local sources.
        pairs, captions: how many are used.
        skipped: {reason: number of pairs left out}; the reasons are the keys of `REMEDIES`.
        first_skipped: {reason: the first one's name}.
    """

    path: str
    revision: str | None = None
    split: str | None = None
    pairs: int = 0
    captions: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first_skipped: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, name: str):
        """Count one pair left out for `reason`."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.first_skipped.setdefault(reason, name)

    @property
    def num_skipped(self) -> int:
        """Pairs left out for any reason."""
        return sum(self.skipped.values())

    def line(self) -> str:
        """The report as one line for the log."""
        skipped = "".join(f", {count:,} left out: {reason}" for reason, count in self.skipped.items())
        return f"{self.path}: {self.pairs:,} pairs, {self.captions:,} captions{skipped}"

    def check_skipped(self, total: int, max_broken_share: float):
        """Warn of what was left out of `total` pairs; raise `DataError` where it is over the share, or all."""
        if not self.skipped:
            return
        parts = [
            f"{count} of {total} {reason} (the first: {self.first_skipped[reason]})"
            for reason, count in self.skipped.items()
        ]
        message = f"{self.path}: {'; '.join(parts)}"
        remedies = ". ".join(REMEDIES[reason] for reason in self.skipped)
        if self.num_skipped == total:
            raise DataError(f"{message}: no pair is left. {remedies}")
        if self.num_skipped > max_broken_share * total:
            raise DataError(
                f"{message}: over data.max_broken_share ({max_broken_share:.2%}). {remedies}, or raise max_broken_share"
            )
        logger.warning("%s. They are left out.", message)


def find_column(place: str, columns: Iterable[str], asked: str | None, known: tuple[str, ...], argument: str) -> str:
    """The column that holds something: the one asked for, else the first known name.

    Raises:
        DataError: listing the columns and the argument that chooses among them.
    """
    columns = list(columns)
    if asked is not None:
        if asked not in columns:
            raise DataError(f"{place}: no column {asked!r}, which {argument} asks for; columns: {', '.join(columns)}")
        return asked
    for name in known:
        if name in columns:
            return name
    raise DataError(
        f"{place}: which column is the {argument.split('_')[0]}? Known names are {', '.join(known)}; "
        f"found: {', '.join(columns)}. Set {argument} to the right one"
    )


def check_captions(value: object, place: str) -> list[str]:
    """The captions of one row as a list of stripped texts.

    Raises:
        DataError: for captions that are absent, blank or not text, or hold half a surrogate pair.
    """
    captions = [value] if value is None or isinstance(value, str) else value
    if not isinstance(captions, (list, tuple)):
        raise DataError(
            f"{place}: the caption is {_short(value)}, not text or a list of texts; correct it or set caption_column"
        )
    if not captions:
        raise DataError(f"{place}: the list of captions is empty; give at least one or remove the row")
    for caption in captions:
        if caption is not None and not isinstance(caption, str):
            raise DataError(f"{place}: the caption {_short(caption)} is not text; quote it or correct the row")
        if caption is None or not caption.strip():
            raise DataError(f"{place}: the caption is empty; write one or remove the row")
        check_encodable(caption, "caption", place)
    return [caption.strip() for caption in captions]


def check_encodable(text: str, what: str, place: str):
    """Raise `DataError` for half a surrogate pair, which can neither be stored nor tokenised.

    A cut `\\ud83d\\ude00` of JSON leaves it, and a file name that is not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: the {what} {_short(text)} holds {text[error.start]!r}, which is not a character; "
            "correct it, or rename the file to a UTF-8 name"
        ) from error


class UniqueIds:
    """Remembers where each id stood and raises `DataError` for a repeated one."""

    def __init__(self):
        self._places: dict[str, str] = {}

    def add(self, pair_id: object, place: str) -> str:
        """The id as text."""
        if pair_id is None or pair_id == "" or (isinstance(pair_id, float) and math.isnan(pair_id)):
            raise DataError(f"{place}: the id is empty; give one, or set id_column to a column without gaps")
        pair_id = str(pair_id)
        check_encodable(pair_id, "id", place)
        if pair_id in self._places:
            raise DataError(
                f"{place}: id {pair_id!r} was used in {self._places[pair_id]} already; ids must be unique: "
                "correct it, or set id_column to another column"
            )
        self._places[pair_id] = place
        return pair_id


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
