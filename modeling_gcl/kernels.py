"""Triton kernels of the tiled loss for NVIDIA GPUs: the sums of exponentials and their weighted gradient.

Notable features:
- neither logits nor weights reach the GPU's memory: a program keeps its tile and, as FlashAttention does, the (rows, D)
  gradient it accumulates in registers;
- similarities are accurate as float32: half-precision products are exact, float32 ones are three TF32 products;
- one launch for each ordered block (a, m), in which every result has one owner, so there are no atomics: the same
  input on the same kind of GPU gives the same bits each run;
- offsets are 64 bit: a million rows of any length.

Only a panel's rows get sums and gradients. The PyTorch tiles use a tile for its rows and for its columns, which costs
12 + 24 = 36 N²D for GCL over N pairs and 9 blocks. Here several programs would have to add to one column's result, by
atomics, whose order, and so whose rounding, changes from run to run. Rows alone cost 18 + 36 = 54 N²D: each of the nine
ordered blocks 2 for its sums and 2 + 2 for its gradient, which computes the similarities again.

Not timed: the configurations are reasoned, and compiled to see that registers and shared memory suffice (for D of 64 to
1024 on sm_80 and sm_90 a thread spills 136 bytes at most, 320 with semantic cosines), but not tuned on a GPU.
"""

import math
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no requirement: the PyTorch tiles do the same
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 256  # columns are split until about so many run; fixed, as another number gives other bits
MAX_PARTS = 4  # of D: the gradient kernel spells out its accumulators
LOG2_E = math.log2(math.e)  # the kernels take powers of two


def supports(x):
    """Whether the kernels take tensor `x`: Triton is installed and `x` is float32, bfloat16 or float16 on an NVIDIA GPU
    of compute capability 8.0 (Ampere) or later. Not on AMD's, where nothing of this was ever compiled."""
    return (
        triton is not None
        and x.is_cuda
        and torch.version.hip is None
        and x.dtype in DTYPES
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def add_sums(panel, scale, shift, sums):
    r"""
    For each of the panel's blocks, in both orders: sums[a, m, r] += Σ_c exp(scale e_a^r·e_m^c − shift) over the
    candidates c that are not hidden from r. With semantic cosines C and a = m, e_a^r·e_m^c is multiplied by
    1 − C[r, c]. Overflow gives inf and underflow 0: the caller chooses the shift, and checks.

    Args:
        panel (`Panel`): R ≥ 1 anchors and C ≥ 1 candidates of M modalities, all contiguous and of one of `DTYPES`.
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


def add_weighted(panel, scale, shift, row_ratios, col_ratios, grads, bf16=False):
    r"""
    For each anchor modality a: grads[a] += Σ_m W_am E_m over the panel's blocks, in both orders, where

        W_am[r, c] = exp(scale e_a^r·e_m^c − shift) (row_ratios[a, m, r] + col_ratios[m, a, c]),   0 where c is hidden

    With semantic cosines C and a = m, both e_a^r·e_m^c and W are multiplied by 1 − C[r, c]. The gradient's factor
    `scale` is left to the caller.

    Args:
        panel (`Panel`): as for `add_sums`.
        scale, shift (`float`).
        row_ratios (`torch.Tensor` of shape `(M, M, R)`), col_ratios (`torch.Tensor` of shape `(M, M, C)`): float32.
        grads (sequence of M `torch.Tensor` of shape `(R, D)`, or None where not wanted): float32, contiguous, changed
            in place.
        bf16 (`bool`): W_am and E_m in bfloat16 for their product, which is accumulated in float32. Always so for
            embeddings of half precision.
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
    """Size of a tile, entries of D that an instruction's operands hold at once, and how it is compiled."""

    rows: int
    cols: int
    width: int
    warps: int = 8
    stages: int = 3


def _sums_config(dtype, semantic):
    """As for a matrix product: of 128×128 similarities each of 256 threads holds 64, and three steps of D are on their
    way through shared memory. Half a tile where it is not alone: float32 operands are split in two to be multiplied,
    and semantic cosines are a second tile."""
    return _Config(128, 64 if semantic or dtype == torch.float32 else 128, _step(dtype))


def _gradient_config(dim, factor_dtype, hopper):
    """The accumulators take D/8 registers of each thread for 32 rows, D/4 for 64, of 255, beside the tile and operands:
    wide parts of D and float32 operands, split in two, take most. More rows would read the candidates less often, and
    Hopper's own matrix instructions take 64. No configuration depends on more than a consumer card's shared memory.
    """
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
    """Entries of D per step of a similarity: 128 bytes, a cache line."""
    return 128 // dtype.itemsize


def _cdiv(a, b):
    return -(-a // b)


def _grid(panel, config):
    """Tiles of rows × parts of the columns, and the columns of a part. Each part has its own copy of the result, to be
    summed, so the copies together hold `PROGRAMS` tiles of rows at most; one part, where rows are many, needs none."""
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
        """Rows `index` of a (length, DIM) matrix, WIDTH of their entries from `start` on; 0 outside."""
        k = start + tl.arange(0, WIDTH)
        mask = (index < length)[:, None] & (k < DIM)[None, :]
        return tl.load(ptr + index.to(tl.int64)[:, None] * DIM + k[None, :], mask=mask, other=0.0)

    @triton.jit
    def _dot(left, right, out, PRECISION: tl.constexpr):
        if PRECISION == "ieee":  # the interpreter, which multiplies the bits of bfloat16 as if they were integers
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
    def _shown(
        r, c, row_labels, col_labels, num_rows, num_cols, LABELS: tl.constexpr, SYMMETRIC: tl.constexpr
    ):  # fmt: skip
        """(r, c) tile: whether c is a negative of r."""
        shown = (r < num_rows)[:, None] & (c < num_cols)[None, :]
        if SYMMETRIC:
            shown = shown & (r[:, None] != c[None, :])
        for index in tl.static_range(LABELS):
            left = tl.load(row_labels + index * num_rows + r, mask=r < num_rows, other=0)
            right = tl.load(col_labels + index * num_cols + c, mask=c < num_cols, other=0)
            shown = shown & (left[:, None] != right[None, :])
        return shown

    @triton.jit
    def _sums_kernel(
        rows, cols, sums, row_labels, col_labels, row_semantic, col_semantic, num_rows, num_cols,
        cols_per_program, scale, shift,
        LABELS: tl.constexpr, SEMANTIC_DIM: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
        DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Writes sums (parts of the columns, num_rows). Here and below scale and shift are those of exp2."""
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
            shown = _shown(r, c, row_labels, col_labels, num_rows, num_cols, LABELS, SYMMETRIC)
            total += tl.sum(tl.where(shown, tl.exp2(tile * scale - shift), 0.0), 1)
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
        """Adds to out (parts of the columns, num_rows, DIM): each program to PARTS · WIDTH entries of its rows."""
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
            shown = _shown(r, c, row_labels, col_labels, num_rows, num_cols, LABELS, SYMMETRIC)
            weights = tl.where(shown, tl.exp2(tile * scale - shift) * ratio, 0.0)
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
