"""The model card: the text of `README.md`, filled in from the facts of the run that made the model.

- Every figure comes from `CardFacts`. A missing fact is an error, never a gap in the text.
- The metadata (the YAML head) is written by huggingface_hub's `ModelCardData` and read back before it is used.
- The template is `hub_configs/model_card_template.md`.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from universal_gcl.evaluation.pairs.measure import HEADLINE
from universal_gcl.evaluation.pairs.report import nine_way_markdown
from universal_gcl.publishing.benchmarks import benchmark_markdown, benchmark_title, model_index, slug
from universal_gcl.publishing.card_facts import CardFacts, DataSource, check_facts
from universal_gcl.publishing.mteb_meta import mteb_fields

TEMPLATE = resources.files("universal_gcl.hub_configs") / "model_card_template.md"
TAGS = [
    "gcl", "multimodal-retrieval", "composed-image-retrieval", "image-text", "embeddings", "sentence-transformers",
    "custom_code",
]  # fmt: skip
PICTURES = {
    "nine_way": "Hit@10 of the nine directions, before and after",
    "modality_pca": "The modality gap: image, text and fused embeddings in the plane of their first two principal "
    "components, and the means of the three",
    "training_curves": "Loss and temperature during training",
    "result_sheet": "Searches of the trained model: a query and its first five candidates",
}
NOTABLE_LOSS = 0.005  # half a point of hit@10


def card_text(facts: CardFacts) -> str:
    """
    The whole text of `README.md`.

    Raises:
        ValueError: a fact is missing, contradicts another, or the Hub would refuse it; the message names the fact.
    """
    check_facts(facts)
    metadata = card_metadata(facts)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{render(facts)}")
    if card.data.to_dict() != metadata.to_dict():
        raise ValueError(
            f"the card's metadata changes when it is written as YAML: {metadata.to_dict()} became {card.data.to_dict()}"
        )
    return str(card)


def card_metadata(facts: CardFacts) -> ModelCardData:
    """The YAML head of the card. Rates are in percent."""
    results = eval_results(facts) + model_index(facts.benchmarks)
    is_finetune = not facts.conversion and bool(facts.base_model_ids)
    return ModelCardData(
        language=facts.languages or None,
        license=facts.licence,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=[*TAGS, *(["peft", "lora"] if facts.adapter_base else [])],
        base_model=facts.base_model_ids or None,
        datasets=[source.source for source in facts.data if source.on_hub] or None,
        model_name=facts.title if results else None,
        eval_results=results or None,
        base_model_relation="finetune" if is_finetune else None,
    )


def eval_results(facts: CardFacts) -> list[EvalResult]:
    """The model index: hit@10 of the headline and its directions in both pools, and nDCG@10 of mixed search.

    Empty if the model was not evaluated.
    """
    results, data = facts.results_after, facts.eval_data
    if results is None or not isinstance(data, DataSource):
        return []
    figures = [("hit_rate_at_10", "headline hit@10, mean of both pools", results["headline"]["mean"])]
    for pool in ("local", "global"):
        figures.append(("hit_rate_at_10", f"headline hit@10, {pool} pool", results["headline"][pool]))
        for direction in HEADLINE:
            hits = results["nine_way"][direction]
            if hits["headline"]:
                figures.append(("hit_rate_at_10", f"hit@10 {direction}, {pool} pool", hits[pool]["hit@10"]))
    if results["mixed"]["ndcg@10"] is not None:
        figures.append(("ndcg_at_10", "nDCG@10, mixed-modality search", results["mixed"]["ndcg@10"]))
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
    """The text of the card without its YAML head."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"cell": cell, "duration": duration, "thousands": lambda number: f"{number:,}"}
    before, after = facts.results_before, facts.results_after
    results = {name: result for name, result in {"before": before, "after": after}.items() if result is not None}
    pictures = [name for name in dict.fromkeys((*PICTURES, *facts.pictures)) if name in facts.pictures]
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        recipe_yaml=yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True).strip(),
        pictures=[(PICTURES.get(name, name.replace("_", " ")), facts.pictures[name]) for name in pictures],
        total_pairs=sum(source.pairs for source in facts.data),
        table=nine_way_markdown(results) if results else "",
        top10_columns=list(results),
        top10_rows=top10_rows(list(results.values())),
        losses=losses(before, after) if before and after else [],
        benchmarks=[(benchmark_title(run), benchmark_markdown(run)) for run in facts.benchmarks],
        mteb_fields=mteb_fields(facts),
        # others can't load an adapter whose base is a folder of this machine
        adapter=facts.adapter_base is not None and not (facts.on_hub and Path(facts.adapter_base).is_absolute()),
    )
    if "more information needed" in text.casefold():
        raise ValueError("the model card's text says 'More information needed': fill in the fact that is missing there")
    return text


def top10_rows(results: list[dict]) -> list[tuple[str, ...]]:
    """For each modality, its name and its share of the first ten places in the global pool, in percent, per result."""
    shares = [result["gap"]["top10_share"] for result in results]
    return [(name, *(f"{100 * share[name]:.1f}" for share in shares)) for name in (shares[0] if shares else ())]


def losses(before: dict, after: dict) -> list[str]:
    """The directions whose hit@10 fell by half a point or more, as in "t→i in the local pool: 52.7 → 49.1"."""
    found = []
    for direction, old in before["nine_way"].items():
        for pool in ("local", "global"):
            if old[pool] is None:
                continue
            was, now = old[pool]["hit@10"], after["nine_way"][direction][pool]["hit@10"]
            if was - now >= NOTABLE_LOSS:
                found.append(f"{direction} in the {pool} pool: {100 * was:.1f} → {100 * now:.1f}")
    return found


def cell(value: Any) -> str:
    """A value as the text of a cell in a markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def duration(seconds: float) -> str:
    """3725 → "1 h 2 min 5 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"
