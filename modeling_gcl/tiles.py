"""Exponentiated similarities of a panel, tile by tile: their sums, and the products with embeddings that gradients are.

Notable features:
- memory of one tile: it is computed, exponentiated, summed and dropped; the gradient computes it again;
- symmetric tiles: S[a,m] = S[m,a]ᵀ, so a panel of pairs against themselves is walked on and above its diagonal only;
  one tile gives row and column sums, and one weight matrix W = P + Pᵀ the gradients of both sides;
- a bounded cache keeps tiles from the sums for the gradient;
- Matryoshka: one tile after another holds the logits of each cut of the embeddings, at the matrix products of one.
"""

from itertools import chain, repeat
from typing import NamedTuple

import torch

from .matryoshka import inverse_norms, parts

TILE = {"cpu": 512}  # a tile, its weights and its embeddings stay in a core's cache
TILE_ACCELERATOR = 4096  # few launches
DIAGONAL_PARTS = 4  # symmetry halves a tile on the diagonal only part by part: 0.5 % of waste at N = 4096


class Pairs(NamedTuple):
    """What similarities need to know of n pairs: `embeds`, a sequence of M tensors (n, D), one a modality; `labels`, a
    sequence of tensors (n,), pairs equal in any of them being no negatives; `semantic`, (n, S) unit rows, or None;
    `dims`, to which the embeddings are cut, from the smallest to D, or None: D alone."""

    embeds: tuple
    labels: tuple = ()
    semantic: torch.Tensor | None = None
    dims: tuple | None = None

    def tensors(self):
        """All of them in one list, for the journey to another process."""
        return [*self.embeds, *self.labels, *([] if self.semantic is None else [self.semantic])]

    @property
    def make(self):
        """(M, number of labels, dims), with which `of` puts `tensors()` together again."""
        return len(self.embeds), len(self.labels), self.dims

    @classmethod
    def of(cls, tensors, make):
        """Pairs of a list of tensors."""
        (m, num_labels, dims), tensors = make, tuple(tensors)
        semantic = tensors[m + num_labels :]
        return cls(tensors[:m], tensors[m : m + num_labels], semantic[0] if semantic else None, dims)

    def select(self, rows):
        """Pairs of a slice of them."""
        return Pairs.of((x[rows] for x in self.tensors()), self.make)


class Panel:
    """
    A rectangle of the similarity matrix: anchors (R pairs) against candidates (C pairs).

    Args:
        anchors, candidates (`Pairs`).
        blocks (sequence of `(a, m)` with `a <= m`): pairs of modalities; (a, m) stands for anchors in a against
            candidates in m and for anchors in m against candidates in a.
        symmetric (`bool`): candidates are the anchors themselves: none is its own negative in any modality.
    """

    def __init__(self, anchors, candidates, blocks, symmetric=False):
        self.anchors, self.candidates = anchors, candidates
        self.rows, self.row_labels, self.row_semantic, dims = anchors
        self.cols, self.col_labels, self.col_semantic, _ = candidates
        self.dims = dims or (self.rows[0].shape[1],)
        self.blocks, self.symmetric = blocks, symmetric

    def transposed(self):
        """The same rectangle with anchors and candidates exchanged."""
        return Panel(self.candidates, self.anchors, self.blocks, self.symmetric)

    def cast(self, dtype):
        """The same rectangle with embeddings of another dtype."""
        sides = (
            side._replace(embeds=tuple(x.to(dtype) for x in side.embeds)) for side in (self.anchors, self.candidates)
        )
        return Panel(*sides, self.blocks, self.symmetric)


class TileCache:
    """Tiles kept from the sums for the gradient, the first ones visited, as many as fit `num_bytes`."""

    def __init__(self, num_bytes, dtype):
        self.bytes_left, self.dtype, self.tiles = num_bytes, dtype, []

    def offer(self, tile):
        """Keep a copy if it fits; return whether it does."""
        self.bytes_left -= tile.numel() * self.dtype.itemsize
        if self.bytes_left >= 0:
            self.tiles.append(tile.to(self.dtype, copy=True))


def replay(tiles):
    """The cached tiles, then None for each that was not kept."""
    return chain(tiles, repeat(None))


def add_sums(panel, scale, shift, row_sums, col_sums, cache):
    """
    Add to each anchor's and each candidate's sums exp(S − shift) over its negatives.

    Args:
        panel (`Panel`): all float32 or all float64.
        scale, shift (`float`): S = scale·cosine.
        row_sums (`torch.Tensor` of shape `(K, M, M, R)`): [k, a, m, r] is of anchor r in a over candidates in m, cut to
            the k-th of the panel's dims.
        col_sums (`torch.Tensor` of shape `(K, M, M, C)`, or None): [k, m, a, c] is of candidate c in m over anchors in
            a. `row_sums` itself where the panel is symmetric; None if not wanted.
        cache (`TileCache`): is offered every tile.
    """
    tiles = _Tiles(panel)
    for a, rows, m, cols in tiles:
        by_col = col_sums is not None and not tiles.is_own_transpose(a, rows, m, cols)
        for k, tile in enumerate(tiles.logits(scale, a, rows, m, cols)):
            if shift:
                tile.sub_(shift)
            tile.exp_()
            row_sums[k, a, m, rows] += tile.sum(1)
            if by_col:
                col_sums[k, m, a, cols] += tile.sum(0)
            if cache.bytes_left > 0:
                if tiles.is_scaled_by_meaning(a, m):
                    tile.mul_(tiles.repulsion(rows, cols))
                cache.offer(tile)


