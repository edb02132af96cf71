"""Converts a state dict of open_clip or TinyCLIP into a folder of transformers' CLIPModel.

- Supported are CLIPs with a vision transformer: open_clip's `CLIP`, its `CustomTextCLIP` if the layers are the same,
  TinyCLIP's manually and automatically pruned files, and OpenAI's state dicts.
- Sizes are read from the shapes. What the shapes don't show (GELU or QuickGELU, the heads of wide towers, pixel
  statistics) comes from open_clip's config file or from an option; it is never guessed.
- The folder appears whole or not at all.

The formats are defined by open_clip's model.py and push_to_hf_hub.py, and by TinyCLIP's model.py (`prune`,
`load_pruned_model`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from universal_gcl.conversion.open_clip_config import CONFIG_NAME, Settings, head_width, image_size, read_config
from universal_gcl.conversion.open_clip_towers import (
    FINAL_NORM,
    PREFIX,
    Tower,
    check_shapes,
    fill_missing,
    layer_prefix,
    read_tower,
    transformers_state,
    uniform_tower,
)
from universal_gcl.conversion.preprocessing import load_tokenizer, square_image_processor
from universal_gcl.conversion.report import Conversion
from universal_gcl.conversion.state_dict import check_finite_floats, list_names, read_state_dict
from universal_gcl.retrieval.new_folder import check_is_new, new_folder

DEFAULT_TOKENIZER = "openai/clip-vit-base-patch32"
WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel and torch.compile add them anywhere in a name
PARTS = (  # first words of names in TinyCLIP's and CustomTextCLIP's files
    "_image_encoder",
    "image_encoder_without_ddp",
    "_text_encoder",
    "text_encoder_without_ddp",
    "_logit_scale",
    "text",
)
WITHOUT_EFFECT = ("input_resolution", "context_length", "vocab_size", "attn_mask", "logit_bias")
NOT_EXPRESSIBLE = {
    "visual.layer1.": "its image tower is a ModifiedResNet",
    "visual.trunk.": "its image tower comes from timm",
    "visual.model.": "its image tower comes from timm",
    "visual.attn_pool": "its image tower pools by attention (CoCa)",
    "text_decoder.": "it is a CoCa with a text decoder",
    "cls_emb": "its text tower has a class token (CoCa)",
    "transformer.embeddings.": "its text tower comes from transformers",
    "transformer.encoder.": "its text tower comes from transformers",
    "l0_module.": "TinyCLIP's masks are not applied yet; run its prune_model and save that model",
}


@dataclass
class Checkpoint:
    """The contents of an open_clip state dict.

    Attributes:
        towers: the image tower and the text tower.
        logit_scale: log of 1/temperature.
        sizes: the towers' sizes by name, for "image" and "text".
        notes: one line each about tensors and layers that are left out.
    """

    towers: list[Tower]
    logit_scale: torch.Tensor
    sizes: dict[str, dict[str, int]]
    notes: list[str]


def convert_open_clip(
    file: str | Path,
    out_dir: str | Path,
    *,
    tokenizer: str | Path = DEFAULT_TOKENIZER,
    config: str | Path | None = None,
    quick_gelu: bool | None = None,
) -> Conversion:
    """Write a CLIPModel folder: model.safetensors in float32, configs, tokenizer and image processor.

    Args:
        file: `.pt`, `.pth`, `.bin` or `.safetensors`. No code in it is run.
        out_dir: folder to write; must be absent or empty.
        tokenizer: folder or Hub id of CLIP's tokenizer.
        config: the model's `open_clip_config.json`, or one of open_clip's or TinyCLIP's `model_configs`.
        quick_gelu: whether the activation is QuickGELU (else GELU). If it is None, the config decides.

    Returns:
        The folder, with notes about unused tensors, assumptions and padding.

    Raises:
        FileExistsError: `out_dir` is not empty.
        FileNotFoundError: there is no such file or config.
        ValueError: the file is truncated or can't be read without running code; tensors are missing, not finite,
            unknown, or of shapes that CLIPModel can't express; the activation or the width of the heads is unknown;
            config, tokenizer and file don't fit together. The message names the tensor and the remedy.
    """
    file, out_dir = Path(file), Path(out_dir)
    check_is_new(out_dir)
    state = read_state_dict(file)
    try:
        settings = read_config(Path(config)) if config is not None else Settings()
        if quick_gelu is not None:
            settings.quick_gelu = quick_gelu
        if settings.quick_gelu is None:
            found = file.with_name(CONFIG_NAME)
            hint = f"--config {found}, which is in the same folder" if found.is_file() else f"--config {CONFIG_NAME}"
            raise ValueError(
                "the file doesn't say which activation the model has: pass --quick-gelu (OpenAI's weights and "
                f"open_clip's names that end in -quickgelu), --gelu (most others, TinyCLIP), or {hint}."
            )
        checkpoint = read_checkpoint(state, settings)
        sizes = checkpoint.sizes
        loaded = load_clip_tokenizer(tokenizer, sizes["text"]["vocabulary"], sizes["text"]["positions"])
        image_processor = build_image_processor(settings, image_size(sizes["image"], settings))
        uniform = [uniform_tower(tower) for tower in checkpoint.towers]
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    notes = checkpoint.notes + padding_notes(checkpoint.towers, uniform)
    if not settings.preprocess:
        notes.append(
            "assumed for images, as no preprocess_cfg was given: open_clip's default mean, standard deviation and "
            "bicubic resize"
        )

    model = CLIPModel(clip_config(uniform, sizes, settings, loaded))
    tensors = {"logit_scale": checkpoint.logit_scale.float().reshape(())}
    for tower in uniform:
        tensors |= transformers_state(tower)
    model.load_state_dict(tensors)
    with new_folder(out_dir) as folder:
        model.save_pretrained(folder)
        CLIPProcessor(image_processor, loaded).save_pretrained(folder)
    return Conversion(out_dir, notes)


def read_checkpoint(state: dict[str, torch.Tensor], settings: Settings) -> Checkpoint:
    """Read both towers and the temperature of an open_clip state dict.

    Raises:
        ValueError: see `convert_open_clip`. The message does not name the file.
    """
    pruned = any(name.startswith(("_image_encoder", "image_encoder_without_ddp")) for name in map(unwrapped, state))
    state = open_clip_names(state)
    for prefix, reason in NOT_EXPRESSIBLE.items():
        if found := [name for name in state if name.startswith(prefix)]:
            raise ValueError(f"{reason} ({found[0]}): CLIPModel can't express it.")
    if "logit_scale" not in state:
        raise ValueError("the file lacks logit_scale: it is incomplete or holds no CLIP.")
    read = {kind: read_tower(state, kind, pruned) for kind in ("image", "text")}
    used = ["logit_scale"]
    for kind, (outer, blocks) in read.items():
        used += [PREFIX[kind] + name for name in outer]
        used += [f"{layer_prefix(kind)}{number}.{name}" for number, block in blocks.items() for name in block]
    unused = [name for name in WITHOUT_EFFECT if name in state]
    if unknown := state.keys() - {*used, *unused}:
        raise ValueError(
            f"CLIPModel has no place for {list_names(sorted(unknown))}: the architecture differs from CLIP's."
        )
    check_finite_floats(state, used)
    if state["logit_scale"].numel() != 1:
        raise ValueError(f"logit_scale must be one number, but its shape is {tuple(state['logit_scale'].shape)}.")

    notes = [f"unused, without effect on embeddings: {list_names(unused)}"] if unused else []
    towers, sizes = [], {}
    for kind, (outer, blocks) in read.items():
        width = len(outer[f"{FINAL_NORM[kind]}.weight"])
        head_dim = head_width(kind, width, settings)
        sizes[kind] = check_shapes(kind, outer, blocks, head_dim) | {"layers": len(blocks)}
        if pruned_layers := [number for number, block in blocks.items() if not block]:
            notes.append(f"{kind} tower: layers {pruned_layers} are pruned completely and left out")
        kept = [fill_missing(block, width) for block in blocks.values() if block]
        floats = {name: tensor.float() for name, tensor in outer.items()}
        towers.append(Tower(kind, floats, kept, head_dim, settings.eps[kind]))
    if sizes["image"]["dim"] != sizes["text"]["dim"]:
        raise ValueError(
            f"visual.proj has {sizes['image']['dim']} output dimensions, text_projection {sizes['text']['dim']}: "
            "the towers belong to different models."
        )
    for (kind, name), expected in settings.sizes.items():
        if sizes[kind][name] != expected:
            raise ValueError(
                f"{kind} tower: {name} is {sizes[kind][name]} in the file, but {expected} in the config: it is the "
                "config of another model."
            )
    return Checkpoint(towers, state["logit_scale"], sizes, notes)


def open_clip_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under open_clip's names, without the words that wrappers and TinyCLIP's parts add.

    TinyCLIP's pruned files hold each tensor twice, with and without the wrapper.

    Raises:
        ValueError: two tensors of the same name differ.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        key = without_part(unwrapped(name))
        if key in renamed and not torch.equal(renamed[key], tensor):
            raise ValueError(f"the file holds {key} twice with different values (once as {name}): remove one of them.")
        renamed[key] = tensor
    return renamed


def unwrapped(name: str) -> str:
    """`module.visual._orig_mod.proj` → `visual.proj`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def without_part(name: str) -> str:
    """`_image_encoder.visual.proj` → `visual.proj`."""
    first, _, rest = name.partition(".")
    return rest if first in PARTS and rest else name


