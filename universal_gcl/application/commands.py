"""`gcl demo` and `gcl convert space`: a page that searches captioned images."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a GCL checkpoint or of another dual encoder.")],
    data: Annotated[str, typer.Argument(help="Captioned images: a folder, .parquet, .jsonl or .csv file, or Hub id.")],
    base: Annotated[
        str | None, typer.Option(help="Another model to compare, such as the one that training started from.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N pairs.")] = None,
    image_root: Annotated[
        str | None, typer.Option(help="Folder that image paths are relative to. Defaults to the folder of DATA.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Number of rows embedded at once.")] = 64,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL on the Hub.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of BASE on the Hub.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for embeddings and small pictures. The next start reuses them.")
    ] = Path("outputs/demo"),
    host: Annotated[
        str, typer.Option(help="Address to serve on. With 0.0.0.0, other machines can open the page.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to serve on.", show_default="the first free port from 7860")
    ] = None,
) -> None:
    """Search captioned images in the browser by text, image or both, in one pool of images, captions, and both."""
    from universal_gcl.application.gallery_folder import LoadedModel, write_gallery
    from universal_gcl.sources.arguments import SourceArguments
    from universal_gcl.sources.pairs import load_pairs

    try:
        from universal_gcl.application.demo import build_app, encoder_of, launch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: pip install "universal-gcl[demo]"') from error
    pairs = load_pairs(SourceArguments(data, split=split, limit=limit, image_root=image_root))
    models = LoadedModel.load_all(model, base, revision=revision, base_revision=base_revision)
    name = Path(data).name
    folder = out / f"{name}-{len(pairs)}"
    gallery = write_gallery(pairs, models, folder, name=name, batch_size=batch_size, show_progress=True)
    app = build_app(gallery, {loaded.label: encoder_of(loaded.model, loaded.processor) for loaded in models})
    typer.echo(f"{launch(app, server_name=host, server_port=port)} (press Ctrl+C to stop)")
    app.block_thread()


def space(
    model: Annotated[str, typer.Argument(help="Hub id of a GCL checkpoint.")],
    data: Annotated[str, typer.Argument(help="Captioned images that you may publish: a folder, file, or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write. It must be empty or not exist yet.")],
    base: Annotated[str | None, typer.Option(help="Hub id of another model to compare.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use only the first N pairs.")] = 1000,
    image_root: Annotated[
        str | None, typer.Option(help="Folder that image paths are relative to. Defaults to the folder of DATA.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Number of rows embedded at once.")] = 64,
    title: Annotated[str, typer.Option(help="Title of the Space.")] = "GCL search",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL on the Hub.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of BASE on the Hub.")] = None,
) -> None:
    """Write the page of gcl demo, with its images and embeddings, as a Gradio Space that hf upload can push."""
    from universal_gcl.sources.arguments import SourceArguments
    from universal_gcl.sources.pairs import load_pairs

    try:
        from universal_gcl.application.space import write_space
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
