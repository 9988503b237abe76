"""Top-k sparse MLA over the `fp8_ds_mla` cache on Hopper, for 1 to 128 heads per device.

For one query token, all its heads, and the cache rows that `topk_indices` names:

    s = sm_scale * q . [kv_c, k_pe]      out = softmax(s) @ kv_c      lse = log(sum(exp(s)))

A CTA takes a part of the work, (token, head group, split of the keys): up to 24 heads one, by
`WarpAttention`; above, in groups of 64, one after the other, by `WarpgroupAttention`. Layout,
numerics and budgets are described there; with more than one split, `combine_sm90` merges. This file
says which rows a warp takes, and how the work is divided.

Roofline (H100)
--------
Memory binds up to 64 heads. A kernel that only gathers random 656-byte rows reaches 2.40 TB/s, 0.27
ns a row for the whole GPU: 73 us for 128 tokens x 2,048 keys, launch included. The compute of 8
heads is 2.4 us per 128 rows and SM (rows in L2) against 4.6 us for memory, that of 64 heads 3.7. At
1 to 8 tokens latency binds: with few heads a start of 1.2 us, a round of 1.7, the merge of a CTA's
warps 1.1, the second kernel 1.5 to 2. Results: `benchmarks/README.md`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper as hw
from pallas_kernels import layout
from pallas_kernels.combine_sm90 import merge_partials_sm90
from pallas_kernels.cta_attention_sm90 import ROW_TILE, CtaAttention
from pallas_kernels.fp8_warp_attention_sm90 import Fp8WarpAttention
from pallas_kernels.hopper import Reg
from pallas_kernels.varying import as_varying_as
from pallas_kernels.warp_attention_sm90 import HEAD_BLOCK
from pallas_kernels.warpgroup_attention_sm90 import (
    COLUMNS,
    TILE,
    TiledConfig,
    WarpgroupAttention,
    WarpgroupTiling,
)

MAX_SPLITS = 64
"""CTAs that can share the keys of one token."""


# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class SparseAttentionConfig(TiledConfig):
    """How `sparse_attention_sm90` divides its work.

    Attributes:
      head_tile: query heads per CTA: 8, 16, 24 or 32 (`WarpAttention`), or 64
        (`WarpgroupAttention`). More heads take several CTAs (head groups), each of which reads the
        rows again.
      num_splits: CTAs that share the keys of one token; above 1 a second kernel merges them.
      num_warpgroups: 1 or 2 (4 or 8 warps per CTA); 3 with `head_tile` 64.
      num_stages: tiles in flight, 1 to 4 of 16 tokens per warp; 3 of 64 tokens with `head_tile` 64.
    """

    head_tile: int
    num_splits: int = 1
    num_warpgroups: int = 2
    num_stages: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.num_splits <= MAX_SPLITS:
            raise ValueError(
                f"num_splits={self.num_splits} must be 1 to {MAX_SPLITS}: the merge holds one value"
                " of each split in registers"
            )
        _ = self.tiling  # checks the rest

    @property
    def tokens_per_round(self) -> int:
        """Keys that one CTA takes per iteration of its main loop."""
        return self.tiling.tokens_per_round

    @property
    def ctas_per_sm(self) -> int:
        """CTAs that fit on an SM."""
        return self.tiling.ctas_per_sm


def default_config(tokens: int, num_heads: int, topk: int) -> SparseAttentionConfig:
    """What measured, or is estimated to be, fastest for these shapes on an H100.

    Up to 24 heads take one CTA of `WarpAttention`, more take CTAs of 64, which are faster with 32
    heads at every number of tokens, and as fast with 24 (`benchmarks/README.md` has both).
    """
    if num_heads <= LARGEST_FEW_HEADS:
        candidates = _few_heads_configs(tokens, num_heads, topk)
    else:
        wide = WarpgroupTiling()
        # Many waves: no splits, whose partial results would only take memory.
        is_full = tokens * -(-num_heads // COLUMNS) >= 4 * hw.NUM_SMS
        candidates = [
            SparseAttentionConfig(COLUMNS, num_splits, wide.num_warpgroups, wide.num_stages)
            for num_splits in ((1,) if is_full else _SPLITS)
            if (num_splits - 1) * TILE < topk
        ]
    return min(candidates, key=lambda config: estimated_us(config, tokens, num_heads, topk))


LARGEST_FEW_HEADS = 24
"""More heads take CTAs of 64 by default."""

_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def _few_heads_configs(tokens: int, num_heads: int, topk: int) -> list[SparseAttentionConfig]:
    head_tile = -(-num_heads // HEAD_BLOCK) * HEAD_BLOCK
    if tokens >= 4 * hw.NUM_SMS:
        # Many waves: no splits, whose partial results would only take memory. Two small CTAs on an
        # SM hide each other's start and end (benchmarks/EXPERIMENTS.md).
        small = SparseAttentionConfig(head_tile, num_warpgroups=1)
        return [small if small.ctas_per_sm > 1 else SparseAttentionConfig(head_tile)]
    return [
        config
        for num_warpgroups in (2, 1)
        for num_splits in _SPLITS
        if (config := SparseAttentionConfig(head_tile, num_splits, num_warpgroups))
        and (num_splits - 1) * config.tokens_per_round < topk
    ]


def estimated_us(config: SparseAttentionConfig, tokens: int, num_heads: int, topk: int) -> float:
    """Time on an H100 by models fitted to measured configurations, mostly within 15%."""
    if config.is_wide:
        return _estimated_wide_us(config, tokens, num_heads, topk)
    return _estimated_few_heads_us(config, tokens, num_heads, topk)


def _estimated_wide_us(
    config: SparseAttentionConfig, tokens: int, num_heads: int, topk: int
) -> float:
    """A CTA's first part takes a fixed time and a time per tile, its others a little less of both.

    Fitted to 1, 8, 128 and 2,048 tokens of 64 heads and to 128 tokens of 128 heads.
    """
    waves = -(-tokens * -(-num_heads // COLUMNS) * config.num_splits // hw.NUM_SMS)
    tiles = -(-topk // (config.num_splits * TILE))
    attend_us = 7.0 + 2.25 * tiles + (waves - 1) * (4.5 + 1.85 * tiles)
    if config.num_splits == 1:
        return attend_us
    partial_bytes = 2.0 * tokens * num_heads * config.num_splits * layout.KV_LORA_RANK
    return attend_us + 1.2 + 0.025 * config.num_splits + partial_bytes / 4.0e6


def _estimated_few_heads_us(
    config: SparseAttentionConfig, tokens: int, num_heads: int, topk: int
) -> float:
    """A model of 50 measured configurations.

    A CTA takes a fixed time, plus two that overlap, but not fully (hence the 4-norm): the latency
    of its rounds of tiles, and the time of all keys of its wave at the bandwidth of the gather.
    Waves overlap as well: the result lies halfway between lockstep and a perfect overlap.
    """
    ctas = tokens * -(-num_heads // config.head_tile) * config.num_splits
    resident = hw.NUM_SMS * config.ctas_per_sm
    full_waves, rest = divmod(ctas, resident)
    rounds = -(-topk // (config.num_splits * config.tokens_per_round))
    blocks = config.head_tile // HEAD_BLOCK
    round_us = 1.1 + 0.6 * blocks if config.num_warpgroups == 1 else 1.7 + 0.9 * blocks
    fixed_us = 2.2 + 0.5 * config.num_warpgroups + 0.4 * (blocks - 1)
    # Four warps alone on an SM do not keep enough rows in flight for the full bandwidth.
    slowdown = 1.0 if config.num_warpgroups == 2 else 1.08 if ctas > hw.NUM_SMS else 1.15
    key_us = slowdown * 0.242e-3 * topk / config.num_splits

    def wave_us(num_ctas: int) -> float:
        if num_ctas > hw.NUM_SMS:  # the SMs with one CTA more than others finish last
            num_ctas = -(-num_ctas // hw.NUM_SMS) * hw.NUM_SMS
        latency_us, memory_us = rounds * round_us, round_us + num_ctas * key_us
        return fixed_us + (latency_us**4 + memory_us**4) ** 0.25

    lockstep = full_waves * wave_us(resident) + (wave_us(rest) if rest else 0.0)
    overlapped = max(
        (full_waves + bool(rest)) * (fixed_us + rounds * round_us),
        fixed_us + round_us + ctas * key_us,
    )
    attend_us = (lockstep + overlapped) / 2 if full_waves else lockstep
    merge_us = 0.0
    if config.num_splits > 1:
        partial_bytes = 4.0 * tokens * num_heads * config.num_splits * layout.KV_LORA_RANK
        merge_us = 1.2 + 0.025 * config.num_splits + partial_bytes / 3.0e6
    return attend_us + merge_us


# ---------------------------------------------------------------------------------------- kernel


class _Problem(NamedTuple):
    """Static facts of one call."""

    num_heads: int
    topk: int
    num_slots: int  # of the cache
    sm_scale: float
    num_parts: int  # of the work, see `_Keys`
    num_ctas: int


class _Keys(CtaAttention):
    """Which keys a CTA takes, and where results go.

    The work is divided into `num_parts`, (token, split, head group), of which a CTA takes one or
    some, one after the other.
    """

    def __init__(
        self, config: SparseAttentionConfig, problem: _Problem, refs: dict[str, Any], cta: Reg
    ) -> None:
        self.config, self.problem, self.cta = config, problem, cta
        self.address = {
            name: hw.global_address(ref) for name, ref in refs.items() if name != "smem"
        }
        arguments: dict[str, Any] = {"tiling": config.tiling}
        super().__init__(
            **arguments,
            smem=hw.shared_address(refs["smem"]),
            kv_cache=self.address["kv_cache"],
            num_slots=problem.num_slots,
            rows_per_copy=1,
            num_columns=problem.num_heads,
            first_column=hw.u32(0),
            sm_scale=problem.sm_scale,
        )

    def take(self, part: Reg) -> None:
        """Sets what depends on the part of the work."""
        config, problem = self.config, self.problem
        groups = -(-problem.num_heads // config.head_tile)
        self.first_column = part % groups * config.head_tile
        self.split = part // groups % config.num_splits
        self.token = part // (groups * config.num_splits)
        self.out_row = (self.token * config.num_splits + self.split) * problem.num_heads

        self.length = hw.u32(problem.topk)
        if "lens" in self.address:
            lens = self.address["lens"]
            (length,) = hw.load_global(hw.element_address(lens, self.token, 4))
            negative = (length >> 31).ne(0)
            self.length = hw.select(negative, hw.u32(0), hw.minimum(length, problem.topk))
        # Tiles go round the warps of all splits, so that a short list is shared evenly.
        round_tokens = config.num_splits * config.tokens_per_round
        self.num_rounds = (
            self.length + (round_tokens - 1) - self.split * config.tokens_per_round
        ) // round_tokens

    def load_slot(self, t: Reg | int) -> Reg:
        """Warps take the list's tiles in turns, all splits' warps together."""
        t = hw.u32(t) if isinstance(t, int) else t
        tile = (
            t * self.config.num_splits + self.split
        ) * self.config.tiling.row_warps + self.row_warp
        position = tile * ROW_TILE + (self.lane & (ROW_TILE - 1))
        row = hw.element_address(self.address["indices"], self.token, 4 * self.problem.topk)
        address = hw.element_address(row, hw.minimum(position, self.problem.topk - 1), 4)
        (slot,) = hw.load_global(address)
        return hw.select(position < self.length, slot, hw.u32(-1))

    def query_address(self, column: Reg) -> Reg:
        row = self.token * self.problem.num_heads + column
        return hw.element_address(self.address["q"], row, 2 * layout.LATENT_DIM)

    def load_sink(self, column: Reg) -> Reg | None:
        if "sink" not in self.address:
            return None
        (sink,) = hw.load_global(hw.element_address(self.address["sink"], column, 4))
        return hw.as_f32(sink)

    def store_lse(self, column: Reg, lse: Reg) -> None:
        hw.store_global(hw.element_address(self.address["lse"], self.out_row + column, 4), [lse])

    def store_out(self, column: Reg, dim: Reg, pair: list[Reg], offset: int = 0) -> None:
        dtype = _out_dtype(self.config)
        itemsize = jnp.dtype(dtype).itemsize
        row = hw.element_address(
            self.address["out"], self.out_row + column, layout.KV_LORA_RANK * itemsize
        )
        values = {
            jnp.bfloat16: lambda: [hw.bf16x2(*pair)],
            jnp.float16: lambda: [hw.f16x2(*pair)],
            jnp.float32: lambda: pair,
        }[dtype]()
        hw.store_global(row + hw.u64(dim * itemsize), values, offset * itemsize)


class _FewHeads(_Keys, Fp8WarpAttention):
    """A CTA of up to 32 heads."""

    def run(self) -> None:
        """One part for each CTA."""
        self.take(self.cta)
        self.attend(self.num_rounds, hw.u32(0), self.init_barriers)


class _ManyHeads(_Keys, WarpgroupAttention):
    """A CTA of 64 heads."""

    def store_unit(self, column: Reg, unit: Reg) -> Reg:
        """Partial results are float16, and their unit lies beside them."""
        if "unit" not in self.address:
            return unit
        address = hw.element_address(self.address["unit"], self.out_row + column, 4)
        with hw.when(column < self.num_columns):
            hw.store_global(address, [unit])
        return hw.f32(1.0)

    def run(self) -> None:
        """Part after part; rows are gathered ahead, beyond the end of a part."""
        self.start()
        self.run_roles(
            gather=lambda: self.for_each_part(self.gather),
            compute=lambda: self.for_each_part(self.attend),
        )

    def for_each_part(self, body: Callable[[Reg, Reg, Reg], None]) -> None:
        """Calls `body(num_tiles, first_tile, index)` in a loop over the CTA's parts."""
        num_ctas = self.problem.num_ctas

        def one_part(carry: list[Reg]) -> list[Reg]:
            part, first_tile, index = carry
            self.take(part)
            body(self.num_rounds, first_tile, index)
            return [part + num_ctas, first_tile + self.num_rounds, index + 1]

        first = [self.cta, hw.u32(0), hw.u32(0)]
        if num_ctas == self.problem.num_parts:
            one_part(first)
            return
        hw.while_loop(lambda carry: carry[0] < self.problem.num_parts, one_part, first)


