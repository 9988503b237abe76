"""A stand-in for a Hopper GPU in NumPy, on which the kernels run as they are written.

    with emulated():
        out, lse = sparse_attention_sm90(q, kv_cache, topk_indices, sm_scale=sm_scale)

Within the block the primitives of `pallas_kernels.hopper` compute with NumPy, and `plgpu.kernel`
runs the kernel's body right away: CTA after CTA, on real arrays, without jit. Everything else,
shapes, grids, addresses, control flow, is the package's own code.

A register is an array [32] over the lanes of a warp, in lockstep. Warps are threads of which
exactly one runs at a time. Which one is a matter of priorities, drawn at random and, at some of the
places where warps meet each other (memory, barriers), drawn anew: a warp may fall behind by a whole
phase (Burckhardt et al., "A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs").
Asynchronous operations take effect at random times, too. All is drawn from one seed.

What raises, or shows in the results:

- accesses out of bounds or misaligned; loads of what a kernel writes, stores to what it is given;
- what was never written: shared memory, outputs and registers of inactive lanes hold 0xFF bytes,
  NaN in every format, and so does the destination of a copy that has not landed;
- `wgmma`: accumulators that are read before `wgmma_wait`; operands in shared memory that change
  between issue and wait: a warp reads them for its rows at one or the other, and does not wait for
  the other warps of its warpgroup, which must issue the same;
- ordinary stores that an asynchronous operation meets without `fence_async_proxy` by the warp that
  stored;
- mbarriers: too many arrivals, bytes that do not add up, phases that nobody completes; named
  barriers with another number of threads. A deadlock names who waits for what;
- collectives in divergent control flow; shifts by 32 or more;
- missing barriers between warps, if one of the schedules that are tried exposes them.

What it cannot tell: races between lanes of a warp, whether a `warp_sync` is needed; what LLVM and
ptxas make of the code, validity of the PTX included; weak memory order, other than the above; the
last bit of approximate instructions, and of sums, whose order in an MMA is the hardware's; time.
"""

import contextlib
import functools
import itertools
import math
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper as hw
from pallas_kernels.hopper import WARP

U32, U64, F32 = np.uint32, np.uint64, np.float32
LANES = np.arange(WARP, dtype=U32)
# Not 0, so that addresses that lack their base are out of bounds; global ones need 64 bits.
SMEM_BASE, GMEM_BASE = 1024, 1 << 40
# Between arrays in global memory: more than any access takes.
GUARD_BYTES = 1 << 14
UNMAPPED, READ_ONLY, WRITE_ONLY = range(3)
NAN_BYTE = 0xFF


class EmulationError(AssertionError):
    """The kernel did what would go wrong, or may go wrong, on a GPU."""


# ------------------------------------------------------------------------------------ registers


