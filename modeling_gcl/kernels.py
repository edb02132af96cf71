"""Triton kernels of the tiled loss for NVIDIA GPUs: the sums of exponentials, and their weighted gradient.

Notable features:
- Neither logits nor weights are written to the GPU's memory. A program keeps its tile in registers, and also the
  (rows, D) gradient that it accumulates, as FlashAttention does.
- Similarities are as accurate as float32: half-precision products are exact, and a float32 product is three TF32 ones.
- Each ordered block (a, m) is one launch, and each result is written by one program. There are no atomics, so the same
  input on the same kind of GPU gives the same bits in every run.
- Offsets are 64-bit, enough for a million rows of any length.

Only a panel's rows get sums and gradients. The PyTorch tiles use each tile for its rows and its columns, which costs
12 + 24 = 36 N²D for GCL over N pairs in 9 blocks. Here, several programs would then have to add to the result of one
column, with atomics, whose order and rounding change from run to run. Using only the rows costs 18 + 36 = 54 N²D: each
of the nine ordered blocks takes 2 N²D for its sums, and 2 + 2 for its gradient, which computes the similarities again.

The configurations were not tuned on a GPU. They were derived, and compiled to check that registers and shared memory
suffice: for D from 64 to 1024 on sm_80 and sm_90, a thread spills at most 136 bytes, or 320 with semantic cosines.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .tiles import Panel

try:
    import triton
    import triton.language as tl
except ImportError:  # optional: the PyTorch tiles compute the same
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 256  # columns are divided until about this many programs run; another number would change the rounding
MAX_PARTS = 4  # parts that D is divided into: the gradient kernel has one variable for each
LOG2_E = math.log2(math.e)  # the kernels compute powers of two


def supports(x: torch.Tensor) -> bool:
    """Whether the kernels support tensor `x`: Triton is installed, and `x` is float32, bfloat16 or float16 on an NVIDIA
    GPU of compute capability 8.0 (Ampere) or later. AMD GPUs are not supported: the kernels were never compiled for
    them."""
    return (
        triton is not None
        and x.is_cuda
        and torch.version.hip is None
        and x.dtype in DTYPES
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def add_sums(panel: Panel, scale: float, shift: float, sums: torch.Tensor) -> None:
    r"""
    For each of the panel's blocks, in both orders: sums[a, m, r] += Σ_c exp(scale e_a^r·e_m^c − shift), over the
    candidates c that are negatives of r. With semantic cosines C and a = m, e_a^r·e_m^c is multiplied by 1 − C[r, c].
    Overflow gives inf and underflow gives 0; the caller chooses the shift and checks the result.

    Args:
        panel (`Panel`): R ≥ 1 anchors and C ≥ 1 candidates in M modalities, all contiguous and with one of `DTYPES`.
        scale, shift (`float`).
        sums (`torch.Tensor` of shape `(M, M, R)`): float32, changed in place.
    """
    x = panel.rows[0]
    config = _sums_config(x.dtype, panel.row_semantic is not None)
    grid, cols_per_program = _grid(panel, config)
    for a, m in _ordered(panel):
        partial = sums.new_empty(grid[1], len(x))
        _launch(_sums_kernel, grid, config, panel, a, m, scale, shift, cols_per_program, sums=partial)
        sums[a, m] += partial.sum(0)


def add_weighted(
    panel: Panel,
    scale: float,
    shift: float,
    row_ratios: torch.Tensor,
    col_ratios: torch.Tensor,
    grads: Sequence[torch.Tensor | None],
    bf16: bool = False,
) -> None:
    r"""
    For each anchor modality a: grads[a] += Σ_m W_am E_m over the panel's blocks, in both orders, where

        W_am[r, c] = exp(scale e_a^r·e_m^c − shift) (row_ratios[a, m, r] + col_ratios[m, a, c])

    or 0 if c is not a negative of r. With semantic cosines C and a = m, both e_a^r·e_m^c and W are multiplied by
    1 − C[r, c]. The caller must multiply the gradient by `scale`.

    Args:
        panel (`Panel`): as for `add_sums`.
        scale, shift (`float`).
        row_ratios (`torch.Tensor` of shape `(M, M, R)`), col_ratios (`torch.Tensor` of shape `(M, M, C)`): float32.
        grads (sequence of M `torch.Tensor` of shape `(R, D)`, or None where not wanted): float32, contiguous, changed
            in place.
        bf16 (`bool`): convert W_am and E_m to bfloat16 for their product, which is accumulated in float32. For
            embeddings of half precision this is always done.
    """
    x = panel.rows[0]
    factor_dtype = torch.float32 if x.dtype == torch.float32 and not bf16 else torch.bfloat16
    config = _gradient_config(x.shape[1], factor_dtype, _is_hopper(x))
    grid, cols_per_program = _grid(panel, config)
    parts = min(MAX_PARTS, _cdiv(x.shape[1], config.width))
    for a, m in _ordered(panel):
        if grads[a] is None:
            continue
        out = grads[a] if grid[1] == 1 else grads[a].new_zeros(grid[1], *grads[a].shape)
        _launch(
            _gradient_kernel, (*grid, _cdiv(x.shape[1], parts * config.width)), config,
            panel, a, m, scale, shift, cols_per_program,
            factors=panel.cols[m].to(factor_dtype), out=out, PARTS=parts, STEP=_step(x.dtype),
            row_ratios=row_ratios[a, m].contiguous(), col_ratios=col_ratios[m, a].contiguous(),
        )  # fmt: skip
        if out is not grads[a]:
            grads[a].add_(out.sum(0))


class _Config(NamedTuple):
    """Rows and columns of a tile, width of the part of D that is multiplied at a time, and compiler options."""

    rows: int
    cols: int
    width: int
    warps: int = 8
    stages: int = 3


def _sums_config(dtype, semantic):
    """The tile is that of a matrix product: each of 256 threads holds 64 of 128×128 similarities, and three steps of D
    are in shared memory. The tile is half as large if more has to be held: float32 operands, which are split in two to
    be multiplied, or semantic cosines, which are a second tile."""
    return _Config(128, 64 if semantic or dtype == torch.float32 else 128, _step(dtype))


def _gradient_config(dim, factor_dtype, hopper):
    """A thread has 255 registers. The accumulators take D/8 of them for 32 rows, or D/4 for 64 rows. The tile and the
    operands need registers too, above all wide parts of D and float32 operands, which are split in two. With more rows,
    the candidates are read less often, and Hopper's matrix instructions need 64 rows. All configurations fit into the
    shared memory of a consumer card."""
    widths = [width for width in (64, 128, 256) if _cdiv(dim, width) <= MAX_PARTS] or [256]
    width = min(widths, key=lambda width: _cdiv(dim, width) * width)
    if factor_dtype == torch.float32:
        rows, cols = (32, 32) if dim <= 512 else (32, 16)
    elif hopper and dim <= 512:
        rows, cols = (64, 64)
    else:
        rows, cols = (64, 32) if dim <= 256 else (32, 64) if dim <= 768 else (32, 32)
    return _Config(rows, cols, width)


def _is_hopper(x):
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def _step(dtype):
    """Entries of D that are multiplied at a time: 128 bytes, a cache line."""
    return 128 // dtype.itemsize


def _cdiv(a, b):
    return -(-a // b)


def _grid(panel, config):
    """The grid, (row tiles, parts of the columns), and the number of columns in a part. Each part has its own copy of
    the result, and the copies are summed; together they have at most `PROGRAMS` row tiles. With many rows, there is
    only one part, and no copy."""
    row_tiles, col_tiles = _cdiv(len(panel.rows[0]), config.rows), _cdiv(len(panel.cols[0]), config.cols)
    tiles_per_part = _cdiv(col_tiles, max(1, PROGRAMS // row_tiles))
    return (row_tiles, _cdiv(col_tiles, tiles_per_part)), tiles_per_part * config.cols


def _ordered(panel):
    for a, m in panel.blocks:
        yield a, m
        if a != m:
            yield m, a


def _launch(kernel, grid, config, panel, a, m, scale, shift, cols_per_program, **own):
    rows, cols = panel.rows[a], panel.cols[m]
    for name, x in {"rows": rows, "cols": cols, **own}.items():
        if isinstance(x, torch.Tensor) and not x.is_contiguous():
            raise ValueError(f"the kernels need contiguous tensors, and {name} is not: pass {name}.contiguous()")
    semantic = panel.row_semantic is not None and a == m
    with torch.cuda.device_of(rows):
        kernel[grid](
            rows=rows, cols=cols, num_rows=len(rows), num_cols=len(cols), cols_per_program=cols_per_program,
            scale=scale * LOG2_E, shift=shift * LOG2_E, SYMMETRIC=panel.symmetric, LABELS=len(panel.row_labels),
            row_labels=_stacked(panel.row_labels), col_labels=_stacked(panel.col_labels),
            row_semantic=panel.row_semantic if semantic else None,
            col_semantic=panel.col_semantic if semantic else None,
            SEMANTIC_DIM=panel.row_semantic.shape[1] if semantic else 0, DIM=rows.shape[1],
            PRECISION="tf32x3" if rows.is_cuda else "ieee", BLOCK_R=config.rows, BLOCK_C=config.cols,
            WIDTH=config.width, num_warps=config.warps, num_stages=config.stages, **own,
        )  # fmt: skip


def _stacked(labels):
    return torch.stack([x.long() for x in labels]) if labels else None


if triton is not None:

    @triton.jit
    def _load(ptr, index, length, start, DIM: tl.constexpr, WIDTH: tl.constexpr):
        """WIDTH entries, from `start` on, of the rows `index` of a (length, DIM) matrix; 0 outside."""
        k = start + tl.arange(0, WIDTH)
        mask = (index < length)[:, None] & (k < DIM)[None, :]
        return tl.load(ptr + index.to(tl.int64)[:, None] * DIM + k[None, :], mask=mask, other=0.0)

    @triton.jit
    def _dot(left, right, out, PRECISION: tl.constexpr):
        if PRECISION == "ieee":  # the interpreter multiplies the bits of bfloat16 as if they were integers
            left, right = left.to(tl.float32), right.to(tl.float32)
        return tl.dot(left, right, out, input_precision=PRECISION)

    @triton.jit
    def _products(
        rows, cols, r, c, num_rows, num_cols,
        DIM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """(r, c) tile of rows · colsᵀ."""
        out = tl.zeros((r.shape[0], c.shape[0]), tl.float32)
        for k in range(0, DIM, WIDTH):
            left = _load(rows, r, num_rows, k, DIM, WIDTH)
            right = _load(cols, c, num_cols, k, DIM, WIDTH)
            out = _dot(left, tl.trans(right), out, PRECISION)
        return out

    @triton.jit
    def _is_negative(
        r, c, row_labels, col_labels, num_rows, num_cols, LABELS: tl.constexpr, SYMMETRIC: tl.constexpr
    ):  # fmt: skip
        """(r, c) tile: whether c is a negative of r."""
        is_negative = (r < num_rows)[:, None] & (c < num_cols)[None, :]
        if SYMMETRIC:
            is_negative = is_negative & (r[:, None] != c[None, :])
        for index in tl.static_range(LABELS):
            left = tl.load(row_labels + index * num_rows + r, mask=r < num_rows, other=0)
            right = tl.load(col_labels + index * num_cols + c, mask=c < num_cols, other=0)
            is_negative = is_negative & (left[:, None] != right[None, :])
        return is_negative

    @triton.jit
    def _sums_kernel(
        rows, cols, sums, row_labels, col_labels, row_semantic, col_semantic, num_rows, num_cols,
        cols_per_program, scale, shift,
        LABELS: tl.constexpr, SEMANTIC_DIM: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
        DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Write sums (parts of the columns, num_rows). Here and below, scale and shift are for exp2."""
        r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        start = tl.program_id(1) * cols_per_program
        total = tl.zeros((BLOCK_R,), tl.float32)
        for first in range(start, tl.minimum(start + cols_per_program, num_cols), BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            tile = _products(rows, cols, r, c, num_rows, num_cols, DIM, WIDTH, PRECISION)
            if SEMANTIC_DIM > 0:
                tile *= 1 - _products(
                    row_semantic, col_semantic, r, c, num_rows, num_cols, SEMANTIC_DIM, 32, PRECISION
                )  # fmt: skip
            is_negative = _is_negative(r, c, row_labels, col_labels, num_rows, num_cols, LABELS, SYMMETRIC)
            total += tl.sum(tl.where(is_negative, tl.exp2(tile * scale - shift), 0.0), 1)
        tl.store(sums + tl.program_id(1).to(tl.int64) * num_rows + r, total, mask=r < num_rows)

    @triton.jit
    def _add(out, tile, r, num_rows, start, DIM: tl.constexpr, WIDTH: tl.constexpr):
        k = start + tl.arange(0, WIDTH)
        mask = (r < num_rows)[:, None] & (k < DIM)[None, :]
        out += r.to(tl.int64)[:, None] * DIM + k[None, :]
        tl.store(out, tl.load(out, mask=mask, other=0.0) + tile, mask=mask)

    @triton.jit
    def _gradient_kernel(
        rows, cols, factors, out, row_ratios, col_ratios, row_labels, col_labels, row_semantic, col_semantic,
        num_rows, num_cols, cols_per_program, scale, shift,
        LABELS: tl.constexpr, SEMANTIC_DIM: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
        DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr,
        PARTS: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        """Add to out (parts of the columns, num_rows, DIM). Each program adds to PARTS · WIDTH entries of its rows."""
        r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        start = tl.program_id(1) * cols_per_program
        d = tl.program_id(2) * PARTS * WIDTH
        row_ratio = tl.load(row_ratios + r, mask=r < num_rows, other=0.0)
        out0 = tl.zeros((BLOCK_R, WIDTH), tl.float32)
        if PARTS > 1:
            out1 = tl.zeros((BLOCK_R, WIDTH), tl.float32)
        if PARTS > 2:
            out2 = tl.zeros((BLOCK_R, WIDTH), tl.float32)
        if PARTS > 3:
            out3 = tl.zeros((BLOCK_R, WIDTH), tl.float32)
        for first in range(start, tl.minimum(start + cols_per_program, num_cols), BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            tile = _products(rows, cols, r, c, num_rows, num_cols, DIM, STEP, PRECISION)
            ratio = row_ratio[:, None] + tl.load(col_ratios + c, mask=c < num_cols, other=0.0)[None, :]
            if SEMANTIC_DIM > 0:
                repulsion = 1 - _products(
                    row_semantic, col_semantic, r, c, num_rows, num_cols, SEMANTIC_DIM, 32, PRECISION
                )  # fmt: skip
                tile *= repulsion
                ratio *= repulsion
            is_negative = _is_negative(r, c, row_labels, col_labels, num_rows, num_cols, LABELS, SYMMETRIC)
            weights = tl.where(is_negative, tl.exp2(tile * scale - shift) * ratio, 0.0)
            weights = weights.to(factors.dtype.element_ty)
            out0 = _dot(weights, _load(factors, c, num_cols, d, DIM, WIDTH), out0, PRECISION)
            if PARTS > 1:
                out1 = _dot(weights, _load(factors, c, num_cols, d + WIDTH, DIM, WIDTH), out1, PRECISION)
            if PARTS > 2:
                out2 = _dot(weights, _load(factors, c, num_cols, d + 2 * WIDTH, DIM, WIDTH), out2, PRECISION)
            if PARTS > 3:
                out3 = _dot(weights, _load(factors, c, num_cols, d + 3 * WIDTH, DIM, WIDTH), out3, PRECISION)
        out += tl.program_id(1).to(tl.int64) * num_rows * DIM
        _add(out, out0, r, num_rows, d, DIM, WIDTH)
        if PARTS > 1:
            _add(out, out1, r, num_rows, d + WIDTH, DIM, WIDTH)
        if PARTS > 2:
            _add(out, out2, r, num_rows, d + 2 * WIDTH, DIM, WIDTH)
        if PARTS > 3:
            _add(out, out3, r, num_rows, d + 3 * WIDTH, DIM, WIDTH)
