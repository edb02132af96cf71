"""Log-sum-exps over blocks of a similarity matrix that is never stored, on one process or divided between several.

Notable features:
- Memory is O(N·D): the logits are computed tile by tile (`tiles`), or on NVIDIA GPUs by Triton kernels (`kernels`).
- The exponents have a fixed shift instead of a running maximum. If it underflows, exact log-sum-exps are computed.
- The gradient of the scale is computed from the gradient of the embeddings.
- Matryoshka: K cuts of the embeddings take one pass, with as many matrix products as one cut. (The kernels take K
  passes.)
- With several processes, each sums over its own anchors, and the sums are gathered. Each process can then compute the
  gradient of its own rows; no gradient is communicated. With `half_ring`, the embeddings are not gathered either.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .kernels import add_sums as add_sums_by_kernel
from .kernels import add_weighted as add_weighted_by_kernel
from .kernels import supports as kernels_support
from .matryoshka import cosines, cut, inverse_norms, parts, sums_beyond
from .tiles import Pairs, Panel, TileCache, add_logsumexps, add_sums, add_weighted, add_weighted_by_logs, replay


class OneProcess:
    """One process that has the whole batch. Objects for several processes have the same attributes and methods.

    Attributes:
        rank, size (`int`): index of this process, and number of processes.
        half_ring (`bool`): send blocks of rows from process to process instead of gathering all rows. Memory is then
            O(N·D / size).
    """

    rank, size, half_ring = 0, 1, False

    def agree(self, num_rows: int, settings: dict[str, Any] | None, error: Exception | None = None) -> list[int]:
        """Compare errors and settings of all processes, before any tensor is exchanged.

        Args:
            num_rows (`int`): number of rows on this process.
            settings (`dict`): what must be equal on all processes. None if there is an error.
            error (`Exception`, *optional*): the error of this process.

        Returns:
            `list[int]`: number of rows on each process.

        Raises:
            Exception: a process has an error. All processes raise it.
            ValueError: the settings differ. All processes raise it.
        """
        if error is not None:
            raise error
        return [num_rows]

    def start_gather(self, tensors: list[torch.Tensor], sizes: list[int]) -> Callable[[], list[torch.Tensor]]:
        """Start to concatenate each of `tensors` (n, ...) over all processes, in rank order. Returns a function that
        waits for the result and returns it."""
        return lambda: tensors

    def start_shift(
        self, tensors: list[torch.Tensor], distance: int, num_rows: int
    ) -> Callable[[], list[torch.Tensor]]:
        """Start to send `tensors` to process rank + distance. Returns a function that waits for the tensors of process
        rank − distance, which have `num_rows` rows, and returns them."""
        return lambda: tensors


def working_dtypes(embeds: Sequence[torch.Tensor]) -> tuple[torch.dtype, torch.dtype]:
    """
    The precision in which losses of these embeddings are computed.

    Returns:
        `tuple[torch.dtype, torch.dtype]`: the dtype of the embeddings, and that of logits and sums. If any embedding is
        float64, both are float64. Otherwise both are float32, except that embeddings of half precision are not
        converted for kernels, which multiply them exactly.
    """
    dtypes = {x.dtype for x in embeds}
    if torch.float64 in dtypes:
        return torch.float64, torch.float64
    keep = len(dtypes) == 1 and all(kernels_support(x) for x in embeds)
    return embeds[0].dtype if keep else torch.float32, torch.float32


def block_logsumexp(
    embeds: Sequence[torch.Tensor],
    scale: torch.Tensor,
    blocks: Sequence[tuple[int, int]],
    dims: Sequence[int],
    *,
    labels: Sequence[torch.Tensor] = (),
    semantic: torch.Tensor | None = None,
    bf16: bool = False,
    cache_bytes: int = 0,
    processes: OneProcess | None = None,
    sizes: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    For N pairs in M modalities, compute the log-sum-exps of each anchor's negatives in each modality, and the cosines
    of the pairs, with the embeddings cut to each of K dimensions:

        negatives[d, a, m, j] = log Σ_{k≠j} exp(s e_a^j·e_m^k),   cosines[d, a, m, j] = e_a^j·e_m^j  (a < m)

    In floating-point operations, a block costs 8 N²D if a < m (it gives [a, m] and [m, a]), and 4 N²D if a = m. With
    `half_ring`, each of W processes does 1/W of that (and for even W, half an n² block more). Otherwise each does
    12 N²D/W and 6 N²D/W, less what symmetry saves for its own n = N/W rows.

    Args:
        embeds (sequence of M `torch.Tensor` of shape `(n, D)`): rows of this process, all on one device, with the first
            of `working_dtypes`. They need not have unit norm, but for norms far from it the slower fallback runs.
        scale (`torch.Tensor` scalar): s, with the second of `working_dtypes`, on the same device.
        blocks (sequence of `(a, m)` with `a <= m`): the blocks to compute.
        dims (sequence of K `int`): from the smallest to D. Rows that are cut are normalised again.
        labels (sequence of `torch.Tensor` of shape `(n,)`): pairs that are equal in one of them are not negatives.
        semantic (`torch.Tensor` of shape `(n, S)`, *optional*): unit rows c, with the dtype of `scale`. In blocks with
            a = m, the similarity e_a^j·e_a^k is multiplied by 1 − c^j·c^k. They get no gradient.
        bf16 (`bool`): compute the products of the gradient in bfloat16, and cache tiles in bfloat16. The result does
            not change.
        cache_bytes (`int`): memory for tiles that are kept from forward to backward. Only used if K = 1.
        processes (*optional*): the processes that share the batch; see [`OneProcess`]. Each has n of the N pairs.
        sizes (`list[int]`, *optional*): number of rows on each process; needed with `processes`.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(K, M, M, N)`, equal on all processes: negatives and cosines. Anchors
        without negatives have a very low finite value. Entries outside `blocks` are undefined; don't use them.

        Backward must start from the same loss on all processes. It gives the gradient of the process's own rows, times
        the number of processes, and a part of the scale's gradient. Averaged over processes, as
        DistributedDataParallel and FSDP do, these give the gradient of the loss.
    """
    if len(dims) > 1 and kernels_support(embeds[0]):
        each = [
            block_logsumexp(
                [cut(x.to(scale.dtype), d) for x in embeds], scale, blocks, [d], labels=labels, semantic=semantic,
                bf16=bf16, processes=processes, sizes=sizes,
            )
            for d in dims
        ]  # fmt: skip
        negatives, paired = (torch.cat(of_each_dim) for of_each_dim in zip(*each))
        return negatives, paired
    if not torch.is_grad_enabled() or kernels_support(embeds[0]) or len(dims) > 1:
        cache_bytes = 0
    processes = processes or OneProcess()
    embeds = [x.contiguous() for x in embeds]
    shares = blocks, processes, sizes or [len(embeds[0])]
    return _BlockLogSumExp.apply(shares, dims, labels, semantic, bf16, cache_bytes, scale, *embeds)


