"""`gcl evaluate mixbench`."""

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


def mixbench(
    model: Model,
    out: Out,
    root: Annotated[Path | None, typer.Option(help="Folder with a folder for each subset, as published.")] = None,
    hub: Annotated[
        str | None,
        typer.Option(help="Or mixed-modality-search/MixBench25 or MixBench2026; @COMMIT behind it pins it."),
    ] = None,
    qrels: Annotated[
        Path | None, typer.Option(help="Folder as ROOT that holds the qrels, which MixBench2026 lacks.")
    ] = None,
    subsets: Annotated[str | None, typer.Option(help="Names with commas between. Default: all that are there.")] = None,
    variant: Variants = None,
    centre_on: CentreOn = None,
    revision: Revision = None,
    batch_size: BatchSize = 64,
    truncate_dim: TruncateDim = None,
    limit: Limit = None,
    skip_unreadable: SkipUnreadable = False,
):
    """MixBench: each item once, as image, text or both; nDCG@10. GR-CLIP is --variant normalized_sum+centring."""
    from universal_gcl.evaluation.mixbench.data import PUBLISHED, download_mixbench, find_subsets, read_subset
    from universal_gcl.evaluation.mixbench.measure import evaluate_mixbench, mixbench_table

    if (root is None) == (hub is None):
        raise ValueError("give either --root or --hub")
    names, hub_qrels = None if subsets is None else listed(subsets), None
    if hub is not None:
        hub, _, pinned = hub.partition("@")
        root, hub_qrels = download_mixbench(hub, names or list(PUBLISHED), pinned or None)
    names = names or find_subsets(root)
    qrels_root = qrels or hub_qrels
    found = [read_subset(root, name, qrels_root=qrels_root, check_counts=limit is None) for name in names]
    data = {
        "root": None if hub else str(root),
        "hub": hub,
        "hub_commit": root.name if hub else None,
        "qrels": str(qrels) if qrels else None,
        "qrels_commit": hub_qrels.name if hub_qrels and not qrels else None,
        "subsets": names,
        "limit": limit,
    }
    options = {"revision": revision, "batch_size": batch_size, "truncate_dim": truncate_dim}
    options |= {"centre_on": centre_on, "skip_unreadable": skip_unreadable}
    for session in sessions(model, out, variant, **options):
        result = evaluate_mixbench(found, session.embed, session.out, limit=limit, device=str(session.device))
        if result is None:
            continue
        typer.echo(f"{session.settings['variant']}:")
        typer.echo(mixbench_table(result["subsets"]))
        typer.echo(f"written to {session.write('mixbench', data, result)}")
    if result is not None:
        compare_variants(out, variant)
