"""Flax NNX modules: Multi-head Latent Attention over a paged latent cache, dense and top-k sparse.

Both modules run the *absorbed* form of MLA. With `kv_b_proj` = [`w_uk`, `w_uv`] per head,

    score(q, k) = q_nope . (w_uk kv_c) + q_pe . k_pe = (w_uk^T q_nope) . kv_c + q_pe . k_pe
    out         = sum_k p_k (w_uv^T kv_c_k)          = w_uv^T (sum_k p_k kv_c_k)

so queries are absorbed (`ql_nope = w_uk^T q_nope`) before the attention op, attention reads nothing
but the latent cache, and `w_uv` is applied to what it returns. Data flow of a call:

    x -> q_a_proj, q_a_layernorm, q_b_proj (or q_proj) -> RoPE -> absorb w_uk -+
    x -> kv_a_proj_with_mqa, kv_a_layernorm -> RoPE -> write to the cache ------+-> attention
                                                       out <- o_proj <- w_uv <-+

Sub-modules carry the names of Hugging Face's checkpoints; kernels are [in, out].

Under tensor parallelism the heads are split over one mesh axis: `q_b_proj` / `q_proj` and
`kv_b_proj` by columns, `o_proj` by rows, the attention op by `mla_jax.tensor_parallel`. Everything
else, the caches included, is replicated, and the all-reduce after `o_proj` is the only one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PrecisionLike
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from mla_jax.attention import mla_decode, mla_prefill, mla_sparse_attention
from mla_jax.cache import KVCacheFormat, LatentCache, logical_to_physical
from mla_jax.dispatch import Implementation, check_implementation
from mla_jax.indexer import Indexer, IndexerConfig, select_keys
from mla_jax.rope import RopeConfig, apply_rope
from mla_jax.sharding import Parallelism, tensor_parallel
from mla_jax.validation import as_arrays, check_indices, check_sizes
from pallas_kernels import layout

# The latent norms use this whatever a model's rms_norm_eps says.
_LATENT_NORM_EPS = 1e-6

_default_kernel_init = nnx.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Sizes of one MLA layer, in Hugging Face's terms; per head, DeepSeek V3's are the defaults.

    Attributes:
      hidden_size: width of the residual stream.
      num_heads: query heads, over all devices.
      q_lora_rank: rank of the query's low-rank form; None for a plain `q_proj`.
      kv_lora_rank: latent dims of a cache row.
      qk_nope_head_dim: dims of a head without RoPE.
      qk_rope_head_dim: dims of a head with RoPE.
      v_head_dim: dims of a head's values.
      rope: frequencies.
      indexer: the DSA indexer's sizes; for `SparseMultiHeadLatentAttention`.
    """

    hidden_size: int
    num_heads: int
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    indexer: IndexerConfig | None = None

    def __post_init__(self) -> None:
        check_sizes(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            q_lora_rank=1 if self.q_lora_rank is None else self.q_lora_rank,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
        )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"{self.qk_rope_head_dim=} must be even: RoPE rotates pairs")
        if self.indexer is None:
            return
        if self.q_lora_rank is None:
            raise ValueError("q_lora_rank=None with an indexer: it reads the low-rank query")
        if self.indexer.head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"{self.indexer.head_dim=} must hold the {self.qk_rope_head_dim=} rotated dims"
            )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def sm_scale(self) -> float:
        """`qk_head_dim**-0.5` times YaRN's factor squared; never of the 576 absorbed dims."""
        return self.qk_head_dim**-0.5 * self.rope.softmax_scale_factor


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["latent", "index_keys"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class SparseCache:
    """The caches of one DSA layer: latents, and the indexer's keys at the same slots.

    Attributes:
      latent: the latent cache.
      index_keys: one row of `index_head_dim` per token, no RoPE part of its own; None in layers
        that share another layer's top-k.
    """

    latent: LatentCache
    index_keys: LatentCache | None

    @property
    def page_size(self) -> int:
        return self.latent.page_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in both caches."""
        index_bytes = 0 if self.index_keys is None else self.index_keys.bytes_per_token
        return self.latent.bytes_per_token + index_bytes


jax.export.register_pytree_node_serialization(
    SparseCache,
    serialized_name="mla_jax.SparseCache",
    serialize_auxdata=lambda nothing: b"",
    deserialize_auxdata=lambda data: (),
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "page_rows", "page_indices", "kv_lens", "cu_q_lens"],
    meta_fields=["batch_shape"],
)
@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Where the tokens of a call stand, for equal lengths and ragged ones alike.

    Attributes:
      positions: [batch, q_len], or [tokens, 1], within the sequence; negative for padding.
      page_rows: the page table of each row of `positions`.
      page_indices, kv_lens, cu_q_lens: the caller's, as jax arrays.
      batch_shape: (batch, q_len), or (tokens,) for a ragged call.
    """

    positions: Array
    page_rows: Array
    page_indices: Array
    kv_lens: Array
    cu_q_lens: Array | None
    batch_shape: tuple[int, ...]

    @classmethod
    def locate(cls, x: Array, page_indices: Array, kv_lens: Array, cu_q_lens: Array | None) -> Self:
        if x.ndim != (3 if cu_q_lens is None else 2):
            raise ValueError(
                f"{x.shape=} must be [batch, q_len, hidden], or [tokens, hidden] with cu_q_lens"
                f" (given: {cu_q_lens is not None})"
            )
        page_indices, kv_lens, cu_q_lens = as_arrays(
            "cu_q_lens", page_indices=page_indices, kv_lens=kv_lens, cu_q_lens=cu_q_lens
        )
        check_indices("kv_lens", kv_lens, (None,), "[batch]")
        batch = kv_lens.shape[0]
        check_indices("page_indices", page_indices, (batch, None), "[batch, pages_per_seq]")
        if cu_q_lens is None:
            if x.shape[0] != batch:
                raise ValueError(f"{x.shape=} and {kv_lens.shape=} must agree on the batch size")
            q_len = x.shape[1]
            positions = kv_lens[:, None] - q_len + jnp.arange(q_len)[None]
            return cls(positions, page_indices, page_indices, kv_lens, None, (batch, q_len))
        check_indices("cu_q_lens", cu_q_lens, (batch + 1,), "[batch + 1]")
        if batch == 0:  # only padding
            positions = jnp.full((x.shape[0], 1), -1, jnp.int32)
            page_rows = jnp.full((x.shape[0], page_indices.shape[1]), -1, jnp.int32)
            return cls(positions, page_rows, page_indices, kv_lens, cu_q_lens, (x.shape[0],))
        token = jnp.arange(x.shape[0])
        sequence = jnp.searchsorted(cu_q_lens, token, side="right") - 1
        padding = sequence >= batch
        sequence = jnp.minimum(sequence, batch - 1)
        positions = kv_lens[sequence] - cu_q_lens[sequence + 1] + token
        positions = jnp.where(padding, -1, positions).astype(jnp.int32)[:, None]
        page_rows = page_indices[sequence]
        return cls(positions, page_rows, page_indices, kv_lens, cu_q_lens, (x.shape[0],))

    def slots(self, page_size: int) -> Int[Array, " tokens"]:
        """Physical slot of each token; -1 for padding."""
        return logical_to_physical(self.page_rows, self.positions, page_size).reshape(-1)


class MultiHeadLatentAttention(nnx.Module):
    """Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434) over a paged latent cache.

    Writes the new tokens' latents to the cache, then attends causally to everything that the cache
    holds for their sequences. One call form serves prefill, chunked prefill, decode and speculative
    drafts; see `__call__`.

    Example::

      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mla_jax import allocate_pages
      >>> from mla_jax.modules import MLAConfig, MultiHeadLatentAttention
      >>> config = MLAConfig(hidden_size=64, num_heads=4, q_lora_rank=32)
      >>> attention = MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
      >>> page_indices, num_pages = allocate_pages([100, 100], page_size=64)
      >>> cache = attention.init_cache(num_pages)
      >>> @nnx.jit(donate_argnames="cache")
      ... def step(attention, x, cache, kv_lens):
      ...     return attention(x, cache, page_indices=jnp.asarray(page_indices), kv_lens=kv_lens)
      >>> out, cache = step(attention, jnp.ones((2, 7, 64)), cache, jnp.array([7, 7]))  # Prefill.
      >>> out, cache = step(attention, out[:, -1:], cache, jnp.array([8, 8]))  # Decode.
      >>> out.shape, cache.data.shape
      ((2, 1, 64), (4, 64, 656))

    In a Linen model, `nnx.bridge.to_linen(MultiHeadLatentAttention, config)` is the same layer: its
    `init` and `apply` take `x, cache, page_indices=, kv_lens=` and the parameters keep their names.

    Args:
      config: sizes.
      dtype: dtype of the computation; None infers it from the inputs and parameters.
      param_dtype: dtype that the parameters are created in.
      precision: precision of the matrix products.
      kernel_init: initializer of the projections.
      kernel_metadata: Variable metadata of the kernels whose columns are heads (`q_b_proj`,
        `q_proj`, `kv_b_proj`); None splits the columns over `head_axis`.
      out_kernel_metadata: the same of `o_proj`; None splits the rows.
      mesh: run tensor parallel over `head_axis` of this mesh. None takes the mesh in context
        (`jax.set_mesh`), here and in every call, if it has that axis, and otherwise leaves
        everything on one device: a module made in the context of a mesh is called in one, too. An
        AbstractMesh serves `nnx.eval_shape` and lowering, where no array is made.
      head_axis: the mesh axis.
      implementation: of the attention op and the cache write: "xla", "mosaic_gpu" or None to
        choose.
      rngs: random numbers for the parameters.

    Raises:
      ValueError: if the mesh axis does not divide the heads, or does not exist; for an unknown
        implementation.
    """

    def __init__(
        self,
        config: MLAConfig,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: nnx.Initializer = _default_kernel_init,
        kernel_metadata: Mapping[str, Any] | None = None,
        out_kernel_metadata: Mapping[str, Any] | None = None,
        mesh: Mesh | AbstractMesh | None = None,
        head_axis: str = "model",
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.parallelism = Parallelism(mesh, head_axis)
        self.parallelism.check_divides(num_heads=config.num_heads)
        check_implementation(implementation)
        self.implementation: Implementation | None = implementation
        self.precision = precision
        if kernel_metadata is None:
            kernel_metadata = self.parallelism.metadata(None, head_axis)
        if out_kernel_metadata is None:
            out_kernel_metadata = self.parallelism.metadata(head_axis, None)
        linear = functools.partial(
            nnx.Linear,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        # Whole on every device: without a place of their own they would be copied in each step.
        whole = self.parallelism.metadata()
        norm = functools.partial(
            nnx.RMSNorm,
            epsilon=_LATENT_NORM_EPS,
            dtype=dtype,
            param_dtype=param_dtype,
            scale_metadata=whole,
            rngs=rngs,
        )
        c = config
        q_features = c.num_heads * c.qk_head_dim
        if c.q_lora_rank is None:
            self.q_proj = linear(c.hidden_size, q_features, kernel_metadata=kernel_metadata)
        else:
            self.q_a_proj = linear(c.hidden_size, c.q_lora_rank, kernel_metadata=whole)
            self.q_a_layernorm = norm(c.q_lora_rank)
            self.q_b_proj = linear(c.q_lora_rank, q_features, kernel_metadata=kernel_metadata)
        self.kv_a_proj_with_mqa = linear(
            c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, kernel_metadata=whole
        )
        self.kv_a_layernorm = norm(c.kv_lora_rank)
        self.kv_b_proj = linear(
            c.kv_lora_rank,
            c.num_heads * (c.qk_nope_head_dim + c.v_head_dim),
            kernel_metadata=kernel_metadata,
        )
        self.o_proj = linear(
            c.num_heads * c.v_head_dim, c.hidden_size, kernel_metadata=out_kernel_metadata
        )

    @property
    def w_uk(self) -> Float[Array, "kv_lora_rank num_heads qk_nope_head_dim"]:
        """The half of `kv_b_proj` that makes keys of latents; absorbed into the query."""
        return self._kv_b_kernel()[..., : self.config.qk_nope_head_dim]

    @property
    def w_uv(self) -> Float[Array, "kv_lora_rank num_heads v_head_dim"]:
        """The half of `kv_b_proj` that makes values of latents; applied after attention."""
        return self._kv_b_kernel()[..., self.config.qk_nope_head_dim :]

    def _kv_b_kernel(self) -> Array:
        if type(self.kv_b_proj).__call__ is not nnx.Linear.__call__:
            raise ValueError(
                f"kv_b_proj is a {type(self.kv_b_proj).__name__}, but must be a plain nnx.Linear:"
                " its kernel is absorbed into queries and outputs, the layer itself never called."
                " Merge an adapter into its kernel"
            )
        return self.kv_b_proj.kernel[...].reshape(
            self.config.kv_lora_rank, self.config.num_heads, -1
        )

    def init_cache(
        self,
        num_pages: int,
        page_size: int = 64,
        *,
        format: KVCacheFormat = "fp8_ds_mla",
        scale_format: layout.ScaleFormat = "power_of_two",
    ) -> LatentCache:
        """An empty cache of this layer's sizes, replicated over the mesh if there is one.

        The arguments are those of `LatentCache.init`.
        """
        return LatentCache.init(
            num_pages,
            page_size,
            format=format,
            kv_lora_rank=self.config.kv_lora_rank,
            qk_rope_head_dim=self.config.qk_rope_head_dim,
            scale_format=scale_format,
            sharding=self.parallelism.replicated_sharding(),
        )

    def __call__(
        self,
        x: Float[Array, "*batch_and_len hidden_size"],
        cache: LatentCache,
        *,
        page_indices: Int[Array, "batch pages_per_seq"],
        kv_lens: Int[Array, " batch"],
        cu_q_lens: Int[Array, " batch_plus_1"] | None = None,
    ) -> tuple[Float[Array, "*batch_and_len hidden_size"], LatentCache]:
        """Attends from the last tokens of each sequence; functional in the cache.

        Args:
          x: `[batch, q_len, hidden_size]`, the last q_len tokens of each sequence: decode (1),
            drafts (a few) or an equal prefill chunk. With `cu_q_lens` `[tokens, hidden_size]`, a
            ragged prefill.
          cache: written at the new tokens' positions; donate it to the enclosing jit to have that
            in place.
          page_indices: int32 page table, -1 where there is no page.
          kv_lens: int32 tokens of each sequence in the cache once this call's tokens are in. Token
            `j` stands at position `kv_lens[b] - q_len + j`; negative positions are padding: they
            are not written, and attend to nothing.
          cu_q_lens: int32, ascending from 0: sequence `b` owns tokens `cu_q_lens[b]` to
            `cu_q_lens[b + 1] - 1`. Tokens from `cu_q_lens[-1]` on are padding.

        Returns:
          `(out, cache)`: out of x's shape; that of padding is arbitrary but finite for finite x.

        Raises:
          ValueError: for shapes that do not fit, or a cache of other sizes.
        """
        return self.parallelism.run(
            MultiHeadLatentAttention._attend, self, x, cache, page_indices, kv_lens, cu_q_lens
        )

    def _attend(
        self,
        x: Array,
        cache: LatentCache,
        page_indices: Array,
        kv_lens: Array,
        cu_q_lens: Array | None,
    ) -> tuple[Array, LatentCache]:
        x = self._check(x, cache)
        tokens = _Tokens.locate(x, page_indices, kv_lens, cu_q_lens)
        q, _, kv_c, k_pe = self._project(x.reshape(-1, x.shape[-1]), tokens)
        cache = self._write(cache, kv_c, k_pe, tokens, self.implementation)
        q = q.reshape(*tokens.batch_shape, *q.shape[1:])
        if cu_q_lens is None:
            out = self._op(mla_decode)(q, cache, tokens.page_indices, tokens.kv_lens)
        else:
            out = self._op(mla_prefill)(
                q, cache, tokens.page_indices, tokens.kv_lens, tokens.cu_q_lens
            )
        return self._finish(out), cache

    def _check(self, x: Array, cache: LatentCache) -> Array:
        """`x` as a jax array; raises ValueError where it or the cache is not the layer's."""
        (x,) = as_arrays(x=x)
        if not isinstance(cache, LatentCache):
            raise ValueError(f"cache is a {type(cache).__name__}; make one with self.init_cache")
        sizes = (cache.kv_lora_rank, cache.qk_rope_head_dim)
        if sizes != (self.config.kv_lora_rank, self.config.qk_rope_head_dim):
            raise ValueError(
                f"{cache.kv_lora_rank=}, {cache.qk_rope_head_dim=} differ from the layer's"
                f" {self.config.kv_lora_rank} and {self.config.qk_rope_head_dim}; make the cache"
                " with self.init_cache"
            )
        if x.shape[-1] != self.config.hidden_size:
            raise ValueError(f"{x.shape=} must end with hidden_size={self.config.hidden_size}")
        return x

    def _project(self, x: Array, tokens: _Tokens) -> tuple[Array, Array | None, Array, Array]:
        """Absorbed queries, low-rank queries, latents and RoPE keys of `x` [tokens, hidden]."""
        c = self.config
        if c.q_lora_rank is None:
            low_rank_q, q = None, self.q_proj(x)
        else:
            low_rank_q = self.q_a_layernorm(self.q_a_proj(x))
            q = self.q_b_proj(low_rank_q)
        q = q.reshape(-1, c.num_heads, c.qk_head_dim)
        q_nope, q_pe = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
        positions = tokens.positions.reshape(-1)
        q_pe = apply_rope(q_pe, positions, c.rope)
        w_uk = self.w_uk.astype(q.dtype)
        ql_nope = jnp.einsum("thn,rhn->thr", q_nope, w_uk, precision=self.precision)
        kv_c, k_pe = jnp.split(self.kv_a_proj_with_mqa(x), [c.kv_lora_rank], axis=-1)
        kv_c = self.kv_a_layernorm(kv_c)
        k_pe = apply_rope(k_pe, positions, c.rope)
        return jnp.concatenate([ql_nope, q_pe], axis=-1), low_rank_q, kv_c, k_pe

    def _write(
        self,
        cache: LatentCache,
        kv_c: Array,
        k_pe: Array | None,
        tokens: _Tokens,
        implementation: Implementation | None,
    ) -> LatentCache:
        write = self.parallelism.on_each_device(_write_rows, implementation=implementation)
        return write(cache, kv_c, k_pe, tokens.slots(cache.page_size))

    def _op(self, op: Callable[..., Any]) -> Callable[..., Array]:
        mesh = self.parallelism.current_mesh()
        if mesh is not None:
            op = tensor_parallel(op, mesh=mesh, head_axis=self.parallelism.axis)
        return functools.partial(
            op, sm_scale=self.config.sm_scale, implementation=self.implementation
        )

    def _finish(self, out: Array) -> Array:
        """Values and output projection of attended latents `[..., num_heads, kv_lora_rank]`."""
        w_uv = self.w_uv.astype(out.dtype)
        out = jnp.einsum("...hr,rhv->...hv", out, w_uv, precision=self.precision)
        features = out.shape[-2] * out.shape[-1]
        return self.parallelism.replicate(self.o_proj(out.reshape(*out.shape[:-2], features)))


def _write_rows(
    cache: LatentCache,
    kv_c: Array,
    k_pe: Array | None,
    slots: Array,
    *,
    implementation: Implementation | None,
) -> LatentCache:
    if k_pe is None:  # Made here: jax 0.11 crashes on empty arguments of a shard_map.
        k_pe = jnp.zeros((*kv_c.shape[:-1], 0), kv_c.dtype)
    return cache.write(kv_c, k_pe, slots, implementation=implementation)


def _indexer(config: MLAConfig, **kwargs: Any) -> Indexer:
    if config.indexer is None or config.q_lora_rank is None:
        raise ValueError(
            f"{config.indexer=}, {config.q_lora_rank=}: a layer with an indexer needs both; or pass"
            " has_indexer=False"
        )
    return Indexer(
        config.hidden_size,
        config.q_lora_rank,
        config.indexer,
        rope=config.rope,
        rope_dim=config.qk_rope_head_dim,
        **kwargs,
    )


class SparseMultiHeadLatentAttention(MultiHeadLatentAttention):
    """MLA with DeepSeek Sparse Attention: each token attends to the `topk` keys of an indexer.

    As in DeepSeek V3.2 and GLM-5. Layers without an indexer of their own (`has_indexer=False`,
    GLM's "shared" layers) attend to the keys that an earlier layer chose.

    Example::

      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mla_jax import allocate_pages
      >>> from mla_jax.modules import IndexerConfig, MLAConfig, SparseMultiHeadLatentAttention
      >>> config = MLAConfig(hidden_size=64, num_heads=4, q_lora_rank=32,
      ...                    indexer=IndexerConfig(num_heads=2, topk=16))
      >>> attention = SparseMultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
      >>> page_indices, num_pages = allocate_pages([100], page_size=64)
      >>> cache = attention.init_cache(num_pages)
      >>> @nnx.jit(donate_argnames="cache")
      ... def step(attention, x, cache, kv_lens):
      ...     return attention(x, cache, page_indices=jnp.asarray(page_indices), kv_lens=kv_lens)
      >>> x = jnp.ones((1, 40, 64))
      >>> out, cache, topk_indices = step(attention, x, cache, jnp.array([40]))
      >>> out.shape, topk_indices.shape
      ((1, 40, 64), (40, 16))

    Args:
      config: sizes; `config.indexer` is required where `has_indexer`.
      has_indexer: False for a layer that is given its `topk_indices`.
      implementation: as in `MultiHeadLatentAttention`; the index keys are always written by "xla".
      **kwargs: as in `MultiHeadLatentAttention`.
    """

    def __init__(
        self,
        config: MLAConfig,
        *,
        has_indexer: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: nnx.Initializer = _default_kernel_init,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        common: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "kernel_init": kernel_init,
            "rngs": rngs,
        }
        super().__init__(config, **common, **kwargs)
        self.indexer = nnx.data(
            _indexer(config, parallelism=self.parallelism, **common) if has_indexer else None
        )

    def init_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        num_pages: int,
        page_size: int = 64,
        *,
        format: KVCacheFormat = "fp8_ds_mla",
        scale_format: layout.ScaleFormat = "power_of_two",
    ) -> SparseCache:
        """Empty caches of this layer's sizes; the arguments are those of `LatentCache.init`.

        The index keys are float32 where the latents are, and bfloat16 otherwise.
        """
        latent = super().init_cache(num_pages, page_size, format=format, scale_format=scale_format)
        if self.indexer is None:
            return SparseCache(latent, None)
        index_keys = LatentCache.init(
            num_pages,
            page_size,
            format="float32" if format == "float32" else "bfloat16",
            kv_lora_rank=self.indexer.config.head_dim,
            qk_rope_head_dim=0,
            sharding=self.parallelism.replicated_sharding(),
        )
        return SparseCache(latent, index_keys)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Array, "*batch_and_len hidden_size"],
        cache: SparseCache,
        *,
        page_indices: Int[Array, "batch pages_per_seq"],
        kv_lens: Int[Array, " batch"],
        cu_q_lens: Int[Array, " batch_plus_1"] | None = None,
        topk_indices: Int[Array, "tokens topk"] | None = None,
    ) -> tuple[Float[Array, "*batch_and_len hidden_size"], SparseCache, Int[Array, "tokens topk"]]:
        """Attends from the last tokens of each sequence to the keys that the indexer chooses.

        Args:
          x, page_indices, kv_lens, cu_q_lens: as in `MultiHeadLatentAttention`.
          cache: latents and index keys, both written at the new tokens' positions.
          topk_indices: int32 physical slots for each token, `batch * q_len` of them in the order of
            x, -1 for none. Required by a layer without an indexer, and refused by one with it.

        Returns:
          `(out, cache, topk_indices)`; the indices serve layers that share them.

        Raises:
          ValueError: for shapes that do not fit, a cache of other sizes, or `topk_indices` missing
            or superfluous.
        """
        return self.parallelism.run(
            SparseMultiHeadLatentAttention._attend_sparse,
            self,
            x,
            cache,
            page_indices,
            kv_lens,
            cu_q_lens,
            topk_indices,
        )

    def _attend_sparse(
        self,
        x: Array,
        cache: SparseCache,
        page_indices: Array,
        kv_lens: Array,
        cu_q_lens: Array | None,
        topk_indices: Array | None,
    ) -> tuple[Array, SparseCache, Array]:
        if not isinstance(cache, SparseCache):
            raise ValueError(f"cache is a {type(cache).__name__}; make one with self.init_cache")
        x = self._check(x, cache.latent)
        if (self.indexer is None) != (cache.index_keys is None):
            raise ValueError(
                f"{cache.index_keys is None=} but {self.indexer is None=}: make the cache of each"
                " layer with its own init_cache"
            )
        pages = cache.latent.data.shape[:2]
        if cache.index_keys is not None and cache.index_keys.data.shape[:2] != pages:
            raise ValueError(
                f"{cache.index_keys.data.shape=} and {cache.latent.data.shape=} must have the same"
                " pages: make both with init_cache"
            )
        if (self.indexer is None) == (topk_indices is None):
            raise ValueError(
                f"{topk_indices is None=} but {self.indexer is None=}: a layer without an indexer"
                " needs topk_indices of an earlier layer, one with an indexer computes them"
            )
        tokens = _Tokens.locate(x, page_indices, kv_lens, cu_q_lens)
        flat_x = x.reshape(-1, x.shape[-1])
        q, low_rank_q, kv_c, k_pe = self._project(flat_x, tokens)
        latent = self._write(cache.latent, kv_c, k_pe, tokens, self.implementation)
        index_keys = cache.index_keys
        if self.indexer is not None and index_keys is not None and low_rank_q is not None:
            index_q, weights, new_keys = self.indexer.project(
                flat_x, low_rank_q, tokens.positions.reshape(-1)
            )
            index_keys = self._write(index_keys, new_keys, None, tokens, "xla")
            if cu_q_lens is None:
                index_q = index_q.reshape(*tokens.batch_shape, *index_q.shape[1:])
                weights = weights.reshape(*tokens.batch_shape, *weights.shape[1:])
            select = self.parallelism.on_each_device(
                select_keys, topk=self.indexer.config.topk, precision=self.indexer.precision
            )
            topk_indices = select(
                index_q,
                weights,
                index_keys,
                tokens.page_indices,
                tokens.kv_lens,
                tokens.cu_q_lens,
            )
        assert topk_indices is not None
        out = self._op(mla_sparse_attention)(q, latent, topk_indices)
        out = self._finish(out.reshape(*tokens.batch_shape, *out.shape[1:]))
        return out, SparseCache(latent, index_keys), topk_indices
