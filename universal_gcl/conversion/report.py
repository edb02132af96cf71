"""What a converter reports when it is done."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion. As a string, one line with the folder, then one line per note.

    Attributes:
        folder: the folder that was written.
        notes: one line each: what was converted, left out, assumed or changed.
    """

    folder: Path
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([str(self.folder), *self.notes])
