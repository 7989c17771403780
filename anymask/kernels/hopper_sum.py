"""The sum of dQ [B, Hq, Sq, D] f32: what the Hopper backward adds up by TMA, and dq from it.

It lies in the order in which threads hold a product, so that each writes 16 bytes at a time on the way to TMA, and no
two of a warp to one bank (as rows of dQ it had 258 conflicts a step, of 2,965 accesses, by ncu on an H200).

A tile of ROWS queries has its chunks of columns one after the other, a chunk its parts, which are the products: of both
consumers half the columns each, or one with all. A product [ROWS, columns] lies as
[columns / 8, warp, row % 8, column % 8 / 2, row / 8 % 2, column % 2]. TMA sees rows of LINE numbers.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.kernels.hopper_work import ROWS
from anymask.kernels.tile import head_pointer, store_tile

LINE = gl.constexpr(256)


@gluon.constexpr_function
def columns_of(tensor):
    """Of the products that blocks of this descriptor take."""
    return tensor.block_type.shape[2] * LINE // ROWS


@gluon.jit
def lines_of(dq):
    """A product [ROWS, columns] as it lies in the sum [lines, LINE]: each thread keeps its numbers."""
    COLUMNS: gl.constexpr = dq.shape[1]
    parts = dq.reshape([4, 2, 8, COLUMNS // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5])
    return parts.reshape([ROWS * COLUMNS // LINE, LINE])


@triton.jit
def product_of(numbers, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of [ROWS * COLUMNS] numbers of the sum."""
    parts = tl.reshape(numbers, [COLUMNS // 8, 4, 8, 4, 2, 2])
    return tl.reshape(tl.permute(parts, (1, 4, 2, 0, 3, 5)), [ROWS, COLUMNS])


@triton.jit(do_not_specialize=["Hq", "Sq"])
def dq_of_sum_kernel(
    sum_pointer,  # hopper_launch.sum_layout, contiguous
    dq_pointer,  # [B, Hq, Sq, D]
    dq_strides,
    Hq,
    Sq,
    scale,
    PARTS: tl.constexpr,  # the columns of each product of a tile
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dq = scale * sum. Grid: a program for each tile of ROWS queries of each head."""
    num_tiles = tl.cdiv(Sq, ROWS)
    head = tl.program_id(0) // num_tiles
    q_start = tl.program_id(0) % num_tiles * ROWS
    dq_pointer = head_pointer(dq_pointer, dq_strides, head // Hq, head % Hq, ALIGN)
    sum_pointer += tl.program_id(0).to(tl.int64) * (ROWS * columns_before(PARTS, len(PARTS)))
    for i in tl.static_range(len(PARTS)):
        store_product(sum_pointer, dq_pointer, dq_strides, q_start, Sq, scale, PARTS, i, D, ALIGN, WIDE)


@triton.jit
def store_product(
    sum_pointer,
    dq_pointer,
    dq_strides,
    q_start,
    Sq,
    scale,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The columns of dq that product PART of a tile holds. sum_pointer: of the tile."""
    COLUMNS: tl.constexpr = PARTS[PART]
    FIRST: tl.constexpr = columns_before(PARTS, PART)
    if FIRST < D:
        numbers = tl.load(sum_pointer + FIRST * ROWS + tl.arange(0, ROWS * COLUMNS))
        dq = product_of(numbers, COLUMNS) * scale
        store_tile(dq_pointer + FIRST, dq, q_start, Sq, dq_strides, ROWS, D - FIRST, COLUMNS, ALIGN, WIDE)


@triton.constexpr_function
def columns_before(PARTS, i):
    return sum(PARTS[:i])
