"""The image tower of EVA02-CLIP (arXiv 2303.11331). VISTA uses its patch tokens.

- Patches have two-dimensional rotary positions; `[CLS]` has none. Each forward pass computes the rotary tables in
  float32, for any dtype of the weights. So there is no buffer that loading could leave empty, or a cast could round.
- The MLP is a SwiGLU. Attention and MLP have a LayerNorm inside (sub-LN). Keys have no bias.
- The output is that of the last layer. VISTA doesn't use the final norm and head, so they are left out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .vista_config import EVA02VisionConfig

ROPE_THETA = 10000.0


def rotary_tables(
    grid_size: int, pretrained_grid_size: int, head_dim: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Cosines and sines that rotate the pairs of channels of each token. The patch's row rotates the first half of a
    head's channels, and its column the second half.

    Args:
        grid_size (`int`): patches along a side.
        pretrained_grid_size (`int`): patches along a side in pre-training. Rows and columns are scaled to this range.
        head_dim (`int`): channels of a head, a multiple of 4.

    Returns:
        `tuple` of two float32 `torch.Tensor` of shape `(1 + grid_size ** 2, head_dim)`. The first row is for `[CLS]`,
        and rotates by zero.
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


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of neighbouring channels of `states` (N, heads, L, head_dim). The result is at least float32."""
    even, odd = states[..., 0::2], states[..., 1::2]
    return states * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention without a mask: patches have no padding. (transformers looks for a function of this name to
    decide whether the tower can use other attention implementations.)"""
    weights = torch.softmax(query @ key.transpose(-1, -2) * scaling, dim=-1)
    return (weights @ value).transpose(1, 2), weights


class EVA02Embeddings(nn.Module):
    """`[CLS]` and patches, with learned positions. In train mode with patch dropout (arXiv 2212.00794)."""

    def __init__(self, config: EVA02VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        num_patches = (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, num_patches + 1, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(N, C, H, W)` → tokens `(N, 1 + P, hidden_size)`. If patch dropout has dropped some, also the indices
        `(N, 1 + P)` of the remaining ones in the full sequence; otherwise None."""
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
        # Kept in the order drawn, as in the original. The text tower numbers the visual tokens in that order.
        indices = 1 + torch.randn(len(patches), count, device=tokens.device).topk(kept, dim=-1).indices
        indices = F.pad(indices, (1, 0))  # [CLS] stays
        return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1])), indices


class ResidualLinear(nn.Linear):
    """The last linear map of an attention or MLP block. Deeper layers have smaller initial weights; `index` is the
    layer's number, from 0."""

    def __init__(self, in_features: int, out_features: int, index: int) -> None:
        super().__init__(in_features, out_features)
        self.index = index


class EVA02Attention(nn.Module):
    def __init__(self, config: EVA02VisionConfig, index: int) -> None:
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

    def forward(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(N, L, hidden_size)` → the same shape, and the attention weights `(N, heads, L, L)`, which only the eager
        implementation returns."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)  # (N, heads, L, head_dim)
        query = rotate(self.q_proj(hidden_states).view(shape).transpose(1, 2), cos, sin).to(value.dtype)
        key = rotate(self.k_proj(hidden_states).view(shape).transpose(1, 2), cos, sin).to(value.dtype)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return self.out_proj(self.inner_norm(attended.flatten(2))), weights  # attended is (N, L, heads, head_dim)


class EVA02MLP(nn.Module):
    def __init__(self, config: EVA02VisionConfig, index: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.inner_norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.down_proj = ResidualLinear(config.intermediate_size, config.hidden_size, index)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gated = F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.inner_norm(gated))


class EVA02Layer(GradientCheckpointingLayer):
    def __init__(self, config: EVA02VisionConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = EVA02Attention(config, index)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EVA02MLP(config, index)

    def forward(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.attention(self.attention_norm(hidden_states), cos, sin)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.mlp_norm(hidden_states)), weights


class EVA02VisionModel(PreTrainedModel):
    r"""
    Args:
        config ([`EVA02VisionConfig`]): the configuration.
    """

    config_class = EVA02VisionConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["EVA02Layer"]

    def __init__(self, config: EVA02VisionConfig) -> None:
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

    def get_input_embeddings(self) -> nn.Module:
        """The convolution that embeds patches."""
        return self.embeddings.patch_embedding

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(N, C, image_size, image_size)`).
            output_hidden_states (`bool`, *optional*): also return the input of the first layer and the output of each.
            output_attentions (`bool`, *optional*): also return each layer's attention weights. Only the eager attention
                implementation has them. Both options default to the configuration's.

        Returns:
            `BaseModelOutput`: `last_hidden_state` of shape `(N, 1 + P, hidden_size)`, with `[CLS]` first and then the
            patches row by row. In train mode with patch dropout, only the patches that were kept, in random order.

        Raises:
            ValueError: the images have another size.
        """
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        hidden_states, indices = self.embeddings(pixel_values)
        cos, sin = rotary_tables(
            config.image_size // config.patch_size,
            config.rope_grid_size,
            config.hidden_size // config.num_attention_heads,
            device=hidden_states.device,
        )
        if indices is not None:
            cos, sin = cos[indices][:, None], sin[indices][:, None]  # (N, 1, 1 + P, head_dim)
        all_states, all_weights = [hidden_states], []
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, cos, sin)
            if output_hidden_states:
                all_states.append(hidden_states)
            if output_attentions and weights is not None:
                all_weights.append(weights)
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )
