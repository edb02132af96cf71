"""`gcl evaluate`: each protocol is a command."""

import typer

from evaluation.commands.mixbench import mixbench
from evaluation.commands.pairs import compare, pairs, summary

app = typer.Typer(no_args_is_help=True, help="Measure models by a protocol.")
app.command("pairs")(pairs)
app.command("compare")(compare)
app.command("summary")(summary)
app.command("mixbench")(mixbench)
