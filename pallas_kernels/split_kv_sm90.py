"""Division of the keys of a ragged batch among CTAs, on the device, and the merge of the parts.

Sequences of very different lengths are cut where that evens out the work: no CTA of a persistent
grid has much more to do than another. Nothing is planned on the host, and no plan is passed around:
every warp reads all lengths and finds the share of its CTA with a few warp-wide operations.

Plan
----
A sequence's keys are counted in *units*, the keys that a CTA takes per round of its main loop:
`n[b] = ceil(len[b] / tokens_per_unit)`. Sequences stand in a row; sequence b begins at `S[b]`, and
CTA c works at the positions `[c P, (c + 1) P)`. There are two ways to choose S and P:

    even      S[b] = sum(n[i] + F for i < b if n[i])    P = ceil(S[batch] / num_ctas)
    regular   S[b] = b m P                              P = ceil(max(n) / m)

F is the cost of a segment (start, merge of the CTA's warps) in units: a sequence's first F
positions stand for it. Regular gives each sequence m = num_ctas // batch CTAs, or, when there are
more sequences than CTAs, each CTA ceil(batch / num_ctas) of them (S[b] = b max(n)). It is taken
where its P is not more than 1/16 above the even one: for lengths that are about equal it leaves
most sequences whole.

A *segment* is what a CTA does of one sequence. A whole sequence is a final result. A part is stored
as a float32 partial: a CTA has at most one that goes on (slot 2 c + 1) and one that was begun
before (slot 2 c), however large the batch is.

Merge
-----
`merge_segments_sm90` runs behind. The CTA that begins a sequence leaves its first CTA and number of
segments in `segments`, and a CTA per (sequence, column) adds them up; sequences of one segment are
done already, empty ones become 0 and -inf here. No atomics, one fixed order: bitwise deterministic.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper as hw
from pallas_kernels import layout
from pallas_kernels.hopper import Reg
from pallas_kernels.varying import as_varying_as

_LOADS_IN_FLIGHT = 4
# "Even" may be this part better than "regular" and still not be worth its splits.
_TOLERANCE = 16

_MERGE_WARPS = 4
_MERGE_UNROLL = 4
_WARP_DIMS = 4 * hw.WARP
# At 72 registers a thread, as many CTAs as run at once.
_MERGE_CTAS = 7 * hw.NUM_SMS


class Segment(NamedTuple):
    """The part of one sequence that a CTA does."""

    request: Reg
    kv_len: Reg  # as given, negative ones as 0: causality counts from it
    length: Reg  # keys that exist: `kv_len`, or what the page table can hold
    first_unit: Reg
    num_units: Reg
    first_round: Reg  # units of the CTA's segments before this one
    ordinal: Reg  # the CTA's segments before this one
    final: Reg  # it is the whole sequence
    partial: Reg  # it is not
    slot: Reg  # where a partial result goes, 0 .. 2 num_ctas - 1


class _Lane(NamedTuple):
    """What a lane knows of its block of sequences."""

    cost: Reg
    longest: Reg


@dataclasses.dataclass(frozen=True)
class WorkSplit:
    """The division of a batch's keys; module docstring.

    Attributes:
      batch: sequences.
      capacity: keys that a sequence's page table can hold.
      tokens_per_unit: keys of a CTA's round.
      num_ctas: CTAs that share the work.
      segment_cost: fixed cost of a segment, in units.
    """

    batch: int
    capacity: int
    tokens_per_unit: int
    num_ctas: int
    segment_cost: int

    @property
    def ctas_per_sequence(self) -> int:
        """CTAs of a sequence in a regular plan, where the batch is not larger than the grid."""
        return max(1, self.num_ctas // self.batch)

    @property
    def num_slots(self) -> int:
        """Partial results that there can be."""
        return 2 * self.num_ctas

    def for_each_segment(
        self,
        kv_lens: Reg,
        segments: Reg,
        cta: Reg,
        body: Callable[[Segment], None],
        writer: int = 0,
    ) -> None:
        """Calls `body` in a loop over the segments of `cta`; every warp must call this.

        It has no barrier, so that the roles of a CTA may each call it for themselves.

        Args:
          kv_lens: address of the int32 lengths.
          segments: address of int32 [batch, 2], written for `merge_segments_sm90`.
          cta: 0 .. num_ctas - 1.
          body: builds the code of one segment; control flow around it is the same in every warp.
          writer: the thread that writes `segments`.
        """
        lane = hw.thread_index() & 31
        block = -(-self.batch // hw.WARP)  # sequences per lane, one after the other
        mine = self._survey(kv_lens, lane * block, block)
        total = hw.reduce_add_u32(mine.cost)
        longest = hw.maximum_u32(hw.reduce_max_u32(mine.longest), 1)

        even_share = hw.maximum_u32((total + (self.num_ctas - 1)) // self.num_ctas, 1)
        if self.batch <= self.num_ctas:
            regular_share = (longest + (self.ctas_per_sequence - 1)) // self.ctas_per_sequence
            stride = regular_share * self.ctas_per_sequence
        else:
            regular_share = longest * -(-self.batch // self.num_ctas)
            stride = longest
        is_even = regular_share > even_share + even_share // _TOLERANCE
        share = hw.select(is_even, even_share, regular_share)
        cost = hw.select(is_even, hw.u32(self.segment_cost), hw.u32(0))
        begin = cta * share
        end = begin + share

        def first_of_even() -> list[Reg]:
            return self._find(kv_lens, lane, block, mine.cost, begin)

        # `begin // stride`, without a division where it would delay small batches.
        request = cta // self.ctas_per_sequence if self.batch <= self.num_ctas else begin // stride
        request, position = hw.cond(is_even, first_of_even, [request, request * stride])

        def one_sequence(carry: list[Reg]) -> list[Reg]:
            request, position, first_round, ordinal = carry
            kv_len, length = self._load_length(kv_lens, request)
            units = self._units(length)
            start = position + cost  # of its first unit
            zero = hw.u32(0)
            first = hw.select(begin > start, begin - start, zero)
            last = hw.select(end > start, hw.minimum(end - start, units), zero)
            num_units = hw.select(last > first, last - first, zero)
            with hw.when(num_units.ne(0)):
                is_first, is_last = first.eq(0), last.eq(units)
                body(
                    Segment(
                        request=request,
                        kv_len=kv_len,
                        length=length,
                        first_unit=first,
                        num_units=num_units,
                        first_round=first_round,
                        ordinal=ordinal,
                        final=is_first & is_last,
                        partial=first.ne(0) | last.ne(units),
                        slot=cta * 2 + hw.select(is_first, hw.u32(1), zero),
                    )
                )
                # Last, since divisions take their time. Every column group of the CTA writes it.
                with hw.when(is_first & hw.thread_index().eq(writer)):
                    count = (start + units - 1) // share - start // share + 1
                    hw.store_global(hw.element_address(segments, request, 8), [cta, count])
            own = hw.select(units.ne(0), units + cost, zero)
            position = position + hw.select(is_even, own, stride)
            ordinal = ordinal + hw.select(num_units.ne(0), hw.u32(1), zero)
            return [request + 1, position, first_round + num_units, ordinal]

        hw.while_loop(
            lambda carry: (carry[0] < self.batch) & (carry[1] < end),
            one_sequence,
            [request, position, hw.u32(0), hw.u32(0)],
        )

    def _load_length(self, kv_lens: Reg, request: Reg) -> tuple[Reg, Reg]:
        """A sequence's `kv_len` and `length`."""
        (kv_len,) = hw.load_global(hw.element_address(kv_lens, request, 4))
        kv_len = hw.select((kv_len >> 31).ne(0), hw.u32(0), kv_len)
        return kv_len, hw.minimum(kv_len, min(self.capacity, 2**31 - 1))

    def _units(self, length: Reg) -> Reg:
        return (length + (self.tokens_per_unit - 1)) // self.tokens_per_unit

    def _cost(self, kv_lens: Reg, request: Reg, exists: Reg) -> _Lane:
        _, length = self._load_length(kv_lens, hw.minimum(request, self.batch - 1))
        units = hw.select(exists, self._units(length), hw.u32(0))
        cost = hw.select(units.ne(0), units + self.segment_cost, hw.u32(0))
        return _Lane(cost, units)

    def _survey(self, kv_lens: Reg, first: Reg, count: int) -> _Lane:
        """Sum of the costs and maximum of the units of a lane's sequences."""

        def some(i: Reg | int, carry: list[Reg], width: int) -> list[Reg]:
            cost, longest = carry
            for j in range(width):
                request = first + (i * width + j)
                exists = request < self.batch
                if count % width:
                    exists = exists & (hw.u32(0) + (i * width + j) < count)
                found = self._cost(kv_lens, request, exists)
                cost, longest = cost + found.cost, hw.maximum_u32(longest, found.longest)
            return [cost, longest]

        init = [hw.u32(0), hw.u32(0)]
        if count <= _LOADS_IN_FLIGHT:
            return _Lane(*some(0, init, count))
        bound = hw.u32(-(-count // _LOADS_IN_FLIGHT))
        return _Lane(*hw.for_loop(bound, init, lambda i, c: some(i, c, _LOADS_IN_FLIGHT)))

    def _find(self, kv_lens: Reg, lane: Reg, block: int, cost: Reg, begin: Reg) -> list[Reg]:
        """The first sequence that ends behind `begin`, and where it starts; even plan."""
        cumulative = hw.cumulative_sum_u32(cost)
        owner = hw.population_count(hw.ballot(begin >= cumulative))
        before = hw.shuffle_index(cumulative - cost, hw.minimum(owner, hw.WARP - 1))
        first = owner * block
        if block == 1:
            return [first, before]

        def chunk(i: Reg, carry: list[Reg]) -> list[Reg]:
            count, start, position = carry
            local = i * hw.WARP + lane
            request = first + local
            exists = (local < block) & (request < self.batch)
            own = self._cost(kv_lens, request, exists).cost
            is_before = exists & (begin >= position + hw.cumulative_sum_u32(own))
            passed = hw.reduce_add_u32(hw.select(is_before, own, hw.u32(0)))
            count = count + hw.population_count(hw.ballot(is_before))
            return [count, start + passed, position + hw.reduce_add_u32(own)]

        init = [hw.u32(0), before, before]
        count, start, _ = hw.for_loop(hw.u32(-(-block // hw.WARP)), init, chunk)
        return [first + count, start]


def merge_segments_sm90(
    out: jax.Array,
    lse: jax.Array,
    partial_out: jax.Array,
    partial_lse: jax.Array,
    kv_lens: jax.Array,
    segments: jax.Array,
    attn_sink: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Completes what the segments of `WorkSplit` left; to be called under `jax.jit`.

    Args:
      out: bfloat16 `[batch, columns, 512]`, in which whole sequences are final; as a kernel returns
        it, since inside `jax.shard_map` a ref cannot have a varying type.
      lse: float32 `[batch, columns]`, likewise.
      partial_out: float32 `[slots, columns, 512]`, normalized.
      partial_lse: float32 `[slots, columns]`.
      kv_lens: int32 `[batch]`.
      segments: int32 `[batch, 2]`: a sequence's first CTA and its number of segments; anything
        where it has no keys.
      attn_sink: float32 `[heads]`; a column's head is the column modulo heads.

    Returns:
      `out` and `lse` with the sequences of several segments merged, and 0 and -inf for those
      without a key.
    """
    batch, num_columns, dim = out.shape
    # Warps of a CTA share the segments where there are few columns, and so perhaps many segments;
    # otherwise the dims.
    chunks = dim // _WARP_DIMS if batch * num_columns * dim // _WARP_DIMS <= _MERGE_CTAS else 1
    ctas_per_request = min(num_columns, max(1, _MERGE_CTAS // (batch * chunks)))
    ctas_per_request = -(-num_columns // -(-num_columns // ctas_per_request))
    operands: dict[str, jax.Array] = {
        "partial_out": partial_out,
        "partial_lse": partial_lse,
        "kv_lens": kv_lens,
        "segments": segments,
    }
    if attn_sink is not None:
        operands["sink"] = attn_sink.astype(jnp.float32)
    # A mutable ref, unlike an output, keeps what the kernel does not write.
    results = [jax.new_ref(x, memory_space=plgpu.GMEM) for x in (out, lse)]
    names = ("out", "lse", *operands, "smem")
    num_heads = num_columns if attn_sink is None else attn_sink.shape[0]

    def merge_segments_kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def cta(ctx: Any, *args: Any) -> None:
            del ctx
            *values, program = args
            _merge_cta(
                dict(zip(names, values, strict=True)),
                Reg(program.registers.item()),
                num_columns=num_columns,
                num_heads=num_heads,
                chunks=chunks,
                ctas_per_request=ctas_per_request,
            )

        # Launched while the kernel before ends, which saves 1.7 us of 32 x 4,096 keys (H100, 16
        # heads); waits here until all of its results are visible.
        plgpu.griddepcontrol_wait()
        cta(*refs, lax.axis_index("cta").astype(jnp.int32))

    plgpu.kernel(
        merge_segments_kernel,
        scratch_types=[plgpu.SMEM((_MERGE_WARPS * _WARP_DIMS * 4,), jnp.uint8)],
        grid=(batch * ctas_per_request * chunks,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
    )(*results, *operands.values())
    out, lse = (as_varying_as(jax.freeze(x), operands.values()) for x in results)
    return out, lse


def _merge_cta(
    refs: dict[str, Any],
    program: Reg,
    *,
    num_columns: int,
    num_heads: int,
    chunks: int,
    ctas_per_request: int,
) -> None:
    """One sequence, every `ctas_per_request`-th column, `1 / chunks` of the output's dims.

    A warp adds up 128 dims: of all segments, or of every fourth where `chunks` leaves all warps the
    same dims.
    """
    address = {name: hw.global_address(ref) for name, ref in refs.items() if name != "smem"}
    smem = hw.shared_address(refs["smem"])
    warp, lane = hw.warp_index(), hw.thread_index() & 31
    chunk, program = program % chunks, program // chunks
    request, first_column = program // ctas_per_request, program % ctas_per_request
    sharers = _MERGE_WARPS if chunks > 1 else 1  # warps that share segments
    zero = hw.u32(0)
    first_segment = warp if sharers > 1 else zero
    dim = (chunk if sharers > 1 else warp) * _WARP_DIMS + lane * 4

    (kv_len,) = hw.load_global(hw.element_address(address["kv_lens"], request, 4))
    first_cta, count = hw.load_global(hw.element_address(address["segments"], request, 8), words=2)
    is_empty = kv_len.eq(0) | (kv_len >> 31).ne(0)
    count = hw.select(is_empty, zero, count)
    first_cta = hw.select(is_empty, zero, first_cta)
    last = hw.maximum_u32(count, 1) - 1

    def partial_row(segment: Reg, column: Reg) -> Reg:
        slot = (first_cta + segment) * 2 + hw.select(segment.eq(0), hw.u32(1), zero)
        return slot * num_columns + column

    def load_lse(segment: Reg, column: Reg) -> Reg:
        row = partial_row(hw.minimum(segment, last), column)
        (value,) = hw.load_global(hw.element_address(address["partial_lse"], row, 4))
        return hw.select(segment < count, hw.as_f32(value), hw.f32(-math.inf))

    def load_parts(i: Reg, column: Reg) -> list[list[Reg]]:
        """This warp's i-th few segments: lse and four dims of each."""
        loaded = []
        for j in range(_MERGE_UNROLL):
            segment = (i * _MERGE_UNROLL + j) * sharers + first_segment
            row = partial_row(hw.minimum(segment, last), column)
            row = hw.element_address(address["partial_out"], row, 4 * layout.KV_LORA_RANK)
            part = map(hw.as_f32, hw.load_global(row + hw.u64(dim * 4), words=4))
            loaded.append([load_lse(segment, column), *part])
        return loaded

    def merge_column(column: Reg) -> None:
        # On their way while the weights are made; most sequences have no more segments than these.
        parts = load_parts(zero, column)
        rounds = (count + (hw.WARP - 1)) // hw.WARP

        def see(i: Reg, carry: list[Reg]) -> list[Reg]:
            maximum, denominator = carry
            lse = load_lse(i * hw.WARP + lane, column)
            higher = hw.maximum(maximum, lse)
            return [higher, hw.fma(denominator, power(maximum, higher), power(lse, higher))]

        def power(lse: Reg, maximum: Reg) -> Reg:
            return hw.exp2((lse - maximum) * hw.LOG2_E)

        def warp_reduce(function: Callable[[Reg, Reg], Reg], x: Reg) -> Reg:
            for distance in (1, 2, 4, 8, 16):
                x = function(x, hw.shuffle_xor(x, distance))
            return x

        own_maximum, own = hw.for_loop(rounds, [hw.f32(hw.NO_MAXIMUM), hw.f32(0.0)], see)
        maximum = warp_reduce(hw.maximum, own_maximum)
        denominator = warp_reduce(lambda a, b: a + b, own * power(own_maximum, maximum))

        def add(total: list[Reg], parts: list[list[Reg]]) -> list[Reg]:
            for lse, *part in parts:
                factor = power(lse, maximum)
                total = [hw.fma(x, factor, a) for x, a in zip(part, total, strict=True)]
            return total

        step = _MERGE_UNROLL * sharers
        total = hw.for_loop(
            (hw.maximum_u32(count, step) - 1) // step,
            add([hw.f32(0.0)] * 4, parts),
            lambda i, total: add(total, load_parts(i + 1, column)),
        )
        if sharers > 1:
            hw.store_shared(smem + hw.thread_index() * 16, total)
            hw.cta_sync()
            total = hw.load_shared_f32(smem + lane * 16)
            for other in range(1, sharers):
                part = hw.load_shared_f32(smem + lane * 16, other * hw.WARP * 16)
                total = [a + b for a, b in zip(total, part, strict=True)]
            hw.cta_sync()

        normalizer = denominator
        if "sink" in address:
            (sink,) = hw.load_global(hw.element_address(address["sink"], column % num_heads, 4))
            normalizer = denominator + hw.exp2((hw.as_f32(sink) - maximum) * hw.LOG2_E)
        inverse = hw.reciprocal(normalizer)
        # Without a key, `total` is 0 times whatever lies in the first slot.
        total = [hw.select(denominator > 0.0, x * inverse, hw.f32(0.0)) for x in total]
        row = request * num_columns + column
        with hw.when(first_segment.eq(0)):
            target = hw.element_address(address["out"], row, 2 * layout.KV_LORA_RANK)
            hw.store_global(
                target + hw.u64(dim * 2), [hw.bf16x2(*total[:2]), hw.bf16x2(*total[2:])]
            )
        with hw.when(hw.thread_index().eq(0) & chunk.eq(0)):
            value = maximum + hw.log2(denominator) * hw.LN_2
            hw.store_global(hw.element_address(address["lse"], row, 4), [value])

    def one_column(i: Reg, carry: list[Reg]) -> list[Reg]:
        merge_column(first_column + i * ctas_per_request)
        return carry

    with hw.when(count.ne(1)):
        hw.for_loop((num_columns - 1 - first_column) // ctas_per_request + 1, [], one_column)
