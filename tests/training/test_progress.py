"""What a training prints: a line for each log entry, on the first process only, with or without bars."""

import re
import sys

import pytest

from tests.support.training_runs import make_pairs, make_trainer
from universal_gcl.training.progress import evaluation_line, step_line, use_step_lines


def test_a_step_as_a_line():
    logs = {"loss": 3.20914, "epoch": 1.667, "logit_scale": 14.274, "learning_rate": 2.1e-4, "pairs_per_second": 1234.5}
    assert step_line(logs, 25, 100, 3723) == (
        "step  25/100   epoch 1.67   loss 3.2091   1/τ 14.27   lr 2.1e-04   1,234 pairs/s   1:02:03 left"
    )
    assert step_line({"loss": 1.0}, 100, 100, 0) == "step 100/100   loss 1.0000"


def test_an_evaluation_as_a_line():
    logs = {"eval_headline_mean": 0.412, "eval_headline_local": 0.557, "eval_headline_global": 0.267}
    line = "evaluated: hit@10 41.2 % (local pool 55.7 %, global pool 26.7 %)"
    assert evaluation_line(logs) == line
    assert evaluation_line(logs | {"eval_mixed_ndcg@10": 0.343}) == f"{line}, mixed nDCG@10 34.3 %"


@pytest.mark.parametrize("disable_tqdm", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_lines_in_the_place_of_dictionaries(disable_tqdm, terminal, tmp_path, capsys, monkeypatch):
    options = {"num_train_epochs": 1, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    options["eval_on_start"] = False
    trainer = make_trainer(tmp_path, eval_pairs=make_pairs(6, seed=1), disable_tqdm=disable_tqdm, **options)
    use_step_lines(trainer)
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    trainer.train()
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split("   ")[0] for line in lines if line.startswith("step")] == [f"step {n}/6" for n in (1, 2, 4, 6)]
    assert sum(line.startswith("evaluated: hit@10 ") for line in lines) == 2  # and at the end
    assert not re.search("[{}]", printed.out)
    assert ("training:" in printed.err) == (terminal and not disable_tqdm)


def test_other_processes_print_nothing(tmp_path, capsys):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    use_step_lines(trainer)
    trainer.state.is_world_process_zero = False
    trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, {"loss": 1.0})
    assert capsys.readouterr().out == ""
