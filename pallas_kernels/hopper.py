"""PTX-level primitives of Hopper (sm_90a) that Pallas has no operation for.

The kernels of this package run one algorithm per *warp*; Pallas arrays belong to a whole warpgroup.
So their inner loops are written on the registers of a single thread, inside
`plgpu.inline_mgpu` blocks with Lane semantics, with the vocabulary of this file:

- `Reg`: one 32-bit, 64-bit or predicate register of every thread, with Python's operators.
  Integers are unsigned: `//`, `%`, `>>`, `<` and conversions treat them as u32 / u64.
- loads, stores and asynchronous copies, by address;
- warp collectives, barriers, conversions and `mma.sync`;
- `when`, `for_loop`, `cond`: structured control flow over (nested lists of) `Reg`.

Each primitive's docstring gives its PTX instruction and what it computes in plain jnp. The plain
form treats a register of a warp as an array `[32]` over lanes; `lane` is `jnp.arange(32)`, and
`g, c = lane // 4, lane % 4` are a lane's row and column in a matrix fragment.

`mma_m16n8k16` fragments, which every kernel here builds on (16-bit elements go in pairs, the lower
index in the lower half of the register):

    A [16 x 16]  a0 = A[g, 2c:2c+2]      a1 = A[g+8, 2c:2c+2]
                 a2 = A[g, 2c+8:2c+10]   a3 = A[g+8, 2c+8:2c+10]
    B [16 x 8]   b0 = B[2c:2c+2, g]      b1 = B[2c+8:2c+10, g]
    C [16 x 8]   c0, c1 = C[g, 2c:2c+2]  c2, c3 = C[g+8, 2c:2c+2]     (float32)
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

WARP = 32
"""Threads of a warp."""

SMEM_BYTES = 227 * 1024
"""Shared memory that one CTA can have."""

SM_SMEM_BYTES = 228 * 1024
"""Shared memory of an SM; each resident CTA also costs `SMEM_BYTES_PER_CTA` of it."""

SMEM_BYTES_PER_CTA = 1024
"""Shared memory that the hardware keeps for itself per resident CTA."""

NUM_SMS = 132
"""SMs of an H100 SXM and of an H200; launch heuristics are sized by it."""

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

NO_MAXIMUM = -3.4028234e38
"""A running maximum before the first score: float32's lowest number.

