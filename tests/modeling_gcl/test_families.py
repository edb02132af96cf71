"""Every family of backbones (`backbones.FAMILIES`, docs/models.md) through what users do with a model."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from modeling_gcl import GCLModel, gcl_loss
from tests.support.backbones import FAMILIES, random_image, tiny_encoder, tiny_model, tiny_processor
from universal_gcl.training.freezing import freeze_parts

TEXTS = ["a red dog runs on the grass", "the cat", "one bird flies in the blue sky", "a house"]

# the rest is by hand: pytest -m slow
COMPILED = ("clip", "vista-base", "efficientnet + bert")
LOADED_ELSEWHERE = ("clip", "clip, gated", "siglip2", "vista-base", "vista-m3", "efficientnet + bert")

pytestmark = pytest.mark.filterwarnings("error:.*deprecated:DeprecationWarning:transformers")


@pytest.fixture(params=FAMILIES)
def family(request):
    """Name of each family in turn."""
    return request.param


@functools.cache
def unchanged_model(family):
    """For tests that only look at it."""
    return tiny_model(family)


@functools.cache
def inputs_for(family):
    images = [random_image(i) for i in range(len(TEXTS))]
    return dict(tiny_processor(family)(images=images, text=TEXTS, return_tensors="pt"))


def mixed_rows():
    rows = [{"image": random_image(i)} for i in range(3)] + list(TEXTS)
    return rows + [{"image": random_image(i), "text": text} for i, text in enumerate(TEXTS)]


@torch.no_grad()
def embeddings(model, family, **kwargs):
    return model(**inputs_for(family), return_loss=False, **kwargs)


def assert_embeddings_equal(found, expected, atol):
    for name in ("image_embeds", "text_embeds", "fused_embeds"):
        torch.testing.assert_close(found[name], expected[name], atol=atol, rtol=0)


def assert_states_equal(found, expected):
    for (name, a), (_, b) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def poison(monkeypatch):
    """Memory that is allocated and not filled shows as NaN or as an index out of range."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def allocate_poisoned(*args, allocate=allocate, **kwargs):
            memory = allocate(*args, **kwargs)
            return memory.fill_(torch.nan if memory.is_floating_point() else -1_000_000)

        monkeypatch.setattr(torch, name, allocate_poisoned)


def test_embeddings_are_the_backbones_own(family):
    model = unchanged_model(family)
    if FAMILIES[family].is_ours:
        pytest.skip("compared with the original's in test_modeling_vista.py")
    with torch.no_grad():
        found, theirs = model(**inputs_for(family)), model.encoder(**inputs_for(family))
    torch.testing.assert_close(found.image_embeds, theirs.image_embeds)
    if FAMILIES[family].gcl.get("text_pooling") != "mean":
        torch.testing.assert_close(found.text_embeds, theirs.text_embeds)
    assert found.image_embeds.shape == (len(TEXTS), model.config.projection_dim)
    expected = gcl_loss(found.image_embeds, found.text_embeds, found.fused_embeds, found.logit_scale)
    assert found.loss.item() == pytest.approx(expected.item())


