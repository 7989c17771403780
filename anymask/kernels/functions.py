"""What emitted text calls: functions of a tile that Triton lacks or defines otherwise (text: expr/emit.py)."""

import triton
import triton.language as tl


@triton.jit
def opaque(x):
    """x, by a move that LLVM cannot look into. NVIDIA only.

    LLVM packs comparisons with consecutive or loaded numbers into bit masks, which costs registers and half as many
    instructions again (sm_90, causal forward, 128 x 128: 826 -> 629 per masked step).
    """
    if x.dtype == tl.int32:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    elif x.dtype == tl.int64:
        x = tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [x], dtype=tl.int64, is_pure=True, pack=1)
    elif x.dtype == tl.float32:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x


@triton.jit
def near(q_idx, kv_idx):
    """q_idx and kv_idx, both less the same number, which differs from column to column, through opaque(). For Hopper.

    In a tile of scores a thread has columns 8 n + 2 (lane % 4) and the next, and tiles begin at multiples of their
    width: with all but those bits of the lane taken off, a thread's columns are constants, which comparisons take as
    they are, and its number is one (causal forward, 128 x 128: 672 -> 611 instructions per masked step). The columns
    are keys, or queries where the tile is transposed.
    """
    if kv_idx.shape[1] > 1:
        OF_KV: tl.constexpr = kv_idx.shape[1] - 7
        return opaque(q_idx - (kv_idx & ~OF_KV)), opaque(kv_idx & OF_KV)
    else:
        OF_Q: tl.constexpr = q_idx.shape[1] - 7
        return opaque(q_idx & OF_Q), opaque(kv_idx - (q_idx & ~OF_Q))


@triton.jit
def kept(x, other, left, right, COMPARISON: tl.constexpr):
    """x where the comparison of int32 holds, else other, both float32. NVIDIA only.

    LLVM cannot look into it, which packs the results of 64 comparisons into bits (sm_90, window, dK/dV/dQ step 64 x 64:
    741 -> 541 instructions).
    """
    ASM: tl.constexpr = select_asm(COMPARISON)
    return tl.inline_asm_elementwise(ASM, "=f,f,f,r,r", [x, other, left, right], tl.float32, is_pure=True, pack=1)


@triton.constexpr_function
def select_asm(comparison):
    return f"{{ .reg .pred p; setp.{comparison}.s32 p, $3, $4; selp.f32 $0, $1, $2, p; }}"


@triton.jit
def rounded_product(x, y):
    """x * y, both float32, which no sum after it is made one instruction with. NVIDIA only."""
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1)


@triton.jit
def floor_divide(x, y):
    """x // y rounded towards minus infinity, as in Python; x // 0 = 0."""
    safe = tl.where((y == 0) | (y == -1), 1, y)  # the smallest integer // -1 traps
    quotient = x // safe
    remainder = x - quotient * safe
    quotient = tl.where((remainder != 0) & ((remainder ^ safe) < 0), quotient - 1, quotient)
    return tl.where(y == -1, -x, tl.where(y == 0, 0, quotient))


@triton.jit
def floor_modulo(x, y):
    """x % y with the sign of y, as in Python; x % 0 = 0."""
    safe = tl.where((y == 0) | (y == -1), 1, y)
    remainder = x % safe
    return tl.where((remainder != 0) & ((remainder ^ safe) < 0), remainder + safe, remainder)


@triton.jit
def shift_left(x, amount):
    """x << amount; 0 where amount is negative or not below the width of x."""
    inside = (amount >= 0) & (amount < x.dtype.primitive_bitwidth)
    return tl.where(inside, x << tl.where(inside, amount, 0), 0)


@triton.jit
def shift_right(x, amount):
    """x >> amount, arithmetic; the sign alone where amount is negative or not below the width of x."""
    last = x.dtype.primitive_bitwidth - 1
    return x >> tl.where((amount >= 0) & (amount <= last), amount, last)


@triton.jit
def integer_power(x, N: tl.constexpr):
    """x^N, by squaring; in the shape of x also for N = 0."""
    result = tl.where(x == x, 1.0, 1.0)
    square = x
    M: tl.constexpr = N if N >= 0 else -N
    for bit in tl.static_range(7):
        if (M >> bit) & 1:
            result = result * square
        if M >> (bit + 1):
            square = square * square
    if N < 0:
        result = 1.0 / result
    return result


