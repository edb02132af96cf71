import json
import shlex
import sys

import pytest

from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder, tiny_processor
from tests.support.training_runs import write_parquet
from universal_gcl import cli


def test_the_results_file_says_what_was_typed_and_where_it_ran(tmp_path, monkeypatch):
    GCLModel.from_encoder(tiny_encoder("clip")).save_pretrained(tmp_path / "model")
    tiny_processor("clip").save_pretrained(tmp_path / "model")
    data = write_parquet(tmp_path / "my pairs.parquet", 12)
    typed = ["evaluate", "pairs", str(tmp_path / "model"), str(data), "--seed", "3", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["/home/me/.venv/bin/gcl", *typed])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert shlex.split(written["command"]) == ["gcl", *typed]
    assert written["seed"] == written["after"]["seed"] == 3
    assert {"version", "packages", "git"} <= written["environment"].keys()
