"""`exact_top_k`, several times faster on large pools: all candidates are compared in int8, few of them exactly.

A candidate x is left out for a query q by proof only:

- What queries share is taken out: with d the direction of their mean, q = a·d + p. Embeddings of one modality lie in a
  cone, and most of what tells their scores apart may be d·x.
- The pool is centred at μ and scaled by s per dimension: x = μ + s∘X + r, X in int8 and r what rounding and clipping
  left over (`retrieval.quantised`, which may keep it). The query is rounded alike: p∘s = t·Y + e, Y in int8.
- So q·x = q·μ + a·(d∘s)·X + t·Y·X + e·X + q·r. Of these, the integer Y·X is all that is computed for every pair;
  |e·X| ≤ |e| |X| and |q·r| ≤ |q| |r| bound the last two. All this is compared for groups of candidates first, by the
  largest Y·X, (d∘s)·X, |X| and |r| of a group; sorting by (d∘s)·X keeps groups alike.
- x is left out if that upper bound lies below a lower bound of the query's k-th best score, which the candidates seen
  so far give. What remains is scored in float32 and compared again, and what then remains, little more than k, is
  scored as `exact_top_k` does.

Every decision carries its certificate, so that the result is `exact_top_k`'s to the bit on any pool: μ, s and d decide
only how many candidates remain. Where too many do (thousands of equal candidates), the query is compared with the whole
chunk exactly. On a CPU each of torch's threads takes chunks of its own.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F

from universal_gcl.retrieval.quantised import Kept, Streamed, runs_over
from universal_gcl.retrieval.search import (
    as_tensor,
    checked,
    exact_top_k,
    keys_of,
    on_grid,
    scores_and_indices,
    top_keys,
)

_MIN_CANDIDATES = 1 << 16
_MIN_SAMPLE = 1 << 14
_QUERIES_AT_ONCE = 4096  # for which the pool is read and quantised once
_BLOCK_QUERIES = 512
_BLOCK_PRODUCTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # integers held at once: those of a processor's cache
_GROUP = 16  # products that are reduced to their maximum before anything is compared
_PAIRS = 1 << 9  # (query, candidate) pairs scored at once
_MAX_PENDING = 1024  # pairs for each query, beyond 4 k, before they are scored exactly
_ROWS_AT_ONCE = 1 << 9
_NO_KEY = torch.iinfo(torch.int64).min
_SAFE = (1e-12, 1e12)  # largest numbers of a chunk for which float32 neither overflows nor loses what bounds count on


def screened_top_k(
    queries, candidates, k: int, *, quantised: Kept | None = None, chunk_size: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `exact_top_k` returns, to the bit; see there for the arguments, the result and the errors.

    Args:
        candidates: as there; must also take an array of indices, as arrays, tensors and `np.memmap` do.
        quantised: the same candidates in int8, so that only those that remain are read. Else all are read and
            quantised for these queries.
        chunk_size: candidates compared at once. Changes memory use and speed, never the result.
    """
    queries, candidates = checked(queries, candidates, k, chunk_size)
    if not worth_screening(candidates.shape[0], k):
        return exact_top_k(queries, candidates, k)
    pool = Streamed(candidates, queries.device) if quantised is None else quantised.to(queries.device)
    parts = [
        _search(part, candidates, pool, k, chunk_size, row)
        for row, part in zip(range(0, len(queries), _QUERIES_AT_ONCE), queries.split(_QUERIES_AT_ONCE))
    ]
    return tuple(torch.cat(part) for part in zip(*parts))


def worth_screening(count: int, k: int) -> bool:
    """Whether a pool of so many candidates is screened; the exact pass is as quick for a smaller one."""
    return count >= max(_MIN_CANDIDATES, 2 * _sample_size(k))


def _sample_size(k):
    return max(_MIN_SAMPLE, 4 * k * _GROUP)


