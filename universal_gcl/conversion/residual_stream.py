"""Finds a wider residual stream in which a transformer tower computes the same function.

Attention heads and MLP channels can be padded with zeros, because their outputs are summed. The residual stream can't:
LayerNorm takes the mean and the variance over all its channels. But LayerNorm gives the same result in a wider stream
if the mapping into it preserves every deviation from the mean. This is a matrix A of shape (wide, width) with A·1 = 0,
AᵀA = I - 11ᵀ/width and columns of mean zero. The variance then shrinks by the factor width / wide. The layers that read
the stream compensate for this factor, and so does LayerNorm's epsilon.

- Text tower: A subtracts the mean and appends zeros.
- Image tower: a LayerNorm (`ln_pre`) comes before the stream, and its gains must be a diagonal matrix in the wide
  stream too. Two unused dimensions are enough to find such an A. By Cauchy's interlacing theorem and its converse (Fan
  and Pall 1957) there is a subspace on which the wide LayerNorm's quadratic form has exactly the eigenvalues of the
  narrow one.

All computations are in float64.
"""

from dataclasses import dataclass

import torch

TOLERANCE = 1e-7  # largest error of the mapping; float32 rounds by 6e-8


@dataclass
class Stream:
    """The mapping of a narrow residual stream into a wide one.

    Attributes:
        stream: (wide, width), the matrix A above. Its last two rows are equal.
        embedding: (wide, width), the same for what comes before `ln_pre`; equal to `stream` if there is no `ln_pre`.
        pre_gain: (wide,), `ln_pre`'s gains in the wide stream; None if there is no `ln_pre`.
    """

    stream: torch.Tensor
    embedding: torch.Tensor
    pre_gain: torch.Tensor | None = None


def widen_stream(width: int, wide: int, pre_gain: torch.Tensor | None = None) -> Stream:
    """Find the mapping of a stream of `width` channels into one of `wide` channels.

    Args:
        width: channels of the narrow stream.
        wide: channels of the wide stream, at least `width` + 2.
        pre_gain: (width,), gains of the LayerNorm before the stream, if there is one.

    Raises:
        ValueError: because of rounding, the mapping for these gains would not be exact in float32.
    """
    centring = torch.eye(width, dtype=torch.float64) - 1 / width
    if pre_gain is None:
        mapping = torch.nn.functional.pad(centring, (0, 0, 0, wide - width))
        return Stream(mapping, mapping)

    gain = pre_gain.double()
    distinct, group, counts = torch.unique(gain, return_inverse=True, return_counts=True)
    # a row per distinct gain: the unit vector along the sum of its channels
    sums = torch.zeros(len(distinct), width, dtype=torch.float64)
    sums[group, torch.arange(width)] = counts.double().rsqrt()[group]
    lift = torch.zeros(wide, len(distinct) + 2, dtype=torch.float64)  # from the group sums and two unused dimensions
    lift[:width, :-2], lift[-2:, -2:] = sums.T, torch.eye(2, dtype=torch.float64)

    # Within a group of channels with equal gains, only the sum needs mapping; deviations from the group's mean stay.
    embedding = lift @ map_group_sums(distinct, counts.double().sqrt(), width, wide) @ sums
    embedding[:width] += torch.eye(width, dtype=torch.float64) - sums.T @ sums
    embedding = embedding @ centring

    wide_gain = torch.nn.functional.pad(gain, (0, wide - width))
    before = centring @ (gain[:, None] * centring)
    after = wide_gain[:, None] * embedding
    after = after - after.mean(0)
    stream = isometry_between(before, after)
    worst = max(
        (embedding.T @ embedding - centring).abs().max().item(),
        embedding.sum(0).abs().max().item(),
        ((stream @ before - after).abs().max() / gain.abs().max().clamp_min(1e-30)).item(),
    )
    if not worst < TOLERANCE:
        raise ValueError(f"the gains of ln_pre allow no exact mapping to a wider residual stream (error {worst:.1e}).")
    return Stream(stream, embedding, wide_gain)


