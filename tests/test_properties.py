"""Properties that hold for any input: what may be permuted, split or padded without a change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("hypothesis")  # Not on every GPU machine, where only gpu tests run.

from hypothesis import given, settings
from hypothesis import strategies as st

from mla_jax import LatentCache, mla_decode, mla_sparse_attention
from mla_jax.heads import with_padded_heads
from tests.helpers import random_latents, random_q

PAGE, PAGES, HEADS, TOPK = 8, 6, 4, 24
seeds = st.integers(0, 2**32 - 1)
some = settings(max_examples=20, deadline=None, derandomize=True)

sparse = jax.jit(lambda *a: mla_sparse_attention(*a, sm_scale=0.07, return_lse=True))
decode = jax.jit(lambda *a: mla_decode(*a, sm_scale=0.07, return_lse=True))


def setup(seed, heads=HEADS):
    rng = np.random.default_rng(seed)
    cache = LatentCache.init(PAGES, PAGE)
    kv_c, k_pe = random_latents(rng, cache.num_slots)
    cache = cache.write(kv_c, k_pe, jnp.arange(cache.num_slots))
    q = random_q(rng, 2, heads, 576)
    indices = rng.choice(cache.num_slots, (2, TOPK)).astype(np.int32)
    indices[rng.random(indices.shape) < 0.3] = -1
    return rng, cache, q, indices


def assert_same(got, expected, atol=2e-2):
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=atol)


@some
@given(seeds)
def test_order_of_the_indices_does_not_matter(seed):
    rng, cache, q, indices = setup(seed)
    assert_same(sparse(q, cache, rng.permuted(indices, axis=1)), sparse(q, cache, indices))


@some
@given(seeds)
def test_place_of_the_pages_does_not_matter(seed):
    rng, cache, q, _ = setup(seed)
    table = jnp.asarray(rng.permutation(PAGES).reshape(2, 3), jnp.int32)
    lens = jnp.asarray(rng.integers(0, 3 * PAGE + 1, 2), jnp.int32)
    to = rng.permutation(PAGES)
    moved = LatentCache(jnp.zeros_like(cache.data).at[to].set(cache.data))
    got = decode(q[:, None], moved, jnp.asarray(to, jnp.int32)[table], lens)
    for a, b in zip(got, decode(q[:, None], cache, table, lens), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@some
@given(seeds, st.integers(0, TOPK))
def test_splits_merge_by_lse(seed, cut):
    """out = sum_i exp(lse_i - lse) out_i: why lse of an empty part is -inf."""
    _, cache, q, indices = setup(seed)
    parts = []
    for keep in (np.arange(TOPK) < cut, np.arange(TOPK) >= cut):
        parts.append(sparse(q, cache, np.where(keep, indices, -1)))
    (out_a, lse_a), (out_b, lse_b) = parts
    lse = np.logaddexp(lse_a, lse_b)
    base = np.where(np.isneginf(lse), 0, lse)
    weights = [np.exp(np.asarray(part) - base)[..., None] for part in (lse_a, lse_b)]
    merged = weights[0] * np.asarray(out_a, np.float32) + weights[1] * np.asarray(out_b, np.float32)
    assert_same((merged, lse), sparse(q, cache, indices))


@some
@given(seeds)
def test_each_token_stands_alone(seed):
    _, cache, q, indices = setup(seed)
    both = sparse(q, cache, indices)
    for t in range(2):
        alone = sparse(q[t : t + 1], cache, indices[t : t + 1])
        assert_same([x[0] for x in alone], [x[t] for x in both])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seeds, st.integers(1, 128))
def test_any_head_count_padded_or_not(seed, heads):
    _, cache, q, indices = setup(seed, heads)
    args = (q, cache, jnp.asarray(indices))
    options = {"sm_scale": 0.07, "return_lse": True}
    plain = mla_sparse_attention(*args, **options)
    assert plain[0].shape == (2, heads, 512)
    assert_same(with_padded_heads(mla_sparse_attention)(*args, **options), plain)


@some
@given(seeds)
def test_an_index_named_twice_is_two_keys(seed):
    _, cache, q, indices = setup(seed)
    out, lse = sparse(q, cache, indices)
    twice = sparse(q, cache, np.concatenate([indices, indices], axis=1))
    assert_same(twice, (out, np.asarray(lse) + np.log(2)))
