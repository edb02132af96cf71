"""Pictures of a nine-way evaluation and of a training run, as PNG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from modeling_gcl.modalities import ALL_DIRECTIONS, IN_WORDS, MODALITIES
from universal_gcl.evaluation.pairs.embeddings import PairEmbeddings
from universal_gcl.evaluation.pairs.gap import modality_gap
from universal_gcl.evaluation.pairs.report import check_comparable
from universal_gcl.evaluation.plot_style import COLOURS, MODALITY_COLOURS, MODALITY_MARKERS, save_figure

Series = dict[str, tuple[np.ndarray, np.ndarray]]  # name → (steps, values)


def nine_way_heatmap(
    before: dict[str, Any],
    after: dict[str, Any] | None,
    path: str | Path,
    *,
    labels: Sequence[str] = ("before", "after"),
) -> Path:
    """Draw hit@10 of the nine directions as 3 × 3 maps, with a row of maps for each pool and a column for each result.

    Args:
        before, after: results of `evaluate_pairs`. The cells of `after` also show the change in percentage points.
            Hatched cells don't count in the headline; grey cells are left empty by the protocol.

    Raises:
        ValueError: the results can't be compared.
    """
    results = [before] if after is None else [before, after]
    check_comparable(results)
    figure = Figure(figsize=(1.4 + 3.5 * len(results), 7.6), layout="constrained")
    axes = figure.subplots(2, len(results), squeeze=False)
    scale = Normalize(0, 100)
    for row, pool in enumerate(("local", "global")):
        for column, result in enumerate(results):
            ax = axes[row, column]
            base = before if column else None
            image = _heatmap_panel(ax, result, base, pool, scale)
            title = f"{pool} pool" if after is None else f"{labels[column]} · {pool} pool"
            ax.set_title(f"{title}\nheadline {100 * result['headline'][pool]:.1f} %", fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.6, label="hit@10 in %")
    figure.suptitle(f"Nine-way retrieval, {before['num_pairs']} pairs", fontsize=13)
    note = "hatched: query and target share an input, so they don't count in the headline"
    figure.supxlabel(note + ("\n" if after is None else " · ") + "grey: left empty", fontsize=9)
    return save_figure(figure, path)


def _heatmap_panel(ax: Axes, result: dict, base: dict | None, pool: str, scale: Normalize) -> AxesImage:
    hits = [result["nine_way"][name][pool] for name in ALL_DIRECTIONS]
    grid = np.array([np.nan if hit is None else 100 * hit["hit@10"] for hit in hits]).reshape(3, 3)
    image = ax.imshow(np.ma.masked_invalid(grid), cmap="viridis", norm=scale)
    ax.set_facecolor("#d9d9d9")
    for place, name in enumerate(ALL_DIRECTIONS):
        y, x = divmod(place, 3)
        value = grid[y, x]
        if np.isnan(value):
            ax.text(x, y, "–", ha="center", va="center", color="#555555", fontsize=13)
            continue
        dark = value < 60
        text = f"{value:.1f}"
        if base is not None:
            text += f"\n{value - 100 * base['nine_way'][name][pool]['hit@10']:+.1f}"
        box = None
        if not result["nine_way"][name]["headline"]:
            ax.add_patch(
                Rectangle(
                    (x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///", edgecolor="#ffffff" if dark else "#333333", lw=0
                )
            )
            box = {"facecolor": image.cmap(scale(value)), "edgecolor": "none", "pad": 2.5}
        ax.text(x, y, text, ha="center", va="center", color="white" if dark else "black", fontsize=12, bbox=box)
    ax.set_xticks(range(3), [IN_WORDS[name] for name in MODALITIES], fontsize=9)
    ax.set_yticks(range(3), [IN_WORDS[name] for name in MODALITIES], fontsize=9, rotation=90, va="center")
    ax.set_xlabel("target", fontsize=9)
    ax.set_ylabel("query", fontsize=9)
    ax.set_xticks([0.5, 1.5], minor=True)
    ax.set_yticks([0.5, 1.5], minor=True)
    ax.grid(which="minor", color="white", linewidth=2)
    ax.tick_params(which="both", length=0)
    return image


def modality_pca(
    before: PairEmbeddings,
    after: PairEmbeddings | None,
    path: str | Path,
    *,
    labels: Sequence[str] = ("before", "after"),
    max_pairs: int = 1000,
    seed: int = 0,
) -> Path:
    """Draw the candidates of the three modalities on their first two principal components.

    Each panel has its own PCA. Training rotates the space, so axes fitted on both would mostly show the rotation.
    Embeddings have norm 1 before and after, so the panels share one scale and distances can be compared by eye. A pair
    gives one point in each modality; for texts it is its first candidate. If there are more than `max_pairs` pairs,
    they are sampled with `seed`.
    """
    panels = [before] if after is None else [before, after]
    figure = Figure(layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    reach = np.zeros(2)
    for ax, embeddings, label in zip(axes, panels, labels, strict=False):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(embeddings.ids))[:max_pairs])
        points = {}
        for name in MODALITIES:
            _, firsts = np.unique(embeddings.owners[name], return_index=True)
            points[name] = embeddings.candidates[name][firsts[chosen]]
        projected, shares = _principal_components(points)
        for name in MODALITIES:
            style = {"color": MODALITY_COLOURS[name], "marker": MODALITY_MARKERS[name]}
            ax.scatter(*projected[name].T, s=9, alpha=0.35, linewidths=0, label=IN_WORDS[name], **style)
        for name in MODALITIES:
            style = {"color": MODALITY_COLOURS[name], "marker": MODALITY_MARKERS[name]}
            ax.scatter(*projected[name].mean(axis=0), s=130, edgecolors="black", linewidths=1.6, zorder=3, **style)
        reach = np.maximum(reach, np.abs(np.concatenate(list(projected.values()))).max(axis=0))
        cosine = modality_gap(embeddings.candidates)["cosine"]
        shown = "   ".join(f"{names} {'–' if value is None else f'{value:.2f}'}" for names, value in cosine.items())
        ax.set_title(("" if after is None else f"{label}\n") + f"cosine of means: {shown}", fontsize=10)
        ax.set_xlabel(f"component 1 ({100 * shares[0]:.1f} % of the variance)")
        ax.set_ylabel(f"component 2 ({100 * shares[1]:.1f} %)")
        ax.set_aspect("equal")
        ax.grid(alpha=0.25)
    reach = 1.06 * np.maximum(reach, 0.6 * reach.max() + 1e-6)  # no axis so short that the panel is a strip
    for ax in axes:
        ax.set(xlim=(-reach[0], reach[0]), ylim=(-reach[1], reach[1]))
    figure.set_size_inches(5.4 * len(panels), 4.7 * reach[1] / reach[0] + 1.8)
    handles, names = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, markerscale=2.5)
    for handle in filter(None, legend.legend_handles):
        handle.set_alpha(1)
    figure.suptitle("Modalities of the candidates; large markers: their means")
    return save_figure(figure, path)


def _principal_components(points: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Modality → (N, 2) coordinates, and the share of the variance that each of the two components explains."""
    stacked = np.concatenate(list(points.values())).astype(np.float64)
    centre = stacked.mean(axis=0)
    _, singular, axes = np.linalg.svd(stacked - centre, full_matrices=False)
    axes = np.pad(axes[:2], ((0, 2 - len(axes[:2])), (0, 0)))
    # the sign of a component is arbitrary: images always go to the lower left, so that panels can be compared
    image_mean = (points["i"].mean(axis=0) - centre) @ axes.T
    axes = axes * np.where(image_mean > 0, -1, 1)[:, None]
    variance = np.pad(singular**2, (0, 2))
    shares = variance[:2] / max(variance.sum(), 1e-30)
    return {name: (matrix - centre) @ axes.T for name, matrix in points.items()}, shares


