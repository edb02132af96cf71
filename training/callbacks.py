"""What happens around the steps: epochs reach the data, the temperature keeps its bound, broken images are counted."""

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from universal_gcl.training.sharding import tell_optimizer


class DataEpochCallback(TrainerCallback):
    """Tells the data set which epoch it is in before its workers start, so that another caption is drawn."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))


class BatchSizeCallback(TrainerCallback, ExportableState):
    """Puts the pairs of a step into checkpoints, and refuses to resume where they differ or no step is left."""

    def __init__(self, pairs_per_step):
        self.pairs_per_step = pairs_per_step

    def state(self):
        """What a checkpoint's `trainer_state.json` holds of this."""
        return {"args": {"pairs_per_step": self.pairs_per_step}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = (state.stateful_callbacks or {}).get(type(self).__name__, self.state())["args"]["pairs_per_step"]
        if saved != self.pairs_per_step:
            raise ValueError(
                f"the checkpoint was trained with {saved} pairs a step, it can't be resumed with {self.pairs_per_step}:"
                " use batches of the same size, or start anew from the checkpoint's weights (as model.encoder)"
            )
        if state.global_step >= state.max_steps:
            raise ValueError(
                f"nothing is left to train: the checkpoint is at step {state.global_step} of {state.max_steps}. Raise "
                "training.num_train_epochs or max_steps, or don't resume"
            )


class LogitScaleCallback(TrainerCallback):
    """Clamps the temperature after every optimiser step, as CLIP does."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.logit_scale.clamp_()
        tell_optimizer(model.logit_scale.log_scale)


class BrokenImagesCallback(TrainerCallback):
    """Counts the unreadable images over all processes when an epoch ends; each process alone sees but its share."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.gather_broken_images()
