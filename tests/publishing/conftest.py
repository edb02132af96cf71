"""The facts of a small made-up run, with results that the real evaluation computed from random embeddings."""

import numpy as np
import pytest

from universal_gcl.evaluation.environment import collect_environment
from universal_gcl.evaluation.pairs.embeddings import MODALITIES, PairEmbeddings
from universal_gcl.evaluation.pairs.measure import evaluate_embeddings
from universal_gcl.publishing.card_facts import CardFacts, DataSource


def evaluate_random(noise, captions=4, seed=0, pairs=60):
    """Queries are noisy copies of the candidates: more noise, lower rates."""
    generator = np.random.default_rng(seed)
    places = np.arange(pairs)

    def unit(matrix):
        return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)

    base = unit(generator.normal(size=(pairs, 16)))
    return evaluate_embeddings(
        PairEmbeddings(
            ids=[f"pair{place}" for place in places],
            caption_counts={captions: pairs},
            queries={name: unit(base + noise * generator.normal(size=base.shape)) for name in MODALITIES},
            candidates={name: unit(base + 0.1 * generator.normal(size=base.shape)) for name in MODALITIES},
            owners=dict.fromkeys(MODALITIES, places),
        )
    )


@pytest.fixture(name="evaluate_random")
def evaluate_random_fixture():
    return evaluate_random


@pytest.fixture
def facts():
    return CardFacts(
        title="gcl-small",
        model_name="someone/gcl-small",
        base_model="two towers, MiniLM and EfficientNet",
        base_model_ids=["sentence-transformers/all-MiniLM-L6-v2"],
        loss="gcl",
        licence="apache-2.0",
        licence_note="The pairs are CC BY-SA 4.0.",
        command="accelerate launch train.py hub_configs/quickstart.yaml --learning_rate 1e-4",
        recipe={"model": {"encoder": "towers"}, "training": {"learning_rate": 1e-4, "loss": "gcl"}},
        training_arguments={"learning_rate": 1e-4, "batch size": "64 × 2 | all"},
        data=[
            {"source": "nlphuji/flickr30k", "pairs": 29000, "skipped": 3, "revision": "abc123", "on_hub": True},
            DataSource(source="quickstart/openmoji_train.parquet", pairs=1990, licence="CC BY-SA 4.0"),
        ],
        eval_data=DataSource(source="quickstart/openmoji_test.parquet", name="OpenMoji, test", pairs=60),
        environment=collect_environment(),
        train_runtime=3725.4,
        trained_parameters=1234,
        size={
            "n_parameters": 27146749,
            "n_embedding_parameters": 11720448,
            "memory_usage_mb": 103.56,
            "max_tokens": 32,
            "embed_dim": 256,
        },
        languages=["en"],
        seed=7,
        results_before=evaluate_random(noise=1.5),
        results_after=evaluate_random(noise=0.5),
    )
