import doctest
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from mla_jax import LatentCache, allocate_pages, cache, logical_to_physical
from mla_jax.cache import dequantize, quantize
from pallas_kernels import layout
from tests import oracle
from tests.helpers import random_latents

FORMATS = ("fp8_ds_mla", "bfloat16", "float32")


def quantize_tile(tile):
    """One 128-dim tile by the definition of the format, in NumPy."""
    amax = np.abs(tile.astype(np.float32)).max()
    scale = np.float32(2.0 ** np.ceil(np.log2(max(float(amax) / 448, 1e-4))))
    return (tile.astype(np.float32) / scale).astype(ml_dtypes.float8_e4m3fn), scale


@pytest.mark.parametrize("jit", [False, True])
def test_quantize_is_the_format_byte_for_byte(jit):
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(-25, 25, (300, 4, 1)))
    kv_c = (rng.normal(size=(300, 4, 128)) * sizes).astype(np.float32)
    k_pe = rng.normal(size=(300, 64)).astype(np.float32)
    fn = jax.jit(quantize) if jit else quantize
    rows = np.asarray(fn(jnp.asarray(kv_c.reshape(300, 512)), jnp.asarray(k_pe)))
    assert rows.shape == (300, layout.FP8_ROW_BYTES)
    for row, latent, rope in zip(rows, kv_c, k_pe, strict=True):
        tiles = [quantize_tile(t) for t in latent]
        expected = b"".join(v.tobytes() for v, _ in tiles)
        expected += b"".join(np.float32(s).tobytes() for _, s in tiles)
        expected += rope.astype(ml_dtypes.bfloat16).tobytes()
        assert row.tobytes() == expected


@pytest.mark.parametrize("exponent", range(-13, 12))
def test_power_of_two_scale_rounds_up_only_past_the_boundary(exponent):
    boundary = np.float32(448 * 2.0**exponent)
    above = np.nextafter(boundary, np.float32(np.inf))
    kv_c = jnp.zeros((2, 128)).at[:, 5].set(jnp.array([boundary, above]))
    rows = np.asarray(quantize(kv_c, jnp.zeros((2, 0))))
    scales = np.ascontiguousarray(rows[:, 128:132]).view(np.float32)[:, 0]
    np.testing.assert_array_equal(scales, [2.0**exponent, 2.0 ** (exponent + 1)])


@pytest.mark.parametrize("jit", [False, True])
def test_exact_scales_are_amax_over_448_to_the_bit(jit):
    rng = np.random.default_rng(4)
    kv_c = rng.normal(size=(500, 512)).astype(np.float32)
    fn = functools.partial(quantize, scale_format="exact")
    rows = np.asarray((jax.jit(fn) if jit else fn)(jnp.asarray(kv_c), jnp.zeros((500, 64))))
    amax = np.abs(kv_c).reshape(500, 4, 128).max(-1)
    scales = np.ascontiguousarray(rows[:, 512:528]).view(np.float32)
    np.testing.assert_array_equal(scales, amax / np.float32(448))


@pytest.mark.parametrize("scale_format", ["power_of_two", "exact"])
def test_zero_tile_is_zero_not_nan(scale_format):
    rows = quantize(jnp.zeros((3, 512)), jnp.zeros((3, 64)), scale_format=scale_format)
    values = np.asarray(dequantize(rows))
    np.testing.assert_array_equal(values, 0)


def test_not_finite_latents_stay_visible():
    kv_c = jnp.ones((2, 512)).at[0, 3].set(jnp.nan).at[1, 200].set(jnp.inf)
    values = np.asarray(dequantize(quantize(kv_c, jnp.zeros((2, 64)))))
    assert np.isnan(values[0, 3])
    assert np.isnan(values[1, 200])


@pytest.mark.parametrize("scale_format", ["power_of_two", "exact"])
def test_quantization_error_is_within_e4m3_rounding(scale_format):
    kv_c, k_pe = random_latents(np.random.default_rng(1), 200)
    rows = quantize(kv_c, k_pe, scale_format=scale_format)
    values = np.asarray(dequantize(rows), np.float64)
    np.testing.assert_allclose(values, oracle.fp8_rows(rows), rtol=1e-6, atol=0)
    exact = np.asarray(kv_c, np.float64)
    amax = np.repeat(np.abs(exact).reshape(200, 4, 128).max(-1), 128, axis=-1)
    # Half a unit in the last of 3 mantissa bits, or half of the smallest subnormal (2**-9) of a
    # scale that is at most 2 * amax / 448.
    bound = np.maximum(np.abs(exact) / 16, 2.0**-10 * 2 * amax / 448) * (1 + 1e-5)
    assert (np.abs(values[:, :512] - exact) <= bound).all()
    np.testing.assert_array_equal(values[:, 512:], np.asarray(k_pe, np.float64))


@pytest.mark.parametrize("kv_lora_rank", [0, 100, 130])
def test_fp8_needs_whole_tiles(kv_lora_rank):
    with pytest.raises(ValueError, match=f"kv_lora_rank={kv_lora_rank}"):
        quantize(jnp.zeros((1, kv_lora_rank)), jnp.zeros((1, 64)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (128, 0), (256, 32)])