class Reg:
    """A register of every lane; stands in for `hopper.Reg`."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value

    @property
    def type(self):
        return {"bool": "i1", "uint32": "i32", "uint64": "i64", "float32": "f32"}[
            self.value.dtype.name
        ]

    @property
    def is_float(self):
        return self.value.dtype == F32

    def operand(self, other):
        if isinstance(other, Reg):
            if other.value.dtype != self.value.dtype:
                raise TypeError(f"{self.type} register combined with {other.type}")
            return other.value
        if self.is_float:
            return F32(other)
        dtype = self.value.dtype
        return dtype.type(int(other) % (1 << 8 * dtype.itemsize))

    def shift(self, other, function):
        distance = self.operand(other)
        too_far = distance >= 8 * self.value.dtype.itemsize
        if too_far.any() and (too_far & running().active.lanes).any():
            raise EmulationError(f"{self.type} register shifted by {distance}")
        return Reg(function(self.value, distance))

    def __add__(self, other):
        return Reg(self.value + self.operand(other))

    def __sub__(self, other):
        return Reg(self.value - self.operand(other))

    def __rsub__(self, other):
        return Reg(self.operand(other) - self.value)

    def __mul__(self, other):
        return Reg(self.value * self.operand(other))

    __radd__ = __add__
    __rmul__ = __mul__

    def __floordiv__(self, other):
        return Reg(self.value // self.operand(other))

    def __mod__(self, other):
        return Reg(self.value % self.operand(other))

    def __and__(self, other):
        return Reg(self.value & self.operand(other))

    def __or__(self, other):
        return Reg(self.value | self.operand(other))

    def __xor__(self, other):
        return Reg(self.value ^ self.operand(other))

    def __lshift__(self, other):
        return self.shift(other, np.left_shift)

    def __rshift__(self, other):
        return self.shift(other, np.right_shift)

    def __lt__(self, other):
        return Reg(self.value < self.operand(other))

    def __gt__(self, other):
        return Reg(self.value > self.operand(other))

    def __ge__(self, other):
        return Reg(self.value >= self.operand(other))

    def eq(self, other):
        return Reg(self.value == self.operand(other))

    def ne(self, other):
        return Reg(self.value != self.operand(other))

    def __bool__(self):
        raise TypeError("a register has no value while the kernel is being built; use `when`")


class InFlight(Reg):
    """A register of an accumulator that `wgmma` is at work on."""

    __slots__ = ("accumulator", "index")

    def __init__(self, accumulator, index):
        self.accumulator, self.index = accumulator, index

    @property
    def value(self):
        raise EmulationError("an accumulator is read before wgmma_wait has returned it")


def full(value, dtype):
    return np.full(WARP, value, dtype)


def poison(dtype, shape=(WARP,)):
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return np.full(num_bytes, NAN_BYTE, np.uint8).view(dtype).reshape(shape)


# ----------------------------------------------------------------------------- warps and a CTA


class Lanes:
    """Which lanes are active."""

    def __init__(self, lanes):
        self.lanes, self.all, self.any = lanes, bool(lanes.all()), bool(lanes.any())


class Stopped(Exception):
    """Another warp has failed."""


class Warp:
    """One thread of execution."""

    def __init__(self, cta, index):
        self.cta, self.index = cta, index
        self.masks = [Lanes(np.ones(WARP, bool))]
        self.baton = threading.Semaphore(0)
        self.priority = cta.random.random()
        self.is_ready, self.waits_for = None, ""
        self.done = False
        self.groups = []  # of wgmma, unfinished
        self.num_wgmmas = 0

    @property
    def active(self):
        return self.masks[-1]

    def pause(self):
        """Perhaps lets others go first; called wherever warps may meet."""
        cta = self.cta
        if cta.random.random() < cta.restlessness:
            self.priority = cta.random.random()
            if cta.copies and cta.random.random() < 0.5:
                cta.land_copy()
            cta.switch(self)

    def wait_until(self, is_ready, waits_for):
        self.is_ready, self.waits_for = is_ready, waits_for
        self.cta.switch(self)
        self.is_ready = None

    def converged(self):
        """Whether all lanes are active, or none; anything else must not meet a collective."""
        if self.active.any and not self.active.all:
            raise EmulationError("a collective in divergent control flow")
        return self.active.all


local = threading.local()


def running() -> Warp:
    return local.warp


class MBarrier:
    """Phases, each of which takes arrivals and announced bytes."""

    def __init__(self, arrivals):
        self.arrivals = self.missing = arrivals
        self.missing_bytes = self.phase = 0

    def update(self, arrivals, num_bytes):
        if arrivals > self.missing:
            raise EmulationError(f"{arrivals} arrivals at an mbarrier that misses {self.missing}")
        self.missing -= arrivals
        self.missing_bytes += num_bytes
        if not self.missing and not self.missing_bytes:
            self.phase, self.missing = self.phase + 1, self.arrivals

    def __str__(self):
        return f"phase {self.phase} misses {self.missing} arrivals, {self.missing_bytes} bytes"


class NamedBarrier:
    """One use of `bar.sync`."""

    def __init__(self, threads):
        self.threads, self.arrived, self.any = threads, [], False

    @property
    def released(self):
        return len(self.arrived) * WARP == self.threads


class Cta:
    """Warps, shared memory, and what is under way."""

    def __init__(self, device, program, num_warps, smem_bytes):
        self.gmem, self.random, self.program = device.gmem, device.random, program
        self.smem = Memory(np.full(smem_bytes, NAN_BYTE, np.uint8), SMEM_BASE)
        # The warp, counted from 1, whose ordinary store asynchronous operations may not see yet.
        self.unfenced = np.zeros(smem_bytes, np.uint8)
        self.restlessness = 2.0 ** -self.random.uniform(2, 8)
        self.mbarriers, self.named_barriers, self.copies = {}, {}, []
        self.wgmmas = {}  # (warpgroup, count) -> what its warps must all issue
        self.failure = None
        self.warps = [Warp(self, i) for i in range(num_warps)]

    def run(self, body, pool):
        runs = [pool.submit(self.run_warp, warp, body) for warp in self.warps]
        self.next_warp().baton.release()
        for run in runs:
            run.result()
        if self.failure is not None:
            raise self.failure
        left = [f"{a:#x}: {b}" for a, b in self.mbarriers.items() if b.missing_bytes]
        if self.copies or left or any(warp.groups for warp in self.warps):
            raise EmulationError(f"the CTA ends with work under way; {left}")

    def run_warp(self, warp, body):
        local.warp = warp
        warp.baton.acquire()
        try:
            if self.failure is None:
                with np.errstate(all="ignore"):
                    body()
        except Stopped:
            pass
        except BaseException as error:
            self.failure = error
        warp.done = True
        if not all(w.done for w in self.warps):
            self.successor().baton.release()

    def successor(self):
        """Who goes on when a warp has ended."""
        if self.failure is None:
            try:
                return self.next_warp()
            except EmulationError as error:
                self.failure = error
        return next(w for w in self.warps if not w.done)

    def next_warp(self):
        while True:
            ready = [w for w in self.warps if not w.done and (w.is_ready is None or w.is_ready())]
            if ready:
                return max(ready, key=lambda w: w.priority)
            if not self.copies:
                raise EmulationError(self.deadlock())
            self.land_copy()

    def deadlock(self):
        waiting = [f"warp {w.index} waits for {w.waits_for}" for w in self.warps if not w.done]
        mbarriers = [f"mbarrier {a:#x}: {b}" for a, b in self.mbarriers.items()]
        return "\n".join(["deadlock", *waiting, *mbarriers])

    def switch(self, warp):
        successor = self.next_warp()
        if successor is not warp:
            successor.baton.release()
            warp.baton.acquire()
        if self.failure is not None:
            raise Stopped

    def mbarrier(self, address):
        try:
            return self.mbarriers[address]
        except KeyError:
            raise EmulationError(f"no mbarrier at {address:#x}") from None

    def land_copy(self):
        """One of the copies under way takes effect, in no particular order."""
        destination, data, barrier = self.copies.pop(self.random.randrange(len(self.copies)))
        self.smem.data[destination : destination + len(data)] = data
        self.mbarrier(barrier).update(0, -len(data))

    def check_fenced(self, place):
        if self.unfenced[place].any():
            raise EmulationError("an asynchronous operation meets a store before fence_async_proxy")


# --------------------------------------------------------------------------------------- memory


class Memory:
    """Bytes from address `base` on; `access` says, byte by byte, what is allowed, if not all is."""

    def __init__(self, data, base, access=None):
        self.data, self.base, self.access = data, base, access

    def place(self, address, num_bytes, alignment, access):
        """Where int64 addresses lie in `data`; they are checked. `alignment` is a power of two."""
        if not address.size:
            return address
        if (address & (alignment - 1)).any():
            raise EmulationError(f"an address in {address} is not a multiple of {alignment}")
        start = address - self.base
        outside = start.min() < 0 or start.max() + num_bytes > len(self.data)
        if not outside and self.access is not None:
            # Arrays lie farther apart than any access is long.
            ends = self.access[start], self.access[start + (num_bytes - 1)]
            outside = (ends[0] != access).any() or (ends[1] != access).any()
        if outside:
            raise EmulationError(
                f"{num_bytes} bytes at an address in {address - self.base} are out of bounds, or"
                " not for this kind of access"
            )
        return start


def lane_places(memory, address, offset, num_bytes, access):
    lanes = running().active
    places = address.value.astype(np.int64) + offset
    places = places if lanes.all else places[lanes.lanes]
    return memory.place(places, num_bytes, num_bytes, access)


def load(memory, address, offset, words, dtype):
    warp = running()
    warp.pause()
    if not warp.active.any:
        return [Reg(poison(dtype))] * words
    start = lane_places(memory, address, offset, 4 * words, READ_ONLY)
    result = memory.data.view(dtype)[(start >> 2) + np.arange(words)[:, None]]
    if not warp.active.all:
        loaded, result = result, poison(dtype, (words, WARP))
        result[:, warp.active.lanes] = loaded
    return list(map(Reg, result))


def store(memory, address, offset, values):
    """Returns the bytes' places, one row per active lane."""
    warp = running()
    warp.pause()
    if not warp.active.any:
        return np.zeros((0, 0), np.int64)
    num_bytes = 4 * len(values)
    start = lane_places(memory, address, offset, num_bytes, WRITE_ONLY)
    data = np.array([x.value.view(U32) for x in values])
    data = data if warp.active.all else data[:, warp.active.lanes]
    memory.data.view(U32)[(start >> 2) + np.arange(len(values))[:, None]] = data
    return start[:, None] + np.arange(num_bytes)


