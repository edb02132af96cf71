"""The Triton kernels: their results under Triton's interpreter, what they take of a GPU, and, where one is, on it."""

import importlib.util
import json
import os
import subprocess
import sys
from itertools import combinations_with_replacement
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.dynamic_module_utils import get_imports

from modeling_gcl import gcl_loss, kernels
from tests.support import dense_loss
from tests.support.dense_panel import dense_sums, dense_weighted

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and kernels.supports(torch.empty(0, device="cuda"))),
    reason="needs Triton and an NVIDIA GPU from Ampere on",
)


def run(*command, **environment):
    finished = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])} | environment,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@needs_triton
def test_under_the_interpreter():
    output = run(
        "-m", "pytest", "-q", "--noconftest", HERE.parent / "support" / "interpreted_triton.py", TRITON_INTERPRET="1"
    )
    assert " passed" in output and "skipped" not in output


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings NVIDIA's assembler on Linux only")
def test_fits_every_gpu_from_ampere_on(tmp_path):
    """99 KB is a consumer card's shared memory for one program; some registers may spill, not an accumulator."""
    output = run(HERE / "compile_triton.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    compiled = [json.loads(line) for line in output.splitlines()]
    assert {kernel["kernel"] for kernel in compiled} == {"_sums_kernel", "_gradient_kernel"}
    for kernel in compiled:
        assert kernel["shared"] <= 99 * 1024, kernel
        assert kernel["stack"] <= 384, kernel


def test_triton_is_no_requirement(monkeypatch):
    """Neither to import the module, nor by transformers' check of the code of a Hub folder."""
    path = Path(kernels.__file__)
    assert "triton" not in get_imports(path)
    monkeypatch.setitem(sys.modules, "triton", None)  # import triton raises ImportError
    spec = importlib.util.spec_from_file_location("modeling_gcl.kernels_without_triton", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.triton is None and not module.supports(torch.empty(1))


def test_what_the_kernels_take(monkeypatch):
    def tensor(dtype=torch.float32, is_cuda=True):
        return SimpleNamespace(dtype=dtype, is_cuda=is_cuda, device="cuda:0")

    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert all(kernels.supports(tensor(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not kernels.supports(tensor(torch.float64))
    assert not kernels.supports(tensor(is_cuda=False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernels.supports(tensor())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not kernels.supports(tensor())


def unit(length, dim, generator):
    return F.normalize(torch.randn(length, dim, generator=generator, device="cuda"), dim=-1)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype, bf16", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("dim", [512, 768])
@pytest.mark.parametrize("semantic", [0, 384])
def test_on_a_gpu(dtype, bf16, dim, semantic):
    generator = torch.Generator("cuda").manual_seed(0)
    embeds = tuple(unit(2011, dim, generator).to(dtype) for _ in range(3))
    labels = (torch.randint(0, 500, (2011,), generator=generator, device="cuda"),)
    cosines = unit(2011, semantic, generator) if semantic else None
    panel = SimpleNamespace(
        rows=embeds, cols=embeds, symmetric=True, blocks=list(combinations_with_replacement(range(3), 2)),
        row_labels=labels, col_labels=labels, row_semantic=cosines, col_semantic=cosines,
    )  # fmt: skip
    ratios = torch.rand(3, 3, 2011, generator=generator, device="cuda")

    def results():
        sums, grads = torch.zeros_like(ratios), [torch.zeros(2011, dim, device="cuda") for _ in range(3)]
        kernels.add_sums(panel, 50.0, 3.0, sums)
        kernels.add_weighted(panel, 50.0, 3.0, ratios, ratios, grads, bf16=bf16)
        return sums, *grads

    sums, *grads = results()
    torch.testing.assert_close(sums.double(), dense_sums(panel, 50.0, 3.0), rtol=2e-5, atol=0)
    tolerance = 1e-2 if bf16 or dtype != torch.float32 else 2e-5
    for got, exact in zip(grads, dense_weighted(panel, 50.0, 3.0, ratios, ratios), strict=True):
        assert (got.double() - exact).norm() <= tolerance * exact.norm()
    for first, second in zip((sums, *grads), results(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
@needs_gpu
def test_offsets_beyond_32_bits_on_a_gpu():
    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.zeros(2**31 // 512 + 300, 512, device="cuda", dtype=torch.bfloat16)
    rows[-200:] = unit(200, 512, generator)
    cols = unit(70, 512, generator).bfloat16()
    panel = SimpleNamespace(
        rows=(rows,), cols=(cols,), blocks=[(0, 0)], symmetric=False,
        row_labels=(), col_labels=(), row_semantic=None, col_semantic=None,
    )  # fmt: skip
    sums = torch.zeros(1, 1, len(rows), device="cuda")
    kernels.add_sums(panel, 20.0, 0.0, sums)
    exact = (20 * rows[-200:].double() @ cols.double().T).exp().sum(1)
    torch.testing.assert_close(sums[0, 0, -200:].double(), exact, rtol=1e-5, atol=0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dim", [512, 768])
def test_the_loss_runs_on_the_kernels(dim, monkeypatch):
    launched = []

    class Spy:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(self.kernel)
            return self.kernel[grid]

    compiled = kernels._sums_kernel, kernels._gradient_kernel
    for kernel in compiled:
        monkeypatch.setattr(kernels, kernel.__name__, Spy(kernel))
    generator = torch.Generator("cuda").manual_seed(0)
    embeds = [unit(2011, dim, generator) for _ in range(3)]

    def results(loss, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in embeds]
        scale = torch.tensor(50.0, dtype=dtype, device="cuda", requires_grad=True)
        value = loss(*leaves, scale)
        return value, *torch.autograd.grad(value, (*leaves, scale))

    got, exact = results(gcl_loss, torch.float32), results(dense_loss.gcl_loss, torch.float64)
    assert set(launched) == set(compiled)
    for a, b in zip(got, exact, strict=True):
        assert (a.double() - b).norm() <= 2e-5 * b.norm()
