"""`gcl convert`: from other formats to folders that GCL reads, and from GCL models to other formats."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Convert checkpoints and test data into folders that GCL reads, and GCL models into other formats.",
)

Out = Annotated[Path, typer.Argument(help="Folder to write. It must be empty or not exist yet.")]
ModelName = Annotated[str, typer.Argument(help="Folder or Hub id of a GCL checkpoint or any dual encoder.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")]


@app.command("towers")
def towers(
    out: Out,
    projection_dim: Annotated[
        int | None, typer.Option(help="Dimension of the embeddings.", show_default="256; 384 with --vista")
    ] = None,
    image_size: Annotated[int, typer.Option(help="Side of the square input in pixels, a multiple of 32.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the new projections.")] = 0,
    vista: Annotated[bool, typer.Option("--vista", help="Join the towers as VISTA does, into a GCL folder.")] = False,
) -> None:
    """Build a small dual encoder from two PyPI packages, MiniLM-L6 and EfficientNet-Lite0; no Hub is needed."""
    from universal_gcl.conversion.towers import convert_towers, convert_towers_to_vista

    if vista and projection_dim is not None:
        raise ValueError("--projection-dim can't be used with --vista, whose embeddings have MiniLM's 384 dimensions")
    if vista:
        typer.echo(convert_towers_to_vista(out, image_size=image_size, seed=seed))
    else:
        width = 256 if projection_dim is None else projection_dim
        typer.echo(convert_towers(out, projection_dim=width, image_size=image_size, seed=seed))


@app.command("centring")
def centring(
    model: ModelName,
    data: Annotated[str, typer.Argument(help="Captioned images to average. Don't use images that you will search.")],
    out: Out,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Use only the first N pairs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows embedded at once.")] = 64,
) -> None:
    """Store a model's modality means, which AutoModel.from_pretrained(OUT, centring=True) subtracts (GR-CLIP)."""
    from universal_gcl.conversion.centring import store_modality_means

    written = store_modality_means(
        model, data, out, split=split, limit=limit, batch_size=batch_size, show_progress=sys.stderr.isatty()
    )
    typer.echo(written)


@app.command("open-clip")
def open_clip(
    file: Annotated[Path, typer.Argument(help="State dict of open_clip or TinyCLIP: .pt, .pth, .bin, .safetensors.")],
    out: Out,
    tokenizer: Annotated[
        str, typer.Option(help="Folder or Hub id of CLIP's tokenizer.")
    ] = "openai/clip-vit-base-patch32",
    config: Annotated[Path | None, typer.Option(help="The model's open_clip_config.json.")] = None,
    quick_gelu: Annotated[
        bool | None, typer.Option("--quick-gelu/--gelu", help="The model's activation; needed without --config.")
    ] = None,
) -> None:
    """Convert an open_clip or TinyCLIP checkpoint into a folder of transformers' CLIPModel."""
    from universal_gcl.conversion.open_clip import convert_open_clip

    typer.echo(convert_open_clip(file, out, tokenizer=tokenizer, config=config, quick_gelu=quick_gelu))


@app.command("vista")
def vista(
    file: Annotated[
        Path,
        typer.Argument(help="Visualized_base_en_v1.5.pth, Visualized_m3.pth, or a checkpoint fine-tuned from one."),
    ],
    out: Out,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of the text encoder's tokenizer.",
            show_default="BAAI/bge-base-en-v1.5 or BAAI/bge-m3, depending on the weights",
        ),
    ] = None,
) -> None:
    """Convert VISTA's (Visualized BGE's) own checkpoint into a GCL folder."""
    from universal_gcl.conversion.vista import convert_vista

    typer.echo(convert_vista(file, out, tokenizer=tokenizer))


@app.command("mbeir")
def mbeir(
    data: Annotated[str, typer.Argument(help="Captioned images: folder, .parquet, .jsonl, .csv, or Hub id.")],
    root: Annotated[Path, typer.Argument(help="Folder to write into. It may have other data sets in M-BEIR's layout.")],
    name: Annotated[str, typer.Option(help="Name of the data set; its tests are called NAME_task0 and so on.")],
    dataset_id: Annotated[
        int, typer.Option(help="Number of the data set in all ids, at least 10. M-BEIR's own data sets have 0 to 9.")
    ],
    composed: Annotated[
        Path | None,
        typer.Option(help='.jsonl of {"ref": id, "text": "…", "targets": \\[ids]}: image + text queries for images.'),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "test",
) -> None:
    """Write captioned images as tests for `gcl evaluate mbeir`: t→i, t→t, t→it, i→t, it→t, or it→i with --composed."""
    from universal_gcl.conversion.mbeir_folder import write_composed, write_pairs
    from universal_gcl.sources.arguments import SourceArguments
    from universal_gcl.sources.pairs import load_pairs

    pairs = load_pairs(SourceArguments(data, split=split))
    if composed is None:
        tests = write_pairs(pairs, root, name=name, dataset_id=dataset_id)
    else:
        tests = write_composed(pairs, composed, root, name=name, dataset_id=dataset_id)
    for test, queries in tests.items():
        typer.echo(f"{test}: {queries:,} queries")


@app.command("to-clip")
def to_clip(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a GCL checkpoint whose backbone is a CLIP.")],
    out: Out,
    revision: Revision = None,
) -> None:
    """Convert a GCL-tuned CLIP into a folder of transformers' CLIPModel, which all tools for CLIP can use."""
    from universal_gcl.conversion.to_clip import convert_to_clip

    typer.echo(convert_to_clip(model, out, revision=revision))


@app.command("merge")
def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter that training saved: MODEL/adapter.")],
    out: Out,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the adapter's base.", show_default="the one that the adapter names"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the base on the Hub.")] = None,
) -> None:
    """Merge a LoRA adapter and its base into one model."""
    from universal_gcl.publishing.adapter import merge_adapter

    typer.echo(merge_adapter(adapter, out, base=base, revision=revision))


@app.command("onnx")
def onnx(model: ModelName, out: Out, revision: Revision = None) -> None:
    """Export image.onnx, text.onnx, fused.onnx and the processor, and compare each graph with the model."""
    from universal_gcl.conversion.onnx_graphs import convert_to_onnx

    typer.echo(convert_to_onnx(model, out, revision=revision))