def store_to_smem(places):
    warp = running()
    warp.cta.unfenced[places] = warp.index + 1


# ---------------------------------------------------------------------------------- primitives

PRIMITIVES = {}


def primitive(function):
    """`function` stands in for the one of its name in `hopper`."""
    PRIMITIVES[function.__name__] = function
    return function


@primitive
@functools.lru_cache(4096)
def u32(value):
    return Reg(full(int(value) % (1 << 32), U32))


@primitive
def f32(value):
    return Reg(full(value, F32))


@primitive
def select(condition, on_true, on_false):
    return Reg(np.where(condition.value, on_true.value, on_true.operand(on_false)))


@primitive
def minimum(a, b):
    return Reg(np.minimum(a.value, a.operand(b)))


@primitive
def maximum_u32(a, b):
    return Reg(np.maximum(a.value, a.operand(b)))


@primitive
def thread_index():
    return Reg(LANES + U32(running().index * WARP))


@primitive
def warp_index():
    return u32(running().index)


def flushed(x):
    """Without subnormal numbers."""
    return np.where(np.abs(x) < np.finfo(F32).smallest_normal, np.copysign(F32(0), x), x)


def packed(pairs, dtype):
    """[32, 2] -> one register of both."""
    return np.ascontiguousarray(pairs.astype(dtype)).view(U32)[:, 0]