@triton.jit
def power(x, y):
    """x^y; a negative x is allowed where y is an integer."""
    magnitude = tl.exp2(y * tl.log2(tl.abs(x)))
    is_integer = tl.floor(y) == y
    is_odd = tl.floor(y * 0.5) * 2 != y
    result = tl.where((x < 0) & is_odd, -magnitude, magnitude)
    result = tl.where((x < 0) & ~is_integer, float("nan"), result)
    return tl.where((y == 0) | (x == 1), 1.0, result)


@triton.jit
def tanh(x):
    """tanh(x) = 1 - 2 / (exp(2x) + 1), to 1e-7 absolute; exp(2x) = inf gives 1."""
    return 1 - 2 / (tl.exp2(x * 2.8853900817779268) + 1)


@triton.jit
def tanh_part(x, factor):
    """r with tanh(x * factor) = 1 - 2 r, by the GPU's reciprocal instead of a division. NVIDIA only. So a multiple of
    tanh takes no more instructions than tanh.

    Not by the GPU's own tanh, whose relative error of 2^-11 is up to 4 times that of plain torch's lse in bfloat16.
    """
    y = tl.exp2(x * (factor * 2.8853900817779268)) + 1
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], tl.float32, is_pure=True, pack=1)


# tanh(x) = w * (c0 + c1 w^2 + c2 w^4 + c3 w^6) for w = 4 x, |w| < 2, to 6.3e-7 of itself (least squares at Chebyshev's
# points, weighted until the largest relative error is least): 0.24999987, -0.0052072373, 1.2881149e-4, -2.7100971e-6,
# as PTX writes float32.
TANH_COEFFICIENTS = tl.constexpr(("0f3E7FFFF7", "0fBBAAA179", "0f39071192", "0fB635DF1D"))
TOGETHER = tl.constexpr(32)


@triton.jit
def tanh_of_tile(x, factor):
    """tanh(x * factor), where each thread has a multiple of 32 numbers of x: all of them by multiplications where those
    of a warp are below 0.5, as of scores far below a cap. NVIDIA only.

    By exp2 and a reciprocal as tanh_part else, which are 16 a cycle of a multiprocessor: with that of the softmax 192
    cycles for 64 x 16 scores, whose products take 128 (D 128).
    """
    ASM: tl.constexpr = tanh_asm(TOGETHER, TANH_COEFFICIENTS)
    CONSTRAINTS: tl.constexpr = tanh_constraints(TOGETHER)
    w = x * (factor * 4.0)
    return tl.inline_asm_elementwise(ASM, CONSTRAINTS, [w], tl.float32, is_pure=True, pack=TOGETHER)


@triton.constexpr_function
def tanh_asm(N, coefficients):
    c0, c1, c2, c3 = coefficients
    w = [f"${N + i}" for i in range(N)]
    # |w| < 2 for all: no exponent has its highest bit, 30 of the number
    lines = ["{ .reg .b32 b; .reg .f32 u, y; .reg .pred p;", f"or.b32 b, {w[0]}, {w[1]};"]
    lines += [f"lop3.b32 b, b, {a}, {c}, 0xFE;" for a, c in zip(w[2::2], w[3::2], strict=True)]
    lines += ["and.b32 b, b, 0x40000000; setp.ne.u32 p, b, 0; vote.sync.any.pred p, p, 0xffffffff; @p bra.uni big;"]
    for i in range(N):
        lines += [f"mul.f32 u, {w[i]}, {w[i]}; fma.rn.f32 y, u, {c3}, {c2}; fma.rn.f32 y, y, u, {c1};"]
        lines += [f"fma.rn.f32 y, y, u, {c0}; mul.f32 ${i}, {w[i]}, y;"]
    lines += ["bra.uni done;", "big:"]
    for i in range(N):  # 2 / ln 2 / 4
        lines += [f"mul.f32 y, {w[i]}, 0f3F38AA3B; ex2.approx.ftz.f32 y, y; add.f32 y, y, 0f3F800000;"]
        lines += [f"rcp.approx.ftz.f32 y, y; fma.rn.f32 ${i}, y, 0fC0000000, 0f3F800000;"]
    return "\n".join([*lines, "done: }"])


@triton.constexpr_function
def tanh_constraints(N):
    return ",".join(["=f"] * N + ["f"] * N)


@triton.jit
def log1p(x):
    """log(1 + x), accurate for tiny x: log(u) x / (u - 1) with u = 1 + x undoes the rounding of u (Kahan)."""
    u = 1 + x
    is_exact = (u == 1) | (u == float("inf"))
    return tl.where(is_exact, x, tl.log(u) * (x / tl.where(is_exact, 1, u - 1)))
