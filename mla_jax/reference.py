"""`implementation="xla"`: MLA over the paged cache in plain jnp, for any device, dims and format.

All functions compute, for each query head over the rows it may see,

    s = sm_scale * q . [kv_c, k_pe]      out = softmax(s) @ kv_c      lse = log(sum(exp(s)))

with q absorbed (`ql_nope ++ q_pe`). Matrix products run in q's dtype and accumulate in float32;
with float32 q everything is float32. Rows that a query may not see are replaced by zeros before any
arithmetic, so that no byte of theirs, NaN included, reaches the result.

Memory is bounded whatever the shapes: the sparse form walks over chunks of tokens, the dense forms
over chunks of keys with an online softmax (Milakov and Gimelshein, 2018).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax.cache import LatentCache, logical_to_physical

# Gathered rows that the sparse form holds at a time. The largest common decode step, 128 tokens x
# top-k 2,048 in bfloat16, is 302 MB and still goes in one piece.
_MAX_GATHER_BYTES = 512 * 2**20
# Keys per step of the dense forms, and queries per step of the ragged one.
_KEY_CHUNK = 1024
_QUERY_CHUNK = 128

_HIGHEST = lax.Precision.HIGHEST


def sparse_attention(
    q: Float[Array, "tokens num_q_heads latent_dim"],
    cache: LatentCache,
    topk_indices: Int[Array, "tokens topk"],
    *,
    sm_scale: float,
    topk_lens: Int[Array, " tokens"] | None,
) -> tuple[Float[Array, "tokens num_q_heads kv_lora_rank"], Float[Array, "tokens num_q_heads"]]:
    """Top-k attention, `(out float32, lse float32)`, chunked over tokens."""
    tokens, topk = topk_indices.shape
    if topk_lens is not None:
        topk_indices = jnp.where(jnp.arange(topk) < topk_lens[:, None], topk_indices, -1)
    bytes_per_token = max(1, topk * q.shape[-1] * q.dtype.itemsize)
    num_chunks = max(1, -(-tokens * bytes_per_token // _MAX_GATHER_BYTES))
    if num_chunks == 1:
        return _attend_rows(q, cache, topk_indices, sm_scale)
    chunk = -(-tokens // num_chunks)
    padding = num_chunks * chunk - tokens
    q = jnp.pad(q, ((0, padding), (0, 0), (0, 0)))
    topk_indices = jnp.pad(topk_indices, ((0, padding), (0, 0)), constant_values=-1)
    out, lse = lax.map(
        lambda args: _attend_rows(args[0], cache, args[1], sm_scale),
        (
            q.reshape(num_chunks, chunk, *q.shape[1:]),
            topk_indices.reshape(num_chunks, chunk, topk),
        ),
    )
    return (
        out.reshape(-1, *out.shape[2:])[:tokens],
        lse.reshape(-1, lse.shape[-1])[:tokens],
    )


def _attend_rows(
    q: Float[Array, "tokens num_q_heads latent_dim"],
    cache: LatentCache,
    slots: Int[Array, "tokens keys"],
    sm_scale: float,
) -> tuple[Array, Array]:
    rows = cache.gather(slots, dtype=q.dtype)
    valid = (slots >= 0) & (slots < cache.num_slots)
    scores = _scores("thd,tkd->thk", q, rows, sm_scale)
    scores = jnp.where(valid[:, None], scores, -jnp.inf)
    running_max = jnp.max(scores, axis=-1, initial=-jnp.inf)
    weights = jnp.exp(scores - _finite(running_max)[..., None])
    denominator = jnp.sum(weights, axis=-1)
    values = rows[..., : cache.kv_lora_rank]
    numerator = _weighted_values("thk,tkd->thd", weights, values)
    return _finish(numerator, running_max, denominator)


def decode(
    q: Float[Array, "batch q_len num_q_heads latent_dim"],
    cache: LatentCache,
    page_indices: Int[Array, "batch pages_per_seq"],
    kv_lens: Int[Array, " batch"],
    *,
    sm_scale: float,
) -> tuple[
    Float[Array, "batch q_len num_q_heads kv_lora_rank"], Float[Array, "batch q_len num_q_heads"]
]:
    """Dense attention of each sequence's last `q_len` positions, `(out float32, lse float32)`."""
    positions = kv_lens[:, None] - q.shape[1] + jnp.arange(q.shape[1])
    return _attend_pages(q, cache, page_indices, positions, sm_scale)


