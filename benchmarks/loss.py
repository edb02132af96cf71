"""Time and memory of the GCL loss, forward and backward, against its peers.

    python benchmarks/loss.py --sizes 1024 4096 8192 --threads 2

Protocol: a float64 correctness gate; one subprocess per measurement; variants interleaved, several rounds, medians; a
GEMM calibration before and after each measurement, which is dropped if the two differ by more than 10 %; memory as peak
resident bytes beyond embeddings and their gradients. Seconds of one machine mean little: read the ratios.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from modeling_gcl import contrastive_loss, gcl_loss  # noqa: E402

SCALE = 1 / 0.02


def tiles(embeds):
    gcl_loss(*embeds, SCALE).backward()


def tiles_bf16(embeds):
    gcl_loss(*embeds, SCALE, bf16=True).backward()


def tiles_bf16_cache(embeds):
    """Half of all exponentiated logits kept."""
    gcl_loss(*embeds, SCALE, bf16=True, cache_bytes=int(4.5 * len(embeds[0]) ** 2)).backward()


def tiles_bf16_all_kept(embeds):
    gcl_loss(*embeds, SCALE, bf16=True, cache_bytes=10 * len(embeds[0]) ** 2).backward()


def autograd(embeds):
    """The best one line: SupCon's L_out with one log-sum-exp per row and the positives apart."""
    z = torch.cat(embeds)
    logits = (SCALE * z @ z.T).fill_diagonal_(-torch.inf)
    ((2 * logits.logsumexp(1).sum() - _positives(embeds)) / (2 * len(z))).backward()


def checkpointed_strips(embeds):
    """Rows in strips of 512, each computed again in backward."""
    z = torch.cat(embeds)

    def strip(z, start):
        logits = SCALE * z[start : start + 512] @ z.T
        logits.diagonal(start).fill_(-torch.inf)
        return logits.logsumexp(1).sum()

    total = sum(checkpoint(strip, z, start, use_reentrant=False) for start in range(0, len(z), 512))
    ((2 * total - _positives(embeds)) / (2 * len(z))).backward()


def open_clip_three_times(embeds):
    """CLIP's loss as open_clip writes it on one process, for each pair of modalities (6 of the 9 blocks)."""
    labels = torch.arange(len(embeds[0]))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        per_a, per_b = SCALE * embeds[a] @ embeds[b].T, SCALE * embeds[b] @ embeds[a].T
        ((F.cross_entropy(per_a, labels) + F.cross_entropy(per_b, labels)) / 6).backward()


def sentence_transformers_cached(embeds, mini_batch_size):
    """The loss stage of CachedMultipleNegativesRankingLoss, both directions, for each pair of modalities."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    loss = CachedMultipleNegativesRankingLoss(
        torch.nn.Sequential(torch.nn.Identity()),  # stands in for the encoder, which this stage does not call
        scale=SCALE,
        similarity_fct=dot_score,
        mini_batch_size=mini_batch_size,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    for a, b in ((0, 1), (0, 2), (1, 2)):
        chunks = [[c.detach().requires_grad_() for c in embeds[k].split(mini_batch_size)] for k in (a, b)]
        loss.calculate_loss(chunks, with_backward=True)
        for k, parts in zip((a, b), chunks):
            embeds[k].grad.add_(torch.cat([c.grad for c in parts]) / 3)


def sentence_transformers_1024(embeds):
    sentence_transformers_cached(embeds, 1024)


def sentence_transformers_32(embeds):
    sentence_transformers_cached(embeds, 32)


def _positives(embeds):
    return SCALE * (sum(embeds).square().sum() - sum(x.square().sum() for x in embeds))


def _gcl(embeds):
    return gcl_loss(*embeds, SCALE)


def _three_times_cl(embeds):
    return sum(contrastive_loss(embeds[a], embeds[b], SCALE) for a, b in ((0, 1), (0, 2), (1, 2))) / 3


# variant: (what it must equal in float64, tolerance of its gradient, largest N it is run at)
VARIANTS = {
    tiles: (_gcl, 1e-5, None),
    tiles_bf16: (_gcl, 1e-2, None),
    tiles_bf16_cache: (_gcl, 1e-2, 16384),
    tiles_bf16_all_kept: (_gcl, 1e-2, 16384),
    autograd: (_gcl, 1e-5, 8192),
    checkpointed_strips: (_gcl, 1e-5, 16384),
    open_clip_three_times: (_three_times_cl, 1e-5, 16384),
    sentence_transformers_1024: (_three_times_cl, 1e-5, 8192),
    sentence_transformers_32: (_three_times_cl, 1e-5, 1024),
}


def make_embeds(num_pairs, dim, dtype=torch.float32):
    """Cone-shaped sets, as encoders give them: cosines around 0.5."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(dim, generator=generator)
    embeds = []
    for _ in range(3):
        x = F.normalize(common + torch.randn(num_pairs, dim, generator=generator), dim=-1).to(dtype).requires_grad_()
        x.grad = torch.zeros_like(x)
        embeds.append(x)
    return embeds


