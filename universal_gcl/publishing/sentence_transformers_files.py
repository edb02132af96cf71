"""Three JSON files that let sentence-transformers (6.0 or newer) load a GCL folder, without code of their own: it calls
the model's feature methods with what the processor makes, and normalises.

    SentenceTransformer(folder, trust_remote_code=True).encode([{"image": photo, "text": "…"}])  # one kind a call
"""

import json
from pathlib import Path

from modeling_gcl import GCLProcessor

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.base.modules.normalize.Normalize"},
]
METHODS = {"text": "get_text_features", "image": "get_image_features", "image+text": "get_fused_features"}


def write_sentence_transformers_files(folder: str | Path, processor: GCLProcessor) -> None:
    """Writes `modules.json`, `sentence_bert_config.json` and `config_sentence_transformers.json`.

    Fusion, text pooling and centring are the model's own. Padding is told here, as sentence-transformers would pad to
    the longest text whatever the text tower was trained on; longer texts are cut by the processor.

    Args:
        folder: exists; what it holds beside these files does not matter.
        processor: the model's.
    """
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            modality: {"method": method, "method_output_name": "pooler_output"} for modality, method in METHODS.items()
        },
        "module_output_name": "sentence_embedding",
        "processing_kwargs": {"text": {"padding": processor.text_padding, "truncation": True}},
    }
    model = {
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
