"""simplify(expr): the same meaning in fewer nodes. One rule per line, its law in the comment."""

from __future__ import annotations

from collections.abc import Callable

from anymask.expr.evaluate import evaluate_constant
from anymask.expr.ir import FALSE, TRUE, DType, Expr, Op, apply, const

Rule = Callable[[Expr], Expr]


def rewrite(expr: Expr, rule: Rule) -> Expr:
    """Apply rule to every node once, operands first; a rule returns its node where nothing changes."""
    done: dict[Expr, Expr] = {}
    for node in expr.walk():
        args = tuple(done[arg] for arg in node.args)
        done[node] = rule(node if args == node.args else Expr.of(node.op, node.dtype, args, node.value))
    return done[expr]


def simplify(expr: Expr) -> Expr:
    """Rewrite until nothing changes."""
    while (smaller := rewrite(expr, _simplify_node)) is not expr:
        expr = smaller
    return expr


def _simplify_node(node: Expr) -> Expr:
    if node.args and node.op is not Op.LOAD and all(arg.op is Op.CONST for arg in node.args):
        return const(evaluate_constant(node), node.dtype)
    for law in _LAWS.get(node.op, ()):
        smaller = law(*node.args) if node.op is not Op.CAST else law(node)
        if smaller is not None:
            return smaller
    return node


def _is(node: Expr, value: bool | int | float) -> bool:
    return node.op is Op.CONST and node.value == value


def _is_int(node: Expr) -> bool:
    return node.dtype.is_int


def _opposite(a: Expr, b: Expr) -> bool:
    return (a.op is Op.NOT and a.args[0] is b) or (b.op is Op.NOT and b.args[0] is a)


def _reciprocal(x: Expr, y: Expr) -> Expr | None:
    if y.dtype is not DType.FLOAT or y.op is not Op.CONST or y.value == 0:
        return None
    return apply(Op.MUL, x, const(1.0 / float(y.value), DType.FLOAT))  # type: ignore[arg-type]


def _join_factors(x: Expr, y: Expr) -> Expr | None:
    if y.op is not Op.CONST or x.op is not Op.MUL or x.args[1].op is not Op.CONST:
        return None
    return apply(Op.MUL, x.args[0], apply(Op.MUL, x.args[1], y))


def _power(x: Expr, y: Expr) -> Expr | None:
    if y.op is not Op.CONST or y.value not in (1, 2, 3, 4):
        return None
    square = apply(Op.MUL, x, x)
    return {1: x, 2: square, 3: apply(Op.MUL, square, x), 4: apply(Op.MUL, square, square)}[int(y.value)]


def _cast_of_cast(node: Expr) -> Expr | None:
    inner = node.args[0]
    is_exact = inner.op is Op.CAST and inner.args[0].dtype.rank < inner.dtype.rank and inner.dtype is not DType.FLOAT
    return Expr.of(Op.CAST, node.dtype, inner.args) if is_exact and node.dtype is not DType.BOOL else None


def _same_type(node: Expr) -> Expr | None:
    return node.args[0] if node.args[0].dtype is node.dtype else None


# fmt: off
_LAWS: dict[Op, tuple[Callable[..., Expr | None], ...]] = {
    Op.ADD: (
        lambda x, y: x if _is(y, 0) and _is_int(x) else None,                        # x + 0 = x    (not -0.0 + 0.0)
        lambda x, y: y if _is(x, 0) and _is_int(x) else None,                        # 0 + y = y
    ),
    Op.SUB: (
        lambda x, y: x if _is(y, 0) else None,                                       # x - 0 = x
        lambda x, y: const(0, x.dtype) if x is y and _is_int(x) else None,           # x - x = 0    (not inf - inf)
    ),
    Op.MUL: (
        lambda x, y: x if _is(y, 1) else None,                                       # x * 1 = x
        lambda x, y: y if _is(x, 1) else None,                                       # 1 * y = y
        lambda x, y: apply(Op.MUL, y, x) if x.op is Op.CONST and y.op is not Op.CONST else None,  # c * x = x * c
        lambda x, y: _join_factors(x, y),                                            # (x * c) * d = x * (c * d)
        lambda x, y: const(0, x.dtype) if (_is(x, 0) or _is(y, 0)) and _is_int(x) else None,  # x * 0 = 0 (not inf * 0)
    ),
    Op.DIV: (_reciprocal,),                                                          # x / c = x * (1 / c)
    Op.FLOORDIV: (lambda x, y: x if _is(y, 1) and _is_int(x) else None,),            # x // 1 = x
    Op.MOD: (lambda x, y: const(0, x.dtype) if _is(y, 1) and _is_int(x) else None,), # x % 1 = 0
    Op.POW: (_power,),                                                               # x ** 2 = x * x, up to 4
    Op.SHL: (lambda x, y: x if _is(y, 0) else None,),                                # x << 0 = x
    Op.SHR: (lambda x, y: x if _is(y, 0) else None,),                                # x >> 0 = x
    Op.NEG: (lambda x: x.args[0] if x.op is Op.NEG else None,),                      # -(-x) = x
    Op.MIN: (lambda x, y: x if x is y else None,),                                   # min(x, x) = x
    Op.MAX: (lambda x, y: x if x is y else None,),                                   # max(x, x) = x
    Op.AND: (
        lambda x, y: x if x is y or y is TRUE else None,                             # x & x = x, x & true = x
        lambda x, y: y if x is TRUE else None,                                       # true & y = y
        lambda x, y: FALSE if x is FALSE or y is FALSE else None,                    # x & false = false
        lambda x, y: FALSE if x.dtype is DType.BOOL and _opposite(x, y) else None,   # x & ~x = false
    ),
    Op.OR: (
        lambda x, y: x if x is y or y is FALSE else None,                            # x | x = x, x | false = x
        lambda x, y: y if x is FALSE else None,                                      # false | y = y
        lambda x, y: TRUE if x is TRUE or y is TRUE else None,                       # x | true = true
        lambda x, y: TRUE if x.dtype is DType.BOOL and _opposite(x, y) else None,    # x | ~x = true
    ),
    Op.XOR: (
        lambda x, y: x if y is FALSE else None,                                      # x ^ false = x
        lambda x, y: y if x is FALSE else None,                                      # false ^ y = y
        lambda x, y: FALSE if x is y and x.dtype is DType.BOOL else None,            # x ^ x = false
    ),
    Op.NOT: (lambda x: x.args[0] if x.op is Op.NOT else None,),                      # ~~x = x
    Op.EQ: (lambda x, y: TRUE if x is y and x.dtype is not DType.FLOAT else None,),  # x == x    (not nan)
    Op.NE: (lambda x, y: FALSE if x is y and x.dtype is not DType.FLOAT else None,), # x != x is false
    Op.LE: (lambda x, y: TRUE if x is y and x.dtype is not DType.FLOAT else None,),  # x <= x
    Op.LT: (lambda x, y: FALSE if x is y else None,),                                # x < x is false
    Op.WHERE: (
        lambda c, x, y: x if c is TRUE or x is y else None,                          # where(true, x, y) = x
        lambda c, x, y: y if c is FALSE else None,                                   # where(false, x, y) = y
        lambda c, x, y: c if x is TRUE and y is FALSE else None,                     # where(c, true, false) = c
    ),
    Op.CAST: (_same_type, _cast_of_cast),                              # widening casts keep the value, so casts join
}
# fmt: on

__all__ = ["rewrite", "simplify"]
