"""Emitted bounds never contradict the emitted mask, for random masks over every Op, and are sharp for usual ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import strategies as st

import anymask
from anymask import causal, document, prefix_lm, sliding_window
from anymask.blocks.build import UNDECIDED, interval_kinds
from anymask.expr import emit_bounds as rules
from anymask.expr.bindings import Bindings
from anymask.expr.emit import emit
from anymask.expr.emit_bounds import emit_bounds
from anymask.expr.interval import EXACT, Bounds, Grid
from anymask.expr.ir import DType, Expr, Op, apply, cast, const, index
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import trace
from anymask.kernels.jit import jitted
from anymask.kernels.triton_map import positions
from tests.expr.expressions import COMPARE, FLOAT, INT32, INT64, as_kernels_take, bindings, expressions
from tests.expr.test_interval import check, grids, mixed_operations

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
SIDE = 16  # tiles and positions of a test at most, along each axis
TYPES = {DType.BOOL: torch.bool, INT32: torch.int32, INT64: torch.int64, FLOAT: torch.float32}


@triton.jit
def bounds_kernel(
    lo_pointer,  # [B, H, SIDE, SIDE]
    hi_pointer,
    Sq,
    Skv,
    bindings,
    BOUNDS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Bounds of SIDE x SIDE tiles of at most SIDE x SIDE positions, for each batch and head."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    line = tl.arange(0, SIDE)
    q_idx = positions(line[:, None], line[None, :], Sq, TILE_Q, False)
    kv_idx = positions(line[:, None], line[None, :], Skv, TILE_KV, False)
    q_ends = (positions(line, 0, Sq, TILE_Q, False), positions(line, TILE_Q - 1, Sq, TILE_Q, False))
    kv_ends = (positions(line, 0, Skv, TILE_KV, False), positions(line, TILE_KV - 1, Skv, TILE_KV, False))
    lo, hi = BOUNDS(
        q_ends[0], q_ends[1], kv_ends[0], kv_ends[1], b, h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2]
    )
    offsets = (b * tl.num_programs(1) + h) * SIDE * SIDE + line[:, None] * SIDE + line[None, :]
    tl.store(lo_pointer + offsets, tl.broadcast_to(lo, [SIDE, SIDE]))
    tl.store(hi_pointer + offsets, tl.broadcast_to(hi, [SIDE, SIDE]))


@triton.jit
def value_kernel(pointer, bindings, VALUE: tl.constexpr, SIDE: tl.constexpr, IS_FLOAT: tl.constexpr):
    """An expression at SIDE x SIDE positions, for each batch and head."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    line = tl.arange(0, SIDE)
    q_idx = line[:, None]
    kv_idx = line[None, :]
    if IS_FLOAT:
        value = VALUE(0.0, b, h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2])
    else:
        value = VALUE(b, h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2])
    offsets = (b * tl.num_programs(1) + h) * SIDE * SIDE + line[:, None] * SIDE + line[None, :]
    tl.store(pointer + offsets, tl.broadcast_to(value, [SIDE, SIDE]))


def emitted_bounds(expr: Expr, bound: Bindings, grid: Grid, is_wide: bool = False) -> Bounds:
    """lo and hi, [B, H, nQ, nKV], from the emitted bounds."""
    kind = torch.float64 if expr.dtype is FLOAT else TYPES[expr.dtype]
    lo, hi = (torch.empty(grid.B, grid.H, SIDE, SIDE, dtype=kind, device=DEVICE) for _ in range(2))
    wide = frozenset(range(len(bound.captures))) if is_wide else frozenset()
    fn = jitted(emit_bounds(expr, "bounds", wide), "bounds")
    arguments = (lo, hi, grid.Sq, grid.Skv, as_kernels_take(bound))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy in the interpreter: overflow, nan
        bounds_kernel[(grid.B, grid.H)](*arguments, BOUNDS=fn, TILE_Q=grid.tile[0], TILE_KV=grid.tile[1], SIDE=SIDE)
    *_, num_q, num_kv = grid.shape
    return Bounds(*(x[..., :num_q, :num_kv].cpu() for x in (lo, hi)))


