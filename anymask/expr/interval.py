"""Bounds of an expression over every tile of the index grid at once. Undecided is never a guess.

Where a value depends on at most one of q_idx and kv_idx (and on b and h), it is evaluated at each of its O(S) positions
and reduced per tile: document ids, `q_idx // W`, `kv_idx % W`, tables of one axis are as sharp as can be. Interval
arithmetic is needed only for operations that mix the two axes: one rule per Op.

Bounds hold for the float64 value; each mixed operation also leaves room for its float32 rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from anymask.expr.bindings import Bindings
from anymask.expr.evaluate import RULES as MEANING
from anymask.expr.evaluate import evaluate
from anymask.expr.ir import DType, Expr, Op


class Bounds(NamedTuple):
    """lo <= value <= hi at every position of a tile; both broadcastable to [B, H, nQ, nKV].

    int64 for integers, float64 for FLOAT, bool for BOOL (lo: surely true everywhere, hi: possibly true somewhere).
    FLOAT bounds of NaN, always both, mean that the value may be anything, NaN included.
    """

    lo: Tensor
    hi: Tensor


class Tiles(NamedTuple):
    """Indices of tiles, int64, of mutually broadcastable shapes."""

    b: Tensor
    h: Tensor
    q_block: Tensor
    kv_block: Tensor


class Indices(TypedDict):
    """What evaluate() reads, int64, of mutually broadcastable shapes."""

    b: Tensor
    h: Tensor
    q_idx: Tensor
    kv_idx: Tensor


@dataclass(frozen=True)
class Grid:
    """All tiles of [B, H, Sq, Skv]. The last tile of an axis covers only the positions that exist."""

    B: int
    H: int
    Sq: int
    Skv: int
    tile: tuple[int, int]
    device: torch.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, H, tiles along q, tiles along kv."""
        return self.B, self.H, -(-self.Sq // self.tile[0]), -(-self.Skv // self.tile[1])

    def tiles(self) -> Tiles:
        """Every tile, as an open mesh: [B, 1, 1, 1], [1, H, 1, 1], [1, 1, nQ, 1], [1, 1, 1, nKV]."""
        lines = [torch.arange(n, device=self.device) for n in self.shape]
        return Tiles(*(line.view([-1 if i == axis else 1 for i in range(4)]) for axis, line in enumerate(lines)))

    def points(self, tiles: Tiles, num_q: int, num_kv: int) -> Indices:
        """The indices at num_q x num_kv points of each tile, its corners among them.

        Each has the shape of its part of `tiles` and two more dimensions, [num_q or 1, num_kv or 1]. Points are spread
        evenly over the positions that exist; num_q, num_kv = tile are all of them (a ragged tile repeats some).
        """
        return {
            "b": tiles.b[..., None, None],
            "h": tiles.h[..., None, None],
            "q_idx": _positions(tiles.q_block, self.tile[0], self.Sq, num_q)[..., :, None],
            "kv_idx": _positions(tiles.kv_block, self.tile[1], self.Skv, num_kv)[..., None, :],
        }

    def boxes(self, tiles: Tiles, size: int) -> Indices:
        """The indices in each size x size box of each tile, for tiles of shape [N].

        q_idx: [N, boxes, 1, size, 1], kv_idx: [N, 1, boxes, 1, size], b and h: [N, 1, 1, 1, 1]. Boxes that hang over
        the end of the tile, or of the sequence, repeat its last position.
        """
        q_idx, kv_idx = (
            _box_positions(block, tile, length, size)
            for block, tile, length in zip(tiles[2:], self.tile, (self.Sq, self.Skv), strict=True)
        )
        b, h = (index[:, None, None, None, None] for index in tiles[:2])
        return {"b": b, "h": h, "q_idx": q_idx[:, :, None, :, None], "kv_idx": kv_idx[:, None, :, None, :]}


def _positions(block: Tensor, tile: int, length: int, num: int) -> Tensor:
    step = torch.arange(num, device=block.device)
    start = block[..., None] * tile
    if num == tile:
        return (start + step).clamp(max=length - 1)
    last = (length - 1 - start).clamp(max=tile - 1)
    return start + step * last // max(num - 1, 1)


def _box_positions(block: Tensor, tile: int, length: int, size: int) -> Tensor:
    """[N, boxes, size]"""
    step = torch.arange(-(-tile // size) * size, device=block.device).clamp(max=tile - 1).view(-1, size)
    return (block[:, None, None] * tile + step).clamp(max=length - 1)


def tile_bounds(expr: Expr, bindings: Bindings, grid: Grid) -> Bounds:
    """Bounds of expr over each tile of the grid."""
    return bounds_over(expr, bindings, grid.points(grid.tiles(), *grid.tile), grid.device)


def bounds_over(expr: Expr, bindings: Bindings, points: Indices, device: torch.device) -> Bounds:
    """Bounds of expr over sets of positions: the last two dimensions of q_idx [..., n, 1] and kv_idx [..., 1, m].

    The result has four dimensions, of length 1 in front where the indices have fewer.
    """
    axes: dict[Expr, frozenset[str]] = {}
    for node in expr.walk():
        own = {str(node.value)} if node.op is Op.INDEX else {"score"} if node.op is Op.SCORE else set()
        axes[node] = frozenset(own - {"b", "h"}).union(*(axes[arg] for arg in node.args))

    def is_mixed(node: Expr) -> bool:
        return len(axes[node]) > 1 or "score" in axes[node]

    bounds: dict[Expr, Bounds] = {}
    for node in filter(is_mixed, expr.walk()):
        if node.op in UNBOUNDED:
            bounds[node] = _anything(node.dtype, device)
            continue
        for arg in node.args:
            if arg not in bounds:
                bounds[arg] = _exact(arg, bindings, points)
        bounds[node] = RULES[node.op](node, *(bounds[arg] for arg in node.args))
    return bounds[expr] if is_mixed(expr) else _exact(expr, bindings, points)


def _exact(expr: Expr, bindings: Bindings, points: Indices) -> Bounds:
    """Evaluate at every position and reduce per tile: for values of one axis, where kv_idx or q_idx broadcasts."""
    value = evaluate(expr, bindings, **points)
    value = value.reshape((1,) * (6 - value.dim()) + value.shape).flatten(-2)
    lo, hi = torch.aminmax(value, dim=-1)
    if expr.dtype is DType.FLOAT:
        return _rounded(lo, hi)
    return Bounds(lo, hi) if expr.dtype is DType.BOOL else Bounds(lo.long(), hi.long())


_LOWEST = {DType.BOOL: False, DType.INT32: -(2**31), DType.INT64: -(2**63), DType.FLOAT: math.nan}
_HIGHEST = {DType.BOOL: True, DType.INT32: 2**31 - 1, DType.INT64: 2**63 - 1, DType.FLOAT: math.nan}


def _anything(dtype: DType, device: torch.device) -> Bounds:
    kind = {DType.BOOL: torch.bool, DType.FLOAT: torch.float64}.get(dtype, torch.int64)
    ends = (_LOWEST[dtype], _HIGHEST[dtype])
    return Bounds(*(torch.full((1, 1, 1, 1), end, dtype=kind, device=device) for end in ends))


def _anything_where(condition: Tensor, dtype: DType, lo: Tensor, hi: Tensor) -> Bounds:
    return Bounds(torch.where(condition, _LOWEST[dtype], lo), torch.where(condition, _HIGHEST[dtype], hi))


_FLOAT32 = torch.finfo(torch.float32)
_MARGIN = 1e-5  # relative; covers one float32 operation, approximate exp and log of the hardware among them


def _rounded(lo: Tensor, hi: Tensor) -> Bounds:
    """FLOAT bounds, widened by what one float32 operation may lose; overflow to inf and underflow to 0 are inside."""
    lo, hi = lo * (1 - _MARGIN * lo.sign()), hi * (1 + _MARGIN * hi.sign())
    lo = torch.where((lo > 0) & (lo < _FLOAT32.tiny), 0.0, torch.where(lo < _FLOAT32.min, -math.inf, lo))
    hi = torch.where((hi < 0) & (hi > -_FLOAT32.tiny), 0.0, torch.where(hi > _FLOAT32.max, math.inf, hi))
    return _anything_where(lo.isnan() | hi.isnan(), DType.FLOAT, lo, hi)


def _span(values: list[Tensor]) -> Bounds:
    return Bounds(functools.reduce(torch.minimum, values), functools.reduce(torch.maximum, values))


def _extremes(dtype: DType, function: Callable[..., Tensor], corners: list[tuple[Tensor, ...]]) -> Bounds:
    """Bounds of a function that takes its extremes at the given operands; anything where it leaves its dtype."""
    lo, hi = _span([function(*corner) for corner in corners])
    if dtype is DType.FLOAT:
        return _rounded(lo, hi)
    if dtype is DType.INT32:
        return _anything_where((lo < _LOWEST[dtype]) | (hi > _HIGHEST[dtype]), dtype, lo, hi)
    size = _span([function(*(x.double() for x in corner)).abs() for corner in corners]).hi
    return _anything_where(size > 2.0**63 * (1 - 1e-9), dtype, lo, hi)


def _corners(a: Bounds, b: Bounds) -> list[tuple[Tensor, ...]]:
    return [(a.lo, b.lo), (a.lo, b.hi), (a.hi, b.lo), (a.hi, b.hi)]


def _has_zero(a: Bounds) -> Tensor:
    return (a.lo <= 0) & (a.hi >= 0)


def _has_inf(a: Bounds) -> Tensor:
    return a.lo.isinf() | a.hi.isinf()


def _size(a: Bounds) -> Bounds:
    """Bounds of the absolute value before wrapping. The lowest int64 counts as -(2^63 - 1): its size would not fit."""
    low = a.lo if a.lo.is_floating_point() else a.lo.clamp(min=-(2**63 - 1))
    return Bounds(torch.maximum(low, -a.hi).clamp(min=0), torch.maximum(-low, a.hi))


def _identity(x: Tensor) -> Tensor:
    return x


# Arithmetic. FLOAT passes all four corners also where two would do: inf - inf then shows as NaN.


def _add(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    return _extremes(node.dtype, torch.add, [(a.lo, b.lo), (a.hi, b.hi)] if node.dtype.is_int else _corners(a, b))


def _sub(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    return _extremes(node.dtype, torch.sub, [(a.lo, b.hi), (a.hi, b.lo)] if node.dtype.is_int else _corners(a, b))


def _mul(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    if node.args[0] is node.args[1]:
        size = _size(a)
        return _extremes(node.dtype, torch.mul, [(size.lo, size.lo), (size.hi, size.hi)])
    product = _extremes(node.dtype, torch.mul, _corners(a, b))
    if node.dtype.is_int:
        return product
    is_nan = (_has_zero(a) & _has_inf(b)) | (_has_inf(a) & _has_zero(b))
    return _anything_where(is_nan, node.dtype, *product)


def _div(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    quotient = _extremes(node.dtype, torch.div, _corners(a, b))
    return _anything_where(_has_zero(b) | (_has_inf(a) & _has_inf(b)), node.dtype, *quotient)


def _floordiv(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    if node.dtype is DType.FLOAT:
        return Bounds(*(x.floor() for x in _div(node, a, b)))
    # |x // y| <= |x| also for y = 0, where it is 0
    is_any = _has_zero(b)
    divisor = Bounds(torch.where(is_any, -1, b.lo), torch.where(is_any, 1, b.hi))
    return _extremes(node.dtype, MEANING[Op.FLOORDIV], _corners(a, divisor))


def _mod(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    if node.dtype is DType.FLOAT:
        lost = _size(a).hi * _MARGIN  # x - floor(x / y) * y cancels
        lo, hi = b.lo.clamp(max=0) - lost, b.hi.clamp(min=0) + lost
        return _anything_where(_has_zero(b) | _has_inf(a) | _has_inf(b), node.dtype, *_rounded(lo, hi))
    lo, hi = (b.lo + 1).clamp(max=0), (b.hi - 1).clamp(min=0)
    period = MEANING[Op.FLOORDIV](a.lo, b.lo)
    is_one_period = (b.lo == b.hi) & (b.lo != 0) & (period == MEANING[Op.FLOORDIV](a.hi, b.lo))
    start = period * b.lo
    return Bounds(torch.where(is_one_period, a.lo - start, lo), torch.where(is_one_period, a.hi - start, hi))


def _neg(node: Expr, a: Bounds) -> Bounds:
    return _extremes(node.dtype, torch.neg, [(a.lo,), (a.hi,)])


def _abs(node: Expr, a: Bounds) -> Bounds:
    size = _size(a)
    return _extremes(node.dtype, _identity, [(size.lo,), (size.hi,)])


def _min(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    return Bounds(torch.minimum(a.lo, b.lo), torch.minimum(a.hi, b.hi))


def _max(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    return Bounds(torch.maximum(a.lo, b.lo), torch.maximum(a.hi, b.hi))


def _pow(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    exponent = node.args[1].value if node.args[1].op is Op.CONST else None
    if isinstance(exponent, float) and exponent.is_integer() and exponent > 0:
        base = a if exponent % 2 else _size(a)
        return _extremes(node.dtype, lambda x: x**exponent, [(base.lo,), (base.hi,)])
    is_nan = (a.lo < 0) | ((a.lo <= 0) & (b.lo < 0))
    return _anything_where(is_nan, node.dtype, *_extremes(node.dtype, torch.pow, _corners(a, b)))


def _shift(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    bits = 32 if node.dtype is DType.INT32 else 64
    is_outside = (b.lo < 0) | (b.hi >= bits)
    amount = Bounds(b.lo.clamp(0, bits - 1), b.hi.clamp(0, bits - 1))
    if node.op is Op.SHR:
        shifted = _span([x >> n for x, n in _corners(a, amount)])
        return _anything_where(is_outside, node.dtype, *shifted)
    return _anything_where(is_outside, node.dtype, *_extremes(node.dtype, _shifted_left, _corners(a, amount)))


def _shifted_left(x: Tensor, amount: Tensor) -> Tensor:
    return torch.ldexp(x, amount) if x.is_floating_point() else torch.bitwise_left_shift(x, amount)


# Logic; of integers by their known bits: those above the highest bit in which lo and hi differ.


def _known_bits(a: Bounds) -> tuple[Tensor, Tensor]:
    """Bits that are surely set in all values, bits that may be set."""
    unknown = a.lo ^ a.hi
    for shift in (1, 2, 4, 8, 16, 32):
        unknown = unknown | (unknown >> shift)
    return a.lo & ~unknown, a.lo | unknown


def _bitwise(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    (a_set, a_may), (b_set, b_may) = _known_bits(a), _known_bits(b)
    if node.op is Op.XOR:
        unknown = (a_set ^ a_may) | (b_set ^ b_may)
        lo = (a_set ^ b_set) & ~unknown
        hi = lo | unknown
    else:
        lo, hi = MEANING[node.op](a_set, b_set), MEANING[node.op](a_may, b_may)
    return _anything_where(lo > hi, node.dtype, lo, hi)  # the sign is not known


def _and_or(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    if node.dtype.is_int:
        return _bitwise(node, a, b)
    return Bounds(MEANING[node.op](a.lo, b.lo), MEANING[node.op](a.hi, b.hi))


def _xor(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    if node.dtype.is_int:
        return _bitwise(node, a, b)
    return Bounds((a.lo & ~b.hi) | (b.lo & ~a.hi), (a.hi & ~b.lo) | (b.hi & ~a.lo))


def _not(node: Expr, a: Bounds) -> Bounds:
    return Bounds(~a.hi, ~a.lo)


# Comparisons, written so that NaN bounds leave them undecided.


def _eq(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    return Bounds((a.lo == b.hi) & (a.hi == b.lo), ~((a.lo > b.hi) | (a.hi < b.lo)))


def _ne(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    return _not(node, _eq(node, a, b))


def _lt(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    return Bounds(a.hi < b.lo, ~(a.lo >= b.hi))


def _le(node: Expr, a: Bounds, b: Bounds) -> Bounds:
    return Bounds(a.hi <= b.lo, ~(a.lo > b.hi))


def _where(node: Expr, condition: Bounds, a: Bounds, b: Bounds) -> Bounds:
    lo = torch.where(condition.hi, torch.minimum(a.lo, b.lo), b.lo)
    hi = torch.where(condition.hi, torch.maximum(a.hi, b.hi), b.hi)
    return Bounds(torch.where(condition.lo, a.lo, lo), torch.where(condition.lo, a.hi, hi))


def _cast(node: Expr, a: Bounds) -> Bounds:
    source, target = node.args[0].dtype, node.dtype
    if target is DType.BOOL:
        return Bounds((a.lo > 0) | (a.hi < 0), ~((a.lo == 0) & (a.hi == 0)))
    if target is DType.FLOAT:
        return _rounded(a.lo.double(), a.hi.double())
    if source is DType.FLOAT:
        limit = float(_HIGHEST[target])
        is_inside = (a.lo > -limit) & (a.hi < limit)
        lo, hi = (torch.where(is_inside, x, 0.0).long() for x in a)
        return _anything_where(~is_inside, target, lo, hi)
    return _extremes(target, _identity, [(a.lo.long(),), (a.hi.long(),)])


# Functions of a FLOAT. Outside the domain they give NaN.


def _increasing(node: Expr, a: Bounds) -> Bounds:
    bounds = Bounds(MEANING[node.op](a.lo), MEANING[node.op](a.hi))
    if node.dtype.is_int:
        return bounds
    return _anything_where(a.lo.isnan(), node.dtype, *_rounded(*bounds))  # torch.sign(nan) is 0


def _rsqrt(node: Expr, a: Bounds) -> Bounds:
    return _anything_where(a.lo <= 0, node.dtype, *_rounded(a.hi.rsqrt(), a.lo.rsqrt()))


def _wave(node: Expr, a: Bounds) -> Bounds:
    one = torch.ones_like(a.lo)
    return _anything_where(_has_inf(a) | a.lo.isnan(), node.dtype, *_rounded(-one, one))


EXACT = frozenset({Op.INDEX, Op.CONST, Op.NUMBER})  # never mix the axes: always evaluated
UNBOUNDED = frozenset({Op.SCORE, Op.LOAD})  # a read at an index that mixes the axes may see any element
RULES: dict[Op, Callable[..., Bounds]] = {
    Op.ADD: _add,
    Op.SUB: _sub,
    Op.MUL: _mul,
    Op.DIV: _div,
    Op.FLOORDIV: _floordiv,
    Op.MOD: _mod,
    Op.NEG: _neg,
    Op.ABS: _abs,
    Op.MIN: _min,
    Op.MAX: _max,
    Op.POW: _pow,
    Op.SHL: _shift,
    Op.SHR: _shift,
    Op.AND: _and_or,
    Op.OR: _and_or,
    Op.XOR: _xor,
    Op.NOT: _not,
    Op.EQ: _eq,
    Op.NE: _ne,
    Op.LT: _lt,
    Op.LE: _le,
    Op.WHERE: _where,
    Op.CAST: _cast,
    Op.EXP: _increasing,
    Op.EXP2: _increasing,
    Op.LOG: _increasing,
    Op.LOG2: _increasing,
    Op.LOG1P: _increasing,
    Op.SQRT: _increasing,
    Op.RSQRT: _rsqrt,
    Op.TANH: _increasing,
    Op.SIGMOID: _increasing,
    Op.ERF: _increasing,
    Op.SIN: _wave,
    Op.COS: _wave,
    Op.FLOOR: _increasing,
    Op.CEIL: _increasing,
    Op.SIGN: _increasing,
}
