"""Make docs/performance.md from results/benchmarks/*.json.

    python -m benchmarks.report

The text between the page's markers is replaced, and its plot is drawn.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.goals import GOALS
from benchmarks.measurement import RESULTS, ROOT, Row, argument_parser
from universal_gcl.evaluation.plot_style import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, save_figure

PAGE = ROOT / "docs" / "performance.md"
MARKED = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
NOT_MEASURED = "*Not measured yet: `make bench`.*\n"
Results = Mapping[str, dict[str, Any]]  # benchmark → the JSON that it wrote

LABELS = {  # the variants, in the order of tables, colours and markers
    "tiles": "tiles",
    "tiles_of_pytorch": "tiles, without Triton",
    "tiles_bf16": "tiles, bf16",
    "tiles_bf16_cache": "tiles, bf16, half kept",
    "tiles_bf16_all_kept": "tiles, bf16, all kept",
    "autograd": "autograd, one line",
    "checkpointed_strips": "checkpointed strips",
    "open_clip_three_times": "open_clip × 3",
    "sentence_transformers_1024": "sentence-transformers, 1024",
    "sentence_transformers_gcl_1024": "sentence-transformers, 1024, GCL in six calls",
    "sentence_transformers_32": "sentence-transformers, 32",
    "memeff_three_times": "memeff × 3",
    "inf_cl_three_times": "inf-cl × 3",
}
COLOURS = (
    BLUE, GREEN, SKY, ORANGE, VERMILION, PURPLE, BLACK, "#777777", "#BBBBBB", "#8C510A", "#C7A500", "#5E3C99",
)  # fmt: skip
MARKERS = ("o", "s", "v", "D", "^", "P", "X", "*", "h", "<", ">", "p")


def load(folder: Path) -> Results:
    """The results in a folder, by file name: loss, step, adapters, pipeline, scaling, search."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def render(page: str, results: Results) -> str:
    """
    Return the page with new text between its markers.

    Args:
        page: markdown with `<!-- begin NAME -->` and `<!-- end NAME -->`.
        results: what `load` returns. A block whose benchmark is missing says so.

    Raises:
        ValueError: the page has a block with an unknown name.
    """

    def block(match: re.Match) -> str:
        start, name, end = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"unknown block {name!r} in the page; there are {', '.join(BLOCKS)}")
        needed, make = BLOCKS[name]
        text = make(results) if needed is None or needed in results else NOT_MEASURED
        return f"{start}{text}{end}"

    return MARKED.sub(block, page)


# Blocks


def goals(results: Results) -> str:
    """The table of goals, limits and figures."""
    lines = ["| | at least | aim | measured | |", "|---|---:|---:|---:|---|"]
    for goal in GOALS:
        try:
            found = goal.figure(results[goal.benchmark])
        except KeyError:  # not measured, or no round was steady
            measured, verdict = "–", "not measured"
        else:
            measured = goal.shown.format(_spread(found))
            verdict = goal.verdict(found["median"] if isinstance(found, dict) else found)
        limits = " | ".join(goal.shown.format(f"{limit:.3g}") for limit in (goal.at_least, goal.aim))
        lines.append(f"| {goal.what} | {limits} | {measured} | {verdict} |")
    return "\n".join(lines) + "\n"


