"""Log-sum-exps over the blocks of a similarity matrix that is never held.

Notable features:
- memory O(N·D): one tile at a time is computed, exponentiated, summed and dropped; backward computes it again;
- symmetric tiles: S[a,m] = S[m,a]ᵀ, so one tile gives row and column sums, and one product W = P + Pᵀ both gradients;
- a fixed shift instead of a running maximum, with the exact running maximum as fallback where the shift underflows;
- the gradient of the scale falls out of the embeddings' gradient.
"""

import math
from itertools import combinations

import torch
from torch.autograd.function import once_differentiable

TILE = {"cpu": 512}  # a tile, its weights and its embeddings stay in a core's cache
TILE_ACCELERATOR = 4096  # few launches
DIAGONAL_PARTS = 4  # symmetry halves a tile on the diagonal only part by part: 0.5 % of waste at N = 4096


def block_logsumexp(embeds, scale, blocks, *, labels=(), semantic=None, bf16=False, cache_bytes=0):
    r"""
    For M modalities of N pairs: the log-sum-exp of each anchor's negatives in each modality, and the pairs' cosines.

        negatives[a, m, j] = log Σ_{k≠j} exp(s e_a^j·e_m^k),   cosines[a, m, j] = e_a^j·e_m^j  (a < m)

    Cost for each block in N²D multiply-adds counted twice: 8 for a < m (it yields [a, m] and [m, a]), 4 for a = m.

    Args:
        embeds (sequence of M `torch.Tensor` of shape `(N, D)`): all float32 or all float64, on one device. Rows need
            not be of unit norm, but far from it the slower fallback runs.
        scale (`torch.Tensor` scalar): s, of the embeddings' dtype and on their device.
        blocks (sequence of `(a, m)` with `a <= m`): the blocks to compute.
        labels (sequence of `torch.Tensor` of shape `(N,)`): pairs equal in any of them are not each other's negatives.
        semantic (`torch.Tensor` of shape `(N, S)`, *optional*): unit rows c. In blocks a = m the similarity e_a^j·e_a^k
            is then multiplied by 1 − c^j·c^k. Without gradient.
        bf16 (`bool`): the gradient's products, and the cached tiles, in bfloat16. The result itself is not affected.
        cache_bytes (`int`): memory for tiles kept from forward to backward, which need not be computed again.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(M, M, N)`: negatives, where anchors without any negative hold a huge
        negative finite value, and cosines. Entries of blocks not asked for are undefined; use none of them.
    """
    walk = _Walk(embeds[0], blocks, labels, semantic)
    if not torch.is_grad_enabled():
        cache_bytes = 0
    return _BlockLogSumExp.apply(walk, bf16, cache_bytes, scale, *embeds)


