"""`gcl card` rewrites the model card of a folder; `gcl push` uploads a folder to the Hub."""

from pathlib import Path
from typing import Annotated

import typer


def card(
    folder: Annotated[Path, typer.Argument(help="Model folder that training or a converter saved.")],
    repo_id: Annotated[
        str | None, typer.Option("--id", help="ORGANISATION_OR_USER/NAME on the Hub, for the card's code examples.")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="results.json of `gcl evaluate` on this model, copied to FOLDER. Repeat the option for several files."
        ),
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the weights in the Hub's spelling, such as mit or apache-2.0.")
    ] = None,
) -> None:
    """Rewrite the model card of a folder, for example with new benchmark results."""
    from universal_gcl.publishing.hub_folder import rewrite_card

    typer.echo(rewrite_card(folder, repo_id=repo_id, results=results or [], licence=licence))


def push(
    folder: Annotated[Path, typer.Argument(help="Model folder that training or a converter saved.")],
    repo_id: Annotated[str, typer.Argument(help="ORGANISATION_OR_USER/NAME; made if it doesn't exist.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to instead of main.")] = None,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload a GCL model",
    adapter_base: Annotated[
        str | None,
        typer.Option(
            help="Hub id of the base of the folder's adapter.",
            show_default="the one that the adapter names; if that is a folder, it is pushed to REPO_ID-base",
        ),
    ] = None,
) -> None:
    """Push a model folder to the Hub in one commit, with the token of `hf auth login` or HF_TOKEN."""
    from universal_gcl.publishing.push import push_folder

    url = push_folder(
        folder, repo_id, private=private, revision=revision, message=message, adapter_base_id=adapter_base
    )
    typer.echo(url)
