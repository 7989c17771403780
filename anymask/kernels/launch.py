"""Starts forward and backward. It obeys the plan and owns what it writes.

(What the Hopper kernels are started with is in hopper_launch.py, which imports Gluon; maps and walks are made by
map_launch.py.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.blocks import cache
from anymask.blocks.block_map import BlockMap
from anymask.blocks.walk import WORD, Walk
from anymask.expr.bindings import Bindings
from anymask.expr.emit import emit_hide, emit_score
from anymask.expr.grad import derivative
from anymask.expr.ir import Expr
from anymask.expr.mods import Mods
from anymask.kernels.configs import (
    ROWS_TOGETHER,
    AnyConfig,
    Config,
    HopperBackwardConfig,
    HopperConfig,
    HopperDqConfig,
)
from anymask.kernels.footprint import padded
from anymask.kernels.jit import jitted
from anymask.kernels.map_launch import walks
from anymask.kernels.plan import Plan, is_readable_by_tma, is_walked, walk_shapes
from anymask.kernels.recipe import TENSOR, Layout, Outline, Recipe, bound, readable
from anymask.kernels.triton_bwd import dkdv_kernel, dq_kernel
from anymask.kernels.triton_fwd import forward_kernel
from anymask.problem import dense_like, dense_strides

Sizes = tuple[int, ...]
Strides = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Likeness:
    """What calls that differ in tensors alone have in common; one object for all of them (likeness), so that it is
    found again by being itself.

    maps: how many maps there are, by batch and by head.
    """

    q: Layout
    k: Layout
    v: Layout
    captures: tuple[Layout, ...]
    ints: tuple[int, ...]
    floats: tuple[float, ...]
    mods: Mods
    maps: tuple[int, int]
    tile: tuple[int, int]
    plan: Plan
    scale: float

    @functools.cached_property
    def is_nothing(self) -> bool:
        """There is no query, or no key."""
        return 0 in (*self.q.shape, self.k.shape[2])

    def maps_of(self, kernel: str) -> tuple[int, int] | None:
        """maps where this kernel walks."""
        return self.maps if is_walked(self.plan, kernel, self.mods.has_mask) else None

    @functools.cached_property
    def is_persistent(self) -> bool:
        """The forward's programs draw their work from a counter."""
        return isinstance(self.plan.forward, HopperConfig) and self.plan.forward.is_persistent

    @functools.cached_property
    def has_persistent_backward(self) -> bool:
        """Those of dk and dv do."""
        return isinstance(self.plan.dkdv, HopperBackwardConfig) and self.plan.dkdv.is_persistent

    @functools.cached_property
    def out(self) -> Layout:
        shape, Dv = self.q.shape, self.v.shape[3]
        return self.q._replace(shape=(*shape[:3], Dv), strides=dense_strides(shape, self.q.strides, Dv))

    @functools.cached_property
    def lse(self) -> tuple[Sizes, Strides]:
        """Sizes and strides."""
        B, Hq, Sq, _ = self.q.shape
        return (B, Hq, Sq), (Hq * Sq, Sq, 1)


likeness = functools.lru_cache(maxsize=1024)(Likeness)


