"""`Protocol`: everything that commands, cards and pictures know about one benchmark.

Each benchmark's folder has a `protocol.py` with its `PROTOCOL`; `evaluation.protocols` lists them. `gcl --help` imports
all of them, so their methods import what is slow to import (torch, datasets, matplotlib) when they are called.

A *run* is the dict that a command of `gcl evaluate` wrote to `results.json`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from universal_gcl.evaluation.benchmark_report import (
    Line,
    Measured,
    RankedTasks,
    comparison_markdown,
    comparison_table,
)

_SETTINGS = ("limit", "instructions", "version")  # settings that runs must share to be compared


@dataclass(frozen=True)
class HubDataset:
    """The data set of the Hub that a benchmark is, for the Hub's evaluation results (`.eval_results/*.yaml`).

    Attributes:
        id: the id of the data set, e.g. `"TIGER-Lab/M-BEIR"`.
        revision: the commit that was measured, if the run names it.
        pools: pool → suffix of its file's name. Figures of other pools are parts of these and aren't written.
        task_prefix: stands before a line's task in the data set's own name of the task.
        notes: appended to the notes of each figure.
    """

    id: str
    revision: str | None
    pools: Mapping[str, str]
    task_prefix: str = ""
    notes: str = ""


class Protocol(ABC):
    """One benchmark: its command, how its runs are read, shown and compared, and what they are called on a card.

    Attributes:
        name: the subcommand of `gcl evaluate`, the value of `"protocol"` in `results.json`, the start of file names.
        command: the function of the subcommand, with typer's annotations; a `staticmethod`.
    """

    name: str
    command: Callable[..., None]

    def holds(self, written: Mapping) -> bool:
        """Whether the content of a `results.json` is a run of this benchmark."""
        return written.get("protocol") == self.name and bool(written.get("result"))

    @abstractmethod
    def title(self, run: Mapping) -> str:
        """The heading on a model card."""

    @abstractmethod
    def tables(self, run: Mapping, *, markdown: bool) -> list[str]:
        """The result as tables, for a terminal or in markdown. The paper's figures are shown where it has them."""

    def notes(self, run: Mapping) -> list[str]:
        """Sentences that a reader of the tables on a card needs."""
        return []

    def name_parts(self, run: Mapping) -> list[str]:
        """What distinguishes the file of this run from others of the benchmark, as parts of its name."""
        return []

    def file_name(self, run: Mapping) -> str:
        """The name of a run's file on a card, without a suffix."""
        dims = [f"{run['truncate_dim']}d"] if run.get("truncate_dim") else []
        return "-".join([self.name, *self.name_parts(run), *dims])

    def figures(self, run: Mapping) -> dict[Line, float | None]:
        """The figures by which a run is judged, as rates in 0..1, without means; None for a rate without queries."""
        return {}

    def conditions(self, run: Mapping) -> dict[str, object]:
        """What was measured, by name. Runs are comparable if all of it is equal."""
        return {}

    def ranked_tasks(self, run: Mapping) -> RankedTasks | None:
        """The tasks for which the run has records of the positives' ranks; None if the benchmark keeps none."""
        return None

    def hub_dataset(self, run: Mapping) -> HubDataset | None:
        """The data set of the Hub that was measured; None if the run is of other data."""
        return None

    def measured(self, run: Mapping) -> Measured:
        """The run in the form in which runs are compared, figures in percent."""
        conditions: dict[str, object] = {name: run.get(name) for name in _SETTINGS}
        conditions |= self.conditions(run)
        skipped = run["result"].get("skipped", {})
        conditions |= {f"skipped rows of {name}": sorted(rows) for name, rows in skipped.items()}
        return Measured(
            protocol=self.name,
            figures={line: 100 * value for line, value in self.figures(run).items() if value is not None},
            conditions=conditions,
            ranked=self.ranked_tasks(run),
            limit=run.get("limit"),
            num_skipped=sum(map(len, skipped.values())),
        )

    def comparison(self, runs: Mapping[str, Mapping], *, markdown: bool = False) -> str:
        """Runs side by side, for a terminal or in markdown.

        Args:
            runs: name → run of this benchmark; two or more.

        Raises:
            ValueError: there are fewer than two runs, or they aren't comparable. The message says in what they differ.
        """
        measured = {name: self.measured(run) for name, run in runs.items()}
        return comparison_markdown(measured) if markdown else comparison_table(measured)

    def draw_comparison(self, runs: Mapping[str, Mapping], folders: Mapping[str, Path], out: Path) -> list[str]:
        """Draw runs side by side into the folder `out`.

        Args:
            runs: as for `comparison`.
            folders: name → folder of the run.

        Returns:
            one message for each picture that can't be drawn, with the reason.
        """
        from universal_gcl.evaluation.benchmark_plots import draw_comparison

        return draw_comparison({name: self.measured(run) for name, run in runs.items()}, folders, out)


def instructions_note(run: Mapping) -> str:
    """A note of benchmarks whose queries may have instructions."""
    return f"{'With' if run['instructions'] else 'Without'} instructions before queries."


def skipped_notes(run: Mapping) -> list[str]:
    """The note of benchmarks whose tables don't say how many rows were left out; empty if none were."""
    skipped = sum(map(len, run["result"].get("skipped", {}).values()))
    return [f"{skipped} rows could not be read and were left out."] if skipped else []


def slug(name: str) -> str:
    """The name as a part of a file's name or of an id: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-")
