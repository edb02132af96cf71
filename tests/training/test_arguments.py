"""Checks of the argument classes: defaults, ranges, and what goes with what."""

import json

import pytest
import torch

from modeling_gcl.modalities import CROSS_DIRECTIONS
from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.training import training_arguments as arguments_module
from universal_gcl.training.arguments import DataArguments, ModelArguments
from universal_gcl.training.training_arguments import GCLTrainingArguments


def test_defaults_suit_contrastive_training(tmp_path):
    arguments = GCLTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (arguments.loss, arguments.denominator, arguments.intra_modality) == ("gcl", "all", True)
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.get_warmup_steps(200) == 10
    assert arguments.report_to == []
    assert arguments.logging_nan_inf_filter is False
    assert arguments.remove_unused_columns is False
    assert arguments.resume_from_checkpoint is None


def test_buffers_are_not_broadcast_where_a_process_may_go_back(tmp_path):
    def broadcast(**given):
        return GCLTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given).ddp_broadcast_buffers

    assert broadcast() is None
    assert broadcast(grad_cache_chunk=4) is False and broadcast(effective_batch_size=64) is False
    assert broadcast(grad_cache_chunk=4, ddp_broadcast_buffers=True) is True


@pytest.mark.parametrize(
    "cores, processes, gpu, expected",
    [(2, 1, False, 1), (16, 1, False, 2), (1, 1, False, 1), (16, 1, True, 8), (16, 4, True, 3), (8, 8, True, 1)],
)
def test_workers_by_the_cores_of_a_process(cores, processes, gpu, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments_module.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert arguments_module.default_num_workers(use_cpu=False) == expected
    assert arguments_module.default_num_workers(use_cpu=True) == min(expected, 2)


def test_loading_follows_workers_and_device(tmp_path, monkeypatch):
    def loading(**given):
        arguments = GCLTrainingArguments(output_dir=str(tmp_path), **given)
        return (
            arguments.dataloader_persistent_workers,
            arguments.dataloader_pin_memory,
            arguments.accelerator_config.non_blocking,
        )

    assert loading(use_cpu=True) == (True, False, False)
    assert loading(use_cpu=True, dataloader_num_workers=0) == (False, False, False)
    assert loading(use_cpu=True, dataloader_persistent_workers=False) == (False, False, False)
    monkeypatch.setattr(GCLTrainingArguments, "device", torch.device("cuda", 0))
    assert loading() == (True, True, True)
    assert loading(dataloader_pin_memory=False) == (True, False, False)


def test_arguments_can_be_saved(tmp_path):
    arguments = GCLTrainingArguments(output_dir=str(tmp_path), use_cpu=True, direction_weights={"i->it": 0.25})
    assert json.loads(arguments.to_json_string())["direction_weights"] == {"i→it": 0.25}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"loss": "clip"}, "training.loss: 'clip' is not one of gcl, cl, alignclip"),
        ({"denominator": "none"}, "training.denominator"),
        ({"direction_weights": {"i-t": 1.0}}, "'i-t' is not one of i→t"),
        ({"direction_weights": {"i->t": -1.0}}, r"direction_weights\[i→t\] is -1.0"),
        ({"direction_weights": {"i->t": float("nan")}}, "is nan"),
        ({"direction_weights": dict.fromkeys(CROSS_DIRECTIONS, 0.0)}, "all 0"),
        ({"loss": "cl", "intra_modality": False}, "training.intra_modality belongs to loss: gcl"),
        ({"loss": "alignclip", "denominator": "target"}, "training.denominator belongs to loss: gcl"),
        ({"separation_weight": 0.25}, "belongs to loss: alignclip"),
        ({"loss": "alignclip", "separation_weight": -1.0}, "at least 0"),
        ({"matryoshka_dims": []}, r"training.matryoshka_dims is \[\]: name each dimension once, each at least 1"),
        ({"matryoshka_dims": [64, 64]}, "name each dimension once"),
        ({"matryoshka_dims": [64, 0]}, "each at least 1"),
        ({"matryoshka_dims": [64], "matryoshka_weights": [1.0, 2.0]}, "give one weight for each"),
        ({"matryoshka_dims": [64], "matryoshka_weights": [0.0]}, "training.matryoshka_weights is 0.0"),
        ({"matryoshka_weights": [1.0]}, "no effect without training.matryoshka_dims"),
        ({"remove_unused_columns": True}, "must be false"),
        ({"per_device_train_batch_size": 0}, "training.per_device_train_batch_size is 0: use a number of at least 1"),
        ({"per_device_eval_batch_size": -1}, "training.per_device_eval_batch_size is -1"),
        ({"gradient_accumulation_steps": 0}, "training.gradient_accumulation_steps is 0"),
        ({"grad_cache_chunk": 0}, "training.grad_cache_chunk is 0: use 1 or more, or leave it out"),
        ({"effective_batch_size": -4}, "training.effective_batch_size is -4: use 1 or more"),
        (
            {"effective_batch_size": 64, "gradient_accumulation_steps": 2},
            r"gradient_accumulation_steps \(2\) is computed from training.effective_batch_size \(64\): leave one",
        ),
        ({"optim": "lomo"}, "training.optim lomo changes weights during backward"),
        ({"dataloader_num_workers": -1}, "training.dataloader_num_workers is -1"),
        ({"weight_decay": float("nan")}, "training.weight_decay is nan"),
        ({"max_grad_norm": -1.0}, "training.max_grad_norm is -1.0"),
        ({"warmup_steps": -1}, "training.warmup_steps is -1"),
        ({"seed": -1}, "training.seed is -1"),
        ({"eval_seed": -1}, "training.eval_seed is -1"),
        ({"learning_rate": float("nan")}, "training.learning_rate is nan: use a number over 0"),
        ({"learning_rate": float("inf")}, "training.learning_rate is inf"),
        ({"learning_rate": -1e-5}, "training.learning_rate is -1e-05"),
        ({"learning_rate": 0.0}, "training.learning_rate is 0.0"),
        ({"num_train_epochs": 0}, "training.num_train_epochs is 0"),
        ({"num_train_epochs": float("inf")}, "training.num_train_epochs is inf"),
        ({"max_steps": 0}, "training.max_steps is 0: use 1 or more, or -1"),
    ],
)
def test_training_arguments_reject(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        GCLTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"encoder": ""}, "model.encoder is empty"),
        ({"fusion": "sam"}, "model.fusion: 'sam' is not one of sum, normalized_sum"),
        ({"text_pooling": "max"}, "model.text_pooling"),
        ({"freeze": ["texts"]}, "model.freeze: 'texts' is not one of image, text"),
        ({"logit_scale_init": 0.0}, "model.logit_scale_init is 0.0"),
        ({"logit_scale_init": 200.0, "max_logit_scale": 100.0}, "over model.max_logit_scale"),
        ({"max_logit_scale": float("inf")}, "model.max_logit_scale"),
    ],
)
def test_model_arguments_reject(given, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(**{"encoder": "some/encoder", **given})


def test_largest_logit_scale_is_the_checkpoints_unless_given():
    assert ModelArguments("some/encoder", logit_scale_init=200.0).max_logit_scale is None


@pytest.mark.parametrize(
    "given, message",
    [
        ({"train": []}, "data.train is empty"),
        ({"train": [SourceArguments("a", weight=1.0), SourceArguments("b")]}, "but not b"),
        ({"mixing_alpha": 1.5}, "data.mixing_alpha is 1.5"),
        ({"max_broken_share": 2.0}, "data.max_broken_share is 2.0"),
        ({"crop_scale": [0.9]}, "data.crop_scale"),
        ({"crop_scale": [1.0, 0.9]}, "data.crop_scale"),
        ({"crop_scale": [0.0, 1.0]}, "data.crop_scale"),
        ({"max_text_length": 1}, "data.max_text_length"),
    ],
)
def test_data_arguments_reject(given, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**{"train": [SourceArguments("a")], **given})


@pytest.mark.parametrize("given", [{"path": ""}, {"path": "a", "weight": 0.0}, {"path": "a", "limit": 0}])
def test_source_arguments_reject(given):
    with pytest.raises(ValueError, match="path of a data source|weight of a|limit of a"):
        SourceArguments(**given)