Finite, so that exp(-inf - maximum) is 0 and not NaN.
"""


# ------------------------------------------------------------------------------------ registers


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _f32() -> ir.Type:
    return ir.F32Type.get()


def _wrap(value: int | float, bits: int) -> int:
    """An unsigned constant as the signed integer of the same bits, which MLIR wants."""
    value = int(value) % (1 << bits)
    return value - (1 << bits) if value >> (bits - 1) else value


@dataclasses.dataclass(frozen=True, eq=False)
class Reg:
    """A register of every thread: an MLIR value of type i1, i32, i64 or f32."""

    value: ir.Value

    @property
    def type(self) -> ir.Type:
        return self.value.type

    @property
    def is_float(self) -> bool:
        return isinstance(self.type, ir.F32Type)

    def _operand(self, other: "Reg | int | float") -> ir.Value:
        """`other` as a value of this register's type; Python numbers become constants."""
        if isinstance(other, Reg):
            if other.type != self.type:
                raise TypeError(f"{self.type} register combined with {other.type}")
            return other.value
        if self.is_float:
            return utils.c(float(other), self.type)
        return utils.c(_wrap(other, 64 if self.type == _i64() else 32), self.type)

    def _arithmetic(self, other: "Reg | int | float", on_float: Any, on_int: Any) -> "Reg":
        operand = self._operand(other)
        if self.is_float:
            return Reg(on_float(self.value, operand, fastmath=arith.FastMathFlags.contract))
        return Reg(on_int(self.value, operand))

    def __add__(self, other: "Reg | int | float") -> "Reg":
        return self._arithmetic(other, arith.addf, arith.addi)

    def __sub__(self, other: "Reg | int | float") -> "Reg":
        return self._arithmetic(other, arith.subf, arith.subi)

    def __mul__(self, other: "Reg | int | float") -> "Reg":
        return self._arithmetic(other, arith.mulf, arith.muli)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: "int | float") -> "Reg":
        return Reg(self._operand(other)) - self

    def __floordiv__(self, other: "Reg | int") -> "Reg":
        return Reg(arith.divui(self.value, self._operand(other)))

    def __mod__(self, other: "Reg | int") -> "Reg":
        return Reg(arith.remui(self.value, self._operand(other)))

    def __and__(self, other: "Reg | int") -> "Reg":
        return Reg(arith.andi(self.value, self._operand(other)))

    def __or__(self, other: "Reg | int") -> "Reg":
        return Reg(arith.ori(self.value, self._operand(other)))

    def __xor__(self, other: "Reg | int") -> "Reg":
        return Reg(arith.xori(self.value, self._operand(other)))

    def __lshift__(self, other: "Reg | int") -> "Reg":
        return Reg(arith.shli(self.value, self._operand(other)))

    def __rshift__(self, other: "Reg | int") -> "Reg":
        return Reg(arith.shrui(self.value, self._operand(other)))

    def _compare(self, other: "Reg | int | float", name: str) -> "Reg":
        operand = self._operand(other)
        if self.is_float:
            predicate = getattr(arith.CmpFPredicate, "O" + name.upper())
            return Reg(arith.cmpf(predicate, self.value, operand))
        unsigned = name if name in ("eq", "ne") else "u" + name
        return Reg(arith.cmpi(getattr(arith.CmpIPredicate, unsigned), self.value, operand))

    def __lt__(self, other: "Reg | int | float") -> "Reg":
        return self._compare(other, "lt")

    def __gt__(self, other: "Reg | int | float") -> "Reg":
        return self._compare(other, "gt")

    def __ge__(self, other: "Reg | int | float") -> "Reg":
        return self._compare(other, "ge")

    def eq(self, other: "Reg | int | float") -> "Reg":
        """`self == other`; a method, because `==` on registers is left to Python."""
        return self._compare(other, "eq")

    def ne(self, other: "Reg | int | float") -> "Reg":
        """`self != other`."""
        return self._compare(other, "ne")

    def __bool__(self) -> bool:
        raise TypeError("a register has no value while the kernel is being built; use `when`")


def u32(value: int) -> Reg:
    """A 32-bit integer constant."""
    return Reg(utils.c(_wrap(value, 32), _i32()))


def f32(value: float) -> Reg:
    """A float32 constant."""
    return Reg(utils.c(float(value), _f32()))


def u64(value: Reg) -> Reg:
    """Zero extension: `value.astype(uint64)`."""
    return Reg(arith.extui(_i64(), value.value))


def select(condition: Reg, on_true: Reg, on_false: Reg) -> Reg:
    """`jnp.where(condition, on_true, on_false)`."""
    return Reg(arith.select(condition.value, on_true.value, on_false.value))


def minimum(a: Reg, b: Reg | int) -> Reg:
    """`jnp.minimum(a, b)` of unsigned integers."""
    return Reg(arith.minui(a.value, a._operand(b)))


def maximum_u32(a: Reg, b: Reg | int) -> Reg:
    """`jnp.maximum(a, b)` of unsigned integers."""
    return Reg(arith.maxui(a.value, a._operand(b)))


def _asm(
    text: str,
    *operands: Reg,
    out: Any = None,
    effects: bool = False,
    convergent: bool = False,
) -> Any:
    """Inline PTX; `$0`, `$1`, ... number the results first, then the operands.

    `effects` keeps its order among other instructions with effects (memory, barriers).
    `convergent` forbids the compiler to move it into or duplicate it over divergent branches;
    everything that several threads execute together needs it.
    """
    values = [operand.value for operand in operands]
    result = utils.inline_ptx(
        text, *values, result_types=out, has_side_effects=effects, convergent=convergent
    )
    if out is None:
        return None
    return Reg(result) if isinstance(out, ir.Type) else [Reg(r) for r in result]


