import hashlib

import numpy as np
import pytest

from universal_gcl.evaluation.pairs.embeddings import PairEmbeddings


class HashModel:
    """Embeds a row by what it holds: the same content gives the same vector, other content an unrelated one, except
    that what belongs to one pair (captions `"<pair> …"`, image `b"<pair>"`) leans to one side."""

    def __init__(self, width=16, lean=1.0):
        self.width, self.lean, self.calls = width, lean, []

    def encode(self, rows, processor=None, batch_size=64, show_progress=False):
        self.calls.append(len(rows))
        return np.stack([self.vector(row.get("image"), row.get("text")) for row in rows])

    def vector(self, image, text):
        pair = text.split()[0] if text else image.decode()
        vector = self.noise(repr((image, text))) + self.lean * self.noise(f"pair {pair}")
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    def noise(self, name):
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return np.random.default_rng(seed).normal(size=self.width)


@pytest.fixture
def hash_model():
    return HashModel()


@pytest.fixture
def make_pairs():
    def make(counts):
        return [
            {"id": f"p{j}", "image": str(j).encode(), "captions": [f"{j} caption {c}" for c in range(count)]}
            for j, count in enumerate(counts)
        ]

    return make


@pytest.fixture
def make_embeddings():
    def make(num_pairs=40, width=32, gap=0.0, noise=1.0, texts=3, seed=0):
        """Pairs with 2 + `texts` captions; `gap` shifts the modalities apart, `noise` blurs the pairs."""
        rng = np.random.default_rng(seed)
        content = rng.normal(size=(num_pairs, width))
        shifts = dict(zip(("i", "t", "it"), gap * rng.normal(size=(3, width)), strict=True))

        def embed(name, times=1):
            rows = np.repeat(content, times, axis=0)
            rows = rows + noise * rng.normal(size=rows.shape) + shifts[name]
            return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

        images, everyone = embed("i"), np.arange(num_pairs)
        return PairEmbeddings(
            ids=[f"p{j}" for j in range(num_pairs)],
            caption_counts={2 + texts: num_pairs},
            queries={"i": images, "t": embed("t"), "it": embed("it")},
            candidates={"i": images, "t": embed("t", texts), "it": embed("it")},
            owners={"i": everyone, "t": np.repeat(everyone, texts), "it": everyone},
        )

    return make
