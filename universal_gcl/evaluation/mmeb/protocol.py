"""MMEB for commands and cards."""

from collections.abc import Mapping

from universal_gcl.evaluation.benchmark_report import Line
from universal_gcl.evaluation.mmeb.command import mmeb
from universal_gcl.evaluation.mmeb.sets import HUB_IDS, PAPER_DIRECTIONS
from universal_gcl.evaluation.protocol import HubDataset, Protocol, instructions_note


class MMEBProtocol(Protocol):
    """36 image sets in two versions; each query has its own candidates, so the pool is called `own`."""

    name = "mmeb"
    command = staticmethod(mmeb)

    def title(self, run: Mapping) -> str:
        return f"MMEB, version {run['version']}"

    def tables(self, run: Mapping, *, markdown: bool) -> list[str]:
        from universal_gcl.evaluation.mmeb.report import mmeb_table

        return [mmeb_table(run["result"], markdown=markdown)]

    def notes(self, run: Mapping) -> list[str]:
        return [instructions_note(run)]

    def name_parts(self, run: Mapping) -> list[str]:
        return [f"v{run['version']}"] if run["version"] != 1 else []

    def figures(self, run: Mapping) -> dict[Line, float | None]:
        return {
            Line("own", name, PAPER_DIRECTIONS.get(name, one["category"]), "precision@1"): one["precision@1"]
            for name, one in run["result"]["sets"].items()
        }

    def conditions(self, run: Mapping) -> dict[str, object]:
        result = run["result"]
        conditions: dict[str, object] = {"the choice of sets": list(result["sets"])}
        conditions |= {key: result[key] for key in ("version", "instructions")}
        counts = ("queries", "candidates", "distinct_candidates")
        return conditions | {f"{name}: {key}": one[key] for name, one in result["sets"].items() for key in counts}

    def hub_dataset(self, run: Mapping) -> HubDataset:
        official = HUB_IDS[run["version"]]
        is_official = run["hub"] and run["hub"].partition("@")[0] == official
        return HubDataset(id=official, revision=run["hub_commit"] if is_official else None, pools={"own": ""})


PROTOCOL = MMEBProtocol()
