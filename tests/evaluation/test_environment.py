import json
import os
import platform
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from universal_gcl.evaluation import environment
from universal_gcl.evaluation.environment import PACKAGE, collect_environment, command_line, git_state, own_version

UNKNOWN = {"sha": None, "dirty": None}


def git(folder, *arguments):
    identity = ("-c", "user.name=tester", "-c", "user.email=tester@example.org", "-c", "core.hooksPath=/dev/null")
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit_all(folder):
    git(folder, "init", "-q")
    git(folder, "add", "--all")
    git(folder, "commit", "-q", "-m", "first")
    return git(folder, "rev-parse", "HEAD")


def copy_package(folder):
    """What an installation has of us: the packages, without setup.cfg."""
    for name in ("environment.py", "__init__.py"):
        target = folder / "universal_gcl" / "evaluation" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / "evaluation" / name, target)
    shutil.copy(PACKAGE / "__init__.py", folder / "universal_gcl" / "__init__.py")
    return folder / "universal_gcl"


def copy_source(folder):
    """What a clone has: the packages and setup.cfg."""
    package = copy_package(folder)
    (folder / "setup.cfg").write_text("[metadata]\nname = universal-gcl\nversion = 7.8.9\n")
    return package


def test_environment_is_complete():
    found = collect_environment()
    assert json.loads(json.dumps(found)) == found
    assert found["python"] == platform.python_version()
    assert found["version"] and found["packages"]["torch"] == torch.__version__
    assert found["cpu"]["name"] and found["cpu"]["cores"] >= 1
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert (found["image_backend"] == "torchvision") == ("torchvision" in found["packages"])
    assert platform.node() not in json.dumps(found)  # the machine's name is nobody's business


def test_absent_packages_are_left_out(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    assert list(environment.package_versions()) == ["torch"]


def test_a_clone_of_ours_has_its_commit(tmp_path):
    package = copy_source(tmp_path)
    git(tmp_path, "init", "-q")
    assert git_state(package) == UNKNOWN  # no commit yet
    sha = commit_all(tmp_path)
    assert git_state(package) == {"sha": sha, "dirty": False}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "new.json").touch()
    assert git_state(package) == {"sha": sha, "dirty": True}
    assert git_state(package, leave_out=["results"]) == {"sha": sha, "dirty": False}
    assert own_version(package) == "7.8.9"


def test_an_installation_in_a_foreign_repository_has_no_commit(tmp_path):
    """In a virtual environment inside a user's repository, or as a copy of our whole source."""
    installed = copy_package(tmp_path / ".venv" / "lib" / "site-packages")
    vendored = copy_source(tmp_path / "third_party" / "gcl")
    commit_all(tmp_path)
    assert git_state(installed) == git_state(vendored) == UNKNOWN
    assert own_version(installed) == environment.version("universal-gcl") and own_version(vendored) == "7.8.9"


def test_a_foreign_repository_at_our_own_root_has_no_commit(tmp_path):
    package = copy_package(tmp_path)
    commit_all(tmp_path)
    assert git_state(package) == UNKNOWN  # no setup.cfg
    (tmp_path / "setup.cfg").write_text("[metadata]\nname = somebody-elses\n")
    assert git_state(package) == UNKNOWN
    (tmp_path / "setup.cfg").write_text("no section")
    assert git_state(package) == UNKNOWN
    (tmp_path / "setup.cfg").write_text("[metadata]\nname = universal-gcl\n")
    assert git_state(package)["sha"]
    git(tmp_path, "rm", "-r", "-q", "--cached", "universal_gcl")
    assert git_state(package) == UNKNOWN  # the files are not those of the commit


def test_without_a_repository_there_is_no_commit(tmp_path):
    assert git_state(tmp_path / "nowhere") == git_state(copy_source(tmp_path)) == UNKNOWN


