"""A model, not a measurement: how long a training step on many GPUs would take, and how much of it is the loss.

    python -m benchmarks.scaling    # 1,024 pairs on each of up to 1,024 GPUs; writes results/benchmarks/scaling.json

The counts of arithmetic, bytes and memory are those of the code; loss.json and step.json have measured the arithmetic.
The rates that turn counts into seconds are assumptions. They are listed in `ASSUMED`, and each is an argument of
`predict`.
"""

from pathlib import Path

from benchmarks.measurement import RESULTS, argument_parser, environment, write_result

MODALITIES = 3
ASSUMED = {
    "flops_per_second": 400e12,  # of one GPU: 40 % of an H100's 989e12 in bfloat16
    "bytes_per_second": 40e9,  # that one GPU receives: 80 % of a 400 Gb/s link
    "bytes_per_number": 2,  # embeddings in bfloat16; 4 in float32, which they have without autocast
}


def clip_vit_b32_flops(text_tokens: int = 77) -> int:
    """Forward flops per pair of CLIP ViT-B/32 at 224 pixels; a multiply-add is two. Backward has twice as many."""

    def transformer(layers: int, width: int, tokens: int) -> int:
        return layers * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width)

    patches = (224 // 32) ** 2
    embedding = 2 * patches * 3 * 32**2 * 768
    return embedding + transformer(12, 768, patches + 1) + transformer(12, 512, text_tokens)


def loss_flops(num_pairs: int, processes: int, dim: int, half_ring: bool = False, kernels: bool = False) -> float:
    """Flops of one process, forward and backward, for its n = N/W rows.

    The tiles need 36 n²D for the process's own rows, because that block is symmetric. A block with the rows of another
    process takes 54 n²D for one side and 72 n²D for both sides. The half ring computes both sides for half of the other
    processes; if their number is odd, it computes one more from one side. The GPU kernels compute each side separately:
    54 n²D for a side, also of the own block, and 108 n²D for both.
    """
    n, others = num_pairs / processes, processes - 1
    two_sided = others // 2 if half_ring else 0
    one_sided = others - 2 * two_sided
    own, both = (54, 108) if kernels else (36, 72)
    return (own + both * two_sided + 54 * one_sided) * n**2 * dim


def exchanged_bytes(num_pairs: int, processes: int, dim: int, bytes_per_number: int, half_ring: bool = False) -> float:
    """Bytes that one process receives.

    If rows are gathered, these are the embeddings of all others once. In the half ring they are the embeddings of half
    of the others, once forward and once backward, and as many rows of gradients in float32. The sums of exponentials, 9
    numbers per pair, are left out.
    """
    numbers = MODALITIES * num_pairs * dim * (processes - 1) / processes
    return numbers * (bytes_per_number + 4 / 2 if half_ring else bytes_per_number)


def loss_memory(num_pairs: int, processes: int, dim: int, bytes_per_number: int, half_ring: bool = False) -> float:
    """Bytes that one process needs for the rows of others, without the tiles.

    If rows are gathered, these are the rows of all. In the half ring they are the visiting rows, the rows that arrive
    next, and two sets of float32 gradients.
    """
    own = MODALITIES * num_pairs / processes * dim
    if processes == 1:
        return 0.0
    return own * (2 * bytes_per_number + 2 * 4 if half_ring else processes * bytes_per_number)


def predict(
    num_pairs: int,
    processes: int,
    dim: int,
    encoder_flops: float,
    *,
    flops_per_second: float,
    bytes_per_second: float,
    bytes_per_number: int,
    half_ring: bool = False,
) -> dict[str, float]:
    """
    Predict one step of N pairs on W GPUs, whose towers take `encoder_flops` forward per pair. Nothing overlaps.

    Returns:
        - seconds of `encoder` (forward and backward, without GradCache), `loss` and `exchange`;
        - `loss_share`: the share of `loss` and `exchange` in all three;
        - `memory`: bytes of the loss on one GPU.
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


def main() -> None:
    parser = argument_parser("scaling", __doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--pairs", type=int, default=1024, help="pairs on each GPU")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--text_tokens", type=int, default=77, help="tokens of each text, including padding")
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
    # the N at which loss and towers have equally much arithmetic, for any W
    assumptions["pairs_where_loss_equals_encoder"] = 3 * encoder_flops / (54 * arguments.dim)
    write_result(arguments.out, {"environment": environment(threads=1), "assumptions": assumptions, "rows": rows})
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