def test_write_then_gather(format, rank, rope):
    rng = np.random.default_rng(2)
    kv_c, k_pe = random_latents(rng, 6, rank, rope)
    empty = LatentCache.init(3, 7, format=format, kv_lora_rank=rank, qk_rope_head_dim=rope)
    slots = jnp.array([20, 0, -1, 7, 13, 2])
    cache = empty.write(kv_c, k_pe, slots)
    got = np.asarray(cache.gather(slots), np.float64)
    np.testing.assert_array_equal(got[2], 0)
    expected = oracle.cache_rows(cache.data, rank, rope)
    for row, slot in zip(got, np.asarray(slots), strict=True):
        if slot >= 0:
            np.testing.assert_allclose(row, expected[slot], rtol=1e-6)
    exact = np.concatenate([kv_c, k_pe], axis=1).astype(np.float64)
    written = np.asarray(slots) >= 0
    np.testing.assert_allclose(got[written], exact[written], rtol=2.0**-4, atol=2e-2)
    untouched = np.setdiff1d(np.arange(21), np.asarray(slots))
    np.testing.assert_array_equal(np.asarray(cache.data).reshape(21, -1)[untouched], 0)


@pytest.mark.parametrize("slot", [-1, -2, -21, 21, 1000, 2**31 - 1])
def test_slots_outside_write_and_read_nothing(slot):
    cache = LatentCache.init(3, 7).write(
        jnp.ones((1, 512)), jnp.ones((1, 64)), jnp.array([slot], jnp.int32)
    )
    np.testing.assert_array_equal(np.asarray(cache.data), 0)
    full = LatentCache(jnp.full((3, 7, 656), 0xFF, jnp.uint8))
    np.testing.assert_array_equal(np.asarray(full.gather(jnp.array([slot]))), 0)


def test_slots_of_any_integer_type():
    cache = LatentCache.init(10, 64)
    ones = jnp.ones((1, 512)), jnp.ones((1, 64))
    for dtype in (jnp.int8, jnp.uint8, jnp.int16, jnp.uint32):
        written = cache.write(*ones, jnp.array([100], dtype))
        assert float(written.gather(jnp.array([100], dtype))[0, 0]) == 1.0
    with jax.enable_x64(True):
        beyond = cache.write(*ones, jnp.array([2**32 + 2], jnp.int64))
    np.testing.assert_array_equal(np.asarray(beyond.data), 0)
    beyond = cache.write(*ones, np.array([2**32 + 2]))
    np.testing.assert_array_equal(np.asarray(beyond.data), 0)


@pytest.mark.parametrize("format", FORMATS)
def test_writing_nothing(format):
    cache = LatentCache.init(2, 4, format=format)
    same = cache.write(jnp.zeros((0, 512)), jnp.zeros((0, 64)), jnp.zeros(0, jnp.int32))
    assert same.data.shape == cache.data.shape
    assert cache.gather(jnp.zeros((0, 3), jnp.int32)).shape == (0, 3, 576)


@pytest.mark.parametrize("format", FORMATS)
def test_write_is_in_place_under_donation(format):
    cache = LatentCache.init(8, 64, format=format)
    kv_c, k_pe = random_latents(np.random.default_rng(3), 4)

    def step(cache, slots):
        return cache.write(kv_c, k_pe, slots)

    compiled = jax.jit(step, donate_argnames="cache").lower(cache, jnp.arange(4)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.data.nbytes
    assert memory.temp_size_in_bytes < cache.data.nbytes
    pointer = cache.data.unsafe_buffer_pointer()
    assert compiled(cache, jnp.arange(4)).data.unsafe_buffer_pointer() == pointer


def test_nnx_cache_holds_the_functional_cache():
    class Layer(nnx.Module):
        def __init__(self):
            self.kv = nnx.Cache(LatentCache.init(2, 4))

        def __call__(self, kv_c, k_pe, slots):
            self.kv.set_value(self.kv.get_value().write(kv_c, k_pe, slots))

    layer = Layer()
    nnx.jit(lambda layer: layer(jnp.ones((1, 512)), jnp.ones((1, 64)), jnp.array([5])))(layer)
    assert float(layer.kv.get_value().gather(jnp.array([5]))[0, 0]) == 1.0


def test_formats_and_sizes():
    sizes = {f: LatentCache.init(2, format=f).bytes_per_token for f in FORMATS}
    assert sizes == {"fp8_ds_mla": 656, "bfloat16": 1152, "float32": 2304}
    cache = LatentCache.init(5, 61, format="bfloat16")
    assert (cache.format, cache.num_pages, cache.page_size, cache.num_slots) == (
        "bfloat16",
        5,
        61,
        305,
    )


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"format": "fp8"}, "format='fp8' must be one of"),
        ({"scale_format": "ue8m0"}, "scale_format='ue8m0' must be one of"),
        ({"num_pages": 0}, "num_pages=0"),
        ({"page_size": 0}, "page_size=0"),
        ({"kv_lora_rank": 500}, "kv_lora_rank=500 must be a positive multiple of 128"),
    ],
)
def test_init_names_the_bad_argument(kwargs, match):
    with pytest.raises(ValueError, match=match):
        LatentCache.init(**{"num_pages": 2, **kwargs})


