"""`WarpAttention` over `fp8_ds_mla` rows: how e4m3 values and their scales meet the MMAs.

Fragments (`hopper` has the MMA's own picture; lane = 4 g + c)
---------
    K   as A operand   16 consecutive bytes of rows g, g + 8: a k-step's dims are whatever four
                       bytes lie there, and Q is stored to match
    V^T as A operand   `ldmatrix.trans` on byte pairs, then a byte permutation: rows g and g + 8
                       are dims 2g and 2g + 1 of a 16-dim block; tokens 2c, 2c + 1, +8

Numbers
-------
- e4m3 -> float16 is exact, one instruction for two values. RoPE stays bfloat16, as an MMA of its
  own into the same accumulator.
- Scales never meet the 8-bit data. Scores: one accumulator per 128 dims, combined in float32 with
  the token's scales. Values: P times the token's scale of the 128 dims, as float16 pairs.
- float16's range: each query column is scaled by a power of two to 2**14 .. 2**15, undone in the
  scores; token scales are taken relative to a running power of two (their largest so far), undone
  at the end. When it is outgrown, the accumulators are rescaled; usually it is not. What this
  cannot hold: a token's values lose bits where another token of the CTA, weighty or not, has a
  scale more than 2**20 times as large.
"""

import functools

from pallas_kernels import hopper as hw
from pallas_kernels import layout
from pallas_kernels.cta_attention_sm90 import scale_query
from pallas_kernels.hopper import Reg
from pallas_kernels.warp_attention_sm90 import (
    HEAD_BLOCK,
    QUERY_BYTES,
    QUERY_UNITS,
    State,
    WarpAttention,
)

_ROW = layout.FP8_ROW_BYTES
_NUM_TILES = layout.num_scale_tiles(layout.KV_LORA_RANK)
_SCALES_OFFSET = layout.KV_LORA_RANK
_ROPE_OFFSET = layout.KV_LORA_RANK + 4 * _NUM_TILES

# P (at most 2**4) and the token scales (less than 2, relative to the running scale) become float16
# times 2**5 each, so that their product stays below 2**15 and small ones stay normal.
_HEADROOM = 5
_SMALLEST_SCALE_EXPONENT = 127 - 100


class Fp8WarpAttention(WarpAttention):
    """A CTA of 8 to 32 columns over `fp8_ds_mla` rows."""

    # ---- queries

    def store_queries(self, loaded: list[list[list[Reg]]]) -> None:
        """Scales each column by a power of two so that its largest value is 2**14 to 2**15.

        float16 then holds every value to 2**-40 of the column's largest; the scores take the power
        back, together with `sm_scale` and log2(e).
        """
        tiling = self.tiling
        for i, pieces in enumerate(loaded):
            column = self.warp + i * tiling.num_warps  # within the tile
            exists = self.first_column + column < self.num_columns
            scaled, undo = scale_query(pieces, exists)
            block = self.smem + self.at.queries + (column // HEAD_BLOCK) * QUERY_BYTES
            column_offset = (column % HEAD_BLOCK) * 64
            for part, words in enumerate(scaled):
                # Piece j holds dims 8 j .. 8 j + 7.
                if part == 2:  # RoPE
                    j = self.lane & 7
                    unit, piece_lane = (j & 1) + (QUERY_UNITS - 2), j >> 1
                else:
                    j = self.lane + 32 * part
                    unit, piece_lane = (j >> 4) * 4 + (j & 3), (j >> 2) & 3
                address = block + unit * 512 + column_offset + piece_lane * 16
                hw.store_shared(address, words)
            with hw.when(self.lane.eq(0)):
                scale = undo * (self.sm_scale * hw.LOG2_E)
                hw.store_shared(self.smem + self.at.query_scales + column * 4, [scale])

    # ---- scores

    def scores(self, stage: Reg, mask: Reg, t: Reg) -> tuple[list[list[Reg]], Reg]:
        """Scores [block][4] in log2 units, -inf for masked tokens; the tile's scale bits.

        Per 128-dim group an MMA chain on unscaled e4m3 values, then one fma with the token's scale
        of that group. A lane's four dims of a k-step are consecutive in memory: the order of k does
        not matter to the product as long as K and Q agree.
        """
        blocks = range(self.tiling.head_blocks)
        zero = hw.f32(0.0)
        tile = self.rows + stage * self.tiling.tile_bytes
        row = tile + self.g * _ROW
        keys = row + self.c * 32
        queries = self.smem + self.at.queries + self.lane * 16

        scales = [hw.load_shared_f32(row, r * 8 * _ROW + _SCALES_OFFSET) for r in range(2)]

        total = [[zero] * 4 for _ in blocks]
        for half in range(2):
            rows = [hw.load_shared(keys, r * 8 * _ROW + _ROPE_OFFSET + 16 * half) for r in range(2)]
            unit = QUERY_UNITS - 2 + half
            q = [hw.load_shared(queries, n * QUERY_BYTES + unit * 512) for n in blocks]
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
                    q = [hw.load_shared(queries, n * QUERY_BYTES + unit * 512) for n in blocks]
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

    def smallest_scale(self) -> Reg:
        return hw.u32(_SMALLEST_SCALE_EXPONENT << 23)

    # ---- values

    def pack_weights(self, low: Reg, high: Reg) -> list[Reg]:
        """P as float16 times 2**5; it meets each 128 dims' scales in `add_values`."""
        power = 2.0**_HEADROOM
        return [hw.f16x2(low * power, high * power)]

    def add_values(self, state: State, weights: list[list[Reg]], tile: Reg, offset: int) -> State:
        """P times the token's scale of each 128 dims, times V."""
        assert state.scale is not None
        blocks, team_size = range(self.tiling.head_blocks), self.tiling.team_size
        inverse_scale = hw.as_f32(((2 * 127 + _HEADROOM) << 23) - state.scale)
        groups = _NUM_TILES // team_size  # 128-dim groups of this warp
        acc = [list(fragment) for fragment in state.acc]
        scale_rows = tile + self.c * (2 * _ROW) + self.member * (4 * groups)
        scales = [
            hw.load_shared_f32(scale_rows, offset + token * _ROW + _SCALES_OFFSET, words=groups)
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
                [hw.multiply_f16x2(b[0], low), hw.multiply_f16x2(b[1], high)] for b in weights
            ]
            for quarter in range(4):
                # Bytes of a loaded register: token t dims d, d+1; token t+1 dims d, d+1. The
                # permutation brings the tokens of one dim side by side.
                bytes_ = hw.load_matrices_transposed(
                    matrix_rows, offset + 128 * group + 32 * quarter
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

    def output_unit(self, state: State) -> Reg:
        """The running scale, and both powers of two of the float16 operands."""
        assert state.scale is not None
        return hw.as_f32(state.scale) * 2.0 ** (-2 * _HEADROOM)

    def dim_pairs(self, fragment: list[Reg]) -> tuple[Reg, list[list[Reg]]]:
        """Rows g and g + 8 of the fragment are dims 2 g and 2 g + 1 of the block."""
        return self.g * 2, [[fragment[0], fragment[2]], [fragment[1], fragment[3]]]