def gate(variant):
    """Raise unless the variant's gradient at N = 1,100 (no multiple of any tile) is right."""
    expected_of, tolerance, _ = VARIANTS[variant]
    embeds, exact = make_embeds(1100, 64), make_embeds(1100, 64, torch.float64)
    variant(embeds)
    expected_of(exact).backward()
    for got, want in zip(embeds, exact):
        error = ((got.grad.double() - want.grad).norm() / want.grad.norm()).item()
        if not error <= tolerance:
            raise SystemExit(f"{variant.__name__}: relative error of the gradient is {error:.1e} > {tolerance}")


def gemm_rate():
    """Flops per second of large float32 matrix products, over half a second."""
    a, b = torch.randn(2048, 512), torch.randn(512, 2048)
    out, rounds, start = a @ b, 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < 0.5:
        torch.mm(a, b, out=out)
        rounds += 1
    return rounds * 2 * 2048 * 2048 * 512 / seconds


def resident(which):
    """Bytes of VmRSS (now) or VmHWM (the peak; unlike getrusage's, a parent's does not pass to its children)."""
    return 1024 * int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(variant, num_pairs, dim):
    """One measurement in this process, as a dict."""
    gate(variant)  # warms up, too
    embeds = make_embeds(num_pairs, dim)
    rate_before = gemm_rate()
    before = resident("VmRSS")
    steps, start = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - start < 0.5:
        variant(embeds)
        steps += 1
    seconds = (time.perf_counter() - start) / steps
    return {
        "seconds": seconds,
        "bytes": max(0, resident("VmHWM") - before),
        "gemm_rates": [rate_before, gemm_rate()],
    }


def run_worker(variant, num_pairs, arguments):
    worker = [variant.__name__, str(num_pairs), str(arguments.dim), str(arguments.threads)]
    done = subprocess.run([sys.executable, __file__, "--worker", *worker], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{variant.__name__} failed at N = {num_pairs}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summarise(rounds, num_pairs, dim):
    """Medians over the rounds whose two GEMM calibrations agree within 10 %."""
    kept = [r for r in rounds if max(r["gemm_rates"]) <= 1.1 * min(r["gemm_rates"])]
    if not kept:
        return {"rounds": len(rounds), "kept": 0}
    ideal = 36 * num_pairs**2 * dim
    return {
        "rounds": len(rounds),
        "kept": len(kept),
        "seconds": statistics.median(r["seconds"] for r in kept),
        "to_gemm_of_36_n2d": statistics.median(r["seconds"] / (ideal / statistics.mean(r["gemm_rates"])) for r in kept),
        "bytes": statistics.median(r["bytes"] for r in kept),
        "gemm_rate": statistics.median(statistics.mean(r["gemm_rates"]) for r in kept),
    }


def environment(arguments):
    processor = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    sha = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return {
        "processor": processor[1] if processor else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git": sha,
        "dim": arguments.dim,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 8192], help="numbers of pairs")
    parser.add_argument("--variants", nargs="+", default=None, help="names of functions in this file; default: all")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/loss.json")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    by_name = {variant.__name__: variant for variant in VARIANTS}
    if arguments.worker:
        name, num_pairs, dim, threads = arguments.worker
        torch.set_num_threads(int(threads))
        print(json.dumps(measure(by_name[name], int(num_pairs), int(dim))))
        return
    chosen = [by_name[name] for name in arguments.variants or by_name]
    result = {"environment": environment(arguments), "sizes": {}}
    for num_pairs in arguments.sizes:
        fitting = [v for v in chosen if VARIANTS[v][2] is None or num_pairs <= VARIANTS[v][2]]
        rounds = {v: [] for v in fitting}
        for _ in range(arguments.rounds):
            for variant in fitting:
                rounds[variant].append(run_worker(variant, num_pairs, arguments))
        rows = {v.__name__: summarise(rounds[v], num_pairs, arguments.dim) for v in fitting}
        reference = rows.get("tiles", {}).get("seconds")
        for name, row in rows.items():
            if reference and "seconds" in row:
                row["to_tiles"] = row["seconds"] / reference
            print(num_pairs, name, json.dumps(row), flush=True)
        result["sizes"][num_pairs] = rows
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
