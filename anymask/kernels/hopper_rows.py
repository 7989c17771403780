"""Before the Hopper backward, in plain Triton: lse and delta of each row, and the sum of dQ zeroed."""

import triton
import triton.language as tl

from anymask.kernels.tile import LOG2_E, head_pointer, load_tile, store_tile


@triton.jit(do_not_specialize=["Hq", "Sq", "row_stride"])
def rows_kernel(
    out_pointer,  # [B, Hq, Sq, DV]
    dout_pointer,  # [B, Hq, Sq, DV]
    lse_pointer,  # [B, Hq, Sq] f32, contiguous
    dlse_pointer,  # the same, or None
    rows_pointer,  # [B, Hq, 2, Sq] f32: lse in base 2 (+inf for a row without keys: P = 0), -delta
    sum_pointer,  # of dQ (hopper_sum.py), contiguous: to be 0; or None
    out_strides,
    dout_strides,
    row_stride,  # of rows: from lse to -delta
    Hq,
    Sq,
    BLOCK_Q: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,  # of the sum
    SUM_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """delta = rowsum(out * dout) - dlse. Grid: a program for each tile of each head."""
    num_tiles = tl.cdiv(Sq, BLOCK_Q)
    head = tl.program_id(0) // num_tiles
    q_start = tl.program_id(0) % num_tiles * BLOCK_Q
    b = head // Hq
    h = head % Hq
    # [BLOCK_Q, DV]
    out_pointer = head_pointer(out_pointer, out_strides, b, h, ALIGN)
    dout_pointer = head_pointer(dout_pointer, dout_strides, b, h, ALIGN)
    out = load_tile(out_pointer, q_start, Sq, out_strides, BLOCK_Q, DV, DV_PAD, ALIGN, WIDE, True)
    dout = load_tile(dout_pointer, q_start, Sq, dout_strides, BLOCK_Q, DV, DV_PAD, ALIGN, WIDE, True)
    # [BLOCK_Q]
    q_idx = q_start + tl.arange(0, BLOCK_Q)
    offsets = head.to(tl.int64) * Sq + q_idx
    lse = tl.load(lse_pointer + offsets, mask=q_idx < Sq, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_pointer is not None:
        delta -= tl.load(dlse_pointer + offsets, mask=q_idx < Sq, other=0.0)
    rows = rows_pointer + head.to(tl.int64) * 2 * row_stride + q_idx
    tl.store(rows, tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), mask=q_idx < Sq)
    tl.store(rows + row_stride, -delta, mask=q_idx < Sq)
    if sum_pointer is not None:
        num_rows = num_tiles * BLOCK_Q
        sum_pointer += head.to(tl.int64) * num_rows * SUM_COLUMNS
        zeros = tl.zeros([BLOCK_Q, SUM_PAD], tl.float32)
        strides = (0, 0, SUM_COLUMNS, 1)
        store_tile(sum_pointer, zeros, q_start, num_rows, strides, BLOCK_Q, SUM_COLUMNS, SUM_PAD, 8, False)
