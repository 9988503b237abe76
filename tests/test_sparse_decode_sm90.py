"""The sparse attention kernel: lowers everywhere, and is right on a Hopper GPU."""

import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    SparseAttentionConfig,
    sparse_attention_sm90,
    warp_attention_sm90,
    warpgroup_attention_sm90,
)
from pallas_kernels.hopper import NUM_SMS
from pallas_kernels.sparse_decode_sm90 import LARGEST_FEW_HEADS, default_config
from tests import oracle
from tests.helpers import assert_attention_close, load_flashmla

SM_SCALE = 192**-0.5
NAN_BYTE = 0xFF  # NaN as e4m3, and in every float32 and bfloat16 made of it
ROW = 656

# Every head count of FlashMLA's decoding tests with every batch; the lengths and page sizes rotate,
# so that each meets each other one.
MATRIX = [
    (heads, batch, (64, 576, 2048)[(i + j) % 3], (2, 61, 64, 576)[(i + 2 * j + j // 2) % 4])
    for i, heads in enumerate((1, 8, 16, 24, 32, 33, 48, 64, 96, 128))
    for j, batch in enumerate((1, 4, 74, 321))
]
CONFIGS = [
    SparseAttentionConfig(head_tile, num_splits, num_warpgroups, num_stages)
    for head_tile, num_splits, num_warpgroups, num_stages in (
        *((8, 1, 2, 2), (8, 1, 1, 4), (8, 2, 2, 1), (8, 5, 1, 3), (8, 32, 1, 2)),
        *((16, 1, 2, 2), (16, 3, 1, 4), (16, 32, 1, 1), (24, 1, 1, 2), (24, 4, 2, 2)),
        *((32, 1, 2, 2), (32, 8, 1, 3), (32, 2, 2, 1)),
        *((64, 1, 3, 3), (64, 2, 3, 3), (64, 5, 3, 3), (64, 32, 3, 3)),
    )
]


# What more than 32 heads take for all but the smallest batches; named here so that small tests do.
WIDE = SparseAttentionConfig(64, 1, 3, 3)


def form(heads):
    """The config that makes a small test take the form that large ones take."""
    return WIDE if heads > 32 else None


def config_id(config):
    return f"h{config.head_tile}-s{config.num_splits}-w{config.num_warpgroups}-d{config.num_stages}"


# ------------------------------------------------------------------------------- without a GPU


def lowered(tokens, heads, topk, *, page_size=64, num_pages=100, sink=True, lens=True, config=None):
    """The StableHLO for CUDA, made without one."""
    shape = jax.ShapeDtypeStruct
    operands = {
        "q": shape((tokens, heads, 576), jnp.bfloat16),
        "kv_cache": shape((num_pages, page_size, ROW), jnp.uint8),
        "topk_indices": shape((tokens, topk), jnp.int32),
    }
    if sink:
        operands["attn_sink"] = shape((heads,), jnp.float32)
    if lens:
        operands["topk_lens"] = shape((tokens,), jnp.int32)
    fn = jax.jit(lambda kw: sparse_attention_sm90(**kw, sm_scale=SM_SCALE, config=config))
    return fn.trace(operands).lower(lowering_platforms=("cuda",)).as_text()


def num_kernels(text):
    return len(re.findall(r"custom_call @mosaic_gpu", text))


@pytest.mark.parametrize("heads", [1, 8, 12, 16, 24, 32, 48, 128])
@pytest.mark.parametrize(("tokens", "topk"), [(1, 2048), (128, 2048), (4, 7)])
def test_lowers_for_every_head_tile(heads, tokens, topk):
    splits = default_config(tokens, heads, topk).num_splits
    assert num_kernels(lowered(tokens, heads, topk)) == 1 + (splits > 1)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_lowers_for_every_kind_of_config(config):
    text = lowered(3, config.head_tile, 576, config=config)
    assert num_kernels(text) == 1 + (config.num_splits > 1)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("lens", [False, True])
def test_lowers_with_and_without_the_optional_arguments(sink, lens):
    assert num_kernels(lowered(128, 8, 2048, sink=sink, lens=lens)) == 1


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 100_000, "heads": 128, "topk": 2048},
        {"tokens": 1, "heads": 8, "topk": 64, "num_pages": 2**20, "page_size": 64},
        {"tokens": 2, "heads": 8, "topk": 64, "num_pages": 3, "page_size": 61},
    ],
    ids=["100000-tokens", "cache-of-44-GB", "page-size-61"],
)
def test_lowers_at_the_ends_of_the_contract(sizes):
    assert num_kernels(lowered(**sizes)) >= 1


