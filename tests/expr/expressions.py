"""Random expressions over every Op, for property tests of the passes."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st

from anymask.expr.bindings import Bindings
from anymask.expr.ir import DType, Expr, Op, apply, cast, const, index
from anymask.kernels.recipe import Layout, _filler, bound, readable

BOOL, INT32, INT64, FLOAT = DType
FUNCTIONS = (
    *(Op.EXP, Op.EXP2, Op.LOG, Op.LOG2, Op.LOG1P, Op.SQRT, Op.RSQRT, Op.TANH, Op.SIGMOID, Op.ERF, Op.SIN, Op.COS),
    *(Op.FLOOR, Op.CEIL),
)
ARITHMETIC = (Op.ADD, Op.SUB, Op.MUL, Op.FLOORDIV, Op.MOD, Op.MIN, Op.MAX)
OPERATIONS = {
    BOOL: {2: (Op.AND, Op.OR, Op.XOR, Op.MIN, Op.MAX), 1: (Op.NOT,)},
    INT32: {2: (*ARITHMETIC, Op.SHL, Op.SHR, Op.AND, Op.OR, Op.XOR), 1: (Op.NEG, Op.ABS, Op.NOT, Op.SIGN)},
    FLOAT: {2: (*ARITHMETIC, Op.DIV, Op.POW), 1: (Op.NEG, Op.ABS, Op.SIGN, *FUNCTIONS)},
}
OPERATIONS[INT64] = OPERATIONS[INT32]
COMPARE = (Op.EQ, Op.NE, Op.LT, Op.LE)
LOADS = {INT32: (0, 1), FLOAT: (1, 2), BOOL: (2, 2), INT64: (3, 1)}  # slot and rank
CONSTANTS = {
    BOOL: st.booleans(),
    INT32: st.sampled_from([-(2**31), -7, -2, -1, 0, 1, 2, 3, 5, 8, 30, 2**31 - 1]),
    INT64: st.sampled_from([-(2**63), -(2**33), -3, -1, 0, 1, 2, 4, 40, 2**62, 2**63 - 1]),
    FLOAT: st.sampled_from([-math.inf, -2.5, -1.0, 0.0, 1e-200, 0.1, 0.5, 1.0, 2.0, 3.0, 1e30, math.inf, math.nan]),
}
NUMBERS = {"ints": (3, -4), "floats": (0.75, -2.0)}


@st.composite
def expressions(draw: st.DrawFn, dtype: DType, depth: int = 3) -> Expr:
    """A random expression of dtype over all ops; captured tensors are those of `bindings`."""

    def some(of: DType) -> Expr:
        return draw(expressions(of, depth - 1))

    if depth == 0:
        kinds = ["index"] * 6 + ["const", "number"]
    else:
        kinds = ["binary"] * 4 + ["compare"] * 6 * (dtype is BOOL) + ["unary", "unary", "where", "cast", "load", "same"]
    kind = draw(st.sampled_from(kinds))
    if kind == "number" and dtype is not BOOL:
        return Expr.of(Op.NUMBER, dtype, (), draw(st.integers(0, 1)))
    if kind == "index":
        return cast(index(draw(st.sampled_from([*["q_idx", "kv_idx"] * 3, "b", "h"]))), dtype)
    if kind == "load":
        slot, rank = LOADS[dtype]
        return Expr.of(Op.LOAD, dtype, tuple(some(INT32) for _ in range(rank)), slot)
    if kind == "cast":
        return cast(some(draw(st.sampled_from(list(DType)))), dtype)
    if kind == "where":
        return apply(Op.WHERE, some(BOOL), some(dtype), some(dtype))
    if kind == "compare":
        of = draw(st.sampled_from(list(DType)))
        return apply(draw(st.sampled_from(COMPARE)), some(of), some(of))
    if kind == "same" and dtype is not BOOL:
        arg = some(dtype)
        return apply(Op.MUL, arg, arg)
    if kind == "unary":
        return apply(draw(st.sampled_from(OPERATIONS[dtype][1])), some(dtype))
    if kind == "binary":
        return apply(draw(st.sampled_from(OPERATIONS[dtype][2])), some(dtype), some(dtype))
    return const(draw(CONSTANTS[dtype]), dtype)


def bindings(seed: int) -> Bindings:
    """Captured tensors for each slot of LOADS, extreme values among them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-3, 4, (7,), generator=generator, dtype=torch.int32).sort().values
    floats = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    floats[0, :4] = torch.tensor([0.0, math.inf, math.nan, -1e-300])
    bools = torch.rand(6, 9, generator=generator) < 0.5
    wide = torch.randint(-(2**40), 2**40, (9,), generator=generator)
    wide[0] = -(2**63)
    return Bindings((ids, floats, bools, wide), **NUMBERS)


def as_kernels_take(bindings: Bindings) -> Any:
    """(captures, ints, floats), the `bindings` argument of a kernel."""
    captures = readable(bindings.captures)
    values, _ = bound(tuple(map(Layout.of, captures)), bindings.ints, bindings.floats)
    return _filler(values)(captures)