def add_logsumexps(panel, scale, row_logs, col_logs):
    """As `add_sums` for rows of any norm: log-sum-exps, added in log space, at twice the exps."""
    tiles = _Tiles(panel)
    for a, rows, m, cols in tiles:
        by_col = col_logs is not None and not tiles.is_own_transpose(a, rows, m, cols)
        for k, tile in enumerate(tiles.logits(scale, a, rows, m, cols)):
            _add_log(row_logs[k, a, m, rows], tile.logsumexp(1))
            if by_col:
                _add_log(col_logs[k, m, a, cols], tile.logsumexp(0))


def add_weighted(panel, scale, shift, row_ratios, col_ratios, row_grads, col_grads, cached, bf16):
    """
    Add W·E, W = exp(S − shift) ∘ (row ratio ⊕ column ratio), to the gradients: each tile serves both sides.

    Args:
        panel, scale, shift: as for `add_sums`.
        row_ratios (`torch.Tensor` of shape `(K, M, M, R)`), col_ratios (`(K, M, M, C)`): gradient from above by sum.
        row_grads (sequence of M `torch.Tensor` of shape `(R, D)`, or None), col_grads (likewise with C): None where no
            gradient is wanted; the same object where the panel is symmetric. For K > 1 of shape `(R, D + K)`: the norms
            of the cut embeddings count as constants, and the last K columns get Σ W ∘ cosines of each cut.
        cached (iterator): what `replay` gives, at this panel's first tile.
        bf16 (`bool`): products in bfloat16.
    """

    def weigh(tile, fresh, weights, k, a, rows, m, cols):
        if fresh:
            if shift:
                tile.sub_(shift)
            tile.exp_()
        torch.add(row_ratios[k, a, m, rows, None], col_ratios[k, m, a, None, cols], out=weights).mul_(tile)

    _add_products(panel, scale, weigh, row_grads, col_grads, cached, bf16)


def add_weighted_by_logs(panel, scale, row_logs, col_logs, row_above, col_above, row_grads, col_grads, bf16):
    """As `add_weighted` with log-sum-exps (from `add_logsumexps`) and gradients from above, at twice the exps."""

    def weigh(tile, fresh, weights, k, a, rows, m, cols):
        torch.sub(tile, row_logs[k, a, m, rows, None], out=weights).exp_().mul_(row_above[k, a, m, rows, None])
        weights.add_(tile.sub_(col_logs[k, m, a, cols]).exp_().mul_(col_above[k, m, a, cols]))

    _add_products(panel, scale, weigh, row_grads, col_grads, repeat(None), bf16)


def _add_products(panel, scale, weigh, row_grads, col_grads, cached, bf16):
    """Walk the panel, let `weigh` fill W of each tile, and add its products to the gradients."""
    tiles = _Tiles(panel)
    row_factors, col_factors = ([x.bfloat16() if bf16 else x for x in side] for side in (panel.rows, panel.cols))
    for a, rows, m, cols in tiles:
        kept = next(cached)
        by_row = row_grads[a] is not None
        by_col = col_grads is not None and col_grads[m] is not None and not tiles.is_own_transpose(a, rows, m, cols)
        if not (by_row or by_col):
            continue
        fresh = kept is None
        weights = [tiles.buffer(f"weights {k}", rows, cols) for k in range(len(panel.dims))]
        for k, tile in enumerate(tiles.logits(scale, a, rows, m, cols) if fresh else [kept]):
            weigh(tile, fresh, weights[k], k, a, rows, m, cols)
            if fresh and tiles.is_scaled_by_meaning(a, m):
                weights[k].mul_(tiles.repulsion(rows, cols))
            if len(panel.dims) > 1:
                weights[k].mul_(tiles.row_inverses[a][k, rows, None]).mul_(tiles.col_inverses[m][k, cols])
                inner = torch.mul(weights[k], tiles.products(rows, cols), out=tile)
                column = panel.dims[-1] + k
                if by_row:
                    row_grads[a][rows, column] += inner.sum(1)
                if by_col:
                    col_grads[m][cols, column] += inner.sum(0)
        total = None
        for part, own in reversed(list(zip(parts(panel.dims), weights))):
            total = own if total is None else total.add_(own)  # of all cuts that these entries take part in
            factor = total.bfloat16() if bf16 else total
            if by_row:
                _add_product(row_grads[a][rows, part], factor, col_factors[m][cols, part])
            if by_col:
                _add_product(col_grads[m][cols, part], factor.T, row_factors[a][rows, part])