def test_lowers_inside_shard_map_and_while_loop():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(q, kv_cache, indices):
        def body(state):
            i, q = state
            out, _ = sparse_attention_sm90(q, kv_cache, indices, sm_scale=SM_SCALE)
            return i + 1, jnp.concatenate([out, out[..., :64]], axis=-1)

        return lax.while_loop(lambda state: state[0] < 3, body, (0, q))[1]

    heads = P(None, "model", None)
    fn = jax.shard_map(step, mesh=mesh, in_specs=(heads, P(), P()), out_specs=heads)
    text = (
        jax.jit(fn)
        .trace(
            jax.ShapeDtypeStruct((4, 16, 576), jnp.bfloat16),
            jax.ShapeDtypeStruct((10, 64, ROW), jnp.uint8),
            jax.ShapeDtypeStruct((4, 64), jnp.int32),
        )
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert num_kernels(text) >= 1


@pytest.mark.parametrize("empty", ["tokens", "topk", "num_pages"])
def test_nothing_to_attend_to_needs_no_kernel(empty):
    sizes = {"tokens": 3, "heads": 8, "topk": 64} | {empty: 0}
    assert num_kernels(lowered(**sizes)) == 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": ((4, 8, 576), "float32")}, NotImplementedError, "q.dtype"),
        ({"q": ((4, 8, 320), "bfloat16")}, NotImplementedError, "q.shape"),
        ({"q": ((4, 576), "bfloat16")}, ValueError, "q.shape"),
        ({"kv_cache": ((10, 64, 576), "bfloat16")}, NotImplementedError, "kv_cache.dtype"),
        ({"kv_cache": ((640, ROW), "uint8")}, ValueError, "kv_cache.shape"),
        ({"topk_indices": ((5, 64), "int32")}, ValueError, "topk_indices.shape"),
        ({"topk_indices": ((4, 64), "uint32")}, ValueError, "topk_indices.dtype"),
        ({"attn_sink": ((16,), "float32")}, ValueError, "attn_sink.shape"),
        ({"topk_lens": ((4, 1), "int32")}, ValueError, "topk_lens.shape"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_says_what_is_wrong_with_an_argument(change, error, words):
    shapes = {
        "q": ((4, 8, 576), "bfloat16"),
        "kv_cache": ((10, 64, ROW), "uint8"),
        "topk_indices": ((4, 64), "int32"),
        **change,
    }
    operands = {name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items()}
    with pytest.raises(error, match=words):
        jax.eval_shape(lambda kw: sparse_attention_sm90(**kw, sm_scale=SM_SCALE), operands)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head_tile": 12}, "head_tile=12"),
        ({"head_tile": 8, "num_splits": 0}, "num_splits=0"),
        ({"head_tile": 8, "num_warpgroups": 3}, "num_warpgroups=3"),
        ({"head_tile": 8, "num_stages": 5}, "num_stages=5"),
        ({"head_tile": 32, "num_stages": 3}, "shared memory"),
        ({"head_tile": 64}, "num_warpgroups=2"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_refuses_an_impossible_config(fields, words):
    with pytest.raises(ValueError, match=words):
        SparseAttentionConfig(**fields)


@pytest.mark.parametrize(
    ("head_tile", "num_bytes"), [(8, 177_824), (16, 192_320), (24, 204_384), (32, 216_448)]
)
def test_shared_memory_adds_up_to_the_documented_budget(head_tile, num_bytes):
    assert SparseAttentionConfig(head_tile).smem_bytes == num_bytes
    table = " ".join(warp_attention_sm90.__doc__.split())
    assert f"{num_bytes:,}" in table


def test_shared_memory_of_64_heads_adds_up_to_the_documented_budget():
    table = " ".join(warpgroup_attention_sm90.__doc__.split())
    assert f"{WIDE.smem_bytes:,}" in table


@pytest.mark.parametrize("heads", [1, 8, 9, 16, 20, 24, 32, 33, 64, 96, 128])
def test_default_config_fits_the_shapes(heads):
    for tokens, topk in itertools.product(
        (1, 2, 8, 33, 74, 132, 133, 321, 2048, 100_000), (1, 64, 576, 2048, 16384)
    ):
        config = default_config(tokens, heads, topk)
        groups = -(-heads // config.head_tile)
        assert config.is_wide == (heads > LARGEST_FEW_HEADS)
        assert groups == -(-heads // 64), "no head group more than the heads need"
        # A split without a single key only costs time.
        assert config.num_splits == 1 or (config.num_splits - 1) * config.tokens_per_round < topk
        if tokens * groups >= 4 * NUM_SMS:
            assert config.num_splits == 1, "enough CTAs without splitting"


@pytest.mark.parametrize(
    ("heads", "tokens", "expected"),
    [
        *(
            (32, 1, (64, 32)),
            (32, 128, (64, 1)),
            (64, 1, (64, 32)),
            (64, 8, (64, 16)),
            (64, 32, (64, 4)),
            (64, 64, (64, 2)),
        ),
        *((64, 128, (64, 1)), (64, 2048, (64, 1)), (128, 64, (64, 1)), (128, 128, (64, 1))),
    ],
)
def test_default_config_of_many_heads_is_the_one_that_measured_best(heads, tokens, expected):
    config = default_config(tokens, heads, 2048)
    assert (config.head_tile, config.num_splits) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 32), (2, 32), (8, 16), (32, 4), (64, 2), (128, 1), (2048, 1)]
)
def test_default_config_is_the_one_that_measured_best(tokens, expected):
    assert default_config(tokens, 8, 2048).num_splits == expected


# -------------------------------------------------------------------------------- on a Hopper GPU


def random_rows(rng, count, *, scales=None):
    """`fp8_ds_mla` rows of finite values; scales are powers of two around 2**-6 unless given."""
    values = (rng.normal(size=(count, 512)) * 60).astype(ml_dtypes.float8_e4m3fn)
    if scales is None:
        scales = np.exp2(rng.integers(-8, -4, (count, 4)))
    rope = rng.normal(size=(count, 64)).astype(ml_dtypes.bfloat16)
    parts = (values, np.asarray(scales, np.float32), rope)
    return np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in parts], axis=1)


