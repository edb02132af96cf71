"""The rooms of the code: what may import what, and that every public function is annotated (see CONTRIBUTING.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
U = "universal_gcl"
# each room: its folder, and the rooms that it may import
FLOORS = {
    "modeling_gcl": ("modeling_gcl", ()),
    f"{U}.sources": (f"{U}/sources", ("modeling_gcl",)),
    f"{U}.retrieval": (f"{U}/retrieval", ("modeling_gcl", f"{U}.sources")),
    f"{U}.application": (f"{U}/application", ("modeling_gcl", f"{U}.sources", f"{U}.retrieval")),
    f"{U}.evaluation": (f"{U}/evaluation", ("modeling_gcl", f"{U}.sources", f"{U}.retrieval")),
    f"{U}.training": (
        "training", ("modeling_gcl", f"{U}.sources", f"{U}.retrieval", f"{U}.evaluation")
    ),
    f"{U}.publishing": (
        f"{U}/publishing", ("modeling_gcl", f"{U}.sources", f"{U}.retrieval", f"{U}.evaluation")
    ),
    f"{U}.conversion": (
        f"{U}/conversion",
        ("modeling_gcl", f"{U}.sources", f"{U}.retrieval", f"{U}.evaluation", f"{U}.publishing"),
    ),
}  # fmt: skip
DATA_ROOM = f"{U}.hub_configs"  # recipes and the card's template: any room may read them
MODULES = [path for folder in ("modeling_gcl", U, "training", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
MODULES = [path for path in MODULES if path.resolve() == path]  # without the links to training/ and hub_configs/


def imported(path):
    """The names of our modules that a file imports, with lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("room", FLOORS)
def test_lower_rooms_never_import_higher_ones(room):
    folder, below = FLOORS[room]
    allowed = (room, DATA_ROOM, *below)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in MODULES
        if path.is_relative_to(ROOT / folder)
        for line, name in imported(path)
        if name != U
        and name.split(".")[0] in ("modeling_gcl", U, "benchmarks", "tests", "train")
        and not any(f"{name}.".startswith(f"{other}.") for other in allowed)
    ]
    assert not wrong


def public_functions(tree):
    """Functions and methods whose names, and whose classes' names, do not begin with an underscore; `__init__` too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not node.name.startswith("_") or node.name in ("__init__", "__call__"):
                yield node


def is_annotated(function):
    arguments = function.args
    everyone = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    named = [argument for argument in everyone if argument is not None and argument.arg not in ("self", "cls")]
    returns = function.returns is not None or function.name == "__init__"
    return returns and all(argument.annotation is not None for argument in named)


def test_every_public_function_is_annotated():
    bare = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        for path in MODULES
        for function in public_functions(ast.parse(path.read_text()))
        if not is_annotated(function)
    ]
    assert not bare
