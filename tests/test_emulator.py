"""The emulator refuses, or shows, what would go wrong on a GPU.

That its primitives compute what they should is test_hopper_sm90.py's matter.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper as hw
from tests.emulator import PRIMITIVES, EmulationError, emulated

# Sizes of the CTA below, and where things lie in its shared memory.
INPUT_BYTES, SMEM_BYTES = 4096, 16384
BARRIER, OTHER_BARRIER, DATA = 0, 8, 1024


def run(function, *, seed=0):
    """Runs `function(smem, source, target)`, addresses, on a CTA of 8 warps; uint32 [256]."""

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
        def cta(ctx, source, target, smem):
            del ctx
            function(hw.shared_address(smem), hw.global_address(source), hw.global_address(target))

        cta(*refs)

    with emulated(seed):
        kernel = plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((256,), jnp.int32),
            scratch_types=[plgpu.SMEM((SMEM_BYTES,), jnp.uint8)],
            num_threads=2,
        )
        return np.asarray(kernel(jnp.arange(INPUT_BYTES // 4, dtype=jnp.int32))).view(np.uint32)


def store_result(target, value):
    hw.store_global(hw.element_address(target, hw.thread_index(), 4), [value])


@contextlib.contextmanager
def one_lane():
    with hw.when(hw.thread_index().eq(0)):
        yield


def init_barrier(smem, arrivals):
    with one_lane():
        hw.mbarrier_init(smem + BARRIER, arrivals)
        hw.fence_async_proxy()
    hw.cta_sync()


def copy(smem, source, *, announced=64, num_bytes=64, offset=0):
    with one_lane():
        hw.mbarrier_arrive_expect(smem + BARRIER, hw.u32(announced))
        hw.copy_row_to_shared(smem + DATA, source + offset, num_bytes, smem + BARRIER)


def wait(smem, parity=0):
    hw.mbarrier_wait(smem + BARRIER, hw.u32(parity))


def test_every_primitive_has_a_stand_in():
    """The others are made of primitives, or no part of a kernel."""
    composed = {"element_address", "bf16x2_to_f32", "any_lane", "matrix_descriptor"}
    functions = {
        name
        for name, value in vars(hw).items()
        if callable(value)
        and not isinstance(value, type)
        and value.__module__ == hw.__name__
        and not name.startswith("_")
    }
    assert functions == set(PRIMITIVES) | composed


def test_nothing_stays_behind():
    with emulated():
        inside = hw.fma
    assert hw.fma is not inside
    assert hw.fma.__module__ == hw.__name__


def test_a_copy_arrives_by_the_time_of_the_wait():
    def function(smem, source, target):
        init_barrier(smem, 1)
        copy(smem, source)
        wait(smem)
        store_result(target, hw.load_shared(smem + DATA, 4, words=1)[0])

    assert np.all(run(function) == 1)


def test_without_the_wait_it_is_poison():
    def function(smem, source, target):
        init_barrier(smem, 1)
        copy(smem, source)
        hw.cta_sync()
        store_result(target, hw.load_shared(smem + DATA, 4, words=1)[0])
        wait(smem)

    assert any(np.any(run(function, seed=seed) == 0xFFFFFFFF) for seed in range(5))


def exchange(synchronized):
    """Each thread takes the word of the same lane of the next warp."""

    def function(smem, source, target):
        del source
        thread = hw.thread_index()
        hw.store_shared(smem + thread * 4, [thread])
        if synchronized:
            hw.cta_sync()
        (theirs,) = hw.load_shared(smem + ((thread + 32) & 255) * 4, words=1)
        store_result(target, theirs)

    return function


def test_a_missing_barrier_shows():
    expected = (np.arange(256) + 32) % 256
    assert all(np.array_equal(run(exchange(True), seed=seed), expected) for seed in range(5))
    assert not all(np.array_equal(run(exchange(False), seed=seed), expected) for seed in range(5))


def waits_for_nobody(smem, source, target):
    del source, target
    init_barrier(smem, 2)
    with one_lane():
        hw.mbarrier_arrive(smem + BARRIER)
    wait(smem)


def bytes_that_do_not_come(smem, source, target):
    del target
    init_barrier(smem, 1)
    copy(smem, source, announced=128)
    wait(smem)


def bytes_that_nobody_announced(smem, source, target):
    del target
    init_barrier(smem, 1)
    copy(smem, source, announced=32)


def arrives_too_often(smem, source, target):
    del source, target
    init_barrier(smem, 1)
    with one_lane():
        hw.mbarrier_arrive_expect(smem + BARRIER, hw.u32(64))
        hw.mbarrier_arrive(smem + BARRIER)


def no_such_mbarrier(smem, source, target):
    del source, target
    hw.mbarrier_arrive(smem + OTHER_BARRIER)


def unfenced_mbarrier(smem, source, target):
    del target
    with one_lane():
        hw.mbarrier_init(smem + BARRIER, 1)
    hw.cta_sync()
    copy(smem, source)


def copies_over_a_store_without_a_fence(smem, source, target):
    del target
    hw.store_shared(smem + DATA + hw.thread_index() * 4, [hw.u32(0)])
    init_barrier(smem, 1)  # only the first warp's stores are fenced, the copy has all warps'
    copy(smem, source, announced=1024, num_bytes=1024)


def copies_from_beyond_the_array(smem, source, target):
    del target
    init_barrier(smem, 1)
    copy(smem, source, offset=INPUT_BYTES - 32)


def copies_a_part_of_a_vector(smem, source, target):
    del target
    init_barrier(smem, 1)
    copy(smem, source, num_bytes=24)


def loads_beyond_shared_memory(smem, source, target):
    del source, target
    hw.load_shared(smem, SMEM_BYTES)


def loads_misaligned(smem, source, target):
    del source, target
    hw.load_shared(smem, 8)


def loads_what_the_kernel_writes(smem, source, target):
    del smem, source
    hw.load_global(target)


def stores_to_an_input(smem, source, target):
    del smem, target
    hw.store_global(source, [hw.u32(0)])


def lanes_part(smem, source, target):
    del smem, source, target
    lane = hw.thread_index() & 31
    with hw.when(lane < 7):
        hw.shuffle_xor(lane, 1)


def warps_part(smem, source, target):
    del smem, source, target
    with hw.when(hw.warp_index() < 2):
        hw.cta_sync()


def barriers_of_other_sizes(smem, source, target):
    del smem, source, target
    for threads in (64, 128):
        with hw.when(hw.warp_index().eq(threads // 64)):
            hw.named_barrier(hw.u32(8), threads)


def shifts_too_far(smem, source, target):
    del smem, source, target
    _ = hw.u32(1) << (hw.thread_index() & 63)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (waits_for_nobody, r"deadlock(.|\n)*warp 3 waits for mbarrier(.|\n)*misses 1 arrivals"),
        (bytes_that_do_not_come, r"deadlock(.|\n)*64 bytes"),
        (bytes_that_nobody_announced, "work under way"),
        (arrives_too_often, "1 arrivals at an mbarrier that misses 0"),
        (no_such_mbarrier, "no mbarrier"),
        (unfenced_mbarrier, "before fence_async_proxy"),
        (copies_over_a_store_without_a_fence, "before fence_async_proxy"),
        (copies_from_beyond_the_array, "out of bounds"),
        (copies_a_part_of_a_vector, "a copy of 24 bytes"),
        (loads_beyond_shared_memory, "out of bounds"),
        (loads_misaligned, "not a multiple of 16"),
        (loads_what_the_kernel_writes, "not for this kind of access"),
        (stores_to_an_input, "not for this kind of access"),
        (lanes_part, "divergent"),
        (warps_part, "deadlock\nwarp 0 waits for named barrier 0 of 256 threads"),
        (barriers_of_other_sizes, "named barrier 8 of"),
        (shifts_too_far, "shifted by"),
    ],
)
def test_mistakes_raise(function, words):
    with pytest.raises(EmulationError, match=words):
        run(function)


def start_wgmma(smem, *, fenced=True, offset=0):
    """A product of ones and what the first warpgroup has stored, 64 x 64 ones."""
    ones = hw.f16x2(hw.f32(1.0), hw.f32(1.0))
    for i in range(2):
        hw.store_shared(smem + DATA + hw.thread_index() * 16, [ones] * 4, 4096 * i)
    if fenced:
        hw.fence_async_proxy()
    hw.cta_sync()
    steps = [hw.WgmmaStep(0, [ones] * 4, 32 * s) for s in range(4)]
    (acc,) = hw.wgmma_m64n64k16([[]], hw.matrix_descriptor(smem + DATA + offset), steps, "f16")
    return acc


def test_wgmma_is_finished_by_the_wait():
    def function(smem, source, target):
        del source
        acc = hw.wgmma_wait(0, start_wgmma(smem))
        store_result(target, hw.as_u32(acc[7]))

    assert np.all(run(function).view(np.float32) == 64)


def accumulators_in_flight(smem):
    _ = start_wgmma(smem)[0] + 1.0


def accumulators_of_a_group_in_flight(smem):
    hw.wgmma_wait(1, start_wgmma(smem))


def never_waits(smem):
    start_wgmma(smem)


def operands_without_a_fence(smem):
    hw.wgmma_wait(0, start_wgmma(smem, fenced=False))


def operands_off_the_swizzle(smem):
    start_wgmma(smem, offset=512)


def operands_of_one_warp(smem):
    start_wgmma(smem, offset=1024 * hw.warp_index())


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (accumulators_in_flight, "read before wgmma_wait"),
        (accumulators_of_a_group_in_flight, "still in flight"),
        (never_waits, "work under way"),
        (operands_without_a_fence, "before fence_async_proxy"),
        (operands_off_the_swizzle, "128-byte swizzle"),
        (operands_of_one_warp, "different wgmmas"),
    ],
)
def test_mistakes_with_wgmma_raise(function, words):
    with pytest.raises(EmulationError, match=words):
        run(lambda smem, source, target: function(smem))


def test_operands_of_wgmma_that_change_show():
    def function(smem, source, target):
        del source
        acc = start_wgmma(smem)
        for i in range(2):
            hw.store_shared(smem + DATA + hw.thread_index() * 16, [hw.u32(0)] * 4, 4096 * i)
        hw.fence_async_proxy()
        acc = hw.wgmma_wait(0, acc)
        store_result(target, hw.as_u32(acc[0]))

    def is_right(seed):
        try:
            return np.all(run(function, seed=seed).view(np.float32) == 64)
        except EmulationError:
            return False

    assert not all(is_right(seed) for seed in range(5))
