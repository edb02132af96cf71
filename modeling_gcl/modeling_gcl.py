"""GCLModel: one embedding space for images, texts, and images together with texts, on any dual encoder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .adapters import AdapterMixin
from .backbone import (
    OUTPUT_OPTIONS,
    FromEncoderMixin,
    build_backbone,
    check_is_dual_encoder,
    check_settings,
    freeze_unused_parameters,
    split_inputs,
)
from .configuration_gcl import GATED_FUSIONS, GCLConfig
from .encoding import EncodingMixin
from .fusion import Fusion, GateLayer, unit
from .loss import gcl_loss
from .modalities import FEATURES
from .temperature import LogitScale
from .vista import mean_of_tokens

DEFAULT_LOGIT_SCALE = 1 / 0.07
FEATURE_NAMES = tuple(FEATURES.values())  # image, text, fused


@dataclass
class GCLOutput(ModelOutput):
    r"""
    Output of [`GCLModel`].

    Args:
        loss (`torch.Tensor` scalar, *optional*): GCL loss of the batch, if images and texts are given.
        image_embeds (`torch.Tensor` of shape `(N, D)`, *optional*): unit norm.
        text_embeds (`torch.Tensor` of shape `(N, D)`, *optional*): unit norm.
        fused_embeds (`torch.Tensor` of shape `(N, D)`, *optional*): unit norm.
        logit_scale (`torch.Tensor` scalar, float32): 1/τ.
        vision_model_output, text_model_output (`BaseModelOutputWithPooling`, *optional*): what the towers returned,
            if hidden states or attentions were asked for.
    """

    loss: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    fused_embeds: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, with the towers' outputs as tuples too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in super().to_tuple())


class GCLPreTrainedModel(AdapterMixin, PreTrainedModel):
    config_class = GCLConfig
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # bfloat16 has 8 bits: a temperature could only change in steps of 0.4 %
    _keep_in_fp32_modules_strict = ["logit_scale", "modality_means"]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, LogitScale):
            init.constant_(module.log_scale, module.initial)
        elif isinstance(module, GateLayer):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):  # the first layer of the gates; backbones initialise their own layers
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, GCLModel):
            init.zeros_(module.modality_means)


class GCLModel(FromEncoderMixin, EncodingMixin, GCLPreTrainedModel):
    r"""
    Embeds images, texts, and images fused with texts, with one dual encoder. Each tower runs once for all three.

    Args:
        config (`GCLConfig`): the configuration.
        encoder (`PreTrainedModel`, *optional*): a loaded backbone. By default one with random weights is built from
            `config.encoder_config`. To start from pretrained weights, see [`GCLModel.from_encoder`].

    Raises:
        ValueError: the backbone is not a dual encoder (it lacks `get_image_features`, `get_text_features`, or a tower),
            or it does not support `text_pooling="mean"` or `fusion="native"`.
    """

    modality_means: torch.Tensor
    # The loss is a mean over pairs. Trainer must not rescale it as if it were a sum over tokens.
    accepts_loss_kwargs = False

    def __init__(self, config: GCLConfig, encoder: PreTrainedModel | None = None) -> None:
        config.check_fields()
        super().__init__(config)
        self.encoder = build_backbone(config.encoder_config) if encoder is None else encoder
        check_is_dual_encoder(self.encoder)
        check_settings(self.encoder, config)
        self.config.encoder_config = self.encoder.config
        self.fusion = Fusion(config.projection_dim, gated=config.fusion in GATED_FUSIONS)
        log_scale = getattr(config.encoder_config, "logit_scale_init_value", None)
        initial = config.logit_scale_init_value or (math.exp(log_scale) if log_scale else DEFAULT_LOGIT_SCALE)
        self.logit_scale = LogitScale(min(initial, config.max_logit_scale), config.max_logit_scale)
        self.register_buffer("modality_means", torch.zeros(3, config.projection_dim, dtype=torch.float32))
        freeze_unused_parameters(self.encoder, config.text_pooling)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Like `PreTrainedModel.from_pretrained`, which makes all parameters trainable. Those that `__init__` freezes
        are frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        freeze_unused_parameters(model.encoder, model.config.text_pooling)
        return loaded

    @property
    def vision_model(self) -> Any:
        """The backbone's image tower."""
        return self.encoder.vision_model

    @property
    def text_model(self) -> Any:
        """The backbone's text tower."""
        return self.encoder.text_model

    @property
    def towers(self) -> dict[str, Any]:
        """Both towers, as `{"image": ..., "text": ...}`."""
        return {"image": self.vision_model, "text": self.text_model}

    @property
    def dtype(self) -> torch.dtype:
        """The towers' dtype. (transformers returns the first parameter's, which may be the float32 temperature.)"""
        return next(self.vision_model.parameters()).dtype

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's token embeddings."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text tower's token embeddings."""
        self.text_model.set_input_embeddings(value)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Like `PreTrainedModel.set_attn_implementation`, but it may be called again. (Up to transformers 5.17, the
        configurations of models inside the backbone keep a mark that excludes them from a second change.)"""
        super().set_attn_implementation(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_attn_was_changed", None)

    def train(self, mode: bool = True) -> Self:
        """Like `nn.Module.train`, except that frozen parts stay in eval mode: towers and projections without a
        trainable parameter (no dropout), and batch norms whose weights are frozen, as they are under LoRA (fixed
        statistics)."""
        super().train(mode)
        for part in self.encoder.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        for module in self.encoder.modules():
            if isinstance(module, _BatchNorm) and not any(weight.requires_grad for weight in module.parameters()):
                module.eval()
        return self

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        r"""
        Image features, not yet normalised.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, C, H, W)`, or as the backbone's image processor returns it).
            pixel_attention_mask, spatial_shapes (`torch.Tensor`, *optional*): further outputs of SigLIP 2's image
                processor. (They are parameters here because sentence-transformers only passes inputs that are.)
            **kwargs: further image inputs of the backbone, `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` has the features, of shape `(N, D)`.
        """
        inputs = {"pixel_values": pixel_values, "pixel_attention_mask": pixel_attention_mask}
        image_inputs, _ = self._split_inputs(inputs | {"spatial_shapes": spatial_shapes} | kwargs)
        output = self._image_output(image_inputs)
        output.pooler_output = self._centre(output.pooler_output, "image")
        return output

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        r"""
        Text features, not yet normalised.

        Args:
            input_ids (`torch.LongTensor` of shape `(N, L)`).
            attention_mask (`torch.LongTensor` of shape `(N, L)`, *optional*): 1 for tokens, 0 for padding.
            **kwargs: further text inputs of the backbone such as `token_type_ids`, and `output_hidden_states`,
                `output_attentions`, `return_dict`.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` has the features, of shape `(N, D)`.
        """
        _, text_inputs = self._split_inputs({"input_ids": input_ids, "attention_mask": attention_mask} | kwargs)
        output = self._text_output(text_inputs)
        output.pooler_output = self._centre(output.pooler_output, "text")
        return output

    @can_return_tuple
    def get_fused_features(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        r"""
        Features of N images fused with N texts, not yet normalised. The arguments are those of `get_image_features` and
        `get_text_features`. Only the outputs of these two contain hidden states and attentions.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` has the features, of shape `(N, D)`.
        """
        inputs = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes} | kwargs
        features, _ = self._features(("fused",), inputs)
        return BaseModelOutputWithPooling(pooler_output=features["fused"])

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = True,
        modalities: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> GCLOutput:
        r"""
        Embeddings of the images and texts given. If both are given, also the fused embeddings, and the GCL loss with
        the paper's settings.

        Args:
            pixel_values, input_ids, attention_mask: as for `get_image_features` and `get_text_features`. Leave out
                either the image or the text inputs to embed only the other; the tower left out does not run.
            return_loss (`bool`): compute the loss, if images and texts are given.
            modalities (sequence of `str`, *optional*): which of `"image"`, `"text"`, `"fused"` to embed. Default: all
                that the inputs allow.
            **kwargs: further inputs of the backbone, `output_hidden_states`, `output_attentions`, and `return_dict`
                (`False` returns a tuple). None counts as not given.

        Returns:
            [`GCLOutput`].

        Raises:
            ValueError: neither images nor texts are given, or `modalities` needs an input that is not given.
            TypeError: the backbone has no input of that name.
        """
        given = {"image": pixel_values is not None, "text": input_ids is not None}
        given["fused"] = all(given.values())
        possible = [name for name in FEATURE_NAMES if given[name]]
        if not possible:
            raise ValueError("nothing to embed: give pixel_values, input_ids or both")
        modalities = possible if modalities is None else modalities
        if not set(modalities) <= set(possible):
            raise ValueError(f"modalities={tuple(modalities)}: the inputs given allow {', '.join(possible)} only")
        inputs = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        features, towers = self._features(modalities, inputs | kwargs)
        embeds = {name: unit(value) for name, value in features.items()}
        logit_scale = self.logit_scale()
        loss: Any = None
        if return_loss and len(embeds) == len(FEATURE_NAMES):
            loss = gcl_loss(embeds["image"], embeds["text"], embeds["fused"], logit_scale)
        with_states = any(kwargs.get(option) or getattr(self.config, option, False) for option in OUTPUT_OPTIONS)
        return GCLOutput(
            loss=loss,
            image_embeds=embeds.get("image"),
            text_embeds=embeds.get("text"),
            fused_embeds=embeds.get("fused"),
            logit_scale=logit_scale,
            vision_model_output=towers.get("image") if with_states else None,
            text_model_output=towers.get("text") if with_states else None,
        )

    def tower_features(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Raw features of both towers, as `{"image": (N, D), "text": (N, D)}`. The inputs are those of `forward`."""
        image_inputs, text_inputs = self._split_inputs(inputs)
        image, text = self._image_output(image_inputs), self._text_output(text_inputs)
        return {"image": image.pooler_output, "text": text.pooler_output}

    def _features(self, modalities, inputs):
        """Run what the modalities need, each tower once. If the backbone fuses by itself, it computes the visual tokens
        once for images and fused rows.

        Returns two dicts by modality: features (N, D), not yet normalised, and the outputs of the towers that ran.
        """
        image_inputs, text_inputs = self._split_inputs(inputs)
        native = self.config.fusion == "native"
        if native:
            check_settings(self.encoder, self.config)  # the configuration may have changed
        if native and {"image", "fused"} <= set(modalities) and hasattr(self.encoder, "get_visual_tokens"):
            image_inputs["visual_tokens"] = self.encoder.get_visual_tokens(image_inputs.pop("pixel_values"))
        by_towers = "fused" in modalities and not native
        towers = {}
        if "image" in modalities or by_towers:
            towers["image"] = self._image_output(image_inputs)
        if "text" in modalities or by_towers:
            towers["text"] = self._text_output(text_inputs)
        raw = {name: output.pooler_output for name, output in towers.items()}
        features = {name: self._centre(raw[name], name) for name in ("image", "text") if name in modalities}
        if by_towers:
            features["fused"] = self._fuse(**raw)
        elif "fused" in modalities:
            fused = self.encoder.get_fused_features(**(image_inputs | text_inputs), return_dict=True)
            features["fused"] = self._centre(fused.pooler_output, "fused")
        return features, towers

    def _split_inputs(self, inputs):
        """Divide the inputs between the image tower and the text tower, and add the options that the configuration
        sets."""
        options = {option: True for option in OUTPUT_OPTIONS if getattr(self.config, option, False)}
        return split_inputs(self.encoder, options | {name: x for name, x in inputs.items() if x is not None})

    def _image_output(self, inputs):
        if "pixel_values" in inputs:  # not every tower casts them itself
            inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        return self.encoder.get_image_features(**inputs, return_dict=True)

    def _text_output(self, inputs):
        output = self.encoder.get_text_features(**inputs, return_dict=True)
        if self.config.text_pooling == "mean":
            pooled = mean_of_tokens(output.last_hidden_state, inputs.get("attention_mask"))
            output.pooler_output = self.encoder.text_projection(pooled)
        return output

    def _centre(self, features, modality):
        if not self.config.centring:
            return features
        # values can't be asked for while the model is traced
        if not torch.compiler.is_compiling() and not self.modality_means.any():
            raise ValueError("config.centring is on, but there are no means: call set_modality_means first")
        return unit(features) - self.modality_means[FEATURE_NAMES.index(modality)]

    def _fuse(self, image, text):
        """Fuse raw features (N, D) of both towers; the result is not normalised."""
        if not self.config.centring:
            return self.fusion(image, text, self.config.fusion)
        if self.config.fusion in GATED_FUSIONS:
            return self._centre(self.fusion(image, text, self.config.fusion), "fused")
        # GR-CLIP mixes the two means as it mixes the two features, so it has no mean of its own for fused features
        return self._centre(image, "image") + self._centre(text, "text")

    @torch.no_grad()
    def set_modality_means(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, fused_embeds: torch.Tensor
    ) -> None:
        r"""
        Store the means that are subtracted if `config.centring` is on (GR-CLIP, arXiv 2507.19054).

        Args:
            image_embeds, text_embeds, fused_embeds (`torch.Tensor` of shape `(M, D)`): unit-norm embeddings of a
                calibration set, computed without centring. Use training images and captions, never the test corpus.

        Raises:
            ValueError: centring is on, so the embeddings given are centred ones.
        """
        if self.config.centring:
            raise ValueError("set config.centring=False before estimating the means, and True afterwards")
        means = torch.stack([embeds.float().mean(0) for embeds in (image_embeds, text_embeds, fused_embeds)])
        self.modality_means.copy_(means)
