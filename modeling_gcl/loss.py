"""Losses over N pairs in three modalities: GCL (arXiv 2509.25638), plain CL, and AlignCLIP's intra-modality separation.

Notable features:
- GCL's denominator is the paper's: it leaves out the anchor itself, and keeps the anchor's second positive. The loss is
  at least log 2.
- Denominator, intra-modality negatives, weights of the directions, and false negatives can be set independently.
- Logits and log-sum-exps are float32 for half-precision embeddings and under autocast, and float64 for float64.
- Memory is O(N·D), forward and backward: `logsumexp` computes the logits tile by tile and never stores them all.
- Matryoshka: each loss can be averaged over embeddings cut to fewer dimensions.
- Several processes can share a batch. Each gets the loss of the whole batch and the exact gradient of its own rows.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from .logsumexp import OneProcess, block_logsumexp, working_dtypes
from .matryoshka import SMALLEST_NORM, cuts_and_shares
from .modalities import CROSS_DIRECTIONS, FEATURES, MODALITIES, parse_direction

DENOMINATORS = ("all", "without_other_positive", "target")
NORM_TOLERANCE = 0.01  # rounding unit rows to bfloat16 changes their norm by 0.4 % at most

# the scalar loss, or with return_terms a tuple of it and the terms by name
LossResult = torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]


class NonFiniteError(FloatingPointError, ValueError):
    """The embeddings or `logit_scale` contain NaN or infinity."""


def gcl_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    fused_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    ids: torch.Tensor | None = None,
    caption_ids: torch.Tensor | None = None,
    denominator: str = "all",
    intra_modality: bool = True,
    direction_weights: Mapping[str, float] | None = None,
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    return_terms: bool = False,
    bf16: bool = False,
    cache_bytes: int = 0,
    processes: OneProcess | None = None,
) -> LossResult:
    r"""
    Generalized contrastive loss. It is the mean of six terms, one for each direction a→b between image, text and fused
    embeddings. Each term contrasts a pair's two embeddings with all embeddings of the batch, in every modality:

        L = -1/(6N) Σ_j Σ_{a≠b} log exp(s e_a^j·e_b^j) / Σ_{(m,k)≠(a,j)} exp(s e_a^j·e_m^k),   s = logit_scale = 1/τ

    With the defaults, this equals SupCon's L_out (Khosla et al., 2020) over the 3N embeddings, labelled by pair.

    Args:
        image_embeds, text_embeds, fused_embeds (`torch.Tensor` of shape `(N, D)`): unit-norm embeddings. Row j of each
            belongs to pair j. The dtype may be float16, bfloat16, float32 or float64.
        logit_scale (`torch.Tensor` scalar or `float`): 1/τ, positive (not its logarithm).
        ids (`torch.LongTensor` of shape `(N,)`, *optional*): pairs with equal ids are not each other's negatives.
        caption_ids (`torch.LongTensor` of shape `(N,)`, *optional*): pairs with equal caption ids are not, either.
        denominator (`str`): which embeddings are in the denominator. `"all"` (the paper): all but the anchor.
            `"without_other_positive"`: all but the anchor and its pair's embedding in the third modality (k=j,
            m∉{a,b}). `"target"`: only those of the target's modality (UNITE's masked variant).
        intra_modality (`bool`): whether the anchor's own modality is in the denominator (in the paper, it is). No
            effect with `denominator="target"`.
        direction_weights (`dict[str, float]`, *optional*): weights of the six directions, `"i→t"` (or `"i->t"`) and so
            on. A direction that is not named has weight 1. The loss is the weighted mean of the terms.
        matryoshka_dims (sequence of `int`, *optional*): average the loss over these dimensions and D: the embeddings
            are cut to their first d entries and normalised again (Kusupati et al., arXiv 2205.13147).
        matryoshka_weights (sequence of `float`, *optional*): positive weights of `matryoshka_dims`, 1 by default. If D
            is not one of these dimensions, its weight is 1.
        return_terms (`bool`): also return the six terms, unweighted and detached.
        bf16 (`bool`): compute the matrix products of the gradient in bfloat16, which is faster on processors with
            bfloat16 arithmetic. The gradient changes by about 0.5 %, the loss does not.
        cache_bytes (`int`): memory for exponentiated logits that are kept for the backward pass, which otherwise
            computes them again. All of them take 18 N² bytes, or 9 N² with `bf16`. No effect with `matryoshka_dims`.
        processes (*optional*): shares the batch between processes. Pass `training.distributed.BatchProcesses()`, or
            another object with the methods of `logsumexp.OneProcess`. Each process passes its own n of the N pairs (n
            may differ) and gets the loss of the whole batch. The gradients are such that *averaging* parameter
            gradients over the processes, as DistributedDataParallel and FSDP do, gives the gradient of the loss.

    Returns:
        `torch.Tensor` scalar (float32, or float64 for float64 input). With `return_terms`, a `tuple` of it and a
        `dict[str, torch.Tensor]` from direction to scalar. With `matryoshka_dims`, these terms are means over the
        dimensions, and the dict also has the loss of each dimension: `"dim_64"` and so on.

    Raises:
        ValueError: the embeddings differ in shape or device, are empty, or don't have unit norm (within 1 %);
            `logit_scale` is not one positive number; `denominator` or a direction is unknown; there is not one id per
            pair; weights are not finite, negative or all zero; dimensions are outside 1..D or repeated; or a row is
            zero once cut. If several processes share the batch, all raise an error that names the process at fault,
            also if their arguments differ.
        TypeError: embeddings or ids are not tensors.
        NonFiniteError: embeddings or `logit_scale` contain NaN or infinity. It is a `ValueError` and a
            `FloatingPointError`.

    Example:
        >>> e_i, e_t = (torch.nn.functional.normalize(torch.randn(8, 16), dim=-1) for _ in range(2))
        >>> e_it = torch.nn.functional.normalize(e_i + e_t, dim=-1)
        >>> loss = gcl_loss(e_i, e_t, e_it, logit_scale=50.0)
    """
    if denominator not in DENOMINATORS:
        raise ValueError(f"denominator={denominator!r} is unknown: choose one of {', '.join(DENOMINATORS)}")
    weights = _checked_weights(direction_weights)
    batch = _Batch(
        (image_embeds, text_embeds, fused_embeds), logit_scale, ids, caption_ids, processes=processes,
        matryoshka=(matryoshka_dims, matryoshka_weights),
        settings={"denominator": denominator, "intra_modality": intra_modality, "direction_weights": weights},
    )  # fmt: skip
    batch.contrast(own=intra_modality and denominator != "target", bf16=bf16, cache_bytes=cache_bytes)
    terms = {d: batch.direction_term(d, denominator, intra_modality) for d in CROSS_DIRECTIONS}
    losses = sum(weights[d] * term for d, term in terms.items() if weights[d]) / sum(weights.values())
    return batch.mean_over_cuts(losses, terms, return_terms)


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    ids: torch.Tensor | None = None,
    caption_ids: torch.Tensor | None = None,
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    return_terms: bool = False,
    bf16: bool = False,
    cache_bytes: int = 0,
    processes: OneProcess | None = None,
) -> LossResult:
    r"""
    Plain contrastive loss (CL), CLIP's symmetric loss: the mean of the cross-entropies of i→t and t→i, each over the
    target modality. It is at least 0.

    The arguments, the result and the errors are as for [`gcl_loss`].
    """
    batch = _Batch(
        (image_embeds, text_embeds), logit_scale, ids, caption_ids, processes=processes,
        matryoshka=(matryoshka_dims, matryoshka_weights),
    )  # fmt: skip
    batch.contrast(own=False, bf16=bf16, cache_bytes=cache_bytes)
    terms = {d: batch.direction_term(d, "target", False) for d in ("i→t", "t→i")}
    return batch.mean_over_cuts(sum(terms.values()) / 2, terms, return_terms)


def alignclip_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    semantic_embeds: torch.Tensor | None = None,
    separation_weight: float = 0.5,
    ids: torch.Tensor | None = None,
    caption_ids: torch.Tensor | None = None,
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    return_terms: bool = False,
    bf16: bool = False,
    cache_bytes: int = 0,
    processes: OneProcess | None = None,
) -> LossResult:
    r"""
    CL plus AlignCLIP's intra-modality separation (arXiv 2406.17639, eq. 5-8, and the authors' code).

    Embeddings of one modality repel each other, unless their captions mean the same. For X in {image, text},
    separation_X is the cross-entropy of the logits s·(X Xᵀ ∘ (1 − C) + diag(e_i^j·e_t^j)) with the diagonal as target,
    where C has the semantic cosines of the captions. The result is CL + separation_weight · mean(separation_i,
    separation_t), which is half of the authors' sum with α=1, β=0.5.

    Args:
        semantic_embeds (`torch.Tensor` of shape `(N, S)`, *optional*): caption embeddings from a semantic encoder, of
            any norm but 0. The authors use a frozen sentence encoder. Default: `text_embeds`, detached. They are never
            cut: C is the same for all of `matryoshka_dims`.
        separation_weight (`float`): weight of the separation.

    The other arguments, the result and the errors are as for [`gcl_loss`].
    """
    if not (math.isfinite(separation_weight) and separation_weight >= 0):
        raise ValueError(f"separation_weight must be finite and not negative, got {separation_weight}")
    batch = _Batch(
        (image_embeds, text_embeds), logit_scale, ids, caption_ids, processes=processes,
        semantic=text_embeds if semantic_embeds is None else semantic_embeds,
        matryoshka=(matryoshka_dims, matryoshka_weights),
        settings={"separation_weight": separation_weight},
    )  # fmt: skip
    batch.contrast(own=True, bf16=bf16, cache_bytes=cache_bytes)
    terms = {d: batch.direction_term(d, "target", False) for d in ("i→t", "t→i")}
    separation = {f"separation_{name}": batch.separation_term(name) for name in ("i", "t")}
    losses = (terms["i→t"] + terms["t→i"] + separation_weight * sum(separation.values())) / 2
    return batch.mean_over_cuts(losses, terms | separation, return_terms)


class _Batch:
    """The checked embeddings of a batch, in full precision, and loss terms computed from their log-sum-exps. Each term
    has the shape (K,): one value for each dimension to which the embeddings are cut."""

    def __init__(
        self, embeds, logit_scale, ids, caption_ids, processes=None, semantic=None, settings=None,
        matryoshka=(None, None),
    ):  # fmt: skip
        self.modalities = MODALITIES[: len(embeds)]
        self.labels = {name: x for name, x in (("ids", ids), ("caption_ids", caption_ids)) if x is not None}
        self.processes, self.semantic, error = processes or OneProcess(), semantic, None
        try:
            self._set({f"{FEATURES[m]}_embeds": x for m, x in zip(MODALITIES, embeds)}, logit_scale, *matryoshka)
        except (ValueError, TypeError) as found:  # the other processes must hear of it, or they would wait forever
            error = found
        common = None if error else self._common_settings(settings or {}, embeds)
        self.sizes = self.processes.agree(len(self.embeds[0]) if common else 0, common, error)

    def _common_settings(self, settings, embeds):
        """What must be equal on all processes, or they would wait for each other or compute different losses."""
        return settings | {
            "modalities": self.modalities,
            "embedding size": self.embeds[0].shape[1],
            "matryoshka_dims": self.cuts,
            "dtypes": [x.dtype for x in embeds],
            "labels": {name: x.dtype for name, x in self.labels.items()},
            "semantic_embeds": None if self.semantic is None else (self.semantic.shape[1], self.semantic.dtype),
            "logit_scale": self.scale.item(),
            "gradients": torch.is_grad_enabled() and [x.requires_grad for x in (*embeds, self.scale)],
            "half_ring": self.processes.half_ring,
        }

    def _set(self, embeds, logit_scale, dims, weights):
        """Check this process's arguments and convert them to full precision."""
        _check_shapes(embeds, self.labels)
        self.cuts = cuts_and_shares(dims, weights, embeds["image_embeds"].shape[1])
        dtype, full = working_dtypes(list(embeds.values()))
        self.embeds = [x.to(dtype) for x in embeds.values()]
        self.scale = torch.as_tensor(logit_scale, dtype=full, device=self.embeds[0].device)
        if self.scale.numel() != 1:
            raise ValueError(f"logit_scale must be one number, got shape {tuple(self.scale.shape)}")
        self.scale = self.scale.reshape(())
        _check_values(dict(zip(embeds, self.embeds)), self.scale)
        _check_cuts(dict(zip(embeds, self.embeds)), list(self.cuts)[:-1])
        if self.semantic is not None:
            self.semantic = _unit_semantic(self.semantic, self.embeds[0])

    def contrast(self, own, bf16=False, cache_bytes=0):
        """Compute the log-sum-exps between modalities and, if `own`, those within each modality."""
        indices = range(len(self.embeds))
        self.negatives, self.cosines = block_logsumexp(
            self.embeds,
            self.scale,
            [(a, m) for a in indices for m in indices[a:] if own or a != m],
            list(self.cuts),
            labels=list(self.labels.values()),
            semantic=self.semantic,
            bf16=bf16,
            cache_bytes=cache_bytes,
            processes=self.processes,
            sizes=self.sizes,
        )

    def positive(self, a, b):
        """(K, N) logits of each pair's embeddings in two modalities."""
        a, b = sorted((self.modalities.index(a), self.modalities.index(b)))
        return self.scale * self.cosines[:, a, b]

    def negative(self, a, m):
        """(K, N) log-sum-exps of each anchor's negatives (k≠j) in modality m."""
        return self.negatives[:, self.modalities.index(a), self.modalities.index(m)]

    def direction_term(self, direction, denominator, intra_modality):
        """Mean of -log p over the pairs. The log-sum-exps leave out the anchor's own pair; its embeddings are added
        here, as `denominator` says."""
        anchor, target = direction.split("→")
        candidates = [target] if denominator == "target" else self.modalities
        others = [m for m in self.modalities if m != anchor] if denominator == "all" else [target]
        parts = [self.negative(anchor, m) for m in candidates if m != anchor or intra_modality]
        parts += [self.positive(anchor, m) for m in others]
        return (torch.stack(parts).logsumexp(0) - self.positive(anchor, target)).mean(-1)

    def separation_term(self, name):
        """Mean over the pairs of AlignCLIP's cross-entropy within a modality. Needs `contrast` with `semantic`."""
        positive = self.positive("i", "t")
        return (torch.logaddexp(self.negative(name, name), positive) - positive).mean(-1)

    def mean_over_cuts(self, losses, terms, return_terms):
        """Average over the dimensions: the scalar loss and, if asked for, the terms that `gcl_loss` returns."""
        shares = losses.new_tensor(list(self.cuts.values()))
        loss = (shares * losses).sum()  # not a dot product, which autocast would round
        if not return_terms:
            return loss
        terms = {name: (shares * term.detach()).sum() for name, term in terms.items()}
        if len(self.cuts) > 1:
            terms |= {f"dim_{d}": value for d, value in reversed(list(zip(self.cuts, losses.detach())))}
        return loss, terms


