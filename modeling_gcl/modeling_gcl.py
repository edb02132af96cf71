"""GCLModel: one embedding space for images, texts and fused image+text, on any dual encoder of transformers."""

import inspect
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .adapters import WholeAdapters
from .backbone import build_backbone, check_is_dual_encoder, check_settings, freeze_unused_parameters
from .configuration_gcl import GATED_FUSIONS, GCLConfig
from .encoding import encode_rows
from .fusion import Fusion, GateLayer, unit
from .loss import gcl_loss
from .modalities import FEATURES
from .pooling import mean_of_tokens
from .pretrained import model_from_encoder
from .temperature import LogitScale

DEFAULT_LOGIT_SCALE = 1 / 0.07


@dataclass
class GCLOutput(ModelOutput):
    r"""
    loss (`torch.Tensor` scalar, *optional*): GCL loss of the batch, when both modalities are given.
    image_embeds (`torch.Tensor` of shape `(N, D)`, *optional*): unit norm.
    text_embeds (`torch.Tensor` of shape `(N, D)`, *optional*): unit norm.
    fused_embeds (`torch.Tensor` of shape `(N, D)`, *optional*): unit norm.
    logit_scale (`torch.Tensor` scalar, float32): 1/τ.
    """

    loss: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    fused_embeds: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None


class GCLPreTrainedModel(WholeAdapters, PreTrainedModel):
    config_class = GCLConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # a temperature in bfloat16 has 8 bits: steps of 0.4 % of 1/τ
    _keep_in_fp32_modules_strict = ["logit_scale", "modality_means"]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, LogitScale):
            init.constant_(module.log_scale, module.initial)
        elif isinstance(module, GateLayer):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):  # the gates' first layer; backbones initialise their own
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, GCLModel):
            init.zeros_(module.modality_means)


