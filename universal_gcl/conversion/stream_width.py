"""Gives a transformer tower a wider residual stream that computes the same function.

Zeros can be added to heads and MLPs, whose outputs add up, but not to the residual stream: LayerNorm takes the mean and
the variance over all of it. A wider stream serves the same LayerNorm if the mapping into it keeps every distance from
the mean: a matrix A of shape (wide, width), A·1 = 0, AᵀA = I - 11ᵀ/width, with columns of mean zero. Then the variance
shrinks by the factor width / wide, which the layers that read the stream and LayerNorm's epsilon make up for.

- Text tower: A centres and adds zeros.
- Image tower: a LayerNorm stands before the stream (`ln_pre`), so its gains must be a diagonal in the wide stream too.
  Two unused dimensions suffice to find such an A: by Cauchy's interlacing theorem and its converse (Fan and Pall 1957)
  there is a subspace on which the wide LayerNorm's quadratic form has just the eigenvalues of the narrow one.

All in float64.
"""

from dataclasses import dataclass

import torch

TOLERANCE = 1e-7  # of the mapping, beside float32's 6e-8


@dataclass
class Stream:
    """A wide residual stream in place of a narrow one.

    Attributes:
        embedding: (wide, width), what precedes `ln_pre` to the wide stream; None without a `ln_pre`.
        pre_gain: (wide,), `ln_pre`'s gains in the wide stream; None without a `ln_pre`.
        stream: (wide, width), the matrix A above. Its last two rows are equal.
    """

    embedding: torch.Tensor | None
    pre_gain: torch.Tensor | None
    stream: torch.Tensor


def widen_stream(width: int, wide: int, pre_gain: torch.Tensor | None = None) -> Stream:
    """Finds the mapping of a stream of `width` into one of `wide`.

    Args:
        width: of the narrow stream.
        wide: at least `width` + 2.
        pre_gain: (width,), gains of the LayerNorm before the stream, if there is one.

    Raises:
        ValueError: gains for which rounding leaves no mapping that is exact to float32.
    """
    centring = torch.eye(width, dtype=torch.float64) - 1 / width
    if pre_gain is None:
        return Stream(None, None, torch.nn.functional.pad(centring, (0, 0, 0, wide - width)))

    gain = pre_gain.double()
    distinct, group, counts = torch.unique(gain, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(distinct), width, dtype=torch.float64)  # rows: unit vectors of channels of equal gain
    sums[group, torch.arange(width)] = counts.double().rsqrt()[group]
    lift = torch.zeros(wide, len(distinct) + 2, dtype=torch.float64)  # the groups' sums and two unused dimensions
    lift[:width, :-2], lift[-2:, -2:] = sums.T, torch.eye(2, dtype=torch.float64)

    # Within a group of equal gains, what sums to zero needs no change: only the groups' sums are mapped.
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
        raise ValueError(f"the gains of ln_pre allow no stable mapping to a wider stream (error {worst:.1e}).")
    return Stream(embedding, wide_gain, stream)


def isometry_between(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The matrix A (wide, width) of `Stream` nearest to A @ `before` = `after`, by orthogonal Procrustes."""
    basis = complement(torch.ones(len(before), dtype=torch.float64))
    wide_roots = torch.ones(len(after) - 1, dtype=torch.float64)
    wide_roots[-1] = 2**0.5  # the last two rows of A are equal: one coordinate, that counts twice
    wide_basis = complement(wide_roots)
    wide_basis = torch.cat([wide_basis[:-1], wide_basis[-1:] / 2**0.5, wide_basis[-1:] / 2**0.5])
    left, _, right = torch.linalg.svd(wide_basis.T @ after @ before.T @ basis, full_matrices=False)
    return wide_basis @ (left @ right) @ basis.T


def map_group_sums(gain: torch.Tensor, root_counts: torch.Tensor, width: int, wide: int) -> torch.Tensor:
    """(groups + 2, groups): the embedding of the groups' sums, two unused dimensions last.

    Args:
        gain: (groups,) distinct gains.
        root_counts: (groups,), square roots of the number of channels in each group.
    """
    wide_roots = torch.nn.functional.pad(root_counts, (0, 2), value=1.0)
    basis, wide_basis = complement(root_counts), complement(wide_roots)
    form = basis.T @ spread(gain, root_counts, width) @ basis
    wide_form = wide_basis.T @ spread(torch.nn.functional.pad(gain, (0, 2)), wide_roots, wide) @ wide_basis
    target, vectors = torch.linalg.eigh(form)

    values = torch.linalg.eigvalsh(
        wide_form
    )  # two more than target; each of target lies between a value and its next but one
    low = torch.maximum(values[:-1], torch.cat([values[:1], target]))
    high = torch.minimum(values[1:], torch.cat([target, values[-1:]]))
    for eigenvalues in ((low + high) / 2, target):
        step = drop_dimension(wide_form, eigenvalues)
        wide_basis, wide_form = wide_basis @ step, step.T @ wide_form @ step
    return wide_basis @ torch.linalg.eigh(wide_form)[1] @ (basis @ vectors).T


def spread(gain: torch.Tensor, root_counts: torch.Tensor, width: int) -> torch.Tensor:
    """Matrix of the form: `width` times the variance of gain·n, n given by its groups' sums."""
    mean = gain * root_counts
    return torch.diag(gain**2) - torch.outer(mean, mean) / width


def complement(vector: torch.Tensor) -> torch.Tensor:
    """(d, d - 1): an orthonormal basis of what is orthogonal to a (d,) vector, by a Householder reflection."""
    axis = vector / vector.norm()
    axis[0] += 1.0 if axis[0] >= 0 else -1.0
    axis /= axis.norm()
    return (torch.eye(len(axis), dtype=axis.dtype) - 2 * torch.outer(axis, axis))[:, 1:]


def drop_dimension(form: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(d, d - 1): an orthonormal basis of a subspace on which `form` (d, d) has the `target` (d - 1,) eigenvalues.

    They must interlace with the form's own. The dropped direction has the squared components
    prod_j (value_i - target_j) / prod_{j != i} (value_i - value_j) along the form's eigenvectors.
    """
    values, vectors = torch.linalg.eigh(form)
    size = len(values)
    others = values.expand(size, size)[~torch.eye(size, dtype=torch.bool)].view(size, size - 1)
    numerator, denominator = values[:, None] - target, values[:, None] - others
    # A pair that rounding cannot tell apart has the ratio 1 or 0: either is as good, 0 / 0 is not.
    ratio = torch.where(denominator == 0, torch.ones_like(numerator), numerator / denominator).clamp_min(0)
    return vectors @ complement(ratio.prod(1).sqrt())
