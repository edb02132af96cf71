"""The figures that this project set out to reach. Each is read from one benchmark's results, so from one run."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Result = dict[str, Any]  # the JSON that a benchmark wrote
Figure = dict[str, float] | float  # {median, min, max}, or one number

E_AT_8192 = 3 * 8192 * 512 * 4  # bytes of the embeddings, D = 512, float32


class Goal(NamedTuple):
    """
    Attributes:
        what: the goal in words.
        benchmark: whose result holds the figure.
        figure: reads the figure from the result; raises KeyError if it was not measured.
        at_least, aim: the limits.
        shown: how limits and figure are written, with `{}` in the place of the number.
    """

    what: str
    benchmark: str
    figure: Callable[[Result], Figure]
    at_least: float
    aim: float
    lower_is_better: bool
    shown: str = "{}"

    def verdict(self, value: float) -> str:
        """Whether a value is "aim reached", "reached" or "missed"."""
        sign = -1 if self.lower_is_better else 1
        if sign * value >= sign * self.aim:
            return "aim reached"
        return "reached" if sign * value >= sign * self.at_least else "missed"


def at(*path: str, by: float = 1.0) -> Callable[[Result], Figure]:
    """Reads the figure at a path of keys and divides it by a number."""

    def figure(result: Result) -> Figure:
        found: Any = result
        for key in path:
            found = found[key]
        if isinstance(found, dict):
            return {name: found[name] / by for name in ("median", "min", "max")}
        return found / by

    return figure


def inverse(*path: str) -> Callable[[Result], Figure]:
    """Reads a ratio of seconds to those of a slower reference, as how many times faster it is."""

    def figure(result: Result) -> Figure:
        ratio = at(*path)(result)
        assert isinstance(ratio, dict)
        return {"median": 1 / ratio["median"], "min": 1 / ratio["max"], "max": 1 / ratio["min"]}

    return figure


def faster(
    what: str, variant: str, num_pairs: int, at_least: float, aim: float, benchmark: str = "loss"
) -> Iterator[Goal]:
    """Two goals against a peer: for the tiles in fp32, and in bf16 with all tiles kept, for which the aim is set."""
    for ours, how in (("tiles", "fp32"), ("tiles_bf16_all_kept", "bf16, all kept")):
        path = ("sizes", str(num_pairs), variant, "ratio_to", ours)
        yield Goal(
            f"against {what}, {num_pairs:,} pairs, {how}", benchmark, at(*path), at_least, aim, False, "{} × faster"
        )


GOALS = (
    Goal(
        "time relative to matrix products of 36 N²D flops, 4,096 pairs, fp32", "loss",
        at("sizes", "4096", "tiles", "to_gemm"), 1.3, 1.1, True,
    ),
    *faster("autograd in one line", "autograd", 4096, 1.7, 4),
    *faster("autograd in one line", "autograd", 8192, 2, 5),
    *faster("open_clip's loss × 3 (two thirds of the logits)", "open_clip_three_times", 4096, 1.1, 2.5),
    *faster(
        "GCL computed by sentence-transformers' cached loss at 1024", "sentence_transformers_gcl_1024", 4096, 2, 4,
        "loss-sentence-transformers",
    ),
    *faster(
        "sentence-transformers' cached loss at 1024, CL × 3 (two thirds of the logits)", "sentence_transformers_1024",
        4096, 2, 4, "loss-sentence-transformers",
    ),
    Goal(
        "peak memory beyond embeddings E and their gradients, 8,192 pairs, fp32", "loss",
        at("sizes", "8192", "tiles", "bytes", by=E_AT_8192), 6 + 64e6 / E_AT_8192, 3, True, "{} × E",
    ),
    Goal(
        "counted flops relative to 36 N²D, 4,096 pairs", "loss",
        at("gates", "tiles", "flops_by_n2d", by=36), 1.05, 1.01, True,
    ),
    Goal(
        "a step with GradCache relative to the plain step", "step",
        at("step", "1", "grad_cache", "ratio_to", "plain"), 1.45, 1.33, True,
    ),
    *(
        Goal(
            f"preprocessing against the image processor, per core, {pixels}", "pipeline",
            inverse("data", "made", "images", variant, "ratio_to", "processor_on_pil"), 3, 5, False, "{} × faster",
        )
        for variant, pixels in (("fast", "float32 pixels"), ("fast_uint8", "uint8 pixels (the device normalises)"))
    ),
    *(
        Goal(
            f"exact search against faiss's flat index, 1M × 512, 1,024 queries, `{pool}`", "search",
            inverse("pools", pool, "kept", "ratio_to", "faiss_flat"), 2, 3, False, "{} × faster",
        )
        for pool in ("sphere", "cone")
    ),
)  # fmt: skip
