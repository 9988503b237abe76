"""Padding of per-device query heads to the tiles that Hopper's MLA kernels are written for.

Pure tensor parallelism divides the query heads: GLM-5's 64 over 8 devices leave 8 each. A kernel
that wants 64 or 128 heads then needs padding, inside of the shard body, where the per-device count
is known. (The port of sglang PR 22372; the kernels of this library take 8 and 16 heads natively.)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import layout

MAX_HEADS = layout.HEAD_TILES[-1]


def padded_num_heads(num_q_heads: int) -> int:
    """The smallest head tile (64 or 128) that holds `num_q_heads` heads of one device.

    Raises:
      ValueError: unless `1 <= num_q_heads <= 128`.
    """
    for tile in layout.HEAD_TILES:
        if 1 <= num_q_heads <= tile:
            return tile
    raise ValueError(
        f"{num_q_heads=} per device must be between 1 and {MAX_HEADS}; with more heads, split them"
        " over more devices"
    )


def with_padded_heads(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` on q padded with zero heads to `padded_num_heads`; its outputs without them.

    `op(q, kv_cache, ..., attn_sink=None, return_lse=False, ...)` is one of `mla_sparse_attention`,
    `mla_decode`, `mla_prefill`. Heads are the second-to-last dimension of q and out and the last
    one of lse. Each head stands alone in attention, so the real heads' results do not change.
    """

    @functools.wraps(op)
    def padded(
        q: Float[Array, "*tokens num_q_heads latent_dim"],
        *args: Any,
        attn_sink: Float[Array, " num_q_heads"] | None = None,
        return_lse: bool = False,
        **kwargs: Any,
    ) -> Any:
        num_q_heads = q.shape[-2]
        extra = padded_num_heads(num_q_heads) - num_q_heads
        q = jnp.pad(q, [(0, 0)] * (q.ndim - 2) + [(0, extra), (0, 0)])
        if attn_sink is not None:
            attn_sink = jnp.pad(attn_sink, (0, extra))
        result = op(q, *args, attn_sink=attn_sink, return_lse=return_lse, **kwargs)
        if return_lse:
            out, lse = result
            return out[..., :num_q_heads, :], lse[..., :num_q_heads]
        return result[..., :num_q_heads, :]

    return padded
