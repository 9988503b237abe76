"""The paged latent KV cache: formats, quantization, write, gather and page bookkeeping.

MLA caches one row per token, shared by all query heads: the latent `kv_c` (kv_lora_rank dims,
also the values) and the RoPE key `k_pe` (qk_rope_head_dim dims). Rows live in pages:

    data [num_pages, page_size, row]      slot = page * page_size + offset

| format       | row                                                   | bytes at 512 + 64 |
|--------------|-------------------------------------------------------|-------------------|
| `fp8_ds_mla` | 512 float8_e4m3fn, 4 float32 scales, 64 bfloat16 RoPE | 656               |
| `bfloat16`   | 576 bfloat16                                          | 1,152             |
| `float32`    | 576 float32                                           | 2,304             |

`fp8_ds_mla` is byte for byte the cache of FlashMLA, vLLM and sglang (`pallas_kernels.layout` has
the picture). Everything here is functional: a write returns a new `LatentCache`, and XLA performs
it in place where the old one is donated.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from mla_jax.dispatch import Implementation, dispatch, forward_only
from mla_jax.validation import check_sizes
from pallas_kernels import cache_write_sm90, layout

KVCacheFormat = Literal["fp8_ds_mla", "bfloat16", "float32"]

_FORMAT_DTYPES = {"fp8_ds_mla": jnp.uint8, "bfloat16": jnp.bfloat16, "float32": jnp.float32}

# 2**-13 is FlashMLA's floor: ceil(log2(1e-4)).
_MIN_SCALE_EXPONENT = -13


def check_format(**formats: str) -> None:
    """Raises ValueError, naming the argument, unless all are cache formats."""
    for name, value in formats.items():
        if value not in _FORMAT_DTYPES:
            raise ValueError(f"{name}={value!r} must be one of {tuple(_FORMAT_DTYPES)}")


def _power_of_two_scale(amax: Float[Array, "..."]) -> Float[Array, "..."]:
    """`2**ceil(log2(max(amax / 448, 1e-4)))` in exact arithmetic.

    448 = 1.75 * 2**8, so the smallest `e` with `amax <= 448 * 2**e` follows from amax's exponent
    and from whether its significand exceeds 1.75. No division and no log2: every device, and the
    quantizing kernel, get the same bits.
    """
    bits = lax.bitcast_convert_type(amax.astype(jnp.float32), jnp.int32)
    exponent = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)
    exponent = jnp.maximum(exponent, _MIN_SCALE_EXPONENT)
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _exact_scale(amax: Float[Array, "..."]) -> Float[Array, "..."]:
    """`amax / 448`, and float32's smallest normal number for a zero tile (0 / 0 would be NaN)."""
    # A constant divisor XLA would replace by its rounded reciprocal: off by a bit half of the time.
    divisor = jnp.where(jnp.isnan(amax), 1.0, jnp.float32(layout.FP8_MAX))
    return jnp.maximum(amax / divisor, jnp.finfo(jnp.float32).tiny)


