"""Mixture of experts as DeepSeek V3 and GLM route it, computed expert by expert."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import PrecisionLike
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mla_jax.models.config import MoEConfig
from mla_jax.sharding import Parallelism
from pallas_kernels.varying import as_varying_as

# Tokens of one expert that are multiplied at a time: enough to reuse the expert's weights, few
# enough that small batches are not mostly padding.
_MIN_TILE, _MAX_TILE = 8, 128


class RoutingBias(nnx.Variable):
    """The load-balancing correction of the router: balanced during training, no gradient."""


class MLP(nnx.Module):
    """`down_proj(silu(gate_proj(x)) * up_proj(x))`, its width split over the model axis."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        parallelism: Parallelism,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        rngs: nnx.Rngs,
    ):
        parallelism.check_divides(intermediate_size=intermediate_size)
        self.parallelism = parallelism
        linear = functools.partial(
            nnx.Linear,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )
        columns = parallelism.metadata(None, parallelism.axis)
        rows = parallelism.metadata(parallelism.axis, None)
        self.gate_proj = linear(hidden_size, intermediate_size, kernel_metadata=columns)
        self.up_proj = linear(hidden_size, intermediate_size, kernel_metadata=columns)
        self.down_proj = linear(intermediate_size, hidden_size, kernel_metadata=rows)

    def __call__(self, x: Float[Array, "tokens hidden_size"]) -> Float[Array, "tokens hidden_size"]:
        out = self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.parallelism.replicate(out)


