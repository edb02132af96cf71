"""`gcl convert`: other checkpoints into folders that GCL starts from, own test data into M-BEIR's layout, models into
other forms and a Space. `gcl card`: a folder's model card anew. `gcl push`: a folder onto the Hub."""

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
    from publishing.towers import convert_towers, convert_towers_to_vista

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

    from evaluation.centring import estimate_modality_means
    from modeling_gcl import GCLModel, GCLProcessor
    from publishing.hub_folder import base_model_ids, read_facts, write_conversion
    from publishing.model_folder import save_model_folder
    from publishing.new_folder import check_is_new, new_folder
    from publishing.shown_paths import shown_name
    from retrieval.processes import own_device
    from retrieval.source_arguments import SourceArguments
    from retrieval.sources import load_pairs

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
    from publishing.open_clip import convert_open_clip

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
    from publishing.vista import convert_vista

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
    from publishing.mbeir_folder import write_composed, write_pairs
    from retrieval.source_arguments import SourceArguments
    from retrieval.sources import load_pairs

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
    from publishing.to_clip import convert_to_clip

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
    from publishing.adapter import merge_adapter

    typer.echo(merge_adapter(adapter, out, base=base, revision=revision))


@app.command("onnx")
def onnx(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a GCL checkpoint or any dual encoder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; absent or empty.")],
    revision: Annotated[str | None, typer.Option(help="Revision on the Hub.")] = None,
):
    """image.onnx, text.onnx and fused.onnx for onnxruntime, each compared with the model, and the processor."""
    from publishing.onnx_graphs import convert_to_onnx

    typer.echo(convert_to_onnx(model, out, revision=revision))


@app.command("space")
def space(
    model: Annotated[str, typer.Argument(help="Hub id of a GCL checkpoint.")],
    data: Annotated[str, typer.Argument(help="Captioned images that may be published: folder, file, or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; absent or empty.")],
    base: Annotated[str | None, typer.Option(help="Hub id of another model to compare.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Only the first pairs.")] = 1000,
    image_root: Annotated[
        str | None, typer.Option(help="Folder that image paths are relative to. By default that of DATA.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows embedded at once.")] = 64,
    title: Annotated[str, typer.Option(help="Of the Space.")] = "GCL search",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="That of BASE.")] = None,
):
    """The page of gcl demo as a Gradio Space, with its gallery and embeddings in it; hf upload pushes it."""
    from retrieval.source_arguments import SourceArguments
    from retrieval.sources import load_pairs

    try:
        from publishing.space import write_space
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: pip install "universal-gcl[demo]"') from error
    report = write_space(
        model,
        load_pairs(SourceArguments(data, split=split, limit=limit, image_root=image_root)),
        out,
        name=Path(data).name,
        base=base,
        revision=revision,
        base_revision=base_revision,
        title=title,
        batch_size=batch_size,
        show_progress=True,
    )
    typer.echo(report)


def card(
    folder: Annotated[Path, typer.Argument(help="Model folder that training or a converter saved.")],
    repo_id: Annotated[
        str | None, typer.Option("--id", help="ORGANISATION_OR_USER/NAME that the card's snippets load.")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="results.json of `gcl evaluate` on this model; may be given several times. Kept in FOLDER."),
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Of the weights, as the Hub spells it, such as mit or apache-2.0.")
    ] = None,
):
    """Write the model card of a folder anew, with benchmarks measured since."""
    from publishing.hub_folder import rewrite_card

    typer.echo(rewrite_card(folder, repo_id=repo_id, results=results or [], licence=licence))


def push(
    folder: Annotated[Path, typer.Argument(help="Model folder that training or a converter saved.")],
    repo_id: Annotated[str, typer.Argument(help="ORGANISATION_OR_USER/NAME; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to instead of main.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a GCL model",
    adapter_base: Annotated[
        str | None,
        typer.Option(
            help="Hub id of the base of the folder's adapter.",
            show_default="the one it names; a base that is a folder is pushed to REPO_ID-base",
        ),
    ] = None,
):
    """Push a model folder to the Hub in one commit, with the token of `hf auth login` or HF_TOKEN."""
    from publishing.push import push_folder

    options = {"private": private, "revision": revision, "message": message, "adapter_base_id": adapter_base}
    typer.echo(push_folder(folder, repo_id, **options))