def quantize(
    kv_c: Float[Array, "*tokens kv_lora_rank"],
    k_pe: Float[Array, "*tokens qk_rope_head_dim"],
    *,
    scale_format: layout.ScaleFormat = "power_of_two",
) -> UInt8[Array, "*tokens row_bytes"]:
    """Packs latents into `fp8_ds_mla` rows.

    Per 128-dim tile: `scale = f(max|kv_c|)`, `value = e4m3(kv_c / scale)` (round to nearest even);
    `k_pe` is stored in bfloat16.

    Args:
      kv_c: new latents, any float dtype. `kv_lora_rank` must be a multiple of 128.
      k_pe: new RoPE keys, already rotated.
      scale_format: `"power_of_two"` rounds max|kv_c| / 448 up to a power of two, so that every
        order of dequantization gives the same bits; `"exact"` keeps max|kv_c| / 448 itself.

    Returns:
      uint8 rows of `kv_lora_rank + 4 * kv_lora_rank / 128 + 2 * qk_rope_head_dim` bytes.

    Raises:
      ValueError: if `kv_lora_rank` is no multiple of 128, the latents are not floats, or
        `scale_format` is unknown.
      NotImplementedError: where it is differentiated.
    """
    layout.check_scale_format(scale_format)
    for name, x in (("kv_c", kv_c), ("k_pe", k_pe)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}.dtype={x.dtype} must be a float dtype")
    kv_c, k_pe = forward_only(
        (kv_c, k_pe),
        "bytes of fp8_ds_mla rows have no gradients: use a bfloat16 or float32 cache, or"
        " jax.lax.stop_gradient of kv_c and k_pe",
    )
    *tokens, kv_lora_rank = kv_c.shape
    tiles = layout.num_scale_tiles(kv_lora_rank)
    values = kv_c.astype(jnp.float32).reshape(*tokens, tiles, layout.SCALE_TILE)
    amax = jnp.max(jnp.abs(values), axis=-1)
    scales = (_power_of_two_scale if scale_format == "power_of_two" else _exact_scale)(amax)
    # |values / scales| is at most 448, or rounds to it: the cast cannot overflow to NaN.
    nope = (values / scales[..., None]).astype(jnp.float8_e4m3fn).reshape(*tokens, kv_lora_rank)
    return jnp.concatenate(
        [_to_bytes(nope), _to_bytes(scales), _to_bytes(k_pe.astype(jnp.bfloat16))], axis=-1
    )


def dequantize(
    rows: UInt8[Array, "*tokens row_bytes"],
    kv_lora_rank: int = layout.KV_LORA_RANK,
    qk_rope_head_dim: int = layout.QK_ROPE_HEAD_DIM,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "*tokens latent_dim"]:
    """Unpacks `fp8_ds_mla` rows: `e4m3 value x scale`, then the RoPE dims, in `dtype`.

    Raises:
      ValueError: if the rows are not `fp8_ds_mla` rows of these sizes.
    """
    row_bytes = layout.fp8_row_bytes(kv_lora_rank, qk_rope_head_dim)
    if rows.dtype != jnp.uint8 or rows.shape[-1] != row_bytes:
        raise ValueError(
            f"{rows.dtype=}, {rows.shape=}: fp8_ds_mla rows of {kv_lora_rank=} and"
            f" {qk_rope_head_dim=} are uint8 [..., {row_bytes}]"
        )
    tiles = layout.num_scale_tiles(kv_lora_rank)
    nope, scales, rope = jnp.split(rows, [kv_lora_rank, kv_lora_rank + 4 * tiles], axis=-1)
    nope = lax.bitcast_convert_type(nope, jnp.float8_e4m3fn).astype(jnp.float32)
    nope = nope.reshape(*nope.shape[:-1], tiles, layout.SCALE_TILE)
    nope = nope * _from_bytes(scales, jnp.float32)[..., None]
    nope = nope.reshape(*rows.shape[:-1], kv_lora_rank)
    return jnp.concatenate(
        [nope.astype(dtype), _from_bytes(rope, jnp.bfloat16).astype(dtype)], axis=-1
    )


def _to_bytes(x: Array) -> UInt8[Array, "..."]:
    data = lax.bitcast_convert_type(x, jnp.uint8)
    return data.reshape(*x.shape[:-1], x.shape[-1] * x.dtype.itemsize)