class Prepared(NamedTuple):
    """A call made ready: its kernels start for any q, k, v and captured tensors laid out as those it was made for.

    walks: of KERNELS.  read: by the forward besides captured tensors: a counter for the stream it was made ready on, if
    it is persistent, and its walk.
    """

    alike: Likeness
    walks: tuple[Walk | None, ...]
    read: tuple[Tensor, ...]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, captures: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """out [B, Hq, Sq, Dv] laid out as q (problem.dense_like), lse [B, Hq, Sq] float32, natural log.

        A row that sees no key: out = 0, lse = -inf.
        """
        alike = self.alike
        out = q.new_empty_strided(alike.out.shape, alike.out.strides)
        lse = q.new_empty_strided(*alike.lse, dtype=torch.float32)
        if alike.is_nothing:
            return out.zero_(), lse.fill_(float("-inf"))
        _forward_recipe(alike)(q, k, v, out, lse, *self.read, *readable(captures))
        return out, lse

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        captures: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv, each in the shape and dtype of q, k, v, laid out by problem.dense_like.

        dlse: the gradient of lse, or None for 0.
        dq first: it leaves lse and delta of each row to dk and dv. Deterministic: each gradient tile has one program
        that adds in the order of the map. But for the Hopper kernel where it computes dq too.
        """
        if self.alike.is_nothing:
            dq, dk, dv = (dense_like(x, x.shape[3]).zero_() for x in (q, k, v))
            return dq, dk, dv
        captures = tuple(readable(captures))
        if isinstance(self.alike.plan.dkdv, HopperBackwardConfig):
            return self._hopper_backward(dout, dlse, q, k, v, out, lse, captures)
        # a hook on saved tensors (save_on_cpu) may bring them back with other strides than they had
        strides = tuple([x.stride() for x in (q, k, v, out, dout)])
        of_captures = tuple([x.stride() for x in captures])
        dq_recipe, dkdv_recipe, made, of_rows = _backward_recipes(self.alike, strides, of_captures, dlse is not None)
        dq, dk, dv = [torch.empty_strided(*layout, dtype=q.dtype, device=q.device) for layout in made]
        rows = torch.empty(of_rows, dtype=torch.float32, device=q.device)
        given = () if dlse is None else (dlse.contiguous(),)
        _, columns, lines = self.walks
        of_dq = (q, k, v, out, dout, lse, *given, dq, rows, *(lines or ()), *captures)
        of_dkdv = (q, k, v, dout, dk, dv, rows, *(columns or ()), *captures)
        if dkdv_recipe.is_new:  # side by side
            dq_recipe.compile_ahead(*of_dq)
            dkdv_recipe.compile_ahead(*of_dkdv)
        dq_recipe(*of_dq)
        dkdv_recipe(*of_dkdv)
        return dq, dk, dv

    def _hopper_backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        captures: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """First lse and delta of each row, and a zeroed sum if the kernel of dk and dv adds dq up there; that kernel;
        then dq from the sum, or by a kernel of its own. What TMA cannot read is copied: dout may have any strides.
        """
        given = tuple([x.stride() for x in (q, k, v)])
        q, k, v, dout = (x if is_readable_by_tma(x) else _copied(x) for x in (q, k, v, dout))
        strides = tuple([x.stride() for x in (q, k, v, out, dout)])
        of_captures = tuple([x.stride() for x in captures])
        recipes = _hopper_backward_recipes(self.alike, given, strides, of_captures, dlse is not None)
        device = q.device
        dq, dk, dv = [torch.empty_strided(*layout, dtype=q.dtype, device=device) for layout in recipes.made]
        rows = torch.empty_strided(*recipes.of_rows, dtype=torch.float32, device=device)
        sums = () if recipes.of_sum is None else (torch.empty(recipes.of_sum, dtype=torch.float32, device=device),)
        dlses = () if dlse is None else (dlse.contiguous(),)
        counters = (counter_of(device),) if self.alike.has_persistent_backward else ()
        calls = self._hopper_calls(recipes, q, k, v, out, dout, lse, dlses, rows, sums, dq, dk, dv, counters, captures)
        if recipes.dkdv.is_new:  # side by side
            for recipe, tensors in calls:
                recipe.compile_ahead(*tensors)
        for recipe, tensors in calls:
            recipe(*tensors)
        return dq, dk, dv

    def _hopper_calls(
        self,
        recipes: HopperRecipes,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        dout: Any,
        lse: Any,
        dlses: tuple[Any, ...],
        rows: Any,
        sums: tuple[Any, ...],
        dq: Any,
        dk: Any,
        dv: Any,
        counters: tuple[Any, ...],
        captures: Sequence[Tensor],
    ) -> tuple[tuple[Recipe, tuple[Any, ...]], ...]:
        """Recipes in the order of their launches, with their tensors or the outlines of these."""
        _, columns, lines = self.walks
        of_dq: tuple[Any, ...] = (q, k, v, out, dout, lse, *dlses, dq, *(lines or ()), *captures)
        if sums:
            of_dq = (*sums, dq)
        elif isinstance(self.alike.plan.dq, HopperDqConfig):
            of_dq = (q, k, v, dout, dq, rows, *(lines or ()), *captures)
        return (
            (recipes.rows, (out, dout, lse, *dlses, rows, *sums)),
            (recipes.dkdv, (q, k, v, dout, rows, *sums, dk, dv, *counters, *(columns or ()), *captures)),
            (recipes.dq, of_dq),
        )

    def begin_backward(self, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor]) -> None:
        """Begin to compile, where they are new, the kernels of a backward with dout laid out as out, and no dlse."""
        alike = self.alike
        strides = (alike.q.strides, alike.k.strides, alike.v.strides, alike.out.strides, alike.out.strides)
        of_captures = tuple([x.strides for x in alike.captures])
        x, row = Outline(q.dtype), Outline(torch.float32)
        if isinstance(alike.plan.dkdv, HopperBackwardConfig):
            recipes = _hopper_backward_recipes(alike, strides[:3], strides, of_captures, False)
            sums = () if recipes.of_sum is None else (row,)
            counters = (Outline(torch.int32),) if alike.has_persistent_backward else ()
            if recipes.dkdv.is_new:
                calls = self._hopper_calls(recipes, q, k, v, x, x, row, (), row, sums, x, x, x, counters, captures)
                for recipe, tensors in calls:
                    recipe.compile_ahead(*tensors)
            return
        dq_recipe, dkdv_recipe, _, _ = _backward_recipes(alike, strides, of_captures, False)
        if dkdv_recipe.is_new:
            _, columns, lines = self.walks
            dq_recipe.compile_ahead(q, k, v, x, x, row, x, row, *(lines or ()), *captures)
            dkdv_recipe.compile_ahead(q, k, v, x, x, x, row, *(columns or ()), *captures)


def counter_of(device: torch.device) -> Tensor:
    """[2] int32, 0, which no kernel uses that runs beside the next one launched; persistent kernels leave it 0.

    Kernels of one stream run one after the other. A graph may be replayed on any stream: its kernels have their own.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    return _counter(device, cache.stream_of(device))


