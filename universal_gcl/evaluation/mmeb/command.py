"""`gcl evaluate mmeb`."""

from pathlib import Path
from typing import Annotated

import typer

from universal_gcl.evaluation.commands.compare import compare_variants
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
    sessions,
)


def mmeb(
    model: Model,
    out: Out,
    root: Annotated[Path | None, typer.Option(help="Folder with SET/test-*.parquet, as on the Hub.")] = None,
    hub: Annotated[
        str | None, typer.Option(help="Or TIGER-Lab/MMEB-eval, ziyjiang/MMEB_Test_Instruct; @COMMIT behind it pins it.")
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder or .zip of the images. Else images.zip and folders in the root.")
    ] = None,
    subsets: Annotated[str, typer.Option(help="paper (12 sets), all (36), or names with commas between.")] = "paper",
    version: Annotated[int, typer.Option(min=1, max=2, help="Of MMEB: the paper's is 1.")] = 1,
    instructions: Annotated[bool, typer.Option(help="Version 1 can't do without.")] = True,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    variant: Variants = None,
    centre_on: CentreOn = None,
    truncate_dim: TruncateDim = None,
    revision: Revision = None,
    skip_unreadable: SkipUnreadable = False,
):
    """MMEB's image sets: precision@1 of each query among its own candidates."""
    from universal_gcl.evaluation.mmeb.data import download_mmeb
    from universal_gcl.evaluation.mmeb.measure import evaluate_mmeb
    from universal_gcl.evaluation.mmeb.report import mmeb_table
    from universal_gcl.evaluation.mmeb.sets import chosen_sets

    if (root is None) == (hub is None):
        raise ValueError("give either --root or --hub")
    sets = chosen_sets(listed(subsets))
    data = {"root": None if root is None else str(root), "hub": hub, "hub_commit": None}
    if hub is not None:
        hub, _, pinned = hub.partition("@")
        root = download_mmeb(hub, sets, revision=pinned or None, images=image_root is None and version == 1)
        data["hub_commit"] = root.name  # the cache's folders are named by commit
    data |= {"image_root": None if image_root is None else str(image_root), "subsets": sets}
    measured = {"version": version, "image_root": image_root, "instructions": instructions, "limit": limit}
    options = {"batch_size": batch_size, "truncate_dim": truncate_dim, "centre_on": centre_on, "revision": revision}
    for session in sessions(model, out, variant, skip_unreadable=skip_unreadable, **options):
        result = evaluate_mmeb(root, session.embed, session.out, sets=sets, **measured)
        if not session.is_main:
            continue
        if variant is not None:
            typer.echo(f"{session.settings['variant']}:")
        typer.echo(mmeb_table(result))
        settings = {"version": version, "instructions": instructions, "limit": limit} | data
        typer.echo(f"written to {session.write('mmeb', settings, result)}")
    if result is not None:
        compare_variants(out, variant)
