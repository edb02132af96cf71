"""Turns a state dict of open_clip or TinyCLIP into a folder of transformers' CLIPModel.

- Reads CLIP with a vision transformer: open_clip's `CLIP` and its like-named `CustomTextCLIP`, TinyCLIP's manually and
  automatically pruned files, OpenAI's state dicts.
- Sizes come from the shapes. What shapes cannot tell (GELU or QuickGELU, the heads of wide towers, pixel statistics)
  comes from open_clip's own config file or from a flag; it is not guessed.
- The folder appears whole or not at all.

Formats: open_clip's model.py and push_to_hf_hub.py; TinyCLIP's model.py (`prune`, `load_pruned_model`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from universal_gcl.conversion.checkpoint_file import read_state_dict
from universal_gcl.conversion.clip_towers import (
    Tower,
    check_shapes,
    enumerate_names,
    fill_missing,
    read_tower,
    transformers_state,
    uniform_tower,
)
from universal_gcl.conversion.open_clip_config import CONFIG_NAME, Settings, head_width, image_size, read_config
from universal_gcl.retrieval.new_folder import check_is_new, new_folder

DEFAULT_TOKENIZER = "openai/clip-vit-base-patch32"
WRAPPERS = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile, anywhere in a name
PREFIXES = {  # TinyCLIP's and CustomTextCLIP's parts
    "_image_encoder": "",
    "image_encoder_without_ddp": "",
    "_text_encoder": "",
    "text_encoder_without_ddp": "",
    "_logit_scale": "",
    "text": "",
}
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
class Conversion:
    """What `convert_open_clip` did.

    Attributes:
        folder: of the CLIPModel.
        notes: a line each about unused tensors, assumptions and padding.
    """

    folder: Path
    notes: list[str]


def convert_open_clip(
    file: str | Path,
    out_dir: str | Path,
    *,
    tokenizer: str | Path = DEFAULT_TOKENIZER,
    config: str | Path | None = None,
    quick_gelu: bool | None = None,
) -> Conversion:
    """Writes a CLIPModel folder: model.safetensors in float32, configs, tokenizer and image processor.

    Args:
        file: `.pt`, `.pth`, `.bin` or `.safetensors`; read without running code.
        out_dir: folder to write; absent or empty.
        tokenizer: folder or Hub id of CLIP's tokenizer.
        config: the model's `open_clip_config.json`, or one of open_clip's or TinyCLIP's `model_configs`.
        quick_gelu: whether the activation is QuickGELU, else GELU; None: as the config says.

    Raises:
        FileExistsError: `out_dir` is not empty.
        FileNotFoundError: no such file or config.
        ValueError: the file cannot be read safely or is truncated; tensors are missing, not finite, unknown or of
            shapes that CLIPModel cannot express; activation or width of the heads are unknown; config, tokenizer and
            file do not fit together. The message names the tensor and the remedy.
    """
    file, out_dir = Path(file), Path(out_dir)
    check_is_new(out_dir)
    state = read_state_dict(file)
    try:
        settings = read_config(Path(config)) if config is not None else Settings()
        if quick_gelu is not None:
            settings.quick_gelu = quick_gelu
        if settings.quick_gelu is None:
            beside = file.with_name(CONFIG_NAME)
            hint = f"--config {beside}, which lies there" if beside.is_file() else f"--config {CONFIG_NAME}"
            raise ValueError(
                "the activation is not in the file: pass --quick-gelu (OpenAI's weights and open_clip's names in "
                f"-quickgelu), --gelu (most others, TinyCLIP), or {hint}."
            )
        towers, logit_scale, sizes, notes = read_towers(state, settings)
        loaded = load_tokenizer(tokenizer, vocabulary=sizes["text"]["vocabulary"], context=sizes["text"]["positions"])
        image_processor, image_note = build_image_processor(settings, image_size(sizes["image"], settings))
        uniform = [uniform_tower(tower) for tower in towers]
        notes += [image_note] * (image_note is not None) + padding_notes(towers, uniform)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error

    model = CLIPModel(clip_config(uniform, sizes, settings, loaded))
    tensors = {"logit_scale": logit_scale.float().reshape(())}
    for tower in uniform:
        tensors |= transformers_state(tower)
    model.load_state_dict(tensors)  # strict: every key of either side
    with new_folder(out_dir) as folder:
        model.save_pretrained(folder)
        CLIPProcessor(image_processor, loaded).save_pretrained(folder)
    return Conversion(out_dir, notes)


def read_towers(state: dict[str, torch.Tensor], settings: Settings):
    """Both towers and the temperature of an open_clip state dict.

    Returns:
        (image tower, text tower), logit_scale, sizes by kind, notes.
    """
    pruned = any(name.startswith(("_image_encoder", "image_encoder_without_ddp")) for name in map(strip, state))
    state = plain_names(state)
    names = list(state)
    for prefix, reason in NOT_EXPRESSIBLE.items():
        if found := [name for name in names if name.startswith(prefix)]:
            raise ValueError(f"{reason} ({found[0]}): CLIPModel cannot express it.")
    notes = []
    if unused := [name for name in names if name in WITHOUT_EFFECT]:
        notes.append(f"unused, without effect on embeddings: {enumerate_names(unused)}")
    towers, sizes, known = [], {}, {"logit_scale", *unused}
    for kind in ("image", "text"):
        outer, blocks = read_tower(state, kind, pruned)
        prefix = "visual." if kind == "image" else ""
        known |= {prefix + name for name in outer}
        known |= {f"{prefix}transformer.resblocks.{number}.{name}" for number in blocks for name in blocks[number]}
        width = len(outer["ln_post.weight" if kind == "image" else "ln_final.weight"])
        head_dim = head_width(kind, width, settings)
        sizes[kind] = check_shapes(kind, outer, blocks, head_dim) | {"layers": len(blocks)}
        if dropped := [number for number, block in blocks.items() if not block]:
            notes.append(f"{kind} tower: layers {dropped} are pruned whole and left out")
        kept = [fill_missing(block, width) for block in blocks.values() if block]
        outer = {name: tensor.float() for name, tensor in outer.items()}
        towers.append(Tower(kind, outer, kept, head_dim, settings.eps[kind]))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"CLIPModel has no place for {enumerate_names(unknown)}: another architecture than CLIP's.")
    if "logit_scale" not in state:
        raise ValueError("it lacks logit_scale: the file is incomplete or no CLIP.")
    logit_scale = state["logit_scale"]
    if logit_scale.numel() != 1 or not torch.isfinite(logit_scale).all():
        raise ValueError(f"logit_scale must be one finite number, got {logit_scale}.")
    if sizes["image"]["dim"] != sizes["text"]["dim"]:
        raise ValueError(
            f"visual.proj gives {sizes['image']['dim']} dimensions, text_projection {sizes['text']['dim']}: "
            "the towers belong to different models."
        )
    for (kind, name), expected in settings.sizes.items():
        if sizes[kind][name] != expected:
            raise ValueError(f"{kind} tower: {name} is {sizes[kind][name]}, {expected} by the config: not its config.")
    return towers, logit_scale, sizes, notes


def plain_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under open_clip's names. TinyCLIP's pruned files hold each tensor twice, with and without DDP."""
    plain = {}
    for name, tensor in state.items():
        key = unprefixed(strip(name))
        if key in plain and not torch.equal(plain[key], tensor):
            raise ValueError(f"it holds {key} twice with different values (once as {name}): drop one of them.")
        plain[key] = tensor
    return plain


