"""Sixteen float32 lanes as one numba value: the arithmetic that the CPU scans are written in.

`Float32x16` is LLVM's `<16 x float>`; the compiler lowers it to whatever the machine has (one AVX-512, two AVX2 or four
NEON registers), so vectorisation does not depend on an optimiser's mood. Memory is addressed by an integer address and
an offset counted in floats, which lets a kernel read slices of larger tensors where they lie.

`exp2` is accurate to 8e-8 (relative), exact at zero, and passes NaN on; arguments are clamped to [-126, 127], so it
never returns 0 or infinity. `softplus` has no threshold. Fast-math must stay off in kernels: it would fold the rounding
by a magic number away.
"""

import hashlib
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16

# Numba keys its disk cache on a kernel's own file; kernels close over this, so that an edit here recompiles them too.
_SHARED = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("simd.py", "threads.py"))
STAMP = hashlib.sha256(_SHARED).hexdigest()[:16]

LOG2_E = 1.4426950408889634
_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds a float32 to the nearest integer, kept in the low mantissa bits

# 2**f on [-1/2, 1/2], degree 6, smallest largest relative error (Remez exchange); constant term exactly 1.
_EXP2 = (
    1.0,
    0.6931471824645996,
    0.24022646248340607,
    0.05550328642129898,
    0.009618489071726799,
    0.0013399930903688073,
    0.0001534581242594868,
)
# 2 * atanh(s) / s in powers of s**2 on [0, 1/9], Chebyshev fit of degree 4: log1p(y) = 2 * atanh(y / (y + 2)).
_LOG1P = (2.0, 0.6666623950004578, 0.40026476979255676, 0.2795262336730957, 0.2816714346408844)


class Float32x16(types.Type):
    """Numba's type of sixteen float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="Float32x16")


float32x16 = Float32x16()
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_LANE_0 = ir.Constant(ir.IntType(32), 0)


@register_model(Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: types.Type) -> None:
        super().__init__(manager, numba_type, _FLOATS)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [float(np.float32(value))] * LANES)


def _declare(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    return builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _pointer(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value, target: ir.Type) -> ir.Value:
    """Pointer to `target` at `offset` floats after `address`."""
    bytes_ = builder.shl(offset, ir.Constant(offset.type, 2))
    return builder.inttoptr(builder.add(address, bytes_), target.as_pointer())


def _fma(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z; rounded once where the machine has a fused instruction, twice where it has not."""
    function = _declare(builder, f"llvm.fmuladd.v{LANES}f32", _FLOATS, [_FLOATS] * 3)
    return builder.call(function, [x, y, z])


def _polynomial(builder: ir.IRBuilder, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
    total = _constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = _fma(builder, total, x, _constant(coefficient))
    return total


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    lane_0 = builder.insert_element(undefined, scalar, _LANE_0)
    return builder.shuffle_vector(lane_0, undefined, ir.Constant(_INTS, [0] * LANES))


def _exp2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    low, high, magic = _constant(-126.0), _constant(127.0), _constant(_ROUND)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)  # ordered comparisons leave NaN alone
    x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
    shifted = builder.fadd(x, magic)
    fraction = builder.fsub(x, builder.fsub(shifted, magic))
    exponent = builder.shl(builder.bitcast(shifted, _INTS), ir.Constant(_INTS, [23] * LANES))
    mantissa = builder.bitcast(_polynomial(builder, fraction, _EXP2), _INTS)
    return builder.bitcast(builder.add(mantissa, exponent), _FLOATS)


