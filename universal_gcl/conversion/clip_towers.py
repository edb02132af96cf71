"""The two towers of an open_clip state dict, read from their shapes, and put into the form of transformers' CLIPModel.

open_clip's towers may be pruned: TinyCLIP's "auto" checkpoints keep another number of heads and of MLP channels in each
layer, lack whole attentions or MLPs, and have a residual stream of any width. CLIPModel has one width, one number of
heads and one MLP for all layers of a tower. Heads and MLP channels are filled up with zeros, which add exactly nothing:
an empty head has the value 0, an empty channel is not read, whatever act(0) is. For the stream see `stream_width`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from universal_gcl.conversion.stream_width import widen_stream

# Names of open_clip, dimensions by name: equal names are equal sizes. "qkv" is three times "inner".
OUTER_SHAPES = {
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
ATTENTION_SHAPES = {
    "ln_1.weight": ("width",),
    "ln_1.bias": ("width",),
    "attn.in_proj_weight": ("qkv", "width"),
    "attn.in_proj_bias": ("qkv",),
    "attn.out_proj.weight": ("width", "inner"),
    "attn.out_proj.bias": ("width",),
}
MLP_SHAPES = {
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
    """One tower: float tensors under open_clip's names without a prefix.

    Attributes:
        kind: "image" or "text".
        outer: embeddings, outer LayerNorms and the projection.
        blocks: one dict a layer, with `inner` (heads x head_dim) and `mlp` that may differ by layer.
        head_dim: width of each head.
        eps: of the LayerNorms.
    """

    kind: str
    outer: dict[str, torch.Tensor]
    blocks: list[dict[str, torch.Tensor]]
    head_dim: int
    eps: float

    @property
    def width(self) -> int:
        return len(self.outer[f"{FINAL_NORM[self.kind]}.weight"])

    @property
    def heads(self) -> list[int]:
        return [block["attn.out_proj.weight"].shape[1] // self.head_dim for block in self.blocks]

    @property
    def mlps(self) -> list[int]:
        return [len(block["mlp.c_fc.bias"]) for block in self.blocks]


def read_tower(state: dict[str, torch.Tensor], kind: str, pruned: bool) -> tuple[dict, dict[int, dict]]:
    """Takes one tower's tensors out of an open_clip `state`.

    Args:
        state: the whole state dict; open_clip's names, without wrappers.
        kind: "image" or "text".
        pruned: whether a layer may lack its attention, its MLP or both, as in TinyCLIP's pruned files.

    Returns:
        The outer tensors and the blocks by their number in the file, under names without prefix.

    Raises:
        ValueError: tensors are missing, named in the message.
    """
    prefix = PREFIX[kind]
    outer = {name: state[prefix + name] for name in OUTER_SHAPES[kind] if prefix + name in state}
    missing = [prefix + name for name in OUTER_SHAPES[kind] if name not in outer]
    layers = f"{prefix}transformer.resblocks."
    numbers = {int(key[len(layers) :].split(".")[0]) for key in state if key.startswith(layers)}
    if not numbers:
        missing.append(layers + "*")
    blocks = {}
    for number in range(max(numbers, default=-1) + 1):
        found = {}
        for half in (ATTENTION_SHAPES, MLP_SHAPES):
            names = {name: f"{layers}{number}.{name}" for name in half}
            present = {name: state[key] for name, key in names.items() if key in state}
            if present or not pruned:
                missing += [key for name, key in names.items() if name not in present]
            found |= present
        blocks[number] = found
    if missing:
        raise ValueError(f"the {kind} tower lacks {enumerate_names(missing)}: the file is incomplete or no CLIP.")
    return outer, blocks


def check_shapes(kind: str, outer: dict, blocks: dict[int, dict], head_dim: int) -> dict[str, int]:
    """Compares all shapes of a tower with one another; returns its sizes by name.

    Raises:
        ValueError: a tensor does not fit the tower, holds no floats or no finite numbers; named in the message.
    """
    sizes: dict[str, int] = {"width": len(outer[f"{FINAL_NORM[kind]}.weight"])}
    check_tensors(PREFIX[kind], outer, OUTER_SHAPES[kind], sizes)
    for number, block in blocks.items():
        prefix = f"{PREFIX[kind]}transformer.resblocks.{number}."
        local = {"width": sizes["width"]}
        check_tensors(prefix, block, ATTENTION_SHAPES | MLP_SHAPES, local)
        inner = local.get("inner", 0)
        if local.get("qkv", 0) != 3 * inner:
            raise ValueError(
                f"{prefix}attn: queries, keys and values have {local['qkv']} rows, not 3 x {inner}: heads of different "
                "widths are not expressible in CLIPModel."
            )
        if inner % head_dim:
            raise ValueError(
                f"{prefix}attn: {inner} channels are no multiple of the head width {head_dim}: pass --config with the "
                "model's open_clip_config.json, which tells the width of the heads."
            )
    return sizes


def check_tensors(prefix: str, tensors: dict, shapes: dict, sizes: dict[str, int]) -> None:
    """Checks dtypes, values and shapes; a dimension whose name is not in `sizes` yet is entered there."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{prefix}{name} holds {tensor.dtype}, not floats: quantised checkpoints are not read.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{prefix}{name} holds NaN or infinite values: the checkpoint is broken.")
        shape = shapes[name]
        if tensor.ndim == len(shape):
            for size, dimension in zip(tensor.shape, shape):
                if isinstance(dimension, str):
                    sizes.setdefault(dimension, size)
        expected = tuple(sizes.get(dimension, dimension) for dimension in shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{prefix}{name} has shape {tuple(tensor.shape)}, expected {expected} from the tower's other tensors: "
                "not expressible in CLIPModel."
            )


