"""The page of `gcl demo` and of a Space: search a gallery by text, image or both, among candidates of all modalities.

A Space holds this file as it is, beside `gallery` and `search`: it imports neither the rest of the package nor
`modeling_gcl`, whose code comes with the model there.
"""

import base64
import html
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor

from universal_gcl.application.gallery import MODALITIES, Gallery, Hit

SHOWN = 12  # hits of a search
SIDE_BY_SIDE = "side by side"
_NAMES = {"image": "image", "text": "text", "image+text": "image + text"}  # of the modalities, on the page
_PLURALS = {"image": "images", "text": "texts", "image+text": "image + text"}
_MAX_TEXT = 2000  # characters of a query
_UPLOADS_KEPT = 3600  # seconds
_STYLE = Path(__file__).with_name("demo.css")

Encoder = Callable[[dict], torch.Tensor]


def load_encoders(gallery: Gallery) -> dict[str, Encoder]:
    """
    The gallery's models from the Hub, at their revisions, where only transformers is installed.

    GCL's code comes with the first, which is a GCL checkpoint; with it another dual encoder embeds as GCL's base does.
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


def encoder_of(model, processor) -> Encoder:
    """A row → its (D,) embedding. `model` and `processor`: as `GCLModel.encode` takes them."""
    return lambda row: model.encode([row], processor)[0]


def build_app(gallery: Gallery, encoders: dict[str, Encoder]) -> gr.Blocks:
    """
    The page; `launch` serves it.

    Args:
        gallery: what is searched.
        encoders: for each label of the gallery's models, what embeds a query. Several can be compared side by side.
    """

    def search(text, picture, view=SIDE_BY_SIDE, kinds=MODALITIES):
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
                    [(_NAMES[name], name) for name in MODALITIES], value=list(MODALITIES), label="Search among"
                )
                view = gr.Radio(
                    [SIDE_BY_SIDE, *encoders], value=SIDE_BY_SIDE, label="Model", visible=several, elem_id="gcl-view"
                )
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(
                    label="Picture", type="filepath", sources=["upload", "clipboard"], height=230, buttons=[],
                    alt_text="the picture of the query",
                )  # fmt: skip
        # the file as it came: gr.Image itself answers one that it can't open by a bare "Error", and stores others anew
        picture.preprocess = lambda payload: payload and payload.path
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


def launch(app: gr.Blocks, **options) -> str:
    """
    Serves the page beside this thread, with a look that needs nothing from outside; `app.block_thread()` waits.

    Args:
        options: of `app.launch`.

    Returns:
        its address.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    style = {"theme": theme, "css_paths": _STYLE, "footer_links": ["api", "settings"], "ssr_mode": False}
    return app.launch(**style, max_file_size="20mb", quiet=True, prevent_thread_lock=True, **options)[1]


def parse_query(text: str | None, picture: str | None) -> dict:
    """
    The row to embed: `text`, `image` or both.

    Raises:
        ValueError: neither is given.
    """
    row = {}
    if text and text.strip():
        row["text"] = text.strip()
    if picture:
        row["image"] = picture
    if not row:
        raise ValueError("Type a text, upload a picture, or give both to search with the two together.")
    return row


def render(gallery: Gallery, found: dict[str, list[Hit]], kinds: Sequence[str] = MODALITIES) -> str:
    """The hits of each model as HTML, in columns; pictures inline."""
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


def _card(gallery, hit):
    caption = html.escape(gallery.entries[hit.entry]["caption"])
    shown = ""
    if "image" in hit.modality:
        data = base64.b64encode(gallery.picture(hit.entry).read_bytes()).decode()
        shown = f'<img src="data:image/jpeg;base64,{data}" alt="{caption}">'
    if "text" in hit.modality:
        shown += f"<p>{caption}</p>"
    name = _NAMES[hit.modality]
    return (
        f'<li data-modality="{hit.modality}"><div class="gcl-content">{shown}</div>'
        f'<footer><b>{name}</b><span title="cosine with the query">{hit.score:.3f}</span></footer></li>'
    )


def _counts(hits, kinds):
    """How many hits of each modality: as a sentence, and as a bar."""
    counts = Counter(hit.modality for hit in hits)
    sentence = ", ".join(
        f"{counts[kind]} {(_NAMES if counts[kind] == 1 else _PLURALS)[kind]}" for kind in MODALITIES if kind in kinds
    )
    parts = "".join(f'<i data-modality="{kind}" style="flex-grow: {counts[kind]}"></i>' for kind in MODALITIES)
    return (
        f'<p class="gcl-counts">first {len(hits)}: {sentence}</p><div class="gcl-bar" aria-hidden="true">{parts}</div>'
    )


def _introduction(gallery, several):
    count, name = f"{len(gallery):,}", html.escape(gallery.name)
    compared = (
        " A model with a gap between modalities ranks by kind first: a typed query finds texts, whatever is in the "
        "pictures. GCL is trained to rank by content, whatever the kind. Compare the two."
        if several
        else f" Model: {html.escape(next(iter(gallery.models.values()))['name'])}."
    )
    return (
        '<div class="gcl-introduction"><h1>Search images, texts and both in one pool</h1>'
        f"<p>Each of the {count} entries of {name} is a candidate three times: its picture alone, its caption alone, "
        f"and both together. Search by a text, a picture, or both.{compared}</p></div>"
    )


def _examples(gallery):
    """A query of each modality, from entries that lie apart."""
    first, second, third = (len(gallery) * part // 4 for part in (1, 2, 3))
    captions = [entry["caption"] for entry in gallery.entries]
    picture = [str(gallery.picture(entry)) for entry in (second, third)]
    return [[captions[first], None], ["", picture[0]], [captions[third], picture[1]]]


def _explain(error, picture):
    """The message of a row that can't be embedded, without its number and the folder of the upload."""
    message = str(error).removeprefix("row 0: ")
    return message.replace(picture, Path(picture).name) if picture else message