class Router(nnx.Module):
    """Chooses experts and their weights (DeepSeek-V3, arXiv:2412.19437, section 2.1.2), in float32.

    With `s = sigmoid(x @ kernel)`: the experts are chosen by `s + bias`, at first the groups whose
    two best experts sum highest, then the best experts of those groups. The weights are `s` of the
    chosen experts, divided by their sum if `normalize_weights`, times `routed_scaling_factor`.
    """

    def __init__(
        self,
        hidden_size: int,
        config: MoEConfig,
        *,
        parallelism: Parallelism,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(
            init(rngs.params(), (hidden_size, config.num_experts), param_dtype),
            **parallelism.metadata(),
        )
        self.e_score_correction_bias = RoutingBias(
            jnp.zeros((config.num_experts,), jnp.float32), **parallelism.metadata()
        )

    def __call__(
        self, x: Float[Array, "tokens hidden_size"]
    ) -> tuple[Int[Array, "tokens k"], Float[Array, "tokens k"]]:
        c = self.config
        logits = jnp.matmul(
            x.astype(jnp.float32),
            self.kernel[...].astype(jnp.float32),
            precision=lax.Precision.HIGHEST,
        )
        scores = jax.nn.sigmoid(logits)
        choice = scores + self.e_score_correction_bias[...][None]
        if c.num_groups > 1:
            grouped = choice.reshape(-1, c.num_groups, c.num_experts // c.num_groups)
            best_two, _ = lax.top_k(grouped, min(2, grouped.shape[-1]))
            _, groups = lax.top_k(jnp.sum(best_two, axis=-1), c.num_groups_per_token)
            allowed = jax.nn.one_hot(groups, c.num_groups, dtype=jnp.bool).any(axis=1)
            choice = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(choice.shape)
        _, experts = lax.top_k(choice, c.num_experts_per_token)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if c.normalize_weights:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return experts, weights * c.routed_scaling_factor


class Experts(nnx.Module):
    """The routed experts' weights, stacked, each expert's width split over the model axis."""

    def __init__(
        self,
        hidden_size: int,
        config: MoEConfig,
        *,
        parallelism: Parallelism,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        rngs: nnx.Rngs,
    ):
        parallelism.check_divides(moe_intermediate_size=config.intermediate_size)
        self.parallelism = parallelism
        self.dtype = dtype
        self.precision = precision
        init = nnx.initializers.lecun_normal(batch_axis=0)
        wide = (config.num_experts, hidden_size, config.intermediate_size)
        narrow = (config.num_experts, config.intermediate_size, hidden_size)
        columns = parallelism.metadata(None, None, parallelism.axis)
        rows = parallelism.metadata(None, parallelism.axis, None)
        self.gate_proj = nnx.Param(init(rngs.params(), wide, param_dtype), **columns)
        self.up_proj = nnx.Param(init(rngs.params(), wide, param_dtype), **columns)
        self.down_proj = nnx.Param(init(rngs.params(), narrow, param_dtype), **rows)

    def __call__(
        self,
        x: Float[Array, "tokens hidden_size"],
        experts: Int[Array, "tokens k"],
        weights: Float[Array, "tokens k"],
    ) -> Float[Array, "tokens hidden_size"]:
        axis = self.parallelism.axis
        kernels = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
        x, *kernels = promote_dtype((x, *kernels), dtype=self.dtype)
        apply = self.parallelism.on_each_device(
            _apply_split_experts,
            (
                P(),  # x [tokens, hidden_size]
                P(),  # experts [tokens, k]
                P(),  # weights [tokens, k]
                P(None, None, axis),  # gate_proj [num_experts, hidden_size, intermediate_size]
                P(None, None, axis),  # up_proj, the same
                P(None, axis, None),  # down_proj [num_experts, intermediate_size, hidden_size]
            ),
            axis=None if self.parallelism.current_mesh() is None else axis,
            precision=self.precision,
        )
        return apply(x, experts, weights, *kernels).astype(x.dtype)


def _apply_split_experts(*args: Array, axis: str | None, precision: PrecisionLike) -> Array:
    """`apply_experts`; where widths are split, one sum at the end instead of one per tile."""
    out = apply_experts(*args, precision=precision)
    return out if axis is None else lax.psum(out, axis)


def apply_experts(
    x: Float[Array, "tokens hidden_size"],
    experts: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    gate: Float[Array, "num_experts hidden_size intermediate_size"],
    up: Float[Array, "num_experts hidden_size intermediate_size"],
    down: Float[Array, "num_experts intermediate_size hidden_size"],
    *,
    precision: PrecisionLike = None,
) -> Float[Array, "tokens hidden_size"]:
    """`sum_k weights[t, k] down_e(silu(gate_e x_t) * up_e x_t)` with `e = experts[t, k]`, float32.

    The (token, expert) pairs are sorted by expert and cut into tiles of one expert each; a scan
    over the tiles multiplies each with its expert's weights only. (`lax.ragged_dot` says the same,
    but falls back to every expert on every token where no kernel is at hand.) The number of tiles
    is static, that of the worst distribution; the idle ones add nothing to the result.

    Memory and FLOPs are about those of the pairs, but the tiles go one after the other: the scan
    has `(pairs + min(num_experts, pairs) * (tile - 1)) // tile` steps with three small matrix
    products each, idle ones included. That is 352 steps a layer for 128 tokens of DeepSeek V3
    (8 of 256 experts, tiles of 8), so on a GPU, latency rather than arithmetic sets the time. It is
    not a fast grouped GEMM.
    """
    tokens, k = experts.shape
    num_experts = gate.shape[0]
    pairs = tokens * k
    tile = _MIN_TILE
    while tile < min(_MAX_TILE, pairs // num_experts):
        tile *= 2
    num_tiles = (pairs + min(num_experts, pairs) * (tile - 1)) // tile

    flat_experts = experts.reshape(-1)
    by_expert = jnp.argsort(flat_experts)
    sizes = jnp.bincount(flat_experts, length=num_experts)
    ends = jnp.cumsum(sizes)
    tile_ends = jnp.cumsum(-(-sizes // tile))
    flat_weights = weights.reshape(-1)

    def add_tile(out: Array, i: Array) -> tuple[Array, None]:
        expert = jnp.minimum(jnp.searchsorted(tile_ends, i, side="right"), num_experts - 1)
        tiles_left = tile_ends[expert] - i
        tiles_of_expert = -(-sizes[expert] // tile)
        first = ends[expert] - sizes[expert] + (tiles_of_expert - tiles_left) * tile
        rows = first + jnp.arange(tile)
        valid = rows < ends[expert]
        pair = by_expert[jnp.where(valid, rows, 0)]
        token = pair // k
        x_tile = x[token]
        matmul = functools.partial(jnp.matmul, precision=precision)
        y = jax.nn.silu(matmul(x_tile, gate[expert])) * matmul(x_tile, up[expert])
        y = matmul(y, down[expert]).astype(jnp.float32) * flat_weights[pair][:, None]
        # A token comes once per expert: within a tile no two rows add to the same place.
        target = jnp.where(valid, token, tokens + jnp.arange(tile))
        return out.at[target].add(y, mode="drop", unique_indices=True), None

    if tokens == 0:
        return jnp.zeros(x.shape, jnp.float32)
    out = as_varying_as(jnp.zeros(x.shape, jnp.float32), (x, experts, weights, gate, up, down))
    return lax.scan(add_tile, out, jnp.arange(num_tiles))[0]


class MoE(nnx.Module):
    """Routed experts plus the shared experts that every token passes."""

    def __init__(
        self,
        hidden_size: int,
        config: MoEConfig,
        *,
        parallelism: Parallelism,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        rngs: nnx.Rngs,
    ):
        self.gate = Router(
            hidden_size, config, parallelism=parallelism, param_dtype=param_dtype, rngs=rngs
        )
        sharded = {
            "parallelism": parallelism,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "rngs": rngs,
        }
        self.experts = Experts(hidden_size, config, **sharded)
        shared = config.num_shared_experts * config.intermediate_size
        self.shared_experts = nnx.data(MLP(hidden_size, shared, **sharded) if shared else None)

    def __call__(self, x: Float[Array, "tokens hidden_size"]) -> Float[Array, "tokens hidden_size"]:
        experts, weights = self.gate(x)
        out = self.experts(x, experts, weights)
        return out if self.shared_experts is None else out + self.shared_experts(x)
