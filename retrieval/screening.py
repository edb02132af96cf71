"""`exact_top_k`, several times faster on large pools: all candidates are compared in int8, few of them exactly.

A candidate x is left out for a query q by proof only:

- What queries share is taken out: with d the direction of their mean, q = a·d + p. Embeddings of one modality lie in a
  cone, and most of what tells their scores apart may be d·x.
- The pool is centred at μ and scaled by s per dimension: x = μ + s∘X + r, X in int8 and r what rounding and clipping
  left over. The query is rounded alike: p∘s = t·Y + e, Y in int8.
- So q·x = q·μ + a·d·(x − μ) + t·Y·X + e·X + p·r. Of these, the integer Y·X is all that is computed for every pair;
  |e·X| ≤ |e| |X| and |p·r| ≤ |p| |r| bound the last two. All this is compared for groups of candidates first, by the
  largest Y·X, d·x, |X| and |r| of a group; sorting by d·x keeps groups alike.
- x is left out if that upper bound lies below a lower bound of the query's k-th best score, which the candidates seen
  so far give. What remains is scored in float32 and compared again, and what then remains, little more than k, is
  scored as `exact_top_k` does.

Every decision carries its certificate, so that the result is `exact_top_k`'s to the bit on any pool. μ and s come from
a sample and need not fit: they decide how many candidates remain. Where too many do (thousands of equal candidates),
the query is compared with the whole chunk exactly.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .search import as_tensor, checked, exact_top_k, keys_of, on_grid, scores_and_indices, top_keys

_MIN_CANDIDATES = 1 << 16  # below, the exact pass is as quick
_MIN_SAMPLE = 1 << 14
_SAMPLE_RUNS = 64  # of neighbouring candidates, spread evenly over the pool
_QUERIES_AT_ONCE = 4096  # for which the pool is read and quantised once
_BLOCK_QUERIES = 512
_BLOCK_PRODUCTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # integers held at once: those of a processor's cache
_GROUP = 16  # products that are reduced to their maximum before anything is compared
_PAIRS = 1 << 9  # (query, candidate) pairs scored at once
_MAX_PENDING = 1024  # pairs for each query, beyond 4 k, before they are scored exactly
_ROWS_AT_ONCE = 1 << 9
_NO_KEY = torch.iinfo(torch.int64).min
_SAFE = (1e-12, 1e12)  # largest numbers of a chunk for which float32 neither overflows nor loses what bounds count on


def screened_top_k(queries, candidates, k: int, *, chunk_size: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """What `exact_top_k` returns, to the bit; see there for the arguments, the result and the errors.

    Args:
        candidates: as there; must also take an array of indices, as arrays, tensors and `np.memmap` do.
        chunk_size: candidates read and quantised at once. Changes memory use and speed, never the result.
    """
    queries, candidates = checked(queries, candidates, k, chunk_size)
    count = candidates.shape[0]
    sample_size = max(_MIN_SAMPLE, 4 * k * _GROUP)
    if count < max(_MIN_CANDIDATES, 2 * sample_size):
        return exact_top_k(queries, candidates, k)
    parts = [
        _search(part, candidates, k, chunk_size, sample_size, row)
        for row, part in zip(range(0, len(queries), _QUERIES_AT_ONCE), queries.split(_QUERIES_AT_ONCE))
    ]
    return tuple(torch.cat(part) for part in zip(*parts))


def _search(queries, candidates, k, chunk_size, sample_size, first_query):
    queries = _Queries(on_grid(queries, "queries", first_query))
    device, everyone = queries.grid.device, torch.arange(len(queries.grid), device=queries.grid.device)
    sample = _sample(candidates, sample_size).to(device, torch.float32)
    if not queries.safe or not sample.isfinite().all():
        return exact_top_k(queries.grid, candidates, k)
    screen = _Screen(queries, sample)
    lower = screen.lower_bounds(sample, k)
    if lower is None:
        return exact_top_k(queries.grid, candidates, k)
    found = _Found(queries, candidates, k, lower)
    for start in range(0, candidates.shape[0], chunk_size):
        chunk, crowded = as_tensor(candidates[start : start + chunk_size]).to(device), everyone
        blocks, slack = screen.quantise(chunk)
        if blocks is not None:
            pairs, crowded = screen.survivors(blocks, slack, len(chunk), found.lower)
            found.add(pairs, chunk, start, slack)
        if len(crowded):
            found.add_all(crowded, on_grid(chunk, "candidates", start), start)
    return found.result()


def _sample(candidates, size):
    """Rows from all over the pool, each once, so that one sorted by anything is met as a whole."""
    count = candidates.shape[0]
    length = -(-size // _SAMPLE_RUNS)
    starts = torch.linspace(0, count - length, _SAMPLE_RUNS).long().tolist()
    return torch.cat([as_tensor(candidates[start : start + length]) for start in starts])


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
        self.norm, self.across_norm = grid.norm(dim=1), self.across.norm(dim=1)


class _Screen:
    """`_Queries` in int8, and candidates as they come, on the scale of a (S, D) float32 `sample` of them."""

    def __init__(self, queries, sample):
        self.single, self.norm, self.direction = queries.single, queries.norm, queries.direction.float()
        self.mean = sample.mean(dim=0)
        low, high = sample.aminmax(dim=0)
        scale = torch.maximum(high - self.mean, self.mean - low) / 127
        # dimensions that hardly vary in the sample may do so elsewhere
        self.scale = scale.clamp(min=scale.mean() / 1000) if scale.any() else torch.ones_like(scale)
        self.inverse, self.offset = 1 / self.scale, -self.mean / self.scale
        scaled = queries.across * self.scale
        step = torch.maximum(scaled.abs().amax(dim=1) / 127, 1e-9 * queries.norm * self.scale.amax())
        self.step = torch.where(step == 0, 1.0, step)  # t
        rounded = (scaled / self.step[:, None]).round()
        self.codes = F.pad(rounded.to(torch.int8), (0, -rounded.shape[1] % 8))  # (Q, D'), as CUDA's product needs it
        self.centre = queries.grid @ self.mean.to(queries.grid)
        # in units of products: what |X|, |r|, the largest and the smallest d·x of a group add to a score at most
        unseen = 1.001 * (scaled - rounded * self.step[:, None]).norm(dim=1)
        parts = [unseen, 1.001 * queries.across_norm, queries.share.clamp(min=0), queries.share.clamp(max=0)]
        self.weights = (torch.stack(parts, dim=1) / self.step[:, None]).float()  # (Q, 4)
        self.weight = (queries.share / self.step).float()

    def lower_bounds(self, sample, k):
        """(Q,) float64: at least k of the candidates, (n, D) float32, have such a score or a better one. None where
        `quantise` finds none."""
        blocks, slack = self.quantise(sample)
        if blocks is None:
            return None
        bounds = []
        for part in self._parts_of_queries():
            best, places = [], []
            for block in blocks:
                guess = self._products(part, block) + self.weight[part, None, None] * block.along
                guess, member = guess.masked_fill(block.place == len(sample), -torch.inf).max(dim=1)
                value, group = guess.topk(min(k, guess.shape[1]), dim=1)
                best.append(value)
                places.append(block.place[member.gather(1, group), group])
            # the best of k groups are k different candidates, and good ones
            chosen = torch.cat(best, dim=1).topk(k, dim=1).indices
            places = torch.cat(places, dim=1).gather(1, chosen)
            scores = [(self.single[part] * sample[place]).sum(dim=1) for place in places.T]
            bounds.append(torch.stack(scores).amin(dim=0) - slack[part])
        return torch.cat(bounds)

    def survivors(self, blocks, slack, count, lower):
        """
        Which candidates, `count` in `blocks`, may score at least `lower` (Q,).

        Returns:
            (2, P) indices of queries and candidates; and (M,) queries for which they are too many, which are not among
            them.
        """
        needed = ((lower - self.centre - slack) / self.step).float()[:, None]
        pairs, crowded = [], []
        for part in self._parts_of_queries():
            weights, weight = self.weights[part], self.weight[part]
            for block in blocks:
                products = self._products(part, block)  # (q, _GROUP, groups)
                # of float32 numbers, and of products as such, which are below 2^28
                size = needed[part].abs() + weights.abs() @ block.bounds.abs().amax(dim=1, keepdim=True)
                least = needed[part] - 2**-20 * size - 16
                limit = torch.addmm(least, weights, block.bounds, alpha=-1)  # (q, groups)
                # not ">=": what overflows to NaN is kept
                at, group = (~(products.amax(dim=1) < limit)).nonzero(as_tuple=True)
                if len(at) == 0:
                    continue
                full = torch.bincount(at, minlength=len(part)) > max(_GROUP, limit.shape[1] // 2)
                crowded.append(part[full])
                at, group = at[~full[at]], group[~full[at]]
                lengths = (weights[at, :2] * block.bounds[:2, group].T).sum(dim=1)
                limit = (least[at, 0] - lengths)[:, None] - weight[at, None] * block.along[:, group].T
                pair, member = (~(products[at, :, group] < limit)).nonzero(as_tuple=True)
                pairs.append(torch.stack([part[at[pair]], block.place[member, group[pair]]]))
        crowded = torch.cat(crowded).unique() if crowded else torch.empty(0, dtype=torch.int64, device=lower.device)
        pairs = torch.cat(pairs, dim=1) if pairs else crowded.new_empty(2, 0)
        return pairs[:, (pairs[1] < count) & ~torch.isin(pairs[0], crowded)], crowded

    def quantise(self, rows):
        """
        Candidates (n, D) in int8.

        Returns:
            `_Block`s, sorted by d·x; and (Q,) float64, how far a score may be from its float32 product. None for both
            where the numbers are none, too large or too small for such a bound.
        """
        codes, lengths, along = [], [], []
        for part in rows.split(_ROWS_AT_ONCE):  # small enough to stay in the cache
            part = part.to(torch.float32)
            scaled = torch.addcmul(self.offset, part, self.inverse)
            rounded = scaled.round().clamp_(-127, 127)
            codes.append(rounded.to(torch.int8))
            residual = scaled.sub_(rounded).mul_(self.scale)
            lengths.append(torch.stack([x.norm(dim=1) for x in (rounded, residual, part)]))
            along.append(part @ self.direction)
        lengths = torch.cat(lengths, dim=1)  # of X, r and x
        longest = lengths[2].amax()
        if not _is_safe(longest):
            return None, None
        # of sums of D products in float32, of the numbers above, and of the grid that scores are defined on
        slack = 1.001 * (4 * rows.shape[1] + 32) * 2**-24 * (longest + self.mean.norm()).double() * self.norm
        along, codes = torch.cat(along) - self.mean @ self.direction, torch.cat(codes)
        if codes.shape[1] < self.codes.shape[1]:
            codes = F.pad(codes, (0, self.codes.shape[1] - codes.shape[1]))
        length = max(_GROUP, _BLOCK_PRODUCTS[rows.device.type] // _BLOCK_QUERIES // _GROUP * _GROUP)
        order = F.pad(along.argsort(), (0, -len(rows) % length), value=len(rows))
        blocks = []
        for place in order.split(length):
            # groups of neighbours lie in columns g, g + length / _GROUP, …: their maximum is found quicker that way
            place = place.view(-1, _GROUP).T.contiguous()  # (_GROUP, groups)
            filled = place.clamp(max=len(rows) - 1)
            bounds = torch.cat(
                [lengths[:2, filled].amax(dim=1), along[filled].amax(0)[None], along[filled].amin(0)[None]]
            )
            blocks.append(_Block(place, codes.index_select(0, filled.view(-1)), along[filled], bounds))
        return blocks, slack

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
    along: torch.Tensor  # (_GROUP, groups) float32, d·(x − μ)
    bounds: torch.Tensor  # (4, groups) float32: the largest |X|, |r| and d·(x − μ), and the smallest d·(x − μ)


class _Found:
    """What may belong to the k best of each query: `lower` (Q,) float64 bounds of the k-th best score from below, pairs
    not scored exactly yet, and the keys (Q, k) of those that are."""

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

    def add(self, pairs, chunk, start, slack):
        """(2, P) queries and rows of the chunk that begins at `start`; `slack` as of `_Screen`."""
        scored = []
        for at, row in pairs.split(_PAIRS, dim=1):
            score = (self.single.index_select(0, at) * chunk.index_select(0, row).float()).sum(dim=1).double()
            upper, lower = score + slack[at], score - slack[at]
            kept = upper >= self.lower[at]
            scored.append((at[kept], start + row[kept], upper[kept], lower[kept]))
        at, row, upper, lower = (torch.cat(part) for part in zip(*scored))
        self.seen = torch.cat([self.seen, _by_query(at, lower, len(self.queries), -torch.inf)], dim=1)
        self.seen = self.seen.topk(self.k, dim=1).values
        self.lower = torch.maximum(self.lower, self.seen[:, -1])
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
        self.lower = torch.where(known, torch.maximum(self.lower, scores), self.lower)

    def result(self):
        self._settle()
        return scores_and_indices(self.best)

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