def recomputed(x: Reg) -> Reg:
    """`x`, of which the compiler knows nothing: what depends on it is computed after this.

    Otherwise addresses that several places need are computed once, early, and kept in registers.
    """
    return _asm("mov.b32 $0, $1;", x, out=x.type, effects=True)


# ----------------------------------------------------------------------------------- thread ids


def thread_index() -> Reg:
    """Thread of the CTA, 0 .. threads - 1."""
    return Reg(utils.thread_idx())


def warp_index() -> Reg:
    """Warp of the CTA; broadcast from lane 0 so that the compiler knows that it is uniform."""
    return shuffle_index(thread_index() >> 5, u32(0))


# ------------------------------------------------------------------------------- floating point


def fma(a: Reg, b: Reg, c: Reg) -> Reg:
    """`fma.rn.f32`: `a * b + c`, rounded once."""
    return _asm("fma.rn.f32 $0, $1, $2, $3;", a, b, c, out=_f32())


def multiply(a: Reg, b: Reg) -> Reg:
    """`mul.rn.f32`: `a * b`, rounded; unlike the operator's, never part of an fma."""
    return _asm("mul.rn.f32 $0, $1, $2;", a, b, out=_f32())


def maximum(a: Reg, b: Reg) -> Reg:
    """`max.f32`: `jnp.fmax(a, b)` (a NaN operand is ignored)."""
    return _asm("max.f32 $0, $1, $2;", a, b, out=_f32())


def divide(a: Reg, b: Reg) -> Reg:
    """`div.rn.f32`: `a / b`, correctly rounded."""
    return _asm("div.rn.f32 $0, $1, $2;", a, b, out=_f32())


def exp2(x: Reg) -> Reg:
    """`ex2.approx.ftz.f32`: `jnp.exp2(x)` to 2 ulp; `exp2(-inf) = 0`."""
    return _asm("ex2.approx.ftz.f32 $0, $1;", x, out=_f32())


def log2(x: Reg) -> Reg:
    """`lg2.approx.ftz.f32`: `jnp.log2(x)`, absolute error 2**-22; `log2(0) = -inf`."""
    return _asm("lg2.approx.ftz.f32 $0, $1;", x, out=_f32())


def reciprocal(x: Reg) -> Reg:
    """`rcp.approx.ftz.f32`: `1 / x` to 1 ulp; `reciprocal(inf) = 0`."""
    return _asm("rcp.approx.ftz.f32 $0, $1;", x, out=_f32())


def as_f32(bits: Reg) -> Reg:
    """`lax.bitcast_convert_type(bits, jnp.float32)`."""
    return Reg(arith.bitcast(_f32(), bits.value))


def as_u32(x: Reg) -> Reg:
    """`lax.bitcast_convert_type(x, jnp.uint32)`."""
    return Reg(arith.bitcast(_i32(), x.value))


# ---------------------------------------------------------------------------------- conversions


def e4m3x4_to_f16x2(packed: Reg) -> tuple[Reg, Reg]:
    """Two `cvt.rn.f16x2.e4m3x2`: 4 e4m3 bytes -> f16 pairs (bytes 0, 1) and (bytes 2, 3). Exact.

    Plain: `bitcast(packed, float8_e4m3fn).astype(float16)`.
    """
    low, high = _asm(
        "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2;"
        " cvt.rn.f16x2.e4m3x2 $0, lo; cvt.rn.f16x2.e4m3x2 $1, hi; }",
        packed,
        out=[_i32(), _i32()],
    )
    return low, high


def f32x4_to_e4m3(a: Reg, b: Reg, c: Reg, d: Reg) -> Reg:
    """Two `cvt.rn.satfinite.e4m3x2.f32`: 4 floats -> 4 e4m3 bytes, `a` in the lowest.

    Plain: `jnp.clip(x, -448, 448).astype(float8_e4m3fn)` (round to nearest even).
    """
    return _asm(
        "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1;"
        " cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; mov.b32 $0, {lo, hi}; }",
        *(a, b, c, d),
        out=_i32(),
    )


