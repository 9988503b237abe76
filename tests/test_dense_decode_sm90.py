"""The dense decode kernel: lowers everywhere, and is right on a Hopper GPU."""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from mla_jax.cache import quantize
from pallas_kernels import DenseDecodeConfig, dense_decode_sm90, warp_attention_sm90
from pallas_kernels.dense_decode_sm90 import default_config
from tests import oracle
from tests.helpers import assert_attention_close, load_flashmla

SM_SCALE = 192**-0.5
NAN_BYTE = 0xFF  # NaN as e4m3, and in every float32 and bfloat16 made of it
FORMATS = ("fp8_ds_mla", "bfloat16")
# What a row of the cache is, and its bytes.
ROWS = {"fp8_ds_mla": (656, jnp.uint8, 656), "bfloat16": (576, jnp.bfloat16, 1152)}
ROW = 656

# Lengths of a batch: every remainder of a tile and a page, none at all, fewer than drafts, far
# apart from each other.
LENGTHS = {
    "short": (5, 0, 1, 64, 17, 128, 2, 0),
    "uneven": (0, 9000, 1, 130, 0, 3000, 64, 777, 15, 16, 33),
    "equal": (700,) * 9,
    "many": tuple(range(0, 600, 4)),
    "long": (20_000,),
}
PAGE_SIZES = (64, 16, 128, 2, 61, 48)
MATRIX = [
    (heads, q_len, tuple(LENGTHS)[(i + 2 * j) % 5], PAGE_SIZES[(2 * i + j) % 6])
    for i, heads in enumerate((1, 8, 16, 24, 32, 33, 64, 128))
    for j, q_len in enumerate((1, 2, 8))
]
CONFIGS = [
    DenseDecodeConfig(head_tile, num_ctas, num_warpgroups, num_stages, segment_cost)
    for head_tile, num_ctas, num_warpgroups, num_stages, segment_cost in (
        *((8, 132, 2, 2, 1), (8, 264, 1, 2, 2), (8, 1, 2, 1, 1), (8, 7, 1, 4, 0)),
        *((16, 132, 2, 2, 0), (16, 3, 1, 3, 16), (24, 40, 2, 2, 1), (24, 264, 1, 2, 1)),
        *((32, 66, 2, 1, 1), (32, 5, 1, 3, 1)),
        *((64, 132, 3, 3, 2), (64, 1, 3, 3, 0), (64, 7, 3, 3, 1), (64, 40, 3, 3, 16)),
    )
]
CONFIGS += [
    DenseDecodeConfig(
        head_tile, num_ctas, num_warpgroups, num_stages, segment_cost, kv_cache_format="bfloat16"
    )
    for head_tile, num_ctas, num_warpgroups, num_stages, segment_cost in (
        *((8, 132, 2, 1, 1), (8, 264, 1, 1, 2), (8, 1, 2, 1, 1), (8, 7, 1, 2, 0)),
        *((16, 132, 2, 1, 0), (16, 3, 1, 2, 16), (24, 40, 2, 1, 1), (24, 132, 1, 2, 1)),
        *((32, 66, 2, 1, 1), (32, 5, 1, 2, 1)),
    )
]


def config_id(config):
    return (
        f"{config.kv_cache_format}-h{config.head_tile}-c{config.num_ctas}-w{config.num_warpgroups}"
        f"-d{config.num_stages}-f{config.segment_cost}"
    )


# ------------------------------------------------------------------------------- without a GPU


def lowered(
    batch,
    heads,
    pages,
    *,
    q_len=1,
    page_size=64,
    num_pages=100,
    sink=True,
    config=None,
    kv_cache_format="fp8_ds_mla",
):
    """The StableHLO for CUDA, made without one."""
    shape = jax.ShapeDtypeStruct
    row, dtype, _ = ROWS[kv_cache_format]
    operands = {
        "q": shape((batch, q_len, heads, 576), jnp.bfloat16),
        "kv_cache": shape((num_pages, page_size, row), dtype),
        "page_indices": shape((batch, pages), jnp.int32),
        "kv_lens": shape((batch,), jnp.int32),
    }
    if sink:
        operands["attn_sink"] = shape((heads,), jnp.float32)
    fn = jax.jit(lambda kw: dense_decode_sm90(**kw, sm_scale=SM_SCALE, config=config))
    return fn.trace(operands).lower(lowering_platforms=("cuda",)).as_text()


