"""VISTA (arXiv 2406.04292), also known as Visualized BGE: one text encoder embeds texts, images and both together.

- An image's patches become tokens of the text encoder: [CLS], the visual tokens, the rest of the text.
- An image alone is the image with the empty text; a text alone is the plain text encoder.
- `get_visual_tokens` runs the image tower once, and its result serves the image-only and the fused pass.
- The image tower is EVA02-CLIP's, as in the paper, or any of transformers that gives tokens or a feature map.
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .eva02 import EVA02VisionModel
from .pooling import mean_of_tokens
from .vista_config import VistaConfig


class VistaModel(PreTrainedModel):
    r"""
    Args:
        config ([`VistaConfig`]): the configuration.
    """

    config_class = VistaConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        is_eva = vision.model_type == EVA02VisionModel.config_class.model_type
        self.vision_model = EVA02VisionModel(vision) if is_eva else _without_pooler(AutoModel.from_config(vision))
        self.visual_projection = nn.Linear(config.vision_width, text.hidden_size)
        self.text_model = _without_pooler(AutoModel.from_config(text))
        self.post_init()

    def get_visual_tokens(self, pixel_values):
        r"""
        The image as tokens of the text encoder, ready to stand behind `[CLS]`: projected patches with the text
        encoder's positions 1..P and its embedding LayerNorm; without token type and, in train mode, without dropout.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, C, H, W)`).

        Returns:
            `torch.Tensor` of shape `(N, P, D)`.

        Raises:
            ValueError: an image of another size than the tower takes, or so many patches that no text fits.
        """
        features = self.vision_model(pixel_values=pixel_values.to(self.dtype)).last_hidden_state
        if features.ndim == 4:
            features = features.flatten(2).transpose(1, 2)  # a feature map (N, C, H, W), row by row
        tokens = self.visual_projection(features[:, self.config.num_prefix_tokens :])
        self._room_for_text(tokens.shape[1])
        embeddings = self.text_model.embeddings
        # XLM-RoBERTa too counts from 0 here, although its own scheme for texts starts behind the padding's position
        positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return embeddings.LayerNorm(tokens + embeddings.position_embeddings(positions))

    def get_image_features(self, pixel_values=None, visual_tokens=None):
        r"""
        Features of N images: the fused pass with the empty text.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, C, H, W)`, *optional*).
            visual_tokens (`torch.Tensor` of shape `(N, P, D)`, *optional*): of `get_visual_tokens`, instead of pixels.

        Returns:
            `BaseModelOutputWithPooling`: features of shape `(N, D)` in `pooler_output`.

        Raises:
            ValueError: neither or both of the two are given.
        """
        visual_tokens = self._tokens(pixel_values, visual_tokens)
        empty = torch.tensor([[self.config.cls_token_id, self.config.sep_token_id]], device=visual_tokens.device)
        return self.get_fused_features(empty.expand(visual_tokens.shape[0], -1), visual_tokens=visual_tokens)

    def get_text_features(self, input_ids, attention_mask=None, token_type_ids=None):
        r"""
        Features of N texts by the plain text encoder. Texts over its limit are cut as in `get_fused_features`.

        Args:
            input_ids (`torch.LongTensor` of shape `(N, L)`): padded on the right.
            attention_mask (`torch.LongTensor` of shape `(N, L)`, *optional*): 1 for real tokens.
            token_type_ids (`torch.LongTensor` of shape `(N, L)`, *optional*).

        Returns:
            `BaseModelOutputWithPooling`: features of shape `(N, D)` in `pooler_output`.
        """
        config = self.config.text_config
        # XLM-RoBERTa's positions of a text start behind that of the padding
        used = self.text_model.embeddings.padding_idx + 1 if config.model_type == "xlm-roberta" else 0
        inputs = cut_texts(config.max_position_embeddings - used, input_ids, attention_mask, token_type_ids)
        input_ids, attention_mask, token_type_ids = inputs
        hidden_states = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        return self._pooled(hidden_states, attention_mask)

    def get_fused_features(
        self, input_ids, attention_mask=None, token_type_ids=None, pixel_values=None, visual_tokens=None
    ):
        r"""
        Features of N (image, text) rows.

        The text encoder reads `[CLS]`, P visual tokens and the remaining text, at positions 0, 1..P and P+1... With
        M positions, M-1-P tokens fit behind `[CLS]` (315 for VISTA base); of a longer text the end is cut off, and its
        closing `[SEP]` kept, as a tokenizer would cut it. (The original fails there.)

        Args:
            input_ids (`torch.LongTensor` of shape `(N, L)`): with `[CLS]` first; padded on the right.
            attention_mask (`torch.LongTensor` of shape `(N, L)`, *optional*): 1 for real tokens.
            token_type_ids (`torch.LongTensor` of shape `(N, L)`, *optional*).
            pixel_values (`torch.Tensor` of shape `(N, C, H, W)`, *optional*).
            visual_tokens (`torch.Tensor` of shape `(N, P, D)`, *optional*): of `get_visual_tokens`, instead of pixels.

        Returns:
            `BaseModelOutputWithPooling`: features of shape `(N, D)` in `pooler_output`; `last_hidden_state` of shape
            `(N, P + L, D)`.

        Raises:
            ValueError: neither or both of `pixel_values` and `visual_tokens` are given.
        """
        visual_tokens = self._tokens(pixel_values, visual_tokens)
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
        # the text model's forward would add a token type and dropout to the visual tokens: only its layers are run
        mask = create_bidirectional_mask(
            config=self.text_model.config, inputs_embeds=sequence, attention_mask=attention_mask
        )
        hidden_states = self.text_model.encoder(sequence, attention_mask=mask).last_hidden_state
        return self._pooled(hidden_states, attention_mask)

    def _tokens(self, pixel_values, visual_tokens):
        if (pixel_values is None) == (visual_tokens is None):
            raise ValueError("give either pixel_values or visual_tokens")
        return self.get_visual_tokens(pixel_values) if visual_tokens is None else visual_tokens

    def _room_for_text(self, count):
        """Tokens of a text, `[CLS]` included, that fit beside `count` visual tokens."""
        limit = self.config.text_config.max_position_embeddings
        if limit - count < 2:
            raise ValueError(
                f"{count} visual tokens leave no room for a text in a text tower of {limit} positions: use smaller "
                "images or larger patches"
            )
        return limit - count

    def _pooled(self, hidden_states, attention_mask):
        if self.config.pooling == "cls":
            pooled = hidden_states[:, 0]
        else:
            pooled = mean_of_tokens(hidden_states, attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


def cut_texts(limit, input_ids, attention_mask=None, token_type_ids=None):
    """Cut texts (N, L), padded on the right, to `limit` tokens; of a text that is longer the last token is kept too."""
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


def _without_pooler(tower):
    """The tower without a trained pooler, whose output isn't used: DistributedDataParallel fails on parameters that
    never get a gradient."""
    pooler = getattr(tower, "pooler", None)
    if pooler is not None and list(pooler.parameters()):
        tower.pooler = None
    return tower
