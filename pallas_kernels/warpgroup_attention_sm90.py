"""Attention of up to 64 query columns over cache rows, on warpgroup MMAs; shared by kernels.

What `warp_attention_sm90` is for few columns, this is for the 64 heads that a device keeps when
heads are not divided, and that q heads are padded to: one CTA takes 64 *columns* (fewer are padded
inside, never in memory) over its rows from raw bytes to the output,

    s = sm_scale * q . [kv_c, k_pe]      out = softmax(s) @ kv_c      lse = log(sum(exp(s)))

Which rows a CTA takes, where queries lie and where results go is up to the kernel that derives from
`WarpgroupAttention`.

Roles
-----
Three warpgroups. One gathers raw rows; two compute, in turns: the scores of every other tile of 64
rows are one's, and the values of every tile belong to both, 256 of the 512 dims each. While one has
the tensor cores for values, the other is busy with conversions and exponentials.

    gather ──▶ raw rows, 3 tiles ─┬─▶ warpgroup 0: scores 0  weights 0  values 0  scores 2  values 1
    cp.async.bulk        SMEM     └─▶ warpgroup 1: scores 1  values 0  weights 1  values 1  scores 3
                                            weights and token scales of a tile ──▶ SMEM ──▶ both

Between the scores and the weights of its tile, a warpgroup takes the values of the tile before:
that tile's rows are done with early, and what its weights need from the other has arrived. Weights
have a place for each stage of rows, so that nobody waits for one: it is free when the rows' is.

Queries come in one bulk copy, as they lie, once the scores of the list before are done; the
computing warps scale and permute them where they are.

Both MMAs have tokens or dims on M and columns on N ("swap-AB"): A comes from raw bytes through
registers, so no dequantized tile is ever stored. By count, shared memory is busy 2,000 cycles a
tile, where both operands in shared memory would take 2,900; the tensor cores are for 2,176.

Fragments (`hopper.wgmma_m64n64k16`; lane = 4 g + c, warp w of its warpgroup)
---------
    S^T [64 tokens, 64 columns]  tokens 16 w + g, + 8;  columns 8 n + 2 c, + 1
    K   as A operand             16 consecutive bytes of two rows: a k-step's dims are whatever four
                                 bytes lie there, and Q is stored to match
    Q^T as B operand             [column, 64 dims] per chunk, 128-byte swizzle
    P   as B operand             [column, 64 tokens], 128-byte swizzle, by `stmatrix.trans`
    V^T as A operand             `ldmatrix.trans` on byte pairs, then a byte permutation: rows g and
                                 g + 8 are dims 2 g and 2 g + 1 of 16; a warp has 32 of 128 dims
    O^T [4 x 64 dims, 64 columns] per warpgroup; the dims of V^T, columns 8 n + 2 c, + 1

Numbers
-------
- e4m3 -> float16 is exact. A token's rows are taken relative to the power of two of its largest
  scale, as float16 pairs times 2**6: exact where scales are powers of two, the default of this
  project's writes; others are rounded to 11 bits, relative to that power. RoPE is multiplied by
  the same power in bfloat16, which is exact, so all 576 dims share one accumulator.
- float16's range: queries are scaled by the power of two that brings the CTA's largest to 2**14
  .. 2**15, so that one factor per token makes scores of all columns. A column whose largest value
  is more than 2**12 times smaller has its own power, which its scores then make up for. Weights
  are 2**(score - ceiling): finite in float16, and 2**7 when the ceiling is set. As float16 they
  meet the token's power, relative to the largest so far. When a ceiling or the power is outgrown,
  all columns' ceilings are brought up to date, so that this is rare, and both warpgroups rescale
  their accumulators.
- What this cannot hold: values lose bits where another token of the CTA, weighty or not, has a
  scale more than 2**16 times as large, and all of a 128-dim group loses them where another group of
  the same token has one 2**21 times as large, or where the token's largest is below 2**-49. Where
  the largest query, times sm_scale and a token's scale, leaves float32's range, all columns are
  lost.
- The row of a key without a slot is never read from the cache: it is zeros in shared memory, its
  score -inf.
- No atomics, one fixed order of everything: bitwise deterministic.

Budgets
-------
240 registers a thread of the computing warpgroups (`setmaxnreg`): 128 for O^T, 32 for S^T, 32 for
the operands of two chunks of scores or two k-steps of values in flight, 8 or 12 for what is read
ahead, the rest addresses and state; 24 for gathering. The shapes that are measured do not spill;
others do by up to 48 bytes, nearly all outside of the loop over tiles. Shared memory in bytes:

    queries 9 x 64 x 128               73,728
    P, token scales 3 x 9,216          27,648
    raw rows 3 x 64 x 656             125,952
    column state, maxima, barriers      2,736
    sum                               230,064

Roofline (H100)
--------
A tile of 64 rows is 2,176 cycles of tensor work, 1.3 us, and 2.3 us of random rows for every SM.
Measured by clock counts: about 3,200 cycles a tile in long lists, and 8,000 from one list to the
next, 3,000 of them for the queries and 3,300 for the output. Beside the other warpgroup's MMAs, the
weights' instructions take twice as long as alone, so that their number matters more than their
order. `benchmarks/EXPERIMENTS.md` has the counts, and the forms that were tried.

Form
----
As in `warp_attention_sm90`, the loop is inline. One warpgroup for all scores and two for the values
was slower, because the scores' chain of conversions, MMAs and exponentials does not overlap with
itself; so was one accumulator per 128 dims of the scores, as there, which takes the registers that
let conversions run beside MMAs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels import hopper as hw
from pallas_kernels import layout
from pallas_kernels.cta_attention_sm90 import (
    ROW_TILE,
    SMALLEST_QUERY_EXPONENT,
    CtaAttention,
    copy_rows,
    query_exponent,
    query_powers,
    scaled_query,
)
from pallas_kernels.hopper import Reg, WgmmaStep
from pallas_kernels.warp_attention_sm90 import WarpTiling

COLUMNS = 64
"""Query columns of a CTA: the N of its MMAs."""

TILE = 64
"""Cache rows per step: the M of the scores' MMAs and the K of the values'."""

STAGES = 3
"""Tiles of raw rows in flight."""

_COMPUTE_WARPS = 8
GATHER_THREAD = _COMPUTE_WARPS * hw.WARP
"""The first thread of those that gather."""

_ROW = layout.FP8_ROW_BYTES
_GROUPS = layout.num_scale_tiles(layout.KV_LORA_RANK)
_SCALES_OFFSET = layout.KV_LORA_RANK
_ROPE_OFFSET = layout.KV_LORA_RANK + 4 * _GROUPS
_TILE_BYTES = TILE * _ROW
_QUERY_BYTES = 2 * layout.LATENT_DIM
_CHUNKS = layout.LATENT_DIM // 64  # 64-dim columns of Q: 8 latent, 1 RoPE
_CHUNK_BYTES = COLUMNS * 128
_BLOCKS = COLUMNS // 8
_BLOCKS_AHEAD = 4  # whose offsets are read before they are needed

# A column's largest value is this far below the CTA's, as an exponent, or has its own power.
_QUERY_RANGE = 12
# Weights are 2**(score - ceiling), finite in float16. A new ceiling leaves 2**8 of 2**15.
_LARGEST_WEIGHT_EXPONENT = 15
_MAX_LAG = 8.0
# Values, at most 448 * 2 relative to their token's power of two, become float16 times 2**6.
_VALUE_HEADROOM = 6
_SMALLEST_SCALE_EXPONENT = 127 - 100
# A token's power of two, so that its inverse times RoPE stays in range.
_SMALLEST_TOKEN_EXPONENT = 127 - 40

# Named barriers: one of each computing warpgroup, and one of both.
_WARPGROUP_BARRIER = 8
_COMPUTE_BARRIER = 10
_COMPUTE_REGISTERS, _GATHER_REGISTERS = 240, 24


class _Buffer(NamedTuple):
    """Byte offsets in what one warpgroup hands over per tile."""

    weights: int = 0  # f16 weights [column, token], swizzled
    value_scales: int = weights + COLUMNS * 128  # f16 [group, 16 tokens, c, half, 2]
    decay: int = value_scales + _GROUPS * TILE * 2  # f32 [column]
    flag: int = decay + COLUMNS * 4  # u32: whether to rescale; f32: the token scales' ratio
    end: int = flag + 16


_BUFFER = _Buffer()
_BUFFER_BYTES = -(-_BUFFER.end // 1024) * 1024


class _SharedLayout(NamedTuple):
    """Byte offsets in shared memory; matrices of the MMAs at multiples of 1024."""

    queries: int = 0  # f16 [chunk, column, 64 permuted dims], swizzled; the last chunk bf16
    buffers: int = queries + _CHUNKS * _CHUNK_BYTES  # what warpgroups hand over [stage]
    rows: int = buffers + STAGES * _BUFFER_BYTES  # raw cache rows [stage, token, 656]
    offsets: int = rows + STAGES * _TILE_BYTES  # f32 [column]: minus its ceiling
    relative: int = offsets + COLUMNS * 4  # f32 [column]: its queries' power, see `store_queries`
    partial: int = relative + COLUMNS * 4  # f32 [warp, column]: maxima, sums
    scale: int = partial + _COMPUTE_WARPS * COLUMNS * 4  # u32 bits; the warps' of a tile
    masks: int = scale + 16 + 2 * 16  # u32 [stage, row warp]: which rows are keys
    # mbarrier: rows full, rows free [stage], weights full [warpgroup], queries full, queries free
    barriers: int = masks + STAGES * 16
    end: int = barriers + 8 * (2 * STAGES + 4)


_SMEM = _SharedLayout()


@dataclasses.dataclass(frozen=True)
class WarpgroupTiling:
    """How one CTA divides its work; there is one way.

    Attributes:
      head_tile: query columns of the CTA.
      num_warpgroups: two that compute, one that gathers.
      num_stages: tiles of raw rows in flight.
    """

    head_tile: int = COLUMNS
    num_warpgroups: int = 3
    num_stages: int = STAGES

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)} must be {field.default} with"
                    f" head_tile={COLUMNS}"
                )

    @property
    def row_warps(self) -> int:
        """Warps that take 16 different rows each."""
        return TILE // ROW_TILE

    @property
    def tokens_per_round(self) -> int:
        """Keys that the CTA takes per step."""
        return TILE

    @property
    def smem_bytes(self) -> int:
        """Shared memory of the CTA."""
        return _SMEM.end

    @property
    def ctas_per_sm(self) -> int:
        """CTAs that fit on an SM."""
        return 1


class TiledConfig:
    """What the kernels' configs derive from their fields of these names."""

    head_tile: int
    num_warpgroups: int
    num_stages: int
    kv_cache_format: layout.RowFormat = "fp8_ds_mla"

    @property
    def is_wide(self) -> bool:
        """Whether CTAs take 64 columns, by warpgroups."""
        return self.head_tile == COLUMNS

    @property
    def tiling(self) -> WarpTiling | WarpgroupTiling:
        """How a CTA divides its work."""
        fields = self.head_tile, self.num_warpgroups, self.num_stages
        if self.is_wide:
            return WarpgroupTiling(*fields)
        return WarpTiling(*fields, self.kv_cache_format)

    @property
    def smem_bytes(self) -> int:
        """Shared memory of one CTA."""
        return self.tiling.smem_bytes


