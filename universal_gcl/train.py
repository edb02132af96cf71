"""Fine-tune a dual encoder with GCL:  accelerate launch train.py RECIPE.yaml [--key value ...]

Parses the recipe, builds model and data, evaluates, trains, evaluates again and writes a Hub-ready folder to
`<output_dir>/model`. `python train.py --help` lists every key.
"""

import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import set_seed

from modeling_gcl import GCLConfig, GCLModel, GCLProcessor, ImageError, load_image
from modeling_gcl.backbone import model_type_of
from universal_gcl.evaluation.environment import collect_environment, command_line
from universal_gcl.evaluation.model_size import model_size
from universal_gcl.evaluation.pairs.measure import evaluate_embeddings
from universal_gcl.evaluation.pairs.plots import modality_pca, nine_way_heatmap, training_curves
from universal_gcl.evaluation.pairs.report import headline_metrics, nine_way_table
from universal_gcl.evaluation.pairs.result_sheet import result_sheet
from universal_gcl.failures import failing_together, stop
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
from universal_gcl.publishing.push import check_may_push, push_folder
from universal_gcl.publishing.shown_paths import shown_name
from universal_gcl.retrieval.adapters import weight_checksums
from universal_gcl.sources.pairs import read_source
from universal_gcl.training.data import PairCollator, build_dataset
from universal_gcl.training.freezing import freeze_parts, parameter_counts, parameter_table
from universal_gcl.training.lora import add_lora
from universal_gcl.training.memory import peak_memory
from universal_gcl.training.preprocessing import choose_preprocessing
from universal_gcl.training.recipe import parse_recipe
from universal_gcl.training.trainer import GCLTrainer

CARD_ARGUMENTS = (
    "loss", "denominator", "intra_modality", "direction_weights", "matryoshka_dims", "matryoshka_weights",
    "num_train_epochs", "per_device_train_batch_size",
    "world_size", "gradient_accumulation_steps", "grad_cache_chunk", "effective_batch_size",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "fp16",
)  # fmt: skip


