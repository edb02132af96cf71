"""Checks that the model, the data and the loss of a recipe fit together, before training starts."""

import logging
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from modeling_gcl.matryoshka import cuts_and_shares
from universal_gcl.training.training_arguments import GCLTrainingArguments

logger = logging.getLogger(__name__)


def check_enough_pairs(arguments: GCLTrainingArguments, num_pairs: int) -> None:
    """Raise ValueError if the training data has fewer pairs than one batch."""
    if num_pairs < arguments.train_batch_size * arguments.world_size:
        raise ValueError(
            f"{num_pairs} pairs are fewer than one batch ({arguments.train_batch_size} pairs x {arguments.world_size} "
            f"process{'' if arguments.world_size == 1 else 'es'}): lower per_device_train_batch_size"
        )


def check_fusion(model: Any, loss_name: str, modalities: tuple[str, ...]) -> None:
    """Raise ValueError if the model has learned gates that the loss would leave untrained."""
    fusion = getattr(model, "fusion", None)
    if "fused" not in modalities and fusion is not None and any(p.requires_grad for p in fusion.parameters()):
        raise ValueError(
            f"training.loss={loss_name!r} has no fused embeddings, so the gates of fusion={model.config.fusion!r} "
            "would stay untrained: use the loss gcl, or freeze them (model.freeze: [fusion])"
        )


def check_grad_cache(arguments: GCLTrainingArguments, model: nn.Module, deepspeed: bool) -> None:
    """Raise ValueError if a recipe asks for GradCache where it can't work. Warn about trained batch norms."""
    if arguments.grad_cache_chunk is None and arguments.effective_batch_size is None:
        return
    if deepspeed:
        raise ValueError(
            "training.grad_cache_chunk and effective_batch_size don't work with DeepSpeed, whose engine counts every "
            "chunk as a step: use DDP or FSDP, or leave them out"
        )
    if arguments.auto_find_batch_size:
        raise ValueError(
            "training.auto_find_batch_size does nothing with grad_cache_chunk or effective_batch_size, where the chunk "
            "limits the memory: leave it out"
        )
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    if count := len(trained.intersection(norms)):
        logger.warning(
            f"{count} batch norm layers are trained. With training.grad_cache_chunk they normalise by the statistics "
            "of a chunk, and their running statistics are updated twice a step."
        )


def matryoshka_cuts(arguments: GCLTrainingArguments, projection_dim: int) -> list[int] | None:
    """The dimensions that embeddings are trained to be cut to, largest first; None for the full dimension only.

    Raises:
        ValueError: the model's embeddings can't be cut to them.
    """
    if arguments.matryoshka_dims is None:
        return None
    try:
        cuts = cuts_and_shares(arguments.matryoshka_dims, arguments.matryoshka_weights, projection_dim)
    except ValueError as error:
        raise ValueError(f"training.{error}") from error
    return sorted(cuts, reverse=True)


def record_cuts(config: Any, cuts: list[int] | None) -> None:
    """Write the dimensions of `matryoshka_cuts` into a model's configuration. Warn if this removes earlier ones."""
    if config.matryoshka_dims and cuts is None:
        logger.warning(
            f"The model was trained to be cut to {config.matryoshka_dims} dimensions. This training only uses the full "
            "dimension, and the saved model will not name the others. To train them too, set training.matryoshka_dims."
        )
    config.matryoshka_dims = cuts