@functools.cache
def _counter(device: torch.device, stream: Hashable) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mods: Mods,
    bindings: Bindings,
    blocks: BlockMap,
    plan: Plan,
    scale: float,
    is_forward: bool = True,
    find_map: Callable[[], BlockMap] | None = None,
    has_gradient: bool = False,
) -> Prepared:
    """Such calls, made ready.

    is_forward: the forward will run, not the backward alone.
    find_map: gives the map, while the forward's kernel is compiled if it is new; `blocks` is then without its kinds.
    has_gradient: a backward will follow, so its kernels are begun too, but no call waits for them before it.
    """
    captures = readable(bindings.captures)
    alike = likeness(
        *map(Layout.of, (q, k, v)),
        tuple(map(Layout.of, captures)),
        bindings.ints,
        bindings.floats,
        mods,
        blocks.shape[:2],
        blocks.tile,
        plan,
        scale,
    )
    if find_map is not None:
        if not alike.is_nothing:
            _begin_forward(alike, q, k, v, captures)
        blocks = find_map()
    made = tuple(walk for walk, _ in walks(blocks, plan, mods.has_mask).values())
    counter = (counter_of(q.device),) if is_forward and alike.is_persistent else ()
    prepared = Prepared(alike, made, (*counter, *(made[0] or ())))
    if has_gradient and not alike.is_nothing:
        _forward_recipe(alike).finish()  # which would take longer beside these
        with contextlib.suppress(Exception):  # is raised by the backward
            prepared.begin_backward(q, k, v, captures)
    return prepared


def _begin_forward(alike: Likeness, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor]) -> None:
    """Begin to compile, where it is new, what Prepared.forward launches."""
    recipe = _forward_recipe(alike)
    if recipe.is_new:
        out, lse, int32 = Outline(q.dtype), Outline(torch.float32), Outline(torch.int32)
        counter = (int32,) if alike.is_persistent else ()
        walk = (Outline(torch.int64), int32) if alike.maps_of("forward") is not None else ()
        recipe.compile_ahead(q, k, v, out, lse, *counter, *walk, *captures)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mods: Mods, bindings: Bindings, blocks: BlockMap, plan: Plan, scale: float
) -> tuple[Tensor, Tensor]:
    """Prepared.forward, once."""
    return prepare(q, k, v, mods, bindings, blocks, plan, scale).forward(q, k, v, bindings.captures)


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
    """Prepared.backward, once."""
    prepared = prepare(q, k, v, mods, bindings, blocks, plan, scale, is_forward=False)
    return prepared.backward(dout, dlse, q, k, v, out, lse, bindings.captures)


