"""MixBench, and your own data in its layout, for commands and cards."""

from collections.abc import Mapping

from universal_gcl.evaluation.benchmark_report import Line, RankedTasks
from universal_gcl.evaluation.mixbench.command import mixbench
from universal_gcl.evaluation.mixbench.subsets import HUB_ID, PUBLISHED
from universal_gcl.evaluation.protocol import HubDataset, Protocol, skipped_notes, slug


class MixBenchProtocol(Protocol):
    """Each subset is one mixed pool; nDCG@10 over all queries, then by the modality of the relevant document."""

    name = "mixbench"
    command = staticmethod(mixbench)

    def title(self, run: Mapping) -> str:
        return "MixBench" if _is_published(run) else "Data in MixBench's layout"

    def tables(self, run: Mapping, *, markdown: bool) -> list[str]:
        from universal_gcl.evaluation.mixbench.report import mixbench_table

        return [mixbench_table(run["result"]["subsets"], markdown=markdown)]

    def notes(self, run: Mapping) -> list[str]:
        return skipped_notes(run)

    def name_parts(self, run: Mapping) -> list[str]:
        return [] if _is_published(run) else sorted(map(slug, run["result"]["subsets"]))

    def figures(self, run: Mapping) -> dict[Line, float | None]:
        subsets = run["result"]["subsets"]
        figures = {
            Line("mixed", name, subset["direction"], "ndcg@10"): subset["ndcg@10"] for name, subset in subsets.items()
        }
        for modality in next(iter(subsets.values()))["by_target"]:
            for name, subset in subsets.items():
                line = Line(f"mixed, {modality} relevant", name, subset["direction"], "ndcg@10")
                figures[line] = subset["by_target"][modality]["ndcg@10"]
        return figures

    def conditions(self, run: Mapping) -> dict[str, object]:
        subsets = run["result"]["subsets"]
        conditions: dict[str, object] = {"the choice of subsets": list(subsets)}
        counts = ("queries", "candidates", "corpus")
        return conditions | {f"{name}: {key}": subset[key] for name, subset in subsets.items() for key in counts}

    def ranked_tasks(self, run: Mapping) -> RankedTasks:
        subsets = run["result"]["subsets"]
        return RankedTasks(
            pool="local",
            directions={name: subset["direction"] for name, subset in subsets.items()},
            queries={name: subset["queries"] for name, subset in subsets.items()},
        )

    def hub_dataset(self, run: Mapping) -> HubDataset | None:
        if not _is_published(run):
            return None
        return HubDataset(id=run["hub"] or HUB_ID, revision=run["hub_commit"], pools={"mixed": ""})


def _is_published(run: Mapping) -> bool:
    """Whether the subsets are MixBench's and not a user's own."""
    return set(run["result"]["subsets"]) <= set(PUBLISHED)


PROTOCOL = MixBenchProtocol()
