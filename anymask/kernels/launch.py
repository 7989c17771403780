"""The only file that starts kernels: map, walk, forward, backward. It obeys the plan and owns what it writes.

(Hopper kernels through hopper_launch.py, which imports Gluon.)
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from anymask.blocks import cache
from anymask.blocks.block_map import BlockMap
from anymask.blocks.walk import WORD, Walk
from anymask.expr.bindings import Bindings
from anymask.expr.emit import emit, emit_hide, odd
from anymask.expr.emit_bounds import emit_bounds
from anymask.expr.grad import derivative
from anymask.expr.interval import Grid
from anymask.expr.ir import Expr
from anymask.expr.mods import Mods
from anymask.kernels.configs import Config, HopperConfig
from anymask.kernels.jit import jitted
from anymask.kernels.plan import KERNELS, Plan, Shape, padded, walk_shapes
from anymask.kernels.triton_bwd import dkdv_kernel, dq_kernel
from anymask.kernels.triton_fwd import forward_kernel
from anymask.kernels.triton_map import classify_kernel
from anymask.kernels.triton_walk import order_kernel, walk_kernel
from anymask.problem import dense_like

# Most tiles that one program bounds, of how many positions in all, and pairs that it evaluates at a time where it must;
# with fewer programs than MAP_PROGRAMS several share such tiles. (8,192 pairs at a time cost 20% more compile time.)
MAP_ROWS, MAP_COLUMNS, MAP_POSITIONS, MAP_PAIRS, MAP_PROGRAMS = 8, 32, 4096, 4096, 4096
# Rows and columns that one program packs at a time; rows that one program ranks, and that it compares at a time.
WALK_ROWS, WALK_COLUMNS, ORDER_ROWS, ORDER_OTHERS = 4, 256, 16, 256


def forward(
    q: Tensor, k: Tensor, v: Tensor, mods: Mods, bindings: Bindings, blocks: BlockMap, plan: Plan, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Sq, Dv] laid out as q (problem.dense_like), lse [B, Hq, Sq] float32, natural log.

    A row that sees no key: out = 0, lse = -inf.
    """
    B, Hq, Sq, D = q.shape
    Hkv, Skv, Dv = v.shape[1:]
    out = dense_like(q, Dv)
    lse = torch.empty(B, Hq, Sq, dtype=torch.float32, device=q.device)
    if out.shape.numel() == 0 or Skv == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    arguments = _bind(bindings)
    mask, score, _ = _functions(mods, arguments.wide, plan.is_ptx, has_gradient=False)
    if score is None and scale <= 0:  # the identity: the kernel's short cut needs scale > 0
        score = _function(mods.score, "score", arguments.wide, plan.is_ptx)
    if isinstance(plan.forward, HopperConfig):
        _hopper_forward(q, k, v, out, lse, mods, arguments, mask, score, blocks, plan, scale)
        return out, lse
    config = _config(plan.forward)
    walk, (tile_q, tile_kv) = walks(blocks, plan, mods.has_mask)["forward"]
    num_rows = _ceil(Sq, tile_q)
    with _device_of(q):
        forward_kernel[(B * Hq * num_rows * tile_q // config.BLOCK_Q,)](
            q,
            k,
            v,
            out,
            lse,
            q.stride(),
            k.stride(),
            v.stride(),
            out.stride(),
            *_walk_arguments(walk, num_rows, B * Hq, Hq // Hkv, Skv * (D + Dv) * q.itemsize, plan),
            Hq,
            Sq,
            Skv,
            scale,
            arguments.values,
            MASK=mask,
            SCORE=score,
            G=Hq // Hkv,
            BLOCK_Q=config.BLOCK_Q,
            BLOCK_KV=config.BLOCK_KV,
            TILE_Q=tile_q,
            TILE_KV=tile_kv,
            IS_EVEN_KV=Skv % tile_kv == 0,
            PRECISION=plan.precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **_head_dims(D, Dv),
            **_addressing(q.stride(), k.stride(), v.stride(), out.stride()),
        )
    return out, lse


def _hopper_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mods: Mods,
    arguments: _Arguments,
    mask: Any,
    score: Any,
    blocks: BlockMap,
    plan: Plan,
    scale: float,
) -> None:
    """Write out and lse."""
    from anymask.kernels.hopper_launch import launch_forward

    B, Hq, Sq, D = q.shape
    Hkv, Skv, Dv = v.shape[1:]
    config = plan.forward
    assert isinstance(config, HopperConfig)
    G, head_bytes = Hq // Hkv, Skv * (D + Dv) * q.itemsize
    walk, tile = walks(blocks, plan, mods.has_mask)["forward"]
    if walk is None:
        tile = (config.BLOCK_Q, config.BLOCK_KV)
    walk_arguments = _walk_arguments(walk, _ceil(Sq, tile[0]), B * Hq, G, head_bytes, plan)
    with _device_of(q):
        launch_forward(
            *(q, k, v, out, lse, walk_arguments, tile, scale, arguments.values),
            mask if mods.has_mask else None,
            score,
            config,
        )


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mods: Mods,
    bindings: Bindings,
    blocks: BlockMap,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, each in the shape and dtype of q, k, v, laid out by problem.dense_like.

    dlse: the gradient of lse, or None for 0.
    dq first: it leaves lse and delta of each row to dk and dv. Deterministic: each gradient tile has one program that
    adds in the order of the map.
    """
    B, Hq, Sq, D = q.shape
    Hkv, Skv, Dv = v.shape[1:]
    dq, dk, dv = dense_like(q, D), dense_like(k, D), dense_like(v, Dv)
    if B == 0 or Hq == 0 or Sq == 0 or Skv == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    arguments = _bind(bindings)
    mask, score, score_gradient = _functions(mods, arguments.wide, plan.is_ptx, has_gradient=True)
    G = Hq // Hkv
    dkdv, dq_config = _config(plan.dkdv), _config(plan.dq)
    of_kernel = walks(blocks, plan, mods.has_mask)
    (columns, columns_tile), (lines, lines_tile) = of_kernel["dkdv"], of_kernel["dq"]
    num_columns, num_lines = _ceil(Skv, columns_tile[1]), _ceil(Sq, lines_tile[0])
    padded_Sq = _ceil(Sq, columns_tile[0]) * columns_tile[0]
    rows = torch.empty(B, Hq, padded_Sq, 2, dtype=torch.float32, device=q.device)
    shared = dict(
        MASK=mask,
        SCORE=score,
        SCORE_GRAD=score_gradient,
        G=G,
        PRECISION=plan.precision,
        **_head_dims(D, Dv),
        **_addressing(*(x.stride() for x in (q, k, v, out, dout, dq, dk, dv))),
    )
    with _device_of(q):
        dq_kernel[(B * Hq * num_lines * lines_tile[0] // dq_config.BLOCK_Q,)](
            q,
            k,
            v,
            out,
            dout,
            lse,
            None if dlse is None else dlse.contiguous(),
            dq,
            rows,
            q.stride(),
            k.stride(),
            v.stride(),
            out.stride(),
            dout.stride(),
            dq.stride(),
            *_walk_arguments(lines, num_lines, B * Hq, G, Skv * (D + Dv) * q.itemsize, plan),
            Hq,
            Sq,
            Skv,
            padded_Sq,
            scale,
            arguments.values,
            BLOCK_Q=dq_config.BLOCK_Q,
            BLOCK_KV=dq_config.BLOCK_KV,
            TILE_Q=lines_tile[0],
            TILE_KV=lines_tile[1],
            IS_EVEN_KV=Skv % lines_tile[1] == 0,
            num_warps=dq_config.num_warps,
            num_stages=dq_config.num_stages,
            **shared,
        )
        dkdv_kernel[(B * Hkv * num_columns * columns_tile[1] // dkdv.BLOCK_KV,)](
            q,
            k,
            v,
            dout,
            dk,
            dv,
            rows,
            q.stride(),
            k.stride(),
            v.stride(),
            dout.stride(),
            dk.stride(),
            dv.stride(),
            *_walk_arguments(columns, num_columns, B * Hkv, 1, Sq * G * (D + Dv) * q.itemsize, plan),
            Hkv,
            Sq,
            Skv,
            padded_Sq,
            scale,
            arguments.values,
            BLOCK_Q=dkdv.BLOCK_Q,
            BLOCK_KV=dkdv.BLOCK_KV,
            TILE_Q=columns_tile[0],
            TILE_KV=columns_tile[1],
            IS_EVEN_Q=Sq % columns_tile[0] == 0,
            num_warps=dkdv.num_warps,
            num_stages=dkdv.num_stages,
            **shared,
        )
    return dq, dk, dv


def walks(blocks: BlockMap, plan: Plan, has_mask: bool = True) -> dict[str, tuple[Walk | None, tuple[int, int]]]:
    """By kernel its walk, made once for a map, and the walk's tile: the bigger of the map's and the kernel's.

    Without a mask there is nothing to walk: None.
    """
    shapes = walk_shapes(plan, blocks.tile)
    if not has_mask:
        return {kernel: (None, tile) for kernel, (tile, _) in zip(KERNELS, shapes, strict=True)}
    what = ("walks", shapes, blocks.tile, blocks.Skv)
    made = cache.find(what, blocks.device, (blocks.kinds,), lambda: make_walks(blocks, *shapes), is_ours=True)
    return {kernel: (walk, tile) for kernel, walk, (tile, _) in zip(KERNELS, made, shapes, strict=True)}


def make_walks(blocks: BlockMap, *shapes: Shape) -> tuple[Walk, ...]:
    """Up to three walks of a map, one for each shape; equal shapes share one."""
    kinds = blocks.kinds
    Bm, Hm, num_q, num_kv = kinds.shape
    made: dict[Shape, Walk] = {}
    arguments: list[Any] = []
    all_rows: list[Tensor] = []
    lengths: list[int] = []
    for shape in shapes:
        if shape in made:
            continue
        (tile_q, tile_kv), is_kv_row = shape
        q_tiles, kv_tiles = tile_q // blocks.tile[0], tile_kv // blocks.tile[1]
        num_rows, num_columns = _ceil(num_q, q_tiles), _ceil(num_kv, kv_tiles)
        if is_kv_row:
            num_rows, num_columns = num_columns, num_rows
        words = torch.empty(Bm, Hm, num_rows, 2, _ceil(num_columns, WORD), dtype=torch.int64, device=kinds.device)
        rows = torch.empty(Bm, Hm, num_rows, 3, dtype=torch.int32, device=kinds.device)
        made[shape] = Walk(words, rows)
        arguments += [words, rows, q_tiles, kv_tiles, int(is_kv_row)]
        all_rows.append(rows)
        lengths.append(num_rows)
    if kinds.numel() > 0:
        unused = 3 - len(made)
        walkers, rankers = (
            Bm * Hm * sum(_ceil(length, size) for length in lengths) for size in (WALK_ROWS, ORDER_ROWS)
        )
        with _device_of(kinds):
            walk_kernel[(walkers,)](
                kinds,
                Bm * Hm,
                num_q,
                num_kv,
                blocks.tile[1],
                blocks.Skv,
                *arguments,
                *arguments[:5] * unused,  # of no program
                ROWS=WALK_ROWS,
                COLUMNS=WALK_COLUMNS,
                num_warps=4,
            )
            order_kernel[(rankers,)](
                *all_rows,
                *all_rows[:1] * unused,
                Bm * Hm,
                *lengths,
                *[0] * unused,
                ROWS=ORDER_ROWS,
                OTHERS=ORDER_OTHERS,
                num_warps=4,
            )
    return tuple(made[shape] for shape in shapes)


def classify(mask: Expr, bindings: Bindings, grid: Grid) -> Tensor:
    """EMPTY, PARTIAL or FULL for each tile of the grid: int8 [B, H, nQ, nKV]. No host synchronisation.

    A captured tensor that is read at a bare index must hold all of it (ops.check_reads).
    """
    kinds = torch.empty(grid.shape, dtype=torch.int8, device=grid.device)
    if kinds.numel() == 0:
        return kinds
    B, H, num_q, num_kv = grid.shape
    tile_q, tile_kv = grid.tile
    padded_q, padded_kv = _power_of_two(tile_q), _power_of_two(tile_kv)
    rows = min(MAP_ROWS, max(1, MAP_POSITIONS // 2 // padded_q))
    columns = min(MAP_COLUMNS, max(1, MAP_POSITIONS // padded_kv))
    num_blocks = B * H * _ceil(num_q, rows) * _ceil(num_kv, columns)
    row_shares = max(1, min(rows, MAP_PROGRAMS // num_blocks))
    column_shares = max(1, min(columns, MAP_PROGRAMS // (num_blocks * row_shares)))
    arguments = _bind(bindings)
    bounds, function = _map_functions(mask, arguments.wide)
    block_kv = min(padded_kv, 128)
    with _device_of(kinds):
        classify_kernel[(num_blocks * row_shares * column_shares,)](
            kinds,
            H,
            num_q,
            num_kv,
            grid.Sq,
            grid.Skv,
            row_shares,
            column_shares,
            arguments.values,
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
        )
    return kinds


class _Arguments:
    """Bindings as kernels take them. wide: slots whose offsets take 64 bits."""

    def __init__(self, bindings: Bindings) -> None:
        captures = []
        for tensor in bindings.captures:
            if tensor.dtype == torch.float64:
                tensor = tensor.float()  # read as float32 anyway, and in half the shared memory
            captures.append((tensor, tuple(odd(size) for size in tensor.shape), tensor.stride()))
        self.values = (tuple(captures), tuple(odd(n) for n in bindings.ints), bindings.floats)
        self.wide = bindings.wide_slots()


_bind = _Arguments


@functools.lru_cache(maxsize=4096)
def _function(expr: Expr, name: str, wide: frozenset[int], is_ptx: bool = False) -> Any:
    text = emit_hide(expr, name, wide, is_ptx) if name == "hide" else emit(expr, name, wide, is_ptx)
    return jitted(text, name)


@functools.lru_cache(maxsize=4096)
def _functions(mods: Mods, wide: frozenset[int], is_ptx: bool, has_gradient: bool) -> tuple[Any, Any, Any]:
    """The mask, the score function and its derivative, the last two None where the score is unchanged."""
    mask = _function(mods.mask, "hide", wide, is_ptx)
    if not mods.has_score:
        return mask, None, None
    score = _function(mods.score, "score", wide, is_ptx)
    if not has_gradient:
        return mask, score, None
    return mask, score, _function(derivative(mods.score), "score_gradient", wide, is_ptx)


@functools.lru_cache(maxsize=4096)
def _map_functions(mask: Expr, wide: frozenset[int]) -> tuple[Any, Any]:
    """The bounds of the mask over map tiles, and the mask itself, both at indices that exist."""
    bounds, function = emit_bounds(mask, "bounds", wide, is_inside=True), emit(mask, "mask", wide, is_inside=True)
    return jitted(bounds, "bounds"), jitted(function, "mask")


def _walk_arguments(
    walk: Walk | None, num_rows: int, num_heads: int, G: int, head_bytes: int, plan: Plan
) -> tuple[Any, ...]:
    """walk, num_words, map_strides, num_rows, num_heads, heads_together of kernels/tile.py.

    head_bytes: what the programs of G heads read in common.
    """
    together = min(G * max(1, plan.shared_bytes // max(head_bytes, 1)), num_heads)
    if walk is None:
        return None, None, (0, 0), num_rows, num_heads, together
    Bm, Hm, _, _, num_words = walk.words.shape
    strides = (Hm if Bm > 1 else 0, 1 if Hm > 1 else 0)
    return walk, num_words, strides, num_rows, num_heads, together


def _head_dims(D: int, Dv: int) -> dict[str, int]:
    return {"D": D, "DV": Dv, "D_PAD": padded(D), "DV_PAD": padded(Dv)}


@functools.lru_cache(maxsize=4096)
def _addressing(*strides: tuple[int, ...]) -> dict[str, Any]:
    """ALIGN: what divides every stride but the last.  WIDE: a tile of up to 256 x 256 can span 2^31 elements."""
    is_aligned = all(stride % 8 == 0 for of_tensor in strides for stride in of_tensor[:3])
    is_wide = any(stride >= 1 << 22 for of_tensor in strides for stride in of_tensor[2:])
    return {"ALIGN": 8 if is_aligned else 1, "WIDE": is_wide}


def _config(config: Config | HopperConfig | None) -> Config:
    assert isinstance(config, Config), "a plan of another backend"
    return config


def _ceil(x: int, y: int) -> int:
    return -(-x // y)


def _power_of_two(x: int) -> int:
    """The smallest power of two from x on."""
    return 1 << (x - 1).bit_length()


_NOTHING = contextlib.nullcontext()


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors'."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)
