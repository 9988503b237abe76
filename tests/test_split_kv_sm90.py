"""The division of a ragged batch's keys: a model of it in Python, and the GPU's agreement."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper as hw
from pallas_kernels.split_kv_sm90 import WorkSplit, merge_segments_sm90
from tests import oracle
from tests.emulator import emulated
from tests.helpers import assert_attention_close

FIELDS = ("request", "first_unit", "num_units", "first_round", "final", "slot")


def model(split, kv_lens):
    """Every CTA's segments as tuples of `FIELDS`, and each sequence's (first CTA, segments)."""
    lengths = [min(max(0, int(length)), split.capacity) for length in kv_lens]
    units = [math.ceil(length / split.tokens_per_unit) for length in lengths]
    costs = [n + split.segment_cost if n else 0 for n in units]
    longest = max(1, *units)
    even_share = max(1, math.ceil(sum(costs) / split.num_ctas))
    if split.batch <= split.num_ctas:
        share = math.ceil(longest / (split.num_ctas // split.batch))
        stride = share * (split.num_ctas // split.batch)
    else:
        share, stride = longest * math.ceil(split.batch / split.num_ctas), longest
    starts = [b * stride for b in range(split.batch)]
    if share > even_share + even_share // 16:
        share = even_share
        starts = (np.cumsum(costs) - costs + split.segment_cost).tolist()

    segments = [[] for _ in range(split.num_ctas)]
    owners = {}
    for b, (start, n) in enumerate(zip(starts, units, strict=True)):
        if not n:
            continue
        ctas = range(start // share, (start + n - 1) // share + 1)
        owners[b] = (ctas.start, len(ctas))
        for cta in ctas:
            first = max(0, cta * share - start)
            last = min(n, (cta + 1) * share - start)
            before = sum(s[2] for s in segments[cta])
            final, slot = len(ctas) == 1, 2 * cta + (first == 0)
            segments[cta].append((b, first, last - first, before, int(final), slot))
    return segments, owners


def random_lengths(rng, batch, kind):
    if kind == "equal":
        return np.full(batch, 3000)
    if kind == "log-uniform":
        return np.exp(rng.uniform(0, np.log(16384), batch)).astype(int)
    if kind == "one long":
        return np.where(np.arange(batch) == batch // 2, 100_000, rng.integers(0, 200, batch))
    return rng.integers(-3, 4, batch) * 128 + rng.integers(-1, 2, batch)


KINDS = ("equal", "log-uniform", "one long", "edges")
BATCHES = (1, 2, 31, 32, 33, 100, 131, 132, 133, 264, 1000, 1025, 5000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("num_ctas", "segment_cost"), [(132, 1), (264, 0), (7, 3)])
def test_model_gives_every_unit_to_one_cta(kind, batch, num_ctas, segment_cost):
    lens = random_lengths(np.random.default_rng([batch, len(kind)]), batch, kind)
    split = WorkSplit(batch, 131_072, 128, num_ctas, segment_cost)
    segments, owners = model(split, lens)
    units = [-(-max(0, int(length)) // 128) for length in lens]
    found = sorted(s[:3] for cta in segments for s in cta)
    expected_next = {}
    for request, first, count in found:
        assert count > 0
        assert first == expected_next.get(request, 0), "in order and without gaps"
        expected_next[request] = first + count
    assert expected_next == {b: n for b, n in enumerate(units) if n}
    slots = [s[5] for cta in segments for s in cta if not s[4]]
    assert len(set(slots)) == len(slots)
    assert all(0 <= slot < split.num_slots for slot in slots)
    parts = [(s[0], cta) for cta, done in enumerate(segments) for s in done]
    for request, (first_cta, count) in owners.items():
        ctas = [cta for b, cta in parts if b == request] if count > 1 else [first_cta]
        assert ctas == list(range(first_cta, first_cta + count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCHES)
def test_model_divides_evenly(kind, batch):
    lens = random_lengths(np.random.default_rng([batch, len(kind)]), batch, kind)
    split = WorkSplit(batch, 131_072, 128, 132, 1)
    segments, _ = model(split, lens)
    work = [sum(s[2] for s in cta) for cta in segments]
    units = sum(-(-max(0, int(length)) // 128) for length in lens)
    fair = math.ceil((units + batch) / 132)
    assert max(work) <= fair + fair // 16


@pytest.mark.parametrize(
    ("batch", "splits"), [(1, 132), (8, 16), (32, 4), (64, 2), (128, 1), (256, 1)]
)
def test_equal_lengths_are_cut_alike(batch, splits):
    segments, owners = model(WorkSplit(batch, 131_072, 128, 132, 1), [131_072] * batch)
    units = 1024
    longest = max(sum(s[2] for s in cta) for cta in segments)
    assert longest == math.ceil(units / splits) * max(1, math.ceil(batch / 132))
    assert {count for _, count in owners.values()} == {math.ceil(units / math.ceil(units / splits))}


def recorded(split, kv_lens, most):
    """Every CTA's segments as the GPU finds them: int32 [ctas, most, fields], rest -1."""

    def kernel(kv_lens_gmem, out_gmem, segments_gmem):
        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 3, plgpu.Layout.WG_SPLAT))
        def inline(ctx, *args):
            del ctx
            lens, out, owners, cta = args
            cta = hw.Reg(cta.registers.item())
            row = hw.element_address(hw.global_address(out), cta, most * len(FIELDS) * 4)
            with hw.when(hw.thread_index().eq(0)):
                hw.for_loop(
                    hw.u32(most * len(FIELDS)),
                    [],
                    lambda i, c: (
                        hw.store_global(hw.element_address(row, i, 4), [hw.u32(-1)]),
                        c,
                    )[1],
                )

            def body(segment):
                with hw.when(hw.thread_index().eq(0)):
                    values = [getattr(segment, name) for name in FIELDS]
                    values[4] = hw.select(segment.final, hw.u32(1), hw.u32(0))
                    start = hw.element_address(row, segment.ordinal, len(FIELDS) * 4)
                    for i, value in enumerate(values):
                        hw.store_global(start, [value], 4 * i)

            addresses = map(hw.global_address, (lens, owners))
            split.for_each_segment(*addresses, cta, body)

        inline(kv_lens_gmem, out_gmem, segments_gmem, lax.axis_index("cta").astype(jnp.int32))

    shape = jax.ShapeDtypeStruct
    out, owners = plgpu.kernel(
        kernel,
        out_type=[
            shape((split.num_ctas, most, len(FIELDS)), jnp.int32),
            shape((split.batch, 2), jnp.int32),
        ],
        grid=(split.num_ctas,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
    )(kv_lens)
    return out, owners


@pytest.mark.parametrize("batch", [1, 33, 5000])
def test_lowers(batch):
    split = WorkSplit(batch, 131_072, 128, 132, 1)
    traced = jax.jit(lambda x: recorded(split, x, 10)).trace(
        jax.ShapeDtypeStruct((batch,), jnp.int32)
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


def check_plan(split, lens):
    """The segments that the device finds are the model's."""
    segments, expected_owners = model(split, lens)
    most = max(1, *map(len, segments))
    call = jax.jit(lambda x: recorded(split, x, most))
    out, owners = map(np.asarray, call(jnp.asarray(lens, jnp.int32)))
    for cta, expected in enumerate(segments):
        found = [tuple(map(int, s)) for s in out[cta] if s[0] >= 0]
        assert found == expected
    for request, owner in expected_owners.items():
        assert tuple(owners[request]) == owner


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCHES[::2])
def test_gpu_agrees_with_the_model(kind, batch):
    lens = random_lengths(np.random.default_rng([batch, len(kind)]), batch, kind)
    for num_ctas, cost in ((132, 1), (7, 0)):
        check_plan(WorkSplit(batch, 131_072, 128, num_ctas, cost), lens)


@pytest.mark.parametrize(
    ("kind", "batch"), [("edges", 2), ("equal", 31), ("one long", 33), ("edges", 1025)]
)
def test_emulator_agrees_with_the_model(kind, batch):
    lens = random_lengths(np.random.default_rng([batch, len(kind)]), batch, kind)
    with emulated():
        check_plan(WorkSplit(batch, 131_072, 128, 5, 1), lens)


def check_merge(columns, with_sink):
    """Sequences of 0, 1, 2, 3 and 70 segments; what no segment wrote is NaN."""
    rng = np.random.default_rng(columns)
    lens = np.asarray([0, 128, 250, 384, 70 * 128 - 5], np.int32)
    counts = [-(-length // 128) for length in lens]
    owners = np.zeros((5, 2), np.int32)
    owners[:, 1] = counts
    owners[1:, 0] = np.cumsum(counts)[:-1]
    owners[0] = 12345
    slots = 2 * sum(counts)
    partial_out = np.full((slots, columns, 512), np.nan, np.float32)
    partial_lse = np.full((slots, columns), np.nan, np.float32)
    out = np.full((5, columns, 512), np.nan, np.float32)
    lse = np.full((5, columns), np.nan, np.float32)
    sink = rng.normal(size=columns).astype(np.float32) + 5 if with_sink else None
    expected = []
    for b, length in enumerate(lens):
        q, rows = rng.normal(size=(columns, 576)), rng.normal(size=(length, 576))
        expected.append(oracle.attend(q, rows, 0.1, sink))
        if counts[b] == 1:
            out[b], lse[b] = expected[-1]
            continue
        for i in range(counts[b]):
            slot = 2 * (owners[b, 0] + i) + (i == 0)
            part = oracle.attend(q, rows[128 * i : 128 * (i + 1)], 0.1)
            partial_out[slot], partial_lse[slot] = part
    arguments = (out.astype(jnp.bfloat16), lse, partial_out, partial_lse, lens, owners, sink)
    arguments = [x if x is None else jnp.asarray(x) for x in arguments]
    actual = jax.jit(merge_segments_sm90)(*arguments)
    assert_attention_close(*actual, *(np.stack(x) for x in zip(*expected, strict=True)))


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 16, 48])
@pytest.mark.parametrize("with_sink", [False, True])
def test_merging_segments_equals_attending_to_the_whole(columns, with_sink):
    check_merge(columns, with_sink)


@pytest.mark.parametrize("with_sink", [False, True])
def test_merging_segments_on_the_emulator_equals_attending_to_the_whole(with_sink):
    with emulated():
        check_merge(1, with_sink)
