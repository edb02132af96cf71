"""The fields of mteb's `ModelMeta`, as lines of Python that a user can paste into mteb."""

from typing import Any

from universal_gcl.publishing.card_facts import CardFacts

# the names of licences that both the Hub and mteb know; mteb refuses others
LICENCES = {
    "mit", "apache-2.0", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "mpl-2.0", "afl-3.0", "openrail", "gemma", "odc-by",
    "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0",
}  # fmt: skip


def mteb_fields(facts: CardFacts) -> list[tuple[str, str]]:
    """The name of each field and its value as Python source, None if it is not known. Some values have a comment.

    sentence-transformers loads the model. mteb passes it image, text or both, according to the field `modalities`.
    """
    size = facts.size
    sources = [source.source for source in facts.data if source.on_hub]
    public_data = None
    if sources and len(sources) == len(facts.data):
        public_data = True if len(sources) > 1 else f"https://huggingface.co/datasets/{sources[0]}"
    values = {
        "name": facts.model_name,
        "revision": None,
        "release_date": facts.environment["date"],
        "languages": ["eng-Latn"] if facts.languages == ["en"] else None,
        "n_parameters": size["n_parameters"],
        "n_embedding_parameters": size["n_embedding_parameters"],
        "memory_usage_mb": round(size["memory_usage_mb"], 1),
        "max_tokens": size["max_tokens"],
        "embed_dim": facts.matryoshka_dims if len(facts.matryoshka_dims) > 1 else size["embed_dim"],
        "license": facts.licence if facts.licence in LICENCES else None,
        "open_weights": True,
        "public_training_code": None,
        "public_training_data": public_data,
        "framework": ["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
        "similarity_fn_name": "cosine",
        "use_instructions": False,
        "training_datasets": None,
        "adapted_from": facts.base_model_ids[0] if len(facts.base_model_ids) == 1 else None,
        "modalities": ["text", "image"],
    }
    if facts.on_hub:
        values["reference"] = f"https://huggingface.co/{facts.model_name}"
    comments = {
        "revision": "the commit that you evaluate",
        "training_datasets": "mteb's names for all data that the base model and this one were trained on: not known",
    }
    comments = {name: f"  # {comment}" for name, comment in comments.items() if values[name] is None}
    return [(name, f"{source(value)},{comments.get(name, '')}") for name, value in values.items()]


def source(value: Any) -> str:
    """A value as Python source, with double quotes as ruff writes them."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(source, value))}]"
    return f"{value:_}" if type(value) is int else repr(value)
