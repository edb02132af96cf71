"""The `gcl` command: evaluate a model, compare runs, convert checkpoints."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
evaluate = typer.Typer(no_args_is_help=True, help="Measure models by a protocol.")
convert = typer.Typer(no_args_is_help=True, help="Turn other checkpoints into folders that GCL starts from.")
app.add_typer(evaluate, name="evaluate")
app.add_typer(convert, name="convert")


@convert.command("towers")
def convert_towers_command(
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


@convert.command("centring")
def convert_centring_command(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a GCL checkpoint or any dual encoder.")],
    data: Annotated[str, typer.Argument(help="Captioned images for calibration, never those that are searched.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; absent or empty.")],
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Only the first pairs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows embedded at once.")] = 64,
):
    """The same model with its modality means stored: AutoModel.from_pretrained(OUT, centring=True) subtracts them."""
    import torch

    from evaluation.centring import estimate_modality_means
    from modeling_gcl import GCLModel, GCLProcessor
    from publishing.new_folder import check_is_new, new_folder
    from retrieval.source_arguments import SourceArguments
    from retrieval.sources import load_pairs

    check_is_new(out)
    encoder, processor = GCLModel.from_encoder(model).eval(), GCLProcessor.from_encoder(model)
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    pairs = load_pairs(SourceArguments(data, split=split, limit=limit))
    estimate_modality_means(encoder, processor, pairs, batch_size=batch_size, show_progress=sys.stderr.isatty())
    with new_folder(out) as folder:
        processor.save_pretrained(folder)
        encoder.save_pretrained(folder)
    typer.echo(out)


@convert.command("open-clip")
def convert_open_clip_command(
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


@convert.command("vista")
def convert_vista_command(
    file: Annotated[Path, typer.Argument(help="Visualized_base_en_v1.5.pth, Visualized_m3.pth, or one trained so.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; absent or empty.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id; by default BAAI/bge-base-en-v1.5 or BAAI/bge-m3, by variant.")
    ] = None,
):
    """VISTA's (Visualized BGE's) own checkpoint as a GCL folder."""
    from publishing.vista import convert_vista

    typer.echo(convert_vista(file, out, tokenizer=tokenizer))


@evaluate.command("pairs")
def evaluate_pairs_command(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a GCL checkpoint or any dual encoder.")],
    data: Annotated[str, typer.Argument(help="Folder, .parquet, .jsonl, .csv, or Hub id of captioned images.")],
    out: Annotated[Path | None, typer.Option(help="Folder for results.json, embeddings and pictures.")] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Only the first pairs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows embedded at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of mixed-modality search.")] = 0,
    fusion: Annotated[str | None, typer.Option(help="Another fusion rule than the checkpoint's.")] = None,
    centring: Annotated[bool, typer.Option("--centring", help="GR-CLIP: subtract the checkpoint's own means.")] = False,
    centre_on: Annotated[
        str | None, typer.Option(help="GR-CLIP: subtract the modality means of these pairs (never the test pairs).")
    ] = None,
    truncate_dim: Annotated[
        int | None, typer.Option(help="Cut embeddings to so many dimensions, as matryoshka_dims trains for.")
    ] = None,
):
    """Nine-way retrieval, mixed-modality search and modality gap on image-caption pairs."""
    import torch

    from evaluation.centring import estimate_modality_means
    from evaluation.environment import collect_environment
    from evaluation.pairs import embed_pairs, evaluate_embeddings
    from evaluation.plots import modality_pca, nine_way_heatmap
    from evaluation.report import nine_way_table
    from evaluation.result_sheet import result_sheet
    from modeling_gcl import GCLModel, GCLProcessor
    from publishing.hub_folder import write_json
    from retrieval.source_arguments import SourceArguments
    from retrieval.sources import load_pairs

    overrides = {name: value for name, value in {"fusion": fusion, "centring": centring}.items() if value}
    encoder = GCLModel.from_encoder(model, **overrides).eval()
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = GCLProcessor.from_encoder(model)
    options = {"batch_size": batch_size, "show_progress": sys.stderr.isatty()}
    if centre_on is not None:
        estimate_modality_means(encoder, processor, load_pairs(SourceArguments(centre_on)), **options)
        encoder.config.centring = True
    pairs = load_pairs(SourceArguments(data, split=split, limit=limit))
    trained = encoder.config.matryoshka_dims or [encoder.config.projection_dim]
    if truncate_dim is not None and truncate_dim not in trained:
        typer.echo(f"warning: {model} was trained for {trained} dimensions, not to be cut to {truncate_dim}", err=True)
    embeddings = embed_pairs(encoder, processor, pairs, truncate_dim=truncate_dim, **options)
    result = evaluate_embeddings(embeddings, seed=seed)
    typer.echo(nine_way_table(result))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        settings = {"model": model, "data": data, "split": split, "limit": limit, "fusion": encoder.config.fusion}
        settings |= {"centring": encoder.config.centring, "centre_on": centre_on, "seed": seed}
        settings |= {"truncate_dim": truncate_dim, "environment": collect_environment()}
        write_json(out / "results.json", {"command": "gcl evaluate pairs", **settings, "after": result})
        embeddings.save(out / "embeddings.safetensors")
        nine_way_heatmap(result, None, out / "nine_way.png")
        modality_pca(embeddings, None, out / "modality_pca.png")
        result_sheet(pairs, embeddings, None, out / "result_sheet.png")
        typer.echo(f"written to {out}")


@evaluate.command("compare")
def compare_command(
    before: Annotated[Path, typer.Argument(help="results.json of one run.")],
    after: Annotated[Path, typer.Argument(help="results.json of another, on the same pairs.")],
    out: Annotated[Path | None, typer.Option(help="Folder for compare.md and nine_way.png.")] = None,
    labels: Annotated[tuple[str, str], typer.Option(help="Names of the two.")] = ("before", "after"),
):
    """Two results side by side: the nine-way table and heat map."""
    from evaluation.plots import nine_way_heatmap
    from evaluation.report import nine_way_markdown, nine_way_table
    from evaluation.summary import read_result

    results = [read_result(before), read_result(after)]
    typer.echo(nine_way_table(*results))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.md").write_text(nine_way_markdown(dict(zip(labels, results))) + "\n")
        nine_way_heatmap(*results, out / "nine_way.png", labels=labels)
        typer.echo(f"written to {out}")


@evaluate.command("summary")
def summary_command(
    runs: Annotated[list[str], typer.Argument(help="NAME=FILE of results.json files; equal names are seeds of one.")],
    out: Annotated[Path, typer.Option(help="Folder for summary.json, summary.md and summary.png.")],
):
    """Mean and standard deviation over seeds, one line for each name: a table and a picture."""
    from evaluation.summary import summarize

    named: dict[str, list[Path]] = {}
    for run in runs:
        name, _, path = run.rpartition("=")
        if not name or not Path(path).is_file():
            raise typer.BadParameter(f"{run!r} is no NAME=FILE of an existing results.json")
        named.setdefault(name, []).append(Path(path))
    typer.echo(summarize(named, out))


def main():
    """The console script: errors of input are a message, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
