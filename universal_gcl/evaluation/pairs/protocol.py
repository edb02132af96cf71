"""Nine-way retrieval on image-caption pairs, for commands and cards.

A run is the `results.json` of `gcl evaluate pairs` or of a training run: both hold the result under `"after"`.
"""

from collections.abc import Mapping
from pathlib import Path

from universal_gcl.evaluation.pairs.command import pairs
from universal_gcl.evaluation.protocol import Protocol, slug


class PairsProtocol(Protocol):
    """Nine directions in two pools, mixed search and the modality gap. The Hub has no data set of them, so there are
    no `figures` for its model index; tables and comparisons are those of `evaluation.pairs.report`."""

    name = "pairs"
    command = staticmethod(pairs)

    def holds(self, written: Mapping) -> bool:
        return bool(written.get("after"))

    def title(self, run: Mapping) -> str:
        return f"Nine directions on {Path(run['data']).name}"

    def tables(self, run: Mapping, *, markdown: bool) -> list[str]:
        from universal_gcl.evaluation.pairs.report import nine_way_markdown, nine_way_table

        return [nine_way_markdown({"this model": run["after"]}) if markdown else nine_way_table(run["after"])]

    def name_parts(self, run: Mapping) -> list[str]:
        return [slug(Path(run["data"]).name)]

    def comparison(self, runs: Mapping[str, Mapping], *, markdown: bool = False) -> str:
        from universal_gcl.evaluation.pairs.report import nine_way_markdown, nine_way_table

        results = {name: run["after"] for name, run in runs.items()}
        return nine_way_table(*results.values()) if len(results) == 2 and not markdown else nine_way_markdown(results)

    def draw_comparison(self, runs: Mapping[str, Mapping], folders: Mapping[str, Path], out: Path) -> list[str]:
        from universal_gcl.evaluation.pairs.plots import nine_way_heatmap

        if len(runs) == 2:
            before, after = (run["after"] for run in runs.values())
            nine_way_heatmap(before, after, out / "nine_way.png", labels=list(runs))
        return []


PROTOCOL = PairsProtocol()
