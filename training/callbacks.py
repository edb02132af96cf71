"""What happens between steps: the data set learns the epoch, the temperature is clamped, broken images are counted."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from universal_gcl.training.sharding import tell_optimizer


class DataEpochCallback(TrainerCallback):
    """Tells the data set the epoch before its workers start, so that each epoch draws another caption."""

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))


class BatchSizeCallback(TrainerCallback, ExportableState):
    """Saves the number of pairs per step in checkpoints. Refuses to resume with another number, or if no step is
    left."""

    def __init__(self, pairs_per_step: int) -> None:
        self.pairs_per_step = pairs_per_step

    def state(self) -> dict[str, dict]:
        """What this callback stores in the `trainer_state.json` of a checkpoint."""
        return {"args": {"pairs_per_step": self.pairs_per_step}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get(type(self).__name__, self.state())["args"]["pairs_per_step"]
        if saved != self.pairs_per_step:
            raise ValueError(
                f"the checkpoint was trained with {saved} pairs a step and can't be resumed with {self.pairs_per_step}:"
                " use the same batch size, or start a new run from the checkpoint's weights (as model.encoder)"
            )
        if state.global_step >= state.max_steps:
            raise ValueError(
                f"nothing is left to train: the checkpoint is at step {state.global_step} of {state.max_steps}. Raise "
                "training.num_train_epochs or max_steps, or don't resume"
            )


class LogitScaleCallback(TrainerCallback):
    """Clamps the temperature after every optimiser step, as CLIP does."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        model.logit_scale.clamp_()
        tell_optimizer(model.logit_scale.log_scale)


class BrokenImagesCallback(TrainerCallback):
    """Counts the unreadable images of all processes when an epoch ends, because each process only reads its own
    share."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.gather_broken_images()