def num_kernels(text):
    return len(re.findall(r"custom_call @mosaic_gpu", text))


@pytest.mark.parametrize("heads", [1, 8, 12, 16, 24, 32, 128])
@pytest.mark.parametrize("q_len", [1, 2])
@pytest.mark.parametrize("kv_cache_format", FORMATS)
def test_lowers_for_every_head_tile(heads, q_len, kv_cache_format):
    assert num_kernels(lowered(5, heads, 40, q_len=q_len, kv_cache_format=kv_cache_format)) == 2


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_lowers_for_every_kind_of_config(config):
    options = {"config": config, "kv_cache_format": config.kv_cache_format}
    assert num_kernels(lowered(3, config.head_tile, 40, sink=False, **options)) == 2


@pytest.mark.parametrize("page_size", [1, 2, 16, 24, 61, 64, 256])
def test_lowers_for_any_page_size(page_size):
    assert num_kernels(lowered(4, 8, 40, page_size=page_size)) == 2


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 8192, "heads": 16, "pages": 2048},
        {"batch": 1, "heads": 8, "pages": 2048, "num_pages": 2**20},
        {"batch": 2, "heads": 128, "pages": 64, "q_len": 8},
    ],
    ids=["8192-sequences", "cache-of-2**26-rows", "1024-columns"],
)
@pytest.mark.parametrize("kv_cache_format", FORMATS)
def test_lowers_at_the_ends_of_the_contract(sizes, kv_cache_format):
    assert num_kernels(lowered(**sizes, kv_cache_format=kv_cache_format)) == 2


def test_lowers_inside_shard_map_and_while_loop():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(q, kv_cache, page_indices, kv_lens):
        def body(state):
            i, q = state
            out, _ = dense_decode_sm90(q, kv_cache, page_indices, kv_lens + i, sm_scale=SM_SCALE)
            return i + 1, jnp.concatenate([out, out[..., :64]], axis=-1)

        return lax.while_loop(lambda state: state[0] < 3, body, (0, q))[1]

    heads = P(None, None, "model", None)
    fn = jax.shard_map(step, mesh=mesh, in_specs=(heads, P(), P(), P()), out_specs=heads)
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((4, 1, 16, 576), jnp.bfloat16),
        shape((10, 64, ROW), jnp.uint8),
        shape((4, 3), jnp.int32),
        shape((4,), jnp.int32),
    )
    text = jax.jit(fn).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert num_kernels(text) >= 2