def emitted_value(expr: Expr, bound: Bindings, grid: Grid) -> torch.Tensor:
    """What kernels see, [B, H, Sq, Skv]; FLOAT is float32."""
    value = torch.empty(grid.B, grid.H, SIDE, SIDE, dtype=TYPES[expr.dtype], device=DEVICE)
    fn = jitted(emit(expr, "value"), "value")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value_kernel[(grid.B, grid.H)](value, as_kernels_take(bound), VALUE=fn, SIDE=SIDE, IS_FLOAT=expr.dtype is FLOAT)
    return value[..., : grid.Sq, : grid.Skv].cpu()


def emitted_kinds(mask: Expr, bound: Bindings, grid: Grid) -> torch.Tensor:
    """EMPTY, FULL or UNDECIDED for each tile, from the emitted bounds: int8 [B, H, nQ, nKV]."""
    lo, hi = emitted_bounds(mask, bound, grid)
    return hi.to(torch.int8) * UNDECIDED - lo.to(torch.int8)


def on_device(bound: Bindings) -> Bindings:
    return Bindings(tuple(tensor.to(DEVICE) for tensor in bound.captures), bound.ints, bound.floats)


def check_emitted(expr: Expr, bound: Bindings, grid: Grid, is_wide: bool = False) -> None:
    check(emitted_value(expr, bound, grid), emitted_bounds(expr, bound, grid, is_wide), grid)


@pytest.mark.parametrize("dtype", DType)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(data=st.data())
def test_bounds_hold_at_every_position(dtype: DType, data: st.DataObject) -> None:
    bound = on_device(bindings(data.draw(st.integers(0, 9))))
    check_emitted(data.draw(expressions(dtype)), bound, data.draw(grids()), data.draw(st.booleans()))


Q, KV = index("q_idx"), index("kv_idx")
GRID = Grid(1, 1, 12, 14, (4, 5), CPU)
NOTHING = Bindings()


@pytest.mark.parametrize("dtype", [INT32, INT64, FLOAT])
@pytest.mark.parametrize("by", [-3, 6])
def test_every_operation_of_two_axes(dtype: DType, by: int) -> None:
    """Each op once with operands that surely mix the axes."""
    for expr in mixed_operations(dtype, by):
        check_emitted(expr, NOTHING, GRID)


LOGIC = (Op.AND, Op.OR, Op.XOR, Op.EQ, Op.NE, Op.LT, Op.LE, Op.MIN, Op.MAX)


@pytest.mark.parametrize("op", LOGIC)
def test_logic(op: Op) -> None:
    below, near = apply(Op.LT, KV, Q), apply(Op.LE, apply(Op.ABS, apply(Op.SUB, Q, KV)), const(3, INT32))
    results = [apply(op, below, near), apply(op, near, apply(Op.NOT, below)), apply(Op.WHERE, below, near, below)]
    results += [apply(op, near, apply(Op.LT, Q, const(6, INT32))), apply(Op.WHERE, near, below, apply(Op.NOT, near))]
    for result in results:
        check_emitted(result, NOTHING, GRID)
        assert torch.equal(emitted_kinds(result, NOTHING, GRID), interval_kinds(result, NOTHING, GRID))


def test_every_op_has_a_rule() -> None:
    tables = (rules.RULES, rules.INTEGER_RULES, rules.FLOAT_RULES, rules.BOOL_RULES)
    ruled = frozenset(op for table in tables for op in table)
    assert ruled | EXACT | rules.UNBOUNDED == set(Op)
    assert not ruled & rules.UNBOUNDED and rules.EXACT_RULES.keys() <= ruled


