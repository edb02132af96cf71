"""Converts VISTA's (Visualized BGE's) own checkpoints, `Visualized_base_en_v1.5.pth` and `Visualized_m3.pth`.

- The file is a pickle: it is read with `weights_only=True`, which refuses code, and written as safetensors in float32.
- Sizes and variant (BERT or XLM-RoBERTa) are read off the tensors' shapes; both have attention heads of 64 channels.
- Each key is mapped, known to be unused, or reported; a missing one, or a layer with parts of its own, is refused.
- The result is a GCL folder with fusion "native" that loads by `AutoModel`, remote code and processor included.
"""

import math
import re
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, XLMRobertaConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_gcl import GCLModel, GCLProcessor
from modeling_gcl.eva02 import rotary_tables
from modeling_gcl.vista import VistaModel
from modeling_gcl.vista_config import EVA02VisionConfig, VistaConfig
from universal_gcl.conversion.checkpoint_file import read_state_dict
from universal_gcl.publishing.hub_folder import write_conversion
from universal_gcl.publishing.model_folder import save_model_folder
from universal_gcl.retrieval.new_folder import check_is_new, new_folder

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
# pattern of keys that VISTA doesn't use → why
UNUSED = {
    r"bge_pooler\.": "the pooler: VISTA's embedding is the [CLS] state itself",
    r"model_visual\.logit_scale$": "EVA-CLIP's temperature: VISTA's own is 0.02, where the converted model starts",
    r"model_visual\.visual\.norm\.": "EVA-CLIP's last norm: VISTA takes the layer before",
    r"model_visual\.visual\.head\.": "EVA-CLIP's projection: VISTA has its own",
    r".*rope\.freqs_(cos|sin)$": "tables of rotary positions: computed, and compared with these",
    r"bge_embeddings\.position_ids$": "a counter that transformers makes itself",
}
IN_LAYER = re.compile(r"(bge_encoder\.layer|model_visual\.visual\.blocks)\.\d+\.")


def convert_vista(file: str | Path, out_dir: str | Path, tokenizer: str | Path | None = None) -> str:
    """Writes a GCL folder: model.safetensors (float32), configs, code, tokenizer and image processor.

    The folder appears whole or not at all.

    Args:
        file: a `.pth` state dict in the format of FlagEmbedding's `research/visual_bge`.
        out_dir: folder to write; must be absent or empty.
        tokenizer: folder or Hub id; by default the text encoder's own, see `TOKENIZERS`.

    Returns:
        A report of a few lines: the variant, the number of tensors used, and the unused ones by name with the reason.

    Raises:
        ValueError: the file holds code, is cut off or is no such state dict; keys are missing, or layers have parts
            that VISTA has not; values are no floats or not finite; the tokenizer isn't to be had, or has another
            vocabulary.
        FileExistsError: `out_dir` is not empty.
        FileNotFoundError: no such file.
    """
    file, out_dir = Path(file), Path(out_dir)
    check_is_new(out_dir)
    state = read_state_dict(file)
    config = infer_config(state, file)
    variant = "m3" if config.text_config.model_type == "xlm-roberta" else "base"
    names = key_names(config)
    unused, unknown = sort_keys(state, names, file)
    check_values(state, names, config, file)

    processor = make_processor(tokenizer or TOKENIZERS[variant], config, file)
    config.cls_token_id, config.sep_token_id = processor.tokenizer("")["input_ids"]
    with torch.device("meta"):  # the file's tensors take the place of the parameters, which are never allocated
        encoder = VistaModel(config)
    model = GCLModel.from_encoder(encoder, fusion="native")
    load_exactly(model.encoder, state, names, file)

    with new_folder(out_dir) as folder:
        save_model_folder(folder, model, processor)
        write_conversion(
            folder,
            out=out_dir,
            model=model,
            processor=processor,
            base_model=file.name,
            conversion=f"It is VISTA (Visualized BGE, arXiv 2406.04292), variant {variant}: the weights of "
            f"{file.name} under other names, in float32.",
        )

    lines = [f"{out_dir}: VISTA {variant}, {len(names)} tensors converted to float32"]
    lines += [f"unused ({reason}): {', '.join(keys)}" for reason, keys in unused.items()]
    if unknown:
        lines.append(f"unused (unknown to this converter): {', '.join(unknown)}")
    return "\n".join(lines)