def test_the_repository_of_a_git_hook_is_not_ours(tmp_path, monkeypatch):
    """In a hook, git's variables name the repository whose hook runs; they win over the folder."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    package = copy_source(ours)
    sha = commit_all(ours)
    theirs.mkdir()
    (theirs / "file").touch()
    commit_all(theirs)
    monkeypatch.setenv("GIT_DIR", str(theirs / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(theirs))
    assert git_state(package) == {"sha": sha, "dirty": False}


def test_secrets_stay_out_of_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "r.yaml", "--hub_token", "hf_abc", "--seed", "1"])
    assert command_line().endswith("train.py r.yaml --hub_token '***' --seed 1")
    monkeypatch.setattr(sys, "argv", ["train.py", "r.yaml", "--training.hub-token=hf_abc", "--seed", "1"])
    assert command_line().endswith("train.py r.yaml '--training.hub-token=***' --seed 1")
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token"])
    assert command_line().endswith("train.py --hub_token")


ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({}, "python"),
        (ACCELERATE, "accelerate launch"),
        (ACCELERATE | {"WORLD_SIZE": "2"}, "accelerate launch --multi_gpu --num_processes 2"),
        (
            ACCELERATE | {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"},
            "accelerate launch --use_fsdp --num_processes 2",
        ),
        (
            ACCELERATE | TORCHRUN | {"WORLD_SIZE": "16", "GROUP_WORLD_SIZE": "2"},
            "accelerate launch --multi_gpu --num_processes 16 --num_machines 2",
        ),
        (TORCHRUN | {"WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}, "torchrun --nproc_per_node 2"),
        (TORCHRUN | {"WORLD_SIZE": "16", "GROUP_WORLD_SIZE": "2"}, "torchrun --nproc_per_node 8 --nnodes 2"),
    ],
)
def test_the_command_names_its_launcher(variables, launcher, monkeypatch):
    for name in ("WORLD_SIZE", "GROUP_WORLD_SIZE", *ACCELERATE, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["train.py", "r.yaml"])
    assert command_line() == f"{launcher} train.py r.yaml"
    monkeypatch.setattr("sys.argv", ["/home/me/.venv/bin/gcl", "evaluate", "pairs", "my model"])
    program = "gcl" if launcher == "python" else f"{launcher} -m universal_gcl"
    assert command_line() == f"{program} evaluate pairs 'my model'"


# A package named as ours, whose modules print the command that would be recorded.
PRINTS = "from universal_gcl.evaluation.environment import command_line\nimport os\n"
PRINTS += "if __name__ == '__main__' and os.environ.get('RANK', '0') == '0':\n    print('RECORDED', command_line())\n"


@pytest.fixture
def printing_package(tmp_path):
    package = copy_package(tmp_path)
    for name in ("__main__.py", "cli.py", "train.py"):
        (package / name).write_text(PRINTS)
    for name in ("train.py", "gcl"):
        (tmp_path / name).write_text(PRINTS)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        ("python train.py r.yaml", None),
        ("python gcl evaluate pairs", "gcl evaluate pairs"),
        ("python -m universal_gcl evaluate pairs 'my model'", None),
        ("python -m universal_gcl.cli evaluate pairs", None),
        ("accelerate launch -m universal_gcl.cli evaluate pairs", None),
        ("accelerate launch --multi_gpu --num_processes 2 -m universal_gcl.train r.yaml", None),
        ("torchrun --nproc_per_node 2 -m universal_gcl.cli evaluate pairs", None),
    ],
)
def test_what_was_typed_is_recorded(typed, recorded, printing_package):
    launchers = {
        "python": [sys.executable],
        "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--master_port", "0"],
    }
    launcher, *rest = shlex.split(typed)
    run = subprocess.run(
        [*launchers[launcher], *rest], cwd=printing_package, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(printing_package), "HF_HOME": str(printing_package / "hf")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("RECORDED ")]
    assert lines == [f"RECORDED {recorded or typed}"]
