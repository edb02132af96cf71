"""GCLModel does what every model of transformers does. The cases are those of transformers' ModelTesterMixin that
CLIPModel passes; CLIPModel itself is the first model here, so that each case is seen to hold for it."""

import copy

import pytest
import torch
from transformers.trainer_utils import align_special_tokens
from transformers.utils import ModelOutput

from modeling_gcl import GCLModel
from tests.support.backbones import random_image, tiny_encoder, tiny_model, tiny_processor

BACKBONES = ("clip", "vision-text-dual-encoder", "siglip", "vista-base")
NUM_LAYERS = 2
TEXTS = ["a red dog", "the blue cat sits"]
FEATURES = ("get_image_features", "get_text_features")


@pytest.fixture(params=["CLIPModel", *BACKBONES])
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return build(name)


def build(name):
    """Built from its configuration, as by `from_pretrained`: a VisionTextDualEncoder that was put together from two
    towers does not pass on a change of the attention implementation."""
    model = tiny_encoder("clip") if name == "CLIPModel" else tiny_model(name)
    rebuilt = type(model)(copy.deepcopy(model.config)).eval()
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt


def inputs_for(name, feature=None):
    processor = tiny_processor("clip" if name == "CLIPModel" else name)
    inputs = processor(images=[random_image(0), random_image(1)], text=TEXTS, return_tensors="pt")
    if feature == "get_image_features":
        return {"pixel_values": inputs["pixel_values"]}
    return {key: inputs[key] for key in inputs if feature is None or key != "pixel_values"}


def run(model, method="__call__", **inputs):
    with torch.no_grad():
        return getattr(model, method)(**inputs)


