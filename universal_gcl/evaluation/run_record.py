"""The record of a training run: how it was run, on which data, what it cost and what it changed.

Training fills a [`RunRecord`]; `results.json` and the model card are made from it. So training and publishing need not
know each other.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.checks import SourceReport


@dataclass(frozen=True)
class ReadSource:
    """One source of pairs: what the recipe says about it, and what was read from it."""

    arguments: SourceArguments
    report: SourceReport


@dataclass(kw_only=True)
class RunRecord:
    """
    Args:
        command: the command line, as it was typed.
        seed: the seed of the run.
        settings: `{section: {key: value}}`, what the recipe and the command line set.
        recipe_text: the same as YAML.
        hyperparameters: name → value of the settings that are worth a row in the card's table.
        environment: what `evaluation.environment.collect_environment` returned.
        output_dir: the folder that the run wrote to.

        encoder: the model that training started from, a Hub id or a folder.
        base_revision: commit of `encoder` on the Hub, if known.
        licence: the licence of the trained weights, as the Hub spells it.
        parameters: part → `{"parameters", "trained"}`, what `training.freezing.parameter_counts` returned.
        size: what `evaluation.model_size.model_size` returned.
        matryoshka_dims: dimensions that the embeddings were trained to be cut to, in falling order.
        loss: name of the loss.
        loss_description: the loss in a few words, as the card names it; "" if the loss has none.
        loss_citation: BibTeX entry of the loss, "" if it has none.

        train_data: the training sources.
        eval_data: the evaluation pairs; None if there are none.
        languages: ISO 639 codes of the captions' languages.
        broken_images: images that could not be read in training, each as "source, pair id: what is wrong".

        train_runtime: seconds of training, without evaluation and saving.
        peak_memory: bytes, the largest amount that training held at once.
        before, after: the nine-way results; None if they were not measured.
        log_history: the log entries of the run.
    """

    command: str
    seed: int
    settings: dict[str, Any]
    recipe_text: str
    hyperparameters: dict[str, Any]
    environment: dict[str, Any]
    output_dir: str

    encoder: str
    base_revision: str | None = None
    licence: str
    parameters: dict[str, dict[str, int]]
    size: dict[str, Any]
    matryoshka_dims: list[int] = field(default_factory=list)
    loss: str
    loss_description: str = ""
    loss_citation: str = ""

    train_data: list[ReadSource]
    eval_data: ReadSource | None = None
    languages: list[str] = field(default_factory=list)
    broken_images: list[str] = field(default_factory=list)

    train_runtime: float
    peak_memory: int
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)

    def results(self) -> dict[str, Any]:
        """The content of `results.json`."""
        return {
            "command": self.command,
            "seed": self.seed,
            "recipe": self.settings,
            "environment": self.environment,
            "train_runtime": self.train_runtime,
            "peak_memory": self.peak_memory,
            "parameters": self.parameters,
            "data": [asdict(source.report) for source in self.train_data],
            "eval_data": None if self.eval_data is None else asdict(self.eval_data.report),
            "broken_images": self.broken_images,
            "before": self.before,
            "after": self.after,
            "log_history": self.log_history,
        }
