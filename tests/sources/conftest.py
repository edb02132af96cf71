"""Fixtures of the sources."""

import datasets
import pytest
from PIL import Image

from tests.support.photo_sources import COLOURS


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name, colour in COLOURS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(folder / name)
    return folder
