"""The `gcl` command: evaluate a model, compare runs, convert checkpoints, push to the Hub."""

import sys

import typer

from evaluation.commands.app import app as evaluate
from publishing.commands import app as convert
from publishing.commands import push

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(evaluate, name="evaluate")
app.add_typer(convert, name="convert")
app.command("push")(push)


def main():
    """The console script: errors of input are a message, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
