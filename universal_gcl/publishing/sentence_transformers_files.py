"""Writes three JSON files with which sentence-transformers (6.0 or newer) loads a GCL folder.

No code of ours is needed: sentence-transformers passes the processor's outputs to the model's feature methods and
normalises the results. All rows of a call must have the same modality:

    SentenceTransformer(folder, trust_remote_code=True).encode([{"image": photo, "text": "…"}])
"""

import json
from pathlib import Path
from typing import Any

from modeling_gcl import GCLProcessor

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.base.modules.normalize.Normalize"},
]
METHODS = {"text": "get_text_features", "image": "get_image_features", "image+text": "get_fused_features"}


def write_sentence_transformers_files(folder: str | Path, processor: GCLProcessor) -> None:
    """Write `modules.json`, `sentence_bert_config.json` and `config_sentence_transformers.json`.

    The model itself does fusion, text pooling and centring. The files set the padding, because sentence-transformers
    would otherwise pad to the longest text, which is wrong for towers trained with texts of full length. The processor
    truncates long texts.

    Args:
        folder: an existing folder.
        processor: the model's processor.
    """
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            modality: {"method": method, "method_output_name": "pooler_output"} for modality, method in METHODS.items()
        },
        "module_output_name": "sentence_embedding",
        "processing_kwargs": {"text": {"padding": processor.text_padding, "truncation": True}},
    }
    model: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    for name, content in {
        "modules.json": MODULES,
        "sentence_bert_config.json": transformer,
        "config_sentence_transformers.json": model,
    }.items():
        (Path(folder) / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
