"""`exact_top_k`, several times faster on large pools: all candidates are compared in int8, and few of them exactly.

For a query q, a candidate x is discarded only if a bound proves that x is not among the k best:

- The queries are split. Let d be the direction of their mean. Then q = a·d + p. Embeddings of one modality lie in a
  cone, so that d·x may explain most of the difference between the scores of two candidates.
- The candidates are written in int8. x = μ + s∘X + r, where μ is the centre of the pool, s a scale for each dimension,
  X is int8, and r is the error of rounding and clipping (see `retrieval.quantised`). The query is rounded in the same
  way: p∘s = t·Y + e, where Y is int8.
- Then q·x = q·μ + a·(d∘s)·X + t·Y·X + e·X + q·r. Only the integer Y·X is computed for every pair. The last two terms
  are bounded by |e·X| ≤ |e| |X| and |q·r| ≤ |q| |r|. The bound is first computed for groups of candidates, from the
  largest Y·X, (d∘s)·X, |X| and |r| in the group. Candidates are sorted by (d∘s)·X, so that those of a group are
  similar.
- The candidates seen so far give a lower bound for the k-th best score of the query. x is discarded if its upper bound
  is below that. The candidates that remain are scored in float32 and compared again. Those that then remain, few more
  than k, are scored as in `exact_top_k`.

So the result equals that of `exact_top_k` bit for bit, on any pool. μ, s and d only affect how many candidates remain.
If too many remain (for example because thousands of candidates are equal), the query is compared exactly with the whole
chunk. On a CPU, each of torch's threads searches its own chunks.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F

from universal_gcl.retrieval.quantised import Codes, SavedCodes, StreamedCodes, runs_over
from universal_gcl.retrieval.search import (
    Matrix,
    as_tensor,
    check_inputs,
    exact_top_k,
    keys_of,
    on_grid,
    scores_and_indices,
    top_keys,
)

_MIN_CANDIDATES = 1 << 16
_MIN_SAMPLE = 1 << 14
_QUERIES_AT_ONCE = 4096  # queries that share one pass over the pool
_BLOCK_QUERIES = 512
_BLOCK_PRODUCTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # products computed at once: as many as fit into the cache
_GROUP = 16  # candidates in a group
_PAIRS = 1 << 9  # (query, candidate) pairs that are scored at once
_MAX_PENDING = 1024  # pairs per query, beyond 4 k, that may wait for being scored exactly
_ROWS_AT_ONCE = 1 << 9
_NO_KEY = torch.iinfo(torch.int64).min
# The largest number of a chunk must lie in this range: float32 then does not overflow, and the bounds hold
_SAFE = (1e-12, 1e12)


def screened_top_k(
    queries: Matrix, candidates: Matrix, k: int, *, codes: SavedCodes | None = None, chunk_size: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the same as `exact_top_k`, bit for bit. Arguments, result and errors are described there.

    Args:
        candidates: as in `exact_top_k`. An array of indices must be allowed as an index, as for arrays, tensors and
            `np.memmap`.
        codes: the int8 codes of the candidates. With them, only the candidates that remain are read. Without them, all
            candidates are read and their codes are computed.
        chunk_size: number of candidates compared at once. It affects memory use and speed, not the result.
    """
    queries, candidates = check_inputs(queries, candidates, k, chunk_size)
    if not worth_screening(candidates.shape[0], k):
        return exact_top_k(queries, candidates, k)
    pool = StreamedCodes(candidates, queries.device) if codes is None else codes.to(queries.device)
    parts = [
        _search(part, candidates, pool, k, chunk_size, row)
        for row, part in zip(range(0, len(queries), _QUERIES_AT_ONCE), queries.split(_QUERIES_AT_ONCE))
    ]
    scores, indices = zip(*parts)
    return torch.cat(scores), torch.cat(indices)


def worth_screening(count: int, k: int) -> bool:
    """Whether a pool of `count` candidates is large enough. For a smaller one, `exact_top_k` is as fast."""
    return count >= max(_MIN_CANDIDATES, 2 * _sample_size(k))