def f16x2(low: Reg, high: Reg) -> Reg:
    """`cvt.rn.f16x2.f32`: `(low, high).astype(float16)` in one register."""
    return _asm("cvt.rn.f16x2.f32 $0, $2, $1;", low, high, out=_i32())


def bf16x2(low: Reg, high: Reg) -> Reg:
    """`cvt.rn.bf16x2.f32`: `(low, high).astype(bfloat16)` in one register."""
    return _asm("cvt.rn.bf16x2.f32 $0, $2, $1;", low, high, out=_i32())


def bf16x2_to_f32(pair: Reg) -> tuple[Reg, Reg]:
    """`bitcast(pair, bfloat16).astype(float32)`: a shift and a mask."""
    return as_f32(pair << 16), as_f32(pair & 0xFFFF0000)


def multiply_f16x2(a: Reg, b: Reg) -> Reg:
    """`mul.rn.f16x2`: elementwise product of two float16 pairs."""
    return _asm("mul.rn.f16x2 $0, $1, $2;", a, b, out=_i32())


def multiply_bf16x2(a: Reg, b: Reg) -> Reg:
    """`mul.rn.bf16x2`: elementwise product of two bfloat16 pairs."""
    return _asm("mul.rn.bf16x2 $0, $1, $2;", a, b, out=_i32())


def maximum_u16x2(a: Reg, b: Reg) -> Reg:
    """`max.u16x2`: elementwise maximum of two pairs of 16-bit unsigned integers."""
    return _asm("max.u16x2 $0, $1, $2;", a, b, out=_i32())


def permute_bytes(x: Reg, selector: int) -> Reg:
    """`prmt.b32`: result byte i is byte `(selector >> 4 i) & 3` of `x`."""
    return _asm(f"prmt.b32 $0, $1, $1, {selector};", x, out=_i32())


# --------------------------------------------------------------------------------------- memory


def shared_address(ref: ir.Value) -> Reg:
    """The 32-bit shared-memory address of a ref's first byte."""
    return Reg(llvm.ptrtoint(_i32(), utils.memref_ptr(ref)))


def global_address(ref: ir.Value) -> Reg:
    """The 64-bit address of a ref's first byte."""
    return Reg(llvm.ptrtoint(_i64(), utils.memref_ptr(ref)))


def element_address(base: Reg, index: Reg, stride_bytes: int) -> Reg:
    """`base + index * stride_bytes` in 64 bits, for arrays beyond 2**32 bytes."""
    return base + u64(index) * stride_bytes


_VECTOR = {1: "", 2: ".v2", 4: ".v4"}


def _load(space: str, address: Reg, offset: int, words: int, is_float: bool) -> list[Reg]:
    kind = "f32" if is_float else "b32"
    results = ", ".join(f"${i}" for i in range(words))
    results = f"{{{results}}}" if words > 1 else results
    return _asm(
        f"ld.{space}{_VECTOR[words]}.{kind} {results}, [${words}+{offset}];",
        address,
        out=[_f32() if is_float else _i32()] * words,
        effects=True,
    )


def _store(space: str, address: Reg, offset: int, values: Sequence[Reg]) -> None:
    kind = "f32" if values[0].is_float else "b32"
    operands = ", ".join(f"${i + 1}" for i in range(len(values)))
    operands = f"{{{operands}}}" if len(values) > 1 else operands
    _asm(f"st.{space}{_VECTOR[len(values)]}.{kind} [$0+{offset}], {operands};", address, *values)


def load_shared(address: Reg, offset: int = 0, *, words: int = 4) -> list[Reg]:
    """`ld.shared`: 1, 2 or 4 consecutive 32-bit words as integers."""
    return _load("shared", address, offset, words, is_float=False)


def load_shared_f32(address: Reg, offset: int = 0, *, words: int = 4) -> list[Reg]:
    """`ld.shared`: 1, 2 or 4 consecutive floats."""
    return _load("shared", address, offset, words, is_float=True)


