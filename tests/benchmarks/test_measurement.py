"""What is dropped, repeated and counted, and that the figures are those of their definitions."""

import json
import shlex
import subprocess
import sys

import pytest
import torch

from benchmarks.measurement import ROOT, measure, measure_rounds, run_worker, steady, summarise


def entry(seconds, rates=(1e9, 1e9), **figures):
    return {"seconds": seconds, "bytes": 10, "gemm_rates": list(rates), **figures}


def test_a_disturbed_measurement_is_dropped():
    assert steady(entry(1, (1.0e9, 1.09e9))) and steady(entry(1, (1.09e9, 1.0e9)))
    assert not steady(entry(1, (1.0e9, 1.11e9))) and not steady(entry(1, (1.11e9, 1.0e9)))


def test_rounds_interleave_and_repeat_what_was_dropped():
    disturbed = entry(9, (1.0e9, 2.0e9))
    answers = {"a": [entry(1), entry(2)], "b": [disturbed, entry(3), disturbed, disturbed, disturbed]}
    order = []

    def measure_one(name):
        order.append(name)
        return answers[name].pop(0)

    series = measure_rounds(measure_one, ["a", "b"], rounds=2, attempts=3)
    assert "".join(order) == "abbabbb"
    assert series == {"a": [entry(1, dropped=0), entry(2, dropped=0)], "b": [entry(3, dropped=1), {"dropped": 3}]}
    row = summarise(series["b"])
    assert (row["rounds"], row["kept"], row["dropped"]) == (2, 1, 4)
    assert row["seconds"] == {"median": 3, "min": 3, "max": 3}
    assert summarise([{"dropped": 3}]) == {"rounds": 1, "kept": 0, "dropped": 3}


def test_ratios_are_taken_within_a_round():
    """A machine that slows down twofold per round moves medians; the ratio of neighbours stays."""
    slow = [entry(3.0 * 2**i, dropped=0) for i in range(3)]
    fast = [entry(1.0 * 2**i, dropped=0) for i in range(3)]
    row = summarise(slow, {"fast": fast}, flops=2e9)
    assert row["ratio_to"] == {"fast": {"rounds": 3, "median": 3, "min": 3, "max": 3, "of_medians": 3}}
    assert row["seconds"] == {"median": 6, "min": 3, "max": 12}
    assert row["to_gemm"]["median"] == 6 * 1e9 / 2e9
    fast[1] = {"dropped": 4}
    row = summarise(slow, {"fast": fast})
    assert row["ratio_to"]["fast"]["median"] == 3 and row["ratio_to"]["fast"]["of_medians"] == 6 / 2.5  # that is why
    fast[2] = entry(1.0, (2e9, 2e9), dropped=0)  # the machine was twice as fast for it
    assert summarise(slow, {"fast": fast})["ratio_to"]["fast"]["rounds"] == 1
    assert "ratio_to" not in summarise(slow, {"fast": [{"dropped": 4}] * 3})


def test_measure_sees_time_and_the_peak_of_memory():
    def step():
        torch.ones(2**24).exp_()

    result = measure(step, at_least=0.05)
    assert 0.95 * 2**26 < result["bytes"] < 1.3 * 2**26
    assert 0 < result["seconds"] < 5 and steady(result | {"gemm_rates": [result["gemm_rates"][0]] * 2})
    assert measure(lambda: None, at_least=0)["bytes"] < 2**22  # the peak before it does not count
    calls = []
    measure(lambda: calls.append(1), steps=3)
    assert len(calls) == 3


def test_workers_answer_with_json_or_stop_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where `python -m` finds the module
    (tmp_path / "a_worker.py").write_text(
        "import json, os, sys\ntask = json.loads(sys.argv[2])\nprint('noise')\nassert task['good'], 'a bad task'\n"
        "print(json.dumps({'threads': os.environ['OMP_NUM_THREADS']}))"
    )
    assert run_worker("a_worker", {"good": True}, threads=3) == {"threads": "3"}
    with pytest.raises(SystemExit, match="a_worker failed at .*good.*(?s:.)*a bad task"):
        run_worker("a_worker", {"good": False}, threads=1)


def test_a_result_names_what_its_figures_depend_on(tmp_path):
    """The command too, as it was typed."""
    out = tmp_path / "scaling.json"
    typed = ["-m", "benchmarks.scaling", "--processes", "1", "--out", str(out)]
    run = subprocess.run([sys.executable, *typed], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())["environment"]
    assert found["threads"] == 1 and found["seed"] == 0 and found["command"] == f"python {shlex.join(typed)}"
    assert found["packages"]["torch"] == torch.__version__ and found["version"]
    assert {"name", "cores", "capability", "bfloat16"} <= found["cpu"].keys()
    assert found["git"].keys() == {"sha", "dirty"}