def prefill(
    q: Float[Array, "tokens num_q_heads latent_dim"],
    cache: LatentCache,
    page_indices: Int[Array, "batch pages_per_seq"],
    kv_lens: Int[Array, " batch"],
    cu_q_lens: Int[Array, " batch_plus_1"],
    *,
    sm_scale: float,
) -> tuple[Float[Array, "tokens num_q_heads kv_lora_rank"], Float[Array, "tokens num_q_heads"]]:
    """Ragged dense attention, `(out float32, lse float32)`; one block of one sequence at a time."""
    tokens, num_q_heads, _ = q.shape
    # A block that starts at the last token reaches beyond the end: the padding keeps dynamic_slice
    # from moving its start.
    q = jnp.pad(q, ((0, _QUERY_CHUNK), (0, 0), (0, 0)))
    out = jnp.zeros((tokens + _QUERY_CHUNK, num_q_heads, cache.kv_lora_rank), jnp.float32)
    lse = jnp.full((tokens + _QUERY_CHUNK, num_q_heads), -jnp.inf, jnp.float32)
    offsets = jnp.arange(_QUERY_CHUNK)

    def block(b: Array, i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = state
        start = cu_q_lens[b] + i * _QUERY_CHUNK
        in_sequence = start + offsets < cu_q_lens[b + 1]
        first_position = kv_lens[b] - (cu_q_lens[b + 1] - cu_q_lens[b]) + i * _QUERY_CHUNK
        positions = jnp.where(in_sequence, first_position + offsets, -1)
        block_out, block_lse = _attend_pages(
            lax.dynamic_slice_in_dim(q, start, _QUERY_CHUNK)[None],
            cache,
            lax.dynamic_slice_in_dim(page_indices, b, 1),
            positions[None],
            sm_scale,
        )
        # The block's tail may hold the next sequence's tokens: those keep what they have.
        block_out = jnp.where(
            in_sequence[:, None, None],
            block_out[0],
            lax.dynamic_slice_in_dim(out, start, _QUERY_CHUNK),
        )
        block_lse = jnp.where(
            in_sequence[:, None], block_lse[0], lax.dynamic_slice_in_dim(lse, start, _QUERY_CHUNK)
        )
        return (
            lax.dynamic_update_slice_in_dim(out, block_out, start, 0),
            lax.dynamic_update_slice_in_dim(lse, block_lse, start, 0),
        )

    def sequence(b: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        blocks = (cu_q_lens[b + 1] - cu_q_lens[b] + _QUERY_CHUNK - 1) // _QUERY_CHUNK
        return lax.fori_loop(0, blocks, lambda i, state: block(b, i, state), state)

    out, lse = lax.fori_loop(0, kv_lens.shape[0], sequence, (out, lse))
    return out[:tokens], lse[:tokens]


def _attend_pages(
    q: Float[Array, "batch n num_q_heads latent_dim"],
    cache: LatentCache,
    page_indices: Int[Array, "batch pages_per_seq"],
    positions: Int[Array, "batch n"],
    sm_scale: float,
) -> tuple[Array, Array]:
    """Each query sees the keys of its sequence up to its own position; none if that is negative."""
    batch, n, num_q_heads, _ = q.shape
    last_position = jnp.max(positions, axis=1)
    chunk = min(_KEY_CHUNK, page_indices.shape[1] * cache.page_size)

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        running_max, denominator, numerator = state
        keys = i * chunk + jnp.arange(chunk)
        slots = logical_to_physical(
            page_indices, jnp.broadcast_to(keys, (batch, chunk)), cache.page_size
        )
        slots = jnp.where(keys <= last_position[:, None], slots, -1)
        rows = cache.gather(slots, dtype=q.dtype)
        visible = (slots >= 0)[:, None] & (keys <= positions[..., None])
        scores = _scores("bnhd,bkd->bnhk", q, rows, sm_scale)
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
    steps = (jnp.max(last_position, initial=-1) + chunk) // chunk
    running_max, denominator, numerator = lax.fori_loop(
        0,
        steps,
        step,
        (
            jnp.full(heads, -jnp.inf, jnp.float32),
            jnp.zeros(heads, jnp.float32),
            jnp.zeros((*heads, cache.kv_lora_rank), jnp.float32),
        ),
    )
    return _finish(numerator, running_max, denominator)


def _scores(subscripts: str, q: Array, rows: Array, sm_scale: float) -> Array:
    return sm_scale * jnp.einsum(
        subscripts, q, rows, precision=_HIGHEST, preferred_element_type=jnp.float32
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


def _finish(numerator: Array, running_max: Array, denominator: Array) -> tuple[Array, Array]:
    """Normalizes; a query without a key gets out 0 and lse -inf."""
    out = numerator / jnp.where(denominator == 0, 1, denominator)[..., None]
    return out, running_max + jnp.log(denominator)


def apply_attn_sink(
    out: Float[Array, "*tokens num_q_heads kv_lora_rank"],
    lse: Float[Array, "*tokens num_q_heads"],
    attn_sink: Float[Array, " num_q_heads"],
) -> Float[Array, "*tokens num_q_heads kv_lora_rank"]:
    """`out * sigmoid(lse - attn_sink)`: a key without a value joins the softmax's denominator."""
    gate = jax.nn.sigmoid(_finite(lse) - attn_sink.astype(jnp.float32))
    return out * jnp.where(jnp.isneginf(lse), 0, gate)[..., None]
