"""The losses against slow hand-written loops in float64, SupCon, facts of the paper; bad arguments."""

import gc
import math
import weakref
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_gcl import alignclip_loss, contrastive_loss, gcl_loss
from tests.support.dense_loss import random_embeds

MODALITIES = ("i", "t", "it")


def slow_gcl(embeds, scale, labels=None, denominator="all", intra_modality=True, weights=None):
    """The paper's sum, term by term, in Python floats. labels[j] is the set of labels that make pairs alike."""
    e = dict(zip(MODALITIES, (x.tolist() for x in embeds)))
    n = len(e["i"])
    labels = labels or [{("own", j)} for j in range(n)]

    def exp(a, j, m, k):
        return math.exp(scale * sum(x * y for x, y in zip(e[a][j], e[m][k])))

    total, weight_sum = 0.0, 0.0
    for a, b in permutations(MODALITIES, 2):
        weight = (weights or {}).get(f"{a}→{b}", 1.0)
        weight_sum += weight
        for j in range(n):
            denominator_sum = 0.0
            for m in MODALITIES:
                for k in range(n):
                    if (m, k) == (a, j):  # self
                        continue
                    if k != j and labels[j] & labels[k]:  # false negative
                        continue
                    if k == j and m not in (a, b) and denominator != "all":
                        continue
                    if m != b and denominator == "target":
                        continue
                    if m == a and not intra_modality:
                        continue
                    denominator_sum += exp(a, j, m, k)
            total += -weight * math.log(exp(a, j, b, j) / denominator_sum) / n
    return total / weight_sum


def supcon(embeds, scale):
    """SupCon L_out (Khosla et al., 2020, eq. 2) over the 3N embeddings with the pair as label."""
    z = torch.cat(embeds)
    labels = torch.arange(len(embeds[0])).repeat(3)
    logits = scale * z @ z.T
    not_self = ~torch.eye(len(z), dtype=torch.bool)
    log_p = logits - logits.masked_fill(~not_self, -torch.inf).logsumexp(1, keepdim=True)
    positive = (labels[:, None] == labels[None]) & not_self
    return -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


@pytest.mark.parametrize("denominator", ["all", "without_other_positive", "target"])
@pytest.mark.parametrize("intra_modality", [True, False])
@pytest.mark.parametrize("n, d, scale", [(1, 3, 20.0), (2, 4, 1.0), (5, 8, 14.3), (7, 3, 100.0)])
def test_equals_the_slow_loop(denominator, intra_modality, n, d, scale):
    embeds = random_embeds(n, d, seed=n)
    fast = gcl_loss(*embeds, scale, denominator=denominator, intra_modality=intra_modality)
    assert fast.item() == pytest.approx(
        slow_gcl(embeds, scale, denominator=denominator, intra_modality=intra_modality), abs=1e-12, rel=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 8),
    scale=st.floats(0.5, 100),
    seed=st.integers(0, 10**6),
    ids=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    captions=st.lists(st.integers(0, 5), min_size=8, max_size=8),
    denominator=st.sampled_from(["all", "without_other_positive", "target"]),
    weights=st.lists(st.sampled_from([0.25, 1.0, 2.0]), min_size=6, max_size=6),
)
def test_equals_the_slow_loop_with_duplicates_and_weights(n, scale, seed, ids, captions, denominator, weights):
    embeds = random_embeds(n, 4, seed)
    weights = dict(zip((f"{a}→{b}" for a, b in permutations(MODALITIES, 2)), weights))
    labels = [{("id", i), ("caption", c)} for i, c in zip(ids[:n], captions[:n])]
    fast = gcl_loss(
        *embeds,
        scale,
        ids=torch.tensor(ids[:n]),
        caption_ids=torch.tensor(captions[:n]),
        denominator=denominator,
        direction_weights=weights,
    )
    assert fast.item() == pytest.approx(slow_gcl(embeds, scale, labels, denominator, True, weights), abs=1e-10)


@pytest.mark.parametrize("n, d, scale", [(2, 2, 5.0), (16, 8, 14.3), (33, 12, 100.0)])
def test_equals_supcon_in_value_and_gradient(n, d, scale):
    embeds = [x.requires_grad_() for x in random_embeds(n, d)]
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(gcl_loss(*embeds, s), [*embeds, s])
    theirs = torch.autograd.grad(supcon(embeds, s), [*embeds, s])
    torch.testing.assert_close(gcl_loss(*embeds, s), supcon(embeds, s), atol=1e-12, rtol=1e-12)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_floor_is_log_2_with_the_other_positive_and_0_without():
    perfect = [torch.eye(4, dtype=torch.float64)] * 3
    assert gcl_loss(*perfect, 1000.0).item() == pytest.approx(math.log(2), abs=1e-12)
    assert gcl_loss(*perfect, 1000.0, denominator="without_other_positive").item() == pytest.approx(0, abs=1e-12)
    assert contrastive_loss(*perfect[:2], 1000.0).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("denominator", ["all", "without_other_positive", "target"])
