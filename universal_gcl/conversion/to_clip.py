"""Turns a GCL-tuned CLIP back into a folder of transformers' CLIPModel, which every tool for CLIP takes."""

from pathlib import Path

import torch
from transformers import CLIPProcessor

from modeling_gcl import GCLModel, GCLProcessor
from modeling_gcl.configuration_gcl import GATED_FUSIONS
from universal_gcl.retrieval.new_folder import check_is_new, new_folder

FUSED = {
    "sum": "image_features + text_features",
    "normalized_sum": "normalize(image_features) + normalize(text_features)",
}


def convert_to_clip(model: str | Path, out_dir: str | Path, revision: str | None = None) -> str:
    """Writes the towers with the learned temperature as `logit_scale`, the tokenizer and the image processor.

    The folder appears whole or not at all.

    Args:
        model: folder or Hub id of a GCL checkpoint on a CLIP.
        out_dir: folder to write; must be absent or empty.
        revision: of the Hub.

    Returns:
        A report of a few lines: the folder, and how a fused feature is made of CLIPModel's two.

    Raises:
        ValueError: no GCL checkpoint, or one whose embeddings a CLIPModel cannot give: another backbone, gated fusion,
            mean pooling or centring; the message names which.
        FileExistsError: `out_dir` is not empty.
        OSError: no such folder or id.
    """
    out_dir = Path(out_dir)
    check_is_new(out_dir)
    gcl = GCLModel.from_pretrained(model, revision=revision)
    config = gcl.config
    if config.encoder_config.model_type != "clip":
        raise ValueError(f"{model} wraps a {config.encoder_config.model_type!r}, not a 'clip': it is no CLIPModel.")
    lost = [f"fusion={config.fusion!r} (its learned gates)"] * (config.fusion in GATED_FUSIONS)
    lost += [f"text_pooling={config.text_pooling!r}"] * (config.text_pooling != "encoder")
    lost += ["centring=True (the modality means)"] * config.centring
    if lost:
        raise ValueError(f"{model}: a CLIPModel has no place for {', '.join(lost)}: its embeddings would differ.")

    processor = GCLProcessor.from_encoder(model, revision=revision)
    tokenizer = processor.tokenizer
    if processor.max_text_length:
        tokenizer.model_max_length = processor.max_text_length
    with torch.no_grad():
        gcl.encoder.logit_scale.copy_(gcl.logit_scale().log())
    with new_folder(out_dir) as folder:
        CLIPProcessor(processor.image_processor, tokenizer).save_pretrained(folder)
        gcl.encoder.save_pretrained(folder)

    lines = [f"{out_dir}: CLIPModel, 1/temperature {gcl.logit_scale().item():.2f}"]
    lines.append(f"fused embeddings, which CLIPModel does not make: normalize({FUSED[config.fusion]})")
    if gcl.modality_means.any():
        lines.append("left out: the modality means, which this model does not apply (centring=False)")
    return "\n".join(lines)
