"""The figures this project set out to reach, each read from one benchmark's results, that is from one run."""

from collections.abc import Callable
from typing import NamedTuple

E_AT_8192 = 3 * 8192 * 512 * 4  # bytes of the embeddings, D = 512, float32


class Goal(NamedTuple):
    """`figure(result)` gives a number or `{median, min, max}`, and raises KeyError where it was not measured; `shown`
    is put before the limits and behind the figure, `{}` standing for them."""

    what: str
    benchmark: str
    figure: Callable
    at_least: float
    aim: float
    lower_is_better: bool
    shown: str = "{}"

    def verdict(self, value):
        """ "aim reached", "reached" or "missed"."""
        sign = -1 if self.lower_is_better else 1
        if sign * value >= sign * self.aim:
            return "aim reached"
        return "reached" if sign * value >= sign * self.at_least else "missed"


def at(*path, by=1.0):
    """The figure at a path of keys, divided."""

    def figure(result):
        for key in path:
            result = result[key]
        if isinstance(result, dict):
            return {name: result[name] / by for name in ("median", "min", "max")}
        return result / by

    return figure


def inverse(*path):
    """How many times faster, from a ratio of seconds to a slower reference."""

    def figure(result):
        ratio = at(*path)(result)
        return {"median": 1 / ratio["median"], "min": 1 / ratio["max"], "max": 1 / ratio["min"]}

    return figure


def faster(what, variant, num_pairs, at_least, aim, benchmark="loss"):
    """Two goals: the fp32 tiles', and those of bf16 with all tiles kept, for which the aims are."""
    for ours, how in (("tiles", "fp32"), ("tiles_bf16_all_kept", "bf16, all kept")):
        path = ("sizes", str(num_pairs), variant, "ratio_to", ours)
        yield Goal(
            f"against {what}, {num_pairs:,} pairs, {how}", benchmark, at(*path), at_least, aim, False, "{} × faster"
        )


GOALS = (
    Goal(
        "time by that of 36 N²D of matrix products, 4,096 pairs, fp32", "loss",
        at("sizes", "4096", "tiles", "to_gemm"), 1.3, 1.1, True,
    ),
    *faster("autograd in one line", "autograd", 4096, 1.7, 4),
    *faster("autograd in one line", "autograd", 8192, 2, 5),
    *faster("open_clip's loss × 3 (two thirds of the logits)", "open_clip_three_times", 4096, 1.1, 2.5),
    *faster(
        "GCL by sentence-transformers' cached stage at 1024", "sentence_transformers_gcl_1024", 4096, 2, 4,
        "loss-sentence-transformers",
    ),
    *faster(
        "sentence-transformers' cached stage at 1024, CL × 3 (two thirds of the logits)", "sentence_transformers_1024",
        4096, 2, 4, "loss-sentence-transformers",
    ),
    Goal(
        "peak memory beyond embeddings E and their gradients, 8,192 pairs, fp32", "loss",
        at("sizes", "8192", "tiles", "bytes", by=E_AT_8192), 6 + 64e6 / E_AT_8192, 3, True, "{} × E",
    ),
    Goal("counted flops by 36 N²D, 4,096 pairs", "loss", at("gates", "tiles", "flops_by_n2d", by=36), 1.05, 1.01, True),
    Goal(
        "GradCache's step by the plain step", "step",
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
            f"exact search against faiss' flat index, 1M × 512, 1,024 queries, `{pool}`", "search",
            inverse("pools", pool, "kept", "ratio_to", "faiss_flat"), 2, 3, False, "{} × faster",
        )
        for pool in ("sphere", "cone")
    ),
)  # fmt: skip