def build_image_processor(settings: Settings, side: int) -> CLIPImageProcessorPil:
    """open_clip's image transform for inference; without `preprocess_cfg`, the one with open_clip's defaults.

    Raises:
        ValueError: a resize mode that transformers' image processor for CLIP doesn't have.
    """
    given = settings.preprocess or {}
    mode = given.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise ValueError(
            f"preprocess_cfg.resize_mode = {mode!r}: transformers' image processor for CLIP has no such mode."
        )
    bilinear = given.get("interpolation") == "bilinear"
    return square_image_processor(
        side,
        crop=mode == "shortest",
        mean=given.get("mean") or OPENAI_CLIP_MEAN,
        std=given.get("std") or OPENAI_CLIP_STD,
        resample=PILImageResampling.BILINEAR if bilinear else PILImageResampling.BICUBIC,
    )


def load_clip_tokenizer(source: str | Path, vocabulary: int, context: int) -> PreTrainedTokenizerBase:
    """Load CLIP's tokenizer and limit it to `context` tokens.

    open_clip takes the text embedding at the token with the highest id, CLIPModel at the first end-of-text token. They
    agree only if the end-of-text token has the highest id, which is checked.

    Raises:
        ValueError: the tokenizer can't be loaded or doesn't belong to a text tower with `vocabulary` embeddings.
    """
    tokenizer = load_tokenizer(source)
    highest, end = max(tokenizer.get_vocab().values()), tokenizer.eos_token_id
    if end != highest:
        raise ValueError(
            f"the tokenizer {source} ends texts with id {end}, but its highest id is {highest}. open_clip's CLIP takes "
            "the text embedding at the highest id: pass --tokenizer with CLIP's own."
        )
    if highest >= vocabulary:
        raise ValueError(
            f"the tokenizer {source} has ids up to {highest}, but the text tower has {vocabulary} embeddings: pass "
            "--tokenizer with the tokenizer that the model was trained with."
        )
    tokenizer.model_max_length = context
    return tokenizer