def unpacked(x, dtype):
    """float32 [32, 2] of the 16-bit numbers in a register."""
    return x.view(np.uint16).view(dtype).astype(F32).reshape(WARP, 2)


def pack(dtype):
    return lambda low, high: packed(np.array([low, high]).T, dtype)


def multiply_pairs(dtype):
    return lambda a, b: packed(unpacked(a, dtype) * unpacked(b, dtype), dtype)


def to_e4m3(*values):
    clipped = np.clip(np.stack(values, axis=1), -448, 448)
    return clipped.astype(ml_dtypes.float8_e4m3fn).view(U32)[:, 0]


# From values to the value of a register, lane by lane.
LANEWISE = {
    "u64": lambda x: x.astype(U64),
    "recomputed": lambda x: x,
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(F32),
    "multiply": np.multiply,
    "maximum": np.fmax,
    "divide": np.divide,
    "exp2": lambda x: flushed(np.exp2(flushed(x))),
    "log2": lambda x: np.log2(flushed(x)),
    "reciprocal": lambda x: flushed(F32(1) / flushed(x)),
    "as_f32": lambda x: x.view(F32),
    "as_u32": lambda x: x.view(U32),
    "f32x4_to_e4m3": to_e4m3,
    "f16x2": pack(np.float16),
    "bf16x2": pack(ml_dtypes.bfloat16),
    "multiply_f16x2": multiply_pairs(np.float16),
    "multiply_bf16x2": multiply_pairs(ml_dtypes.bfloat16),
    "maximum_u16x2": lambda a, b: np.maximum(a.view(np.uint16), b.view(np.uint16)).view(U32),
    "population_count": lambda x: np.bitwise_count(x).astype(U32),
}


def lanewise(function):
    return lambda *operands: Reg(function(*[x.value for x in operands]))


PRIMITIVES |= {name: lanewise(function) for name, function in LANEWISE.items()}


@primitive
def e4m3x4_to_f16x2(x):
    halves = x.value.view(ml_dtypes.float8_e4m3fn).astype(np.float16).view(U32).reshape(WARP, 2)
    return Reg(halves[:, 0].copy()), Reg(halves[:, 1].copy())


@primitive
def permute_bytes(x, selector):
    source = x.value.view(np.uint8).reshape(WARP, 4)
    chosen = source[:, [selector >> 4 * i & 3 for i in range(4)]]
    return Reg(np.ascontiguousarray(chosen).view(U32)[:, 0])


# Refs are addresses here.


@primitive
def shared_address(ref):
    return u32(ref)


@primitive
def global_address(ref):
    return Reg(full(ref, U64))


@primitive
def load_shared(address, offset=0, *, words=4):
    return load(running().cta.smem, address, offset, words, U32)


@primitive
def load_shared_f32(address, offset=0, *, words=4):
    return load(running().cta.smem, address, offset, words, F32)


@primitive
def store_shared(address, values, offset=0):
    store_to_smem(store(running().cta.smem, address, offset, values))