def _unit_semantic(semantic, like):
    """Normalise (N, S) semantic embeddings, without gradient."""
    if semantic.ndim != 2 or len(semantic) != len(like) or semantic.device != like.device:
        raise ValueError(
            f"semantic_embeds must be ({len(like)}, S) on {like.device}, one row per pair, got "
            f"{tuple(semantic.shape)} on {semantic.device}"
        )
    semantic = semantic.detach().to(torch.promote_types(like.dtype, torch.float32))
    norms = torch.linalg.vector_norm(semantic, dim=-1, keepdim=True)
    bad = ~((norms > 0) & norms.isfinite())
    if bad.any():
        row = bad.flatten().nonzero()[0].item()
        raise ValueError(f"semantic_embeds row {row} is zero, NaN or infinite: leave out pairs without a caption")
    return semantic / norms


def _checked_weights(weights):
    """The weights of all six directions; 1 for those that are not named."""
    weights = {parse_direction(name): weight for name, weight in (weights or {}).items()}
    unknown = set(weights) - set(CROSS_DIRECTIONS)
    if unknown:
        raise ValueError(f"direction_weights names {sorted(unknown)}; the directions are {list(CROSS_DIRECTIONS)}")
    weights = {direction: float(weights.get(direction, 1.0)) for direction in CROSS_DIRECTIONS}
    if not all(math.isfinite(w) and w >= 0 for w in weights.values()) or sum(weights.values()) == 0:
        raise ValueError(f"direction_weights must be finite, non-negative and not all zero, got {weights}")
    return weights


