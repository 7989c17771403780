"""What emitted bounds call: rules of interval arithmetic, as in expr/interval.py (text: expr/emit_bounds.py).

Bounds lo <= value <= hi have the dtype of their value, but float64 for a float32: then NaN, always both, means that the
value may be anything, NaN included.
"""

import triton
import triton.language as tl

from anymask.kernels.functions import floor_divide

MARGIN: tl.constexpr = tl.constexpr(1e-5)  # relative; covers one float32 operation, approximate ones among them
# These are float32 numbers: Triton rounds a literal to one.
TINY: tl.constexpr = tl.constexpr(2.0**-126)  # smallest normal float32
HUGE: tl.constexpr = tl.constexpr(3.4028234663852886e38)  # largest float32
LARGE: tl.constexpr = tl.constexpr(2.0**62)  # an int64 result beyond is taken to overflow


@triton.jit
def of_one(x):
    """Bounds of a scalar."""
    lo, hi = x, x
    if x.dtype == tl.float32:
        lo, hi = widened(x, x)
    return lo, hi


@triton.jit
def over_q(x):
    """Bounds of values [RQ, positions] over each tile, [RQ, 1]."""
    lo, hi = reduced(x)
    return lo[:, None], hi[:, None]


@triton.jit
def over_kv(x):
    """Bounds of values [RKV, positions] over each tile, [1, RKV]."""
    lo, hi = reduced(x)
    return lo[None, :], hi[None, :]


@triton.jit
def reduced(x):
    if x.dtype == tl.int1:
        lo, hi = tl.min(x.to(tl.int32), 1) != 0, tl.max(x.to(tl.int32), 1) != 0
    elif x.dtype == tl.float32:
        lo, hi = widened(tl.min(x, 1), tl.max(x, 1))
        lo, hi = anything_where(tl.max(is_nan(x).to(tl.int32), 1) != 0, lo, hi)
    else:
        lo, hi = tl.min(x, 1), tl.max(x, 1)
    return lo, hi


@triton.jit
def anything_where(is_any, lo, hi):
    """lo, hi; where is_any the bounds of every value that the dtype has."""
    if lo.dtype == tl.int32:
        lowest, highest = -(2**31), 2**31 - 1
    elif lo.dtype == tl.int64:
        lowest, highest = -(2**63), 2**63 - 1
    else:
        lowest, highest = float("nan"), float("nan")
    return tl.where(is_any, lowest, lo), tl.where(is_any, highest, hi)


@triton.jit
def is_nan(x):
    return x != x


@triton.jit
def has_inf(lo, hi):
    return (tl.abs(lo) == float("inf")) | (tl.abs(hi) == float("inf"))


@triton.jit
def has_zero(lo, hi):
    return (lo <= 0) & (hi >= 0)


@triton.jit
def widened(lo, hi):
    """Bounds of a float32 result, by what one operation may lose; overflow to inf and underflow to 0 are inside."""
    lo, hi = lowered(lo.to(tl.float64)), -lowered(-hi.to(tl.float64))
    return anything_where(is_nan(lo) | is_nan(hi), lo, hi)


@triton.jit
def lowered(x):
    x = x * tl.where(x > 0, 1 - MARGIN, 1 + MARGIN)
    return tl.where((x > 0) & (x < TINY), 0, tl.where(x < -HUGE, -float("inf"), x))


@triton.jit
def plus(x, y):
    return x + y


@triton.jit
def minus(x, y):
    return x - y


@triton.jit
def times(x, y):
    return x * y


@triton.jit
def over(x, y):
    return x / y


@triton.jit
def quotient(x, y):
    if x.dtype == tl.float64:
        result = tl.floor(x / y)
    else:
        result = floor_divide(x, y)
    return result


@triton.jit
def spanned(OPERATION: tl.constexpr, TYPE: tl.constexpr, a_lo, a_hi, b_lo, b_hi):
    """Smallest and largest result of an operation, computed as TYPE, at the four corners."""
    a_lo, a_hi, b_lo, b_hi = a_lo.to(TYPE), a_hi.to(TYPE), b_lo.to(TYPE), b_hi.to(TYPE)
    w, x, y, z = OPERATION(a_lo, b_lo), OPERATION(a_lo, b_hi), OPERATION(a_hi, b_lo), OPERATION(a_hi, b_hi)
    lo = tl.minimum(tl.minimum(w, x), tl.minimum(y, z))
    hi = tl.maximum(tl.maximum(w, x), tl.maximum(y, z))
    if w.dtype == tl.float64:  # minimum and maximum pass NaN over
        lo, hi = anything_where(is_nan(w) | is_nan(x) | is_nan(y) | is_nan(z), lo, hi)
    return lo, hi


