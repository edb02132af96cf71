"""Chunks of a micro-batch: every pair once, texts sorted and trimmed, nothing changed for the model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_gcl import GCLModel
from tests.support.backbones import random_image, tiny_encoder, tiny_processor
from universal_gcl.training.chunks import split_batch, widen_texts

TEXTS = ["a red dog", "a cat", "the blue bird flies in the sky", "grass", "a dog sits on green grass", "two"]


def batch_of(name, **kwargs):
    images = [random_image(j) for j in range(len(TEXTS))]
    return dict(tiny_processor(name)(images=images, text=TEXTS, return_tensors="pt", **kwargs))


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 25))
def test_every_pair_comes_once_and_no_token_is_lost(lengths, size):
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": torch.arange(9) * mask, "attention_mask": mask, "pixel_values": torch.rand(len(lengths), 2)}
    labels = {"ids": torch.arange(len(lengths))}
    chunks = split_batch(inputs, labels, size)
    assert len(chunks) == -(-len(lengths) // size)
    sizes = [len(chunk.labels["ids"]) for chunk in chunks]
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
    assert sorted(torch.cat([chunk.labels["ids"] for chunk in chunks]).tolist()) == list(range(len(lengths)))
    longest = 0
    for chunk in chunks:
        own, given_ = chunk.inputs(), chunk.labels["ids"]
        assert torch.equal(own["pixel_values"], inputs["pixel_values"][given_])
        width = own["input_ids"].shape[1]
        assert own["attention_mask"].sum() == mask[given_].sum()
        assert torch.equal(own["input_ids"], inputs["input_ids"][given_, :width])
        if len(chunks) > 1:
            assert width == max(lengths[j] for j in given_) >= longest
            longest = width


def test_a_batch_in_one_chunk_is_handed_on_as_it_is():
    inputs = {"input_ids": torch.ones(4, 3)}
    for size in (None, 4, 9):
        (chunk,) = split_batch(inputs, {}, size)
        assert chunk.inputs() is inputs


@pytest.mark.parametrize("side", ["right", "left"])
def test_trimmed_texts_are_embedded_as_before(backbone, side):
    if side == "left" and backbone.startswith("clip"):
        pytest.skip("CLIP's positions count from the left: its texts are padded at the right")
    model = GCLModel.from_encoder(tiny_encoder(backbone))
    inputs = batch_of(backbone, padding_side=side)
    labels = {"ids": torch.arange(len(TEXTS))}
    whole = model(**inputs, return_loss=False)
    widths = []
    for chunk in split_batch(inputs, labels, 2):
        part, rows = model(**chunk.inputs(), return_loss=False), chunk.labels["ids"]
        widths.append(chunk.inputs()["input_ids"].shape[1])
        for name in ("image_embeds", "text_embeds", "fused_embeds"):
            torch.testing.assert_close(part[name], whole[name][rows], atol=1e-6, rtol=0)
    full = inputs["input_ids"].shape[1]
    if backbone.startswith("siglip") or side == "left":  # no mask: attended padding; at the left: nothing to cut
        assert widths == [full] * 3
    else:
        assert widths[0] < widths[1] < widths[2] == full


def test_widened_texts_keep_their_first_columns():
    inputs = batch_of("clip")
    wide = widen_texts(inputs, 16)
    assert wide["input_ids"].shape == wide["attention_mask"].shape == (len(TEXTS), 16)
    assert torch.equal(wide["input_ids"][:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert wide["pixel_values"] is inputs["pixel_values"]
    assert widen_texts(inputs, 2)["input_ids"] is inputs["input_ids"]


def test_texts_of_one_length_are_left_whole():
    """SigLIP's tower pools the last position, whatever mask the tokenizer makes."""
    inputs = batch_of("clip", padding="max_length")
    for chunk in split_batch(inputs, {}, 2, trim_texts=False):
        assert chunk.inputs()["input_ids"].shape == (2, inputs["input_ids"].shape[1])
    assert split_batch(inputs, {}, 2)[0].inputs()["input_ids"].shape[1] < inputs["input_ids"].shape[1]