class _ProcessShare:
    """The panels that one process computes, and its communication with other processes."""

    def __init__(self, own, blocks, processes, sizes):
        self.own, self.blocks, self.processes, self.sizes = own, blocks, processes, sizes
        start = sum(sizes[: processes.rank])
        self.rows = slice(start, start + sizes[processes.rank])  # this process's among all
        self.num_pairs = sum(sizes)

    def panels(self, gathered=None):
        """Yield (panel, slice of the candidates among all rows, distance). If the candidates' process relies on this
        process for its side of the panel, distance is the distance to it; otherwise it is None.

        Args:
            gathered (list, *optional*): the gathered tensors. If empty, it is filled with them.
        """
        gathered = [] if gathered is None else gathered
        if self.processes.half_ring:
            yield from self._half_ring()
            return
        arrive = None if gathered else self.processes.start_gather(self.own.tensors(), self.sizes)
        yield Panel(self.own, self.own, self.blocks, symmetric=True), self.rows, None
        if arrive is not None:
            gathered.extend(arrive())
        for rows in (slice(0, self.rows.start), slice(self.rows.stop, self.num_pairs)):
            if rows.start < rows.stop:
                others = Pairs.from_tensors(gathered, self.own.layout).select(rows)
                yield Panel(self.own, others, self.blocks), rows, None

    def _half_ring(self):
        """S[p,q] = S[q,p]ᵀ, so only one of two processes computes it, and sends the other its side."""
        rank, size = self.processes.rank, self.processes.size
        arrive = self._start_visit(1)
        yield Panel(self.own, self.own, self.blocks, symmetric=True), self.rows, None
        for distance in range(1, size // 2 + 1):
            visitors = Pairs.from_tensors(arrive(), self.own.layout)
            arrive = self._start_visit(distance + 1)
            host = (rank - distance) % size
            start = sum(self.sizes[:host])
            rows = slice(start, start + self.sizes[host])
            # half-way around an even ring, both processes visit each other, and each computes its own side
            shared = 2 * distance < size
            yield Panel(self.own, visitors, self.blocks), rows, distance if shared else None

    def _start_visit(self, distance):
        if distance <= self.processes.size // 2:
            num_rows = self.sizes[(self.processes.rank - distance) % self.processes.size]
            return self.processes.start_shift(self.own.tensors(), distance, num_rows)

    def send_back(self, tensors, distance):
        """Send visitors what was computed for them, and receive what others computed for this process's rows."""
        return self.processes.start_shift(tensors, -distance, self.sizes[self.processes.rank])()

    def gather(self, rows_first):
        """(n, ...) of every process → (N, ...)."""
        return self.processes.start_gather([rows_first], self.sizes)()[0]


class _BlockLogSumExp(torch.autograd.Function):
    """`block_logsumexp`. With X = exp(S − c), row sums z and the incoming gradient g, the gradient of the logits is
    g X/z. The rows of a tile belong to [a, m] and its columns to [m, a], so both gradients use W = X ∘ (g/z ⊕ (g/z)ᵀ).
    If K > 1, a gradient has K more columns, Σ W ∘ cosines of each cut, for the gradients of the norms and the scale."""

    @staticmethod
    def forward(ctx, shares, dims, labels, semantic, bf16, cache_bytes, scale, *embeds):
        with torch.autocast(scale.device.type, enabled=False):
            own = Pairs(embeds, tuple(labels), semantic, tuple(dims))
            work = _ProcessShare(own, *shares)
            ctx.shares, ctx.layout, ctx.bf16, ctx.scale = shares, own.layout, bf16, scale.item()
            ctx.shift = _fixed_shift(ctx.scale, work.num_pairs, scale.dtype)
            cache = TileCache(cache_bytes, torch.bfloat16 if bf16 else scale.dtype)
            gathered = []
            sums = _sums(work, ctx.scale, ctx.shift, scale.dtype, cache, gathered)
            ctx.exact = not _all_safe(sums, work.blocks)
            if ctx.exact:
                cache.tiles.clear()
                negatives = saved = _logsumexps(work, ctx.scale, scale.dtype, gathered)
            else:
                negatives, saved = sums.log().add_(ctx.shift), sums
            paired = torch.zeros_like(saved[..., work.rows])
            for a, m in combinations(range(len(embeds)), 2):
                paired[:, a, m] = cosines(embeds[a].to(scale.dtype), embeds[m].to(scale.dtype), dims)
            ctx.num_own, ctx.num_gathered = len(own.tensors()), len(gathered)
            ctx.save_for_backward(saved, *own.tensors(), *gathered, *cache.tiles)
            return negatives, _rows_last(work.gather(_rows_first(paired)))

    @staticmethod
    @once_differentiable
    def backward(ctx, from_negatives, from_cosines):
        saved, *rest = ctx.saved_tensors
        own, rest = Pairs.from_tensors(rest[: ctx.num_own], ctx.layout), rest[ctx.num_own :]
        gathered, cached = rest[: ctx.num_gathered], rest[ctx.num_gathered :]
        work, embeds = _ProcessShare(own, *ctx.shares), own.embeds
        with torch.autocast(saved.device.type, enabled=False):
            needs_scale, *needs = ctx.needs_input_grad[6:]
            dim, dims = embeds[0].shape[1], own.dims
            width = dim + (len(dims) if len(dims) > 1 else 0)
            grads = [
                x.new_zeros(len(x), width, dtype=saved.dtype) if need or needs_scale else None
                for x, need in zip(embeds, needs)
            ]
            _add_gradients(ctx, work, from_negatives, saved, gathered, cached, grads)
            from_scale = None
            if needs_scale:  # Σ g dS/ds = Σ g S/s = <W E, E>/2, as W holds each entry of g in its row and in its column
                if len(dims) > 1:
                    inner = (grad[:, dim:].sum() for grad in grads)
                else:
                    inner = (torch.linalg.vecdot(grad, x.to(grad.dtype)).sum() for grad, x in zip(grads, embeds))
                from_scale = sum(inner) / 2 * work.processes.size
            _to_gradients(grads, embeds, dims, ctx.scale, from_cosines[..., work.rows])
            grads = (
                grad[:, :dim].mul_(work.processes.size).to(x.dtype) if need else None
                for grad, x, need in zip(grads, embeds, needs)
            )
            return None, None, None, None, None, None, from_scale, *grads


def _to_gradients(grads, embeds, dims, scale, from_cosines):
    """Turn W·E into gradients, in place: multiply by the scale, add the gradient that comes from the pairs' cosines
    (K, M, M, n), and remove the component along each cut embedding, whose norm is fixed."""
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
    """The smallest c ≥ 0 for which N terms exp(s·cosine − c) cannot overflow, which leaves most room for small cosines.
    (With semantic factors, which reach 2, they can overflow; `_all_safe` detects that.)"""
    return max(0.0, scale - (math.log(torch.finfo(dtype).max) - 2 - math.log(num_pairs)))


def _sums(work, scale, shift, dtype, cache, gathered):
    """(K, M, M, N) sums of exp(S − shift) over the negatives of all anchors."""
    sums = _of_each_anchor(work, 0.0, dtype)
    for panel, rows, distance in work.panels(gathered):
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


def _logsumexps(work, scale, dtype, gathered):
    """(K, M, M, N) log-sum-exps over the negatives of all anchors, for inputs of any size."""
    logs = _of_each_anchor(work, -torch.inf, dtype)
    for panel, rows, distance in work.panels(gathered):
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
    """Whether no row sum has overflowed, and none is so small that terms lost to underflow could matter."""
    limits = torch.finfo(sums.dtype)
    sums = torch.stack([sums[:, x, y] for a, m in blocks for x, y in ((a, m), (m, a))])
    return bool(((sums >= sums.shape[-1] * limits.tiny / limits.eps) & (sums <= limits.max)).all())


def _add_gradients(ctx, work, above, saved, gathered, cached, grads):
    """Add W·E to those gradients of this process's rows that are not None."""
    ratios = above if ctx.exact else above / saved  # g/z
    cached = replay(cached)
    for panel, rows, distance in work.panels(gathered):
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
