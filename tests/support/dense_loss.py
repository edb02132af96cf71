"""The losses of `modeling_gcl.loss` with every logit held at once, by plain autograd: the oracle of the tiles.

Same arguments and results. Compared in float64; `test_loss.py` holds the losses against slower loops.
"""

from functools import wraps

import torch
import torch.nn.functional as F

DIRECTIONS = ("i->t", "t->i", "i->it", "it->i", "t->it", "it->t")
DENOMINATORS = ("all", "without_other_positive", "target")


def _matryoshka(loss_of):
    """The same loss with `matryoshka_dims` and `matryoshka_weights`: once for each dimension, by its own call."""

    @wraps(loss_of)
    def loss_of_cuts(*arguments, matryoshka_dims=None, matryoshka_weights=None, return_terms=False, **options):
        *embeds, scale = arguments
        if matryoshka_dims is None:
            return loss_of(*embeds, scale, return_terms=return_terms, **options)
        weights = dict(zip(matryoshka_dims, matryoshka_weights or [1.0] * len(matryoshka_dims)))
        weights.setdefault(embeds[0].shape[1], 1.0)
        if loss_of.__name__ == "alignclip_loss" and options.get("semantic_embeds") is None:
            options["semantic_embeds"] = embeds[1]
        total, total_terms, each = 0.0, {}, {}
        for d, weight in weights.items():
            cut = embeds if d == embeds[0].shape[1] else [F.normalize(x[:, :d], dim=-1) for x in embeds]
            loss, terms = loss_of(*cut, scale, return_terms=True, **options)
            share = weight / sum(weights.values())
            total = total + share * loss
            total_terms = {name: total_terms.get(name, 0.0) + share * term for name, term in terms.items()}
            each[f"dim_{d}"] = loss.detach()
        return (total, total_terms | (each if len(each) > 1 else {})) if return_terms else total

    return loss_of_cuts


@_matryoshka
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
    """As `modeling_gcl.gcl_loss`, in O(N²) memory."""
    embeds = {"i": image_embeds, "t": text_embeds, "it": fused_embeds}
    terms = _direction_terms(embeds, DIRECTIONS, logit_scale, ids, caption_ids, denominator, intra_modality)
    return _weighted_mean(terms, direction_weights, return_terms)


@_matryoshka
def contrastive_loss(image_embeds, text_embeds, logit_scale, *, ids=None, caption_ids=None, return_terms=False):
    """As `modeling_gcl.contrastive_loss`, in O(N²) memory."""
    embeds = {"i": image_embeds, "t": text_embeds}
    terms = _direction_terms(embeds, ("i->t", "t->i"), logit_scale, ids, caption_ids, "target", False)
    return _weighted_mean(terms, None, return_terms)


@_matryoshka
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
    """As `modeling_gcl.alignclip_loss`, in O(N²) memory."""
    _, terms = contrastive_loss(
        image_embeds, text_embeds, logit_scale, ids=ids, caption_ids=caption_ids, return_terms=True
    )
    loss = contrastive_loss(image_embeds, text_embeds, logit_scale, ids=ids, caption_ids=caption_ids)
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


def random_embeds(n, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, d, generator=generator, dtype=dtype), dim=-1) for _ in range(3)]