def build_model(arguments, max_text_length):
    """Model and processor of a recipe's `model:` section; the processor cuts texts to `max_text_length`, if given."""
    overrides = {
        "fusion": arguments.fusion,
        "text_pooling": arguments.text_pooling,
        "logit_scale_init_value": arguments.logit_scale_init,
        "max_logit_scale": arguments.max_logit_scale,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    processor = GCLProcessor.from_encoder(
        arguments.encoder, revision=arguments.revision, max_text_length=max_text_length
    )
    # float32 whatever the checkpoint's dtype: an optimiser's small steps vanish in half precision
    model = GCLModel.from_encoder(
        arguments.encoder, processor=processor, revision=arguments.revision, dtype=torch.float32, **overrides
    )
    model.config.centring = False  # the means were those of the weights before training
    model.modality_means.zero_()
    freeze_parts(model, arguments.freeze)
    # convolutions run up to twice as fast so, on CPU and GPU alike
    model.to(memory_format=torch.channels_last)
    return model, processor


def build_lora(recipe, model, processor):
    """The model with adapters. They sit on the recipe's encoder if that is a GCL checkpoint which the recipe leaves as
    it is, else on a GCL folder of the model as it is now, `<output_dir>/base`."""
    base, out = recipe.model.encoder, Path(recipe.training.output_dir).absolute()
    # what this run writes to has other weights in the end
    if not is_unchanged(recipe.model) or Path(base).resolve() == (out / "model").resolve():
        base = out / "base"
        with recipe.training.main_process_first():
            if recipe.training.process_index == 0:
                save_model_folder(base, model, processor)
                name = shown_name(recipe.model.encoder)
                write_conversion(
                    base,
                    out=base,
                    model=model,
                    processor=processor,
                    base_model=name,
                    base_model_ids=base_model_ids(recipe.model.encoder),
                    licence=recipe.model.licence,
                    conversion=f"It is {name} as a GCL checkpoint, the base that a LoRA adapter was trained on.",
                )
    elif Path(base).exists():
        base = Path(base).absolute()
    return add_lora(model, recipe.peft, str(base))


def is_unchanged(arguments):
    """Whether a recipe's `model:` section means a GCL checkpoint as it is stored, and as AutoModel will find it, which
    loads the base of an adapter at its newest commit, whatever the adapter says."""
    if arguments.revision is not None:
        return False
    overrides = (arguments.fusion, arguments.text_pooling, arguments.logit_scale_init, arguments.max_logit_scale)
    if model_type_of(arguments.encoder) != GCLConfig.model_type or overrides != (None,) * 4:
        return False
    return not GCLConfig.from_pretrained(arguments.encoder).centring


def fusion_line(config):
    """The fusion rule and what it was chosen by, for the log."""
    if config.tower_norms is None:
        return f"fusion: {config.fusion}"
    lengths = ", ".join(f"{name} {length:.2f}" for name, length in config.tower_norms.items())
    return f"fusion: {config.fusion} (mean length of the towers' features at the start: {lengths})"


def build_trainer(recipe):
    """Model, data and trainer of a recipe; returns the trainer, the reports of the sources read, and what preprocesses
    the training images.

    Raises:
        ValueError, OSError: a model or data that cannot be used; the message says what to do.
    """
    arguments, data = recipe.training, recipe.data
    set_seed(arguments.seed)
    model, processor = build_model(recipe.model, data.max_text_length)
    preprocessing, how_preprocessed = choose_preprocessing(processor.image_processor)
    if recipe.peft is not None:
        model = build_lora(recipe, model, processor)
    if preprocessing is not None:  # pixels travel as uint8, a quarter of the bytes, and are normalised on the device
        model.register_forward_pre_hook(preprocessing.normalize_input, with_kwargs=True)
    train_dataset, train_reports = build_dataset(data, seed=arguments.seed, preprocessing=preprocessing)
    eval_pairs, eval_report = None, None
    if data.eval is not None:
        eval_pairs, eval_report = read_source(data.eval, max_broken_share=data.max_broken_share)
        for pair in eval_pairs:  # now, rather than after hours of training
            try:
                load_image(pair["image"])
            except ImageError as error:
                raise ImageError(f"{data.eval.path}, {pair['id']}: {error}. Repair or remove it") from error
    trainer = GCLTrainer(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_pairs,
        data_collator=PairCollator(processor, preprocessing, normalize=preprocessing is None),
        processing_class=processor,
        max_broken_share=data.max_broken_share,
    )
    return trainer, train_reports, eval_report, how_preprocessed


def main(argv):
    started = time.time()
    try:
        recipe = parse_recipe(argv)
        # Trainer would push each checkpoint: what is pushed here is the finished folder
        repo_id, recipe.training.push_to_hub = recipe.training.push_to_hub, None
        if repo_id is not None and recipe.training.process_index == 0:
            check_may_push(repo_id, recipe.training.hub_token)
        environment = collect_environment()  # now: the checkout may move on while this runs
        trainer, train_reports, eval_report, environment["training_images"] = build_trainer(recipe)
    except (ValueError, OSError, SafetensorError) as error:
        stop(error)
    arguments = recipe.training
    if trainer.is_world_process_zero():
        print(parameter_table(trainer.model))
        print(fusion_line(trainer.model.config))
        print(f"batch: {trainer.batch_plan.line()}")
        for report in train_reports:
            print(f"train: {report.line()}")
        print(f"train: images by {environment['training_images']}")
        if eval_report is not None:
            print(f"evaluate: {eval_report.line()}")
    folder = Path(arguments.output_dir) / "model"
    try:
        evaluated = trainer.eval_dataset is not None
        before = evaluate(trainer) if evaluated and arguments.eval_on_start else None
        # on_start is done: Trainer would evaluate a second time
        arguments.eval_on_start = False
        parameters = parameter_counts(trainer.model)  # now: merged adapters are gone
        trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
        memory = peak_memory(arguments.device)
        save(trainer, folder)  # before anything else can fail
        broken_images = trainer.gather_broken_images()
        after = evaluate(trainer) if evaluated else None
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        stop(error)
    if trainer.is_world_process_zero():
        results = write_results(
            folder, recipe, trainer, train_reports, eval_report, before, after, broken_images, environment, parameters,
            memory,
        )  # fmt: skip
        report_to_user(folder, results, time.time() - started)
        if repo_id is not None:
            push(folder, repo_id, arguments)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def save(trainer, folder):
    """The trained model onto disk. With LoRA its adapter too, and the merged model takes the trainer's place: what is
    measured next is what was saved."""
    model, processor = trainer.model, trainer.processing_class
    if not hasattr(model, "peft_config"):
        weights = trainer.accelerator.get_state_dict(model)  # on every rank: sharded ones are gathered
        if trainer.is_world_process_zero():
            shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)  # of an earlier run, on other weights
            save_model_folder(folder, model, processor, state_dict=weights)
        return
    # without the autocast of mixed precision around its forward, in which nothing is equal to 1e-5
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if trainer.is_world_process_zero():
        config = model.peft_config["default"]
        checksums = weight_checksums(config.base_model_name_or_path)
        trainer.model = save_with_adapter(folder, model, processor, checksums)
    else:
        trainer.model = model.merge_and_unload()


def evaluate(trainer):
    """The evaluation pairs' embeddings (for the pictures) and their nine-way result, whose headline is logged."""
    embeddings = trainer.embed_eval_pairs()
    result = evaluate_embeddings(embeddings, seed=trainer.args.eval_seed)
    trainer.log(headline_metrics(result))
    return embeddings, result


