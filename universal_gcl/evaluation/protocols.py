"""The benchmarks whose runs `gcl evaluate` writes, compares and shows on cards. A new benchmark is one line here."""

import json
from collections.abc import Mapping
from pathlib import Path

from universal_gcl.evaluation.covr.protocol import PROTOCOL as COVR
from universal_gcl.evaluation.mbeir.protocol import PROTOCOL as MBEIR
from universal_gcl.evaluation.mixbench.protocol import PROTOCOL as MIXBENCH
from universal_gcl.evaluation.mmeb.protocol import PROTOCOL as MMEB
from universal_gcl.evaluation.pairs.protocol import PROTOCOL as PAIRS
from universal_gcl.evaluation.protocol import Protocol

PROTOCOLS: tuple[Protocol, ...] = (PAIRS, MBEIR, MMEB, COVR, MIXBENCH)  # in the order of `gcl evaluate --help`


def protocol_of(run: Mapping) -> Protocol:
    """The protocol of a run that `read_run` returned."""
    return next(protocol for protocol in PROTOCOLS if protocol.name == run["protocol"])


def read_run(path: str | Path) -> dict:
    """Read what a command of `gcl evaluate` wrote.

    Args:
        path: a run's folder, or its `results.json`.

    Returns:
        its settings and figures, with the benchmark's name under `"protocol"`.

    Raises:
        ValueError: the file is not JSON, or holds no result of one of the benchmarks.
        OSError: there is no such file.
    """
    path = results_file(path)
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); was it cut off?") from error
    if isinstance(written, dict):
        for protocol in PROTOCOLS:
            if protocol.holds(written):
                return {"protocol": protocol.name, **written}
    stated = written.get("protocol") if isinstance(written, dict) else None
    names = ", ".join(protocol.name for protocol in PROTOCOLS)
    raise ValueError(f"{path} holds no result of {names}" + (f"; its protocol is {stated!r}" if stated else ""))


def read_runs(paths: Mapping[str, Path]) -> tuple[Protocol, dict[str, dict]]:
    """Read runs that are to be compared.

    Args:
        paths: name → a run's folder, or its `results.json`; one or more.

    Returns:
        the protocol that they share, and name → run.

    Raises:
        ValueError: the runs belong to different benchmarks; see also `read_run`.
        OSError: see `read_run`.
    """
    runs = {name: read_run(path) for name, path in paths.items()}
    (first, one), *others = runs.items()
    for name, other in others:
        if other["protocol"] != one["protocol"]:
            raise ValueError(
                f"{first} and {name} are not comparable: protocol differs, {one['protocol']} and {other['protocol']}"
            )
    return protocol_of(one), runs


def results_file(path: str | Path) -> Path:
    """The `results.json` of a run that is named by its folder or by that file."""
    path = Path(path)
    return path / "results.json" if path.is_dir() else path