def _out_dtype(config: SparseAttentionConfig) -> Any:
    """Final results are bfloat16. Partial ones of 64 heads are many: float16 halves their bytes."""
    if config.num_splits == 1:
        return jnp.bfloat16
    return jnp.float16 if config.is_wide else jnp.float32


# ---------------------------------------------------------------------------------------- launch


def sparse_attention_sm90(
    q: jax.Array,
    kv_cache: jax.Array,
    topk_indices: jax.Array,
    *,
    sm_scale: float,
    attn_sink: jax.Array | None = None,
    topk_lens: jax.Array | None = None,
    config: SparseAttentionConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of each query token over its own list of cache rows.

    Per token and head, over the slots that `topk_indices` names,

        s = sm_scale * q . row      out = softmax(s) @ row[:512]      lse = log(sum(exp(s)))

    Decode, prefill and draft tokens alike; causality is in the lists. Bitwise deterministic.

    Args:
      q: bfloat16 `[tokens, heads, 576]`, absorbed: `ql_nope ++ q_pe`. Any number of heads; up to
        64 share the read of a row, more are computed in groups. Nothing needs padding.
      kv_cache: uint8 `[num_pages, page_size, 656]`, `fp8_ds_mla`, any page size, beyond 2**31
        bytes, too.
      topk_indices: int32 `[tokens, topk]`, physical slots in any order, any `topk`. -1, and any
        slot outside of the cache, names nothing; what lies in slots that are not named never
        reaches the result.
      sm_scale: the factor of the scores, positive.
      attn_sink: float32 `[heads]`: `out` is multiplied by `sigmoid(lse - attn_sink)`.
      topk_lens: int32 `[tokens]`: only the first so many entries of a list count.
      config: how to divide the work; `default_config` if None.

    Returns:
      `out` bfloat16 `[tokens, heads, 512]` and `lse` float32 `[tokens, heads]`, natural log. A
      token without a key has out 0 and lse -inf.

    Raises:
      ValueError: if the arguments do not fit together.
      NotImplementedError: if q is not bfloat16 of 576 dims, or the cache not `fp8_ds_mla` of 512 +
        64 dims.
    """
    layout.check_sm_scale(sm_scale)
    _validate(q, kv_cache, topk_indices, attn_sink, topk_lens)
    tokens, num_heads, _ = q.shape
    topk = topk_indices.shape[1]
    if 0 in (tokens, num_heads, topk, kv_cache.shape[0], kv_cache.shape[1]):
        return (
            jnp.zeros((tokens, num_heads, layout.KV_LORA_RANK), jnp.bfloat16),
            jnp.full((tokens, num_heads), -jnp.inf, jnp.float32),
        )
    if config is None:
        config = default_config(tokens, num_heads, topk)
    return _attend(
        q, kv_cache, topk_indices, attn_sink, topk_lens, sm_scale=float(sm_scale), config=config
    )


# Under jit, so that eager calls compile once, and layers of one shape share one kernel.
@functools.partial(jax.jit, static_argnames=("sm_scale", "config"))
def _attend(
    q: jax.Array,
    kv_cache: jax.Array,
    topk_indices: jax.Array,
    attn_sink: jax.Array | None,
    topk_lens: jax.Array | None,
    *,
    sm_scale: float,
    config: SparseAttentionConfig,
) -> tuple[jax.Array, jax.Array]:
    tokens, num_heads, _ = q.shape
    topk = topk_indices.shape[1]
    num_slots = kv_cache.shape[0] * kv_cache.shape[1]
    final = config.num_splits == 1
    operands = {"kv_cache": kv_cache, "q": q, "indices": topk_indices}
    if topk_lens is not None:
        operands["lens"] = topk_lens
    if attn_sink is not None and final:  # otherwise the merge applies it
        operands["sink"] = attn_sink.astype(jnp.float32)
    rows = tokens * config.num_splits
    results = {
        "out": jax.ShapeDtypeStruct((rows, num_heads, layout.KV_LORA_RANK), _out_dtype(config)),
        "lse": jax.ShapeDtypeStruct((rows, num_heads), jnp.float32),
    }
    if config.is_wide and not final:
        results["unit"] = results["lse"]
    names = (*operands, *results, "smem")
    num_parts = rows * -(-num_heads // config.head_tile)
    # A persistent grid where a CTA can gather rows of its next part before it is done with one.
    num_ctas = min(num_parts, hw.NUM_SMS) if config.is_wide else num_parts
    problem = _Problem(num_heads, topk, num_slots, sm_scale, num_parts, num_ctas)

    def sparse_attention_kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def cta(ctx: Any, *args: Any) -> None:
            del ctx
            *values, program = args
            code = _ManyHeads if config.is_wide else _FewHeads
            named = dict(zip(names, values, strict=True))
            code(config, problem, named, Reg(program.registers.item())).run()

        cta(*refs, lax.axis_index("cta").astype(jnp.int32))

    out, lse, *unit = plgpu.kernel(
        sparse_attention_kernel,
        out_type=list(results.values()),
        scratch_types=[plgpu.SMEM((config.smem_bytes,), jnp.uint8)],
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=config.num_warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
    )(*operands.values())
    out, lse, *unit = (as_varying_as(x, operands.values()) for x in (out, lse, *unit))
    if final:
        return out, lse
    shape = (tokens, config.num_splits, num_heads)
    return merge_partials_sm90(
        out.reshape(*shape, -1),
        lse.reshape(shape),
        attn_sink,
        partial_unit=unit[0].reshape(shape) if unit else None,
    )


def _validate(
    q: jax.Array,
    kv_cache: jax.Array,
    topk_indices: jax.Array,
    attn_sink: jax.Array | None,
    topk_lens: jax.Array | None,
) -> None:
    if q.ndim != 3 or kv_cache.ndim != 3 or topk_indices.ndim != 2:
        raise ValueError(
            f"{q.shape=}, {kv_cache.shape=}, {topk_indices.shape=}: expected"
            " [tokens, heads, 576], [pages, page_size, 656] and [tokens, topk]"
        )
    if q.dtype != jnp.bfloat16 or q.shape[2] != layout.LATENT_DIM:
        raise NotImplementedError(
            f"{q.dtype=}, {q.shape=}: this kernel takes bfloat16 [.., .., {layout.LATENT_DIM}]"
        )
    if kv_cache.dtype != jnp.uint8 or kv_cache.shape[2] != layout.FP8_ROW_BYTES:
        raise NotImplementedError(
            f"{kv_cache.dtype=}, {kv_cache.shape=}: this kernel reads fp8_ds_mla caches, uint8"
            f" [pages, page_size, {layout.FP8_ROW_BYTES}]"
        )
    tokens, num_heads, _ = q.shape
    if topk_indices.shape[0] != tokens or topk_indices.dtype != jnp.int32:
        raise ValueError(
            f"{topk_indices.shape=}, {topk_indices.dtype=} must be int32 [{tokens}, topk], one"
            " list per query token"
        )
    if attn_sink is not None and attn_sink.shape != (num_heads,):
        raise ValueError(f"{attn_sink.shape=} must be ({num_heads},), one value per query head")
    if topk_lens is not None and (topk_lens.shape != (tokens,) or topk_lens.dtype != jnp.int32):
        raise ValueError(f"{topk_lens.shape=}, {topk_lens.dtype=} must be int32 ({tokens},)")
