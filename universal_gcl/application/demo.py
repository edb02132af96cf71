"""The page of `gcl demo` and of a Space: search a gallery by text, image or both, among candidates of all modalities.

A Space has a copy of this file, of `application.gallery` and of `retrieval.search`, without the rest of our package and
without `modeling_gcl`. So this file must not import them. In a Space, the code of the model comes with its checkpoint.
"""

import base64
import html
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.data_classes import ImageData
from transformers import AutoConfig, AutoModel, AutoProcessor

from universal_gcl.application.gallery import MODALITIES, NAMES, Gallery, Hit

SHOWN = 12  # number of hits on the page
SIDE_BY_SIDE = "side by side"
_MAX_TEXT = 2000  # characters in a query
_UPLOADS_KEPT = 3600  # seconds until an uploaded picture is deleted
_STYLE = Path(__file__).with_name("demo.css")

Encoder = Callable[[dict], torch.Tensor]


def load_encoders(gallery: Gallery) -> dict[str, Encoder]:
    """
    Load the models of a gallery from the Hub, at their revisions. Our package need not be installed.

    The first model must be a GCL checkpoint, because GCL's code comes with it. That code can load other dual encoders
    too.

    Returns:
        Label → encoder of a query.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoders = {}
    for label, source in gallery.models.items():
        name, options = source["name"], {"revision": source["revision"]}
        if AutoConfig.from_pretrained(name, trust_remote_code=True, **options).model_type == "gcl":
            model, processor = (
                auto.from_pretrained(name, trust_remote_code=True, **options) for auto in (AutoModel, AutoProcessor)
            )
            code = type(model), type(processor)
        else:
            processor = code[1].from_encoder(name, **options)
            model = code[0].from_encoder(name, processor=processor, **options)
        encoders[label] = encoder_of(model.eval().to(device), processor)
    return encoders


def encoder_of(model: Any, processor: Any) -> Encoder:
    """
    A function that embeds one row and returns its (D,) embedding.

    Args:
        model: a `GCLModel`. The type is not given, because the class comes with the checkpoint in a Space.
        processor: its `GCLProcessor`.
    """
    return lambda row: model.encode([row], processor)[0]


def build_app(gallery: Gallery, encoders: dict[str, Encoder]) -> gr.Blocks:
    """
    Build the page. `launch` serves it.

    Args:
        gallery: the gallery to search.
        encoders: for each model, its label in the gallery → the encoder of a query. If there are several, the page can
            show their results side by side.
    """

    def search(
        text: str | None, picture: str | None, view: str = SIDE_BY_SIDE, kinds: Sequence[str] = MODALITIES
    ) -> str:
        labels = list(encoders) if view == SIDE_BY_SIDE else [view]
        try:
            row = parse_query(text, picture)
            if not kinds:
                raise ValueError("Choose at least one kind of candidate to search among.")
            found = {label: gallery.search(label, encoders[label](row), SHOWN, kinds) for label in labels}
        except ValueError as error:
            return f'<p class="gcl-message" role="alert">{html.escape(_explain(error, picture))}</p>'
        return render(gallery, found, kinds)

    several = len(encoders) > 1
    with gr.Blocks(title="GCL search", analytics_enabled=False, delete_cache=(_UPLOADS_KEPT, _UPLOADS_KEPT)) as app:
        gr.HTML(_introduction(gallery, several))
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                text = gr.Textbox(
                    label="Text",
                    placeholder=f"e.g. {gallery.entries[0]['caption']}",
                    max_length=_MAX_TEXT,
                    autofocus=True,
                )
                kinds = gr.CheckboxGroup(
                    [(NAMES[kind][0], kind) for kind in MODALITIES], value=list(MODALITIES), label="Search among"
                )
                view = gr.Radio(
                    [SIDE_BY_SIDE, *encoders], value=SIDE_BY_SIDE, label="Model", visible=several, elem_id="gcl-view"
                )
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(
                    label="Picture", type="filepath", sources=["upload", "clipboard"], height=230, buttons=[],
                    alt_text="the picture of the query",
                )  # fmt: skip
        # gr.Image has no argument for this, and a subclass would be another component for the browser
        picture.preprocess = _uploaded_file  # type: ignore[method-assign]
        button = gr.Button("Search", variant="primary")
        results = gr.HTML(elem_id="gcl-results")
        tries = gr.Examples(_examples(gallery), [text, picture], label="Try")
        inputs = [text, picture, view, kinds]
        gr.on([text.submit, button.click], search, inputs, results, api_name="search")
        tries.load_input_event.then(search, inputs, results, api_visibility="private")
        gr.on(
            [view.input, kinds.input],
            lambda *values: search(*values) if values[0].strip() or values[1] else "",
            inputs, results, api_visibility="private",
        )  # fmt: skip
    return app


def launch(app: gr.Blocks, *, server_name: str | None = None, server_port: int | None = None) -> str:
    """
    Serve the page in the background. `app.block_thread()` then waits until the program is interrupted.

    The page loads nothing from other servers, no fonts either.

    Args:
        app: the page.
        server_name: the address to serve on. Defaults to gradio's choice: the environment variable
            GRADIO_SERVER_NAME, which a Space sets, or 127.0.0.1.
        server_port: the port to serve on. Defaults to the first free one from 7860.

    Returns:
        The address of the page.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return app.launch(
        server_name=server_name,
        server_port=server_port,
        theme=theme,
        css_paths=_STYLE,
        footer_links=["api", "settings"],
        ssr_mode=False,
        max_file_size="20mb",
        quiet=True,
        prevent_thread_lock=True,
    )[1]


