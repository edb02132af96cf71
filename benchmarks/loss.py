"""Time and memory of the GCL loss, forward and backward, against its peers.

    python -m benchmarks.loss                                   # this machine's processor, about 20 minutes
    python -m benchmarks.loss --sizes 4096 --variants tiles open_clip_three_times --rounds 5
    python -m benchmarks.loss --device cuda --dim 768           # bfloat16 embeddings, 8k to 128k pairs

A correctness gate first: every variant's loss and gradient against its definition in float64, and its matrix products
counted. Then the protocol of protocol.py, memory as the peak beyond embeddings and their gradients. Peers without the
terms within one modality compute 6 of the 9 blocks: CLIP's loss for each of the three pairs of modalities.
"""

import argparse
import json
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.protocol import (
    RESULTS,
    environment,
    measure,
    measure_rounds,
    run_worker,
    summarise,
    write_result,
)
from modeling_gcl import gcl_loss

SCALE = 1 / 0.02
SEED = 0
SIZES = {"cpu": [1024, 4096, 8192, 16384, 32768], "cuda": [8192, 16384, 32768, 65536, 131072]}
SEVERAL_ROUNDS = 8192  # pairs; one round above, since minutes average out what disturbs seconds
GATE_PAIRS, GATE_DIM = 1100, 256  # no multiple of any tile
PAIRS_OF_MODALITIES = ((0, 1), (0, 2), (1, 2))


# Every variant takes three (N, D) embeddings, leaves its gradients in .grad, and returns its loss.


def tiles(embeds):
    return _backward(gcl_loss(*embeds, SCALE))


def tiles_of_pytorch(embeds):
    """Without the Triton kernels, which `tiles` runs on where they are supported."""
    with patch("modeling_gcl.logsumexp.kernels_support", return_value=False):
        return tiles(embeds)


def tiles_bf16(embeds):
    return _backward(gcl_loss(*embeds, SCALE, bf16=True))


def tiles_bf16_cache(embeds):
    """Half of all exponentiated logits kept."""
    return _backward(gcl_loss(*embeds, SCALE, bf16=True, cache_bytes=int(4.5 * len(embeds[0]) ** 2)))


def tiles_bf16_all_kept(embeds):
    return _backward(gcl_loss(*embeds, SCALE, bf16=True, cache_bytes=10 * len(embeds[0]) ** 2))


