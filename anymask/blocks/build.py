"""From a mask to the kinds of its tiles: by intervals, then by a closer look at undecided tiles, see STAGES."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from anymask.blocks.block_map import EMPTY, FULL, PARTIAL
from anymask.expr.bindings import Bindings
from anymask.expr.evaluate import evaluate
from anymask.expr.interval import Grid, Tiles, bounds_over, tile_bounds
from anymask.expr.ir import Expr

UNDECIDED = 3
STAGES = ("intervals", "2 x 2 points", "8 x 8 points", "4 x 4 boxes", "all points")

# The kinds of a grid's tiles: EMPTY, PARTIAL or FULL, int8 [B, H, nQ, nKV], contiguous.
Classify = Callable[[Expr, Bindings, Grid], Tensor]


def build(
    mask: Expr,
    bindings: Bindings,
    B: int,
    H: int,
    Sq: int,
    Skv: int,
    device: torch.device,
    tile: tuple[int, int] = (128, 128),
    classify: Classify | None = None,
) -> Tensor:
    """Kinds of a mask's tiles, equal to brute force over all pairs: int8 [B|1, H|1, nQ, nKV].

    mask: BOOL.  There is a batch (head) dimension of 1 if the mask does not depend on b (h). Any size may be 0.
    classify: makes the kinds; tile_kinds, in torch, if None. No memory of Sq x Skv is used in either case.
    """
    depends_on = mask.indices()
    grid = Grid(B if "b" in depends_on else 1, H if "h" in depends_on else 1, Sq, Skv, tile, device)
    return (classify or tile_kinds)(mask, bindings, grid)


def tile_kinds(mask: Expr, bindings: Bindings, grid: Grid) -> Tensor:
    """EMPTY, PARTIAL or FULL for each tile of the grid: int8 [B, H, nQ, nKV]."""
    *_, (_, kinds) = _stages(mask, bindings, grid)
    return kinds


def stages(mask: Expr, bindings: Bindings, grid: Grid) -> dict[str, int]:
    """How many tiles each of the STAGES of tile_kinds decides; "mixed": how many that took all points are PARTIAL."""
    counts = dict.fromkeys((*STAGES, "mixed"), 0)
    left = torch.ones(grid.shape, dtype=torch.bool, device=grid.device)
    for stage, kinds in _stages(mask, bindings, grid):
        decided = left & (kinds != UNDECIDED)
        counts[stage] = int(decided.sum())
        if stage == STAGES[-1]:
            counts["mixed"] = int((decided & (kinds == PARTIAL)).sum())
        left &= ~decided
    return counts


def interval_kinds(mask: Expr, bindings: Bindings, grid: Grid) -> Tensor:
    """EMPTY, FULL or UNDECIDED for each tile, from the bounds of the mask: int8 [B, H, nQ, nKV]."""
    lo, hi = tile_bounds(mask, bindings, grid)
    return (hi.to(torch.int8) * UNDECIDED - lo.to(torch.int8)).expand(grid.shape).contiguous()


_CHUNK = 1 << 20  # elements, or boxes, evaluated at a time
_BOX = 4  # positions of a box along each axis


def _stages(mask: Expr, bindings: Bindings, grid: Grid) -> Iterator[tuple[str, Tensor]]:
    """The kinds after each stage, each in place of the last: by bounds, then by a closer look at undecided tiles."""
    kinds = interval_kinds(mask, bindings, grid)
    yield STAGES[0], kinds
    pairs = grid.tile[0] * grid.tile[1]
    for stage, look, size in (
        (STAGES[1], functools.partial(_seen_kinds, points=2), 4),
        (STAGES[2], functools.partial(_seen_kinds, points=8), 64),
        (STAGES[3], _box_kinds, pairs // 16 + 1),
        (STAGES[4], functools.partial(_seen_kinds, points=max(grid.tile)), pairs),
    ):
        tiles = Tiles(*(kinds == UNDECIDED).nonzero(as_tuple=True))
        if tiles.b.numel() == 0:
            return
        for chunk in zip(*(index.split(max(_CHUNK // size, 1)) for index in tiles), strict=True):
            kinds[chunk] = look(mask, bindings, grid, Tiles(*chunk))
        yield stage, kinds


def _box_kinds(mask: Expr, bindings: Bindings, grid: Grid, tiles: Tiles) -> Tensor:
    """Kinds of tiles [N] from the bounds of their boxes: int8, UNDECIDED where these do not tell.

    Sharper than the tile's own bounds where a row of an image, or a block, ends inside the tile.
    """
    lo, hi = (x.flatten(-2) for x in bounds_over(mask, bindings, grid.boxes(tiles, _BOX), grid.device))
    some, every = lo.any(-1), lo.all(-1)
    hidden = ~hi
    kinds = torch.where(every, FULL, torch.where(hidden.all(-1), EMPTY, UNDECIDED))
    kinds = torch.where(some & hidden.any(-1), PARTIAL, kinds)
    return kinds.to(torch.int8).reshape(-1).expand(tiles.b.shape)


def _seen_kinds(mask: Expr, bindings: Bindings, grid: Grid, tiles: Tiles, points: int) -> Tensor:
    """Kinds of tiles from points x points of their elements, or all: int8, UNDECIDED where the points do not tell."""
    num_q, num_kv = (min(points, size) for size in grid.tile)
    visible = evaluate(mask, bindings, **grid.points(tiles, num_q, num_kv))
    visible = visible.expand(*tiles.b.shape, num_q, num_kv)
    some, every = visible.any(-1).any(-1), visible.all(-1).all(-1)
    if (num_q, num_kv) == grid.tile:
        return some.to(torch.int8) + every.to(torch.int8)
    return torch.where(some & ~every, PARTIAL, UNDECIDED).to(torch.int8)
