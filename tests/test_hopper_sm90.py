"""Every primitive of `pallas_kernels.hopper` does what its docstring says in plain terms."""

import contextlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper as hw
from tests.emulator import emulated

LANES = np.arange(32)
G, C = LANES // 4, LANES % 4


def on_a_warp(function, num_outputs, *inputs):
    """Runs `function(*registers) -> registers` on one warp: uint32 [num_outputs, 32]."""
    operands = [jnp.asarray(np.ascontiguousarray(x).view(np.int32)) for x in inputs]

    def kernel_body(*refs):
        @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
        def warp(ctx, *values):
            del ctx
            *inputs, scratch, out = values[:-2], values[-1], values[-2]
            thread = hw.thread_index()
            lane = thread & 31
            registers = [
                hw.load_global(hw.element_address(hw.global_address(x), lane, 4))[0]
                for x in inputs[0]
            ]
            results = function(hw.shared_address(scratch), *registers)
            with hw.when(thread < 32):
                for i, result in enumerate(results):
                    if not result.is_float and str(result.type) == "i1":
                        result = hw.select(result, hw.u32(1), hw.u32(0))
                    address = hw.element_address(hw.global_address(out), lane, 4)
                    hw.store_global(address, [result], 128 * i)

        warp(*refs)

    kernel = plgpu.kernel(
        kernel_body,
        out_type=jax.ShapeDtypeStruct((num_outputs, 32), jnp.int32),
        scratch_types=[plgpu.SMEM((8192,), jnp.uint8)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel, operands


def pairs(x, dtype):
    """float [32, 2] -> uint32 [32] of two 16-bit floats."""
    return np.ascontiguousarray(np.asarray(x, dtype)).view(np.uint32)[:, 0]


def bits(x):
    return np.ascontiguousarray(np.asarray(x, np.float32)).view(np.uint32)


RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, 2**32, 32, np.uint32)
BYTES = (RNG.normal(size=(32, 4)) * 50).astype(ml_dtypes.float8_e4m3fn)
FLOATS = RNG.normal(size=(32, 4)).astype(np.float32) * 100
FLOATS[0] = [6e4, -6e4, 0, 448]
FLOAT_BITS = [bits(FLOATS[:, i]) for i in range(4)]


def conversions(smem, packed, a, b, c, d):
    del smem
    a, b, c, d = (hw.as_f32(x) for x in (a, b, c, d))
    return [
        *hw.e4m3x4_to_f16x2(packed),
        hw.f32x4_to_e4m3(a, b, c, d),
        hw.f16x2(a, b),
        hw.bf16x2(a, b),
        *hw.bf16x2_to_f32(hw.bf16x2(a, b)),
        hw.permute_bytes(packed, 0x3120),
    ]


def conversions_plain():
    halves = BYTES.astype(np.float16)
    rounded = FLOATS[:, :2].astype(ml_dtypes.bfloat16)
    packed = BYTES.view(np.uint8)
    clipped = np.clip(FLOATS, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return [
        pairs(halves[:, :2], np.float16),
        pairs(halves[:, 2:], np.float16),
        clipped.view(np.uint32)[:, 0],
        pairs(FLOATS[:, :2], np.float16),
        pairs(FLOATS[:, :2], ml_dtypes.bfloat16),
        bits(rounded[:, 0]),
        bits(rounded[:, 1]),
        np.ascontiguousarray(packed[:, [0, 2, 1, 3]]).view(np.uint32)[:, 0],
    ]


def arithmetic(smem, x, y, a, b):
    del smem
    a, b = hw.as_f32(a), hw.as_f32(b)
    return [
        x + y,
        5 - x,
        x // 7,
        x % 7,
        x >> 3,
        x < y,
        hw.minimum(x, y),
        hw.maximum_u32(x, 1 << 31),
        hw.maximum_u16x2(x, y),
        hw.population_count(x),
        hw.maximum(a, b),
        hw.fma(a, b, a),
        hw.divide(a, b),
        hw.select(a > b, x, y),
        x ^ y,
        hw.multiply(a, b),
        hw.multiply_f16x2(hw.f16x2(a * 0.01, b), hw.f16x2(b, b * 0.01)),
        hw.multiply_bf16x2(hw.bf16x2(a, b), hw.bf16x2(b, b)),
        hw.recomputed(x) + y,
    ]


def products(a, b, c, d, *, dtype):
    """Pairs (a c, b d) of rounded factors."""
    factors = [np.stack(x, axis=1).astype(dtype).astype(np.float32) for x in ((a, b), (c, d))]
    return pairs(factors[0] * factors[1], dtype)


def small(x):
    return x * np.float32(0.01)


def arithmetic_plain():
    x, y = WORDS, WORDS[::-1]
    a, b = FLOATS[:, 0], FLOATS[:, 1]
    with np.errstate(over="ignore"):
        wide = (a.astype(np.float64) * b + a).astype(np.float32)
        halves = np.maximum(x.view(np.uint16), np.ascontiguousarray(y).view(np.uint16))
        return [
            x + y,
            np.uint32(5) - x,
            x // 7,
            x % 7,
            x >> 3,
            (x < y).astype(np.uint32),
            np.minimum(x, y),
            np.maximum(x, np.uint32(1 << 31)),
            halves.view(np.uint32),
            np.bitwise_count(x).astype(np.uint32),
            bits(np.maximum(a, b)),
            bits(wide),
            bits(a / b),
            np.where(a > b, x, y),
            x ^ y,
            bits(a * b),
            products(small(a), b, b, small(b), dtype=np.float16),
            products(a, b, b, b, dtype=ml_dtypes.bfloat16),
            x + y,
        ]


def collectives(smem, x):
    del smem
    odd = (x & 1).ne(0)
    return [
        hw.shuffle_xor(x, 5),
        hw.shuffle_index(x, x & 31),
        hw.ballot(odd),
        hw.any_lane(odd),
        hw.reduce_max_u32(x),
        hw.transpose_matrix(x),
        hw.reduce_add_u32(x & 0xFF),
        hw.cumulative_sum_u32(x & 0xFF),
        hw.named_barrier_any(hw.u32(8), 128, hw.thread_index().eq(77)),
        hw.named_barrier_any(hw.u32(8), 128, hw.thread_index().eq(128)),
    ]


def collectives_plain():
    x = WORDS
    odd = (x & 1).astype(np.uint32)
    matrix = np.ascontiguousarray(x).view(np.uint16).reshape(8, 8)
    return [
        x[LANES ^ 5],
        x[x & 31],
        np.full(32, (odd << LANES).sum(), np.uint32),
        np.full(32, odd.any(), np.uint32),
        np.full(32, x.max(), np.uint32),
        np.ascontiguousarray(matrix.T).view(np.uint32).reshape(-1),
        np.full(32, (x & 0xFF).sum(), np.uint32),
        np.cumsum(x & 0xFF).astype(np.uint32),
        np.ones(32, np.uint32),
        np.zeros(32, np.uint32),
    ]


def control_flow(smem, x):
    del smem

    def body(i, carry):
        total, (count,) = carry
        return total + i, [count + 1]

    total, (count,) = hw.for_loop(x & 15, (x, [hw.u32(0)]), body)
    # A warp-uniform condition: all lanes take the same branch.
    chosen = hw.cond(hw.any_lane(x.eq(0)), lambda: [x + 1], [x + 2])
    return [total, count, *chosen]


def control_flow_plain():
    n = WORDS & 15
    return [WORDS + n * (n - 1) // 2, n, WORDS + 2]


A = RNG.normal(size=(16, 16)).astype(np.float16)
B = RNG.normal(size=(16, 8)).astype(np.float16)
MATRICES = RNG.integers(0, 2**16, (4, 8, 8), np.uint16)


def matrices(smem, a0, a1, a2, a3, b0, b1, *rows):
    """The MMA; ldmatrix on rows that lane 8 i + r stores as row r of matrix i; stmatrix back."""
    lane = hw.thread_index() & 31
    zero = hw.f32(0.0)
    product = hw.mma_m16n8k16([zero] * 4, [a0, a1, a2, a3], [b0, b1], "f16")
    row = smem + lane * 16
    hw.store_shared(row, rows)
    hw.warp_sync()
    transposed = hw.load_matrices_transposed(row)
    hw.store_matrices_transposed(row + 512, transposed)
    hw.warp_sync()
    return [*product, *transposed, *hw.load_shared(row, 512)]


def matrices_inputs():
    def pair(m, row, column):
        return pairs(np.stack([m[row, column], m[row, column + 1]], axis=1), m.dtype)

    transposed = np.ascontiguousarray(B.T)
    return [
        pair(A, G, 2 * C),
        pair(A, G + 8, 2 * C),
        pair(A, G, 2 * C + 8),
        pair(A, G + 8, 2 * C + 8),
        pair(transposed, G, 2 * C),
        pair(transposed, G, 2 * C + 8),
        *MATRICES.reshape(32, 8).view(np.uint32).T,
    ]


def matrices_plain():
    product = A.astype(np.float64) @ B.astype(np.float64)
    c = [product[G, 2 * C], product[G, 2 * C + 1], product[G + 8, 2 * C], product[G + 8, 2 * C + 1]]
    transposed = [
        np.ascontiguousarray(np.stack([m[2 * C, G], m[2 * C + 1, G]], axis=1)).view(np.uint32)[:, 0]
        for m in MATRICES
    ]
    return [*map(bits, c), *transposed, *MATRICES.reshape(32, 8).view(np.uint32).T]


WIDE_B = RNG.normal(size=(64, 64)).astype(np.float16)  # [n, k]
K_STEP = 2


def warpgroup_mma(smem, *inputs):
    """Two products into one accumulator; every warp has the same 16 rows of A."""
    a, b = inputs[:4], inputs[4:]
    lane = hw.thread_index() & 31
    for i, word in enumerate(b):
        hw.store_shared(smem + lane * 4, [word], 128 * i)
    hw.fence_async_proxy()
    hw.cta_sync()
    step = hw.WgmmaStep(0, a, 32 * K_STEP)
    (acc,) = hw.wgmma_m64n64k16([[]], hw.matrix_descriptor(smem), [step], "f16")
    (acc,) = hw.wgmma_m64n64k16([acc], hw.matrix_descriptor(smem), [step], "f16")
    return hw.wgmma_wait(0, acc)


def warpgroup_mma_inputs():
    pieces = WIDE_B.reshape(64, 8, 8)  # [row, 16-byte piece, element]
    swizzled = np.empty_like(pieces)
    for row in range(64):
        for j in range(8):
            swizzled[row, j ^ row % 8] = pieces[row, j]
    return [*matrices_inputs()[:4], *swizzled.reshape(64, 64).view(np.uint32)]


def warpgroup_mma_plain():
    columns = slice(16 * K_STEP, 16 * K_STEP + 16)
    product = 2 * A.astype(np.float64) @ WIDE_B[:, columns].T.astype(np.float64)
    return [
        bits(product[G + 8 * (i // 2), 8 * n + 2 * C + i % 2]) for n in range(8) for i in range(4)
    ]


CASES = {
    "conversions": (conversions, conversions_plain, [BYTES.view(np.uint32)[:, 0], *FLOAT_BITS]),
    "arithmetic": (arithmetic, arithmetic_plain, [WORDS, WORDS[::-1], *FLOAT_BITS[:2]]),
    "collectives": (collectives, collectives_plain, [WORDS]),
    "control_flow": (control_flow, control_flow_plain, [WORDS]),
    "matrices": (matrices, matrices_plain, matrices_inputs()),
    "warpgroup_mma": (warpgroup_mma, warpgroup_mma_plain, warpgroup_mma_inputs()),
}


@pytest.mark.parametrize("case", CASES)
def test_lowers(case):
    function, plain, inputs = CASES[case]
    kernel, operands = on_a_warp(function, len(plain()), *inputs)
    text = jax.jit(kernel).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param(contextlib.nullcontext, id="gpu", marks=pytest.mark.gpu),
        pytest.param(emulated, id="emulated"),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_computes_its_plain_form(case, machine):
    """On a GPU; and on the emulator, which is held to the same meaning."""
    function, plain, inputs = CASES[case]
    expected = plain()
    with machine():
        kernel, operands = on_a_warp(function, len(expected), *inputs)
        actual = np.asarray(jax.jit(kernel)(*operands)).view(np.uint32)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if case == "warpgroup_mma" or (
            case == "matrices" and i < 4
        ):  # float32 sums in another order
            np.testing.assert_allclose(a.view(np.float32), e.view(np.float32), atol=1e-5)
        else:
            np.testing.assert_array_equal(a, e, err_msg=f"output {i}")


def test_registers_refuse_what_would_go_wrong_silently():
    refused = []

    def function(smem, x):
        for mistake in (lambda: bool(x.eq(0)), lambda: x + hw.f32(1.0)):
            with pytest.raises(TypeError) as caught:
                mistake()
            refused.append(str(caught.value))
        return [x]

    kernel, operands = on_a_warp(function, 1, WORDS)
    jax.jit(kernel).trace(*operands).lower(lowering_platforms=("cuda",))
    assert "use `when`" in refused[0]
    assert "combined with" in refused[1]