def parse_query(text: str | None, picture: str | None) -> dict:
    """
    Make the row to embed, with `text`, `image` or both.

    Args:
        text: the text of the query.
        picture: the file of the uploaded picture.

    Raises:
        ValueError: there is neither a text nor a picture.
    """
    row = {}
    if text and text.strip():
        row["text"] = text.strip()
    if picture:
        row["image"] = picture
    if not row:
        raise ValueError("Type a text, upload a picture, or do both to search by the two together.")
    return row


def render(gallery: Gallery, found: dict[str, list[Hit]], kinds: Sequence[str] = MODALITIES) -> str:
    """The hits of each model as HTML, one column for each model. The pictures are in the HTML."""
    columns = []
    for label, hits in found.items():
        title = ""
        if len(gallery.models) > 1:
            name = gallery.models[label]["name"]
            title = f"<h2>{html.escape(label)} <small>{html.escape(name)}</small></h2>"
        cards = "".join(_card(gallery, hit) for hit in hits)
        columns.append(
            f'<section aria-label="{html.escape(label)}">{title}{_counts(hits, kinds)}<ol>{cards}</ol></section>'
        )
    return f'<div class="gcl-columns">{"".join(columns)}</div>'


def _uploaded_file(payload: ImageData | None) -> str | None:
    """The uploaded file as it is. gr.Image would show just "Error" for a file that it can't open, and would save the
    others again."""
    return payload.path if payload else None


def _card(gallery: Gallery, hit: Hit) -> str:
    caption = html.escape(gallery.entries[hit.entry]["caption"])
    shown = ""
    if "image" in hit.modality:
        data = base64.b64encode(gallery.picture(hit.entry).read_bytes()).decode()
        shown = f'<img src="data:image/jpeg;base64,{data}" alt="{caption}">'
    if "text" in hit.modality:
        shown += f"<p>{caption}</p>"
    name = NAMES[hit.modality][0]
    return (
        f'<li data-modality="{hit.modality}"><div class="gcl-content">{shown}</div>'
        f'<footer><b>{name}</b><span title="cosine with the query">{hit.score:.3f}</span></footer></li>'
    )


def _counts(hits: Sequence[Hit], kinds: Sequence[str]) -> str:
    """The number of hits of each modality, in words and as a bar."""
    counts = Counter(hit.modality for hit in hits)
    sentence = ", ".join(f"{counts[kind]} {NAMES[kind][counts[kind] != 1]}" for kind in MODALITIES if kind in kinds)
    parts = "".join(f'<i data-modality="{kind}" style="flex-grow: {counts[kind]}"></i>' for kind in MODALITIES)
    return (
        f'<p class="gcl-counts">first {len(hits)}: {sentence}</p><div class="gcl-bar" aria-hidden="true">{parts}</div>'
    )


def _introduction(gallery: Gallery, several: bool) -> str:
    count, name = f"{len(gallery):,}", html.escape(gallery.name)
    compared = (
        " Many models rank by kind first: they answer a text with texts, even if a picture matches better. GCL is "
        "trained to rank by content. Compare the two models."
        if several
        else f" Model: {html.escape(next(iter(gallery.models.values()))['name'])}."
    )
    return (
        '<div class="gcl-introduction"><h1>Search images, texts and both in one pool</h1>'
        f"<p>The pool holds each of the {count} entries of {name} three times: as a picture, as a caption, and as both "
        f"together. Search it by a text, a picture, or both.{compared}</p></div>"
    )


def _examples(gallery: Gallery) -> list[list[str | None]]:
    """One query of each modality, made from entries that are far apart in the gallery."""
    first, second, third = (len(gallery) * part // 4 for part in (1, 2, 3))
    captions = [entry["caption"] for entry in gallery.entries]
    picture = [str(gallery.picture(entry)) for entry in (second, third)]
    return [[captions[first], None], ["", picture[0]], [captions[third], picture[1]]]


def _explain(error: ValueError, picture: str | None) -> str:
    """The message of an error, without the number of the row and the folder of the uploaded picture."""
    message = str(error).removeprefix("row 0: ")
    return message.replace(picture, Path(picture).name) if picture else message
