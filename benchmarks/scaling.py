"""A model, not a measurement: what a training step on many GPUs would take, and what the loss would add to it.

    python -m benchmarks.scaling    # 1,024 pairs on each of up to 1,024 GPUs; writes results/benchmarks/scaling.json

Counts of arithmetic, bytes and memory are those of the code (the first is measured in loss.json and step.json); the
rates that turn them into seconds are assumptions, in `ASSUMED`, and every one is an argument of `predict`.
"""

import argparse
from pathlib import Path

from benchmarks.protocol import RESULTS, environment, write_result

MODALITIES = 3
ASSUMED = {
    "flops_per_second": 400e12,  # of one GPU: 40 % of an H100's 989e12 in bfloat16
    "bytes_per_second": 40e9,  # that one GPU receives: 80 % of a 400 Gb/s link
    "bytes_per_number": 2,  # embeddings in bfloat16; in float32, as without autocast, 4
}


def clip_vit_b32_flops(text_tokens=77):
    """Forward flops per pair of CLIP ViT-B/32 at 224 pixels (a multiply-add is two); backward has twice as many."""

    def transformer(layers, width, tokens):
        return layers * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width)

    patches = (224 // 32) ** 2
    embedding = 2 * patches * 3 * 32**2 * 768
    return embedding + transformer(12, 768, patches + 1) + transformer(12, 512, text_tokens)


def loss_flops(num_pairs, processes, dim, half_ring=False, kernels=False):
    """Of one process, forward and backward, for its n = N/W rows.

    The tiles need 36 n²D among themselves (symmetric); 54 n²D with the rows of another process, seen from one side; 72
    n²D from both sides, which the half ring computes for half of the others (and once from one side, if their number is
    odd). The GPU kernels see rows alone: 54 n²D for a side, their own too, 108 for both.
    """
    n, others = num_pairs / processes, processes - 1
    two_sided = others // 2 if half_ring else 0
    one_sided = others - 2 * two_sided
    own, both = (54, 108) if kernels else (36, 72)
    return (own + both * two_sided + 54 * one_sided) * n**2 * dim


def exchanged_bytes(num_pairs, processes, dim, bytes_per_number, half_ring=False):
    """Received by one process: the embeddings of all others once; in the half ring those of half of them, forward and
    again backward, and as many rows of gradients in float32. Sums of exponentials (9 numbers a pair) are left out."""
    numbers = MODALITIES * num_pairs * dim * (processes - 1) / processes
    return numbers * (bytes_per_number + 4 / 2 if half_ring else bytes_per_number)


def loss_memory(num_pairs, processes, dim, bytes_per_number, half_ring=False):
    """Bytes of one process for others' rows, tiles left out: the rows of all; in the half ring visitors, those that
    follow, and float32 gradients for them and from others."""
    own = MODALITIES * num_pairs / processes * dim
    if processes == 1:
        return 0.0
    return own * (2 * bytes_per_number + 2 * 4 if half_ring else processes * bytes_per_number)


def predict(
    num_pairs, processes, dim, encoder_flops, *, flops_per_second, bytes_per_second, bytes_per_number, half_ring=False
):
    """
    One step of N pairs on W GPUs, one pair's towers taking `encoder_flops` forward; nothing overlaps.

    Returns:
        `dict`: seconds of `encoder` (forward and backward, without GradCache), `loss` and `exchange`; `loss_share` of
        the last two in all three; `memory`: bytes of the loss on one GPU.
    """
    shape = num_pairs, processes, dim
    received = exchanged_bytes(*shape, bytes_per_number, half_ring)
    seconds = {
        "encoder": 3 * encoder_flops * num_pairs / processes / flops_per_second,
        "loss": loss_flops(*shape, half_ring, kernels=True) / flops_per_second,
        "exchange": received / bytes_per_second,
    }
    share = 1 - seconds["encoder"] / sum(seconds.values())
    return {**seconds, "loss_share": share, "memory": loss_memory(*shape, bytes_per_number, half_ring)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--pairs", type=int, default=1024, help="on each GPU")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--text_tokens", type=int, default=77, help="of each text, padding included")
    for name, value in ASSUMED.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    arguments = parser.parse_args()
    rates = {name: getattr(arguments, name) for name in ASSUMED}
    encoder_flops = clip_vit_b32_flops(arguments.text_tokens)
    rows = []
    for processes in arguments.processes:
        num_pairs = processes * arguments.pairs
        for half_ring in (False, True) if processes > 1 else (False,):
            row = {"processes": processes, "num_pairs": num_pairs, "half_ring": half_ring}
            rows.append(row | predict(num_pairs, processes, arguments.dim, encoder_flops, half_ring=half_ring, **rates))
    assumptions = rates | {name: getattr(arguments, name) for name in ("dim", "text_tokens")}
    assumptions |= {"encoder": "CLIP ViT-B/32", "encoder_flops": encoder_flops}
    # N at which the loss's arithmetic equals the towers', whatever W
    assumptions["pairs_where_loss_equals_encoder"] = 3 * encoder_flops / (54 * arguments.dim)
    write_result(arguments.out, {"environment": environment(threads=1), "assumptions": assumptions, "rows": rows})
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
