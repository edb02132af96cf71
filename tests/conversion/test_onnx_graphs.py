"""ONNX graphs give the model's embeddings for any batch and text length; what can't be exported is refused.

tests/publishing/test_doors.py runs the command, on a CLIP with gates and centring.
"""

import sys
from dataclasses import replace

import onnxruntime
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument, RuntimeException

from modeling_gcl import GCLModel
from tests.support.backbones import FAMILIES, random_image, tiny_model, tiny_processor
from universal_gcl.conversion.onnx_graphs import GRAPHS, compare, convert_to_onnx, export_graph
from universal_gcl.publishing.model_folder import save_model_folder

TEXTS = ["a", "a red dog on the grass", "two three one a house in the sky and a bird", "one two"]


def check(session, model, processor, modality, longest, batch):
    rows = {"images": [random_image(index, (40, 30 + index)) for index in range(batch)], "text": TEXTS[:batch]}
    given = {name: rows[name] for name in rows if name.startswith(tuple(GRAPHS[modality]))}
    given |= {} if longest is None else {"max_length": longest}
    inputs = processor(**given, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs, return_loss=False)[f"{modality}_embeds"]
    assert {value.name for value in session.get_inputs()} == set(inputs)
    found = session.run([f"{modality}_embeds"], dict(processor(**given, return_tensors="np")))[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=0)


def one_layer(name):
    """A model with one layer per tower, which is traced in half the time."""
    family = FAMILIES[name]
    text, layer = family.text, {"num_hidden_layers": 1}
    text = (text[0], text[1] | layer) if isinstance(text, tuple) else text | layer
    torch.manual_seed(0)
    return GCLModel.from_encoder(replace(family, text=text, vision=family.vision | layer).build()).eval()


def test_texts_of_one_length(tmp_path):
    model, processor = one_layer("siglip"), tiny_processor("siglip")
    export_graph(model, processor, "fused", tmp_path / "fused.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "fused.onnx")
    assert {value.name: value.shape for value in session.get_inputs()}["input_ids"] == ["batch", 16]
    for batch in (1, 4):
        check(session, model, processor, "fused", None, batch)


def test_native_fusion(tmp_path):
    model, processor = one_layer("vista-base"), tiny_processor("vista-base")
    line = export_graph(model, processor, "fused", tmp_path / "fused.onnx")
    assert "cut texts to 12 tokens" in line  # 16 positions, 4 patches
    session = onnxruntime.InferenceSession(tmp_path / "fused.onnx")
    axes = {value.name: value.shape for value in session.get_inputs() + session.get_outputs()}
    assert axes["input_ids"] == ["batch", "text_length"] and axes["pixel_values"] == ["batch", 3, 32, 32]
    assert axes["fused_embeds"] == ["batch", 32]
    for batch in (1, 4):
        check(session, model, processor, "fused", 12, batch)
    too_long = processor(images=[random_image(0)], text=[TEXTS[2] * 3], return_tensors="np")
    with pytest.raises((RuntimeException, InvalidArgument)):  # rather than a wrong vector
        session.run(None, dict(too_long))
    # a graph with other weights than the model is refused
    with torch.no_grad():
        model.encoder.visual_projection.weight.neg_()
    with pytest.raises(ValueError, match=r"fused.onnx differs from the model by"):
        compare(tmp_path / "fused.onnx", model, dict(processor(**one_row(), return_tensors="pt")))


def one_row():
    return {"images": [random_image(0)], "text": ["a dog"]}


def test_naflex_is_refused_and_leaves_nothing(tmp_path):
    save_model_folder(tmp_path / "model", tiny_model("siglip2"), tiny_processor("siglip2"))
    with pytest.raises(ValueError, match="torch can't export Siglip2Model's image embeddings: "):
        convert_to_onnx(tmp_path / "model", tmp_path / "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_without_onnxruntime(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "universal-gcl\[onnx\]"'):
        convert_to_onnx(tmp_path / "model", tmp_path / "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("modality", GRAPHS)
@pytest.mark.parametrize("name", ["clip", "siglip", "vista-base", "vista-m3", "efficientnet + bert", "chinese_clip"])
def test_families(name, modality, tmp_path):
    model, processor = tiny_model(name), tiny_processor(name)
    export_graph(model, processor, modality, tmp_path / f"{modality}.onnx")
    session = onnxruntime.InferenceSession(tmp_path / f"{modality}.onnx")
    longest = 12 if (name, modality) == ("vista-base", "fused") else None
    for batch in (1, 4):
        check(session, model, processor, modality, longest, batch)
