"""The size of a model, as mteb's ModelMeta and the model card give it."""

from typing import Any

from modeling_gcl import GCLModel, GCLProcessor


def model_size(model: GCLModel, processor: GCLProcessor) -> dict[str, Any]:
    """
    Args:
        model: the model that is measured.
        processor: the checkpoint's processor.

    Returns:
        - `n_parameters`;
        - `n_embedding_parameters`: those of the token embeddings;
        - `memory_usage_mb`: memory of the parameters in their dtype, in MiB;
        - `max_tokens`: the longest text, None if there is no limit;
        - `embed_dim`.
    """
    parameters = list(model.parameters())
    return {
        "n_parameters": sum(parameter.numel() for parameter in parameters),
        "n_embedding_parameters": sum(table.numel() for table in model.get_input_embeddings().parameters()),
        "memory_usage_mb": sum(parameter.numel() * parameter.element_size() for parameter in parameters) / 2**20,
        "max_tokens": processor.max_tokens,
        "embed_dim": model.config.projection_dim,
    }
