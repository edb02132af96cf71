"""A built wheel in an environment that holds nothing else, used from a folder outside the clone: `make test-wheel`.

Each test runs the installed `gcl` in a process of its own, as a user without a clone would.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.support.checkout import ROOT, copy_checkout

pytestmark = pytest.mark.wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of the commands of an environment in which the wheel and the extra `train` are installed."""
    folder = tmp_path_factory.mktemp("installed")
    source, wheels, environment = folder / "source", folder / "wheels", folder / "environment"
    copy_checkout(source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, source], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    commands = environment / "bin"
    requirement = f"universal-gcl[train] @ {wheel.as_uri()}"
    constraints = ["-c", ROOT / "constraints-cpu.txt"]
    subprocess.run([commands / "python", "-m", "pip", "install", "-q", *constraints, requirement], check=True)
    return commands


@pytest.fixture
def run(installed, tmp_path):
    """Runs an installed command in an empty folder, without anything of this checkout; returns what it printed."""

    def run(command, *arguments, folder=tmp_path):
        hidden = ("PYTHONPATH", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"PYTHONSAFEPATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        line = [installed / command, *map(str, arguments)]
        done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return run


def test_help_lists_the_commands(run):
    listed = run("gcl", "--help")
    for command in ("train", "embed", "search", "evaluate", "convert", "card", "push"):
        assert f" {command} " in listed


def test_two_import_names_are_claimed(installed, run):
    """`top_level.txt` is what an installation adds to the names that Python can import."""
    code = "from importlib.metadata import distribution as d; print(d('universal-gcl').read_text('top_level.txt'))"
    assert run("python", "-c", code).split() == ["modeling_gcl", "universal_gcl"]
    site_packages = next((installed.parent / "lib").glob("python*/site-packages"))
    claimed = {line.split(",")[0].split("/")[0] for line in _record(site_packages) if not line.startswith("..")}
    assert {name for name in claimed if not name.endswith(".dist-info")} == {"modeling_gcl", "universal_gcl"}


def _record(site_packages):
    (record,) = site_packages.glob("universal_gcl-*.dist-info/RECORD")
    return record.read_text().splitlines()


def test_training_evaluation_and_card(run, recipe, tmp_path):
    """Two steps by the installed entry point, its card written again, its model evaluated, all outside a clone."""
    run("gcl", "train", recipe, "--max_steps", "2")
    model = tmp_path / "out" / "model"
    results = json.loads((model / "results.json").read_text())
    assert results["command"].startswith("gcl train ") and results["after"]["headline"]
    assert results["environment"]["git"] == {"sha": None, "dirty": None}, "this is no checkout"
    assert "# " in (model / "README.md").read_text()
    (model / "README.md").unlink()
    run("gcl", "card", model)
    assert "# " in (model / "README.md").read_text()
    run("gcl", "evaluate", "pairs", model, tmp_path / "eval.parquet", "--out", tmp_path / "evaluated")
    assert json.loads((tmp_path / "evaluated" / "results.json").read_text())["after"]["headline"]


def test_a_shipped_recipe_is_found_by_its_name(run):
    code = "from universal_gcl.training.recipe import parse_recipe; print(parse_recipe(['finetune']).training.loss)"
    assert "gcl" in run("python", "-c", code)


def test_a_users_own_modules_go_on_working(run, tmp_path):
    """Folders without `__init__.py` are the ones that an installed package of their name would hide."""
    for name in ("training", "evaluation", "retrieval", "publishing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"NAME = 'my {name}'\n")
    for name in ("gcl", "train"):
        (tmp_path / f"{name}.py").write_text(f"NAME = 'my {name}'\n")
    (tmp_path / "project.py").write_text(
        "import gcl, train\n"
        "from evaluation import mine as evaluation\nfrom publishing import mine as publishing\n"
        "from retrieval import mine as retrieval\nfrom training import mine as training\n"
        "import universal_gcl.training.trainer, universal_gcl.evaluation.session\n"
        "for module in (gcl, train, training, evaluation, retrieval, publishing):\n    print(module.NAME)\n"
    )
    printed = run("python", "project.py").splitlines()
    assert printed == [f"my {name}" for name in ("gcl", "train", "training", "evaluation", "retrieval", "publishing")]
    assert "Commands" in run("gcl", "--help")
