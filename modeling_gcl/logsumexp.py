"""Log-sum-exps over the blocks of a similarity matrix that is never held, on one process or shared out over several.

Notable features:
- memory O(N·D): the logits exist only tile by tile (`tiles`);
- a fixed shift instead of a running maximum, with exact log-sum-exps as fallback where the shift underflows;
- the gradient of the scale falls out of the embeddings' gradient;
- Matryoshka: embeddings cut to several dimensions are one pass, of a single one's matrix products (not by kernels);
- on NVIDIA GPUs Triton kernels take the place of the tiles (`kernels`);
- several processes: each sums over its own anchors, the sums are gathered, and every process then holds all that the
  gradient of its own rows needs. No gradient is communicated. With `half_ring` not even the embeddings are gathered.
"""

import math
from itertools import combinations

import torch
from torch.autograd.function import once_differentiable

from .kernels import add_sums as add_sums_by_kernel
from .kernels import add_weighted as add_weighted_by_kernel
from .kernels import supports as kernels_support
from .matryoshka import cosines, cut, inverse_norms, parts, sums_beyond
from .tiles import Pairs, Panel, TileCache, add_logsumexps, add_sums, add_weighted, add_weighted_by_logs, replay


class OneProcess:
    """A batch that one process holds whole; and what an object that stands for several processes must offer.

    Attributes:
        rank, size (`int`): which process this is, of how many.
        half_ring (`bool`): pass blocks of rows around instead of gathering all: memory O(N·D / size).
    """

    rank, size, half_ring = 0, 1, False

    def agree(self, num_rows, settings, error=None):
        """Before any tensor is exchanged: `error` (or None) and what this process has, compared with the others'.

        Args:
            num_rows (`int`): rows on this process.
            settings (`dict`): what must be the same on all processes; None with an error.
            error (`Exception`, *optional*): what is wrong on this process.

        Returns:
            `list[int]`: rows of each process.

        Raises:
            Exception: on every process alike, if any process has an error.
            ValueError: likewise, if settings differ.
        """
        if error is not None:
            raise error
        return [num_rows]

    def start_gather(self, tensors, sizes):
        """Begin to join each of `tensors` (n, ...) over all processes in rank order; returns a function that waits and
        gives the list of them."""
        return lambda: tensors

    def start_shift(self, tensors, distance, num_rows):
        """Begin to send `tensors` to process rank + distance; returns a function that waits and gives the list that
        process rank − distance sent, of `num_rows` rows each."""
        return lambda: tensors


def working_dtypes(embeds):
    """
    Precision of the losses of these embeddings.

    Returns:
        `tuple[torch.dtype, torch.dtype]`: of the embeddings, and of logits and sums. Both float64 if an embedding is;
        else float32, but embeddings of half precision stay as they are where kernels multiply them exactly.
    """
    dtypes = {x.dtype for x in embeds}
    if torch.float64 in dtypes:
        return torch.float64, torch.float64
    keep = len(dtypes) == 1 and all(kernels_support(x) for x in embeds)
    return embeds[0].dtype if keep else torch.float32, torch.float32