@pytest.mark.parametrize("empty", ["batch", "q_len", "pages", "num_pages"])
def test_nothing_to_attend_to_needs_no_kernel(empty):
    sizes: dict[str, Any] = {"batch": 3, "heads": 8, "pages": 5} | {empty: 0}
    assert num_kernels(lowered(**sizes)) == 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": ((4, 1, 8, 576), "float32")}, NotImplementedError, "q.dtype"),
        ({"q": ((4, 1, 8, 320), "bfloat16")}, NotImplementedError, "q.shape"),
        ({"q": ((4, 8, 576), "bfloat16")}, ValueError, "q.shape"),
        ({"kv_cache": ((10, 64, 576), "float32")}, NotImplementedError, "kv_cache.dtype"),
        ({"kv_cache": ((10, 64, 640), "bfloat16")}, NotImplementedError, "kv_cache.shape"),
        ({"kv_cache": ((640, ROW), "uint8")}, ValueError, "kv_cache.shape"),
        ({"page_indices": ((5, 3), "int32")}, ValueError, "page_indices.shape"),
        ({"page_indices": ((4, 3), "uint32")}, ValueError, "page_indices.dtype"),
        ({"kv_lens": ((5,), "int32")}, ValueError, "kv_lens.shape"),
        ({"kv_lens": ((4,), "uint32")}, ValueError, "kv_lens.dtype"),
        ({"attn_sink": ((16,), "float32")}, ValueError, "attn_sink.shape"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_says_what_is_wrong_with_an_argument(change, error, words):
    shapes = {
        "q": ((4, 1, 8, 576), "bfloat16"),
        "kv_cache": ((10, 64, ROW), "uint8"),
        "page_indices": ((4, 3), "int32"),
        "kv_lens": ((4,), "int32"),
        **change,
    }
    operands = {name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items()}
    with pytest.raises(error, match=words):
        jax.eval_shape(lambda kw: dense_decode_sm90(**kw, sm_scale=SM_SCALE), operands)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head_tile": 12}, "head_tile=12"),
        ({"head_tile": 8, "num_ctas": 0}, "num_ctas=0"),
        ({"head_tile": 8, "num_ctas": 100_000}, "num_ctas=100000"),
        ({"head_tile": 8, "num_warpgroups": 3}, "num_warpgroups=3"),
        ({"head_tile": 8, "num_stages": 5}, "num_stages=5"),
        ({"head_tile": 8, "segment_cost": -1}, "segment_cost=-1"),
        ({"head_tile": 32, "num_stages": 3}, "shared memory"),
        ({"head_tile": 64}, "num_warpgroups=2"),
        ({"head_tile": 8, "kv_cache_format": "float32"}, "kv_cache_format='float32'"),
        ({"head_tile": 8, "kv_cache_format": "bfloat16"}, "shared memory"),
        ({"head_tile": 64, "kv_cache_format": "bfloat16"}, "head_tile=64 takes fp8_ds_mla"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_refuses_an_impossible_config(fields, words):
    with pytest.raises(ValueError, match=words):
        DenseDecodeConfig(**fields)


@pytest.mark.parametrize("kv_cache_format", FORMATS)
def test_a_config_is_for_rows_of_one_format(kv_cache_format):
    (other,) = set(FORMATS) - {kv_cache_format}
    config = DenseDecodeConfig(8, num_stages=1, kv_cache_format=other)
    with pytest.raises(ValueError, match=f"config.kv_cache_format='{other}'.*{kv_cache_format}"):
        lowered(3, 8, 40, config=config, kv_cache_format=kv_cache_format)


@pytest.mark.parametrize(
    ("head_tile", "num_bytes"), [(8, 159_296), (16, 177_856), (24, 191_936), (32, 206_016)]
)
def test_shared_memory_of_bfloat16_rows_adds_up_to_the_documented_budget(head_tile, num_bytes):
    config = default_config(128, head_tile, 4096, "bfloat16")
    assert (config.head_tile, config.smem_bytes) == (head_tile, num_bytes)
    assert f"{num_bytes:,}" in " ".join(warp_attention_sm90.__doc__.split())


@pytest.mark.parametrize(
    ("columns", "batch", "capacity", "expected"),
    [
        (16, 8, 2048, (16, 132, 1, 3)),
        (16, 32, 4096, (16, 132, 1, 3)),
        (16, 64, 4096, (16, 132, 2, 2)),
        (8, 128, 4096, (8, 132, 2, 2)),
        (32, 32, 4096, (32, 132, 2, 2)),
        (64, 128, 4096, (64, 132, 3, 3)),
        (256, 128, 4096, (64, 33, 3, 3)),
    ],
)
def test_default_config_is_the_one_that_measured_best(columns, batch, capacity, expected):
    config = default_config(batch, columns, capacity)
    fields = config.head_tile, config.num_ctas, config.num_warpgroups, config.num_stages
    assert fields == expected


@pytest.mark.parametrize("columns", [1, 8, 9, 16, 20, 32, 33, 64, 256, 1024])
@pytest.mark.parametrize("kv_cache_format", FORMATS)
def test_default_config_fits_the_shapes(columns, kv_cache_format):
    largest = 32 if columns <= 32 or kv_cache_format == "bfloat16" else 64
    for batch, capacity in itertools.product((1, 2, 128, 5000), (1, 64, 4096, 131_072)):
        config = default_config(batch, columns, capacity, kv_cache_format)
        assert config.kv_cache_format == kv_cache_format
        groups = -(-columns // config.head_tile)
        assert groups == -(-columns // largest), "no group too many"
        assert groups * config.num_ctas <= max(132, groups), "one wave"
        keys = config.tiling.tokens_per_round
        assert config.num_ctas <= batch * -(-capacity // keys), "no CTA without any work"


# -------------------------------------------------------------------------------- on a Hopper GPU


def random_rows(rng, count, kv_cache_format="fp8_ds_mla"):
    """Bytes of rows of finite values; in `fp8_ds_mla`, scales are powers of two around 2**-6."""
    if kv_cache_format == "bfloat16":
        values = rng.normal(size=(count, 576)) * np.exp2(rng.integers(-2, 2, (count, 1)))
        return values.astype(ml_dtypes.bfloat16).view(np.uint8)
    values = (rng.normal(size=(count, 512)) * 60).astype(ml_dtypes.float8_e4m3fn)
    scales = np.exp2(rng.integers(-8, -4, (count, 4))).astype(np.float32)
    rope = rng.normal(size=(count, 64)).astype(ml_dtypes.bfloat16)
    parts = (values, scales, rope)
    return np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in parts], axis=1)


def random_queries(rng, *shape):
    return jnp.asarray(rng.normal(size=(*shape, 576)).astype(ml_dtypes.bfloat16))


def random_pages(rng, lengths, page_size, *, spare_pages=3, kv_cache_format="fp8_ds_mla"):
    """A cache with shuffled pages and a table; whatever no sequence uses is NaN, -1 or junk."""
    counts = [-(-length // page_size) for length in lengths]
    num_pages = sum(counts) + 5
    order = iter(rng.permutation(num_pages))
    table = rng.choice([-1, 2**31 - 1, num_pages, 0], (len(lengths), max(counts) + spare_pages))
    _, dtype, row_bytes = ROWS[kv_cache_format]
    cache = np.full((num_pages, page_size, row_bytes), NAN_BYTE, np.uint8)
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[b, :count] = list(itertools.islice(order, count))
        rows = np.full((count * page_size, row_bytes), NAN_BYTE, np.uint8)
        rows[:length] = random_rows(rng, length, kv_cache_format)
        cache[table[b, :count]] = rows.reshape(count, page_size, row_bytes)
    return cache.view(dtype), table.astype(np.int32)


def run(q, cache, table, lens, **options):
    """The kernel, twice, on memory that held NaN before: bitwise equal, and every byte written."""
    call = jax.jit(
        lambda q, cache, table, lens, sink: dense_decode_sm90(
            q,
            cache,
            table,
            lens,
            sm_scale=options.get("sm_scale", SM_SCALE),
            attn_sink=sink,
            config=options.get("config"),
        )
    )
    arrays = (jnp.asarray(x) for x in (cache, table, lens))
    arguments = (q, *arrays, options.get("attn_sink"))
    results = []
    for _ in range(2):
        poison = [jnp.full((*q.shape[:3], 512 * 40), jnp.nan, jnp.bfloat16) for _ in range(2)]
        poison.append(jnp.full((2**24,), jnp.nan, jnp.float32))
        jax.block_until_ready(poison)
        del poison
        out, lse = jax.block_until_ready(call(*arguments))
        results.append((np.asarray(out), np.asarray(lse)))
    (out, lse), (out_again, lse_again) = results
    np.testing.assert_array_equal(out.view(np.uint16), out_again.view(np.uint16))
    np.testing.assert_array_equal(lse.view(np.uint32), lse_again.view(np.uint32))
    assert out.dtype == ml_dtypes.bfloat16
    assert out.shape == (*q.shape[:3], 512)
    assert lse.shape == q.shape[:3]
    return out, lse


def check(q, cache, table, lens, *, most=8, **options):
    """`run`, against the float64 oracle for a sample of the sequences."""
    out, lse = run(q, cache, table, np.asarray(lens, np.int32), **options)
    assert np.isfinite(out.astype(np.float32)).all()
    assert not (np.isnan(lse) | np.isposinf(lse)).any()
    sample = np.unique(np.linspace(0, len(out) - 1, most).astype(int))
    sink = options.get("attn_sink")
    for b in sample:
        rows = oracle.cache_rows(oracle.sequence_rows(cache, table[b], int(lens[b])))
        expected = oracle.ragged_attention(
            np.asarray(q[b]),
            np.append(rows, np.zeros((1, 576)), axis=0)[None],  # one page, never empty
            np.zeros((1, 1), int),
            [len(rows)],
            [0, q.shape[1]],
            sm_scale=options.get("sm_scale", SM_SCALE),
            attn_sink=None if sink is None else np.asarray(sink),
        )
        assert_attention_close(out[b], lse[b], *expected)
    return out, lse


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "q_len", "lengths", "page_size"),
    MATRIX,
    ids=[f"H{h}-Q{q}-{lengths}-P{p}" for h, q, lengths, p in MATRIX],
)
@pytest.mark.parametrize("kv_cache_format", FORMATS)
def test_matrix(heads, q_len, lengths, page_size, kv_cache_format):
    rng = np.random.default_rng([heads, q_len, page_size])
    lens = LENGTHS[lengths]
    cache, table = random_pages(rng, lens, page_size, kv_cache_format=kv_cache_format)
    sink = jnp.asarray(rng.normal(size=heads) * 3 + 2, jnp.float32)
    check(random_queries(rng, len(lens), q_len, heads), cache, table, lens, attn_sink=sink)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_every_page_size_with_all_lengths(lengths, page_size):
    rng = np.random.default_rng(1)
    lens = LENGTHS[lengths]
    cache, table = random_pages(rng, lens, page_size)
    check(random_queries(rng, len(lens), 1, 8), cache, table, lens, most=12)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_every_page_size_with_bfloat16_rows(page_size):
    rng = np.random.default_rng(1)
    lens = LENGTHS["uneven"]
    cache, table = random_pages(rng, lens, page_size, kv_cache_format="bfloat16")
    check(random_queries(rng, len(lens), 1, 8), cache, table, lens, most=12)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
@pytest.mark.parametrize("spare_heads", [0, 3])
def test_every_kind_of_config(config, spare_heads):
    rng = np.random.default_rng(2)
    heads = 2 * config.head_tile - spare_heads
    lens = (*LENGTHS["uneven"], *LENGTHS["equal"])
    cache, table = random_pages(rng, lens, 64, kv_cache_format=config.kv_cache_format)
    sink = jnp.asarray(rng.normal(size=heads), jnp.float32)
    check(
        random_queries(rng, len(lens), 1, heads),
        cache,
        table,
        lens,
        attn_sink=sink,
        config=config,
        most=20,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [131, 132, 133, 400])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("kv_cache_format", FORMATS)
def test_batches_around_the_number_of_sms(batch, equal, kv_cache_format):
    rng = np.random.default_rng(3)
    lens = np.full(batch, 300) if equal else rng.integers(0, 600, batch)
    lens[-1] = 1500 if not equal else 300
    cache, table = random_pages(rng, lens, 64, kv_cache_format=kv_cache_format)
    check(random_queries(rng, batch, 1, 16), cache, table, lens)


@pytest.mark.gpu
def test_thousands_of_sequences():
    """More than a warp's lanes can look at in one step, twice over."""
    rng = np.random.default_rng(4)
    lens = rng.integers(0, 40, 3000)
    lens[rng.integers(0, 3000, 20)] = 2000
    cache, table = random_pages(rng, lens, 16)
    check(random_queries(rng, 3000, 1, 8), cache, table, lens, most=100)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 64])
@pytest.mark.parametrize("kv_cache_format", FORMATS)
def test_the_longest_context(heads, kv_cache_format):
    rng = np.random.default_rng(5)
    lens = (131_072, 0, 1)
    cache, table = random_pages(rng, lens, 64, kv_cache_format=kv_cache_format)
    check(random_queries(rng, 3, 1, heads), cache, table, lens)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 32, 64])
