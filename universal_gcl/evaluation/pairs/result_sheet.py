"""A sheet of search results: queries on the left, and to the right of each what a model finds first."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from modeling_gcl.modalities import IN_WORDS, MODALITIES
from modeling_gcl.rows import load_image
from universal_gcl.evaluation.pairs.embeddings import PairEmbeddings, caption_roles
from universal_gcl.evaluation.plot_style import GREEN, GREY, save_figure
from universal_gcl.retrieval.search import exact_top_k

_THUMBNAIL = (320, 320)  # pixels; a cell shows no more at the sheet's resolution
_DPI = 100


def result_sheet(
    pairs: Sequence[dict],
    before: PairEmbeddings,
    after: PairEmbeddings | None,
    path: str | Path,
    *,
    query: str = "t",
    pool: str = "global",
    num_queries: int = 4,
    k: int = 5,
    labels: Sequence[str] = ("before", "after"),
    seed: int = 0,
) -> Path:
    """Draw the first `k` results of some queries, one line for each model. Results of the query's own pair have a green
    frame and ✓.

    A query that is also a candidate would find itself first. This holds for images, and for texts and fused queries if
    each pair has one caption. Such a query is left out of its own results, and the sheet says so.

    Args:
        pairs: the pairs that were embedded, in the same order.
        before, after: embeddings by one or two models.
        query: modality of the queries.
        pool: `"global"` for the candidates of all modalities together, or a modality to search that one alone.
        num_queries: number of pairs to draw. They are sampled with `seed`, not chosen by how well they did.
        labels: names of the two models.

    Raises:
        ValueError: a modality is unknown; the pairs are not those of the embeddings; the pool holds nothing but the
            query; an image can't be read.
    """
    if query not in MODALITIES or pool not in ("global", *MODALITIES):
        pools = ("global", *MODALITIES)
        raise ValueError(f"query must be one of {MODALITIES} and pool one of {pools}, got {query!r} and {pool!r}")
    models = [before] if after is None else [before, after]
    for embeddings in models:
        if len(pairs) != len(embeddings.ids):
            raise ValueError(
                f"{len(pairs)} pairs, but embeddings of {len(embeddings.ids)}: pass the pairs that were embedded"
            )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:num_queries])
    found = [_search(embeddings, chosen, query, pool, k) for embeddings in models]

    lines = len(chosen) * len(models)
    width = 1 + len(found[0][0])
    figure = Figure(figsize=(2.1 * width, (2.4 if pool in ("i", "t") else 2.75) * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, width, squeeze=False)
    for number, pair in enumerate(chosen.tolist()):
        for model, (embeddings, results) in enumerate(zip(models, found, strict=True)):
            line = axes[number * len(models) + model]
            if model == 0:
                caption = _query_caption(embeddings, query)
                content = _content(pairs, embeddings, pair, query != "t", caption)
                _cell(line[0], *content, f"query: {IN_WORDS[query]}", "black", 2.0)
            else:
                line[0].axis("off")
            if after is not None:
                line[1].set_ylabel(labels[model], fontsize=11)
            for rank, (ax, (name, candidate, score)) in enumerate(zip(line[1:], results[number], strict=True), start=1):
                owner = int(embeddings.owners[name][candidate])
                right = owner == pair
                caption = embeddings.caption_of(name, candidate)
                title = f"{rank} · {IN_WORDS[name]} · {score:.2f}" + (" ✓" if right else "")
                content = _content(pairs, embeddings, owner, name != "t", caption)
                _cell(ax, *content, title, GREEN if right else GREY, 3.5 if right else 1.0)
    where = "all modalities" if pool == "global" else f"{IN_WORDS[pool]} only"
    title = f"Top {width - 1} of the candidates, {where}; the number is the cosine similarity"
    if pool in ("global", query) and _is_candidate(before, query):
        title += "\nthe query itself, which is a candidate too, is left out"
    figure.suptitle(title, fontsize=12)
    return save_figure(figure, path, _DPI)


def _search(
    embeddings: PairEmbeddings, chosen: np.ndarray, query: str, pool: str, k: int
) -> list[list[tuple[str, int, float]]]:
    """The first `k` results of each chosen pair without the query itself: (modality, index in that modality, score)."""
    names = MODALITIES if pool == "global" else (pool,)
    places = [(name, place) for name in names for place in range(len(embeddings.candidates[name]))]
    candidates = np.concatenate([embeddings.candidates[name] for name in names])
    itself = {}
    if query in names and _is_candidate(embeddings, query):
        firsts = np.searchsorted(embeddings.owners[query], chosen)  # the query is the first candidate of its pair
        itself = {pair: (query, int(first)) for pair, first in zip(chosen.tolist(), firsts)}
        if len(candidates) == 1:
            raise ValueError(f"the pool {pool!r} holds nothing but the query itself: add pairs, or search another pool")
    scores, indices = exact_top_k(embeddings.queries[query][chosen], candidates, min(k + 1, len(candidates)))
    found = []
    for pair, row, values in zip(chosen.tolist(), indices.tolist(), scores.tolist(), strict=True):
        others = [(index, score) for index, score in zip(row, values) if places[index] != itself.get(pair)]
        found.append([(*places[index], score) for index, score in others[:k]])
    return found


def _query_caption(embeddings: PairEmbeddings, query: str) -> int | None:
    roles = caption_roles(embeddings.captions_per_pair)
    return {"i": None, "t": roles.text_query, "it": roles.fused_query}[query]


def _is_candidate(embeddings: PairEmbeddings, query: str) -> bool:
    """Whether the queries of this modality are also candidates, each the first of its pair."""
    return _query_caption(embeddings, query) == embeddings.caption_of(query, 0)


def _content(
    pairs: Sequence[dict], embeddings: PairEmbeddings, place: int, with_image: bool, caption: int | None
) -> tuple[Image.Image | None, str | None]:
    """The small image and the text that a cell shows; each may be None."""
    pair = pairs[place]
    if str(pair["id"]) != embeddings.ids[place]:
        raise ValueError(
            f"pair {place} is {pair['id']!r}, but was {embeddings.ids[place]!r} when embedded: keep the order of pairs"
        )
    image = None
    if with_image:
        value = pair["image"]
        image = load_image(value[0] if isinstance(value, (list, tuple)) else value)
        image.thumbnail(_THUMBNAIL)
    return image, None if caption is None else pair["captions"][caption]


def _cell(ax: Axes, image: Image.Image | None, text: str | None, title: str, colour: str, line_width: float) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(color=colour, linewidth=line_width)
    ax.set_title(title, fontsize=8.5)
    if image is None:
        ax.set_facecolor("#f4f4f4")
        ax.set_box_aspect(1)
        shown = textwrap.fill(text or "", 24, max_lines=7, placeholder=" …")
        # parse_math is off because a caption may contain dollar signs
        ax.text(0.5, 0.5, shown, ha="center", va="center", fontsize=9, parse_math=False, transform=ax.transAxes)
        return
    # the image is padded to a square, so that all cells have one size
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    ax.imshow(square)
    if text is not None:
        shown = textwrap.fill(text, 30, max_lines=3, placeholder=" …")
        ax.set_xlabel(shown, fontsize=8, labelpad=4, parse_math=False)