def store_shared(address: Reg, values: Sequence[Reg], offset: int = 0) -> None:
    """`st.shared`: 1, 2 or 4 consecutive 32-bit words."""
    _store("shared", address, offset, values)


def load_global(address: Reg, offset: int = 0, *, words: int = 1) -> list[Reg]:
    """`ld.global.nc`: words that no thread writes while the kernel runs."""
    return _load("global.nc", address, offset, words, is_float=False)


def prefetch_global(address: Reg) -> None:
    """`prefetch.global.L2`: starts bringing the 128 bytes around an address to the L2 cache."""
    _asm("prefetch.global.L2 [$0];", address, effects=True)


def store_global(address: Reg, values: Sequence[Reg], offset: int = 0) -> None:
    """`st.global`: 1, 2 or 4 consecutive 32-bit words."""
    _store("global", address, offset, values)


def load_matrices_transposed(row_address: Reg, offset: int = 0) -> list[Reg]:
    """`ldmatrix.x4.trans`: four 8 x 8 matrices of 16-bit elements, transposed.

    Lane `8 i + r` gives the address of row r (16 bytes) of matrix i. Plain, with `m[i]` as
    `[8, 8]`: result i of a lane is the pair `m[i][2c:2c+2, g]`.
    """
    return _asm(
        f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$0, $1, $2, $3}}, [$4+{offset}];",
        row_address,
        out=[_i32()] * 4,
        effects=True,
        convergent=True,
    )


def store_matrices_transposed(row_address: Reg, values: Sequence[Reg]) -> None:
    """`stmatrix.x4.trans`: four 8 x 8 matrices of 16-bit elements, transposed.

    The inverse of `load_matrices_transposed`: lane `8 i + r` gives the address of row r of the
    stored matrix i, whose `[2c:2c+2, g]` is register i of a lane.
    """
    _asm(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};",
        row_address,
        *values,
        convergent=True,
    )


# ----------------------------------------------------------------------------- warp collectives


def shuffle_xor(x: Reg, mask: int) -> Reg:
    """`shfl.sync.bfly`: `x[lane ^ mask]`."""
    return _asm(
        f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, 0xffffffff;",
        x,
        out=x.type,
        effects=True,
        convergent=True,
    )


def shuffle_index(x: Reg, source: Reg) -> Reg:
    """`shfl.sync.idx`: `x[source]`."""
    return _asm(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
        x,
        source,
        out=x.type,
        effects=True,
        convergent=True,
    )


def ballot(condition: Reg) -> Reg:
    """`vote.sync.ballot`: bit i is lane i's condition; the same in every lane."""
    return _asm(
        "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }",
        Reg(arith.extui(_i32(), condition.value)),
        out=_i32(),
        effects=True,
        convergent=True,
    )


def any_lane(condition: Reg) -> Reg:
    """`jnp.any(condition)` over the warp."""
    return ballot(condition).ne(0)


def reduce_max_u32(x: Reg) -> Reg:
    """`redux.sync.max.u32`: `jnp.max(x)` over the warp, unsigned."""
    return _asm(
        "redux.sync.max.u32 $0, $1, 0xffffffff;", x, out=_i32(), effects=True, convergent=True
    )


def reduce_add_u32(x: Reg) -> Reg:
    """`redux.sync.add.u32`: `jnp.sum(x)` over the warp."""
    return _asm(
        "redux.sync.add.u32 $0, $1, 0xffffffff;", x, out=_i32(), effects=True, convergent=True
    )


def cumulative_sum_u32(x: Reg) -> Reg:
    """`jnp.cumsum(x)` over the warp's lanes, by five `shfl.sync.up`."""
    for distance in (1, 2, 4, 8, 16):
        x = _asm(
            "{ .reg .b32 y; .reg .pred p;"
            f" shfl.sync.up.b32 y|p, $1, {distance}, 0, 0xffffffff;"
            " mov.b32 $0, $1; @p add.u32 $0, $0, y; }",
            x,
            out=_i32(),
            effects=True,
            convergent=True,
        )
    return x


