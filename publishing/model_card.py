"""The model card: `README.md` of a saved folder, filled from the facts of the run that made it.

- Every figure comes from `CardFacts`; a fact that is missing is an error, never a gap in the text.
- The metadata (YAML head) goes through huggingface_hub's `ModelCardData` and is read back before it is written.
- The text is `hub_configs/model_card_template.md`.
"""

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, StrictUndefined

from evaluation.pairs import HEADLINE
from evaluation.report import nine_way_markdown

TEMPLATE = Path(__file__).resolve().parents[1] / "hub_configs" / "model_card_template.md"
TAGS = ["gcl", "multimodal-retrieval", "composed-image-retrieval", "image-text", "embeddings", "custom_code"]
PICTURES = {
    "nine_way": "Hit@10 of the nine directions, before and after",
    "modality_pca": "Image, text and fused embeddings in the plane of their first two principal components",
    "training_curves": "Loss and temperature during training",
    "result_sheet": "Searches of the trained model: a query and its first five candidates",
}
LOSSES = {
    "gcl": "Generalized Contrastive Learning (GCL, [arXiv 2509.25638](https://arxiv.org/abs/2509.25638))",
    "cl": "the symmetric image-text contrastive loss of CLIP (CL, a baseline of GCL)",
    "alignclip": "intra-modality separation (AlignCLIP, [arXiv 2406.17639](https://arxiv.org/abs/2406.17639), a "
    "baseline of GCL)",
}
NOTABLE_LOSS = 0.005  # half a point of hit@10


@dataclass
class DataSource:
    """Pairs from one place.

    Args:
        source: Hub id, or a description or relative path of local data.
        pairs: number of pairs used.
        skipped: number of pairs left out because their image was missing or broken.
        name, revision: configuration and commit of a Hub data set, or a local file's version or checksum.
        licence: of the data, if known.
        on_hub: whether `source` is a data set on the Hub.
    """

    source: str
    pairs: int
    skipped: int = 0
    name: str | None = None
    revision: str | None = None
    licence: str | None = None
    on_hub: bool = False


@dataclass
class CardFacts:
    """What a model card tells. Fields without a default are required, and none of them may be empty.

    Args:
        title: heading of the card, and the model's name in its metadata.
        model_name: Hub id (or folder) that the usage snippet loads.
        base_model: what training started from, in words or as a Hub id.
        loss: "gcl", "cl" or "alignclip".
        licence: of the weights, as the Hub spells it: "apache-2.0", "cc-by-sa-4.0", ..., "other".
        command: the exact command line.
        recipe: the recipe as run, overrides included (`model`, `data`, `training`).
        training_arguments: name → value of the hyper-parameters worth a table (learning rate, batch size, ...).
        data: training sources; dicts with `DataSource`'s fields are accepted.
        environment: what `evaluation.environment.collect_environment` returned.
        train_runtime: seconds.
        parameters: `{"total": int, "trainable": int}`.
        embedding_dim: D.
        seed: of the training run.
        matryoshka_dims: dimensions that embeddings were trained to be cut to, falling from D; empty: D alone.
        base_model_ids: Hub ids of the pretrained models inside, for the metadata.
        eval_data: the pairs evaluated on; given together with `results_after`, or neither.
        results_before, results_after: what `evaluation.pairs.evaluate_pairs` returned; the first is optional.
        pictures: name (see `PICTURES`) → path relative to the card's folder.
        licence_note: a sentence on what else binds the user, e.g. the training data's licence.
        languages: of the captions, ISO 639 codes.
    """

    title: str
    model_name: str
    base_model: str
    loss: str
    licence: str
    command: str
    recipe: dict
    training_arguments: dict
    data: list
    environment: dict
    train_runtime: float
    parameters: dict
    embedding_dim: int
    seed: int
    base_model_ids: list[str] = field(default_factory=list)
    matryoshka_dims: list[int] = field(default_factory=list)
    eval_data: DataSource | dict | None = None
    results_before: dict | None = None
    results_after: dict | None = None
    pictures: dict[str, str] = field(default_factory=dict)
    licence_note: str = ""
    languages: list[str] = field(default_factory=lambda: ["en"])

    def __post_init__(self):
        self.data = [DataSource(**source) if isinstance(source, dict) else source for source in self.data or []]
        if isinstance(self.eval_data, dict):
            self.eval_data = DataSource(**self.eval_data)


def write_model_card(folder: str | Path, facts: CardFacts) -> Path:
    """Writes `README.md` into `folder`, replacing the one that is there.

    Returns:
        Path of the card.

    Raises:
        ValueError: a fact is missing, inconsistent, or not what the Hub takes; the message names it.
        FileNotFoundError: a picture is not in the folder.
    """
    folder = Path(folder)
    check_facts(facts)
    for name, path in facts.pictures.items():
        if not (folder / path).is_file():
            raise FileNotFoundError(f"CardFacts.pictures[{name!r}] is {path!r}, which {folder} does not hold.")
    metadata = card_metadata(facts)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{render(facts)}")
    if card.data.to_dict() != metadata.to_dict():
        raise ValueError(
            f"the card's metadata does not survive YAML: {metadata.to_dict()} became {card.data.to_dict()}"
        )
    path = folder / "README.md"
    partial = folder / "README.md.partial"
    card.save(partial)
    os.replace(partial, path)
    return path


