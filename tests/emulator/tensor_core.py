"""What one warp computes of a wgmma: 16 rows of D += A @ B.

Layouts: PTX ISA, "Asynchronous warpgroup-level matrix instructions", on register fragments, on shared memory matrix
layouts (strides, leading dimension) and on the matrix descriptor.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tests.emulator.arithmetic import EmulatorError, f2, f4, u2, u4
from tests.emulator.tma import swizzled

Array = np.ndarray[Any, Any]
WIDTHS = (0, 128, 64, 32)  # by the descriptor's two bits: the swizzle in bytes
K = 16


@functools.lru_cache(maxsize=4096)
def places(layout: int, start: int, rows: int, is_transposed: bool) -> tuple[Array, Array]:
    """Where elements [rows, K] of a matrix lie in shared memory, in steps of 2 bytes; the 4-byte words they are in.

    layout: the descriptor's upper bits. start: its address modulo 1024; the places are counted from the multiple of
    1024. is_transposed: rows lie side by side ("MN-major").
    """
    leading, stride = (layout >> 16 & 0x3FFF) << 4, (layout >> 32 & 0x3FFF) << 4
    width = WIDTHS[layout >> 62]
    if layout >> 49 & 7:
        raise EmulatorError("a matrix descriptor with a base offset")
    row, k = np.arange(rows)[:, None], np.arange(K)[None, :]
    if not is_transposed and width:
        # 8 rows of `width` bytes; K = 16 lies within one
        linear = row // 8 * stride + row % 8 * width + 2 * k
    elif not is_transposed:
        linear = row // 8 * stride + row % 8 * 16 + k // 8 * leading + 2 * (k % 8)
    elif width:
        # 8 k of `width` bytes of rows
        wide = width // 2
        linear = row // wide * leading + row % wide * 2 + k // 8 * stride + k % 8 * width
    else:
        linear = row // 8 * stride + row % 8 * 2 + k // 8 * leading + k % 8 * 16
    addresses = swizzled(start + linear, width)
    return addresses // 2, np.unique(addresses // 4)


def numbers(bits: Array, kind: str) -> Array:
    """float32 of uint16."""
    if kind == "bf16":
        return (bits.astype(u4) << u4(16)).view(f4)
    assert kind == "f16", kind
    return bits.view(f2).astype(f4)


def matrix_of_registers(registers: tuple[Array, ...]) -> Array:
    """[16, 16] uint16 of the four registers of A: of lane 4 g + t, rows g and g + 8, columns 2 t and 2 t + 8."""
    halves = np.array(registers).view(u2).reshape(2, 2, 8, 4, 2)  # k / 8, row / 8, g, t, a pair
    return halves.transpose(1, 2, 0, 3, 4).reshape(16, 16)


def registers_of_matrix(matrix: Array) -> Array:
    """[N / 2, 32] of [16, N]: register 4 n + 2 i + j of lane 4 g + t is of row g + 8 i, column 8 n + 2 t + j."""
    n = matrix.shape[1] // 8
    return matrix.reshape(2, 8, n, 4, 2).transpose(2, 0, 4, 1, 3).reshape(4 * n, 32)
