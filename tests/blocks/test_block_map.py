"""Block maps equal brute force, in both directions, for random masks and for the ones that people use."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from anymask.blocks.block_map import EMPTY, FULL, PARTIAL, BlockMap
from anymask.blocks.build import STAGES, UNDECIDED, build, interval_kinds, stages, tile_kinds
from anymask.expr.bindings import Bindings
from anymask.expr.interval import Grid
from anymask.expr.ir import FALSE, TRUE, DType, Expr, Op, apply, const, index, to_text
from tests.expr.test_interval import bindings, dense, expressions, grids

CPU = torch.device("cpu")
NAMES = (*STAGES, "mixed")
B_IDX, H_IDX, Q, KV = (index(name) for name in ("b", "h", "q_idx", "kv_idx"))
CAUSAL = apply(Op.LE, KV, Q)


def number(value: int) -> Expr:
    return const(value, DType.INT32)


def load(*args: Expr) -> Expr:
    return Expr.of(Op.LOAD, DType.INT32, args, 0)


def both(*masks: Expr) -> Expr:
    return masks[0] if len(masks) == 1 else apply(Op.AND, masks[0], both(*masks[1:]))


def brute_force(mask: Expr, bound: Bindings, grid: Grid) -> torch.Tensor:
    """Kinds from every pair, [B, H, nQ, nKV] int8."""
    visible = dense(mask, bound, grid)
    kinds = torch.empty(grid.shape, dtype=torch.int8)
    for i, rows in enumerate(visible.split(grid.tile[0], dim=2)):
        for j, pairs in enumerate(rows.split(grid.tile[1], dim=3)):
            pairs = pairs.flatten(2)
            kinds[:, :, i, j] = torch.where(pairs.all(-1), FULL, torch.where(pairs.any(-1), PARTIAL, EMPTY))
    return kinds


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(data=st.data())
def test_random_masks_equal_brute_force(data: st.DataObject) -> None:
    grid = data.draw(grids())
    mask = data.draw(expressions(DType.BOOL))
    bound = bindings(data.draw(st.integers(0, 9)))
    expected = brute_force(mask, bound, grid)
    claimed = interval_kinds(mask, bound, grid)
    assert torch.equal(torch.where(claimed == UNDECIDED, expected, claimed), expected)

    kinds = build(mask, bound, grid.B, grid.H, grid.Sq, grid.Skv, CPU, grid.tile)
    assert kinds.dtype is torch.int8 and kinds.is_contiguous()
    assert torch.equal(kinds.expand(grid.shape), expected)


WINDOW = apply(Op.LT, apply(Op.SUB, Q, KV), number(20))
CHUNKED = apply(Op.EQ, apply(Op.FLOORDIV, Q, number(24)), apply(Op.FLOORDIV, KV, number(24)))
# training layout of block diffusion: noised copy, then clean copy, 32 positions each, in blocks of 4
Q_NOISED, KV_NOISED = apply(Op.LT, Q, number(32)), apply(Op.LT, KV, number(32))
Q_STEP, KV_STEP = (apply(Op.FLOORDIV, apply(Op.MOD, x, number(32)), number(4)) for x in (Q, KV))
BLOCK_DIFFUSION = apply(
    Op.OR,
    both(apply(Op.EQ, Q_STEP, KV_STEP), apply(Op.EQ, Q_NOISED, KV_NOISED)),
    both(
        apply(Op.NOT, KV_NOISED),
        apply(
            Op.OR,
            both(Q_NOISED, apply(Op.LT, KV_STEP, Q_STEP)),
            both(apply(Op.NOT, Q_NOISED), apply(Op.LE, KV_STEP, Q_STEP)),
        ),
    ),
)
SAME_DOCUMENT = apply(Op.EQ, load(B_IDX, Q), load(B_IDX, KV))
COMMON = {
    "full": TRUE,
    "empty": FALSE,
    "causal": CAUSAL,
    "causal, bottom right": apply(Op.LE, KV, apply(Op.ADD, Q, number(-6))),
    "window": both(CAUSAL, WINDOW),
    "documents": both(CAUSAL, SAME_DOCUMENT),
    "not documents": apply(Op.NOT, both(CAUSAL, SAME_DOCUMENT)),
    "prefix": apply(Op.OR, CAUSAL, apply(Op.LT, KV, load(B_IDX, number(0)))),
    "chunked": both(CAUSAL, CHUNKED),
    "block diffusion": BLOCK_DIFFUSION,
}


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("tile", [(8, 8), (16, 4), (4, 16)])
def test_common_masks_need_no_exact_pass(name: str, tile: tuple[int, int]) -> None:
    """Intervals leave undecided only what is truly partial, and two corners prove that."""
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 5, 5]).repeat_interleave(8)
    bound = Bindings((torch.stack((ids + 9, ids.div(2, rounding_mode="floor"))).int(),))
    grid = Grid(2, 1, 62, 64, tile, CPU)
    expected = brute_force(COMMON[name], bound, grid)
    claimed = interval_kinds(COMMON[name], bound, grid)
    assert torch.equal(claimed, torch.where(expected == PARTIAL, UNDECIDED, expected))
    assert torch.equal(tile_kinds(COMMON[name], bound, grid), expected)


def test_dimensions_follow_the_mask() -> None:
    lengths = torch.tensor([[3, 9], [0, 16]], dtype=torch.int32)
    shapes = {
        CAUSAL: (1, 1, 2, 2),
        apply(Op.LT, KV, load(B_IDX, number(1))): (2, 1, 2, 2),
        apply(Op.LT, KV, load(number(0), H_IDX)): (1, 2, 2, 2),
        apply(Op.LT, KV, load(B_IDX, H_IDX)): (2, 2, 2, 2),
    }
    for mask, shape in shapes.items():
        assert build(mask, Bindings((lengths,)), 2, 2, 16, 16, CPU, (8, 8)).shape == shape


@pytest.mark.parametrize("sizes", [(2, 2, 0, 5), (2, 2, 5, 0), (0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 0)])
def test_sizes_of_zero(sizes: tuple[int, int, int, int]) -> None:
    mask = apply(Op.LE, apply(Op.ADD, B_IDX, KV), apply(Op.ADD, H_IDX, Q))
    block_map = BlockMap(build(mask, Bindings(), *sizes, CPU, (4, 4)), *sizes[2:], (4, 4))
    assert block_map.shape == Grid(*sizes, (4, 4), CPU).shape
    assert block_map.density() == 0
    assert "0.0%" in str(block_map)


def test_kinds_may_come_from_elsewhere() -> None:
    kinds = torch.ones(2, 1, 8, 4, dtype=torch.int8)
    calls = []

    def classify(mask: Expr, bound: Bindings, grid: Grid) -> torch.Tensor:
        calls.append((mask, bound, grid))
        return kinds

    mask, bound = both(CAUSAL, apply(Op.EQ, load(B_IDX, Q), load(B_IDX, KV))), Bindings()
    assert build(mask, bound, 2, 3, 60, 64, CPU, (8, 16), classify) is kinds
    assert calls == [(mask, bound, Grid(2, 1, 60, 64, (8, 16), CPU))]


def test_stages() -> None:
    """How many tiles each stage decides: causal ones by bounds and corners, a lone pair only by all points."""
    grid = Grid(1, 2, 64, 64, (16, 16), CPU)
    assert stages(CAUSAL, Bindings(), grid) == dict(zip(NAMES, (24, 8, 0, 0, 0, 0), strict=True))
    assert stages(TRUE, Bindings(), grid) == dict(zip(NAMES, (32, 0, 0, 0, 0, 0), strict=True))
    ids = torch.arange(64, dtype=torch.int32)
    ids[13] = 40  # widens the range of its tile to others: one of those is empty, one has a visible pair off its points
    mask, bound, grid = apply(Op.EQ, load(Q), load(KV)), Bindings((ids,)), Grid(1, 1, 64, 64, (16, 16), CPU)
    counts = stages(mask, bound, grid)
    assert counts == dict(zip(NAMES, (8, 4, 0, 0, 4, 2), strict=True))
    assert sum(counts[stage] for stage in STAGES) == 16
    assert stages(mask, bound, Grid(1, 1, 0, 64, (16, 16), CPU)) == dict.fromkeys(NAMES, 0)


def test_memory_does_not_grow_with_the_square() -> None:
    """Every tile is undecided and most need all of their elements: no tensor comes near Sq x Skv."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
            return result

    S = 4096
    ids = torch.randint(0, 2**30, (S,), generator=torch.Generator().manual_seed(0)).int()
    ids[::64] = torch.tensor([0, 2**30]).int().repeat(S // 128)
    with Largest() as largest:
        build(apply(Op.EQ, load(Q), load(KV)), Bindings((ids,)), 1, 1, S, S, CPU, (128, 128))
    assert largest.numel <= S * S // 8


def test_to_another_device() -> None:
    bound = Bindings((torch.zeros(16, dtype=torch.int32),), ints=(3,))
    mask = both(CAUSAL, apply(Op.EQ, load(Q), load(KV)))
    block_map = BlockMap(build(mask, bound, 1, 1, 16, 16, CPU, (4, 8)), 16, 16, (4, 8), to_text(mask), bound)
    moved = block_map.to("meta")
    assert {x.device.type for x in (moved.kinds, *moved.bindings.captures)} == {"meta"}
    assert (moved.Sq, moved.Skv, moved.tile) == (16, 16, (4, 8))
    assert moved.bindings.ints == (3,) and moved.text == block_map.text


def test_pictures() -> None:
    small = BlockMap(build(CAUSAL, Bindings(), 1, 1, 48, 64, CPU, (16, 16)), 48, 64, (16, 16))
    assert str(small).splitlines() == [
        "48 x 64, tiles of 16 x 16, 50.0% visited",
        "▒···",
        "█▒··",
        "██▒·",
        "█ full  ▒ partial  · empty",
    ]
    assert repr(small) == "BlockMap(1 x 1 x 3 x 4 tiles of 16 x 16, cpu)"
    kinds = build(apply(Op.LE, KV, apply(Op.ADD, Q, B_IDX)), Bindings(), 2, 1, 8192, 8192, CPU, (64, 64))
    large = BlockMap(kinds, 8192, 8192, (64, 64))
    head, *lines, legend = str(large).splitlines()
    assert "batch 0 of 2" in head and "4 x 2 tiles" in legend
    assert len(lines) == 32 and {len(line) for line in lines} == {64}
    assert lines[0] == "▒▒" + "·" * 62 and lines[-1] == "█" * 62 + "▒▒"
