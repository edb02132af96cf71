"""Tiny random backbones of every supported kind and processors for them, built offline."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from modeling_gcl import GCLProcessor

WORDS = "a an the red blue green dog cat bird runs sits flies on in grass house sky one two three".split()
BACKBONES = ("clip", "siglip", "siglip2", "vision-text-dual-encoder")
IMAGE_SIZE = 32


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
    """A random dual encoder of the named kind: width 32, 2 layers, 32 px."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": 30, "max_position_embeddings": 16, "pad_token_id": 0}
    vision = tower | {"image_size": IMAGE_SIZE, "patch_size": 16}
    if name == "clip":
        text |= {"bos_token_id": 2, "eos_token_id": 3}
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    if name == "siglip":
        return SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    if name == "siglip2":
        vision = tower | {"num_patches": 4, "patch_size": 16}
        return Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).eval()
    vit, bert = ViTModel(ViTConfig(**vision)), BertModel(BertConfig(**text))
    model = VisionTextDualEncoderModel(vision_model=vit, text_model=bert)
    return model.eval()


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
