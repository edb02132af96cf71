"""`gcl evaluate compare`, and the comparison that a command prints after several variants."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Folders or results.json of two or more runs of one benchmark. NAME=RUN gives a run a name. Each "
            "figure of the other runs comes with its difference to the first run's."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for compare.md and pictures.")] = None,
    labels: Annotated[tuple[str, str] | None, typer.Option(help="Names for exactly two runs.")] = None,
) -> None:
    """Show runs of one benchmark side by side: a table, bars by direction and the ranks of the positives."""
    _show(_named(runs, labels), out)


def compare_variants(out: Path, variants: Sequence[str] | None) -> None:
    """Compare the runs OUT/VARIANT, if there are several. Process 0 calls this at the end of a benchmark's command."""
    if variants is not None and len(variants) > 1:
        _show({variant: out / variant for variant in variants}, out)


def _named(runs: Sequence[str], labels: tuple[str, str] | None) -> dict[str, Path]:
    """name → folder or file of each run."""
    if labels is not None:
        if len(runs) != 2:
            raise typer.BadParameter(f"--labels names two runs, but there are {len(runs)}: write NAME=RUN instead")
        pairs = list(zip(labels, runs))
    else:
        unnamed = dict(zip(runs, ("before", "after"))) if len(runs) == 2 else {}
        pairs = []
        for run in runs:
            name, _, path = ("", "", run) if Path(run).exists() else run.rpartition("=")
            pairs.append((name or unnamed.get(run) or Path(path).name, path))
    named = {name: Path(path) for name, path in pairs}
    for place in named.values():
        if not place.exists():
            raise typer.BadParameter(f"{place} is neither a folder nor a results.json")
    if len(named) < 2 or len(named) < len(runs):
        raise typer.BadParameter("name two runs or more, each with a different name: NAME=RUN")
    return named


def _show(named: Mapping[str, Path], out: Path | None) -> None:
    """Print the comparison of runs, and write it with its pictures into `out` if there is one."""
    from universal_gcl.evaluation.protocols import read_runs, results_file

    protocol, runs = read_runs(named)
    typer.echo(protocol.comparison(runs))
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.md").write_text(protocol.comparison(runs, markdown=True) + "\n", encoding="utf-8")
    folders = {name: results_file(path).parent for name, path in named.items()}
    for message in protocol.draw_comparison(runs, folders, out):
        typer.echo(message, err=True)
    typer.echo(f"written to {out}")
