"""The recipes of a call's kernels: what each is started with, worked out once for calls that are alike.

(Those of Gluon are in hopper_launch.py, which is imported only where the plan wants one.)
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from anymask.blocks.walk import WORD
from anymask.expr.emit import emit_hide, emit_score
from anymask.expr.grad import derivative
from anymask.expr.ir import Expr
from anymask.expr.mods import Mods
from anymask.kernels.configs import ROWS_TOGETHER, AnyConfig, Config, HopperBackwardConfig, HopperConfig, HopperDqConfig
from anymask.kernels.footprint import padded
from anymask.kernels.jit import jitted
from anymask.kernels.likeness import Likeness, Sizes, Strides
from anymask.kernels.plan import Plan, walk_shapes
from anymask.kernels.recipe import TENSOR, Layout, Recipe, bound
from anymask.kernels.triton_bwd import dkdv_kernel, dq_kernel
from anymask.kernels.triton_fwd import forward_kernel
from anymask.problem import dense_strides


@functools.lru_cache(maxsize=1024)
def forward_recipe(alike: Likeness) -> Recipe:
    """For q, k, v, out, lse, a counter if it is persistent, the walk's tensors, captured ones."""
    plan, scale = alike.plan, alike.scale
    B, Hq, Sq, D = alike.q.shape
    Hkv, Skv, Dv = alike.v.shape[1:]
    out = alike.out.strides
    bindings, wide = bound(alike.captures, alike.ints, alike.floats)
    config = plan.forward
    assert config is not None, "a plan of another backend"
    tile_q, tile_kv = walk_shapes(plan, alike.tile)[0][0]
    maps = alike.maps_of("forward")
    near = None
    if isinstance(config, HopperConfig):
        near = "kv_idx"
        if maps is None:
            tile_q, tile_kv = config.BLOCK_Q, config.BLOCK_KV
    # rows past the end are not stored, and keys past the end hidden
    overhang = _overhang(Sq % tile_q, Skv % tile_kv)
    mask, score, _ = _functions(alike.mods, wide, plan.is_ptx, overhang, False, near)
    if score is None and scale <= 0:  # the identity: the kernel's short cut needs scale > 0
        score = _function(alike.mods.score, "score", wide, plan.is_ptx, overhang, near)
    num_rows, head_bytes = _ceil(Sq, tile_q), Skv * (D + Dv) * alike.q.dtype.itemsize
    walk = walk_arguments(maps, _ceil(Skv, tile_kv), num_rows, B * Hq, Hq // Hkv, head_bytes, plan)
    if isinstance(config, HopperConfig):
        from anymask.kernels import hopper_launch

        mask = None if maps is None else mask
        tensors = (alike.q, alike.k, alike.v, alike.out)
        return hopper_launch.forward_recipe(*tensors, walk, (tile_q, tile_kv), scale, bindings, mask, score, config)
    return Recipe(
        alike.q.device,
        forward_kernel,
        B * Hq * num_rows * tile_q // config.BLOCK_Q,
        TENSOR,
        TENSOR,
        TENSOR,
        TENSOR,
        TENSOR,
        alike.q.strides,
        alike.k.strides,
        alike.v.strides,
        out,
        *walk,
        Hq,
        Sq,
        Skv,
        scale,
        bindings,
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
        **addressing(alike.q.strides, alike.k.strides, alike.v.strides, out),
    )


@functools.lru_cache(maxsize=1024)
def backward_recipes(
    alike: Likeness, strides: tuple[Strides, ...], of_captures: tuple[Strides, ...], has_dlse: bool
) -> tuple[Recipe, Recipe, list[tuple[Sizes, Strides]], Sizes]:
    """dQ's, for q, k, v, out, dout, lse, dlse if there is one, dq, rows, the walk's tensors, captured ones; that of dK
    and dV, for q, k, v, dout, dk, dv, rows and again those; the sizes and strides of dq, dk, dv; the sizes of rows.

    strides: of q, k, v, out and dout.
    """
    plan, scale = alike.plan, alike.scale
    B, Hq, Sq, D = alike.q.shape
    Hkv, Skv, Dv = alike.v.shape[1:]
    G = Hq // Hkv
    q, k, v, _, dout = strides
    inputs = zip((alike.q, alike.k, alike.v), strides, strict=False)
    made: list[tuple[Sizes, Strides]] = [(x.shape, dense_strides(x.shape, of_x, x.shape[3])) for x, of_x in inputs]
    dq, dk, dv = [of_x for _, of_x in made]
    captures = tuple(x._replace(strides=of_x) for x, of_x in zip(alike.captures, of_captures, strict=True))
    bindings, wide = bound(captures, alike.ints, alike.floats)
    dkdv = _config(plan.dkdv)
    _, (columns_tile, _), (lines_tile, _) = walk_shapes(plan, alike.tile)
    # of what lies past the end, rows are not stored, and what they are multiplied with is hidden
    overhang = _overhang(Sq % columns_tile[0] or Sq % lines_tile[0], Skv % columns_tile[1] or Skv % lines_tile[1])
    mask, score, score_gradient = _functions(alike.mods, wide, plan.is_ptx, overhang, has_gradient=True)
    num_columns = _ceil(Skv, columns_tile[1])
    padded_Sq = _ceil(Sq, columns_tile[0]) * columns_tile[0]
    row_bytes = (D + Dv) * alike.q.dtype.itemsize
    shared = dict(
        MASK=mask,
        SCORE=score,
        SCORE_GRAD=score_gradient,
        G=G,
        PRECISION=plan.precision,
        **_head_dims(D, Dv),
        **addressing(*strides, dq, dk, dv),
    )
    dq_recipe = _dq_recipe(alike, strides, dq, bindings, has_dlse, padded_Sq, shared)
    dkdv_recipe = Recipe(
        alike.q.device,
        dkdv_kernel,
        B * Hkv * num_columns * columns_tile[1] // dkdv.BLOCK_KV,
        TENSOR,
        TENSOR,
        TENSOR,
        TENSOR,
        TENSOR,
        TENSOR,
        TENSOR,
        q,
        k,
        v,
        dout,
        dk,
        dv,
        *walk_arguments(alike.maps, _ceil(Sq, columns_tile[0]), num_columns, B * Hkv, 1, Sq * G * row_bytes, plan),
        Hkv,
        Sq,
        Skv,
        padded_Sq,
        scale,
        bindings,
        BLOCK_Q=dkdv.BLOCK_Q,
        BLOCK_KV=dkdv.BLOCK_KV,
        TILE_Q=columns_tile[0],
        TILE_KV=columns_tile[1],
        IS_EVEN_Q=Sq % columns_tile[0] == 0,
        num_warps=dkdv.num_warps,
        num_stages=dkdv.num_stages,
        **shared,
    )
    return dq_recipe, dkdv_recipe, made, (B, Hq, padded_Sq, 2)


def _dq_recipe(
    alike: Likeness,
    strides: tuple[Strides, ...],
    dq: Strides,
    bindings: Any,
    has_dlse: bool,
    padded_Sq: int | None,
    shared: dict[str, Any],
) -> Recipe:
    """For q, k, v, out, dout, lse, dlse if there is one, dq, rows if padded_Sq is given, then as all recipes.

    strides: of q, k, v, out, dout.
    """
    plan, scale = alike.plan, alike.scale
    B, Hq, Sq, D = alike.q.shape
    Hkv, Skv, Dv = alike.v.shape[1:]
    G = Hq // Hkv
    dq_config = _config(plan.dq)
    lines_tile, _ = walk_shapes(plan, alike.tile)[2]
    num_lines = _ceil(Sq, lines_tile[0])
    row_bytes = (D + Dv) * alike.q.dtype.itemsize
    maps = alike.maps_of("dq")
    return Recipe(
        alike.q.device,
        dq_kernel,
        B * Hq * num_lines * lines_tile[0] // dq_config.BLOCK_Q,
        TENSOR,
        TENSOR,
        TENSOR,
        TENSOR,
        TENSOR,
        TENSOR,
        TENSOR if has_dlse else None,
        TENSOR,
        None if padded_Sq is None else TENSOR,
        *strides,
        dq,
        *walk_arguments(maps, _ceil(Skv, lines_tile[1]), num_lines, B * Hq, G, Skv * row_bytes, plan),
        Hq,
        Sq,
        Skv,
        padded_Sq,
        scale,
        bindings,
        BLOCK_Q=dq_config.BLOCK_Q,
        BLOCK_KV=dq_config.BLOCK_KV,
        TILE_Q=lines_tile[0],
        TILE_KV=lines_tile[1],
        IS_EVEN_KV=Skv % lines_tile[1] == 0,
        num_warps=dq_config.num_warps,
        num_stages=dq_config.num_stages,
        **shared,
    )


class HopperRecipes(NamedTuple):
    """What Prepared._hopper_backward starts, and the sizes and strides of what it makes."""

    rows: Recipe  # out, dout, lse, dlse if there is one, rows, the sum of dQ if there is one
    dkdv: Recipe  # q, k, v, dout, rows, that sum, dk, dv, a counter if needed, the walk's tensors, captured ones
    dq: Recipe  # that sum and dq; or as hopper_launch.dq_recipe; or as _dq_recipe without rows
    made: list[tuple[Sizes, Strides]]  # dq, dk, dv
    of_rows: tuple[Sizes, Strides]
    of_sum: Sizes | None


@functools.lru_cache(maxsize=1024)
def hopper_backward_recipes(
    alike: Likeness,
    given: tuple[Strides, ...],
    strides: tuple[Strides, ...],
    of_captures: tuple[Strides, ...],
    has_dlse: bool,
) -> HopperRecipes:
    """given: the strides of q, k, v, which dq, dk, dv follow.  strides: of q, k, v, out, dout as kernels read them."""
    from anymask.kernels import hopper_launch

    plan, scale = alike.plan, alike.scale
    config = plan.dkdv
    assert isinstance(config, HopperBackwardConfig), "a plan of another backend"
    B, Hq, Sq, D = alike.q.shape
    Hkv, Skv, Dv = alike.v.shape[1:]
    inputs = (alike.q, alike.k, alike.v)
    made = [x._replace(strides=dense_strides(x.shape, of_x, x.shape[3])) for x, of_x in zip(inputs, given, strict=True)]
    q, k, v, out, dout = [
        x._replace(strides=of_x) for x, of_x in zip((*inputs, alike.out, alike.out), strides, strict=True)
    ]
    captures = tuple(x._replace(strides=of_x) for x, of_x in zip(alike.captures, of_captures, strict=True))
    bindings, wide = bound(captures, alike.ints, alike.floats)
    maps = alike.maps_of("dkdv")
    _, (tile, _), (lines_tile, _) = walk_shapes(plan, alike.tile)
    if maps is None:
        tile = config.BLOCK_Q, config.BLOCK_KV
    # queries past the end are zeros, and keys past it hidden; a thread reads at 16 queries and 2 keys, and a predicate
    # costs less than 16 clamps (documents and causal, D 128: 781 and 933 instructions a masked step)
    overhang = None if Sq % tile[0] else _overhang(0, Skv % tile[1])
    mask, score, score_gradient = _functions(alike.mods, wide, plan.is_ptx, overhang, True, "q_idx")
    head_bytes = Sq * (Hq // Hkv) * (D + Dv) * q.dtype.itemsize
    walk = walk_arguments(maps, _ceil(Sq, tile[0]), _ceil(Skv, tile[1]), B * Hkv, 1, head_bytes, plan)
    functions = (None if maps is None else mask, score, score_gradient)
    _, dk, dv = made
    dkdv = hopper_launch.backward_recipe(q, k, v, dout, dk, dv, walk, tile, scale, bindings, *functions, config)
    rows = hopper_launch.rows_layout(q)
    of_rows = addressing(out.strides, dout.strides)
    rows_recipe = hopper_launch.rows_recipe(out, dout, rows, D, has_dlse, config.is_fused, of_rows)
    if config.is_fused:
        dq = hopper_launch.dq_of_sum_recipe(made[0], scale, config, addressing(made[0].strides))
    elif isinstance(plan.dq, HopperDqConfig):
        dq = _hopper_dq_recipe(alike, q, k, v, dout, made[0], bindings, wide)
    else:
        overhang = _overhang(Sq % lines_tile[0], Skv % lines_tile[1])
        mask, score, score_gradient = _functions(alike.mods, wide, plan.is_ptx, overhang, has_gradient=True)
        shared = dict(
            MASK=mask,
            SCORE=score,
            SCORE_GRAD=score_gradient,
            G=Hq // Hkv,
            PRECISION=plan.precision,
            **_head_dims(D, Dv),
            **addressing(*strides, made[0].strides),
        )
        dq = _dq_recipe(alike, strides, made[0].strides, bindings, has_dlse, None, shared)
    of_sum = hopper_launch.sum_layout(q).shape if config.is_fused else None
    return HopperRecipes(rows_recipe, dkdv, dq, [x[:2] for x in made], rows[:2], of_sum)


def _hopper_dq_recipe(
    alike: Likeness, q: Layout, k: Layout, v: Layout, dout: Layout, dq: Layout, bindings: Any, wide: frozenset[int]
) -> Recipe:
    """As hopper_launch.dq_recipe."""
    from anymask.kernels import hopper_launch

    plan = alike.plan
    config = plan.dq
    assert isinstance(config, HopperDqConfig), "a plan of another backend"
    B, Hq, Sq, D = q.shape
    Hkv, Skv, Dv = v.shape[1:]
    maps = alike.maps_of("dq")
    tile = config.BLOCK_Q, config.BLOCK_KV
    if maps is not None:
        tile, _ = walk_shapes(plan, alike.tile)[2]
    # as in the forward: rows past the end are not stored, and keys past the end hidden
    overhang = _overhang(Sq % tile[0], Skv % tile[1])
    mask, score, score_gradient = _functions(alike.mods, wide, plan.is_ptx, overhang, True, "kv_idx")
    head_bytes = Skv * (D + Dv) * q.dtype.itemsize
    walk = walk_arguments(maps, _ceil(Skv, tile[1]), _ceil(Sq, tile[0]), B * Hq, Hq // Hkv, head_bytes, plan)
    functions = (None if maps is None else mask, score, score_gradient)
    return hopper_launch.dq_recipe(q, k, v, dout, dq, walk, tile, alike.scale, bindings, *functions, config)


@functools.lru_cache(maxsize=4096)
def _function(
    expr: Expr, name: str, wide: frozenset[int], is_ptx: bool, overhang: frozenset[str] | None, near: str | None = None
) -> Any:
    return jitted((emit_hide if name == "hide" else emit_score)(expr, name, wide, is_ptx, overhang, near), name)


@functools.lru_cache(maxsize=4096)
def _functions(
    mods: Mods,
    wide: frozenset[int],
    is_ptx: bool,
    overhang: frozenset[str] | None,
    has_gradient: bool,
    near: str | None = None,
) -> tuple[Any, Any, Any]:
    """The mask, the score function and its derivative, the last two None where the score is unchanged.

    overhang, near: see emit.
    """
    mask = _function(mods.mask, "hide", wide, is_ptx, overhang, near)
    if not mods.has_score:
        return mask, None, None
    score = _function(mods.score, "score", wide, is_ptx, overhang, near)
    if not has_gradient:
        return mask, score, None
    return mask, score, _function(derivative(mods.score), "score_gradient", wide, is_ptx, overhang, near)


def _overhang(q: int, kv: int) -> frozenset[str]:
    """The indices that tiles may take past the end: those with a rest."""
    return frozenset(name for name, rest in (("q_idx", q), ("kv_idx", kv)) if rest)


def walk_arguments(
    maps: tuple[int, int] | None, num_columns: int, num_rows: int, num_heads: int, G: int, head_bytes: int, plan: Plan
) -> tuple[Any, ...]:
    """walk, num_words, map_strides, num_rows, num_heads, heads_together, heads_last of kernels/tile.py.

    head_bytes: what the programs of G heads read in common.
    """
    fewest = _ceil(ROWS_TOGETHER, num_rows) if any(plan.shared_bytes) else 1
    together, last = (min(G * max(size // max(head_bytes, 1), fewest), num_heads) for size in plan.shared_bytes)
    last += (num_heads - last) % together
    if maps is None:
        return None, None, (0, 0), num_rows, num_heads, together, last
    Bm, Hm = maps
    strides = (Hm if Bm > 1 else 0, 1 if Hm > 1 else 0)
    return (TENSOR, TENSOR), _ceil(num_columns, WORD), strides, num_rows, num_heads, together, last


def _head_dims(D: int, Dv: int) -> dict[str, int]:
    return {"D": D, "DV": Dv, "D_PAD": padded(D), "DV_PAD": padded(Dv)}


@functools.lru_cache(maxsize=4096)
def addressing(*strides: tuple[int, ...]) -> dict[str, Any]:
    """ALIGN: what divides every stride but the last.  WIDE: a tile of up to 256 x 256 can span 2^31 elements."""
    is_aligned = all(stride % 8 == 0 for of_tensor in strides for stride in of_tensor[:3])
    is_wide = any(stride >= 1 << 22 for of_tensor in strides for stride in of_tensor[2:])
    return {"ALIGN": 8 if is_aligned else 1, "WIDE": is_wide}


def _config(config: AnyConfig | None) -> Config:
    assert isinstance(config, Config), "a plan of another backend"
    return config


def _ceil(x: int, y: int) -> int:
    return -(-x // y)