def answers(results: Results) -> str:
    """The three answers at the top of the page."""
    sizes = results["loss"]["sizes"]
    measured = {int(n): rows["tiles"] for n, rows in sizes.items() if "seconds" in rows.get("tiles", {})}
    largest = max(measured)
    row = measured[largest]
    lines = [
        f"- **How big a batch?** The loss of {largest:,} pairs (a matrix of {3 * largest:,} × {3 * largest:,} logits, "
        f"{_size(4 * (3 * largest) ** 2)}) took {_seconds(row['seconds']['median'])} on the machine below, and "
        f"{_size(row['bytes']['median'])} of memory in addition to the embeddings and their gradients. With GradCache "
        "the towers need the memory of one chunk.",
    ]
    if "step" in results:
        cached = results["step"]["step"].get("1", {}).get("grad_cache", {})
        if "ratio_to" in cached:
            lines.append(
                f"- **What does it cost?** A step with GradCache takes {_spread(cached['ratio_to']['plain'])} times as "
                "long as the plain step. The time of the loss grows with the square of the batch. Compared to the "
                "towers it is small until batches are huge (see the model below)."
            )
    best = sizes.get("4096", {})
    faster = [
        f"{_spread(best[name]['ratio_to']['tiles'])} × as fast as {label}"
        for name, label in LABELS.items()
        if not name.startswith("tiles") and "tiles" in best.get(name, {}).get("ratio_to", {})
    ]
    if faster:
        lines.append(f"- **What do I gain?** The loss of 4,096 pairs in fp32 is {'; '.join(faster)}.")
    return "\n".join(lines) + "\n"


def loss_table(result: dict[str, Any]) -> str:
    """For each variant and number of pairs: seconds, peak memory beyond E and dE, and time relative to the tiles."""
    sizes = result["sizes"]
    lines = [f"| N = | {' | '.join(f'{int(n):,}' for n in sizes)} |", "|---|" + "---:|" * len(sizes)]
    for name, label in LABELS.items():
        if not any(name in rows for rows in sizes.values()):
            continue
        cells = []
        for rows in sizes.values():
            row = rows.get(name, {})
            if "seconds" not in row:
                cells.append("–" if name not in rows else "unsteady")
                continue
            ratio = row.get("ratio_to", {}).get("tiles")
            cell = f"{_seconds(row['seconds']['median'])}, {_size(row['bytes']['median'])}"
            cells.append(cell + (f", **{ratio['median']:.2f}**" if ratio else ""))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", _measured(result)]
    if result["not_installed"]:
        lines.append(f"Left out because they are not installed: {', '.join(result['not_installed'])}.")
    return "\n".join(lines) + "\n"


def gpu_tables(results: Results) -> str:
    """A table for each file that `benchmarks.loss --device cuda` wrote."""
    tables = [
        f"D = {result['dim']}:\n\n{loss_table(result)}"
        for name, result in results.items()
        if name.startswith("loss-cuda")
    ]
    return "\n".join(tables) or (
        "Not timed on GPUs yet. `python -m benchmarks.loss --device cuda` does it, also against memeff and inf-cl.\n"
    )


def step_table(results: Results) -> str:
    """A training step, plain and with GradCache."""
    step = results["step"]
    lines = [
        "| processes | step | seconds | peak memory of a process | relative to the plain step |",
        "|---|---|---:|---:|---:|",
    ]
    for processes, rows in step["step"].items():
        for name, row in rows.items():
            label = {"plain": "plain", "grad_cache": f"GradCache, chunk {step['settings']['chunk']}"}[name]
            lines.append(f"| {processes} | {label} | {_row(row, 'plain')} |")
    settings = step["settings"]
    note = (
        f"{settings['tower']}, {settings['batch']} pairs in all processes together, {settings['image_size']} px, "
        f"{settings['text_length']} tokens, fp32. {_measured(step)}"
    )
    return "\n".join([*lines, "", note]) + "\n"


TRAINED = {"all": "all weights", "lora": "LoRA, r = 16", "gates": "gates of the fusion"}


