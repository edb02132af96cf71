"""Time of exact search over a pool on disk, against faiss' flat index in memory.

    python -m benchmarks.search                        # 1M x 512, 1,024 queries, k = 10
    python -m benchmarks.search --candidates 200000 --k 100

Pools are stores, made here: `sphere`, independent directions, and `cone`, whose embeddings are alike to a cosine of 0.9
and whose queries lie in another cone, as images and texts do. The gate: the screened searches must equal the exact one
to the bit, and faiss must find the same but where float32 cannot tell neighbours apart.

What is timed is a search; what is made once for a pool comes before, and its time is reported beside it
(`build_seconds`): for `kept` the int8 form of the vectors, written to disk, and for `faiss_flat` its index, the vectors
as float32 in memory. `screened` quantises the float16 vectors in each search, as for a pool that is searched once, and
`exact` is the definition; neither makes anything before. Ours read from memory maps. Then the protocol is that of
protocol.py.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.protocol import (
    RESULTS,
    environment,
    measure,
    measure_rounds,
    run_worker,
    summarise,
    write_result,
)
from universal_gcl.retrieval.quantised import SavedCodes, delete_codes, saved_codes
from universal_gcl.retrieval.screening import screened_top_k
from universal_gcl.retrieval.search import exact_top_k
from universal_gcl.retrieval.store import FORMAT, Store, Vectors, shard_paths, write_json

SEED = 0
POOLS = ("sphere", "cone")
SHARD_ROWS = 4096  # as `embed_rows` writes them
GATE_CANDIDATES = 100_000
WARM_UP_CANDIDATES = 70_000
SAME_AS_FAISS = 0.99  # of the indices


def make_pool(folder, pool, candidates, queries, dim):
    """Writes a store of `candidates`, all that searches of vectors read, and `queries.npy`, float32."""
    generator = torch.Generator().manual_seed(SEED)
    axes = torch.randn(2, dim, generator=generator) * (3.0 if pool == "cone" else 0.0)
    counts = [min(SHARD_ROWS, candidates - start) for start in range(0, candidates, SHARD_ROWS)]
    for path, count in zip(shard_paths(folder, len(counts)), counts):
        rows = torch.randn(count, dim, generator=generator) + axes[0]
        np.save(path, F.normalize(rows, dim=1).half().numpy())
    np.save(folder / "rows.npy", np.arange(candidates))
    write_json(folder / "manifest.json", {"format": FORMAT, "complete": True, "dim": dim, "shards": counts})
    rows = torch.randn(queries, dim, generator=generator) + axes[1]
    np.save(folder / "queries.npy", F.normalize(rows, dim=1).numpy())


# Every variant takes queries, a store and how many candidates of it are searched (None: all), makes what is made once,
# and returns a function that searches.


def kept(queries, store, count, k):
    codes = saved_codes(store)
    if count is not None:
        codes = SavedCodes(codes.codes[:count], codes.lengths[:, :count], codes.mean, codes.scale)
    return lambda: screened_top_k(queries, part_of(store, count), k, codes=codes)


def screened(queries, store, count, k):
    return lambda: screened_top_k(queries, part_of(store, count), k)


def exact(queries, store, count, k):
    return lambda: exact_top_k(queries, part_of(store, count), k)


def faiss_flat(queries, store, count, k):
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(queries.shape[1])
    vectors = part_of(store, count)
    for start in range(0, len(vectors), SHARD_ROWS):
        index.add(vectors[start : start + SHARD_ROWS].astype(np.float32))
    return lambda: index.search(queries, k)


VARIANTS = {variant.__name__: variant for variant in (kept, screened, faiss_flat, exact)}


def part_of(store, count):
    """The first `count` vectors, or all."""
    if count is None or count >= len(store.vectors):
        return store.vectors
    paths = store.vectors.paths[: -(-count // SHARD_ROWS)]
    vectors = Vectors(paths, store.vectors.shape[1])
    vectors.shape = (count, vectors.shape[1])
    return vectors


def gate(folder, k):
    """
    Raises:
        SystemExit: a screened search differs from the exact one, or faiss from all.
    """
    queries, store = np.load(Path(folder) / "queries.npy"), Store(folder)
    count = min(GATE_CANDIDATES, len(store.vectors))
    found = {name: variant(queries, store, count, k)() for name, variant in VARIANTS.items()}
    for name in ("kept", "screened"):
        if not all(torch.equal(one, other) for one, other in zip(found[name], found["exact"])):
            raise SystemExit(f"{folder}: the search {name!r} differs from the exact one")
    same = float((found["faiss_flat"][1] == found["exact"][1].numpy()).mean())
    if same < SAME_AS_FAISS:
        raise SystemExit(f"{folder}: faiss finds {same:.1%} of the exact search's candidates only")
    return {"candidates": count, "equal": True, "same_as_faiss": same}


def work(folder, variant, k):
    queries, store = np.load(Path(folder) / "queries.npy"), Store(folder)
    VARIANTS[variant](queries, store, min(WARM_UP_CANDIDATES, len(store.vectors)), k)()  # loads code
    delete_codes(Path(folder))
    start = time.perf_counter()
    search = VARIANTS[variant](queries, store, None, k)
    return {"build_seconds": time.perf_counter() - start} | measure(search)


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
