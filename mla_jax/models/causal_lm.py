"""The decoder of the DeepSeek V3 / V3.2 / GLM MoE DSA families.

Module names follow Hugging Face's checkpoints, so that `mla_jax.checkpoint` needs no table of them.
Layers are unrolled: a compiled step of unrolled layers launches several times faster than a scan.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PrecisionLike
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from mla_jax.cache import KVCacheFormat, LatentCache
from mla_jax.dispatch import Implementation
from mla_jax.models.config import ModelConfig
from mla_jax.models.moe import MLP, MoE
from mla_jax.modules import (
    MultiHeadLatentAttention,
    SparseCache,
    SparseMultiHeadLatentAttention,
)
from mla_jax.sharding import Parallelism
from mla_jax.validation import as_arrays
from pallas_kernels import layout

LayerCache = LatentCache | SparseCache


class DecoderLayer(nnx.Module):
    """`x += attention(norm(x))`, then `x += mlp(norm(x))`."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        parallelism: Parallelism,
        implementation: Implementation | None,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        attention = {
            "mesh": parallelism.mesh,
            "head_axis": parallelism.axis,
            "implementation": implementation,
            "rngs": rngs,
            **dtypes,
        }
        hidden_size = config.attention.hidden_size
        norm = functools.partial(_rms_norm, config, parallelism, rngs=rngs, **dtypes)
        self.input_layernorm = norm()
        self.self_attn = (
            SparseMultiHeadLatentAttention(
                config.attention, has_indexer=config.indexed_layers[layer], **attention
            )
            if config.is_sparse
            else MultiHeadLatentAttention(config.attention, **attention)
        )
        self.post_attention_layernorm = norm()
        sharded = {"parallelism": parallelism, "rngs": rngs, **dtypes}
        if config.dense_layers[layer]:
            self.mlp = MLP(hidden_size, config.intermediate_size, **sharded)
        else:
            assert config.moe is not None
            self.mlp = MoE(hidden_size, config.moe, **sharded)

    def __call__(
        self,
        x: Array,
        cache: LayerCache,
        topk_indices: Array | None,
        **tokens: Array | None,
    ) -> tuple[Array, LayerCache, Array | None]:
        normed = self.input_layernorm(x)
        if isinstance(self.self_attn, SparseMultiHeadLatentAttention):
            shared = topk_indices if self.self_attn.indexer is None else None
            out, cache, topk_indices = self.self_attn(normed, cache, topk_indices=shared, **tokens)  # pyright: ignore
        else:
            out, cache = self.self_attn(normed, cache, **tokens)  # pyright: ignore
        x = x + out
        normed = self.post_attention_layernorm(x)
        out = self.mlp(normed.reshape(-1, x.shape[-1]))
        return x + out.reshape(x.shape), cache, topk_indices


def _rms_norm(
    config: ModelConfig, parallelism: Parallelism, *, rngs: nnx.Rngs, **dtypes: Any
) -> nnx.RMSNorm:
    dtypes = {k: v for k, v in dtypes.items() if k != "precision"}
    return nnx.RMSNorm(
        config.attention.hidden_size,
        epsilon=config.rms_norm_eps,
        scale_metadata=parallelism.metadata(),
        rngs=rngs,
        **dtypes,
    )


