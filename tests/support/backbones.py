"""Tiny random models of every supported family and processors for them, built offline."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from modeling_gcl import GCLModel, GCLProcessor
from modeling_gcl.own_backbones import OWN_BACKBONES

WORDS = "a an the red blue green dog cat bird runs sits flies on in grass house sky one two three".split()
BACKBONES = ("clip", "siglip", "siglip2", "vision-text-dual-encoder")  # the kinds that every room is tested with
IMAGE_SIZE = 32
DIM = 24

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = TOWER | {"vocab_size": 30, "max_position_embeddings": 16, "pad_token_id": 0}
TEXT = BERT | {"bos_token_id": 2, "eos_token_id": 3}
ROBERTA = TEXT | {"max_position_embeddings": 20}  # positions count from behind pad_token_id
VISION = TOWER | {"image_size": IMAGE_SIZE, "patch_size": 16}
EFFICIENTNET = {  # two blocks; widths are multiplied by 1/40; weights of that size keep activations from fading out
    "image_size": IMAGE_SIZE, "width_coefficient": 0.025, "depth_coefficient": 1.0, "kernel_sizes": [3, 3],
    "in_channels": [32, 320], "out_channels": [320, 960], "strides": [1, 2], "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2], "initializer_range": 0.5, "drop_connect_rate": 0.0,
}  # fmt: skip
# of the usual size, 0.02, they would make all embeddings of so small a VISTA one, to 2e-3
LARGE = {"initializer_range": 0.2}
EVA02 = VISION | {"model_type": "eva02_clip_vision", "rope_grid_size": 4} | LARGE
GROUPVIT = {
    "num_hidden_layers": 3, "depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 2]
}  # fmt: skip


@dataclass
class Family:
    """A kind of backbone and what is said to `GCLModel.from_encoder` beside it.

    Attributes:
        name (`str`): transformers' class without `Model`.
        text, vision (`dict`): of the towers' configurations; for `VisionTextDualEncoder` after their classes' names.
        backbone (`dict`): of the backbone's configuration.
        gcl (`dict`): of `GCLConfig`.
    """

    name: str
    text: dict | tuple
    vision: dict | tuple
    backbone: dict = field(default_factory=lambda: {"projection_dim": DIM})
    gcl: dict = field(default_factory=dict)

    def build(self):
        if self.is_ours:
            model = OWN_BACKBONES[self.name]
            return model(model.config_class(text_config=self.text, vision_config=self.vision, **self.backbone))
        if self.name == "VisionTextDualEncoder":
            vision, text = (
                getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
                for name, config in (self.vision, self.text)
            )
            towers = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
                vision.config, text.config, **self.backbone
            )
            return transformers.VisionTextDualEncoderModel(towers, vision_model=vision, text_model=text)
        config = getattr(transformers, f"{self.name}Config")
        config = config(text_config=self.text, vision_config=self.vision, **self.backbone)
        return getattr(transformers, f"{self.name}Model")(config)

    @property
    def is_ours(self):
        """No `AutoModel` of transformers: a converted folder is a GCLModel's."""
        return self.name in OWN_BACKBONES

    @property
    def is_known(self):
        """Whether it is ours or this transformers has it."""
        return self.is_ours or hasattr(transformers, f"{self.name}Model")


# every family of docs/models.md that GCL takes
FAMILIES = {
    "clip": Family("CLIP", TEXT, VISION),
    "vista-base": Family("vista", {"model_type": "bert"} | BERT | LARGE, EVA02, {"cls_token_id": 2, "sep_token_id": 3}),
    "vista-m3": Family(
        "vista", {"model_type": "xlm-roberta"} | ROBERTA | LARGE, EVA02, {"cls_token_id": 2, "sep_token_id": 3}
    ),
    "clip, gated": Family("CLIP", TEXT, VISION, gcl={"fusion": "gated_sum"}),
    "metaclip_2": Family("MetaClip2", TEXT, VISION),
    "altclip": Family("AltCLIP", ROBERTA | {"project_dim": 28}, VISION),
    "chinese_clip": Family("ChineseCLIP", BERT, VISION),
    "clipseg": Family("CLIPSeg", TEXT, VISION),
    "siglip": Family("Siglip", TEXT, VISION, {}),
    "siglip2": Family("Siglip2", TEXT, TOWER | {"num_patches": 4, "patch_size": 16}, {}),
    "align": Family("Align", BERT, EFFICIENTNET | {"hidden_dim": DIM}),
    "tipsv2": Family("Tipsv2", TEXT, VISION, {}),
    "groupvit": Family("GroupViT", TEXT, VISION | GROUPVIT, {"projection_dim": DIM, "projection_intermediate_dim": 40}),
    "owlvit": Family("OwlViT", TEXT, VISION),
    "owlv2": Family("Owlv2", TEXT, VISION),
    "vision-text-dual-encoder": Family("VisionTextDualEncoder", ("Bert", BERT), ("ViT", VISION)),
    "clip + xlm-roberta": Family("VisionTextDualEncoder", ("XLMRoberta", ROBERTA), ("CLIPVision", VISION)),
    "dinov2 + bert": Family("VisionTextDualEncoder", ("Bert", BERT), ("Dinov2", VISION)),
    "efficientnet + bert": Family(
        "VisionTextDualEncoder", ("Bert", BERT), ("EfficientNet", EFFICIENTNET | {"hidden_dim": 32, "hidden_size": 32}),
        gcl={"text_pooling": "mean", "fusion": "normalized_sum"},
    ),
}  # fmt: skip


def word_tokenizer(model_input_names=("input_ids", "attention_mask"), model_max_length=16):
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]",
        model_input_names=list(model_input_names), model_max_length=model_max_length,
    )  # fmt: skip


def tiny_encoder(name, seed=0):
    """A random backbone of the named family: width 32, 2 layers, 32 px."""
    family = FAMILIES[name]
    if not family.is_known:
        pytest.skip(f"transformers {transformers.__version__} has no {family.name}")
    torch.manual_seed(seed)
    return family.build().eval()


def tiny_model(name, seed=0, **config):
    """A GCLModel on `tiny_encoder`, in eval mode."""
    return GCLModel.from_encoder(tiny_encoder(name, seed), **FAMILIES[name].gcl | config).eval()


def tiny_processor(name):
    if name == "siglip2":
        image_processor = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=4)
    else:
        side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        image_processor = CLIPImageProcessorPil(size=side, crop_size=side)
    if name.startswith("siglip"):  # trained on full-length text without a mask
        return GCLProcessor(image_processor, word_tokenizer(["input_ids"]), text_padding="max_length")
    return GCLProcessor(image_processor, word_tokenizer())


def random_image(seed, size=(40, 48)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
