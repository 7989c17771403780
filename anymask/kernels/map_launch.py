"""Starts the kernels that make maps and walks: classify, walk, order."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from anymask.blocks import cache
from anymask.blocks.block_map import BlockMap
from anymask.blocks.walk import WORD, Walk
from anymask.expr.bindings import Bindings
from anymask.expr.emit import emit
from anymask.expr.emit_bounds import emit_bounds
from anymask.expr.interval import Grid
from anymask.expr.ir import Expr
from anymask.kernels.jit import jitted
from anymask.kernels.plan import KERNELS, Plan, Shape, is_walked, walk_shapes
from anymask.kernels.recipe import TENSOR, Layout, Recipe, bound, readable
from anymask.kernels.triton_map import classify_kernel
from anymask.kernels.triton_walk import order_kernel, walk_kernel

# Most tiles that one program bounds, of how many positions in all, and pairs that it evaluates at a time where it must;
# with fewer programs than MAP_PROGRAMS several share such tiles. (8,192 pairs at a time cost 20% more compile time.)
MAP_ROWS, MAP_COLUMNS, MAP_POSITIONS, MAP_PAIRS, MAP_PROGRAMS = 8, 32, 4096, 4096, 4096
# Rows and columns that one program packs at a time; rows that one program ranks, and that it compares at a time.
WALK_ROWS, WALK_COLUMNS, ORDER_ROWS, ORDER_OTHERS = 4, 256, 16, 256


def walks(blocks: BlockMap, plan: Plan, has_mask: bool = True) -> dict[str, tuple[Walk | None, tuple[int, int]]]:
    """By kernel its walk, made once for a map, and the walk's tile: the bigger of the map's and the kernel's.

    None for a kernel that does not walk (plan.is_walked).
    """
    shapes = dict(zip(KERNELS, walk_shapes(plan, blocks.tile), strict=True))
    walked = tuple([shape for kernel, shape in shapes.items() if is_walked(plan, kernel, has_mask)])
    what = ("walks", walked, blocks.tile, blocks.Skv)
    made = cache.find(what, blocks.device, (blocks.kinds,), lambda: make_walks(blocks, *walked), is_ours=True)
    by_shape = dict(zip(walked, made, strict=True))
    return {
        kernel: (by_shape[shape] if is_walked(plan, kernel, has_mask) else None, shape[0])
        for kernel, shape in shapes.items()
    }


def make_walks(blocks: BlockMap, *shapes: Shape) -> tuple[Walk, ...]:
    """Up to three walks of a map, one for each shape; equal shapes share one."""
    device = blocks.device
    layouts, recipes = _walk_recipes(blocks.kinds.shape, device, blocks.tile, blocks.Skv, shapes)
    walks = [
        Walk(
            torch.empty(*words, dtype=torch.int64, device=device),
            torch.empty(*rows, dtype=torch.int32, device=device),
        )
        for words, rows in layouts.values()
    ]
    if recipes:
        walk_recipe, order_recipe = recipes
        unused = 3 - len(walks)
        of_order = [rows for _, rows in (*walks, *walks[:1] * unused)]
        if order_recipe.is_new:  # beside the walk
            order_recipe.compile_ahead(*of_order)
        walk_recipe(blocks.kinds, *itertools.chain(*walks, *walks[:1] * unused))
        order_recipe(*of_order)
    made = dict(zip(layouts, walks, strict=True))
    return tuple([made[shape] for shape in shapes])


@functools.lru_cache(maxsize=1024)
def _walk_recipes(
    kinds: tuple[int, ...], device: torch.device, tile: tuple[int, int], Skv: int, shapes: tuple[Shape, ...]
) -> tuple[dict[Shape, tuple[Any, Any]], tuple[Recipe, Recipe] | None]:
    """By shape the sizes of a walk's tensors, and the two recipes, None where there is nothing to do: for the kinds and
    the tensors of three walks; for the rows of three. What is missing of three walks has no program.
    """
    Bm, Hm, num_q, num_kv = kinds
    layouts: dict[Shape, tuple[Any, Any]] = {}
    numbers: list[tuple[int, int, int]] = []
    lengths: list[int] = []
    for shape in dict.fromkeys(shapes):
        (tile_q, tile_kv), is_kv_row = shape
        q_tiles, kv_tiles = tile_q // tile[0], tile_kv // tile[1]
        num_rows, num_columns = _ceil(num_q, q_tiles), _ceil(num_kv, kv_tiles)
        if is_kv_row:
            num_rows, num_columns = num_columns, num_rows
        layouts[shape] = (Bm, Hm, num_rows, 2, _ceil(num_columns, WORD)), (Bm, Hm, num_rows, 3)
        numbers.append((q_tiles, kv_tiles, int(is_kv_row)))
        lengths.append(num_rows)
    if 0 in kinds or not shapes:
        return layouts, None
    unused = 3 - len(lengths)
    walkers, rankers = (Bm * Hm * sum(_ceil(length, size) for length in lengths) for size in (WALK_ROWS, ORDER_ROWS))
    walk_recipe = Recipe(
        device,
        walk_kernel,
        walkers,
        TENSOR,
        Bm * Hm,
        num_q,
        num_kv,
        tile[1],
        Skv,
        *[argument for of_walk in (*numbers, *numbers[:1] * unused) for argument in (TENSOR, TENSOR, *of_walk)],
        ROWS=WALK_ROWS,
        COLUMNS=WALK_COLUMNS,
        num_warps=4,
    )
    order_recipe = Recipe(
        device,
        order_kernel,
        rankers,
        *[TENSOR] * 3,
        Bm * Hm,
        *lengths,
        *[0] * unused,
        ROWS=ORDER_ROWS,
        OTHERS=ORDER_OTHERS,
        num_warps=4,
    )
    return layouts, (walk_recipe, order_recipe)


def classify(mask: Expr, bindings: Bindings, grid: Grid) -> Tensor:
    """EMPTY, PARTIAL or FULL for each tile of the grid: int8 [B, H, nQ, nKV]. No host synchronisation.

    A captured tensor that is read at a bare index must hold all of it (ops.check_reads).
    """
    kinds = torch.empty(grid.shape, dtype=torch.int8, device=grid.device)
    if kinds.numel() > 0:
        captures = readable(bindings.captures)
        layouts = tuple(map(Layout.of, captures))
        _classify_recipe(mask, layouts, bindings.ints, bindings.floats, grid)(kinds, *captures)
    return kinds


@functools.lru_cache(maxsize=1024)
def _classify_recipe(
    mask: Expr, captures: tuple[Layout, ...], ints: tuple[int, ...], floats: tuple[float, ...], grid: Grid
) -> Recipe:
    """For the kinds and captured tensors."""
    B, H, num_q, num_kv = grid.shape
    tile_q, tile_kv = grid.tile
    padded_q, padded_kv = _power_of_two(tile_q), _power_of_two(tile_kv)
    rows = min(MAP_ROWS, max(1, MAP_POSITIONS // 2 // padded_q))
    columns = min(MAP_COLUMNS, max(1, MAP_POSITIONS // padded_kv))
    num_blocks = B * H * _ceil(num_q, rows) * _ceil(num_kv, columns)
    row_shares = max(1, min(rows, MAP_PROGRAMS // num_blocks))
    column_shares = max(1, min(columns, MAP_PROGRAMS // (num_blocks * row_shares)))
    bindings, wide = bound(captures, ints, floats)
    bounds, function = _map_functions(mask, wide)
    block_kv = min(padded_kv, 128)
    return Recipe(
        grid.device,
        classify_kernel,
        num_blocks * row_shares * column_shares,
        TENSOR,
        H,
        num_q,
        num_kv,
        grid.Sq,
        grid.Skv,
        row_shares,
        column_shares,
        bindings,
        BOUNDS=bounds,
        MASK=function,
        TILE_Q=tile_q,
        TILE_KV=tile_kv,
        PADDED_Q=padded_q,
        PADDED_KV=padded_kv,
        BLOCK_Q=min(padded_q, MAP_PAIRS // block_kv),
        BLOCK_KV=block_kv,
        ROWS=rows,
        COLUMNS=columns,
        IS_EVEN_Q=tile_q == padded_q and grid.Sq % tile_q == 0,
        IS_EVEN_KV=tile_kv == padded_kv and grid.Skv % tile_kv == 0,
        num_warps=4,
        enable_fp_fusion=False,  # the mask is what attention computes: see ROUNDED_TEMPLATES of expr/emit.py
    )


@functools.lru_cache(maxsize=4096)
def _map_functions(mask: Expr, wide: frozenset[int]) -> tuple[Any, Any]:
    """The bounds of the mask over map tiles, and the mask itself, both at indices that exist."""
    is_inside: frozenset[str] = frozenset()  # no index overhangs
    bounds = emit_bounds(mask, "bounds", wide, overhang=is_inside)
    function = emit(mask, "mask", wide, overhang=is_inside)
    return jitted(bounds, "bounds"), jitted(function, "mask")


def _ceil(x: int, y: int) -> int:
    return -(-x // y)


def _power_of_two(x: int) -> int:
    """The smallest power of two from x on."""
    return 1 << (x - 1).bit_length()