def adapters_table(results: Results) -> str:
    """A training step by what is trained."""
    found = results["adapters"]
    lines = [
        "| trained | parameters | tensors of a step | seconds | resident memory of a step | relative to all weights |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in found["rows"].items():
        tensors = _size(row["tensors"]["median"]) if "tensors" in row else "–"
        lines.append(f"| {TRAINED[name]} | {row['trained']:,} | {tensors} | {_row(row, 'all')} |")
    settings = found["settings"]
    note = f"{settings['tower']}, {settings['batch']} pairs, {settings['image_size']} px, fp32. {_measured(found)}"
    return "\n".join([*lines, "", note]) + "\n"


def shared_table(results: Results) -> str:
    """The loss that processes share."""
    step = results["step"]
    lines = [
        "| | N²D flops per process | seconds | peak memory of a process | relative to one process | expected |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    n2d = step["settings"]["pairs"] ** 2 * step["settings"]["dim"]
    for name, row in step["shared_loss"].items():
        flops = row["expected_flops"] / n2d
        lines.append(f"| {name.replace('_', ' ')} | {flops:g} | {_row(row, '1 process')} | {flops / 36:.2f} |")
    note = f"{step['settings']['pairs']:,} pairs, D = {step['settings']['dim']}, one thread per process."
    return "\n".join([*lines, "", note]) + "\n"


def scaling_table(results: Results) -> str:
    """The model of many GPUs."""
    lines = [
        "| GPUs | pairs | rows are | towers | loss | exchange | share of loss and exchange | memory of the loss |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["scaling"]["rows"]:
        way = "–" if row["processes"] == 1 else "half ring" if row["half_ring"] else "gathered"
        seconds = " | ".join(f"{1000 * row[part]:.2f} ms" for part in ("encoder", "loss", "exchange"))
        share, memory = f"{row['loss_share']:.0%}", _size(row["memory"]) if row["memory"] else "–"
        lines.append(f"| {row['processes']:,} | {row['num_pairs']:,} | {way} | {seconds} | {share} | {memory} |")
    return "\n".join(lines) + "\n"


def assumptions(results: Results) -> str:
    """The assumptions of the model."""
    assumed = results["scaling"]["assumptions"]
    return (
        f"Assumptions: a GPU computes {assumed['flops_per_second'] / 1e12:.0f}e12 flops/s in loss and towers, and "
        f"receives {assumed['bytes_per_second'] / 1e9:.0f} GB/s; embeddings have D = {assumed['dim']} dimensions of "
        f"{assumed['bytes_per_number']} bytes; {assumed['encoder']} at 224 px and {assumed['text_tokens']} tokens "
        f"takes {assumed['encoder_flops'] / 1e9:.1f} GFlop per pair forward and twice that backward; no GradCache; "
        "nothing overlaps. The loss then needs as many flops as the towers at "
        f"{assumed['pairs_where_loss_equals_encoder'] / 1e6:.1f} million pairs, for any number of GPUs.\n"
    )


def pipeline_table(results: Results) -> str:
    """Images from file to pixels."""
    lines = [
        "| images, from JPEG to pixels | per second and core | time relative to the image processor |",
        "|---|---:|---:|",
    ]
    for name, row in results["pipeline"]["data"]["made"]["images"].items():
        speed = f"{row['images_per_second']['median']:.0f}" if "images_per_second" in row else "unsteady"
        ratio = row.get("ratio_to", {}).get("processor_on_pil")
        lines.append(f"| {name.replace('_', ' ')} | {speed} | {_spread(ratio) if ratio else '–'} |")
    return "\n".join([*lines, "", _measured(results["pipeline"])]) + "\n"


SEARCHES = {
    "kept": "int8 kept on disk",
    "screened": "int8 made in each search",
    "faiss_flat": "faiss IndexFlatIP, float32 in memory",
    "exact": "float64, the definition",
}


def search_table(results: Results) -> str:
    """Exact search against faiss."""
    found = results["search"]
    lines = [
        "| pool | search | made once | a search | memory of a search | time relative to faiss |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for pool, rows in found["pools"].items():
        for name, row in rows.items():
            build = row.get("build_seconds") if name in ("kept", "faiss_flat") else None
            made = _seconds(build["median"]) if build else "–"
            lines.append(f"| {pool} | {SEARCHES[name]} | {made} | {_row(row, 'faiss_flat')} |")
    settings = found["settings"]
    note = (
        f"{settings['candidates']:,} candidates, {settings['queries']:,} queries, D = {settings['dim']}, "
        f"k = {settings['k']}. {_measured(found)}"
    )
    return "\n".join([*lines, "", note]) + "\n"


def plot_link(results: Results) -> str:
    """The picture that `draw` makes."""
    return "![Time and memory of the loss against the number of pairs](performance.png)\n"


BLOCKS: dict[str, tuple[str | None, Callable[[Results], str]]] = {  # name: (benchmark that it needs, its text)
    "answers": ("loss", answers),
    "goals": (None, goals),
    "loss": ("loss", lambda results: loss_table(results["loss"])),
    "gpu": (None, gpu_tables),
    "plot": ("loss", plot_link),
    "step": ("step", step_table),
    "adapters": ("adapters", adapters_table),
    "shared": ("step", shared_table),
    "assumptions": ("scaling", assumptions),
    "scaling": ("scaling", scaling_table),
    "pipeline": ("pipeline", pipeline_table),
    "search": ("search", search_table),
}


def _spread(found: dict[str, float] | float) -> str:
    if not isinstance(found, dict):
        return f"{found:.3f}"
    median, low, high = (f"{found[name]:.2f}" for name in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}–{high})"


def _row(row: Row, reference: str) -> str:
    if "seconds" not in row:
        return "unsteady | – | –"
    ratio = row.get("ratio_to", {}).get(reference)
    cells = _seconds(row["seconds"]["median"]), _size(row["bytes"]["median"]), _spread(ratio) if ratio else "–"
    return " | ".join(cells)


def _measured(result: dict[str, Any]) -> str:
    found = result["environment"]
    packages = [f"{name} {version}" for name, version in found["packages"].items() if name in SHOWN_PACKAGES]
    bfloat16 = [name for name, has in found["cpu"]["bfloat16"].items() if has]
    commit = f"{(found['git']['sha'] or 'unknown')[:7]}{' and uncommitted changes' if found['git']['dirty'] else ''}"
    where = ", ".join(found["gpus"]) if result.get("device") == "cuda" else found["cpu"]["name"]
    return (
        f"`{found['command']}` at commit {commit}: {where}, {found['cpu']['cores']} cores, {found['threads']} threads, "
        f"{found['cpu']['capability']}, bfloat16 by {' and '.join(bfloat16) or 'emulation'}; "
        f"Python {found['python']}, {', '.join(packages)}."
    )


SHOWN_PACKAGES = ("torch", "transformers", "accelerate", "sentence-transformers", "simplejpeg", "faiss-cpu", "pillow")


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _size(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.0f} kB"


# The picture


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw time and memory against N on logarithmic axes, with a line for each variant."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    for ax, name, scale, title in zip(
        figure.subplots(1, 2),
        ("seconds", "bytes"),
        (1, 1e-6),
        ("seconds, forward and backward", "MB beyond embeddings and their gradients"),
    ):
        for index, (variant, label) in enumerate(LABELS.items()):
            points = [
                (int(n), rows[variant][name]["median"] * scale)
                for n, rows in result["sizes"].items()
                if name in rows.get(variant, {}) and rows[variant][name]["median"] > 0
            ]
            if points:
                style = {
                    "color": COLOURS[index % len(COLOURS)],
                    "marker": MARKERS[index % len(MARKERS)],
                    "markersize": 6,
                }
                ours = variant.startswith("tiles")
                ax.plot(*zip(*points), label=label, lw=2.2 if ours else 1.2, ls="-" if ours else "--", **style)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ticks = [int(n) for n in result["sizes"]]
        ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
        ax.set_xlabel("pairs N")
        ax.set_title(title, fontsize=11)
        ax.grid(True, which="major", color="#dddddd")
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(f"The loss, D = {result['dim']}, {result['environment']['threads']} threads", fontsize=12)
    save_figure(figure, path, dpi=130)


def main() -> None:
    parser = argument_parser("report", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON that benchmarks wrote")
    parser.add_argument("--page", type=Path, default=PAGE, help="markdown; the plot is written beside it as PNG")
    arguments = parser.parse_args()
    results = load(arguments.results)
    arguments.page.write_text(render(arguments.page.read_text(), results))
    if "loss" in results:
        draw(results["loss"], arguments.page.with_suffix(".png"))


if __name__ == "__main__":
    main()