def _sample_size(k: int) -> int:
    return max(_MIN_SAMPLE, 4 * k * _GROUP)


def _search(
    embeddings: torch.Tensor, candidates: Matrix, pool: Codes, k: int, chunk_size: int, first_query: int
) -> tuple[torch.Tensor, torch.Tensor]:
    queries = _Queries(on_grid(embeddings, "queries", first_query))
    count, everyone = candidates.shape[0], torch.arange(len(queries.grid), device=queries.grid.device)
    if not queries.safe or not pool.mean.isfinite().all():
        return exact_top_k(queries.grid, candidates, k)
    screen = _Screen(queries, pool)
    lower = _lower_bounds(screen, candidates, k, runs_over(count, _sample_size(k)))
    if lower is None:
        return exact_top_k(queries.grid, candidates, k)
    threads = torch.get_num_threads() if lower.device.type == "cpu" else 1
    threads = min(threads, -(-count // chunk_size))

    def search(thread: int) -> torch.Tensor:
        found = _Results(queries, candidates, k, lower)
        for start in range(thread * chunk_size, count, threads * chunk_size):
            stop, crowded = min(start + chunk_size, count), everyone
            chunk = screen.chunk([(start, stop)])
            if chunk is not None:
                pairs, crowded = screen.survivors(chunk, lower)
                found.add(pairs, start, chunk.slack)
            if len(crowded):
                rows = as_tensor(candidates[start:stop]).to(queries.grid.device)
                found.add_all(crowded, on_grid(rows, "candidates", start), start)
        return found.keys()

    return scores_and_indices(torch.cat(_in_threads(search, threads), dim=1).topk(k, dim=1).values)


def _in_threads(search: Callable[[int], torch.Tensor], threads: int) -> list[torch.Tensor]:
    """Run `search(0)`, `search(1)`, … in threads. Each uses one thread of torch, as its operations are too short to be
    divided."""
    if threads == 1:
        return [search(0)]
    of_torch = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            return list(executor.map(search, range(threads)))
    finally:
        torch.set_num_threads(of_torch)


def _lower_bounds(
    screen: "_Screen", candidates: Matrix, k: int, runs: Sequence[tuple[int, int]]
) -> torch.Tensor | None:
    """(Q,) float64: for each query a score that at least k candidates reach. None if `_Screen.chunk` returns None."""
    sample = screen.chunk(runs)
    if sample is None:
        return None
    rows = torch.cat([as_tensor(candidates[start:stop]) for start, stop in runs]).to(screen.single)
    scores = [(screen.single * rows[place]).sum(dim=1) for place in screen.guess_best(sample, k).T]
    return torch.stack(scores).amin(dim=0) - sample.slack


def _is_safe(numbers: torch.Tensor) -> torch.Tensor:
    """Whether each number lies in the range `_SAFE`. NaN doesn't."""
    return (numbers >= _SAFE[0]) & (numbers <= _SAFE[1])


class _Queries:
    """(Q, D) queries, `grid` in float64 and `single` in float32, where grid = share[:, None] * direction + across."""

    def __init__(self, grid: torch.Tensor) -> None:
        self.grid, self.single = grid, grid.to(torch.float32)
        largest = grid.abs().amax(dim=1)
        self.safe = bool(((largest == 0) | _is_safe(largest)).all())
        self.direction = F.normalize(grid.mean(dim=0), dim=0)  # (D,)
        self.share = grid @ self.direction  # (Q,)
        self.across = grid - self.share[:, None] * self.direction
        self.norm = grid.norm(dim=1)


class _Screen:
    """The queries in int8, on the scale of the codes of a pool."""

    def __init__(self, queries: _Queries, pool: Codes) -> None:
        self.pool, self.single, self.norm = pool, queries.single, queries.norm
        self.mean_norm = pool.mean.norm().double()
        scaled = queries.across * pool.scale
        step = torch.maximum(scaled.abs().amax(dim=1) / 127, 1e-9 * queries.norm * pool.scale.amax())
        self.step = torch.where(step == 0, 1.0, step)  # t
        rounded = (scaled / self.step[:, None]).round()
        padding = (0, -rounded.shape[1] % 8)
        self.codes = F.pad(rounded.to(torch.int8), padding)  # (Q, D')
        self.direction = F.pad((queries.direction * pool.scale).float(), padding)  # (D',) d∘s
        self.centre = queries.grid @ pool.mean.to(queries.grid)
        # the factors of |X|, |r|, and the largest and smallest (d∘s)·X of a group in the bound, in units of Y·X
        unseen = 1.001 * (scaled - rounded * self.step[:, None]).norm(dim=1)
        parts = [unseen, 1.001 * queries.norm, queries.share.clamp(min=0), queries.share.clamp(max=0)]
        self.weights = (torch.stack(parts, dim=1) / self.step[:, None]).float()  # (Q, 4)
        self.weight = (queries.share / self.step).float()

    def chunk(self, runs: Sequence[tuple[int, int]]) -> "_Chunk | None":
        """The candidates of some runs of the pool, numbered from 0. None if they are NaN, or too large or too small for
        the bounds."""
        parts = [self.pool.part(start, stop) for start, stop in runs]
        codes = torch.cat([part.codes for part in parts]) if len(parts) > 1 else parts[0].codes
        lengths = torch.cat([part.lengths for part in parts], dim=1)
        longest = lengths[2].amax()
        if not _is_safe(longest):
            return None
        # the error of a sum of D products in float32, of the numbers above, and of rounding to the grid
        size = longest.double() + self.mean_norm
        slack = 1.001 * (4 * codes.shape[1] + 32) * 2**-24 * size * self.norm
        along = torch.cat([part.float() @ self.direction for part in codes.split(_ROWS_AT_ONCE)])
        length = max(_GROUP, _BLOCK_PRODUCTS[codes.device.type] // _BLOCK_QUERIES // _GROUP * _GROUP)
        order = F.pad(along.argsort(), (0, -len(codes) % length), value=len(codes))
        blocks = []
        for place in order.split(length):
            # a group is a column, not a row, because the maximum over columns is faster
            place = place.view(-1, _GROUP).T.contiguous()  # (_GROUP, groups)
            filled = place.clamp(max=len(codes) - 1)
            ordered = along[filled]
            bounds = torch.cat([lengths[:2, filled].amax(dim=1), ordered.amax(0)[None], ordered.amin(0)[None]])
            blocks.append(_Block(place, codes.index_select(0, filled.view(-1)), ordered, bounds))
        return _Chunk(blocks, slack, len(codes))

    def guess_best(self, chunk: "_Chunk", k: int) -> torch.Tensor:
        """(Q, k): a guess at the best candidates of a chunk, all different. The chunk must have at least 2 k groups."""
        found = []
        for part in self._parts_of_queries():
            weight, best, places = self.weight[part, None], [], []
            for block in chunk.blocks:
                products = self._products(part, block)
                guess = torch.addcmul(products.amax(dim=1).float(), weight, block.bounds[2])
                guess.masked_fill_(block.place[-1] == chunk.size, -torch.inf)  # not groups with padding in them
                value, group = guess.topk(min(k, guess.shape[1]), dim=1)
                scores = products.gather(2, group[:, None].expand(-1, _GROUP, -1))
                scores = scores + weight[..., None] * block.along[:, group].transpose(0, 1)
                best.append(value)
                places.append(block.place[scores.argmax(dim=1), group])
            chosen = torch.cat(best, dim=1).topk(k, dim=1).indices
            found.append(torch.cat(places, dim=1).gather(1, chosen))
        return torch.cat(found)

    def survivors(self, chunk: "_Chunk", lower: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Find the candidates of a chunk whose score may reach `lower` (Q,).

        Returns:
            - (2, P) pairs of a query and a candidate, by index.
            - (M,) the queries for which there are too many such candidates. They are not in the pairs.
        """
        needed = ((lower - self.centre - chunk.slack) / self.step).float()[:, None]
        largest = torch.stack([block.bounds.abs().amax(dim=1) for block in chunk.blocks]).amax(dim=0)
        # allow for the rounding of the float32 numbers, and of the products, which are below 2^28
        needed = needed - 2**-20 * (needed.abs() + (self.weights.abs() @ largest)[:, None]) - 16
        found, too_many = [], []
        for part in self._parts_of_queries():
            weights, weight, least = self.weights[part], self.weight[part], needed[part]
            for block in chunk.blocks:
                products = self._products(part, block)  # (q, _GROUP, groups)
                limit = torch.addmm(least, weights, block.bounds, alpha=-1)  # (q, groups)
                # not ">=", so that a NaN from an overflow is not discarded
                at, group = (products.amax(dim=1) < limit).logical_not_().nonzero(as_tuple=True)
                if len(at) == 0:
                    continue
                full = torch.bincount(at, minlength=len(part)) > max(_GROUP, limit.shape[1] // 2)
                if full.any():
                    too_many.append(part[full])
                    at, group = at[~full[at]], group[~full[at]]
                lengths = (weights[at, :2] * block.bounds[:2, group].T).sum(dim=1)
                limit = (least[at, 0] - lengths)[:, None] - weight[at, None] * block.along[:, group].T
                pair, member = (products[at, :, group] < limit).logical_not_().nonzero(as_tuple=True)
                found.append(torch.stack([part[at[pair]], block.place[member, group[pair]]]))
        crowded = torch.cat(too_many).unique() if too_many else torch.empty(0, dtype=torch.int64, device=lower.device)
        pairs = torch.cat(found, dim=1) if found else crowded.new_empty(2, 0)
        pairs = pairs[:, pairs[1] < chunk.size]
        return (pairs[:, ~torch.isin(pairs[0], crowded)] if len(crowded) else pairs), crowded

    def _parts_of_queries(self) -> Sequence[torch.Tensor]:
        return torch.arange(len(self.step), device=self.step.device).split(_BLOCK_QUERIES)

    def _products(self, part: torch.Tensor, block: "_Block") -> torch.Tensor:
        """(q, _GROUP, groups) int32: Y·X for the queries in `part`."""
        ours = self.codes[part[0] : part[-1] + 1]
        ours = F.pad(ours, (0, 0, 0, max(0, 32 - len(ours))))  # CUDA's int8 product needs at least 17 rows
        return torch._int_mm(ours, block.codes.T)[: len(part)].view(len(part), *block.place.shape)


class _Block(NamedTuple):
    """The codes of candidates in groups."""

    place: torch.Tensor  # (_GROUP, groups) int64, index in the chunk; padding has the chunk's length
    codes: torch.Tensor  # (_GROUP * groups, D') int8, X
    along: torch.Tensor  # (_GROUP, groups) float32, (d∘s)·X
    bounds: torch.Tensor  # (4, groups) float32: the largest |X|, |r| and (d∘s)·X, and the smallest (d∘s)·X


class _Chunk(NamedTuple):
    """The candidates that are compared at once, sorted by (d∘s)·X."""

    blocks: list[_Block]
    slack: torch.Tensor  # (Q,) float64: largest difference between a score and its float32 product
    size: int


class _Results:
    """
    The candidates that may be among the k best of each query.

    Attributes:
        lower: (Q,) float64, a lower bound of each query's k-th best score. Threads share it and raise it in place. If
            one overwrites the number of another, the result is still a lower bound.
        pending: pairs of a query and a candidate that have not been scored exactly yet.
        best: (Q, k) int64, the keys of the best candidates that have been scored exactly.
    """

    def __init__(self, queries: _Queries, candidates: Matrix, k: int, lower: torch.Tensor) -> None:
        self.queries, self.single, self.candidates = queries.grid, queries.single, candidates
        self.k, self.lower = k, lower
        self.seen = lower.new_full((len(lower), k), -torch.inf)  # lower bounds of the best scores so far
        self.best = torch.full((len(lower), k), _NO_KEY, device=lower.device)
        self.pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.num_pending = 0

    def add(self, pairs: torch.Tensor, start: int, slack: torch.Tensor) -> None:
        """
        Add candidates that survived the screen.

        Args:
            pairs: (2, P), queries and candidates, by index.
            start: the index of candidate 0 in the whole pool.
            slack: the slack of the chunk.
        """
        scored = []
        needed, places = pairs[1].unique(return_inverse=True)
        rows = as_tensor(self.candidates[(start + needed).cpu().numpy()]).to(self.single.device)
        for (at, row), place in zip(pairs.split(_PAIRS, dim=1), places.split(_PAIRS)):
            score = (self.single.index_select(0, at) * rows.index_select(0, place).float()).sum(dim=1).double()
            upper, lower = score + slack[at], score - slack[at]
            kept = upper >= self.lower[at]
            scored.append((at[kept], start + row[kept], upper[kept], lower[kept]))
        at, row, upper, lower = (torch.cat(part) for part in zip(*scored))
        self.seen = torch.cat([self.seen, _by_query(at, lower, len(self.queries), -torch.inf)], dim=1)
        self.seen = self.seen.topk(self.k, dim=1).values
        torch.maximum(self.lower, self.seen[:, -1], out=self.lower)
        self.pending.append((at, row, upper))
        self.num_pending += len(at)
        if self.num_pending > len(self.queries) * (4 * self.k + _MAX_PENDING):
            self._score_pending()

    def add_all(self, which: torch.Tensor, chunk: torch.Tensor, start: int) -> None:
        """Score all candidates of a chunk (from `on_grid`) exactly, for the queries `which`."""
        keys = torch.cat([self.best[which], top_keys(self.queries[which], chunk, start, self.k)], dim=1)
        self.best[which] = keys.topk(self.k, dim=1).values
        known = self.best[:, -1] != _NO_KEY
        scores = scores_and_indices(self.best[:, -1])[0].double()
        torch.where(known, torch.maximum(self.lower, scores), self.lower, out=self.lower)

    def keys(self) -> torch.Tensor:
        """(Q, k) int64: the keys of the best candidates, padded with `_NO_KEY`."""
        self._score_pending()
        return self.best

    def _score_pending(self) -> None:
        """Score the pending pairs exactly, except those whose upper bound is below `lower` by now."""
        if not self.pending:
            return
        at, row, upper = (torch.cat(part) for part in zip(*self.pending))
        kept = upper >= self.lower[at]
        at, row = at[kept], row[kept]
        order = row.argsort()
        at, row = at[order], row[order]
        keys = []
        for ours, theirs in zip(at.split(_PAIRS), row.split(_PAIRS)):
            needed, place = theirs.unique(return_inverse=True)
            rows = as_tensor(self.candidates[needed.cpu().numpy()]).to(self.queries.device)
            rows = on_grid(rows, "candidates", 0)
            keys.append(keys_of((self.queries[ours] * rows[place]).sum(dim=1).float(), theirs))
        if keys:  # there are none if all pending pairs are below the bound
            table = _by_query(at, torch.cat(keys), len(self.queries), _NO_KEY)
            self.best = torch.cat([self.best, table], dim=1).topk(self.k, dim=1).values
        self.pending, self.num_pending = [], 0


def _by_query(at: torch.Tensor, values: torch.Tensor, num_queries: int, fill: float) -> torch.Tensor:
    """Arrange (P,) values, of the queries `at`, in a table (Q, m). Lines with fewer than m values end in `fill`."""
    order = at.argsort()
    at = at[order]
    counts = torch.bincount(at, minlength=num_queries)
    place = torch.arange(len(at), device=at.device) - (counts.cumsum(0) - counts)[at]
    table = values.new_full((num_queries, int(counts.max()) if len(at) else 0), fill)
    table[at, place] = values[order]
    return table