def test_one_pair_has_finite_loss_and_gradient(denominator):
    embeds = [x.requires_grad_() for x in random_embeds(1, 4, dtype=torch.float32)]
    loss = gcl_loss(*embeds, 50.0, denominator=denominator)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(x.grad).all() for x in embeds)


def test_no_gradient_through_masked_entries():
    """With all pairs alike, nothing is a negative: the loss of pair 0 must not pull on pair 1."""
    embeds = [x.requires_grad_() for x in random_embeds(3, 4)]
    _, terms = gcl_loss(*embeds, 10.0, ids=torch.tensor([7, 7, 7]), return_terms=True)
    alone = [
        gcl_loss(*(x[j : j + 1] for x in embeds), 10.0, return_terms=True)[1] for j in range(3)
    ]  # one pair at a time
    for direction, term in terms.items():
        assert term.item() == pytest.approx(sum(a[direction].item() for a in alone) / 3, abs=1e-12)
    # only pair 1 and 2 alike: pair 1's text gets its gradient from pairs 0 and 1, none from pair 2's anchor
    text = embeds[1].detach().requires_grad_()
    anchor_2 = contrastive_loss(embeds[0].detach(), text, 10.0, ids=torch.tensor([0, 1, 1]), return_terms=False)
    grad = torch.autograd.grad(anchor_2, text)[0]
    i = embeds[0].detach()

    def by_hand(t):  # the same loss written out for three pairs
        logits = 10.0 * i @ t.T
        hidden = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=torch.bool)
        rows = logits.masked_fill(hidden, -torch.inf).logsumexp(1) - logits.diagonal()
        columns = logits.T.masked_fill(hidden, -torch.inf).logsumexp(1) - logits.diagonal()
        return (rows.mean() + columns.mean()) / 2

    expected = torch.autograd.grad(by_hand(text), text)[0]
    torch.testing.assert_close(grad, expected, atol=1e-12, rtol=1e-12)


def test_plain_cl_equals_cross_entropy_and_clip():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    image, text, _ = random_embeds(9, 6)
    logits = 20 * image @ text.T
    target = torch.arange(9)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(contrastive_loss(image, text, 20.0), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(image_text_contrastive_loss(logits), expected, atol=1e-12, rtol=1e-12)


def test_alignclip_equals_a_slow_loop():
    image, text, semantic = random_embeds(6, 5)
    s, n = 15.0, 6

    def separation(x):
        total = 0.0
        for j in range(n):
            logits = []
            for k in range(n):
                cosine = float(semantic[j] @ semantic[k])
                logits.append(s * (float(x[j] @ x[k]) * (1 - cosine) + (float(image[j] @ text[j]) if j == k else 0)))
            total += math.log(sum(math.exp(v) for v in logits)) - logits[j]
        return total / n

    expected = contrastive_loss(image, text, s).item() + 0.5 * (separation(image) + separation(text)) / 2
    assert alignclip_loss(image, text, s, semantic_embeds=semantic).item() == pytest.approx(expected, abs=1e-11)
    own = alignclip_loss(image, text, s)
    torch.testing.assert_close(own, alignclip_loss(image, text, s, semantic_embeds=text))
    torch.testing.assert_close(alignclip_loss(image, text, s, separation_weight=0.0), contrastive_loss(image, text, s))


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_of_the_logits(dtype, expected):
    embeds = [x.to(dtype) for x in random_embeds(5, 8)]
    loss = gcl_loss(*embeds, torch.tensor(100.0))
    assert loss.dtype == expected
    reference = gcl_loss(*(x.double() for x in embeds), 100.0)  # the same rounded embeddings, exact arithmetic
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)


