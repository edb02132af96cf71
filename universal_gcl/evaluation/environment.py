"""What a result depends on beside its recipe: the command, versions, hardware, image backend, git SHA."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers.utils import is_torchvision_available

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pillow",
    "simplejpeg",
    "av",
    "torchvision",
)
REPOSITORY = Path(__file__).resolve().parents[1]


def collect_environment() -> dict:
    """The environment of this process, ready for JSON. Host, user and folder names are left out.

    Returns:
        - `date`: of now, by UTC, as 2026-01-31;
        - `python`: version; `packages`: name → version of those of `PACKAGES` that are installed;
        - `platform`: operating system and machine; `cpu`: `{"name", "cores"}`; `gpus`: names, `[]` without any;
        - `image_backend`: `"torchvision"` or `"pil"`: transformers' image processors differ slightly between the two;
        - `git`: `{"sha", "dirty"}` of the project, both None outside a checkout or before its first commit.
    """
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": {"name": cpu_name(), "cores": os.cpu_count()},
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "image_backend": "torchvision" if is_torchvision_available() else "pil",
        "git": git_state(REPOSITORY),
    }


def command_line():
    """The command that started this run, as a user would type it again, without secrets."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    launcher = "accelerate launch " if "ACCELERATE_MIXED_PRECISION" in os.environ else "python "
    if processes > 1:
        sharding = [
            name for name in ("fsdp", "deepspeed") if os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true"
        ]
        kind = f"use_{sharding[0]}" if sharding else "multi_gpu"
        launcher += f"--{kind} --num_processes {processes} "
    words = list(sys.argv)
    if Path(words[0]).stem == "gcl":  # the console script, wherever it lies
        words[0], launcher = "gcl", "" if processes == 1 else f"{launcher}-m "
    for place, word in enumerate(words):
        name, is_assignment, _ = word.partition("=")
        if name.replace("-", "_").endswith("hub_token"):
            words[place : place + 2 - bool(is_assignment)] = [f"{name}=***"]
    return launcher + shlex.join(words)


def package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue  # an optional one
    return versions


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_state(repository: Path) -> dict:
    """`{"sha": str | None, "dirty": bool | None}`; dirty: tracked files differ from the commit, or untracked exist."""
    try:
        sha = _git(repository, "rev-parse", "HEAD").strip()
        return {"sha": sha, "dirty": bool(_git(repository, "status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return {"sha": None, "dirty": None}


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
