"""Universal multimodal retrieval with GCL: train, evaluate, search, convert checkpoints, push to the Hub."""

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from universal_gcl.application.commands import demo, space
from universal_gcl.conversion.commands import app as convert
from universal_gcl.evaluation.commands.app import app as evaluate
from universal_gcl.publishing.commands import card, push
from universal_gcl.retrieval.commands import embed, search

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def print_version(wanted: bool) -> None:
    """Print the installed version and exit, if `--version` was given."""
    if wanted:
        from importlib.metadata import version

        typer.echo(f"gcl {version('universal-gcl')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of `gcl` itself."""


# the recipe's own options and --help are parsed and printed by universal_gcl.training.recipe
@app.command(
    "train",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="RECIPE [--key value ...]",
)
def train(context: typer.Context) -> None:
    """Train from a recipe, in one process. `gcl train --help` lists every key."""
    from universal_gcl.quiet import quiet_imports

    quiet_imports()
    from universal_gcl.train import main

    main(context.args)


def quietly(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same command, without the progress bars and warnings of other libraries."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        from universal_gcl.quiet import quiet_libraries

        quiet_libraries()
        return command(*arguments, **options)

    return run


for group in (evaluate, convert):
    for entry in group.registered_commands:
        assert entry.callback is not None
        entry.callback = quietly(entry.callback)
app.command("embed")(quietly(embed))
app.command("search")(search)
app.command("demo")(quietly(demo))
app.add_typer(evaluate, name="evaluate")
convert.command("space")(quietly(space))
app.add_typer(convert, name="convert")
app.command("card")(card)
app.command("push")(push)


def main() -> None:
    """The console script. An error that the user can mend is printed as one line, without a traceback.

    In a launch of several processes, an error in one of them ends all processes. If the reader of a pipe leaves early,
    as in `gcl train --help | head`, the command ends without a message.
    """
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # if the reader is gone, raise here and not when Python shuts down
    except Exception as error:
        from safetensors import SafetensorError

        from universal_gcl.failures import failing_together, stop

        if isinstance(error, (ValueError, OSError, ModuleNotFoundError, FloatingPointError, SafetensorError)):
            stop(error)
        with failing_together():
            raise


if __name__ == "__main__":
    main()
