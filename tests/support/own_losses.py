"""Losses that a user may write: those of GCLTrainer's docstring, which are run here as they stand there."""

import doctest

import torch
from torch import nn

from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder
from tests.support.training_runs import make_pairs, make_trainer
from universal_gcl.training.trainer import GCLTrainer

EXAMPLES: dict = {"__name__": __name__}
for example in doctest.DocTestParser().get_examples(GCLTrainer.__doc__):
    exec(example.source, EXAMPLES)
UniformTrainer, SigmoidLoss = EXAMPLES["UniformTrainer"], EXAMPLES["SigmoidLoss"]


class LocalSigmoidLoss(SigmoidLoss):
    """The same loss with this process's images only: its gradients differ between the processes."""

    def forward(self, image_embeds, text_embeds, logit_scale, processes, **labels):
        texts, start = processes.gather(text_embeds), processes.rank * len(image_embeds)
        logits = logit_scale * image_embeds @ texts.T + self.bias
        signs = 2 * torch.eye(len(texts))[start : start + len(image_embeds)] - 1
        return -nn.functional.logsigmoid(signs * logits).sum(1).mean()


def exact_model():
    """A tiny model in float64, without dropout, whose runs can be compared to 1e-9."""
    encoder = tiny_encoder("clip")
    for module in encoder.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return GCLModel.from_encoder(encoder, logit_scale_init_value=10.0).double()


def trained(output_dir, cls=GCLTrainer, loss=None, resume=None, **arguments):
    """A trainer that has taken its steps, one by default, on 12 pairs each, which are in `batches`."""
    defaults = {"per_device_train_batch_size": 12, "max_steps": 1, "model": exact_model()}
    trainer = make_trainer(output_dir, make_pairs(48), cls=cls, own_loss=loss, **(defaults | arguments))
    trainer.batches = []
    collate = trainer.data_collator
    trainer.data_collator = lambda items: trainer.batches.append(collate(items)) or trainer.batches[-1]
    trainer.train(resume_from_checkpoint=resume)
    # the data loader is a batch ahead
    trainer.batches = trainer.batches[: trainer.state.global_step * trainer.args.gradient_accumulation_steps]
    return trainer


def weights(trainer):
    """The parameters of model and loss by name."""
    found = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    if isinstance(trainer.loss, nn.Module):
        found |= {f"loss.{name}": p.detach().clone() for name, p in trainer.loss.named_parameters()}
    return found


def assert_same(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=0, msg=lambda m, at=name: f"{at}: {m}")