def random_queries(rng, tokens, heads, size=1.0):
    return jnp.asarray((rng.normal(size=(tokens, heads, 576)) * size).astype(ml_dtypes.bfloat16))


def run(q, cache, indices, **options):
    """The kernel, twice, on memory that held NaN before: bitwise equal, and every byte written."""
    call = jax.jit(
        lambda q, cache, indices, sink, lens: sparse_attention_sm90(
            q,
            cache,
            indices,
            sm_scale=options.get("sm_scale", SM_SCALE),
            attn_sink=sink,
            topk_lens=lens,
            config=options.get("config"),
        )
    )
    sink, lens = options.get("attn_sink"), options.get("topk_lens")
    arguments = (q, jnp.asarray(cache), jnp.asarray(indices), sink, lens)
    results = []
    for _ in range(2):
        poison = [jnp.full((*q.shape[:2], 512 * 40), jnp.nan, jnp.bfloat16)] if q.size < 1e7 else []
        jax.block_until_ready(poison)
        del poison
        out, lse = jax.block_until_ready(call(*arguments))
        results.append((np.asarray(out), np.asarray(lse)))
    (out, lse), (out_again, lse_again) = results
    np.testing.assert_array_equal(out.view(np.uint16), out_again.view(np.uint16))
    np.testing.assert_array_equal(lse.view(np.uint32), lse_again.view(np.uint32))
    assert out.dtype == ml_dtypes.bfloat16
    assert out.shape == (*q.shape[:2], 512)
    assert lse.shape == q.shape[:2]
    return out, lse


