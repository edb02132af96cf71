"""One training run: what is printed at its start, evaluation before and after, training, and the record of it all."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any, cast

from modeling_gcl import GCLModel, GCLProcessor
from universal_gcl.evaluation.model_size import model_size
from universal_gcl.evaluation.pairs.measure import evaluate_embeddings
from universal_gcl.evaluation.pairs.pictures import Evaluated
from universal_gcl.evaluation.pairs.report import headline_metrics
from universal_gcl.evaluation.run_record import ReadSource, RunRecord
from universal_gcl.training.freezing import parameter_counts, parameter_table
from universal_gcl.training.memory import peak_memory
from universal_gcl.training.recipe import Recipe
from universal_gcl.training.trainer import GCLTrainer

HYPERPARAMETERS = (  # those with a row in the card's table, after the loss and its settings
    "matryoshka_dims", "matryoshka_weights", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "world_size", "gradient_accumulation_steps", "grad_cache_chunk", "effective_batch_size",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "fp16",
)  # fmt: skip


class TrainingRun:
    """
    A run that is ready to start: `train` it, then ask for its `record`.

    Args:
        recipe: the parsed recipe.
        trainer: the trainer, which has the model and the data.
        train_data: the training sources and what was read from them.
        eval_data: the source of the evaluation pairs and what was read from it; None if there are no evaluation pairs.
        training_images: what preprocesses the training images, in words.

    Attributes:
        before, after: the evaluations, once `train` has made them.
    """

    def __init__(
        self,
        recipe: Recipe,
        trainer: GCLTrainer,
        train_data: list[ReadSource],
        eval_data: ReadSource | None,
        training_images: str,
    ):
        self.recipe = recipe
        self.trainer = trainer
        self.train_data = train_data
        self.eval_data = eval_data
        self.training_images = training_images
        self.before: Evaluated | None = None
        self.after: Evaluated | None = None
        self._parameters: dict[str, dict[str, int]] = {}
        self._peak_memory = 0
        self._broken_images: list[str] = []

    @property
    def model(self) -> GCLModel:
        """The present model. With LoRA it is a `peft.PeftModel`, which has the same attributes, until it is saved."""
        return cast(GCLModel, self.trainer.model)

    @property
    def processor(self) -> GCLProcessor:
        """The model's processor."""
        return cast(GCLProcessor, self.trainer.processing_class)

    @property
    def eval_pairs(self) -> Sequence[dict] | None:
        """The evaluation pairs; None if there are none."""
        return cast("Sequence[dict] | None", self.trainer.eval_dataset)

    def opening(self) -> str:
        """What is printed before training: parts of the model, fusion rule, batch, data."""
        config = self.model.config
        fusion = f"fusion: {config.fusion}"
        if config.tower_norms is not None:
            norms = ", ".join(f"{name} {norm:.2f}" for name, norm in config.tower_norms.items())
            fusion += f" (feature norms of the towers at the start: {norms})"
        lines = [parameter_table(self.model), fusion, f"batch: {self.trainer.batch_plan.line()}"]
        lines += [f"train: {source.report.line()}" for source in self.train_data]
        lines.append(f"train: images by {self.training_images}")
        lines += [f"evaluate: {self.eval_data.report.line()}"] if self.eval_data is not None else []
        return "\n".join(lines)

    def train(self, save: Callable[[], GCLModel]) -> None:
        """
        Evaluate, train, save and evaluate again.

        Args:
            save: writes the trained model to disk and returns the model that it saved (with LoRA, the merged one).
                Every process calls it right after training, before anything else can fail.

        Raises:
            ValueError, OSError, FloatingPointError, MemoryError: see `GCLTrainer`.
        """
        trainer, arguments = self.trainer, self.recipe.training
        evaluates = self.eval_pairs is not None
        self.before = self._evaluate() if evaluates and arguments.eval_on_start else None
        arguments.eval_on_start = False  # done: Trainer would evaluate a second time
        self._parameters = parameter_counts(self.model)  # counted now: merging removes the adapters
        trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
        self._peak_memory = peak_memory(arguments.device)
        trainer.model = save()  # what is evaluated next is what was saved
        self._broken_images = trainer.gather_broken_images()
        self.after = self._evaluate() if evaluates else None

    def record(self, command: str, environment: dict[str, Any]) -> RunRecord:
        """The record of the run. Call it after `train`, on the first process.

        Args:
            command: the command line, as it was typed.
            environment: what `collect_environment` returned at the start.
        """
        recipe = self.recipe
        arguments, config = recipe.training, self.model.config
        history = self.trainer.state.log_history
        if self.before is not None:  # train() began a new history
            history.insert(0, headline_metrics(self.before.result) | {"epoch": 0, "step": 0})
        return RunRecord(
            command=command,
            seed=arguments.seed,
            settings=recipe.settings,
            recipe_text=recipe.to_yaml(),
            hyperparameters=hyperparameters(recipe),
            environment=environment | {"training_images": self.training_images},
            output_dir=str(arguments.output_dir),
            encoder=recipe.model.encoder,
            base_revision=getattr(config.encoder_config, "_commit_hash", None),
            licence=recipe.model.licence,
            parameters=self._parameters,
            size=model_size(self.model, self.processor),
            matryoshka_dims=config.matryoshka_dims or [],
            loss=arguments.loss,
            loss_description=getattr(self.trainer.loss, "description", ""),
            loss_citation=getattr(self.trainer.loss, "citation", ""),
            train_data=self.train_data,
            eval_data=self.eval_data,
            languages=recipe.data.languages,
            broken_images=self._broken_images,
            train_runtime=next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry),
            peak_memory=self._peak_memory,
            before=None if self.before is None else self.before.result,
            after=None if self.after is None else self.after.result,
            log_history=history,
        )

    def _evaluate(self) -> Evaluated:
        """The nine-way evaluation; its headline is logged."""
        embeddings = self.trainer.embed_eval_pairs()
        result = evaluate_embeddings(embeddings, seed=self.recipe.training.eval_seed)
        self.trainer.log(headline_metrics(result))
        return Evaluated(embeddings, result)


def hyperparameters(recipe: Recipe) -> dict[str, Any]:
    """Name → value of the hyper-parameters that are set. The names of LoRA's begin with the name of their section."""
    own = [entry.name for entry in fields(recipe.training.make_loss())]
    settings = {name: getattr(recipe.training, name) for name in ("loss", *own, *HYPERPARAMETERS)}
    del settings["num_train_epochs" if settings["max_steps"] > 0 else "max_steps"]  # the one that wasn't used
    if recipe.peft is not None:
        settings |= {f"peft.{name}": value for name, value in asdict(recipe.peft).items()}
    # an enumeration of transformers is written as its value
    return {name: getattr(value, "value", value) for name, value in settings.items() if value is not None}