@pytest.mark.parametrize("batch", [1, 140])
@pytest.mark.parametrize("length", [0, -5])
@pytest.mark.parametrize("kv_cache_format", FORMATS)
def test_sequences_without_a_key(heads, batch, length, kv_cache_format):
    rng = np.random.default_rng(6)
    _, dtype, row_bytes = ROWS[kv_cache_format]
    cache = np.full((10, 64, row_bytes), NAN_BYTE, np.uint8).view(dtype)
    table = np.zeros((batch, 20), np.int32)
    sink = jnp.asarray(rng.normal(size=heads), jnp.float32).at[0].set(-jnp.inf)
    lens = np.full(batch, length, np.int32)
    out, lse = run(random_queries(rng, batch, 2, heads), cache, table, lens, attn_sink=sink)
    assert not np.any(out.astype(np.float32))
    assert np.all(np.isneginf(lse))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [64, 4])
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("heads", [8, 64])
@pytest.mark.parametrize("kv_cache_format", FORMATS)
def test_keys_of_pages_outside_of_the_cache_are_skipped(heads, page_size, q_len, kv_cache_format):
    rng = np.random.default_rng(7)
    lens = (1000, 2000, 300)
    cache, table = random_pages(rng, lens, page_size, kv_cache_format=kv_cache_format)
    gone = rng.random(table.shape) < 0.3
    gone[:, -8:] = False
    gone[2, : -(-300 // page_size)] = True
    table[gone] = rng.choice([-1, 10**6, -(2**31)], gone.sum())
    q = random_queries(rng, 3, q_len, heads)
    out, lse = run(q, cache, table, np.asarray(lens, np.int32))
    for b, j in itertools.product(range(3), range(q_len)):
        keys = np.arange(lens[b] - q_len + 1 + j)
        keys = keys[~gone[b, keys // page_size]]
        rows = oracle.cache_rows(cache[table[b, keys // page_size], keys % page_size])
        expected = oracle.attend(np.asarray(q[b, j]), rows, SM_SCALE)
        assert_attention_close(out[b, j], lse[b, j], *expected)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [10**6, 2**31 - 1])
@pytest.mark.parametrize("heads", [8, 64])
@pytest.mark.parametrize("kv_cache_format", FORMATS)
def test_keys_beyond_the_page_table_are_skipped(heads, length, kv_cache_format):
    rng = np.random.default_rng(8)
    options = {"spare_pages": 0, "kv_cache_format": kv_cache_format}
    cache, table = random_pages(rng, (640, 640), 64, **options)
    q = random_queries(rng, 2, 2, heads)
    out, lse = run(q, cache, table, np.asarray([length, 640], np.int32))
    rows = oracle.cache_rows(oracle.sequence_rows(cache, table[0], 640))
    for j in range(2):
        assert_attention_close(out[0, j], lse[0, j], *oracle.attend(q[0, j], rows, SM_SCALE))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense_decode_h16_causal", "dense_decode_h128"])
def test_flashmla_s_dense_tests_over_a_quantized_cache(name):
    data = load_flashmla(name)
    latents = jnp.asarray(data["kv_cache"])
    cache = np.asarray(quantize(latents[..., :512], latents[..., 512:]))
    check(
        jnp.asarray(data["q"]),
        cache,
        data["block_table"],
        data["cache_seqlens"],
        sm_scale=data["sm_scale"],
    )


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 32])
def test_one_bfloat16_key_outweighs_all_others(heads):
    """The running maximum lags behind, and grows in steps: weights are not 1 then."""
    rng = np.random.default_rng(10)
    cache, table = random_pages(rng, (2000, 700), 64, kv_cache_format="bfloat16")
    q = random_queries(rng, 2, 1, heads)
    # Keys along a head's query: scores grow by a few powers of two over the sequence.
    for b, length in enumerate((2000, 700)):
        keys = np.arange(0, length, 50)
        rows = (
            np.asarray(q[b, 0, keys % heads], np.float32) * np.linspace(0, 1.5, len(keys))[:, None]
        )
        cache[table[b, keys // 64], keys % 64] = rows.astype(ml_dtypes.bfloat16)
    check(q, cache, table, (2000, 700))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache_format", FORMATS)
def test_inside_while_loop_and_shard_map(kv_cache_format):
    rng = np.random.default_rng(9)
    pages = random_pages(rng, (2000, 90, 640, 4), 64, kv_cache_format=kv_cache_format)
    cache, table = map(jnp.asarray, pages)
    lens = jnp.asarray([1990, 80, 630, 1], jnp.int32)
    q = random_queries(rng, 4, 1, 8)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(i, q):
        out, lse = dense_decode_sm90(q, cache, table, lens + i, sm_scale=SM_SCALE)
        return jnp.concatenate([out, q[..., 512:]], axis=-1), lse

    def looped(q):
        return lax.fori_loop(1, 4, lambda i, state: step(i, state[0]), step(0, q))

    heads = P(None, None, "model", None)
    out_specs = (heads, P(None, None, "model"))
    sharded = jax.shard_map(looped, mesh=mesh, in_specs=heads, out_specs=out_specs, check_vma=False)
    expected, lse = q, None
    for i in range(4):
        expected, lse = jax.jit(step)(i, expected)
    out, looped_lse = jax.jit(sharded)(q)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(looped_lse), np.asarray(lse))
