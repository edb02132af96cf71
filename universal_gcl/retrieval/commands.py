"""`gcl embed` and `gcl search`."""

from pathlib import Path
from typing import Annotated

import typer


def embed(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a GCL checkpoint or any dual encoder.")],
    data: Annotated[
        str,
        typer.Argument(
            help="A .jsonl of rows, one object a line: id, and any of text, image, video, instruction. With --modality "
            "captioned images: folder, .parquet, .jsonl, .csv, or Hub id."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the embeddings; the same again goes on where it ended.")],
    modality: Annotated[
        str | None,
        typer.Option(
            help="Of captioned images: i, images (id cat.jpg); t, captions (cat.jpg#0, cat.jpg#1, …); it, each caption "
            "fused with its image (cat.jpg#0+image)."
        ),
    ] = None,
    image_root: Annotated[
        str | None, typer.Option(help="Folder that image paths are relative to. By default that of DATA.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pairs, or rows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows embedded at once.")] = 64,
    truncate_dim: Annotated[
        int | None, typer.Option(help="Cut embeddings to so many dimensions, as matryoshka_dims trains for.")
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Go on without images and videos that can't be read.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")] = None,
):
    """Embed rows into a folder that gcl search reads.

    Equal contents are embedded once. Under accelerate launch or torchrun the processes share the rows.
    """
    from modeling_gcl import GCLModel, GCLProcessor
    from universal_gcl.retrieval.embed import embed_rows
    from universal_gcl.retrieval.processes import Processes, own_device
    from universal_gcl.sources.arguments import SourceArguments
    from universal_gcl.sources.pairs import load_pairs
    from universal_gcl.sources.rows import PairRows, read_rows

    if modality is None:
        if not data.endswith(".jsonl"):
            raise ValueError(
                f"{data} is no .jsonl of rows: of captioned images say which --modality to embed: i, t, it"
            )
        rows = read_rows(data, image_root)[:limit]
    else:
        rows = PairRows(load_pairs(SourceArguments(data, split=split, limit=limit, image_root=image_root)), modality)
    encoder = GCLModel.from_encoder(model, revision=revision).eval()
    processor = GCLProcessor.from_encoder(model, revision=revision)
    encoder.to(own_device())
    store = embed_rows(
        encoder,
        processor,
        rows,
        out,
        batch_size=batch_size,
        truncate_dim=truncate_dim,
        on_error="skip" if skip_unreadable else "raise",
        show_progress=True,
    )
    if Processes().rank == 0:
        vectors, skipped = store.manifest["vectors"], store.manifest["skipped"]
        typer.echo(
            f"{out}: {len(store):,} rows, {vectors:,} embeddings of {store.manifest['dim']} dimensions; "
            f"{len(store) - skipped - vectors:,} rows share another's, {skipped:,} skipped"
            + (f" (why: {out / 'skipped.json'})" if skipped else "")
        )


def search(
    queries: Annotated[Path, typer.Argument(help="Embeddings of the queries, as gcl embed writes them.")],
    pools: Annotated[list[Path], typer.Argument(help="Embeddings of the candidates; several are searched as one.")],
    out: Annotated[
        Path, typer.Option(help="Result file, .safetensors. `universal_gcl.retrieval.run.Run.load` reads it.")
    ],
    k: Annotated[int, typer.Option(min=1, help="Candidates for each query.")] = 100,
    trec: Annotated[Path | None, typer.Option(help="Write the result as text for trec_eval too.")] = None,
):
    """The k best candidates of each query, exactly; equal scores by id."""
    from universal_gcl.retrieval.processes import own_device
    from universal_gcl.retrieval.run import search as search_stores
    from universal_gcl.retrieval.store import Store

    stores = [Store(folder) for folder in (queries, *pools)]
    run = search_stores(stores[0], stores[1:], k, device=str(own_device()))
    for path in filter(None, (out, trec)):
        path.parent.mkdir(parents=True, exist_ok=True)
    run.save(out)
    if trec is not None:
        run.save_trec(trec)
    missing = run.manifest["missing_queries"]
    typer.echo(
        f"{out}: the best {run.manifest['k']:,} of {sum(map(len, stores[1:])):,} rows for each of "
        f"{len(run.query_ids):,} queries" + (f"; {missing:,} queries have no embedding" if missing else "")
    )
