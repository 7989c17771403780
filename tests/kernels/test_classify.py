"""The map kernel decides every tile as brute force does: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from anymask.blocks.block_map import EMPTY, FULL, PARTIAL
from anymask.blocks.build import build, tile_kinds
from anymask.expr.bindings import Bindings
from anymask.expr.interval import Grid
from anymask.expr.ir import FALSE, TRUE, DType, Expr, Op, apply, cast, const, index
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import trace
from anymask.kernels import map_launch
from tests.cases import MASKS, Sizes
from tests.expr.expressions import bindings, expressions
from tests.expr.test_emit_bounds import DEVICE, emitted_value, on_device
from tests.expr.test_interval import grids

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")  # numpy: nan, inf, deprecations
B_IDX, H_IDX, Q, KV = (index(name) for name in ("b", "h", "q_idx", "kv_idx"))
CAUSAL = apply(Op.LE, KV, Q)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps are shared among few programs, which the interpreter runs one by one."""
    monkeypatch.setattr(map_launch, "MAP_PROGRAMS", 3)


def brute_force(visible: Tensor, grid: Grid) -> Tensor:
    """Kinds from every pair, [B, H, nQ, nKV] int8.  visible: [B, H, Sq, Skv] bool."""
    kinds = torch.empty(grid.shape, dtype=torch.int8)
    for i, rows in enumerate(visible.split(grid.tile[0], dim=2)):
        for j, pairs in enumerate(rows.split(grid.tile[1], dim=3)):
            pairs = pairs.flatten(2)
            kinds[:, :, i, j] = torch.where(pairs.all(-1), FULL, torch.where(pairs.any(-1), PARTIAL, EMPTY))
    return kinds


@pytest.mark.parametrize("tile", [(16, 16), (8, 4), (100, 24)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name: str, tile: tuple[int, int]) -> None:
    B, H, Sq, Skv = 2, 2, 40, 52
    program = trace(MASKS[name](Sizes(B, H, Sq, Skv, DEVICE.type)), None, DEVICE)
    mask = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats).mask
    kinds = build(mask, program.bindings, B, H, Sq, Skv, DEVICE, tile, map_launch.classify)
    assert torch.equal(kinds, build(mask, program.bindings, B, H, Sq, Skv, DEVICE, tile))


def fitting(bound: Bindings) -> Bindings:
    """Captured tensors that hold every bare index, as ops.check_reads wants."""
    larger = []
    for tensor in bound.captures:
        whole = torch.zeros([16] * tensor.dim(), dtype=tensor.dtype)
        whole[tuple(slice(size) for size in tensor.shape)] = tensor
        larger.append(whole)
    return Bindings(tuple(larger), bound.ints, bound.floats)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data())
def test_random_masks(data: st.DataObject) -> None:
    grid, mask = data.draw(grids()), data.draw(expressions(DType.BOOL))
    bound = on_device(fitting(bindings(data.draw(st.integers(0, 9)))))
    grid = Grid(grid.B, grid.H, grid.Sq, grid.Skv, grid.tile, DEVICE)
    kinds = map_launch.classify(mask, bound, grid)
    assert torch.equal(kinds.cpu(), brute_force(emitted_value(mask, bound, grid), grid))


@pytest.mark.parametrize("tile", [(1, 1), (1, 16), (100, 100), (256, 256), (256, 16)], ids=str)
@pytest.mark.parametrize("Sq, Skv", [(300, 512), (3, 20), (512, 7)])
def test_any_tile_and_length(tile: tuple[int, int], Sq: int, Skv: int) -> None:
    """A mask that bounds decide but for few tiles, and one that is read pair by pair."""
    if tile[0] == 1:
        Sq, Skv = min(Sq, 9), min(Skv, 40)
    grid = Grid(1, 1, Sq, Skv, tile, DEVICE)
    visible = torch.rand(Sq, Skv, generator=torch.Generator().manual_seed(0)) < 0.999
    visible[:, : Skv // 2] &= torch.arange(Sq)[:, None] < Sq // 2
    opaque = Expr.of(Op.LOAD, DType.BOOL, (Q, KV), 0)
    for mask in (CAUSAL, opaque, apply(Op.AND, CAUSAL, opaque)):
        bound = Bindings((visible.to(DEVICE),))
        assert torch.equal(map_launch.classify(mask, bound, grid), tile_kinds(mask, bound, grid))


@pytest.mark.parametrize("num_programs", [1, 100])
def test_programs_share_what_bounds_leave_open(num_programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_launch, "MAP_PROGRAMS", num_programs)
    ids = torch.randint(0, 3, (2, 90), generator=torch.Generator().manual_seed(1)).sort().values.int().to(DEVICE)
    reads = [Expr.of(Op.LOAD, DType.INT32, (B_IDX, i), 0) for i in (Q, KV)]
    mask, bound = apply(Op.OR, apply(Op.EQ, *reads), apply(Op.LT, Q, apply(Op.ADD, KV, H_IDX))), Bindings((ids,))
    grid = Grid(2, 3, 77, 90, (16, 8), DEVICE)
    assert torch.equal(map_launch.classify(mask, bound, grid), tile_kinds(mask, bound, grid))


@pytest.mark.parametrize("sizes", [(2, 2, 0, 5), (2, 2, 5, 0), (0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 0)])
def test_sizes_of_zero(sizes: tuple[int, int, int, int]) -> None:
    mask = apply(Op.LE, apply(Op.ADD, B_IDX, KV), apply(Op.ADD, H_IDX, Q))
    kinds = build(mask, Bindings(), *sizes, DEVICE, (4, 4), map_launch.classify)
    assert kinds.shape == Grid(*sizes, (4, 4), DEVICE).shape and kinds.dtype is torch.int8


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    ids = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    reads = [Expr.of(Op.LOAD, DType.INT32, (i,), 0) for i in (Q, KV)]
    mask, grid = apply(Op.AND, CAUSAL, apply(Op.EQ, *reads)), Grid(1, 1, 60, 64, (8, 16), DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kinds = map_launch.classify(mask, Bindings((ids,)), grid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(kinds, tile_kinds(mask, Bindings((ids,)), grid))


def test_a_mask_without_indices() -> None:
    for mask, kind in ((TRUE, FULL), (FALSE, EMPTY), (apply(Op.LT, H_IDX, const(1, DType.INT32)), FULL)):
        kinds = build(mask, Bindings(), 1, 1, 50, 70, DEVICE, (16, 16), map_launch.classify)
        assert kinds.shape == (1, 1, 4, 5) and bool((kinds == kind).all())


def test_a_power_of_zero_keeps_the_shape_of_its_index() -> None:
    power = apply(Op.POW, cast(index("kv_idx"), DType.FLOAT), const(0.0, DType.FLOAT))
    mask = apply(Op.LT, const(9.0, DType.FLOAT), apply(Op.ADD, power, cast(index("q_idx"), DType.FLOAT)))
    kinds = map_launch.classify(mask, Bindings(), Grid(1, 1, 50, 70, (1, 1), DEVICE))
    assert torch.equal(kinds[0, 0].cpu() == FULL, torch.arange(50)[:, None].expand(50, 70) > 8)
