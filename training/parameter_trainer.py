"""Trainer for the parameters that it does not handle by itself: those of the loss, and LoRA adapters."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from universal_gcl.retrieval.adapters import ADAPTER_WEIGHTS, check_adapter_keys, check_adapter_weights
from universal_gcl.training.loss_parameters import LossParameters
from universal_gcl.training.training_arguments import GCLTrainingArguments


class ParameterTrainer(Trainer):
    """
    `transformers.Trainer` for a model with or without LoRA, and a loss with or without parameters. A subclass sets
    `loss_parameters`, and calls its `start`, `clear_gradients` and `average_gradients` in training.
    """

    args: GCLTrainingArguments
    model: Any
    train_dataset: Any
    optimizer: Any
    loss_parameters: LossParameters

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The same as Trainer's, for the loss's parameters too.

        Raises:
            ValueError: an optimizer was given that doesn't have them.
        """
        super().create_optimizer(self.loss_parameters.with_model(self.model if model is None else model))
        self.loss_parameters.check_optimizer(self.optimizer)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The same as Trainer's, without the temperature: decay would pull 1/τ towards 1."""
        return [name for name in super().get_decay_parameter_names(model) if "logit_scale" not in name]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self.loss_parameters.with_model(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self.loss_parameters.with_model(model), grad_norm=grad_norm)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The same as Trainer's, with the loss's parameters. An adapter is read back, because peft may leave out what
        a name does not match."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # other ranks come here too, before the files are written
            return
        folder = str(output_dir or self.args.output_dir)
        self.loss_parameters.save(folder)
        if self._has_adapter:
            check_adapter_weights(folder, self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The same as Trainer's, with the loss's parameters. Trainer would go on from the base model if a checkpoint
        holds no adapter, or only part of it; here that is an error."""
        holds_adapter = (Path(resume_from_checkpoint) / ADAPTER_WEIGHTS).is_file()
        if holds_adapter != self._has_adapter:
            raise ValueError(
                f"{resume_from_checkpoint} was trained {'with' if holds_adapter else 'without'} LoRA: resume it "
                f"{'with its' if holds_adapter else 'without a'} peft: section in the recipe"
            )
        if holds_adapter:
            check_adapter_keys(resume_from_checkpoint, self.model)
        self.loss_parameters.load(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if holds_adapter:
            check_adapter_weights(resume_from_checkpoint, self.model)

    def _load_best_model(self) -> None:
        """The same as Trainer's, with the loss's parameters."""
        super()._load_best_model()
        self.loss_parameters.load(str(self.state.best_model_checkpoint))

    @property
    def _has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")
