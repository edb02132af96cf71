"""Adapters: on the layers that were meant, trained as the definition of LoRA says, saved whole, resumed, or refused."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_gcl import GCLModel
from tests.support.backbones import random_image, tiny_encoder, tiny_processor
from tests.support.training_runs import CHECKPOINTING, make_trainer
from universal_gcl.training.arguments import LoraArguments
from universal_gcl.training.freezing import freeze_parts
from universal_gcl.training.lora import add_lora


def adapted(name="clip", freeze=(), fusion=None, **settings):
    overrides = {} if fusion is None else {"fusion": fusion}
    model = GCLModel.from_encoder(tiny_encoder(name), logit_scale_init_value=10.0, **overrides)
    freeze_parts(model, freeze)
    torch.manual_seed(1)
    return add_lora(model, LoraArguments(**{"r": 4} | settings), "a/base")


def inputs_of(name):
    words = ["a red dog", "two cats sits", "a bird flies on the house", "green grass in the sky"]
    images = [random_image(i) for i in range(4)]
    return tiny_processor(name)(images=images, text=words, return_tensors="pt")


def layers(model):
    """Names of the adapted layers, relative to the backbone."""
    names = {name.split(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    return {name.removeprefix("base_model.model.encoder.") for name in names}


@pytest.mark.parametrize("name", ["clip", "siglip2", "vista-base", "efficientnet + bert"])
def test_all_linear_maps_are_adapted_and_every_trained_parameter_gets_a_gradient(name):
    model = adapted(name)
    expected = set()
    inside = [m for a in tiny_encoder(name).modules() if isinstance(a, nn.MultiheadAttention) for m in a.children()]
    for layer, module in GCLModel.from_encoder(tiny_encoder(name)).encoder.named_modules():
        linear = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
        if linear and module.weight.requires_grad and not layer.endswith("head.attention.out_proj"):
            expected.add(layer)
    assert layers(model) == expected and bool(inside) == name.startswith("siglip")
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key for key in trained if "lora_" not in key} == {
        "base_model.model.logit_scale.modules_to_save.default.log_scale"
    }
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.1)  # as after a step: with zeros A has no gradient
    model.train()
    model(**inputs_of(name)).loss.backward()
    dead = [key for key in trained if not model.get_parameter(key).grad.abs().sum() > 0]
    # an attention's key bias shifts all scores alike, but its weight has a gradient
    assert not dead
    assert not [key for key, parameter in model.named_parameters() if not parameter.requires_grad and parameter.grad]


def test_the_gradient_is_that_of_the_definition():
    """W' = W + s B A, so that dL/dB = s (dL/dW) A^T."""
    model, plain = adapted(lora_alpha=12), GCLModel.from_encoder(tiny_encoder("clip"), logit_scale_init_value=10.0)
    for each in (model, plain):
        each.eval()
        each(**inputs_of("clip")).loss.backward()
    layer = model.get_base_model().encoder.text_model.encoder.layers[1].mlp.fc1
    gradient = plain.encoder.text_model.encoder.layers[1].mlp.fc1.weight.grad
    expected = 12 / 4 * gradient @ layer.lora_A["default"].weight.T
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, expected, atol=1e-7, rtol=1e-4)
    scale = model.get_base_model().logit_scale.log_scale.grad
    torch.testing.assert_close(scale, plain.logit_scale.log_scale.grad)


def test_batch_statistics_of_a_frozen_base_stay():
    """An adapter doesn't hold them: what it is loaded onto has those of the base."""
    model = adapted("efficientnet + bert")
    before = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
    model.train()
    model(**inputs_of("efficientnet + bert"))
    assert before and all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_targets_are_chosen_by_tower():
    model = adapted(image_targets=r"layers\.1\..*q_proj", text_targets="q_proj|text_projection")
    text = {f"text_model.encoder.layers.{i}.self_attn.q_proj" for i in (0, 1)} | {"text_projection"}
    assert layers(model) == {"vision_model.encoder.layers.1.self_attn.q_proj"} | text
    assert {name.split(".")[0] for name in layers(adapted(freeze=["image", "logit_scale"]))} == {
        "text_model", "text_projection"
    }  # fmt: skip
    assert "visual_projection" in layers(adapted(freeze=["text_tower"]))


