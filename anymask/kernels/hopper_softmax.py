"""Softmax in registers of a Hopper warpgroup: the online softmax, sums scaled anew, P as pairs of 16-bit numbers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.kernels.record import record

# The maximum that scores are taken relative to may lag behind the largest so far by this, in base 2: then sums are
# scaled anew in a row's first steps and rarely after, and P, at most 256 instead of 1, is as exact as before.
SLACK = gl.constexpr(8.0)


@record
class OnlineSoftmax:
    """Of rows of scores that come tile by tile: a maximum in base 2, at most SLACK below the largest score so far, and
    the sum of exp2(score - maximum) in 8 parts, by column modulo 8: so each thread adds up its own columns.
    """

    row_max: gl.tensor  # [BLOCK_Q] f32
    row_sums: gl.tensor  # [BLOCK_Q, 8] f32

    @gluon.jit
    def create(BLOCK_Q: gl.constexpr, BLOCK_KV: gl.constexpr, LAYOUT: gl.constexpr):
        """Of no tile. LAYOUT: of the scores [BLOCK_Q, BLOCK_KV]."""
        row_max = gl.full([BLOCK_Q], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
        return OnlineSoftmax(row_max, sums_of_columns(gl.zeros([BLOCK_Q, BLOCK_KV], gl.float32, LAYOUT)))

    @gluon.jit
    def add(self, s, factor, HAS_HIDDEN: gl.constexpr):
        """This with one more tile, its P [BLOCK_Q, BLOCK_KV] f32, and what scales sums so far [BLOCK_Q] f32.

        s: [BLOCK_Q, BLOCK_KV] f32; s * factor are scores in base 2, factor > 0.  HAS_HIDDEN: s may hold -inf; a row
        may then have no key so far, and exp2(-inf - 0) = 0.
        """
        new_max = gl.maximum(self.row_max, max_of_rows(s) * factor)
        # inf and nan, of a row without a key so far, are not below it
        new_max = gl.where(new_max - self.row_max <= SLACK, self.row_max, new_max)
        if HAS_HIDDEN:
            safe_max = gl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            safe_max = new_max
        correction = gl.exp2(self.row_max - safe_max)
        # P = exp2(S - max)
        p = gl.exp2(s * factor - safe_max[:, None])
        of_sums = gl.convert_layout(correction, gl.SliceLayout(1, self.row_sums.type.layout))
        row_sums = self.row_sums * of_sums[:, None] + sums_of_columns(p)
        return OnlineSoftmax(new_max, row_sums), p, correction

    @gluon.jit
    def row_sum(self):
        """[BLOCK_Q] f32"""
        return gl.convert_layout(gl.sum(self.row_sums, 1), self.row_max.type.layout)


@gluon.jit
def sums_of_columns(p):
    """[BLOCK_Q, 8] sums of [BLOCK_Q, BLOCK_KV], by column modulo 8."""
    return gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 8]), 1)


@gluon.constexpr_function
def rescale_asm(N):
    """N products, where a thread of the warp has a factor that is not 1."""
    lines = [f"{{ .reg .pred p, q; setp.neu.f32 p, ${2 * N}, 0f3F800000; setp.neu.f32 q, ${2 * N + 2}, 0f3F800000;"]
    lines += ["or.pred p, p, q; vote.sync.any.pred p, p, 0xffffffff; @!p bra.uni same;"]
    lines += [f"mul.rn.f32 ${i}, ${N + i}, ${2 * N + i};" for i in range(N)]
    return "\n".join([*lines, "same: }"])


@gluon.constexpr_function
def rescale_constraints(N):
    return ",".join(["=f"] * N + [str(i) for i in range(N)] + ["f"] * N)


@gluon.jit
def rescaled(acc, factor):
    """acc * factor [:, None], but nothing is multiplied by a warp whose rows all have the factor 1.

    acc: [64, columns] f32, as a product of a warpgroup leaves it: of a thread's numbers the first two are of one row,
    the next two of its other one.  factor: [64] f32.
    """
    N: gl.constexpr = acc.shape[0] * acc.shape[1] // 128  # of a thread
    ASM: gl.constexpr = rescale_asm(N)
    CONSTRAINTS: gl.constexpr = rescale_constraints(N)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))
    return gl.inline_asm_elementwise(ASM, CONSTRAINTS, [acc, factor[:, None]], gl.float32, is_pure=True, pack=N)


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
