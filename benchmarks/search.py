"""Time of exact search over a pool on disk, against faiss' flat index in memory.

    python benchmarks/search.py                        # 1M x 512, 1,024 queries, k = 10
    python benchmarks/search.py --candidates 200000 --k 100

Pools are made here: `sphere`, independent directions, and `cone`, whose embeddings are alike to a cosine of 0.9 and
whose queries lie in another cone, as images and texts do. The gate: the screened search must equal the exact one to the
bit, and faiss must find the same but where float32 cannot tell neighbours apart. Our searches stream float16 from a
memory map and are timed with all they do; faiss holds float32 in memory, and making its index is not timed. Then the
protocol is that of protocol.py.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.protocol import (  # noqa: E402
    RESULTS,
    environment,
    measure,
    measure_rounds,
    run_worker,
    summarise,
    write_result,
)
from retrieval.screening import screened_top_k  # noqa: E402
from retrieval.search import exact_top_k  # noqa: E402

SEED = 0
POOLS = ("sphere", "cone")
ROWS_AT_ONCE = 65536
GATE_CANDIDATES = 100_000
SAME_AS_FAISS = 0.99  # of the indices


def make_pool(folder, pool, candidates, queries, dim):
    """Writes `candidates.npy`, float16, and `queries.npy`, float32."""
    generator = torch.Generator().manual_seed(SEED)
    axes = torch.randn(2, dim, generator=generator) * (3.0 if pool == "cone" else 0.0)
    mapped = np.lib.format.open_memmap(folder / "candidates.npy", mode="w+", dtype=np.float16, shape=(candidates, dim))
    for start in range(0, candidates, ROWS_AT_ONCE):
        rows = torch.randn(min(ROWS_AT_ONCE, candidates - start), dim, generator=generator) + axes[0]
        mapped[start : start + len(rows)] = F.normalize(rows, dim=1).half().numpy()
    mapped.flush()
    rows = torch.randn(queries, dim, generator=generator) + axes[1]
    np.save(folder / "queries.npy", F.normalize(rows, dim=1).numpy())


def read_pool(folder, candidates=None):
    pool = np.load(Path(folder) / "candidates.npy", mmap_mode="r")
    return np.load(Path(folder) / "queries.npy"), pool[:candidates]


# Every variant takes queries and candidates, and returns a function that searches.


def screened(queries, candidates, k):
    return lambda: screened_top_k(queries, candidates, k)


def exact(queries, candidates, k):
    """The definition, in float64."""
    return lambda: exact_top_k(queries, candidates, k)


def faiss_flat(queries, candidates, k):
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(queries.shape[1])
    for start in range(0, len(candidates), ROWS_AT_ONCE):
        index.add(candidates[start : start + ROWS_AT_ONCE].astype(np.float32))
    return lambda: index.search(queries, k)


VARIANTS = {variant.__name__: variant for variant in (screened, faiss_flat, exact)}


def gate(folder, k):
    """
    Raises:
        SystemExit: the screened search differs from the exact one, or faiss from both.
    """
    queries, candidates = read_pool(folder, GATE_CANDIDATES)
    found, expected, peer = (VARIANTS[name](queries, candidates, k)() for name in ("screened", "exact", "faiss_flat"))
    if not all(torch.equal(one, other) for one, other in zip(found, expected)):
        raise SystemExit(f"{folder}: the screened search differs from the exact one")
    same = float((peer[1] == expected[1].numpy()).mean())
    if same < SAME_AS_FAISS:
        raise SystemExit(f"{folder}: faiss finds {same:.1%} of the exact search's candidates only")
    return {"candidates": len(candidates), "equal": True, "same_as_faiss": same}


def work(folder, variant, k):
    search = VARIANTS[variant](*read_pool(folder), k)
    warm_up = VARIANTS[variant](*read_pool(folder, 70_000), k)
    return measure(search, warm_up=warm_up)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=POOLS)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "search.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        task = json.loads(arguments.worker)
        print(json.dumps({"gate": gate, "work": work}[task.pop("task")](**task)))
        return
    settings = {name: getattr(arguments, name) for name in ("candidates", "queries", "dim", "k")}
    result = {"environment": environment(arguments.threads, SEED), "settings": settings, "gates": {}, "pools": {}}
    for pool in arguments.pools:
        with tempfile.TemporaryDirectory() as folder:
            make_pool(Path(folder), pool, arguments.candidates, arguments.queries, arguments.dim)
            task = {"folder": folder, "k": arguments.k}
            result["gates"][pool] = run_worker(__file__, {"task": "gate"} | task, threads=arguments.threads)
            series = measure_rounds(
                lambda variant, task=task: run_worker(
                    __file__, {"task": "work", "variant": variant} | task, threads=arguments.threads
                ),
                arguments.variants,
                arguments.rounds,
            )
        references = {"faiss_flat": series["faiss_flat"]} if "faiss_flat" in series else {}
        flops = 2 * arguments.candidates * arguments.queries * arguments.dim
        result["pools"][pool] = {name: summarise(series[name], references, flops) for name in arguments.variants}
        for name, row in result["pools"][pool].items():
            print(pool, name, json.dumps(row), flush=True)
        write_result(arguments.out, result)


if __name__ == "__main__":
    main()