def test_overflow_and_nan_leave_open() -> None:
    high = const(2**31 - 1, INT32)
    total = apply(Op.ADD, apply(Op.SUB, high, Q), KV)
    difference = cast(apply(Op.SUB, Q, KV), FLOAT)
    nans = [
        apply(Op.SQRT, difference),
        apply(Op.DIV, difference, difference),
        apply(Op.MUL, difference, const(math.inf, FLOAT)),
        apply(Op.ADD, difference, Expr.of(Op.LOAD, FLOAT, (Q,), 0)),
    ]
    bound = Bindings((torch.full((12,), math.nan, device=DEVICE),))
    for value, least in [(total, const(-5, INT32)), *((nan, const(-1e30, FLOAT)) for nan in nans)]:
        for op in COMPARE:
            mask = apply(op, value, least)
            kinds = emitted_kinds(mask, bound, GRID)
            assert torch.equal(kinds, interval_kinds(mask, bound, GRID)) and kinds[..., 1, 1].item() == UNDECIDED


S = 120
IDS = torch.tensor([0, 0, 0, 1, 1, 2, 5, 5, -1, -1], dtype=torch.int32, device=DEVICE).repeat_interleave(12)
Function = Callable[[Any, Any, Any, Any], Any]


def diffusion(b: Any, h: Any, q: Any, k: Any) -> Any:
    q_clean, k_clean = q >= 60, k >= 60
    q_block, k_block = torch.where(q_clean, q - 60, q) // 8, torch.where(k_clean, k - 60, k) // 8
    own = (q_block == k_block) & (q_clean == k_clean)
    return own | (k_clean & ~q_clean & (k_block < q_block)) | (k_clean & q_clean & (k_block <= q_block))


STRUCTURED: dict[str, Function] = {
    "causal": causal(),
    "shifted": causal(offset=-7),
    "shifted per batch": causal(offset=torch.tensor([3, -9], device=DEVICE)),
    "window": sliding_window(17, 6),
    "causal window": sliding_window(40, 0),
    "documents": causal() & document(IDS),
    "documents per batch": causal() & document(torch.stack([IDS, IDS // 2])),
    "documents and window": document(IDS) & sliding_window(24, 0),
    "prefix": prefix_lm(35),
    "prefix per batch": prefix_lm(torch.tensor([20, 77], device=DEVICE)),
    "chunked": lambda b, h, q, k: (q // 24 == k // 24) & (q >= k),
    "block diffusion": diffusion,
    "1-D neighbourhood": lambda b, h, q, k: abs(q - k) <= 13,
    "clamped neighbourhood": lambda b, h, q, k: abs(q.clamp(13, S - 14) - k) <= 13,
    "2-D neighbourhood": lambda b, h, q, k: (abs(q // 12 - k // 12) <= 2) & (abs(q % 12 - k % 12) <= 2),
    "distance": lambda b, h, q, k: (q // 12 - k // 12) ** 2 + (q % 12 - k % 12) ** 2 <= 9,
    "remainder of the distance": lambda b, h, q, k: ((q - k) % 64 < 20) & ((q - k) // 16 != 1),
    "float": lambda b, h, q, k: torch.sqrt((q - k) * 1.0 * (q - k)) / 2 < 11.5,
    "sinks": causal() & (sliding_window(16, 0) | anymask.from_function(lambda b, h, q, k: k < 4)),
    "every other head": lambda b, h, q, k: torch.where(h % 2 == 0, q >= k, abs(q - k) <= 8),
    "not documents": ~(causal() & document(IDS)),
    "exclusive": causal() ^ document(IDS),
    "either": document(IDS) | ~sliding_window(9, None),
}


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("tile", [(8, 8), (16, 10)])
def test_structured_masks_are_decided_as_by_intervals(name: str, tile: tuple[int, int]) -> None:
    program = trace(STRUCTURED[name], None, DEVICE)
    mask = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats).mask
    grid = Grid(2, 2, S - 2, S, tile, DEVICE)
    assert torch.equal(emitted_kinds(mask, program.bindings, grid), interval_kinds(mask, program.bindings, grid))