def check(q, cache, indices, *, most_tokens=12, **options):
    """`run`, against the float64 oracle for a sample of the tokens (the last one included)."""
    out, lse = run(q, cache, indices, **options)
    assert np.isfinite(out.astype(np.float32)).all()
    assert not (np.isnan(lse) | np.isposinf(lse)).any()
    tokens = np.unique(np.linspace(0, len(out) - 1, most_tokens).astype(int))
    sink, lens = options.get("attn_sink"), options.get("topk_lens")
    expected = oracle.sparse_attention(
        np.asarray(q[tokens]),
        oracle.cache_rows(cache),
        np.asarray(indices)[tokens],
        sm_scale=options.get("sm_scale", SM_SCALE),
        attn_sink=None if sink is None else np.asarray(sink),
        topk_lens=None if lens is None else np.asarray(lens)[tokens],
    )
    assert_attention_close(out[tokens], lse[tokens], *expected)
    return out, lse


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "batch", "topk", "page_size"),
    MATRIX,
    ids=[f"H{h}-B{b}-K{k}-P{p}" for h, b, k, p in MATRIX],
)
def test_matrix_of_flashmla_s_decoding_tests(heads, batch, topk, page_size):
    """Random -1, sinks, lengths; unused slots and all of page 0 hold NaN bytes."""
    rng = np.random.default_rng([heads, batch, topk, page_size])
    num_pages = -(-6000 // page_size) + 1
    rows = random_rows(rng, num_pages * page_size)
    used = rng.permutation(np.arange(page_size, len(rows)))[: len(rows) // 2]
    unused = np.setdiff1d(np.arange(len(rows)), used)
    rows[unused] = NAN_BYTE
    indices = rng.choice(used, (batch, topk)).astype(np.int32)
    indices[rng.random((batch, topk)) < 0.2] = -1
    lens = rng.integers(0, topk + 1, batch).astype(np.int32)
    lens[-1] = topk
    if batch > 2:
        indices[1], lens[2] = -1, 0
    # What lies beyond a list's length may be anything.
    beyond = np.arange(topk) >= lens[:, None]
    indices[beyond] = rng.choice(unused, beyond.sum())
    cache = rows.reshape(num_pages, page_size, ROW)
    sink = jnp.asarray(rng.normal(size=heads) * 3 + 2, jnp.float32)
    queries = random_queries(rng, batch, heads)
    check(queries, cache, indices, attn_sink=sink, topk_lens=jnp.asarray(lens))


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
@pytest.mark.parametrize("spare_heads", [0, 3])
def test_every_kind_of_config(config, spare_heads):
    rng = np.random.default_rng(1)
    heads = 2 * config.head_tile - spare_heads
    cache = random_rows(rng, 640).reshape(10, 64, ROW)
    indices = rng.integers(-1, 640, (3, 600)).astype(np.int32)
    sink = jnp.asarray(rng.normal(size=heads), jnp.float32)
    check(random_queries(rng, 3, heads), cache, indices, attn_sink=sink, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "config"),
    [
        *((None, None), (None, WIDE), (None, CONFIGS[-2]), (8, None), (16, None), (24, None)),
        *((5, None), (48, WIDE), (8, WIDE)),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "sparse_decode_h64",
        "sparse_decode_h128_sink_invalid",
        "sparse_decode_h64_page61_invalid",
    ],
)
def test_flashmla_s_own_outputs(name, heads, config):
    """All heads, and a slice of them as tensor parallelism leaves it: each head stands alone."""
    data = load_flashmla(name)
    batch, q_len, all_heads, dim = data["q"].shape
    taken = slice(0, all_heads) if heads is None else slice(all_heads - heads, all_heads)
    sink = data.get("attn_sink")
    out, lse = run(
        jnp.asarray(data["q"].reshape(batch * q_len, all_heads, dim)[:, taken]),
        data["kv_cache"],
        data["indices"].reshape(batch * q_len, -1),
        sm_scale=data["sm_scale"],
        attn_sink=None if sink is None else jnp.asarray(sink[taken]),
        config=config,
    )
    expected_out = data["out"].reshape(batch * q_len, all_heads, 512)[:, taken]
    expected_lse = data["lse"].reshape(batch * q_len, all_heads)[:, taken]
    assert_attention_close(out, lse, expected_out, expected_lse)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 32, 64])
@pytest.mark.parametrize("batch", [1, 140])
@pytest.mark.parametrize("how", ["indices", "lens", "negative lens"])
def test_queries_without_a_key(heads, batch, how):
    rng = np.random.default_rng(2)
    cache = np.full((10, 64, ROW), NAN_BYTE, np.uint8)
    indices = np.zeros((batch, 300), np.int32)
    lens = None
    if how == "indices":
        indices[:] = -1
    else:
        lens = jnp.full((batch,), 0 if how == "lens" else -5, jnp.int32)
    sink = jnp.asarray(rng.normal(size=heads), jnp.float32).at[0].set(-jnp.inf)
    q = random_queries(rng, batch, heads)
    out, lse = run(q, cache, indices, attn_sink=sink, topk_lens=lens, config=form(heads))
    assert not np.any(out.astype(np.float32))
    assert np.all(np.isneginf(lse))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, WIDE], ids=["native", "64"])
