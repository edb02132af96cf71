"""`gcl convert`: other checkpoints into folders that GCL starts from, test data into M-BEIR's layout, and models into
other formats."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, help="Turn checkpoints and test data into folders that GCL reads, and models into others."
)


@app.command("towers")
def towers(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    projection_dim: Annotated[
        int | None, typer.Option(help="Width of the common space.", show_default="256; with --vista MiniLM's 384")
    ] = None,
    image_size: Annotated[int, typer.Option(help="Side of the square input in pixels, a multiple of 32.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the new projections.")] = 0,
    vista: Annotated[bool, typer.Option("--vista", help="Join them as VISTA does.")] = False,
):
    """MiniLM-L6 and EfficientNet-Lite0 from their PyPI packages as one VisionTextDualEncoder folder."""
    from universal_gcl.conversion.towers import convert_towers, convert_towers_to_vista

    if vista and projection_dim is not None:
        raise ValueError("--projection-dim is not for --vista, whose common space is MiniLM's own, 384 wide")
    if vista:
        typer.echo(convert_towers_to_vista(out, image_size=image_size, seed=seed))
    else:
        width = 256 if projection_dim is None else projection_dim
        typer.echo(convert_towers(out, projection_dim=width, image_size=image_size, seed=seed))


@app.command("centring")
def centring(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a GCL checkpoint or any dual encoder.")],
    data: Annotated[str, typer.Argument(help="Captioned images for calibration, never those that are searched.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; absent or empty.")],
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Only the first pairs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows embedded at once.")] = 64,
):
    """The same model with its modality means stored: AutoModel.from_pretrained(OUT, centring=True) subtracts them."""

    from modeling_gcl import GCLModel, GCLProcessor
    from universal_gcl.evaluation.centring import estimate_modality_means
    from universal_gcl.publishing.hub_folder import base_model_ids, read_facts, write_conversion
    from universal_gcl.publishing.model_folder import save_model_folder
    from universal_gcl.publishing.shown_paths import shown_name
    from universal_gcl.retrieval.new_folder import check_is_new, new_folder
    from universal_gcl.retrieval.processes import own_device
    from universal_gcl.sources.arguments import SourceArguments
    from universal_gcl.sources.pairs import load_pairs

    check_is_new(out)
    encoder, processor = GCLModel.from_encoder(model).eval(), GCLProcessor.from_encoder(model)
    encoder.to(own_device())
    pairs = load_pairs(SourceArguments(data, split=split, limit=limit))
    estimate_modality_means(encoder, processor, pairs, batch_size=batch_size, show_progress=sys.stderr.isatty())
    done = (
        f"Its weights are unchanged; the modality means of {len(pairs):,} pairs of {shown_name(data)} lie "
        "beside them, and `AutoModel.from_pretrained(..., centring=True)` subtracts them (GR-CLIP, arXiv 2507.19054)."
    )
    origin = {"base_model": shown_name(model), "base_model_ids": base_model_ids(model)}
    if (Path(model) / "card.json").is_file():
        told = read_facts(Path(model))
        origin |= {"licence": told.licence, "licence_note": told.licence_note}
    with new_folder(out) as folder:
        save_model_folder(folder, encoder, processor)
        write_conversion(folder, out=out, model=encoder, processor=processor, conversion=done, **origin)
    typer.echo(out)


@app.command("open-clip")
def open_clip(
    file: Annotated[Path, typer.Argument(help="State dict of open_clip or TinyCLIP: .pt, .pth, .bin, .safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; absent or empty.")],
    tokenizer: Annotated[
        str, typer.Option(help="Folder or Hub id of CLIP's tokenizer.")
    ] = "openai/clip-vit-base-patch32",
    config: Annotated[Path | None, typer.Option(help="The model's open_clip_config.json.")] = None,
    quick_gelu: Annotated[
        bool | None, typer.Option("--quick-gelu/--gelu", help="Activation, where no config tells it.")
    ] = None,
):
    """An open_clip or TinyCLIP checkpoint as a folder of transformers' CLIPModel."""
    from universal_gcl.conversion.open_clip import convert_open_clip

    converted = convert_open_clip(file, out, tokenizer=tokenizer, config=config, quick_gelu=quick_gelu)
    for note in converted.notes:
        typer.echo(note)
    typer.echo(converted.folder)


@app.command("vista")
def vista(
    file: Annotated[Path, typer.Argument(help="Visualized_base_en_v1.5.pth, Visualized_m3.pth, or one trained so.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; absent or empty.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id; by default BAAI/bge-base-en-v1.5 or BAAI/bge-m3, by variant.")
    ] = None,
):
    """VISTA's (Visualized BGE's) own checkpoint as a GCL folder."""
    from universal_gcl.conversion.vista import convert_vista

    typer.echo(convert_vista(file, out, tokenizer=tokenizer))


@app.command("mbeir")
def mbeir(
    data: Annotated[str, typer.Argument(help="Folder, .parquet, .jsonl, .csv, or Hub id of captioned images.")],
    root: Annotated[Path, typer.Argument(help="Folder to write into; may hold other data sets in M-BEIR's layout.")],
    name: Annotated[str, typer.Option(help="Of the data set; its tests are NAME_task0 and so on.")],
    dataset_id: Annotated[int, typer.Option(help="Its number in all ids; M-BEIR's own have 0 to 9.")],
    composed: Annotated[
        Path | None,
        typer.Option(help='.jsonl of {"ref": id, "text": "…", "targets": \\[ids]}: image + text queries for images.'),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "test",
):
    """Captioned images as tests t→i, t→t, t→it, i→t and it→t, or with --composed it→i, for gcl evaluate mbeir."""
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
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a GCL checkpoint on a CLIP.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; absent or empty.")],
    revision: Annotated[str | None, typer.Option(help="Revision on the Hub.")] = None,
):
    """A GCL-tuned CLIP as a folder of transformers' CLIPModel, for every tool that takes CLIP."""
    from universal_gcl.conversion.to_clip import convert_to_clip

    typer.echo(convert_to_clip(model, out, revision=revision))


@app.command("merge")
def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter that training saved: MODEL/adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; absent or empty.")],
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub id of its base.", show_default="the one that the adapter names")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a base on the Hub.")] = None,
):
    """A LoRA adapter and its base as one model."""
    from universal_gcl.publishing.adapter import merge_adapter

    typer.echo(merge_adapter(adapter, out, base=base, revision=revision))


@app.command("onnx")
def onnx(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a GCL checkpoint or any dual encoder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; absent or empty.")],
    revision: Annotated[str | None, typer.Option(help="Revision on the Hub.")] = None,
):
    """image.onnx, text.onnx and fused.onnx for onnxruntime, each compared with the model, and the processor."""
    from universal_gcl.conversion.onnx_graphs import convert_to_onnx

    typer.echo(convert_to_onnx(model, out, revision=revision))
