"""`gcl evaluate compare`, and the comparison that a command prints after several variants."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Folders or results.json of two or more runs of one benchmark; NAME=RUN names one. The others have "
            "their difference to the first beside them."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for compare.md and pictures.")] = None,
    labels: Annotated[tuple[str, str] | None, typer.Option(help="Names of two runs.")] = None,
):
    """Runs of one benchmark, or two of `pairs`, side by side: a table, bars by direction, ranks of the positives."""
    named = _named(runs, labels)
    if _is_of_pairs(next(iter(named.values()))):
        _compare_pairs(named, out)
    else:
        _compare_benchmarks(named, out)


def compare_variants(out: Path, variants: Sequence[str] | None) -> None:
    """For the end of a benchmark's command, on process 0: compare OUT/VARIANT of each, if there are several."""
    if variants is not None and len(variants) > 1:
        _compare_benchmarks({variant: out / variant for variant in variants}, out)


def _named(runs: Sequence[str], labels: tuple[str, str] | None) -> dict[str, Path]:
    """name → folder or file of each run."""
    if labels is not None:
        if len(runs) != 2:
            raise typer.BadParameter(f"--labels names two runs, here are {len(runs)}: write NAME=RUN")
        pairs = list(zip(labels, runs))
    else:
        unnamed = dict(zip(runs, ("before", "after"))) if len(runs) == 2 else {}
        pairs = []
        for run in runs:
            name, _, path = ("", "", run) if Path(run).exists() else run.rpartition("=")
            pairs.append((name or unnamed.get(run) or Path(path).name, path))
    named = {name: Path(path) for name, path in pairs}
    for path in named.values():
        if not path.exists():
            raise typer.BadParameter(f"{path} is neither a folder nor a results.json")
    if len(named) < 2 or len(named) < len(runs):
        raise typer.BadParameter("name two runs or more, each by a name of its own: NAME=RUN")
    return named


def _is_of_pairs(path: Path) -> bool:
    file = path / "results.json" if path.is_dir() else path
    try:
        return "after" in json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); was it cut off?") from error


def _compare_pairs(named: dict[str, Path], out: Path | None) -> None:
    from universal_gcl.evaluation.pairs.plots import nine_way_heatmap
    from universal_gcl.evaluation.pairs.report import nine_way_markdown, nine_way_table
    from universal_gcl.evaluation.pairs.summary import read_result

    results = {name: read_result(path / "results.json" if path.is_dir() else path) for name, path in named.items()}
    markdown = nine_way_markdown(results)
    typer.echo(nine_way_table(*results.values()) if len(results) == 2 else markdown)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.md").write_text(markdown + "\n", encoding="utf-8")
        if len(results) == 2:
            nine_way_heatmap(*results.values(), out / "nine_way.png", labels=list(results))
        typer.echo(f"written to {out}")


def _compare_benchmarks(named: dict[str, Path], out: Path | None) -> None:
    from universal_gcl.evaluation.benchmark_plots import direction_bars, missing_records, rank_histogram
    from universal_gcl.evaluation.benchmark_report import comparison_markdown, comparison_table, ranked_tasks, read_run

    runs = {name: read_run(path) for name, path in named.items()}
    typer.echo(comparison_table(runs))
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.md").write_text(comparison_markdown(runs) + "\n", encoding="utf-8")
    direction_bars(runs, out / "directions.png")
    if ranked_tasks(next(iter(runs.values())))[1]:
        records = {name: (path if path.is_dir() else path.parent) / "records" for name, path in named.items()}
        missing = [path for name, run in runs.items() for path in missing_records(run, records[name])]
        if missing:
            typer.echo(f"no ranks.png: {len(missing)} files of records are missing, e.g. {missing[0]}", err=True)
        else:
            rank_histogram(runs, records, out / "ranks.png")
    typer.echo(f"written to {out}")
