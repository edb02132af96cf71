"""What a result depends on in addition to its recipe: command, versions, hardware, image backend, git commit."""

import configparser
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
PACKAGE = Path(__file__).resolve().parents[1]  # the folder of universal_gcl
DISTRIBUTION = "universal-gcl"
_GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")


def collect_environment() -> dict[str, Any]:
    """The environment of this process, ready for JSON. Names of the host, the user and folders are left out.

    Returns:
        - `date`: today in UTC, as in 2026-01-31;
        - `version`: the version of universal-gcl; None if it is neither a checkout nor installed. Files written before
          0.2.0 don't have it;
        - `python`: its version; `packages`: name → version, for those of `PACKAGES` that are installed;
        - `platform`: operating system and machine; `cpu`: `{"name", "cores"}`; `gpus`: their names, `[]` if there are
          none;
        - `image_backend`: `"torchvision"` or `"pil"`: transformers' image processors differ slightly between the two;
        - `git`: `{"sha", "dirty"}` of the checkout that this code runs from, see `git_state`.
    """
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "version": own_version(PACKAGE),
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": {"name": cpu_name(), "cores": os.cpu_count()},
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "image_backend": "torchvision" if is_torchvision_available() else "pil",
        "git": git_state(PACKAGE),
    }


def command_line() -> str:
    """The command that started this run, as a user would type it again. Secrets are replaced by `***`.

    The launcher is reconstructed from the variables that it sets, so options that are the same for every run (a
    configuration file, a port) are missing.
    """
    words = hide_secrets(sys.argv[1:])
    launcher = launcher_words(os.environ)
    if Path(sys.argv[0]).stem == "gcl":  # the console script, wherever it is installed
        # launchers start modules and files, no console scripts
        program = ["gcl"] if launcher is None else ["-m", "universal_gcl"]
    else:
        launcher = launcher or ["python"]
        module = _main_module()
        program = [sys.argv[0]] if module is None else ["-m", module]
    return shlex.join([*(launcher or []), *program, *words])


def launcher_words(environ: Mapping[str, str]) -> list[str] | None:
    """The launcher that started this process and its number of processes, as words of a command; None without one."""
    processes, machines = int(environ.get("WORLD_SIZE", 1)), int(environ.get("GROUP_WORLD_SIZE", 1))
    if "ACCELERATE_MIXED_PRECISION" in environ:
        words = ["accelerate", "launch"]
        if processes > 1:
            sharding = [
                name for name in ("fsdp", "deepspeed") if environ.get(f"ACCELERATE_USE_{name.upper()}") == "true"
            ]
            words += [f"--use_{sharding[0]}" if sharding else "--multi_gpu", "--num_processes", str(processes)]
        return words + (["--num_machines", str(machines)] if machines > 1 else [])
    if "TORCHELASTIC_RUN_ID" in environ:
        words = ["torchrun", "--nproc_per_node", str(processes // machines)]
        return words + (["--nnodes", str(machines)] if machines > 1 else [])
    return None


def hide_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command, with `***` in the place of a Hub token: `--hub_token X` or `--hub_token=X`."""

    def names_token(word: str) -> bool:
        return word.replace("-", "_").endswith("hub_token")

    shown = []
    for before, word in zip(["", *words], words):
        name, is_assignment, _ = word.partition("=")
        if names_token(before):
            shown.append("***")
        else:
            shown.append(f"{name}=***" if is_assignment and names_token(name) else word)
    return shown


def _main_module() -> str | None:
    """The module that `python -m` runs; None if a file is run.

    `sys.argv[0]` is compared with the file of `__main__`, because programs that run ours within their own process (test
    runners, debuggers) put the name of ours there.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is None or sys.argv[0] != getattr(main, "__file__", None):
        return None
    return spec.name.removesuffix(".__main__")


def package_versions() -> dict[str, str]:
    """Name → version of those of `PACKAGES` that are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue  # an optional package
    return versions


def cpu_name() -> str:
    """The processor's name, as Linux reports it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def own_version(package: Path) -> str | None:
    """The version of universal-gcl in this package folder. A checkout states it in its setup.cfg, an installation in
    its metadata."""
    if is_own_source(package.parent):
        return read_setup(package.parent).get("metadata", "version", fallback=None)
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return None


def is_own_source(folder: Path) -> bool:
    """Whether a folder is the root of this project's source, according to its setup.cfg."""
    return read_setup(folder).get("metadata", "name", fallback=None) == DISTRIBUTION


def read_setup(folder: Path) -> configparser.ConfigParser:
    """The folder's setup.cfg; empty if there is none or it can't be parsed."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(folder / "setup.cfg", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return configparser.ConfigParser(interpolation=None)
    return parser


def git_state(package: Path, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """
    The commit of the checkout that a package folder belongs to.

    The package may also be installed inside another repository: in a user's virtual environment, or as a copy. That
    repository's commit says nothing about this code. So the repository must be a checkout of this project: its root
    has our setup.cfg next to the package, and git tracks the package's files.

    Args:
        package: folder of `universal_gcl`.
        leave_out: files and folders below the root, as git's pathspecs, whose changes don't count.

    Returns:
        `{"sha": str | None, "dirty": bool | None}`. `dirty`: tracked files differ from the commit, or untracked ones
        exist. Both are None outside a checkout, before its first commit and without git.
    """
    root = package.parent
    unknown = {"sha": None, "dirty": None}
    if not is_own_source(root):
        return unknown
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel").strip()).resolve() != root.resolve():
            return unknown
        _git(root, "ls-files", "--error-unmatch", "--", f"{package.name}/__init__.py")
        sha = _git(root, "rev-parse", "HEAD").strip()
        changes = _git(root, "status", "--porcelain", "--", ".", *(f":!{path}" for path in leave_out))
    except (OSError, subprocess.CalledProcessError):
        return unknown
    return {"sha": sha, "dirty": bool(changes.strip())}


def _git(repository: Path, *arguments: str) -> str:
    # inside a git hook these variables name the hook's repository and win over -C
    environ = {name: value for name, value in os.environ.items() if name not in _GIT_VARIABLES}
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout
