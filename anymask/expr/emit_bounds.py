"""emit_bounds(mask): the text of one Triton function that bounds a mask over map tiles. Text only: imports no Triton.

As in interval.py, a value of at most one of q_idx and kv_idx is evaluated at each of its positions and reduced per
tile; an operation that mixes the two follows one rule per Op. Where there is none, the value may be anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from anymask.expr.emit import RANGES, TEMPLATES, TYPES, Bounds, axes, function_text, integer_bounds, lines_of
from anymask.expr.ir import DType, Expr, Op


@functools.lru_cache(maxsize=4096)
def emit_bounds(
    mask: Expr, name: str, wide: frozenset[int] = frozenset(), overhang: frozenset[str] | None = None
) -> str:
    """Source of `name(q_first, q_last, kv_first, kv_last, b, h, q_idx, kv_idx, captures, ints, floats)` -> lo, hi.

    lo: surely true everywhere in a map tile, hi: possibly true somewhere; two int1 tiles that broadcast to [RQ, RKV].
    In the function q_idx is int32 [RQ, positions of a tile] and kv_idx int32 [RKV, positions], where a position may
    stand more than once; q_first, q_last [RQ] and kv_first, kv_last [RKV] are its ends; the rest is as in emit().
    """
    ranges = integer_bounds(mask.walk())
    parts, mixed = _parts(mask, ranges)
    lines, values = lines_of(parts, wide, overhang=overhang)
    ends: dict[Expr, tuple[str, str]] = {}

    def assign(node: Expr, bounds: str) -> None:
        ends[node] = (f"lo{len(ends)}", f"hi{len(ends)}")
        lines.append(f"{', '.join(ends[node])} = {bounds}")

    for node, value in zip(parts, values, strict=True):
        assign(node, _ENDS.get(value) or f"{_OVER[axes(node)]}({value})")
    for node in mixed:
        rule = _rule(node, ranges)
        operands = [end for arg in node.args for end in ends[arg]] if rule else []
        assign(node, (rule or ANYTHING[node.dtype]).format(**dict(zip("aAbBcC", operands, strict=False))))
    return function_text(
        name, ["q_first", "q_last", "kv_first", "kv_last"], [*lines, f"return {', '.join(ends[mask])}"]
    )


# An index itself is not looked at at every position.
_ENDS = {"q_idx": "q_first[:, None], q_last[:, None]", "kv_idx": "kv_first[None, :], kv_last[None, :]"}
_OVER = {frozenset(): "of_one", frozenset({"q_idx"}): "over_q", frozenset({"kv_idx"}): "over_kv"}


def _parts(mask: Expr, ranges: Bounds) -> tuple[list[Expr], list[Expr]]:
    """What the mask's bounds follow from: values of at most one axis, and operations of both; operands first."""
    nodes = list(mask.walk())
    needed = {mask}
    for node in reversed(nodes):
        if node in needed and len(axes(node)) == 2 and _rule(node, ranges):
            needed.update(node.args)
    kept = [node for node in nodes if node in needed]
    return [node for node in kept if len(axes(node)) < 2], [node for node in kept if len(axes(node)) == 2]


def _rule(node: Expr, ranges: Bounds) -> str | None:
    """The text of a node's bounds over those of its operands; None if it may be anything."""
    dtype = node.args[-1].dtype if node.args else node.dtype
    own = {DType.BOOL: BOOL_RULES, DType.FLOAT: FLOAT_RULES}.get(dtype, INTEGER_RULES)
    if _is_exact(node, ranges):
        return EXACT_RULES[node.op]
    rule = own.get(node.op) or RULES.get(node.op)
    return rule(node) if callable(rule) else rule


def _is_exact(node: Expr, ranges: Bounds) -> bool:
    """Whether a sum surely fits its dtype, and the bounds of its operands are no wider than their structure says."""
    is_sum = node.op in EXACT_RULES and node.dtype.is_int and ranges[node] != RANGES[node.dtype]
    return is_sum and all(len(axes(arg)) < 2 or _is_exact(arg, ranges) for arg in node.args)


def _product(node: Expr) -> str:
    is_square = node.args[0] is node.args[1]
    return "square_bounds({a}, {A})" if is_square else "multiply_bounds({a}, {A}, {b}, {B})"


def _quotient(node: Expr) -> str:
    if _constant(node.args[1]) > 0:
        return "floor_divide({a}, {b}), floor_divide({A}, {b})"
    return "floor_divide_bounds({a}, {A}, {b}, {B})"


def _shifted_left(node: Expr) -> str | None:
    amount = _constant(node.args[1])
    if not 0 <= amount < (32 if node.dtype is DType.INT32 else 63):
        return None
    factor = f"tl.full([], {1 << amount}, tl.int64)"
    return f"corners(times, {{a}}, {{A}}, {factor}, {factor})"


def _shifted_right(node: Expr) -> str | None:
    is_inside = 0 <= _constant(node.args[1]) < (32 if node.dtype is DType.INT32 else 64)
    return "{a} >> {b}, {A} >> {b}" if is_inside else None


def _constant(node: Expr) -> int:
    """The value of an integer constant; -1 for what is none."""
    return int(node.value) if node.op is Op.CONST else -1  # type: ignore[arg-type]