@functools.lru_cache(maxsize=1024)
def _forward_recipe(alike: Likeness) -> Recipe:
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
    walk = _walk_arguments(maps, _ceil(Skv, tile_kv), num_rows, B * Hq, Hq // Hkv, head_bytes, plan)
    if isinstance(config, HopperConfig):
        from anymask.kernels.hopper_launch import forward_recipe

        mask = None if maps is None else mask
        tensors = (alike.q, alike.k, alike.v, alike.out)
        return forward_recipe(*tensors, walk, (tile_q, tile_kv), scale, bindings, mask, score, config)
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
        **_addressing(alike.q.strides, alike.k.strides, alike.v.strides, out),
    )


@functools.lru_cache(maxsize=1024)
def _backward_recipes(
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
        **_addressing(*strides, dq, dk, dv),
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
        *_walk_arguments(alike.maps, _ceil(Sq, columns_tile[0]), num_columns, B * Hkv, 1, Sq * G * row_bytes, plan),
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
        *_walk_arguments(maps, _ceil(Skv, lines_tile[1]), num_lines, B * Hq, G, Skv * row_bytes, plan),
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
def _hopper_backward_recipes(
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
    walk = _walk_arguments(maps, _ceil(Sq, tile[0]), _ceil(Skv, tile[1]), B * Hkv, 1, head_bytes, plan)
    functions = (None if maps is None else mask, score, score_gradient)
    _, dk, dv = made
    dkdv = hopper_launch.backward_recipe(q, k, v, dout, dk, dv, walk, tile, scale, bindings, *functions, config)
    rows = hopper_launch.rows_layout(q)
    of_rows = _addressing(out.strides, dout.strides)
    rows_recipe = hopper_launch.rows_recipe(out, dout, rows, D, has_dlse, config.is_fused, of_rows)
    if config.is_fused:
        dq = hopper_launch.dq_of_sum_recipe(made[0], scale, config, _addressing(made[0].strides))
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
            **_addressing(*strides, made[0].strides),
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
    walk = _walk_arguments(maps, _ceil(Skv, tile[1]), _ceil(Sq, tile[0]), B * Hq, Hq // Hkv, head_bytes, plan)
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


def _walk_arguments(
    maps: tuple[int, int] | None, num_columns: int, num_rows: int, num_heads: int, G: int, head_bytes: int, plan: Plan
) -> tuple[Any, ...]:
    """walk, num_words, map_strides, num_rows, num_heads, heads_together of kernels/tile.py.

    head_bytes: what the programs of G heads read in common.
    """
    heads = max(plan.shared_bytes // max(head_bytes, 1), _ceil(ROWS_TOGETHER, num_rows) if plan.shared_bytes else 1)
    together = min(G * heads, num_heads)
    if maps is None:
        return None, None, (0, 0), num_rows, num_heads, together
    Bm, Hm = maps
    strides = (Hm if Bm > 1 else 0, 1 if Hm > 1 else 0)
    return (TENSOR, TENSOR), _ceil(num_columns, WORD), strides, num_rows, num_heads, together


def _head_dims(D: int, Dv: int) -> dict[str, int]:
    return {"D": D, "DV": Dv, "D_PAD": padded(D), "DV_PAD": padded(Dv)}


@functools.lru_cache(maxsize=4096)
def _addressing(*strides: tuple[int, ...]) -> dict[str, Any]:
    """ALIGN: what divides every stride but the last.  WIDE: a tile of up to 256 x 256 can span 2^31 elements."""
    is_aligned = all(stride % 8 == 0 for of_tensor in strides for stride in of_tensor[:3])
    is_wide = any(stride >= 1 << 22 for of_tensor in strides for stride in of_tensor[2:])
    return {"ALIGN": 8 if is_aligned else 1, "WIDE": is_wide}


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _config(config: AnyConfig | None) -> Config:
    assert isinstance(config, Config), "a plan of another backend"
    return config


def _ceil(x: int, y: int) -> int:
    return -(-x // y)
