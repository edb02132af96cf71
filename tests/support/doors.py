"""A process in which neither this checkout nor its editable install can be imported, as at a user's; what is deprecated
there is an error."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
PRELUDE = """
import sys
sys.path[:] = {paths!r}
for name in ("modeling_gcl", "universal_gcl"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(name + " can be imported")
"""


def run_outside(code, folder, **variables):
    """Runs Python `code` in `folder`, with more environment variables; returns what it printed.

    -S leaves .pth files unread, by which an editable install is found."""
    paths = paths_outside()
    script = folder / "script.py"
    script.write_text(PRELUDE.format(paths=paths) + (TESTS / "deprecations.py").read_text() + code)
    environment = {
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    warnings = ["-W", "error::FutureWarning", "-W", "ignore:`is_gradient_checkpointing`:FutureWarning"]  # peft's own
    command = [sys.executable, "-I", "-S", *warnings, script]
    environment = os.environ | environment | variables
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def paths_outside():
    """sys.path without this checkout, and without the modules that transformers has copied for this process."""
    ours = ("modeling_gcl", "transformers_modules")
    return [
        path
        for path in sys.path
        if path and Path(path) != TESTS and not any((Path(path) / name).exists() for name in ours)
    ]
