"""Bounds hold at every position of every tile, for random expressions over every Op."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from anymask.expr import interval
from anymask.expr.bindings import Bindings
from anymask.expr.evaluate import evaluate
from anymask.expr.interval import Bounds, Grid, tile_bounds
from anymask.expr.ir import SCORE, DType, Expr, Op, apply, cast, const, index
from tests.expr.expressions import COMPARE, FLOAT, INT32, INT64, OPERATIONS, bindings, expressions


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Ragged grids, some with tiles larger than the lengths."""
    sizes = [draw(st.integers(1, high)) for high in (2, 2, 13, 13)]
    tile = draw(st.sampled_from([(4, 4), (3, 5), (1, 2), (16, 3)]))
    return Grid(*sizes, tile, torch.device("cpu"))


def dense(expr: Expr, bound: Bindings, grid: Grid, **options: object) -> torch.Tensor:
    """The value at every position, [B, H, Sq, Skv]."""
    sizes = (grid.B, grid.H, grid.Sq, grid.Skv)
    lines = [torch.arange(n).view([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate(sizes)]
    indices = dict(zip(("b", "h", "q_idx", "kv_idx"), lines, strict=True))
    return evaluate(expr, bound, **indices, **options).expand(sizes)  # type: ignore[arg-type]


def at_positions(bounds: Bounds, grid: Grid) -> list[torch.Tensor]:
    """lo and hi of the tile of each position, [B, H, Sq, Skv]."""
    q_block, kv_block = torch.arange(grid.Sq) // grid.tile[0], torch.arange(grid.Skv) // grid.tile[1]
    return [x.expand(grid.shape)[:, :, q_block][..., kv_block] for x in bounds]


def check(value: torch.Tensor, bounds: Bounds, grid: Grid) -> None:
    lo, hi = at_positions(bounds, grid)
    if value.dtype is torch.bool:
        assert not bool((lo & ~value).any()), "lo claims True"
        assert not bool((value & ~hi).any()), "hi claims False"
        return
    is_anything = lo.isnan()
    assert torch.equal(is_anything, hi.isnan())
    assert bool((is_anything | ((lo <= value) & (value <= hi))).all())


@pytest.mark.parametrize("dtype", DType)
@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(data=st.data())
def test_bounds_hold_at_every_position(dtype: DType, data: st.DataObject) -> None:
    grid = data.draw(grids())
    expr = data.draw(expressions(dtype))
    bound = bindings(data.draw(st.integers(0, 9)))
    check(dense(expr, bound, grid), tile_bounds(expr, bound, grid), grid)


Q, KV = index("q_idx"), index("kv_idx")
GRID = Grid(1, 1, 12, 14, (4, 5), torch.device("cpu"))


def shifted(dtype: DType, by: int) -> tuple[Expr, Expr]:
    return cast(Q, dtype), apply(Op.SUB, cast(KV, dtype), const(by, dtype))


def mixed_operations(dtype: DType, by: int) -> list[Expr]:
    """Each op once with operands that surely mix the axes."""
    q, kv = shifted(dtype, by)
    mixed = apply(Op.SUB, q, kv)
    results = [apply(op, q, kv) for op in (*OPERATIONS[dtype][2], *COMPARE)]
    results += [apply(op, kv, q) for op in OPERATIONS[dtype][2]]
    results += [apply(op, mixed) for op in OPERATIONS[dtype][1]]
    results += [apply(Op.WHERE, apply(Op.LT, q, kv), q, kv)] + [cast(mixed, other) for other in DType]
    return results + [apply(op, mixed, const(n, dtype)) for op in OPERATIONS[dtype][2] for n in (-2, 0, 2, 3, 7)]


@pytest.mark.parametrize("dtype", [INT32, INT64, FLOAT])
@pytest.mark.parametrize("by", [-3, 6])
def test_every_operation_of_two_axes(dtype: DType, by: int) -> None:
    """FLOAT ones also as float32 kernels compute them."""
    for expr in mixed_operations(dtype, by):
        bounds = tile_bounds(expr, Bindings(), GRID)
        check(dense(expr, Bindings(), GRID), bounds, GRID)
        if expr.dtype is FLOAT:
            check(dense(expr, Bindings(), GRID, dtype=torch.float32).double(), bounds, GRID)


def test_every_op_has_a_rule() -> None:
    assert interval.RULES.keys() | interval.EXACT | interval.UNBOUNDED == set(Op)


def bounds_of(expr: Expr, grid: Grid, bound: Bindings | None = None) -> list[list[list[int]]]:
    return [x.expand(grid.shape)[0, 0].tolist() for x in tile_bounds(expr, bound or Bindings(), grid)]


def test_values_of_one_axis_are_exact() -> None:
    """A table and a remainder are bounded by the values that occur in the tile, ragged end included."""
    grid = Grid(1, 1, 6, 1, (4, 4), torch.device("cpu"))
    table = torch.tensor([5, 7, 6, 5, -1, -1, 99], dtype=torch.int32)
    assert bounds_of(Expr.of(Op.LOAD, INT32, (Q,), 0), grid, Bindings((table,))) == [[[5], [-1]], [[7], [-1]]]
    assert bounds_of(apply(Op.MOD, Q, const(4, INT32)), grid) == [[[0], [0]], [[3], [1]]]


def test_remainder_is_sharp_within_a_period() -> None:
    grid = Grid(1, 1, 4, 8, (4, 4), torch.device("cpu"))
    remainder = apply(Op.MOD, apply(Op.ADD, Q, KV), const(8, INT32))
    assert bounds_of(remainder, grid) == [[[0, 0]], [[6, 7]]]


def test_overflow_is_the_full_range() -> None:
    grid = Grid(1, 1, 2, 2, (2, 2), torch.device("cpu"))
    for dtype, high in ((INT32, 2**31 - 1), (INT64, 2**63 - 1)):
        total = apply(Op.ADD, apply(Op.SUB, const(high, dtype), cast(Q, dtype)), cast(KV, dtype))
        assert bounds_of(total, grid) == [[[-high - 1]], [[high]]]


def test_squares_are_not_negative() -> None:
    """So a circular neighbourhood, sqrt(dx * dx) < R, is decided far from its rim."""
    grid = Grid(1, 1, 8, 8, (4, 4), torch.device("cpu"))
    difference = cast(apply(Op.SUB, Q, KV), FLOAT)
    near = apply(Op.LT, apply(Op.SQRT, apply(Op.MUL, difference, difference)), const(4.0, FLOAT))
    assert bounds_of(near, grid)[0] == [[True, False], [False, True]]


def test_nan_leaves_comparisons_undecided() -> None:
    grid = Grid(1, 1, 4, 4, (4, 4), torch.device("cpu"))
    difference = cast(apply(Op.SUB, Q, KV), FLOAT)
    zero = apply(Op.MUL, difference, const(0.0, FLOAT))
    nans = [
        apply(Op.LOG, difference),
        apply(Op.SQRT, difference),
        apply(Op.DIV, difference, difference),
        apply(Op.MUL, difference, const(math.inf, FLOAT)),
        apply(Op.SUB, apply(Op.DIV, const(1.0, FLOAT), zero), apply(Op.DIV, const(1.0, FLOAT), zero)),
        apply(Op.ADD, SCORE, difference),
    ]
    for nan in nans:
        for comparison in (apply(op, nan, const(-1e30, FLOAT)) for op in COMPARE):
            assert bounds_of(comparison, grid) == [[[False]], [[True]]]


@pytest.mark.parametrize("sizes", [(1, 1, 0, 5), (1, 1, 5, 0), (0, 2, 5, 5), (2, 0, 5, 5)])
def test_nothing_to_bound(sizes: tuple[int, int, int, int]) -> None:
    grid = Grid(*sizes, (4, 4), torch.device("cpu"))
    mask = apply(Op.LE, apply(Op.ADD, index("b"), KV), apply(Op.ADD, index("h"), Q))
    assert all(x.expand(grid.shape).numel() == 0 for x in tile_bounds(mask, Bindings(), grid))
