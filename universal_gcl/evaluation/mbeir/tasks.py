"""The tasks of M-BEIR (UniIR, arXiv 2311.17136) and its rules for texts, as UniIR's code has them (98dc570)."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from modeling_gcl.modalities import IN_DATA, direction

SEED = 2023  # UniIR's seed for drawing instructions

_SHORT = {name: modality for modality, name in IN_DATA.items()}  # as in the data → as in tables
_DATASETS = {  # name in file names → name in the paper, and the id before the colon of qids and dids
    "visualnews": ("VisualNews", "0"),
    "fashion200k": ("Fashion200K", "1"),
    "webqa": ("WebQA", "2"),
    "edis": ("EDIS", "3"),
    "nights": ("NIGHTS", "4"),
    "oven": ("OVEN", "5"),
    "infoseek": ("InfoSeek", "6"),
    "fashioniq": ("FashionIQ", "7"),
    "cirr": ("CIRR", "8"),
    "mscoco": ("MSCOCO", "9"),
}
_DIRECTIONS = {  # task id → modalities of queries and candidates; 5 is unused
    "0": ("text", "image"),
    "1": ("text", "text"),
    "2": ("text", "image,text"),
    "3": ("image", "text"),
    "4": ("image", "image"),
    "6": ("image,text", "text"),
    "7": ("image,text", "image"),
    "8": ("image,text", "image,text"),
}


@dataclass(frozen=True)
class MBEIRTask:
    """
    Attributes:
        name: as in file names, e.g. `"cirr_task7"`.
        dataset: as in the paper, e.g. `"CIRR"`.
        dataset_id: as in qids and in the file of instructions; None for a user's own data set.
        query, candidate: modalities, as in the data: `text`, `image` or `image,text`.
        pool: the name of its local pool, as in file names.
        k: the cut-off of Recall@k on the local pool.
    """

    name: str
    dataset: str
    dataset_id: str | None
    query: str
    candidate: str
    pool: str
    k: int

    @property
    def direction(self) -> str:
        return direction(_SHORT[self.query], _SHORT[self.candidate])


def parse_task(name: str) -> MBEIRTask:
    """The task called DATASET_taskN, where N says which modality searches which. The data set may be a user's own in
    M-BEIR's layout.

    Raises:
        ValueError: the name has another form.
    """
    match = re.fullmatch(r"(\w+)_task(\d)", name)
    if match is None or match[2] not in _DIRECTIONS:
        known = ", ".join(f"{number} {direction(_SHORT[q], _SHORT[c])}" for number, (q, c) in _DIRECTIONS.items())
        names = ", ".join(task.name for task in TASKS)
        raise ValueError(
            f"{name!r} is not a task: choose from {names}; or DATASET_taskN for your own data, with N one of {known}"
        )
    dataset, dataset_id = _DATASETS.get(match[1], (match[1], None))
    query, candidate = _DIRECTIONS[match[2]]
    # MSCOCO has separate pools for validation and test
    pool = f"{name}_test" if match[1] == "mscoco" else name
    return MBEIRTask(name, dataset, dataset_id, query, candidate, pool, 10 if "fashion" in match[1] else 5)


# in the order of the paper's tables
TASKS = tuple(
    map(
        parse_task,
        (
            "visualnews_task0", "mscoco_task0", "fashion200k_task0", "webqa_task1", "edis_task2", "webqa_task2",
            "visualnews_task3", "mscoco_task3", "fashion200k_task3", "nights_task4", "oven_task6", "infoseek_task6",
            "fashioniq_task7", "cirr_task7", "oven_task8", "infoseek_task8",
        ),
    )
)  # fmt: skip


def choose_tasks(names: Sequence[str] | None, tests: Sequence[str] = (), pools: Sequence[str] = ()) -> list[MBEIRTask]:
    """The tasks with these names; M-BEIR's come in the paper's order.

    Args:
        names: default: the user's own tests if there are any, else M-BEIR's 16.
        tests, pools: names of the tests and pools that exist. A user's task without a pool of its own name searches the
            pool of its data set that has candidates of the same modality.

    Raises:
        ValueError: a name is not a task or is repeated, or M-BEIR's tasks are chosen together with others, for which no
            global pool is defined.
    """
    if not names:
        names = sorted(set(tests) - {task.name for task in TASKS})
        if names and len(names) < len(tests):
            raise ValueError(
                f"the folder holds {', '.join(names)} and tasks of M-BEIR: choose tasks of one kind with --tasks"
            )
        if not names:
            return list(TASKS)
    tasks = [parse_task(name) for name in names]
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"a task is named twice: {', '.join(names)}")
    own = [task.name for task in tasks if task not in TASKS]
    if own and len(own) < len(tasks):
        raise ValueError(
            f"{', '.join(own)}: not tasks of M-BEIR, so they have no part in its global pool; run them separately"
        )
    return [_with_pool(task, pools) for task in tasks] if own else [task for task in TASKS if task in tasks]


def _with_pool(task: MBEIRTask, pools: Sequence[str]) -> MBEIRTask:
    """A user's own task with a pool that exists."""
    others = [parse_task(name) for name in sorted(pools) if name.startswith(f"{task.dataset}_task")]
    found = [other.name for other in others if other.candidate == task.candidate]
    return task if task.pool in pools or not found else replace(task, pool=found[0])


@lru_cache(maxsize=64)  # called millions of times with three values
def parse_modality(value: str | None) -> str:
    """The modality as `IN_DATA` spells it; `text,image` and blanks are accepted too.

    Raises:
        ValueError: an unknown modality.
    """
    parts = sorted(part.strip().lower() for part in str(value).split(","))
    modality = ",".join(parts)
    if modality not in _SHORT:
        raise ValueError(f"the modality is {value!r}, not one of {', '.join(_SHORT)}")
    return modality


def clean_text(text: str | None) -> str:
    """The text as UniIR embeds it: carriage returns are removed, then blanks and then double quotes at both ends; the
    first letter is in upper case; a period is added unless the text ends in `.`, `?` or `!`. `""` for no text."""
    text = (text or "").replace("\r", "").strip().strip('"')
    if text:
        text = text[0].upper() + text[1:]
        text = text if text[-1] in ".?!" else f"{text}."
    return text


def instructed_text(prompts: Sequence[str], text: str | None, qid: str) -> str:
    """One of the prompts, followed by a query's text. An image query gets the prompt as its text, as in UniIR.

    The prompt is drawn from `SEED` and the query's id, so that neither the order of the queries nor the number of
    processes matters. UniIR draws from one stream per worker, which can't be reproduced.
    """
    prompt = clean_text(random.Random(f"{SEED} {qid}").choice(prompts))
    return clean_text(f"{prompt} {text or ''}")
