"""Time and memory of the GCL loss, forward and backward, against its peers.

    python -m benchmarks.loss                                   # this machine's processor, about 20 minutes
    python -m benchmarks.loss --sizes 4096 --variants tiles open_clip_three_times --rounds 5
    python -m benchmarks.loss --device cuda --dim 768           # bfloat16 embeddings, 8k to 128k pairs

A gate comes first: every variant's loss and gradient must equal its definition in float64, and its matrix products are
counted. Then variants are measured as `benchmarks/measurement.py` says. Memory is the peak beyond the embeddings and
their gradients. Peers that have no terms within one modality compute 6 of the 9 blocks: CLIP's loss for each of the
three pairs of modalities.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measurement import (
    RESULTS,
    Measurement,
    argument_parser,
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
SEVERAL_ROUNDS = 8192  # pairs; larger sizes get one round, since disturbances average out over minutes
GATE_PAIRS, GATE_DIM = 1100, 256  # not a multiple of any tile
PAIRS_OF_MODALITIES = ((0, 1), (0, 2), (1, 2))

Embeds = list[torch.Tensor]  # three of (N, D): images, texts, fused
Variant = Callable[[Embeds], torch.Tensor]
Gates = dict[str, dict[str, float]]  # variant → what its gate found


# Every variant takes three (N, D) embeddings, adds its gradients to their .grad, and returns its loss.


def tiles(embeds: Embeds) -> torch.Tensor:
    return _backward(gcl_loss(*embeds, SCALE))


def tiles_of_pytorch(embeds: Embeds) -> torch.Tensor:
    """The tiles without the Triton kernels, which `tiles` uses where they are supported."""
    with patch("modeling_gcl.logsumexp.kernels_support", return_value=False):
        return tiles(embeds)


def tiles_bf16(embeds: Embeds) -> torch.Tensor:
    return _backward(gcl_loss(*embeds, SCALE, bf16=True))


def tiles_bf16_cache(embeds: Embeds) -> torch.Tensor:
    """Half of all exponentiated logits are kept."""
    return _backward(gcl_loss(*embeds, SCALE, bf16=True, cache_bytes=int(4.5 * len(embeds[0]) ** 2)))


def tiles_bf16_all_kept(embeds: Embeds) -> torch.Tensor:
    return _backward(gcl_loss(*embeds, SCALE, bf16=True, cache_bytes=10 * len(embeds[0]) ** 2))


def halves(embeds: Embeds) -> list[int]:
    """The number of dimensions, and its half, quarter and eighth: 512, 256, 128 and 64."""
    return [embeds[0].shape[1] // 2**k for k in range(4)]


def cut(embeds: Embeds, d: int) -> Embeds:
    """The first `d` dimensions, normalised again."""
    return [x if d == x.shape[1] else F.normalize(x[:, :d], dim=-1) for x in embeds]


def matryoshka(embeds: Embeds) -> torch.Tensor:
    """All four sizes in one pass over the tiles. The kernels take four passes."""
    return _backward(gcl_loss(*embeds, SCALE, matryoshka_dims=halves(embeds)))


def matryoshka_separate_passes(embeds: Embeds) -> torch.Tensor:
    """The loss once for each size, on embeddings cut by autograd, as sentence-transformers' MatryoshkaLoss does it."""
    total = torch.zeros((), device=embeds[0].device)
    for d in halves(embeds):
        total += _backward(gcl_loss(*cut(embeds, d), SCALE) / 4)
    return total


def autograd(embeds: Embeds) -> torch.Tensor:
    """The best one line: SupCon's L_out with one log-sum-exp per row and the positives apart."""
    z = torch.cat(embeds)
    logits = (SCALE * z @ z.T).float().fill_diagonal_(-torch.inf)
    return _backward((2 * logits.logsumexp(1).sum() - _positives(embeds)) / (2 * len(z)))


def checkpointed_strips(embeds: Embeds) -> torch.Tensor:
    """Rows in strips of 512. Each strip is computed again in backward."""
    z = torch.cat(embeds)

    def strip(z: torch.Tensor, start: int) -> torch.Tensor:
        logits = (SCALE * z[start : start + 512] @ z.T).float()
        logits.diagonal(start).fill_(-torch.inf)
        return logits.logsumexp(1).sum()

    total = torch.stack([checkpoint(strip, z, start, use_reentrant=False) for start in range(0, len(z), 512)]).sum()
    return _backward((2 * total - _positives(embeds)) / (2 * len(z)))


def open_clip_three_times(embeds: Embeds) -> torch.Tensor:
    """ClipLoss as open_clip writes it for one process. Each pair's graph is freed before the next."""
    labels = torch.arange(len(embeds[0]), device=embeds[0].device)
    total = torch.zeros((), device=embeds[0].device)
    for a, b in PAIRS_OF_MODALITIES:
        per_a, per_b = SCALE * embeds[a] @ embeds[b].T, SCALE * embeds[b] @ embeds[a].T
        # .float() as under autocast; it does nothing to float32
        loss = (F.cross_entropy(per_a.float(), labels) + F.cross_entropy(per_b.float(), labels)) / 6
        total += _backward(loss)
    return total


