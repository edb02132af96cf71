"""`gcl evaluate covr`."""

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
    measure_variants,
)

if TYPE_CHECKING:
    from universal_gcl.evaluation.session import Session


def covr(
    model: Model,
    csv: Annotated[Path, typer.Option(help="The test file, webvid8m-covr_test.csv.")],
    out: Out,
    videos: Annotated[
        Path | None, typer.Option(help="Folder with <folder>/<id>.mp4. The frames are extracted to OUT/frames once.")
    ] = None,
    frames: Annotated[
        Path | None,
        typer.Option(help="Instead of --videos: a folder with images <folder>/<id>/*, or OUT/frames of another run."),
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
) -> None:
    """WebVid-CoVR: a frame and a text that changes it search for a video; R@1, 5, 10, 50 and the paper's figures."""
    from universal_gcl.evaluation.covr.frames import Frames, Videos
    from universal_gcl.evaluation.covr.measure import evaluate_covr
    from universal_gcl.evaluation.covr.triplets import read_triplets

    if videos is not None and frames is None:
        source: Videos | Frames = Videos(videos)
    elif frames is not None and videos is None:
        source = Frames(frames)
    else:
        raise ValueError("give either --videos or --frames")
    triplets = read_triplets(csv, limit)

    def measure(session: "Session") -> dict | None:
        return evaluate_covr(
            triplets,
            source,
            session.embed,
            session.folder,
            frames_folder=out / "frames",
            squash=squash,
            skip_unreadable=skip_unreadable,
            show_progress=True,
        )

    measure_variants(
        "covr",
        model,
        out,
        variant,
        measure,
        {"csv": str(csv), "limit": limit},
        batch_size=batch_size,
        truncate_dim=truncate_dim,
        centre_on=centre_on,
        revision=revision,
        skip_unreadable=skip_unreadable,
    )