def _check_shapes(embeds, labels):
    for name, x in (embeds | labels).items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    shapes = {name: tuple(x.shape) for name, x in embeds.items()}
    shape = shapes["image_embeds"]
    if set(shapes.values()) != {shape} or len(shape) != 2:
        raise ValueError(f"embeddings must be (N, D) and of one shape for every modality, got {shapes}")
    if shape[0] == 0:
        raise ValueError("the batch is empty: a contrastive loss needs at least one pair")
    for name, x in labels.items():
        if tuple(x.shape) != shape[:1]:
            raise ValueError(f"{name} must hold one label per pair, shape {shape[:1]}, got {tuple(x.shape)}")
    devices = {name: x.device for name, x in (embeds | labels).items()}
    if len(set(devices.values())) != 1:
        raise ValueError(f"embeddings and ids must lie on one device, got {devices}")


def _check_values(embeds, scale):
    """Check all values by the norms of the rows, which show NaN and infinity too. This needs only one transfer from the
    device."""
    norms = {name: _norms(x) for name, x in embeds.items()}
    worst = torch.stack([*((x - 1).abs().amax() for x in norms.values()), scale.detach()])
    *deviations, scale = worst.tolist()
    if not math.isfinite(scale):
        raise NonFiniteError(f"logit_scale is {scale}")
    if scale <= 0:
        raise ValueError(f"logit_scale must be positive (it is 1/τ, not its logarithm), got {scale}")
    for (name, x), deviation in zip(norms.items(), deviations):
        if not math.isfinite(deviation):
            rows = (~x.isfinite()).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"{name} holds NaN or infinite values in {len(rows)} of {len(x)} rows, the first is row {rows[0]}: "
                "the encoder's weights have diverged, or its output overflowed"
            )
        if deviation > NORM_TOLERANCE:
            row = (x - 1).abs().argmax().item()
            raise ValueError(
                f"{name} must hold rows of unit norm, row {row} has norm {x[row].item():.4g}: "
                "apply torch.nn.functional.normalize(x, dim=-1) first"
            )


def _check_cuts(embeds, dims):
    """Raise ValueError if a row is too small to be normalised again once cut to one of `dims`."""
    if not dims:
        return
    norms = {(name, d): _norms(x[:, :d]) for name, x in embeds.items() for d in dims}
    smallest = torch.stack([x.amin() for x in norms.values()]).tolist()
    for ((name, d), x), norm in zip(norms.items(), smallest):
        if norm < SMALLEST_NORM:
            raise ValueError(
                f"{name} can't be cut to {d} dimensions: the norm of row {x.argmin().item()} is {norm:.4g} there, too "
                f"small to be normalised; leave {d} out of matryoshka_dims"
            )


def _norms(x):
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
