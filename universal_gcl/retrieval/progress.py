"""Progress with rate and time left: a bar on a terminal, a line now and then in a log."""

import sys
import time

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """
    Counts up to `total`. Use as a context manager.

    Args:
        what: stands before the figures.
        unit: of what is counted, in the plural.
        initial: what was done before, left out of the rate.
    """

    def __init__(self, what: str, total: int, unit: str = "rows", *, initial: int = 0, shown: bool = True):
        self.what, self.total, self.unit, self.initial, self.done = what, total, unit, initial, initial
        terminal = sys.stderr.isatty()
        hidden = not (shown and terminal)
        self.bar = tqdm(desc=what, total=total, initial=initial, unit=f" {unit}", disable=hidden, dynamic_ncols=True)
        self.lines = shown and not terminal
        self.start = self.last_line = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()
        if self.lines:
            self._write_line()

    def update(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        if self.lines and time.monotonic() - self.last_line >= _SECONDS_BETWEEN_LINES:
            self._write_line()

    def _write_line(self):
        self.last_line = time.monotonic()
        rate = (self.done - self.initial) / max(self.last_line - self.start, 1e-9)
        line = f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.3g} {self.unit}/s"
        if rate and self.done < self.total:
            line += f", {tqdm.format_interval((self.total - self.done) / rate)} left"
        print(line, file=sys.stderr, flush=True)
