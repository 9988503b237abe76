"""The ops against the float64 oracle: every edge of the contract, under implementation="xla"."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mla_jax import LatentCache, mla_decode, mla_prefill, mla_sparse_attention, reference
from mla_jax.cache import logical_to_physical
from pallas_kernels import SparseAttentionConfig
from tests import oracle
from tests.helpers import assert_attention_close, random_latents, random_q

FORMATS = ("fp8_ds_mla", "bfloat16", "float32")
SM_SCALE = 192**-0.5


def filled_cache(rng, num_pages, page_size, format="fp8_ds_mla", **kwargs):
    cache = LatentCache.init(num_pages, page_size, format=format, **kwargs)
    kv_c, k_pe = random_latents(rng, cache.num_slots, cache.kv_lora_rank, cache.qk_rope_head_dim)
    return cache.write(kv_c, k_pe, jnp.arange(cache.num_slots))


def poisoned(cache, keep):
    """The cache with NaN bytes (0xFF in every format) in all slots but `keep`."""
    data = np.array(cache.data).reshape(cache.num_slots, -1)
    mask = np.ones(cache.num_slots, bool)
    mask[np.asarray(keep)] = False
    data.view(np.uint8).reshape(cache.num_slots, -1)[mask] = 0xFF
    return LatentCache(
        jnp.asarray(data.reshape(cache.data.shape)), cache.kv_lora_rank, cache.qk_rope_head_dim
    )


def check_sparse(q, cache, indices, **kwargs):
    out, lse = mla_sparse_attention(
        q, cache, jnp.asarray(indices, jnp.int32), sm_scale=SM_SCALE, return_lse=True, **kwargs
    )
    rows = oracle.cache_rows(cache.data, cache.kv_lora_rank, cache.qk_rope_head_dim)
    expected = oracle.sparse_attention(
        q, rows, indices, sm_scale=SM_SCALE, kv_lora_rank=cache.kv_lora_rank, **kwargs
    )
    assert out.dtype == q.dtype
    assert lse.dtype == jnp.float32
    assert_attention_close(out, lse, *expected)
    return out, lse


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("page_size", [2, 61, 64])
def test_sparse(format, page_size):
    rng = np.random.default_rng(0)
    cache = filled_cache(rng, -(-256 // page_size), page_size, format)
    indices = rng.integers(0, cache.num_slots, (5, 96))
    indices[1, ::3] = -1
    indices[2, :50] = -1
    indices[3, :] = -1
    check_sparse(random_q(rng, 5, 8, 576), cache, indices)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_sparse_sink_and_topk_lens(dtype):
    rng = np.random.default_rng(1)
    cache = filled_cache(rng, 4, 64)
    indices = rng.integers(0, 256, (6, 64))
    sink = jnp.asarray(rng.normal(size=7) + 3, jnp.float32).at[0].set(jnp.inf).at[1].set(-jnp.inf)
    lens = jnp.array([64, 10, 0, -5, 63, 1000], jnp.int32)
    q = random_q(rng, 6, 7, 576, dtype=dtype)
    with np.errstate(over="ignore"):
        check_sparse(q, cache, indices, attn_sink=sink, topk_lens=lens)


@pytest.mark.parametrize("format", FORMATS)
def test_sparse_never_reads_what_it_was_not_asked_for(format):
    rng = np.random.default_rng(2)
    cache = filled_cache(rng, 4, 16, format)
    indices = rng.integers(16, 40, (3, 20))
    cache = poisoned(cache, keep=np.unique(indices))
    indices[:, 5] = -1
    indices[1] = -1
    indices[2, :3] = [64, 2**31 - 1, -7]
    check_sparse(random_q(rng, 3, 4, 576), cache, indices)


def test_sparse_other_dims():
    rng = np.random.default_rng(3)
    cache = filled_cache(rng, 4, 16, kv_lora_rank=256, qk_rope_head_dim=32)
    check_sparse(random_q(rng, 3, 4, 288), cache, rng.integers(0, 64, (3, 20)))


def test_sparse_in_chunks_equals_sparse_at_once(monkeypatch):
    rng = np.random.default_rng(4)
    cache = filled_cache(rng, 4, 64)
    q, indices = random_q(rng, 11, 4, 576), jnp.asarray(rng.integers(-1, 256, (11, 32)), jnp.int32)
    attend = functools.partial(mla_sparse_attention, sm_scale=SM_SCALE, return_lse=True)
    whole = attend(q, cache, indices)
    monkeypatch.setattr(reference, "_MAX_CHUNK_BYTES", 4 * 32 * 576 * 2)
    chunked = attend(q, cache, indices)
    for a, b in zip(whole, chunked, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_sparse_prefill_of_4096_tokens_is_bounded():
    shapes = (
        jax.ShapeDtypeStruct((4096, 8, 576), jnp.bfloat16),
        jax.ShapeDtypeStruct((128, 64, 656), jnp.uint8),
        jax.ShapeDtypeStruct((4096, 2048), jnp.int32),
    )
    compiled = (
        jax.jit(functools.partial(mla_sparse_attention, sm_scale=SM_SCALE)).lower(*shapes).compile()
    )
    # All rows at once are 9.7 GB in bfloat16, and twice that in float32, in which the CPU computes.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**30


def paged_batch(rng, lens, page_size, format="fp8_ds_mla"):
    """A cache with shuffled pages; junk page numbers beyond each length; NaN wherever unused."""
    counts = [-(-n // page_size) for n in lens]
    num_pages = sum(counts) + 2
    cache = filled_cache(rng, num_pages, page_size, format)
    order = rng.permutation(np.arange(1, num_pages))  # page 0 stays unused
    table = rng.integers(0, num_pages, (len(lens), max(counts) + 2)).astype(np.int32)
    used, next_page = [], 0
    for b, (n, count) in enumerate(zip(lens, counts, strict=True)):
        table[b, :count] = order[next_page : next_page + count]
        next_page += count
        slots = table[b, np.arange(n) // page_size] * page_size + np.arange(n) % page_size
        used.append(slots)
    return poisoned(cache, np.concatenate(used).astype(int)), jnp.asarray(table)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("page_size", [2, 61, 64])
@pytest.mark.parametrize("q_len", [1, 3])
def test_decode(format, page_size, q_len):
    rng = np.random.default_rng(5)
    lens = np.array([130, 1, 0, 64, 2])
    cache, table = paged_batch(rng, lens, page_size, format)
    q = random_q(rng, 5, q_len, 8, 576)
    sink = jnp.asarray(rng.normal(size=8), jnp.float32)
    out, lse = mla_decode(
        q,
        cache,
        table,
        jnp.asarray(lens, jnp.int32),
        sm_scale=SM_SCALE,
        attn_sink=sink,
        return_lse=True,
    )
    pages = oracle.cache_rows(cache.data).reshape(cache.num_pages, page_size, -1)
    expected = oracle.ragged_attention(
        q.reshape(5 * q_len, 8, 576),
        pages,
        table,
        lens,
        np.arange(6) * q_len,
        sm_scale=SM_SCALE,
        attn_sink=sink,
    )
    assert_attention_close(out.reshape(5 * q_len, 8, 512), lse.reshape(5 * q_len, 8), *expected)


@pytest.mark.parametrize("key_chunk", [32, 1024])
@pytest.mark.parametrize("query_chunk", [4, 128])
def test_prefill(key_chunk, query_chunk, monkeypatch):
    monkeypatch.setattr(reference, "_KEY_CHUNK", key_chunk)
    monkeypatch.setattr(reference, "_QUERY_CHUNK", query_chunk)
    rng = np.random.default_rng(6)
    # The last sequence has fewer keys than queries: its first ones stand before position 0.
    lens, q_lens = np.array([70, 0, 9, 33, 5, 3]), np.array([11, 0, 9, 1, 0, 6])
    cache, table = paged_batch(rng, lens, 16)
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)])
    q = random_q(rng, cu_q_lens[-1] + 3, 4, 576)  # three padding tokens
    out, lse = mla_prefill(
        q,
        cache,
        table,
        jnp.asarray(lens, jnp.int32),
        jnp.asarray(cu_q_lens, jnp.int32),
        sm_scale=SM_SCALE,
        return_lse=True,
    )
    pages = oracle.cache_rows(cache.data).reshape(cache.num_pages, 16, -1)
    expected = oracle.ragged_attention(q, pages, table, lens, cu_q_lens, sm_scale=SM_SCALE)
    assert_attention_close(out, lse, *expected)


def test_decode_in_chunks_equals_decode_at_once(monkeypatch):
    rng = np.random.default_rng(10)
    lens = np.array([300, 20, 7])
    cache, table = paged_batch(rng, lens, 16)
    q = random_q(rng, 3, 11, 4, 576)
    attend = functools.partial(mla_decode, sm_scale=SM_SCALE, return_lse=True)
    whole = attend(q, cache, table, jnp.asarray(lens, jnp.int32))
    per_query = 3 * 4 * 4 * (2 * 64 + 2 * 576)
    monkeypatch.setattr(reference, "_MAX_CHUNK_BYTES", 4 * per_query)
    chunked = attend(q, cache, table, jnp.asarray(lens, jnp.int32))
    assert_attention_close(*chunked, *whole)


def test_decode_of_a_long_equal_chunk_is_bounded():
    batch, q_len, heads = 4, 4096, 32
    compiled = (
        jax.jit(functools.partial(mla_decode, sm_scale=SM_SCALE))
        .lower(
            jax.ShapeDtypeStruct((batch, q_len, heads, 576), jnp.bfloat16),
            jax.ShapeDtypeStruct((256, 64, 656), jnp.uint8),
            jax.ShapeDtypeStruct((batch, 64), jnp.int32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
        )
        .compile()
    )
    scores = batch * q_len * heads * q_len * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2


@pytest.mark.parametrize("overrun", [33, 2**31 - 1000, 2**31 - 1])
def test_lengths_beyond_the_table_end_with_the_table(overrun):
    rng = np.random.default_rng(11)
    cache, table = filled_cache(rng, 4, 16), jnp.array([[2, 1]], jnp.int32)
    q = random_q(rng, 1, 1, 4, 576)
    options = {"sm_scale": SM_SCALE, "return_lse": True}
    expected = mla_decode(q, cache, table, jnp.array([32], jnp.int32), **options)
    got = mla_decode(q, cache, table, jnp.array([overrun], jnp.int32), **options)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("page", [-1, 4, 2**26, 2**31 - 1])
def test_pages_outside_of_the_cache_are_skipped(page):
    rng = np.random.default_rng(12)
    cache = filled_cache(rng, 4, 64)
    q, lens = random_q(rng, 1, 1, 4, 576), jnp.array([128], jnp.int32)
    table = jnp.array([[page, 3]], jnp.int32)
    options = {"sm_scale": SM_SCALE, "return_lse": True}
    got = mla_decode(q, cache, table, lens, **options)
    slots = jnp.arange(3 * 64, 4 * 64, dtype=jnp.int32)[None]
    expected = mla_sparse_attention(q[0], cache, slots, **options)
    np.testing.assert_allclose(got[1][0], expected[1], rtol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_empty_calls_have_empty_results(format):
    cache = LatentCache.init(2, 8, format=format)
    zeros, i32 = functools.partial(jnp.zeros, dtype=jnp.bfloat16), jnp.int32
    table, lens = jnp.zeros((0, 2), i32), jnp.zeros(0, i32)
    options = {"sm_scale": 1.0, "return_lse": True}
    out, lse = mla_sparse_attention(zeros((3, 4, 576)), cache, jnp.zeros((3, 0), i32), **options)
    assert not out.any()
    assert jnp.isneginf(lse).all()
    empty = (
        mla_sparse_attention(zeros((0, 4, 576)), cache, jnp.zeros((0, 5), i32), **options),
        mla_decode(zeros((0, 1, 4, 576)), cache, table, lens, **options),
        mla_decode(
            zeros((2, 0, 4, 576)), cache, jnp.zeros((2, 2), i32), jnp.ones(2, i32), **options
        ),
        mla_prefill(zeros((0, 4, 576)), cache, table, lens, jnp.zeros(1, i32), **options),
    )
    for out, lse in empty:
        assert out.size == 0
        assert lse.shape == out.shape[:-1]


def test_numpy_arguments_and_scales_of_any_float_type():
    rng = np.random.default_rng(13)
    cache, table = paged_batch(rng, np.array([20]), 8)
    q, lens, cu = random_q(rng, 1, 1, 4, 576), np.array([20], np.int32), np.array([0, 1], np.int32)
    expected = np.asarray(mla_decode(q, cache, table, jnp.asarray(lens), sm_scale=0.07), np.float32)
    table, data = np.asarray(table), np.asarray(cache.data)
    got = mla_decode(np.asarray(q), data, table, lens, sm_scale=np.float32(0.07))
    scale = np.float64(0.07)
    ragged = jax.jit(lambda q: mla_prefill(q, data, table, lens, cu, sm_scale=scale))(q[0])
    for out in (got, ragged[None]):
        np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=1e-2, atol=1e-4)


def test_numpy_integers_that_int32_would_wrap_are_refused():
    cache = filled_cache(np.random.default_rng(0), 2, 4)
    q = jnp.zeros((1, 8, 576), jnp.bfloat16)
    with pytest.raises(ValueError, match="topk_indices holds 4294967298"):
        mla_sparse_attention(q, cache, np.array([[3, 2**32 + 2]]), sm_scale=SM_SCALE)


def test_float16_queries_do_not_limit_the_range_of_the_latents():
    cache = LatentCache.init(1, 8).write(
        jnp.full((8, 512), 1e5), jnp.zeros((8, 64)), jnp.arange(8, dtype=jnp.int32)
    )
    q = jnp.full((1, 2, 576), 1e-3, jnp.float16)
    _, lse = mla_sparse_attention(
        q, cache, jnp.arange(8, dtype=jnp.int32)[None], sm_scale=1e-3, return_lse=True
    )
    np.testing.assert_allclose(lse, 512 * 1e-6 * 1e5 + np.log(8), rtol=0.05)


def test_prefill_of_a_long_prompt_is_bounded():
    tokens, heads = 8192, 16
    compiled = (
        jax.jit(functools.partial(mla_prefill, sm_scale=SM_SCALE))
        .lower(
            jax.ShapeDtypeStruct((tokens, heads, 576), jnp.bfloat16),
            jax.ShapeDtypeStruct((128, 64, 656), jnp.uint8),
            jax.ShapeDtypeStruct((1, 128), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((2,), jnp.int32),
        )
        .compile()
    )
    scores = tokens * heads * tokens * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 4


def test_sparse_over_all_positions_equals_decode():
    rng = np.random.default_rng(7)
    cache, table = paged_batch(rng, np.array([50, 20]), 16)
    lens = jnp.array([50, 20], jnp.int32)
    q = random_q(rng, 2, 1, 8, 576)
    positions = jnp.broadcast_to(jnp.arange(64), (2, 64))
    slots = logical_to_physical(table, positions, 16)
    slots = jnp.where(positions < lens[:, None], slots, -1)
    options = {"sm_scale": SM_SCALE, "return_lse": True}
    dense = mla_decode(q, cache, table, lens, **options)
    sparse = mla_sparse_attention(q[:, 0], cache, slots, **options)
    np.testing.assert_allclose(
        np.asarray(dense[0][:, 0], np.float32), np.asarray(sparse[0], np.float32), atol=4e-3
    )
    np.testing.assert_allclose(dense[1][:, 0], sparse[1], rtol=1e-5)


def test_absorbed_ops_equal_multi_head_attention():
    """q absorbed with w_uk, out expanded with w_uv: the same numbers as MLA as the paper has it."""
    rng = np.random.default_rng(8)
    heads, nope, v_dim, keys = 4, 24, 20, 50
    cache = filled_cache(rng, 1, 64, "float32")
    rows = oracle.cache_rows(cache.data)[:keys]
    w_uk, w_uv = rng.normal(size=(heads, nope, 512)) / 20, rng.normal(size=(heads, v_dim, 512)) / 20
    q_nope, q_pe = rng.normal(size=(heads, nope)), rng.normal(size=(heads, 64))
    expected = oracle.multi_head_attention(
        q_nope, q_pe, rows[:, :512], rows[:, 512:], w_uk, w_uv, SM_SCALE
    )
    q = np.concatenate([np.einsum("hn,hnr->hr", q_nope, w_uk), q_pe], axis=1)
    out = mla_sparse_attention(
        jnp.asarray(q, jnp.float32)[None],
        cache,
        jnp.arange(keys, dtype=jnp.int32)[None],
        sm_scale=SM_SCALE,
    )
    got = np.einsum("hr,hvr->hv", np.asarray(out[0], np.float64), w_uv)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_with_64_bit_types_enabled():
    rng = np.random.default_rng(5)
    cache, page_indices = paged_batch(rng, [9, 3], 4)
    q, lens = random_q(rng, 2, 3, 4, 576), jnp.asarray([9, 3], jnp.int32)
    expected = mla_decode(q, cache, page_indices, lens, sm_scale=SM_SCALE)
    with jax.enable_x64(True):
        out = mla_decode(q, cache, page_indices, lens, sm_scale=SM_SCALE)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))


@pytest.mark.parametrize("op", ["decode", "prefill", "sparse"])
def test_inside_a_shard_map_that_checks_varying_axes(op):
    """`jax.shard_map`'s own default; loops' carries need the axes of what they meet."""
    rng = np.random.default_rng(4)
    cache, page_indices = paged_batch(rng, [9, 3], 4)
    lens = jnp.asarray([9, 3], jnp.int32)
    q = jnp.asarray(rng.normal(size=(2, 3, 4, 576)), jnp.bfloat16)
    arguments = (q, cache, page_indices, lens)
    f = functools.partial(mla_decode, sm_scale=SM_SCALE)
    heads = P(None, None, "model")
    if op != "decode":
        q, heads = q.reshape(6, 4, 576), P(None, "model")
    if op == "prefill":
        arguments = (q, cache, page_indices, lens, jnp.asarray([0, 3, 6], jnp.int32))
        f = functools.partial(mla_prefill, sm_scale=SM_SCALE)
    if op == "sparse":
        arguments = (q, cache, jnp.tile(page_indices[:1, :1] * 4, (6, 5)))
        f = functools.partial(mla_sparse_attention, sm_scale=SM_SCALE)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    in_specs = (heads, *[P()] * (len(arguments) - 1))
    sharded = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=heads))
    np.testing.assert_allclose(
        np.asarray(sharded(*arguments), np.float32),
        np.asarray(f(*arguments), np.float32),
        rtol=2.0**-7,
        atol=1e-6,
    )


def test_works_inside_jit_scan_and_while_loop():
    rng = np.random.default_rng(9)
    cache, table = paged_batch(rng, np.array([40]), 8)
    q, lens = random_q(rng, 1, 1, 4, 576), jnp.array([40], jnp.int32)
    attend = functools.partial(mla_decode, sm_scale=SM_SCALE)
    expected = np.asarray(attend(q, cache, table, lens), np.float32)

    def body(carry):
        i, _ = carry
        return i + 1, attend(q, cache, table, lens)

    init = (0, jnp.zeros((1, 1, 4, 512), jnp.bfloat16))
    _, out = jax.jit(lambda: jax.lax.while_loop(lambda c: c[0] < 3, body, init))()
    np.testing.assert_array_equal(np.asarray(out, np.float32), expected)


Q = jnp.zeros((3, 4, 576), jnp.bfloat16)
CACHE = jnp.zeros((2, 8, 656), jnp.uint8)
INDICES = jnp.zeros((3, 5), jnp.int32)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": Q[..., :512]}, r"q.shape=\(3, 4, 512\) must be \[tokens, num_q_heads, 576\]"),
        ({"q": Q[0]}, r"q.shape=\(4, 576\)"),
        ({"q": Q.astype(jnp.int32)}, "q.dtype=dtype"),
        ({"kv_cache": CACHE[..., :576]}, r"kv_cache.shape=\(2, 8, 576\)"),
        ({"kv_cache": CACHE.astype(jnp.float16)}, "kv_cache.dtype=float16"),
        ({"kv_cache": LatentCache(CACHE, 256)}, r"kv_cache.data.shape=\(2, 8, 656\)"),
        ({"topk_indices": INDICES[:2]}, r"topk_indices.shape=\(2, 5\)"),
        ({"topk_indices": INDICES.astype(jnp.float32)}, "topk_indices.dtype=float32"),
        ({"topk_lens": jnp.zeros(4, jnp.int32)}, r"topk_lens.shape=\(4,\)"),
        ({"attn_sink": jnp.zeros(5)}, r"attn_sink.shape=\(5,\)"),
        ({"sm_scale": 0.0}, "sm_scale=0.0 must be a positive"),
        ({"sm_scale": float("inf")}, "sm_scale=inf must be a positive"),
        ({"sm_scale": jnp.ones(())}, "sm_scale=Array"),
        ({"sm_scale": np.ones(4)}, "sm_scale=array"),
        ({"sm_scale": None}, "sm_scale=None"),
        ({"topk_indices": [[0]]}, r"topk_indices=\[\[0\]\] must be an array"),
        ({"topk_indices": None}, "topk_indices=None must be an array"),
        ({"kv_cache": None}, "kv_cache=None must be an array"),
        ({"kv_cache": CACHE[:0]}, r"kv_cache.data.shape=\(0, 8, 656\)"),
        ({"config": "big tiles"}, "config='big tiles' must be None or a pallas_kernels"),
        ({"implementation": "cuda"}, "implementation='cuda' must be None or one of"),
        ({"implementation": "xla", "config": SparseAttentionConfig(8)}, "config="),
    ],
)
def test_sparse_names_the_bad_argument(change, match):
    arguments = {"q": Q, "kv_cache": CACHE, "topk_indices": INDICES, "sm_scale": 1.0, **change}
    with pytest.raises(ValueError, match=match):
        mla_sparse_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": Q}, r"must be \[batch, q_len, num_q_heads, 576\]"),
        ({"kv_lens": jnp.zeros(2, jnp.int32)}, r"kv_lens.shape=\(2,\) must be \[batch\] = \[3\]"),
        ({"page_indices": INDICES[:, :0]}, "holds no page"),
        ({"page_indices": INDICES[0]}, r"page_indices.shape=\(5,\)"),
    ],
)
def test_decode_names_the_bad_argument(change, match):
    lens = jnp.zeros(3, jnp.int32)
    arguments = {"q": Q[:, None], "kv_cache": CACHE, "page_indices": INDICES, "kv_lens": lens}
    with pytest.raises(ValueError, match=match):
        mla_decode(**{**arguments, **change}, sm_scale=1.0)


def test_prefill_names_the_bad_argument():
    lens = jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match=r"cu_q_lens.shape=\(3,\) must be \[batch \+ 1\]"):
        mla_prefill(Q, CACHE, INDICES, lens, lens, sm_scale=1.0)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (mla_decode, (Q[:, None].astype(jnp.float32), CACHE, INDICES, jnp.zeros(3, jnp.int32))),
        (mla_prefill, (Q, CACHE, INDICES, jnp.zeros(3, jnp.int32), jnp.zeros(4, jnp.int32))),
        (mla_sparse_attention, (Q.astype(jnp.float32), CACHE, INDICES)),
    ],
)
def test_a_named_kernel_that_cannot_says_so(op, args):
    with pytest.raises(NotImplementedError, match="xla"):
        op(*args, sm_scale=1.0, implementation="mosaic_gpu")


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("format", FORMATS)
def test_nothing_relies_on_promotion(format, dtype):
    cache = LatentCache.init(4, 8, format=format)
    slots = jnp.array([9, -1], jnp.int32)
    cache = cache.write(jnp.ones((2, 512), dtype), jnp.ones((2, 64), jnp.bfloat16), slots)
    q, sink, lens = jnp.ones((2, 4, 576), dtype), jnp.zeros(4), jnp.array([9, 3], jnp.int32)
    table, cu_q_lens = jnp.array([[1, 2], [0, 3]], jnp.int32), jnp.array([0, 1, 2], jnp.int32)
    options = {"sm_scale": SM_SCALE, "attn_sink": sink, "return_lse": True}
    indices = jnp.array([[9, 2, -1], [0, 1, 9]], jnp.int32)
    for topk_lens in (None, jnp.array([2, 3], jnp.int32)):
        mla_sparse_attention(q, cache, indices, topk_lens=topk_lens, **options)
    mla_decode(q[:, None], cache, table, lens, **options)
    mla_prefill(q, cache, table, lens, cu_q_lens, **options)