def isometry_between(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The matrix A (wide, width) of `Stream` for which A @ `before` is nearest to `after`, by orthogonal Procrustes."""
    basis = complement(torch.ones(len(before), dtype=torch.float64))
    wide_roots = torch.ones(len(after) - 1, dtype=torch.float64)
    wide_roots[-1] = 2**0.5  # the last two rows of A are equal: one coordinate that counts twice
    wide_basis = complement(wide_roots)
    wide_basis = torch.cat([wide_basis[:-1], wide_basis[-1:] / 2**0.5, wide_basis[-1:] / 2**0.5])
    left, _, right = torch.linalg.svd(wide_basis.T @ after @ before.T @ basis, full_matrices=False)
    return wide_basis @ (left @ right) @ basis.T


def map_group_sums(gain: torch.Tensor, root_counts: torch.Tensor, width: int, wide: int) -> torch.Tensor:
    """The mapping of the group sums, (groups + 2, groups). The last two rows are the unused dimensions.

    Args:
        gain: (groups,), the distinct gains.
        root_counts: (groups,), the square root of the number of channels in each group.
        width, wide: channels of the two streams.
    """
    wide_roots = torch.nn.functional.pad(root_counts, (0, 2), value=1.0)
    basis, wide_basis = complement(root_counts), complement(wide_roots)
    form = basis.T @ spread(gain, root_counts, width) @ basis
    wide_form = wide_basis.T @ spread(torch.nn.functional.pad(gain, (0, 2)), wide_roots, wide) @ wide_basis
    target, vectors = torch.linalg.eigh(form)

    # There are two more values than targets. Each target lies between a value and the next but one.
    values = torch.linalg.eigvalsh(wide_form)
    low = torch.maximum(values[:-1], torch.cat([values[:1], target]))
    high = torch.minimum(values[1:], torch.cat([target, values[-1:]]))
    for eigenvalues in ((low + high) / 2, target):
        step = drop_dimension(wide_form, eigenvalues)
        wide_basis, wide_form = wide_basis @ step, step.T @ wide_form @ step
    return wide_basis @ torch.linalg.eigh(wide_form)[1] @ (basis @ vectors).T


def spread(gain: torch.Tensor, root_counts: torch.Tensor, width: int) -> torch.Tensor:
    """The matrix of the quadratic form that gives `width` times the variance of gain·n, for n given by group sums."""
    mean = gain * root_counts
    return torch.diag(gain**2) - torch.outer(mean, mean) / width


def complement(vector: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (d, d - 1) of the space orthogonal to a (d,) vector, by a Householder reflection."""
    axis = vector / vector.norm()
    axis[0] += 1.0 if axis[0] >= 0 else -1.0
    axis /= axis.norm()
    return (torch.eye(len(axis), dtype=axis.dtype) - 2 * torch.outer(axis, axis))[:, 1:]


def drop_dimension(form: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (d, d - 1) of a subspace on which `form` (d, d) has the eigenvalues `target` (d - 1,).

    The targets must interlace with the form's own eigenvalues. Along the form's eigenvectors, the direction that is
    dropped has the squared components prod_j (value_i - target_j) / prod_{j != i} (value_i - value_j).
    """
    values, vectors = torch.linalg.eigh(form)
    size = len(values)
    others = values.expand(size, size)[~torch.eye(size, dtype=torch.bool)].view(size, size - 1)
    numerator, denominator = values[:, None] - target, values[:, None] - others
    # If rounding makes two values equal, the ratio may be 1 or 0: both are right, but 0 / 0 is not.
    ratio = torch.where(denominator == 0, torch.ones_like(numerator), numerator / denominator).clamp_min(0)
    return vectors @ complement(ratio.prod(1).sqrt())
