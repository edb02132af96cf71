"""A GCL-tuned CLIP becomes a CLIPModel with its temperature; a model that would lose something is refused."""

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from modeling_gcl import GCLModel
from tests.support.backbones import random_image, tiny_model, tiny_processor
from universal_gcl.conversion.to_clip import convert_to_clip
from universal_gcl.publishing.model_folder import save_model_folder


@pytest.fixture
def saved(tmp_path):
    """A function that saves a tiny model and returns the model and its folder."""

    def save(name="clip", max_text_length=None, centring=False, **config):
        model, processor = tiny_model(name, **config), tiny_processor(name)
        processor.max_text_length = max_text_length
        model.config.centring = centring
        save_model_folder(tmp_path / "model", model, processor)
        return model, tmp_path / "model"

    return save


@pytest.mark.parametrize("fusion", ["sum", "normalized_sum"])
def test_features_and_logits_are_the_models_own(fusion, saved, tmp_path):
    model, folder = saved(fusion=fusion, max_text_length=8)
    with torch.no_grad():
        model.logit_scale.log_scale.fill_(3.3)
        model.modality_means.fill_(0.1)
    model.save_pretrained(folder)
    written = convert_to_clip(folder, tmp_path / "clip")
    assert written.folder == tmp_path / "clip" and "1/temperature 27.11" in written.notes[0]
    assert "left out: the modality means" in written.notes[2]
    clip, processor = CLIPModel.from_pretrained(tmp_path / "clip"), CLIPProcessor.from_pretrained(tmp_path / "clip")
    texts = ["a dog", "two birds in the sky and a red cat on grass"]
    images = [random_image(0), random_image(1)]
    inputs = processor(images=images, text=texts, padding=True, truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 8
    with torch.no_grad():
        found, expected = clip(**inputs), model(**inputs)
        scope = {
            "normalize": torch.nn.functional.normalize,
            "image_features": clip.get_image_features(inputs["pixel_values"]).pooler_output,
            "text_features": clip.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output,
        }
    formula = written.notes[1].split("does not compute: ")[1]  # the note is right
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(eval(formula, scope), expected.fused_embeds, **close)
    torch.testing.assert_close(found.image_embeds, expected.image_embeds, **close)
    torch.testing.assert_close(found.text_embeds, expected.text_embeds, **close)
    cosines = expected.text_embeds @ expected.image_embeds.T
    torch.testing.assert_close(found.logits_per_text, expected.logit_scale * cosines, atol=1e-5, rtol=1e-6)
    # and back: the next training starts at the same temperature
    again = GCLModel.from_encoder(tmp_path / "clip")
    torch.testing.assert_close(again.logit_scale(), expected.logit_scale)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"name": "siglip"}, "has a 'siglip' backbone: only a 'clip' can"),
        ({"fusion": "gated_sum"}, r"can't hold fusion='gated_sum' \(its learned gates\), so its"),
        (
            {"centring": True, "text_pooling": "mean"},
            r"text_pooling='mean', centring=True \(the modality means\)",
        ),
    ],
)
def test_what_would_be_lost_is_named(settings, named, saved, tmp_path):
    _, folder = saved(**settings)
    with pytest.raises(ValueError, match=named):
        convert_to_clip(folder, tmp_path / "clip")
    assert not (tmp_path / "clip").exists()


def test_other_folders(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="'clip' checkpoint, not a GCL one"):
        convert_to_clip(clip_folder, tmp_path / "clip")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert_to_clip(clip_folder, clip_folder)
