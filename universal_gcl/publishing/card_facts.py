"""The facts that a model card states: the training or conversion that made a model."""

from dataclasses import dataclass, field, fields

from huggingface_hub.utils import HFValidationError, validate_repo_id

# for folders whose card.json was written before it held the description of the loss
KNOWN_LOSSES = {
    "gcl": "Generalized Contrastive Learning (GCL, [arXiv 2509.25638](https://arxiv.org/abs/2509.25638))",
    "cl": "the symmetric image-text contrastive loss of CLIP (CL, a baseline of GCL)",
    "alignclip": "intra-modality separation (AlignCLIP, [arXiv 2406.17639](https://arxiv.org/abs/2406.17639), a "
    "baseline of GCL)",
}
_ALWAYS = ("title", "model_name", "base_model", "command", "environment", "size")
_OF_TRAINING = (
    "licence",
    "loss",
    "recipe",
    "training_arguments",
    "data",
    "train_runtime",
    "trained_parameters",
    "seed",
)


@dataclass
class DataSource:
    """One source of pairs.

    Args:
        source: Hub id, or a description or relative path of local data.
        pairs: number of pairs that were used.
        skipped: number of pairs that were left out because their image was missing or broken.
        name: configuration of a Hub data set.
        revision: commit of a Hub data set, or version or checksum of a local file.
        licence: the licence of the data, if known.
        on_hub: whether `source` is a data set on the Hub.
    """

    source: str
    pairs: int
    skipped: int = 0
    name: str | None = None
    revision: str | None = None
    licence: str | None = None
    on_hub: bool = False


@dataclass(kw_only=True)
class CardFacts:
    """The facts about a model that was trained or, with `conversion`, converted without training.

    Args:
        title: heading of the card, and the model's name in its metadata.
        model_name: the Hub id or folder that the usage snippets load.
        on_hub: whether `model_name` is a Hub id.
        base_model: the start of training or conversion, in words or as a Hub id.
        base_revision: commit of the base model, if it is on the Hub.
        base_model_ids: Hub ids of the pretrained models inside, for the metadata.
        command: the exact command line.
        environment: what `evaluation.environment.collect_environment` returned.
        size: what `evaluation.model_size.model_size` returned.
        matryoshka_dims: dimensions that embeddings were trained to be cut to, in falling order; empty if none.
        licence: the licence of the weights, as the Hub spells it: "apache-2.0", "cc-by-sa-4.0", ..., "other". Only a
            conversion may have None: then the original's licence holds.
        licence_note: a sentence on other terms that bind the user, e.g. the licence of the training data.
        languages: ISO 639 codes of the captions' languages; empty if not known.
        pictures: name (see `model_card.PICTURES`) → path relative to the card's folder.

        conversion: for a conversion, what was done, in a sentence or two. The fields below it, except `benchmarks`,
            belong to a training and stay empty then.
        loss: name of the loss, as in the recipe.
        loss_description: the loss in a few words, for the first paragraph; by default that of `KNOWN_LOSSES`.
        loss_citation: BibTeX entry of the loss, shown after GCL's; "" if there is none.
        recipe: the recipe as run, with its overrides (`model`, `data`, `training`).
        training_arguments: name → value of the hyper-parameters for the table (learning rate, batch size, ...).
        data: training sources; dicts with the fields of `DataSource` are accepted.
        train_runtime: seconds of training.
        trained_parameters: number of trained parameters.
        seed: the seed of the training run.
        eval_data: the evaluation pairs. Give it together with `results_after`, or give neither.
        results_before, results_after: what `evaluation.pairs.measure.evaluate_pairs` returned; the first is optional.
        adapter_base: the model that the LoRA adapter in `adapter/` was trained on, Hub id or folder; None without one.
        benchmarks: benchmark runs of this model, as `publishing.benchmarks.read_benchmark` returns them.
    """

    title: str
    model_name: str
    on_hub: bool = False
    base_model: str
    base_revision: str | None = None
    base_model_ids: list[str] = field(default_factory=list)
    command: str
    environment: dict
    size: dict
    matryoshka_dims: list[int] = field(default_factory=list)
    licence: str | None
    licence_note: str = ""
    languages: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    conversion: str = ""
    loss: str | None = None
    loss_description: str = ""
    loss_citation: str = ""
    recipe: dict | None = None
    training_arguments: dict | None = None
    data: list = field(default_factory=list)
    train_runtime: float | None = None
    trained_parameters: int | None = None
    seed: int | None = None
    eval_data: DataSource | dict | None = None
    results_before: dict | None = None
    results_after: dict | None = None
    adapter_base: str | None = None
    benchmarks: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data = [DataSource(**source) if isinstance(source, dict) else source for source in self.data or []]
        if isinstance(self.eval_data, dict):
            self.eval_data = DataSource(**self.eval_data)
        self.loss_description = self.loss_description or KNOWN_LOSSES.get(self.loss or "", "")


def check_facts(facts: CardFacts) -> None:
    """Raise ValueError if a fact is missing or contradicts another."""
    for name in (*_ALWAYS, *(() if facts.conversion else _OF_TRAINING)):
        value = getattr(facts, name)
        if value is None or value in ("", [], {}):
            raise ValueError(f"the model card needs CardFacts.{name}, which is {value!r}")
    if facts.conversion:
        for each in fields(facts):
            if each.name in _OF_TRAINING[1:] and getattr(facts, each.name) not in (None, []):
                raise ValueError(
                    f"CardFacts.{each.name} belongs to a training, but these are the facts of a conversion"
                )
    elif not facts.loss_description:
        raise ValueError(
            f"the model card needs CardFacts.loss_description for the loss {facts.loss!r}: it has its own only for "
            f"{', '.join(KNOWN_LOSSES)}"
        )
    for key in ("n_parameters", "n_embedding_parameters", "memory_usage_mb", "max_tokens", "embed_dim"):
        if key not in facts.size:
            raise ValueError(f"the model card needs CardFacts.size[{key!r}]: see model_size()")
    for key in ("date", "python", "packages", "platform", "cpu", "gpus", "image_backend", "git"):
        if key not in facts.environment:
            raise ValueError(f"the model card needs CardFacts.environment[{key!r}]: see collect_environment()")
    for repo_id in [*facts.base_model_ids, *(source.source for source in facts.data if source.on_hub)]:
        check_hub_id(repo_id)
    if facts.on_hub:
        check_hub_id(facts.model_name)
    if (facts.eval_data is None) != (facts.results_after is None):
        raise ValueError("the model card needs CardFacts.eval_data and results_after together, or neither")
    if facts.results_before is not None and facts.results_after is None:
        raise ValueError("the model card needs CardFacts.results_after if it has results_before")


def check_hub_id(repo_id: str) -> None:
    """Raise ValueError if the Hub would not accept this id."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no id on the Hub: {error}") from error
