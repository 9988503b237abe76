"""The merge of split-KV partials: interpreted on CPU, lowered for CUDA, and right on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import merge_partials_sm90
from tests import oracle
from tests.helpers import assert_attention_close


def partials(rng, tokens, splits, heads, dim=512):
    """Partial results of a random attention; some without a key, and one token without any."""
    out = rng.normal(size=(tokens, splits, heads, dim)).astype(np.float32)
    lse = (rng.normal(size=(tokens, splits, heads)) * 4).astype(np.float32)
    empty = rng.random(lse.shape) < 0.2
    empty[0] = True
    lse[empty] = -np.inf
    out[empty] = 0
    return out, lse


def expected_merge(out, lse, sink=None):
    out, lse = out.astype(np.float64), lse.astype(np.float64)
    top = np.maximum(lse.max(axis=1, keepdims=True), -1e30)
    weights = np.exp(lse - top)
    total = weights.sum(axis=1)
    merged = (out * weights[..., None]).sum(axis=1) / np.where(total > 0, total, 1)[..., None]
    with np.errstate(divide="ignore"):
        merged_lse = top[:, 0] + np.log(total)
    if sink is not None:
        merged = merged / (1 + np.exp(sink - merged_lse))[..., None]
    return merged, merged_lse


def check(interpret, tokens, splits, heads, with_sink, in_units=False):
    rng = np.random.default_rng([tokens, splits, heads])
    out, lse = partials(rng, tokens, splits, heads)
    unit = None
    if in_units:
        unit = np.exp2(rng.integers(-30, 30, lse.shape)).astype(np.float32)
        small = out.astype(np.float16)
        out = small.astype(np.float32) * unit[..., None]
    sink = rng.normal(size=heads).astype(np.float32) if with_sink else None
    with np.errstate(over="ignore"):
        expected = expected_merge(out, lse, sink)
    actual = merge_partials_sm90(
        jnp.asarray(small if in_units else out),
        jnp.asarray(lse),
        None if sink is None else jnp.asarray(sink),
        partial_unit=None if unit is None else jnp.asarray(unit),
        interpret=interpret,
    )
    assert_attention_close(*actual, *expected)


SHAPES = [(2, 2, 3), (3, 5, 1), (1, 32, 2)]


@pytest.mark.parametrize("in_units", [False, True])
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize(("tokens", "splits", "heads"), SHAPES)
def test_merges_when_interpreted(tokens, splits, heads, with_sink, in_units):
    check(True, tokens, splits, heads, with_sink, in_units)


@pytest.mark.gpu
@pytest.mark.parametrize("in_units", [False, True])
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize(("tokens", "splits", "heads"), [*SHAPES, (74, 3, 24), (8, 16, 128)])
def test_merges_on_the_gpu(tokens, splits, heads, with_sink, in_units):
    check(False, tokens, splits, heads, with_sink, in_units)


@pytest.mark.gpu
def test_merging_parts_equals_attending_to_the_whole():
    rng = np.random.default_rng(0)
    q, rows = rng.normal(size=(8, 576)), rng.normal(size=(120, 576))
    parts = [oracle.attend(q, part, 0.1) for part in np.split(rows, [50, 51])]
    out, lse = (np.stack(x)[None].astype(np.float32) for x in zip(*parts, strict=True))
    expected_out, expected_lse = oracle.attend(q, rows, 0.1)
    actual = merge_partials_sm90(jnp.asarray(out), jnp.asarray(lse))
    assert_attention_close(*actual, expected_out[None], expected_lse[None])


@pytest.mark.parametrize("splits", [1, 3, 32])
def test_lowers(splits):
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((4, splits, 8, 512), jnp.float32),
        shape((4, splits, 8), jnp.float32),
        shape((8,), jnp.float32),
    )
    text = jax.jit(merge_partials_sm90).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert text.as_text().count("custom_call @mosaic_gpu") == 1


def test_refuses_shapes_that_do_not_fit():
    out, lse = jnp.zeros((4, 2, 8, 512)), jnp.zeros((4, 2, 7))
    with pytest.raises(ValueError, match=r"partial_lse\.shape"):
        merge_partials_sm90(out, lse)
    with pytest.raises(ValueError, match=r"partial_unit\.shape"):
        merge_partials_sm90(out, jnp.zeros((4, 2, 8)), partial_unit=lse)
    with pytest.raises(NotImplementedError, match="dim=100"):
        merge_partials_sm90(jnp.zeros((4, 2, 8, 100)), jnp.zeros((4, 2, 8)))