@pytest.mark.parametrize("batch", [1, 140])
def test_infinite_sinks(batch, config):
    rng = np.random.default_rng(3)
    cache = random_rows(rng, 640).reshape(10, 64, ROW)
    indices = rng.integers(0, 640, (batch, 256)).astype(np.int32)
    q = random_queries(rng, batch, 8)
    plain, plain_lse = run(q, cache, indices, config=config)
    sink = jnp.full((8,), -jnp.inf).at[1].set(jnp.inf).at[2].set(1e30).at[3].set(-1e30)
    out, lse = run(q, cache, indices, attn_sink=sink, config=config)
    np.testing.assert_array_equal(lse, plain_lse)
    closed = [1, 2]
    opened = [0, *range(3, 8)]
    assert not np.any(out[:, closed].astype(np.float32))
    np.testing.assert_array_equal(out[:, opened].view(np.uint16), plain[:, opened].view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 64])
def test_one_valid_key_anywhere_in_the_list(heads):
    rng = np.random.default_rng(4)
    rows = random_rows(rng, 640)
    rows[:320] = NAN_BYTE
    positions = np.array([0, 1, 15, 16, 127, 128, 1000, 2047])
    indices = np.full((len(positions), 2048), -1, np.int32)
    indices[np.arange(len(positions)), positions] = rng.integers(320, 640, len(positions))
    q = random_queries(rng, len(positions), heads)
    check(q, rows.reshape(10, 64, ROW), indices, config=form(heads))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 32, 64])
@pytest.mark.parametrize("batch", [2, 140])
def test_indices_outside_of_the_cache_are_none(heads, batch):
    rng = np.random.default_rng(5)
    cache = random_rows(rng, 640).reshape(10, 64, ROW)
    indices = rng.integers(0, 640, (batch, 320)).astype(np.int32)
    outside = np.array([640, 641, 10**6, 2**31 - 1, -2, -640, -(2**31)], np.int32)
    mask = rng.random(indices.shape) < 0.3
    indices[mask] = rng.choice(outside, mask.sum())
    check(random_queries(rng, batch, heads), cache, indices, config=form(heads))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 24, 64])
@pytest.mark.parametrize(
    ("low", "high", "exact"),
    [(-13, 6, False), (-13, 6, True), (-13, -13, False), (6, 6, False), (-40, -30, True)],
)
def test_token_scales_from_tiny_to_large(heads, low, high, exact):
    """Powers of two and others; the queries shrink with them, so that the softmax stays soft."""
    rng = np.random.default_rng([6, high + 50])
    exponents = rng.uniform(low, high, (640, 4)) if exact else rng.integers(low, high + 1, (640, 4))
    cache = random_rows(rng, 640, scales=np.exp2(exponents)).reshape(10, 64, ROW)
    indices = rng.integers(-1, 640, (3, 900)).astype(np.int32)
    q = np.asarray(random_queries(rng, 3, heads)).astype(np.float32)
    q[..., :512] *= 2.0 ** -(high + 6)
    check(jnp.asarray(q, jnp.bfloat16), cache, indices, config=form(heads))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 64])
@pytest.mark.parametrize("magnitude", [2.0**-100, 2.0**-30, 2.0**12, 2.0**40, 2.0**100])
def test_queries_of_bfloat16_s_range(heads, magnitude):
    """float16 holds neither 2**-30 nor 2**40. sm_scale undoes the magnitude; heads differ."""
    rng = np.random.default_rng(7)
    cache = random_rows(rng, 640).reshape(10, 64, ROW)
    indices = rng.integers(-1, 640, (3, 300)).astype(np.int32)
    q = np.asarray(random_queries(rng, 3, heads)).astype(np.float32)
    q *= magnitude * np.exp2(-np.arange(heads) % 16)[:, None]
    q = jnp.asarray(q, jnp.bfloat16)
    check(q, cache, indices, sm_scale=SM_SCALE / magnitude, config=form(heads))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIGS[0], WIDE], ids=config_id)
