import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import mla_sparse_attention, padded_num_heads
from mla_jax.heads import with_padded_heads
from tests.helpers import random_q
from tests.test_attention import filled_cache


def test_padding_target():
    assert [padded_num_heads(n) for n in (1, 8, 16, 24, 48, 64)] == [64] * 6
    assert [padded_num_heads(n) for n in (65, 96, 128)] == [128] * 3


@pytest.mark.parametrize("n", [-1, 0, 129, 256])
def test_padding_target_names_the_bad_count(n):
    with pytest.raises(ValueError, match=f"num_q_heads={n} per device must be between 1 and 128"):
        padded_num_heads(n)


@pytest.mark.parametrize("heads", [1, 8, 24, 48, 64, 96, 128])
def test_padded_heads_do_not_show(heads):
    rng = np.random.default_rng(heads)
    cache = filled_cache(rng, 2, 64)
    q = random_q(rng, 3, heads, 576)
    indices = jnp.asarray(rng.integers(-1, 128, (3, 32)), jnp.int32)
    sink = jnp.asarray(rng.normal(size=heads), jnp.float32)
    seen = []

    def op(q, *args, **kwargs):
        seen.append(q.shape[-2])
        return mla_sparse_attention(q, *args, **kwargs)

    options = {"sm_scale": 0.07, "attn_sink": sink, "return_lse": True}
    expected = mla_sparse_attention(q, cache, indices, **options)
    got = with_padded_heads(op)(q, cache, indices, **options)
    assert seen == [padded_num_heads(heads)]
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2)
    alone = with_padded_heads(op)(q, cache, indices, sm_scale=0.07)
    assert alone.shape == (3, heads, 512)
