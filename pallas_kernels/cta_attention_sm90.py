"""What the CTAs of the attention kernels have in common: who defines what, rows and queries.

A CTA takes some *columns*, query vectors that attend to the same keys, over lists of cache rows.
How it does that is `WarpAttention`'s (few columns) or `WarpgroupAttention`'s (64) matter; which
rows, where queries lie and where results go is the kernel's that derives from one of them.
"""

import abc
import math
from collections.abc import Iterator

from pallas_kernels import hopper as hw
from pallas_kernels import layout
from pallas_kernels.hopper import Reg

ROW_TILE = 16
"""Cache rows that a warp gathers, or takes scores of, at a time."""

_LARGEST_QUERY_EXPONENT = 14
SMALLEST_QUERY_EXPONENT = _LARGEST_QUERY_EXPONENT + 1
"""Biased by 127; see `query_powers`."""


class CtaAttention(abc.ABC):
    """The code of one CTA, as far as it does not depend on how the CTA divides its work.

    Attributes:
      thread, lane, warp, g, c: this thread's place; lane = 4 g + c.
      row_warp: which 16 rows of a round are this warp's.
      first_column: the CTA's first query column, of `num_columns` in all; columns beyond are
        computed as zeros and not stored.
    """

    row_warp: Reg

    def __init__(
        self,
        *,
        smem: Reg,
        kv_cache: Reg,
        num_slots: int,
        rows_per_copy: int,
        num_columns: int,
        first_column: Reg,
        sm_scale: float,
    ) -> None:
        """See the class.

        Args:
          smem: shared memory of the tiling's `smem_bytes`, at a multiple of 1024.
          kv_cache: address of the cache's first row.
          num_slots: rows of the cache; other slots name nothing.
          rows_per_copy: rows, from a multiple of it in a tile on, that are neighbors in the cache:
            1, 2, 4, 8 or 16. Their valid ones come first.
          num_columns: query columns of the whole problem.
          first_column: the first one of this CTA.
          sm_scale: the factor of the scores.
        """
        self.smem, self.kv_cache = smem, kv_cache
        self.num_slots, self.rows_per_copy, self.sm_scale = num_slots, rows_per_copy, sm_scale
        self.num_columns, self.first_column = num_columns, first_column

        self.thread = hw.thread_index()
        self.lane = self.thread & 31
        self.warp = hw.warp_index()
        self.g, self.c = self.lane >> 2, self.lane & 3

    # ---- what a kernel defines

    @abc.abstractmethod
    def load_slot(self, t: Reg | int) -> Reg:
        """This lane's cache slot in the warp's 16 rows of round t, lanes 16-31 as 0-15.

        -1, or anything outside of the cache, for none. Called ahead of the rows' copy, and for
        rounds beyond the last.
        """

    @abc.abstractmethod
    def query_address(self, column: Reg) -> Reg:
        """Where the column's 576 bfloat16 values lie; a CTA's columns follow each other.

        A multiple of 16 bytes: queries are copied in bulk.
        """

    @abc.abstractmethod
    def load_sink(self, column: Reg) -> Reg | None:
        """The column's float32 attention sink, -inf or None for none (partial results, too)."""

    @abc.abstractmethod
    def store_lse(self, column: Reg, lse: Reg) -> None:
        """Stores the natural log of the column's sum of exponentials."""

    @abc.abstractmethod
    def store_out(self, column: Reg, dim: Reg, pair: list[Reg], offset: int = 0) -> None:
        """Stores the column's output at `dim` and `dim + 1`, or `offset` elements behind these."""

    # ---- what they share

    def validity(self, slot: Reg) -> tuple[Reg, Reg]:
        """Whether this lane's slot lies in the cache (0 or 1), and the warp's mask of it.

        One unsigned comparison refuses -1, other negative numbers and slots beyond the end.
        """
        inside = slot < min(self.num_slots, 2**31)
        return hw.select(inside, hw.u32(1), hw.u32(0)), hw.ballot(inside)

    def load_query(self, column: Reg) -> list[list[Reg]]:
        """A column of the CTA: 8 dims per 16 bytes and lane, of the latent twice, then of RoPE.

        72 pieces: two per lane, and lanes 0-7 a third; the others repeat one harmlessly.
        """
        row = self.query_address(hw.minimum(self.first_column + column, self.num_columns - 1))
        address = hw.element_address(row, self.lane, 16)
        last = hw.element_address(row, self.lane & 7, 16)
        return [
            hw.load_global(address, words=4),
            hw.load_global(address, 512, words=4),
            hw.load_global(last, 1024, words=4),
        ]

    def visible(self, scores: list[list[Reg]], mask: Reg, t: Reg) -> list[list[Reg]]:
        """Scores `[block][4]` of the warp's rows of round t, -inf for keys that are not seen.

        `mask` has the bits of the rows whose slots are valid.
        """
        del t
        valid = [(mask >> (self.g + 8 * r) & 1).ne(0) for r in range(2)]
        return [
            [hw.select(valid[i // 2], x, hw.f32(-math.inf)) for i, x in enumerate(block)]
            for block in scores
        ]


def query_exponent(pieces: list[list[Reg]]) -> Reg:
    """The exponent, biased by 127, of a query's largest value; 255 where a value is not finite.

    Args:
      pieces: the query's bfloat16 pairs, over the lanes of a warp.
    """
    largest = hw.u32(0)
    for piece in pieces:
        for word in piece:
            largest = hw.maximum_u16x2(largest, word & 0x7FFF7FFF)
    return hw.reduce_max_u32(hw.maximum_u32(largest & 0xFFFF, largest >> 16)) >> 7


def query_powers(exponent: Reg) -> tuple[Reg, Reg]:
    """The power of two that brings values of this exponent to 2**14 .. 2**15, and its inverse.

    Exponents are not below `SMALLEST_QUERY_EXPONENT`: smaller ones have no such inverse.
    """
    power = hw.as_f32((2 * 127 + _LARGEST_QUERY_EXPONENT - exponent) << 23)
    return power, hw.as_f32((exponent - _LARGEST_QUERY_EXPONENT) << 23)


def scale_query(pieces: list[list[Reg]], exists: Reg) -> tuple[Iterator[list[Reg]], Reg]:
    """Brings a query to float16's range by a power of two.

    Args:
      pieces: the query's bfloat16 pairs, over the lanes of a warp; the last piece is RoPE.
      exists: whether there is such a column; others become zeros.

    Returns:
      The pieces times the power, float16 pairs, RoPE bfloat16; computed as they are taken. And the
      power's inverse.
    """
    exponent = hw.maximum_u32(query_exponent(pieces), SMALLEST_QUERY_EXPONENT)
    power, undo = query_powers(exponent)
    return scaled_query(pieces, hw.select(exists, power, hw.f32(0.0))), undo


def scaled_query(pieces: list[list[Reg]], power: Reg) -> Iterator[list[Reg]]:
    """The pieces times a power of two, float16 pairs, RoPE bfloat16; computed as they are taken."""
    for part, piece in enumerate(pieces):
        pack = hw.bf16x2 if part == len(pieces) - 1 else hw.f16x2
        pairs = map(hw.bf16x2_to_f32, piece)
        yield [pack(low * power, high * power) for low, high in pairs]


def copy_rows(
    kv_cache: Reg,
    slot: Reg,
    valid: Reg,
    mask: Reg,
    *,
    destination: Reg,
    barrier: Reg,
    rows_per_copy: int,
    row_bytes: int = layout.FP8_ROW_BYTES,
) -> None:
    """Starts copying a warp's 16 cache rows to shared memory; those of no key become zeros.

    Zeros, so that what a masked token's weight of 0 multiplies is never a NaN.

    Args:
      kv_cache: address of the cache's first row.
      slot: this lane's slot, lanes 16-31 as 0-15.
      valid: 1 where it lies in the cache, else 0; `mask` has a bit of it per lane.
      destination: where this lane's row goes.
      barrier: an mbarrier that expects one arrival of the warp; the rows' bytes count, too.
      rows_per_copy: as for `CtaAttention`; 1 if the rows do not follow each other in shared memory.
      row_bytes: bytes of a row.
    """
    lane = hw.thread_index() & 31
    owner = lane < ROW_TILE
    with hw.when(mask.ne(0xFFFFFFFF)):
        with hw.when(owner & valid.eq(0)):
            zeros = [hw.u32(0)] * 4
            for offset in range(0, row_bytes, 16):
                hw.store_shared(destination, zeros, offset)
            hw.fence_async_proxy()
        hw.warp_sync()
    with hw.when(lane.eq(0)):
        num_rows = hw.population_count(mask & 0xFFFF)
        hw.mbarrier_arrive_expect(barrier, num_rows * row_bytes)
    num_bytes: int | Reg = row_bytes
    if rows_per_copy > 1:
        owner = owner & (lane & (rows_per_copy - 1)).eq(0)
        copied = mask >> lane & ((1 << rows_per_copy) - 1)
        num_bytes = hw.population_count(copied) * row_bytes
    with hw.when(owner & valid.ne(0)):
        source = hw.element_address(kv_cache, slot, row_bytes)
        hw.copy_row_to_shared(destination, source, num_bytes, barrier)
