"""The folder of a LoRA run: adapter and merged model give the trained model's embeddings, here and on the Hub."""

import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_gcl import GCLModel
from tests.support.backbones import FAMILIES, TEXT, VISION, random_image, tiny_encoder, tiny_processor
from tests.support.doors import run_outside
from tests.support.hub_on_loopback import TOKEN
from tests.support.training_runs import make_trainer
from universal_gcl.publishing.adapter import merge_adapter, save_with_adapter
from universal_gcl.publishing.model_folder import save_model_folder
from universal_gcl.publishing.push import push_folder
from universal_gcl.retrieval.adapters import load_adapter, weight_checksums
from universal_gcl.training.arguments import LoraArguments
from universal_gcl.training.lora import add_lora

ROWS = ["a red dog", {"image": "dog.png"}, {"image": "dog.png", "text": "in grass"}]
DOORS = """
import torch
from peft import PeftModel
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor
rows, found = {rows!r}, {{}}
for name, adapter, base in {models!r}:
    options = {{"trust_remote_code": True}}
    inside = {{"subfolder": "adapter"}} if name == "hub" else {{}}
    processor = AutoProcessor.from_pretrained(base, **options)
    found[name + " AutoModel"] = AutoModel.from_pretrained(adapter, adapter_kwargs=inside, **options)
    base_model = AutoModel.from_pretrained(base, **options)
    found[name + " PeftModel"] = PeftModel.from_pretrained(base_model, adapter, **inside)
    for door in ("AutoModel", "PeftModel"):
        found[name + " " + door] = found[name + " " + door].encode(rows, processor)
sentences = SentenceTransformer("org/tuned", trust_remote_code=True, device="cpu")
opened = [row if isinstance(row, str) else row | {{"image": Image.open(row["image"])}} for row in rows]
vectors = [sentences.encode([row], convert_to_tensor=True) for row in opened]
found["hub SentenceTransformer"] = torch.cat(vectors)
torch.save(found, "found.pt")
"""


def trained(base, **settings):
    """A model with an adapter in which every parameter differs from its start."""
    torch.manual_seed(3)
    model = add_lora(GCLModel.from_pretrained(base), LoraArguments(**{"r": 4} | settings), str(base))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)  # larger ones amplify rounding beyond 1e-5
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "base"
    model = GCLModel.from_encoder(tiny_encoder("clip"), fusion="gated_normalized_sum", logit_scale_init_value=30.0)
    save_model_folder(folder, model, tiny_processor("clip"))
    (folder / "README.md").write_text("# A base\n")
    return folder


@pytest.fixture(scope="module")
def saved(base):
    """The folder of a run, and the embeddings of its model."""
    random_image(0).save(base.parent / "dog.png")
    model, processor = trained(base), tiny_processor("clip")
    rows = [row if isinstance(row, str) else row | {"image": str(base.parent / row["image"])} for row in ROWS]
    expected = model.eval().encode(rows, processor)
    merged = save_with_adapter(base.parent / "model", model, processor, weight_checksums(base))
    assert type(merged) is GCLModel
    (base.parent / "model" / "README.md").write_text("# A model\n")
    return base.parent / "model", expected


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "model")


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True, "image_targets": "q_proj"}])
def test_kinds_of_adapters_are_read_back_and_merged(settings, base, tmp_path):
    save_with_adapter(tmp_path, trained(base, **settings), tiny_processor("clip"), weight_checksums(base))


def test_trained_in_4_bits_it_is_merged_with_the_whole_base(tmp_path):
    """On the CPU bitsandbytes trains nothing after an evaluation, so this test doesn't evaluate before training."""
    width = {"hidden_size": 128, "intermediate_size": 256}  # bitsandbytes can't pack the weights of smaller layers
    family = replace(FAMILIES["clip"], text=TEXT | width, vision=VISION | width, backbone={"projection_dim": 64})
    torch.manual_seed(0)
    float_base = GCLModel.from_encoder(family.build(), fusion="gated_sum", logit_scale_init_value=10.0)
    save_model_folder(tmp_path / "base", float_base, tiny_processor("clip"))
    model = add_lora(float_base, LoraArguments(r=4, load_in_4bit=True), str(tmp_path / "base"))
    layer = model.get_base_model().encoder.text_model.encoder.layers[0].mlp.fc1
    assert type(layer.base_layer).__name__ == "Linear4bit" and layer.base_layer.weight.dtype == torch.uint8
    trainer = make_trainer(tmp_path, model=model, num_train_epochs=1)
    trainer.train()
    merged = save_with_adapter(
        tmp_path / "model", trainer.model, tiny_processor("clip"), weight_checksums(tmp_path / "base")
    )
    adapter = load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")
    part = "encoder.text_model.encoder.layers.0.mlp.fc1"
    a, b = (adapter[f"base_model.model.{part}.lora_{side}.weight"] for side in "AB")
    expected = float_base.get_parameter(f"{part}.weight") + 32 / 4 * b @ a
    assert b.abs().max() > 0
    torch.testing.assert_close(merged.get_parameter(f"{part}.weight"), expected)


def test_a_training_that_changed_nothing_is_refused(base, tmp_path):
    model = add_lora(GCLModel.from_pretrained(base), LoraArguments(), str(base))
    with pytest.raises(ValueError, match="training changed nothing.*Raise learning_rate"):
        save_with_adapter(tmp_path, model, tiny_processor("clip"), weight_checksums(base))


