"""How every benchmark here measures.

Notable features:
- one subprocess per measurement (several under torchrun), so that no peak of memory and no warm cache is inherited;
- a calibration by matrix products before and after each measurement: if the two differ by more than 10 %, something
  else ran beside it, and the measurement is dropped and repeated, a bounded number of times, all counted;
- rounds: in each, every variant is measured once, right after the others, so that a machine's drift meets all alike;
- medians with smallest and largest; a ratio of two variants is the median of the rounds' ratios, leaving out rounds in
  which the machine was not as fast for one as for the other.

Seconds of one machine mean little: read the ratios.
"""

import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from universal_gcl.evaluation.environment import collect_environment, command_line

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "benchmarks"
TOLERANCE = 0.1  # between the two calibrations around a measurement
ATTEMPTS = 4  # at one measurement, before its round does without it
PEERS = ("sentence-transformers", "simplejpeg", "memeff", "inf-cl", "faiss-cpu")


# in the worker


def measure(step, *, device="cpu", at_least=0.5, steps=None, warm_up=None):
    """
    Time and memory of `step()`, called again until `at_least` seconds have passed.

    Args:
        step (callable): what is measured; its arguments exist already, and their memory isn't counted.
        device (`str`): `"cpu"`, or `"cuda"`: then timed by CUDA events.
        at_least (`float`): seconds.
        steps (`int`, *optional*): call it exactly so often instead; several processes must agree.
        warm_up (callable, *optional*): called once before; on CPU a small problem that loads code is enough, on CUDA
            the step itself, since kernels are tuned to their shapes.

    Returns:
        `dict`: `seconds` per step; `bytes`: peak beyond what was resident (on CUDA: allocated) before; `gemm_rates`:
        flops per second of the matrix products before and after.
    """
    if warm_up is not None:
        warm_up()
    rate = gemm_rate(device)
    before = start_of_memory(device)
    times = []
    while len(times) < (steps or 1) or (steps is None and sum(times) < at_least):
        times.append(_timed(step, device))
    peak = peak_of_memory(device)
    return {"seconds": statistics.mean(times), "bytes": max(0, peak - before), "gemm_rates": [rate, gemm_rate(device)]}


def _timed(step, device):
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def gemm_rate(device="cpu", seconds=0.5):
    """Flops per second of large matrix products: float32 on CPU (2048 × 512 × 2048), bfloat16 on CUDA (8192³)."""
    n, k, dtype = (2048, 512, torch.float32) if device == "cpu" else (8192, 8192, torch.bfloat16)
    a, b = torch.randn(n, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    out = a @ b
    products, passed = 0, 0.0
    while passed < seconds:
        passed += _timed(lambda: torch.mm(a, b, out=out), device)
        products += 1
    return products * 2 * n * n * k / passed


def start_of_memory(device="cpu"):
    """Bytes in use now; resets the peak, after handing back to the system what is free."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass  # then the peak includes the warm-up's, which is small
    return resident("VmRSS")


def peak_of_memory(device="cpu"):
    """Bytes, the largest since `start_of_memory`."""
    return resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def resident(which):
    """Bytes of VmRSS (now) or VmHWM (the peak; unlike getrusage's, a parent's does not pass to its children)."""
    return 1024 * int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# in the parent


def run_worker(script, task, *, threads, processes=1):
    """
    What `python -m benchmarks.NAME --worker TASK` prints last: a measurement, as one line of JSON.
    With several processes it runs under torchrun, and one of them prints.

    Args:
        script (`str`): `__file__` of the benchmark.
        task (`dict`): becomes JSON.
        threads (`int`): of each process.

    Raises:
        SystemExit: the worker failed; with its error output.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command += [script, "--worker", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{Path(script).name} failed at {task}:\n{done.stderr[-4000:]}")
    return json.loads(lines[-1])


def steady(measurement):
    """Whether the calibrations before and after differ by at most 10 %."""
    return _agree(measurement["gemm_rates"])


def _agree(rates):
    return max(rates) <= (1 + TOLERANCE) * min(rates)


def _rate(measurement):
    return statistics.mean(measurement["gemm_rates"])


def measure_rounds(measure_one, names, rounds, attempts=ATTEMPTS):
    """
    `rounds` rounds, in each of which `measure_one(name)` is called for every name in turn, again where it was not
    steady.

    Returns:
        `dict[str, list]`: for each name, one entry per round: its measurement with `dropped`, the number of attempts
        before it that were dropped; `{"dropped": attempts}` alone where none was steady.
    """
    series = {name: [] for name in names}
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


def summarise(series, references=None, flops=None):
    """
    One row of results from one variant's series of `measure_rounds`.

    Args:
        series (`list[dict]`): one entry per round.
        references (`dict[str, list[dict]]`, *optional*): name → series of the variants that ratios refer to.
        flops (`float`, *optional*): of the ideal computation.

    Returns:
        `dict`: `rounds`, `kept`, `dropped` (measurements), then, where any was kept, `{median, min, max}` of each of
        `seconds`, `bytes` and every further figure of the measurements; `gemm_rate`; with `flops` `to_gemm`: seconds by
        those of as many flops at the calibration's rate; `ratio_to`: for each reference `{median, min, max}` of
        this variant's seconds by the reference's, over the `rounds` in which both were kept and the machine was as
        fast for one as for the other (calibrations within 10 %), and `of_medians`, over all.
    """
    kept = [entry for entry in series if "seconds" in entry]
    row = {"rounds": len(series), "kept": len(kept), "dropped": sum(entry["dropped"] for entry in series)}
    if not kept:
        return row
    rates = [_rate(entry) for entry in kept]
    row |= {name: spread([entry[name] for entry in kept]) for name in kept[0] if name not in ("gemm_rates", "dropped")}
    row["gemm_rate"] = spread(rates)
    if flops is not None:
        row["to_gemm"] = spread([entry["seconds"] * rate / flops for entry, rate in zip(kept, rates)])
    for name, reference in (references or {}).items():
        both = [(own, other) for own, other in zip(series, reference) if "seconds" in own and "seconds" in other]
        alike = [(own, other) for own, other in both if _agree([_rate(own), _rate(other)])]
        if alike:
            of_reference = statistics.median(other["seconds"] for other in reference if "seconds" in other)
            ratio = {"rounds": len(alike), "of_medians": row["seconds"]["median"] / of_reference}
            ratio |= spread([own["seconds"] / other["seconds"] for own, other in alike])
            row.setdefault("ratio_to", {})[name] = ratio
    return row


def spread(values):
    """`{"median", "min", "max"}`."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def environment(threads, seed=0):
    """What figures depend on: processor and its bfloat16 arithmetic, versions, command, seed, git SHA; for JSON.

    `git.dirty` leaves `results` and the page made from it out, which a benchmark before this one may just have written.
    """
    result = collect_environment()
    for package in PEERS:
        try:
            result["packages"][package] = version(package)
        except PackageNotFoundError:
            continue
    git = ["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!results", ":!docs/performance*"]
    changes = subprocess.run(git, capture_output=True, text=True)
    result["git"]["dirty"] = bool(changes.stdout.strip()) if changes.returncode == 0 else None
    flags = Path("/proc/cpuinfo").read_text().split()
    result["cpu"] |= {
        "capability": torch.backends.cpu.get_cpu_capability(),
        # without either, products of bfloat16 are emulated and the bf16 variants gain nothing
        "bfloat16": {name: name in flags for name in ("avx512_bf16", "amx_bf16")},
    }
    return result | {"threads": threads, "seed": seed, "command": command_line()}


def write_result(path, result):
    """Write as JSON; called after each part, so that an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
