"""`implementation="xla"`: MLA over the paged cache in plain jnp, for any device, dims and format.

All functions compute, for each query head over the rows it may see,

    s = sm_scale * q . [kv_c, k_pe]      out = softmax(s) @ kv_c      lse = log(sum(exp(s)))

with q absorbed (`ql_nope ++ q_pe`), then multiply out by `sigmoid(lse - attn_sink)` if there is a
sink. Matrix products take bfloat16 operands where q is bfloat16 and float32 ones otherwise, and
accumulate in float32. Rows that a query may not see are replaced by zeros before any arithmetic, so
that no byte of theirs, NaN included, reaches the result.

What is held beside inputs and outputs is bounded, whatever the shapes: the sparse form walks over
chunks of tokens, the dense forms over chunks of queries and of keys with an online softmax (Milakov
and Gimelshein, 2018).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax.cache import LatentCache, logical_to_physical
from pallas_kernels.varying import as_varying_as

# Rows and scores held at a time; XLA keeps two or three arrays of that size. 128 decode tokens x
# top-k 2,048 in bfloat16, the largest common decode step, are 302 MB of rows: one piece.
_MAX_CHUNK_BYTES = 512 * 2**20
# Keys per step of the dense forms at most, and queries per step of the ragged one.
_KEY_CHUNK = 1024
_QUERY_CHUNK = 128
# Fewer keys per step than this make the loop's overhead show.
_MIN_KEY_CHUNK = 64

_HIGHEST = lax.Precision.HIGHEST


class _Softmax(NamedTuple):
    """What all forms share."""

    sm_scale: float
    attn_sink: Array | None
    compute_dtype: jnp.dtype
    out_dtype: jnp.dtype


def _softmax(q: Array, sm_scale: float, attn_sink: Array | None) -> _Softmax:
    compute_dtype = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32
    return _Softmax(sm_scale, attn_sink, jnp.dtype(compute_dtype), jnp.dtype(q.dtype))


def sparse_attention(
    q: Float[Array, "tokens num_q_heads latent_dim"],
    cache: LatentCache,
    topk_indices: Int[Array, "tokens topk"],
    *,
    sm_scale: float,
    topk_lens: Int[Array, " tokens"] | None,
    attn_sink: Float[Array, " num_q_heads"] | None,
) -> tuple[Float[Array, "tokens num_q_heads kv_lora_rank"], Float[Array, "tokens num_q_heads"]]:
    """Top-k attention, `(out of q's dtype, lse float32)`, chunked over tokens."""
    tokens, topk = topk_indices.shape
    softmax = _softmax(q, sm_scale, attn_sink)
    if topk_lens is not None:
        topk_indices = jnp.where(jnp.arange(topk)[None] < topk_lens[:, None], topk_indices, -1)
    bytes_per_token = topk * max(
        q.shape[-1] * softmax.compute_dtype.itemsize,
        q.shape[-2] * 4,
    )
    num_chunks = max(1, -(-tokens * bytes_per_token // _MAX_CHUNK_BYTES))
    if num_chunks == 1:
        return _attend_rows(q, cache, topk_indices, softmax)
    chunk = -(-tokens // num_chunks)
    return _map_blocks(
        lambda q, slots: _attend_rows(q, cache, slots, softmax), chunk, q, topk_indices
    )


def _map_blocks(f: Callable[..., tuple[Array, ...]], block: int, *arrays: Array) -> Any:
    """`f` on `block` entries of the leading dimension at a time, one block after the other.

    The last block is filled up with copies of the last entry, whose results are cut off.
    """
    size = arrays[0].shape[0]
    num_blocks = -(-size // block)

    def cut(x: Array) -> Array:
        widths = [(0, num_blocks * block - size)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, widths, mode="edge").reshape(num_blocks, block, *x.shape[1:])

    results = lax.map(lambda blocks: f(*blocks), tuple(map(cut, arrays)))
    return tuple(x.reshape(num_blocks * block, *x.shape[2:])[:size] for x in results)


def _attend_rows(
    q: Float[Array, "tokens num_q_heads latent_dim"],
    cache: LatentCache,
    slots: Int[Array, "tokens keys"],
    softmax: _Softmax,
) -> tuple[Array, Array]:
    slots = cache.valid_slots(slots)
    rows = cache.gather(slots, dtype=softmax.compute_dtype)
    scores = _scores("thd,tkd->thk", q, rows, softmax)
    scores = jnp.where((slots >= 0)[:, None], scores, -jnp.inf)
    running_max = jnp.max(scores, axis=-1, initial=-jnp.inf)
    weights = jnp.exp(scores - _finite(running_max)[..., None])
    denominator = jnp.sum(weights, axis=-1)
    values = rows[..., : cache.kv_lora_rank]
    numerator = _weighted_values("thk,tkd->thd", weights, values)
    return _finish(numerator, running_max, denominator, softmax)


def decode(
    q: Float[Array, "batch q_len num_q_heads latent_dim"],
    cache: LatentCache,
    page_indices: Int[Array, "batch pages_per_seq"],
    kv_lens: Int[Array, " batch"],
    *,
    sm_scale: float,
    attn_sink: Float[Array, " num_q_heads"] | None,
) -> tuple[
    Float[Array, "batch q_len num_q_heads kv_lora_rank"], Float[Array, "batch q_len num_q_heads"]
]:
    """Dense attention of each sequence's last `q_len` positions, `(out, lse float32)`."""
    batch, q_len, num_q_heads, latent_dim = q.shape
    softmax = _softmax(q, sm_scale, attn_sink)
    positions = kv_lens[:, None] - q_len + jnp.arange(q_len)[None]
    # Scores, weights, and the accumulators of a block of queries.
    bytes_per_query = max(1, batch * num_q_heads * 4 * (2 * _MIN_KEY_CHUNK + 2 * latent_dim))
    block = max(1, min(q_len, _MAX_CHUNK_BYTES // bytes_per_query))
    if block >= q_len:
        return _attend_pages(q, cache, page_indices, positions, softmax)

    def attend(q: Array, positions: Array) -> tuple[Array, ...]:
        q, positions = jnp.moveaxis(q, 0, 1), jnp.moveaxis(positions, 0, 1)
        results = _attend_pages(q, cache, page_indices, positions, softmax)
        return tuple(jnp.moveaxis(x, 1, 0) for x in results)

    # Blocks of queries: q_len leads.
    results = _map_blocks(attend, block, jnp.moveaxis(q, 1, 0), jnp.moveaxis(positions, 1, 0))
    out, lse = (jnp.moveaxis(x, 0, 1) for x in results)
    return out, lse


def prefill(
    q: Float[Array, "tokens num_q_heads latent_dim"],
    cache: LatentCache,
    page_indices: Int[Array, "batch pages_per_seq"],
    kv_lens: Int[Array, " batch"],
    cu_q_lens: Int[Array, " batch_plus_1"],
    *,
    sm_scale: float,
    attn_sink: Float[Array, " num_q_heads"] | None,
) -> tuple[Float[Array, "tokens num_q_heads kv_lora_rank"], Float[Array, "tokens num_q_heads"]]:
    """Ragged dense attention, `(out, lse float32)`; one block of one sequence at a time."""
    tokens, num_q_heads, _ = q.shape
    softmax = _softmax(q, sm_scale, attn_sink)

    def block(b: Array, positions: Array, q: Array) -> tuple[Array, Array]:
        table = lax.dynamic_slice_in_dim(page_indices, b, 1)
        out, lse = _attend_pages(q[None], cache, table, positions[None], softmax)
        return out[0], lse[0]

    out = jnp.zeros((tokens, num_q_heads, cache.kv_lora_rank), softmax.out_dtype)
    lse = jnp.full((tokens, num_q_heads), -jnp.inf, jnp.float32)
    # A loop's carry has one type, inside `jax.shard_map`, too.
    operands = [q, cache.data, page_indices, kv_lens, cu_q_lens]
    operands += [] if attn_sink is None else [attn_sink]
    outputs = (as_varying_as(out, operands), as_varying_as(lse, operands))
    return walk_sequences(block, (q,), outputs, kv_lens, cu_q_lens, chunk=_QUERY_CHUNK)


def walk_sequences(
    f: Callable[..., tuple[Array, ...]],
    inputs: tuple[Array, ...],
    outputs: tuple[Array, ...],
    kv_lens: Int[Array, " batch"],
    cu_q_lens: Int[Array, " batch_plus_1"],
    *,
    chunk: int,
) -> Any:
    """Applies `f` to a ragged batch, `chunk` tokens of one sequence at a time.

    Args:
      f: `f(b, positions, *blocks) -> blocks`: of sequence `b`, its tokens at `positions` [chunk],
        -1 where the block goes beyond the sequence.
      inputs: arrays [tokens, ...] that the input blocks are cut from.
      outputs: arrays [tokens, ...] that the output blocks are put into; what belongs to no
        sequence keeps its value.
      kv_lens, cu_q_lens: as in `mla_jax.mla_prefill`.
      chunk: tokens per block.

    Returns:
      The outputs.
    """
    tokens = inputs[0].shape[0]
    if tokens == 0 or kv_lens.shape[0] == 0:
        return outputs
    chunk = min(chunk, tokens)

    # A block that starts at the last token reaches beyond the end: the padding keeps dynamic_slice
    # from moving its start.
    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, chunk)] + [(0, 0)] * (x.ndim - 1))

    inputs = tuple(map(padded, inputs))
    offsets = jnp.arange(chunk)

    def block(b: Array, i: Array, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
        start = cu_q_lens[b] + i * chunk
        in_sequence = start + offsets < cu_q_lens[b + 1]
        first_position = kv_lens[b] - (cu_q_lens[b + 1] - cu_q_lens[b]) + i * chunk
        positions = jnp.where(in_sequence, first_position + offsets, -1)
        results = f(b, positions, *(lax.dynamic_slice_in_dim(x, start, chunk) for x in inputs))
        updated = []
        for result, output in zip(results, outputs, strict=True):
            # The block's tail may hold the next sequence's tokens: those keep what they have.
            kept = lax.dynamic_slice_in_dim(output, start, chunk)
            mask = in_sequence.reshape(chunk, *[1] * (output.ndim - 1))
            result = jnp.where(mask, result, kept)
            updated.append(lax.dynamic_update_slice_in_dim(output, result, start, 0))
        return tuple(updated)

    def sequence(b: Array, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
        blocks = (cu_q_lens[b + 1] - cu_q_lens[b] + chunk - 1) // chunk
        return lax.fori_loop(0, blocks, lambda i, outputs: block(b, i, outputs), outputs)

    outputs = lax.fori_loop(0, kv_lens.shape[0], sequence, tuple(map(padded, outputs)))
    return tuple(x[:tokens] for x in outputs)


def _attend_pages(
    q: Float[Array, "batch n num_q_heads latent_dim"],
    cache: LatentCache,
    page_indices: Int[Array, "batch pages_per_seq"],
    positions: Int[Array, "batch n"],
    softmax: _Softmax,
) -> tuple[Array, Array]:
    """Each query sees the keys of its sequence up to its own position; none if that is negative."""
    batch, n, num_q_heads, latent_dim = q.shape
    capacity = page_indices.shape[1] * cache.page_size
    # A length beyond the table (junk in a padded row, say) must not make the loop longer.
    last_position = jnp.minimum(jnp.max(positions, axis=1, initial=-1), capacity - 1)
    bytes_per_key = batch * (latent_dim * softmax.compute_dtype.itemsize + 8 * n * num_q_heads)
    chunk = min(
        _KEY_CHUNK, capacity, max(_MIN_KEY_CHUNK, _MAX_CHUNK_BYTES // max(1, bytes_per_key))
    )

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        running_max, denominator, numerator = state
        keys = (i * chunk + jnp.arange(chunk))[None]
        slots = logical_to_physical(
            page_indices, jnp.broadcast_to(keys, (batch, chunk)), cache.page_size
        )
        slots = cache.valid_slots(jnp.where(keys <= last_position[:, None], slots, -1))
        rows = cache.gather(slots, dtype=softmax.compute_dtype)
        visible = (slots >= 0)[:, None] & (keys[None] <= positions[..., None])
        scores = _scores("bnhd,bkd->bnhk", q, rows, softmax)
        scores = jnp.where(visible[:, :, None], scores, -jnp.inf)
        new_max = jnp.maximum(running_max, jnp.max(scores, axis=-1))
        decay = jnp.exp(running_max - _finite(new_max))
        weights = jnp.exp(scores - _finite(new_max)[..., None])
        values = rows[..., : cache.kv_lora_rank]
        numerator = numerator * decay[..., None] + _weighted_values(
            "bnhk,bkd->bnhd", weights, values
        )
        return new_max, denominator * decay + jnp.sum(weights, axis=-1), numerator

    heads = (batch, n, num_q_heads)
    state = (
        jnp.full(heads, -jnp.inf, jnp.float32),
        jnp.zeros(heads, jnp.float32),
        jnp.zeros((*heads, cache.kv_lora_rank), jnp.float32),
    )
    running_max, denominator, numerator = lax.fori_loop(
        0,
        (jnp.max(last_position, initial=-1) + chunk) // chunk,
        step,
        tuple(as_varying_as(x, (q, cache.data, page_indices, positions)) for x in state),
    )
    return _finish(numerator, running_max, denominator, softmax)


def _scores(subscripts: str, q: Array, rows: Array, softmax: _Softmax) -> Array:
    return softmax.sm_scale * jnp.einsum(
        subscripts,
        q.astype(softmax.compute_dtype),
        rows,
        precision=_HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _weighted_values(subscripts: str, weights: Array, values: Array) -> Array:
    return jnp.einsum(
        subscripts,
        weights.astype(values.dtype),
        values,
        precision=_HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _finite(running_max: Array) -> Array:
    """0 instead of -inf, so that exp(-inf - max) is 0 and not NaN."""
    return jnp.where(jnp.isneginf(running_max), 0, running_max)


def _finish(
    numerator: Array, running_max: Array, denominator: Array, softmax: _Softmax
) -> tuple[Array, Array]:
    """Normalizes and applies the sink; a query without a key gets out 0 and lse -inf."""
    out = numerator / jnp.where(denominator == 0, 1, denominator)[..., None]
    lse = running_max + jnp.log(denominator)
    if softmax.attn_sink is not None:
        # A key without a value that joins the softmax's denominator.
        gate = jax.nn.sigmoid(
            _finite(lse) - softmax.attn_sink.astype(jnp.float32).reshape(*[1] * (lse.ndim - 1), -1)
        )
        out = out * jnp.where(jnp.isneginf(lse), 0, gate)[..., None]
    return out.astype(softmax.out_dtype), lse