@triton.jit
def corners(OPERATION: tl.constexpr, a_lo, a_hi, b_lo, b_hi):
    """Bounds of an operation that takes its extremes at the corners; anything where it leaves its dtype."""
    if a_lo.dtype == tl.float64:
        lo, hi = widened(*spanned(OPERATION, tl.float64, a_lo, a_hi, b_lo, b_hi))
    else:
        lo, hi = spanned(OPERATION, tl.int64, a_lo, a_hi, b_lo, b_hi)
        if a_lo.dtype == tl.int32:
            lo, hi = narrowed(lo, hi, tl.int32)
        else:
            low, high = spanned(OPERATION, tl.float64, a_lo, a_hi, b_lo, b_hi)
            lo, hi = anything_where((low < -LARGE) | (high > LARGE), lo, hi)
    return lo, hi


@triton.jit
def multiply_bounds(a_lo, a_hi, b_lo, b_hi):
    lo, hi = corners(times, a_lo, a_hi, b_lo, b_hi)
    if lo.dtype == tl.float64:  # 0 * inf
        is_any = (has_zero(a_lo, a_hi) & has_inf(b_lo, b_hi)) | (has_inf(a_lo, a_hi) & has_zero(b_lo, b_hi))
        lo, hi = anything_where(is_any, lo, hi)
    return lo, hi


@triton.jit
def square_bounds(lo, hi):
    """Of x * x, which is never negative."""
    lo, hi = size_bounds(lo, hi)
    return corners(times, lo, hi, lo, hi)


@triton.jit
def divide_bounds(a_lo, a_hi, b_lo, b_hi):
    lo, hi = corners(over, a_lo, a_hi, b_lo, b_hi)
    return anything_where(has_zero(b_lo, b_hi) | (has_inf(a_lo, a_hi) & has_inf(b_lo, b_hi)), lo, hi)


@triton.jit
def floor_divide_bounds(a_lo, a_hi, b_lo, b_hi):
    is_any = has_zero(b_lo, b_hi)  # |x // y| <= |x| also for y = 0, where it is 0
    return corners(quotient, a_lo, a_hi, tl.where(is_any, -1, b_lo), tl.where(is_any, 1, b_hi))


@triton.jit
def modulo_bounds(a_lo, a_hi, b_lo, b_hi):
    period = floor_divide(a_lo, b_lo)
    is_one_period = (b_lo == b_hi) & (b_lo != 0) & (period == floor_divide(a_hi, b_lo))
    start = period * b_lo
    lo = tl.where(is_one_period, a_lo - start, tl.minimum(b_lo + 1, 0))
    hi = tl.where(is_one_period, a_hi - start, tl.maximum(b_hi - 1, 0))
    return lo, hi


@triton.jit
def negate_bounds(lo, hi):
    low, high = -hi, -lo
    if lo.dtype != tl.float64:  # the lowest integer has no negative
        low, high = anything_where((lo < 0) & (lo == -lo), low, high)
    return low, high


@triton.jit
def size_bounds(lo, hi):
    """Of the absolute value."""
    low, high = tl.maximum(tl.maximum(lo, -hi), 0), tl.maximum(-lo, hi)
    is_any = is_nan(lo) if lo.dtype == tl.float64 else (lo < 0) & (lo == -lo)
    return anything_where(is_any, low, high)


@triton.jit
def min_bounds(a_lo, a_hi, b_lo, b_hi):
    return anything_where(is_nan(a_lo) | is_nan(b_lo), tl.minimum(a_lo, b_lo), tl.minimum(a_hi, b_hi))


@triton.jit
def max_bounds(a_lo, a_hi, b_lo, b_hi):
    return anything_where(is_nan(a_lo) | is_nan(b_lo), tl.maximum(a_lo, b_lo), tl.maximum(a_hi, b_hi))


@triton.jit
def where_bounds(c_lo, c_hi, a_lo, a_hi, b_lo, b_hi):
    """Of where(c, a, b)."""
    lo, hi = tl.minimum(a_lo, b_lo), tl.maximum(a_hi, b_hi)
    if lo.dtype == tl.float64:
        lo, hi = anything_where(is_nan(a_lo) | is_nan(b_lo), lo, hi)
    lo, hi = tl.where(c_hi, lo, b_lo), tl.where(c_hi, hi, b_hi)
    return tl.where(c_lo, a_lo, lo), tl.where(c_lo, a_hi, hi)


@triton.jit
def truncated(lo, hi, TYPE: tl.constexpr):
    """Of a FLOAT as an integer."""
    LIMIT: tl.constexpr = 2147483648.0 if tl.int32 == TYPE else 9223372036854775808.0
    is_inside = (lo > -LIMIT) & (hi < LIMIT)
    lo, hi = tl.where(is_inside, lo, 0).to(TYPE), tl.where(is_inside, hi, 0).to(TYPE)
    return anything_where(~is_inside, lo, hi)


@triton.jit
def narrowed(lo, hi, TYPE: tl.constexpr):
    """Of an INT64 as an INT32."""
    is_any = (lo < -2147483648) | (hi > 2147483647)
    return anything_where(is_any, lo.to(TYPE), hi.to(TYPE))
