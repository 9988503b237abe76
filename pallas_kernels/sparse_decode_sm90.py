"""Top-k sparse MLA over the `fp8_ds_mla` cache on Hopper, natively for few heads per device.

For one query token, all its heads, and the cache rows that `topk_indices` names:

    s = sm_scale * q . [kv_c, k_pe]      out = softmax(s) @ kv_c      lse = log(sum(exp(s)))

A CTA takes (token, head group of 8 to 32 heads, split of the keys); with more than one split,
`combine_sm90` merges. Tokens are the M of every MMA and heads the N ("swap-AB"), so 8 heads cost 8
columns, and nothing is padded to 64.

Roles
-----
There are none: each warp alone takes 16 rows at a time from raw bytes to its own online softmax.

    warp w ── gather ──▶ raw rows ── scores ──▶ S^T ── softmax ──▶ P ── values ──▶ O^T ─┐
      ▲    cp.async.bulk   SMEM     mma.sync    regs               regs   mma.sync  regs  ├─▶ merge
      └────────── next tile, as soon as this one is read ◀───────────────────────────┘   all warps

The only CTA-wide barriers are before the loop (queries are in place) and in the merge. From 16
heads on, one warp's registers do not hold 512 output dims of all heads: 2 or 4 warps form a team.
Each computes S for its own tile and all heads, then the values of all the team's tiles for its
share of the dims; maxima and P pass through shared memory (three named barriers a round). Repeating
the dequantization in every warp instead measured 82 us against 72 (16 heads, 128 tokens).

    heads in a CTA   team   dims of a warp   output accumulators a thread
          8            1         512          32 dim blocks x 1 head block  x 4 = 128
         16            2         256          16            x 2             x 4 = 128
         24            4         128           8            x 3             x 4 =  96
         32            4         128           8            x 4             x 4 = 128

Fragments (`hopper` has the MMA's own picture; lane = 4 g + c)
---------
    S^T [16 tokens, 8 heads]   tokens g, g + 8;  heads 2c, 2c + 1
    K   as A operand           16 consecutive bytes of rows g, g + 8: a k-step's dims are whatever
                               four bytes lie there, and Q is stored to match
    P   as B operand           S^T's fragment through `movmatrix`: tokens 2c, 2c + 1, +8; head g
    V^T as A operand           `ldmatrix.trans` on byte pairs, then a byte permutation: dims 2g and
                               2g + 1 of a 16-dim block; tokens 2c, 2c + 1, +8
    O^T [16 dims, 8 heads]     dims 2g, 2g + 1;  heads 2c, 2c + 1

Numbers
-------
- e4m3 -> float16 is exact, one instruction for two values. RoPE stays bfloat16, as an MMA of its
  own into the same accumulator.
- Scales never meet the 8-bit data. Scores: one accumulator per 128 dims, combined in float32 with
  the token's scales. Values: P times the token's scale of the 128 dims, as float16 pairs.
- float16's range: each query head is scaled by a power of two to 2**14 .. 2**15, undone in the
  scores; token scales are taken relative to a running power of two (their largest so far), undone
  at the end. When it or the running maximum (by more than 2**4) is outgrown, the accumulators are
  rescaled; usually they are not. What this cannot hold: a token's values lose bits where another
  token of the list, weighty or not, has a scale more than 2**24 times as large.
- A masked token's row is never read from the cache: it is zeros in shared memory, its score -inf.
- No atomics, one fixed order of everything: bitwise deterministic.

Budgets
-------
255 registers a thread (8, 16 and 24 heads without spills; 32 heads spill 148 bytes): 96 to 128
accumulators, 4 per head block for maxima and sums, 8 to 32 for scores in flight, the rest addresses
and operands. Shared memory in bytes, with 8 warps and two tiles in flight per warp:

    heads                            8         16         24         32
    raw rows 8 x 2 x 16 x 656   167,936    167,936    167,936    167,936
    queries 9,216 per block       9,216     18,432     27,648     36,864
    query scales                     32         64         96        128
    P, 256 per warp and block         -      4,096      6,144      8,192
    maxima and scales                 -        640        896      1,152
    max and sum per warp            512      1,024      1,536      2,048
    mbarriers                       128        128        128        128
    sum                         177,824    192,320    204,384    216,448

A row stride of 656 bytes is 164 words, 4 modulo 32: 16-byte reads of 8 rows meet no bank conflict.

Roofline (H100)
--------
Memory binds up to 24 heads. A kernel that only gathers random 656-byte rows reaches 2.40 TB/s, 0.27
ns a row for the whole GPU: 68 to 72 us for 128 tokens x 2,048 keys, where this kernel takes 68. Its
compute is 2.4 us per 128 rows and SM (8 heads, rows in L2) against about 4.3 us for memory; at 32
heads it is 5.2 us and binds. At 1 to 8 tokens latency binds: start 1.2 us, a round 1.7 us, merge
1.1 us, the second kernel 1.5 to 2 us.

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
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper as hw
from pallas_kernels import layout
from pallas_kernels.combine_sm90 import merge_partials_sm90
from pallas_kernels.hopper import Reg

TOKEN_TILE = 16
"""Cache rows that a warp works on at a time: the M of its MMAs."""

HEAD_BLOCK = 8
"""Query heads per MMA: its N."""

DIM_BLOCK = 16
"""Value dims per MMA of the values stage: its M there."""

CTA_HEAD_TILES = (8, 16, 24, 32)
"""Query heads that a CTA can take."""

MAX_SPLITS = 64
"""CTAs that can share the keys of one token."""

_ROW = layout.FP8_ROW_BYTES
_NUM_TILES = layout.num_scale_tiles(layout.KV_LORA_RANK)
_SCALES_OFFSET = layout.KV_LORA_RANK
_ROPE_OFFSET = layout.KV_LORA_RANK + 4 * _NUM_TILES
_TILE_BYTES = TOKEN_TILE * _ROW
_DIM_BLOCKS = layout.KV_LORA_RANK // DIM_BLOCK

# Queries of 8 heads in MMA order: 32 fragments for the latent and 4 for RoPE, two to a 512-byte
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
_LARGEST_QUERY_EXPONENT = 14

# Named barriers of the teams; the hardware has 16, Mosaic GPU uses 0 to 4.
_TEAM_BARRIER = 8


# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class SparseAttentionConfig:
    """How `sparse_attention_sm90` divides its work.

    Attributes:
      head_tile: query heads per CTA, 8, 16, 24 or 32. More heads take several CTAs (head groups),
        each of which reads the rows again.
      num_splits: CTAs that share the keys of one token; above 1 a second kernel merges them.
      num_warpgroups: 1 or 2 (4 or 8 warps per CTA).
      num_stages: 16-token tiles that a warp keeps in flight, 1 to 4.
    """

    head_tile: int
    num_splits: int = 1
    num_warpgroups: int = 2
    num_stages: int = 2

    def __post_init__(self) -> None:
        if self.head_tile not in CTA_HEAD_TILES:
            raise ValueError(f"head_tile={self.head_tile} must be one of {CTA_HEAD_TILES}")
        if not 1 <= self.num_splits <= MAX_SPLITS:
            raise ValueError(
                f"num_splits={self.num_splits} must be 1 to {MAX_SPLITS}: the merge holds one value"
                " of each split in registers"
            )
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
    def num_threads(self) -> int:
        return hw.WARP * self.num_warps

    @property
    def head_blocks(self) -> int:
        """MMA column blocks of 8 heads."""
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
        """Keys that one CTA takes per iteration of its main loop."""
        return TOKEN_TILE * self.num_warps

    @property
    def smem_bytes(self) -> int:
        """Shared memory of one CTA."""
        return _shared_layout(self).end

    @property
    def ctas_per_sm(self) -> int:
        """CTAs that fit on an SM: 255 registers a thread allow two of one warpgroup."""
        fits = hw.SM_SMEM_BYTES // (self.smem_bytes + hw.SMEM_BYTES_PER_CTA)
        return min(fits, 2 // self.num_warpgroups)


class _SharedLayout(NamedTuple):
    """Byte offsets in shared memory."""

    rows: int  # raw cache rows [warp, stage, token, 656]; the merge reuses them for outputs
    queries: int  # [head block, unit, lane, 16]
    query_scales: int  # f32 [head]
    weights: int  # f16 P fragments [warp, head block, lane, 8], for teams
    maxima: int  # f32 [warp, head] and the tile's scale, for teams
    stats: int  # f32 (max, sum) [warp, head]
    barriers: int  # mbarrier [warp, stage]
    end: int


def _shared_layout(config: SparseAttentionConfig) -> _SharedLayout:
    rows = config.num_warps * config.num_stages * _TILE_BYTES
    outputs = config.num_teams * config.head_tile * layout.KV_LORA_RANK * 4
    exchanges = config.team_size > 1
    sizes = (
        max(rows, outputs),
        config.head_blocks * _QUERY_BYTES,
        config.head_tile * 4,
        exchanges * config.num_warps * config.head_blocks * 256,
        exchanges * config.num_warps * _maxima_bytes(config),
        config.num_warps * config.head_tile * 8,
        config.num_warps * config.num_stages * 8,
    )
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // 16) * 16)
    return _SharedLayout(*offsets)


def _maxima_bytes(config: SparseAttentionConfig) -> int:
    return config.head_tile * 4 + 16


def default_config(tokens: int, num_heads: int, topk: int) -> SparseAttentionConfig:
    """What measured, or is estimated to be, fastest for these shapes on an H100."""
    groups = -(-num_heads // CTA_HEAD_TILES[-1])
    head_tile = -(-num_heads // groups // HEAD_BLOCK) * HEAD_BLOCK
    if tokens * groups >= 4 * hw.NUM_SMS:
        # Many waves: no splits, whose partial results would only take memory. Two small CTAs on an
        # SM hide each other's start and end (2,048 tokens, 8 heads: 593 us against 658).
        small = SparseAttentionConfig(head_tile, num_warpgroups=1)
        return small if small.ctas_per_sm > 1 else SparseAttentionConfig(head_tile)
    candidates = [
        config
        for num_warpgroups in (2, 1)
        for num_splits in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
        if (config := SparseAttentionConfig(head_tile, num_splits, num_warpgroups))
        and (num_splits - 1) * config.tokens_per_round < topk
    ]
    return min(candidates, key=lambda config: estimated_us(config, tokens, num_heads, topk))


def estimated_us(config: SparseAttentionConfig, tokens: int, num_heads: int, topk: int) -> float:
    """Time on an H100 by a model fitted to 50 measured configurations, mostly within 10%.

    A CTA takes a fixed time, plus two that overlap, but not fully (hence the 4-norm): the latency
    of its rounds of tiles, and the time of all keys of its wave at the bandwidth of the gather.
    Waves overlap as well: the result lies halfway between lockstep and a perfect overlap.
    """
    ctas = tokens * -(-num_heads // config.head_tile) * config.num_splits
    resident = hw.NUM_SMS * config.ctas_per_sm
    full_waves, rest = divmod(ctas, resident)
    rounds = -(-topk // (config.num_splits * config.tokens_per_round))
    blocks = config.head_blocks
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


class _State(NamedTuple):
    """What a warp carries from tile to tile, in registers."""

    acc: list[list[list[Reg]]]  # f32 O^T fragments [dim block][head block][4]
    maxima: list[list[Reg]]  # f32 running maximum [head block][2], log2 units
    sums: list[list[Reg]]  # f32 running sum of this lane's tokens [head block][2]
    scale: Reg  # bits of the running token scale, a power of two
    masks: list[Reg]  # valid tokens of the tiles in flight, one bit each


class _Problem(NamedTuple):
    """Static facts of one call."""

    num_heads: int
    topk: int
    num_slots: int  # of the cache
    sm_scale: float
    has_lens: bool
    has_sink: bool


class _Cta:
    """The code of one CTA: (token, head group, split) = `program`."""

    def __init__(
        self, config: SparseAttentionConfig, problem: _Problem, refs: dict[str, Any], program: Reg
    ) -> None:
        self.config, self.problem = config, problem
        self.kv_cache, self.q, self.indices, self.out, self.lse = (
            hw.global_address(refs[name]) for name in ("kv_cache", "q", "indices", "out", "lse")
        )
        self.lens = hw.global_address(refs["lens"]) if problem.has_lens else None
        self.sink = hw.global_address(refs["sink"]) if problem.has_sink else None
        self.smem = hw.shared_address(refs["smem"])
        self.at = _shared_layout(config)

        self.thread = hw.thread_index()
        self.lane = self.thread & 31
        self.warp = hw.warp_index()
        self.g, self.c = self.lane >> 2, self.lane & 3
        self.team = self.warp // config.team_size
        self.member = self.warp % config.team_size

        groups = -(-problem.num_heads // config.head_tile)
        self.group = program % groups
        self.split = program // groups % config.num_splits
        self.token = program // (groups * config.num_splits)
        self.first_head = self.group * config.head_tile

        warp_bytes = config.num_stages * _TILE_BYTES
        self.rows = self.smem + self.warp * warp_bytes
        self.team_rows = self.smem + self.team * (config.team_size * warp_bytes)
        barriers = self.smem + self.at.barriers
        self.barriers = barriers + self.warp * (config.num_stages * 8)
        self.team_barriers = barriers + self.team * (config.team_size * config.num_stages * 8)

        self.length = hw.u32(problem.topk)
        if self.lens is not None:
            (length,) = hw.load_global(hw.element_address(self.lens, self.token, 4))
            negative = (length >> 31).ne(0)
            self.length = hw.select(negative, hw.u32(0), hw.minimum(length, problem.topk))
        # Tiles go round the warps of all splits, so that a short list is shared evenly.
        round_tokens = config.num_splits * config.tokens_per_round
        self.num_rounds = (
            self.length + (round_tokens - 1) - self.split * config.tokens_per_round
        ) // round_tokens

    # ---- gather: the cache rows of one tile into one stage of shared memory

    def load_slot(self, t: Reg | int) -> Reg:
        """This lane's cache slot of the warp's t-th tile, lanes 16-31 as 0-15; -1 for none."""
        config = self.config
        t = hw.u32(t) if isinstance(t, int) else t
        tile = (t * config.num_splits + self.split) * config.num_warps + self.warp
        position = tile * TOKEN_TILE + (self.lane & (TOKEN_TILE - 1))
        row = hw.element_address(self.indices, self.token, 4 * self.problem.topk)
        address = hw.element_address(row, hw.minimum(position, self.problem.topk - 1), 4)
        (slot,) = hw.load_global(address)
        return hw.select(position < self.length, slot, hw.u32(-1))

    def gather(self, slot: Reg, stage: Reg, valid: Reg, mask: Reg) -> None:
        """Starts copying the tile's valid rows; rows of the others become zeros.

        Zeros, so that what a masked token's weight of 0 multiplies is never a NaN.
        """
        barrier = self.barriers + stage * 8
        destination = self.rows + stage * _TILE_BYTES + (self.lane & (TOKEN_TILE - 1)) * _ROW
        owner = self.lane < TOKEN_TILE
        with hw.when(mask.ne(0xFFFFFFFF)):
            with hw.when(owner & valid.eq(0)):
                zeros = [hw.u32(0)] * 4
                for offset in range(0, _ROW, 16):
                    hw.store_shared(destination, zeros, offset)
                hw.fence_async_proxy()
            hw.warp_sync()
        with hw.when(self.lane.eq(0)):
            num_rows = hw.population_count(mask & 0xFFFF)
            hw.mbarrier_arrive_expect(barrier, num_rows * _ROW)
        with hw.when(owner & valid.ne(0)):
            source = hw.element_address(self.kv_cache, slot, _ROW)
            hw.copy_row_to_shared(destination, source, _ROW, barrier)

    def validity(self, slot: Reg) -> tuple[Reg, Reg]:
        """Whether this lane's slot lies in the cache (0 or 1), and the warp's mask of it.

        One unsigned comparison refuses -1, other negative numbers and slots beyond the end.
        """
        inside = slot < min(self.problem.num_slots, 2**31)
        return hw.select(inside, hw.u32(1), hw.u32(0)), hw.ballot(inside)

    # ---- queries: scaled to float16's range, in the order in which the MMAs read them

    def load_queries(self) -> list[list[list[Reg]]]:
        """This warp's heads (warp, warp + num_warps, ...), 8 dims per 16 bytes and lane."""
        config = self.config
        loaded = []
        for i in range(-(-config.head_tile // config.num_warps)):
            head = hw.minimum(
                self.first_head + self.warp + i * config.num_warps, self.problem.num_heads - 1
            )
            row = hw.element_address(
                self.q, self.token * self.problem.num_heads + head, 2 * layout.LATENT_DIM
            )
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
        """Scales each head by a power of two so that its largest value is 2**14 to 2**15.

        float16 then holds every value to 2**-40 of the head's largest; the scores take the power
        back, together with `sm_scale` and log2(e).
        """
        config = self.config
        for i, pieces in enumerate(loaded):
            head = self.warp + i * config.num_warps  # within the tile
            exists = self.first_head + head < self.problem.num_heads
            largest = hw.u32(0)
            for piece in pieces:
                for word in piece:
                    largest = hw.maximum_u16x2(largest, word & 0x7FFF7FFF)
            largest = hw.reduce_max_u32(hw.maximum_u32(largest & 0xFFFF, largest >> 16))
            exponent = hw.maximum_u32(largest >> 7, _LARGEST_QUERY_EXPONENT + 1)
            power = hw.as_f32((2 * 127 + _LARGEST_QUERY_EXPONENT - exponent) << 23)
            undo = hw.as_f32((exponent - _LARGEST_QUERY_EXPONENT) << 23)
            power = hw.select(exists, power, hw.f32(0.0))
            block = self.smem + self.at.queries + (head // HEAD_BLOCK) * _QUERY_BYTES
            head_offset = (head % HEAD_BLOCK) * 64
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
                    unit, column = (j & 1) + (_QUERY_UNITS - 2), j >> 1
                else:
                    j = self.lane + 32 * part
                    unit, column = (j >> 4) * 4 + (j & 3), (j >> 2) & 3
                address = block + unit * 512 + head_offset + column * 16
                hw.store_shared(address, words)
            with hw.when(self.lane.eq(0)):
                scale = undo * (self.problem.sm_scale * hw.LOG2_E)
                hw.store_shared(self.smem + self.at.query_scales + head * 4, [scale])

    # ---- scores: S^T = K Q^T for the warp's own tile and all heads

    def scores(self, stage: Reg, mask: Reg) -> tuple[list[list[Reg]], Reg]:
        """Scores [head block][4] in log2 units, -inf for masked tokens; the tile's scale bits.

        Per 128-dim group an MMA chain on unscaled e4m3 values, then one fma with the token's scale
        of that group. A lane's four dims of a k-step are consecutive in memory: the order of k does
        not matter to the product as long as K and Q agree.
        """
        blocks = range(self.config.head_blocks)
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
        valid = [(mask >> (self.g + 8 * r) & 1).ne(0) for r in range(2)]
        result = []
        for n in blocks:
            factor = hw.load_shared_f32(query_scales, n * 32, words=2)
            result.append(
                [
                    hw.select(valid[i // 2], total[n][i] * factor[i % 2], hw.f32(-math.inf))
                    for i in range(4)
                ]
            )

        # Positive floats order like their bits; masked rows are zeros.
        largest = functools.reduce(
            hw.maximum_u32, [hw.as_u32(s) for row_scales in scales for s in row_scales]
        )
        return result, hw.reduce_max_u32(largest) & 0x7F800000

    # ---- softmax: running maximum and scale, rescaling, weights

    def softmax(
        self, state: _State, scores: list[list[Reg]], scale: Reg
    ) -> tuple[_State, list[list[Reg]]]:
        """Brings the state to this tile's maximum and scale; returns weights P [head block][4]."""
        blocks = range(self.config.head_blocks)
        tile_max = []
        for n in blocks:
            tile_max.append([])
            for h in range(2):
                x = hw.maximum(scores[n][h], scores[n][2 + h])
                for distance in (4, 8, 16):
                    x = hw.maximum(x, hw.shuffle_xor(x, distance))
                tile_max[n].append(x)
        if self.config.team_size > 1:
            tile_max, scale = self.exchange_maxima(tile_max, scale)

        outgrown = scale > state.scale
        for n in blocks:
            for h in range(2):
                outgrown = outgrown | (tile_max[n][h] > state.maxima[n][h] + _MAX_LAG)

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
        blocks = range(self.config.head_blocks)
        stride = _maxima_bytes(self.config)
        maxima = self.smem + self.at.maxima
        mine = maxima + self.warp * stride
        with hw.when(self.g.eq(0)):
            for n in blocks:
                hw.store_shared(mine + self.c * 8, tile_max[n], n * 32)
        with hw.when(self.lane.eq(0)):
            hw.store_shared(mine, [scale], 4 * self.config.head_tile)
        self.team_sync()
        team = maxima + self.team * (self.config.team_size * stride)
        for member in range(self.config.team_size):
            offset = member * stride
            for n in blocks:
                theirs = hw.load_shared_f32(team + self.c * 8, offset + n * 32, words=2)
                tile_max[n] = [hw.maximum(a, b) for a, b in zip(tile_max[n], theirs, strict=True)]
            (other,) = hw.load_shared(team, offset + 4 * self.config.head_tile, words=1)
            scale = hw.maximum_u32(scale, other)
        return tile_max, scale

    def team_sync(self) -> None:
        """All warps of the team arrived, and see each other's shared memory."""
        hw.named_barrier(self.team + _TEAM_BARRIER, hw.WARP * self.config.team_size)

    # ---- values: O^T += V^T P for this warp's dims and the tiles of its team

    def values(self, state: _State, weights: list[list[Reg]], stage: Reg, parity: Reg) -> _State:
        """Adds the team's tiles; P goes to float16 once, and meets each 128 dims' scales there."""
        blocks = range(self.config.head_blocks)
        team_size, num_stages = self.config.team_size, self.config.num_stages
        # C fragment [token, head] of S^T -> B fragment [token, head]: the pairs run along tokens.
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
        fragment_bytes = self.config.head_blocks * 256
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
        config, problem = self.config, self.problem
        blocks = range(config.head_blocks)
        final = config.num_splits == 1
        stats = self.smem + self.at.stats + self.c * 16
        stats_bytes = config.head_tile * 8
        sums = state.sums
        for distance in (4, 8, 16):
            sums = [[x + hw.shuffle_xor(x, distance) for x in pair] for pair in sums]
        with hw.when(self.g.eq(0)):
            for n in blocks:
                (m0, m1), (l0, l1) = state.maxima[n], sums[n]
                hw.store_shared(stats + self.warp * stats_bytes, [m0, l0, m1, l1], n * 64)
        hw.cta_sync()

        undo_headroom = hw.as_f32(state.scale) * 2.0 ** (-2 * _HEADROOM)
        row = (self.token * config.num_splits + self.split) * problem.num_heads
        factors = []
        for n in blocks:
            warps = [
                hw.load_shared_f32(stats, w * stats_bytes + n * 64) for w in range(config.num_warps)
            ]
            factors.append([])
            for h in range(2):
                maximum = functools.reduce(hw.maximum, [w[2 * h] for w in warps])
                denominator = hw.f32(0.0)
                for w in warps:
                    weight = hw.exp2(w[2 * h] - maximum)
                    denominator = hw.fma(w[2 * h + 1], weight, denominator)
                head = self.first_head + self.c * 2 + (8 * n + h)
                with hw.when(self.warp.eq(0) & self.g.eq(0) & (head < problem.num_heads)):
                    lse = (maximum + hw.log2(denominator)) * hw.LN_2
                    hw.store_global(hw.element_address(self.lse, row + head, 4), [lse])
                normalizer = denominator
                if self.sink is not None and final:
                    # out * sigmoid(lse - sink): the sink is one more term of the denominator.
                    address = hw.element_address(
                        self.sink, hw.minimum(head, problem.num_heads - 1), 4
                    )
                    (sink,) = hw.load_global(address)
                    normalizer = denominator + hw.exp2(hw.as_f32(sink) * hw.LOG2_E - maximum)
                inverse = hw.select(denominator > 0.0, hw.reciprocal(normalizer), hw.f32(0.0))
                own = hw.exp2(state.maxima[n][h] - maximum)
                factors[n].append(own * inverse * undo_headroom)

        # Output fragments [team, dim block, head block, lane, 16 bytes], over the raw rows: every
        # copy has landed and been read before the barrier above.
        team_bytes = config.head_tile * layout.KV_LORA_RANK * 4
        my_blocks = _DIM_BLOCKS // config.team_size
        mine = (
            self.smem
            + self.team * team_bytes
            + self.member * (my_blocks * config.head_blocks * 512)
            + self.lane * 16
        )
        for i, fragment in enumerate(state.acc):
            for n in blocks:
                scaled = [x * factors[n][k % 2] for k, x in enumerate(fragment[n])]
                hw.store_shared(mine, scaled, (i * config.head_blocks + n) * 512)
        hw.cta_sync()

        num_fragments = _DIM_BLOCKS * config.head_blocks
        for i in range(num_fragments // config.num_warps):
            fragment = self.warp + i * config.num_warps
            address = self.smem + fragment * 512 + self.lane * 16
            total = hw.load_shared_f32(address)
            for team in range(1, config.num_teams):
                other = hw.load_shared_f32(address, team * team_bytes)
                total = [a + b for a, b in zip(total, other, strict=True)]
            n, block = fragment % config.head_blocks, fragment // config.head_blocks
            # Rows g and g + 8 of the fragment are dims 2 g and 2 g + 1 of the block.
            dim = block * DIM_BLOCK + self.g * 2
            for h in range(2):
                head = self.first_head + n * HEAD_BLOCK + self.c * 2 + h
                pair = [total[h], total[2 + h]]
                itemsize = 2 if final else 4
                address = hw.element_address(
                    self.out, row + head, layout.KV_LORA_RANK * itemsize
                ) + hw.u64(dim * itemsize)
                values = [hw.bf16x2(*pair)] if final else pair
                if problem.num_heads % config.head_tile:
                    with hw.when(head < problem.num_heads):
                        hw.store_global(address, values)
                else:
                    hw.store_global(address, values)

    # ---- the whole

    def run(self) -> None:
        """Gathers ahead, loops over the rounds of tiles, merges."""
        config = self.config
        # Indices first, then queries: both are on their way while the barriers are set up, and the
        # first rows are while the queries are converted.
        slots = [self.load_slot(t) for t in range(config.num_stages)]
        queries = self.load_queries()
        with hw.when(self.lane.eq(0)):
            for stage in range(config.num_stages):
                hw.mbarrier_init(self.barriers + 8 * stage, 1)
            hw.fence_async_proxy()
        hw.warp_sync()
        masks = []
        for t, slot in enumerate(slots):
            valid, mask = self.validity(slot)
            masks.append(mask)
            with hw.when(hw.u32(t) < self.num_rounds):
                self.gather(slot, hw.u32(t), valid, mask)
        self.store_queries(queries)
        hw.cta_sync()

        blocks, zero = config.head_blocks, hw.f32(0.0)
        state = _State(
            acc=[
                [[zero] * 4 for _ in range(blocks)] for _ in range(_DIM_BLOCKS // config.team_size)
            ],
            maxima=[[hw.f32(_NO_MAXIMUM)] * 2 for _ in range(blocks)],
            sums=[[zero] * 2 for _ in range(blocks)],
            scale=hw.u32(_SMALLEST_SCALE_EXPONENT << 23),
            masks=masks,
        )

        def one_round(t: Reg, state: _State) -> _State:
            stage, parity = t % config.num_stages, t // config.num_stages & 1
            mask, *in_flight = state.masks
            next_slot = self.load_slot(t + config.num_stages)
            hw.mbarrier_wait(self.barriers + stage * 8, parity)
            scores, scale = self.scores(stage, mask)
            state, weights = self.softmax(state, scores, scale)
            state = self.values(state, weights, stage, parity)
            # The stage is free once the whole team has read it.
            if config.team_size > 1:
                self.team_sync()
            else:
                hw.warp_sync()
            valid, next_mask = self.validity(next_slot)
            with hw.when(t + config.num_stages < self.num_rounds):
                self.gather(next_slot, stage, valid, next_mask)
            return state._replace(masks=[*in_flight, next_mask])

        self.merge(hw.for_loop(self.num_rounds, state, one_round))


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
        32 share the read of a row, more are computed in groups. Nothing needs padding.
      kv_cache: uint8 `[num_pages, page_size, 656]`, `fp8_ds_mla`, any page size, beyond 2**31
        bytes, too.
      topk_indices: int32 `[tokens, topk]`, physical slots in any order, any `topk`. -1, and any
        slot outside of the cache, names nothing; what lies in slots that are not named never
        reaches the result.
      sm_scale: the factor of the scores.
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
    names = (*operands, "out", "lse", "smem")
    problem = _Problem(num_heads, topk, num_slots, sm_scale, "lens" in operands, "sink" in operands)

    def sparse_attention_kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def cta(ctx: Any, *args: Any) -> None:
            del ctx
            *values, program = args
            _Cta(
                config,
                problem,
                dict(zip(names, values, strict=True)),
                Reg(program.registers.item()),
            ).run()

        cta(*refs, lax.axis_index("cta").astype(jnp.int32))

    rows = tokens * config.num_splits
    out, lse = plgpu.kernel(
        sparse_attention_kernel,
        out_type=[
            jax.ShapeDtypeStruct(
                (rows, num_heads, layout.KV_LORA_RANK), jnp.bfloat16 if final else jnp.float32
            ),
            jax.ShapeDtypeStruct((rows, num_heads), jnp.float32),
        ],
        scratch_types=[plgpu.SMEM((config.smem_bytes,), jnp.uint8)],
        grid=(rows * -(-num_heads // config.head_tile),),
        grid_names=("cta",),
        num_threads=config.num_warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
    )(*operands.values())
    out, lse = (hw.as_varying_as(x, operands.values()) for x in (out, lse))
    if final:
        return out, lse
    shape = (tokens, config.num_splits, num_heads)
    return merge_partials_sm90(out.reshape(*shape, -1), lse.reshape(shape), attn_sink)


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
    if kv_cache.dtype != jnp.uint8 or kv_cache.shape[2] != _ROW:
        raise NotImplementedError(
            f"{kv_cache.dtype=}, {kv_cache.shape=}: this kernel reads fp8_ds_mla caches, uint8"
            f" [pages, page_size, {_ROW}]"
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
