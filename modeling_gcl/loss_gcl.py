"""Losses over three modalities of N pairs: GCL (arXiv 2509.25638), plain CL, and AlignCLIP's intra-modality separation.

Notable features:
- the self term is masked and the other positive stays in the denominator, as the paper states (floor log 2);
- one switch each for the denominator, the intra-modality negatives, the weight of each direction, false negatives;
- logits and log-sum-exp in float32 for half-precision embeddings and under autocast, in float64 for float64 ones.
"""

import torch
import torch.nn.functional as F

DIRECTIONS = ("i->t", "t->i", "i->it", "it->i", "t->it", "it->t")
DENOMINATORS = ("all", "without_other_positive", "target")


def gcl_loss(
    image_embeds,
    text_embeds,
    fused_embeds,
    logit_scale,
    *,
    ids=None,
    caption_ids=None,
    denominator="all",
    intra_modality=True,
    direction_weights=None,
    return_terms=False,
):
    r"""
    Generalized contrastive loss: six directions a→b between image, text and fused embeddings, each contrasted against
    every embedding of the batch in every modality:

        L = -1/(6N) Σ_j Σ_{a≠b} log exp(s e_a^j·e_b^j) / Σ_{(m,k)≠(a,j)} exp(s e_a^j·e_m^k),   s = logit_scale = 1/τ

    With the defaults this equals SupCon's L_out (Khosla et al., 2020) over the 3N embeddings with the pair as label.

    Args:
        image_embeds, text_embeds, fused_embeds (`torch.Tensor` of shape `(N, D)`): unit-norm embeddings, row j of each
            from pair j; float16, bfloat16, float32 or float64, all alike.
        logit_scale (`torch.Tensor` scalar or `float`): 1/τ, positive (not its logarithm).
        ids (`torch.LongTensor` of shape `(N,)`, *optional*): pairs with equal ids are not each other's negatives.
        caption_ids (`torch.LongTensor` of shape `(N,)`, *optional*): likewise for equal captions.
        denominator (`str`): `"all"` (the paper): every other embedding. `"without_other_positive"`: leaves out the
            anchor's third view (k=j, m∉{a,b}). `"target"`: only the target's modality (UNITE's masked variant).
        intra_modality (`bool`): whether embeddings of the anchor's own modality are negatives (the paper: yes).
            Without effect for `denominator="target"`.
        direction_weights (`dict[str, float]`, *optional*): weight of each of the six directions `"i->t"`, ...; those
            not named weigh 1. The loss is the weighted mean of the terms.
        return_terms (`bool`): also return the six unweighted terms, detached.

    Returns:
        `torch.Tensor` scalar (float32, or float64 for float64 input); with `return_terms` a tuple of it and a
        `dict[str, torch.Tensor]` from direction to scalar.

    Raises:
        ValueError: embeddings of unequal shapes or an empty batch, unknown `denominator` or direction, ids that are
            not one per pair, or weights that are negative or all zero.

    Example:
        >>> e_i, e_t = (torch.nn.functional.normalize(torch.randn(8, 16), dim=-1) for _ in range(2))
        >>> e_it = torch.nn.functional.normalize(e_i + e_t, dim=-1)
        >>> loss = gcl_loss(e_i, e_t, e_it, logit_scale=50.0)
    """
    embeds = {"i": image_embeds, "t": text_embeds, "it": fused_embeds}
    terms = _direction_terms(embeds, DIRECTIONS, logit_scale, ids, caption_ids, denominator, intra_modality)
    return _weighted_mean(terms, direction_weights, return_terms)


def contrastive_loss(image_embeds, text_embeds, logit_scale, *, ids=None, caption_ids=None, return_terms=False):
    r"""
    Plain CL, CLIP's symmetric loss: the mean over i→t and t→i of the cross-entropy against the target modality.

    Arguments, result and errors as for [`gcl_loss`]; the floor is 0.
    """
    embeds = {"i": image_embeds, "t": text_embeds}
    terms = _direction_terms(embeds, ("i->t", "t->i"), logit_scale, ids, caption_ids, "target", False)
    return _weighted_mean(terms, None, return_terms)


