"""A wider residual stream computes the same LayerNorms, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm

from universal_gcl.conversion.residual_stream import widen_stream

EPS = 1e-5


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same_function(gain, wide):
    """A layer reads the same from both streams, right after `ln_pre` and after another layer has written to them."""
    width = len(gain)
    mapping = widen_stream(width, wide, gain)
    shrink, eps = (width / wide) ** 0.5, EPS * width / wide
    patches, bias, written = randn(5, width), randn(width, seed=1), randn(5, width, seed=2)
    narrow = layer_norm(patches, (width,), gain.double(), bias, EPS)
    embedded, wide_bias = patches @ mapping.embedding.T, mapping.stream @ bias
    widened = layer_norm(embedded, (wide,), mapping.pre_gain * shrink, wide_bias, eps)
    for extra in (0 * written, written):
        expected = layer_norm(narrow + extra, (width,), None, None, EPS)
        found = layer_norm(widened + extra @ mapping.stream.T, (wide,), None, None, eps) @ mapping.stream * shrink
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)
    assert torch.equal(mapping.pre_gain[width:], torch.zeros(wide - width, dtype=torch.float64))
    torch.testing.assert_close(mapping.stream[-1], mapping.stream[-2], atol=1e-12, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 70),
    extra=st.integers(2, 40),
    scale=st.floats(0.01, 1),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_any_gains(width, extra, scale, dtype, seed):
    gain = (1 + scale * randn(width, seed=seed)).to(dtype).float()  # half precision: gains occur more than once
    assert_same_function(gain, width + extra)


@pytest.mark.parametrize(
    "gain",
    [torch.ones(20), torch.zeros(20), torch.tensor([1.0] * 10 + [-1.0] * 10), torch.tensor([0.0] + [1.0] * 19)],
    ids=["equal", "zero", "signs", "one zero"],
)
def test_degenerate_gains(gain):
    assert_same_function(gain, 64)


def test_a_tower_without_a_first_layernorm():
    mapping = widen_stream(37, 64)
    stream = randn(5, 37)
    found = layer_norm(stream @ mapping.stream.T, (64,), None, None, EPS * 37 / 64) @ mapping.stream * (37 / 64) ** 0.5
    torch.testing.assert_close(found, layer_norm(stream, (37,), None, None, EPS), atol=1e-12, rtol=0)
    assert torch.equal(mapping.stream[37:], torch.zeros(27, 37, dtype=torch.float64))


def test_gains_beyond_rounding_are_refused():
    gain = torch.cat([1e-7 * randn(100).abs(), randn(100, seed=1).abs()])
    with pytest.raises(ValueError, match="ln_pre"):
        widen_stream(200, 256, gain)
