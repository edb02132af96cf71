"""`gcl evaluate covr`."""

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
    sessions,
)


def covr(
    model: Model,
    csv: Annotated[Path, typer.Option(help="webvid8m-covr_test.csv.")],
    out: Out,
    videos: Annotated[
        Path | None, typer.Option(help="Folder of <folder>/<id>.mp4; their frames are written to OUT/frames, for once.")
    ] = None,
    frames: Annotated[
        Path | None, typer.Option(help="Instead, a folder of images <folder>/<id>/*, or OUT/frames of another run.")
    ] = None,
    squash: Annotated[
        int | None,
        typer.Option(min=1, help="Resize frames to a square of this side first, as the official transform does."),
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    variant: Variants = None,
    centre_on: CentreOn = None,
    truncate_dim: TruncateDim = None,
    revision: Revision = None,
    skip_unreadable: SkipUnreadable = False,
):
    """WebVid-CoVR: a frame and a text that changes it, to a video; R@1, 5, 10, 50 beside the paper's."""
    from universal_gcl.evaluation.covr.frames import Frames, Videos
    from universal_gcl.evaluation.covr.measure import covr_table, evaluate_covr, read_triplets

    if (videos is None) == (frames is None):
        raise ValueError("give either --videos or --frames")
    triplets = read_triplets(csv, limit)
    source = Videos(videos) if videos is not None else Frames(frames)
    options = {"batch_size": batch_size, "centre_on": centre_on, "truncate_dim": truncate_dim, "revision": revision}
    for session in sessions(model, out, variant, skip_unreadable=skip_unreadable, **options):
        result = evaluate_covr(
            triplets,
            source,
            session.embed,
            session.out,
            frames_folder=out / "frames",
            squash=squash,
            skip_unreadable=skip_unreadable,
            show_progress=True,
        )
        if result is None:  # process 0 has it
            continue
        written = session.write("covr", {"csv": str(csv), "limit": limit}, result)
        typer.echo(f"{session.settings['variant']}:\n{covr_table(result)}")
        if limit is not None:
            typer.echo(f"a smoke run on the first {limit} rows: the gallery is smaller, and recall higher")
        typer.echo(f"written to {written}")
    if result is not None:
        compare_variants(out, variant)
