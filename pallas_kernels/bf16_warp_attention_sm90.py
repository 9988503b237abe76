"""`WarpAttention` over bfloat16 rows: 576 values, the latent's 512 first, ready for the MMAs.

No value of a row is converted or scaled. Its bytes are 1.76 times those of `fp8_ds_mla`, and memory
binds up to 32 columns.

Fragments (`hopper` has the MMA's own picture; lane = 4 g + c)
---------
    K   as A operand   16 consecutive bytes of rows g, g + 8 are two k-steps: their dims are
                       whatever lies there, and Q is stored to match
    V^T as A operand   `ldmatrix.trans`: dims g and g + 8 of a 16-dim block; tokens 2c, 2c + 1, +8
    O^T                the dims of V^T; where results are stored, the lanes of neighboring dims
                       trade half of what they hold

Numbers
-------
- Q and K are bfloat16 as given, scores float32. With 8 columns there is one accumulator for even
  k-steps and one for odd ones: two chains of dependent MMAs side by side, as more columns have.
- P meets V as the sum of two bfloat16 numbers, 16 bits of it, in two MMAs. As one of 8 bits, it
  would put outputs up to 1.4 times the project's tolerance off FlashMLA's own (a NumPy model on the
  files in tests/data; 0.9 times with two, and 0.25 off exact outputs).
"""

import functools
import operator

from pallas_kernels import hopper as hw
from pallas_kernels import layout
from pallas_kernels.hopper import Reg
from pallas_kernels.warp_attention_sm90 import (
    DIM_BLOCK,
    HEAD_BLOCK,
    QUERY_BYTES,
    State,
    WarpAttention,
)

_CHUNKS = 2 * layout.LATENT_DIM // 128  # of 64 dims


class Bf16WarpAttention(WarpAttention):
    """A CTA of 8 to 32 columns over bfloat16 rows."""

    # ---- queries

    def store_queries(self, loaded: list[list[list[Reg]]]) -> None:
        """Stores the queries as they are: piece j, dims 8 j .. 8 j + 7, is half of a k-step pair.

        Unit 2 i + h holds, for lane (column, c), dims 64 i + 16 c + 8 h .. + 7: what that lane
        reads of a key.
        """
        tiling = self.tiling
        for i, pieces in enumerate(loaded):
            column = self.warp + i * tiling.num_warps  # within the tile
            exists = self.first_column + column < self.num_columns
            block = self.smem + self.at.queries + (column // HEAD_BLOCK) * QUERY_BYTES
            column_offset = (column % HEAD_BLOCK) * 64
            for part, piece in enumerate(pieces):
                # Lanes 8-31 repeat the last 8 pieces.
                j = self.lane + 32 * part if part < 2 else (self.lane & 7) + 64
                unit, piece_lane = (j >> 3) * 2 + (j & 1), (j >> 1) & 3
                words = [hw.select(exists, word, hw.u32(0)) for word in piece]
                hw.store_shared(block + unit * 512 + column_offset + piece_lane * 16, words)

    # ---- scores

    def scores(self, stage: Reg, mask: Reg, t: Reg) -> tuple[list[list[Reg]], None]:
        """All 576 dims, in chunks of 64: 128 consecutive bytes of a row, 32 of them a lane's."""
        tiling, blocks = self.tiling, range(self.tiling.head_blocks)
        keys = self.rows + stage * tiling.tile_bytes + self.g * tiling.row_stride + self.c * 32
        queries = self.smem + self.at.queries + self.lane * 16
        chains = 2 if tiling.head_blocks == 1 else 1
        partial = [[[hw.f32(0.0)] * 4 for _ in blocks] for _ in range(chains)]
        for i in range(_CHUNKS):
            for half in range(2):
                rows = [
                    hw.load_shared(keys, r * 8 * tiling.row_stride + 128 * i + 16 * half)
                    for r in range(2)
                ]
                unit = 2 * i + half
                q = [hw.load_shared(queries, n * QUERY_BYTES + unit * 512) for n in blocks]
                for s in range(2):
                    a = [rows[0][2 * s], rows[1][2 * s], rows[0][2 * s + 1], rows[1][2 * s + 1]]
                    for n in blocks:
                        b = q[n][2 * s : 2 * s + 2]
                        acc = partial[s % chains]
                        acc[n] = hw.mma_m16n8k16(acc[n], a, b, "bf16")
        factor = self.sm_scale * hw.LOG2_E
        result = [
            [functools.reduce(operator.add, terms) * factor for terms in zip(*block, strict=True)]
            for block in zip(*partial, strict=True)
        ]
        return self.visible(result, mask, t), None

    def smallest_scale(self) -> None:
        """There are no scales."""

    # ---- values

    def pack_weights(self, low: Reg, high: Reg) -> list[Reg]:
        """P in bfloat16, and what that leaves."""
        rounded = hw.bf16x2(low, high)
        rounded_low, rounded_high = hw.bf16x2_to_f32(rounded)
        return [rounded, hw.bf16x2(low - rounded_low, high - rounded_high)]

    def add_values(self, state: State, weights: list[list[Reg]], tile: Reg, offset: int) -> State:
        """Both terms of P times V as it is."""
        tiling, blocks = self.tiling, range(self.tiling.head_blocks)
        dims = layout.KV_LORA_RANK // tiling.team_size  # of this warp
        # Lane -> address of a row of one of the four 8 x 8 matrices of [16 tokens, 16 dims].
        matrix_rows = (
            tile
            + (self.lane & 15) * tiling.row_stride
            + (self.lane >> 4) * 16
            + self.member * (2 * dims)
        )
        acc = [list(fragment) for fragment in state.acc]
        # The MMAs of a block's terms depend on each other: with 8 columns, two blocks alternate.
        width = 2 if tiling.head_blocks == 1 else 1
        for first in range(0, dims // DIM_BLOCK, width):
            values = []
            for i in range(first, first + width):
                a0, a2, a1, a3 = hw.load_matrices_transposed(
                    matrix_rows, offset + 2 * DIM_BLOCK * i
                )
                values.append([a0, a1, a2, a3])
            for term in range(tiling.weight_terms):
                for i, a in enumerate(values, first):
                    for n in blocks:
                        b = weights[n][2 * term : 2 * term + 2]
                        acc[i][n] = hw.mma_m16n8k16(acc[i][n], a, b, "bf16")
        return state._replace(acc=acc)

    def output_unit(self, state: State) -> Reg:
        """1: nothing was scaled."""
        del state
        return hw.f32(1.0)

    def dim_pairs(self, fragment: list[Reg]) -> tuple[Reg, list[list[Reg]]]:
        """Rows g and g + 8 of the fragment are dims g and g + 8 of the block.

        Lanes of an even g and the next one trade: the first gets dims g, g + 1 of both, the second
        dims g + 7, g + 8.
        """
        is_even = (self.g & 1).eq(0)
        dim = hw.select(is_even, self.g, self.g + 7)
        pairs = []
        for own_low, own_high in zip(fragment[:2], fragment[2:], strict=True):
            other = hw.shuffle_xor(hw.select(is_even, own_high, own_low), 4)
            pairs.append([hw.select(is_even, own_low, other), hw.select(is_even, other, own_high)])
        return dim, pairs