def assert_equal(left, right):
    """Compare outputs: tuples, dicts and tensors in each other."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif left is not None:
        left, right = (list(x.values() if isinstance(x, dict) else x) for x in (left, right))
        assert len(left) == len(right)
        for a, b in zip(left, right):
            assert_equal(a, b)


@pytest.mark.parametrize("options", [(), ("output_hidden_states",), ("output_attentions",)])
def test_a_tuple_holds_what_the_dict_holds(name, model, options):
    model.set_attn_implementation("eager")
    inputs = inputs_for(name) | dict.fromkeys(options, True)
    output = run(model, **inputs, return_dict=True)
    as_tuple = run(model, **inputs, return_dict=False)
    assert isinstance(output, ModelOutput) and type(as_tuple) is tuple
    assert_equal(as_tuple, output.to_tuple())
    assert_equal(run(model, **inputs, return_dict=None), output)


@pytest.mark.parametrize("method", FEATURES)
def test_features_as_a_tuple_or_an_output(name, model, method):
    inputs = inputs_for(name, method)
    output = run(model, method, **inputs)
    assert output.last_hidden_state.ndim == 3 and len(output.pooler_output) == len(TEXTS)
    assert_equal(run(model, method, **inputs, return_dict=False), output.to_tuple())
    model.config.return_dict = False
    assert type(run(model, method, **inputs)) is tuple


@pytest.mark.parametrize("method", FEATURES)
@pytest.mark.parametrize("kind, count", [("hidden_states", NUM_LAYERS + 1), ("attentions", NUM_LAYERS)])
def test_features_with_hidden_states_and_attentions(name, method, kind, count):
    model, inputs = build(name), inputs_for(name, method)
    model.set_attn_implementation("eager")
    plain = run(model, method, **inputs)
    asked = run(model, method, **inputs, **{f"output_{kind}": True})
    assert getattr(plain, kind) is None and len(getattr(asked, kind)) == count
    assert torch.equal(asked.pooler_output, plain.pooler_output)
    # the same if the configuration asks
    config = copy.deepcopy(model.config)
    for part in (config, config.text_config, config.vision_config, getattr(config, "encoder_config", config)):
        setattr(part, f"output_{kind}", True)
    model = type(model)(config).eval()
    model.set_attn_implementation("eager")
    assert len(getattr(run(model, method, **inputs), kind)) == count


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kind", ["hidden_states", "attentions"])
def test_forward_returns_the_towers_states_if_asked(backbone, kind):
    model, inputs = build(backbone), inputs_for(backbone)
    model.set_attn_implementation("eager")
    plain, asked = run(model, **inputs), run(model, **inputs, **{f"output_{kind}": True})
    assert plain.vision_model_output is None and plain.text_model_output is None
    assert torch.equal(asked.fused_embeds, plain.fused_embeds)
    for part, method in (("vision_model_output", "get_image_features"), ("text_model_output", "get_text_features")):
        alone = run(model, method, **inputs_for(backbone, method), **{f"output_{kind}": True})
        assert_equal(asked[part][kind], alone[kind])


def test_states_of_vistas_text_encoder_are_those_of_the_sequence_it_reads():
    model, inputs = tiny_model("vista-base").encoder, inputs_for("vista-base")
    model.set_attn_implementation("eager")
    output = run(model, "get_fused_features", **inputs, output_hidden_states=True, output_attentions=True)
    length = 4 + inputs["input_ids"].shape[1]  # four patches
    assert [x.shape for x in output.hidden_states] == [(2, length, 32)] * (NUM_LAYERS + 1)
    assert [x.shape for x in output.attentions] == [(2, 2, length, length)] * NUM_LAYERS
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    # a text alone has the same states from our collection as from BERT's own
    sequence = model.text_model.embeddings(inputs["input_ids"])
    ours = run(model, "_encode", sequence=sequence, attention_mask=inputs["attention_mask"],
               output_hidden_states=True, output_attentions=True)  # fmt: skip
    berts = run(model, "get_text_features", **inputs_for("vista-base", "get_text_features"),
                output_hidden_states=True, output_attentions=True)  # fmt: skip
    assert_equal(ours.hidden_states, berts.hidden_states)
    assert_equal(ours.attentions, berts.attentions)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_inputs_that_are_none_are_let_through(backbone):
    model, inputs = build(backbone), inputs_for(backbone)
    nothing = dict.fromkeys(("inputs_embeds", "labels", "output_attentions", "output_hidden_states", "return_dict"))
    assert_equal(run(model, **inputs, **nothing), run(model, **inputs))
    for method in FEATURES:
        run(model, method, **inputs_for(backbone, method), **nothing)
    with pytest.raises(TypeError, match="takes no input named labels"):
        run(model, **inputs, labels=torch.zeros(2))
    with pytest.raises(TypeError, match="takes no input named labels"):
        run(model, "get_text_features", **inputs_for(backbone, "get_text_features"), labels=torch.zeros(2))


def test_the_towers_configurations_have_transformers_names(model):
    config = model.config
    assert config.get_text_config().hidden_size == config.text_config.hidden_size == 32
    assert config.vision_config.num_hidden_layers == NUM_LAYERS
    assert model.text_model.config is config.text_config and model.vision_model.config is config.vision_config


@pytest.mark.parametrize("backbone", BACKBONES)
def test_token_embeddings_are_read_replaced_and_resized(backbone, tmp_path):
    model, inputs = build(backbone), inputs_for(backbone)
    before = run(model, **inputs).text_embeds
    assert model.get_input_embeddings().weight.shape == (30, 32)
    model.resize_token_embeddings(40)
    assert model.get_input_embeddings().weight.shape == (40, 32)
    assert model.config.get_text_config().vocab_size == 40
    assert torch.equal(run(model, **inputs).text_embeds, before)
    model.save_pretrained(tmp_path)
    again = GCLModel.from_pretrained(tmp_path)
    assert again.get_input_embeddings().weight.shape == (40, 32)
    assert torch.equal(run(again, **inputs).text_embeds, before)
    model.set_input_embeddings(torch.nn.Embedding(40, 32))
    assert not torch.allclose(run(model, **inputs).text_embeds, before)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_trainers_alignment_of_special_tokens_leaves_text_embeddings(backbone, tmp_path):
    """Trainer writes the tokenizer's special tokens into `config.get_text_config()`, the text tower's own."""
    model, inputs = build(backbone), inputs_for(backbone)
    before = run(model, **inputs).text_embeds
    align_special_tokens(model, tiny_processor(backbone))
    model.save_pretrained(tmp_path)
    assert torch.equal(run(GCLModel.from_pretrained(tmp_path), **inputs).text_embeds, before)


def test_attention_can_be_switched_in_both_towers(name, model):
    inputs = inputs_for(name)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        towers = (model.text_model, model.vision_model)
        assert {tower.config._attn_implementation for tower in towers} == {implementation}
        embeds = run(model, **inputs).text_embeds
        assert torch.allclose(embeds, run(build(name), **inputs).text_embeds, atol=1e-5)


def test_saving_and_loading_keeps_every_weight(name, model, tmp_path):
    inputs = inputs_for(name)
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal(run(again, **inputs).to_tuple(), run(model, **inputs).to_tuple())
    with torch.device("meta"):
        assert {p.device.type for p in type(model)(copy.deepcopy(model.config)).parameters()} == {"meta"}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_the_same_with_checkpointing(name, use_reentrant):
    inputs, gradients = inputs_for(name) | {"return_loss": True}, []
    for checkpointing in (False, True):
        model = build(name)
        if checkpointing:
            # transformers 5.17 has only the second name, and 5.23 deprecates it
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.train()(**inputs).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients):
        assert (plain is None) == (checkpointed is None)
        assert plain is None or torch.allclose(plain, checkpointed, atol=1e-6)


def test_a_row_does_not_depend_on_its_batch(name, model):
    inputs = inputs_for(name)
    whole = run(model, **inputs)
    for row in range(len(TEXTS)):
        alone = run(model, **{key: value[row : row + 1] for key, value in inputs.items()})
        for key in ("image_embeds", "text_embeds"):
            assert torch.allclose(alone[key], whole[key][row : row + 1], atol=1e-5)


# not SigLIP, whose texts sentence-transformers pads to the longest of the batch unless its files say otherwise
@pytest.mark.parametrize("backbone", ["clip", "vision-text-dual-encoder", "vista-base"])
def test_sentence_transformers_loads_a_folder_without_files_of_its_own(backbone, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, processor = build(backbone), tiny_processor(backbone)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not (tmp_path / "modules.json").exists()
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    embeds = theirs.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
    assert torch.allclose(embeds, model.encode(TEXTS, processor=processor), atol=1e-5)
