"""Saves a GCL model as a folder: processor, sentence-transformers' files, code, configuration and weights."""

from pathlib import Path

import torch

from modeling_gcl import GCLModel, GCLProcessor
from universal_gcl.publishing.sentence_transformers_files import write_sentence_transformers_files


def save_model_folder(
    folder: str | Path, model: GCLModel, processor: GCLProcessor, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Write everything that `AutoModel`, `AutoProcessor` and `SentenceTransformer` need to load the model.

    Args:
        folder: folder to write into; it is made if absent, and files with the same names are replaced.
        model: the model; its weights are written in their dtype.
        processor: the model's processor.
        state_dict: the model's gathered state dict, if its parameters are sharded over processes.
    """
    processor.save_pretrained(folder)
    write_sentence_transformers_files(folder, processor)
    model.save_pretrained(folder, state_dict=state_dict)  # last, so that a folder with weights is complete
