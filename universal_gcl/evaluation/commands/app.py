"""`gcl evaluate`: each protocol is a command."""

import typer

from universal_gcl.evaluation.commands.compare import compare
from universal_gcl.evaluation.covr.command import covr
from universal_gcl.evaluation.mbeir.command import mbeir
from universal_gcl.evaluation.mixbench.command import mixbench
from universal_gcl.evaluation.mmeb.command import mmeb
from universal_gcl.evaluation.mteb.command import mteb
from universal_gcl.evaluation.pairs.command import pairs, summary

app = typer.Typer(no_args_is_help=True, help="Measure models by a protocol.")
app.command("pairs")(pairs)
app.command("mbeir")(mbeir)
app.command("mmeb")(mmeb)
app.command("covr")(covr)
app.command("mixbench")(mixbench)
app.command("mteb")(mteb)
app.command("compare")(compare)
app.command("summary")(summary)