def sentence_transformers_cached(embeds: Embeds, mini_batch_size: int) -> torch.Tensor:
    """CachedMultipleNegativesRankingLoss without its encoder, in both directions, for each pair of modalities."""
    both = ("query_to_doc", "doc_to_query")
    losses = [
        _cached_loss([embeds[a], embeds[b]], mini_batch_size, both, "per_direction", 1 / 3)
        for a, b in PAIRS_OF_MODALITIES
    ]
    return torch.stack(losses).sum()


def _cached_loss(
    columns: Embeds, mini_batch_size: int, directions: tuple[str, ...], partition_mode: str, weight: float
) -> torch.Tensor:
    """The weighted loss of one call. Its gradient is added to that of the columns."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    loss = CachedMultipleNegativesRankingLoss(
        torch.nn.Sequential(torch.nn.Identity()),  # stands in for the encoder, which is not called
        scale=SCALE,
        similarity_fct=dot_score,
        mini_batch_size=mini_batch_size,
        directions=directions,
        partition_mode=partition_mode,
    )
    chunks = [[c.detach().requires_grad_() for c in column.split(mini_batch_size)] for column in columns]
    value = loss.calculate_loss(chunks, with_backward=True)
    for column, parts in zip(columns, chunks):
        assert column.grad is not None
        column.grad.add_(torch.cat([c.grad for c in parts]), alpha=weight)
    return value * weight


def sentence_transformers_1024(embeds: Embeds) -> torch.Tensor:
    return sentence_transformers_cached(embeds, 1024)


def sentence_transformers_32(embeds: Embeds) -> torch.Tensor:
    """With its default size of mini-batches."""
    return sentence_transformers_cached(embeds, 32)


def sentence_transformers_gcl_1024(embeds: Embeds) -> torch.Tensor:
    """GCL computed by the same loss, with one call for each of the six directions.

    The third modality is a second column of documents, so its rows are in the denominator too. `query_to_query` adds
    the rows of the anchor's own modality.
    """
    total = torch.zeros((), device=embeds[0].device)
    for anchor, target in permutations(range(3), 2):
        columns = [embeds[k] for k in (anchor, target, 3 - anchor - target)]
        total += _cached_loss(columns, 1024, ("query_to_doc", "query_to_query"), "joint", 1 / 6)
    return total


def memeff_three_times(embeds: Embeds) -> torch.Tensor:
    from memeff import MemoryEfficientCLIPLoss

    # its default, stable=True, would scale the gradient with the batch
    loss = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return torch.stack([_backward(loss(embeds[a], embeds[b]) / 3) for a, b in PAIRS_OF_MODALITIES]).sum()


def inf_cl_three_times(embeds: Embeds) -> torch.Tensor:
    """One pass for each of the six directions."""
    from inf_cl import cal_flash_loss

    total = torch.zeros((), device=embeds[0].device)
    for a, b in PAIRS_OF_MODALITIES:
        for query, key in ((a, b), (b, a)):
            total += _backward(cal_flash_loss(embeds[query], embeds[key], scale=SCALE).mean() / 6)
    return total


def _backward(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss.detach()


def _positives(embeds: Embeds) -> torch.Tensor:
    images, texts, fused = (x.float() for x in embeds)
    squares = images.square().sum() + texts.square().sum() + fused.square().sum()
    return SCALE * ((images + texts + fused).square().sum() - squares)


# The definitions that the variants must equal


def definition_of_gcl(embeds: Embeds) -> torch.Tensor:
    """The mean over the six directions of the cross-entropy with all other embeddings in the denominator."""
    n = len(embeds[0])
    z = torch.cat(embeds)
    log_p = (SCALE * z @ z.T).fill_diagonal_(-torch.inf).log_softmax(1).view(3, n, 3, n)
    directions = permutations(range(3), 2)
    return -torch.stack([log_p[a, :, b].diagonal().mean() for a, b in directions]).mean()


def definition_of_matryoshka(embeds: Embeds) -> torch.Tensor:
    """The mean of GCL over the four sizes."""
    return torch.stack([definition_of_gcl(cut(embeds, d)) for d in halves(embeds)]).mean()


def definition_of_three_times_cl(embeds: Embeds) -> torch.Tensor:
    """The mean of CLIP's loss over the six directions."""
    labels = torch.arange(len(embeds[0]), device=embeds[0].device)
    directions = permutations(range(3), 2)
    return torch.stack([F.cross_entropy(SCALE * embeds[a] @ embeds[b].T, labels) for a, b in directions]).mean()