def test_save_and_load_are_equal_with_poisoned_memory(family, tmp_path, monkeypatch):
    """Folder of the backbone → GCLModel → folder → AutoModel."""
    encoder, processor = tiny_encoder(family), tiny_processor(family)
    encoder.save_pretrained(tmp_path / "encoder")
    with monkeypatch.context() as patch:
        poison(patch)
        source = encoder if FAMILIES[family].is_ours else tmp_path / "encoder"
        model = GCLModel.from_encoder(source, **FAMILIES[family].gcl).eval()
    assert_states_equal(model.encoder, encoder)
    expected = unchanged_model(family).encode(mixed_rows(), processor)
    model.set_modality_means(*torch.randn(3, 4, model.config.projection_dim))
    model.save_pretrained(tmp_path / "gcl")
    processor.save_pretrained(tmp_path / "gcl")
    with monkeypatch.context() as patch:
        poison(patch)
        loaded = AutoModel.from_pretrained(tmp_path / "gcl", trust_remote_code=True).eval()
        loaded_processor = AutoProcessor.from_pretrained(tmp_path / "gcl", trust_remote_code=True)
    assert_states_equal(loaded, model)
    for name in ("fusion", "text_pooling", "logit_scale_init_value", "max_logit_scale"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    for each in (model, loaded):
        torch.testing.assert_close(each.encode(mixed_rows(), loaded_processor), expected, atol=1e-6, rtol=0)


def test_they_load_by_trust_remote_code_in_one_process_without_our_package(tmp_path):
    """A fresh interpreter, started elsewhere and without this repository on its path."""
    for name in LOADED_ELSEWHERE:
        unchanged_model(name).save_pretrained(tmp_path / name)
        tiny_processor(name).save_pretrained(tmp_path / name)
    random_image(0).save(tmp_path / "x.png")
    rows = ["a red dog", {"image": str(tmp_path / "x.png")}, {"image": str(tmp_path / "x.png"), "text": "a cat"}]
    script = tmp_path / "load.py"
    script.write_text(
        "import importlib.util, json, sys\n"
        "assert importlib.util.find_spec('modeling_gcl') is None\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "rows = json.loads(sys.argv[1])\n"
        "for folder in sys.argv[2:]:\n"
        "    model = AutoModel.from_pretrained(folder, trust_remote_code=True)\n"
        "    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)\n"
        "    print('RESULT', json.dumps([folder, model.encode(rows, processor=processor).tolist()]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", HIDE_REPOSITORY, str(script), json.dumps(rows), *LOADED_ELSEWHERE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = [line.removeprefix("RESULT ") for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    results = [json.loads(line) for line in lines]
    assert tuple(name for name, _ in results) == LOADED_ELSEWHERE
    for name, theirs in results:
        ours = unchanged_model(name).encode(rows, tiny_processor(name))
        torch.testing.assert_close(torch.tensor(theirs), ours, atol=1e-6, rtol=0)


# an editable install puts a finder for our packages into site-packages; drop it and its path before the script runs
HIDE_REPOSITORY = (
    "import sys, runpy; "
    "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '') "
    "and '__editable__' not in str(f)]; "
    f"sys.path = [p for p in sys.path if p != {os.getcwd()!r}]; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_bfloat16(family, tmp_path):
    model = tiny_model(family, logit_scale_init_value=14.3)
    model.save_pretrained(tmp_path)
    half = GCLModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == half.towers["text"].dtype == torch.bfloat16
    assert half.logit_scale.log_scale.dtype == half.modality_means.dtype == torch.float32
    assert half.logit_scale().item() == pytest.approx(14.3, abs=1e-5)
    expected, found = embeddings(model, family), embeddings(half, family)
    for name in ("image_embeds", "text_embeds", "fused_embeds"):
        assert found[name].dtype == torch.float32
        assert (found[name] * expected[name]).sum(-1).min() > 0.995, name
    text = ("input_ids", "attention_mask", "token_type_ids")  # float32 pixels by the other doors' way too
    with torch.no_grad():
        image = half.get_image_features(**{k: v for k, v in inputs_for(family).items() if k not in text}).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(image.float(), dim=-1), found["image_embeds"])


def test_gradient_checkpointing_gives_the_same_gradients(family):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(family)
        if checkpointing:
            # renamed in transformers 5.23, where the old name warns
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.towers["text"].modules())
        torch.manual_seed(0)  # dropout
        model.train()(**inputs_for(family)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize(
    "family", [name if name in COMPILED else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_compiled_into_one_graph(family):
    torch._dynamo.reset()
    model = unchanged_model(family)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_embeddings_equal(embeddings(compiled, family), embeddings(model, family), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_each_row_as_if_alone_whatever_order_padding_and_batch(family, batch_size):
    model, processor, rows = unchanged_model(family), tiny_processor(family), mixed_rows()
    permutation = np.random.default_rng(batch_size).permutation(len(rows))
    together = model.encode([rows[i] for i in permutation], processor, batch_size=batch_size)
    assert torch.equal(together, model.encode([rows[i] for i in permutation], processor, batch_size=batch_size))
    for position, i in enumerate(permutation):
        alone = model.encode([rows[i]], processor)
        torch.testing.assert_close(together[position], alone[0], atol=1e-5, rtol=0)
    padded = tiny_processor(family)
    padded.text_padding = "max_length"
    torch.testing.assert_close(model.encode(rows, padded), model.encode(rows, processor), atol=1e-5, rtol=0)


def test_attention_as_transformers_chooses_it_equals_eager(family, tmp_path):
    """SDPA, but for backbones that have none."""
    unchanged_model(family).save_pretrained(tmp_path)
    chosen = GCLModel.from_pretrained(tmp_path).eval()
    eager = GCLModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    has_sdpa = getattr(chosen.towers["text"], "_supports_sdpa", False)
    assert chosen.towers["text"].config._attn_implementation == ("sdpa" if has_sdpa else "eager")
    assert eager.towers["text"].config._attn_implementation == "eager"
    assert_embeddings_equal(embeddings(eager, family), embeddings(chosen, family), atol=1e-5)


def test_one_step_moves_every_trained_parameter(family, tmp_path):
    """DistributedDataParallel fails on any without a gradient; a loaded checkpoint must freeze as a new model does."""
    tiny_model(family).save_pretrained(tmp_path)
    for model in (tiny_model(family), GCLModel.from_pretrained(tmp_path), GCLModel.from_encoder(tmp_path)):
        moved = parts_moved(model, family)
        assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("part, prefixes", [("image", "encoder.vis"), ("text", "encoder.text")])
def test_a_frozen_side_stays_and_all_else_moves(family, part, prefixes):
    """Batch statistics stay, too."""
    model = tiny_model(family)
    freeze_parts(model, [part])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moved = parts_moved(model, family)
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved and not any(name.startswith(prefixes) for name in moved)
    for name, value in model.state_dict().items():
        if name.startswith(prefixes):
            assert torch.equal(before[name], value), name


def parts_moved(model, family):
    """Names of the parameters that two steps of training change: in the first the gates' last layer is zero."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    for _ in range(2):
        model.train()(**inputs_for(family)).loss.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
