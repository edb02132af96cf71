"""WebVid-CoVR for commands and cards."""

from collections.abc import Mapping

from universal_gcl.evaluation.benchmark_report import Line
from universal_gcl.evaluation.covr.command import covr
from universal_gcl.evaluation.covr.report import WEIGHTINGS, covr_table
from universal_gcl.evaluation.protocol import Protocol, skipped_notes


class CoVRProtocol(Protocol):
    """One task in one pool, the gallery; hit@k for each way to join the frames of a video."""

    name = "covr"
    command = staticmethod(covr)

    def title(self, run: Mapping) -> str:
        return "WebVid-CoVR"

    def tables(self, run: Mapping, *, markdown: bool) -> list[str]:
        return [covr_table(run["result"], limit=run.get("limit"), markdown=markdown)]

    def notes(self, run: Mapping) -> list[str]:
        return skipped_notes(run)

    def figures(self, run: Mapping) -> dict[Line, float | None]:
        return {
            Line(f"gallery, {name} of frames", "WebVid-CoVR", "it→video", metric): value
            for name in WEIGHTINGS
            for metric, value in (run["result"][name] or {}).items()
            if metric.startswith("hit@")
        }

    def conditions(self, run: Mapping) -> dict[str, object]:
        result = run["result"]
        counts = {key: result[key] for key in ("rows", "gallery", "coverage", "frames")}
        return counts | {
            "squash": result["source"]["squash"],
            "weighting by scores": result["weighted"] is not None,
        }


PROTOCOL = CoVRProtocol()
