"""`gcl evaluate mbeir`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from universal_gcl.evaluation.commands.compare import compare_variants
from universal_gcl.evaluation.commands.options import (
    BatchSize,
    CentreOn,
    Limit,
    Model,
    Out,
    Revision,
    SkipUnreadable,
    TruncateDim,
    Variants,
    listed,
    sessions,
)


class Scope(StrEnum):
    LOCAL = "local"
    GLOBAL = "global"


def mbeir(
    model: Model,
    out: Out,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of TIGER-Lab/M-BEIR, images unpacked, or of mbeir_TASK/*.parquet."),
    ] = None,
    hub: Annotated[str | None, typer.Option(help="Or owner of data sets mbeir_TASK on the Hub: MRBench.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Names with commas between, as cirr_task7,nights_task4. Default: your own in ROOT, or M-BEIR's 16."
        ),
    ] = None,
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="local, global; both by default. The global pool is that of all 16 tasks."),
    ] = None,
    instructions: Annotated[
        bool, typer.Option("--instructions", help="Prompts before queries, as UniIR's models need; the paper has none.")
    ] = False,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    variant: Variants = None,
    centre_on: CentreOn = None,
    truncate_dim: TruncateDim = None,
    revision: Revision = None,
    skip_unreadable: SkipUnreadable = False,
):
    """M-BEIR: 16 tasks on local pools and the global one, beside the paper's tables."""
    from universal_gcl.evaluation.mbeir.measure import evaluate_mbeir, open_source, read_mbeir
    from universal_gcl.evaluation.mbeir.report import mbeir_table
    from universal_gcl.evaluation.mbeir.tasks import choose_tasks

    scopes = [str(name) for name in Scope if not scope or name in scope]
    source = open_source(root, hub)
    chosen = choose_tasks(None if tasks is None else listed(tasks), *source.present())
    benchmark = read_mbeir(source, chosen, scopes=scopes, limit=limit, instructions=instructions)
    options = {"batch_size": batch_size, "truncate_dim": truncate_dim, "centre_on": centre_on, "revision": revision}
    measured = {"scopes": scopes, "skip_unreadable": skip_unreadable, "limit": limit}
    for session in sessions(model, out, variant, skip_unreadable=skip_unreadable, **options):
        device = str(session.device)
        result = evaluate_mbeir(benchmark, chosen, session.embed, session.out, device=device, **measured)
        if result is None:  # process 0 has it
            continue
        settings = {"tasks": [task.name for task in chosen], "scopes": scopes, "instructions": instructions}
        written = session.write("mbeir", settings | {"limit": limit} | source.settings, result)
        typer.echo(f"{session.settings['variant']}:")
        typer.echo("\n\n".join(mbeir_table(result, name) for name in scopes))
        tables = "\n\n".join(mbeir_table(result, name, markdown=True) for name in scopes)
        (session.out / "table.md").write_text(tables + "\n", encoding="utf-8")
        typer.echo(f"written to {written}")
    if result is not None:
        compare_variants(out, variant)