def block_logsumexp(
    embeds, scale, blocks, dims, *, labels=(), semantic=None, bf16=False, cache_bytes=0, processes=None, sizes=None
):
    r"""
    For M modalities of N pairs: the log-sum-exp of each anchor's negatives in each modality, and the pairs' cosines,
    with the embeddings cut to each of K dimensions:

        negatives[d, a, m, j] = log Σ_{k≠j} exp(s e_a^j·e_m^k),   cosines[d, a, m, j] = e_a^j·e_m^j  (a < m)

    Cost for each block in N²D multiply-adds counted twice: 8 for a < m (it yields [a, m] and [m, a]), 4 for a = m. On
    W processes each has 1/W of it with `half_ring` (and for even W half an n² block more); otherwise 12 and 6 N²D/W,
    less what symmetry saves among its own n = N/W rows.

    Args:
        embeds (sequence of M `torch.Tensor` of shape `(n, D)`): this process's rows, on one device and of the first of
            `working_dtypes`. Rows need not be of unit norm, but far from it the slower fallback runs.
        scale (`torch.Tensor` scalar): s, of the second of `working_dtypes`, on the same device.
        blocks (sequence of `(a, m)` with `a <= m`): the blocks to compute.
        dims (sequence of K `int`): from the smallest to D. Rows are normalised again once cut, but not to D.
        labels (sequence of `torch.Tensor` of shape `(n,)`): pairs equal in any of them are not each other's negatives.
        semantic (`torch.Tensor` of shape `(n, S)`, *optional*): unit rows c, of the scale's dtype. In blocks a = m the
            similarity e_a^j·e_a^k is then multiplied by 1 − c^j·c^k. Without gradient.
        bf16 (`bool`): the gradient's products, and the cached tiles, in bfloat16. The result itself is not affected.
        cache_bytes (`int`): memory for tiles kept from forward to backward, which need not be computed again, if K = 1.
        processes (*optional*): who shares the batch, as [`OneProcess`] describes it; each has n of the N pairs.
        sizes (`list[int]`, *optional*): rows of each process; with `processes`.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(K, M, M, N)`, the same on all processes: negatives, where anchors
        without any negative hold a huge negative finite value, and cosines. Entries of blocks not asked for are
        undefined; use none of them. Backward must start from the same loss on all processes. It gives the gradient of
        the process's own rows times the number of processes, and a share of the scale's such that the mean over
        processes is the whole gradient: what DistributedDataParallel and FSDP make of it, by averaging, is the gradient
        of the loss.
    """
    if len(dims) > 1 and kernels_support(embeds[0]):
        each = [
            block_logsumexp(
                [cut(x.to(scale.dtype), d) for x in embeds], scale, blocks, [d], labels=labels, semantic=semantic,
                bf16=bf16, processes=processes, sizes=sizes,
            )
            for d in dims
        ]  # fmt: skip
        return tuple(map(torch.cat, zip(*each)))
    if not torch.is_grad_enabled() or kernels_support(embeds[0]) or len(dims) > 1:
        cache_bytes = 0
    processes = processes or OneProcess()
    embeds = [x.contiguous() for x in embeds]
    shares = blocks, processes, sizes or [len(embeds[0])]
    return _BlockLogSumExp.apply(shares, dims, labels, semantic, bf16, cache_bytes, scale, *embeds)


