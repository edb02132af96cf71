"""Arguments that several commands share, and the loop over a model's variants."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from universal_gcl.evaluation.session import Session

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a GCL checkpoint or any dual encoder.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per forward pass.")]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Use only the first N queries, to try a command. The result is marked as a smoke run."),
]
TruncateDim = Annotated[
    int | None, typer.Option(help="Cut embeddings to N dimensions. Use it with models trained with matryoshka_dims.")
]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        help="plain, centring (GR-CLIP), a fusion rule (sum, normalized_sum, native), or a rule with centring, such as "
        "sum+centring. Repeat the option to measure several variants; each then gets its own folder.",
    ),
]
CentreOn = Annotated[
    str | None,
    typer.Option(
        help="Captioned images that centring computes the modality means from. Don't use the test pairs. Default: the "
        "means that the checkpoint stores."
    ),
]
SkipUnreadable = Annotated[
    bool,
    typer.Option("--skip-unreadable", help="Leave out images and videos that can't be read; the result names them."),
]
Out = Annotated[
    Path,
    typer.Option(
        help="Folder for embeddings, runs and results.json. After an interruption, run the same command again to "
        "continue."
    ),
]


def listed(names: str) -> list[str]:
    """The names in an option that takes several, separated by commas; each once.

    Raises:
        ValueError: there is no name.
    """
    found = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not found:
        raise ValueError(f"{names!r} names nothing: give one name or more, separated by commas")
    return found


def pinned(hub: str) -> tuple[str, str | None]:
    """Hub id and commit of `ID@COMMIT`; the commit is None for a bare id."""
    name, _, commit = hub.partition("@")
    return name, commit or None


def sessions(model: str, out: Path | None, variants: list[str] | None, **options: Any) -> Iterator["Session"]:
    """A `Session` for each variant, one after the other.

    Args:
        out: folder of the session; with several variants, each has the folder OUT/VARIANT.
        options: keyword arguments of `Session`. Only the variants that centre get `centre_on`.

    Raises:
        ValueError: a variant is repeated or unknown, or needs an option that is absent; or `centre_on` is given without
            a variant that centres.
    """
    from universal_gcl.evaluation.session import Session, parse_variant

    variants = variants or ["plain"]
    if len(set(variants)) < len(variants):
        raise ValueError(f"--variant is given twice: {', '.join(variants)}")
    centred = [parse_variant(variant)[1] for variant in variants]  # checks all of them before the first is measured
    centre_on = options.pop("centre_on", None)
    if centre_on is not None and not any(centred):
        raise ValueError("--centre-on is for --variant centring, which is not among the variants")
    for variant, is_centred in zip(variants, centred, strict=True):
        folder = out / variant if out is not None and len(variants) > 1 else out
        yield Session(model, folder, variant=variant, centre_on=centre_on if is_centred else None, **options)


def measure_variants(
    protocol: str,
    model: str,
    out: Path,
    variants: list[str] | None,
    measure: Callable[["Session"], dict | None],
    settings: dict,
    **options: Any,
) -> None:
    """Measure a benchmark in each variant of a model; print and write each result, and compare several.

    Args:
        protocol: the benchmark's name.
        out, options: as for `sessions`.
        measure: session → the result on process 0, None on the others.
        settings: the settings of the benchmark. They are written to `results.json` together with those of the session.

    Each run's folder gets `results.json` and its tables in `table.md`; with several variants, `out` gets the
    comparison.
    """
    from universal_gcl.evaluation.commands.compare import compare_variants
    from universal_gcl.evaluation.protocols import protocol_of, read_run

    result = None
    for session in sessions(model, out, variants, **options):
        result = measure(session)
        if result is None:
            continue
        written = session.write(protocol, settings, result)
        run = read_run(written)
        tables = {markdown: "\n\n".join(protocol_of(run).tables(run, markdown=markdown)) for markdown in (False, True)}
        (written.parent / "table.md").write_text(tables[True] + "\n", encoding="utf-8")
        typer.echo(f"{run['variant']}:\n{tables[False]}\nwritten to {written}")
    if result is not None:
        compare_variants(out, variants)