def population_count(x: Reg) -> Reg:
    """`popc.b32`: `lax.population_count(x)`."""
    return _asm("popc.b32 $0, $1;", x, out=_i32())


def transpose_matrix(x: Reg) -> Reg:
    """`movmatrix.trans`: an 8 x 8 matrix of 16-bit elements, row g in lanes 4 g .. 4 g + 3.

    Plain: `x.reshape(8, 8).T` for the 64 elements in lane order.
    """
    return _asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", x, out=_i32(), convergent=True)


def mma_m16n8k16(c: Sequence[Reg], a: Sequence[Reg], b: Sequence[Reg], dtype: str) -> list[Reg]:
    """`mma.sync.m16n8k16` of `dtype` "f16" or "bf16": `C + A @ B` in float32, by fragments."""
    return _asm(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
        " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        *(*a, *b, *c),
        out=[_f32()] * 4,
        convergent=True,
    )


# -------------------------------------------------------------------------- warpgroup collectives


def _asm_in_place(text: str, in_place: Sequence[Reg], operands: Sequence[Reg]) -> list[Reg]:
    """Inline PTX that updates registers: `$0`, `$1`, ... are `in_place`, then the operands.

    Asynchronous instructions need it: their accumulators must stay where they are.
    """
    if not in_place:
        _asm(text, *operands, effects=True, convergent=True)
        return []
    n = len(in_place)
    # LLVM numbers the tied inputs, too.
    text = re.sub(r"\$(\d+)", lambda m: f"${int(m[1]) + n * (int(m[1]) >= n)}", text)
    letters = {"f32": "f", "i32": "r", "i64": "l"}
    constraints = [
        *("=" + letters[str(r.type)] for r in in_place),
        *map(str, range(n)),
        *(letters[str(r.type)] for r in operands),
    ]
    values = [r.value for r in (*in_place, *operands)]
    types = [r.type for r in in_place]
    result = llvm.inline_asm(
        types[0] if n == 1 else llvm.StructType.get_literal(types),
        values,
        text,
        ",".join(constraints),
        has_side_effects=True,
        convergent=True,
    )
    if n == 1:
        return [Reg(result)]
    return [Reg(llvm.extractvalue(t, result, [i])) for i, t in enumerate(types)]


def matrix_descriptor(address: Reg) -> Reg:
    """`wgmma`'s 64-bit name of a B operand in shared memory, at a multiple of 1024 bytes.

    The operand is `[64 n, 64 k]` of 16-bit elements, a row of 128 bytes per n, in the 128-byte
    swizzle: 16-byte piece j of row n lies at piece `j ^ (n % 8)`.
    """
    swizzle_128, stride_of_8_rows = 1 << 62, 1024 >> 4
    return u64((address & 0x3FFFF) >> 4) | (swizzle_128 | stride_of_8_rows << 32 | 1 << 16)


class WgmmaStep(NamedTuple):
    """One `wgmma.m64n64k16`: `accumulators[target] += A @ B`."""

    target: int
    a: Sequence[Reg]
    offset: int  # bytes from the descriptor's address to B's first column, a multiple of 16


def wgmma_m64n64k16(
    accumulators: Sequence[Sequence[Reg]], b: Reg, steps: Sequence[WgmmaStep], dtype: str
) -> list[list[Reg]]:
    """Starts a group of `wgmma.mma_async` of `dtype` "f16" or "bf16", in order.

    Warp w of the warpgroup holds rows 16 w .. 16 w + 15: of A as `mma_m16n8k16`'s A fragment, of an
    accumulator `[64, 64]` as 8 of its C fragments side by side. Nothing of either may be touched
    before `wgmma_wait`. An empty accumulator is a new one, from zero. `b` is a `matrix_descriptor`;
    the 16 columns of k-step s begin at offset `32 * s`.
    """
    zero = f32(0.0)
    fresh = [not acc for acc in accumulators]
    flat = [r for acc in accumulators for r in (list(acc) or [zero] * 32)]
    operands = [b]
    # The additions are in here, so that LLVM does not keep every descriptor in registers.
    lines = ["wgmma.fence.sync.aligned;"]
    for step in steps:
        acc = ", ".join(f"${32 * step.target + i}" for i in range(32))
        first = len(flat) + len(operands)
        a = ", ".join(f"${first + i}" for i in range(4))
        operands += step.a
        accumulate = int(not fresh[step.target])
        fresh[step.target] = False
        lines.append(
            f"setp.ne.b32 p, {accumulate}, 0; add.s64 d, ${len(flat)}, {step.offset >> 4};"
            f" wgmma.mma_async.sync.aligned.m64n64k16.f32.{dtype}.{dtype}"
            f" {{{acc}}}, {{{a}}}, d, p, 1, 1, 0;"
        )
    lines.append("wgmma.commit_group.sync.aligned;")
    text = "{ .reg .pred p; .reg .b64 d; " + " ".join(lines) + " }"
    flat = _asm_in_place(text, flat, operands)
    return [flat[32 * i : 32 * i + 32] for i in range(len(accumulators))]


