"""A GCL folder as every command writes it: processor, sentence-transformers' files, code, configuration and weights."""

from pathlib import Path

import torch

from modeling_gcl import GCLModel, GCLProcessor
from universal_gcl.publishing.sentence_transformers_files import write_sentence_transformers_files


def save_model_folder(
    folder: str | Path, model: GCLModel, processor: GCLProcessor, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes all that `AutoModel`, `AutoProcessor` and `SentenceTransformer` need to load the model.

    Args:
        folder: made if absent; files of the same names are replaced.
        model: weights are written in their dtype.
        processor: the model's.
        state_dict: the model's, gathered, where its parameters are shared out to processes.
    """
    processor.save_pretrained(folder)
    write_sentence_transformers_files(folder, processor)
    model.save_pretrained(folder, state_dict=state_dict)  # the weights last: a folder that has them is complete
