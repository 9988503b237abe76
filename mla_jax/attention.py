"""The attention ops: each validates its arguments once, chooses the implementation, dispatches.

`implementation=None` chooses:

| device | cache      | `mla_sparse_attention` | `mla_decode` | `mla_prefill` |
|--------|------------|------------------------|--------------|---------------|
| Hopper | fp8_ds_mla | "mosaic_gpu"           | "mosaic_gpu" | "xla"         |
| Hopper | bfloat16   | "xla"                  | "mosaic_gpu" | "xla"         |
| Hopper | other      | "xla"                  | "xla"        | "xla"         |
| other  | any        | "xla"                  | "xla"        | "xla"         |

The sparse kernel serves prefill and decode alike: there is no heuristic switch between them. The
kernels take bfloat16 q.

On a mesh, wrap the ops in `mla_jax.tensor_parallel`.

ValueError is the caller's mistake and names the argument. NotImplementedError says that a named
implementation cannot do what was asked; None then takes "xla". Everything is decided while tracing.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_jax import reference
from mla_jax.cache import KVCacheFormat, LatentCache
from mla_jax.dispatch import Implementation, dispatch
from mla_jax.validation import as_arrays, check_indices
from pallas_kernels import (
    DenseDecodeConfig,
    SparseAttentionConfig,
    dense_decode_sm90,
    layout,
    sparse_attention_sm90,
)

# A kernel or reference with everything but its array arguments bound.
_Bound = Callable[..., tuple[Array, Array]]


def mla_sparse_attention(
    q: Float[Array, "tokens num_q_heads latent_dim"],
    kv_cache: LatentCache | Array,
    topk_indices: Int[Array, "tokens topk"],
    *,
    sm_scale: float,
    attn_sink: Float[Array, " num_q_heads"] | None = None,
    topk_lens: Int[Array, " tokens"] | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
    config: SparseAttentionConfig | None = None,
) -> Array | tuple[Array, Array]:
    """Token-sparse MLA: each token attends to the cache slots that it names.

    Per token and head, over the slots `i` with `topk_indices[token, i] != -1`:

        s_i = sm_scale * q . row_i
        out = softmax(s) @ row_i[:kv_lora_rank]
        lse = log(sum(exp(s)))

    A token may be a decode token, a prefill token or a speculative draft token; causality is in
    the choice of the indices. As in DeepSeek V3.2 ("DeepSeek Sparse Attention") and FlashMLA's
    sparse kernels.

    Args:
      q: absorbed queries `ql_nope ++ q_pe`; bfloat16 for the kernel, float32 and float16 (computed
        in float32) under "xla" too.
      kv_cache: a `LatentCache`, or its array: uint8 `[pages, page_size, 656]`, bfloat16 or float32
        `[pages, page_size, 576]`.
      topk_indices: physical slots (page * page_size + offset), -1 for "none" in any position.
        Slots outside of the cache count as -1.
      sm_scale: multiplies the scores. `qk_head_dim**-0.5` (192, not 576, in DeepSeek's models)
        times the square of YaRN's factor.
      attn_sink: float32 logit per head; out is multiplied by `sigmoid(lse - attn_sink)`.
      topk_lens: entries of `topk_indices` from `topk_lens[token]` on are ignored.
      return_lse: also return lse.
      implementation: "xla", "mosaic_gpu" (Hopper, `fp8_ds_mla`, bfloat16 q) or None to choose.
      config: overrides the kernel's own choice of tiles, wherever the kernel runs.

    Returns:
      out, of q's dtype, `[tokens, num_q_heads, kv_lora_rank]`; with `return_lse` also lse, float32
      natural log, `[tokens, num_q_heads]`. A token without a valid slot has out 0 and lse -inf.

    Raises:
      ValueError: for shapes, dtypes or names that do not fit.
      NotImplementedError: if the named implementation cannot do this.
    """
    cache = _as_cache(kv_cache)
    q, topk_indices, topk_lens, attn_sink = as_arrays(
        "topk_lens",
        "attn_sink",
        q=q,
        topk_indices=topk_indices,
        topk_lens=topk_lens,
        attn_sink=attn_sink,
    )
    sm_scale = _check_common(q, 3, "[tokens, num_q_heads, {}]", cache, sm_scale, attn_sink)
    tokens = q.shape[0]
    check_indices("topk_indices", topk_indices, (tokens, None), "[tokens, topk]")
    if topk_lens is not None:
        check_indices("topk_lens", topk_lens, (tokens,), "[tokens]")
    _check_config(config, SparseAttentionConfig, implementation)

    def mosaic_gpu() -> _Bound:
        _check_kernel_takes(q, cache, ("fp8_ds_mla",))
        return lambda q, data, topk_indices, topk_lens, attn_sink: sparse_attention_sm90(
            q,
            data,
            topk_indices,
            sm_scale=sm_scale,
            topk_lens=topk_lens,
            attn_sink=attn_sink,
            config=config,
        )

    def xla(q, data, topk_indices, topk_lens, attn_sink):
        return reference.sparse_attention(
            q,
            dataclasses.replace(cache, data=data),
            topk_indices,
            sm_scale=sm_scale,
            topk_lens=topk_lens,
            attn_sink=attn_sink,
        )

    out, lse = dispatch(
        implementation, xla, mosaic_gpu, q, cache.data, topk_indices, topk_lens, attn_sink
    )
    return (out, lse) if return_lse else out


def mla_decode(
    q: Float[Array, "batch q_len num_q_heads latent_dim"],
    kv_cache: LatentCache | Array,
    page_indices: Int[Array, "batch pages_per_seq"],
    kv_lens: Int[Array, " batch"],
    *,
    sm_scale: float,
    attn_sink: Float[Array, " num_q_heads"] | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
    config: DenseDecodeConfig | None = None,
) -> Array | tuple[Array, Array]:
    """Dense paged MLA of each sequence's last `q_len` positions.

    Query `j` of sequence `b` stands at position `kv_lens[b] - q_len + j` and attends to all keys up
    to and including its own:

        s_k = sm_scale * q . row_k
        out = softmax(s) @ row_k[:kv_lora_rank]
        lse = log(sum(exp(s)))

    q_len 1 is plain decoding, 2 to 8 are speculative drafts; "xla" takes equal prefill chunks of
    any length, too.

    Args:
      q: absorbed queries `ql_nope ++ q_pe`; bfloat16 for the kernel, float32 and float16 (computed
        in float32) under "xla" too.
      kv_cache: a `LatentCache`, or its array, as in `mla_sparse_attention`.
      page_indices: int32 page table (FlashMLA's block_table); entries beyond `kv_lens` are never
        read and may hold anything. Keys of pages outside of the cache (-1) are skipped.
      kv_lens: tokens of each sequence in the cache, the q_len new ones included. 0 (a graph-padded
        row), or fewer than q_len, leaves queries without keys; keys beyond the page table are
        skipped.
      sm_scale: multiplies the scores, see `mla_sparse_attention`.
      attn_sink: float32 logit per head; out is multiplied by `sigmoid(lse - attn_sink)`.
      return_lse: also return lse.
      implementation: "xla", "mosaic_gpu" (Hopper, `fp8_ds_mla` or bfloat16 cache, bfloat16 q) or
        None to choose.
      config: overrides the kernel's own choice of tiles, wherever the kernel runs.

    Returns:
      out, of q's dtype, `[batch, q_len, num_q_heads, kv_lora_rank]`; with `return_lse` also lse,
      float32 natural log, `[batch, q_len, num_q_heads]`. A query without a key has out 0, lse -inf.

    Raises:
      ValueError: for shapes, dtypes or names that do not fit.
      NotImplementedError: if the named implementation cannot do this.
    """
    cache = _as_cache(kv_cache)
    q, page_indices, kv_lens, attn_sink = as_arrays(
        "attn_sink", q=q, page_indices=page_indices, kv_lens=kv_lens, attn_sink=attn_sink
    )
    sm_scale = _check_common(q, 4, "[batch, q_len, num_q_heads, {}]", cache, sm_scale, attn_sink)
    _check_pages(page_indices, kv_lens, q.shape[0])
    _check_config(config, DenseDecodeConfig, implementation)

    def mosaic_gpu() -> _Bound:
        _check_kernel_takes(q, cache, ("fp8_ds_mla", "bfloat16"))
        return lambda q, data, page_indices, kv_lens, attn_sink: dense_decode_sm90(
            q,
            data,
            page_indices,
            kv_lens,
            sm_scale=sm_scale,
            attn_sink=attn_sink,
            config=config,
        )

    def xla(q, data, page_indices, kv_lens, attn_sink):
        return reference.decode(
            q,
            dataclasses.replace(cache, data=data),
            page_indices,
            kv_lens,
            sm_scale=sm_scale,
            attn_sink=attn_sink,
        )

    out, lse = dispatch(
        implementation, xla, mosaic_gpu, q, cache.data, page_indices, kv_lens, attn_sink
    )
    return (out, lse) if return_lse else out


def mla_prefill(
    q: Float[Array, "tokens num_q_heads latent_dim"],
    kv_cache: LatentCache | Array,
    page_indices: Int[Array, "batch pages_per_seq"],
    kv_lens: Int[Array, " batch"],
    cu_q_lens: Int[Array, " batch_plus_1"],
    *,
    sm_scale: float,
    attn_sink: Float[Array, " num_q_heads"] | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, Array]:
    """Dense paged MLA of a ragged batch: chunked prefill of prompts of any lengths.

    Tokens `cu_q_lens[b]` to `cu_q_lens[b + 1] - 1` are the last ones of sequence `b`, in order: the
    last stands at position `kv_lens[b] - 1`. Each attends to all keys up to and including its own;
    formula as in `mla_decode`. Sequences of one token are allowed, but a batch of them is faster in
    `mla_decode`.

    Args:
      q: absorbed queries `ql_nope ++ q_pe`.
      kv_cache: a `LatentCache`, or its array, as in `mla_sparse_attention`.
      page_indices: int32 page table, as in `mla_decode`.
      kv_lens: tokens of each sequence in the cache, the new ones included, as in `mla_decode`.
      cu_q_lens: int32, ascending from 0; tokens from `cu_q_lens[-1]` on are padding.
      sm_scale: multiplies the scores, see `mla_sparse_attention`.
      attn_sink: float32 logit per head; out is multiplied by `sigmoid(lse - attn_sink)`.
      return_lse: also return lse.
      implementation: "xla" or None.

    Returns:
      out, of q's dtype, `[tokens, num_q_heads, kv_lora_rank]`; with `return_lse` also lse, float32
      natural log, `[tokens, num_q_heads]`. Padding tokens have out 0 and lse -inf.

    Raises:
      ValueError: for shapes, dtypes or names that do not fit.
      NotImplementedError: if the named implementation cannot do this.
    """
    cache = _as_cache(kv_cache)
    q, page_indices, kv_lens, cu_q_lens, attn_sink = as_arrays(
        "attn_sink",
        q=q,
        page_indices=page_indices,
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        attn_sink=attn_sink,
    )
    sm_scale = _check_common(q, 3, "[tokens, num_q_heads, {}]", cache, sm_scale, attn_sink)
    batch = kv_lens.shape[0] if kv_lens.ndim else 0
    _check_pages(page_indices, kv_lens, batch)
    check_indices("cu_q_lens", cu_q_lens, (batch + 1,), "[batch + 1]")

    def xla(q, data, page_indices, kv_lens, cu_q_lens, attn_sink):
        return reference.prefill(
            q,
            dataclasses.replace(cache, data=data),
            page_indices,
            kv_lens,
            cu_q_lens,
            sm_scale=sm_scale,
            attn_sink=attn_sink,
        )

    mosaic_gpu = functools.partial(_no_kernel, "mla_prefill")
    out, lse = dispatch(
        implementation, xla, mosaic_gpu, q, cache.data, page_indices, kv_lens, cu_q_lens, attn_sink
    )
    return (out, lse) if return_lse else out


def _no_kernel(op: str) -> _Bound:
    raise NotImplementedError(f'{op} has no implementation="mosaic_gpu"; use "xla" or None')


# Validation


def _as_cache(kv_cache: LatentCache | Array) -> LatentCache:
    if isinstance(kv_cache, LatentCache):
        kv_cache.check()
        return dataclasses.replace(kv_cache, data=jnp.asarray(kv_cache.data))
    (data,) = as_arrays(kv_cache=kv_cache)
    rows = {
        jnp.dtype(jnp.uint8): layout.FP8_ROW_BYTES,
        jnp.dtype(jnp.bfloat16): layout.LATENT_DIM,
        jnp.dtype(jnp.float32): layout.LATENT_DIM,
    }
    if data.ndim != 3 or data.shape[-1] != rows.get(data.dtype):
        raise ValueError(
            f"kv_cache.shape={data.shape}, kv_cache.dtype={data.dtype}: a bare kv_cache is uint8"
            f" [num_pages, page_size, {layout.FP8_ROW_BYTES}] or bfloat16 / float32 [num_pages,"
            f" page_size, {layout.LATENT_DIM}]; reshape away an axis of heads, bitcast float8 to"
            " uint8, wrap other sizes in LatentCache"
        )
    cache = LatentCache(data)
    cache.check()
    return cache


def _check_common(
    q: Array,
    ndim: int,
    shape: str,
    cache: LatentCache,
    sm_scale: float,
    attn_sink: Array | None,
) -> float:
    """Checks what all ops share; returns sm_scale as a Python float."""
    latent_dim = cache.kv_lora_rank + cache.qk_rope_head_dim
    if q.ndim != ndim or q.shape[-1] != latent_dim:
        raise ValueError(
            f"{q.shape=} must be {shape.format(latent_dim)}: q after absorption of w_uk, ql_nope ++"
            f" q_pe, for a cache of kv_lora_rank={cache.kv_lora_rank} and"
            f" qk_rope_head_dim={cache.qk_rope_head_dim}"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float32, jnp.float16):
        raise ValueError(f"{q.dtype=} must be bfloat16, float16 or float32; cast q")
    if q.shape[-2] < 1:
        raise ValueError(f"{q.shape=} has no heads")
    is_number = isinstance(sm_scale, numbers.Real) and not isinstance(sm_scale, bool)
    if not (is_number and math.isfinite(sm_scale) and sm_scale > 0):
        raise ValueError(
            f"{sm_scale=} must be a positive number, known while tracing: qk_head_dim**-0.5, times"
            " the square of YaRN's factor"
        )
    if attn_sink is not None and attn_sink.shape != q.shape[-2:-1]:
        raise ValueError(
            f"{attn_sink.shape=} must be {q.shape[-2:-1]}, one logit for each of q's heads"
        )
    return float(sm_scale)


def _check_pages(page_indices: Array, kv_lens: Array, batch: int) -> None:
    check_indices("kv_lens", kv_lens, (batch,), "[batch]")
    check_indices("page_indices", page_indices, (batch, None), "[batch, pages_per_seq]")
    if page_indices.shape[1] < 1:
        raise ValueError(f"{page_indices.shape=} holds no page; give each sequence at least one")


def _check_config(config: Any, expected: type, implementation: Implementation | None) -> None:
    if config is not None and (implementation == "xla" or not isinstance(config, expected)):
        raise ValueError(
            f"{config=} must be None or a pallas_kernels.{expected.__name__}, for the mosaic_gpu"
            f" kernel ({implementation=})"
        )


def _check_kernel_takes(q: Array, cache: LatentCache, formats: tuple[KVCacheFormat, ...]) -> None:
    if cache.format not in formats or q.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"kv_cache format {cache.format} with {q.dtype=}: the mosaic_gpu kernel takes"
            f' {" or ".join(formats)} and bfloat16 q; use implementation="xla"'
        )
    # Rows of 576 values could be divided otherwise.
    if cache.kv_lora_rank != layout.KV_LORA_RANK:
        raise NotImplementedError(
            f"kv_cache with kv_lora_rank={cache.kv_lora_rank}: the mosaic_gpu kernel takes"
            f' {layout.KV_LORA_RANK}; use implementation="xla"'
        )
