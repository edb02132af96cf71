"""The `gcl` command: embed, search and show, evaluate, compare, convert checkpoints, write cards, push to the Hub."""

import typer

from universal_gcl.application.commands import demo, space
from universal_gcl.conversion.commands import app as convert
from universal_gcl.evaluation.commands.app import app as evaluate
from universal_gcl.publishing.commands import card, push
from universal_gcl.retrieval.commands import embed, search

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.command("embed")(embed)
app.command("search")(search)
app.command("demo")(demo)
app.add_typer(evaluate, name="evaluate")
convert.command("space")(space)
app.add_typer(convert, name="convert")
app.command("card")(card)
app.command("push")(push)


def main() -> None:
    """The console script: errors of input are a message, not a traceback; they end all processes of a launch."""
    try:
        app()
    except Exception as error:
        from safetensors import SafetensorError

        from universal_gcl.failures import failing_together, stop

        if isinstance(error, (ValueError, OSError, ModuleNotFoundError, FloatingPointError, SafetensorError)):
            stop(error)
        with failing_together():
            raise


if __name__ == "__main__":
    main()
