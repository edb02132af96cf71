"""The end of a run: figures before and after, where things are, the next step."""

from pathlib import Path

from universal_gcl.evaluation.run_record import ReadSource, RunRecord
from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.checks import SourceReport
from universal_gcl.training.closing import closing


def result(local, mixed):
    return {"headline": {"local": local, "global": 0.25, "mean": (local + 0.25) / 2}, "mixed": {"ndcg@10": mixed}}


def record(**changed):
    facts = {
        "command": "gcl train r", "seed": 0, "settings": {}, "recipe_text": "", "hyperparameters": {},
        "environment": {}, "output_dir": "out", "encoder": "e", "licence": "other", "parameters": {}, "size": {},
        "loss": "gcl",
        "train_data": [ReadSource(SourceArguments("a"), SourceReport("a", pairs=1990))], "train_runtime": 1.0,
        "peak_memory": 1, "log_history": [{"step": 5, "loss": 1.0}, {"step": 60, "train_runtime": 1.0}],
    }  # fmt: skip
    return RunRecord(**(facts | changed))


def test_figures_before_and_after():
    text = closing(record(before=result(0.5, 0.4), after=result(0.6, 0.35)), Path("out/model"), 244)
    assert text.splitlines() == [
        "",
        "Done in 04:04: 60 steps on 1,990 pairs.",
        "",
        "hit@10, local pool      50.0 →  60.0 %  +10.0",
        "hit@10, global pool     25.0 →  25.0 %   +0.0",
        "hit@10, both pools      37.5 →  42.5 %   +5.0",
        "mixed search, nDCG@10   40.0 →  35.0 %   -5.0",
        "",
        "Model, card, results, pictures:  out/model",
        "Measure it on your own pairs:    gcl evaluate pairs out/model YOUR_FOLDER",
        "Train it further:                gcl train finetune --encoder out/model --train YOUR_FOLDER",
    ]


def test_without_an_evaluation_before_or_at_all():
    text = closing(record(after=result(0.6, None)), Path("out/model"), 1)
    assert "hit@10, local pool      60.0 %\n" in text and "mixed" not in text and "→" not in text
    text = closing(record(), Path("out/model"), 1)
    assert "hit@10" not in text and "names no data.eval" in text


def test_broken_images_are_counted():
    broken = [f"photos, {number}.png: not an image" for number in range(3)]
    assert "Skipped 3 unreadable images;" in (text := closing(record(broken_images=broken), Path("m"), 1))
    assert "The first: photos, 0.png: not an image" in text
