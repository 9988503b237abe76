"""The quantizing cache write: lowers everywhere, bit-identical to the reference on a GPU."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from pallas_kernels import cache_write_sm90
from tests import oracle
from tests.helpers import load_flashmla

ROW = 656
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def lowered(fn, *operands):
    return jax.jit(fn, donate_argnums=0).trace(*operands).lower(lowering_platforms=("cuda",))


def operands(tokens, dtype=jnp.bfloat16, pages=10):
    shape = jax.ShapeDtypeStruct
    return (
        shape((pages, 64, ROW), jnp.uint8),
        shape((tokens, 512), dtype),
        shape((tokens, 64), dtype),
        shape((tokens,), jnp.int32),
    )


@pytest.mark.parametrize("scale_format", ["power_of_two", "exact"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 8192])
def test_lowers_to_one_launch_that_aliases_the_cache(tokens, dtype, scale_format):
    text = lowered(
        lambda *args: cache_write_sm90(*args, scale_format=scale_format), *operands(tokens, dtype)
    ).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 1
    (alias,) = re.findall(r"output_operand_alias<[^>]*>", text)
    assert "operand_index = 0" in alias


def test_lowers_in_a_donated_loop():
    def loop(cache, kv_c, k_pe, slots):
        return lax.fori_loop(
            0, 3, lambda i, cache: cache_write_sm90(cache, kv_c, k_pe, slots + i), cache
        )

    assert "mosaic_gpu" in lowered(loop, *operands(5)).as_text()


@pytest.mark.parametrize(
    ("index", "spec", "error", "words"),
    [
        (0, ((10, 64, 576), "bfloat16"), NotImplementedError, "kv_cache"),
        (0, ((10, 64, 576), "uint8"), ValueError, "kv_cache.shape"),
        (1, ((5, 256), "bfloat16"), NotImplementedError, "kv_c.shape"),
        (1, ((6, 512), "bfloat16"), ValueError, "kv_c.shape"),
        (2, ((5, 64), "float16"), NotImplementedError, "k_pe.dtype"),
        (3, ((5,), "uint8"), ValueError, "slots.dtype"),
        (3, ((5, 1), "int32"), ValueError, "slots.shape"),
    ],
)
def test_says_what_is_wrong_with_an_argument(index, spec, error, words):
    arguments = list(operands(5))
    arguments[index] = jax.ShapeDtypeStruct(*spec)
    with pytest.raises(error, match=words):
        jax.eval_shape(cache_write_sm90, *arguments)


def test_refuses_an_unknown_scale_format():
    with pytest.raises(ValueError, match="scale_format='fast'"):
        jax.eval_shape(lambda *a: cache_write_sm90(*a, scale_format="fast"), *operands(5))


def test_nothing_to_write_launches_nothing():
    assert "mosaic_gpu" not in lowered(cache_write_sm90, *operands(0)).as_text()


# -------------------------------------------------------------------------------- on a Hopper GPU


def quantized(kv_c, k_pe, scale_format="power_of_two"):
    """The rows in NumPy, by the definition."""
    tiles = np.asarray(kv_c, np.float32).reshape(-1, 4, 128)
    amax = np.abs(tiles).max(axis=-1)
    if scale_format == "power_of_two":
        significand, exponent = np.frexp(np.maximum(amax.astype(np.float64) / 448, 1e-4))
        scales = np.ldexp(1.0, exponent - (significand == 0.5)).astype(np.float32)
    else:
        scales = np.maximum(amax / np.float32(448), np.float32(2.0**-126))
    values = (tiles / scales[..., None]).astype(ml_dtypes.float8_e4m3fn).reshape(-1, 512)
    parts = (values, scales, np.asarray(k_pe).astype(ml_dtypes.bfloat16))
    return np.concatenate([np.ascontiguousarray(x).view(np.uint8) for x in parts], axis=1)


def random_latents(rng, tokens, dtype):
    """Tiles of very different sizes: zeros, exact powers of two times 448 and their neighbours."""
    tiles = rng.normal(size=(tokens, 4, 128)) * np.exp2(rng.uniform(-30, 20, (tokens, 4, 1)))
    tiles[::5, 0] = 0
    edge = 448 * np.exp2(rng.integers(-14, 10, tokens))
    tiles[:, 1] = np.clip(tiles[:, 1], -edge[:, None], edge[:, None])
    tiles[:, 1, 7] = edge * rng.choice([1, 1 - 2.0**-8, 1 + 2.0**-7, -1], tokens)
    kv_c = jnp.asarray(tiles.reshape(tokens, 512), dtype)
    return kv_c, jnp.asarray(rng.normal(size=(tokens, 64)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("scale_format", ["power_of_two", "exact"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 128, 8192])
def test_writes_the_reference_s_bytes_and_no_others(tokens, dtype, scale_format):
    rng = np.random.default_rng([tokens, scale_format == "exact"])
    kv_c, k_pe = random_latents(rng, tokens, dtype)
    pages, page_size = 200, 61
    num_slots = pages * page_size
    slots = rng.permutation(num_slots)[:tokens].astype(np.int32)
    outside = np.array([-1, -2, num_slots, num_slots + 1, 2**31 - 1, -(2**31)], np.int32)
    skipped = rng.random(tokens) < 0.2 * (tokens > 1)
    slots[skipped] = rng.choice(outside, skipped.sum())
    before = rng.integers(0, 256, (num_slots, ROW), np.uint8)
    expected = before.copy()
    expected[slots[~skipped]] = quantized(kv_c, k_pe, scale_format)[~skipped]

    write = jax.jit(
        lambda *args: cache_write_sm90(*args, scale_format=scale_format), donate_argnums=0
    )
    cache = jnp.asarray(before.reshape(pages, page_size, ROW))
    address = cache.unsafe_buffer_pointer()
    after = write(cache, kv_c, k_pe, jnp.asarray(slots))
    assert after.unsafe_buffer_pointer() == address, "the donated cache was copied"
    np.testing.assert_array_equal(np.asarray(after).reshape(num_slots, ROW), expected)


@pytest.mark.gpu
def test_keeps_a_cache_that_was_not_donated():
    rng = np.random.default_rng(0)
    kv_c, k_pe = random_latents(rng, 3, jnp.bfloat16)
    cache = jnp.full((2, 64, ROW), 7, jnp.uint8)
    after = cache_write_sm90(cache, kv_c, k_pe, jnp.array([5, -1, 64], jnp.int32))
    assert np.all(np.asarray(cache) == 7)
    changed = np.flatnonzero(np.any(np.asarray(after).reshape(128, ROW) != 7, axis=1))
    np.testing.assert_array_equal(changed, [5, 64])


@pytest.mark.gpu
def test_the_compiled_loop_holds_one_cache():
    """In a donated `fori_loop`: one kernel, no copy of anything as large as the cache."""

    def loop(cache, kv_c, k_pe, slots):
        return lax.fori_loop(
            0, 3, lambda i, cache: cache_write_sm90(cache, kv_c, k_pe, slots + i), cache
        )

    kv_c, k_pe = random_latents(np.random.default_rng(0), 5, jnp.bfloat16)
    cache = jnp.zeros((1000, 64, ROW), jnp.uint8)
    slots = jnp.arange(5, dtype=jnp.int32) * 100
    compiled = jax.jit(loop, donate_argnums=0).lower(cache, kv_c, k_pe, slots).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.nbytes // 10
    assert not re.search(r"= u8\[1000,64,656\]\S* copy\(", compiled.as_text())
    after = np.asarray(compiled(cache, kv_c, k_pe, slots)).reshape(-1, ROW)
    written = np.flatnonzero(after.any(axis=1))
    np.testing.assert_array_equal(written, [s + i for s in range(0, 500, 100) for i in range(3)])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sparse_decode_h64", "sparse_decode_h64_page61_invalid"])
def test_writes_flashmla_s_cache_bit_for_bit(name):
    data = load_flashmla(name)
    latents = jnp.asarray(data["kv_unquantized"].reshape(-1, 576))
    expected = data["kv_cache"]
    slots = jnp.arange(len(latents), dtype=jnp.int32)
    after = jax.jit(cache_write_sm90)(
        jnp.zeros(expected.shape, jnp.uint8), latents[:, :512], latents[:, 512:], slots
    )
    np.testing.assert_array_equal(np.asarray(after), expected)


@pytest.mark.gpu
def test_not_finite_latents_stay_visible():
    kv_c = jnp.ones((2, 512)).at[0, 3].set(jnp.nan).at[1, 200].set(jnp.inf)
    cache = jnp.zeros((1, 2, ROW), jnp.uint8)
    after = cache_write_sm90(cache, kv_c, jnp.ones((2, 64)), jnp.arange(2, dtype=jnp.int32))
    with np.errstate(all="ignore"):
        values = oracle.fp8_rows(np.asarray(after)[0]).astype(np.float32)
    assert not np.isfinite(values[0, 3])
    assert not np.isfinite(values[1, 200])
    assert np.isfinite(values[:, 300:]).all()


@pytest.mark.gpu
def test_writes_beyond_two_gigabytes():
    num_pages = 2**31 // (64 * ROW) + 100
    slot = num_pages * 64 - 3
    kv_c, k_pe = random_latents(np.random.default_rng(0), 1, jnp.bfloat16)
    cache = jnp.zeros((num_pages, 64, ROW), jnp.uint8)
    after = jax.jit(cache_write_sm90, donate_argnums=0)(
        cache, kv_c, k_pe, jnp.array([slot], jnp.int32)
    )
    np.testing.assert_array_equal(np.asarray(after[-1, -3])[None], quantized(kv_c, k_pe))
    written = jax.jit(lambda x: jnp.sum(jnp.any(x != 0, axis=-1)))(after)
    assert int(written) == 1
