"""Pictures of an evaluation and of a training run, as PNG. Colours after Okabe and Ito, and matplotlib's viridis,
which people with colour-vision deficiency can tell apart; what matters is also said by numbers, hatching or markers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from universal_gcl.evaluation.pairs.embeddings import MODALITIES, MODALITY_NAMES, PairEmbeddings
from universal_gcl.evaluation.pairs.gap import modality_gap
from universal_gcl.evaluation.pairs.measure import DIRECTIONS
from universal_gcl.evaluation.pairs.report import check_comparable

_MODALITY_COLOURS = {"i": "#0072B2", "t": "#D55E00", "it": "#009E73"}
_MARKERS = {"i": "o", "t": "^", "it": "s"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DPI = 150


def nine_way_heatmap(
    before: dict, after: dict | None, path: str | Path, *, labels: Sequence[str] = ("before", "after")
) -> Path:
    """hit@10 of the nine directions as 3 × 3 maps: a row of maps for each pool, a column for each result.

    Args:
        before, after: results of `evaluate_pairs`; with `after`, its cells also show the change in
            percentage points. Hatched cells are not in the headline; grey ones are left empty by the protocol.

    Raises:
        ValueError: the results come from different protocols.
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
    note = "hatched: query and target share an input, not in the headline"
    figure.supxlabel(note + ("\n" if after is None else " · ") + "grey: left empty", fontsize=9)
    return save_figure(figure, path)


def _heatmap_panel(ax, result: dict, base: dict | None, pool: str, scale: Normalize):
    hits = {name: result["nine_way"][name][pool] for name in DIRECTIONS}
    grid = np.array([np.nan if hits[name] is None else 100 * hits[name]["hit@10"] for name in DIRECTIONS]).reshape(3, 3)
    image = ax.imshow(np.ma.masked_invalid(grid), cmap="viridis", norm=scale)
    ax.set_facecolor("#d9d9d9")
    for place, name in enumerate(DIRECTIONS):
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
    ax.set_xticks(range(3), [MODALITY_NAMES[name] for name in MODALITIES], fontsize=9)
    ax.set_yticks(range(3), [MODALITY_NAMES[name] for name in MODALITIES], fontsize=9, rotation=90, va="center")
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
    """The candidates of the three modalities on their first two principal components.

    Each panel has its own PCA: training turns the space, so axes fitted on both would mostly show before against
    after. Embeddings have norm 1 in both, so the panels share one scale and distances can be compared by eye. A pair
    gives one point in each modality (its first text candidate); more than `max_pairs` are sampled with `seed`.
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
            style = {"color": _MODALITY_COLOURS[name], "marker": _MARKERS[name]}
            ax.scatter(*projected[name].T, s=9, alpha=0.35, linewidths=0, label=MODALITY_NAMES[name], **style)
        for name in MODALITIES:
            style = {"color": _MODALITY_COLOURS[name], "marker": _MARKERS[name]}
            ax.scatter(*projected[name].mean(axis=0), s=130, edgecolors="black", linewidths=1.6, zorder=3, **style)
        reach = np.maximum(reach, np.abs(np.concatenate(list(projected.values()))).max(axis=0))
        cosine = modality_gap(embeddings.candidates)["cosine"]
        shown = "   ".join(f"{names} {'–' if value is None else f'{value:.2f}'}" for names, value in cosine.items())
        ax.set_title(("" if after is None else f"{label}\n") + f"cosine of means: {shown}", fontsize=10)
        ax.set_xlabel(f"component 1 ({100 * shares[0]:.1f} % of the variance)")
        ax.set_ylabel(f"component 2 ({100 * shares[1]:.1f} %)")
        ax.set_aspect("equal")
        ax.grid(alpha=0.25)
    reach = 1.06 * np.maximum(reach, 0.6 * reach.max() + 1e-6)  # neither axis so short that the panel is a strip
    for ax in axes:
        ax.set(xlim=(-reach[0], reach[0]), ylim=(-reach[1], reach[1]))
    figure.set_size_inches(5.4 * len(panels), 4.7 * reach[1] / reach[0] + 1.8)
    handles, names = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, markerscale=2.5)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    figure.suptitle("Modalities of the candidates; large markers: their means")
    return save_figure(figure, path)


def _principal_components(points: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(N, 2) coordinates by modality, and the two components' shares of the variance."""
    stacked = np.concatenate(list(points.values())).astype(np.float64)
    centre = stacked.mean(axis=0)
    _, singular, axes = np.linalg.svd(stacked - centre, full_matrices=False)
    axes = np.pad(axes[:2], ((0, 2 - len(axes[:2])), (0, 0)))
    # the sign of a component is arbitrary: images go to the lower left, so that panels are turned alike
    image_mean = (points["i"].mean(axis=0) - centre) @ axes.T
    axes = axes * np.where(image_mean > 0, -1, 1)[:, None]
    variance = np.pad(singular**2, (0, 2))
    return {name: (matrix - centre) @ axes.T for name, matrix in points.items()}, variance[:2] / max(
        variance.sum(), 1e-30
    )


def training_curves(log_history: Sequence[dict], path: str | Path) -> Path:
    """Loss, loss by direction, temperature and headline over the steps, from a Trainer's `state.log_history`.

    A panel is drawn for what was logged: `loss` and `eval_loss`; `loss_t→i` and so on; `logit_scale` (= 1 /
    temperature) or `temperature`; and every key that holds `headline`, such as `eval_headline_global`.

    Raises:
        ValueError: the log holds none of these.
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
        raise ValueError("the log history holds no loss, temperature or headline: nothing to draw")
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


def _series(log_history: Sequence[dict], wanted) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """key → (steps, values), for the numbers logged under the keys that are wanted, in the order of the keys."""
    keys = dict.fromkeys(key for entry in log_history for key in entry if wanted(key))
    return {
        key: tuple(np.array([(entry["step"], entry[key]) for entry in log_history if key in entry], dtype=float).T)
        for key in keys
    }


def _reciprocal(values):
    values = np.asarray(values, dtype=float)
    return 1 / np.where(np.abs(values) < 1e-9, 1e-9, values)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG at the resolution of all pictures here; the folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    return path