def _inverse_power(bits: Reg) -> Reg:
    """2**6 over a power of two, which is given by its bits."""
    return hw.as_f32(((2 * 127 + _VALUE_HEADROOM) << 23) - bits)


class WarpgroupAttention(CtaAttention):
    """A CTA of 64 columns.

    `start`, then `gather` in the gathering warpgroup and `attend` in the computing ones, both
    for the same lists of keys, one after the other: `index` counts the lists before, `first_tile`
    their tiles, from which the mbarriers' phases follow.
    """

    def __init__(self, tiling: WarpgroupTiling, **arguments: Any) -> None:
        """The arguments are `CtaAttention`'s; there is only one `tiling`."""
        del tiling
        super().__init__(**arguments)
        self.warpgroup, self.row_warp = self.warp >> 2, self.warp & 3
        self.rows = self.smem + _SMEM.rows
        self.rows_full = self.smem + _SMEM.barriers
        self.rows_free = self.rows_full + 8 * STAGES
        self.weights_full = self.rows_free + 8 * STAGES
        self.queries_full = self.weights_full + 8 * 2
        self.queries_free = self.queries_full + 8

    def store_unit(self, column: Reg, unit: Reg) -> Reg:
        """What the results are to be multiplied by, for an output in natural units `unit`.

        An output over it is at most 57,344, in float16's range: a kernel may keep `unit` beside
        float16 results and return 1 instead.
        """
        del column
        return unit

    def visible(self, scores: list[list[Reg]], mask: Reg, t: Reg) -> list[list[Reg]]:
        """As `CtaAttention`'s, and with the columns' own powers; in tiles that need either."""
        masked = super().visible

        def adjusted() -> list[list[Reg]]:
            result = []
            for n, block in enumerate(scores):
                relative = self.load_columns(_SMEM.relative, n)
                result.append([x * relative[i % 2] for i, x in enumerate(block)])
            return masked(result, mask, t)

        return hw.cond(mask.ne(0xFFFFFFFF) | (self.query_unit < 0.0), adjusted, scores)

    # ---- start

    def start(self) -> None:
        """Sets up the mbarriers; every thread."""
        with hw.when(self.thread.eq(0)):
            for stage in range(STAGES):
                hw.mbarrier_init(self.rows_full + 8 * stage, 4 * hw.WARP)
                hw.mbarrier_init(self.rows_free + 8 * stage, _COMPUTE_WARPS * hw.WARP)
            for owner in range(2):
                hw.mbarrier_init(self.weights_full + 8 * owner, 1)
            hw.mbarrier_init(self.queries_full, 1)
            hw.mbarrier_init(self.queries_free, _COMPUTE_WARPS * hw.WARP)
            hw.fence_async_proxy()
        hw.cta_sync()

    def run_roles(self, gather: Callable[[], None], compute: Callable[[], None]) -> None:
        """Each warpgroup its role, with its registers."""
        with hw.when(self.warpgroup.eq(2)):
            hw.set_max_registers(_GATHER_REGISTERS, increase=False)
            gather()
        with hw.when(self.warpgroup < 2):
            hw.set_max_registers(_COMPUTE_REGISTERS, increase=True)
            compute()

    # ---- gather

    def gather(self, num_tiles: Reg, first_tile: Reg, index: Reg) -> None:
        """Copies one list's queries and tiles to shared memory, as their places become free."""
        with hw.when(self.row_warp.eq(0)):
            self.copy_queries(index)
        row = self.row_warp * ROW_TILE + (self.lane & (ROW_TILE - 1))

        def one_tile(t: Reg, slot: Reg) -> Reg:
            next_slot = self.load_slot(t + 1)
            tile = first_tile + t
            stage, use = tile % STAGES, tile // STAGES
            with hw.when(use > 0):
                hw.mbarrier_wait(self.rows_free + stage * 8, (use - 1) & 1)
            valid, mask = self.validity(slot)
            with hw.when(self.lane.eq(0)):
                hw.store_shared(self.mask_address(stage), [mask])
            copy_rows(
                self.kv_cache,
                slot,
                valid,
                mask,
                destination=self.rows + stage * _TILE_BYTES + row * _ROW,
                barrier=self.rows_full + stage * 8,
                rows_per_copy=self.rows_per_copy,
            )
            # Lane 0 has arrived; the others do, so that each releases the zeros that it stored.
            with hw.when(self.lane.ne(0)):
                hw.mbarrier_arrive(self.rows_full + stage * 8)
            return next_slot

        hw.for_loop(num_tiles, self.load_slot(0), one_tile)

    def mask_address(self, stage: Reg) -> Reg:
        """Where the mask of this warp's rows in a stage lies, one bit a lane; with the rows."""
        return self.smem + _SMEM.masks + stage * 16 + self.row_warp * 4

    # ---- queries

    def copy_queries(self, index: Reg) -> None:
        """Starts copying the list's queries, one behind the other as they lie; one warp.

        Where `store_queries` stores them permuted, when the scores of the list before are done.
        """
        with hw.when(index.ne(0)):
            hw.mbarrier_wait(self.queries_free, (index - 1) & 1)
        with hw.when(self.lane.eq(0)):
            num_bytes = self.num_queries() * _QUERY_BYTES
            hw.mbarrier_arrive_expect(self.queries_full, num_bytes)
            source = self.query_address(self.first_column)
            hw.copy_row_to_shared(self.smem + _SMEM.queries, source, num_bytes, self.queries_full)

    def num_queries(self) -> Reg:
        """The CTA's columns that exist."""
        return hw.minimum(self.num_columns - self.first_column, COLUMNS)

    def store_queries(self, index: Reg) -> None:
        """Scales and permutes the columns in place; every eighth is a warp's.

        All are scaled by the same power of two, so that `query_unit` is the factor of all scores.
        Columns that this would leave too small get a power of their own; then `query_unit` is
        negative, and `visible` makes up for it.
        """
        hw.mbarrier_wait(self.queries_full, index & 1)
        columns = [self.warp + i * _COMPUTE_WARPS for i in range(COLUMNS // _COMPUTE_WARPS)]
        loaded = [self.load_query(column) for column in columns]
        exponents = [query_exponent(pieces) for pieces in loaded]
        # What is not finite spoils its own column only.
        finite = [hw.select(e.eq(255), hw.u32(0), e) for e in exponents]
        exchanged = self.smem + _SMEM.partial
        with hw.when(self.lane.eq(0)):
            largest = functools.reduce(hw.maximum_u32, finite)
            hw.store_shared(exchanged + self.warp * 4, [largest])
        self.compute_sync()
        words = [w for half in range(2) for w in hw.load_shared(exchanged, 16 * half)]
        common = hw.maximum_u32(functools.reduce(hw.maximum_u32, words), SMALLEST_QUERY_EXPONENT)

        is_uneven = hw.u32(0).ne(0)
        for column, pieces, exponent in zip(columns, loaded, exponents, strict=True):
            is_small = exponent.ne(0) & (exponent + _QUERY_RANGE < common)
            is_uneven = is_uneven | is_small
            # As far below as float32 has powers to make up for it.
            own = hw.maximum_u32(exponent, SMALLEST_QUERY_EXPONENT) + 126
            own = hw.maximum_u32(own, common) - 126
            self.store_query(column, pieces, hw.select(is_small, own, common), common)
        _, undo = query_powers(common)
        # Not 0 where it underflows, so that it has a sign.
        unit = hw.maximum(undo * (self.sm_scale * hw.LOG2_E), hw.f32(2.0**-126))
        hw.fence_async_proxy()
        is_uneven = hw.named_barrier_any(
            hw.u32(_COMPUTE_BARRIER), hw.WARP * _COMPUTE_WARPS, is_uneven
        )
        self.query_unit = hw.select(is_uneven, 0.0 - unit, unit)

    def load_query(self, column: Reg) -> list[list[Reg]]:
        """A column of the CTA in the order of the scores' k, 8 dims per lane and piece.

        In the scores, lane c of four holds 16 consecutive latent bytes, or 8 + 8 RoPE elements, of
        a token, and k-step s takes four of them, b = 4 s + 2 h + e, as columns 8 h + 2 c + e. So
        16-byte piece 2 s + h of Q's row, which is lane 2 s + h's here, has one word of each c.
        """
        # Columns that do not exist become 0 times the last one; stale bytes may be NaN.
        column = hw.minimum(column, self.num_queries() - 1)
        row = self.smem + _SMEM.queries + column * _QUERY_BYTES
        latent = row + ((self.lane >> 4) * 64 + (self.lane & 15)) * 4
        rope = row + (self.lane & 7) * 4

        def load(address: Reg, offset: int, distance: int) -> list[Reg]:
            return [hw.load_shared(address, offset + distance * c, words=1)[0] for c in range(4)]

        return [load(latent, 0, 64), load(latent, 512, 64), load(rope, 1024, 32)]

    def store_query(self, column: Reg, pieces: list[list[Reg]], exponent: Reg, common: Reg) -> None:
        """Scales a column by the power of its exponent, and stores it and its state."""
        power, _ = query_powers(exponent)
        exists = self.first_column + column < self.num_columns
        row = self.smem + _SMEM.queries + column * 128
        place = (self.lane & 7) ^ (column & 7)
        scaled = scaled_query(pieces, hw.select(exists, power, hw.f32(0.0)))
        for part, words in enumerate(scaled):
            chunk = hw.u32(_CHUNKS - 1) if part == 2 else (self.lane >> 3) + 4 * part
            hw.store_shared(row + chunk * _CHUNK_BYTES + place * 16, words)
        with hw.when(self.lane.eq(0)):
            state = self.smem + column * 4
            hw.store_shared(state, [(127 + exponent - common) << 23], _SMEM.relative)
            hw.store_shared(state, [hw.f32(-hw.NO_MAXIMUM)], _SMEM.offsets)

    # ---- scores

    def buffer(self, tile: Reg) -> Reg:
        """Where the tile's weights lie. When its rows are there, it is free, as their place was."""
        return self.smem + _SMEM.buffers + tile % STAGES * _BUFFER_BYTES

    def warpgroup_sync(self) -> None:
        hw.named_barrier(self.warpgroup + _WARPGROUP_BARRIER, 128)

    def scores(self, row: Reg, mask: Reg, t: Reg) -> tuple[list[list[Reg]], list[Reg], list[Reg]]:
        """S^T [block][4], before the rows' factors; -inf for keys that are not seen.

        Also the powers of two, as bits, of the two tokens' largest scales, and the factors that
        make log2 units of the two rows. Values relative to the powers are float16's, so that all
        dims share one accumulator.
        """
        keys = row + self.c * 32
        queries = hw.matrix_descriptor(self.smem + _SMEM.queries)
        powers, inverses, scales = [], [], []
        for r in range(2):
            bits = hw.load_shared(row, r * 8 * _ROW + _SCALES_OFFSET)
            power = functools.reduce(hw.maximum_u32, bits) & 0x7F800000
            powers.append(hw.maximum_u32(power, _SMALLEST_TOKEN_EXPONENT << 23))
            inverses.append(_inverse_power(powers[r]))
            scales.append([hw.as_f32(b) * inverses[r] for b in bits])

        def load_rows(chunk: int) -> list[list[Reg]]:
            offset = 128 * (chunk // 2) + 16 * (chunk % 2)
            return [hw.load_shared(keys, r * 8 * _ROW + offset) for r in range(2)]

        raw = load_rows(0)
        steps = []
        rope_scales = [hw.bf16x2(x, x) for x in inverses]
        for half in range(2):
            rows = [
                [
                    hw.multiply_bf16x2(word, rope_scales[r])
                    for word in hw.load_shared(keys, r * 8 * _ROW + _ROPE_OFFSET + 16 * half)
                ]
                for r in range(2)
            ]
            for s in range(2):
                a = [rows[0][2 * s], rows[1][2 * s], rows[0][2 * s + 1], rows[1][2 * s + 1]]
                steps.append(WgmmaStep(0, a, 8 * _CHUNK_BYTES + 32 * (2 * half + s)))
        (acc,) = hw.wgmma_m64n64k16([[]], queries, steps, "bf16")

        last = _CHUNKS - 2
        for chunk in range(last + 1):
            relative = [hw.f16x2(scales[r][chunk // 2], scales[r][chunk // 2]) for r in range(2)]
            steps = []
            for s in range(4):
                pairs = [hw.e4m3x4_to_f16x2(raw[r][s]) for r in range(2)]
                a = [
                    hw.multiply_f16x2(pairs[r][k], relative[r]) for k in range(2) for r in range(2)
                ]
                steps.append(WgmmaStep(0, a, chunk * _CHUNK_BYTES + 32 * s))
            if chunk < last:
                raw = load_rows(chunk + 1)
            (acc,) = hw.wgmma_m64n64k16([acc], queries, steps, "f16")
            # Registers are for two chunks' operands.
            if chunk < last:
                hw.wgmma_wait(1)
        acc = hw.wgmma_wait(0, acc)

        unit = hw.as_f32(hw.as_u32(self.query_unit) & 0x7FFFFFFF) * 2.0**-_VALUE_HEADROOM
        # Not 0 where it underflows: a masked score stays -inf.
        factors = [hw.maximum(hw.as_f32(power) * unit, hw.f32(2.0**-126)) for power in powers]
        blocks = [acc[4 * n : 4 * n + 4] for n in range(_BLOCKS)]
        return self.visible(blocks, mask, t), powers, factors

    def load_columns(self, array: int, n: int) -> list[Reg]:
        """Of one of `_SMEM`'s float32 [column], this lane's two columns of block n."""
        return hw.load_shared_f32(self.smem + array + self.c * 8, n * 32, words=2)

    def reduce_over_rows(self, values: list[list[Reg]], combine: Any) -> list[Reg]:
        """[block][2] of all lanes -> the columns 2 lane, 2 lane + 1, over the warp's rows.

        Each of three exchanges halves the blocks that a lane is left with.
        """
        blocks = values
        for bit in (2, 1, 0):
            upper = (self.g >> bit & 1).ne(0)
            half = len(blocks) // 2
            kept = []
            for low, high in zip(blocks[:half], blocks[half:], strict=True):
                kept.append([])
                for a, b in zip(low, high, strict=True):
                    theirs = hw.shuffle_xor(hw.select(upper, a, b), 4 << bit)
                    kept[-1].append(combine(hw.select(upper, b, a), theirs))
            blocks = kept
        return blocks[0]

    def weigh(
        self, tile: Reg, x: list[list[Reg]], powers: list[Reg], factors: list[Reg]
    ) -> tuple[list[list[Reg]], Reg]:
        """From scores, powers and factors to published weights and token scales.

        This warpgroup has taken the values of the tile before, so the ceilings are that tile's. The
        weights are stored before all warps know that the ceilings hold, and again where they do
        not.

        Returns:
          The weights' sums [block][2] over this lane's tokens, and whether the tile has raised
          ceilings or scale.
        """
        buffer = self.buffer(tile)
        scale_address = self.smem + _SMEM.scale
        own = self.load_token_scales(tile)
        (scale,) = hw.load_shared(scale_address, words=1)
        sums, largest = self.store_weights(
            buffer,
            scale,
            powers,
            lambda n, i, offset: hw.fma(x[n][i], factors[i // 2], offset),
        )
        self.store_token_scales(buffer, own, powers)
        hw.fence_async_proxy()
        # Halves that are not finite: their exponents are 31.
        overflows = ((largest + 0x04000400) & 0x80008000).ne(0)
        outgrown = overflows | (powers[0] > scale) | (powers[1] > scale)
        outgrown = hw.named_barrier_any(self.warpgroup + _WARPGROUP_BARRIER, 128, outgrown)

        def raised() -> list[list[Reg]]:
            # Rounded products, since the ceiling is one of them: as a fused one, an enormous score
            # may be far above its own rounding.
            scores = [[hw.multiply(y, factors[i // 2]) for i, y in enumerate(b)] for b in x]
            self.raise_ceilings(buffer, scores, powers, scale)
            (new_scale,) = hw.load_shared(scale_address, words=1)
            sums, _ = self.store_weights(
                buffer,
                new_scale,
                powers,
                lambda n, i, offset: scores[n][i] + offset,
            )
            hw.fence_async_proxy()
            self.warpgroup_sync()
            return sums

        sums = hw.cond(outgrown, raised, sums)
        with hw.when((self.thread & 127).eq(0)):
            hw.store_shared(buffer, [hw.select(outgrown, hw.u32(1), hw.u32(0))], _BUFFER.flag)
            hw.mbarrier_arrive(self.weights_full + self.warpgroup * 8)
        return sums, outgrown

    def raise_ceilings(
        self, buffer: Reg, scores: list[list[Reg]], powers: list[Reg], scale: Reg
    ) -> None:
        """Brings ceilings and scale to the tile's scores and powers, and leaves by how much."""
        scale_address = self.smem + _SMEM.scale
        partial = self.smem + _SMEM.partial
        in_warpgroup = self.thread & 127
        maxima = self.reduce_over_rows(
            [[hw.maximum(b[h], b[2 + h]) for h in range(2)] for b in scores], hw.maximum
        )
        hw.store_shared(partial + self.row_warp * (COLUMNS * 4) + self.lane * 8, maxima)
        power = hw.reduce_max_u32(hw.maximum_u32(*powers))
        with hw.when(self.lane.eq(0)):
            hw.store_shared(scale_address + self.warp * 4, [power], 16)
        self.warpgroup_sync()
        with hw.when(in_warpgroup < COLUMNS):
            offset = self.smem + in_warpgroup * 4
            old = 0.0 - hw.load_shared_f32(offset, _SMEM.offsets, words=1)[0]
            largest = functools.reduce(
                hw.maximum,
                [
                    hw.load_shared_f32(partial + in_warpgroup * 4, w * COLUMNS * 4, words=1)[0]
                    for w in range(4)
                ],
            )
            # Every column's, so that the next tiles outgrow none of them.
            new = hw.maximum(old, largest - (_LARGEST_WEIGHT_EXPONENT - _MAX_LAG))
            # Where scores are so large that float32 does not hold the difference, weights must stay
            # in range all the same.
            new = hw.select(largest - new > _LARGEST_WEIGHT_EXPONENT, largest, new)
            hw.store_shared(offset, [0.0 - new], _SMEM.offsets)
            hw.store_shared(buffer + in_warpgroup * 4, [hw.exp2(old - new)], _BUFFER.decay)
        theirs = hw.load_shared(scale_address + self.warpgroup * 16, 16)
        new_scale = functools.reduce(hw.maximum_u32, theirs, scale)
        difference = hw.minimum(new_scale - scale, 127 << 23)
        with hw.when(in_warpgroup.eq(0)):
            ratio = hw.as_f32((127 << 23) - difference)
            hw.store_shared(buffer + _BUFFER.flag, [ratio], 4)
            hw.store_shared(scale_address, [new_scale])
        self.warpgroup_sync()

    def load_token_scales(self, tile: Reg) -> list[Reg]:
        """Of this lane's two tokens, for the 128-dim group c."""
        row = self.key_row(tile)
        return [
            hw.load_shared_f32(row + self.c * 4, r * 8 * _ROW + _SCALES_OFFSET, words=1)[0]
            for r in range(2)
        ]

    def store_token_scales(self, buffer: Reg, own: list[Reg], powers: list[Reg]) -> None:
        """For the values: the tokens' scales relative to their powers."""
        pairs = []
        for r in range(2):
            relative = own[r] * _inverse_power(powers[r])
            pairs.append(hw.f16x2(relative, hw.shuffle_xor(relative, 4)))
        with hw.when((self.g & 1).eq(0)):
            address = buffer + self.c * (TILE * 2) + self.row_warp * 32 + (self.g >> 1) * 8
            hw.store_shared(address, pairs, _BUFFER.value_scales)

    def store_weights(
        self,
        buffer: Reg,
        scale: Reg,
        powers: list[Reg],
        exponent: Callable[[int, int, Reg], Reg],
    ) -> tuple[list[list[Reg]], Reg]:
        """For the values: weights times the tokens' powers, relative to the scale.

        `exponent(n, i, offset)` is the log2 of weight i of block n, given its column's offset.
        Returns the weights' sums [block][2] over this lane's tokens, and the largest weights as a
        pair of float16 bits, before they are multiplied.
        """
        token_factors = []
        for r in range(2):
            factor = hw.as_f32((127 << 23) - hw.minimum(scale - powers[r], 127 << 23))
            token_factors.append(hw.f16x2(factor, factor))
        # Matrix i of a store: block 2 k + i // 2, tokens 8 (i % 2) .. of the warp's 16.
        matrix, column = self.lane >> 3, self.lane & 7
        piece = (self.row_warp * 2 + (matrix & 1)) ^ column
        address = buffer + _BUFFER.weights + ((matrix >> 1) * 8 + column) * 128 + piece * 16

        sums, largest = [], hw.u32(0)
        loaded = [self.load_columns(_SMEM.offsets, n) for n in range(_BLOCKS_AHEAD)]
        for k in range(_BLOCKS // 2):
            pairs = []
            for n in (2 * k, 2 * k + 1):
                offsets = loaded.pop(0)
                if n + _BLOCKS_AHEAD < _BLOCKS:
                    loaded.append(self.load_columns(_SMEM.offsets, n + _BLOCKS_AHEAD))
                weights = [hw.exp2(exponent(n, i, offsets[i % 2])) for i in range(4)]
                sums.append([weights[h] + weights[2 + h] for h in range(2)])
                pairs += [hw.f16x2(*weights[2 * r : 2 * r + 2]) for r in range(2)]
            largest = functools.reduce(hw.maximum_u16x2, pairs, largest)
            values = [hw.multiply_f16x2(p, token_factors[i % 2]) for i, p in enumerate(pairs)]
            hw.store_matrices_transposed(address + k * 16 * 128, values)
        return sums, largest

    def decayed(self, sums: list[Reg], tile: Reg, raised: Reg) -> list[Reg]:
        """The sums under the ceilings that the tile has raised, if it has."""

        def decayed() -> list[Reg]:
            address = self.buffer(tile) + self.lane * 8
            decay = hw.load_shared_f32(address, _BUFFER.decay, words=2)
            return [a * b for a, b in zip(sums, decay, strict=True)]

        return hw.cond(raised, decayed, sums)

    def key_row(self, tile: Reg) -> Reg:
        """Address of the first of the two rows whose scores this lane has; the other is 8 on."""
        row = self.row_warp * ROW_TILE + self.g
        return self.rows + tile % STAGES * _TILE_BYTES + row * _ROW

    def wait_for_rows(self, tile: Reg) -> None:
        hw.mbarrier_wait(self.rows_full + tile % STAGES * 8, tile // STAGES & 1)

    def scores_of(self, tile: Reg, first_tile: Reg) -> tuple[list[list[Reg]], list[Reg], list[Reg]]:
        """`scores`, once the tile's rows are there."""
        tile = hw.recomputed(tile)
        self.wait_for_rows(tile)
        (mask,) = hw.load_shared(self.mask_address(tile % STAGES), words=1)
        return self.scores(self.key_row(tile), mask, tile - first_tile)

    def add_sums(self, sums: list[Reg], new: list[list[Reg]]) -> list[Reg]:
        """Sums of the columns 2 lane, 2 lane + 1 over this warpgroup's tiles, and a tile's."""
        added = self.reduce_over_rows(new, lambda a, b: a + b)
        return [a + b for a, b in zip(sums, added, strict=True)]

    # ---- values

    def wait_for_weights(self, tile: Reg) -> Reg:
        """Waits for the other warpgroup's; whether the tile has raised ceilings or scale."""
        hw.mbarrier_wait(self.weights_full + (self.warpgroup ^ 1) * 8, tile // 2 & 1)
        (flag,) = hw.load_shared(self.buffer(tile), _BUFFER.flag, words=1)
        return flag.ne(0)

    def values(
        self,
        tile: Reg,
        raised: Reg,
        acc: list[list[Reg]],
        meanwhile: Callable[[], list[Reg]],
    ) -> tuple[list[list[Reg]], list[Reg]]:
        """Adds a tile's values to O^T [4 blocks of 64 dims][32].

        Args:
          tile: the tile, whose weights are there.
          raised: whether they have raised ceilings or scale.
          acc: O^T.
          meanwhile: what to do while the first MMAs run; its result is returned, too.
        """
        stage, buffer = tile % STAGES, self.buffer(tile)

        def rescaled() -> list[list[Reg]]:
            (ratio,) = hw.load_shared(buffer, _BUFFER.flag + 4, words=1)
            result = [list(a) for a in acc]
            for n in range(_BLOCKS):
                decay = hw.load_shared_f32(buffer + self.c * 8, _BUFFER.decay + n * 32, words=2)
                factors = [d * hw.as_f32(ratio) for d in decay]
                for a in result:
                    for i in range(4):
                        a[4 * n + i] = a[4 * n + i] * factors[i % 2]
            return result

        acc = hw.cond(raised, rescaled, acc)
        weights = hw.matrix_descriptor(buffer + _BUFFER.weights)
        rows = (
            self.rows
            + stage * _TILE_BYTES
            + (self.lane & 15) * _ROW
            + (self.lane >> 4) * 16
            + self.warpgroup * (layout.KV_LORA_RANK // 2)
            + self.row_warp * 32
        )
        value_scales = buffer + _BUFFER.value_scales + self.warpgroup * (2 * TILE * 2) + self.c * 8

        def load(k: int) -> tuple[list[list[Reg]], list[list[Reg]]]:
            """Bytes of 16 tokens, this warp's 32 dims of two 128-dim groups, and their scales."""
            at = k * (16 * _ROW)
            bytes_ = [hw.load_matrices_transposed(rows, at + 128 * group) for group in range(2)]
            scales = [
                hw.load_shared(value_scales, k * 32 + group * (TILE * 2), words=2)
                for group in range(2)
            ]
            return bytes_, scales

        acc, last, done = list(acc), TILE // 16 - 1, []
        loaded = load(0)
        for k in range(TILE // 16):
            steps: list[list[WgmmaStep]] = []
            for bytes_, (low, high) in zip(*loaded, strict=True):
                steps.append([])
                for b in range(2):
                    a0, a1 = hw.e4m3x4_to_f16x2(hw.permute_bytes(bytes_[2 * b], 0x3120))
                    a2, a3 = hw.e4m3x4_to_f16x2(hw.permute_bytes(bytes_[2 * b + 1], 0x3120))
                    a = [
                        hw.multiply_f16x2(x, y)
                        for x, y in zip([a0, a1, a2, a3], [low, low, high, high], strict=True)
                    ]
                    steps[-1].append(WgmmaStep(b, a, 32 * k))
            if k < last:
                loaded = load(k + 1)
            for group in range(2):
                two = slice(2 * group, 2 * group + 2)
                acc[two] = hw.wgmma_m64n64k16(acc[two], weights, steps[group], "f16")
            if k == 0:
                done = meanwhile()
            if k < last:
                # Registers are for the operands of two k-steps.
                hw.wgmma_wait(1)
        flat = hw.wgmma_wait(0, [r for a in acc for r in a])
        acc = [flat[32 * i : 32 * i + 32] for i in range(4)]
        hw.mbarrier_arrive(self.rows_free + stage * 8)
        return acc, done

    # ---- the computing warpgroups

    def attend(self, num_tiles: Reg, first_tile: Reg, index: Reg) -> None:
        """Attention of the columns over one list of keys, up to the stored result.

        Args:
          num_tiles: tiles of the list.
          first_tile: tiles of all lists before it.
          index: lists before it.
        """
        zero = hw.f32(0.0)
        with hw.when(self.thread.eq(0)):
            hw.store_shared(self.smem, [hw.u32(_SMALLEST_SCALE_EXPONENT << 23)], _SMEM.scale)
        self.store_queries(index)

        # A warpgroup's steps: the scores of its next tile; the values of the tile before, which is
        # the other's; the weights and the values of its own.
        parity = (first_tile ^ self.warpgroup) & 1

        def others(tile: Reg, acc: Any, sums: list[Reg]) -> Any:
            tile = hw.recomputed(tile)
            raised = self.wait_for_weights(tile)  # and so, for the rows
            return self.values(tile, raised, acc, lambda: self.decayed(sums, tile, raised))

        def step(m: Reg, carry: Any) -> Any:
            acc, sums = carry
            t = m * 2 + parity
            tile = first_tile + t
            x, powers, factors = self.scores_of(tile, first_tile)
            acc, sums = hw.cond(t.ne(0), lambda: others(tile - 1, acc, sums), (acc, sums))
            tile = hw.recomputed(tile)
            new, raised = self.weigh(tile, x, powers, factors)
            return self.values(
                tile, raised, acc, lambda: self.add_sums(self.decayed(sums, tile, raised), new)
            )

        state = ([[zero] * 32 for _ in range(4)], [zero, zero])
        acc, sums = hw.for_loop((num_tiles + 1 - parity) // 2, state, step)
        hw.mbarrier_arrive(self.queries_free)
        last = first_tile + num_tiles - 1
        is_behind = num_tiles.ne(0) & ((last ^ self.warpgroup) & 1).ne(0)
        acc, sums = hw.cond(is_behind, lambda: others(last, acc, sums), (acc, sums))
        self.finish(acc, sums)

    def compute_sync(self) -> None:
        """All warps of the computing warpgroups arrived, and see each other's shared memory."""
        hw.named_barrier(hw.u32(_COMPUTE_BARRIER), hw.WARP * _COMPUTE_WARPS)

    def finish(self, acc: list[list[Reg]], sums: list[Reg]) -> None:
        """Adds up the warps' sums, stores lse, applies the softmax's denominator, stores out."""
        partial = self.smem + _SMEM.partial
        factors = self.smem + _SMEM.buffers  # [column], where P was
        hw.store_shared(partial + self.warp * (COLUMNS * 4) + self.lane * 8, sums)
        self.compute_sync()
        with hw.when(self.thread < COLUMNS):
            own = [
                hw.load_shared_f32(partial + self.thread * 4, w * COLUMNS * 4, words=1)[0]
                for w in range(_COMPUTE_WARPS)
            ]
            # The same sum whichever warpgroup the list's first tile was.
            pairs = [a + b for a, b in zip(own[:4], own[4:], strict=True)]
            denominator = functools.reduce(lambda a, b: a + b, pairs)
            offset = self.smem + self.thread * 4
            ceiling = 0.0 - hw.load_shared_f32(offset, _SMEM.offsets, words=1)[0]
            (scale,) = hw.load_shared_f32(self.smem, _SMEM.scale, words=1)
            column = self.first_column + self.thread
            normalizer = denominator
            sink = self.load_sink(hw.minimum(column, self.num_columns - 1))
            if sink is not None:
                # out * sigmoid(lse - sink): the sink is one more term of the denominator.
                normalizer = denominator + hw.exp2(sink * hw.LOG2_E - ceiling)
            inverse = hw.select(denominator > 0.0, hw.reciprocal(normalizer), hw.f32(0.0))
            with hw.when(column < self.num_columns):
                self.store_lse(column, (ceiling + hw.log2(denominator)) * hw.LN_2)
            unit = self.store_unit(column, scale * 2.0**-_VALUE_HEADROOM)
            hw.store_shared(factors + self.thread * 4, [inverse * unit])
        self.compute_sync()

        first = self.first_column + self.c * 2
        dim = self.warpgroup * (layout.KV_LORA_RANK // 2) + self.row_warp * 32 + self.g * 2
        for n in range(_BLOCKS):
            factor = hw.load_shared_f32(factors + self.c * 8, n * 32, words=2)
            for h in range(2):
                column = 8 * n + h
                with hw.when(first + column < self.num_columns):
                    for b in range(4):
                        pair = [acc[b][4 * n + i] * factor[h] for i in (h, 2 + h)]
                        dims = 128 * (b // 2) + 16 * (b % 2)
                        self.store_out(first, dim, pair, column * layout.KV_LORA_RANK + dims)
