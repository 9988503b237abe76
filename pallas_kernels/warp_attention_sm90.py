"""Attention of a few query columns over cache rows, by warps that work alone; shared by kernels.

One CTA takes 8 to 32 *columns*: query vectors that attend to the same keys (the heads of a token,
or the heads of several draft tokens of a sequence). For each column, over the rows it is given,

    s = sm_scale * q . [kv_c, k_pe]      out = softmax(s) @ kv_c      lse = log(sum(exp(s)))

Tokens are the M of every MMA and columns the N ("swap-AB"), so 8 heads cost 8 columns, and nothing
is padded to 64. Which rows a CTA takes, where queries lie and where results go is up to the kernel
that derives from `WarpAttention`: `sparse_decode_sm90`, `dense_decode_sm90`.

Roles
-----
There are none: each warp alone takes 16 rows at a time from raw bytes to its own online softmax.

    warp w ── gather ──▶ raw rows ── scores ──▶ S^T ── softmax ──▶ P ── values ──▶ O^T ─┐
      ▲    cp.async.bulk   SMEM     mma.sync    regs               regs   mma.sync  regs  ├─▶ merge
      └────────── next tile, as soon as this one is read ◀───────────────────────────┘   all warps

The only CTA-wide barriers are before the loop (queries are in place) and in the merge. From 16
columns on, one warp's registers do not hold 512 output dims of all of them: 2 or 4 warps form a
team. Each computes S for its own tile and all columns, then the values of all the team's tiles for
its share of the dims; maxima and P pass through shared memory (three named barriers a round).
Repeating the dequantization in every warp instead was slower (`benchmarks/EXPERIMENTS.md`).

   columns in a CTA  team   dims of a warp   output accumulators a thread
          8            1         512          32 dim blocks x 1 column block  x 4 = 128
         16            2         256          16            x 2               x 4 = 128
         24            4         128           8            x 3               x 4 =  96
         32            4         128           8            x 4               x 4 = 128

Fragments (`hopper` has the MMA's own picture; lane = 4 g + c)
---------
    S^T [16 tokens, 8 columns] tokens g, g + 8;  columns 2c, 2c + 1
    K   as A operand           16 consecutive bytes of rows g, g + 8, see the row format
    P   as B operand           S^T's fragment through `movmatrix`: tokens 2c, 2c + 1, +8; column g
    V^T as A operand           `ldmatrix.trans`, see the row format
    O^T [16 dims, 8 columns]   the dims of V^T;  columns 2c, 2c + 1

Row formats
-----------
How queries, rows and weights become operands is a derived class's: `Fp8WarpAttention`
(`fp8_ds_mla`) and `Bf16WarpAttention`. Their modules have the fragments and the numerics.

Numbers
-------
- The running maximum may lag behind by 2**4, so P is at most that. When it is outgrown, the
  accumulators are rescaled; usually they are not.
- The row of a key without a slot is never read from the cache: it is zeros in shared memory, its
  score -inf.
- No atomics, one fixed order of everything: bitwise deterministic.

Budgets
-------
255 registers a thread (sparse: 8, 16 and 24 columns without spills; 32 spill 112 bytes; bfloat16
rows: no spills): 96 to 128 accumulators, 4 per column block for maxima and sums, 8 to 32 for scores
in flight, the rest addresses and operands. Shared memory in bytes, with 8 warps and two tiles of
`fp8_ds_mla` rows in flight per warp:

    columns                          8         16         24         32
    raw rows 8 x 2 x 16 x 656   167,936    167,936    167,936    167,936
    queries 9,216 per block       9,216     18,432     27,648     36,864
    query scales                     32         64         96        128
    P, 256 per warp and block         -      4,096      6,144      8,192
    maxima and scales                 -        640        896      1,152
    max and sum per warp            512      1,024      1,536      2,048
    mbarriers                       128        128        128        128
    sum                         177,824    192,320    204,384    216,448

and with one tile of bfloat16 rows per warp:

    columns                          8         16         24         32
    raw rows 8 x 16 x 1,168     149,504    149,504    149,504    149,504
    queries, no scales            9,216     18,432     27,648     36,864
    P, 512 per warp and block         -      8,192     12,288     16,384
    maxima, max and sum             512      1,664      2,432      3,200
    mbarriers                        64         64         64         64
    sum                         159,296    177,856    191,936    206,016

A row stride of 656 bytes is 164 words, 4 modulo 32: 16-byte reads of 8 rows meet no bank conflict.
bfloat16 rows of 1,152 bytes lie 1,168 bytes apart for it.

Form
----
Grid, refs, launch and the merge of splits are Pallas; the loop is inline, because Pallas arrays
belong to a warpgroup and this algorithm to a warp. The same steps as Pallas operations take half
again as long in series, and `copy_gmem_to_smem` row by row gathers slower, since one elected thread
issues the copies (`benchmarks/EXPERIMENTS.md`).
"""

