"""What PTX instructions compute on 32 lanes: the names that translated programs speak of."""

from __future__ import annotations

from typing import Any

import numpy as np

i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
f2, f4, f8 = np.float16, np.float32, np.float64
Array = np.ndarray[Any, Any]


class EmulatorError(Exception):
    """A program did what it must not do."""


def _constant(values: Any, dtype: Any) -> Array:
    array = np.broadcast_to(np.asarray(values, dtype), 32).copy()
    array.flags.writeable = False
    return array


LANES = _constant(np.arange(32), i4)
ZERO, ZERO_U4, ONE = _constant(0, i4), _constant(0, u4), _constant(1, f4)
TRUE, FALSE, FIRST_LANE = _constant(True, bool), _constant(False, bool), _constant(np.arange(32) == 0, bool)
SMALLEST = f4(2.0**-126)
# what a register holds before it is written: nan, and a number that lies in no memory
UNDEFINED_u4, UNDEFINED_u8, UNDEFINED_u2 = (
    _constant(0x7FC0DEAD % 2**bits, kind) for bits, kind in ((32, u4), (64, u8), (16, u2))
)
UNDEFINED_i4, UNDEFINED_f4 = UNDEFINED_u4.view(i4), UNDEFINED_u4.view(f4)
UNDEFINED_i8, UNDEFINED_f8, UNDEFINED_i2 = UNDEFINED_u8.view(i8), UNDEFINED_u8.view(f8), UNDEFINED_u2.view(i2)
UNDEFINED_f2, UNDEFINED_pred = UNDEFINED_u2.view(f2), FALSE


def is_true(predicate: Array) -> bool:
    """Of all lanes."""
    count = np.count_nonzero(predicate)
    if count == 32:
        return True
    if count:
        raise EmulatorError("lanes of a warp go different ways")
    return False


def uniform(x: Array) -> int:
    if (x != x[0]).any():
        raise EmulatorError(f"lanes of a warp differ: {x}")
    return int(x[0])


def fma(a: Array, b: Array, c: Array) -> Array:
    """Rounded twice, first to float64: the product is exact there."""
    return (a.astype(f8) * b.astype(f8) + c.astype(f8)).astype(f4)


def flushed(x: Array) -> Array:
    """.ftz: what is smaller than any normal number is 0."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(f4(0), x), x)


def mul_hi(a: Array, b: Array) -> Array:
    wide = i8 if a.dtype == i4 else u8
    return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)


def div(a: Array, b: Array) -> Array:
    """Towards zero. Division by zero gives what nobody looks at."""
    wide = a.astype(i8), np.where(b == 0, 1, b).astype(i8)
    return (np.sign(wide[0]) * np.sign(wide[1]) * (np.abs(wide[0]) // np.abs(wide[1]))).astype(a.dtype)


def rem(a: Array, b: Array) -> Array:
    return np.fmod(a, np.where(b == 0, 1, b)).astype(a.dtype)


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """Any function of three bits: bit 4a + 2b + c of the table."""
    if table == 0xFE:
        return a | b | c
    result = np.zeros_like(a)
    for bit in range(8):
        if table >> bit & 1:
            result |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
    return result


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes of b:a by the four nibbles of the selector; with bit 3 set the byte's sign, eight times."""
    places = np.stack((a, b), 1).view(u1)
    nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype=i4) & 15
    chosen = np.take_along_axis(places, (nibbles & 7).astype(i8), 1)
    chosen = np.where(nibbles & 8, np.where(chosen & 128, 255, 0), chosen).astype(u1)
    return np.ascontiguousarray(chosen).view(i4)[:, 0]


def bfe(a: Array, start: Array, length: Array) -> Array:
    """Bits start .. start + length, which the compiler knows to be some, and there."""
    bits = 8 * a.dtype.itemsize
    assert (start + length <= bits).all() and (length > 0).all(), (a.dtype, start, length)
    return a << (bits - start - length).astype(a.dtype) >> (bits - length).astype(a.dtype)


def ballot(predicate: Array) -> Array:
    return np.full(32, np.packbits(predicate, bitorder="little").view(u4)[0])


def lanes_of_bfly(b: Array, c: int) -> Array:
    assert c == 31, c
    return LANES ^ (b & 31)


def lanes_of_idx(b: Array, c: int) -> Array:
    assert c == 31, c
    return b & 31


def lanes_of_up(b: Array, c: int) -> Array:
    assert c == 0, c
    return np.where(b <= LANES, LANES - b, LANES)


def lanes_of_down(b: Array, c: int) -> Array:
    assert c == 31, c
    return np.where(LANES + b < 32, LANES + b, LANES)


def bf16_of_f32(x: Array) -> Array:
    """To the nearest, of two the even one."""
    bits = x.view(u4)
    rounded = bits + (u4(0x7FFF) + (bits >> u4(16) & u4(1))) >> u4(16)
    return np.where(x != x, u4(0x7FFF), rounded).astype(u2)


def f16_of_f32(x: Array) -> Array:
    return x.astype(f2).view(u2)


def bf16x2(high: Array, low: Array) -> Array:
    bits = np.array((high, low)).view(u4)
    rounded = bits + (u4(0x7FFF) + (bits >> u4(16) & u4(1)))
    if (is_nan := (bits & u4(0x7FFFFFFF)) > u4(0x7F800000)).any():
        rounded[is_nan] = 0x7FFF0000
    return (rounded[0] & u4(0xFFFF0000) | rounded[1] >> u4(16)).view(i4)


def f16x2(high: Array, low: Array) -> Array:
    return np.stack((low.astype(f2), high.astype(f2)), 1).view(i4)[:, 0]


def f32_of_bf16(x: Array) -> Array:
    return (x.astype(u4) << u4(16)).view(f4)


def f32_of_f16(x: Array) -> Array:
    return x.view(f2).astype(f4)


def integer_of(x: Array, rounding: str, dtype: Any) -> Array:
    """Saturated; 0 for nan."""
    function = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding]
    limits = np.iinfo(dtype)
    rounded = function(np.nan_to_num(x.astype(f8), nan=0.0))
    return np.clip(rounded, float(limits.min), float(limits.max)).astype(dtype)
