"""Fixtures of the converters."""

import pytest

from tests.support.open_clip_states import clip_like_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with CLIP's kind of tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    clip_like_tokenizer().save_pretrained(folder)
    return folder
