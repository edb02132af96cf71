"""How every speed benchmark measures.

- Each measurement runs in a subprocess of its own, or in several under torchrun. It inherits no peak of memory and no
  warm cache.
- Matrix products are timed before and after each measurement, as a calibration. If the two differ by more than 10 %,
  something else ran on the machine. The measurement is then dropped and repeated, a limited number of times, and all
  drops are counted.
- In each round every variant is measured once, one right after the other, so that all variants see the same drift of
  the machine.
- Figures are medians with the smallest and the largest value. A ratio of two variants is the median of the rounds'
  ratios. Rounds in which the machine was not equally fast for both are left out.

Seconds on one machine mean little: read the ratios.
"""

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from universal_gcl.evaluation.environment import PACKAGE, collect_environment, command_line, git_state

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "benchmarks"
TOLERANCE = 0.1  # between the two calibrations of a measurement
ATTEMPTS = 4  # at one measurement, before its round goes on without it
PEERS = ("sentence-transformers", "simplejpeg", "memeff", "inf-cl", "faiss-cpu")

Measurement = dict[str, Any]  # what `measure` returns, with further figures of a benchmark
Row = dict[str, Any]  # what `summarise` returns


# In the worker


def measure(
    step: Callable[[], Any],
    *,
    device: str = "cpu",
    at_least: float = 0.5,
    steps: int | None = None,
    warm_up: Callable[[], Any] | None = None,
) -> Measurement:
    """
    Time and memory of `step()`, which is repeated until `at_least` seconds have passed.

    Args:
        step: what is measured. Its arguments exist already, so their memory isn't counted.
        device: `"cpu"`, or `"cuda"`, which is timed by CUDA events.
        at_least: seconds.
        steps: call `step` exactly this often instead. Several processes must agree on a number.
        warm_up: called once before. On the CPU a small problem that loads the code is enough. On CUDA it must be the
            step itself, because kernels are tuned to their shapes.

    Returns:
        - `seconds`: of one step;
        - `bytes`: the peak beyond what was resident before (on CUDA: allocated);
        - `gemm_rates`: flops per second of matrix products before and after.
    """
    if warm_up is not None:
        warm_up()
    rate = gemm_rate(device)
    before = start_of_memory(device)
    times: list[float] = []
    while len(times) < (steps or 1) or (steps is None and sum(times) < at_least):
        times.append(_timed(step, device))
    peak = peak_of_memory(device)
    return {"seconds": statistics.mean(times), "bytes": max(0, peak - before), "gemm_rates": [rate, gemm_rate(device)]}


