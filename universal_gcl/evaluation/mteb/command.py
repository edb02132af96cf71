"""`gcl evaluate mteb`."""

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


def mteb(
    model: Model,
    tasks: Annotated[
        list[str],
        typer.Option(help="A task or benchmark of mteb, e.g. CIRRIT2IRetrieval or MIEB(lite). Repeat it for several."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for mteb's results and results.json. After an interruption, run the same command again to "
            "continue."
        ),
    ],
    instructions: Annotated[bool, typer.Option("--instructions", help="Put mteb's prompts before queries.")] = False,
    variant: Variants = None,
    centre_on: CentreOn = None,
    revision: Revision = None,
    batch_size: BatchSize = 64,
    truncate_dim: TruncateDim = None,
) -> None:
    """MIEB, and the other tasks of mteb with texts and images."""
    try:
        import mteb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; install it with pip install 'universal-gcl[mteb]'") from error

    from universal_gcl.evaluation.mteb.model import GCLEncoder
    from universal_gcl.evaluation.mteb.tasks import measure_tasks, select_tasks, tasks_table

    selected = select_tasks(tasks)
    for session in sessions(
        model, out, variant, revision=revision, batch_size=batch_size, truncate_dim=truncate_dim, centre_on=centre_on
    ):
        if session.processes.size > 1:
            raise ValueError("mteb runs in one process: start this command without a launcher")
        settings = {name: session.settings[name] for name in ("variant", "centre_on")}
        encoder = GCLEncoder(
            session.model,
            session.processor,
            model,
            instructions=instructions,
            truncate_dim=truncate_dim,
            settings={name: value for name, value in settings.items() if value not in (None, "plain")},
        )
        results = measure_tasks(
            encoder, selected, session.folder, batch_size=batch_size, show_progress=sys.stderr.isatty()
        )
        if variant is not None:
            typer.echo(f"{session.settings['variant']}:")
        typer.echo(tasks_table(results))
        run = {"tasks": tasks, "instructions": instructions, "mteb": mteb.__version__}
        typer.echo(f"written to {session.write('mteb', run, results)}")
