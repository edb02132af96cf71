"""M-BEIR, and your own data in its layout, for commands and cards."""

from collections.abc import Mapping

from universal_gcl.evaluation.benchmark_report import Line, RankedTasks
from universal_gcl.evaluation.mbeir.command import Scope, mbeir
from universal_gcl.evaluation.protocol import HubDataset, Protocol, instructions_note, slug


class MBEIRProtocol(Protocol):
    """16 tasks in local pools and the global one; the metric of each is the one that the paper reports."""

    name = "mbeir"
    command = staticmethod(mbeir)

    def title(self, run: Mapping) -> str:
        return "M-BEIR" if _is_published(run) else "Data in M-BEIR's layout"

    def tables(self, run: Mapping, *, markdown: bool) -> list[str]:
        from universal_gcl.evaluation.mbeir.report import mbeir_table

        return [mbeir_table(run["result"], scope, markdown=markdown) for scope in run["scopes"]]

    def notes(self, run: Mapping) -> list[str]:
        return [instructions_note(run)]

    def name_parts(self, run: Mapping) -> list[str]:
        own = (
            [] if _is_published(run) else sorted({slug(name.partition("_task")[0]) for name in run["result"]["tasks"]})
        )
        return own + (["instructions"] if run["instructions"] else [])

    def figures(self, run: Mapping) -> dict[Line, float | None]:
        figures = {}
        for scope in map(str, Scope):
            for name, task in run["result"]["tasks"].items():
                if scope in task:
                    metric = task[scope]["paper_metric"]
                    figures[Line(scope, name, task["direction"], metric)] = task[scope][metric]
        return figures

    def conditions(self, run: Mapping) -> dict[str, object]:
        tasks = run["result"]["tasks"]
        conditions: dict[str, object] = {"the choice of tasks": list(tasks)}
        for scope in map(str, Scope):
            for name, task in tasks.items():
                conditions |= {f"{name}: {key}": task[key] for key in ("direction", "queries", "pool")}
                conditions[f"{name}: the choice of pools"] = [str(scope) for scope in Scope if scope in task]
                if scope in task:
                    counts = ("candidates", "positives_outside")
                    conditions |= {f"{name}, {scope}: {key}": task[scope][key] for key in counts}
        return conditions

    def ranked_tasks(self, run: Mapping) -> RankedTasks:
        tasks = run["result"]["tasks"]
        return RankedTasks(
            pool="global" if any("global" in task for task in tasks.values()) else "local",
            directions={name: task["direction"] for name, task in tasks.items()},
            queries={name: task["queries"] for name, task in tasks.items()},
        )

    def hub_dataset(self, run: Mapping) -> HubDataset | None:
        if not _is_published(run):
            return None
        return HubDataset(
            id="TIGER-Lab/M-BEIR",
            revision=None,
            pools={"local": "_local", "global": "_global"},
            task_prefix="mbeir_",
            notes=", with instructions" if run.get("instructions") else "",
        )


def _is_published(run: Mapping) -> bool:
    """Whether the tasks are M-BEIR's and not a user's own."""
    from universal_gcl.evaluation.mbeir.tasks import TASKS

    return set(run["result"]["tasks"]) <= {task.name for task in TASKS}


PROTOCOL = MBEIRProtocol()
