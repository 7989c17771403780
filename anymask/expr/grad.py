"""derivative(expr): d expr / d score, in forward mode. One rule per Op; None stands for a derivative that is 0."""

from __future__ import annotations

import math
from collections.abc import Callable

from anymask.expr.ir import SCORE, DType, Expr, Op, apply, const
from anymask.expr.simplify import simplify


def derivative(expr: Expr) -> Expr:
    """d expr / d score as an expression of the same indices, captures and score.

    Conventions at kinks are those of torch.autograd: abs and sign give 0 at 0, a tie of min or max gives half to each.
    """
    done: dict[Expr, Expr | None] = {}
    for node in expr.walk():
        if node is SCORE:
            done[node] = _number(1.0)
        elif node.dtype is not DType.FLOAT or not node.args or all(done[arg] is None for arg in node.args):
            done[node] = None
        else:
            done[node] = RULES[node.op](node, *node.args, *(done[arg] for arg in node.args))
    result = done[expr]
    return _number(0.0) if result is None else simplify(result)


def _number(value: float) -> Expr:
    return const(value, DType.FLOAT)


def _add(x: Expr | None, y: Expr | None) -> Expr | None:
    if x is None or y is None:
        return y if x is None else x
    return apply(Op.ADD, x, y)


def _neg(x: Expr | None) -> Expr | None:
    return None if x is None else apply(Op.NEG, x)


def _mul(x: Expr, dx: Expr | None) -> Expr | None:
    return None if dx is None else apply(Op.MUL, x, dx)


def _where(condition: Expr, x: Expr | None, y: Expr | None) -> Expr:
    return apply(Op.WHERE, condition, *(_number(0.0) if value is None else value for value in (x, y)))


def _pick(x: Expr, y: Expr, d_if_less: Expr | None, d_if_more: Expr | None) -> Expr:
    """The derivative of min or max of x and y: one where x < y, one where x > y, half of each at a tie."""
    tie = _mul(_number(0.5), _add(d_if_less, d_if_more))
    return _where(apply(Op.EQ, x, y), tie, _where(apply(Op.LT, x, y), d_if_less, d_if_more))


def _pow(z: Expr, x: Expr, y: Expr, dx: Expr | None, dy: Expr | None) -> Expr | None:
    by_base = _mul(apply(Op.MUL, y, apply(Op.POW, x, apply(Op.SUB, y, _number(1.0)))), dx)
    by_exponent = None if dy is None else _mul(apply(Op.MUL, z, apply(Op.LOG, x)), dy)
    return _add(by_base, by_exponent)


def _div(z: Expr, x: Expr, y: Expr, dx: Expr | None, dy: Expr | None) -> Expr | None:
    top = _add(dx, _neg(_mul(z, dy)))
    return None if top is None else apply(Op.DIV, top, y)


def _one_minus(x: Expr) -> Expr:
    return apply(Op.SUB, _number(1.0), x)


def _flat(z: Expr, *_: object) -> Expr | None:
    return None


# Each rule gets the node z, its operands, then their derivatives.
# fmt: off
RULES: dict[Op, Callable[..., Expr | None]] = {
    Op.ADD: lambda z, x, y, dx, dy: _add(dx, dy),
    Op.SUB: lambda z, x, y, dx, dy: _add(dx, _neg(dy)),
    Op.MUL: lambda z, x, y, dx, dy: _add(_mul(y, dx), _mul(x, dy)),
    Op.DIV: _div,
    Op.FLOORDIV: _flat,
    Op.MOD: lambda z, x, y, dx, dy: _add(dx, _neg(_mul(apply(Op.FLOORDIV, x, y), dy))),  # x - floor(x / y) y
    Op.NEG: lambda z, x, dx: _neg(dx),
    Op.ABS: lambda z, x, dx: _mul(apply(Op.SIGN, x), dx),
    Op.MIN: lambda z, x, y, dx, dy: _pick(x, y, dx, dy),
    Op.MAX: lambda z, x, y, dx, dy: _pick(x, y, dy, dx),
    Op.POW: _pow,
    Op.WHERE: lambda z, c, x, y, dc, dx, dy: _where(c, dx, dy),
    Op.EXP: lambda z, x, dx: _mul(z, dx),
    Op.EXP2: lambda z, x, dx: _mul(apply(Op.MUL, z, _number(math.log(2.0))), dx),
    Op.LOG: lambda z, x, dx: apply(Op.DIV, dx, x),
    Op.LOG2: lambda z, x, dx: apply(Op.DIV, dx, apply(Op.MUL, x, _number(math.log(2.0)))),
    Op.LOG1P: lambda z, x, dx: apply(Op.DIV, dx, apply(Op.ADD, x, _number(1.0))),
    Op.SQRT: lambda z, x, dx: apply(Op.DIV, apply(Op.MUL, _number(0.5), dx), z),
    Op.RSQRT: lambda z, x, dx: _mul(apply(Op.MUL, _number(-0.5), apply(Op.MUL, z, apply(Op.MUL, z, z))), dx),
    Op.TANH: lambda z, x, dx: _mul(_one_minus(apply(Op.MUL, z, z)), dx),
    Op.SIGMOID: lambda z, x, dx: _mul(apply(Op.MUL, z, _one_minus(z)), dx),
    Op.ERF: lambda z, x, dx: _mul(
        apply(Op.MUL, _number(2 / math.sqrt(math.pi)), apply(Op.EXP, apply(Op.NEG, apply(Op.MUL, x, x)))), dx),
    Op.SIN: lambda z, x, dx: _mul(apply(Op.COS, x), dx),
    Op.COS: lambda z, x, dx: _mul(apply(Op.NEG, apply(Op.SIN, x)), dx),
    Op.FLOOR: _flat,
    Op.CEIL: _flat,
    Op.SIGN: _flat,
    Op.CAST: _flat,  # FLOAT from an integer; only integers and BOOL reach it
}
# fmt: on
