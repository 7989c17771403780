"""From a mask to its block map: intervals, then a few points of each undecided tile, then all of its elements."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from anymask.blocks.block_map import PARTIAL, BlockMap
from anymask.expr.bindings import Bindings
from anymask.expr.evaluate import evaluate
from anymask.expr.interval import Grid, Tiles, tile_bounds
from anymask.expr.ir import Expr, to_text

UNDECIDED = 3

# exact(kinds, mask, bindings, Sq, Skv, tile): overwrite each UNDECIDED entry of kinds by EMPTY, PARTIAL or FULL.
Exact = Callable[[Tensor, Expr, Bindings, int, int, tuple[int, int]], None]


def build(
    mask: Expr,
    bindings: Bindings,
    B: int,
    H: int,
    Sq: int,
    Skv: int,
    device: torch.device,
    tile: tuple[int, int] = (128, 128),
    exact: Exact | None = None,
) -> BlockMap:
    """The block map of a mask, equal to brute force over all pairs.

    mask: BOOL.  The map has a batch (head) dimension of 1 if the mask does not depend on b (h). Any size may be 0.
    exact: decides what intervals and corners leave open, without host synchronisation; without it torch does so, and
    only those tiles are evaluated element by element. No memory of Sq x Skv is used in either case.
    """
    depends_on = mask.indices()
    grid = Grid(B if "b" in depends_on else 1, H if "h" in depends_on else 1, Sq, Skv, tile, device)
    kinds = tile_kinds(mask, bindings, grid, exact)
    return BlockMap(kinds, Sq, Skv, tile, to_text(mask), bindings)


def tile_kinds(mask: Expr, bindings: Bindings, grid: Grid, exact: Exact | None = None) -> Tensor:
    """EMPTY, PARTIAL or FULL for each tile of the grid: int8 [B, H, nQ, nKV]."""
    kinds = interval_kinds(mask, bindings, grid)
    if exact is None:
        _decide(kinds, mask, bindings, grid)
        return kinds
    corners = _seen_kinds(mask, bindings, grid, grid.tiles(), 2)
    kinds = torch.where(kinds == UNDECIDED, corners, kinds)
    exact(kinds, mask, bindings, grid.Sq, grid.Skv, grid.tile)
    return kinds


def interval_kinds(mask: Expr, bindings: Bindings, grid: Grid) -> Tensor:
    """EMPTY, FULL or UNDECIDED for each tile, from the bounds of the mask: int8 [B, H, nQ, nKV]."""
    lo, hi = tile_bounds(mask, bindings, grid)
    return (hi.to(torch.int8) * UNDECIDED - lo.to(torch.int8)).expand(grid.shape).contiguous()


_CHUNK = 1 << 20  # elements evaluated at a time


def _decide(kinds: Tensor, mask: Expr, bindings: Bindings, grid: Grid) -> None:
    """Overwrite UNDECIDED entries: look at ever more points of the tiles that are left, in the end at all of them."""
    for points in (2, 8, max(grid.tile)):
        tiles = Tiles(*(kinds == UNDECIDED).nonzero(as_tuple=True))
        if tiles.b.numel() == 0:
            return
        for chunk in zip(*(index.split(max(_CHUNK // points**2, 1)) for index in tiles), strict=True):
            kinds[chunk] = _seen_kinds(mask, bindings, grid, Tiles(*chunk), points)


def _seen_kinds(mask: Expr, bindings: Bindings, grid: Grid, tiles: Tiles, points: int) -> Tensor:
    """Kinds of tiles from points x points of their elements, or all: int8, UNDECIDED where the points do not tell."""
    num_q, num_kv = (min(points, size) for size in grid.tile)
    visible = evaluate(mask, bindings, **grid.points(tiles, num_q, num_kv))
    shape = torch.broadcast_tensors(*tiles)[
        0
    ].shape  # not torch.broadcast_shapes, which imports sympy: 2 s at first call
    visible = visible.expand(*shape, num_q, num_kv)
    some, every = visible.any(-1).any(-1), visible.all(-1).all(-1)
    if (num_q, num_kv) == grid.tile:
        return some.to(torch.int8) + every.to(torch.int8)
    return torch.where(some & ~every, PARTIAL, UNDECIDED).to(torch.int8)
