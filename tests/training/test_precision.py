"""bfloat16 that the CPU emulates is warned of, once, with the measured ratio; nothing is changed."""

import pytest

from universal_gcl.training import precision
from universal_gcl.training.precision import bfloat16_slowdown, warn_if_bfloat16_is_slow
from universal_gcl.training.training_arguments import GCLTrainingArguments


@pytest.mark.parametrize(
    "slowdown, bf16, warned", [(10.84, True, True), (1.2, True, False), (0.1, True, False), (10.84, False, False)]
)
def test_slow_bfloat16_is_warned_of(slowdown, bf16, warned, tmp_path, monkeypatch, caplog):
    measured = []
    monkeypatch.setattr(precision, "bfloat16_slowdown", lambda: measured.append(slowdown) or slowdown)
    arguments = GCLTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=bf16)
    warn_if_bfloat16_is_slow(arguments)
    assert arguments.bf16 is bf16 and len(measured) == bf16
    assert ("10.8 times as long as in float32" in caplog.text and "--bf16 false" in caplog.text) == warned


def test_accelerators_and_other_processes_are_not_measured(tmp_path, monkeypatch):
    def fail():
        raise AssertionError("measured")

    monkeypatch.setattr(precision, "bfloat16_slowdown", fail)
    arguments = GCLTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True)
    monkeypatch.setattr(GCLTrainingArguments, "process_index", 1)
    warn_if_bfloat16_is_slow(arguments)
    monkeypatch.setattr(GCLTrainingArguments, "process_index", 0)
    monkeypatch.setattr(GCLTrainingArguments, "device", precision.torch.device("cuda", 0))
    warn_if_bfloat16_is_slow(arguments)


def test_the_measurement_is_a_ratio():
    assert 0.001 < bfloat16_slowdown() < 1000
