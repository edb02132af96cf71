"""`gcl evaluate mmeb`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from universal_gcl.evaluation.commands.options import (
    BatchSize,
    CentreOn,
    Limit,
    Model,
    Out,
    Revision,
    SkipUnreadable,
    TruncateDim,
    Variants,
    listed,
    measure_variants,
    pinned,
)

if TYPE_CHECKING:
    from universal_gcl.evaluation.session import Session


def mmeb(
    model: Model,
    out: Out,
    root: Annotated[Path | None, typer.Option(help="Folder with SET/test-*.parquet, as on the Hub.")] = None,
    hub: Annotated[
        str | None,
        typer.Option(
            help="Instead of --root: TIGER-Lab/MMEB-eval or ziyjiang/MMEB_Test_Instruct; ID@COMMIT pins a commit."
        ),
    ] = None,
    image_root: Annotated[
        Path | None,
        typer.Option(help="Folder or .zip file with the images. Default: images.zip or folders in the root."),
    ] = None,
    subsets: Annotated[str, typer.Option(help="paper (12 sets), all (36), or names separated by commas.")] = "paper",
    version: Annotated[int, typer.Option(min=1, max=2, help="Version of MMEB; the paper measured 1.")] = 1,
    instructions: Annotated[
        bool, typer.Option(help="Embed the instructions. Only version 2 can leave them out.")
    ] = True,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    variant: Variants = None,
    centre_on: CentreOn = None,
    truncate_dim: TruncateDim = None,
    revision: Revision = None,
    skip_unreadable: SkipUnreadable = False,
) -> None:
    """MMEB's image sets: precision@1 of each query among its own candidates."""
    from universal_gcl.evaluation.mmeb.data import download_mmeb
    from universal_gcl.evaluation.mmeb.measure import evaluate_mmeb
    from universal_gcl.evaluation.mmeb.sets import chosen_sets

    sets = chosen_sets(listed(subsets))
    if hub is not None and root is None:
        name, commit = pinned(hub)
        folder = download_mmeb(name, sets, revision=commit, images=image_root is None and version == 1)
        data: dict = {"root": None, "hub": hub, "hub_commit": folder.name}  # the cache's folders are named by commit
    elif root is not None and hub is None:
        folder, data = root, {"root": str(root), "hub": None, "hub_commit": None}
    else:
        raise ValueError("give either --root or --hub")
    data |= {"image_root": None if image_root is None else str(image_root), "subsets": sets}

    def measure(session: "Session") -> dict | None:
        return evaluate_mmeb(
            folder,
            session.embed,
            session.folder,
            sets=sets,
            version=version,
            image_root=image_root,
            instructions=instructions,
            limit=limit,
        )

    measure_variants(
        "mmeb",
        model,
        out,
        variant,
        measure,
        {"version": version, "instructions": instructions, "limit": limit} | data,
        batch_size=batch_size,
        truncate_dim=truncate_dim,
        centre_on=centre_on,
        revision=revision,
        skip_unreadable=skip_unreadable,
    )
