"""GCLModel: one embedding space for images, texts and fused image+text, on any dual encoder of transformers."""

import copy
import inspect
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .configuration_gcl import GCLConfig
from .encoding_gcl import encode_rows
from .loss_gcl import gcl_loss

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


class LogitScale(nn.Module):
    """The learned temperature, log(1/τ). A module, so that PEFT's `modules_to_save` trains and saves it."""

    def __init__(self, initial, maximum):
        super().__init__()
        self.initial, self.maximum = math.log(initial), math.log(maximum)
        self.log_scale = nn.Parameter(torch.tensor(self.initial, dtype=torch.float32))

    def forward(self):
        """1/τ as a float32 scalar, at most the configured maximum."""
        return self.log_scale.float().clamp(max=self.maximum).exp()

    @torch.no_grad()
    def reset_(self):
        """Go back to the configured initial value."""
        self.log_scale.fill_(self.initial)

    @torch.no_grad()
    def clamp_(self):
        """Bring the parameter back to its bound after an optimiser step, so that its gradient never dies there."""
        self.log_scale.clamp_(max=self.maximum)


class GCLPreTrainedModel(PreTrainedModel):
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
        ValueError: the backbone is no dual encoder (it lacks `get_image_features` or `get_text_features`), or
            `text_pooling="mean"` on a backbone without a `text_projection`.
    """

    # the loss is a mean over pairs, not a sum to be divided by tokens: Trainer must not rescale it
    accepts_loss_kwargs = False

    def __init__(self, config, encoder=None):
        config.check_fields()
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config) if encoder is None else encoder
        for part in ("get_image_features", "get_text_features", "vision_model", "text_model"):
            if not hasattr(self.encoder, part):
                raise ValueError(
                    f"unknown backbone: {type(self.encoder).__name__} is no dual encoder (it has no {part}). "
                    "GCL wraps CLIP, SigLIP, VisionTextDualEncoder and the like."
                )
        if config.text_pooling == "mean" and not hasattr(self.encoder, "text_projection"):
            raise ValueError(
                f"text_pooling='mean' needs a backbone with a text_projection; {type(self.encoder).__name__} has none. "
                "Use text_pooling='encoder'."
            )
        self.config.encoder_config = self.encoder.config
        own_scale = getattr(config.encoder_config, "logit_scale_init_value", None)
        initial = config.logit_scale_init_value or (math.exp(own_scale) if own_scale else DEFAULT_LOGIT_SCALE)
        self.logit_scale = LogitScale(min(initial, config.max_logit_scale), config.max_logit_scale)
        self.register_buffer("modality_means", torch.zeros(2, config.projection_dim, dtype=torch.float32))
        self._freeze_unused_parameters()
        self.post_init()

    def _freeze_unused_parameters(self):
        """The backbone's own temperature and bias, and a pooler that mean pooling bypasses, never get a gradient;
        DistributedDataParallel fails on trainable parameters without one."""
        for name in ("logit_scale", "logit_bias"):
            if isinstance(getattr(self.encoder, name, None), nn.Parameter):
                getattr(self.encoder, name).requires_grad_(False)
        if self.config.text_pooling == "mean":
            pooler = getattr(getattr(self.encoder, "text_model", None), "pooler", None)
            if pooler is not None:
                pooler.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`, which forgets what `__init__` froze."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._freeze_unused_parameters()
        return loaded

    @classmethod
    def from_encoder(cls, encoder, *, revision=None, dtype=None, attn_implementation=None, **config):
        r"""
        Start from a pretrained dual encoder.

        Args:
            encoder (`str`, `Path` or `PreTrainedModel`): Hub id or folder of a dual encoder, or a loaded one. An id
                or folder of a GCL checkpoint is loaded as such, with `config` overriding its configuration.
            revision (`str`, *optional*): Hub revision.
            dtype, attn_implementation: as for `from_pretrained`, for an id or folder.
            **config: fields of [`GCLConfig`], e.g. `fusion="normalized_sum"`.

        Returns:
            [`GCLModel`] whose temperature starts at `logit_scale_init_value`, else at the backbone's own.

        Raises:
            ValueError: the backbone is no dual encoder.
            TypeError: `config` names a field that GCLConfig does not have.
            OSError: no such id or folder.
        """
        unknown = set(config) - set(inspect.signature(GCLConfig.__init__).parameters)
        if unknown:
            raise TypeError(f"GCLConfig has no field {', '.join(sorted(unknown))}")
        if isinstance(encoder, (str, Path)):
            encoder_config = AutoConfig.from_pretrained(encoder, revision=revision)
            loading = {"revision": revision, "attn_implementation": attn_implementation}
            loading |= {} if dtype is None else {"dtype": dtype}
            if encoder_config.model_type == GCLConfig.model_type:
                gcl_config = GCLConfig.from_pretrained(encoder, revision=revision, **config)
                model = cls.from_pretrained(encoder, config=gcl_config, **loading)
                if config.get("logit_scale_init_value") is not None:
                    model.logit_scale.reset_()
                return model
            encoder = AutoModel.from_pretrained(encoder, **loading)
        if encoder.config.model_type == GCLConfig.model_type:
            raise ValueError("this encoder is a GCLModel already: use it as it is")
        own_scale = getattr(encoder, "logit_scale", None)
        if isinstance(own_scale, nn.Parameter):
            bound = config.get("max_logit_scale") or GCLConfig().max_logit_scale  # SigLIP's own lies above it
            config.setdefault("logit_scale_init_value", min(own_scale.detach().float().exp().item(), bound))
        # a copy: GCLConfig resets the attention implementation of its sub-configs, which the loaded encoder has chosen
        return cls(GCLConfig(encoder_config=copy.deepcopy(encoder.config), **config), encoder=encoder)

    @property
    def dtype(self):
        """The towers' dtype; transformers takes the first parameter's, perhaps a temperature kept in float32."""
        return self.towers["image"].dtype

    def get_input_embeddings(self):
        """The text tower's token embeddings."""
        return self.towers["text"].get_input_embeddings()

    @property
    def towers(self):
        """`dict` from `"image"` and `"text"` to the backbone's tower modules."""
        return {"image": self.encoder.vision_model, "text": self.encoder.text_model}

    def train(self, mode=True):
        """As `nn.Module.train`, but a tower that is frozen whole stays in eval mode: its dropout and batch
        statistics must not move."""
        super().train(mode)
        for tower in self.towers.values():
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        return self

    def get_image_features(self, pixel_values, **kwargs):
        r"""
        Raw image features, before any normalisation.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, C, H, W)`, or as the backbone's image processor makes it).
            **kwargs: further image inputs of the backbone, e.g. SigLIP 2's `pixel_attention_mask`, `spatial_shapes`.

        Returns:
            `BaseModelOutputWithPooling`: features of shape `(N, D)` in `pooler_output`.
        """
        return self.encoder.get_image_features(pixel_values=pixel_values.to(self.dtype), **kwargs)

    def get_text_features(self, input_ids, attention_mask=None, **kwargs):
        r"""
        Raw text features, before any normalisation.

        Args:
            input_ids (`torch.LongTensor` of shape `(N, L)`).
            attention_mask (`torch.LongTensor` of shape `(N, L)`, *optional*): 1 for real tokens.
            **kwargs: further text inputs of the backbone, e.g. `token_type_ids`.

        Returns:
            `BaseModelOutputWithPooling`: features of shape `(N, D)` in `pooler_output`.
        """
        output = self.encoder.get_text_features(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if self.config.text_pooling == "mean":
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            mask = mask.unsqueeze(-1).to(output.last_hidden_state.dtype)  # (N, L, 1)
            pooled = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
            output.pooler_output = self.encoder.text_projection(pooled)
        return output

    def get_fused_features(self, pixel_values, input_ids, attention_mask=None, **kwargs):
        r"""
        Fused features of N (image, text) rows, before the final normalisation.

        Arguments as for `get_image_features` and `get_text_features` together.

        Returns:
            `BaseModelOutputWithPooling`: features of shape `(N, D)` in `pooler_output`.
        """
        image_kwargs, text_kwargs = self._split_inputs(kwargs)
        image = self.get_image_features(pixel_values, **image_kwargs).pooler_output
        text = self.get_text_features(input_ids, attention_mask, **text_kwargs).pooler_output
        return BaseModelOutputWithPooling(pooler_output=self._fuse(image, text))

    def forward(
        self, pixel_values=None, input_ids=None, attention_mask=None, return_loss=True, return_dict=None, **kwargs
    ):
        r"""
        Embeddings of the modalities given; with both, the fused ones too and the GCL loss with the paper's settings.

        Args:
            pixel_values, input_ids, attention_mask, **kwargs: as for `get_image_features` and `get_text_features`;
                either modality may be left out, and costs nothing then.
            return_loss (`bool`): whether to compute the loss (never when a modality is missing).
            return_dict (`bool`, *optional*): `False` for a plain tuple.

        Returns:
            [`GCLOutput`].

        Raises:
            ValueError: neither modality is given.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("nothing to embed: give pixel_values, input_ids or both")
        image_kwargs, text_kwargs = self._split_inputs(kwargs)
        image = text = None
        if pixel_values is not None:
            image = self.get_image_features(pixel_values, **image_kwargs).pooler_output  # (N, D)
        if input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask, **text_kwargs).pooler_output  # (N, D)
        output = GCLOutput(logit_scale=self.logit_scale(), **self._embeddings(image, text))
        if return_loss and output.fused_embeds is not None:
            output.loss = gcl_loss(output.image_embeds, output.text_embeds, output.fused_embeds, output.logit_scale)
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return output if use_dict else output.to_tuple()

    def _embeddings(self, image, text):
        """Unit-norm embeddings of raw features, either of which may be None; in float32 for half-precision towers."""
        if self.config.centring and not self.modality_means.any():
            raise ValueError("config.centring is on, but there are no means: call set_modality_means first")
        embeds = {}
        if image is not None:
            embeds["image_embeds"] = self._centre(image, 0)
        if text is not None:
            embeds["text_embeds"] = self._centre(text, 1)
        if image is not None and text is not None:
            embeds["fused_embeds"] = _unit(self._fuse(image, text))
        return embeds

    def _centre(self, features, modality):
        unit = _unit(features)
        return _unit(unit - self.modality_means[modality]) if self.config.centring else unit

    def _fuse(self, image, text):
        """(N, D) raw features of both towers → (N, D) fused features, not normalised."""
        if self.config.centring:
            # GR-CLIP's fused mean is the same mixture of the two means as the features are of the two modalities
            return _unit(image) + _unit(text) - self.modality_means.sum(0)
        if self.config.fusion == "normalized_sum":
            return _unit(image) + _unit(text)
        return image + text

    @torch.no_grad()
    def set_modality_means(self, image_embeds, text_embeds):
        r"""
        Store the means that `config.centring` subtracts (GR-CLIP, arXiv 2507.19054).

        Args:
            image_embeds, text_embeds (`torch.Tensor` of shape `(M, D)`): uncentred unit-norm embeddings of a
                calibration set (training captions and photos, never the test corpus).

        Raises:
            ValueError: centring is already on, so that the embeddings given are centred ones.
        """
        if self.config.centring:
            raise ValueError("set config.centring=False before estimating the means, and True afterwards")
        means = torch.stack([image_embeds.float().mean(0), text_embeds.float().mean(0)])
        self.modality_means.copy_(means)

    def _split_inputs(self, kwargs):
        """Route further inputs to the tower whose feature method names them."""
        image_names = inspect.signature(self.encoder.get_image_features).parameters
        text_names = inspect.signature(self.encoder.get_text_features).parameters
        image = {name: value for name, value in kwargs.items() if name in image_names}
        text = {name: value for name, value in kwargs.items() if name in text_names and name not in image_names}
        unknown = set(kwargs) - set(image) - set(text)
        if unknown:
            raise TypeError(f"{type(self.encoder).__name__} takes no input named {', '.join(sorted(unknown))}")
        return image, text

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


def _unit(features):
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)
