"""Shares of a step's time: with a clock that is set by hand, and in a run's log."""

import pytest
import torch

from tests.support.training_runs import make_trainer
from universal_gcl.training import step_timer
from universal_gcl.training.step_timer import StepTimer


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(step_timer, "time", clock)
    return clock


def one_step(timer, clock, **seconds):
    timer.begin_step()
    for part, duration in seconds.items():
        with timer.measure(part):
            clock.now += duration
    clock.now += 1.0  # the optimiser
    timer.end_step()


def test_shares_are_of_the_steps_alone_and_since_the_last_call(clock):
    timer = StepTimer(torch.device("cpu"))
    assert timer.pop_shares() == {}
    one_step(timer, clock, data_wait=2.0, encoder=4.0, loss=1.0)
    clock.now += 1000  # evaluation
    timer.add_pairs(32)
    one_step(timer, clock, data_wait=0.0, encoder=6.0, loss=1.0)
    assert timer.pop_shares() == pytest.approx(
        {"share_data_wait": 2 / 16, "share_encoder": 10 / 16, "share_loss": 2 / 16, "pairs_per_second": 32 / 16}
    )
    timer.end_step()  # without a beginning
    assert timer.pop_shares() == {}
    one_step(timer, clock, encoder=1.0)
    assert timer.pop_shares() == {
        "share_data_wait": 0, "share_encoder": 0.5, "share_loss": 0, "pairs_per_second": 0
    }  # fmt: skip


def test_a_part_that_fails_is_closed(clock):
    timer = StepTimer(torch.device("cpu"))
    timer.begin_step()
    with pytest.raises(KeyError), timer.measure("encoder"):
        clock.now += 1
        raise KeyError
    timer.end_step()
    assert timer.pop_shares()["share_encoder"] == 1


def test_on_an_accelerator_events_are_read_only_when_shares_are(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            self.at = 500.0 * len(log)  # milliseconds

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch, "get_device_module", lambda device: type("module", (), {"Event": Event}))
    timer = StepTimer(torch.device("cuda"))
    timer.begin_step()
    with timer.measure("encoder"):
        pass
    timer.add_pairs(3)
    timer.end_step()
    assert log == ["record"] * 4
    shares = timer.pop_shares()
    assert shares["share_encoder"] == pytest.approx(1 / 3) and shares["pairs_per_second"] == pytest.approx(2)
    assert log.count("synchronize") == 2


@pytest.mark.parametrize("settings", [{}, {"grad_cache_chunk": 3, "gradient_accumulation_steps": 2}])
def test_every_log_entry_has_the_shares(tmp_path, settings):
    trainer = make_trainer(tmp_path, num_train_epochs=1, logging_steps=2, **settings)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) >= 2
    for entry in entries:
        shares = [entry[f"share_{part}"] for part in step_timer.PARTS]
        assert all(share > 0 for share in shares) and sum(shares) < 1 and entry["pairs_per_second"] > 0
    last = next(entry for entry in trainer.state.log_history if "train_runtime" in entry)
    assert "share_encoder" not in last