# variant: (definition it must equal, tolerance of its gradient, device → largest number of pairs it runs with)
VARIANTS: dict[Variant, tuple[Variant, float, dict[str, int]]] = {
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
BFLOAT16_TOLERANCE = 0.1  # of the gradient if logits near 25 are held in bfloat16, as peers on GPUs do
NEEDS: dict[Variant, str] = {
    sentence_transformers_1024: "sentence_transformers",
    sentence_transformers_gcl_1024: "sentence_transformers",
    sentence_transformers_32: "sentence_transformers",
    memeff_three_times: "memeff",
    inf_cl_three_times: "inf_cl",
}
REFERENCES = ("tiles", "tiles_bf16", "tiles_bf16_cache", "tiles_bf16_all_kept", "matryoshka_separate_passes")


def make_embeds(num_pairs: int, dim: int, device: str = "cpu") -> Embeds:
    """Embeddings in a cone with cosines around 0.5, as encoders give them; bfloat16 on CUDA, float32 on the CPU."""
    generator = torch.Generator().manual_seed(SEED)
    common = torch.randn(dim, generator=generator)
    embeds = []
    for _ in range(3):
        x = F.normalize(common + torch.randn(num_pairs, dim, generator=generator), dim=-1)
        x = x.to(device, torch.float32 if device == "cpu" else torch.bfloat16).requires_grad_()
        x.grad = torch.full_like(x, 0.0)
        embeds.append(x)
    return embeds


def gate(variant: Variant, device: str = "cpu") -> dict[str, float]:
    """
    Relative errors of the variant's loss and gradient against its definition in float64.

    Raises:
        SystemExit: one of them exceeds the tolerance.
    """
    definition, tolerance, _ = VARIANTS[variant]
    tolerance = tolerance if device == "cpu" else BFLOAT16_TOLERANCE
    embeds = make_embeds(GATE_PAIRS, GATE_DIM, device)
    exact = [x.detach().double().requires_grad_() for x in embeds]
    loss, exact_loss = variant(embeds).double(), definition(exact)
    exact_loss.backward()
    errors = {"loss": (loss - exact_loss).abs().item() / exact_loss.item()}
    by_modality = torch.stack([(x.grad - y.grad).norm() / y.grad.norm() for x, y in zip(embeds, exact)])
    errors["gradient"] = by_modality.max().item()  # NaN if any of them is NaN
    for name, error in errors.items():
        if not error <= tolerance:
            raise SystemExit(f"{variant.__name__}: relative error of the {name} is {error:.1e} > {tolerance}")
    return errors


def count_flops(variant: Variant, num_pairs: int = 4096, dim: int = 16) -> float:
    """Flops of the matrix products, divided by N²D."""

    def addmm_(_: Any, left: Sequence[int], right: Sequence[int], **__: Any) -> int:  # FlopCounterMode lacks this form
        return 2 * left[0] * left[1] * right[1]

    embeds = make_embeds(num_pairs, dim)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
        variant(embeds)
    return counter.get_total_flops() / (num_pairs**2 * dim)


def work(variants: Sequence[str], device: str, num_pairs: int | None = None, dim: int = 512) -> Measurement | Gates:
    """A worker's task: the measurement of one variant if `num_pairs` is given, else the gates of all variants."""
    chosen = [variant for variant in VARIANTS if variant.__name__ in variants]
    if num_pairs is None:
        answers = {}
        for variant in chosen:
            answers[variant.__name__] = gate(variant, device)
            if device == "cpu":
                answers[variant.__name__]["flops_by_n2d"] = count_flops(variant)
        return answers
    (variant,) = chosen
    embeds = make_embeds(num_pairs, dim, device)
    small = make_embeds(600, dim, device) if device == "cpu" else embeds
    return measure(lambda: variant(embeds), device=device, warm_up=lambda: variant(small))


def main() -> None:
    parser = argument_parser("loss", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", help=f"numbers of pairs; default: {SIZES}")
    parser.add_argument(
        "--variants", nargs="+", help=f"some of {', '.join(v.__name__ for v in VARIANTS)}; default: all"
    )
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help=f"up to {SEVERAL_ROUNDS} pairs; larger sizes get one")
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
        print(
            f"{name} is left out because its package is missing: pip install {NEEDS[by_name[name]].replace('_', '-')}",
            flush=True,
        )
    chosen = [v for v in chosen if v.__name__ not in missing]
    result = {"environment": environment(threads, SEED), "device": device, "dim": dim, "not_installed": missing}
    gates = run_worker("benchmarks.loss", {"variants": [v.__name__ for v in chosen], "device": device}, threads=threads)
    result |= {"gates": gates, "sizes": {}}
    for num_pairs in arguments.sizes or SIZES[device]:
        names = [v.__name__ for v in chosen if num_pairs <= VARIANTS[v][2][device]]
        task = {"device": device, "num_pairs": num_pairs, "dim": dim}
        series = measure_rounds(
            lambda name, task=task: run_worker("benchmarks.loss", task | {"variants": [name]}, threads=threads),
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