def wgmma_wait(pending: int, registers: Sequence[Reg] = ()) -> list[Reg]:
    """`wgmma.wait_group`: until at most `pending` of the newest groups are unfinished.

    `registers` are the finished accumulators; only what is returned may be read.
    """
    return _asm_in_place(f"wgmma.wait_group.sync.aligned {pending};", registers, [])


def set_max_registers(count: int, *, increase: bool) -> None:
    """`setmaxnreg`: registers of a thread of this warpgroup from here on, a multiple of 8."""
    action = "inc" if increase else "dec"
    _asm(f"setmaxnreg.{action}.sync.aligned.u32 {count};", effects=True, convergent=True)


# ------------------------------------------------------------- barriers and asynchronous copies


def warp_sync() -> None:
    """`bar.warp.sync`: all lanes arrived, and see each other's memory accesses."""
    _asm("bar.warp.sync 0xffffffff;", effects=True, convergent=True)


def cta_sync() -> None:
    """`bar.sync 0`: all threads of the CTA arrived, and see each other's memory accesses."""
    _asm("bar.sync 0;", effects=True, convergent=True)


def named_barrier(index: Reg, threads: int) -> None:
    """`bar.sync index, threads`: like `cta_sync` for some warps of the CTA.

    Index 0 is `cta_sync`'s; 1 to 4 are Mosaic GPU's, one per warpgroup.
    """
    _asm(f"bar.sync $0, {threads};", index, effects=True, convergent=True)


def named_barrier_any(index: Reg, threads: int, condition: Reg) -> Reg:
    """`bar.red.or`: like `named_barrier`; returns `jnp.any(condition)` over all the threads."""
    result = _asm(
        "{ .reg .pred p, q; setp.ne.s32 p, $2, 0;"
        f" bar.red.or.pred q, $1, {threads}, p; selp.b32 $0, 1, 0, q; }}",
        index,
        Reg(arith.extui(_i32(), condition.value)),
        out=_i32(),
        effects=True,
        convergent=True,
    )
    return result.ne(0)


