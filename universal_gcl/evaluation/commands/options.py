"""Arguments that several commands share, and the loop over variants."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a GCL checkpoint or any dual encoder.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows embedded at once.")]
Limit = Annotated[int | None, typer.Option(min=1, help="A smoke run on the first queries; the result says so.")]
TruncateDim = Annotated[
    int | None, typer.Option(help="Cut embeddings to so many dimensions, as matryoshka_dims trains for.")
]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        help="plain, centring (GR-CLIP), a fusion rule (sum, normalized_sum, native), or two as in sum+centring. "
        "Repeat it for several; each has a folder of its own then.",
    ),
]
CentreOn = Annotated[
    str | None,
    typer.Option(help="Pairs whose modality means centring subtracts, never the test pairs. Else the checkpoint's."),
]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Go on without images and videos that can't be read; they are named.")
]
Out = Annotated[Path, typer.Option(help="Folder for embeddings, runs and results.json; the same again goes on.")]


def listed(names: str) -> list[str]:
    """The names of an option that takes several with commas between, each once.

    Raises:
        ValueError: there is none.
    """
    found = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not found:
        raise ValueError(f"{names!r} names nothing: give one or more, with commas between")
    return found


def sessions(model: str, out: Path | None, variants: list[str] | None, **options) -> Iterator:
    """A `Session` for each variant, one after the other; `centre_on` is used by those that centre. Of several, each
    has the folder OUT/VARIANT."""
    from universal_gcl.evaluation.session import Session, parse_variant

    variants = variants or ["plain"]
    if len(set(variants)) < len(variants):
        raise ValueError(f"--variant is given twice: {', '.join(variants)}")
    centred = [parse_variant(variant)[1] for variant in variants]  # all are read before the first is measured
    centre_on = options.pop("centre_on", None)
    if centre_on is not None and not any(centred):
        raise ValueError("--centre-on is for --variant centring, which is not among the variants")
    for variant, is_centred in zip(variants, centred, strict=True):
        folder = out / variant if out is not None and len(variants) > 1 else out
        yield Session(model, folder, variant=variant, centre_on=centre_on if is_centred else None, **options)