class _Walk:
    """The order in which tiles are visited, and the logits of one tile."""

    def __init__(self, like, blocks, labels, semantic):
        self.num_pairs = len(like)
        self.blocks, self.labels, self.semantic = blocks, labels, semantic
        self.tile = TILE.get(like.device.type, TILE_ACCELERATOR)
        self.new_empty = like.new_empty
        self.free()

    def free(self):
        """Give back the buffers; the next tile makes them anew."""
        self.buffers, self.hidden_of, self.repulsion_of = {}, None, None

    def __iter__(self):
        """Yield (a, rows, m, cols): each wanted pair of entries once, its transposed left out.

        All blocks of one pair of slices follow each other, so that they share masks and cached embeddings.
        """
        slices = _even_slices(0, self.num_pairs, self.tile)
        for index, rows in enumerate(slices):
            for cols in slices[index:]:
                for a, m in self.blocks:
                    if a == m and rows == cols:
                        parts = _even_slices(rows.start, rows.stop, -(-self.tile // DIAGONAL_PARTS))
                        for part, first in enumerate(parts):
                            for second in parts[part:]:
                                yield a, first, a, second
                    else:
                        yield a, rows, m, cols
                        if a != m and rows != cols:
                            yield a, cols, m, rows

    def buffer(self, name, rows, cols):
        """Uninitialised (rows, cols) memory that stays the same from tile to tile."""
        shape = rows.stop - rows.start, cols.stop - cols.start
        numel = shape[0] * shape[1]
        if name not in self.buffers or self.buffers[name].numel() < numel:
            self.buffers[name] = self.new_empty(numel)
        return self.buffers[name][:numel].view(shape)

    def logits(self, embeds, scale, a, rows, m, cols):
        """Tile of s·E_a E_mᵀ, -inf where the candidate is no negative; valid until the next call."""
        tile = self.buffer("tile", rows, cols)
        tile.addmm_(embeds[a][rows], embeds[m][cols].T, beta=0, alpha=scale)
        if a == m and self.semantic is not None:
            tile.mul_(self.repulsion(rows, cols))
        if rows == cols:
            tile.fill_diagonal_(-torch.inf)
        if self.labels and (hidden := self.hidden(rows, cols)) is not None:
            tile.masked_fill_(hidden, -torch.inf)
        return tile

    def hidden(self, rows, cols):
        """Bool tile: which pairs are alike by a label; None if known to be none."""
        key = (rows, cols)
        if self.hidden_of is None or self.hidden_of[0] not in (key, (cols, rows)):
            hidden = self.labels[0][rows, None] == self.labels[0][None, cols]
            for labels in self.labels[1:]:
                hidden |= labels[rows, None] == labels[None, cols]
            if hidden.device.type == "cpu" and not hidden.any():  # elsewhere asking costs more than masking
                hidden = None
            self.hidden_of = key, hidden
        first, hidden = self.hidden_of
        return hidden if hidden is None or first == key else hidden.T

    def repulsion(self, rows, cols):
        """Tile of 1 − C with C the semantic cosines."""
        if self.repulsion_of is None or self.repulsion_of[0] != (rows, cols):
            tile = self.buffer("repulsion", rows, cols).fill_(1)
            tile.addmm_(self.semantic[rows], self.semantic[cols].T, alpha=-1)
            self.repulsion_of = (rows, cols), tile
        return self.repulsion_of[1]


class _BlockLogSumExp(torch.autograd.Function):
    """`block_logsumexp`. With X = exp(S − c) and row sums z, g X/z is the gradient by the logits for g from above; a
    tile serves [a, m] by its rows and [m, a] by its columns, so both gradients use W = X ∘ (g/z ⊕ (g/z)ᵀ)."""

    @staticmethod
    def forward(ctx, walk, bf16, cache_bytes, scale, *embeds):
        with torch.autocast(scale.device.type, enabled=False):
            ctx.walk, ctx.bf16, ctx.scale = walk, bf16, scale.item()
            ctx.shift = _fixed_shift(ctx.scale, walk.num_pairs, scale.dtype)
            cache_dtype = torch.bfloat16 if bf16 else scale.dtype
            sums, cache = _shifted_sums(walk, embeds, ctx.scale, ctx.shift, cache_dtype, cache_bytes)
            ctx.exact = not _all_safe(sums, walk.blocks)
            if ctx.exact:
                cache = []
                negatives = saved = _online_logsumexp(walk, embeds, ctx.scale)
            else:
                negatives, saved = sums.log().add_(ctx.shift), sums
            walk.free()
            cosines = torch.zeros_like(negatives)
            for a, m in combinations(range(len(embeds)), 2):
                cosines[a, m] = torch.linalg.vecdot(embeds[a], embeds[m])
            ctx.save_for_backward(saved, *embeds, *cache)
            return negatives, cosines

    @staticmethod
    @once_differentiable
    def backward(ctx, from_negatives, from_cosines):
        saved, *rest = ctx.saved_tensors
        with torch.autocast(saved.device.type, enabled=False):
            needs_scale, *needs = ctx.needs_input_grad[3:]
            embeds, cache = rest[: len(needs)], rest[len(needs) :]
            grads = [torch.zeros_like(x) if need or needs_scale else None for x, need in zip(embeds, needs)]
            _add_weighted(ctx, from_negatives, saved, embeds, cache, grads)
            from_scale = None
            if needs_scale:  # Σ g dS/ds = Σ g S/s = <W E, E>/2, as W holds each entry of g in its row and in its column
                from_scale = sum(torch.linalg.vecdot(grad, x).sum() for grad, x in zip(grads, embeds)) / 2
            for own, grad in enumerate(grads):
                if grad is None:
                    continue
                grad.mul_(ctx.scale)
                for other in range(len(embeds)):
                    if other != own:
                        by_cosine = from_cosines[min(own, other), max(own, other), :, None]
                        grad.addcmul_(by_cosine, embeds[other])
            return None, None, None, from_scale, *(grad if need else None for grad, need in zip(grads, needs))


def _fixed_shift(scale, num_pairs, dtype):
    """Smallest c ≥ 0 for which N terms exp(s·cosine − c) cannot overflow; leaves the most room to small cosines."""
    return max(0.0, scale - (math.log(torch.finfo(dtype).max) - 2 - math.log(num_pairs)))


def _shifted_sums(walk, embeds, scale, shift, cache_dtype, cache_bytes):
    """(M, M, N) sums of exp(S − shift) over the negatives, and the list of the first tiles, as many as fit."""
    sums = embeds[0].new_zeros(len(embeds), len(embeds), walk.num_pairs)
    cache = []
    for a, rows, m, cols in walk:
        tile = walk.logits(embeds, scale, a, rows, m, cols)
        if shift:
            tile.sub_(shift)
        tile.exp_()
        sums[a, m, rows] += tile.sum(1)
        if (a, rows) != (m, cols):
            sums[m, a, cols] += tile.sum(0)
        cache_bytes -= tile.numel() * cache_dtype.itemsize
        if cache_bytes >= 0:
            if a == m and walk.semantic is not None:
                tile.mul_(walk.repulsion(rows, cols))
            cache.append(tile.to(cache_dtype, copy=True))
    return sums, cache


def _all_safe(sums, blocks):
    """Whether no row sum overflowed, nor is so small that terms lost to underflow could matter (or has no negative)."""
    limits = torch.finfo(sums.dtype)
    sums = torch.stack([sums[pair] for a, m in blocks for pair in ((a, m), (m, a))])
    return bool(((sums >= sums.shape[-1] * limits.tiny / limits.eps) & (sums <= limits.max)).all())


def _online_logsumexp(walk, embeds, scale):
    """(M, M, N) log-sum-exps over the negatives with a running maximum per row: for any input, at twice the exps."""
    limits = torch.finfo(embeds[0].dtype)
    peaks = embeds[0].new_full((len(embeds), len(embeds), walk.num_pairs), limits.min / 4)
    sums = torch.zeros_like(peaks)
    for a, rows, m, cols in walk:
        tile = walk.logits(embeds, scale, a, rows, m, cols)
        _add_online(peaks[a, m, rows], sums[a, m, rows], tile)
        if (a, rows) != (m, cols):
            _add_online(peaks[m, a, cols], sums[m, a, cols], tile.T)
    return peaks + sums.clamp_min(limits.tiny).log()


def _add_online(peaks, sums, tile):
    new_peaks = torch.maximum(peaks, tile.amax(1))
    sums.mul_((peaks - new_peaks).exp_()).add_((tile - new_peaks[:, None]).exp_().sum(1))
    peaks.copy_(new_peaks)


def _add_weighted(ctx, upstream, saved, embeds, cache, grads):
    """Add W·E to the gradients that are not None."""
    walk = ctx.walk
    ratios = None if ctx.exact else upstream / saved  # g/z
    factors = [x.bfloat16() for x in embeds] if ctx.bf16 else embeds
    for index, (a, rows, m, cols) in enumerate(walk):
        if grads[a] is None and grads[m] is None:
            continue
        weights = walk.buffer("weights", rows, cols)
        cached = index < len(cache)
        tile = cache[index] if cached else walk.logits(embeds, ctx.scale, a, rows, m, cols)
        if ctx.exact:
            torch.sub(tile, saved[a, m, rows, None], out=weights).exp_().mul_(upstream[a, m, rows, None])
            weights.add_(tile.sub_(saved[m, a, cols]).exp_().mul_(upstream[m, a, cols]))
        else:
            if not cached:
                if ctx.shift:
                    tile.sub_(ctx.shift)
                tile.exp_()
            torch.add(ratios[a, m, rows, None], ratios[m, a, None, cols], out=weights).mul_(tile)
        if a == m and walk.semantic is not None and not cached:
            weights.mul_(walk.repulsion(rows, cols))
        if ctx.bf16:
            weights = weights.bfloat16()
        if grads[a] is not None:
            _add_product(grads[a][rows], weights, factors[m][cols])
        if grads[m] is not None and (a, rows) != (m, cols):
            _add_product(grads[m][cols], weights.T, factors[a][rows])
    walk.free()


def _add_product(out, left, right):
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        out.add_(left @ right)


def _even_slices(start, stop, size):
    """Slices over start..stop, at most `size` long, as equal as may be."""
    parts = -(-(stop - start) // size)
    bounds = [start + (stop - start) * part // parts for part in range(parts + 1)]
    return [slice(*bound) for bound in zip(bounds, bounds[1:])]