def write_results(
    folder, recipe, trainer, train_reports, eval_report, before, after, broken_images, environment, parameters, memory
):
    """Everything a saved folder holds beside model and processor; returns what `results.json` says."""
    arguments = recipe.training
    history = trainer.state.log_history
    if before is not None:  # train() began a new history
        history.insert(0, headline_metrics(before[1]) | {"epoch": 0, "step": 0})
    runtime = next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry)
    results = {
        "command": command_line(),
        "seed": arguments.seed,
        "recipe": recipe.settings,
        "environment": environment,
        "train_runtime": runtime,
        "peak_memory": memory,
        "parameters": parameters,
        "data": [asdict(report) for report in train_reports],
        "eval_data": eval_report and asdict(eval_report),
        "broken_images": broken_images,
        "before": before and before[1],
        "after": after and after[1],
        "log_history": history,
    }
    pictures = draw_pictures(Path(arguments.output_dir) / "pictures", history, before, after, trainer)
    facts = CardFacts(
        title=Path(arguments.output_dir).name,
        model_name=local_name(folder),
        base_model=shown_name(recipe.model.encoder),
        base_revision=getattr(trainer.model.config.encoder_config, "_commit_hash", None),
        base_model_ids=base_model_ids(recipe.model.encoder),
        loss=arguments.loss,
        licence=recipe.model.licence,
        command=results["command"],
        recipe=recipe.settings,
        training_arguments=card_arguments(arguments, recipe.peft),
        data=[data_source(*read, broken_images) for read in zip(recipe.data.train, train_reports)],
        environment=environment,
        train_runtime=runtime,
        trained_parameters=results["parameters"]["total"]["trained"],
        size=model_size(trainer.model, trainer.processing_class),
        languages=recipe.data.languages,
        matryoshka_dims=trainer.model.config.matryoshka_dims or [],
        seed=arguments.seed,
        eval_data=data_source(recipe.data.eval, eval_report) if eval_report else None,
        results_before=results["before"],
        results_after=results["after"],
    )
    write_hub_folder(folder, facts=facts, recipe_text=recipe.to_yaml(), results=results, pictures=pictures)
    return results


def card_arguments(arguments, peft):
    """The hyper-parameters of the card's table, LoRA's with their section's name."""
    settings = {name: getattr(arguments, name) for name in CARD_ARGUMENTS}
    settings |= {} if peft is None else {f"peft.{name}": value for name, value in asdict(peft).items()}
    # of transformers' enumerations the value
    return {name: getattr(value, "value", value) for name, value in settings.items() if value is not None}


def push(folder, repo_id, arguments):
    """The finished folder to the Hub. A failure names the command that tries again: nothing need be trained twice."""
    try:
        url = push_folder(
            folder,
            repo_id,
            private=bool(arguments.hub_private_repo),
            revision=arguments.hub_revision,
            token=arguments.hub_token,
        )
    except (ValueError, ConnectionError) as error:
        stop(ValueError(f"{error}. The model is in {folder}; when that is mended: gcl push {folder} {repo_id}"))
    print(f"\nPushed to {url}")


def draw_pictures(folder, history, before, after, trainer):
    """The pictures that the evaluation allows, by the name the card knows them by."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"training_curves": training_curves(history, folder / "training_curves.png")}
    if after is not None:
        # a run evaluated only after training shows that state alone
        (first_embeds, first), (last_embeds, last) = (after, (None, None)) if before is None else (before, after)
        pictures |= {
            "nine_way": nine_way_heatmap(first, last, folder / "nine_way.png"),
            "modality_pca": modality_pca(first_embeds, last_embeds, folder / "modality_pca.png"),
            "result_sheet": result_sheet(trainer.eval_dataset, first_embeds, last_embeds, folder / "result_sheet.png"),
        }
    return pictures


def data_source(source, report, broken_images=()):
    """What the card says of one source.

    `broken_images`: those that training met, of any source, each named "source, pair id: what is wrong"."""
    on_hub = report.split is not None
    return DataSource(
        source=shown_name(report.path),
        pairs=report.pairs,
        skipped=report.num_skipped + sum(name.startswith(f"{source.path}, ") for name in broken_images),
        name=source.name,
        revision=report.revision,
        licence=source.licence,
        on_hub=on_hub,
    )


def report_to_user(folder, results, seconds):
    """The end of a run on the terminal: figures, files, and what to type next."""
    first, last = results["before"], results["after"]
    if last is not None:
        print("\n" + (nine_way_table(last) if first is None else nine_way_table(first, last)))
    if results["broken_images"]:
        shown = "; ".join(results["broken_images"][:20])
        print(f"\nUnreadable images that were skipped, {len(results['broken_images'])}: {shown}")
    print(f"\n{seconds:.0f} s in all. Written to {folder}:")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"  {path.relative_to(folder)}")
    print("\nNext, measure it on images of your own (a folder with metadata.csv, or a .txt beside each image):")
    print(f"  gcl evaluate pairs {folder} YOUR_FOLDER")
    print("or fine-tune on them:")
    print("  accelerate launch train.py hub_configs/finetune.yaml --train YOUR_FOLDER --encoder " + str(folder))


if __name__ == "__main__":
    with failing_together():
        main(sys.argv[1:])
