"""Converts a GCL-tuned CLIP back into a folder of transformers' CLIPModel, which all tools for CLIP can use."""

from pathlib import Path

import torch
from transformers import CLIPProcessor

from modeling_gcl import GCLModel, GCLProcessor
from modeling_gcl.configuration_gcl import GATED_FUSIONS
from universal_gcl.conversion.report import Conversion
from universal_gcl.retrieval.new_folder import check_is_new, new_folder

FUSED_FEATURES = {  # fusion → how to compute it from CLIPModel's features
    "sum": "image_features + text_features",
    "normalized_sum": "normalize(image_features) + normalize(text_features)",
}


def convert_to_clip(model: str | Path, out_dir: str | Path, revision: str | None = None) -> Conversion:
    """Write the towers, the learned temperature as `logit_scale`, the tokenizer and the image processor.

    The folder appears whole or not at all.

    Args:
        model: folder or Hub id of a GCL checkpoint whose backbone is a CLIP.
        out_dir: folder to write; must be absent or empty.
        revision: revision on the Hub.

    Returns:
        The folder, with notes: the temperature, and the formula of a fused embedding from CLIPModel's features.

    Raises:
        ValueError: it is not a GCL checkpoint, or a CLIPModel would give other embeddings because of another backbone,
            gated fusion, mean pooling or centring; the message says which.
        FileExistsError: `out_dir` is not empty.
        OSError: there is no such folder or id.
    """
    out_dir = Path(out_dir)
    check_is_new(out_dir)
    gcl = GCLModel.from_pretrained(model, revision=revision)
    config = gcl.config
    if config.encoder_config.model_type != "clip":
        raise ValueError(
            f"{model} has a {config.encoder_config.model_type!r} backbone: only a 'clip' can become a CLIPModel."
        )
    lost = [f"fusion={config.fusion!r} (its learned gates)"] * (config.fusion in GATED_FUSIONS)
    lost += [f"text_pooling={config.text_pooling!r}"] * (config.text_pooling != "encoder")
    lost += ["centring=True (the modality means)"] * config.centring
    if lost:
        raise ValueError(f"{model}: a CLIPModel can't hold {', '.join(lost)}, so its embeddings would differ.")

    processor = GCLProcessor.from_encoder(model, revision=revision)
    tokenizer = processor.tokenizer
    if processor.max_text_length:
        tokenizer.model_max_length = processor.max_text_length
    with torch.no_grad():
        gcl.encoder.logit_scale.copy_(gcl.logit_scale().log())
    with new_folder(out_dir) as folder:
        CLIPProcessor(processor.image_processor, tokenizer).save_pretrained(folder)
        gcl.encoder.save_pretrained(folder)

    notes = [
        f"CLIPModel, 1/temperature {gcl.logit_scale().item():.2f}",
        f"fused embeddings, which CLIPModel does not compute: normalize({FUSED_FEATURES[config.fusion]})",
    ]
    if gcl.modality_means.any():
        notes.append("left out: the modality means, which this model does not apply (centring=False)")
    return Conversion(out_dir, notes)
