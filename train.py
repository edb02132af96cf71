"""Fine-tune a dual encoder with GCL:  accelerate launch train.py RECIPE.yaml [--key value ...]

Parses the recipe, builds model and data, evaluates, trains, evaluates again and writes a Hub-ready folder to
`<output_dir>/model`. `python train.py --help` lists every key.
"""

import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import set_seed

from evaluation.pairs import evaluate_embeddings
from evaluation.plots import modality_pca, nine_way_heatmap, training_curves
from evaluation.report import nine_way_table
from evaluation.result_sheet import result_sheet
from modeling_gcl import GCLModel, GCLProcessor
from publishing.environment import collect_environment
from publishing.hub_folder import write_hub_folder
from publishing.model_card import CardFacts, DataSource
from training.data import PairCollator, build_dataset
from training.freezing import freeze_parts, parameter_counts, parameter_table
from training.recipe import parse_recipe
from training.sources import read_source
from training.trainer import GCLTrainer

CARD_ARGUMENTS = (
    "loss", "denominator", "intra_modality", "direction_weights", "num_train_epochs", "per_device_train_batch_size",
    "world_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "max_grad_norm", "bf16", "fp16",
)  # fmt: skip


def build_model(arguments):
    """Model and processor of a recipe's `model:` section."""
    overrides = {
        "fusion": arguments.fusion,
        "text_pooling": arguments.text_pooling,
        "logit_scale_init_value": arguments.logit_scale_init,
        "max_logit_scale": arguments.max_logit_scale,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    model = GCLModel.from_encoder(arguments.encoder, revision=arguments.revision, **overrides)
    freeze_parts(model, arguments.freeze)
    # convolutions run up to twice as fast so, on CPU and GPU alike
    model.to(memory_format=torch.channels_last)
    return model, GCLProcessor.from_encoder(arguments.encoder, revision=arguments.revision)


def main(argv):
    started = time.time()
    recipe = parse_recipe(argv)
    arguments = recipe.training
    set_seed(arguments.seed)
    model, processor = build_model(recipe.model)
    train_dataset, reports = build_dataset(recipe.data, seed=arguments.seed)
    eval_pairs, eval_report = read_source(recipe.data.eval) if recipe.data.eval else (None, None)
    trainer = GCLTrainer(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_pairs,
        data_collator=PairCollator(processor, recipe.data.max_text_length),
        processing_class=processor,
        max_broken_share=recipe.data.max_broken_share,
    )
    main_process = trainer.is_world_process_zero()
    if main_process:
        print(parameter_table(model))
        for report in reports:
            print(report)

    before = after = None
    if eval_pairs is not None and arguments.eval_on_start:
        before = trainer.embed_eval_pairs()
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    if eval_pairs is not None:
        after = trainer.embed_eval_pairs()

    if main_process:
        folder = Path(arguments.output_dir) / "model"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        results = write_results(folder, recipe, trainer, reports, eval_report, before, after)
        report_to_user(folder, results, trainer, time.time() - started)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def write_results(folder, recipe, trainer, reports, eval_report, before, after):
    """Everything a saved folder holds beside model and processor; returns what `results.json` says."""
    arguments = recipe.training
    history = trainer.state.log_history
    runtime = next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry)
    environment = collect_environment()
    results = {
        "command": command_line(),
        "seed": arguments.seed,
        "recipe": recipe.settings,
        "environment": environment,
        "train_runtime": runtime,
        "parameters": parameter_counts(trainer.model),
        "data": [asdict(report) for report in reports],
        "broken_images": trainer.broken_images.names,
        "before": None if before is None else evaluate_embeddings(before, seed=arguments.eval_seed),
        "after": None if after is None else evaluate_embeddings(after, seed=arguments.eval_seed),
        "log_history": history,
    }
    pictures = draw_pictures(Path(arguments.output_dir) / "pictures", results, before, after, trainer)
    total = results["parameters"]["total"]
    facts = CardFacts(
        model_name=arguments.hub_model_id or str(folder),
        base_model=recipe.model.encoder,
        loss=arguments.loss,
        licence=recipe.model.licence,
        command=results["command"],
        recipe=recipe.settings,
        training_arguments={name: getattr(arguments, name) for name in CARD_ARGUMENTS},
        data=[data_source(*read) for read in zip(recipe.data.train, reports)],
        environment=environment,
        train_runtime=runtime,
        parameters={"total": total["parameters"], "trainable": total["trained"]},
        embedding_dim=trainer.model.config.projection_dim,
        seed=arguments.seed,
        eval_data=data_source(recipe.data.eval, eval_report) if eval_report else None,
        results_before=results["before"],
        results_after=results["after"],
    )
    write_hub_folder(folder, facts=facts, recipe_text=recipe.to_yaml(), results=results, pictures=pictures)
    return results


def draw_pictures(folder, results, before, after, trainer):
    """The pictures that the evaluation allows, by the name the card knows them by."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"training_curves": training_curves(results["log_history"], folder / "training_curves.png")}
    if after is not None:
        first, first_embeds = (results["before"], before) if before is not None else (results["after"], after)
        last, last_embeds = (results["after"], after) if before is not None else (None, None)
        pictures |= {
            "nine_way": nine_way_heatmap(first, last, folder / "nine_way.png"),
            "modality_pca": modality_pca(first_embeds, last_embeds, folder / "modality_pca.png"),
            "result_sheet": result_sheet(trainer.eval_dataset, first_embeds, last_embeds, folder / "result_sheet.png"),
        }
    return pictures


def data_source(source, report):
    """What the card says of one source."""
    return DataSource(
        source=report.path,
        pairs=report.pairs,
        skipped=sum(report.skipped.values()),
        revision=report.revision,
        licence=source.licence,
    )


def command_line():
    """The command that started this run, as a user would type it again."""
    launcher = "accelerate launch " if "ACCELERATE_MIXED_PRECISION" in os.environ else "python "
    return launcher + shlex.join(sys.argv)


def report_to_user(folder, results, trainer, seconds):
    """The end of a run on the terminal: figures, files, and what to type next."""
    if results["after"] is not None:
        first, last = (results["before"], results["after"])
        print("\n" + (nine_way_table(last) if first is None else nine_way_table(first, last)))
    if trainer.broken_images.names:
        print(trainer.broken_images.summary())
    print(f"\n{seconds:.0f} s in all. Written to {folder}:")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"  {path.relative_to(folder)}")
    print(f"\nNext: gcl evaluate pairs {folder} YOUR_FOLDER_OF_CAPTIONED_IMAGES")


if __name__ == "__main__":
    main(sys.argv[1:])