def test_an_adapter_that_loads_as_another_is_refused(base, tmp_path, monkeypatch):
    model = trained(base)
    other = add_lora(GCLModel.from_pretrained(base), LoraArguments(r=4), str(base))
    monkeypatch.setattr("universal_gcl.publishing.adapter.load_adapter", lambda folder: other.eval())
    with pytest.raises(ValueError, match="the adapter in .* differs from the model that was trained"):
        save_with_adapter(tmp_path, model, tiny_processor("clip"), weight_checksums(base))


def test_merged_later_it_is_the_same_model(saved, tmp_path):
    folder, _ = saved
    merge_adapter(folder / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "gate_out", "log_scale"])
def test_missing_keys_are_refused(part, copy):
    path = copy / "adapter" / "adapter_model.safetensors"
    held = load_file(path)
    save_file({name: tensor for name, tensor in held.items() if part not in name}, path)
    for load in (load_adapter, GCLModel.from_pretrained):  # the second is what AutoModel calls
        with pytest.raises(ValueError, match=f"adapter.*{part}"):
            load(copy / "adapter")


def test_an_adapter_that_is_cut_off_is_refused(copy):
    path = copy / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    for refuse in (load_adapter, lambda adapter: push_folder(adapter.parent, "org/tuned", token=TOKEN)):
        with pytest.raises(ValueError, match="adapter_model.safetensors is damaged or|does not fit .*fully"):
            refuse(copy / "adapter")


def test_another_base_is_refused(copy, base, tmp_path):
    other = GCLModel.from_pretrained(base)
    torch.nn.init.normal_(other.encoder.text_projection.weight)  # peft accepts it, because the shapes are the same
    save_model_folder(tmp_path / "other", other, tiny_processor("clip"))
    peft.PeftModel.from_pretrained(other, str(copy / "adapter"))
    with pytest.raises(ValueError, match="was trained on another base than .*other: the weight files differ"):
        merge_adapter(copy / "adapter", tmp_path / "merged", base=str(tmp_path / "other"))
    assert not (tmp_path / "merged").exists()


def test_what_is_no_adapter_is_refused(copy, base):
    with pytest.raises(ValueError, match="holds no adapter: adapter_config.json is missing"):
        load_adapter(copy)
    config = copy / "adapter" / "adapter_config.json"
    for text, message in [
        ("[]", "holds no adapter: adapter_config.json is missing or damaged"),
        ('{"base_model_name_or_path": null}', "adapter_config.json names no base"),
        ('{"base_model_name_or_path": "/gone"}', "/gone"),
    ]:
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_adapter(copy / "adapter")
    (copy / "adapter" / "base.json").unlink()
    with pytest.raises(ValueError, match="does not say which weights its adapter is for"):
        load_adapter(copy / "adapter", str(base))
    with pytest.raises(ValueError, match="not complete: it lacks adapter/base.json"):
        push_folder(copy, "org/tuned", token=TOKEN)


def test_every_door_gives_the_same_also_from_the_hub(saved, base, hub, tmp_path):
    folder, expected = saved
    push_folder(folder, "org/tuned", private=True, token=TOKEN)
    assert hub.private == {"org/tuned", "org/tuned-base"}
    pushed = hub.files("org/tuned")
    config = json.loads(pushed["adapter/adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/tuned-base"
    local = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert local == config | {"base_model_name_or_path": str(base)}
    assert pushed["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    random_image(0).save(tmp_path / "dog.png")
    models = [("folder", str(folder / "adapter"), str(base)), ("hub", "org/tuned", "org/tuned-base")]
    code = DOORS.format(rows=ROWS, models=models)
    run_outside(code, tmp_path, **hub.environment, HF_HOME=str(tmp_path / "home"))
    found = torch.load(tmp_path / "found.pt")
    found["merged"] = (
        GCLModel.from_pretrained(folder)
        .eval()
        .encode(
            [row if isinstance(row, str) else row | {"image": str(tmp_path / "dog.png")} for row in ROWS],
            tiny_processor("clip"),
        )
    )
    assert len(found) == 6
    for door, embeds in found.items():
        torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=0, msg=lambda m, door=door: f"{door}: {m}")


def test_a_base_on_the_hub_must_be_the_right_one(copy, base, hub, tmp_path):
    push_folder(copy, "org/first", token=TOKEN)
    push_folder(copy, "org/second", token=TOKEN, adapter_base_id="org/first-base")  # is there already
    assert set(hub.repos) == {"org/first", "org/first-base", "org/second"}
    assert len(hub.repos["org/first-base"]["main"]) == 2
    state = {name: len(commits) for repo in hub.repos for name, commits in hub.repos[repo].items()}
    config = json.loads((copy / "adapter" / "adapter_config.json").read_text())

    def refused(message, names=None, **options):
        if names is not None:
            (copy / "adapter" / "adapter_config.json").write_text(
                json.dumps(config | {"base_model_name_or_path": names})
            )
        with pytest.raises(ValueError, match=message):
            push_folder(copy, "org/third", token=TOKEN, **options)
        assert state == {name: len(commits) for repo in hub.repos for name, commits in hub.repos[repo].items()}

    refused("was trained on another base than org/first on the Hub", adapter_base_id="org/first")
    refused("org/absent, the base of the adapter in .*, is not on the Hub: pass its id", "org/absent")
    refused(r"the base of the adapter in .*/gone, no longer exists: pass one on the Hub with --adapter-base", "/gone")
    other = shutil.copytree(base, tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"other weights")
    refused("the weights in .*/other have changed since .*: train it again", str(other))