def test_write_names_the_bad_argument():
    cache = LatentCache.init(2)
    with pytest.raises(ValueError, match=r"kv_c.shape=\(3, 576\)"):
        cache.write(jnp.zeros((3, 576)), jnp.zeros((3, 64)), jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"slots.dtype=dtype\('float32'\)"):
        cache.write(jnp.zeros((3, 512)), jnp.zeros((3, 64)), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"slots.shape=\(\)"):
        cache.write(jnp.zeros((3, 512)), jnp.zeros((3, 64)), jnp.int32(1))
    with pytest.raises(ValueError, match=r"kv_c\.dtype=int32 must be a float"):
        cache.write(jnp.zeros((1, 512), int), jnp.zeros((1, 64)), jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match=r"slots.dtype=dtype\('float32'\)"):
        cache.gather(jnp.zeros(3))
    with pytest.raises(ValueError, match="must be None or one of"):
        cache.write(
            jnp.zeros((3, 512)), jnp.zeros((3, 64)), jnp.zeros(3, jnp.int32), implementation="cuda"
        )


def test_allocate_pages_gives_every_sequence_its_own_pages():
    table, num_pages = allocate_pages([130, 0, 64, 1], page_size=64)
    np.testing.assert_array_equal(table, [[0, 1, 2], [-1] * 3, [3, -1, -1], [4, -1, -1]])
    assert num_pages == 5
    with pytest.raises(ValueError, match="page_size=0"):
        allocate_pages([1], page_size=0)
    with pytest.raises(ValueError, match=r"max_lens=\[\]"):
        allocate_pages([])


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_logical_to_physical_refuses_types_that_do_not_hold_slots(dtype):
    table, positions = np.array([[100, 3]]), np.array([[0, 65]])
    with pytest.raises(ValueError, match=r"page_indices\.dtype"):
        logical_to_physical(jnp.asarray(table, dtype), jnp.asarray(positions, jnp.int32), 64)
    with pytest.raises(ValueError, match=r"positions\.dtype"):
        logical_to_physical(jnp.asarray(table, jnp.int32), jnp.asarray(positions, dtype), 64)


def test_logical_to_physical():
    table = jnp.array([[4, 2, -1], [0, 1, 3]], jnp.int32)
    positions = jnp.array([[0, 5, 9, 10, -1], [0, 5, 9, 14, 15]], jnp.int32)
    slots = logical_to_physical(table, positions, page_size=5)
    np.testing.assert_array_equal(slots, [[20, 10, 14, -1, -1], [0, 5, 9, 19, -1]])
    junk = jnp.array([[2**30, 2**31 - 1, -5]], jnp.int32)
    slots = logical_to_physical(junk, jnp.array([[0, 8, 16]]), page_size=8)
    np.testing.assert_array_equal(slots, [[-1, -1, -1]])


def test_docstring_example():
    assert doctest.testmod(cache).failed == 0


def test_bytes_of_rows_have_no_gradients():
    """An error, where they would silently be zero."""
    slots = jnp.array([1, 2], jnp.int32)

    def written(kv_c, format):
        cache = LatentCache.init(2, 4, format=format, kv_lora_rank=128, qk_rope_head_dim=4)
        return cache.write(kv_c, jnp.ones((2, 4)), slots).gather(slots).sum()

    kv_c = jnp.ones((2, 128))
    np.testing.assert_array_equal(jax.grad(written)(kv_c, "float32"), kv_c)
    for transform in (lambda f: f, jax.jit):
        with pytest.raises(NotImplementedError, match="rows have no gradients: use a bfloat16"):
            transform(jax.grad(lambda x: written(x, "fp8_ds_mla")))(kv_c)
    assert jax.grad(lambda x: written(jax.lax.stop_gradient(x), "fp8_ds_mla"))(kv_c).sum() == 0


def test_functions_of_caches_can_be_exported():
    pytest.importorskip("flatbuffers")
    cache = LatentCache.init(2, 4, kv_lora_rank=128, qk_rope_head_dim=4, scale_format="exact")
    arguments = (cache, jnp.ones((1, 128)), jnp.ones((1, 4)), jnp.array([5], jnp.int32))
    exported = jax.export.export(jax.jit(LatentCache.write))(*arguments)
    written = jax.export.deserialize(exported.serialize()).call(*arguments)
    assert written.scale_format == "exact"
    np.testing.assert_array_equal(written.data, cache.write(*arguments[1:]).data)


def test_kernels_can_be_exported_for_hopper_from_here():
    pytest.importorskip("flatbuffers")
    arguments = (LatentCache.init(2), jnp.ones((1, 512)), jnp.ones((1, 64)), jnp.array([5]))
    write = jax.jit(functools.partial(LatentCache.write, implementation="mosaic_gpu"))
    exported = jax.export.export(write, platforms=["cuda"])(*arguments)
    assert "@mosaic_gpu" in exported.mlir_module()
    assert jax.export.deserialize(exported.serialize()).platforms == ("cuda",)