def halves(embeds):
    """512, 256, 128 and 64 of 512 dimensions."""
    return [embeds[0].shape[1] // 2**k for k in range(4)]


def cut(embeds, d):
    return [x if d == x.shape[1] else F.normalize(x[:, :d], dim=-1) for x in embeds]


def matryoshka(embeds):
    """All four in one pass of the tiles (where `tiles` runs on kernels, in four)."""
    return _backward(gcl_loss(*embeds, SCALE, matryoshka_dims=halves(embeds)))


def matryoshka_separate_passes(embeds):
    """As sentence-transformers' MatryoshkaLoss does it: the loss once for each, of embeddings cut by autograd."""
    total = 0
    for d in halves(embeds):
        total += _backward(gcl_loss(*cut(embeds, d), SCALE) / 4)
    return total


def autograd(embeds):
    """The best one line: SupCon's L_out with one log-sum-exp per row and the positives apart."""
    z = torch.cat(embeds)
    logits = (SCALE * z @ z.T).float().fill_diagonal_(-torch.inf)
    return _backward((2 * logits.logsumexp(1).sum() - _positives(embeds)) / (2 * len(z)))


def checkpointed_strips(embeds):
    """Rows in strips of 512, each computed again in backward."""
    z = torch.cat(embeds)

    def strip(z, start):
        logits = (SCALE * z[start : start + 512] @ z.T).float()
        logits.diagonal(start).fill_(-torch.inf)
        return logits.logsumexp(1).sum()

    total = sum(checkpoint(strip, z, start, use_reentrant=False) for start in range(0, len(z), 512))
    return _backward((2 * total - _positives(embeds)) / (2 * len(z)))


def open_clip_three_times(embeds):
    """ClipLoss as open_clip writes it on one process; each pair's graph is freed before the next."""
    labels = torch.arange(len(embeds[0]), device=embeds[0].device)
    total = 0
    for a, b in PAIRS_OF_MODALITIES:
        per_a, per_b = SCALE * embeds[a] @ embeds[b].T, SCALE * embeds[b] @ embeds[a].T
        # .float() as autocast does; nothing for float32
        loss = (F.cross_entropy(per_a.float(), labels) + F.cross_entropy(per_b.float(), labels)) / 6
        total += _backward(loss)
    return total


def sentence_transformers_cached(embeds, mini_batch_size):
    """The loss stage of CachedMultipleNegativesRankingLoss, both directions, for each pair of modalities."""
    both = ("query_to_doc", "doc_to_query")
    return sum(
        _cached_stage([embeds[a], embeds[b]], mini_batch_size, both, "per_direction", 1 / 3)
        for a, b in PAIRS_OF_MODALITIES
    )


def _cached_stage(columns, mini_batch_size, directions, partition_mode, weight):
    """One call, and its gradient by the columns' embeddings."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    loss = CachedMultipleNegativesRankingLoss(
        torch.nn.Sequential(torch.nn.Identity()),  # stands in for the encoder, which this stage does not call
        scale=SCALE,
        similarity_fct=dot_score,
        mini_batch_size=mini_batch_size,
        directions=directions,
        partition_mode=partition_mode,
    )
    chunks = [[c.detach().requires_grad_() for c in column.split(mini_batch_size)] for column in columns]
    value = loss.calculate_loss(chunks, with_backward=True)
    for column, parts in zip(columns, chunks):
        column.grad.add_(torch.cat([c.grad for c in parts]), alpha=weight)
    return value * weight


def sentence_transformers_1024(embeds):
    return sentence_transformers_cached(embeds, 1024)


def sentence_transformers_32(embeds):
    """At its default mini-batch."""
    return sentence_transformers_cached(embeds, 32)


def sentence_transformers_gcl_1024(embeds):
    """GCL itself from the same stage: for each direction the third view is a second column of documents, so that it and
    all others are in the denominator, and `query_to_query` brings the anchor's own modality. Six calls."""
    total = 0
    for anchor, target in permutations(range(3), 2):
        columns = [embeds[k] for k in (anchor, target, 3 - anchor - target)]
        total += _cached_stage(columns, 1024, ("query_to_doc", "query_to_query"), "joint", 1 / 6)
    return total


def memeff_three_times(embeds):
    from memeff import MemoryEfficientCLIPLoss

    # stable=True, its default, would scale the gradient with the batch
    loss = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return sum(_backward(loss(embeds[a], embeds[b]) / 3) for a, b in PAIRS_OF_MODALITIES)


def inf_cl_three_times(embeds):
    """One pass per direction, six in all."""
    from inf_cl import cal_flash_loss

    total = 0
    for a, b in PAIRS_OF_MODALITIES:
        for query, key in ((a, b), (b, a)):
            total += _backward(cal_flash_loss(embeds[query], embeds[key], scale=SCALE).mean() / 6)
    return total


def _backward(loss):
    loss.backward()
    return loss.detach()


def _positives(embeds):
    embeds = [x.float() for x in embeds]
    return SCALE * (sum(embeds).square().sum() - sum(x.square().sum() for x in embeds))


# What the variants must equal, as the definitions say it


def definition_of_gcl(embeds):
    n = len(embeds[0])
    z = torch.cat(embeds)
    log_p = (SCALE * z @ z.T).fill_diagonal_(-torch.inf).log_softmax(1).view(3, n, 3, n)
    return -sum(log_p[a, :, b].diagonal().mean() for a in range(3) for b in range(3) if a != b) / 6


def definition_of_matryoshka(embeds):
    return sum(definition_of_gcl(cut(embeds, d)) for d in halves(embeds)) / 4


def definition_of_three_times_cl(embeds):
    labels = torch.arange(len(embeds[0]), device=embeds[0].device)
    return (
        sum(F.cross_entropy(SCALE * embeds[a] @ embeds[b].T, labels) for a in range(3) for b in range(3) if a != b) / 6
    )


# variant: (what it must equal, tolerance of its gradient, largest number of pairs it is run at on each device)
VARIANTS = {
    tiles: (definition_of_gcl, 1e-5, {"cpu": 32768, "cuda": 131072}),
    tiles_of_pytorch: (definition_of_gcl, 1e-5, {"cuda": 131072}),
    tiles_bf16: (definition_of_gcl, 1e-2, {"cpu": 32768}),
    tiles_bf16_cache: (definition_of_gcl, 1e-2, {"cpu": 16384}),
    tiles_bf16_all_kept: (definition_of_gcl, 1e-2, {"cpu": 8192}),
    matryoshka: (definition_of_matryoshka, 1e-5, {"cpu": 16384, "cuda": 131072}),
    matryoshka_separate_passes: (definition_of_matryoshka, 1e-5, {"cpu": 16384, "cuda": 131072}),
    autograd: (definition_of_gcl, 1e-5, {"cpu": 8192, "cuda": 16384}),
    checkpointed_strips: (definition_of_gcl, 1e-5, {"cpu": 8192, "cuda": 131072}),
    open_clip_three_times: (definition_of_three_times_cl, 1e-5, {"cpu": 16384, "cuda": 32768}),
    sentence_transformers_1024: (definition_of_three_times_cl, 1e-5, {"cpu": 4096, "cuda": 131072}),
    sentence_transformers_gcl_1024: (definition_of_gcl, 1e-5, {"cpu": 4096, "cuda": 131072}),
    sentence_transformers_32: (definition_of_three_times_cl, 1e-5, {"cpu": 1024, "cuda": 8192}),
    memeff_three_times: (definition_of_three_times_cl, 1e-5, {"cuda": 131072}),
    inf_cl_three_times: (definition_of_three_times_cl, 1e-5, {"cuda": 131072}),
}
BFLOAT16_TOLERANCE = 0.1  # of the gradient, of variants that hold logits near 25 in bfloat16, as peers on GPU do
NEEDS = {
    sentence_transformers_1024: "sentence_transformers",
    sentence_transformers_gcl_1024: "sentence_transformers",
    sentence_transformers_32: "sentence_transformers",
    memeff_three_times: "memeff",
    inf_cl_three_times: "inf_cl",
}
REFERENCES = ("tiles", "tiles_bf16", "tiles_bf16_cache", "tiles_bf16_all_kept", "matryoshka_separate_passes")


def make_embeds(num_pairs, dim, device="cpu"):
    """Cone-shaped sets, as encoders give them: cosines around 0.5. bfloat16 on CUDA, float32 on CPU."""
    generator = torch.Generator().manual_seed(SEED)
    common = torch.randn(dim, generator=generator)
    embeds = []
    for _ in range(3):
        x = F.normalize(common + torch.randn(num_pairs, dim, generator=generator), dim=-1)
        x = x.to(device, torch.float32 if device == "cpu" else torch.bfloat16).requires_grad_()
        x.grad = torch.full_like(x, 0.0)
        embeds.append(x)
    return embeds


def gate(variant, device="cpu"):
    """
    Relative errors of the variant's loss and gradient against its definition in float64.

    Raises:
        SystemExit: one of them is over the tolerance.
    """
    definition, tolerance, _ = VARIANTS[variant]
    tolerance = tolerance if device == "cpu" else BFLOAT16_TOLERANCE
    embeds = make_embeds(GATE_PAIRS, GATE_DIM, device)
    exact = [x.detach().double().requires_grad_() for x in embeds]
    loss, exact_loss = variant(embeds).double(), definition(exact)
    exact_loss.backward()
    errors = {"loss": (loss - exact_loss).abs().item() / exact_loss.item()}
    by_modality = torch.stack([(x.grad - y.grad).norm() / y.grad.norm() for x, y in zip(embeds, exact)])
    errors["gradient"] = by_modality.max().item()  # NaN, if any is
    for name, error in errors.items():
        if not error <= tolerance:
            raise SystemExit(f"{variant.__name__}: relative error of the {name} is {error:.1e} > {tolerance}")
    return errors


def count_flops(variant, num_pairs=4096, dim=16):
    """Flops of the matrix products, by N²D."""

    def addmm_(_, left, right, **__):  # FlopCounterMode does not know the in-place form
        return 2 * left[0] * left[1] * right[1]

    embeds = make_embeds(num_pairs, dim)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
        variant(embeds)
    return counter.get_total_flops() / (num_pairs**2 * dim)


def work(variants, device, num_pairs=None, dim=None):
    """A worker's task: with `num_pairs` a measurement of the one variant, else the gates of all."""
    variants = [variant for variant in VARIANTS if variant.__name__ in variants]
    if num_pairs is None:
        answers = {}
        for variant in variants:
            answers[variant.__name__] = gate(variant, device)
            if device == "cpu":
                answers[variant.__name__]["flops_by_n2d"] = count_flops(variant)
        return answers
    (variant,) = variants
    embeds = make_embeds(num_pairs, dim, device)
    small = make_embeds(600, dim, device) if device == "cpu" else embeds
    return measure(lambda: variant(embeds), device=device, warm_up=lambda: variant(small))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", help=f"numbers of pairs; default: {SIZES}")
    parser.add_argument("--variants", nargs="+", help=f"of {', '.join(v.__name__ for v in VARIANTS)}; default: all")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help=f"at {SEVERAL_ROUNDS} pairs at most; 1 above")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/loss.json, or loss-cuda-DIM.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(**json.loads(arguments.worker))))
        return
    device, dim, threads = arguments.device, arguments.dim, arguments.threads
    out = arguments.out or RESULTS / ("loss.json" if device == "cpu" else f"loss-cuda-{dim}.json")
    by_name = {variant.__name__: variant for variant in VARIANTS if device in VARIANTS[variant][2]}
    if unknown := set(arguments.variants or ()) - set(by_name):
        parser.error(f"no variants on {device}: {', '.join(sorted(unknown))}; there are {', '.join(by_name)}")
    chosen = [by_name[name] for name in arguments.variants or by_name]
    missing = [v.__name__ for v in chosen if v in NEEDS and find_spec(NEEDS[v]) is None]
    for name in missing:
        print(f"{name} is left out: pip install {NEEDS[by_name[name]].replace('_', '-')}", flush=True)
    chosen = [v for v in chosen if v.__name__ not in missing]
    result = {"environment": environment(threads, SEED), "device": device, "dim": dim, "not_installed": missing}
    gates = run_worker(__file__, {"variants": [v.__name__ for v in chosen], "device": device}, threads=threads)
    result |= {"gates": gates, "sizes": {}}
    for num_pairs in arguments.sizes or SIZES[device]:
        names = [v.__name__ for v in chosen if num_pairs <= VARIANTS[v][2][device]]
        task = {"device": device, "num_pairs": num_pairs, "dim": dim}
        series = measure_rounds(
            lambda name, task=task: run_worker(__file__, task | {"variants": [name]}, threads=threads),
            names,
            arguments.rounds if num_pairs <= SEVERAL_ROUNDS else 1,
        )
        references = {name: series[name] for name in REFERENCES if name in series}
        rows = {name: summarise(series[name], references, 36 * num_pairs**2 * dim) for name in names}
        for name, row in rows.items():
            print(num_pairs, name, json.dumps(row), flush=True)
        result["sizes"][str(num_pairs)] = rows
        write_result(out, result)


if __name__ == "__main__":
    main()
