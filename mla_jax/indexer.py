"""The indexer of DeepSeek Sparse Attention (DSA): which keys each token attends to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PrecisionLike
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax.cache import LatentCache, logical_to_physical
from mla_jax.reference import walk_sequences
from mla_jax.rope import RopeConfig, apply_rope
from mla_jax.sharding import Parallelism
from mla_jax.validation import check_sizes
from pallas_kernels.varying import as_varying_as

# Per-head scores [queries, index heads, keys] that are held at a time, and all keys' scores
# [queries, keys].
_MAX_SCORE_BYTES = 256 * 2**20
# Keys per step, at most and (before the queries are cut into blocks) at least.
_MAX_KEY_CHUNK = 2048
_MIN_KEY_CHUNK = 256
# Queries of one sequence per step, where all queries of a call do not fit.
_QUERY_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
    """Sizes of the DSA indexer ("lightning indexer" of DeepSeek V3.2).

    Attributes:
      num_heads: index heads (64 in DeepSeek V3.2, 32 in GLM-5).
      head_dim: dims of an index head; the first `qk_rope_head_dim` of them are rotated.
      topk: keys that each token attends to.
      rope_interleaved: pairing of the indexer's RoPE: False in DeepSeek V3.2, True in GLM.
    """

    num_heads: int
    head_dim: int = 128
    topk: int = 2048
    rope_interleaved: bool = False

    def __post_init__(self) -> None:
        check_sizes(num_heads=self.num_heads, head_dim=self.head_dim, topk=self.topk)


class Indexer(nnx.Module):
    """Chooses the keys that each token attends to ("lightning indexer", DeepSeek V3.2).

    With a key `k_s` cached for each token `s`, and for each token `t` index queries `q_{t,h}` and
    weights `w_{t,h}`,

        score(t, s) = sum_h w_{t,h} relu(q_{t,h} . k_s)      for s <= t

    and the `topk` highest scores win. `w` is scaled by `num_heads**-0.5 head_dim**-0.5`. Replicated
    under tensor parallelism: every device needs all indices.

    Args:
      hidden_size: width of the residual stream.
      q_lora_rank: rank of the attention's low-rank query, which the index queries are made of.
      config: the indexer's own sizes.
      rope: frequencies.
      rope_dim: leading dims of an index head that are rotated.
      parallelism: the mesh axis of the layer that this is a part of.
      dtype, param_dtype, precision, kernel_init, rngs: as in `MultiHeadLatentAttention`.
    """

    def __init__(
        self,
        hidden_size: int,
        q_lora_rank: int,
        config: IndexerConfig,
        *,
        rope: RopeConfig,
        rope_dim: int,
        parallelism: Parallelism,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.rope = rope
        self.rope_dim = rope_dim
        self.precision = precision
        whole = parallelism.metadata()
        linear = functools.partial(
            nnx.Linear,
            use_bias=False,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            kernel_metadata=whole,
            rngs=rngs,
        )
        self.wq_b = linear(q_lora_rank, config.num_heads * config.head_dim, dtype=dtype)
        self.wk = linear(hidden_size, config.head_dim, dtype=dtype)
        self.k_norm = nnx.LayerNorm(
            config.head_dim,
            epsilon=1e-6,
            dtype=dtype,
            param_dtype=param_dtype,
            scale_metadata=whole,
            bias_metadata=whole,
            rngs=rngs,
        )
        # In float32 whatever the model's dtype: these weights decide near ties.
        self.weights_proj = linear(hidden_size, config.num_heads, dtype=jnp.float32)

    def project(
        self,
        x: Float[Array, "tokens hidden_size"],
        low_rank_q: Float[Array, "tokens q_lora_rank"],
        positions: Int[Array, " tokens"],
    ) -> tuple[
        Float[Array, "tokens index_heads index_head_dim"],
        Float[Array, "tokens index_heads"],
        Float[Array, "tokens index_head_dim"],
    ]:
        """Index queries, their weights (float32) and the keys to cache."""
        c = self.config
        q = self.wq_b(low_rank_q).reshape(-1, c.num_heads, c.head_dim)
        weights = self.weights_proj(x) * (c.num_heads**-0.5 * c.head_dim**-0.5)
        return self._rotate(q, positions), weights, self._rotate(self.k_norm(self.wk(x)), positions)

    def _rotate(self, x: Array, positions: Array) -> Array:
        rope, rest = jnp.split(x, [self.rope_dim], axis=-1)
        rope = apply_rope(rope, positions, self.rope, interleaved=self.config.rope_interleaved)
        return jnp.concatenate([rope, rest], axis=-1)


def select_keys(
    q: Float[Array, "*tokens index_heads index_head_dim"],
    weights: Float[Array, "*tokens index_heads"],
    index_keys: LatentCache,
    page_indices: Int[Array, "batch pages_per_seq"],
    kv_lens: Int[Array, " batch"],
    cu_q_lens: Int[Array, " batch_plus_1"] | None = None,
    *,
    topk: int,
    precision: PrecisionLike = None,
) -> Int[Array, "tokens topk"]:
    """Physical slots of the highest scores among the keys up to each token's own position.

    Keys are gathered once per sequence, and no more than `_MAX_SCORE_BYTES` of scores are held:
    a call with more queries than that goes through its sequences block by block.

    Args:
      q, weights: of `Indexer.project`; leading dims `[batch, q_len]`, or `[tokens]` if ragged.
      index_keys: the cached keys, those of this call's tokens included.
      page_indices, kv_lens, cu_q_lens: as in `MultiHeadLatentAttention`.

    Returns:
      int32 `[tokens, min(topk, pages_per_seq * page_size)]`, tokens in the order of q; -1
      beyond the keys that there are.
    """
    num_heads, head_dim = q.shape[-2:]
    num_keys = page_indices.shape[1] * index_keys.page_size
    topk = min(topk, num_keys)
    fitting = _MAX_SCORE_BYTES // (4 * max(num_heads * _MIN_KEY_CHUNK, num_keys))
    if cu_q_lens is None:
        batch, q_len = q.shape[:2]
        if batch * q_len <= fitting:
            positions = kv_lens[:, None] - q_len + jnp.arange(q_len)[None]
            slots = _select(q, weights, index_keys, page_indices, positions, topk, precision)
            return slots.reshape(batch * q_len, topk)
        q = q.reshape(batch * q_len, num_heads, head_dim)
        weights = weights.reshape(batch * q_len, num_heads)
        cu_q_lens = jnp.arange(batch + 1, dtype=jnp.int32) * q_len

    def block(b: Array, positions: Array, q: Array, weights: Array) -> tuple[Array]:
        table = lax.dynamic_slice_in_dim(page_indices, b, 1)
        args = (q[None], weights[None], index_keys, table, positions[None], topk, precision)
        return (_select(*args)[0],)

    slots = as_varying_as(
        jnp.full((q.shape[0], topk), -1, jnp.int32),
        (q, weights, index_keys.data, page_indices, kv_lens, cu_q_lens),
    )
    (slots,) = walk_sequences(
        block,
        (q, weights),
        (slots,),
        kv_lens,
        cu_q_lens,
        chunk=max(1, min(_QUERY_CHUNK, fitting)),
    )
    return slots


def _select(
    q: Float[Array, "batch n index_heads index_head_dim"],
    weights: Float[Array, "batch n index_heads"],
    index_keys: LatentCache,
    page_indices: Int[Array, "batch pages_per_seq"],
    positions: Int[Array, "batch n"],
    topk: int,
    precision: PrecisionLike,
) -> Int[Array, "batch n topk"]:
    scores = _scores(q, weights, index_keys, page_indices, positions, precision)
    best, chosen = lax.top_k(scores, topk)
    chosen = jnp.where(jnp.isneginf(best), -1, chosen)
    slots = logical_to_physical(page_indices, chosen.reshape(q.shape[0], -1), index_keys.page_size)
    return slots.reshape(chosen.shape)


def _scores(
    q: Array,
    weights: Array,
    index_keys: LatentCache,
    page_indices: Array,
    positions: Array,
    precision: PrecisionLike,
) -> Float[Array, "batch n keys"]:
    """Scores of all keys of the page table; -inf for the future and for missing pages."""
    batch, n, num_heads, _ = q.shape
    num_keys = page_indices.shape[1] * index_keys.page_size
    fitting = _MAX_SCORE_BYTES // max(1, 4 * num_heads * batch * n)
    chunk = min(num_keys, _MAX_KEY_CHUNK, max(_MIN_KEY_CHUNK, fitting))
    # A length beyond the table must not make the loop longer.
    last_position = jnp.minimum(jnp.max(positions, axis=1, initial=-1), num_keys - 1)

    def chunk_scores(i: Array | int) -> Array:
        keys = (i * chunk + jnp.arange(chunk))[None]
        slots = logical_to_physical(
            page_indices, jnp.broadcast_to(keys, (batch, chunk)), index_keys.page_size
        )
        # Masked before the gather: the bytes of slots that nobody wrote are never read.
        slots = jnp.where(keys <= last_position[:, None], slots, -1)
        slots = index_keys.valid_slots(slots)
        k = index_keys.gather(slots, dtype=q.dtype)
        per_head = jnp.einsum(
            "bnhd,bkd->bnhk",
            q,
            k,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        scores = jnp.einsum(
            "bnhk,bnh->bnk", jax.nn.relu(per_head), weights, precision=lax.Precision.HIGHEST
        )
        visible = (slots >= 0)[:, None] & (keys[None] <= positions[..., None])
        return jnp.where(visible, scores, -jnp.inf)

    num_chunks = -(-num_keys // chunk)
    if num_chunks == 1:
        return chunk_scores(0)
    scores = lax.fori_loop(
        0,
        (jnp.max(last_position, initial=-1) + chunk) // chunk,
        lambda i, scores: lax.dynamic_update_slice_in_dim(
            scores, chunk_scores(i), i * chunk, axis=2
        ),
        as_varying_as(
            jnp.full((batch, n, num_chunks * chunk), -jnp.inf, jnp.float32),
            (q, weights, index_keys.data, page_indices, positions),
        ),
    )
    return scores[..., :num_keys]