def _sigmoid(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    decay = _exp2(builder, builder.fmul(x, _constant(-LOG2_E)))
    return builder.fdiv(_constant(1.0), builder.fadd(_constant(1.0), decay))


def _softplus(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    positive = builder.fcmp_ordered(">", x, _constant(0.0))
    minus_abs = builder.select(positive, builder.fsub(_constant(0.0), x), x)
    y = _exp2(builder, builder.fmul(minus_abs, _constant(LOG2_E)))
    s = builder.fdiv(y, builder.fadd(y, _constant(2.0)))
    log1p = _polynomial(builder, builder.fmul(s, s), _LOG1P)
    negative = builder.fcmp_ordered("<=", x, _constant(0.0))
    return _fma(builder, log1p, s, builder.select(negative, _constant(0.0), x))


def _sum(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    for distance in (8, 4, 2, 1):
        swap = ir.Constant(_INTS, [lane ^ distance for lane in range(LANES)])
        x = builder.fadd(x, builder.shuffle_vector(x, x, swap))
    return builder.extract_element(x, _LANE_0)


def _flush(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    magnitude = builder.call(_declare(builder, f"llvm.fabs.v{LANES}f32", _FLOATS, [_FLOATS]), [x])
    return builder.select(builder.fcmp_ordered("<", magnitude, _constant(1e-30)), _constant(0.0), x)


def _lanewise(emit: Callable[..., ir.Value], arity: int, doc: str, result: types.Type = float32x16) -> Any:
    """A numba function of one or three vectors, emitted by `emit`."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        return emit(builder, *arguments)

    def of_one(typing_context: Any, x: types.Type) -> Any:
        return result(float32x16), generate

    def of_three(typing_context: Any, x: types.Type, y: types.Type, z: types.Type) -> Any:
        return result(float32x16, float32x16, float32x16), generate

    typer = of_one if arity == 1 else of_three
    typer.__doc__ = doc
    return intrinsic(typer)


exp2 = _lanewise(_exp2, 1, "2**x.")
sigmoid = _lanewise(_sigmoid, 1, "1 / (1 + exp(-x)).")
softplus = _lanewise(_softplus, 1, "log(1 + exp(x)).")
fma = _lanewise(_fma, 3, "x * y + z.")
flush = _lanewise(_flush, 1, "x, with lanes below 1e-30 in size set to zero: no arithmetic on denormals later.")
total = _lanewise(_sum, 1, "Sum of the sixteen lanes, a float32.", types.float32)


@intrinsic
def load(typing_context: Any, address: types.Type, offset: types.Type) -> Any:
    """Sixteen floats at `offset` floats after `address`; no alignment needed."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        return builder.load(_pointer(builder, arguments[0], arguments[1], _FLOATS), align=4)

    return float32x16(types.int64, types.int64), generate


@intrinsic
def store(typing_context: Any, address: types.Type, offset: types.Type, value: types.Type) -> Any:
    """Write sixteen floats at `offset` floats after `address`."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        builder.store(arguments[2], _pointer(builder, arguments[0], arguments[1], _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, float32x16), generate


@intrinsic
def store_scalar(typing_context: Any, address: types.Type, offset: types.Type, value: types.Type) -> Any:
    """Write one float at `offset` floats after `address`."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        builder.store(arguments[2], _pointer(builder, arguments[0], arguments[1], ir.FloatType()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def load_scalar(typing_context: Any, address: types.Type, offset: types.Type) -> Any:
    """The float32 at `offset` floats after `address`."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        return builder.load(_pointer(builder, arguments[0], arguments[1], ir.FloatType()))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def spread(typing_context: Any, address: types.Type, offset: types.Type) -> Any:
    """The one float at `offset` floats after `address`, in all lanes."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        return _splat(builder, builder.load(_pointer(builder, arguments[0], arguments[1], ir.FloatType())))

    return float32x16(types.int64, types.int64), generate


@intrinsic
def fill(typing_context: Any, scalar: types.Type) -> Any:
    """A float32 in all lanes."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        return _splat(builder, arguments[0])

    return float32x16(types.float32), generate


@intrinsic
def prefetch(typing_context: Any, address: types.Type, offset: types.Type) -> Any:
    """Ask for the cache line at `offset` floats after `address`; harmless when the address is not ours."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        byte, word = ir.IntType(8), ir.IntType(32)
        function = _declare(builder, "llvm.prefetch.p0", ir.VoidType(), [byte.as_pointer(), word, word, word])
        builder.call(function, [_pointer(builder, arguments[0], arguments[1], byte), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def transpose_tile(
    typing_context: Any, source: types.Type, source_row: types.Type, target: types.Type, target_row: types.Type
) -> Any:
    """Write the 16 x 16 tile at address `source` transposed to `target`; row strides in floats. Nothing may overlap."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        source, source_row, target, target_row = arguments
        index = [ir.Constant(source_row.type, i) for i in range(LANES)]
        tile = [
            builder.load(_pointer(builder, source, builder.mul(source_row, index[i]), _FLOATS), align=4)
            for i in range(LANES)
        ]
        for distance in (8, 4, 2, 1):  # swap the off-diagonal quarters of ever smaller squares
            low = [lane if not lane & distance else lane - distance + LANES for lane in range(LANES)]
            high = [lane + distance if not lane & distance else lane + LANES for lane in range(LANES)]
            for i in (i for i in range(LANES) if not i & distance):
                a, b = tile[i], tile[i + distance]
                tile[i] = builder.shuffle_vector(a, b, ir.Constant(_INTS, low))
                tile[i + distance] = builder.shuffle_vector(a, b, ir.Constant(_INTS, high))
        for i in range(LANES):
            builder.store(tile[i], _pointer(builder, target, builder.mul(target_row, index[i]), _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def _operator(symbol: Callable[[Any, Any], Any], instruction: str) -> None:
    """Give `Float32x16` a binary operator."""

    @infer_global(symbol)
    class _Typing(ConcreteTemplate):
        cases = (signature(float32x16, float32x16, float32x16),)

    @lower_builtin(symbol, Float32x16, Float32x16)
    def _lower(context: Any, builder: ir.IRBuilder, sig: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        return getattr(builder, instruction)(*arguments)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
