"""From a recipe to a trainer: model, adapters, data."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from modeling_gcl import GCLConfig, GCLModel, GCLProcessor, ImageError, load_image
from modeling_gcl.backbone import model_type_of
from universal_gcl.evaluation.run_record import ReadSource
from universal_gcl.sources.pairs import read_source
from universal_gcl.training.arguments import DataArguments, ModelArguments
from universal_gcl.training.data import PairCollator, build_dataset
from universal_gcl.training.freezing import freeze_parts
from universal_gcl.training.lora import add_lora
from universal_gcl.training.preprocessing import choose_preprocessing
from universal_gcl.training.progress import use_step_lines
from universal_gcl.training.recipe import Recipe
from universal_gcl.training.run import TrainingRun
from universal_gcl.training.shipped import find_data
from universal_gcl.training.trainer import GCLTrainer

BaseWriter = Callable[[Path, GCLModel, GCLProcessor], None]


def build_run(recipe: Recipe, write_base: BaseWriter) -> TrainingRun:
    """
    Model, data and trainer of a recipe.

    Args:
        recipe: the parsed recipe. Its training arguments go to the trainer.
        write_base: `write_base(folder, model, processor)` saves the model that an adapter will name as its base. It is
            called on the first process, and only if there is no such checkpoint yet.

    Raises:
        ValueError, OSError: the model or the data can't be used. The message says what to do.
    """
    arguments, data = recipe.training, recipe.data
    set_seed(arguments.seed)
    model, processor = build_model(recipe.model, data.max_text_length)
    preprocessing, how_preprocessed = choose_preprocessing(processor.image_processor)
    trained: nn.Module = model
    if recipe.peft is not None:
        base = choose_adapter_base(recipe, model, processor, write_base)
        trained = add_lora(model, recipe.peft, base)
    if preprocessing is not None:  # pixels travel as uint8, a quarter of the bytes, and are normalised on the device
        trained.register_forward_pre_hook(preprocessing.normalize_input, with_kwargs=True)
    train_dataset, reports = build_dataset(data, seed=arguments.seed, preprocessing=preprocessing)
    eval_pairs, eval_data = read_eval_pairs(data)
    trainer = GCLTrainer(
        model=trained,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_pairs,
        data_collator=PairCollator(processor, preprocessing, normalize=preprocessing is None),
        processing_class=processor,
        max_broken_share=data.max_broken_share,
    )
    use_step_lines(trainer)
    train_data = [ReadSource(source, report) for source, report in zip(data.train, reports, strict=True)]
    return TrainingRun(recipe, trainer, train_data, eval_data, how_preprocessed)


def build_model(arguments: ModelArguments, max_text_length: int | None) -> tuple[GCLModel, GCLProcessor]:
    """Model and processor of a recipe's `model:` section.

    Args:
        arguments: the section.
        max_text_length: where the processor cuts texts, in tokens; None leaves the encoder's own limit.

    Raises:
        OSError: the encoder is neither a folder nor a model that can be downloaded from the Hub.
        ValueError: the encoder can't be trained as the section says.
    """
    overrides: dict[str, Any] = {
        "fusion": arguments.fusion,
        "text_pooling": arguments.text_pooling,
        "logit_scale_init_value": arguments.logit_scale_init,
        "max_logit_scale": arguments.max_logit_scale,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    try:
        processor = GCLProcessor.from_encoder(
            arguments.encoder, revision=arguments.revision, max_text_length=max_text_length
        )
    except OSError as error:
        if Path(arguments.encoder).exists():
            raise
        raise OSError(
            f"model.encoder: there is no folder {arguments.encoder} in {Path.cwd()}, and loading it from the Hub "
            f"failed. Check the name, or make the folder first, as the recipe says. The Hub's answer: {error}"
        ) from error
    # always float32: in half precision, the optimiser's small steps vanish
    model = GCLModel.from_encoder(
        arguments.encoder, processor=processor, revision=arguments.revision, dtype=torch.float32, **overrides
    )
    model.config.centring = False  # the stored means are those of the weights before training
    model.modality_means.zero_()
    freeze_parts(model, arguments.freeze)
    # convolutions run up to twice as fast in this layout, on CPU and GPU
    model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # transformers hides the signature
    return model, processor


def choose_adapter_base(recipe: Recipe, model: GCLModel, processor: GCLProcessor, write_base: BaseWriter) -> str:
    """The checkpoint that the adapters will name as their base, a folder or a Hub id.

    If the recipe's encoder is a GCL checkpoint and the recipe does not change it, it is the base. Otherwise the present
    model is saved to `<output_dir>/base`.
    """
    encoder, out = Path(recipe.model.encoder), Path(str(recipe.training.output_dir)).absolute()
    # the folder that this run writes to will hold other weights in the end
    if is_unchanged(recipe.model) and encoder.resolve() != (out / "model").resolve():
        return str(encoder.absolute()) if encoder.exists() else recipe.model.encoder
    with recipe.training.main_process_first():
        if recipe.training.process_index == 0:
            write_base(out / "base", model, processor)
    return str(out / "base")


def is_unchanged(arguments: ModelArguments) -> bool:
    """Whether a recipe's `model:` section means a GCL checkpoint exactly as it is stored.

    A pinned revision counts as a change, because AutoModel always loads the newest commit of an adapter's base.
    """
    if arguments.revision is not None:
        return False
    overrides = (arguments.fusion, arguments.text_pooling, arguments.logit_scale_init, arguments.max_logit_scale)
    if model_type_of(arguments.encoder) != GCLConfig.model_type or overrides != (None,) * 4:
        return False
    return not GCLConfig.from_pretrained(arguments.encoder).centring


def read_eval_pairs(data: DataArguments) -> tuple[list[dict] | None, ReadSource | None]:
    """The evaluation pairs and their source, or None and None if the recipe names no evaluation data.

    Every image is decoded once here. So a broken image stops the run now and not after hours of training.

    Raises:
        DataError, ImageError: the pairs can't be used. The message names the source, the pair and what is wrong.
    """
    if data.eval is None:
        return None, None
    found = replace(data.eval, path=find_data(data.eval.path))
    pairs, report = read_source(found, max_broken_share=data.max_broken_share)
    for pair in pairs:
        try:
            load_image(pair["image"])
        except ImageError as error:
            raise ImageError(f"{data.eval.path}, {pair['id']}: {error}. Repair or remove it") from error
    return pairs, ReadSource(data.eval, replace(report, path=data.eval.path))
