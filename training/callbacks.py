"""What happens around the steps: epochs reach the data, the temperature keeps its bound, broken images are counted."""

from transformers import TrainerCallback

from .sharding import tell_optimizer


class DataEpochCallback(TrainerCallback):
    """Tells the data set which epoch it is in before its workers start, so that another caption is drawn."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))


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
