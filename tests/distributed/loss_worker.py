"""Run under torchrun: the losses of a batch shared by processes against the dense oracle of the whole, on every rank.

Argument: a folder, where each rank that got through writes a file with the number of its checks.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from modeling_gcl import loss as loss_module
from modeling_gcl import tiles
from modeling_gcl.loss import NonFiniteError
from tests.support import dense_loss
from universal_gcl.retrieval.processes import world_size
from universal_gcl.training.distributed import BatchProcesses

SWITCHES = {
    "gcl": ("gcl_loss", {}),
    "without_other_positive": ("gcl_loss", {"denominator": "without_other_positive"}),
    "target": ("gcl_loss", {"denominator": "target"}),
    "no_intra": ("gcl_loss", {"intra_modality": False}),
    "weights": ("gcl_loss", {"direction_weights": {"i→t": 0.0, "t→i": 0.25, "it→t": 3.0}}),
    "cl": ("contrastive_loss", {}),
    "alignclip": ("alignclip_loss", {"separation_weight": 0.7}),
    "alignclip_semantic": ("alignclip_loss", {"semantic_embeds": True}),
}
MATRYOSHKA = {"matryoshka_dims": [5, 2], "matryoshka_weights": [0.5, 2.0]}
LABELS = {"none": (), "ids": ("ids",), "both": ("ids", "caption_ids")}


def batch(sizes, dtype, seed=0, d=7):
    """Embeddings, labels, semantic embeddings and the scale of the whole, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    draw = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(4))
    *embeds, semantic = (F.normalize(x, dim=-1).to(dtype) for x in draw)
    labels = {"ids": torch.randint(0, n, (n,), generator=generator), "caption_ids": torch.arange(n) % (n // 2 + 1)}
    return embeds, labels, semantic


def arguments(switch, embeds, labels, semantic, rows=slice(None)):
    name, options = SWITCHES[switch]
    options = dict(options)
    if options.get("semantic_embeds"):
        options["semantic_embeds"] = semantic[rows]
    leaves = [x[rows].clone().requires_grad_() for x in embeds[: 3 if name == "gcl_loss" else 2]]
    return name, leaves, options | {key: x[rows] for key, x in labels.items()}


def check(switch, sizes, dtype, half_ring, label_names, scale=20.0, tolerance=None, matryoshka=None, **more):
    """Loss, terms, gradient of the own rows, and the scale's gradient averaged over ranks, against one process."""
    embeds, labels, semantic = batch(sizes, dtype)
    labels = {name: labels[name] for name in label_names}
    start = sum(sizes[: dist.get_rank()])
    rows = slice(start, start + sizes[dist.get_rank()])
    name, leaves, options = arguments(switch, embeds, labels, semantic, rows)
    options |= matryoshka or {}
    s = torch.tensor(scale, dtype=dtype, requires_grad=True)
    processes = BatchProcesses(half_ring=half_ring)
    loss, terms = getattr(loss_module, name)(*leaves, s, return_terms=True, processes=processes, **options, **more)
    *grads, from_scale = torch.autograd.grad(loss, [*leaves, s])
    dist.all_reduce(from_scale)

    exact = [x.double() for x in embeds], labels, semantic.double()
    name, whole, options = arguments(switch, *exact)
    options |= matryoshka or {}
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    expected, expected_terms = getattr(dense_loss, name)(*whole, s, return_terms=True, **options)
    *whole_grads, whole_from_scale = torch.autograd.grad(expected, [*whole, s])

    tolerance = tolerance or (1e-12 if dtype == torch.float64 else 1e-5)
    pairs = [(loss, expected), (from_scale / world_size(), whole_from_scale)]
    pairs += [(grad / world_size(), whole[rows]) for grad, whole in zip(grads, whole_grads)]
    pairs += [(terms[direction], term) for direction, term in expected_terms.items()]
    for got, want in pairs:
        torch.testing.assert_close(
            got.double(), want.double(), atol=tolerance, rtol=tolerance,
            msg=lambda m: f"{switch}, {sizes}, {dtype}, half_ring={half_ring}, {label_names}, {matryoshka}{more}: {m}",
        )  # fmt: skip
    return 1


def check_flops():
    """Of each rank, forward and backward, in N²D: 36/W in the half ring; gathered, 54/W but for its own n² at 36."""
    n, d, world = 128, 16, world_size()
    embeds = [x.requires_grad_() for x in batch([n], torch.float32, d=d)[0]]
    expected = {True: 36 * world * n * n * d, False: (36 + 54 * (world - 1)) * n * n * d}
    if world % 2 == 0:  # half way round, both processes compute what is between them
        expected[True] += 18 * n * n * d
    for half_ring, flops in expected.items():
        addmm = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
        with FlopCounterMode(display=False, custom_mapping=addmm) as counter:
            loss_module.gcl_loss(*embeds, 20.0, processes=BatchProcesses(half_ring=half_ring)).backward()
        assert flops <= counter.get_total_flops() <= 1.04 * flops, (half_ring, counter.get_total_flops() / flops)
    return 2


def check_errors():
    """What is wrong on the last rank alone is the same error on every rank, and the processes can go on."""
    rank, last = dist.get_rank(), world_size() - 1

    def raises(kind, message, change=(), **changed):
        embeds, labels, _ = batch([4] * world_size(), torch.float32)
        given = dict(zip(("image_embeds", "text_embeds", "fused_embeds"), (x[:4] for x in embeds)))
        given |= {"logit_scale": 20.0, "ids": labels["ids"][:4], "processes": BatchProcesses()}
        if rank == last:
            given |= changed | dict(change)
        try:
            loss_module.gcl_loss(**given)
        except kind as error:
            assert message in str(error), str(error)
            return 1
        raise AssertionError(f"no error: {message}")

    at_fault = f"process {last} of {world_size()}: "
    good = batch([4], torch.float32)[0][0]
    nan = good.clone()
    nan[2] = torch.nan
    count = raises(NonFiniteError, at_fault + "text_embeds holds NaN", text_embeds=nan)
    count += raises(FloatingPointError, at_fault + "logit_scale is inf", logit_scale=torch.inf)
    count += raises(ValueError, at_fault + "image_embeds must hold rows of unit norm", image_embeds=2 * good)
    count += raises(ValueError, at_fault + "logit_scale must be positive", logit_scale=-1.0)
    count += raises(ValueError, at_fault + "embeddings must be (N, D)", image_embeds=good[:3])
    empty = dict.fromkeys(("image_embeds", "text_embeds", "fused_embeds"), good[:0])
    count += raises(ValueError, at_fault + "the batch is empty", **empty, ids=None)
    count += raises(TypeError, at_fault + "ids must be a torch.Tensor", ids=[1, 2, 3, 4])
    count += raises(ValueError, "processes must agree on labels", ids=None)
    count += raises(ValueError, "processes must agree on labels", ids=torch.arange(4, dtype=torch.int32))
    count += raises(ValueError, "processes must agree on gradients", text_embeds=good.clone().requires_grad_())
    count += raises(ValueError, "processes must agree on half_ring", processes=BatchProcesses(half_ring=True))
    count += raises(ValueError, "processes must agree on denominator", denominator="target")
    count += raises(ValueError, "processes must agree on logit_scale", logit_scale=21.0)
    count += raises(ValueError, "processes must agree on matryoshka_dims", matryoshka_dims=[3])
    count += raises(ValueError, at_fault + "matryoshka_dims holds 9", matryoshka_dims=[9])
    cut_to_nothing = F.normalize(good * torch.tensor([0.0, 0, 1, 1, 1, 1, 1]), dim=-1)
    count += raises(
        ValueError, at_fault + "image_embeds can't be cut to 2", matryoshka_dims=[2], image_embeds=cut_to_nothing
    )
    narrow = F.normalize(good[:, :5], dim=-1)
    thin = dict.fromkeys(("image_embeds", "text_embeds", "fused_embeds"), narrow)
    count += raises(ValueError, "processes must agree on embedding size", **thin)
    return count


def main(folder):
    dist.init_process_group("gloo")
    assert world_size() == int(os.environ["WORLD_SIZE"]) > 1
    torch.set_num_threads(1)
    world = world_size()
    tiles.TILE["cpu"] = 8
    layouts = {"even": [13] * world, "one": [1] * world, "ragged": [17, 3, 9][:world]}
    count = 0
    for half_ring in (False, True):
        for dtype in (torch.float64, torch.float32):
            for switch in SWITCHES:
                for labels in LABELS.values():
                    for sizes in layouts.values():
                        count += check(switch, sizes, dtype, half_ring, labels)
        # rows cut to 2 of 7 entries have small norms, by which rounding is divided
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
            for switch in SWITCHES:
                for sizes in layouts.values():
                    count += check(
                        switch, sizes, dtype, half_ring, ("ids",), tolerance=tolerance, matryoshka=MATRYOSHKA
                    )
        far = {"scale": 3000.0, "tolerance": 1e-10, "matryoshka": MATRYOSHKA}
        count += check("gcl", layouts["ragged"], torch.float64, half_ring, ("ids",), **far)
        # the shift underflows: log-sum-exps instead
        count += check("gcl", layouts["ragged"], torch.float32, half_ring, (), scale=3000.0, tolerance=2e-2)
        count += check("gcl", layouts["ragged"], torch.float64, half_ring, ("ids",), scale=3000.0, tolerance=1e-10)
        for cache_bytes in (3000, 10**6):
            count += check("gcl", layouts["ragged"], torch.float64, half_ring, ("ids",), cache_bytes=cache_bytes)
            count += check("alignclip", layouts["even"], torch.float64, half_ring, (), cache_bytes=cache_bytes)
        count += check("gcl", layouts["even"], torch.float32, half_ring, (), bf16=True, tolerance=1e-2)
    count += check_errors()
    tiles.TILE["cpu"] = 32
    count += check_flops()
    dist.barrier()
    Path(folder, f"rank_{dist.get_rank()}").write_text(str(count))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
