"""What a run leaves has the form of the runs in results/."""

import json
from pathlib import Path

from universal_gcl.evaluation.run_record import ReadSource, RunRecord
from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.checks import SourceReport

RECORDED = Path(__file__).parents[2] / "results" / "flickr8k_lora" / "runs" / "lora-seed0.json"


def test_results_have_the_form_of_those_recorded():
    recorded = json.loads(RECORDED.read_text())
    report = recorded["data"][0]
    record = RunRecord(
        command=recorded["command"],
        seed=recorded["seed"],
        settings=recorded["recipe"],
        recipe_text="",
        hyperparameters={},
        environment=recorded["environment"],
        output_dir="outputs",
        encoder="encoder",
        licence="other",
        parameters=recorded["parameters"],
        size={},
        loss="gcl",
        train_data=[ReadSource(SourceArguments(report["path"]), SourceReport(**report))],
        eval_data=ReadSource(SourceArguments("test"), SourceReport(**recorded["eval_data"])),
        broken_images=recorded["broken_images"],
        train_runtime=recorded["train_runtime"],
        peak_memory=recorded["peak_memory"],
        before=recorded["before"],
        after=recorded["after"],
        log_history=recorded["log_history"],
    )
    assert record.results() == recorded
    assert list(record.results()) == list(recorded)
    record.eval_data = None
    assert record.results()["eval_data"] is None
