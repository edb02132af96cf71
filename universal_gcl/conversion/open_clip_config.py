"""Reads open_clip's config file, which holds the settings that can't be read from the shapes of a state dict."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG_NAME = "open_clip_config.json"  # open_clip writes it to the Hub under this name
CLIP_MODEL_VALUES: dict[str, dict[str, Any]] = {  # settings that don't show in shapes → their value in a CLIPModel
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
WIDEST_WITH_64 = 1024  # open_clip's own image towers have heads of 64 channels up to this width, and never above it
EPS = 1e-5


@dataclass
class Settings:
    """The settings that can't be read from shapes. None means that no config was given or that it doesn't say.

    Attributes:
        quick_gelu: whether the activation is QuickGELU; else it is GELU.
        head_width: channels per attention head of the image tower.
        text_head_width: the same for the text tower.
        eps: epsilon of the LayerNorms, for "image" and "text".
        image_size: side of the input in pixels.
        sizes: the sizes that the config states, by (tower, name of `open_clip_towers`' dimensions).
        preprocess: open_clip's `preprocess_cfg`.
    """

    quick_gelu: bool | None = None
    head_width: int | None = None
    text_head_width: int | None = None
    eps: dict[str, float] = field(default_factory=lambda: {"image": EPS, "text": EPS})
    image_size: int | None = None
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    preprocess: dict[str, Any] | None = None


def read_config(path: Path) -> Settings:
    """Read an `open_clip_config.json` (with `model_cfg` and `preprocess_cfg`) or the config of a model alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON of this form, or CLIPModel can't express a setting; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config {path} is not a file.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config {path} is not valid JSON: {error}") from error
    model = document.get("model_cfg", document) if isinstance(document, dict) else None
    if not isinstance(model, dict) or not all(isinstance(model.get(part), dict) for part in CLIP_MODEL_VALUES):
        raise ValueError(f"config {path} has no vision_cfg and text_cfg: pass open_clip's {CONFIG_NAME}.")
    if "multimodal_cfg" in model:
        raise ValueError(f"config {path} has a multimodal_cfg: it is a CoCa, which CLIPModel can't express.")
    for part, expected in CLIP_MODEL_VALUES.items():
        for name, value in expected.items():
            if (given := model[part].get(name, value)) != value:
                raise ValueError(f"config {path}: CLIPModel can't express {part}.{name} = {given!r}.")
    vision, text = model["vision_cfg"], model["text_cfg"]
    settings = Settings(
        quick_gelu=bool(model.get("quick_gelu", False)),
        head_width=vision.get("head_width", HEAD_WIDTH),
        image_size=square_size(vision.get("image_size"), path),
        preprocess=document.get("preprocess_cfg"),
    )
    for kind, part in (("image", vision), ("text", text)):
        settings.eps[kind] = (part.get("norm_kwargs") or {}).get("eps", EPS)
    if text.get("heads") and text.get("width"):
        settings.text_head_width = text["width"] // text["heads"]
    if not (model.get("mask_image") or model.get("mask_text")):  # TinyCLIP's masks: the sizes are those before pruning
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


def square_size(size: int | list[int] | None, path: Path) -> int | None:
    """The side of a square image; open_clip states it as a number or as [height, width].

    Raises:
        ValueError: the image is not square.
    """
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise ValueError(f"config {path}: images of {size} pixels are not square, as CLIPModel needs them.")
        return size[0]
    return size


def head_width(kind: str, width: int, settings: Settings) -> int:
    """Channels per attention head of a tower that is `width` wide.

    Raises:
        ValueError: the image tower is wide, and there is no config.
    """
    if kind == "text":
        return settings.text_head_width or HEAD_WIDTH
    if settings.head_width is None and width > WIDEST_WITH_64:
        raise ValueError(
            f"the file doesn't say how wide the image tower's heads are, and in open_clip's models of width {width} "
            f"they are not {HEAD_WIDTH} wide: pass --config {CONFIG_NAME}."
        )
    return settings.head_width or HEAD_WIDTH


def image_size(sizes: dict[str, int], settings: Settings) -> int:
    """Side of the input in pixels, from the config or, if it states none, from the grid of positions and the patch
    size.

    Raises:
        ValueError: the positions form no square grid, or another grid than the config states.
    """
    grid, patch = round((sizes["positions"] - 1) ** 0.5), sizes["patch"]
    if grid**2 + 1 != sizes["positions"]:
        raise ValueError(
            f"visual.positional_embedding has {sizes['positions']} rows, which is not a class token and a square grid: "
            "CLIPModel can't express this."
        )
    if settings.image_size is None:
        return grid * patch
    if settings.image_size // patch != grid:
        raise ValueError(
            f"visual.positional_embedding is a grid of {grid} x {grid}, but the config has images of "
            f"{settings.image_size} pixels and patches of {patch}: it is the config of another model."
        )
    return settings.image_size
