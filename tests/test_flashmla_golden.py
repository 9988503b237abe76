"""FlashMLA's own outputs on an H100: through the XLA implementation, and from the same bytes
through the dense kernel.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import mla_decode, mla_prefill, mla_sparse_attention
from mla_jax.cache import quantize
from tests.helpers import assert_attention_close, load_flashmla

SPARSE_DECODE = (
    "sparse_decode_h64",
    "sparse_decode_h128_sink_invalid",
    "sparse_decode_h64_page61_invalid",
)
DENSE_DECODE = ("dense_decode_h16_causal", "dense_decode_h128")


@pytest.mark.parametrize("name", SPARSE_DECODE)
def test_sparse_decode(name):
    data = load_flashmla(name)
    batch, q_len, heads, dim = data["q"].shape
    sink = data.get("attn_sink")
    out, lse = mla_sparse_attention(
        jnp.asarray(data["q"]).reshape(batch * q_len, heads, dim),
        jnp.asarray(data["kv_cache"]),
        jnp.asarray(data["indices"]).reshape(batch * q_len, -1),
        sm_scale=data["sm_scale"],
        attn_sink=None if sink is None else jnp.asarray(sink),
        return_lse=True,
        implementation="xla",
    )
    assert_attention_close(
        out.reshape(data["out"].shape), lse.reshape(data["lse"].shape), data["out"], data["lse"]
    )


@pytest.mark.parametrize("name", SPARSE_DECODE)
def test_quantizing_gives_flashmla_s_cache_bit_for_bit(name):
    data = load_flashmla(name)
    latents = jnp.asarray(data["kv_unquantized"])
    rows = quantize(latents[..., :512], latents[..., 512:])
    np.testing.assert_array_equal(np.asarray(rows), data["kv_cache"])


def test_sparse_prefill():
    data = load_flashmla("sparse_prefill_h64")
    out, lse = mla_sparse_attention(
        jnp.asarray(data["q"]),
        jnp.asarray(data["kv"])[None],
        jnp.asarray(data["indices"]),
        sm_scale=data["sm_scale"],
        return_lse=True,
        implementation="xla",
    )
    assert_attention_close(out, lse, data["out"], data["lse"])


@pytest.mark.parametrize("name", DENSE_DECODE)
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_dense_decode(name, op):
    data = load_flashmla(name)
    q, cache, table, lens = (
        jnp.asarray(data[k]) for k in ("q", "kv_cache", "block_table", "cache_seqlens")
    )
    options = {"sm_scale": data["sm_scale"], "return_lse": True, "implementation": "xla"}
    batch, q_len, heads, dim = q.shape
    if op == "decode":
        out, lse = mla_decode(q, cache, table, lens, **options)
    else:
        ragged = q.reshape(batch * q_len, heads, dim)
        cu_q_lens = jnp.arange(batch + 1, dtype=jnp.int32) * q_len
        out, lse = mla_prefill(ragged, cache, table, lens, cu_q_lens, **options)
    assert_attention_close(
        out.reshape(data["out"].shape), lse.reshape(data["lse"].shape), data["out"], data["lse"]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", DENSE_DECODE)
def test_dense_decode_by_the_kernel_over_the_same_bfloat16_cache(name):
    data = load_flashmla(name)
    arrays = (jnp.asarray(data[k]) for k in ("q", "kv_cache", "block_table", "cache_seqlens"))
    options = {"sm_scale": data["sm_scale"], "return_lse": True}
    out, lse = mla_decode(*arrays, **options, implementation="mosaic_gpu")
    assert_attention_close(out, lse, data["out"], data["lse"])