def _cast(node: Expr) -> str:
    source, target = node.args[0].dtype, node.dtype
    if target is DType.BOOL:
        return "({a} > 0) | ({A} < 0), ~(({a} == 0) & ({A} == 0))"
    if target is DType.FLOAT:
        return "widened({a}, {A})"
    if source is DType.FLOAT or source is DType.INT64:
        return f"{'truncated' if source is DType.FLOAT else 'narrowed'}({{a}}, {{A}}, {TYPES[target]})"
    return f"{{a}}.to({TYPES[target]}), {{A}}.to({TYPES[target]})"


def _increasing(node: Expr) -> str:
    template = str(TEMPLATES[node.op])
    low, high = (template.format(end, type=TYPES[node.dtype]) for end in ("{a}", "{A}"))
    return f"widened({low}, {high})" if node.dtype is DType.FLOAT else f"{low}, {high}"


def _anything(dtype: DType) -> str:
    ends = RANGES.get(dtype, ('float("nan")',) * 2)
    return ", ".join(f"tl.full([], {end}, {'tl.float64' if dtype is DType.FLOAT else TYPES[dtype]})" for end in ends)


ANYTHING = {dtype: _anything(dtype) for dtype in DType}

# Op -> template of "lo, hi" over the bounds {a} {A} of the first operand, {b} {B} of the second, {c} {C} of the third.
# Functions without a prefix are those of kernels/bounds.py and kernels/functions.py. Comparisons are written so that
# NaN, the bounds of a FLOAT that may be anything, leaves them undecided.
Rule = str | Callable[[Expr], str | None]
RULES: dict[Op, Rule] = {
    Op.ADD: "corners(plus, {a}, {A}, {b}, {B})",
    Op.SUB: "corners(minus, {a}, {A}, {b}, {B})",
    Op.MUL: _product,
    Op.NEG: "negate_bounds({a}, {A})",
    Op.ABS: "size_bounds({a}, {A})",
    Op.EQ: "({a} == {B}) & ({A} == {b}), ~(({a} > {B}) | ({A} < {b}))",
    Op.NE: "({a} > {B}) | ({A} < {b}), ~(({a} == {B}) & ({A} == {b}))",
    Op.LT: "{A} < {b}, ~({a} >= {B})",
    Op.LE: "{A} <= {b}, ~({a} > {B})",
    Op.WHERE: "where_bounds({a}, {A}, {b}, {B}, {c}, {C})",
    Op.CAST: _cast,
}
INTEGER_RULES: dict[Op, Rule] = {
    Op.FLOORDIV: _quotient,
    Op.MOD: "modulo_bounds({a}, {A}, {b}, {B})",
    Op.MIN: "tl.minimum({a}, {b}), tl.minimum({A}, {B})",
    Op.MAX: "tl.maximum({a}, {b}), tl.maximum({A}, {B})",
    Op.SHL: _shifted_left,
    Op.SHR: _shifted_right,
    Op.NOT: "~{A}, ~{a}",
    Op.SIGN: _increasing,
}
# Where _is_exact.
EXACT_RULES: dict[Op, str] = {
    Op.ADD: "{a} + {b}, {A} + {B}",
    Op.SUB: "{a} - {B}, {A} - {b}",
}
FLOAT_RULES: dict[Op, Rule] = {
    Op.DIV: "divide_bounds({a}, {A}, {b}, {B})",
    Op.MIN: "min_bounds({a}, {A}, {b}, {B})",
    Op.MAX: "max_bounds({a}, {A}, {b}, {B})",
    Op.SQRT: _increasing,
    Op.FLOOR: _increasing,
    Op.CEIL: _increasing,
}
BOOL_RULES: dict[Op, Rule] = {
    Op.AND: "{a} & {b}, {A} & {B}",
    Op.OR: "{a} | {b}, {A} | {B}",
    Op.XOR: "({a} & ~{B}) | (~{A} & {b}), ({A} & ~{b}) | (~{a} & {B})",
    Op.NOT: "~{A}, ~{a}",
    Op.EQ: "({a} & {b}) | ~({A} | {B}), ({A} | ~{b}) & (~{a} | {B})",
    Op.NE: "({a} & ~{B}) | (~{A} & {b}), ({A} & ~{b}) | (~{a} & {B})",
    Op.LT: "~{A} & {b}, ~{a} & {B}",
    Op.LE: "~{A} | {b}, ~{a} | {B}",
    Op.MIN: "{a} & {b}, {A} & {B}",
    Op.MAX: "{a} | {b}, {A} | {B}",
    Op.MUL: "{a} & {b}, {A} & {B}",
    Op.ADD: "{a} | {b}, {A} | {B}",
    Op.WHERE: "({a} & {b}) | (~{A} & {c}) | ({b} & {c}), ({A} & {B}) | (~{a} & {C})",
    Op.CAST: _cast,
}
# Of both axes, these may be anything.
UNBOUNDED = frozenset(
    {Op.SCORE, Op.LOAD, Op.POW, Op.EXP, Op.EXP2, Op.LOG, Op.LOG2, Op.LOG1P, Op.RSQRT, Op.TANH, Op.SIGMOID, Op.ERF}
) | {Op.SIN, Op.COS}
