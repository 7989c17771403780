"""emit(expr): the text of one Triton function that computes an expression over a tile. Text only: imports no Triton.

One line per node in the order of Expr.walk. Operands keep the shape their indices give them, [BLOCK_Q, 1] or
[1, BLOCK_KV], until an operation needs both, so what depends on a row alone is computed and loaded once per row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable

from anymask.expr.ir import SCORE, DType, Expr, Op, apply
from anymask.expr.simplify import rewrite

TYPES = {DType.BOOL: "tl.int1", DType.INT32: "tl.int32", DType.INT64: "tl.int64", DType.FLOAT: "tl.float32"}
INDENT = "    "


@functools.lru_cache(maxsize=4096)
def emit(
    expr: Expr,
    name: str,
    wide: frozenset[int] = frozenset(),
    is_ptx: bool = False,
    overhang: frozenset[str] | None = None,
    near: str | None = None,
) -> str:
    """Source of `name(b, h, q_idx, kv_idx, captures, ints, floats)`; `score` comes first where expr is a FLOAT.

    In the function: b, h are int32 scalars; q_idx, kv_idx int32 [BLOCK_Q, 1] and [1, BLOCK_KV] (or transposed).
    captures: per slot (pointer, odd sizes, strides).  ints: odd numbers; a size or number n travels as odd(n).
    wide: slots of captured tensors whose offsets need 64 bits. The result broadcasts to the tile; FLOAT is float32.
    is_ptx: for NVIDIA: what an operation of both axes reads of one axis alone goes through opaque() of functions.py.
    overhang: the indices that may run past the last position, where the value is of no meaning. So ids[b, q_idx] is
    inside its tensor (ops.check_reads), or may be read at its end. None: any index may, and its value has a meaning.
    near: for Hopper: distances of q_idx and kv_idx are compared near the tile (near() of functions.py), whose columns
    are this one of both.
    """
    params = ["score"] if expr.dtype is DType.FLOAT else []
    lines, (value,) = lines_of([expr], wide, is_ptx, overhang, near)
    return function_text(name, params, [*lines, f"return {value}"])


@functools.lru_cache(maxsize=4096)
def emit_hide(
    mask: Expr,
    name: str,
    wide: frozenset[int] = frozenset(),
    is_ptx: bool = False,
    overhang: frozenset[str] | None = None,
    near: str | None = None,
) -> str:
    """Source of `name(x, other, b, h, q_idx, kv_idx, captures, ints, floats)`: x where the mask shows, other where not.

    One select for each condition that `&` joins: joined first, LLVM would pack the conditions into bits (sm_90,
    documents and causal, dQ step 128 x 64: 734 -> 591 instructions). near: of two such comparisons of a 64 x 64 tile
    LLVM packs the results all the same, so each is one instruction with its select (kept() of functions.py).
    """
    conjuncts = _conjuncts(mask)
    operands = {arg for part in conjuncts for node in part.walk() for arg in node.args}
    kept = frozenset(
        part
        for part in conjuncts
        if near
        and part.op in PTX_COMPARISONS
        and part not in operands
        and part.args[0].dtype is DType.INT32
        and len(axes(part)) == 2
    )
    lines, values = lines_of(conjuncts, wide, is_ptx, overhang, near, kept)
    selects = [
        f"x = tl.where({value}, x, other)" for part, value in zip(conjuncts, values, strict=True) if part not in kept
    ]
    return function_text(name, ["x", "other"], [*lines, *selects, "return x"])


SCALE = Expr.of(Op.INDEX, DType.FLOAT, (), "scale")


@functools.lru_cache(maxsize=4096)
def emit_score(
    expr: Expr,
    name: str,
    wide: frozenset[int] = frozenset(),
    is_ptx: bool = False,
    overhang: frozenset[str] | None = None,
    near: str | None = None,
) -> str:
    """Source of `name(score, scale, b, h, q_idx, kv_idx, captures, ints, floats)`: a score function, or its derivative,
    of score * scale.

    Factors that are the same for a whole tile are multiplied by each other first: q k^T * scale / cap takes one
    multiplication a score (sm_90, softcap, forward 128 x 128: 984 -> 791 instructions a step).
    """
    lines, (value,) = lines_of([rewrite(expr, _gather_factors)], wide, is_ptx, overhang, near)
    return function_text(name, ["score", "scale"], [*lines, f"return {value}"])


def _gather_factors(node: Expr) -> Expr:
    """score = score * scale; factor * x = x * factor; (x * factor) * other = x * (factor * other)."""
    if node is SCORE:
        return apply(Op.MUL, SCORE, SCALE)
    if node.op is not Op.MUL or node.dtype is not DType.FLOAT:
        return node
    x, factor = node.args if axes(node.args[0]) else node.args[::-1]
    if not axes(x) or axes(factor):
        return node
    if (inner := _scaled(x)) is not None:
        x, factor = inner[0], apply(Op.MUL, inner[1], factor)
    return apply(Op.MUL, x, factor)


def _scaled(node: Expr) -> tuple[Expr, Expr] | None:
    """What a product multiplies, and its factor that is the same for a whole tile, if it has one."""
    is_scaled = node.op is Op.MUL and node.dtype is DType.FLOAT and axes(node.args[0]) and not axes(node.args[1])
    return (node.args[0], node.args[1]) if is_scaled else None


def _conjuncts(mask: Expr) -> list[Expr]:
    return [part for arg in mask.args for part in _conjuncts(arg)] if mask.op is Op.AND else [mask]


def function_text(name: str, params: list[str], lines: list[str]) -> str:
    """The text of a jitted function of these parameters, the indices and the bindings."""
    params = [*params, "b", "h", "q_idx", "kv_idx", "captures", "ints", "floats"]
    return f"@triton.jit\ndef {name}({', '.join(params)}):\n" + "".join(f"{INDENT}{line}\n" for line in lines)


def lines_of(
    exprs: list[Expr],
    wide: frozenset[int],
    is_ptx: bool = False,
    overhang: frozenset[str] | None = None,
    near: str | None = None,
    kept: frozenset[Expr] = frozenset(),
) -> tuple[list[str], list[str]]:
    """One line per node of the expressions, and the names that hold their values. kept: comparisons of which nothing
    holds the value: x is kept where they are true.
    """
    nodes = list(dict.fromkeys(node for expr in exprs for node in expr.walk()))
    opaque = _one_axis_operands(nodes) if is_ptx else set()
    rounds = all(expr.dtype is DType.BOOL for expr in exprs)
    bounds = integer_bounds(nodes)
    names: dict[Expr, str] = {}
    lines: list[str] = []
    is_hopper = near is not None
    if not any(map(_is_distance, nodes)):
        near = None
    if near:
        lines.append("near_q_idx, near_kv_idx = near(q_idx, kv_idx)")
    for node in nodes:
        if node.op in (Op.INDEX, Op.SCORE):
            names[node] = str(node.value) if node.op is Op.INDEX else "score"
            if node in opaque:  # for operations of both axes: reads of captured tensors still see consecutive indices
                lines.append(f"opaque_{node.value} = opaque({node.value})")
            continue
        target = f"v{len(names)}"
        args = [names[arg] for arg in node.args]
        if node.op is Op.LOAD:
            lines += _load(node, target, args, bounds, wide, overhang)
        else:
            if near and _is_distance(node):
                args = [f"near_{arg}" for arg in args]
            elif len(axes(node)) == 2:
                hidden = [arg.op is Op.INDEX and arg in opaque for arg in node.args]
                args = [f"opaque_{arg}" if is_hidden else arg for arg, is_hidden in zip(args, hidden, strict=True)]
            rule = (_rounded_rule(node, is_ptx) if rounds else None) or _rule(node, bounds)
            if near:
                args = _row_bound(node, names, near) or args
            scaled = _scaled(node.args[0] if node.op is Op.TANH else node) if is_ptx else None
            if is_hopper and node.op is Op.TANH and len(axes(node)) == 2:
                x, factor = (names[scaled[0]], names[scaled[1]]) if scaled else (args[0], "1.0")
                lines.append(f"{target} = tanh_of_tile({x}, {factor})")
            elif is_ptx and node.op is Op.TANH:
                x, factor = (names[scaled[0]], names[scaled[1]]) if scaled else (args[0], "1.0")
                lines += [f"{target}_part = tanh_part({x}, {factor})", f"{target} = 1 - 2 * {target}_part"]
            elif scaled and scaled[0].op is Op.TANH and not is_hopper:
                lines.append(f"{target} = {args[1]} - 2 * {args[1]} * {args[0]}_part")
            elif node in kept:
                lines.append(f'x = kept(x, other, {args[0]}, {args[1]}, "{PTX_COMPARISONS[node.op]}")')
            else:
                lines.append(f"{target} = {rule.format(*args, type=TYPES[node.dtype])}")
        if node in opaque:
            lines.append(f"{target} = opaque({target})")
        names[node] = target
    return lines, [names[expr] for expr in exprs]


@functools.lru_cache(maxsize=65536)
def axes(node: Expr) -> frozenset[str]:
    """Which of q_idx and kv_idx a value varies with; the score varies with both."""
    if node.op is Op.SCORE:
        return frozenset(("q_idx", "kv_idx"))
    own = {str(node.value)} if node.op is Op.INDEX else set()
    return frozenset(own & {"q_idx", "kv_idx"}).union(*map(axes, node.args))


def _is_distance(node: Expr) -> bool:
    """It depends on q_idx and kv_idx by their difference alone: it compares or subtracts them."""
    is_difference = node.op in (Op.LE, Op.LT, Op.EQ, Op.NE, Op.SUB)
    return is_difference and {(arg.op, arg.value) for arg in node.args} == {(Op.INDEX, "q_idx"), (Op.INDEX, "kv_idx")}


def _row_bound(node: Expr, names: dict[Expr, str], column: str) -> list[str] | None:
    """Operands that compare the column with a number of the row, where node compares q_idx - kv_idx with another one.

    The number is cut to +-INDEX_LIMIT, beyond every difference, so that nothing wraps.
    """
    if node.op not in (Op.LE, Op.LT):
        return None
    for difference, number in (node.args, node.args[::-1]):
        if difference.op is Op.SUB and _is_distance(difference) and column not in axes(number):
            is_column_first = difference.args[0].value == column
            row = difference.args[is_column_first].value
            cut = f"tl.minimum(tl.maximum({names[number]}, -{INDEX_LIMIT}), {INDEX_LIMIT})"
            bound = f"near_{row} {'+' if is_column_first else '-'} {cut}"
            # column - row <= n and n <= row - column bound the column from above
            is_above = is_column_first == (difference is node.args[0])
            return [f"near_{column}", bound] if is_above else [bound, f"near_{column}"]
    return None


def is_costly(mask: Expr) -> bool:
    """A tile of 128 x 128 takes more registers than there are: where each pair takes more than 16 operations, or keys
    are read at indices that may be negative.
    """
    nodes = list(mask.walk())
    bounds = integer_bounds(nodes)
    reads = [node for node in nodes if node.op is Op.LOAD and "kv_idx" in axes(node)]
    may_wrap = any(bounds[arg][0] < 0 and "kv_idx" in axes(arg) for node in reads for arg in node.args)
    return may_wrap or sum(len(axes(node)) == 2 for node in nodes) > 16


def _one_axis_operands(nodes: list[Expr]) -> set[Expr]:
    """The values of one axis that operations of both axes read."""
    mixed = [node for node in nodes if len(axes(node)) == 2 and node.op is not Op.LOAD]
    return {arg for node in mixed for arg in node.args if len(axes(arg)) == 1 and arg.dtype is not DType.BOOL}


def odd(n: int) -> int:
    """How an integer travels to a kernel: Triton compiles anew for 1 and for multiples of 16, and this is never one.

    (It is 1 for n = 0, which is rare: a captured number 0 has become a constant.)
    """
    return 2 * n + 1


# Op -> template over its operands {0} {1} {2} and the Triton {type} of its result. Functions without a prefix are those
# of kernels/functions.py.
TEMPLATES: dict[Op, str | Callable[[Expr], str]] = {
    Op.INDEX: "{0}",
    Op.SCORE: "{0}",
    Op.CONST: lambda node: f"tl.cast({_literal(node)}, {{type}})",
    Op.NUMBER: lambda node: (
        f"tl.cast(floats[{node.value}], {{type}})"
        if node.dtype is DType.FLOAT
        else f"tl.cast(ints[{node.value}] >> 1, {{type}})"
    ),
    Op.LOAD: "tl.load({0}, mask={1}, other=0)",
    Op.ADD: "{0} + {1}",
    Op.SUB: "{0} - {1}",
    Op.MUL: "{0} * {1}",
    Op.DIV: "{0} / {1}",
    Op.FLOORDIV: "floor_divide({0}, {1})",
    Op.MOD: "floor_modulo({0}, {1})",
    Op.NEG: "-{0}",
    Op.ABS: "tl.abs({0})",
    Op.MIN: "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    Op.MAX: "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    Op.POW: lambda node: _power(node),
    Op.SHL: "shift_left({0}, {1})",
    Op.SHR: "shift_right({0}, {1})",
    Op.AND: "{0} & {1}",
    Op.OR: "{0} | {1}",
    Op.XOR: "{0} ^ {1}",
    Op.NOT: "~{0}",
    Op.EQ: "{0} == {1}",
    Op.NE: "{0} != {1}",
    Op.LT: "{0} < {1}",
    Op.LE: "{0} <= {1}",
    Op.WHERE: "tl.where({0}, {1}, {2})",
    Op.CAST: lambda node: "{0} != 0" if node.dtype is DType.BOOL else "{0}.to({type})",
    Op.EXP: "tl.exp({0})",
    Op.EXP2: "tl.exp2({0})",
    Op.LOG: "tl.log({0})",
    Op.LOG2: "tl.log2({0})",
    Op.LOG1P: "log1p({0})",
    Op.SQRT: "tl.sqrt({0})",
    Op.RSQRT: "tl.rsqrt({0})",
    Op.TANH: "tanh({0})",
    Op.SIGMOID: "tl.sigmoid({0})",
    Op.ERF: "tl.erf({0})",
    Op.SIN: "tl.sin({0})",
    Op.COS: "tl.cos({0})",
    Op.FLOOR: "tl.floor({0})",
    Op.CEIL: "tl.ceil({0})",
    Op.SIGN: "({0} > 0).to({type}) - ({0} < 0).to({type})",
}

# On BOOL operands: Triton orders a 1-bit True below False.
BOOL_TEMPLATES: dict[Op, str] = {
    Op.LT: "~{0} & {1}",
    Op.LE: "~{0} | {1}",
    Op.MIN: "{0} & {1}",
    Op.MAX: "{0} | {1}",
    Op.MUL: "{0} & {1}",
    Op.ADD: "{0} | {1}",
}

# How PTX names them.
PTX_COMPARISONS: dict[Op, str] = {Op.EQ: "eq", Op.NE: "ne", Op.LT: "lt", Op.LE: "le"}

FLOAT_TEMPLATES: dict[Op, str] = {
    Op.FLOORDIV: "tl.floor({0} / {1})",
    Op.MOD: "{0} - tl.floor({0} / {1}) * {1}",
}

# In a mask each operation is rounded by itself, as torch does it: what decides who sees what must not depend on whether
# a product and a sum became one instruction. (exp and its like still differ by their last bits.)
ROUNDED_TEMPLATES: dict[Op, str] = {Op.DIV: "tl.div_rn({0}, {1})", Op.SQRT: "tl.sqrt_rn({0})"}
PTX_ROUNDED_TEMPLATES: dict[Op, str] = {Op.MUL: "rounded_product({0}, {1})"}

Bounds = dict[Expr, tuple[int, int]]
RANGES = {DType.BOOL: (0, 1), DType.INT32: (-(1 << 31), (1 << 31) - 1), DType.INT64: (-(1 << 63), (1 << 63) - 1)}


def _rule(node: Expr, bounds: Bounds) -> str:
    """The cheapest template whose condition holds."""
    dtype = node.args[0].dtype if node.args else node.dtype
    if dtype is DType.BOOL and node.op in BOOL_TEMPLATES:
        return BOOL_TEMPLATES[node.op]
    if dtype is DType.FLOAT and node.op in FLOAT_TEMPLATES:
        return FLOAT_TEMPLATES[node.op]
    if node.op in (Op.FLOORDIV, Op.MOD, Op.SHL, Op.SHR):
        return _integer_rule(node, bounds) or str(TEMPLATES[node.op])
    template = TEMPLATES[node.op]
    return template if isinstance(template, str) else template(node)


def _rounded_rule(node: Expr, is_ptx: bool) -> str | None:
    if node.dtype is not DType.FLOAT:
        return None
    return ROUNDED_TEMPLATES.get(node.op) or (PTX_ROUNDED_TEMPLATES.get(node.op) if is_ptx else None)


def _integer_rule(node: Expr, bounds: Bounds) -> str | None:
    """What one instruction can do: shifts by less than the width, division by 2^n, division of what is not negative."""
    x, y = node.args
    low, high = bounds[y]
    if node.op in (Op.SHL, Op.SHR):
        is_inside = low >= 0 and high < (32 if node.dtype is DType.INT32 else 64)
        return {Op.SHL: "{0} << {1}", Op.SHR: "{0} >> {1}"}[node.op] if is_inside else None
    if y.op is Op.CONST and low > 0 and low & (low - 1) == 0:
        return f"{{0}} >> {low.bit_length() - 1}" if node.op is Op.FLOORDIV else f"{{0}} & {low - 1}"
    if low > 0 and bounds[x][0] >= 0:  # C and Triton round towards zero: the same where neither is negative
        return {Op.FLOORDIV: "{0} // {1}", Op.MOD: "{0} % {1}"}[node.op]
    return None


def _power(node: Expr) -> str:
    exponent = node.args[1].value if node.args[1].op is Op.CONST else None
    if isinstance(exponent, float) and exponent.is_integer() and abs(exponent) <= 64:
        return f"integer_power({{0}}, {int(exponent)})"
    return "power({0}, {1})"


def _literal(node: Expr) -> str:
    if isinstance(node.value, float) and not math.isfinite(node.value):
        return f'float("{node.value}")'
    return repr(node.value)


def _load(
    node: Expr, target: str, args: list[str], bounds: Bounds, wide: frozenset[int], overhang: frozenset[str] | None
) -> list[str]:
    """Lines that read a captured tensor: negative indices count from the end, outside the tensor 0 is read."""
    slot = int(node.value)  # type: ignore[arg-type]
    lines, inside, pointer = [], [], f"captures[{slot}][0]"
    for dim, (arg, index) in enumerate(zip(node.args, args, strict=True)):
        size = f"(captures[{slot}][1][{dim}] >> 1)"
        if bounds[arg][0] < 0:
            lines.append(f"{target}_{dim} = tl.where({index} < 0, {index} + {size}, {index})")
            index = f"{target}_{dim}"
            inside.append(f"({index} >= 0)")
        if overhang is None or arg.op is not Op.INDEX:
            inside.append(f"({index} < {size})")
        elif arg.value in overhang:
            index = f"tl.minimum({index}, {size} - 1)"
        offset = f"{index}.to(tl.int64)" if slot in wide else index
        pointer += f" + {offset} * captures[{slot}][2][{dim}]"
    read = str(TEMPLATES[Op.LOAD]).format(pointer, " & ".join(inside)) if inside else f"tl.load({pointer})"
    convert = " != 0" if node.dtype is DType.BOOL else f".to({TYPES[node.dtype]})"
    return [*lines, f"{target} = {read}{convert}"]


INDEX_LIMIT = 1 << 30  # above every index that a kernel passes, the overhang of the last tile included


def integer_bounds(nodes: Iterable[Expr]) -> Bounds:
    """Smallest and largest value of each integer node, by its structure alone; what could wrap is unknown."""
    bounds: Bounds = {}
    for node in nodes:
        if node.dtype is DType.FLOAT:
            continue
        lowest, highest = RANGES[node.dtype]
        found = _node_bounds(node, [bounds[arg] for arg in node.args if arg in bounds])
        is_known = found is not None and lowest <= found[0] and found[1] <= highest
        bounds[node] = found if found is not None and is_known else (lowest, highest)
    return bounds


def _node_bounds(node: Expr, args: list[tuple[int, int]]) -> tuple[int, int] | None:
    if node.op is Op.INDEX:
        return 0, INDEX_LIMIT - 1
    if node.op is Op.CONST:
        return int(node.value), int(node.value)  # type: ignore[arg-type]
    if node.op is Op.CAST and args:
        return args[0]
    if node.op is Op.WHERE:
        return min(args[1][0], args[2][0]), max(args[1][1], args[2][1])
    if node.op in (Op.LOAD, Op.NUMBER) or len(args) != 2 or node.dtype is DType.BOOL:
        return None
    (a, b), (c, d) = args
    if node.op is Op.ADD:
        return a + c, b + d
    if node.op is Op.SUB:
        return a - d, b - c
    if node.op is Op.MUL:
        corners = (a * c, a * d, b * c, b * d)
        return min(corners), max(corners)
    if node.op is Op.MIN:
        return min(a, c), min(b, d)
    if node.op is Op.MAX:
        return max(a, c), max(b, d)
    if node.op is Op.MOD and c > 0:
        return 0, d - 1
    if node.op in (Op.FLOORDIV, Op.SHR) and a >= 0 and c >= 0:
        return 0, b
    if node.op is Op.AND and (a >= 0 or c >= 0):
        return 0, min(b if a >= 0 else d, d if c >= 0 else b)
    return None