def check_facts(facts: CardFacts) -> None:
    """Raises ValueError where a fact is missing or does not go with another."""
    optional = {"base_model_ids", "eval_data", "results_before", "results_after", "pictures", "licence_note"}
    optional |= {"matryoshka_dims"}
    for each in fields(facts):
        value = getattr(facts, each.name)
        if each.name not in optional and (value is None or value in ("", [], {})):
            raise ValueError(f"the model card needs CardFacts.{each.name}, which is {value!r}")
    if facts.loss not in LOSSES:
        raise ValueError(f"CardFacts.loss is {facts.loss!r}: the model card knows {', '.join(LOSSES)}")
    for key in ("total", "trainable"):
        if key not in facts.parameters:
            raise ValueError(f"the model card needs CardFacts.parameters[{key!r}]")
    for key in ("python", "packages", "platform", "cpu", "gpus", "image_backend", "git"):
        if key not in facts.environment:
            raise ValueError(f"the model card needs CardFacts.environment[{key!r}]: see collect_environment()")
    for repo_id in [*facts.base_model_ids, *(source.source for source in facts.data if source.on_hub)]:
        check_hub_id(repo_id)
    if (facts.eval_data is None) != (facts.results_after is None):
        raise ValueError("the model card needs CardFacts.eval_data and results_after together, or neither")
    if facts.results_before is not None and facts.results_after is None:
        raise ValueError("the model card needs CardFacts.results_after beside results_before")


def check_hub_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no id on the Hub, though the card's facts say so: {error}") from error


def card_metadata(facts: CardFacts) -> ModelCardData:
    """The card's YAML head. Hit rates in percent."""
    return ModelCardData(
        language=facts.languages,
        license=facts.licence,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=TAGS,
        base_model=facts.base_model_ids or None,
        datasets=[source.source for source in facts.data if source.on_hub] or None,
        model_name=facts.title if facts.results_after else None,
        eval_results=eval_results(facts) if facts.results_after else None,
    )


def eval_results(facts: CardFacts) -> list[EvalResult]:
    """hit@10 of the headline and of its directions in both pools, and nDCG@10 of mixed search, as a model index."""
    results = facts.results_after
    figures = [("hit_rate_at_10", "headline hit@10, mean of both pools", results["headline"]["mean"])]
    for pool in ("local", "global"):
        figures.append(("hit_rate_at_10", f"headline hit@10, {pool} pool", results["headline"][pool]))
        for direction in HEADLINE:
            hits = results["nine_way"][direction]
            if hits["headline"]:
                figures.append(("hit_rate_at_10", f"hit@10 {direction}, {pool} pool", hits[pool]["hit@10"]))
    if results["mixed"]["ndcg@10"] is not None:
        figures.append(("ndcg_at_10", "nDCG@10, mixed-modality search", results["mixed"]["ndcg@10"]))
    data = facts.eval_data
    return [
        EvalResult(
            task_type="retrieval",
            task_name="universal multimodal retrieval, nine-way on pairs",
            dataset_type=data.source if data.on_hub else slug(data.name or data.source),
            dataset_name=data.name or data.source,
            dataset_revision=data.revision,
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=round(100 * value, 1),
        )
        for metric_type, metric_name, value in figures
    ]


def render(facts: CardFacts) -> str:
    """The card's text, without its YAML head."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"cell": cell, "duration": duration, "thousands": lambda number: f"{number:,}"}
    results = {"before": facts.results_before, "after": facts.results_after}
    results = {name: result for name, result in results.items() if result is not None}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        loss=LOSSES[facts.loss],
        recipe_yaml=yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True).strip(),
        pictures=[(PICTURES.get(name, name.replace("_", " ")), path) for name, path in facts.pictures.items()],
        total_pairs=sum(source.pairs for source in facts.data),
        table=nine_way_markdown(results) if results else "",
        top10_columns=list(results),
        top10_rows=top10_rows(list(results.values())),
        losses=losses(facts.results_before, facts.results_after) if facts.results_before else [],
    )
    if "more information needed" in text.casefold():
        raise ValueError("the model card's text says 'More information needed': fill the fact it stands for")
    return text


def top10_rows(results: list[dict]) -> list[tuple[str, ...]]:
    """(modality, its share in each result) of the first ten places in the global pool, in percent."""
    shares = [result["gap"]["top10_share"] for result in results]
    return [(name, *(f"{100 * share[name]:.1f}" for share in shares)) for name in (shares[0] if shares else ())]


def losses(before: dict, after: dict) -> list[str]:
    """Directions whose hit@10 fell by half a point or more, as "t→i in the local pool: 52.7 → 49.1"."""
    found = []
    for direction, old in before["nine_way"].items():
        for pool in ("local", "global"):
            if old[pool] is None:
                continue
            was, now = old[pool]["hit@10"], after["nine_way"][direction][pool]["hit@10"]
            if was - now >= NOTABLE_LOSS:
                found.append(f"{direction} in the {pool} pool: {100 * was:.1f} → {100 * now:.1f}")
    return found


def cell(value) -> str:
    """A value as the text of a markdown table's cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def duration(seconds: float) -> str:
    """3725 → "1 h 2 min 5 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-")