class GCLModel(GCLPreTrainedModel):
    r"""
    Embeds images, texts and fused image+text with one dual encoder, each tower run once for all three.

    Args:
        config (`GCLConfig`): the configuration.
        encoder (`PreTrainedModel`, *optional*): a loaded backbone to wrap; by default one is built from
            `config.encoder_config` with random weights. See [`GCLModel.from_encoder`].

    Raises:
        ValueError: the backbone is no dual encoder (it lacks `get_image_features` or `get_text_features`),
            `text_pooling="mean"` on a backbone without a `text_projection`, or `fusion="native"` on one that does not
            fuse.
    """

    # the loss is a mean over pairs, not a sum to be divided by tokens: Trainer must not rescale it
    accepts_loss_kwargs = False

    def __init__(self, config, encoder=None):
        config.check_fields()
        super().__init__(config)
        self.encoder = build_backbone(config.encoder_config) if encoder is None else encoder
        check_is_dual_encoder(self.encoder)
        check_settings(self.encoder, config)
        self.config.encoder_config = self.encoder.config
        self.fusion = Fusion(config.projection_dim, gated=config.fusion in GATED_FUSIONS)
        own_scale = getattr(config.encoder_config, "logit_scale_init_value", None)
        initial = config.logit_scale_init_value or (math.exp(own_scale) if own_scale else DEFAULT_LOGIT_SCALE)
        self.logit_scale = LogitScale(min(initial, config.max_logit_scale), config.max_logit_scale)
        self.register_buffer("modality_means", torch.zeros(3, config.projection_dim, dtype=torch.float32))
        freeze_unused_parameters(self.encoder, config.text_pooling)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`, which forgets what `__init__` froze."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        freeze_unused_parameters(model.encoder, model.config.text_pooling)
        return loaded

    @classmethod
    def from_encoder(cls, encoder, *, processor=None, revision=None, dtype=None, attn_implementation=None, **config):
        r"""
        Start from a pretrained dual encoder.

        Without `fusion`, a backbone that fuses by itself (VISTA) does so. For two towers the lengths of their features
        are measured, stored as `config.tower_norms`, and decide between `"sum"` and `"normalized_sum"`.

        Args:
            encoder (`str`, `Path` or `PreTrainedModel`): Hub id or folder of a dual encoder, or a loaded one. An id
                or folder of a GCL checkpoint is loaded as such, with `config` overriding its configuration.
            processor (`GCLProcessor`, *optional*): for that measurement; by default the one beside an id or folder. A
                loaded encoder without it gets `"sum"`, the paper's rule.
            revision (`str`, *optional*): Hub revision.
            dtype, attn_implementation: as for `from_pretrained`, for an id or folder.
            **config: fields of [`GCLConfig`], e.g. `fusion="normalized_sum"`.

        Returns:
            [`GCLModel`] whose temperature starts at `logit_scale_init_value`, else at the backbone's own.

        Raises:
            ValueError: the backbone is no dual encoder, brings code of its own, or lacks weights.
            TypeError: `config` names a field that GCLConfig does not have.
            OSError: no such id or folder.
        """
        loading = {"revision": revision, "attn_implementation": attn_implementation}
        loading |= {} if dtype is None else {"dtype": dtype}
        return model_from_encoder(cls, encoder, processor, loading, config)

    @property
    def dtype(self):
        """The towers' dtype; transformers takes the first parameter's, perhaps a temperature kept in float32."""
        return next(self.towers["image"].parameters()).dtype

    def get_input_embeddings(self):
        """The text tower's token embeddings."""
        return self.towers["text"].get_input_embeddings()

    @property
    def towers(self):
        """`dict` from `"image"` and `"text"` to the backbone's tower modules."""
        return {"image": self.encoder.vision_model, "text": self.encoder.text_model}

    def train(self, mode=True):
        """As `nn.Module.train`, but what is frozen stays in eval mode: dropout of a tower or projection that is frozen
        whole, and batch statistics beside weights that are frozen, as all are under LoRA."""
        super().train(mode)
        for part in self.encoder.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        for module in self.encoder.modules():
            if isinstance(module, _BatchNorm) and not any(weight.requires_grad for weight in module.parameters()):
                module.eval()
        return self

    def get_image_features(self, pixel_values, pixel_attention_mask=None, spatial_shapes=None, **kwargs):
        r"""
        Image features, before the final normalisation.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, C, H, W)`, or as the backbone's image processor makes it).
            pixel_attention_mask, spatial_shapes (`torch.Tensor`, *optional*): what SigLIP 2's image processor makes
                beside it. They have names because sentence-transformers passes only the inputs that have.
            **kwargs: further image inputs of the backbone.

        Returns:
            `BaseModelOutputWithPooling`: features of shape `(N, D)` in `pooler_output`.
        """
        patches = _given(pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes)
        output = self._image_output(pixel_values=pixel_values, **patches, **kwargs)
        output.pooler_output = self._centre(output.pooler_output, "image")
        return output

    def get_text_features(self, input_ids, attention_mask=None, **kwargs):
        r"""
        Text features, before the final normalisation.

        Args:
            input_ids (`torch.LongTensor` of shape `(N, L)`).
            attention_mask (`torch.LongTensor` of shape `(N, L)`, *optional*): 1 for real tokens.
            **kwargs: further text inputs of the backbone, e.g. `token_type_ids`.

        Returns:
            `BaseModelOutputWithPooling`: features of shape `(N, D)` in `pooler_output`.
        """
        output = self._text_output(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        output.pooler_output = self._centre(output.pooler_output, "text")
        return output

    def get_fused_features(
        self,
        pixel_values,
        input_ids,
        attention_mask=None,
        pixel_attention_mask=None,
        spatial_shapes=None,
        **kwargs,
    ):
        r"""
        Fused features of N (image, text) rows, before the final normalisation.

        Arguments as for `get_image_features` and `get_text_features` together.

        Returns:
            `BaseModelOutputWithPooling`: features of shape `(N, D)` in `pooler_output`.
        """
        inputs = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= _given(pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes)
        return BaseModelOutputWithPooling(pooler_output=self._features(("fused",), **inputs, **kwargs)["fused"])

    def forward(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        return_loss=True,
        return_dict=None,
        modalities=None,
        **kwargs,
    ):
        r"""
        Embeddings of the modalities given; with both, the fused ones too and the GCL loss with the paper's settings.

        Args:
            pixel_values, input_ids, attention_mask, **kwargs: as for `get_image_features` and `get_text_features`;
                either modality may be left out, and costs nothing then.
            return_loss (`bool`): whether to compute the loss (never when a modality is missing).
            return_dict (`bool`, *optional*): `False` for a plain tuple.
            modalities (sequence of `str`, *optional*): which of `"image"`, `"text"`, `"fused"` to embed. Default: all
                that the inputs allow.

        Returns:
            [`GCLOutput`].

        Raises:
            ValueError: neither modality is given, or `modalities` asks for what the inputs don't allow.
        """
        given = {"image": pixel_values is not None, "text": input_ids is not None}
        given["fused"] = all(given.values())
        possible = [name for name in FEATURES.values() if given[name]]
        if not possible:
            raise ValueError("nothing to embed: give pixel_values, input_ids or both")
        modalities = possible if modalities is None else modalities
        if not set(modalities) <= set(possible):
            raise ValueError(f"modalities={tuple(modalities)}: the inputs given allow {', '.join(possible)} only")
        features = self._features(modalities, pixel_values, input_ids, attention_mask, **kwargs)
        output = GCLOutput(
            logit_scale=self.logit_scale(), **{f"{name}_embeds": unit(value) for name, value in features.items()}
        )
        if return_loss and len(features) == len(FEATURES):
            output.loss = gcl_loss(output.image_embeds, output.text_embeds, output.fused_embeds, output.logit_scale)
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return output if use_dict else output.to_tuple()

    def tower_features(self, pixel_values, input_ids, attention_mask=None, **kwargs):
        """Raw features of both towers as `{"image": (N, D), "text": (N, D)}`; arguments as for `forward`."""
        image_inputs, text_inputs = self._split_inputs(pixel_values, input_ids, attention_mask, kwargs)
        image, text = self._image_output(**image_inputs), self._text_output(**text_inputs)
        return {"image": image.pooler_output, "text": text.pooler_output}

    def _features(self, modalities, pixel_values, input_ids, attention_mask, **kwargs):
        """Features of the modalities asked for, before the final normalisation; each tower runs once, and the visual
        tokens of a backbone that fuses by itself serve both its image-only and its fused pass."""
        image_inputs, text_inputs = self._split_inputs(pixel_values, input_ids, attention_mask, kwargs)
        native = self.config.fusion == "native"
        if native:
            check_settings(self.encoder, self.config)  # the configuration may have changed
        if native and "image" in modalities and "fused" in modalities:
            image_inputs = {"visual_tokens": self.encoder.get_visual_tokens(**image_inputs)}
        towers = {}
        if "image" in modalities or ("fused" in modalities and not native):
            towers["image"] = self._image_output(**image_inputs).pooler_output  # (N, D)
        if "text" in modalities or ("fused" in modalities and not native):
            towers["text"] = self._text_output(**text_inputs).pooler_output  # (N, D)
        features = {name: self._centre(towers[name], name) for name in ("image", "text") if name in modalities}
        if "fused" in modalities and native:
            fused = self.encoder.get_fused_features(**image_inputs, **text_inputs).pooler_output
            features["fused"] = self._centre(fused, "fused")
        elif "fused" in modalities:
            features["fused"] = self._fuse(**towers)
        return features

    def _image_output(self, **inputs):
        if "pixel_values" in inputs:  # not every tower casts them itself
            inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        return self.encoder.get_image_features(**inputs)

    def _text_output(self, **inputs):
        output = self.encoder.get_text_features(**inputs)
        if self.config.text_pooling == "mean":
            pooled = mean_of_tokens(output.last_hidden_state, inputs.get("attention_mask"))
            output.pooler_output = self.encoder.text_projection(pooled)
        return output

    def _centre(self, features, modality):
        if not self.config.centring:
            return features
        if not torch.compiler.is_compiling() and not self.modality_means.any():  # what is traced can't ask for values
            raise ValueError("config.centring is on, but there are no means: call set_modality_means first")
        return unit(features) - self.modality_means[list(FEATURES.values()).index(modality)]

    def _fuse(self, image, text):
        """(N, D) raw features of both towers → (N, D) fused features, not normalised."""
        if not self.config.centring:
            return self.fusion(image, text, self.config.fusion)
        if self.config.fusion in GATED_FUSIONS:
            return self._centre(self.fusion(image, text, self.config.fusion), "fused")
        # GR-CLIP's fused mean is the same mixture of the two means as the features are of the two modalities
        return self._centre(image, "image") + self._centre(text, "text")

    @torch.no_grad()
    def set_modality_means(self, image_embeds, text_embeds, fused_embeds):
        r"""
        Store the means that `config.centring` subtracts (GR-CLIP, arXiv 2507.19054).

        Args:
            image_embeds, text_embeds, fused_embeds (`torch.Tensor` of shape `(M, D)`): uncentred unit-norm embeddings
                of a calibration set (training captions and photos, never the test corpus).

        Raises:
            ValueError: centring is already on, so that the embeddings given are centred ones.
        """
        if self.config.centring:
            raise ValueError("set config.centring=False before estimating the means, and True afterwards")
        means = torch.stack([embeds.float().mean(0) for embeds in (image_embeds, text_embeds, fused_embeds)])
        self.modality_means.copy_(means)

    def _split_inputs(self, pixel_values, input_ids, attention_mask, others):
        """Inputs of the image and of the text side; others go to the tower whose feature method names them."""
        image_names = inspect.signature(self.encoder.get_image_features).parameters
        text_names = inspect.signature(self.encoder.get_text_features).parameters
        image = {name: value for name, value in others.items() if name in image_names}
        text = {name: value for name, value in others.items() if name in text_names and name not in image_names}
        unknown = set(others) - set(image) - set(text)
        if unknown:
            raise TypeError(f"{type(self.encoder).__name__} takes no input named {', '.join(sorted(unknown))}")
        if pixel_values is not None:
            image["pixel_values"] = pixel_values
        return image, text | {"input_ids": input_ids, "attention_mask": attention_mask}

    def encode(
        self,
        rows,
        processor,
        batch_size=64,
        show_progress=False,
        on_error="raise",
        truncate_dim=None,
        num_frames=15,
    ):
        r"""
        Embed rows of any kind, mixed freely.

        Args:
            rows (`Sequence`): each a dict with

                - `image`: a PIL image, path, bytes or uint8 array, or a list of them;
                - `video`, in place of `image`: the path of a file (needs PyAV: `pip install av`), or a list of images
                  that are its frames;
                - `text`, alone or beside either: with it the row is a fused one;
                - `instruction`: put before the text, as `"{instruction} {text}"`; beside an image or video without
                  text it is the text, so that such a row is a fused one.

                Of several images or frames, each is embedded, together with the text if there is one; the row's
                embedding is their normalised mean. Blank text counts as absent. A bare value is a row too: a `str` is a
                text, a `Path` with the suffix of a video a video, another `Path`, a PIL image, `bytes` or array an
                image.
            processor (`GCLProcessor`): the checkpoint's processor.
            batch_size (`int`): texts, images and frames per forward pass. Rows are sorted by kind and length inside.
            show_progress (`bool`): show a progress bar with rows per second.
            on_error (`str`): `"raise"` stops at the first bad row; `"skip"` leaves bad rows out.
            truncate_dim (`int`, *optional*): keep the first dimensions only, as models trained with Matryoshka
                dimensions allow: each embedding is cut and normalised again, before any mean over images.
            num_frames (`int`): frames taken of a video file: the middle one of each of so many equal intervals, as
                WebVid-CoVR does, or every frame of a shorter video. A list of frames is taken whole.

        Returns:
            `torch.FloatTensor` of shape `(N, D)`, or `(N, truncate_dim)`, on the CPU, unit norm, in the order of
            `rows`; with `on_error="skip"` a tuple of it, for the rows kept, and the `list[int]` of their indices.

        Raises:
            ValueError: naming the row: nothing to embed, both image and video, an empty list, an unreadable image,
                frame or video; `truncate_dim` outside 1…D; `batch_size` or `num_frames` below 1.
            ImportError: a video file is given and PyAV is not installed.
        """
        return encode_rows(
            self, rows, processor, batch_size, show_progress, on_error, truncate_dim=truncate_dim, num_frames=num_frames
        )


def _given(**inputs):
    """The inputs that are not None: backbones without them would refuse the name."""
    return {name: value for name, value in inputs.items() if value is not None}
