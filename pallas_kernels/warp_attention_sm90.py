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
Repeating the dequantization in every warp instead measured 82 us against 72 (16 heads, 128 tokens).

   columns in a CTA  team   dims of a warp   output accumulators a thread
          8            1         512          32 dim blocks x 1 column block  x 4 = 128
         16            2         256          16            x 2               x 4 = 128
         24            4         128           8            x 3               x 4 =  96
         32            4         128           8            x 4               x 4 = 128

Fragments (`hopper` has the MMA's own picture; lane = 4 g + c)
---------
    S^T [16 tokens, 8 columns] tokens g, g + 8;  columns 2c, 2c + 1
    K   as A operand           16 consecutive bytes of rows g, g + 8: a k-step's dims are whatever
                               four bytes lie there, and Q is stored to match
    P   as B operand           S^T's fragment through `movmatrix`: tokens 2c, 2c + 1, +8; column g
    V^T as A operand           `ldmatrix.trans` on byte pairs, then a byte permutation: dims 2g and
                               2g + 1 of a 16-dim block; tokens 2c, 2c + 1, +8
    O^T [16 dims, 8 columns]   dims 2g, 2g + 1;  columns 2c, 2c + 1

Numbers
-------
- e4m3 -> float16 is exact, one instruction for two values. RoPE stays bfloat16, as an MMA of its
  own into the same accumulator.
- Scales never meet the 8-bit data. Scores: one accumulator per 128 dims, combined in float32 with
  the token's scales. Values: P times the token's scale of the 128 dims, as float16 pairs.
- float16's range: each query column is scaled by a power of two to 2**14 .. 2**15, undone in the
  scores; token scales are taken relative to a running power of two (their largest so far), undone
  at the end. When it or the running maximum (by more than 2**4) is outgrown, the accumulators are
  rescaled; usually they are not. What this cannot hold: a token's values lose bits where another
  token of the CTA, weighty or not, has a scale more than 2**20 times as large.
- The row of a key without a slot is never read from the cache: it is zeros in shared memory, its
  score -inf.
- No atomics, one fixed order of everything: bitwise deterministic.

Budgets
-------
255 registers a thread (sparse: 8, 16 and 24 columns without spills; 32 spill 112 bytes): 96 to
128 accumulators, 4 per column block for maxima and sums, 8 to 32 for scores in flight, the rest
addresses and operands. Shared memory in bytes, with 8 warps and two tiles in flight per warp:

    columns                          8         16         24         32
    raw rows 8 x 2 x 16 x 656   167,936    167,936    167,936    167,936
    queries 9,216 per block       9,216     18,432     27,648     36,864
    query scales                     32         64         96        128
    P, 256 per warp and block         -      4,096      6,144      8,192
    maxima and scales                 -        640        896      1,152
    max and sum per warp            512      1,024      1,536      2,048
    mbarriers                       128        128        128        128
    sum                         177,824    192,320    204,384    216,448

A row stride of 656 bytes is 164 words, 4 modulo 32: 16-byte reads of 8 rows meet no bank conflict.

Form
----
Grid, refs, launch and the merge of splits are Pallas; the loop is inline, because Pallas arrays
belong to a warpgroup and this algorithm to a warp. The same steps as Pallas operations, timed one
by one on all SMs, per 64 rows: 0.52 us to dequantize, 0.45 for the scores, 0.39 for the values and
0.15 to 0.23 for each of two reductions over tokens, 1.7 to 1.9 us in series against 1.2 here; and
`copy_gmem_to_smem` row by row gathers at 1.96 TB/s, since one elected thread issues the copies.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels import hopper as hw
from pallas_kernels import layout
from pallas_kernels.cta_attention_sm90 import ROW_TILE, CtaAttention, copy_rows, query_scales
from pallas_kernels.hopper import Reg

TOKEN_TILE = ROW_TILE
"""Cache rows that a warp works on at a time: the M of its MMAs."""

HEAD_BLOCK = 8
"""Query columns per MMA: its N."""

DIM_BLOCK = 16
"""Value dims per MMA of the values stage: its M there."""

CTA_HEAD_TILES = (8, 16, 24, 32)
"""Query columns that a CTA can take."""

_ROW = layout.FP8_ROW_BYTES
_NUM_TILES = layout.num_scale_tiles(layout.KV_LORA_RANK)
_SCALES_OFFSET = layout.KV_LORA_RANK
_ROPE_OFFSET = layout.KV_LORA_RANK + 4 * _NUM_TILES
_TILE_BYTES = TOKEN_TILE * _ROW
_DIM_BLOCKS = layout.KV_LORA_RANK // DIM_BLOCK

# Queries of 8 columns in MMA order: 32 fragments for the latent and 4 for RoPE, two to a 512-byte
# unit, so that a lane reads 16 bytes for two MMAs.
_QUERY_UNITS = layout.LATENT_DIM // 32
_QUERY_BYTES = _QUERY_UNITS * 512

# The running maximum may lag behind by 2**4 before the accumulators are rescaled.
_MAX_LAG = 4.0
# Finite, so that -inf - maximum is -inf and not NaN, and below every score.
_NO_MAXIMUM = -3.4028234e38
# P (at most 2**_MAX_LAG) and the token scales (less than 2, relative to the running scale) become
# float16 times 2**5 each, so that their product stays below 2**15 and small ones stay normal.
_HEADROOM = 5
_SMALLEST_SCALE_EXPONENT = 127 - 100

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
    """

    head_tile: int
    num_warpgroups: int = 2
    num_stages: int = 2

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
    def tokens_per_round(self) -> int:
        """Keys that the CTA takes per iteration of its main loop."""
        return TOKEN_TILE * self.num_warps

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

    rows: int  # raw cache rows [warp, stage, token, 656]; the merge reuses them for outputs
    queries: int  # [block, unit, lane, 16]
    query_scales: int  # f32 [column]
    weights: int  # f16 P fragments [warp, block, lane, 8], for teams
    maxima: int  # f32 [warp, column] and the tile's scale, for teams
    stats: int  # f32 (max, sum) [warp, column]
    barriers: int  # mbarrier [warp, stage]
    end: int


def _shared_layout(tiling: WarpTiling) -> _SharedLayout:
    rows = tiling.num_warps * tiling.num_stages * _TILE_BYTES
    outputs = tiling.num_teams * tiling.head_tile * layout.KV_LORA_RANK * 4
    exchanges = tiling.team_size > 1
    sizes = (
        max(rows, outputs),
        tiling.head_blocks * _QUERY_BYTES,
        tiling.head_tile * 4,
        exchanges * tiling.num_warps * tiling.head_blocks * 256,
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


class _State(NamedTuple):
    """What a warp carries from tile to tile, in registers."""

    acc: list[list[list[Reg]]]  # f32 O^T fragments [dim block][block][4]
    maxima: list[list[Reg]]  # f32 running maximum [block][2], log2 units
    sums: list[list[Reg]]  # f32 running sum of this lane's tokens [block][2]
    scale: Reg  # bits of the running token scale, a power of two
    masks: list[Reg]  # valid tokens of the tiles in flight, one bit each


class WarpAttention(CtaAttention):
    """A CTA of 8 to 32 columns.

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

        warp_bytes = tiling.num_stages * _TILE_BYTES
        self.rows = self.smem + self.warp * warp_bytes
        self.team_rows = self.smem + self.team * (tiling.team_size * warp_bytes)
        barriers = self.smem + self.at.barriers
        self.barriers = barriers + self.warp * (tiling.num_stages * 8)
        self.team_barriers = barriers + self.team * (tiling.team_size * tiling.num_stages * 8)

    # ---- gather: the cache rows of one tile into one stage of shared memory

    def init_barriers(self) -> None:
        """Each warp its own mbarriers, once."""
        with hw.when(self.lane.eq(0)):
            for stage in range(self.tiling.num_stages):
                hw.mbarrier_init(self.barriers + 8 * stage, 1)
            hw.fence_async_proxy()
        hw.warp_sync()

    def validity(self, slot: Reg) -> tuple[Reg, Reg]:
        """Whether this lane's slot lies in the cache (0 or 1), and the warp's mask of it.

        One unsigned comparison refuses -1, other negative numbers and slots beyond the end.
        """
        inside = slot < min(self.num_slots, 2**31)
        return hw.select(inside, hw.u32(1), hw.u32(0)), hw.ballot(inside)

    def gather(self, slot: Reg, stage: Reg, valid: Reg, mask: Reg) -> None:
        """Starts copying the tile's rows, see `copy_rows`."""
        copy_rows(
            self.kv_cache,
            slot,
            valid,
            mask,
            destination=self.rows + stage * _TILE_BYTES + (self.lane & (TOKEN_TILE - 1)) * _ROW,
            barrier=self.barriers + stage * 8,
            rows_per_copy=self.rows_per_copy,
        )

    # ---- queries: scaled to float16's range, in the order in which the MMAs read them

    def load_queries(self) -> list[list[list[Reg]]]:
        """This warp's columns (warp, warp + num_warps, ...), 8 dims per 16 bytes and lane."""
        tiling = self.tiling
        loaded = []
        for i in range(-(-tiling.head_tile // tiling.num_warps)):
            column = hw.minimum(
                self.first_column + self.warp + i * tiling.num_warps, self.num_columns - 1
            )
            row = self.query_address(column)
            address = hw.element_address(row, self.lane, 16)
            # 72 pieces: two per lane, and lanes 0-7 a third; the others repeat one harmlessly.
            last = hw.element_address(row, self.lane & 7, 16)
            loaded.append(
                [
                    hw.load_global(address, words=4),
                    hw.load_global(address, 512, words=4),
                    hw.load_global(last, 1024, words=4),
                ]
            )
        return loaded

    def store_queries(self, loaded: list[list[list[Reg]]]) -> None:
        """Scales each column by a power of two so that its largest value is 2**14 to 2**15.

        float16 then holds every value to 2**-40 of the column's largest; the scores take the power
        back, together with `sm_scale` and log2(e).
        """
        tiling = self.tiling
        for i, pieces in enumerate(loaded):
            column = self.warp + i * tiling.num_warps  # within the tile
            exists = self.first_column + column < self.num_columns
            power, undo = query_scales(pieces)
            power = hw.select(exists, power, hw.f32(0.0))
            block = self.smem + self.at.queries + (column // HEAD_BLOCK) * _QUERY_BYTES
            column_offset = (column % HEAD_BLOCK) * 64
            for part, piece in enumerate(pieces):
                is_rope = part == 2
                pack = hw.bf16x2 if is_rope else hw.f16x2
                words = []
                for word in piece:
                    low, high = hw.bf16x2_to_f32(word)
                    words.append(pack(low * power, high * power))
                # Piece j holds dims 8 j .. 8 j + 7.
                if is_rope:
                    j = self.lane & 7
                    unit, piece_lane = (j & 1) + (_QUERY_UNITS - 2), j >> 1
                else:
                    j = self.lane + 32 * part
                    unit, piece_lane = (j >> 4) * 4 + (j & 3), (j >> 2) & 3
                address = block + unit * 512 + column_offset + piece_lane * 16
                hw.store_shared(address, words)
            with hw.when(self.lane.eq(0)):
                scale = undo * (self.sm_scale * hw.LOG2_E)
                hw.store_shared(self.smem + self.at.query_scales + column * 4, [scale])

    # ---- scores: S^T = K Q^T for the warp's own tile and all columns

    def scores(self, stage: Reg, mask: Reg, t: Reg) -> tuple[list[list[Reg]], Reg]:
        """Scores [block][4] in log2 units, -inf for masked tokens; the tile's scale bits.

        Per 128-dim group an MMA chain on unscaled e4m3 values, then one fma with the token's scale
        of that group. A lane's four dims of a k-step are consecutive in memory: the order of k does
        not matter to the product as long as K and Q agree.
        """
        blocks = range(self.tiling.head_blocks)
        zero = hw.f32(0.0)
        tile = self.rows + stage * _TILE_BYTES
        row = tile + self.g * _ROW
        keys = row + self.c * 32
        queries = self.smem + self.at.queries + self.lane * 16

        scales = [hw.load_shared_f32(row, r * 8 * _ROW + _SCALES_OFFSET) for r in range(2)]

        total = [[zero] * 4 for _ in blocks]
        for half in range(2):
            rows = [hw.load_shared(keys, r * 8 * _ROW + _ROPE_OFFSET + 16 * half) for r in range(2)]
            unit = _QUERY_UNITS - 2 + half
            q = [hw.load_shared(queries, n * _QUERY_BYTES + unit * 512) for n in blocks]
            for s in range(2):
                a = [rows[0][2 * s], rows[1][2 * s], rows[0][2 * s + 1], rows[1][2 * s + 1]]
                for n in blocks:
                    total[n] = hw.mma_m16n8k16(total[n], a, q[n][2 * s : 2 * s + 2], "bf16")

        for j in range(_NUM_TILES):
            acc = [[zero] * 4 for _ in blocks]
            for half in range(2):
                rows = [hw.load_shared(keys, r * 8 * _ROW + 128 * j + 16 * half) for r in range(2)]
                for pair in range(2):
                    unit = 4 * j + 2 * half + pair
                    q = [hw.load_shared(queries, n * _QUERY_BYTES + unit * 512) for n in blocks]
                    for s in range(2):
                        a0, a2 = hw.e4m3x4_to_f16x2(rows[0][2 * pair + s])
                        a1, a3 = hw.e4m3x4_to_f16x2(rows[1][2 * pair + s])
                        for n in blocks:
                            b = q[n][2 * s : 2 * s + 2]
                            acc[n] = hw.mma_m16n8k16(acc[n], [a0, a1, a2, a3], b, "f16")
            for n in blocks:
                total[n] = [hw.fma(scales[i // 2][j], acc[n][i], total[n][i]) for i in range(4)]

        query_scales = self.smem + self.at.query_scales + self.c * 8
        result = []
        for n in blocks:
            factor = hw.load_shared_f32(query_scales, n * 32, words=2)
            result.append([total[n][i] * factor[i % 2] for i in range(4)])
        result = self.visible(result, mask, t)

        # Positive floats order like their bits; masked rows are zeros.
        largest = functools.reduce(
            hw.maximum_u32, [hw.as_u32(s) for row_scales in scales for s in row_scales]
        )
        return result, hw.reduce_max_u32(largest) & 0x7F800000

    # ---- softmax: running maximum and scale, rescaling, weights

    def softmax(
        self, state: _State, scores: list[list[Reg]], scale: Reg
    ) -> tuple[_State, list[list[Reg]]]:
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

        outgrown = scale > state.scale
        for n in blocks:
            for h in range(2):
                outgrown = outgrown | (tile_max[n][h] - state.maxima[n][h] > _MAX_LAG)

        def rescaled() -> _State:
            maxima = [
                [hw.maximum(state.maxima[n][h], tile_max[n][h]) for h in range(2)] for n in blocks
            ]
            decay = [[hw.exp2(state.maxima[n][h] - maxima[n][h]) for h in range(2)] for n in blocks]
            new_scale = hw.maximum_u32(state.scale, scale)
            # old scale / new scale, a power of two; 0 where that leaves float32's range.
            difference = new_scale - state.scale
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

    def exchange_maxima(self, tile_max: list[list[Reg]], scale: Reg) -> tuple[list[list[Reg]], Reg]:
        """Maxima over the tiles of all warps of the team."""
        blocks = range(self.tiling.head_blocks)
        stride = _maxima_bytes(self.tiling)
        maxima = self.smem + self.at.maxima
        mine = maxima + self.warp * stride
        with hw.when(self.g.eq(0)):
            for n in blocks:
                hw.store_shared(mine + self.c * 8, tile_max[n], n * 32)
        with hw.when(self.lane.eq(0)):
            hw.store_shared(mine, [scale], 4 * self.tiling.head_tile)
        self.team_sync()
        team = maxima + self.team * (self.tiling.team_size * stride)
        for member in range(self.tiling.team_size):
            offset = member * stride
            for n in blocks:
                theirs = hw.load_shared_f32(team + self.c * 8, offset + n * 32, words=2)
                tile_max[n] = [hw.maximum(a, b) for a, b in zip(tile_max[n], theirs, strict=True)]
            (other,) = hw.load_shared(team, offset + 4 * self.tiling.head_tile, words=1)
            scale = hw.maximum_u32(scale, other)
        return tile_max, scale

    def team_sync(self) -> None:
        """All warps of the team arrived, and see each other's shared memory."""
        hw.named_barrier(self.team + _TEAM_BARRIER, hw.WARP * self.tiling.team_size)

    # ---- values: O^T += V^T P for this warp's dims and the tiles of its team

    def values(self, state: _State, weights: list[list[Reg]], stage: Reg, parity: Reg) -> _State:
        """Adds the team's tiles; P goes to float16 once, and meets each 128 dims' scales there."""
        blocks = range(self.tiling.head_blocks)
        team_size, num_stages = self.tiling.team_size, self.tiling.num_stages
        # C fragment [token, column] of S^T -> B fragment of the same: the pairs run along tokens.
        power = 2.0**_HEADROOM
        fragments = [
            [
                hw.transpose_matrix(
                    hw.f16x2(weights[n][2 * r] * power, weights[n][2 * r + 1] * power)
                )
                for r in range(2)
            ]
            for n in blocks
        ]
        fragment_bytes = self.tiling.head_blocks * 256
        exchange = self.smem + self.at.weights + self.lane * 8
        if team_size > 1:
            for n in blocks:
                hw.store_shared(exchange + self.warp * fragment_bytes, fragments[n], n * 256)
            self.team_sync()

        inverse_scale = hw.as_f32(((2 * 127 + _HEADROOM) << 23) - state.scale)
        groups = _NUM_TILES // team_size  # 128-dim groups of this warp
        acc = [list(fragment) for fragment in state.acc]
        for member in range(team_size):
            tile_offset = member * num_stages * _TILE_BYTES
            if team_size > 1:
                barrier = self.team_barriers + stage * 8 + member * num_stages * 8
                hw.mbarrier_wait(barrier, parity)
                team_exchange = exchange + self.team * (team_size * fragment_bytes)
                fragments = [
                    hw.load_shared(team_exchange, member * fragment_bytes + n * 256, words=2)
                    for n in blocks
                ]
            tile = self.team_rows + stage * _TILE_BYTES
            scale_rows = tile + self.c * (2 * _ROW) + self.member * (4 * groups)
            scales = [
                hw.load_shared_f32(
                    scale_rows, tile_offset + token * _ROW + _SCALES_OFFSET, words=groups
                )
                for token in (0, 1, 8, 9)
            ]
            # Lane -> address of a row of one of the four 8 x 8 matrices of [16 tokens, 32 bytes].
            matrix_rows = (
                tile
                + (self.lane & 15) * _ROW
                + (self.lane >> 4) * 16
                + self.member * (layout.KV_LORA_RANK // team_size)
            )
            for group in range(groups):
                low, high = (
                    hw.f16x2(
                        scales[2 * r][group] * inverse_scale,
                        scales[2 * r + 1][group] * inverse_scale,
                    )
                    for r in range(2)
                )
                scaled = [
                    [hw.multiply_f16x2(b[0], low), hw.multiply_f16x2(b[1], high)] for b in fragments
                ]
                for quarter in range(4):
                    # Bytes of a loaded register: token t dims d, d+1; token t+1 dims d, d+1. The
                    # permutation brings the tokens of one dim side by side.
                    bytes_ = hw.load_matrices_transposed(
                        matrix_rows, tile_offset + 128 * group + 32 * quarter
                    )
                    for k in range(2):
                        a0, a1 = hw.e4m3x4_to_f16x2(hw.permute_bytes(bytes_[2 * k], 0x3120))
                        a2, a3 = hw.e4m3x4_to_f16x2(hw.permute_bytes(bytes_[2 * k + 1], 0x3120))
                        block = 8 * group + 2 * quarter + k
                        acc[block] = [
                            hw.mma_m16n8k16(acc[block][n], [a0, a1, a2, a3], scaled[n], "f16")
                            for n in blocks
                        ]
        return state._replace(acc=acc)

    # ---- merge: the CTA's warps into one output

    def merge(self, state: _State) -> None:
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

        undo_headroom = hw.as_f32(state.scale) * 2.0 ** (-2 * _HEADROOM)
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
                factors[n].append(own * inverse * undo_headroom)

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
            # Rows g and g + 8 of the fragment are dims 2 g and 2 g + 1 of the block.
            dim = block * DIM_BLOCK + self.g * 2
            for h in range(2):
                column = self.first_column + n * HEAD_BLOCK + self.c * 2 + h
                pair = [total[h], total[2 + h]]
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
        state = _State(
            acc=[
                [[zero] * 4 for _ in range(blocks)] for _ in range(_DIM_BLOCKS // tiling.team_size)
            ],
            maxima=[[hw.f32(_NO_MAXIMUM)] * 2 for _ in range(blocks)],
            sums=[[zero] * 2 for _ in range(blocks)],
            scale=hw.u32(_SMALLEST_SCALE_EXPONENT << 23),
            masks=masks,
        )

        def one_round(t: Reg, state: _State) -> _State:
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
