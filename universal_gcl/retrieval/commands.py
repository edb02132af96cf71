"""`gcl embed` and `gcl search`."""

from pathlib import Path
from typing import Annotated

import typer


def embed(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a GCL checkpoint or of another dual encoder.")],
    data: Annotated[
        str,
        typer.Argument(
            help="Without --modality: a .jsonl file of rows, one object per line, with an id and any of text, image, "
            "video, instruction. With --modality: captioned images as a folder, .parquet, .jsonl, .csv, or Hub id."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder for the embeddings. After an interruption, run the same command again to continue."
        ),
    ],
    modality: Annotated[
        str | None,
        typer.Option(
            help="What to embed of captioned images: i for images (with ids like cat.jpg), t for captions (cat.jpg#0, "
            "cat.jpg#1, …), it for each caption fused with its image (cat.jpg#0+image, …)."
        ),
    ] = None,
    image_root: Annotated[
        str | None, typer.Option(help="Folder that image paths are relative to. Defaults to the folder of DATA.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N pairs or rows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of rows embedded at once.")] = 64,
    truncate_dim: Annotated[
        int | None,
        typer.Option(
            help="Shorten the embeddings to N dimensions. Use it with a model that was trained with matryoshka_dims."
        ),
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Skip images and videos that can't be read, instead of stopping.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")] = None,
) -> None:
    """Embed rows and write the embeddings to a folder that gcl search can search.

    Rows with equal contents are embedded once. The processes of accelerate launch or torchrun share the rows.
    """
    from modeling_gcl import GCLModel, GCLProcessor
    from universal_gcl.retrieval.contents import Rows
    from universal_gcl.retrieval.embed import embed_rows
    from universal_gcl.retrieval.processes import Processes, own_device
    from universal_gcl.sources.arguments import SourceArguments
    from universal_gcl.sources.pairs import load_pairs
    from universal_gcl.sources.rows import PairRows, read_rows

    if modality is None:
        if not data.endswith(".jsonl"):
            raise ValueError(f"{data} is not a .jsonl file of rows. For captioned images, set --modality to i, t or it")
        rows: Rows = read_rows(data, image_root)[:limit]
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
            f"{len(store) - skipped - vectors:,} rows share the embedding of another row, {skipped:,} were skipped"
            + (f" (for the reasons see {out / 'skipped.json'})" if skipped else "")
        )


def search(
    queries: Annotated[Path, typer.Argument(help="Folder of the embeddings of the queries, from gcl embed.")],
    pools: Annotated[
        list[Path], typer.Argument(help="Folders of the embeddings of the candidates. They are searched as one pool.")
    ],
    out: Annotated[
        Path,
        typer.Option(help="File for the result, .safetensors. Read it with `universal_gcl.retrieval.run.Run.load`."),
    ],
    k: Annotated[int, typer.Option(min=1, help="Number of candidates to find for each query.")] = 100,
    trec: Annotated[
        Path | None, typer.Option(help="Another file for the result, in the text format of trec_eval.")
    ] = None,
) -> None:
    """Find the k best candidates of each query by exact search. Candidates with equal scores are sorted by id."""
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
