"""The end of a run on the terminal: figures before and after, where the files are, what to type next."""

from pathlib import Path

from tqdm import tqdm

from universal_gcl.evaluation.run_record import RunRecord

FIGURES = (  # label, section and key of a nine-way result
    ("hit@10, local pool", "headline", "local"),
    ("hit@10, global pool", "headline", "global"),
    ("hit@10, both pools", "headline", "mean"),
    ("mixed search, nDCG@10", "mixed", "ndcg@10"),
)


def closing(record: RunRecord, folder: Path, seconds: float) -> str:
    """
    The last lines that a run prints, about ten.

    Args:
        record: the record of the run.
        folder: the folder with the model, its card and all results.
        seconds: how long the whole command took.
    """
    steps = max((entry.get("step", 0) for entry in record.log_history), default=0)
    pairs = sum(source.report.pairs for source in record.train_data)
    lines = ["", f"Done in {tqdm.format_interval(seconds)}: {steps:,} steps on {pairs:,} pairs.", ""]
    if record.after is not None:
        lines += [*figure_lines(record), ""]
    if record.broken_images:
        count, first = len(record.broken_images), record.broken_images[0]
        images = "image" if count == 1 else "images"
        lines += [f"Skipped {count:,} unreadable {images}; results.json names every one. The first: {first}", ""]
    own = "" if record.after is not None else " (this recipe names no data.eval)"
    return "\n".join(
        [
            *lines,
            f"Model, card, results, pictures:  {folder}",
            f"Measure it on your own pairs:    gcl evaluate pairs {folder} YOUR_FOLDER{own}",
            f"Train it further:                gcl train finetune --encoder {folder} --train YOUR_FOLDER",
        ]
    )


def figure_lines(record: RunRecord) -> list[str]:
    """Each figure after training, with the one before and the change in points, if it was measured before."""
    lines = []
    for label, section, key in FIGURES:
        after = record.after[section][key] if record.after is not None else None
        before = record.before[section][key] if record.before is not None else None
        if after is None:  # pairs with too few captions have no such figure
            continue
        change = "" if before is None else f"{100 * before:>5.1f} → "
        line = f"{label:<22} {change}{100 * after:>5.1f} %"
        lines.append(line if before is None else f"{line}  {100 * (after - before):>+5.1f}")
    return lines