@primitive
def load_global(address, offset=0, *, words=1):
    return load(running().cta.gmem, address, offset, words, U32)


@primitive
def store_global(address, values, offset=0):
    store(running().cta.gmem, address, offset, values)


@primitive
def prefetch_global(address):
    lane_places(running().cta.gmem, address, 0, 1, READ_ONLY)


def matrix_rows(row_address, offset):
    """Places of four matrices' rows, [4, 8]; 16 bytes each."""
    memory = running().cta.smem
    return lane_places(memory, row_address, offset, 16, READ_ONLY).reshape(4, 8)


@primitive
def load_matrices_transposed(row_address, offset=0):
    warp = running()
    if not warp.converged():
        return [Reg(poison(U32))] * 4
    warp.pause()
    places = matrix_rows(row_address, offset)[..., None] // 2 + np.arange(8)
    matrices = warp.cta.smem.data.view(np.uint16)[places].transpose(0, 2, 1)
    return list(map(Reg, np.ascontiguousarray(matrices).view(U32).reshape(4, WARP)))


@primitive
def store_matrices_transposed(row_address, values):
    warp = running()
    if warp.converged():
        warp.pause()
        places = matrix_rows(row_address, 0)[..., None] + np.arange(16)
        matrices = np.stack([x.value for x in values]).view(np.uint16).reshape(4, 8, 8)
        rows = np.ascontiguousarray(matrices.transpose(0, 2, 1)).view(np.uint8)
        warp.cta.smem.data[places] = rows
        store_to_smem(places)


def collective(function):
    """A primitive of all lanes of the first argument's values; nothing where none is active."""

    @functools.wraps(function)
    def wrapper(x, *arguments):
        return Reg(function(x.value, *arguments)) if running().converged() else x

    return primitive(wrapper)


@collective
def shuffle_xor(x, mask):
    return x[LANES ^ U32(mask)]


@collective
def shuffle_index(x, source):
    return x[source.value % WARP]


@primitive
def ballot(condition):
    if not running().converged():
        return u32(0)
    return u32(np.packbits(condition.value, bitorder="little").view(U32)[0])


@collective
def reduce_max_u32(x):
    return full(x.max(), U32)


@collective
def reduce_add_u32(x):
    return full(x.sum(dtype=U32), U32)


@collective
def cumulative_sum_u32(x):
    return x.cumsum(dtype=U32)


@collective
def transpose_matrix(x):
    return np.ascontiguousarray(x.view(np.uint16).reshape(8, 8).T).view(U32).reshape(-1)


# ------------------------------------------------------------------------------------------ MMA


def stacked(registers):
    return np.array([x.value for x in registers])


def floats(registers, dtype):
    """float32 [register, g, c, 2] of registers of 16-bit pairs."""
    dtype = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    return stacked(registers).view(dtype).astype(F32).reshape(len(registers), 8, 4, 2)


def a_matrix(registers, dtype):
    """[16, 16] of an A fragment."""
    x = floats(registers, dtype).reshape(2, 2, 8, 4, 2)  # upper columns, upper rows, g, c, 2
    return x.transpose(1, 2, 0, 3, 4).reshape(16, 16)


def b_matrix(registers, dtype):
    """[16, 8] of a B fragment."""
    return floats(registers, dtype).transpose(0, 2, 3, 1).reshape(16, 8)


def c_matrix(registers):
    """[16, 8 n] of n C fragments side by side."""
    x = stacked(registers).reshape(-1, 2, 2, 8, 4)  # n, upper rows, 2, g, c
    return x.transpose(1, 3, 0, 4, 2).reshape(16, -1)


def c_fragments(matrix):
    """The inverse of `c_matrix`: [4 n, 32]."""
    x = matrix.reshape(2, 8, -1, 4, 2)
    return x.transpose(2, 0, 4, 1, 3).reshape(-1, WARP)


@primitive
def mma_m16n8k16(c, a, b, dtype):
    if not running().converged():
        return c
    product = a_matrix(a, dtype) @ b_matrix(b, dtype)
    return list(map(Reg, c_fragments(c_matrix(c) + product)))


class Accumulator:
    """A warp's 16 rows of one; the number of groups that are at work on it."""

    def __init__(self, matrix):
        self.matrix, self.users = matrix, 0


def accumulator(registers):
    if not registers:
        return Accumulator(np.zeros((16, 64), F32))
    if not isinstance(registers[0], InFlight):
        return Accumulator(c_matrix(registers))
    acc = registers[0].accumulator
    assert [(acc, i) for i in range(32)] == [(r.accumulator, r.index) for r in registers]
    return acc