def _timed(step: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def gemm_rate(device: str = "cpu", seconds: float = 0.5) -> float:
    """Flops per second of large matrix products: float32 on the CPU (2048 × 512 × 2048), bfloat16 on CUDA (8192³)."""
    n, k, dtype = (2048, 512, torch.float32) if device == "cpu" else (8192, 8192, torch.bfloat16)
    a, b = torch.randn(n, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    out = a @ b
    products, passed = 0, 0.0
    while passed < seconds:
        passed += _timed(lambda: torch.mm(a, b, out=out), device)
        products += 1
    return products * 2 * n * n * k / passed


def start_of_memory(device: str = "cpu") -> int:
    """Bytes in use now. Hands free memory back to the system and resets the peak."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # only glibc has it
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass  # the peak then includes that of the warm-up, which is small
    return resident("VmRSS")


def peak_of_memory(device: str = "cpu") -> int:
    """The largest number of bytes in use since `start_of_memory`."""
    return resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def resident(which: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak). Unlike getrusage's peak, VmHWM does not include that of the parent."""
    found = re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no line {which}: memory can only be measured on Linux")
    return 1024 * int(found[1])


# In the parent


def argument_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m benchmarks.NAME`, which shows the docstring of the module as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_worker(module: str, task: Mapping[str, Any], *, threads: int, processes: int = 1) -> Measurement:
    """
    Run `python -m MODULE --worker TASK` and return the last line of JSON that it prints.

    Several processes run under torchrun, and one of them prints.

    Args:
        module: a benchmark's module, such as `benchmarks.loss`.
        task: passed on as JSON.
        threads: of each process.

    Raises:
        SystemExit: the worker failed; the message has its error output.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environ = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command += ["-m", module, "--worker", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{module} failed at {task}:\n{done.stderr[-4000:]}")
    return json.loads(lines[-1])


def steady(measurement: Measurement) -> bool:
    """Whether the calibrations before and after differ by at most 10 %."""
    return _agree(measurement["gemm_rates"])


def _agree(rates: Sequence[float]) -> bool:
    return max(rates) <= (1 + TOLERANCE) * min(rates)


def _rate(measurement: Measurement) -> float:
    return statistics.mean(measurement["gemm_rates"])


def measure_rounds(
    measure_one: Callable[[str], Measurement], names: Iterable[str], rounds: int, attempts: int = ATTEMPTS
) -> dict[str, list[Measurement]]:
    """
    Call `measure_one(name)` for every name in turn, in each of `rounds` rounds, and repeat what was not steady.

    Returns:
        name → one entry for each round. An entry is a measurement with `dropped`, the number of attempts before it that
        were dropped, or `{"dropped": attempts}` if no attempt was steady.
    """
    names = list(names)
    series: dict[str, list[Measurement]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            for dropped in range(attempts):
                measurement = measure_one(name)
                if steady(measurement):
                    series[name].append(measurement | {"dropped": dropped})
                    break
            else:
                series[name].append({"dropped": attempts})
    return series


def summarise(
    series: Sequence[Measurement],
    references: Mapping[str, Sequence[Measurement]] | None = None,
    flops: float | None = None,
) -> Row:
    """
    Summarise one variant's series of `measure_rounds` in one row.

    Args:
        series: one entry for each round.
        references: name → series of the variants that ratios refer to.
        flops: flops of the ideal computation.

    Returns:
        - `rounds`; `kept`, the number of rounds with a measurement; `dropped`, the number of dropped measurements;
        - if any round was kept, `{median, min, max}` of `seconds`, `bytes`, every further figure of the measurements,
          and `gemm_rate`;
        - with `flops`, `to_gemm`: seconds divided by the time of as many flops at the rate of the calibration;
        - `ratio_to`: reference → `{median, min, max}` of this variant's seconds divided by the reference's, over
          `rounds` rounds, those in which both were kept and the machine was equally fast for both (calibrations within
          10 %); and `of_medians`, the ratio of the medians over all rounds.
    """
    kept = [entry for entry in series if "seconds" in entry]
    row: Row = {"rounds": len(series), "kept": len(kept), "dropped": sum(entry["dropped"] for entry in series)}
    if not kept:
        return row
    rates = [_rate(entry) for entry in kept]
    row |= {name: spread([entry[name] for entry in kept]) for name in kept[0] if name not in ("gemm_rates", "dropped")}
    row["gemm_rate"] = spread(rates)
    if flops is not None:
        row["to_gemm"] = spread([entry["seconds"] * rate / flops for entry, rate in zip(kept, rates)])
    for name, reference in (references or {}).items():
        both = [(own, other) for own, other in zip(series, reference) if "seconds" in own and "seconds" in other]
        comparable = [(own, other) for own, other in both if _agree([_rate(own), _rate(other)])]
        if comparable:
            of_reference = statistics.median(other["seconds"] for other in reference if "seconds" in other)
            ratio = {"rounds": len(comparable), "of_medians": row["seconds"]["median"] / of_reference}
            ratio |= spread([own["seconds"] / other["seconds"] for own, other in comparable])
            row.setdefault("ratio_to", {})[name] = ratio
    return row


def spread(values: Sequence[float]) -> dict[str, float]:
    """`{"median", "min", "max"}` of the values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def environment(threads: int, seed: int = 0) -> dict[str, Any]:
    """What figures depend on: processor and its bfloat16 arithmetic, versions, command, seed, git commit; for JSON.

    `git.dirty` ignores `results` and the page made from it, because an earlier benchmark may just have written them.
    """
    result = collect_environment()
    for package in PEERS:
        try:
            result["packages"][package] = version(package)
        except PackageNotFoundError:
            continue
    result["git"] = git_state(PACKAGE, leave_out=["results", "docs/performance*"])
    flags = Path("/proc/cpuinfo").read_text().split()
    result["cpu"] |= {
        "capability": torch.backends.cpu.get_cpu_capability(),
        # without either, products of bfloat16 are emulated and the bf16 variants are no faster
        "bfloat16": {name: name in flags for name in ("avx512_bf16", "amx_bf16")},
    }
    return result | {"threads": threads, "seed": seed, "command": command_line()}


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write JSON. Benchmarks call this after each part, so that an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
