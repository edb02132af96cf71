"""Storing modality means: the weights and the licence stay, and nothing is loaded for a folder that exists already.

tests/test_cli.py runs the command and checks the centred embeddings.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.support.backbones import tiny_model, tiny_processor
from tests.support.training_runs import write_parquet
from universal_gcl.conversion.centring import store_modality_means
from universal_gcl.publishing.converted_model import save_converted_model
from universal_gcl.publishing.hub_folder import read_facts


def test_weights_and_licence_stay(tmp_path):
    save_converted_model(
        tmp_path / "model",
        tiny_model("clip"),
        tiny_processor("clip"),
        base_model="org/clip",
        base_model_ids=["org/clip"],
        licence="other",
        licence_note="For research only.",
        conversion="Nothing was done.",
    )
    data = write_parquet(tmp_path / "pairs.parquet", 6)
    assert store_modality_means(str(tmp_path / "model"), str(data), tmp_path / "out", limit=5) == tmp_path / "out"
    facts = read_facts(tmp_path / "out")
    assert (facts.licence, facts.licence_note, facts.base_model_ids) == ("other", "For research only.", ["org/clip"])
    assert facts.base_model == "model" and "means of 5 pairs of pairs.parquet" in facts.conversion
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == {"modality_means"}


def test_a_folder_that_exists_is_refused_first(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        store_modality_means("no/model", "no/data", tmp_path)
