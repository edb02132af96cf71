"""What GCLModel.from_encoder refuses, and what of a backbone is used."""

import json

import pytest
import torch
import transformers
from packaging import version
from safetensors.torch import load_file, save_file

from modeling_gcl import GCLModel
from tests.support.backbones import BERT, DIM, TEXT, TOWER, VISION, tiny_encoder, word_tokenizer

BLIP_TEXT = TEXT | {"encoder_hidden_size": 32, "sep_token_id": 3}


def make(name, config, **kwargs):
    return getattr(transformers, name)(getattr(transformers, f"{config}Config")(**kwargs))


def blip():
    return make(
        "BlipForImageTextRetrieval", "Blip", text_config=BLIP_TEXT, vision_config=VISION, image_text_hidden_size=DIM
    )


def blip_2():
    qformer = TOWER | {"vocab_size": 30, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    text = {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "vocab_size": 30}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"vision_config": VISION, "qformer_config": qformer, "text_config": text}
    return make("Blip2ForImageTextRetrieval", "Blip2", **config)


def flava():
    towers = {"text_config": BERT, "image_config": VISION, "multimodal_config": TOWER}
    return make("FlavaModel", "Flava", **towers, projection_dim=DIM, hidden_size=32)


def x_clip():
    vision = VISION | {"mit_hidden_size": 32, "mit_intermediate_size": 64, "mit_num_attention_heads": 2}
    return make("XCLIPModel", "XCLIP", text_config=TEXT, vision_config=vision, prompt_num_attention_heads=2)


def aimv2():
    return make("Aimv2Model", "Aimv2", text_config=TEXT, vision_config=VISION, projection_dim=DIM)


def clip_text():
    return make("CLIPTextModelWithProjection", "CLIPText", **TEXT, projection_dim=DIM)


# every family of docs/models.md that GCL does not take, but for those that bring code of their own
REFUSED = {
    "blip": (blip, r"blip lacks \d+ weights of BlipModel, which would be random: .*saved from another class"),
    "blip-2": (blip_2, "Blip2Model is no dual encoder .it has no text_model"),
    "flava": (flava, "FlavaModel is no dual encoder .it has no vision_model"),
    "xclip": (x_clip, "XCLIPModel is no dual encoder .it has no get_image_features"),
    "aimv2": (aimv2, "Aimv2Model cannot be wrapped: .*a text's embedding would depend on the rest of its batch"),
    "clip_text_model": (clip_text, "CLIPTextModel is no dual encoder .it has no get_image_features"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_backbones_that_do_not_fit_are_refused(name, tmp_path):
    build, message = REFUSED[name]
    build().save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        GCLModel.from_encoder(tmp_path / name)


def test_checkpoints_that_bring_code_of_their_own_are_refused_and_their_code_is_not_run(tmp_path):
    config = {"model_type": "jina_clip", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="brings code of its own for its model_type='jina_clip'"):
        GCLModel.from_encoder(tmp_path)


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_cfg": {"embed_dim": 512}}')
    with pytest.raises(ValueError, match="no checkpoint of transformers .*gcl convert --help"):
        GCLModel.from_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "of-tomorrow"}')
    with pytest.raises(ValueError, match="of-tomorrow"):
        GCLModel.from_encoder(tmp_path)
    for name in (tmp_path / "no-such-folder", "outputs/no-such-folder/model"):  # the second can't be a Hub id
        with pytest.raises(OSError, match=f"there is no folder {name} in .*Check the name"):
            GCLModel.from_encoder(name)


@pytest.mark.parametrize("lost", ["visual_projection.weight", "logit_scale", "vision_model.post_layernorm.bias"])
def test_a_checkpoint_without_all_weights_is_refused(lost, tmp_path):
    tiny_encoder("clip").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights of CLIPModel, which would be random: {lost}"):
        GCLModel.from_encoder(tmp_path)


def test_weights_that_are_not_used_may_be_missing(tmp_path):
    tiny_encoder("dinov2 + bert").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["vision_model.embeddings.mask_token"], weights["text_model.pooler.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    GCLModel.from_encoder(tmp_path, text_pooling="mean")
    with pytest.raises(ValueError, match="text_model.pooler.dense.weight"):
        GCLModel.from_encoder(tmp_path)


def test_the_dual_encoder_inside_a_detector_is_taken(tmp_path):
    detector = make("OwlViTForObjectDetection", "OwlViT", text_config=TEXT, vision_config=VISION, projection_dim=DIM)
    detector.save_pretrained(tmp_path)
    model = GCLModel.from_encoder(tmp_path)
    assert torch.equal(model.encoder.visual_projection.weight, detector.owlvit.visual_projection.weight)


def test_the_clip_inside_a_segmenter_is_taken_or_refused(tmp_path):
    """transformers 5.12 and 5.17 find none of its weights, and only warn; 5.23 does."""
    segmenter = make(
        "CLIPSegForImageSegmentation", "CLIPSeg", text_config=TEXT, vision_config=VISION, projection_dim=DIM,
        extract_layers=[0, 1], reduce_dim=16, decoder_intermediate_size=32, decoder_num_attention_heads=2,
    )  # fmt: skip
    segmenter.save_pretrained(tmp_path)
    try:
        model = GCLModel.from_encoder(tmp_path)
    except ValueError as error:
        assert "weights of CLIPSegModel, which would be random" in str(error)
        assert version.parse(transformers.__version__) < version.parse("5.23")
    else:
        assert torch.equal(model.encoder.visual_projection.weight, segmenter.clip.visual_projection.weight)


def test_a_backbones_own_temperature_is_kept_whatever_form_it_has():
    align = tiny_encoder("align")
    align.temperature.data.fill_(0.02)
    model = GCLModel.from_encoder(align)
    assert model.logit_scale().item() == pytest.approx(50.0)
    clip = tiny_encoder("clip")
    clip.logit_scale.data.fill_(3.0)
    assert GCLModel.from_encoder(clip).logit_scale().item() == pytest.approx(20.0855, abs=1e-3)


def test_the_reason_to_refuse_aimv2():
    """Once this fails, the family can move to `backbones.FAMILIES`."""
    torch.manual_seed(0)
    encoder = aimv2().eval()
    text = word_tokenizer()(["a red dog"], return_tensors="pt")
    padded = word_tokenizer()(["a red dog"], padding="max_length", return_tensors="pt")

    def distance():
        with torch.no_grad():
            alone, beside = (encoder.get_text_features(**inputs).pooler_output for inputs in (text, padded))
        return ((alone - beside).norm() / beside.norm()).item()

    text, padded = ({name: x[name] for name in ("input_ids", "attention_mask")} for x in (text, padded))
    encoder.set_attn_implementation("sdpa")
    assert distance() > 1e-3
    encoder.set_attn_implementation("eager")
    assert distance() < 1e-5
