"""`exact_top_k`, several times faster on large pools: all candidates are compared in int8, few of them exactly.

A candidate x is left out for a query q by proof only:

- What queries share is taken out: with d the direction of their mean, q = a·d + p. Embeddings of one modality lie in a
  cone, and most of what tells their scores apart may be d·x.
- A chunk of the pool is centred at μ and scaled by s per dimension: x = μ + s∘X + r, X in int8 and r what rounding left
  over. The query is rounded alike: p∘s = t·Y + e, Y in int8.
- So q·x = q·μ + a·d·(x − μ) + t·Y·X + e·X + p·r. Of these, the integer Y·X is all that is computed for every pair;
  |e·X| ≤ |e| |X| and |p·r| ≤ |p| |r| bound the last two, with the largest |X| and |r| of the chunk. The candidates are
  sorted by d·x, so that a group of them shares one bound.
- x is left out if that upper bound lies below a lower bound of the query's k-th best score, which the candidates seen
  so far give. What remains is scored in float32 and compared again, and what then remains, little more than k, is
  scored as `exact_top_k` does.

Every decision carries its certificate, so that the result is `exact_top_k`'s to the bit on any pool. Where too many
candidates remain (thousands that are equal, one huge vector that takes the range of int8 from the others), the query is
compared with the whole chunk exactly.
"""

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
_PAIRS = 1 << 11  # (query, candidate) pairs scored at once
_MAX_PENDING = 1024  # pairs for each query, beyond 4 k, before they are scored exactly
_ROWS_AT_ONCE = 1 << 11  # quantised while in the cache
_NO_KEY = torch.iinfo(torch.int64).min
_SAFE = (1e-12, 1e12)  # largest numbers of a chunk for which float32 neither overflows nor loses what bounds count on


def screened_top_k(queries, candidates, k: int, *, chunk_size: int = 8192) -> tuple[torch.Tensor, torch.Tensor]:
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
    if not queries.safe or not _is_safe(sample):
        return exact_top_k(queries.grid, candidates, k)
    found = _Found(queries, candidates, k, _Screen(queries, sample).lower_bounds(sample, k))
    for start in range(0, candidates.shape[0], chunk_size):
        raw = as_tensor(candidates[start : start + chunk_size]).to(device)
        chunk, crowded = raw.to(torch.float32), everyone
        if _is_safe(chunk):
            screen = _Screen(queries, chunk)
            pairs, crowded = screen.survivors(found.lower)
            found.add(pairs, chunk, start, screen.slack)
        if len(crowded):
            found.add_all(crowded, on_grid(raw, "candidates", start), start)
    return found.result()