@pytest.mark.parametrize(
    "name, settings, message",
    [
        (
            "clip",
            {"image_targets": "query"},
            "'query' matches no linear layer .*like encoder.vision_model",
        ),
        ("clip", {"text_targets": "q_proj", "freeze": ["text"]}, "matches only frozen layers of the text tower"),
        ("clip", {"freeze": ["image", "text"], "fusion": "gated_sum"}, "every tower is frozen"),
        ("siglip2", {"image_targets": "out_proj"}, "MultiheadAttention. That reads the layer's weight"),
        ("efficientnet + bert", {"image_targets": "depthwise"}, "a grouped convolution"),
        ("clip", {"text_targets": "q_proj["}, "peft.text_targets: 'q_proj.' is not a regular expression"),
        ("clip", {"lora_dropout": 1.5}, "peft.lora_dropout is 1.5"),
    ],
)
def test_what_would_train_nothing_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        adapted(name, **settings)


@pytest.mark.parametrize(
    "options, settings",
    [({}, {}), ({"use_dora": True}, {"grad_cache_chunk": 4}), ({"use_rslora": True}, {CHECKPOINTING: True})],
)
def test_temperature_gates_and_adapters_are_trained_saved_and_resumed(options, settings, tmp_path):
    schedule = {"save_strategy": "epoch", "num_train_epochs": 2, **settings}

    def trainer():
        return make_trainer(tmp_path, model=adapted(fusion="gated_sum", **options), **schedule)

    whole = trainer()
    before = {key: value.clone() for key, value in whole.model.state_dict().items()}
    whole.train()
    changed = {key for key, value in whole.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key, parameter in whole.model.named_parameters() if parameter.requires_grad}
    assert any("logit_scale" in key for key in changed) and any("gate_out.weight" in key for key in changed)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[key], value, atol=1e-6, rtol=1e-5, msg=key)


def test_a_checkpoint_without_all_of_the_adapter_is_not_resumed(tmp_path):
    schedule = {"save_strategy": "epoch", "num_train_epochs": 1}
    make_trainer(tmp_path / "lora", model=adapted(), **schedule).train()
    checkpoint = tmp_path / "lora" / "checkpoint-6"
    with pytest.raises(ValueError, match="was trained with LoRA: resume it with its peft: section"):
        make_trainer(tmp_path / "lora").train(resume_from_checkpoint=str(checkpoint))
    held = load_file(checkpoint / "adapter_model.safetensors")
    lost = [key for key in held if "logit_scale" in key]
    save_file({key: held[key] for key in held if key not in lost}, checkpoint / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="1 missing keys, such as base_model.model.logit_scale.log_scale"):
        make_trainer(tmp_path / "lora", model=adapted()).train(resume_from_checkpoint=str(checkpoint))
    make_trainer(tmp_path / "full", **schedule).train()
    with pytest.raises(ValueError, match="was trained without LoRA: resume it without a peft: section"):
        make_trainer(tmp_path / "full", model=adapted()).train(
            resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-6")
        )


def test_an_adapter_that_is_not_saved_whole_stops_training(tmp_path, monkeypatch):
    save = PeftModel.save_pretrained

    def forgetful(model, folder, **options):  # as peft is with modules_to_save that are no modules
        save(model, folder, **options)
        path = Path(folder) / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(path).items() if "fusion" not in key}, path)

    monkeypatch.setattr(PeftModel, "save_pretrained", forgetful)
    trainer = make_trainer(tmp_path, model=adapted(fusion="gated_sum"), num_train_epochs=1, save_strategy="epoch")
    with pytest.raises(ValueError, match="4 missing keys, such as base_model.model.fusion.gate_in.bias"):
        trainer.train()


def test_only_the_process_that_saves_an_adapter_reads_it_back(tmp_path, monkeypatch):
    """transformers 5.23 calls `_save` on every rank; the others would look for a file that is not written yet."""
    trainer = make_trainer(tmp_path, model=adapted())
    monkeypatch.setattr("transformers.Trainer._save", lambda *_: None)
    with pytest.raises(ValueError, match="holds no adapter"):
        trainer._save(str(tmp_path / "checkpoint-1"))
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    trainer._save(str(tmp_path / "checkpoint-1"))