def alignclip_loss(
    image_embeds,
    text_embeds,
    logit_scale,
    *,
    semantic_embeds=None,
    separation_weight=0.5,
    ids=None,
    caption_ids=None,
    return_terms=False,
):
    r"""
    CL plus AlignCLIP's intra-modality separation (arXiv 2406.17639, eq. 5-8, and the authors' code).

    For X in {image, text}: separation_X is the cross-entropy, with the diagonal as target, of the logits
    s·(X Xᵀ ∘ (1 − C) + diag(e_i^j·e_t^j)), where C holds the captions' semantic cosines: embeddings of one modality
    repel each other unless their captions mean the same. Result: CL + separation_weight · mean(separation_i,
    separation_t), which is half the authors' α=1, β=0.5 sum.

    Args:
        semantic_embeds (`torch.Tensor` of shape `(N, S)`, *optional*): caption embeddings of a semantic encoder; the
            authors use a frozen sentence encoder. Default: the batch's own text embeddings, detached.
        separation_weight (`float`): weight of the separation.
        Others, result and errors as for [`gcl_loss`].
    """
    labels = {"ids": ids, "caption_ids": caption_ids}
    loss, terms = contrastive_loss(image_embeds, text_embeds, logit_scale, return_terms=True, **labels)
    with torch.autocast(image_embeds.device.type, enabled=False):
        image, text = (_full_precision(x) for x in (image_embeds, text_embeds))
        semantic = text if semantic_embeds is None else _full_precision(semantic_embeds)
        semantic = F.normalize(semantic.detach(), dim=-1)
        repulsion = 1 - semantic @ semantic.T  # (N, N)
        paired = torch.diag((image * text).sum(-1))  # (N, N)
        target = torch.arange(len(image), device=image.device)
        hidden = _false_negatives(len(image), image.device, ids, caption_ids)
        separation = {}
        for name, x in (("i", image), ("t", text)):
            logits = logit_scale * (x @ x.T * repulsion.to(x.dtype) + paired)
            if hidden is not None:
                logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min / 4)
            separation[f"separation_{name}"] = F.cross_entropy(logits, target)
        loss = loss + separation_weight * (separation["separation_i"] + separation["separation_t"]) / 2
    if return_terms:
        return loss, terms | {name: term.detach() for name, term in separation.items()}
    return loss


def _direction_terms(embeds, directions, logit_scale, ids, caption_ids, denominator, intra_modality):
    """Mean over the pairs of -log p for each direction, from nine blocks' log-sum-exps over negatives.

    Each (anchor modality, candidate modality) block contributes the log-sum-exp of its negatives (k≠j); the diagonal,
    which holds self, the positive and the other positive, is added per direction as the switches say.
    """
    _check(embeds, ids, caption_ids, denominator)
    num_pairs, device = len(next(iter(embeds.values()))), next(iter(embeds.values())).device
    with torch.autocast(device.type, enabled=False):
        embeds = {name: _full_precision(x) for name, x in embeds.items()}
        hidden = torch.eye(num_pairs, dtype=torch.bool, device=device)
        false_negatives = _false_negatives(num_pairs, device, ids, caption_ids)
        if false_negatives is not None:
            hidden = hidden | false_negatives

        def negatives(a, m):  # (N,): log-sum-exp over k≠j; finite even where every entry is hidden (N = 1)
            logits = logit_scale * (embeds[a] @ embeds[m].T)
            return logits.masked_fill(hidden, torch.finfo(logits.dtype).min / 4).logsumexp(-1)

        def diagonal(a, b):  # (N,)
            return logit_scale * (embeds[a] * embeds[b]).sum(-1)

        terms = {}
        for anchor in embeds:
            targets = [d.split("->")[1] for d in directions if d.split("->")[0] == anchor]
            in_denominator = [m for m in embeds if m in targets or (m == anchor and intra_modality)]
            blocks = {m: negatives(anchor, m) for m in (targets if denominator == "target" else in_denominator)}
            positives = {b: diagonal(anchor, b) for b in targets}
            for b in targets:
                if denominator == "all":
                    parts = [*blocks.values(), *positives.values()]
                elif denominator == "without_other_positive":
                    parts = [*blocks.values(), positives[b]]
                else:
                    parts = [blocks[b], positives[b]]
                terms[f"{anchor}->{b}"] = (torch.stack(parts).logsumexp(0) - positives[b]).mean()
        return terms


def _weighted_mean(terms, weights, return_terms):
    weights = weights or {}
    unknown = set(weights) - set(terms)
    if unknown:
        raise ValueError(f"direction_weights names {sorted(unknown)}; the directions are {list(terms)}")
    weights = {direction: float(weights.get(direction, 1.0)) for direction in terms}
    if min(weights.values()) < 0 or sum(weights.values()) == 0:
        raise ValueError(f"direction_weights must be non-negative and not all zero, got {weights}")
    loss = sum(weights[d] * term for d, term in terms.items() if weights[d]) / sum(weights.values())
    if return_terms:
        return loss, {direction: term.detach() for direction, term in terms.items()}
    return loss


def _full_precision(x):
    return x if x.dtype == torch.float64 else x.float()


def _false_negatives(num_pairs, device, ids, caption_ids):
    """(N, N) bool, True where k≠j but pair k must not be a negative of pair j; None if there are no ids at all."""
    same = None
    for labels in (ids, caption_ids):
        if labels is not None:
            equal = labels[:, None] == labels[None, :]
            same = equal if same is None else same | equal
    return None if same is None else same & ~torch.eye(num_pairs, dtype=torch.bool, device=device)


def _check(embeds, ids, caption_ids, denominator):
    shapes = {name: tuple(x.shape) for name, x in embeds.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(f"embeddings must be (N, D) and of one shape for every modality, got {shapes}")
    num_pairs = len(next(iter(embeds.values())))
    if num_pairs == 0:
        raise ValueError("the batch is empty: a contrastive loss needs at least one pair")
    if denominator not in DENOMINATORS:
        raise ValueError(f"denominator={denominator!r} is unknown: choose one of {', '.join(DENOMINATORS)}")
    for name, labels in (("ids", ids), ("caption_ids", caption_ids)):
        if labels is not None and tuple(labels.shape) != (num_pairs,):
            raise ValueError(f"{name} must hold one label per pair, shape ({num_pairs},), got {tuple(labels.shape)}")
