"""Sums of exponentiated similarities, and their gradients, computed tile by tile for a panel of the similarity matrix.

Notable features:
- Only one tile is in memory: it is computed, exponentiated, summed and dropped. The gradient computes it again.
- Symmetry: S[a,m] = S[m,a]ᵀ, so for a panel of pairs against themselves only the tiles on and above the diagonal are
  computed. Each tile gives row sums and column sums, and one weight matrix W = P + Pᵀ the gradients of both sides.
- A cache of limited size can keep tiles from the sums for the gradient.
- Matryoshka: the logits of all cuts of the embeddings are computed from the matrix products of one.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import NamedTuple

import torch

from .matryoshka import inverse_norms, parts

TILE = {"cpu": 512}  # small enough that a tile, its weights and its embeddings fit a core's cache
TILE_ACCELERATOR = 4096  # large, so that few kernels are launched
DIAGONAL_PARTS = 4  # tiles on the diagonal are divided again to use their symmetry; 0.5 % is computed twice at N = 4096


class Pairs(NamedTuple):
    """
    The tensors of n pairs from which their similarities are computed.

    Args:
        embeds (sequence of M `torch.Tensor` of shape `(n, D)`): one for each modality.
        labels (sequence of `torch.Tensor` of shape `(n,)`): pairs that are equal in one of them are not negatives.
        semantic (`torch.Tensor` of shape `(n, S)`, *optional*): unit rows.
        dims (sequence of `int`, *optional*): dimensions that embeddings are cut to, from the smallest to D. None: only
            D.
    """

    embeds: Sequence[torch.Tensor]
    labels: Sequence[torch.Tensor] = ()
    semantic: torch.Tensor | None = None
    dims: Sequence[int] | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All tensors in one list, to be sent to another process."""
        return [*self.embeds, *self.labels, *([] if self.semantic is None else [self.semantic])]

    @property
    def layout(self) -> tuple[int, int, Sequence[int] | None]:
        """(M, number of labels, dims), which `from_tensors` needs in addition to `tensors()`."""
        return len(self.embeds), len(self.labels), self.dims

    @classmethod
    def from_tensors(cls, tensors: Iterable[torch.Tensor], layout: tuple[int, int, Sequence[int] | None]) -> "Pairs":
        """Make pairs from the `tensors()` and the `layout` of another object."""
        (m, num_labels, dims), tensors = layout, tuple(tensors)
        semantic = tensors[m + num_labels :]
        return cls(tensors[:m], tensors[m : m + num_labels], semantic[0] if semantic else None, dims)

    def select(self, rows: slice) -> "Pairs":
        """The pairs in a slice."""
        return Pairs.from_tensors((x[rows] for x in self.tensors()), self.layout)


class Panel:
    """
    A rectangle of the similarity matrix: R pairs as anchors against C pairs as candidates.

    Args:
        anchors, candidates (`Pairs`).
        blocks (sequence of `(a, m)` with `a <= m`): pairs of modalities. (a, m) means anchors in a against candidates
            in m, and anchors in m against candidates in a.
        symmetric (`bool`): the candidates are the anchors themselves. No pair is its own negative, in any modality.
    """

    def __init__(
        self, anchors: Pairs, candidates: Pairs, blocks: Sequence[tuple[int, int]], symmetric: bool = False
    ) -> None:
        self.anchors, self.candidates = anchors, candidates
        self.rows, self.row_labels, self.row_semantic, dims = anchors
        self.cols, self.col_labels, self.col_semantic, _ = candidates
        self.dims = dims or (self.rows[0].shape[1],)
        self.blocks, self.symmetric = blocks, symmetric

    def transposed(self) -> "Panel":
        """The panel with anchors and candidates exchanged."""
        return Panel(self.candidates, self.anchors, self.blocks, self.symmetric)

    def cast(self, dtype: torch.dtype) -> "Panel":
        """The panel with embeddings of another dtype."""
        anchors, candidates = (
            side._replace(embeds=tuple(x.to(dtype) for x in side.embeds)) for side in (self.anchors, self.candidates)
        )
        return Panel(anchors, candidates, self.blocks, self.symmetric)


class TileCache:
    """Tiles kept from the sums for the gradient: the first ones, as many as fit into `num_bytes`."""

    def __init__(self, num_bytes: int, dtype: torch.dtype) -> None:
        self.bytes_left, self.dtype = num_bytes, dtype
        self.tiles: list[torch.Tensor] = []

    def offer(self, tile: torch.Tensor) -> None:
        """Keep a copy of the tile if it fits."""
        self.bytes_left -= tile.numel() * self.dtype.itemsize
        if self.bytes_left >= 0:
            self.tiles.append(tile.to(self.dtype, copy=True))


def replay(tiles: Iterable[torch.Tensor]) -> Iterator[torch.Tensor | None]:
    """Yield the cached tiles, and then None for each tile that was not kept."""
    return chain(tiles, repeat(None))


