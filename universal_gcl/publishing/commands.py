"""`gcl card` writes the model card of a folder again; `gcl push` uploads a folder to the Hub."""

from pathlib import Path
from typing import Annotated

import typer


def card(
    folder: Annotated[Path, typer.Argument(help="Model folder that training or a converter saved.")],
    repo_id: Annotated[
        str | None, typer.Option("--id", help="ORGANISATION_OR_USER/NAME that the card's snippets load.")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="results.json of `gcl evaluate` on this model; may be given several times. Kept in FOLDER."),
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Of the weights, as the Hub spells it, such as mit or apache-2.0.")
    ] = None,
):
    """Write the model card of a folder anew, with benchmarks measured since."""
    from universal_gcl.publishing.hub_folder import rewrite_card

    typer.echo(rewrite_card(folder, repo_id=repo_id, results=results or [], licence=licence))


def push(
    folder: Annotated[Path, typer.Argument(help="Model folder that training or a converter saved.")],
    repo_id: Annotated[str, typer.Argument(help="ORGANISATION_OR_USER/NAME; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to instead of main.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a GCL model",
    adapter_base: Annotated[
        str | None,
        typer.Option(
            help="Hub id of the base of the folder's adapter.",
            show_default="the one it names; a base that is a folder is pushed to REPO_ID-base",
        ),
    ] = None,
):
    """Push a model folder to the Hub in one commit, with the token of `hf auth login` or HF_TOKEN."""
    from universal_gcl.publishing.push import push_folder

    options = {"private": private, "revision": revision, "message": message, "adapter_base_id": adapter_base}
    typer.echo(push_folder(folder, repo_id, **options))