# [column, byte]: 16 columns of a swizzled row of 128 bytes, whose address bits 4-6 are to meet 7-9.
B_OFFSETS = np.arange(64)[:, None] * 128 + np.arange(32)


class WgmmaGroup:
    """What one `commit_group` covers, of one warp."""

    def __init__(self, warp, accumulators, b, steps, dtype):
        descriptor = int(b.value[0])
        self.warp, self.accumulators, self.dtype = warp, accumulators, dtype
        self.b_address = (descriptor & 0x3FFF) << 4
        if self.b_address % 1024 or descriptor >> 16 != (1 << 62 | 64 << 32 | 1 << 16) >> 16:
            raise EmulationError(f"descriptor {descriptor:#x} is not of the 128-byte swizzle")
        self.steps = [(s.target, a_matrix(s.a, dtype), s.offset) for s in steps]
        for acc in accumulators:
            acc.users += 1

    def run(self):
        """Reads the operands and computes, once."""
        cta, steps = self.warp.cta, self.steps
        self.steps = []
        for target, a, offset in steps:
            address = B_OFFSETS + (self.b_address + offset)
            address ^= (address >> 7 & 7) << 4
            place = cta.smem.place(address, 1, 1, READ_ONLY)
            cta.check_fenced(place)
            dtype = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[self.dtype]
            b = cta.smem.data[place].view(dtype).astype(F32)
            self.accumulators[target].matrix += a @ b.T