def add_sums(
    panel: Panel,
    scale: float,
    shift: float,
    row_sums: torch.Tensor,
    col_sums: torch.Tensor | None,
    cache: TileCache,
) -> None:
    """
    Add exp(S − shift), summed over the negatives, to the sums of each anchor and each candidate.

    Args:
        panel (`Panel`): all float32 or all float64.
        scale, shift (`float`): S = scale·cosine.
        row_sums (`torch.Tensor` of shape `(K, M, M, R)`): [k, a, m, r] is the sum of anchor r in a over candidates in
            m, with embeddings cut to the k-th of the panel's dims.
        col_sums (`torch.Tensor` of shape `(K, M, M, C)`, or None): [k, m, a, c] is the sum of candidate c in m over
            anchors in a. If the panel is symmetric, `row_sums` itself; None if not wanted.
        cache (`TileCache`): every tile is offered to it.
    """
    tiles = _Tiles(panel)
    for a, rows, m, cols in tiles:
        own_transpose = tiles.is_own_transpose(a, rows, m, cols)
        for k, tile in enumerate(tiles.logits(scale, a, rows, m, cols)):
            if shift:
                tile.sub_(shift)
            tile.exp_()
            row_sums[k, a, m, rows] += tile.sum(1)
            if col_sums is not None and not own_transpose:
                col_sums[k, m, a, cols] += tile.sum(0)
            if cache.bytes_left > 0:
                if tiles.is_semantic(a, m):
                    tile.mul_(tiles.repulsion(rows, cols))
                cache.offer(tile)


def add_logsumexps(panel: Panel, scale: float, row_logs: torch.Tensor, col_logs: torch.Tensor | None) -> None:
    """Like `add_sums`, for rows of any norm: log-sum-exps are added in log space, which takes twice as many exps."""
    tiles = _Tiles(panel)
    for a, rows, m, cols in tiles:
        own_transpose = tiles.is_own_transpose(a, rows, m, cols)
        for k, tile in enumerate(tiles.logits(scale, a, rows, m, cols)):
            _add_log(row_logs[k, a, m, rows], tile.logsumexp(1))
            if col_logs is not None and not own_transpose:
                _add_log(col_logs[k, m, a, cols], tile.logsumexp(0))


def add_weighted(
    panel: Panel,
    scale: float,
    shift: float,
    row_ratios: torch.Tensor,
    col_ratios: torch.Tensor,
    row_grads: Sequence[torch.Tensor | None],
    col_grads: Sequence[torch.Tensor | None] | None,
    cached: Iterator[torch.Tensor | None],
    bf16: bool,
) -> None:
    """
    Add W·E, with W = exp(S − shift) ∘ (row ratio ⊕ column ratio), to the gradients of both sides.

    Args:
        panel, scale, shift: as for `add_sums`.
        row_ratios (`torch.Tensor` of shape `(K, M, M, R)`), col_ratios (`(K, M, M, C)`): the incoming gradient, divided
            by the sum.
        row_grads, col_grads (sequences of M `torch.Tensor` of shapes `(R, D)` and `(C, D)`, or None): None where no
            gradient is wanted, and the same object if the panel is symmetric. If K > 1, the shapes are `(R, D + K)` and
            `(C, D + K)`: the norms of the cut embeddings count as constants, and the last K columns get Σ W ∘ cosines
            of each cut.
        cached (iterator): the result of `replay`, at this panel's first tile.
        bf16 (`bool`): compute the products in bfloat16.
    """

    def weigh(tile, fresh, weights, k, a, rows, m, cols):
        if fresh:
            if shift:
                tile.sub_(shift)
            tile.exp_()
        torch.add(row_ratios[k, a, m, rows, None], col_ratios[k, m, a, None, cols], out=weights).mul_(tile)

    _add_products(panel, scale, weigh, row_grads, col_grads, cached, bf16)


def add_weighted_by_logs(
    panel: Panel,
    scale: float,
    row_logs: torch.Tensor,
    col_logs: torch.Tensor,
    row_incoming: torch.Tensor,
    col_incoming: torch.Tensor,
    row_grads: Sequence[torch.Tensor | None],
    col_grads: Sequence[torch.Tensor | None] | None,
    bf16: bool,
) -> None:
    """Like `add_weighted`, from log-sum-exps (see `add_logsumexps`) and incoming gradients, with twice as many exps."""

    def weigh(tile, fresh, weights, k, a, rows, m, cols):
        torch.sub(tile, row_logs[k, a, m, rows, None], out=weights).exp_().mul_(row_incoming[k, a, m, rows, None])
        weights.add_(tile.sub_(col_logs[k, m, a, cols]).exp_().mul_(col_incoming[k, m, a, cols]))

    _add_products(panel, scale, weigh, row_grads, col_grads, repeat(None), bf16)


