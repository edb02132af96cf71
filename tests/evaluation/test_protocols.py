"""Protocols: each benchmark has one, nothing else switches on a benchmark's name, and a new one needs nothing more."""

import ast
import json
from pathlib import Path

import pytest
import typer

from universal_gcl.evaluation import protocols
from universal_gcl.evaluation.benchmark_report import Line
from universal_gcl.evaluation.commands.app import app
from universal_gcl.evaluation.commands.compare import compare
from universal_gcl.evaluation.protocol import Protocol
from universal_gcl.evaluation.protocols import PROTOCOLS, protocol_of, read_run, read_runs

ROOT = Path(__file__).parents[2]
NAMES = [protocol.name for protocol in PROTOCOLS]


def test_each_protocol_is_a_folder_and_a_command():
    commands = typer.main.get_command(app).commands
    for name in NAMES:
        assert (ROOT / "universal_gcl" / "evaluation" / name / "protocol.py").is_file()
        assert name in commands
    assert len(set(NAMES)) == len(NAMES)


def compared_constants(path):
    """The strings that a module compares with something, with their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", part.value


def test_no_module_asks_for_the_name_of_a_benchmark():
    modules = [
        *(ROOT / "universal_gcl" / "evaluation").rglob("*.py"),
        *(ROOT / "universal_gcl/publishing").rglob("*.py"),
    ]
    assert len(modules) > 40
    assert not [place for path in modules for place, text in compared_constants(path) if text in NAMES]


def test_published_results_are_read_and_compared():
    runs = {name: ROOT / "results" / "flickr8k" / "runs" / f"{name}.json" for name in ("centred", "stage1")}
    protocol, found = read_runs(runs)
    assert protocol.name == "pairs" and found["centred"]["protocol"] == "pairs"
    assert "| centred | stage1 |" in protocol.comparison(found, markdown=True)
    title = protocol.title(found["centred"])
    assert title.startswith("Nine directions on ") and protocol.file_name(found["centred"]).startswith("pairs-")


class QuizProtocol(Protocol):
    """A benchmark of one figure."""

    name = "quiz"

    def title(self, run):
        return "Quiz"

    def tables(self, run, *, markdown):
        return [f"accuracy {run['result']['accuracy']}"]

    def figures(self, run):
        return {Line("all", "quiz", "t→i", "accuracy"): run["result"]["accuracy"]}

    def conditions(self, run):
        return {"questions": run["result"]["questions"]}


@pytest.fixture
def quiz(tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "PROTOCOLS", (*PROTOCOLS, QuizProtocol()))
    for name, accuracy in (("a", 0.25), ("b", 0.5)):
        (tmp_path / name).mkdir()
        written = {"protocol": "quiz", "result": {"accuracy": accuracy, "questions": 8}}
        (tmp_path / name / "results.json").write_text(json.dumps(written))
    return tmp_path


def test_a_new_benchmark_is_compared_and_drawn_without_more(quiz, capsys):
    compare([str(quiz / "a"), str(quiz / "b")], quiz / "out", ("A", "B"))
    assert "50.0  +25.0" in capsys.readouterr().out
    assert {path.name for path in (quiz / "out").iterdir()} == {"compare.md", "directions.png"}
    run = read_run(quiz / "a")
    protocol = protocol_of(run)
    assert (protocol.file_name(run), protocol.notes(run), protocol.hub_dataset(run)) == ("quiz", [], None)
    written = {"protocol": "quiz", "result": {"accuracy": 0.5, "questions": 9}}
    (quiz / "b" / "results.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="A and B are not comparable: questions differs, 8 and 9"):
        compare([str(quiz / "a"), str(quiz / "b")], None, ("A", "B"))