@primitive
def wgmma_m64n64k16(accumulators, b, steps, dtype):
    warp = running()
    if not warp.converged():
        return [acc or [f32(0.0)] * 32 for acc in accumulators]
    warp.pause()
    group = WgmmaGroup(warp, list(map(accumulator, accumulators)), b, steps, dtype)
    what = (int(b.value[0]), dtype, [(s.target, s.offset) for s in steps])
    if warp.cta.wgmmas.setdefault((warp.index // 4, warp.num_wgmmas), what) != what:
        raise EmulationError("the warps of a warpgroup issue different wgmmas")
    warp.num_wgmmas += 1
    warp.groups.append(group)
    if warp.cta.random.random() < 0.5:  # read now, or when the group is waited for
        for unfinished in warp.groups:
            unfinished.run()
    return [[InFlight(acc, i) for i in range(32)] for acc in group.accumulators]


@primitive
def wgmma_wait(pending, registers=()):
    warp = running()
    if not warp.converged():
        return list(registers)
    warp.pause()
    while len(warp.groups) > pending:
        group = warp.groups.pop(0)
        group.run()
        for acc in group.accumulators:
            acc.users -= 1
    result = []
    for acc, indices in itertools.groupby(registers, lambda r: r.accumulator):
        if acc.users:
            raise EmulationError("wgmma_wait returns an accumulator that is still in flight")
        fragments = c_fragments(acc.matrix)
        result += [Reg(fragments[r.index]) for r in indices]
    return result


@primitive
def set_max_registers(count, *, increase):
    del increase
    if running().converged() and (count % 8 or not 24 <= count <= 256):
        raise EmulationError(f"setmaxnreg {count}")


# ------------------------------------------------------------- barriers and asynchronous copies


@primitive
def warp_sync():
    running().converged()


def named_barrier_use(index, threads, condition):
    """Arrives, waits; returns whether any thread's condition held."""
    warp = running()
    if not warp.converged():
        return False
    warp.pause()
    index = int(index.value[0])
    barriers = warp.cta.named_barriers
    barrier = barriers.setdefault(index, NamedBarrier(threads))
    if not 0 <= index < 16 or barrier.threads != threads:
        raise EmulationError(f"named barrier {index} of {barrier.threads} and {threads} threads")
    barrier.arrived.append(warp)
    barrier.any |= condition
    if barrier.released:
        del barriers[index]
        warp.pause()
    else:
        warp.wait_until(lambda: barrier.released, f"named barrier {index} of {threads} threads")
    return barrier.any


@primitive
def cta_sync():
    named_barrier_use(u32(0), WARP * len(running().cta.warps), False)


@primitive
def named_barrier(index, threads):
    named_barrier_use(index, threads, False)


@primitive
def named_barrier_any(index, threads, condition):
    return Reg(full(named_barrier_use(index, threads, bool(condition.value.any())), bool))


@primitive
def mbarrier_init(barrier, arrivals):
    warp = running()
    for address in set(barrier.value[warp.active.lanes].tolist()):
        place = warp.cta.smem.place(np.array([address]), 8, 8, WRITE_ONLY)
        warp.cta.mbarriers[address] = MBarrier(arrivals)
        store_to_smem(place[:, None] + np.arange(8))


def update_mbarriers(barrier, num_bytes):
    warp = running()
    warp.pause()
    for address, size in zip(barrier.value.tolist(), num_bytes, strict=True):
        warp.cta.mbarrier(address).update(1, size)


@primitive
def mbarrier_arrive_expect(barrier, num_bytes):
    lanes = running().active.lanes
    update_mbarriers(Reg(barrier.value[lanes]), num_bytes.value[lanes].tolist())


@primitive
def mbarrier_arrive(barrier):
    lanes = running().active.lanes
    update_mbarriers(Reg(barrier.value[lanes]), [0] * int(lanes.sum()))


@primitive
def mbarrier_wait(barrier, parity):
    warp = running()
    if warp.converged():
        warp.pause()
        (address,), (parity,) = (set(x.value.tolist()) for x in (barrier, parity))
        mbarrier = warp.cta.mbarrier(address)
        if mbarrier.phase % 2 == parity:
            waits_for = f"mbarrier {address:#x}, parity {parity}"
            warp.wait_until(lambda: mbarrier.phase % 2 != parity, waits_for)


@primitive
def fence_async_proxy():
    warp = running()
    if warp.active.any:
        warp.cta.unfenced[warp.cta.unfenced == warp.index + 1] = 0


@primitive
def copy_row_to_shared(destination, source, num_bytes, barrier):
    warp, cta = running(), running().cta
    warp.pause()
    size = u32(num_bytes) if isinstance(num_bytes, int) else num_bytes
    for lane in np.flatnonzero(warp.active.lanes):
        to, start, count, address = (
            int(x.value[lane]) for x in (destination, source, size, barrier)
        )
        if count % 16 or not count:
            raise EmulationError(f"a copy of {count} bytes")
        (to,) = cta.smem.place(np.array([to]), count, 16, WRITE_ONLY)
        (start,) = cta.gmem.place(np.array([start]), count, 16, READ_ONLY)
        cta.mbarrier(address)
        for place in (slice(to, to + count), slice(address - SMEM_BASE, address - SMEM_BASE + 8)):
            cta.check_fenced(place)
        cta.smem.data[to : to + count] = NAN_BYTE
        cta.copies.append((to, cta.gmem.data[start : start + count], address))


# --------------------------------------------------------------------------------- control flow


@primitive
@contextlib.contextmanager
def when(condition):
    warp = running()
    warp.masks.append(Lanes(condition.value & warp.active.lanes))
    try:
        yield
    finally:
        warp.masks.pop()


def branch(condition, function, otherwise):
    """`function()` for the condition's lanes, `otherwise` for others; None if it holds in none."""
    with when(condition):
        lanes = running().active
        if not lanes.any:
            return None
        leaves, structure = jax.tree.flatten(function())
        others, other_structure = jax.tree.flatten(otherwise)
        if structure != other_structure:
            raise TypeError(f"{structure} is not {other_structure}")
        if not lanes.all:
            leaves = [select(Reg(lanes.lanes), a, b) for a, b in zip(leaves, others, strict=True)]
        return jax.tree.unflatten(structure, leaves)


@primitive
def for_loop(bound, init, body):
    carry = init
    for i in itertools.count():
        result = branch(u32(i) < bound, lambda i=i, carry=carry: body(u32(i), carry), carry)
        if result is None:
            return carry
        carry = result


@primitive
def while_loop(condition, body, init):
    carry = init
    while True:
        result = branch(condition(carry), lambda carry=carry: body(carry), carry)
        if result is None:
            return carry
        carry = result


@primitive
def cond(condition, on_true, otherwise):
    result = branch(condition, on_true, otherwise)
    return otherwise if result is None else result


# --------------------------------------------------------------------------------------- launch


class MutableRef:
    """Stands in for `jax.new_ref`'s."""

    def __init__(self, x, memory_space):
        del memory_space
        self.array = np.array(x)


class Program:
    """A CTA's index in the grid, where kernels look for it."""

    def __init__(self, index):
        self.registers = self
        self.index = index

    def astype(self, dtype):
        del dtype
        return self

    def item(self):
        return full(self.index, U32)


class Device:
    """Runs kernels one after the other."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.gmem = Memory(np.zeros(0, np.uint8), GMEM_BASE)
        self.pallas_kernel = plgpu.kernel
        self.axis_index = jax.lax.axis_index

    def kernel(self, body, **options):
        """Stands in for `plgpu.kernel`, but leaves what is to be interpreted to Pallas."""
        if options.get("interpret") is None:
            return lambda *operands: self.launch(body, operands, **options)

        def interpreted(*operands):
            with jax.disable_jit(False):
                return jax.jit(self.pallas_kernel(body, **options))(*operands)

        return interpreted

    def launch(
        self, body, operands, *, out_type=(), scratch_types=(), grid=(), num_threads=1, **options
    ):
        """Runs all CTAs, in any order; `options` are the compiler's, and names."""
        del options
        types = jax.tree.leaves(out_type)
        outputs = [poison(t.dtype, t.shape) for t in types]
        inputs = [x.array if isinstance(x, MutableRef) else np.asarray(x) for x in operands]
        is_input = [not isinstance(x, MutableRef) for x in operands] + [False] * len(outputs)
        arrays = [*inputs, *outputs]
        addresses = self.allocate(arrays, is_input)
        *scratch, smem_bytes = np.cumsum([0] + [math.prod(s.shape) for s in scratch_types]).tolist()
        refs = [*addresses, *(SMEM_BASE + offset for offset in scratch)]

        programs = list(range(math.prod(grid)))
        self.random.shuffle(programs)
        num_warps = 4 * num_threads
        with ThreadPoolExecutor(num_warps) as pool:
            for program in programs:
                Cta(self, program, num_warps, smem_bytes).run(lambda: body(*refs), pool)

        for array, address, given in zip(arrays, addresses, is_input, strict=True):
            if not given:
                start = address - GMEM_BASE
                data = self.gmem.data[start : start + array.nbytes]
                array[...] = data.view(array.dtype).reshape(array.shape)
        return jax.tree.unflatten(jax.tree.structure(out_type), map(jnp.asarray, outputs))

    def allocate(self, arrays, is_input):
        """Puts arrays into global memory; returns their addresses."""
        starts = [GUARD_BYTES]
        for array in arrays:
            starts.append(starts[-1] + -(-array.nbytes // 256) * 256 + GUARD_BYTES)
        data = np.full(starts[-1], NAN_BYTE, np.uint8)
        access = np.full(starts[-1], UNMAPPED, np.uint8)
        for array, start, given in zip(arrays, starts, is_input, strict=False):
            place = slice(start, start + array.nbytes)
            data[place] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            access[place] = READ_ONLY if given else WRITE_ONLY
        self.gmem = Memory(data, GMEM_BASE, access)
        return [GMEM_BASE + start for start in starts[:-1]]

    def program(self, axis_name):
        """Stands in for `lax.axis_index`."""
        warp = getattr(local, "warp", None)
        return self.axis_index(axis_name) if warp is None else Program(warp.cta.program)


def not_emulated(text, *arguments, **options):
    raise NotImplementedError(f"the emulator has no stand-in for {text!r}")


@contextlib.contextmanager
def emulated(seed=0):
    """Within this context, kernels run on the emulator, outside of jit.

    Args:
      seed: of all random choices. Several calls within one context take different ones.
    """
    device = Device(seed)
    kernel_modules = [m for name, m in sys.modules.items() if name.startswith("pallas_kernels")]
    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        for module in kernel_modules:
            if getattr(module, "Reg", None) is hw.Reg and module is not hw:
                patch.setattr(module, "Reg", Reg)
            if hasattr(module, "merge_partials_sm90"):  # in plain Pallas: interpreted
                function = functools.partial(module.merge_partials_sm90, interpret=True)
                patch.setattr(module, "merge_partials_sm90", function)
        patch.setattr(hw, "Reg", Reg)
        for name, function in PRIMITIVES.items():
            assert hasattr(hw, name)
            patch.setattr(hw, name, function)
        for name in ("_asm", "_asm_in_place"):
            patch.setattr(hw, name, not_emulated)
        patch.setattr(plgpu, "kernel", device.kernel)
        patch.setattr(plgpu, "inline_mgpu", lambda arg_types: lambda f: functools.partial(f, None))
        patch.setattr(plgpu, "griddepcontrol_wait", lambda: None)
        patch.setattr(jax.lax, "axis_index", device.program)
        patch.setattr(jax, "new_ref", MutableRef)
        patch.setattr(jax, "freeze", lambda ref: jnp.asarray(ref.array))
        yield
