"""Softmax in registers of a Hopper warpgroup: the online softmax, and P as pairs of 16-bit numbers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.kernels.record import record


@record
class OnlineSoftmax:
    """Of rows of scores that come tile by tile: the maximum so far, in base 2, and the sum of exp2(score - maximum)."""

    row_max: gl.tensor  # [BLOCK_Q] f32
    row_sum: gl.tensor  # [BLOCK_Q] f32

    @gluon.jit
    def create(BLOCK_Q: gl.constexpr, LAYOUT: gl.constexpr):
        """Of no tile. LAYOUT: of the scores."""
        ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
        return OnlineSoftmax(
            gl.full([BLOCK_Q], float("-inf"), gl.float32, ROWS), gl.full([BLOCK_Q], 0.0, gl.float32, ROWS)
        )

    @gluon.jit
    def add(self, s, factor, HAS_HIDDEN: gl.constexpr):
        """This with one more tile, its P [BLOCK_Q, BLOCK_KV] f32, and what scales sums so far [BLOCK_Q] f32.

        s: [BLOCK_Q, BLOCK_KV] f32; s * factor are scores in base 2, factor > 0.  HAS_HIDDEN: s may hold -inf; a row
        may then have no key so far, and exp2(-inf - 0) = 0.
        """
        new_max = gl.maximum(self.row_max, max_of_rows(s) * factor)
        if HAS_HIDDEN:
            safe_max = gl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            safe_max = new_max
        correction = gl.exp2(self.row_max - safe_max)
        # P = exp2(S - max)
        p = gl.exp2(s * factor - safe_max[:, None])
        row_sum = self.row_sum * correction + gl.sum(p, 1)
        return OnlineSoftmax(new_max, row_sum), p, correction


@gluon.jit
def max_of_rows(s):
    """[BLOCK_Q] maxima of [BLOCK_Q, BLOCK_KV], by way of the maxima of both halves: two chains a row instead of one."""
    BLOCK_Q: gl.constexpr = s.shape[0]
    HALF: gl.constexpr = s.shape[1] // 2
    a, b = s.reshape([BLOCK_Q, 2, HALF]).permute([0, 2, 1]).split()
    return gl.convert_layout(gl.max(gl.maximum(a, b), 1), gl.SliceLayout(1, s.type.layout))


@gluon.constexpr_function
def pair_asm(dtype):
    return f"cvt.rn.{'bf16x2' if dtype == gl.bfloat16 else 'f16x2'}.f32 $0, $2, $1;"


@gluon.jit
def pack_pairs(p, DTYPE: gl.constexpr):
    """[R, N] f32 as [R, N / 2] int32: two DTYPE numbers each.

    A 16-bit tensor that a loop carries would cost a PRMT an element, and as f32 it takes twice the registers.
    """
    ASM: gl.constexpr = pair_asm(DTYPE)
    low, high = p.reshape([p.shape[0], p.shape[1] // 2, 2]).split()
    return gl.inline_asm_elementwise(ASM, "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack_pairs(pairs, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """[R, N] DTYPE of [R, N / 2] pairs, as operand of a product. Takes no instruction."""
    low = pairs.to(gl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape([pairs.shape[0], pairs.shape[1] * 2]), LAYOUT)