def _search(queries, candidates, pool, k, chunk_size, first_query):
    queries = _Queries(on_grid(queries, "queries", first_query))
    count, everyone = candidates.shape[0], torch.arange(len(queries.grid), device=queries.grid.device)
    if not queries.safe or not pool.mean.isfinite().all():
        return exact_top_k(queries.grid, candidates, k)
    screen = _Screen(queries, pool)
    lower = _lower_bounds(screen, candidates, k, runs_over(count, _sample_size(k)))
    if lower is None:
        return exact_top_k(queries.grid, candidates, k)
    threads = torch.get_num_threads() if lower.device.type == "cpu" else 1
    threads = min(threads, -(-count // chunk_size))

    def search(thread):
        found = _Found(queries, candidates, k, lower)
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


def _in_threads(search, threads):
    """`search(0)`, `search(1)`, … at once, each with one of torch's threads: its steps are too short to be shared."""
    if threads == 1:
        return [search(0)]
    of_torch = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            return list(executor.map(search, range(threads)))
    finally:
        torch.set_num_threads(of_torch)


def _lower_bounds(screen, candidates, k, runs):
    """(Q,) float64: at least k of the candidates have such a score or a better one. None where `_Screen.chunk` is."""
    sample = screen.chunk(runs)
    if sample is None:
        return None
    rows = torch.cat([as_tensor(candidates[start:stop]) for start, stop in runs]).to(screen.single)
    scores = [(screen.single * rows[place]).sum(dim=1) for place in screen.promising(sample, k).T]
    return torch.stack(scores).amin(dim=0) - sample.slack


def _is_safe(numbers):
    """Whether the largest of them is, for each row; NaN fails all comparisons."""
    return (numbers >= _SAFE[0]) & (numbers <= _SAFE[1])


class _Queries:
    """(Q, D) queries: `grid` float64, `single` float32, and grid = share[:, None] * direction + across."""

    def __init__(self, grid):
        self.grid, self.single = grid, grid.to(torch.float32)
        largest = grid.abs().amax(dim=1)
        self.safe = bool(((largest == 0) | _is_safe(largest)).all())
        self.direction = F.normalize(grid.mean(dim=0), dim=0)  # (D,)
        self.share = grid @ self.direction  # (Q,)
        self.across = grid - self.share[:, None] * self.direction
        self.norm = grid.norm(dim=1)


class _Screen:
    """`_Queries` in int8, on the scale of a quantised pool."""

    def __init__(self, queries, pool):
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
        # in units of products: what |X|, |r|, the largest and the smallest (d∘s)·X of a group add to a score at most
        unseen = 1.001 * (scaled - rounded * self.step[:, None]).norm(dim=1)
        parts = [unseen, 1.001 * queries.norm, queries.share.clamp(min=0), queries.share.clamp(max=0)]
        self.weights = (torch.stack(parts, dim=1) / self.step[:, None]).float()  # (Q, 4)
        self.weight = (queries.share / self.step).float()

    def chunk(self, runs):
        """The candidates of some runs of the pool as a `_Chunk`, numbered from 0 on. None where their numbers are none,
        or too large or too small for the bounds."""
        parts = [self.pool.part(start, stop) for start, stop in runs]
        codes = torch.cat([part.codes for part in parts]) if len(parts) > 1 else parts[0].codes
        lengths = torch.cat([part.lengths for part in parts], dim=1)
        longest = lengths[2].amax()
        if not _is_safe(longest):
            return None
        # of sums of D products in float32, of the numbers above, and of the grid that scores are defined on
        size = longest.double() + self.mean_norm
        slack = 1.001 * (4 * codes.shape[1] + 32) * 2**-24 * size * self.norm
        along = torch.cat([part.float() @ self.direction for part in codes.split(_ROWS_AT_ONCE)])
        length = max(_GROUP, _BLOCK_PRODUCTS[codes.device.type] // _BLOCK_QUERIES // _GROUP * _GROUP)
        order = F.pad(along.argsort(), (0, -len(codes) % length), value=len(codes))
        blocks = []
        for place in order.split(length):
            # groups of neighbours lie in columns g, g + length / _GROUP, …: their maximum is found quicker that way
            place = place.view(-1, _GROUP).T.contiguous()  # (_GROUP, groups)
            filled = place.clamp(max=len(codes) - 1)
            ordered = along[filled]
            bounds = torch.cat([lengths[:2, filled].amax(dim=1), ordered.amax(0)[None], ordered.amin(0)[None]])
            blocks.append(_Block(place, codes.index_select(0, filled.view(-1)), ordered, bounds))
        return _Chunk(blocks, slack, len(codes))

    def promising(self, chunk, k):
        """(Q, k) different candidates of a chunk, which has 2 k groups or more: guesses at the best."""
        found = []
        for part in self._parts_of_queries():
            weight, best, places = self.weight[part, None], [], []
            for block in chunk.blocks:
                products = self._products(part, block)
                guess = torch.addcmul(products.amax(dim=1).float(), weight, block.bounds[2])
                guess.masked_fill_(block.place[-1] == chunk.count, -torch.inf)  # not among them: groups with a gap
                value, group = guess.topk(min(k, guess.shape[1]), dim=1)
                scores = products.gather(2, group[:, None].expand(-1, _GROUP, -1))
                scores = scores + weight[..., None] * block.along[:, group].transpose(0, 1)
                best.append(value)
                places.append(block.place[scores.argmax(dim=1), group])
            chosen = torch.cat(best, dim=1).topk(k, dim=1).indices
            found.append(torch.cat(places, dim=1).gather(1, chosen))
        return torch.cat(found)

    def survivors(self, chunk, lower):
        """
        Which candidates of a chunk may score at least `lower` (Q,).

        Returns:
            (2, P) indices of queries and candidates; and (M,) queries for which they are too many, which are not among
            them.
        """
        needed = ((lower - self.centre - chunk.slack) / self.step).float()[:, None]
        largest = torch.stack([block.bounds.abs().amax(dim=1) for block in chunk.blocks]).amax(dim=0)
        # of float32 numbers, and of products as such, which are below 2^28
        needed = needed - 2**-20 * (needed.abs() + (self.weights.abs() @ largest)[:, None]) - 16
        pairs, crowded = [], []
        for part in self._parts_of_queries():
            weights, weight, least = self.weights[part], self.weight[part], needed[part]
            for block in chunk.blocks:
                products = self._products(part, block)  # (q, _GROUP, groups)
                limit = torch.addmm(least, weights, block.bounds, alpha=-1)  # (q, groups)
                # not ">=": what overflows to NaN is kept
                at, group = (products.amax(dim=1) < limit).logical_not_().nonzero(as_tuple=True)
                if len(at) == 0:
                    continue
                full = torch.bincount(at, minlength=len(part)) > max(_GROUP, limit.shape[1] // 2)
                if full.any():
                    crowded.append(part[full])
                    at, group = at[~full[at]], group[~full[at]]
                lengths = (weights[at, :2] * block.bounds[:2, group].T).sum(dim=1)
                limit = (least[at, 0] - lengths)[:, None] - weight[at, None] * block.along[:, group].T
                pair, member = (products[at, :, group] < limit).logical_not_().nonzero(as_tuple=True)
                pairs.append(torch.stack([part[at[pair]], block.place[member, group[pair]]]))
        crowded = torch.cat(crowded).unique() if crowded else torch.empty(0, dtype=torch.int64, device=lower.device)
        pairs = torch.cat(pairs, dim=1) if pairs else crowded.new_empty(2, 0)
        pairs = pairs[:, pairs[1] < chunk.count]
        return (pairs[:, ~torch.isin(pairs[0], crowded)] if len(crowded) else pairs), crowded

    def _parts_of_queries(self):
        return torch.arange(len(self.step), device=self.step.device).split(_BLOCK_QUERIES)

    def _products(self, part, block):
        """(q, _GROUP, groups) int32: Y·X of some queries."""
        ours = self.codes[part[0] : part[-1] + 1]
        ours = F.pad(ours, (0, 0, 0, max(0, 32 - len(ours))))  # CUDA's product takes 17 rows or more
        return torch._int_mm(ours, block.codes.T)[: len(part)].view(len(part), *block.place.shape)


class _Block(NamedTuple):
    """Candidates in int8, by group."""

    place: torch.Tensor  # (_GROUP, groups) int64, in the chunk; its length where there is none
    codes: torch.Tensor  # (_GROUP * groups, D') int8, X
    along: torch.Tensor  # (_GROUP, groups) float32, (d∘s)·X
    bounds: torch.Tensor  # (4, groups) float32: the largest |X|, |r| and (d∘s)·X, and the smallest (d∘s)·X


class _Chunk(NamedTuple):
    """Candidates that are compared at once, sorted by (d∘s)·X."""

    blocks: list[_Block]
    slack: torch.Tensor  # (Q,) float64: how far a score may be from its float32 product
    count: int


class _Found:
    """What may belong to the k best of each query: `lower` (Q,) float64 bounds of the k-th best score from below, pairs
    not scored exactly yet, and the keys (Q, k) of those that are. Threads share `lower` and raise it in place: one that
    overwrites another's number leaves a bound all the same."""

    def __init__(self, queries, candidates, k, lower):
        self.queries, self.single, self.candidates, self.k, self.lower = (
            queries.grid,
            queries.single,
            candidates,
            k,
            lower,
        )
        self.seen = lower.new_full((len(lower), k), -torch.inf)  # bounds from below of the best scores so far
        self.best = torch.full((len(lower), k), _NO_KEY, device=lower.device)
        self.pending, self.num_pending = [], 0

    def add(self, pairs, start, slack):
        """(2, P) queries and candidates, which are numbered from `start` on; `slack` as of `_Chunk`."""
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
            self._settle()

    def add_all(self, which, chunk, start):
        """All candidates of a chunk on the grid, for some of the queries."""
        keys = torch.cat([self.best[which], top_keys(self.queries[which], chunk, start, self.k)], dim=1)
        self.best[which] = keys.topk(self.k, dim=1).values
        known = self.best[:, -1] != _NO_KEY
        scores = scores_and_indices(self.best[:, -1])[0].double()
        torch.where(known, torch.maximum(self.lower, scores), self.lower, out=self.lower)

    def keys(self):
        """(Q, k) of the best, `_NO_KEY` where there are no more."""
        self._settle()
        return self.best

    def _settle(self):
        """Score what is pending exactly, unless `lower` has left it behind."""
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
        if keys:  # else no candidate of any query came through
            keys = _by_query(at, torch.cat(keys), len(self.queries), _NO_KEY)
            self.best = torch.cat([self.best, keys], dim=1).topk(self.k, dim=1).values
        self.pending, self.num_pending = [], 0


def _by_query(at, values, num_queries, fill):
    """(P,) values of the queries `at` as (Q, m), m the most that a query has."""
    order = at.argsort()
    at = at[order]
    counts = torch.bincount(at, minlength=num_queries)
    place = torch.arange(len(at), device=at.device) - (counts.cumsum(0) - counts)[at]
    table = values.new_full((num_queries, int(counts.max()) if len(at) else 0), fill)
    table[at, place] = values[order]
    return table