class _Tiles:
    """The order in which a panel's tiles are visited, and the logits of one tile."""

    def __init__(self, panel):
        self.panel = panel
        like = panel.rows[0]
        self.tile = TILE.get(like.device.type, TILE_ACCELERATOR)
        self.new_empty = like.new_empty
        self.buffers, self.hidden_of, self.repulsion_of = {}, None, None
        if len(panel.dims) > 1:
            self.row_inverses = [inverse_norms(x, panel.dims) for x in panel.rows]
            self.col_inverses = [inverse_norms(x, panel.dims) for x in panel.cols]

    def __iter__(self):
        """Yield (a, rows, m, cols): each wanted pair of entries once; of a symmetric panel, not its transposed again.

        All blocks of one pair of slices follow each other, so that they share masks and cached embeddings.
        """
        num_rows, num_cols = len(self.panel.rows[0]), len(self.panel.cols[0])
        col_slices = _even_slices(0, num_cols, self.tile)
        for index, rows in enumerate(_even_slices(0, num_rows, self.tile)):
            for cols in col_slices[index if self.panel.symmetric else 0 :]:
                on_diagonal = self.panel.symmetric and rows == cols
                for a, m in self.panel.blocks:
                    if a == m and on_diagonal:
                        parts = _even_slices(rows.start, rows.stop, -(-self.tile // DIAGONAL_PARTS))
                        for part, first in enumerate(parts):
                            for second in parts[part:]:
                                yield a, first, a, second
                    else:
                        yield a, rows, m, cols
                        if a != m and not on_diagonal:
                            yield m, rows, a, cols

    def is_own_transpose(self, a, rows, m, cols):
        """Whether the tile's columns are its rows, so that they must not be counted twice."""
        return self.panel.symmetric and (a, rows) == (m, cols)

    def is_scaled_by_meaning(self, a, m):
        return a == m and self.panel.row_semantic is not None

    def buffer(self, name, rows, cols):
        """Uninitialised (rows, cols) memory that stays the same from tile to tile."""
        shape = rows.stop - rows.start, cols.stop - cols.start
        numel = shape[0] * shape[1]
        if name not in self.buffers or self.buffers[name].numel() < numel:
            self.buffers[name] = self.new_empty(numel)
        return self.buffers[name][:numel].view(shape)

    def logits(self, scale, a, rows, m, cols):
        """Yield for each of the panel's dims the tile of s·E_a E_mᵀ, -inf where the candidate is no negative; valid
        until the next."""
        anchors, candidates = self.panel.rows[a][rows], self.panel.cols[m][cols]
        tile = self.buffer("tile", rows, cols)
        if len(self.panel.dims) == 1:
            tile.addmm_(anchors, candidates.T, beta=0, alpha=scale)
            yield self.without_hidden(tile, a, rows, m, cols)
            return
        products = self.products(rows, cols)
        for k, part in enumerate(parts(self.panel.dims)):
            products.addmm_(anchors[:, part], candidates[:, part].T, beta=min(k, 1))
            torch.mul(products, self.col_inverses[m][k, cols], out=tile)
            tile.mul_(scale * self.row_inverses[a][k, rows, None])
            yield self.without_hidden(tile, a, rows, m, cols)

    def products(self, rows, cols):
        """Tile of E_a E_mᵀ up to the cut that `logits` has come to."""
        return self.buffer("products", rows, cols)

    def without_hidden(self, tile, a, rows, m, cols):
        """Logits of products, in place: times the repulsion, and -inf where the candidate is no negative."""
        if self.is_scaled_by_meaning(a, m):
            tile.mul_(self.repulsion(rows, cols))
        if self.panel.symmetric and rows == cols:
            tile.fill_diagonal_(-torch.inf)
        if self.panel.row_labels and (hidden := self.hidden(rows, cols)) is not None:
            tile.masked_fill_(hidden, -torch.inf)
        return tile

    def hidden(self, rows, cols):
        """Bool tile: which pairs are alike by a label; None if known to be none."""
        if self.hidden_of is None or self.hidden_of[0] != (rows, cols):
            hidden = None
            for anchors, candidates in zip(self.panel.row_labels, self.panel.col_labels):
                alike = anchors[rows, None] == candidates[None, cols]
                hidden = alike if hidden is None else hidden.logical_or_(alike)
            if hidden.device.type == "cpu" and not hidden.any():  # elsewhere asking costs more than masking
                hidden = None
            self.hidden_of = (rows, cols), hidden
        return self.hidden_of[1]

    def repulsion(self, rows, cols):
        """Tile of 1 − C with C the semantic cosines."""
        if self.repulsion_of is None or self.repulsion_of[0] != (rows, cols):
            tile = self.buffer("repulsion", rows, cols).fill_(1)
            tile.addmm_(self.panel.row_semantic[rows], self.panel.col_semantic[cols].T, alpha=-1)
            self.repulsion_of = (rows, cols), tile
        return self.repulsion_of[1]


def _add_log(out, more):
    torch.logaddexp(out, more, out=out)


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
