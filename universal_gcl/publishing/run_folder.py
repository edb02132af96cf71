"""What a training run writes: the base of an adapter, the trained model, and the Hub-ready folder around it."""

import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from modeling_gcl import GCLModel, GCLProcessor
from universal_gcl.evaluation.run_record import ReadSource, RunRecord
from universal_gcl.publishing.adapter import save_with_adapter
from universal_gcl.publishing.card_facts import CardFacts, DataSource
from universal_gcl.publishing.hub_folder import (
    ADAPTER_FOLDER,
    base_model_ids,
    local_name,
    write_conversion,
    write_hub_folder,
)
from universal_gcl.publishing.model_folder import save_model_folder
from universal_gcl.publishing.shown_paths import shown_name
from universal_gcl.retrieval.adapters import weight_checksums


def write_base(folder: Path, model: GCLModel, processor: GCLProcessor, *, encoder: str, licence: str) -> None:
    """Save the model that an adapter is about to be trained on as a folder of its own.

    Args:
        folder: created if absent.
        model: the model before training.
        processor: the processor of the model.
        encoder: the Hub id or folder from which the model was made.
        licence: the licence of the weights, as the Hub spells it.
    """
    save_model_folder(folder, model, processor)
    name = shown_name(encoder)
    write_conversion(
        folder,
        out=folder,
        model=model,
        processor=processor,
        base_model=name,
        base_model_ids=base_model_ids(encoder),
        licence=licence,
        conversion=f"It is {name} as a GCL checkpoint, the base that a LoRA adapter was trained on.",
    )


def save_trained(folder: Path, model: Any, processor: GCLProcessor, accelerator: Accelerator) -> GCLModel:
    """
    Save the trained model. Every process must call this; the first one writes.

    Args:
        folder: created if absent; files of an earlier run are replaced.
        model: the trained model, a `GCLModel` or a `peft.PeftModel` around one. An adapter is saved, and also merged.
        processor: the processor of the model.
        accelerator: gathers weights that are sharded over processes.

    Returns:
        The model that was saved. With LoRA it is the merged one. Measure this model, because it is the one that users
        load.
    """
    if not hasattr(model, "peft_config"):
        weights = accelerator.get_state_dict(model)  # on every process: sharded weights are gathered
        if accelerator.is_main_process:
            # an earlier run's adapter belongs to other weights
            shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)
            save_model_folder(folder, model, processor, state_dict=weights)
        return model
    # remove the autocast that mixed precision puts around forward: it makes larger errors than the tolerance of 1e-5
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if accelerator.is_main_process:
        checksums = weight_checksums(model.peft_config["default"].base_model_name_or_path)
        return save_with_adapter(folder, model, processor, checksums)
    return model.merge_and_unload()


def write_run_folder(folder: Path, record: RunRecord, pictures: dict[str, Path]) -> Path:
    """Complete the folder that `save_trained` wrote: recipe, results, pictures, data, environment, model card."""
    return write_hub_folder(
        folder,
        facts=card_facts(record, folder),
        recipe_text=record.recipe_text,
        results=record.results(),
        pictures=pictures,
    )


def card_facts(record: RunRecord, folder: Path) -> CardFacts:
    """The facts of the model card of a run whose model is in `folder`."""
    return CardFacts(
        title=Path(record.output_dir).name,
        model_name=local_name(folder),
        base_model=shown_name(record.encoder),
        base_revision=record.base_revision,
        base_model_ids=base_model_ids(record.encoder),
        loss=record.loss,
        loss_description=record.loss_description,
        loss_citation=record.loss_citation,
        licence=record.licence,
        command=record.command,
        recipe=record.settings,
        training_arguments=record.hyperparameters,
        data=[data_source(source, record.broken_images) for source in record.train_data],
        environment=record.environment,
        train_runtime=record.train_runtime,
        trained_parameters=record.parameters["total"]["trained"],
        size=record.size,
        languages=record.languages,
        matryoshka_dims=record.matryoshka_dims,
        seed=record.seed,
        eval_data=None if record.eval_data is None else data_source(record.eval_data),
        results_before=record.before,
        results_after=record.after,
    )


def data_source(source: ReadSource, broken_images: list[str] | None = None) -> DataSource:
    """What the card says about one source.

    Args:
        source: the source and what was read from it.
        broken_images: the images of any source that training could not read, each "source, pair id: what is wrong".
    """
    arguments, report = source.arguments, source.report
    broken = [name for name in broken_images or [] if name.startswith(f"{arguments.path}, ")]
    return DataSource(
        source=shown_name(report.path),
        pairs=report.pairs,
        skipped=report.num_skipped + len(broken),
        name=arguments.name,
        revision=report.revision,
        licence=arguments.licence,
        on_hub=report.split is not None,
    )