def infer_config(state: dict[str, torch.Tensor], file: Path) -> VistaConfig:
    """The configuration that the shapes tell."""

    def shape(key, ndim):
        if key not in state:
            raise ValueError(f"{file} is no VISTA checkpoint: it lacks {key}.")
        if state[key].ndim != ndim:
            raise ValueError(f"{file}: {key} has shape {tuple(state[key].shape)}, which is not VISTA's.")
        return state[key].shape

    def layers(prefix):
        indices = [
            int(key[len(prefix) :].split(".")[0]) for key in state if re.match(re.escape(prefix) + r"\d+\.", key)
        ]
        return max(indices, default=-1) + 1

    def heads(width, tower):
        if width % HEAD_DIM:
            raise ValueError(f"{file}: the {tower} tower's width, {width}, is no multiple of heads of {HEAD_DIM}.")
        return width // HEAD_DIM

    vocabulary, text_width = shape("bge_embeddings.word_embeddings.weight", 2)
    positions, _ = shape("bge_embeddings.position_embeddings.weight", 2)
    token_types, _ = shape("bge_embeddings.token_type_embeddings.weight", 2)
    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "num_hidden_layers": layers("bge_encoder.layer."),
        "num_attention_heads": heads(text_width, "text"),
        "intermediate_size": shape("bge_encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": positions,
        "type_vocab_size": token_types,
    }
    # BERT knows two kinds of text segments, XLM-RoBERTa one
    if token_types == 1:
        text_config = XLMRobertaConfig(**text, pad_token_id=1, layer_norm_eps=1e-5)
    else:
        text_config = BertConfig(**text, pad_token_id=0, layer_norm_eps=1e-12)
    width, channels, patch_size, _ = shape(f"{VISUAL}.patch_embed.proj.weight", 4)
    patches = shape(f"{VISUAL}.pos_embed", 3)[1] - 1
    grid = math.isqrt(patches)
    if grid**2 != patches:
        raise ValueError(f"{file}: {VISUAL}.pos_embed has {patches} patches, which make no square.")
    vision_config = EVA02VisionConfig(
        hidden_size=width,
        intermediate_size=shape(f"{VISUAL}.blocks.0.mlp.w1.weight", 2)[0],
        num_hidden_layers=layers(f"{VISUAL}.blocks."),
        num_attention_heads=heads(width, "image"),
        image_size=grid * patch_size,
        patch_size=patch_size,
        num_channels=channels,
    )
    # the ids of the empty text follow from the tokenizer
    return VistaConfig(text_config=text_config, vision_config=vision_config, cls_token_id=0, sep_token_id=0)


def key_names(config: VistaConfig) -> dict[str, str]:
    """Every key that a checkpoint of this size must have → the parameter's name in `VistaModel`."""
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


def sort_keys(state: dict, names: dict, file: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The keys of `state` that aren't in `names`: those known to be unused, by reason, and unknown ones."""
    missing = [key for key in names if key not in state]
    if missing:
        raise ValueError(f"{file} lacks {listed(missing)}. Nothing was written.")
    unused, unknown = {}, []
    for key in state:
        if key in names:
            continue
        reason = next((reason for pattern, reason in UNUSED.items() if re.match(pattern, key)), None)
        if reason:
            unused.setdefault(reason, []).append(key)
        else:
            unknown.append(key)
    foreign = [key for key in unknown if IN_LAYER.match(key)]
    if foreign:
        raise ValueError(
            f"{file}: its layers have parts that VISTA's have not, which change the embeddings: {listed(foreign)}."
        )
    return unused, unknown


def check_values(state: dict, names: dict, config: VistaConfig, file: Path) -> None:
    """Raises ValueError for values that are no floats or not finite, or rotary tables other than those that will be
    computed."""
    integers = [key for key in names if not state[key].is_floating_point()]
    if integers:
        raise ValueError(f"{file}: no floats, but integers (quantised weights are not read) in {listed(integers)}.")
    bad = [key for key in names if not torch.isfinite(state[key]).all()]
    if bad:
        raise ValueError(f"{file} is damaged: not all values are finite in {listed(bad)}.")
    vision = config.vision_config
    tables = rotary_tables(vision.image_size // vision.patch_size, vision.rope_grid_size, HEAD_DIM)
    for key, tensor in state.items():
        if match := re.search(r"rope\.freqs_(cos|sin)$", key):
            table = tables[match[1] == "sin"][1:]  # without [CLS]
            if tensor.shape != table.shape or (tensor.float() - table).abs().max() > 1e-3:  # the file is in float16
                raise ValueError(f"{file}: {key} is not the table of rotary positions of EVA02-CLIP's B-16 and L-14.")


def make_processor(tokenizer: str | Path, config: VistaConfig, file: Path) -> GCLProcessor:
    """VISTA's preprocessing: shortest side to the image size by bicubic, centre crop, CLIP's mean and deviation.

    Where an odd number of pixels is cropped, transformers' PIL backend may begin one pixel before torchvision.
    """
    text = config.text_config
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the tokenizer {str(tokenizer)!r} is not to be had: {reason} Download it and pass its folder: --tokenizer "
            "FOLDER."
        ) from error
    expected = {"tokens": text.vocab_size, "padding token's id": text.pad_token_id, "tokens of an empty text": 2}
    found = (len(loaded), loaded.pad_token_id, len(loaded("")["input_ids"]))
    for (name, wanted), value in zip(expected.items(), found):
        if value != wanted:
            raise ValueError(
                f"the tokenizer {str(tokenizer)!r} does not belong to {file}, a {text.model_type} text encoder: its "
                f"{name}: {value}, the weights': {wanted}. Pass the right one: --tokenizer FOLDER_OR_ID."
            )
    loaded.padding_side = "right"
    limit = text.max_position_embeddings - (text.pad_token_id + 1 if text.model_type == "xlm-roberta" else 0)
    side = config.vision_config.image_size
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
    )
    return GCLProcessor(image_processor, loaded, max_text_length=min(loaded.model_max_length, limit))


def load_exactly(encoder: VistaModel, state: dict, names: dict, file: Path) -> None:
    """Puts the file's tensors, in float32, in the place of the encoder's parameters, which must have their shapes."""
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    wrong = [key for key, name in names.items() if state[key].shape != shapes[name]]
    if wrong:
        raise ValueError(f"{file}: shapes that do not go together: {listed(wrong)}.")
    encoder.load_state_dict({name: state[key].float() for key, name in names.items()}, assign=True)


def listed(keys: list[str], limit: int = 20) -> str:
    rest = len(keys) - limit
    return ", ".join(keys[:limit]) + (f" and {rest} more" if rest > 0 else "")
