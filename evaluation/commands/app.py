"""`gcl evaluate`: each protocol is a command."""

import typer

from evaluation.commands.compare import compare
from evaluation.commands.covr import covr
from evaluation.commands.mbeir import mbeir
from evaluation.commands.mixbench import mixbench
from evaluation.commands.mmeb import mmeb
from evaluation.commands.mteb import mteb
from evaluation.commands.pairs import pairs, summary

app = typer.Typer(no_args_is_help=True, help="Measure models by a protocol.")
app.command("pairs")(pairs)
app.command("mbeir")(mbeir)
app.command("mmeb")(mmeb)
app.command("covr")(covr)
app.command("mixbench")(mixbench)
app.command("mteb")(mteb)
app.command("compare")(compare)
app.command("summary")(summary)