def fill_missing(block: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """A block with an attention without heads and an MLP without channels where it has none."""
    filled = {}
    for name, shape in (ATTENTION_SHAPES | MLP_SHAPES).items():
        empty = torch.zeros([width if dimension == "width" else 0 for dimension in shape])
        filled[name] = block.get(name, empty).float()
    return filled


def uniform_tower(tower: Tower) -> Tower:
    """The same function with as many heads and MLP channels in every layer, and a width that the heads divide."""
    dim, heads = tower.head_dim, max(tower.heads)
    if tower.width % dim or heads > tower.width // dim:
        tower = widened_tower(tower, dim * max(heads, -(-(tower.width + 2) // dim)))
    mlp = max(1, *tower.mlps)
    blocks = [pad_block(block, inner=tower.width, mlp=mlp) for block in tower.blocks]
    return Tower(tower.kind, tower.outer, blocks, dim, tower.eps)


def pad_block(block: dict[str, torch.Tensor], inner: int, mlp: int) -> dict[str, torch.Tensor]:
    """Adds zero heads up to `inner` = heads x head_dim channels and zero MLP channels up to `mlp`."""
    block = dict(block)
    heads, channels = inner - block["attn.out_proj.weight"].shape[1], mlp - len(block["mlp.c_fc.bias"])
    pad = torch.nn.functional.pad
    for name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        missing_rows = (0, 0) * (block[name].ndim - 1) + (0, heads)
        block[name] = torch.cat([pad(part, missing_rows) for part in block[name].chunk(3)])
    block["attn.out_proj.weight"] = pad(block["attn.out_proj.weight"], (0, heads))
    block["mlp.c_fc.weight"] = pad(block["mlp.c_fc.weight"], (0, 0, 0, channels))
    block["mlp.c_fc.bias"] = pad(block["mlp.c_fc.bias"], (0, channels))
    block["mlp.c_proj.weight"] = pad(block["mlp.c_proj.weight"], (0, channels))
    return block


def widened_tower(tower: Tower, wide: int) -> Tower:
    """The same function with a residual stream of `wide` channels; LayerNorms' gains go into the layers that read them.

    Raises:
        ValueError: see `stream_width.widen_stream`.
    """
    outer = {name: tensor.double() for name, tensor in tower.outer.items()}
    width, kind = tower.width, tower.kind
    mapping = widen_stream(width, wide, outer.get("ln_pre.weight"))
    shrink = (width / wide) ** 0.5  # of the standard deviation in the wide stream
    stream, embed = mapping.stream, mapping.stream if mapping.embedding is None else mapping.embedding

    outer["positional_embedding"] = outer["positional_embedding"] @ embed.T
    if kind == "image":
        outer["class_embedding"] = embed @ outer["class_embedding"]
        outer["conv1.weight"] = torch.tensordot(embed, outer["conv1.weight"], dims=1)
        outer["ln_pre.weight"] = mapping.pre_gain * shrink
        outer["ln_pre.bias"] = stream @ outer["ln_pre.bias"]
    else:
        outer["token_embedding.weight"] = outer["token_embedding.weight"] @ embed.T

    norm, projection = FINAL_NORM[kind], PROJECTION[kind]
    gain, bias, weight = outer[f"{norm}.weight"], outer[f"{norm}.bias"], outer[projection]
    outer[projection] = shrink * stream @ (gain[:, None] * weight)
    # CLIPModel's projection has no bias: the last channel, whose part its equal neighbour takes over, carries it.
    outer[projection][-2] += outer[projection][-1]
    outer[projection][-1] = bias @ weight
    outer[f"{norm}.weight"], outer[f"{norm}.bias"] = torch.ones(wide), torch.zeros(wide)
    outer[f"{norm}.weight"][-1], outer[f"{norm}.bias"][-1] = 0, 1

    blocks = []
    for source in tower.blocks:
        block = {name: tensor.double() for name, tensor in source.items()}
        for norm, weight, bias in (
            ("ln_1", "attn.in_proj_weight", "attn.in_proj_bias"),
            ("ln_2", "mlp.c_fc.weight", "mlp.c_fc.bias"),
        ):
            block[bias] = block[bias] + block[weight] @ block[f"{norm}.bias"]
            block[weight] = shrink * (block[weight] * block[f"{norm}.weight"]) @ stream.T
            block[f"{norm}.weight"], block[f"{norm}.bias"] = torch.ones(wide), torch.zeros(wide)
        for layer in ("attn.out_proj", "mlp.c_proj"):
            block[f"{layer}.weight"] = stream @ block[f"{layer}.weight"]
            block[f"{layer}.bias"] = stream @ block[f"{layer}.bias"]
        blocks.append({name: tensor.float() for name, tensor in block.items()})
    outer = {name: tensor.float() for name, tensor in outer.items()}
    return Tower(kind, outer, blocks, tower.head_dim, tower.eps * width / wide)


def transformers_state(tower: Tower) -> dict[str, torch.Tensor]:
    """A uniform tower's tensors under the names of transformers' CLIPModel."""
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
    """`mlp.c_fc.bias` → `mlp.fc1.bias`."""
    if name in TRANSFORMERS_NAMES:
        return TRANSFORMERS_NAMES[name]
    module, parameter = name.rsplit(".", 1)
    return f"{TRANSFORMERS_NAMES[module]}.{parameter}"


def enumerate_names(names: Iterable[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
