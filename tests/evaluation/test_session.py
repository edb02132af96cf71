"""One model in one variant: what it embeds, and what is written of it."""

import json

import pytest
import torch

from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder, tiny_processor
from tests.support.training_runs import write_parquet
from universal_gcl.evaluation.session import Session, parse_variant

ROWS = [("a", {"text": "A red bird."}), ("b", {"text": "Snow."}), ("c", {"text": "A red bird."})]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    GCLModel.from_encoder(tiny_encoder("clip")).save_pretrained(folder)
    tiny_processor("clip").save_pretrained(folder)
    return str(folder)


def test_embeds_what_the_model_encodes_and_writes_its_settings(model_folder, tmp_path):
    session = Session(model_folder, tmp_path / "out", variant="normalized_sum")
    store = session.embed("queries", ROWS)
    expected = session.model.encode([row for _, row in ROWS], session.processor)
    torch.testing.assert_close(torch.tensor(store.embeddings()), expected, atol=1e-3, rtol=0)
    assert (tmp_path / "out" / "embeddings" / "queries" / "manifest.json").is_file()
    written = json.loads(session.write("made", {"limit": 3}, {"hit@1": 0.5}).read_text())
    assert (written["protocol"], written["limit"], written["result"]) == ("made", 3, {"hit@1": 0.5})
    assert written["variant"] == written["fusion"] == "normalized_sum" and written["environment"]["packages"]["torch"]
    assert written["fingerprint"]["weights"] == store.manifest["model"]["weights"]


def test_variants_are_other_embeddings_of_the_same_model(model_folder, tmp_path):
    pairs = str(write_parquet(tmp_path / "pairs.parquet", 8))
    fused = [("a", {"text": "Snow.", "image": torch.zeros(9, 9, 3, dtype=torch.uint8).numpy()})]
    embeds = {}
    for variant in ("sum", "normalized_sum", "normalized_sum+centring"):
        centre_on = pairs if "centring" in variant else None
        session = Session(model_folder, tmp_path / variant, variant=variant, centre_on=centre_on)
        embeds[variant] = session.embed("fused", fused).embeddings()[0]
    plain, other, centred = embeds.values()
    assert abs(plain @ other) < 0.99999 and abs(other @ centred) < 0.9


@pytest.mark.parametrize(
    ("variant", "expected"),
    [("plain", (None, False)), ("centring", (None, True)), ("sum", ("sum", False)), ("centring+sum", ("sum", True))],
)
def test_variants_by_name(variant, expected):
    assert parse_variant(variant) == expected


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("add", "'add' is not one of plain, centring, sum"),
        ("sum+native", "join one fusion rule and 'centring'"),
        ("plain+sum", "join one fusion rule"),
        ("sum+sum", "join one fusion rule"),
        ("", "is not one of"),
    ],
)
def test_unknown_variants_are_refused(variant, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        parse_variant(variant)


def test_centring_needs_means(model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"calibration pairs with centre_on \(--centre-on\), or store their means"):
        Session(model_folder, tmp_path, variant="centring")
    with pytest.raises(ValueError, match="centre_on is for the variant 'centring', not for 'sum'"):
        Session(model_folder, tmp_path, variant="sum", centre_on="x.parquet")