import abc
import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels import hopper as hw
from pallas_kernels import layout
from pallas_kernels.cta_attention_sm90 import ROW_TILE, CtaAttention, copy_rows
from pallas_kernels.hopper import Reg

HEAD_BLOCK = 8
"""Query columns per MMA: its N."""

DIM_BLOCK = 16
"""Value dims per MMA of the values stage: its M there."""

CTA_HEAD_TILES = (8, 16, 24, 32)
"""Query columns that a CTA can take."""

QUERY_UNITS = layout.LATENT_DIM // 32
"""Units of 512 bytes of 8 columns' queries: two MMAs' B fragments each, 16 bytes a lane."""

QUERY_BYTES = QUERY_UNITS * 512
"""Queries of 8 columns in shared memory."""

_DIM_BLOCKS = layout.KV_LORA_RANK // DIM_BLOCK

# The running maximum may lag behind by 2**4 before the accumulators are rescaled.
_MAX_LAG = 4.0

# Named barriers of the teams; the hardware has 16, Mosaic GPU uses 0 to 4.
_TEAM_BARRIER = 8


# ---------------------------------------------------------------------------------------- tiling


@dataclasses.dataclass(frozen=True)
class WarpTiling:
    """How one CTA divides its work among warps.

    Attributes:
      head_tile: query columns of the CTA, 8, 16, 24 or 32.
      num_warpgroups: 1 or 2 (4 or 8 warps).
      num_stages: 16-token tiles that a warp keeps in flight, 1 to 4.
      kv_cache_format: of the rows.
    """

    head_tile: int
    num_warpgroups: int = 2
    num_stages: int = 2
    kv_cache_format: layout.RowFormat = "fp8_ds_mla"

    def __post_init__(self) -> None:
        if self.head_tile not in CTA_HEAD_TILES:
            raise ValueError(f"head_tile={self.head_tile} must be one of {CTA_HEAD_TILES}, or 64")
        if self.num_warpgroups not in (1, 2):
            raise ValueError(
                f"num_warpgroups={self.num_warpgroups} must be 1 or 2: with 3, a thread has 168"
                " registers, and the output accumulators alone take 128"
            )
        if not 1 <= self.num_stages <= 4:
            raise ValueError(f"num_stages={self.num_stages} must be 1 to 4")
        if self.smem_bytes > hw.SMEM_BYTES:
            raise ValueError(
                f"{self} needs {self.smem_bytes} bytes of shared memory of {hw.SMEM_BYTES};"
                " take fewer stages or warpgroups"
            )

    @property
    def num_warps(self) -> int:
        return 4 * self.num_warpgroups

    @property
    def row_warps(self) -> int:
        """Warps that take 16 different rows each."""
        return self.num_warps

    @property
    def num_threads(self) -> int:
        return hw.WARP * self.num_warps

    @property
    def head_blocks(self) -> int:
        """MMAs side by side, 8 columns each."""
        return self.head_tile // HEAD_BLOCK

    @property
    def team_size(self) -> int:
        """Warps that share their tiles: each holds `1 / team_size` of the output dims."""
        return {1: 1, 2: 2, 3: 4, 4: 4}[self.head_blocks]

    @property
    def num_teams(self) -> int:
        return self.num_warps // self.team_size

    @property
    def row_bytes(self) -> int:
        """Bytes of a cache row."""
        return layout.ROW_BYTES[self.kv_cache_format]

    @property
    def row_stride(self) -> int:
        """Bytes from row to row in shared memory: 16 modulo 128.

        16-byte reads of 8 rows then meet no bank conflict.
        """
        return self.row_bytes + (16 - self.row_bytes) % 128

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile in shared memory."""
        return ROW_TILE * self.row_stride

    @property
    def weight_terms(self) -> int:
        """16-bit numbers that a weight of P is the sum of: float16, or two of bfloat16."""
        return {"fp8_ds_mla": 1, "bfloat16": 2}[self.kv_cache_format]

    @property
    def tokens_per_round(self) -> int:
        """Keys that the CTA takes per iteration of its main loop."""
        return ROW_TILE * self.num_warps

    @property
    def smem_bytes(self) -> int:
        """Shared memory of the CTA."""
        return _shared_layout(self).end

    @property
    def ctas_per_sm(self) -> int:
        """CTAs that fit on an SM: 255 registers a thread allow two of one warpgroup."""
        fits = hw.SM_SMEM_BYTES // (self.smem_bytes + hw.SMEM_BYTES_PER_CTA)
        return min(fits, 2 // self.num_warpgroups)


class _SharedLayout(NamedTuple):
    """Byte offsets in shared memory."""

    rows: int  # raw cache rows [warp, stage, token]; the merge reuses them for outputs
    queries: int  # [block, unit, lane, 16]
    query_scales: int  # f32 [column], for fp8_ds_mla
    weights: int  # 16-bit P fragments [warp, block, lane, 8 * terms], for teams
    maxima: int  # f32 [warp, column] and the tile's scale, for teams
    stats: int  # f32 (max, sum) [warp, column]
    barriers: int  # mbarrier [warp, stage]
    end: int


def _shared_layout(tiling: WarpTiling) -> _SharedLayout:
    rows = tiling.num_warps * tiling.num_stages * tiling.tile_bytes
    outputs = tiling.num_teams * tiling.head_tile * layout.KV_LORA_RANK * 4
    exchanges = tiling.team_size > 1
    sizes = (
        max(rows, outputs),
        tiling.head_blocks * QUERY_BYTES,
        (tiling.kv_cache_format == "fp8_ds_mla") * tiling.head_tile * 4,
        exchanges * tiling.num_warps * tiling.head_blocks * 256 * tiling.weight_terms,
        exchanges * tiling.num_warps * _maxima_bytes(tiling),
        tiling.num_warps * tiling.head_tile * 8,
        tiling.num_warps * tiling.num_stages * 8,
    )
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // 16) * 16)
    return _SharedLayout(*offsets)


def _maxima_bytes(tiling: WarpTiling) -> int:
    return tiling.head_tile * 4 + 16


# ------------------------------------------------------------------------------------------- CTA


class State(NamedTuple):
    """What a warp carries from tile to tile, in registers."""

    acc: list[list[list[Reg]]]  # f32 O^T fragments [dim block][block][4]
    maxima: list[list[Reg]]  # f32 running maximum [block][2], log2 units
    sums: list[list[Reg]]  # f32 running sum of this lane's tokens [block][2]
    scale: Reg | None  # bits of the running token scale, a power of two; None without scales
    masks: list[Reg]  # valid tokens of the tiles in flight, one bit each


class WarpAttention(CtaAttention):
    """A CTA of 8 to 32 columns, over rows of any format: a derived class knows the format.

    `attend` takes the CTA's columns over one list of keys. It may run several times, for one list
    after the other: `first_round` then counts the rounds of all lists before, from which the
    mbarriers' phases follow.
    """

    def __init__(self, tiling: WarpTiling, **arguments: Any) -> None:
        """`tiling`: how the warps divide the work; the others are `CtaAttention`'s."""
        super().__init__(**arguments)
        self.tiling, self.row_warp = tiling, self.warp
        self.at = _shared_layout(tiling)
        self.team = self.warp // tiling.team_size
        self.member = self.warp % tiling.team_size

        warp_bytes = tiling.num_stages * tiling.tile_bytes
        self.rows = self.smem + self.warp * warp_bytes
        self.team_rows = self.smem + self.team * (tiling.team_size * warp_bytes)
        barriers = self.smem + self.at.barriers
        self.barriers = barriers + self.warp * (tiling.num_stages * 8)
        self.team_barriers = barriers + self.team * (tiling.team_size * tiling.num_stages * 8)

    # ---- what a row format defines

    @abc.abstractmethod
    def store_queries(self, loaded: list[list[list[Reg]]]) -> None:
        """Stores what `load_queries` brought, in MMA order; zeros for columns beyond the last."""

    @abc.abstractmethod
    def scores(self, stage: Reg, mask: Reg, t: Reg) -> tuple[list[list[Reg]], Reg | None]:
        """S^T = K Q^T for the warp's own tile and all columns.

        Returns:
          Scores `[block][4]` in log2 units, -inf for tokens that are not seen; and bits of the
          power of two of the tile's largest scale, None where rows have no scales.
        """

    @abc.abstractmethod
    def smallest_scale(self) -> Reg | None:
        """Where the running token scale begins; None where rows have no scales."""

    @abc.abstractmethod
    def pack_weights(self, low: Reg, high: Reg) -> list[Reg]:
        """A pair of weights, at most 2**4, as 16-bit operands of the values' MMAs: its terms."""

    @abc.abstractmethod
    def add_values(self, state: State, weights: list[list[Reg]], tile: Reg, offset: int) -> State:
        """O^T += V^T P for this warp's dims and one tile.

        Args:
          state: holds O^T.
          weights: P as B fragments `[block][2 * terms]`, term after term.
          tile: address of a tile in shared memory; the one that is meant lies `offset` behind.
        """

    @abc.abstractmethod
    def output_unit(self, state: State) -> Reg:
        """What O^T is to be multiplied by at the end."""

    @abc.abstractmethod
    def dim_pairs(self, fragment: list[Reg]) -> tuple[Reg, list[list[Reg]]]:
        """Two neighboring dims of an O^T fragment: which of the 16, and their values.

        Returns:
          The lower dim, even, and `[column][2]` values for columns 2c and 2c + 1.
        """

    # ---- gather: the cache rows of one tile into one stage of shared memory

    def init_barriers(self) -> None:
        """Each warp its own mbarriers, once."""
        with hw.when(self.lane.eq(0)):
            for stage in range(self.tiling.num_stages):
                hw.mbarrier_init(self.barriers + 8 * stage, 1)
            hw.fence_async_proxy()
        hw.warp_sync()

    def gather(self, slot: Reg, stage: Reg, valid: Reg, mask: Reg) -> None:
        """Starts copying the tile's rows, see `copy_rows`; one by one if there are gaps between."""
        tiling = self.tiling
        row = (self.lane & (ROW_TILE - 1)) * tiling.row_stride
        is_dense = tiling.row_stride == tiling.row_bytes
        copy_rows(
            self.kv_cache,
            slot,
            valid,
            mask,
            row_bytes=tiling.row_bytes,
            destination=self.rows + stage * tiling.tile_bytes + row,
            barrier=self.barriers + stage * 8,
            rows_per_copy=self.rows_per_copy if is_dense else 1,
        )

    # ---- queries: in the order in which the MMAs read them

    def load_queries(self) -> list[list[list[Reg]]]:
        """This warp's columns (warp, warp + num_warps, ...), 8 dims per 16 bytes and lane."""
        tiling = self.tiling
        columns_per_warp = -(-tiling.head_tile // tiling.num_warps)
        return [self.load_query(self.warp + i * tiling.num_warps) for i in range(columns_per_warp)]

    # ---- softmax: running maximum and scale, rescaling, weights

    def softmax(
        self, state: State, scores: list[list[Reg]], scale: Reg | None
    ) -> tuple[State, list[list[Reg]]]:
        """Brings the state to this tile's maximum and scale; returns weights P [block][4]."""
        blocks = range(self.tiling.head_blocks)
        tile_max = []
        for n in blocks:
            tile_max.append([])
            for h in range(2):
                x = hw.maximum(scores[n][h], scores[n][2 + h])
                for distance in (4, 8, 16):
                    x = hw.maximum(x, hw.shuffle_xor(x, distance))
                tile_max[n].append(x)
        if self.tiling.team_size > 1:
            tile_max, scale = self.exchange_maxima(tile_max, scale)

        old_scale = state.scale
        is_above = [] if scale is None or old_scale is None else [scale > old_scale]
        for n in blocks:
            for h in range(2):
                is_above.append(tile_max[n][h] - state.maxima[n][h] > _MAX_LAG)
        outgrown = functools.reduce(operator.or_, is_above)

        def rescaled() -> State:
            maxima = [
                [hw.maximum(state.maxima[n][h], tile_max[n][h]) for h in range(2)] for n in blocks
            ]
            decay = [[hw.exp2(state.maxima[n][h] - maxima[n][h]) for h in range(2)] for n in blocks]
            new_scale, ratio = None, hw.f32(1.0)
            if scale is not None and old_scale is not None:
                new_scale = hw.maximum_u32(old_scale, scale)
                # old scale / new scale, a power of two; 0 where that leaves float32's range.
                difference = new_scale - old_scale
                ratio = hw.as_f32((127 << 23) - hw.minimum(difference, 127 << 23))
            return state._replace(
                acc=[
                    [
                        [x * (decay[n][i % 2] * ratio) for i, x in enumerate(fragment[n])]
                        for n in blocks
                    ]
                    for fragment in state.acc
                ],
                maxima=maxima,
                sums=[[state.sums[n][h] * decay[n][h] for h in range(2)] for n in blocks],
                scale=new_scale,
            )

        state = hw.cond(hw.any_lane(outgrown), rescaled, state)
        weights = [
            [hw.exp2(scores[n][i] - state.maxima[n][i % 2]) for i in range(4)] for n in blocks
        ]
        sums = [
            [state.sums[n][h] + (weights[n][h] + weights[n][2 + h]) for h in range(2)]
            for n in blocks
        ]
        return state._replace(sums=sums), weights

    def exchange_maxima(
        self, tile_max: list[list[Reg]], scale: Reg | None
    ) -> tuple[list[list[Reg]], Reg | None]:
        """Maxima over the tiles of all warps of the team."""
        blocks = range(self.tiling.head_blocks)
        stride = _maxima_bytes(self.tiling)
        maxima = self.smem + self.at.maxima
        mine = maxima + self.warp * stride
        with hw.when(self.g.eq(0)):
            for n in blocks:
                hw.store_shared(mine + self.c * 8, tile_max[n], n * 32)
        if scale is not None:
            with hw.when(self.lane.eq(0)):
                hw.store_shared(mine, [scale], 4 * self.tiling.head_tile)
        self.team_sync()
        team = maxima + self.team * (self.tiling.team_size * stride)
        for member in range(self.tiling.team_size):
            offset = member * stride
            for n in blocks:
                theirs = hw.load_shared_f32(team + self.c * 8, offset + n * 32, words=2)
                tile_max[n] = [hw.maximum(a, b) for a, b in zip(tile_max[n], theirs, strict=True)]
            if scale is not None:
                (other,) = hw.load_shared(team, offset + 4 * self.tiling.head_tile, words=1)
                scale = hw.maximum_u32(scale, other)
        return tile_max, scale

    def team_sync(self) -> None:
        """All warps of the team arrived, and see each other's shared memory."""
        hw.named_barrier(self.team + _TEAM_BARRIER, hw.WARP * self.tiling.team_size)

    # ---- values: O^T += V^T P for this warp's dims and the tiles of its team

    def values(self, state: State, weights: list[list[Reg]], stage: Reg, parity: Reg) -> State:
        """Adds the team's tiles; P becomes 16 bits once, in the warp that has it."""
        tiling, blocks = self.tiling, range(self.tiling.head_blocks)
        team_size, num_stages = tiling.team_size, tiling.num_stages
        # C fragment [token, column] of S^T -> B fragment of the same: the pairs run along tokens.
        fragments = []
        for n in blocks:
            low, high = (
                [*map(hw.transpose_matrix, self.pack_weights(*weights[n][2 * r : 2 * r + 2]))]
                for r in range(2)
            )
            fragments.append([x for term in zip(low, high, strict=True) for x in term])
        words = 2 * tiling.weight_terms
        block_bytes, fragment_bytes = 128 * words, tiling.head_blocks * 128 * words
        exchange = self.smem + self.at.weights + self.lane * (4 * words)
        if team_size > 1:
            for n in blocks:
                mine = exchange + self.warp * fragment_bytes
                hw.store_shared(mine, fragments[n], n * block_bytes)
            self.team_sync()

        for member in range(team_size):
            if team_size > 1:
                barrier = self.team_barriers + stage * 8 + member * num_stages * 8
                hw.mbarrier_wait(barrier, parity)
                team_exchange = exchange + self.team * (team_size * fragment_bytes)
                theirs = member * fragment_bytes
                fragments = [
                    hw.load_shared(team_exchange, theirs + n * block_bytes, words=words)
                    for n in blocks
                ]
            tile = self.team_rows + stage * tiling.tile_bytes
            offset = member * num_stages * tiling.tile_bytes
            state = self.add_values(state, fragments, tile, offset)
        return state

    # ---- merge: the CTA's warps into one output

    def merge(self, state: State) -> None:
        """Adds the teams' outputs, applies the softmax's denominator, stores out and lse."""
        tiling = self.tiling
        blocks = range(tiling.head_blocks)
        stats = self.smem + self.at.stats + self.c * 16
        stats_bytes = tiling.head_tile * 8
        sums = state.sums
        for distance in (4, 8, 16):
            sums = [[x + hw.shuffle_xor(x, distance) for x in pair] for pair in sums]
        with hw.when(self.g.eq(0)):
            for n in blocks:
                (m0, m1), (l0, l1) = state.maxima[n], sums[n]
                hw.store_shared(stats + self.warp * stats_bytes, [m0, l0, m1, l1], n * 64)
        hw.cta_sync()

        unit = self.output_unit(state)
        factors = []
        for n in blocks:
            warps = [
                hw.load_shared_f32(stats, w * stats_bytes + n * 64) for w in range(tiling.num_warps)
            ]
            factors.append([])
            for h in range(2):
                maximum = functools.reduce(hw.maximum, [w[2 * h] for w in warps])
                denominator = hw.f32(0.0)
                for w in warps:
                    weight = hw.exp2(w[2 * h] - maximum)
                    denominator = hw.fma(w[2 * h + 1], weight, denominator)
                column = self.first_column + self.c * 2 + (8 * n + h)
                with hw.when(self.warp.eq(0) & self.g.eq(0) & (column < self.num_columns)):
                    self.store_lse(column, (maximum + hw.log2(denominator)) * hw.LN_2)
                normalizer = denominator
                sink = self.load_sink(hw.minimum(column, self.num_columns - 1))
                if sink is not None:
                    # out * sigmoid(lse - sink): the sink is one more term of the denominator.
                    normalizer = denominator + hw.exp2(sink * hw.LOG2_E - maximum)
                inverse = hw.select(denominator > 0.0, hw.reciprocal(normalizer), hw.f32(0.0))
                own = hw.exp2(state.maxima[n][h] - maximum)
                factors[n].append(own * inverse * unit)

        # Output fragments [team, dim block, block, lane, 16 bytes], over the raw rows: every
        # copy has landed and been read before the barrier above.
        team_bytes = tiling.head_tile * layout.KV_LORA_RANK * 4
        my_blocks = _DIM_BLOCKS // tiling.team_size
        mine = (
            self.smem
            + self.team * team_bytes
            + self.member * (my_blocks * tiling.head_blocks * 512)
            + self.lane * 16
        )
        for i, fragment in enumerate(state.acc):
            for n in blocks:
                scaled = [x * factors[n][k % 2] for k, x in enumerate(fragment[n])]
                hw.store_shared(mine, scaled, (i * tiling.head_blocks + n) * 512)
        hw.cta_sync()

        num_fragments = _DIM_BLOCKS * tiling.head_blocks
        for i in range(num_fragments // tiling.num_warps):
            fragment = self.warp + i * tiling.num_warps
            address = self.smem + fragment * 512 + self.lane * 16
            total = hw.load_shared_f32(address)
            for team in range(1, tiling.num_teams):
                other = hw.load_shared_f32(address, team * team_bytes)
                total = [a + b for a, b in zip(total, other, strict=True)]
            n, block = fragment % tiling.head_blocks, fragment // tiling.head_blocks
            dim_in_block, pairs = self.dim_pairs(total)
            dim = block * DIM_BLOCK + dim_in_block
            for h, pair in enumerate(pairs):
                column = self.first_column + n * HEAD_BLOCK + self.c * 2 + h
                if self.num_columns % tiling.head_tile:
                    with hw.when(column < self.num_columns):
                        self.store_out(column, dim, pair)
                else:
                    self.store_out(column, dim, pair)

    # ---- the whole

    def attend(self, num_rounds: Reg, first_round: Reg, claim: Callable[[], None]) -> None:
        """Gathers ahead, loops over the rounds of tiles, merges.

        Args:
          num_rounds: tiles of each warp; the same for all warps.
          first_round: rounds that the CTA has done before, in other lists.
          claim: called when the first loads are on their way and before shared memory is written:
            initializes the barriers, or waits until every warp is done with the list before.
        """
        tiling = self.tiling
        # Indices first, then queries: both are on their way while the barriers are set up, and the
        # first rows are while the queries are converted.
        slots = [self.load_slot(t) for t in range(tiling.num_stages)]
        queries = self.load_queries()
        claim()
        masks = []
        for t, slot in enumerate(slots):
            valid, mask = self.validity(slot)
            masks.append(mask)
            with hw.when(hw.u32(t) < num_rounds):
                self.gather(slot, (first_round + t) % tiling.num_stages, valid, mask)
        self.store_queries(queries)
        hw.cta_sync()

        blocks, zero = tiling.head_blocks, hw.f32(0.0)
        state = State(
            acc=[
                [[zero] * 4 for _ in range(blocks)] for _ in range(_DIM_BLOCKS // tiling.team_size)
            ],
            maxima=[[hw.f32(hw.NO_MAXIMUM)] * 2 for _ in range(blocks)],
            sums=[[zero] * 2 for _ in range(blocks)],
            scale=self.smallest_scale(),
            masks=masks,
        )

        def one_round(t: Reg, state: State) -> State:
            use = first_round + t
            stage, parity = use % tiling.num_stages, use // tiling.num_stages & 1
            mask, *in_flight = state.masks
            next_slot = self.load_slot(t + tiling.num_stages)
            hw.mbarrier_wait(self.barriers + stage * 8, parity)
            scores, scale = self.scores(stage, mask, t)
            state, weights = self.softmax(state, scores, scale)
            state = self.values(state, weights, stage, parity)
            # The stage is free once the whole team has read it.
            if tiling.team_size > 1:
                self.team_sync()
            else:
                hw.warp_sync()
            valid, next_mask = self.validity(next_slot)
            with hw.when(t + tiling.num_stages < num_rounds):
                self.gather(next_slot, stage, valid, next_mask)
            return state._replace(masks=[*in_flight, next_mask])

        self.merge(hw.for_loop(num_rounds, state, one_round))