def training_curves(log_history: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Draw loss, loss by direction, temperature and headline over the steps of a Trainer's `state.log_history`.

    Each panel is drawn if its keys were logged: `loss` and `eval_loss`; `loss_t→i` and so on; `logit_scale`
    (= 1 / temperature) or `temperature`; and every key that contains `headline`, such as `eval_headline_global`.

    Raises:
        ValueError: the log has none of these keys.
    """
    loss = _series(log_history, lambda key: key in ("loss", "eval_loss"))
    directions = _series(log_history, lambda key: key.startswith("loss_") and "→" in key)
    scale = _series(log_history, lambda key: key == "logit_scale")
    temperature = _series(log_history, lambda key: key == "temperature")
    if temperature and not scale:
        steps, values = temperature["temperature"]
        scale = {"logit_scale": (steps, 1 / values)}
    headline = _series(log_history, lambda key: "headline" in key)
    panels = [
        (title, unit, series)
        for title, unit, series in (
            ("Loss", "loss (nats)", loss),
            ("Loss by direction", "loss (nats)", directions),
            ("Temperature", "logit scale 1/τ", scale),
            ("Headline", "mean hit@10 in %", {key: (x, 100 * y) for key, (x, y) in headline.items()}),
        )
        if series
    ]
    if not panels:
        raise ValueError("the log history has no loss, temperature or headline: there is nothing to draw")
    columns = 2 if len(panels) == 4 else len(panels)
    rows = len(panels) // columns
    figure = Figure(figsize=(5.4 * columns, 3.8 * rows), layout="constrained")
    for ax, (title, unit, series) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
        for number, (name, (steps, values)) in enumerate(series.items()):
            few = len(steps) <= 30
            ax.plot(
                steps,
                values,
                color=COLOURS[number % len(COLOURS)],
                linestyle=("-", "--", ":", "-.")[number // 2 % 4],
                marker="o" if few else None,
                markersize=3.5,
                label={"loss": "training", "eval_loss": "evaluation"}.get(
                    name, name.removeprefix("loss_").removeprefix("eval_headline_")
                ),
            )
        ax.set(title=title, xlabel="optimiser step", ylabel=unit)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        ax.ticklabel_format(axis="y", useOffset=False)  # a change in the fourth digit must not look like a collapse
        ax.margins(y=0.1)
        ax.grid(alpha=0.3)
        if len(series) > 1:
            ax.legend(frameon=False, fontsize=9)
        if series is scale:
            right = ax.secondary_yaxis("right", functions=(_reciprocal, _reciprocal))
            right.ticklabel_format(axis="y", useOffset=False)
            right.set_ylabel("temperature τ")
    return save_figure(figure, path)


def _series(log_history: Sequence[dict], is_wanted: Callable[[str], bool]) -> Series:
    """The numbers logged under the wanted keys, in the order of the keys."""
    keys = dict.fromkeys(key for entry in log_history for key in entry if is_wanted(key))
    series = {}
    for key in keys:
        logged = [entry for entry in log_history if key in entry]
        series[key] = (
            np.array([entry["step"] for entry in logged], dtype=float),
            np.array([entry[key] for entry in logged], dtype=float),
        )
    return series


def _reciprocal(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return 1 / np.where(np.abs(values) < 1e-9, 1e-9, values)
