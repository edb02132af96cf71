"""Processes of pytest that run side by side share no cache: see tests/support/caches.py."""

from pathlib import Path

import datasets
import huggingface_hub
from transformers.utils import hub

from tests.support.caches import FOLDER


def test_the_libraries_keep_their_caches_in_the_folder_of_this_process():
    """They read HF_HOME when they are imported: the folder must be set before."""
    caches = (huggingface_hub.constants.HF_HOME, hub.HF_MODULES_CACHE, datasets.config.HF_DATASETS_CACHE)
    assert all(Path(cache).is_relative_to(FOLDER.name) for cache in caches), caches
