"""The benchmarks run, measure what they say, and refuse a variant that computes something else."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import adapters, loss, measurement, scaling, search, step
from modeling_gcl import gcl_loss

BENCHMARKS = Path(loss.__file__).parent


@pytest.fixture
def in_this_process(monkeypatch):
    """Workers' tasks done here, with short calibrations that always agree: seconds instead of minutes."""
    monkeypatch.setattr(measurement, "gemm_rate", lambda device="cpu": 1e11)
    monkeypatch.setattr(loss, "run_worker", lambda script, task, **_: loss.work(**task))
    monkeypatch.setattr(loss, "count_flops", lambda variant: 36.0)


COMMANDS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_starts_and_says_how(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"benchmarks.{name}").main()
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m benchmarks.{name} [-h]") and f"    python -m benchmarks.{name}" in shown


def test_a_benchmark_starts_as_a_module():
    command = [sys.executable, "-m", "benchmarks.loss", "--help"]
    run = subprocess.run(command, cwd=measurement.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_makefile_runs_benchmarks_that_exist():
    named = re.findall(r"-m benchmarks\.(\w+)", (measurement.ROOT / "Makefile").read_text())
    assert set(named) == set(COMMANDS)


def test_every_variant_is_what_it_says(in_this_process, monkeypatch, tmp_path):
    """All variants of the CPU pass the gate, are measured, and are compared with the tiles."""
    monkeypatch.setattr(loss, "GATE_PAIRS", 70)
    monkeypatch.setattr(loss, "GATE_DIM", 16)
    out = tmp_path / "loss.json"
    chosen = [v.__name__ for v, (*_, largest) in loss.VARIANTS.items() if "cpu" in largest]
    arguments = ["--sizes", "64", "--variants", *chosen, "--rounds", "2", "--dim", "16", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["loss.py", *arguments])
    loss.main()
    result = json.loads(out.read_text())
    rows = result["sizes"]["64"]
    assert set(rows) == set(result["gates"]) == set(chosen) - set(result["not_installed"])
    for name, row in rows.items():
        assert row["rounds"] == row["kept"] == 2 and row["ratio_to"]["tiles"]["rounds"] == 2, name
        assert row["to_gemm"]["median"] == pytest.approx(row["seconds"]["median"] * 1e11 / (36 * 64**2 * 16))


@pytest.mark.parametrize("wrong", ["another loss", "another gradient", "no number"])
def test_the_gate_refuses_a_wrong_variant(wrong, monkeypatch):
    def variant(embeds):
        if wrong == "another loss":
            return loss.tiles(embeds) * 1.01
        value = loss._backward(gcl_loss(*embeds, loss.SCALE, intra_modality=wrong != "another gradient"))
        if wrong == "no number":
            embeds[1].grad[3, 2] = torch.nan
            return value
        return loss.definition_of_gcl(embeds).detach()

    monkeypatch.setitem(loss.VARIANTS, variant, loss.VARIANTS[loss.tiles])
    monkeypatch.setattr(loss, "GATE_PAIRS", 70)
    with pytest.raises(SystemExit, match="relative error of the (loss|gradient)"):
        loss.gate(variant)


def test_tiles_without_kernels_are_what_they_say():
    """They run on CUDA only, but what they replace must exist."""
    embeds, expected = loss.make_embeds(40, 8), loss.make_embeds(40, 8)
    torch.testing.assert_close(loss.tiles_of_pytorch(embeds), loss.definition_of_gcl(expected).detach())


def test_flops_are_counted_in_place_too():
    assert loss.count_flops(loss.autograd, 600, 16) == pytest.approx(54)
    assert 36 <= loss.count_flops(loss.tiles, 600, 16) < 40


def test_unknown_variants_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loss.py", "--variants", "tilse"])
    with pytest.raises(SystemExit):
        loss.main()
    assert "no variants on cpu: tilse; there are tiles, " in capsys.readouterr().err


def test_a_step_is_measured_in_the_trainer(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measurement, "gemm_rate", lambda device="cpu": 1e11)
    measured = step.TASKS["step"](tower="small", batch=8, chunk=None)
    assert measured["seconds"] > 0 and measured["bytes"] >= 0


def test_grad_cache_passes_the_gate(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert step.TASKS["gate_step"](tower="small", batch=6, chunk=4)["gradient"] <= step.GATE_TOLERANCE


def test_the_gate_of_a_step_refuses_another_gradient():
    with pytest.raises(SystemExit, match="relative error of it is"):
        step.within_tolerance("it", torch.ones(3) * 1.01, torch.ones(3))
    assert step.within_tolerance("it", torch.ones(3), torch.ones(3)) == 0


def test_workers_of_the_shared_loss_run_under_torchrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = {"kind": "gate_shared_loss", "half_ring": True, "num_pairs": 50, "dim": 8}
    assert measurement.run_worker("benchmarks.step", task, threads=1, processes=2)["gradient"] <= step.GATE_TOLERANCE


def test_the_model_counts_as_the_formulas_say():
    n, d = 8192, 512
    assert scaling.loss_flops(n, 1, d) == scaling.loss_flops(n, 1, d, half_ring=True) == 36 * n**2 * d
    for w in (2, 3, 8, 9):
        own = n / w
        assert scaling.loss_flops(n, w, d) == pytest.approx((54 * w - 18) * own**2 * d)
        assert scaling.loss_flops(n, w, d, half_ring=True) == pytest.approx((36 * w + 18 * (w % 2 == 0)) * own**2 * d)
        assert scaling.loss_flops(n, w, d, kernels=True) == pytest.approx(54 * n**2 * d / w)
    assert scaling.exchanged_bytes(n, 2, d, 4) == 3 * n // 2 * d * 4
    assert scaling.exchanged_bytes(n, 2, d, 4, half_ring=True) == 1.5 * 3 * n // 2 * d * 4
    # open_clip's model profile gives 14.78 GFlop for this model
    assert scaling.clip_vit_b32_flops() == pytest.approx(14.78e9, rel=0.01)
    few = scaling.predict(8192, 8, d, 1e9, **scaling.ASSUMED)
    assert few["memory"] == 3 * 8192 * d * 2
    more = scaling.predict(16384, 16, d, 1e9, **scaling.ASSUMED)
    assert few["encoder"] == more["encoder"] and more["loss"] > 1.9 * few["loss"] and more["exchange"] > few["exchange"]
    assert few["loss_share"] == pytest.approx(1 - few["encoder"] / sum(few[k] for k in ("encoder", "loss", "exchange")))


def test_searches_are_measured_and_gated(monkeypatch, tmp_path):
    monkeypatch.setattr(measurement, "gemm_rate", lambda device="cpu": 1e11)
    monkeypatch.setattr(search, "run_worker", lambda script, task, **_: getattr(search, task["task"])(**without(task)))
    out = tmp_path / "search.json"
    arguments = ["--candidates", "400", "--queries", "5", "--dim", "8", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["search.py", *arguments])
    search.main()
    result = json.loads(out.read_text())
    assert set(result["pools"]) == set(search.POOLS)
    for pool, rows in result["pools"].items():
        assert result["gates"][pool]["equal"] and result["gates"][pool]["candidates"] == 400
        assert all(rows[name]["ratio_to"]["faiss_flat"]["rounds"] == 1 for name in search.VARIANTS)
        assert all(rows[name]["build_seconds"]["median"] >= 0 for name in search.VARIANTS)


def without(task):
    return {name: value for name, value in task.items() if name != "task"}


@pytest.mark.parametrize("wrong", ["kept", "screened", "faiss_flat"])
def test_the_gate_refuses_a_wrong_search(wrong, monkeypatch, tmp_path):
    search.make_pool(tmp_path, "cone", 300, 4, 8)
    right = search.VARIANTS[wrong]

    def shifted(*args):
        return lambda: tuple(part + 1 for part in right(*args)())

    monkeypatch.setitem(search.VARIANTS, wrong, shifted)
    with pytest.raises(SystemExit, match="faiss finds" if wrong == "faiss_flat" else f"{wrong}.*differs from"):
        search.gate(tmp_path, 3)


def test_ways_to_train_a_part_are_measured(in_this_process, monkeypatch, tmp_path):
    def worker(script, task, **_):
        return step.run_step(task["tower"], task["batch"], None, adapters.measure_both, task["trained"])

    monkeypatch.setattr(adapters, "run_worker", worker)
    out = tmp_path / "adapters.json"
    monkeypatch.setattr(
        sys, "argv", ["adapters.py", "--tower", "small", "--batch", "8", "--rounds", "1", "--out", str(out)]
    )
    adapters.main()
    rows = json.loads(out.read_text())["rows"]
    assert max(rows[part]["trained"] for part in ("gates", "lora")) < rows["all"]["trained"] / 10
    assert all(row["kept"] == 1 and row["ratio_to"]["all"]["rounds"] == 1 for row in rows.values())
    tensors = {name: row["tensors"]["median"] for name, row in rows.items()}
    # LoRA keeps few gradients; under the gates there is nothing to go backward through
    assert tensors["gates"] < tensors["lora"] < tensors["all"]