def clip_config(
    towers: list[Tower], sizes: dict[str, dict[str, int]], settings: Settings, tokenizer: PreTrainedTokenizerBase
) -> CLIPConfig:
    """The configuration of a CLIPModel with these two uniform towers."""
    dim = sizes["image"]["dim"]
    common = [
        {
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp_sizes[0],
            "num_hidden_layers": len(tower.blocks),
            "num_attention_heads": tower.width // tower.head_dim,
            "hidden_act": "quick_gelu" if settings.quick_gelu else "gelu",
            "layer_norm_eps": tower.eps,
            "projection_dim": dim,
        }
        for tower in towers
    ]
    vision = common[0] | {"image_size": image_size(sizes["image"], settings), "patch_size": sizes["image"]["patch"]}
    text = common[1] | {
        "vocab_size": sizes["text"]["vocabulary"],
        "max_position_embeddings": sizes["text"]["positions"],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=dim)


def padding_notes(towers: list[Tower], uniform: list[Tower]) -> list[str]:
    """A line for each tower that was padded: what was padded, and the number of parameters before and after."""
    notes = []
    for before, after in zip(towers, uniform):
        changes = []
        if after.width != before.width:
            changes.append(f"residual stream {before.width} → {after.width}")
        for name, found, target in (
            ("heads", before.heads, after.width // after.head_dim),
            ("MLP channels", before.mlp_sizes, after.mlp_sizes[0]),
        ):
            if min(found) < target:
                changes.append(f"{name} {min(found)} to {max(found)} → {target}")
        if changes:
            millions = [count_parameters(tower) / 1e6 for tower in (before, after)]
            notes.append(
                f"{before.kind} tower padded: {', '.join(changes)}; {millions[0]:.1f} → {millions[1]:.1f} M parameters"
            )
    return notes


def count_parameters(tower: Tower) -> int:
    """Number of values in all tensors of a tower."""
    return sum(tensor.numel() for part in (tower.outer, *tower.blocks) for tensor in part.values())