@pytest.mark.parametrize("factor", [0.0, 2.0**60, np.inf, np.nan])
def test_what_one_head_s_query_is_does_not_change_the_others(factor, config):
    """64 columns are scaled by the largest one's power of two, if they can be."""
    rng = np.random.default_rng(21)
    cache = random_rows(rng, 640).reshape(10, 64, ROW)
    indices = rng.integers(-1, 640, (2, 200)).astype(np.int32)
    q = random_queries(rng, 2, 8)
    check_without_head_5(q, q.at[:, 5].multiply(factor), cache, indices, config)


def check_without_head_5(q, changed, cache, indices, config, sm_scale=SM_SCALE):
    actual = run(changed, cache, indices, sm_scale=sm_scale, config=config)
    rows = oracle.cache_rows(cache)
    expected = oracle.sparse_attention(np.asarray(q), rows, indices, sm_scale=sm_scale)
    assert_attention_close(*(np.delete(x, 5, axis=1) for x in (*actual, *expected)))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIGS[0], WIDE], ids=config_id)
@pytest.mark.parametrize(
    ("size", "outlier", "sm_scale"),
    [
        *((2.0**-n, 3e38, SM_SCALE) for n in (0, 1, 6, 40)),
        (2.0**-114, 2.0**-84, 2.0**109),
        (2.0**-114, 2.0**-74, 2.0**109),
    ],
)
def test_queries_far_below_another_head_s(size, outlier, sm_scale, config):
    """As far apart as bfloat16 has numbers; weights differ where sm_scale makes up for the size."""
    rng = np.random.default_rng(22)
    cache = random_rows(rng, 640).reshape(10, 64, ROW)
    indices = rng.integers(-1, 640, (2, 200)).astype(np.int32)
    q = (random_queries(rng, 2, 8) * size).astype(jnp.bfloat16)
    check_without_head_5(q, q.at[:, 5].set(outlier), cache, indices, config, sm_scale)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], WIDE, CONFIGS[-2]], ids=config_id)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("score", [1.4 * 2.0**27, 2.0**108])
def test_one_key_of_enormous_score_is_still_a_key(score, sign, config):
    """Nothing that stands for "no key" outdoes -1e32, nor float32's rounding at 2e8."""
    rng = np.random.default_rng(15)
    cache = random_rows(rng, 640).reshape(10, 64, ROW)
    indices = np.full((2, 600), -1, np.int32)
    indices[:, 77] = [5, 400]
    rows = oracle.cache_rows(cache)[indices[:, 77]]
    size = score / (np.abs(rows).sum(1, keepdims=True) * SM_SCALE * np.log2(np.e))
    q = np.repeat((sign * size * np.sign(rows))[:, None], 8, axis=1)
    check(jnp.asarray(q, jnp.bfloat16), cache, indices, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], WIDE, CONFIGS[-2]], ids=config_id)
def test_enormous_scores_whose_difference_float32_hardly_holds(config):
    """Two keys of the same values, 16 apart at 2**25: whatever their weights, the output is one."""
    rng = np.random.default_rng(17)
    rows = random_rows(rng, 640)
    rows[9] = rows[300]
    rope = np.zeros((2, 64), ml_dtypes.bfloat16)
    rope[1, 0] = 16 / (SM_SCALE * np.log2(np.e))
    rows[[9, 300], 528:] = rope.view(np.uint8)
    latents = oracle.fp8_rows(rows[300])[:512]
    q = np.zeros((2, 8, 576))
    q[..., :512] = 2.0**25 / (SM_SCALE * np.log2(np.e)) * np.sign(latents) / np.abs(latents).sum()
    q[..., 512] = 1.0
    indices = np.full((2, 600), -1, np.int32)
    indices[0, [3, 500]] = 9, 300
    indices[1, [3, 500]] = 300, 9
    q = jnp.asarray(q, jnp.bfloat16)
    out, lse = run(q, rows.reshape(10, 64, ROW), indices, config=config)
    expected = np.broadcast_to(latents, out.shape)
    np.testing.assert_allclose(out.astype(np.float32), expected, rtol=2.0**-7)
    scores = np.einsum("thd,d->th", np.asarray(q, np.float64)[..., :512], latents) * SM_SCALE
    np.testing.assert_allclose(lse, scores, rtol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIGS[0], WIDE], ids=config_id)
