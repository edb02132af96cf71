"""`gcl evaluate mixbench`."""

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


def mixbench(
    model: Model,
    out: Out,
    root: Annotated[Path | None, typer.Option(help="Folder with one folder per subset, as published.")] = None,
    hub: Annotated[
        str | None,
        typer.Option(
            help="Instead of --root: mixed-modality-search/MixBench25 or MixBench2026; ID@COMMIT pins a commit."
        ),
    ] = None,
    qrels: Annotated[
        Path | None, typer.Option(help="Folder laid out like ROOT with the qrels, which MixBench2026 lacks.")
    ] = None,
    subsets: Annotated[
        str | None, typer.Option(help="Names separated by commas. Default: all subsets in the root.")
    ] = None,
    variant: Variants = None,
    centre_on: CentreOn = None,
    revision: Revision = None,
    batch_size: BatchSize = 64,
    truncate_dim: TruncateDim = None,
    limit: Limit = None,
    skip_unreadable: SkipUnreadable = False,
) -> None:
    """MixBench: nDCG@10 on items that are images, texts or both. GR-CLIP is --variant normalized_sum+centring."""
    from universal_gcl.evaluation.mixbench.data import download_mixbench, find_subsets, read_subset
    from universal_gcl.evaluation.mixbench.measure import evaluate_mixbench
    from universal_gcl.evaluation.mixbench.subsets import PUBLISHED

    names, hub_qrels, hub_id = None if subsets is None else listed(subsets), None, None
    if hub is not None and root is None:
        hub_id, commit = pinned(hub)
        folder, hub_qrels = download_mixbench(hub_id, names or list(PUBLISHED), commit)
    elif root is not None and hub is None:
        folder = root
    else:
        raise ValueError("give either --root or --hub")
    names = names or find_subsets(folder)
    qrels_root = qrels or hub_qrels
    found = [read_subset(folder, name, qrels_root=qrels_root, check_counts=limit is None) for name in names]
    settings = {
        "root": None if hub_id else str(folder),
        "hub": hub_id,
        "hub_commit": folder.name if hub_id else None,
        "qrels": str(qrels) if qrels else None,
        "qrels_commit": hub_qrels.name if hub_qrels and not qrels else None,
        "subsets": names,
        "limit": limit,
    }

    def measure(session: "Session") -> dict | None:
        return evaluate_mixbench(found, session.embed, session.folder, limit=limit, device=str(session.device))

    measure_variants(
        "mixbench",
        model,
        out,
        variant,
        measure,
        settings,
        batch_size=batch_size,
        truncate_dim=truncate_dim,
        centre_on=centre_on,
        revision=revision,
        skip_unreadable=skip_unreadable,
    )
