"""Converts VISTA's (Visualized BGE's) own checkpoints, `Visualized_base_en_v1.5.pth` and `Visualized_m3.pth`.

- The file is a pickle. It is read with `weights_only=True`, which refuses code, and written as safetensors in float32.
- The sizes and the variant (BERT or XLM-RoBERTa) are read from the shapes of the tensors. Attention heads have 64
  channels in both variants.
- Every key is converted, known to be unused, or reported. The file is refused if a key is missing or a layer has
  parts that VISTA's layers don't have.
- The result is a GCL folder with `fusion="native"`, including the code that `AutoModel` and `AutoProcessor` load.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, PreTrainedConfig, XLMRobertaConfig

from modeling_gcl import GCLModel, GCLProcessor
from modeling_gcl.eva02 import rotary_tables
from modeling_gcl.vista import VistaModel
from modeling_gcl.vista_config import EVA02VisionConfig, VistaConfig
from universal_gcl.conversion.preprocessing import load_tokenizer, square_image_processor
from universal_gcl.conversion.report import Conversion
from universal_gcl.conversion.state_dict import check_finite_floats, list_names, read_state_dict
from universal_gcl.publishing.converted_model import save_converted_model
from universal_gcl.retrieval.new_folder import check_is_new

TOKENIZERS = {"base": "BAAI/bge-base-en-v1.5", "m3": "BAAI/bge-m3"}
HEAD_DIM = 64

VISUAL = "model_visual.visual"
OUTER_NAMES = {
    "bge_embeddings.word_embeddings.weight": "text_model.embeddings.word_embeddings.weight",
    "bge_embeddings.position_embeddings.weight": "text_model.embeddings.position_embeddings.weight",
    "bge_embeddings.token_type_embeddings.weight": "text_model.embeddings.token_type_embeddings.weight",
    "bge_embeddings.LayerNorm.weight": "text_model.embeddings.LayerNorm.weight",
    "bge_embeddings.LayerNorm.bias": "text_model.embeddings.LayerNorm.bias",
    "visual_proj.weight": "visual_projection.weight",
    "visual_proj.bias": "visual_projection.bias",
    f"{VISUAL}.cls_token": "vision_model.embeddings.cls_token",
    f"{VISUAL}.pos_embed": "vision_model.embeddings.position_embedding",
    f"{VISUAL}.patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
    f"{VISUAL}.patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
}
BLOCK_MODULES = {
    "norm1": "attention_norm",
    "attn.inner_attn_ln": "attention.inner_norm",
    "attn.proj": "attention.out_proj",
    "norm2": "mlp_norm",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.up_proj",
    "mlp.w3": "mlp.down_proj",
    "mlp.ffn_ln": "mlp.inner_norm",
}
BLOCK_PARAMETERS = {
    "attn.q_bias": "attention.q_proj.bias",
    "attn.v_bias": "attention.v_proj.bias",
    "attn.q_proj.weight": "attention.q_proj.weight",
    "attn.k_proj.weight": "attention.k_proj.weight",
    "attn.v_proj.weight": "attention.v_proj.weight",
}
TEXT_MODULES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
# pattern of keys that VISTA doesn't use → the reason
UNUSED = {
    r"bge_pooler\.": "the pooler; VISTA's embedding is the [CLS] state itself",
    r"model_visual\.logit_scale$": "EVA-CLIP's temperature; the converted model starts at VISTA's own, 0.02",
    r"model_visual\.visual\.norm\.": "EVA-CLIP's final norm; VISTA takes the layer before it",
    r"model_visual\.visual\.head\.": "EVA-CLIP's projection; VISTA has its own",
    r".*rope\.freqs_(cos|sin)$": "tables of rotary positions; they are computed, and these were compared with them",
    r"bge_embeddings\.position_ids$": "position numbers, which transformers generates",
}
IN_LAYER = re.compile(r"(bge_encoder\.layer|model_visual\.visual\.blocks)\.\d+\.")


def convert_vista(file: str | Path, out_dir: str | Path, tokenizer: str | Path | None = None) -> Conversion:
    """Write a GCL folder: model.safetensors (float32), configs, code, tokenizer and image processor.

    The folder appears whole or not at all.

    Args:
        file: a `.pth` state dict in the format of FlagEmbedding's `research/visual_bge`.
        out_dir: folder to write; must be absent or empty.
        tokenizer: folder or Hub id; by default the text encoder's own, see `TOKENIZERS`.

    Returns:
        The folder, with notes: the variant, the number of converted tensors, and the unused ones with the reason.

    Raises:
        ValueError: the file is truncated, holds code, or is not such a state dict; keys are missing; layers have parts
            that VISTA's don't have; values are integers or not finite; the tokenizer can't be loaded or has another
            vocabulary than the weights.
        FileExistsError: `out_dir` is not empty.
        FileNotFoundError: there is no such file.
    """
    file, out_dir = Path(file), Path(out_dir)
    check_is_new(out_dir)
    state = read_state_dict(file)
    try:
        config = infer_config(state)
        variant = "m3" if config.text_config.model_type == "xlm-roberta" else "base"
        names = key_names(config)
        unused, unknown = classify_keys(state, names)
        check_finite_floats(state, names)
        check_rotary_tables(state, config.vision_config)
        processor = build_processor(tokenizer or TOKENIZERS[variant], config)
        config.cls_token_id, config.sep_token_id = processor.tokenizer("")["input_ids"]
        with torch.device("meta"):  # the parameters are never allocated: the file's tensors replace them
            encoder = VistaModel(config)
        model = GCLModel.from_encoder(encoder, fusion="native")
        load_weights(encoder, state, names)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error

    save_converted_model(
        out_dir,
        model,
        processor,
        base_model=file.name,
        conversion=f"It is VISTA (Visualized BGE, arXiv 2406.04292), variant {variant}: the weights of {file.name} "
        "under other names, in float32.",
    )
    notes = [f"VISTA {variant}, {len(names)} tensors converted to float32"]
    notes += [f"unused ({reason}): {', '.join(keys)}" for reason, keys in unused.items()]
    if unknown:
        notes.append(f"unused (unknown to this converter): {', '.join(unknown)}")
    return Conversion(out_dir, notes)


def infer_config(state: Mapping[str, torch.Tensor]) -> VistaConfig:
    """Infer the configuration from the shapes of the tensors.

    Raises:
        ValueError: the shapes are not those of a VISTA checkpoint; the message names the tensor.
    """

    def shape(key: str, ndim: int) -> torch.Size:
        if key not in state:
            raise ValueError(f"this is not a VISTA checkpoint: it lacks {key}.")
        if state[key].ndim != ndim:
            raise ValueError(f"{key} has shape {tuple(state[key].shape)}, but VISTA's has {ndim} dimensions.")
        return state[key].shape

    def layers(prefix: str) -> int:
        indices = [
            int(key[len(prefix) :].split(".")[0]) for key in state if re.match(re.escape(prefix) + r"\d+\.", key)
        ]
        return max(indices, default=-1) + 1

    def heads(width: int, tower: str) -> int:
        if width % HEAD_DIM:
            raise ValueError(f"the {tower} tower's width, {width}, is not a multiple of the head width {HEAD_DIM}.")
        return width // HEAD_DIM

    vocabulary, text_width = shape("bge_embeddings.word_embeddings.weight", 2)
    positions, _ = shape("bge_embeddings.position_embeddings.weight", 2)
    token_types, _ = shape("bge_embeddings.token_type_embeddings.weight", 2)
    text: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "num_hidden_layers": layers("bge_encoder.layer."),
        "num_attention_heads": heads(text_width, "text"),
        "intermediate_size": shape("bge_encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": positions,
        "type_vocab_size": token_types,
    }
    # BERT has embeddings for two types of text segments, XLM-RoBERTa for one
    text_config: PreTrainedConfig
    if token_types == 1:
        text_config = XLMRobertaConfig(**text, pad_token_id=1, layer_norm_eps=1e-5)
    else:
        text_config = BertConfig(**text, pad_token_id=0, layer_norm_eps=1e-12)
    width, channels, patch_size, _ = shape(f"{VISUAL}.patch_embed.proj.weight", 4)
    patches = shape(f"{VISUAL}.pos_embed", 3)[1] - 1
    grid = math.isqrt(patches)
    if grid**2 != patches:
        raise ValueError(f"{VISUAL}.pos_embed has {patches} patches, which is not a square number.")
    vision_config = EVA02VisionConfig(
        hidden_size=width,
        intermediate_size=shape(f"{VISUAL}.blocks.0.mlp.w1.weight", 2)[0],
        num_hidden_layers=layers(f"{VISUAL}.blocks."),
        num_attention_heads=heads(width, "image"),
        image_size=grid * patch_size,
        patch_size=patch_size,
        num_channels=channels,
    )
    # convert_vista sets the two token ids, which the tokenizer defines
    return VistaConfig(text_config=text_config, vision_config=vision_config, cls_token_id=0, sep_token_id=0)


def key_names(config: VistaConfig) -> dict[str, str]:
    """Every key that a checkpoint of this size must have → the name of the parameter in `VistaModel`."""
    names = dict(OUTER_NAMES)
    for layer in range(config.text_config.num_hidden_layers):
        for module in TEXT_MODULES:
            for kind in ("weight", "bias"):
                path = f"layer.{layer}.{module}.{kind}"
                names[f"bge_encoder.{path}"] = f"text_model.encoder.{path}"
    for layer in range(config.vision_config.num_hidden_layers):
        theirs, ours = f"{VISUAL}.blocks.{layer}", f"vision_model.layers.{layer}"
        for module, name in BLOCK_MODULES.items():
            for kind in ("weight", "bias"):
                names[f"{theirs}.{module}.{kind}"] = f"{ours}.{name}.{kind}"
        for parameter, name in BLOCK_PARAMETERS.items():
            names[f"{theirs}.{parameter}"] = f"{ours}.{name}"
    return names


def classify_keys(
    state: Mapping[str, torch.Tensor], names: Mapping[str, str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Sort the keys of `state` that are not in `names`.

    Returns:
        The keys that are known to be unused, by reason, and the unknown ones.

    Raises:
        ValueError: a key of `names` is missing, or a layer has an unknown part.
    """
    if missing := [key for key in names if key not in state]:
        raise ValueError(f"the file lacks {list_names(missing)}.")
    unused: dict[str, list[str]] = {}
    unknown = []
    for key in state:
        if key in names:
            continue
        reason = next((reason for pattern, reason in UNUSED.items() if re.match(pattern, key)), None)
        if reason:
            unused.setdefault(reason, []).append(key)
        else:
            unknown.append(key)
    if foreign := [key for key in unknown if IN_LAYER.match(key)]:
        raise ValueError(
            "its layers have parts that VISTA's layers don't have, and that change the embeddings: "
            f"{list_names(foreign)}."
        )
    return unused, unknown