def test_tokens_without_weight_do_not_cost_the_others_their_bits(config):
    """All weight on tokens of scale 2**-13, beside one of scale 2**6 that nobody attends to."""
    rng = np.random.default_rng(16)
    scales = np.full((640, 4), 2.0**-13)
    scales[7] = 2.0**6
    rows = random_rows(rng, 640, scales=scales)
    q = np.asarray(random_queries(rng, 2, 8)).astype(np.float32) * 2.0**6
    q -= 2.0**-3 * oracle.fp8_rows(rows[7]).astype(np.float32) / 2.0**6
    indices = np.tile(np.arange(640, dtype=np.int32), (2, 1))
    check(jnp.asarray(q, jnp.bfloat16), rows.reshape(10, 64, ROW), indices, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, WIDE], ids=["16", "64"])
@pytest.mark.parametrize("sm_scale", [SM_SCALE, 2.0**-40])
def test_a_query_of_zeros_averages(sm_scale, config):
    rng = np.random.default_rng(8)
    cache = random_rows(rng, 640).reshape(10, 64, ROW)
    indices = rng.integers(-1, 640, (3, 300)).astype(np.int32)
    q = random_queries(rng, 3, 16).at[:, 5].set(0).at[2].set(0)
    check(q, cache, indices, config=config, sm_scale=sm_scale)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], WIDE, CONFIGS[-2]], ids=config_id)
def test_growing_scores_rescale_what_was_accumulated(config):
    """Keys sorted by score, upwards and downwards: the running maximum moves at every tile."""
    rng = np.random.default_rng(9)
    rows = random_rows(rng, 2048)
    q = random_queries(rng, 2, 8, size=3.0)
    scores = np.asarray(q[0, 0]).astype(np.float64) @ oracle.fp8_rows(rows).T
    indices = np.stack([np.argsort(scores), np.argsort(-scores)]).astype(np.int32)
    check(q, rows.reshape(32, 64, ROW), indices, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, WIDE], ids=["8", "64"])
def test_cache_beyond_two_gigabytes(config):
    rng = np.random.default_rng(10)
    num_pages = 2**31 // (64 * ROW) + 500
    first = 2**31 // ROW - 100
    rows = random_rows(rng, 2000)
    cache = jnp.full((num_pages, 64, ROW), NAN_BYTE, jnp.uint8)
    write = jax.jit(
        lambda cache, rows: lax.dynamic_update_slice(
            cache.reshape(-1, ROW), rows, (first, 0)
        ).reshape(cache.shape),
        donate_argnums=0,
    )
    cache = write(cache, jnp.asarray(rows))
    local = rng.integers(0, 2000, (4, 512)).astype(np.int32)
    q = random_queries(rng, 4, 8)
    out, lse = run(q, cache, local + first, config=config)
    expected = oracle.sparse_attention(q, oracle.cache_rows(rows), local, sm_scale=SM_SCALE)
    assert_attention_close(out, lse, *expected)


@pytest.mark.gpu
def test_a_hundred_thousand_tokens():
    rng = np.random.default_rng(11)
    cache = random_rows(rng, 640).reshape(10, 64, ROW)
    indices = rng.integers(-1, 640, (100_000, 20)).astype(np.int32)
    q = jax.random.normal(jax.random.key(0), (100_000, 8, 576), jnp.bfloat16)
    check(q, cache, indices)


@pytest.mark.gpu
def test_inside_while_loop_and_shard_map():
    rng = np.random.default_rng(12)
    cache = jnp.asarray(random_rows(rng, 640).reshape(10, 64, ROW))
    indices = jnp.asarray(rng.integers(-1, 640, (4, 300)).astype(np.int32))
    q = random_queries(rng, 4, 8)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(q):
        out, lse = sparse_attention_sm90(q, cache, indices, sm_scale=SM_SCALE)
        return jnp.concatenate([out, q[..., 512:]], axis=-1), lse

    def looped(q):
        return lax.fori_loop(0, 3, lambda _, state: step(state[0]), step(q))

    heads = P(None, "model", None)
    sharded = jax.shard_map(
        looped, mesh=mesh, in_specs=heads, out_specs=(heads, P(None, "model")), check_vma=False
    )
    expected = q
    for _ in range(4):
        expected, lse = jax.jit(step)(expected)
    out, looped_lse = jax.jit(sharded)(q)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(looped_lse), np.asarray(lse))
