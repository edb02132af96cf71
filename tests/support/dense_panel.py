"""Sums and weighted gradients of a panel with every logit held at once in float64: the oracle of the Triton kernels."""

import torch


def dense_sums(panel, scale, shift):
    """(M, M, R): Σ_c exp(scale S − shift); zero in blocks not asked for."""
    num = len(panel.rows)
    sums = torch.zeros(num, num, len(panel.rows[0]), dtype=torch.float64, device=panel.rows[0].device)
    for a, m in _ordered(panel):
        sums[a, m] = _exponentials(panel, scale, shift, a, m).sum(1)
    return sums


def dense_weighted(panel, scale, shift, row_ratios, col_ratios):
    """List of M (R, D): Σ_m W_am E_m."""
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in panel.rows]
    for a, m in _ordered(panel):
        weights = _exponentials(panel, scale, shift, a, m)
        weights *= row_ratios[a, m].double()[:, None] + col_ratios[m, a].double()[None, :]
        grads[a] += (weights * _repulsion(panel, a, m)) @ panel.cols[m].double()
    return grads


def _ordered(panel):
    return {pair for a, m in panel.blocks for pair in ((a, m), (m, a))}


def _repulsion(panel, a, m):
    if a != m or panel.row_semantic is None:
        return 1.0
    return 1 - panel.row_semantic.double() @ panel.col_semantic.double().T


def _exponentials(panel, scale, shift, a, m):
    similarities = panel.rows[a].double() @ panel.cols[m].double().T * _repulsion(panel, a, m)
    hidden = torch.zeros_like(similarities, dtype=torch.bool)
    for row_labels, col_labels in zip(panel.row_labels, panel.col_labels, strict=True):
        hidden |= row_labels[:, None] == col_labels[None, :]
    if panel.symmetric:
        hidden.fill_diagonal_(True)
    return (scale * similarities - shift).exp().masked_fill(hidden, 0)
