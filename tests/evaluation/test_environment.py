import json
import platform
import subprocess
import sys

import torch

from universal_gcl.evaluation import environment
from universal_gcl.evaluation.environment import collect_environment, command_line, git_state


def test_environment_is_complete():
    found = collect_environment()
    assert json.loads(json.dumps(found)) == found
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__
    assert found["cpu"]["name"] and found["cpu"]["cores"] >= 1
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert (found["image_backend"] == "torchvision") == ("torchvision" in found["packages"])
    assert platform.node() not in json.dumps(found)  # the machine's name is nobody's business


def test_absent_packages_are_left_out(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    assert list(environment.package_versions()) == ["torch"]


def test_git_state(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=tester", "-c", "user.email=tester@example.org")
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    unknown = {"sha": None, "dirty": None}
    assert git_state(tmp_path / "nowhere") == unknown
    git("init", "-q")
    assert git_state(tmp_path) == unknown  # no commit yet
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("-c", "core.hooksPath=/dev/null", "commit", "-q", "-m", "first")
    assert git_state(tmp_path) == {"sha": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("b")
    assert git_state(tmp_path)["dirty"] is True


def test_secrets_stay_out_of_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "r.yaml", "--hub_token", "hf_abc", "--seed", "1"])
    assert command_line().endswith("train.py r.yaml '--hub_token=***' --seed 1")
    monkeypatch.setattr(sys, "argv", ["train.py", "r.yaml", "--training.hub-token=hf_abc", "--seed", "1"])
    assert "hf_abc" not in command_line() and command_line().endswith("--seed 1")


def test_the_command_names_its_launcher(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "r.yaml"])
    for variables, launcher in [
        ({}, "python "),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch "),
        ({"WORLD_SIZE": "2"}, "accelerate launch --multi_gpu --num_processes 2 "),
        ({"ACCELERATE_USE_FSDP": "true"}, "accelerate launch --use_fsdp --num_processes 2 "),
    ]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert command_line() == launcher + "train.py r.yaml"


def test_the_console_script_goes_by_its_name(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/me/.venv/bin/gcl", "evaluate", "pairs", "my model"])
    assert command_line() == "gcl evaluate pairs 'my model'"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert command_line() == "accelerate launch --multi_gpu --num_processes 2 -m gcl evaluate pairs 'my model'"
