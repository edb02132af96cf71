"""VISTA (arXiv 2406.04292), also known as Visualized BGE: one text encoder embeds texts, images, and both together.

- The patches of an image become tokens of the text encoder, which reads `[CLS]`, the visual tokens, and the text.
- An image alone is read with the empty text. A text alone passes through the text encoder as usual.
- `get_visual_tokens` runs the image tower. Its result can be used for both the image feature and the fused feature.
- The image tower is that of EVA02-CLIP, as in the paper, or any of transformers that returns tokens or a feature map.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .eva02 import EVA02VisionModel
from .vista_config import VistaConfig


class VistaModel(PreTrainedModel):
    r"""
    Args:
        config ([`VistaConfig`]): the configuration.
    """

    config_class = VistaConfig
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VistaConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        is_eva = vision.model_type == EVA02VisionModel.config_class.model_type
        tower = EVA02VisionModel(vision) if is_eva else AutoModel.from_config(vision)
        self.vision_model: Any = _without_pooler(tower)
        self.visual_projection = nn.Linear(config.vision_width, config.projection_dim)
        self.text_model: Any = _without_pooler(AutoModel.from_config(config.text_config))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text encoder's token embeddings."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text encoder's token embeddings."""
        self.text_model.set_input_embeddings(value)

    def get_visual_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""
        The image as tokens of the text encoder, to be placed after `[CLS]`. The patches are projected, and get the text
        encoder's positions 1 to P and its embedding LayerNorm. They get no token type, and no dropout in train mode.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, C, H, W)`).

        Returns:
            `torch.Tensor` of shape `(N, P, D)`.

        Raises:
            ValueError: the tower takes images of another size, or there are so many patches that no text fits.
        """
        features = self.vision_model(pixel_values=pixel_values.to(self.dtype), return_dict=True).last_hidden_state
        if features.ndim == 4:
            features = features.flatten(2).transpose(1, 2)  # a feature map (N, C, H, W), row by row
        tokens = self.visual_projection(features[:, self.config.num_prefix_tokens :])
        self._room_for_text(tokens.shape[1])
        embeddings = self.text_model.embeddings
        # XLM-RoBERTa numbers the positions of a text from its padding id + 1; visual tokens are numbered from 1 all the
        # same, as in the original
        positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return embeddings.LayerNorm(tokens + embeddings.position_embeddings(positions))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        visual_tokens: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        r"""
        Features of N images: the same as `get_fused_features` with the empty text.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, C, H, W)`, *optional*).
            visual_tokens (`torch.Tensor` of shape `(N, P, D)`, *optional*): the result of `get_visual_tokens`, instead
                of `pixel_values`.
            output_hidden_states, output_attentions (`bool`, *optional*): also return those of the text encoder.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` has the features, of shape `(N, D)`.

        Raises:
            ValueError: neither or both of `pixel_values` and `visual_tokens` are given.
        """
        visual_tokens = self._visual_tokens(pixel_values, visual_tokens)
        empty = torch.tensor([[self.config.cls_token_id, self.config.sep_token_id]], device=visual_tokens.device)
        return self.get_fused_features(
            empty.expand(visual_tokens.shape[0], -1),
            visual_tokens=visual_tokens,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        r"""
        Features of N texts, by the text encoder alone. Texts over its limit are cut as in `get_fused_features`.

        Args:
            input_ids (`torch.LongTensor` of shape `(N, L)`): padded on the right.
            attention_mask (`torch.LongTensor` of shape `(N, L)`, *optional*): 1 for tokens, 0 for padding.
            token_type_ids (`torch.LongTensor` of shape `(N, L)`, *optional*).
            **kwargs: `output_hidden_states` and `output_attentions`.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` has the features, of shape `(N, D)`.
        """
        config = self.config.text_config
        # XLM-RoBERTa numbers the positions of a text from its padding id + 1
        used = self.text_model.embeddings.padding_idx + 1 if config.model_type == "xlm-roberta" else 0
        inputs = cut_texts(config.max_position_embeddings - used, input_ids, attention_mask, token_type_ids)
        input_ids, attention_mask, token_type_ids = inputs
        output = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            return_dict=True,
            **kwargs,
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=self._pool(output.last_hidden_state, attention_mask),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    @can_return_tuple
    def get_fused_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        visual_tokens: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        r"""
        Features of N images fused with N texts.

        The text encoder reads `[CLS]` at position 0, P visual tokens at positions 1 to P, and the rest of the text at
        positions P + 1 and up. If it has M positions, M - 1 - P text tokens fit after `[CLS]` (315 for VISTA base).
        Longer texts are cut at the end, but keep their closing `[SEP]`, as if the tokenizer had cut them. (The original
        fails on them.)

        Args:
            input_ids (`torch.LongTensor` of shape `(N, L)`): `[CLS]` first; padded on the right.
            attention_mask (`torch.LongTensor` of shape `(N, L)`, *optional*): 1 for tokens, 0 for padding.
            token_type_ids (`torch.LongTensor` of shape `(N, L)`, *optional*).
            pixel_values (`torch.Tensor` of shape `(N, C, H, W)`, *optional*).
            visual_tokens (`torch.Tensor` of shape `(N, P, D)`, *optional*): the result of `get_visual_tokens`, instead
                of `pixel_values`.
            output_hidden_states, output_attentions (`bool`, *optional*): also return those of the text encoder.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` has the features, of shape `(N, D)`, and `last_hidden_state`
            the states of all tokens, of shape `(N, P + L, D)`.

        Raises:
            ValueError: neither or both of `pixel_values` and `visual_tokens` are given.
        """
        visual_tokens = self._visual_tokens(pixel_values, visual_tokens)
        count = visual_tokens.shape[1]
        inputs = cut_texts(self._room_for_text(count), input_ids, attention_mask, token_type_ids)
        input_ids, attention_mask, token_type_ids = inputs
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = torch.where(positions > 0, positions + count, 0)[None]  # (1, L)
        text = self.text_model.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=positions
        )  # (N, L, D)
        sequence = torch.cat([text[:, :1], visual_tokens, text[:, 1:]], dim=1)  # (N, P + L, D)
        if attention_mask is not None:
            visual_mask = attention_mask.new_ones(visual_tokens.shape[:2])
            attention_mask = torch.cat([attention_mask[:, :1], visual_mask, attention_mask[:, 1:]], dim=1)
        output = self._encode(sequence, attention_mask, output_hidden_states, output_attentions)
        output.pooler_output = self._pool(output.last_hidden_state, attention_mask)
        return output

    def _encode(self, sequence, attention_mask, output_hidden_states, output_attentions):
        """Run the layers of the text encoder on embedded tokens (N, L, D). Its own forward can't be used: it would add
        token types and dropout to the visual tokens. Hooks collect what the forward would otherwise have collected."""
        states, weights, hooks = [sequence], [], []

        def keep_states(layer, inputs, output):
            states.append(output[0] if isinstance(output, tuple) else output)

        def keep_weights(attention, inputs, output):
            if output[1] is not None:  # only the eager implementation returns them
                weights.append(output[1])

        for layer in self.text_model.encoder.layer:
            if output_hidden_states:
                hooks.append(layer.register_forward_hook(keep_states))
            if output_attentions:
                hooks.append(layer.attention.self.register_forward_hook(keep_weights))
        mask = create_bidirectional_mask(
            config=self.text_model.config, inputs_embeds=sequence, attention_mask=attention_mask
        )
        try:
            last = self.text_model.encoder(sequence, attention_mask=mask).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )

    def _visual_tokens(self, pixel_values, visual_tokens):
        if (pixel_values is None) == (visual_tokens is None):
            raise ValueError("give either pixel_values or visual_tokens")
        return self.get_visual_tokens(pixel_values) if visual_tokens is None else visual_tokens

    def _room_for_text(self, count):
        """How many tokens of a text, `[CLS]` included, fit next to `count` visual tokens."""
        limit = self.config.text_config.max_position_embeddings
        if limit - count < 2:
            raise ValueError(
                f"{count} visual tokens leave no room for a text in a text tower of {limit} positions: use smaller "
                "images or larger patches"
            )
        return limit - count

    def _pool(self, hidden_states, attention_mask):
        if self.config.pooling == "cls":
            return hidden_states[:, 0]
        return mean_of_tokens(hidden_states, attention_mask)


def mean_of_tokens(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens: states (N, L, D) and a mask (N, L), which is 1 for tokens and 0 for padding → (N, D)."""
    if attention_mask is None:
        attention_mask = torch.ones(hidden_states.shape[:2], device=hidden_states.device)
    mask = attention_mask.unsqueeze(-1).to(hidden_states.dtype)  # (N, L, 1)
    return (hidden_states * mask).sum(1) / mask.sum(1)


def cut_texts(
    limit: int,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Cut texts (N, L), padded on the right, to `limit` tokens. A text that is cut keeps its last token."""
    if input_ids.shape[1] > limit:
        if attention_mask is None:
            lengths = torch.full_like(input_ids[:, :1], input_ids.shape[1])
        else:
            lengths = attention_mask.sum(1, keepdim=True)
        closing = input_ids.gather(1, lengths - 1)  # (N, 1)
        closing = torch.where(lengths > limit, closing, input_ids[:, limit - 1 : limit])
        input_ids = torch.cat([input_ids[:, : limit - 1], closing], dim=1)
        attention_mask = None if attention_mask is None else attention_mask[:, :limit]
        token_type_ids = None if token_type_ids is None else token_type_ids[:, :limit]
    return input_ids, attention_mask, token_type_ids


def _without_pooler(tower: Any) -> Any:
    """The tower, with a trainable pooler removed. Its output isn't used, and DistributedDataParallel fails if trainable
    parameters never get a gradient."""
    pooler = getattr(tower, "pooler", None)
    if pooler is not None and list(pooler.parameters()):
        tower.pooler = None
    return tower
