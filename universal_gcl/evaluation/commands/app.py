"""`gcl evaluate`: each benchmark is a subcommand."""

import typer

from universal_gcl.evaluation.commands.compare import compare
from universal_gcl.evaluation.mteb.command import mteb
from universal_gcl.evaluation.pairs.command import summary
from universal_gcl.evaluation.protocols import PROTOCOLS

app = typer.Typer(no_args_is_help=True, help="Measure models on a benchmark, and compare runs.")
for protocol in PROTOCOLS:
    app.command(protocol.name)(protocol.command)
app.command("mteb")(mteb)  # mteb keeps results in files of its own and compares them by its own tools
app.command("compare")(compare)
app.command("summary")(summary)
