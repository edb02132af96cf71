"""`gcl evaluate pairs` and `gcl evaluate summary`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from universal_gcl.evaluation.commands.options import (
    BatchSize,
    CentreOn,
    Model,
    Revision,
    TruncateDim,
    Variants,
    sessions,
)


def pairs(
    model: Model,
    data: Annotated[str, typer.Argument(help="Folder, .parquet, .jsonl, .csv, or Hub id of captioned images.")],
    out: Annotated[Path | None, typer.Option(help="Folder for results.json, embeddings and pictures.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set on the Hub.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N pairs.")] = None,
    batch_size: BatchSize = 64,
    seed: Annotated[int, typer.Option(help="Seed that draws the modality of each item in mixed search.")] = 0,
    variant: Variants = None,
    centre_on: CentreOn = None,
    truncate_dim: TruncateDim = None,
    revision: Revision = None,
) -> None:
    """Nine-way retrieval, mixed-modality search and modality gap on image-caption pairs."""
    from universal_gcl.evaluation.environment import collect_environment, command_line
    from universal_gcl.evaluation.pairs.measure import embed_pairs, evaluate_embeddings
    from universal_gcl.evaluation.pairs.plots import modality_pca, nine_way_heatmap
    from universal_gcl.evaluation.pairs.report import nine_way_markdown, nine_way_table
    from universal_gcl.evaluation.pairs.result_sheet import result_sheet
    from universal_gcl.retrieval.fingerprint import model_fingerprint
    from universal_gcl.retrieval.store import write_json
    from universal_gcl.sources.arguments import SourceArguments
    from universal_gcl.sources.pairs import load_pairs

    options = {"batch_size": batch_size, "truncate_dim": truncate_dim, "centre_on": centre_on, "revision": revision}
    found = load_pairs(SourceArguments(data, split=split, limit=limit))
    results = {}
    for session in sessions(model, out, variant, **options):
        trained = session.model.config.matryoshka_dims or [session.model.config.projection_dim]
        if truncate_dim is not None and truncate_dim not in trained:
            typer.echo(
                f"warning: {model} was trained for {trained} dimensions, not to be cut to {truncate_dim}", err=True
            )
        embeddings = embed_pairs(
            session.model,
            session.processor,
            found,
            batch_size=batch_size,
            show_progress=sys.stderr.isatty(),
            truncate_dim=truncate_dim,
        )
        results[session.settings["variant"]] = result = evaluate_embeddings(embeddings, seed=seed)
        if variant is not None:
            typer.echo(f"{session.settings['variant']}:")
        typer.echo(nine_way_table(result))
        if session.out is None:
            continue
        session.out.mkdir(parents=True, exist_ok=True)
        settings = session.settings | {"data": data, "split": split, "limit": limit, "seed": seed}
        settings["fingerprint"] = model_fingerprint(session.model, session.processor)
        written = {"command": command_line(), **settings, "environment": collect_environment(), "after": result}
        write_json(session.out / "results.json", written)
        embeddings.save(session.out / "embeddings.safetensors")
        nine_way_heatmap(result, None, session.out / "nine_way.png")
        modality_pca(embeddings, None, session.out / "modality_pca.png")
        result_sheet(found, embeddings, None, session.out / "result_sheet.png")
        typer.echo(f"written to {session.out}")
    if len(results) > 1:
        typer.echo(nine_way_markdown(results))


def summary(
    runs: Annotated[
        list[str], typer.Argument(help="NAME=FILE for each results.json; repeat a NAME for several seeds.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for summary.json, summary.md and summary.png.")],
) -> None:
    """Mean and standard deviation over seeds, as a table with one line for each name and as a picture."""
    from universal_gcl.evaluation.pairs.summary import summarize

    named: dict[str, list[Path]] = {}
    for run in runs:
        name, _, path = run.rpartition("=")
        if not name or not Path(path).is_file():
            raise typer.BadParameter(f"{run!r} is not NAME=FILE with an existing results.json")
        named.setdefault(name, []).append(Path(path))
    typer.echo(summarize(named, out))