class CausalLM(nnx.Module):
    """A decoder-only language model with MLA over paged latent caches.

    Example::

      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mla_jax import allocate_pages
      >>> from mla_jax.models import CausalLM, ModelConfig
      >>> config = ModelConfig.from_hf(dict(
      ...     model_type="deepseek_v3", vocab_size=64, hidden_size=32, intermediate_size=48,
      ...     num_hidden_layers=1, num_attention_heads=2, kv_lora_rank=128, qk_nope_head_dim=16,
      ...     qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=1))
      >>> model = CausalLM(config, rngs=nnx.Rngs(0))
      >>> page_indices, num_pages = allocate_pages([100], page_size=64)
      >>> caches = model.init_caches(num_pages)
      >>> @nnx.jit(donate_argnames="caches")
      ... def step(model, ids, caches, kv_lens):
      ...     return model(ids, caches, page_indices=jnp.asarray(page_indices), kv_lens=kv_lens)
      >>> logits, caches = step(model, jnp.ones((1, 7), jnp.int32), caches, jnp.array([7]))
      >>> logits.shape, len(caches)
      ((1, 7, 64), 1)

    Args:
      config: sizes, from `ModelConfig.from_file` or `mla_jax.models.presets`.
      dtype: dtype of the computation; None infers it from the parameters.
      param_dtype: dtype that the parameters are created in; the router's correction stays float32.
      precision: precision of the matrix products.
      mesh: run tensor parallel over `model_axis` of this mesh; None takes the mesh in context. See
        `MultiHeadLatentAttention`.
      model_axis: the mesh axis that heads, MLP widths and vocabulary are split over.
      implementation: of attention and cache writes, "xla", "mosaic_gpu" or None to choose.
      rngs: random numbers for the parameters.

    Raises:
      ValueError: if the mesh axis does not divide heads, widths or vocabulary.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        mesh: Mesh | AbstractMesh | None = None,
        model_axis: str = "model",
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.parallelism = Parallelism(mesh, model_axis)
        hidden_size = config.attention.hidden_size
        self.parallelism.check_divides(vocab_size=config.vocab_size, hidden_size=hidden_size)
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        columns = self.parallelism.metadata(None, model_axis)
        self.embed_tokens = nnx.Embed(
            config.vocab_size, hidden_size, embedding_metadata=columns, rngs=rngs, **dtypes
        )
        self.layers = nnx.List(
            DecoderLayer(
                config,
                layer,
                parallelism=self.parallelism,
                implementation=implementation,
                rngs=rngs,
                precision=precision,
                **dtypes,
            )
            for layer in range(config.num_layers)
        )
        self.norm = _rms_norm(config, self.parallelism, rngs=rngs, **dtypes)
        self.lm_head = nnx.Linear(
            hidden_size,
            config.vocab_size,
            use_bias=False,
            precision=precision,
            kernel_metadata=columns,
            rngs=rngs,
            **dtypes,
        )

    def init_caches(
        self,
        num_pages: int,
        page_size: int = 64,
        *,
        format: KVCacheFormat = "fp8_ds_mla",
        scale_format: layout.ScaleFormat = "power_of_two",
    ) -> tuple[LayerCache, ...]:
        """One empty `LatentCache` or `SparseCache` per layer; all layers share the page table."""
        return tuple(
            layer.self_attn.init_cache(
                num_pages, page_size, format=format, scale_format=scale_format
            )
            for layer in self.layers
        )

    def __call__(
        self,
        input_ids: Int[Array, "*batch_and_len"],
        caches: tuple[LayerCache, ...],
        *,
        page_indices: Int[Array, "batch pages_per_seq"],
        kv_lens: Int[Array, " batch"],
        cu_q_lens: Int[Array, " batch_plus_1"] | None = None,
        last_token_only: bool = False,
    ) -> tuple[Float[Array, "*batch_and_len vocab_size"], tuple[LayerCache, ...]]:
        """Logits of the next token after each given token, and the caches with the given tokens in.

        Args:
          input_ids: int32 `[batch, q_len]`, or ragged `[tokens]` with `cu_q_lens`.
          caches: one per layer, from `init_caches`; donate them to the enclosing jit.
          page_indices, kv_lens, cu_q_lens: as in `mla_jax.modules.MultiHeadLatentAttention`.
          last_token_only: compute logits for each sequence's last token only,
            `[batch, vocab_size]`. (That of a sequence without tokens in this call is arbitrary.)

        Returns:
          `(logits, caches)`; logits are float32 of input_ids' shape plus `[vocab_size]`.

        Raises:
          ValueError: for shapes that do not fit, or caches of other sizes or number.
        """
        if not isinstance(caches, tuple | list):
            raise ValueError(f"caches is a {type(caches).__name__}; make them with init_caches")
        if len(caches) != self.config.num_layers:
            raise ValueError(f"{len(caches)=} must be one per layer, {self.config.num_layers}")
        (input_ids,) = as_arrays(input_ids=input_ids)
        if input_ids.ndim != (2 if cu_q_lens is None else 1):
            raise ValueError(
                f"{input_ids.shape=} must be [batch, q_len], or [tokens] with cu_q_lens (given:"
                f" {cu_q_lens is not None})"
            )
        forward = functools.partial(CausalLM._forward, last_token_only=last_token_only)
        return self.parallelism.run(
            forward, self, input_ids, caches, page_indices, kv_lens, cu_q_lens
        )

    def _forward(
        self,
        input_ids: Array,
        caches: tuple[LayerCache, ...],
        page_indices: Array,
        kv_lens: Array,
        cu_q_lens: Array | None,
        *,
        last_token_only: bool,
    ) -> tuple[Array, tuple[LayerCache, ...]]:
        x = self.parallelism.replicate(self.embed_tokens(input_ids))
        new_caches = []
        topk_indices = None
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache, topk_indices = layer(
                x,
                cache,
                topk_indices,
                page_indices=page_indices,
                kv_lens=kv_lens,
                cu_q_lens=cu_q_lens,
            )
            new_caches.append(cache)
        if last_token_only:
            x = _last_tokens(x, cu_q_lens)
        logits = self.lm_head(self.norm(x)).astype(jnp.float32)
        return logits, tuple(new_caches)


def _last_tokens(x: Array, cu_q_lens: Array | None) -> Array:
    """Of x [batch, q_len, hidden_size] or ragged [tokens, hidden_size], one row per sequence."""
    if x.shape[-2] == 0:
        batch = x.shape[0] if cu_q_lens is None else cu_q_lens.shape[0] - 1
        return jnp.zeros((batch, x.shape[-1]), x.dtype)
    return x[:, -1] if cu_q_lens is None else x[jnp.maximum(cu_q_lens[1:] - 1, 0)]
