"""The constants of MLA's geometry and of the `fp8_ds_mla` cache row: their only home.

A row of the paged cache holds one token's latent, shared by all query heads. In the `fp8_ds_mla`
format of FlashMLA, vLLM and sglang it is, byte for byte::

    byte 0                    512           528              656
    |-- 512 x float8_e4m3fn --|- 4 x f32 ---|-- 64 x bf16 ---|
      latent (NoPE) values      scales        RoPE values

where scale `i` belongs to the values of dims `[128 i, 128 (i + 1))` and
dequantized = e4m3 value x scale. In general, with `r = kv_lora_rank` (a multiple of 128) and
`d = qk_rope_head_dim`, a row is `r + 4 r / 128 + 2 d` bytes.
"""

import math
from typing import Literal, get_args

ScaleFormat = Literal["power_of_two", "exact"]
"""How a writer chooses the scale of a tile: amax / 448 rounded up to a power of two, or itself."""

RowFormat = Literal["fp8_ds_mla", "bfloat16"]
"""Formats of a cache that a kernel reads."""

KV_LORA_RANK = 512
"""Latent ("NoPE") dims of a row; also the value dims, since V is the latent itself."""

QK_ROPE_HEAD_DIM = 64
"""Decoupled RoPE dims of a row."""

LATENT_DIM = KV_LORA_RANK + QK_ROPE_HEAD_DIM
"""Dims of an absorbed query, and of a bfloat16 or float32 cache row: 576."""

SCALE_TILE = 128
"""Latent dims that share one float32 scale."""

FP8_MAX = 448.0
"""Largest finite float8_e4m3fn value."""

HEAD_TILES = (64, 128)
"""Query-head counts that FlashMLA's Hopper kernels are written for, and that padding aims at."""


def check_scale_format(scale_format: str) -> None:
    """Raises ValueError for anything but a `ScaleFormat`."""
    if scale_format not in get_args(ScaleFormat):
        raise ValueError(f"{scale_format=} must be one of {get_args(ScaleFormat)}")


def num_scale_tiles(kv_lora_rank: int) -> int:
    """Float32 scales in one `fp8_ds_mla` row.

    Raises:
      ValueError: if `kv_lora_rank` is not a positive multiple of `SCALE_TILE`.
    """
    if kv_lora_rank <= 0 or kv_lora_rank % SCALE_TILE:
        raise ValueError(
            f"{kv_lora_rank=} must be a positive multiple of {SCALE_TILE} for fp8_ds_mla, which"
            f" stores one scale per {SCALE_TILE} dims; use a bfloat16 or float32 cache instead"
        )
    return kv_lora_rank // SCALE_TILE


def fp8_row_bytes(kv_lora_rank: int, qk_rope_head_dim: int) -> int:
    """Bytes of one `fp8_ds_mla` row: `r + 4 r / 128 + 2 d`."""
    return kv_lora_rank + 4 * num_scale_tiles(kv_lora_rank) + 2 * qk_rope_head_dim


FP8_ROW_BYTES = fp8_row_bytes(KV_LORA_RANK, QK_ROPE_HEAD_DIM)
"""656."""

ROW_BYTES: dict[RowFormat, int] = {"fp8_ds_mla": FP8_ROW_BYTES, "bfloat16": 2 * LATENT_DIM}
"""Bytes of a row: 656 and 1,152."""


def check_sm_scale(sm_scale: float) -> None:
    """Raises ValueError unless it is positive and finite: masked scores are its multiples."""
    if not 0 < sm_scale < math.inf:
        raise ValueError(f"{sm_scale=} must be positive and finite, as qk_head_dim ** -0.5 is")
