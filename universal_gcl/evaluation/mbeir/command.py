"""`gcl evaluate mbeir`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    measure_variants,
)

if TYPE_CHECKING:
    from universal_gcl.evaluation.session import Session


class Scope(StrEnum):
    LOCAL = "local"
    GLOBAL = "global"


def mbeir(
    model: Model,
    out: Out,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder with TIGER-Lab/M-BEIR and its images unpacked, or with mbeir_TASK/*.parquet."),
    ] = None,
    hub: Annotated[
        str | None, typer.Option(help="Instead of --root: owner of the data sets mbeir_TASK on the Hub, e.g. MRBench.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Names separated by commas, e.g. cirr_task7,nights_task4. Default: your own tasks if ROOT has any, "
            "else M-BEIR's 16."
        ),
    ] = None,
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="local or global; both by default. The global pool joins the pools of all 16 tasks."),
    ] = None,
    instructions: Annotated[
        bool,
        typer.Option("--instructions", help="Put prompts before queries, as UniIR's models need; the paper uses none."),
    ] = False,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    variant: Variants = None,
    centre_on: CentreOn = None,
    truncate_dim: TruncateDim = None,
    revision: Revision = None,
    skip_unreadable: SkipUnreadable = False,
) -> None:
    """M-BEIR: 16 tasks on local pools and the global pool, with the paper's figures."""
    from universal_gcl.evaluation.mbeir.measure import evaluate_mbeir, open_source, read_mbeir
    from universal_gcl.evaluation.mbeir.tasks import choose_tasks

    scopes = [str(name) for name in Scope if not scope or name in scope]
    source = open_source(root, hub)
    chosen = choose_tasks(None if tasks is None else listed(tasks), *source.present())
    benchmark = read_mbeir(source, chosen, scopes=scopes, limit=limit, instructions=instructions)
    settings = {"tasks": [task.name for task in chosen], "scopes": scopes, "instructions": instructions}

    def measure(session: "Session") -> dict | None:
        return evaluate_mbeir(
            benchmark,
            chosen,
            session.embed,
            session.folder,
            scopes=scopes,
            skip_unreadable=skip_unreadable,
            limit=limit,
            device=str(session.device),
        )

    measure_variants(
        "mbeir",
        model,
        out,
        variant,
        measure,
        settings | {"limit": limit} | source.settings,
        batch_size=batch_size,
        truncate_dim=truncate_dim,
        centre_on=centre_on,
        revision=revision,
        skip_unreadable=skip_unreadable,
    )
