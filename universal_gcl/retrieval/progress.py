"""Shows progress with rate and remaining time: as a bar on a terminal, else as a line every half minute."""

import sys
import time

from tqdm import tqdm

from universal_gcl.retrieval.processes import Processes

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """
    Shows how far a job is. Use it as a context manager.

    Args:
        what: the name of the job.
        total: how many units there are to do.
        unit: the name of the units, in the plural.
        initial: how many units were done before the start. They don't count for the rate.
        shown: False shows nothing.
    """

    def __init__(self, what: str, total: int, unit: str = "rows", *, initial: int = 0, shown: bool = True) -> None:
        self.what, self.total, self.unit, self.initial, self.done = what, total, unit, initial, initial
        terminal = sys.stderr.isatty()
        hidden = not (shown and terminal)
        self.bar = tqdm(desc=what, total=total, initial=initial, unit=f" {unit}", disable=hidden, dynamic_ncols=True)
        self.lines = shown and not terminal
        self.start = self.last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.lines:
            self._write_line()

    def update(self, count: int) -> None:
        """Report that `count` more units are done."""
        self.done += count
        self.bar.update(count)
        if self.lines and time.monotonic() - self.last_line >= _SECONDS_BETWEEN_LINES:
            self._write_line()

    def _write_line(self):
        self.last_line = time.monotonic()
        rate = (self.done - self.initial) / max(self.last_line - self.start, 1e-9)
        line = f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {number(rate)} {self.unit}/s"
        if rate and self.done < self.total:
            line += f", {tqdm.format_interval((self.total - self.done) / rate)} left"
        print(line, file=sys.stderr, flush=True)


def number(rate: float) -> str:
    """A rate as people write it: "0.4", "25", "3,654"."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def job_name(what: str, processes: Processes) -> str:
    """The name of a job for `Progress`. If several processes share the job, it says which one this is."""
    return what if processes.size == 1 else f"{what} (process {processes.rank} of {processes.size})"
