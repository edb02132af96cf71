"""The image tower of EVA02-CLIP (arXiv 2303.11331), of which VISTA takes the patch tokens.

- Rotary positions in two dimensions, for patches and not for `[CLS]`; the tables are computed in float32 whatever the
  weights' dtype, and in each forward pass: there is no buffer that loading could leave empty or a cast could round.
- SwiGLU, a LayerNorm inside the attention and the MLP (sub-LN), no bias for keys.
- The output is the last layer's, without the final norm and head, which VISTA doesn't use.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .vista_config import EVA02VisionConfig

ROPE_THETA = 10000.0


def rotary_tables(grid_size, pretrained_grid_size, head_dim, device=None):
    r"""
    Cosines and sines that rotate each token's channel pairs: the first half of a head's channels by the patch's row,
    the second by its column.

    Args:
        grid_size (`int`): patches along a side.
        pretrained_grid_size (`int`): the same in pre-training; rows and columns are stretched to this range.
        head_dim (`int`): channels of a head, a multiple of 4.

    Returns:
        Two float32 `torch.Tensor` of shape `(1 + grid_size ** 2, head_dim)`. The first row, `[CLS]`, is no rotation.
    """
    half = head_dim // 2
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    places = torch.arange(grid_size, dtype=torch.float32, device=device) / grid_size * pretrained_grid_size
    angles = (places[:, None] * frequencies).repeat_interleave(2, dim=-1)  # (grid_size, half)
    rows = angles[:, None].expand(-1, grid_size, -1)
    columns = angles[None].expand(grid_size, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (grid_size ** 2, head_dim)
    angles = F.pad(angles, (0, 0, 1, 0))
    return angles.cos(), angles.sin()


def rotate(states, cos, sin):
    """Rotate the pairs of neighbouring channels of `states` (N, heads, L, head_dim); the result is float32 or wider."""
    even, odd = states[..., 0::2], states[..., 1::2]
    return states * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain softmax attention. There is no padding among patches, so that `attention_mask` is None. (transformers looks
    for this function's name to learn that the tower can switch to others.)"""
    weights = torch.softmax(query @ key.transpose(-1, -2) * scaling, dim=-1)
    return (weights @ value).transpose(1, 2), weights


class EVA02Embeddings(nn.Module):
    """Patches and `[CLS]` with their learned positions; in train mode with patch dropout (arXiv 2212.00794)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        num_patches = (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, num_patches + 1, config.hidden_size))

    def forward(self, pixel_values):
        """`(N, C, H, W)` → tokens `(N, 1 + P, hidden_size)` and, after patch dropout, the places `(N, 1 + P)` in the
        whole sequence that they come from, else None."""
        side = self.config.image_size
        if pixel_values.shape[-2:] != (side, side):
            raise ValueError(
                f"images of {pixel_values.shape[-2]} x {pixel_values.shape[-1]} pixels do not fit this tower, which "
                f"takes {side} x {side}: use the checkpoint's own processor"
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.position_embedding
        if not self.training or not self.config.patch_dropout:
            return tokens, None
        count = patches.shape[1]
        kept = max(1, int(count * (1 - self.config.patch_dropout)))
        # in the order of the draw, as the original: the text tower's positions then follow that order too
        places = 1 + torch.randn(len(patches), count, device=tokens.device).topk(kept, dim=-1).indices
        places = F.pad(places, (1, 0))  # [CLS] stays
        return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1])), places


class ResidualLinear(nn.Linear):
    """What a layer adds to the residual stream, drawn smaller the deeper the layer; `index` counts them from 0."""

    def __init__(self, in_features, out_features, index):
        super().__init__(in_features, out_features)
        self.index = index


class EVA02Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.inner_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_proj = ResidualLinear(config.hidden_size, config.hidden_size, index)

    def forward(self, hidden_states, cos, sin):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)  # (N, heads, L, head_dim)
        query = rotate(self.q_proj(hidden_states).view(shape).transpose(1, 2), cos, sin).to(value.dtype)
        key = rotate(self.k_proj(hidden_states).view(shape).transpose(1, 2), cos, sin).to(value.dtype)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0)  # (N, L, heads, ...)
        return self.out_proj(self.inner_norm(attended.flatten(2)))


class EVA02MLP(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.inner_norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.down_proj = ResidualLinear(config.intermediate_size, config.hidden_size, index)

    def forward(self, hidden_states):
        gated = F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.inner_norm(gated))


class EVA02Layer(GradientCheckpointingLayer):
    def __init__(self, config, index):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = EVA02Attention(config, index)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EVA02MLP(config, index)

    def forward(self, hidden_states, cos, sin):
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), cos, sin)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class EVA02VisionModel(PreTrainedModel):
    r"""
    Args:
        config ([`EVA02VisionConfig`]): the configuration.
    """

    config_class = EVA02VisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["EVA02Layer"]

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = EVA02Embeddings(config)
        self.layers = nn.ModuleList([EVA02Layer(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, EVA02Embeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.position_embedding, std=std)
        elif isinstance(module, ResidualLinear):
            init.normal_(module.weight, std=std / (2 * (module.index + 1)) ** 0.5)

    def forward(self, pixel_values):
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(N, C, image_size, image_size)`).

        Returns:
            `BaseModelOutput`: `last_hidden_state` of shape `(N, 1 + P, hidden_size)`, `[CLS]` first and then the
            patches row by row. In train mode with patch dropout the patches are those kept, in random order.

        Raises:
            ValueError: images of another size.
        """
        hidden_states, places = self.embeddings(pixel_values)
        config = self.config
        cos, sin = rotary_tables(
            config.image_size // config.patch_size,
            config.rope_grid_size,
            config.hidden_size // config.num_attention_heads,
            device=hidden_states.device,
        )
        if places is not None:
            cos, sin = cos[places][:, None], sin[places][:, None]  # (N, 1, 1 + P, head_dim)
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin)
        return BaseModelOutput(last_hidden_state=hidden_states)