class _Work:
    """One process's share of the panels, and what it needs of other processes for them."""

    def __init__(self, own, blocks, processes, sizes):
        self.own, self.blocks, self.processes, self.sizes = own, blocks, processes, sizes
        start = sum(sizes[: processes.rank])
        self.rows = slice(start, start + sizes[processes.rank])  # this process's among all
        self.num_pairs = sum(sizes)

    def panels(self, everyone=None):
        """Yield (panel, candidates' rows among all, distance of their process or None if they do no share of it).

        Args:
            everyone (list, *optional*): is filled with the gathered tensors, or holds them already.
        """
        everyone = [] if everyone is None else everyone
        if self.processes.half_ring:
            yield from self._half_ring()
            return
        arrive = None if everyone else self.processes.start_gather(self.own.tensors(), self.sizes)
        yield Panel(self.own, self.own, self.blocks, symmetric=True), self.rows, None
        if arrive is not None:
            everyone.extend(arrive())
        for rows in (slice(0, self.rows.start), slice(self.rows.stop, self.num_pairs)):
            if rows.start < rows.stop:
                others = Pairs.of(everyone, self.own.make).select(rows)
                yield Panel(self.own, others, self.blocks), rows, None

    def _half_ring(self):
        """S[p,q] = S[q,p]ᵀ: of two processes one computes it, and hands the other its side."""
        rank, size = self.processes.rank, self.processes.size
        arrive = self._start_visit(1)
        yield Panel(self.own, self.own, self.blocks, symmetric=True), self.rows, None
        for distance in range(1, size // 2 + 1):
            visitors = Pairs.of(arrive(), self.own.make)
            arrive = self._start_visit(distance + 1)
            host = (rank - distance) % size
            start = sum(self.sizes[:host])
            rows = slice(start, start + self.sizes[host])
            # half way round an even ring both processes meet each other: each takes its own side
            shared = 2 * distance < size
            yield Panel(self.own, visitors, self.blocks), rows, distance if shared else None

    def _start_visit(self, distance):
        if distance <= self.processes.size // 2:
            num_rows = self.sizes[(self.processes.rank - distance) % self.processes.size]
            return self.processes.start_shift(self.own.tensors(), distance, num_rows)

    def send_back(self, tensors, distance):
        """Give visitors what was computed for them, and get what others computed for this process's rows."""
        return self.processes.start_shift(tensors, -distance, self.sizes[self.processes.rank])()

    def gather(self, rows_first):
        """(n, ...) of every process → (N, ...)."""
        return self.processes.start_gather([rows_first], self.sizes)()[0]


class _BlockLogSumExp(torch.autograd.Function):
    """`block_logsumexp`. With X = exp(S − c) and row sums z, g X/z is the gradient by the logits for g from above; a
    tile serves [a, m] by its rows and [m, a] by its columns, so both gradients use W = X ∘ (g/z ⊕ (g/z)ᵀ). A gradient
    has K more columns if K > 1: Σ W ∘ cosines of each cut, which the norms and the scale get their gradients from."""

    @staticmethod
    def forward(ctx, shares, dims, labels, semantic, bf16, cache_bytes, scale, *embeds):
        with torch.autocast(scale.device.type, enabled=False):
            own = Pairs(embeds, tuple(labels), semantic, tuple(dims))
            work = _Work(own, *shares)
            ctx.shares, ctx.make, ctx.bf16, ctx.scale = shares, own.make, bf16, scale.item()
            ctx.shift = _fixed_shift(ctx.scale, work.num_pairs, scale.dtype)
            cache = TileCache(cache_bytes, torch.bfloat16 if bf16 else scale.dtype)
            everyone = []
            sums = _sums(work, ctx.scale, ctx.shift, scale.dtype, cache, everyone)
            ctx.exact = not _all_safe(sums, work.blocks)
            if ctx.exact:
                cache.tiles.clear()
                negatives = saved = _logsumexps(work, ctx.scale, scale.dtype, everyone)
            else:
                negatives, saved = sums.log().add_(ctx.shift), sums
            paired = torch.zeros_like(saved[..., work.rows])
            for a, m in combinations(range(len(embeds)), 2):
                paired[:, a, m] = cosines(embeds[a].to(scale.dtype), embeds[m].to(scale.dtype), dims)
            ctx.num_own, ctx.num_gathered = len(own.tensors()), len(everyone)
            ctx.save_for_backward(saved, *own.tensors(), *everyone, *cache.tiles)
            return negatives, _rows_last(work.gather(_rows_first(paired)))

    @staticmethod
    @once_differentiable
    def backward(ctx, from_negatives, from_cosines):
        saved, *rest = ctx.saved_tensors
        own, rest = Pairs.of(rest[: ctx.num_own], ctx.make), rest[ctx.num_own :]
        everyone, cached = rest[: ctx.num_gathered], rest[ctx.num_gathered :]
        work, embeds = _Work(own, *ctx.shares), own.embeds
        with torch.autocast(saved.device.type, enabled=False):
            needs_scale, *needs = ctx.needs_input_grad[6:]
            dim, dims = embeds[0].shape[1], own.dims
            width = dim + (len(dims) if len(dims) > 1 else 0)
            grads = [
                x.new_zeros(len(x), width, dtype=saved.dtype) if need or needs_scale else None
                for x, need in zip(embeds, needs)
            ]
            _add_gradients(ctx, work, from_negatives, saved, everyone, cached, grads)
            from_scale = None
            if needs_scale:  # Σ g dS/ds = Σ g S/s = <W E, E>/2, as W holds each entry of g in its row and in its column
                if len(dims) > 1:
                    inner = (grad[:, dim:].sum() for grad in grads)
                else:
                    inner = (torch.linalg.vecdot(grad, x.to(grad.dtype)).sum() for grad, x in zip(grads, embeds))
                from_scale = sum(inner) / 2 * work.processes.size
            _finish(grads, embeds, dims, ctx.scale, from_cosines[..., work.rows])
            grads = (
                grad[:, :dim].mul_(work.processes.size).to(x.dtype) if need else None
                for grad, x, need in zip(grads, embeds, needs)
            )
            return None, None, None, None, None, None, from_scale, *grads


def _finish(grads, embeds, dims, scale, from_cosines):
    """Turn W·E into gradients, in place: times the scale, with what the pairs' cosines pull (K, M, M, n), and without
    the part along a cut embedding, whose norm is fixed."""
    inverses = [inverse_norms(x, dims).to(from_cosines.dtype) for x in embeds]
    for a, grad in enumerate(grads):
        if grad is None:
            continue
        along = grad.mul_(scale)[:, dims[-1] :].T
        for m in range(len(embeds)):
            if m == a:
                continue
            pull = from_cosines[:, min(a, m), max(a, m)]
            for part, factor in zip(parts(dims), sums_beyond(pull * inverses[a] * inverses[m])):
                grad[:, part].addcmul_(factor[:, None], embeds[m][:, part])
            if len(dims) > 1:
                along.add_(pull * cosines(embeds[a], embeds[m], dims))
        if len(dims) > 1:
            for part, factor in zip(parts(dims), sums_beyond((along * inverses[a].square())[:-1])):
                grad[:, part].addcmul_(factor[:, None], embeds[a][:, part], value=-1)


def _fixed_shift(scale, num_pairs, dtype):
    """Smallest c ≥ 0 for which N terms exp(s·cosine − c) cannot overflow; leaves the most room to small cosines.
    (Semantic factors reach 2: what they make overflow is found by `_all_safe`.)"""
    return max(0.0, scale - (math.log(torch.finfo(dtype).max) - 2 - math.log(num_pairs)))


def _sums(work, scale, shift, dtype, cache, everyone):
    """(K, M, M, N) sums of exp(S − shift) over the negatives of all anchors."""
    sums = _of_each_anchor(work, 0.0, dtype)
    for panel, rows, distance in work.panels(everyone):
        theirs = sums if panel.symmetric else None
        if distance is not None:
            theirs = sums.new_zeros(*sums.shape[:-1], rows.stop - rows.start)
        if kernels_support(panel.rows[0]):
            add_sums_by_kernel(panel, scale, shift, sums[0])
            if distance is not None:
                add_sums_by_kernel(panel.transposed(), scale, shift, theirs[0])
        else:
            add_sums(panel, scale, shift, sums, theirs, cache)
        if distance is not None:
            sums += _rows_last(work.send_back([_rows_first(theirs)], distance)[0])
    return _rows_last(work.gather(_rows_first(sums)))


def _logsumexps(work, scale, dtype, everyone):
    """(K, M, M, N) log-sum-exps over the negatives of all anchors, for any input."""
    logs = _of_each_anchor(work, -torch.inf, dtype)
    for panel, rows, distance in work.panels(everyone):
        theirs = logs if panel.symmetric else None
        if distance is not None:
            theirs = logs.new_full((*logs.shape[:-1], rows.stop - rows.start), -torch.inf)
        add_logsumexps(panel.cast(dtype), scale, logs, theirs)
        if distance is not None:
            logs = torch.logaddexp(logs, _rows_last(work.send_back([_rows_first(theirs)], distance)[0]))
    logs.clamp_min_(torch.finfo(logs.dtype).min / 4)
    return _rows_last(work.gather(_rows_first(logs)))


def _of_each_anchor(work, value, dtype):
    embeds, dims = work.own.embeds, work.own.dims
    return embeds[0].new_full((len(dims), len(embeds), len(embeds), len(embeds[0])), value, dtype=dtype)


def _all_safe(sums, blocks):
    """Whether no row sum overflowed, nor is so small that terms lost to underflow could matter (or has no negative)."""
    limits = torch.finfo(sums.dtype)
    sums = torch.stack([sums[:, x, y] for a, m in blocks for x, y in ((a, m), (m, a))])
    return bool(((sums >= sums.shape[-1] * limits.tiny / limits.eps) & (sums <= limits.max)).all())


def _add_gradients(ctx, work, above, saved, everyone, cached, grads):
    """Add W·E to the gradients of this process's rows that are not None."""
    ratios = above if ctx.exact else above / saved  # g/z
    cached = replay(cached)
    for panel, rows, distance in work.panels(everyone):
        theirs = grads if panel.symmetric else None
        if distance is not None:
            theirs = [None if g is None else g.new_zeros(len(x), g.shape[1]) for g, x in zip(grads, panel.cols)]
        if ctx.exact:
            logs_above = saved[..., work.rows], saved[..., rows], above[..., work.rows], above[..., rows]
            add_weighted_by_logs(panel.cast(saved.dtype), ctx.scale, *logs_above, grads, theirs, ctx.bf16)
        else:
            mine, others = ratios[..., work.rows], ratios[..., rows]
            if kernels_support(panel.rows[0]):
                mine, others = mine[0], others[0]
                add_weighted_by_kernel(panel, ctx.scale, ctx.shift, mine, others, grads, ctx.bf16)
                if distance is not None:
                    add_weighted_by_kernel(panel.transposed(), ctx.scale, ctx.shift, others, mine, theirs, ctx.bf16)
            else:
                add_weighted(panel, ctx.scale, ctx.shift, mine, others, grads, theirs, cached, ctx.bf16)
        if distance is not None:
            wanted = [g for g in grads if g is not None]
            for grad, more in zip(wanted, work.send_back([t for t in theirs if t is not None], distance)):
                grad.add_(more)


def _rows_first(x):
    return x.movedim(-1, 0).contiguous()


def _rows_last(x):
    return x.movedim(0, -1)
