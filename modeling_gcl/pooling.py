"""Pooling of token states into one feature."""

import torch


def mean_of_tokens(hidden_states, attention_mask=None):
    """(N, L, D) token states and their (N, L) mask, 1 for real tokens → (N, D) means over the real ones."""
    if attention_mask is None:
        attention_mask = torch.ones(hidden_states.shape[:2], device=hidden_states.device)
    mask = attention_mask.unsqueeze(-1).to(hidden_states.dtype)  # (N, L, 1)
    return (hidden_states * mask).sum(1) / mask.sum(1)