def check_rotary_tables(state: Mapping[str, torch.Tensor], vision: PreTrainedConfig) -> None:
    """Check that the file's tables of rotary positions, if it has any, are those that the model computes.

    Raises:
        ValueError: a table differs.
    """
    tables = rotary_tables(vision.image_size // vision.patch_size, vision.rope_grid_size, HEAD_DIM)
    for key, tensor in state.items():
        if match := re.search(r"rope\.freqs_(cos|sin)$", key):
            table = tables[match[1] == "sin"][1:]  # without [CLS]
            if tensor.shape != table.shape or (tensor.float() - table).abs().max() > 1e-3:  # the file has float16
                raise ValueError(f"{key} is not the table of rotary positions of EVA02-CLIP's B-16 and L-14.")


def build_processor(tokenizer: str | Path, config: VistaConfig) -> GCLProcessor:
    """VISTA's preprocessing: the shortest side resized to the image size (bicubic), centre crop, CLIP's mean and
    standard deviation.

    Raises:
        ValueError: the tokenizer can't be loaded or doesn't belong to the text encoder.
    """
    text = config.text_config
    loaded = load_tokenizer(tokenizer)
    expected = {
        "vocabulary size": text.vocab_size,
        "padding token id": text.pad_token_id,
        "number of tokens of an empty text": 2,
    }
    found = (len(loaded), loaded.pad_token_id, len(loaded("")["input_ids"]))
    for (name, needed), value in zip(expected.items(), found):
        if value != needed:
            raise ValueError(
                f"the tokenizer {str(tokenizer)!r} does not belong to these weights, a {text.model_type} text encoder: "
                f"its {name} is {value}, but the weights need {needed}. Pass the right one: --tokenizer FOLDER_OR_ID."
            )
    loaded.padding_side = "right"
    limit = text.max_position_embeddings - (text.pad_token_id + 1 if text.model_type == "xlm-roberta" else 0)
    image_processor = square_image_processor(config.vision_config.image_size)
    return GCLProcessor(image_processor, loaded, max_text_length=min(loaded.model_max_length, limit))


def load_weights(encoder: VistaModel, state: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
    """Replace the encoder's parameters by the file's tensors in float32.

    Raises:
        ValueError: a tensor has another shape than the parameter.
    """
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    if wrong := [key for key, name in names.items() if state[key].shape != shapes[name]]:
        raise ValueError(f"these tensors' shapes don't fit the others': {list_names(wrong)}.")
    encoder.load_state_dict({name: state[key].float() for key, name in names.items()}, assign=True)
