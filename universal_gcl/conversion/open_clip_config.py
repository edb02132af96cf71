"""open_clip's config file: what a state dict's shapes don't tell."""

import json
from dataclasses import dataclass, field
from pathlib import Path

CONFIG_NAME = "open_clip_config.json"  # as open_clip writes it to the Hub
PLAIN_CONFIG = {  # settings that shapes don't show, and the value CLIPModel has
    "vision_cfg": {"attentional_pool": False, "no_ln_pre": False, "pool_type": "tok", "timm_model_name": None},
    "text_cfg": {
        "embed_cls": False,
        "hf_model_name": None,
        "no_causal_mask": False,
        "pool_type": "argmax",
        "proj_bias": False,
        "proj_type": "linear",
    },
}
HEAD_WIDTH = 64
WIDEST_WITH_64 = 1024  # open_clip's own image towers up to this width have heads of 64, all wider ones have others


@dataclass
class Settings:
    """What the shapes don't tell, from open_clip's config."""

    quick_gelu: bool | None = None
    head_width: int | None = None
    text_head_width: int | None = None
    eps: dict[str, float] = field(default_factory=lambda: {"image": 1e-5, "text": 1e-5})
    image_size: int | None = None
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    preprocess: dict | None = None


def read_config(path: Path) -> Settings:
    """Settings of an `open_clip_config.json` (model_cfg and preprocess_cfg) or of a bare model config.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON of that form, or a setting that CLIPModel cannot express.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config {path} is no file.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config {path} is no JSON: {error}") from error
    model = document.get("model_cfg", document) if isinstance(document, dict) else None
    if not isinstance(model, dict) or not all(isinstance(model.get(part), dict) for part in PLAIN_CONFIG):
        raise ValueError(f"config {path} has no vision_cfg and text_cfg: give open_clip's {CONFIG_NAME}.")
    if "multimodal_cfg" in model:
        raise ValueError(f"config {path}: multimodal_cfg is CoCa's; CLIPModel cannot express it.")
    for part, plain in PLAIN_CONFIG.items():
        for name, value in plain.items():
            if (given := model[part].get(name, value)) != value:
                raise ValueError(f"config {path}: {part}.{name} = {given!r} is not expressible in CLIPModel.")
    vision, text = model["vision_cfg"], model["text_cfg"]
    settings = Settings(
        quick_gelu=bool(model.get("quick_gelu", False)),
        head_width=vision.get("head_width", HEAD_WIDTH),
        image_size=square_size(vision.get("image_size"), path),
        preprocess=document.get("preprocess_cfg"),
    )
    for kind, part in (("image", vision), ("text", text)):
        settings.eps[kind] = (part.get("norm_kwargs") or {}).get("eps", 1e-5)
    if text.get("heads") and text.get("width"):
        settings.text_head_width = text["width"] // text["heads"]
    if not (model.get("mask_image") or model.get("mask_text")):  # else TinyCLIP's: sizes before pruning
        stated = {
            ("image", "width"): vision.get("width"),
            ("image", "layers"): vision.get("layers"),
            ("image", "patch"): vision.get("patch_size"),
            ("image", "dim"): model.get("embed_dim"),
            ("text", "width"): text.get("width"),
            ("text", "layers"): text.get("layers"),
            ("text", "positions"): text.get("context_length"),
            ("text", "vocabulary"): text.get("vocab_size"),
        }
        settings.sizes = {name: size for name, size in stated.items() if size is not None}
    return settings


def square_size(size, path: Path) -> int | None:
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise ValueError(f"config {path}: images of {size} are not square, as CLIPModel needs them.")
        return size[0]
    return size


def head_width(kind: str, width: int, settings: Settings) -> int:
    if kind == "text":
        return settings.text_head_width or HEAD_WIDTH
    if settings.head_width is None and width > WIDEST_WITH_64:
        raise ValueError(
            f"the width of the image tower's heads is not in the file, and at width {width} they are not 64 in "
            f"open_clip's models: pass --config {CONFIG_NAME}."
        )
    return settings.head_width or HEAD_WIDTH


def image_size(sizes: dict[str, int], settings: Settings) -> int:
    """Side of the input in pixels, by the grid of positions; the config's if it has the same grid."""
    grid, patch = round((sizes["positions"] - 1) ** 0.5), sizes["patch"]
    if grid**2 + 1 != sizes["positions"]:
        raise ValueError(
            f"visual.positional_embedding has {sizes['positions']} rows, not a class token and a square grid: "
            "not expressible in CLIPModel."
        )
    if settings.image_size is None:
        return grid * patch
    if settings.image_size // patch != grid:
        raise ValueError(
            f"visual.positional_embedding is a grid of {grid} x {grid}, but the config has images of "
            f"{settings.image_size} pixels and patches of {patch}: not its config."
        )
    return settings.image_size
