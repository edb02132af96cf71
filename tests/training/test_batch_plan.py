"""What a batch consists of: accumulation, negatives, and the line for the log."""

import pytest
import torch

from tests.support.training_runs import make_pairs, make_trainer
from universal_gcl.training import memory
from universal_gcl.training.batch_plan import BatchPlan, accumulation_for


def test_accumulation_makes_up_the_batch_or_says_what_would():
    assert accumulation_for(16384, 64, 4, 10**6) == 64
    assert accumulation_for(64, 64, 1, 64) == 1
    for arguments, message in [
        (
            (100, 64, 1, 1000),
            r"is 100, which is not a multiple .* 64 x 1: use 64 or 128, or per_device_.* 50",
        ),
        ((100, 64, 1, 120), r"use 64, or per_device_train_batch_size 50"),
        ((30, 64, 1, 1000), r"use 64, or per_device_train_batch_size 30"),
        ((101, 4, 2, 1000), r"= 4 x 2: use 96 or 104$"),
        ((2000, 64, 1, 1000), r"is 2000, but the training data has 1000 pairs: use at most 960"),
    ]:
        with pytest.raises(ValueError, match=message):
            accumulation_for(*arguments)


def test_the_line_says_what_a_batch_is():
    plan = BatchPlan(micro_batch=64, accumulation=128, processes=2, chunk=32, negatives=49149, chunk_that_fits=64)
    assert plan.line() == (
        "16,384 pairs a step = 64 a micro-batch x 128 accumulated x 2 processes, embedded in chunks of 32; "
        "each query sees 49,149 negatives"
    )
    roomy = BatchPlan(64, 1, 1, 64, 189, chunk_that_fits=1024)
    assert "x 1 process," in roomy.line() and "chunks of at least 1024 fit in memory" in roomy.line()
    assert (
        BatchPlan(64, 2, 1, None, 189)
        .line()
        .endswith("; each query sees 189 negatives from its own micro-batch (with grad_cache_chunk, from all)")
    )
    assert BatchPlan(64, 2, 1, None, None).line() == "128 pairs a step = 64 a micro-batch x 2 accumulated x 1 process"


def test_an_effective_batch_is_trained_as_one(tmp_path, monkeypatch):
    settings = {"effective_batch_size": 24, "num_train_epochs": 1, "per_device_train_batch_size": 8}
    trainer = make_trainer(tmp_path, make_pairs(48), **settings)
    plan = trainer.batch_plan
    assert (plan.accumulation, plan.chunk, plan.negatives) == (3, 8, 3 * 23) and plan.chunk_that_fits is None
    trainer.train()
    assert trainer.state.global_step == 2
    whole = make_trainer(tmp_path, make_pairs(48), num_train_epochs=1, per_device_train_batch_size=24)
    assert whole.batch_plan.chunk is None and whole.batch_plan.negatives == 3 * 23
    whole.train()
    expected = dict(whole.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=0)

    assert make_trainer(tmp_path, make_pairs(48), grad_cache_chunk=3, **settings).batch_plan.chunk == 3
    averaged = make_trainer(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=3)
    assert averaged.batch_plan.negatives == 3 * 7
    monkeypatch.setattr(memory, "chunk_that_fits", lambda *figures: 4)
    assert make_trainer(tmp_path, make_pairs(48), **settings).batch_plan.chunk == 4


def test_an_effective_batch_that_cannot_be_is_refused(tmp_path, monkeypatch):
    for size, message in [(20, "use 16 or 24, or per_device_train_batch_size 5"), (96, "has 48 pairs: use at most 48")]:
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, make_pairs(48), effective_batch_size=size)
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="does not fit on rank 0"):
        make_trainer(tmp_path, make_pairs(48), effective_batch_size=16)


def test_measuring_does_not_move_the_run(tmp_path):
    """The seed alone decides: the same run with the chunk given and with the chunk found."""
    runs = []
    for settings in ({"grad_cache_chunk": 8}, {}):
        trainer = make_trainer(tmp_path, make_pairs(32), effective_batch_size=16, num_train_epochs=1, **settings)
        trainer.train()
        runs.append(dict(trainer.model.named_parameters()))
    for name, parameter in runs[0].items():
        assert torch.equal(parameter, runs[1][name]), name