def mbarrier_init(barrier: Reg, arrivals: int) -> None:
    """`mbarrier.init`: a phase completes after `arrivals` arrivals and all announced bytes."""
    _asm(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", barrier)


def mbarrier_arrive_expect(barrier: Reg, num_bytes: Reg) -> None:
    """`mbarrier.arrive.expect_tx`: one arrival that announces `num_bytes` of async copies."""
    _asm("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", barrier, num_bytes)


def mbarrier_arrive(barrier: Reg) -> None:
    """`mbarrier.arrive`: one arrival."""
    _asm("mbarrier.arrive.shared::cta.b64 _, [$0];", barrier)


def mbarrier_wait(barrier: Reg, parity: Reg) -> None:
    """`mbarrier.try_wait.parity` in a loop: until the phase of that parity has completed."""
    _asm(
        "{ .reg .pred done; WAIT_${:uid}:"
        " mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;"
        " @done bra DONE_${:uid}; bra WAIT_${:uid}; DONE_${:uid}: }",
        barrier,
        parity,
        effects=True,
        convergent=True,
    )


def fence_async_proxy() -> None:
    """`fence.proxy.async`: orders ordinary shared-memory accesses with asynchronous copies."""
    _asm("fence.proxy.async.shared::cta;", effects=True)


def copy_row_to_shared(destination: Reg, source: Reg, num_bytes: int | Reg, barrier: Reg) -> None:
    """`cp.async.bulk`: copies `num_bytes` (a multiple of 16) from global to shared memory.

    Asynchronous; the bytes count towards `barrier`. Every lane may issue its own copy, which keeps
    more rows in flight than one elected thread can.
    """
    size = u32(num_bytes) if isinstance(num_bytes, int) else num_bytes
    _asm(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
        *(destination, source, size, barrier),
    )


# --------------------------------------------------------------------------------- control flow


def _then_block(branch: scf.IfOp) -> ir.Block:
    return branch.regions[0].blocks[0]


def _else_block(branch: scf.IfOp) -> ir.Block:
    return branch.regions[1].blocks[0]


@contextlib.contextmanager
def when(condition: Reg) -> Iterator[None]:
    """`if condition:` for statements that only have effects."""
    with ir.InsertionPoint(_then_block(scf.IfOp(condition.value))):
        yield
        scf.yield_([])


def _flatten(tree: Any) -> tuple[list[ir.Value], Any]:
    leaves, structure = jax.tree.flatten(tree)
    return [leaf.value for leaf in leaves], structure


def for_loop(bound: Reg, init: Any, body: Callable[[Reg, Any], Any]) -> Any:
    """`lax.fori_loop(0, bound, body, init)`; the carry is a nested list of registers."""
    values, structure = _flatten(init)
    loop = scf.ForOp(utils.c(0, _i32()), bound.value, utils.c(1, _i32()), values)
    with ir.InsertionPoint(loop.body):
        carry = jax.tree.unflatten(structure, [Reg(v) for v in loop.inner_iter_args])
        result, result_structure = _flatten(body(Reg(loop.induction_variable), carry))
        if result_structure != structure:
            raise TypeError(f"carry changed from {structure} to {result_structure}")
        scf.yield_(result)
    return jax.tree.unflatten(structure, [Reg(v) for v in loop.results])


def while_loop(condition: Callable[[Any], Reg], body: Callable[[Any], Any], init: Any) -> Any:
    """`lax.while_loop(condition, body, init)`; the carry is a nested list of registers."""
    values, structure = _flatten(init)
    types = [v.type for v in values]
    loop = scf.WhileOp(types, values)

    def block(region: ir.Region) -> ir.Block:
        return ir.Block.create_at_start(region, types, [ir.Location.unknown()] * len(types))

    before, after = block(loop.before), block(loop.after)
    with ir.InsertionPoint(before):
        carry = [Reg(v) for v in before.arguments]
        again = condition(jax.tree.unflatten(structure, carry))
        scf.condition(again.value, [r.value for r in carry])
    with ir.InsertionPoint(after):
        carry = jax.tree.unflatten(structure, [Reg(v) for v in after.arguments])
        result, result_structure = _flatten(body(carry))
        if result_structure != structure:
            raise TypeError(f"carry changed from {structure} to {result_structure}")
        scf.yield_(result)
    return jax.tree.unflatten(structure, [Reg(v) for v in loop.results])


def cond(condition: Reg, on_true: Callable[[], Any], otherwise: Any) -> Any:
    """`on_true() if condition else otherwise`, nested lists of registers of one structure."""
    values, structure = _flatten(otherwise)
    branch = scf.IfOp(condition.value, [v.type for v in values], has_else=True)
    with ir.InsertionPoint(_then_block(branch)):
        result, result_structure = _flatten(on_true())
        if result_structure != structure:
            raise TypeError(f"branches return {result_structure} and {structure}")
        scf.yield_(result)
    with ir.InsertionPoint(_else_block(branch)):
        scf.yield_(values)
    return jax.tree.unflatten(structure, [Reg(v) for v in branch.results])