def _add_products(panel, scale, weigh, row_grads, col_grads, cached, bf16):
    """Visit the panel's tiles, let `weigh` compute the weights W of each, and add their products to the gradients."""
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
            if fresh and tiles.is_semantic(a, m):
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
            total = own if total is None else total.add_(own)  # over all cuts that contain these entries
            factor = total.bfloat16() if bf16 else total
            if by_row:
                _add_product(row_grads[a][rows, part], factor, col_factors[m][cols, part])
            if by_col:
                _add_product(col_grads[m][cols, part], factor.T, row_factors[a][rows, part])


class _Tiles:
    """Visits the tiles of a panel and computes their logits."""

    def __init__(self, panel):
        self.panel = panel
        like = panel.rows[0]
        self.tile = TILE.get(like.device.type, TILE_ACCELERATOR)
        self.new_empty = like.new_empty
        self.buffers, self.masked_tile, self.repulsion_tile = {}, None, None
        if len(panel.dims) > 1:
            self.row_inverses = [inverse_norms(x, panel.dims) for x in panel.rows]
            self.col_inverses = [inverse_norms(x, panel.dims) for x in panel.cols]

    def __iter__(self):
        """Yield (a, rows, m, cols) for each tile. A symmetric panel yields no tile together with its transpose.

        All blocks of the same rows and columns follow each other, so that they share masks and embeddings in the cache.
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
        """Whether the tile is its own transpose, so that its columns must not be counted after its rows."""
        return self.panel.symmetric and (a, rows) == (m, cols)

    def is_semantic(self, a, m):
        return a == m and self.panel.row_semantic is not None

    def buffer(self, name, rows, cols):
        """Uninitialised memory of shape (rows, cols), which all tiles share."""
        shape = rows.stop - rows.start, cols.stop - cols.start
        numel = shape[0] * shape[1]
        if name not in self.buffers or self.buffers[name].numel() < numel:
            self.buffers[name] = self.new_empty(numel)
        return self.buffers[name][:numel].view(shape)

    def logits(self, scale, a, rows, m, cols):
        """For each of the panel's dims, yield the tile of s·E_a E_mᵀ, with -inf where the candidate is not a negative.
        The next one overwrites it."""
        anchors, candidates = self.panel.rows[a][rows], self.panel.cols[m][cols]
        tile = self.buffer("tile", rows, cols)
        if len(self.panel.dims) == 1:
            tile.addmm_(anchors, candidates.T, beta=0, alpha=scale)
            yield self.masked(tile, a, rows, m, cols)
            return
        products = self.products(rows, cols)
        for k, part in enumerate(parts(self.panel.dims)):
            products.addmm_(anchors[:, part], candidates[:, part].T, beta=min(k, 1))
            torch.mul(products, self.col_inverses[m][k, cols], out=tile)
            tile.mul_(scale * self.row_inverses[a][k, rows, None])
            yield self.masked(tile, a, rows, m, cols)

    def products(self, rows, cols):
        """Tile of E_a E_mᵀ up to the cut that `logits` has reached."""
        return self.buffer("products", rows, cols)

    def masked(self, tile, a, rows, m, cols):
        """Multiply a tile by the repulsion, and write -inf where the candidate is not a negative, in place."""
        if self.is_semantic(a, m):
            tile.mul_(self.repulsion(rows, cols))
        if self.panel.symmetric and rows == cols:
            tile.fill_diagonal_(-torch.inf)
        if self.panel.row_labels and (hidden := self.hidden(rows, cols)) is not None:
            tile.masked_fill_(hidden, -torch.inf)
        return tile

    def hidden(self, rows, cols):
        """Boolean tile that is True where pairs have an equal label; None if it is known that there are none."""
        if self.masked_tile is None or self.masked_tile[0] != (rows, cols):
            hidden = None
            for anchors, candidates in zip(self.panel.row_labels, self.panel.col_labels):
                alike = anchors[rows, None] == candidates[None, cols]
                hidden = alike if hidden is None else hidden.logical_or_(alike)
            if (
                hidden.device.type == "cpu" and not hidden.any()
            ):  # on an accelerator, the check costs more than the masking
                hidden = None
            self.masked_tile = (rows, cols), hidden
        return self.masked_tile[1]

    def repulsion(self, rows, cols):
        """Tile of 1 − C, where C has the semantic cosines."""
        if self.repulsion_tile is None or self.repulsion_tile[0] != (rows, cols):
            tile = self.buffer("repulsion", rows, cols).fill_(1)
            tile.addmm_(self.panel.row_semantic[rows], self.panel.col_semantic[cols].T, alpha=-1)
            self.repulsion_tile = (rows, cols), tile
        return self.repulsion_tile[1]


def _add_log(out, more):
    torch.logaddexp(out, more, out=out)


def _add_product(out, left, right):
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        out.add_(left @ right)


def _even_slices(start, stop, size):
    """Divide start..stop into slices of at most `size`, as equal as possible."""
    parts = -(-(stop - start) // size)
    bounds = [start + (stop - start) * part // parts for part in range(parts + 1)]
    return [slice(*bound) for bound in zip(bounds, bounds[1:])]