def _from_bytes(data: UInt8[Array, "..."], dtype: jax.typing.DTypeLike) -> Array:
    itemsize = jnp.dtype(dtype).itemsize
    return lax.bitcast_convert_type(
        data.reshape(*data.shape[:-1], data.shape[-1] // itemsize, itemsize), dtype
    )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data"],
    meta_fields=["kv_lora_rank", "qk_rope_head_dim", "scale_format"],
)
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """A paged latent cache of one layer, as a pytree with a single leaf.

    Attributes:
      data: uint8 `[num_pages, page_size, 656]` (`fp8_ds_mla`), or bfloat16 / float32
        `[num_pages, page_size, 576]`; the dtype is the format.
      kv_lora_rank: latent dims of a row. Static.
      qk_rope_head_dim: RoPE dims of a row; 0 is allowed. Static.
      scale_format: how writes choose the scales of `fp8_ds_mla`; reading needs no choice. Static.

    Example::

      >>> import jax.numpy as jnp
      >>> from mla_jax import LatentCache
      >>> cache = LatentCache.init(num_pages=4, page_size=64)
      >>> cache = cache.write(jnp.ones((2, 512)), jnp.ones((2, 64)), jnp.array([70, -1]))
      >>> cache.format, cache.data.shape, float(cache.gather(jnp.array([70]))[0, 0])
      ('fp8_ds_mla', (4, 64, 656), 1.0)
    """

    data: Array
    kv_lora_rank: int = layout.KV_LORA_RANK
    qk_rope_head_dim: int = layout.QK_ROPE_HEAD_DIM
    scale_format: layout.ScaleFormat = "power_of_two"

    @classmethod
    def init(
        cls,
        num_pages: int,
        page_size: int = 64,
        *,
        format: KVCacheFormat = "fp8_ds_mla",
        kv_lora_rank: int = layout.KV_LORA_RANK,
        qk_rope_head_dim: int = layout.QK_ROPE_HEAD_DIM,
        scale_format: layout.ScaleFormat = "power_of_two",
        sharding: jax.sharding.Sharding | None = None,
    ) -> Self:
        """An empty cache of `num_pages` pages of `page_size` tokens.

        Args:
          num_pages: pages in the pool, at least 1.
          page_size: tokens in a page, any positive size.
          format: `"fp8_ds_mla"`, `"bfloat16"` or `"float32"`.
          kv_lora_rank: latent dims; a multiple of 128 for `fp8_ds_mla`.
          qk_rope_head_dim: RoPE dims.
          scale_format: `"power_of_two"` or `"exact"`, see `quantize`.
          sharding: where the array goes; under tensor parallelism it is replicated.

        Raises:
          ValueError: for sizes that are not positive or an unknown format.
        """
        layout.check_scale_format(scale_format)
        check_format(format=format)
        check_sizes(num_pages=num_pages, page_size=page_size, kv_lora_rank=kv_lora_rank)
        if qk_rope_head_dim:  # an indexer's keys have none
            check_sizes(qk_rope_head_dim=qk_rope_head_dim)
        row = _row_size(format, kv_lora_rank, qk_rope_head_dim)
        data = jnp.zeros((num_pages, page_size, row), _FORMAT_DTYPES[format], device=sharding)
        return cls(data, kv_lora_rank, qk_rope_head_dim, scale_format)

    @property
    def format(self) -> KVCacheFormat:
        """The format, from the dtype of `data`."""
        for name, dtype in _FORMAT_DTYPES.items():
            if self.data.dtype == dtype:
                return name  # pyright: ignore[reportReturnType]
        raise ValueError(
            f"{self.data.dtype=} is no cache format: use uint8 (fp8_ds_mla), bfloat16 or float32"
        )

    @property
    def num_pages(self) -> int:
        return self.data.shape[0]

    @property
    def page_size(self) -> int:
        return self.data.shape[1]

    @property
    def num_slots(self) -> int:
        """Tokens that fit: `num_pages * page_size`."""
        return self.num_pages * self.page_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one row."""
        return self.data.shape[2] * self.data.dtype.itemsize

    def check(self, name: str = "kv_cache") -> None:
        """Raises ValueError, naming the argument, unless shape, dtype and sizes agree."""
        row = _row_size(self.format, self.kv_lora_rank, self.qk_rope_head_dim)
        if self.data.ndim != 3 or self.data.shape[2] != row or 0 in self.data.shape:
            raise ValueError(
                f"{name}.data.shape={self.data.shape}: a {self.format} cache of"
                f" kv_lora_rank={self.kv_lora_rank} and qk_rope_head_dim={self.qk_rope_head_dim} is"
                f" [num_pages, page_size, {row}], with at least one page of one token"
            )

    def valid_slots(self, slots: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """int32 `slots`, with -1 for every slot outside of the cache.

        Raises:
          ValueError: if the slots are not integers.
        """
        if not jnp.issubdtype(slots.dtype, jnp.integer):
            raise ValueError(f"{slots.dtype=} must be an integer type; cast the slots to int32")
        if slots.dtype.itemsize < 4:
            slots = slots.astype(jnp.int32)
        # Before narrowing: 2**32 + 2 is outside, not slot 2.
        return jnp.where((slots >= 0) & (slots < self.num_slots), slots, -1).astype(jnp.int32)

    def write(
        self,
        kv_c: Float[Array, "tokens kv_lora_rank"],
        k_pe: Float[Array, "tokens qk_rope_head_dim"],
        slots: Int[Array, " tokens"],
        *,
        implementation: Implementation | None = None,
    ) -> Self:
        """Writes one row per token; in place where this cache is donated to the enclosing jit.

        Args:
          kv_c: new latents (after the latent norm).
          k_pe: new RoPE keys, already rotated.
          slots: physical slots, `page * page_size + offset`, each at most once. -1 (any slot
            outside of the cache) writes nothing.
          implementation: `"xla"`, `"mosaic_gpu"` (one fused kernel; Hopper, `fp8_ds_mla` of 512 +
            64 dims), or None to choose.

        Raises:
          ValueError: if the shapes do not fit the cache.
          NotImplementedError: if `implementation` is named and cannot write this cache.
        """
        self.check("self")
        if isinstance(slots, np.ndarray):
            slots = self.valid_slots(slots)  # before jnp.asarray drops the upper half of 64 bits
        kv_c, k_pe, slots = jnp.asarray(kv_c), jnp.asarray(k_pe), jnp.asarray(slots)
        expected = (
            (*slots.shape, self.kv_lora_rank),
            (*slots.shape, self.qk_rope_head_dim),
        )
        if slots.ndim != 1 or (kv_c.shape, k_pe.shape) != expected:
            raise ValueError(
                f"{kv_c.shape=}, {k_pe.shape=}, {slots.shape=}: expected"
                f" [tokens, {self.kv_lora_rank}], [tokens, {self.qk_rope_head_dim}] and [tokens]"
            )

        def xla(data: Array, kv_c: Array, k_pe: Array, slots: Array) -> Array:
            return _write_xla(dataclasses.replace(self, data=data), kv_c, k_pe, slots)

        data = dispatch(
            implementation,
            xla,
            functools.partial(_write_kernel, self),
            self.data,
            kv_c,
            k_pe,
            self.valid_slots(slots),
        )
        return dataclasses.replace(self, data=data)

    def gather(
        self, slots: Int[Array, "*shape"], *, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> Float[Array, "*shape latent_dim"]:
        """Rows at physical `slots`, dequantized to `dtype`; zeros for -1 and slots outside.

        Whatever bytes lie in slots that were not asked for never reach the result.

        Raises:
          ValueError: if the slots are not integers, or the cache is malformed.
        """
        self.check("self")
        slots = self.valid_slots(jnp.asarray(slots))
        rows = _as_rows(self)[jnp.maximum(slots, 0)]
        if self.format == "fp8_ds_mla":
            rows = dequantize(rows, self.kv_lora_rank, self.qk_rope_head_dim, dtype=dtype)
        return jnp.where((slots >= 0)[..., None], rows.astype(dtype), 0)


# So that `jax.export` can write and read functions of caches.
jax.export.register_pytree_node_serialization(
    LatentCache,
    serialized_name="mla_jax.LatentCache",
    serialize_auxdata=lambda sizes: json.dumps(sizes, default=int).encode(),
    deserialize_auxdata=lambda data: tuple(json.loads(data)),
)


def _write_xla(cache: LatentCache, kv_c: Array, k_pe: Array, slots: Array) -> Array:
    if cache.format == "fp8_ds_mla":
        rows = quantize(kv_c, k_pe, scale_format=cache.scale_format)
    else:
        rows = jnp.concatenate([x.astype(cache.data.dtype) for x in (kv_c, k_pe)], axis=-1)
    # Negative indices count from the end in jnp: send -1 past the end, where "drop" drops it.
    slots = jnp.where(slots < 0, cache.num_slots, slots)
    return _as_rows(cache).at[slots].set(rows, mode="drop").reshape(cache.data.shape)


def _as_rows(cache: LatentCache) -> Array:
    return cache.data.reshape(cache.num_slots, cache.data.shape[2])


def _row_size(format: KVCacheFormat, kv_lora_rank: int, qk_rope_head_dim: int) -> int:
    """Elements (bytes for `fp8_ds_mla`) of one row."""
    if format == "fp8_ds_mla":
        return layout.fp8_row_bytes(kv_lora_rank, qk_rope_head_dim)
    return kv_lora_rank + qk_rope_head_dim


def _write_kernel(cache: LatentCache) -> Callable[[Array, Array, Array, Array], Array]:
    if cache.format != "fp8_ds_mla":
        raise NotImplementedError(
            f'kv_cache format {cache.format}: implementation="mosaic_gpu" writes fp8_ds_mla only;'
            ' use "xla" or None'
        )
    return functools.partial(cache_write_sm90, scale_format=cache.scale_format)


def allocate_pages(
    max_lens: Sequence[int], page_size: int = 64
) -> tuple[Int[np.ndarray, "batch pages_per_seq"], int]:
    """Page tables for a batch whose sequences grow to `max_lens` tokens at most.

    Returns:
      `(page_indices, num_pages)`: int32 page numbers, consecutive for each sequence and padded
      with -1, and the pages that the pool needs.

    Raises:
      ValueError: for an empty batch, a negative length or a page size that is not positive.
    """
    check_sizes(page_size=page_size)
    if not len(max_lens) or min(max_lens) < 0:
        raise ValueError(f"{max_lens=} must hold one length, not negative, per sequence")
    counts = [-(-n // page_size) for n in max_lens]
    page_indices = np.full((len(counts), max(1, *counts)), -1, np.int32)
    next_page = 0
    for row, count in zip(page_indices, counts, strict=True):
        row[:count] = np.arange(next_page, next_page + count)
        next_page += count
    return page_indices, max(1, next_page)


def logical_to_physical(
    page_indices: Int[Array, "batch pages_per_seq"],
    positions: Int[Array, "batch n"],
    page_size: int,
) -> Int[Array, "batch n"]:
    """Physical slots of positions within each sequence.

    `slot = page_indices[b, position // page_size] * page_size + position % page_size`; -1 for
    negative positions, positions beyond the table, and page numbers that are negative or overflow.

    Raises:
      ValueError: if `page_indices` or `positions` are no integers of 32 or 64 bits.
    """
    for name, x in (("page_indices", page_indices), ("positions", positions)):
        if not jnp.issubdtype(x.dtype, jnp.integer) or x.dtype.itemsize < 4:
            raise ValueError(f"{name}.dtype={x.dtype} must be int32; cast it to jnp.int32")
    pages_per_seq = page_indices.shape[1]
    logical_pages = positions // page_size
    valid = (positions >= 0) & (logical_pages < pages_per_seq)
    pages = jnp.take_along_axis(page_indices, jnp.clip(logical_pages, 0, pages_per_seq - 1), axis=1)
    # A junk page number must not wrap around to a real slot.
    valid &= (pages >= 0) & (pages < 2**31 // page_size)
    return jnp.where(valid, pages * page_size + positions % page_size, -1)
