"""Time of exact search in a pool on disk, against faiss's flat index in memory.

    python -m benchmarks.search                        # 1M x 512, 1,024 queries, k = 10
    python -m benchmarks.search --candidates 200000 --k 100

There are two pools, which are made here as stores. In `sphere` all directions are independent. In `cone` the embeddings
have cosines around 0.9, and the queries lie in another cone, as images and texts do. A gate must pass: the screened
searches equal the exact one to the bit, and faiss finds the same candidates, except where float32 can't tell neighbours
apart.

Searches are timed as `benchmarks/measurement.py` says. What is made once for a pool is timed separately, as
`build_seconds`: `kept` writes the int8 form of the vectors to disk, and `faiss_flat` makes an index of float32 vectors
in memory. `screened` quantises the float16 vectors in each search, as for a pool that is searched once. `exact` is the
definition. Our searches read from memory maps.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.measurement import (
    RESULTS,
    Measurement,
    argument_parser,
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
SAME_AS_FAISS = 0.99  # share of the indices

Search = Callable[[], tuple]  # scores and indices


def make_pool(folder: Path, pool: str, candidates: int, queries: int, dim: int) -> None:
    """Write those files of a store that a search of its vectors reads, and `queries.npy` in float32."""
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


# Every variant takes queries, a store and the number of its candidates that are searched (None: all). It makes what is
# made once and returns a function that searches.


def kept(queries: np.ndarray, store: Store, count: int | None, k: int) -> Search:
    codes = saved_codes(store)
    if codes is not None and count is not None:
        codes = SavedCodes(codes.codes[:count], codes.lengths[:, :count], codes.mean, codes.scale)
    return lambda: screened_top_k(queries, part_of(store, count), k, codes=codes)


def screened(queries: np.ndarray, store: Store, count: int | None, k: int) -> Search:
    return lambda: screened_top_k(queries, part_of(store, count), k)


def exact(queries: np.ndarray, store: Store, count: int | None, k: int) -> Search:
    return lambda: exact_top_k(queries, part_of(store, count), k)


def faiss_flat(queries: np.ndarray, store: Store, count: int | None, k: int) -> Search:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(queries.shape[1])
    vectors = part_of(store, count)
    for start in range(0, len(vectors), SHARD_ROWS):
        index.add(vectors[start : start + SHARD_ROWS].astype(np.float32))
    return lambda: index.search(queries, k)


VARIANTS = {variant.__name__: variant for variant in (kept, screened, faiss_flat, exact)}


def part_of(store: Store, count: int | None) -> Vectors:
    """The first `count` vectors, or all."""
    if count is None or count >= len(store.vectors):
        return store.vectors
    paths = store.vectors.paths[: -(-count // SHARD_ROWS)]
    vectors = Vectors(paths, store.vectors.shape[1])
    vectors.shape = (count, vectors.shape[1])
    return vectors


def gate(folder: str | Path, k: int) -> dict[str, Any]:
    """Compare the searches on the first candidates.

    Raises:
        SystemExit: a screened search differs from the exact one, or faiss finds too many other candidates.
    """
    queries, store = np.load(Path(folder) / "queries.npy"), Store(folder)
    count = min(GATE_CANDIDATES, len(store.vectors))
    found = {name: variant(queries, store, count, k)() for name, variant in VARIANTS.items()}
    for name in ("kept", "screened"):
        if not all(torch.equal(one, other) for one, other in zip(found[name], found["exact"])):
            raise SystemExit(f"{folder}: the search {name!r} differs from the exact one")
    same = float((found["faiss_flat"][1] == found["exact"][1].numpy()).mean())
    if same < SAME_AS_FAISS:
        raise SystemExit(f"{folder}: faiss finds only {same:.1%} of the exact search's candidates")
    return {"candidates": count, "equal": True, "same_as_faiss": same}


def work(folder: str, variant: str, k: int) -> Measurement:
    """Time one search, and before it what is made once."""
    queries, store = np.load(Path(folder) / "queries.npy"), Store(folder)
    VARIANTS[variant](queries, store, min(WARM_UP_CANDIDATES, len(store.vectors)), k)()  # loads the code
    delete_codes(Path(folder))
    start = time.perf_counter()
    search = VARIANTS[variant](queries, store, None, k)
    return {"build_seconds": time.perf_counter() - start} | measure(search)


def main() -> None:
    parser = argument_parser("search", __doc__)
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
        work_on: dict[str, Callable[..., Any]] = {"gate": gate, "work": work}
        task = json.loads(arguments.worker)
        print(json.dumps(work_on[task.pop("task")](**task)))
        return
    settings = {name: getattr(arguments, name) for name in ("candidates", "queries", "dim", "k")}
    result: dict[str, Any] = {
        "environment": environment(arguments.threads, SEED),
        "settings": settings,
        "gates": {},
        "pools": {},
    }
    for pool in arguments.pools:
        with tempfile.TemporaryDirectory() as folder:
            make_pool(Path(folder), pool, arguments.candidates, arguments.queries, arguments.dim)
            task = {"folder": folder, "k": arguments.k}
            result["gates"][pool] = run_worker("benchmarks.search", {"task": "gate"} | task, threads=arguments.threads)
            series = measure_rounds(
                lambda variant, task=task: run_worker(
                    "benchmarks.search", {"task": "work", "variant": variant} | task, threads=arguments.threads
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
