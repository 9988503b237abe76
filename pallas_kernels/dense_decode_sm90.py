"""Dense paged MLA decode on Hopper, for any number of heads per device; FP8 or bfloat16 cache.

For sequence b and draft token j, at position `kv_lens[b] - q_len + j`, over the keys up to its own,

    s = sm_scale * q . [kv_c, k_pe]      out = softmax(s) @ kv_c      lse = log(sum(exp(s)))

The heads of all q_len tokens of a sequence are columns of one matrix, since they read the same
rows. Up to 32 are a CTA's, which runs `WarpAttention`; more are computed in groups, each of which
reads the rows again (mostly from L2): of 64 by `WarpgroupAttention` over `fp8_ds_mla`, of up to 32
by `WarpAttention` over bfloat16. Layout, numerics and budgets are described there.

The grid is persistent. `WorkSplit` gives each CTA an equal share of the keys, however uneven the
lengths are, as a few segments; parts of a sequence are merged by a second kernel (`split_kv_sm90`).

    lengths ── every warp: share of its CTA ──▶ segments ── attention ──▶ out, lse
                                                                 └─▶ partials ── merge ──▶ out, lse

Rows
----
16 rows of a tile that lie in one page are neighbors: one `cp.async.bulk` brings up to 10,496 bytes.
Pages of other sizes take a copy per `gcd(page_size, 16)` rows, so any page size works. bfloat16
rows are copied one by one, since there must be gaps between them in shared memory. Only rows of
keys that exist are copied; the others become zeros, their scores -inf.

Causality costs nothing in most tiles: only those that the last q_len positions touch compare.

Roofline (H100)
--------
Memory: 0.214 ns a row for the whole GPU at 3.06 TB/s, 3.6 us for a round of 128 rows on every SM;
the compute of 128 rows is 2.4 us with 8 columns (measured for the sparse kernel), 5.2 with 32 and
3.7 with 64. A bfloat16 row costs 0.376 ns, a round of 128 rows 6.4 us. Results, and what was tried:
`benchmarks/README.md` and `benchmarks/EXPERIMENTS.md`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper as hw
from pallas_kernels import layout
from pallas_kernels.bf16_warp_attention_sm90 import Bf16WarpAttention
from pallas_kernels.cta_attention_sm90 import ROW_TILE, CtaAttention
from pallas_kernels.fp8_warp_attention_sm90 import Fp8WarpAttention
from pallas_kernels.hopper import Reg
from pallas_kernels.split_kv_sm90 import Segment, WorkSplit, merge_segments_sm90
from pallas_kernels.varying import as_varying_as
from pallas_kernels.warp_attention_sm90 import CTA_HEAD_TILES, HEAD_BLOCK, WarpAttention
from pallas_kernels.warpgroup_attention_sm90 import (
    COLUMNS,
    GATHER_THREAD,
    TiledConfig,
    WarpgroupAttention,
    WarpgroupTiling,
)

# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class DenseDecodeConfig(TiledConfig):
    """How `dense_decode_sm90` divides its work.

    Attributes:
      head_tile: query columns (heads x q_len) per CTA: 8, 16, 24 or 32 (`WarpAttention`), or 64
        (`WarpgroupAttention`). More columns take several CTAs (column groups), each of which reads
        the rows again.
      num_ctas: CTAs that share the keys of a column group.
      num_warpgroups: 1 or 2 (4 or 8 warps per CTA); 3 with `head_tile` 64.
      num_stages: tiles in flight, 1 to 4 of 16 tokens per warp (bfloat16 rows: 2, or 1 with 8
        warps); 3 of 64 tokens with `head_tile` 64.
      segment_cost: fixed cost of a sequence's share in a CTA, in rounds of its keys (`64 *
        num_warpgroups`, or 64 with `head_tile` 64); 0 to 16.
      kv_cache_format: "fp8_ds_mla" or "bfloat16" (`head_tile` 8 to 32).
    """

    head_tile: int
    num_ctas: int = hw.NUM_SMS
    num_warpgroups: int = 2
    num_stages: int = 2
    segment_cost: int = 2
    kv_cache_format: layout.RowFormat = "fp8_ds_mla"

    def __post_init__(self) -> None:
        if not 1 <= self.num_ctas <= MAX_CTAS:
            raise ValueError(f"num_ctas={self.num_ctas} must be 1 to {MAX_CTAS}")
        if not 0 <= self.segment_cost <= 16:
            raise ValueError(f"segment_cost={self.segment_cost} must be 0 to 16")
        if self.kv_cache_format not in layout.ROW_BYTES:
            raise ValueError(
                f"kv_cache_format={self.kv_cache_format!r} must be one of {(*layout.ROW_BYTES,)}"
            )
        if self.is_wide and self.kv_cache_format != "fp8_ds_mla":
            raise ValueError(
                f"head_tile={self.head_tile} takes fp8_ds_mla rows only: two tiles of 64 bfloat16"
                f" rows do not fit into shared memory; take one of {CTA_HEAD_TILES}"
            )
        _ = self.tiling  # checks the rest


MAX_CTAS = 1024
"""CTAs that can share the keys of a column group."""


def default_config(
    batch: int,
    num_columns: int,
    capacity: int,
    kv_cache_format: layout.RowFormat = "fp8_ds_mla",
) -> DenseDecodeConfig:
    """What measured fastest on an H100: one wave of the largest CTAs that fit, or of smaller ones.

    Args:
      batch: sequences.
      num_columns: heads x q_len.
      capacity: keys that a sequence's page table can hold.
      kv_cache_format: of the rows.
    """
    is_fp8 = kv_cache_format == "fp8_ds_mla"
    if num_columns > CTA_HEAD_TILES[-1] and is_fp8:
        groups, wide = -(-num_columns // COLUMNS), WarpgroupTiling()
        rounds = batch * -(-capacity // wide.tokens_per_round)
        num_ctas = min(max(1, hw.NUM_SMS // groups), rounds)
        return DenseDecodeConfig(COLUMNS, num_ctas, wide.num_warpgroups, wide.num_stages)
    groups = -(-num_columns // CTA_HEAD_TILES[-1])
    head_tile = -(-num_columns // (groups * HEAD_BLOCK)) * HEAD_BLOCK
    # Shared memory holds 16 tiles of fp8_ds_mla rows or 8 of bfloat16 rows.
    stages = 2 if is_fp8 else 1
    config = DenseDecodeConfig(head_tile, num_stages=stages, kv_cache_format=kv_cache_format)
    # Where there are few keys, half as many warps, which wait less for each other, are faster; the
    # bound lies between 16 heads' 32 x 4,096 and 64 x 4,096 keys (benchmarks/EXPERIMENTS.md).
    largest_tile, keys_per_sm, stages = (2, 1024, 3) if is_fp8 else (1, 128, 2)
    if head_tile <= largest_tile * HEAD_BLOCK and batch * capacity <= hw.NUM_SMS * keys_per_sm:
        config = dataclasses.replace(config, num_warpgroups=1, num_stages=stages)
    rounds = batch * -(-capacity // config.tiling.tokens_per_round)
    return dataclasses.replace(config, num_ctas=min(max(1, hw.NUM_SMS // groups), rounds))


# ---------------------------------------------------------------------------------------- kernel


class _Problem(NamedTuple):
    """Static facts of one call."""

    batch: int
    q_len: int
    num_heads: int
    num_pages: int
    page_size: int
    pages_per_seq: int
    sm_scale: float

    @property
    def num_columns(self) -> int:
        return self.q_len * self.num_heads

    @property
    def capacity(self) -> int:
        return self.pages_per_seq * self.page_size


class _Sequences(CtaAttention):
    """Which keys a CTA, (share of the keys, column group) = `program`, takes, and its results."""

    segment: Segment

    def __init__(
        self, config: DenseDecodeConfig, problem: _Problem, refs: dict[str, Any], program: Reg
    ) -> None:
        self.config, self.problem = config, problem
        groups = -(-problem.num_columns // config.head_tile)
        # The groups of a share run side by side, so that one of them finds the rows in L2.
        self.cta = program // groups
        self.group = program % groups
        self.address = {
            name: hw.global_address(ref) for name, ref in refs.items() if name != "smem"
        }
        arguments: dict[str, Any] = {"tiling": config.tiling}
        super().__init__(
            **arguments,
            smem=hw.shared_address(refs["smem"]),
            kv_cache=self.address["kv_cache"],
            num_slots=problem.num_pages * problem.page_size,
            rows_per_copy=math.gcd(problem.page_size, ROW_TILE),
            num_columns=problem.num_columns,
            first_column=self.group * config.head_tile,
            sm_scale=problem.sm_scale,
        )

    def tile_start(self, t: Reg | int) -> Reg:
        """Position of the first key of the warp's t-th tile."""
        unit = self.segment.first_unit + t
        return (unit * self.config.tiling.row_warps + self.row_warp) * ROW_TILE

    def load_slot(self, t: Reg | int) -> Reg:
        """The page table's entry; nothing where the key or the page does not exist."""
        problem = self.problem
        position = self.tile_start(t) + (self.lane & (ROW_TILE - 1))
        number = hw.minimum(position // problem.page_size, problem.pages_per_seq - 1)
        row = hw.element_address(
            self.address["page_indices"], self.segment.request, 4 * problem.pages_per_seq
        )
        (page,) = hw.load_global(hw.element_address(row, number, 4))
        exists = (position < self.segment.length) & (page < problem.num_pages)
        slot = page * problem.page_size + position % problem.page_size
        return hw.select(exists, slot, hw.u32(-1))

    def visible(self, scores: list[list[Reg]], mask: Reg, t: Reg) -> list[list[Reg]]:
        """Draft token j does not see the last `q_len - 1 - j` keys."""
        problem = self.problem
        scores = super().visible(scores, mask, t)
        if problem.q_len == 1:
            return scores
        start = self.tile_start(t)

        def causal() -> list[list[Reg]]:
            result = []
            for n, block in enumerate(scores):
                hidden = []
                for h in range(2):
                    column = self.first_column + self.c * 2 + (8 * n + h)
                    token = hw.minimum(column // problem.num_heads, problem.q_len - 1)
                    hidden.append(hw.u32(problem.q_len - 1) - token)
                result.append([])
                for i, x in enumerate(block):
                    # Keys from this one on, and how many of the sequence's last keys are hidden.
                    behind = start + self.g + 8 * (i // 2) + hidden[i % 2]
                    seen = behind < self.segment.kv_len
                    result[n].append(hw.select(seen, x, hw.f32(-math.inf)))
            return result

        touched = start + (ROW_TILE + problem.q_len - 1) > self.segment.kv_len
        return hw.cond(touched, causal, scores)

    def query_address(self, column: Reg) -> Reg:
        row = self.segment.request * self.problem.num_columns + column
        return hw.element_address(self.address["q"], row, 2 * layout.LATENT_DIM)

    def load_sink(self, column: Reg) -> Reg | None:
        if "sink" not in self.address:
            return None
        head = column % self.problem.num_heads
        (sink,) = hw.load_global(hw.element_address(self.address["sink"], head, 4))
        return hw.select(self.segment.final, hw.as_f32(sink), hw.f32(-math.inf))

    def result_row(self, column: Reg) -> Reg:
        """The column's row in the final results, or in the partial ones."""
        segment = self.segment
        rows = hw.select(segment.final, segment.request, segment.slot)
        return rows * self.problem.num_columns + column

    def store_lse(self, column: Reg, lse: Reg) -> None:
        final, partial = self.address["lse"], self.address["partial_lse"]
        base = hw.select(self.segment.final, final, partial)
        hw.store_global(hw.element_address(base, self.result_row(column), 4), [lse])

    def store_out(self, column: Reg, dim: Reg, pair: list[Reg], offset: int = 0) -> None:
        element = hw.u64(self.result_row(column)) * layout.KV_LORA_RANK + hw.u64(dim)
        with hw.when(self.segment.final):
            hw.store_global(self.address["out"] + element * 2, [hw.bf16x2(*pair)], offset * 2)
        with hw.when(self.segment.partial):
            hw.store_global(self.address["partial_out"] + element * 4, pair, offset * 4)

    def prefetch_pages(self, request: Reg) -> None:
        """Brings a sequence's page table to L2."""
        row_bytes = 4 * self.problem.pages_per_seq
        row = hw.element_address(self.address["page_indices"], request, row_bytes)
        with hw.when(self.thread * 128 < row_bytes):
            hw.prefetch_global(hw.element_address(row, self.thread, 128))

    def prefetch_first_pages(self, split: WorkSplit) -> None:
        """Where this CTA begins if the lengths are about equal; they are still on their way."""
        if split.batch <= split.num_ctas:
            self.prefetch_pages(hw.minimum(self.cta // split.ctas_per_sequence, split.batch - 1))

    def for_each_segment(
        self, split: WorkSplit, attend: Callable[[Segment], None], writer: int = 0
    ) -> None:
        """Calls `attend` in a loop over the CTA's segments, `self.segment` being it.

        Args:
          split: how the keys are divided.
          attend: builds the code of one segment.
          writer: the thread that leaves the plan for `merge_segments_sm90`.
        """

        def body(segment: Segment) -> None:
            self.segment = segment
            attend(segment)

        addresses = (self.address["kv_lens"], self.address["segments"])
        split.for_each_segment(*addresses, self.cta, body, writer)


class _FewColumns(_Sequences, WarpAttention):
    """A CTA of up to 32 columns."""

    def run(self, split: WorkSplit) -> None:
        """Segment after segment."""
        self.prefetch_first_pages(split)
        self.init_barriers()

        def release() -> None:
            # Every warp has read the results that the last merge left where rows go now. Not at
            # the start: the fence waits for loads that are on their way.
            with hw.when(self.segment.first_round.ne(0)):
                hw.fence_async_proxy()
                hw.cta_sync()

        self.for_each_segment(
            split, lambda segment: self.attend(segment.num_units, segment.first_round, release)
        )


class _FewColumnsFp8(_FewColumns, Fp8WarpAttention):
    """The same, over `fp8_ds_mla` rows."""


class _FewColumnsBf16(_FewColumns, Bf16WarpAttention):
    """The same, over bfloat16 rows."""


class _ManyColumns(_Sequences, WarpgroupAttention):
    """A CTA of 64 columns."""

    def run(self, split: WorkSplit) -> None:
        """Segment after segment; each role finds them by itself."""
        self.prefetch_first_pages(split)
        self.start()

        def gather(segment: Segment) -> None:
            self.gather(segment.num_units, segment.first_round, segment.ordinal)

        def compute(segment: Segment) -> None:
            self.attend(segment.num_units, segment.first_round, segment.ordinal)

        self.run_roles(
            gather=lambda: self.for_each_segment(split, gather, GATHER_THREAD),
            compute=lambda: self.for_each_segment(split, compute, GATHER_THREAD),
        )


_FEW_COLUMNS = {"fp8_ds_mla": _FewColumnsFp8, "bfloat16": _FewColumnsBf16}

# ---------------------------------------------------------------------------------------- launch


def dense_decode_sm90(
    q: jax.Array,
    kv_cache: jax.Array,
    page_indices: jax.Array,
    kv_lens: jax.Array,
    *,
    sm_scale: float,
    attn_sink: jax.Array | None = None,
    config: DenseDecodeConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of each sequence's last `q_len` positions over its pages.

    Query j of sequence b stands at position `kv_lens[b] - q_len + j`; per head, over the keys up to
    and including its own,

        s = sm_scale * q . row      out = softmax(s) @ row[:512]      lse = log(sum(exp(s)))

    Bitwise deterministic. Lengths may differ as they like: the keys are divided on the device.

    Args:
      q: bfloat16 `[batch, q_len, heads, 576]`, absorbed: `ql_nope ++ q_pe`. Up to 64 (token, head)
        columns share the read of a row (32 with a bfloat16 cache), more are computed in groups.
        Nothing needs padding.
      kv_cache: uint8 `[num_pages, page_size, 656]` (`fp8_ds_mla`) or bfloat16 `[num_pages,
        page_size, 576]` (`kv_c ++ k_pe`); any page size (with `fp8_ds_mla`, multiples of 16 are
        fastest), beyond 2**31 bytes, too.
      page_indices: int32 `[batch, pages_per_seq]`. Keys of pages outside of the cache (-1) are
        skipped; entries beyond a sequence's length may be anything.
      kv_lens: int32 `[batch]`, the q_len new tokens included; keys beyond the page table are
        skipped.
      sm_scale: the factor of the scores, positive.
      attn_sink: float32 `[heads]`: `out` is multiplied by `sigmoid(lse - attn_sink)`.
      config: how to divide the work, over rows of the cache's format; `default_config` if None.

    Returns:
      `out` bfloat16 `[batch, q_len, heads, 512]` and `lse` float32 `[batch, q_len, heads]`, natural
      log. A query without a key has out 0 and lse -inf.

    Raises:
      ValueError: if the arguments do not fit together.
      NotImplementedError: if q is not bfloat16 of 576 dims, or the cache neither `fp8_ds_mla` nor
        bfloat16 of 512 + 64 dims.
    """
    layout.check_sm_scale(sm_scale)
    kv_cache_format = _validate(q, kv_cache, page_indices, kv_lens, attn_sink)
    if config is not None and config.kv_cache_format != kv_cache_format:
        raise ValueError(
            f"{config.kv_cache_format=} is not that of the cache, {kv_cache.dtype} rows of"
            f" {kv_cache.shape[2]}: {kv_cache_format!r}"
        )
    batch, q_len, num_heads, _ = q.shape
    if 0 in (*q.shape, *page_indices.shape, *kv_cache.shape):
        return (
            jnp.zeros((batch, q_len, num_heads, layout.KV_LORA_RANK), jnp.bfloat16),
            jnp.full((batch, q_len, num_heads), -jnp.inf, jnp.float32),
        )
    if config is None:
        capacity = page_indices.shape[1] * kv_cache.shape[1]
        config = default_config(batch, q_len * num_heads, capacity, kv_cache_format)
    return _decode(
        q, kv_cache, page_indices, kv_lens, attn_sink, sm_scale=float(sm_scale), config=config
    )


# Under jit, so that eager calls compile once, and layers of one shape share one kernel.
@functools.partial(jax.jit, static_argnames=("sm_scale", "config"))
def _decode(
    q: jax.Array,
    kv_cache: jax.Array,
    page_indices: jax.Array,
    kv_lens: jax.Array,
    attn_sink: jax.Array | None,
    *,
    sm_scale: float,
    config: DenseDecodeConfig,
) -> tuple[jax.Array, jax.Array]:
    batch, q_len, num_heads, _ = q.shape
    num_pages, page_size, _ = kv_cache.shape
    problem = _Problem(
        batch, q_len, num_heads, num_pages, page_size, page_indices.shape[1], sm_scale
    )
    split = WorkSplit(
        batch,
        problem.capacity,
        config.tiling.tokens_per_round,
        config.num_ctas,
        config.segment_cost,
    )
    operands = {"kv_cache": kv_cache, "q": q, "page_indices": page_indices, "kv_lens": kv_lens}
    if attn_sink is not None:
        operands["sink"] = attn_sink.astype(jnp.float32)
    names = (*operands, "out", "lse", "partial_out", "partial_lse", "segments", "smem")

    code = _ManyColumns if config.is_wide else _FEW_COLUMNS[config.kv_cache_format]

    def dense_decode_kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def cta(ctx: Any, *args: Any) -> None:
            del ctx
            *values, program = args
            named = dict(zip(names, values, strict=True))
            code(config, problem, named, Reg(program.registers.item())).run(split)

        cta(*refs, lax.axis_index("cta").astype(jnp.int32))

    columns = problem.num_columns
    shape = jax.ShapeDtypeStruct
    out, lse, *partials, segments = plgpu.kernel(
        dense_decode_kernel,
        out_type=[
            shape((batch, columns, layout.KV_LORA_RANK), jnp.bfloat16),
            shape((batch, columns), jnp.float32),
            shape((split.num_slots, columns, layout.KV_LORA_RANK), jnp.float32),
            shape((split.num_slots, columns), jnp.float32),
            shape((batch, 2), jnp.int32),
        ],
        scratch_types=[plgpu.SMEM((config.smem_bytes,), jnp.uint8)],
        grid=(config.num_ctas * -(-columns // config.head_tile),),
        grid_names=("cta",),
        num_threads=config.num_warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
    )(*operands.values())
    partial_out, partial_lse = (as_varying_as(x, operands.values()) for x in partials)
    out, lse = merge_segments_sm90(out, lse, partial_out, partial_lse, kv_lens, segments, attn_sink)
    return out.reshape(batch, q_len, num_heads, -1), lse.reshape(batch, q_len, num_heads)


def _validate(
    q: jax.Array,
    kv_cache: jax.Array,
    page_indices: jax.Array,
    kv_lens: jax.Array,
    attn_sink: jax.Array | None,
) -> layout.RowFormat:
    """Checks the arguments; returns the cache's format."""
    if q.ndim != 4 or kv_cache.ndim != 3 or page_indices.ndim != 2:
        raise ValueError(
            f"{q.shape=}, {kv_cache.shape=}, {page_indices.shape=}: expected"
            " [batch, q_len, heads, 576], [pages, page_size, 656 or 576] and [batch, pages_per_seq]"
        )
    if q.dtype != jnp.bfloat16 or q.shape[3] != layout.LATENT_DIM:
        raise NotImplementedError(
            f"{q.dtype=}, {q.shape=}: this kernel takes bfloat16 [.., .., .., {layout.LATENT_DIM}]"
        )
    rows = (kv_cache.dtype, kv_cache.shape[2])
    if rows == (jnp.uint8, layout.FP8_ROW_BYTES):
        kv_cache_format = "fp8_ds_mla"
    elif rows == (jnp.bfloat16, layout.LATENT_DIM):
        kv_cache_format = "bfloat16"
    else:
        raise NotImplementedError(
            f"{kv_cache.dtype=}, {kv_cache.shape=}: this kernel reads fp8_ds_mla caches, uint8"
            f" [pages, page_size, {layout.FP8_ROW_BYTES}], and bfloat16 ones [pages, page_size,"
            f" {layout.LATENT_DIM}]"
        )
    batch, _, num_heads, _ = q.shape
    if page_indices.shape[0] != batch or page_indices.dtype != jnp.int32:
        raise ValueError(
            f"{page_indices.shape=}, {page_indices.dtype=} must be int32 [{batch}, pages_per_seq],"
            " one page table per sequence"
        )
    if kv_lens.shape != (batch,) or kv_lens.dtype != jnp.int32:
        raise ValueError(f"{kv_lens.shape=}, {kv_lens.dtype=} must be int32 ({batch},)")
    if attn_sink is not None and attn_sink.shape != (num_heads,):
        raise ValueError(f"{attn_sink.shape=} must be ({num_heads},), one value per query head")
    return kv_cache_format