def test_autocast_does_not_reach_the_logits():
    embeds = random_embeds(16, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gcl_loss(*embeds, 100.0), contrastive_loss(*embeds[:2], 100.0), alignclip_loss(*embeds[:2], 100.0)
    outside = gcl_loss(*embeds, 100.0), contrastive_loss(*embeds[:2], 100.0), alignclip_loss(*embeds[:2], 100.0)
    for a, b in zip(inside, outside):
        assert torch.equal(a, b)


def test_weights_select_terms():
    embeds = random_embeds(6, 4)
    _, terms = gcl_loss(*embeds, 10.0, return_terms=True)
    only = {d: 0.0 for d in terms} | {"it→t": 3.0}
    assert gcl_loss(*embeds, 10.0, direction_weights=only).item() == pytest.approx(terms["it→t"].item())
    assert gcl_loss(*embeds, 10.0).item() == pytest.approx(sum(t.item() for t in terms.values()) / 6)


def test_direction_weights_may_be_typed_in_ascii():
    embeds = random_embeds(6, 4)
    ascii_weights, weights = ({f"i{arrow}t": 0.0, f"t{arrow}it": 3.0} for arrow in ("->", "→"))
    assert torch.equal(
        gcl_loss(*embeds, 10.0, direction_weights=ascii_weights), gcl_loss(*embeds, 10.0, direction_weights=weights)
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_embeds": torch.zeros(3, 4)}, "of one shape"),
        ({"denominator": "some"}, "denominator='some' is unknown"),
        ({"ids": torch.zeros(5)}, r"ids must hold one label per pair, shape \(2,\)"),
        ({"direction_weights": {"i→x": 1.0}}, "direction_weights names"),
        ({"direction_weights": {"i→t": -1.0}}, "non-negative"),
        ({"direction_weights": {"i→t": math.nan}}, "finite"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(zip(("image_embeds", "text_embeds", "fused_embeds"), random_embeds(2, 4))) | {"logit_scale": 1.0}
    with pytest.raises(ValueError, match=message):
        gcl_loss(**(arguments | change))


def test_what_is_no_tensor_is_named():
    embeds = random_embeds(2, 4)
    with pytest.raises(TypeError, match="ids must be a torch.Tensor, got list"):
        gcl_loss(*embeds, 1.0, ids=[1, 2])
    with pytest.raises(ValueError, match="separation_weight must be finite"):
        alignclip_loss(*embeds[:2], 1.0, separation_weight=-1.0)


def test_a_loss_that_is_kept_keeps_no_embeddings_after_backward():
    embeds = [x.requires_grad_() for x in random_embeds(5, 4)]
    leaf = embeds[0] * 1.0
    loss = gcl_loss(leaf, *embeds[1:], 1.0)
    alive = weakref.ref(leaf)
    del leaf
    assert alive() is not None
    loss.backward()
    gc.collect()
    assert alive() is None


def test_empty_batch_is_an_error():
    with pytest.raises(ValueError, match="batch is empty"):
        gcl_loss(*[torch.zeros(0, 4)] * 3, 1.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_embeds": torch.full((2, 4), torch.nan)}, "text_embeds holds NaN or infinite values in 2 of 2 rows"),
        ({"fused_embeds": torch.tensor([[1.0, 0, 0, 0], [torch.inf, 0, 0, 0]])}, "first is row 1"),
        ({"image_embeds": torch.tensor([[1.0, 0, 0, 0], [0, 0, 3.0, 4.0]])}, "image_embeds .* row 1 has norm 5"),
        ({"image_embeds": torch.zeros(2, 4)}, "row 0 has norm 0"),
        ({"logit_scale": 0.0}, "logit_scale must be positive"),
        ({"logit_scale": torch.tensor(-1.0)}, "logit_scale must be positive"),
        ({"logit_scale": torch.nan}, "logit_scale is nan"),
        ({"logit_scale": torch.ones(2)}, "logit_scale must be one number"),
        ({"text_embeds": torch.empty(2, 4, device="meta")}, "on one device"),
        ({"ids": torch.empty(2, device="meta")}, "on one device"),
    ],
)
def test_bad_values_are_named(change, message):
    arguments = dict(zip(("image_embeds", "text_embeds", "fused_embeds"), random_embeds(2, 4))) | {"logit_scale": 1.0}
    with pytest.raises(ValueError, match=message):
        gcl_loss(**(arguments | change))


def test_what_is_not_finite_can_be_told_from_bad_arguments():
    embeds = random_embeds(2, 4)
    with pytest.raises(FloatingPointError):
        gcl_loss(embeds[0], embeds[1] * torch.nan, embeds[2], 1.0)
    with pytest.raises(FloatingPointError):
        gcl_loss(*embeds, torch.inf)


def test_bad_semantic_embeds_are_named():
    image, text, semantic = random_embeds(3, 4)
    with pytest.raises(ValueError, match=r"semantic_embeds must be \(3, S\)"):
        alignclip_loss(image, text, 1.0, semantic_embeds=semantic[:2])
    semantic[1] = 0
    with pytest.raises(ValueError, match="semantic_embeds row 1 is zero"):
        alignclip_loss(image, text, 1.0, semantic_embeds=semantic)
