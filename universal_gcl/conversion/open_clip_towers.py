"""Reads the two towers of an open_clip state dict and rewrites them as towers of transformers' CLIPModel.

open_clip's towers may be pruned. In TinyCLIP's "auto" checkpoints each layer has its own number of heads and MLP
channels, some layers have no attention or no MLP, and the residual stream has any width. In a CLIPModel all layers of a
tower have the same width, heads and MLP. The conversion therefore adds zeros, which don't change the output: an added
head has zero values, and no weight reads an added MLP channel. `residual_stream` widens the stream.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from universal_gcl.conversion.residual_stream import widen_stream
from universal_gcl.conversion.state_dict import list_names

Shapes = Mapping[str, tuple[str | int, ...]]

# The shapes of open_clip's tensors. Dimensions of the same name have the same size; "qkv" is three times "inner".
OUTER_SHAPES: dict[str, Shapes] = {
    "image": {
        "class_embedding": ("width",),
        "positional_embedding": ("positions", "width"),
        "conv1.weight": ("width", 3, "patch", "patch"),
        "ln_pre.weight": ("width",),
        "ln_pre.bias": ("width",),
        "ln_post.weight": ("width",),
        "ln_post.bias": ("width",),
        "proj": ("width", "dim"),
    },
    "text": {
        "token_embedding.weight": ("vocabulary", "width"),
        "positional_embedding": ("positions", "width"),
        "ln_final.weight": ("width",),
        "ln_final.bias": ("width",),
        "text_projection": ("width", "dim"),
    },
}
ATTENTION_SHAPES: Shapes = {
    "ln_1.weight": ("width",),
    "ln_1.bias": ("width",),
    "attn.in_proj_weight": ("qkv", "width"),
    "attn.in_proj_bias": ("qkv",),
    "attn.out_proj.weight": ("width", "inner"),
    "attn.out_proj.bias": ("width",),
}
MLP_SHAPES: Shapes = {
    "ln_2.weight": ("width",),
    "ln_2.bias": ("width",),
    "mlp.c_fc.weight": ("mlp", "width"),
    "mlp.c_fc.bias": ("mlp",),
    "mlp.c_proj.weight": ("width", "mlp"),
    "mlp.c_proj.bias": ("width",),
}
TRANSFORMERS_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
PREFIX = {"image": "visual.", "text": ""}
FINAL_NORM = {"image": "ln_post", "text": "ln_final"}
PROJECTION = {"image": "proj", "text": "text_projection"}


@dataclass
class Tower:
    """One tower: float32 tensors under open_clip's names, without the tower's prefix.

    Attributes:
        kind: "image" or "text".
        outer: the tensors outside the layers: embeddings, outer LayerNorms and the projection.
        blocks: the tensors of each layer. The sizes `inner` (heads x head_dim) and `mlp` may differ between layers.
        head_dim: channels per attention head.
        eps: epsilon of the LayerNorms.
    """

    kind: str
    outer: dict[str, torch.Tensor]
    blocks: list[dict[str, torch.Tensor]]
    head_dim: int
    eps: float

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return len(self.outer[f"{FINAL_NORM[self.kind]}.weight"])

    @property
    def heads(self) -> list[int]:
        """Number of attention heads of each layer."""
        return [block["attn.out_proj.weight"].shape[1] // self.head_dim for block in self.blocks]

    @property
    def mlp_sizes(self) -> list[int]:
        """Number of MLP channels of each layer."""
        return [len(block["mlp.c_fc.bias"]) for block in self.blocks]


def read_tower(
    state: Mapping[str, torch.Tensor], kind: str, pruned: bool
) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, torch.Tensor]]]:
    """Pick one tower's tensors out of an open_clip state dict.

    Args:
        state: the whole state dict under open_clip's names.
        kind: "image" or "text".
        pruned: whether a layer may have no attention or no MLP, as in TinyCLIP's pruned files.

    Returns:
        The outer tensors, and the layers by their number in the file; names without the tower's prefix.

    Raises:
        ValueError: tensors are missing; the message names them.
    """
    prefix = PREFIX[kind]
    outer = {name: state[prefix + name] for name in OUTER_SHAPES[kind] if prefix + name in state}
    missing = [prefix + name for name in OUTER_SHAPES[kind] if name not in outer]
    layers = layer_prefix(kind)
    numbers = {int(key[len(layers) :].split(".")[0]) for key in state if key.startswith(layers)}
    if not numbers:
        missing.append(layers + "*")
    blocks = {}
    for number in range(max(numbers, default=-1) + 1):
        found: dict[str, torch.Tensor] = {}
        for half in (ATTENTION_SHAPES, MLP_SHAPES):
            names = {name: f"{layers}{number}.{name}" for name in half}
            present = {name: state[key] for name, key in names.items() if key in state}
            if present or not pruned:
                missing += [key for name, key in names.items() if name not in present]
            found |= present
        blocks[number] = found
    if missing:
        raise ValueError(
            f"the {kind} tower lacks {list_names(missing)}: the file is incomplete or holds no CLIP with a vision "
            "transformer."
        )
    return outer, blocks


def layer_prefix(kind: str) -> str:
    """What the names of a tower's layers start with, before the layer's number."""
    return f"{PREFIX[kind]}transformer.resblocks."


def check_shapes(
    kind: str, outer: Mapping[str, torch.Tensor], blocks: Mapping[int, Mapping[str, torch.Tensor]], head_dim: int
) -> dict[str, int]:
    """Check that the shapes of a tower's tensors agree.

    Returns:
        The sizes of the outer tensors' dimensions, by name.

    Raises:
        ValueError: a tensor doesn't fit the others; the message names it.
    """
    sizes = {"width": len(outer[f"{FINAL_NORM[kind]}.weight"])}
    match_shapes(PREFIX[kind], outer, OUTER_SHAPES[kind], sizes)
    for number, block in blocks.items():
        prefix = f"{layer_prefix(kind)}{number}."
        block_sizes = {"width": sizes["width"]}
        match_shapes(prefix, block, {**ATTENTION_SHAPES, **MLP_SHAPES}, block_sizes)
        inner = block_sizes.get("inner", 0)
        if block_sizes.get("qkv", 0) != 3 * inner:
            raise ValueError(
                f"{prefix}attn: queries, keys and values have {block_sizes['qkv']} rows together, not 3 x {inner}. "
                "CLIPModel can't express heads of different widths."
            )
        if inner % head_dim:
            raise ValueError(
                f"{prefix}attn: {inner} channels are not a multiple of the head width {head_dim}. Pass --config with "
                "the model's open_clip_config.json, which holds the head width."
            )
    return sizes


def match_shapes(prefix: str, tensors: Mapping[str, torch.Tensor], shapes: Shapes, sizes: dict[str, int]) -> None:
    """Compare tensors with `shapes`. The first tensor that has a dimension sets its size in `sizes`.

    Raises:
        ValueError: a tensor has another shape; the message names it, with `prefix`.
    """
    for name, tensor in tensors.items():
        shape = shapes[name]
        if tensor.ndim == len(shape):
            for size, dimension in zip(tensor.shape, shape):
                if isinstance(dimension, str):
                    sizes.setdefault(dimension, size)
        expected = tuple(sizes.get(dimension) if isinstance(dimension, str) else dimension for dimension in shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{prefix}{name} has shape {tuple(tensor.shape)}, but the tower's other tensors need {expected}: "
                "CLIPModel can't express this."
            )


def fill_missing(block: Mapping[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """Give a layer without attention one with no heads, and a layer without MLP one with no channels."""
    filled = {}
    for name, shape in {**ATTENTION_SHAPES, **MLP_SHAPES}.items():
        empty = torch.zeros([width if dimension == "width" else 0 for dimension in shape])
        filled[name] = block.get(name, empty).float()
    return filled


def uniform_tower(tower: Tower) -> Tower:
    """The same function with equally many heads and MLP channels in every layer, and a width that the heads divide."""
    dim, heads = tower.head_dim, max(tower.heads)
    if tower.width % dim or heads > tower.width // dim:  # the stream gets at least 2 more channels
        tower = widen_tower(tower, dim * max(heads, -(-(tower.width + 2) // dim)))
    mlp = max(1, *tower.mlp_sizes)
    blocks = [pad_block(block, inner=tower.width, mlp=mlp) for block in tower.blocks]
    return Tower(tower.kind, tower.outer, blocks, dim, tower.eps)


def pad_block(block: Mapping[str, torch.Tensor], inner: int, mlp: int) -> dict[str, torch.Tensor]:
    """Add heads of zeros until all heads have `inner` channels together, and MLP channels of zeros up to `mlp`."""
    block = dict(block)
    head_channels, mlp_channels = inner - block["attn.out_proj.weight"].shape[1], mlp - len(block["mlp.c_fc.bias"])
    pad = torch.nn.functional.pad
    for name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        missing_rows = (0, 0) * (block[name].ndim - 1) + (0, head_channels)
        block[name] = torch.cat([pad(part, missing_rows) for part in block[name].chunk(3)])
    block["attn.out_proj.weight"] = pad(block["attn.out_proj.weight"], (0, head_channels))
    block["mlp.c_fc.weight"] = pad(block["mlp.c_fc.weight"], (0, 0, 0, mlp_channels))
    block["mlp.c_fc.bias"] = pad(block["mlp.c_fc.bias"], (0, mlp_channels))
    block["mlp.c_proj.weight"] = pad(block["mlp.c_proj.weight"], (0, mlp_channels))
    return block


def widen_tower(tower: Tower, wide: int) -> Tower:
    """The same function with a residual stream of `wide` channels.

    The gain and bias of each LayerNorm are moved into the layer that reads its output.

    Raises:
        ValueError: rounding leaves no exact mapping, see `residual_stream.widen_stream`.
    """
    outer = {name: tensor.double() for name, tensor in tower.outer.items()}
    width, kind = tower.width, tower.kind
    mapping = widen_stream(width, wide, outer.get("ln_pre.weight"))
    shrink = (width / wide) ** 0.5  # standard deviation in the wide stream / in the narrow one
    stream, embedding = mapping.stream, mapping.embedding

    outer["positional_embedding"] = outer["positional_embedding"] @ embedding.T
    if mapping.pre_gain is not None:  # the image tower
        outer["class_embedding"] = embedding @ outer["class_embedding"]
        outer["conv1.weight"] = torch.tensordot(embedding, outer["conv1.weight"], dims=1)
        outer["ln_pre.weight"] = mapping.pre_gain * shrink
        outer["ln_pre.bias"] = stream @ outer["ln_pre.bias"]
    else:
        outer["token_embedding.weight"] = outer["token_embedding.weight"] @ embedding.T

    norm, projection = FINAL_NORM[kind], PROJECTION[kind]
    gain, bias, weight = outer[f"{norm}.weight"], outer[f"{norm}.bias"], outer[projection]
    outer[projection] = shrink * stream @ (gain[:, None] * weight)
    # CLIPModel's projection has no bias: the last channel carries it. The channel before has the same values in the
    # stream, so that it can take over what was read from the last.
    outer[projection][-2] += outer[projection][-1]
    outer[projection][-1] = bias @ weight
    outer[f"{norm}.weight"], outer[f"{norm}.bias"] = torch.ones(wide), torch.zeros(wide)
    outer[f"{norm}.weight"][-1], outer[f"{norm}.bias"][-1] = 0, 1

    blocks = []
    for source in tower.blocks:
        block = {name: tensor.double() for name, tensor in source.items()}
        for norm, reader in (("ln_1", "attn.in_proj_"), ("ln_2", "mlp.c_fc.")):
            weight, bias = block[f"{reader}weight"], block[f"{reader}bias"]
            block[f"{reader}bias"] = bias + weight @ block[f"{norm}.bias"]
            block[f"{reader}weight"] = shrink * (weight * block[f"{norm}.weight"]) @ stream.T
            block[f"{norm}.weight"], block[f"{norm}.bias"] = torch.ones(wide), torch.zeros(wide)
        for layer in ("attn.out_proj", "mlp.c_proj"):
            block[f"{layer}.weight"] = stream @ block[f"{layer}.weight"]
            block[f"{layer}.bias"] = stream @ block[f"{layer}.bias"]
        blocks.append({name: tensor.float() for name, tensor in block.items()})
    outer = {name: tensor.float() for name, tensor in outer.items()}
    return Tower(kind, outer, blocks, tower.head_dim, tower.eps * width / wide)


def transformers_state(tower: Tower) -> dict[str, torch.Tensor]:
    """The tensors of a uniform tower under the names of transformers' CLIPModel."""
    model, projection = {
        "image": ("vision_model.", "visual_projection.weight"),
        "text": ("text_model.", "text_projection.weight"),
    }[tower.kind]
    state = {projection: tower.outer[PROJECTION[tower.kind]].T.contiguous()}
    for name, tensor in tower.outer.items():
        if name != PROJECTION[tower.kind]:
            state[model + transformers_name(name)] = tensor
    for number, block in enumerate(tower.blocks):
        layer = f"{model}encoder.layers.{number}."
        for name, tensor in block.items():
            if name.startswith("attn.in_proj_"):
                for part, rows in zip("qkv", tensor.chunk(3)):
                    state[f"{layer}self_attn.{part}_proj.{name.removeprefix('attn.in_proj_')}"] = rows.contiguous()
            else:
                state[layer + transformers_name(name)] = tensor
    return state


def transformers_name(name: str) -> str:
    """The name in transformers of an open_clip tensor: `mlp.c_fc.bias` → `mlp.fc1.bias`."""
    if name in TRANSFORMERS_NAMES:
        return TRANSFORMERS_NAMES[name]
    module, parameter = name.rsplit(".", 1)
    return f"{TRANSFORMERS_NAMES[module]}.{parameter}"