def strip(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unprefixed(name: str) -> str:
    """`_image_encoder.visual.proj` → `visual.proj`."""
    first, _, rest = name.partition(".")
    return rest if first in PREFIXES and rest else name


def build_image_processor(settings: Settings, side: int) -> tuple[CLIPImageProcessorPil, str | None]:
    """open_clip's transform for inference; without its config, with its defaults, which the note says."""
    given = settings.preprocess or {}
    mode = given.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise ValueError(
            f"preprocess_cfg.resize_mode = {mode!r}: transformers' image processor for CLIP has no such mode."
        )
    size = {"height": side, "width": side}
    processor = CLIPImageProcessorPil(
        size=size if mode == "squash" else {"shortest_edge": side},
        crop_size=size,
        do_center_crop=mode == "shortest",
        resample=PILImageResampling.BILINEAR
        if given.get("interpolation") == "bilinear"
        else PILImageResampling.BICUBIC,
        image_mean=list(given.get("mean") or OPENAI_CLIP_MEAN),
        image_std=list(given.get("std") or OPENAI_CLIP_STD),
    )
    assumed = "images: open_clip's default mean, standard deviation and bicubic resize, as no preprocess_cfg was given"
    return processor, None if settings.preprocess else assumed


def load_tokenizer(source: str | Path, vocabulary: int, context: int):
    """CLIP's tokenizer, cut to `context` tokens.

    open_clip pools where the token id is highest, CLIPModel at the first end-of-text token: the same only if end of
    text is the highest id, which is checked.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer {source} cannot be loaded ({str(error).splitlines()[0]}): pass --tokenizer with a folder "
            f"or Hub id of CLIP's tokenizer, such as a copy of {DEFAULT_TOKENIZER}."
        ) from error
    highest, end = max(tokenizer.get_vocab().values()), tokenizer.eos_token_id
    if end != highest:
        raise ValueError(
            f"the tokenizer {source} ends texts with id {end}, its highest id is {highest}: open_clip's CLIP reads its "
            "text embedding at the highest id. Pass --tokenizer with CLIP's own."
        )
    if highest >= vocabulary:
        raise ValueError(
            f"the tokenizer {source} has ids up to {highest}, the text tower {vocabulary} embeddings: pass --tokenizer "
            "with the one that the model was trained with."
        )
    tokenizer.model_max_length = context
    return tokenizer


def clip_config(towers: list[Tower], sizes: dict[str, dict[str, int]], settings: Settings, tokenizer) -> CLIPConfig:
    dim = sizes["image"]["dim"]
    common = [
        {
            "hidden_size": tower.width,
            "intermediate_size": tower.mlps[0],
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
    """What was padded, and the parameters before and after."""
    notes = []
    for before, after in zip(towers, uniform):
        changes = []
        if after.width != before.width:
            changes.append(f"residual stream {before.width} → {after.width}")
        for name, found, target in (
            ("heads", before.heads, after.width // after.head_dim),
            ("MLP channels", before.mlps, after.mlps[0]),
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
    return sum(tensor.numel() for part in (tower.outer, *tower.blocks) for tensor in part.values())