def _sample(candidates, size):
    """Rows from all over the pool, each once, so that one sorted by anything is met as a whole."""
    count = candidates.shape[0]
    length = -(-size // _SAMPLE_RUNS)
    starts = torch.linspace(0, count - length, _SAMPLE_RUNS).long().tolist()
    return torch.cat([as_tensor(candidates[start : start + length]) for start in starts])


def _is_safe(chunk):
    low, high = chunk.aminmax()
    largest = torch.maximum(-low, high)  # NaN fails all comparisons
    return bool((largest == 0) | ((largest >= _SAFE[0]) & (largest <= _SAFE[1])))


class _Queries:
    """(Q, D) queries: `grid` float64, `single` float32, and grid = share[:, None] * direction + across."""

    def __init__(self, grid):
        self.grid, self.single = grid, grid.to(torch.float32)
        largest = grid.abs().amax(dim=1)
        self.safe = bool(((largest == 0) | ((largest >= _SAFE[0]) & (largest <= _SAFE[1]))).all())
        self.direction = F.normalize(grid.mean(dim=0), dim=0)  # (D,)
        self.share = grid @ self.direction  # (Q,)
        self.across = grid - self.share[:, None] * self.direction
        self.norm, self.across_norm = grid.norm(dim=1), self.across.norm(dim=1)


class _Screen:
    """
    Queries and some candidates in int8, and what that leaves out.

    Args:
        queries: `_Queries`.
        rows: (n, D) float32 candidates.

    Attributes:
        error: (Q,) float64, how far a score may be from what its product says.
        slack: (Q,) float64, how far a score may be from its float32 product.
    """

    def __init__(self, queries, rows):
        self.single, self.share, self.count = queries.single, queries.share, len(rows)
        mean = rows.mean(dim=0)
        low, high = rows.aminmax(dim=0)
        scale = torch.maximum(high - mean, mean - low) / 127
        scale[scale == 0] = 1.0  # a dimension in which all are equal
        codes, longest = [], []
        for part in rows.split(_ROWS_AT_ONCE):
            scaled = (part - mean).div_(scale)
            rounded = scaled.round().clamp_(-127, 127)
            codes.append(rounded.to(torch.int8))
            residual = scaled.sub_(rounded).mul_(scale)
            longest.append(torch.stack([x.norm(dim=1).amax() for x in (rounded, residual, part)]))
        longest_code, longest_residual, longest_row = torch.stack(longest).amax(dim=0).double()
        self._arrange(torch.cat(codes), (rows - mean) @ queries.direction.float())

        scaled = queries.across * scale
        step = torch.maximum(scaled.abs().amax(dim=1) / 127, 1e-9 * queries.norm * scale.amax())
        self.step = torch.where(step == 0, 1.0, step)  # t
        rounded = (scaled / self.step[:, None]).round()
        self.queries = F.pad(rounded.to(torch.int8), (0, -rounded.shape[1] % 8))  # (Q, D')
        self.centre = queries.grid @ mean.to(queries.grid)
        # of sums of D products in float32, of the norms above, and of the grid that scores are defined on
        rounding = (4 * rows.shape[1] + 16) * 2**-24 * (longest_row + mean.norm().double())
        self.slack = 1.001 * rounding * queries.norm
        unseen = (scaled - rounded * self.step[:, None]).norm(dim=1) * longest_code
        self.error = 1.001 * (unseen + queries.across_norm * longest_residual) + self.slack

    def _arrange(self, codes, along):
        """Sort candidates by `along`, (n,) parts along the direction. Each block of L holds L / _GROUP groups of
        neighbours; group g has the columns g, g + L / _GROUP, …, whose maximum is found quicker than side by side."""
        length = max(_GROUP, _BLOCK_PRODUCTS[codes.device.type] // _BLOCK_QUERIES // _GROUP * _GROUP)
        place = F.pad(along.argsort(), (0, -self.count % length), value=self.count)
        self.place = place.view(-1, length // _GROUP, _GROUP).transpose(1, 2).reshape(-1, length)  # (blocks, L)
        filled = self.place.clamp(max=self.count - 1)
        # to the multiple of 8 columns that CUDA's product needs
        self.codes = F.pad(codes, (0, -codes.shape[1] % 8))[filled]  # (blocks, L, D')
        self.along = along[filled].view(len(filled), _GROUP, -1)  # (blocks, _GROUP, L / _GROUP)

    def lower_bounds(self, rows, k):
        """(Q,) float64: at least k of the candidates, (n, D) float32, have such a score or a better one."""
        bounds, weight = [], (self.share / self.step).float()
        for part in self._parts_of_queries():
            best, places = [], []
            for place, products, along in self._products(part):
                guess = products + weight[part, None, None] * along  # (q, _GROUP, L / _GROUP)
                guess, member = guess.masked_fill(place == self.count, -torch.inf).max(dim=1)
                value, group = guess.topk(min(k, guess.shape[1]), dim=1)
                best.append(value)
                places.append(place[member.gather(1, group), group])
            # the best of k groups are k different candidates, and good ones
            chosen = torch.cat(best, dim=1).topk(k, dim=1).indices
            places = torch.cat(places, dim=1).gather(1, chosen)
            scores = [(self.single[part] * rows[place]).sum(dim=1) for place in places.T]
            bounds.append(torch.stack(scores).amin(dim=0) - self.slack[part])
        return torch.cat(bounds)

    def survivors(self, lower):
        """`(queries, candidates)`, (2, P) indices: which pairs may score at least `lower` (Q,); and (M,) the queries
        for which they are too many, which are not among these."""
        needed, weight = (lower - self.centre - self.error) / self.step, self.share / self.step
        # in units of products: of float32 numbers, and of products as such, which are below 2^28
        needed = needed - 2**-20 * (needed.abs() + weight.abs() * self.along.abs().amax()) - 16
        needed, weight = needed.float()[:, None], weight.float()[:, None]
        pairs, crowded = [], []
        for part in self._parts_of_queries():
            for place, products, along in self._products(part):
                most = torch.maximum(weight[part] * along.amax(dim=0), weight[part] * along.amin(dim=0))
                # not ">=": what overflows to NaN is kept
                at, group = (~(products.amax(dim=1) < needed[part] - most)).nonzero(as_tuple=True)
                if len(at) == 0:
                    continue
                full = torch.bincount(at, minlength=len(part)) > max(_GROUP, along.shape[1] // 2)
                crowded.append(part[full])
                at, group = at[~full[at]], group[~full[at]]
                members = products[at, :, group]  # (groups that remain, _GROUP)
                limit = needed[part[at]] - weight[part[at]] * along[:, group].T
                pair, member = (~(members < limit)).nonzero(as_tuple=True)
                pairs.append(torch.stack([part[at[pair]], place[member, group[pair]]]))
        crowded = torch.cat(crowded).unique() if crowded else self.place.new_empty(0)
        pairs = torch.cat(pairs, dim=1) if pairs else self.place.new_empty(2, 0)
        return pairs[:, (pairs[1] < self.count) & ~torch.isin(pairs[0], crowded)], crowded

    def _parts_of_queries(self):
        return torch.arange(len(self.step), device=self.step.device).split(_BLOCK_QUERIES)

    def _products(self, part):
        """Of some queries, block by block: the candidates' places (`count` for none), int32 products (q, …) and parts
        along the direction; by group, (_GROUP, L / _GROUP)."""
        ours = self.queries[part[0] : part[-1] + 1]
        ours = F.pad(ours, (0, 0, 0, max(0, 32 - len(ours))))  # CUDA's product takes 17 rows or more
        for place, codes, along in zip(self.place, self.codes, self.along):
            products = torch._int_mm(ours, codes.T)[: len(part)]
            yield place.view(along.shape), products.view(len(part), *along.shape), along


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
        """(2, P) queries and rows of the float32 chunk that begins at `start`; `slack` as of `_Screen`."""
        scored = []
        for at, row in pairs.split(_PAIRS, dim=1):
            score = (self.single[at] * chunk[row]).sum(dim=1).double()
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
