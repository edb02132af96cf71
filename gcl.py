"""The `gcl` command: evaluate a model, convert checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
evaluate = typer.Typer(no_args_is_help=True, help="Measure a model by a protocol.")
convert = typer.Typer(no_args_is_help=True, help="Turn other checkpoints into folders that GCL starts from.")
app.add_typer(evaluate, name="evaluate")
app.add_typer(convert, name="convert")


@convert.command("towers")
def convert_towers_command(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    projection_dim: Annotated[int, typer.Option(help="Width of the common space.")] = 256,
    image_size: Annotated[int, typer.Option(help="Side of the square input in pixels, a multiple of 32.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the two new projections.")] = 0,
):
    """MiniLM-L6 and EfficientNet-Lite0 from their PyPI packages as one VisionTextDualEncoder folder."""
    from publishing.towers import convert_towers

    typer.echo(convert_towers(out, projection_dim=projection_dim, image_size=image_size, seed=seed))


if __name__ == "__main__":
    app()
