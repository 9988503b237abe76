"""Quantizes new latents and scatters them into the paged `fp8_ds_mla` cache, in place, on Hopper.

One warp per token, four tokens per CTA, one launch, no shared memory:

    lanes          0 .. 7      8 .. 15     16 .. 23    24 .. 31
    latent dims    0 .. 127    128 .. 255  256 .. 383  384 .. 511   16 consecutive dims per lane
    RoPE dims      0 .. 15     16 .. 31    32 .. 47    48 .. 63     2 consecutive dims per lane

A lane stores its 16 e4m3 values as one vector and its RoPE pair as one word; the first lane of each
eight stores their scale. A tile's maximum takes three shuffles, and all loads of a token are in
flight at once.

Memory binds: a bfloat16 token reads 1,156 bytes and writes 656. At the 3.03 TB/s of a plain copy on
an H100 (read plus written) that is 0.6 ns a token, 4.9 us for 8,192; at 128 tokens the launch is
the time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper as hw
from pallas_kernels import layout
from pallas_kernels.hopper import Reg
from pallas_kernels.varying import as_varying_as

_WARPS = 4
_LANE_DIMS = layout.KV_LORA_RANK // hw.WARP
_TILE_LANES = layout.SCALE_TILE // _LANE_DIMS
_ROPE_OFFSET = layout.FP8_ROW_BYTES - 2 * layout.QK_ROPE_HEAD_DIM

# 448 = 1.75 * 2**8: a tile of maximum (1 + f) * 2**e needs the scale 2**(e - 8), and the next power
# of two when 1 + f > 1.75. No logarithm, so no rounding to disagree about.
_FP8_EXPONENT = 8
_SIGNIFICAND_OF_448 = 0x600000
_SMALLEST_SCALE_EXPONENT = 127 - 13  # ceil(log2(1e-4)), FlashMLA's floor
_SMALLEST_NORMAL = 2.0**-126


def cache_write_sm90(
    kv_cache: jax.Array,
    kv_c: jax.Array,
    k_pe: jax.Array,
    slots: jax.Array,
    *,
    scale_format: layout.ScaleFormat = "power_of_two",
) -> jax.Array:
    """Writes one quantized row per token: `kv_cache[slots[i]] = quantize(kv_c[i], k_pe[i])`.

    Per 128 latent dims `scale = 2**ceil(log2(max(amax / 448, 1e-4)))` (or `amax / 448` itself for
    `"exact"`, at least float32's smallest normal number), `value = e4m3(kv_c / scale)`, rounded to
    nearest even; RoPE dims are rounded to bfloat16. Bit for bit what `mla_jax.cache.quantize` gives
    for finite input.

    The cache is an input that the output aliases: under `jit` with the cache donated (or carried
    through a loop) the rows are written in place, and no other byte is touched.

    Args:
      kv_cache: uint8 `[num_pages, page_size, 656]`.
      kv_c: new latents `[tokens, 512]`, bfloat16 or float32.
      k_pe: new RoPE keys `[tokens, 64]`, already rotated, bfloat16 or float32.
      slots: int32 `[tokens]`, `page * page_size + offset`, each at most once. -1, and any slot
        outside of the cache, writes nothing.
      scale_format: `"power_of_two"` or `"exact"`.

    Returns:
      The cache with the rows written.

    Raises:
      ValueError: if the arguments do not fit together.
      NotImplementedError: for caches that are not `fp8_ds_mla` of 512 + 64 dims, and for other
        input dtypes.
    """
    _validate(kv_cache, kv_c, k_pe, slots, scale_format)
    if slots.shape[0] == 0 or kv_cache.size == 0:
        return kv_cache
    return _write(kv_cache, kv_c, k_pe, slots, scale_format)


# A ref in GPU memory exists inside of `jit` only: this one serves calls from outside of one.
@functools.partial(jax.jit, static_argnames="scale_format")
def _write(
    kv_cache: jax.Array,
    kv_c: jax.Array,
    k_pe: jax.Array,
    slots: jax.Array,
    scale_format: layout.ScaleFormat,
) -> jax.Array:
    num_pages, page_size, _ = kv_cache.shape
    tokens = slots.shape[0]

    def cache_write_kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def inline(ctx: Any, *args: Any) -> None:
            del ctx
            out, kv_c, k_pe, slots, cta = args
            warp, lane = hw.warp_index(), hw.thread_index() & 31
            token = Reg(cta.registers.item()) * _WARPS + warp
            in_range = token < tokens
            token = hw.minimum(token, tokens - 1)
            (slot,) = hw.load_global(hw.element_address(hw.global_address(slots), token, 4))
            latent = _load_floats(kv_c, kv_c_dtype, token, lane, _LANE_DIMS)
            rope = _load_floats(k_pe, k_pe_dtype, token, lane, 2)
            scale, quantized = _quantize(latent, scale_format)
            # One unsigned comparison refuses -1, other negative numbers and slots beyond the end.
            with hw.when(in_range & (slot < min(num_pages * page_size, 2**31))):
                row = hw.element_address(hw.global_address(out), slot, layout.FP8_ROW_BYTES)
                hw.store_global(row + hw.u64(lane * _LANE_DIMS), quantized)
                hw.store_global(row + hw.u64(lane * 4), [hw.bf16x2(*rope)], _ROPE_OFFSET)
                with hw.when((lane % _TILE_LANES).eq(0)):
                    tile = lane // _TILE_LANES
                    hw.store_global(row + hw.u64(tile * 4), [scale], layout.KV_LORA_RANK)

        inline(*refs, lax.axis_index("cta").astype(jnp.int32))

    kv_c_dtype, k_pe_dtype = kv_c.dtype, k_pe.dtype
    # A mutable ref, unlike an output, keeps what the kernel does not write.
    kv_cache = as_varying_as(kv_cache, (kv_c, k_pe, slots))
    cache_ref = jax.new_ref(kv_cache, memory_space=plgpu.GMEM)
    plgpu.kernel(
        cache_write_kernel,
        grid=(-(-tokens // _WARPS),),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
    )(cache_ref, kv_c, k_pe, slots)
    return jax.freeze(cache_ref)


def _load_floats(ref: Any, dtype: Any, token: Reg, lane: Reg, count: int) -> list[Reg]:
    """`ref[token, count * lane : count * (lane + 1)]` in float32; `32 * count` dims a row."""
    itemsize = jnp.dtype(dtype).itemsize
    row = hw.element_address(hw.global_address(ref), token, hw.WARP * count * itemsize)
    address = hw.element_address(row, lane, count * itemsize)
    num_words = count * itemsize // 4
    vector = min(num_words, 4)
    words = []
    for offset in range(0, 4 * num_words, 4 * vector):
        words += hw.load_global(address, offset, words=vector)
    if itemsize == 4:
        return [hw.as_f32(word) for word in words]
    return [x for word in words for x in hw.bf16x2_to_f32(word)]


def _quantize(values: list[Reg], scale_format: layout.ScaleFormat) -> tuple[Reg, list[Reg]]:
    """The float32 scale of this lane's tile, and this lane's values as packed e4m3."""
    # As integers, magnitudes order like floats.
    largest = functools.reduce(hw.maximum_u32, [hw.as_u32(x) & 0x7FFFFFFF for x in values])
    for distance in (1, 2, 4):
        largest = hw.maximum_u32(largest, hw.shuffle_xor(largest, distance))
    if scale_format == "power_of_two":
        carry = (largest & 0x7FFFFF) > _SIGNIFICAND_OF_448
        exponent = (largest >> 23) + hw.select(carry, hw.u32(1), hw.u32(0))
        exponent = hw.maximum_u32(exponent, _SMALLEST_SCALE_EXPONENT + _FP8_EXPONENT)
        exponent = exponent - _FP8_EXPONENT
        scale = hw.as_f32(exponent << 23)
        # Division by a power of two is exact, and so is multiplication by its inverse.
        inverse = hw.as_f32((2 * 127 - exponent) << 23)
        scaled = [x * inverse for x in values]
    else:
        scale = hw.divide(hw.as_f32(largest), hw.f32(layout.FP8_MAX))
        scale = hw.maximum(scale, hw.f32(_SMALLEST_NORMAL))
        scaled = [hw.divide(x, scale) for x in values]
    return scale, [hw.f32x4_to_e4m3(*scaled[i : i + 4]) for i in range(0, len(scaled), 4)]


def _validate(
    kv_cache: jax.Array,
    kv_c: jax.Array,
    k_pe: jax.Array,
    slots: jax.Array,
    scale_format: layout.ScaleFormat,
) -> None:
    layout.check_scale_format(scale_format)
    if slots.ndim != 1 or slots.dtype != jnp.int32:
        raise ValueError(f"{slots.shape=}, {slots.dtype=} must be int32 [tokens]")
    if kv_c.ndim != 2 or k_pe.ndim != 2 or {kv_c.shape[0], k_pe.shape[0]} != {slots.shape[0]}:
        raise ValueError(
            f"{kv_c.shape=} and {k_pe.shape=} must be [tokens, dims] of as many tokens as"
            f" {slots.shape=}"
        )
    expected = (layout.KV_LORA_RANK, layout.QK_ROPE_HEAD_DIM)
    if (kv_c.shape[1], k_pe.shape[1]) != expected:
        raise NotImplementedError(
            f"{kv_c.shape=}, {k_pe.shape=}: this kernel writes rows of {expected} dims"
        )
    if kv_cache.ndim != 3 or kv_cache.dtype != jnp.uint8:
        raise NotImplementedError(
            f"{kv_cache.shape=}, {kv_cache.dtype=}: this kernel writes fp8_ds_mla caches, uint8"
            f" [pages, page_size, {layout.FP8_ROW_BYTES}]"
        )
    if kv_cache.shape[2] != layout.FP8_ROW_BYTES:
        raise ValueError(f"{kv_cache.shape=}: the last dimension must be {layout.FP8_ROW_BYTES}")
    for name, x in (("kv_c", kv_c), ("k_pe", k_pe)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            raise NotImplementedError(f"{name}.dtype={x.dtype} must be bfloat16 or float32")
