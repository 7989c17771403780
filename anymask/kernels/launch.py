"""Starts forward and backward. It obeys the plan and owns what it writes.

(What kernels are started with is in recipes.py; maps and walks are made by map_launch.py.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.blocks import cache
from anymask.blocks.block_map import BlockMap
from anymask.blocks.walk import Walk
from anymask.expr.bindings import Bindings
from anymask.expr.mods import Mods
from anymask.kernels.configs import HopperBackwardConfig, HopperDqConfig
from anymask.kernels.likeness import Likeness, likeness
from anymask.kernels.map_launch import walks
from anymask.kernels.plan import Plan, is_readable_by_tma
from anymask.kernels.recipe import Layout, Outline, Recipe, readable
from anymask.kernels.recipes import HopperRecipes, backward_recipes, forward_recipe, hopper_backward_recipes
from anymask.problem import dense_like


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
        forward_recipe(alike)(q, k, v, out, lse, *self.read, *readable(captures))
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
        dq_recipe, dkdv_recipe, made, of_rows = backward_recipes(self.alike, strides, of_captures, dlse is not None)
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
        recipes = hopper_backward_recipes(self.alike, given, strides, of_captures, dlse is not None)
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
            recipes = hopper_backward_recipes(alike, strides[:3], strides, of_captures, False)
            sums = () if recipes.of_sum is None else (row,)
            counters = (Outline(torch.int32),) if alike.has_persistent_backward else ()
            if recipes.dkdv.is_new:
                calls = self._hopper_calls(recipes, q, k, v, x, x, row, (), row, sums, x, x, x, counters, captures)
                for recipe, tensors in calls:
                    recipe.compile_ahead(*tensors)
            return
        dq_recipe, dkdv_recipe, _, _ = backward_recipes(alike, strides, of_captures, False)
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
        forward_recipe(alike).finish()  # which would take longer beside these
        with contextlib.suppress(Exception):  # is raised by the backward
            prepared.begin_backward(q, k, v, captures)
    return prepared


def _begin_forward(alike: Likeness, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor]) -> None:
    """Begin to compile, where it is new, what Prepared.forward launches."""
    recipe = forward_recipe(alike)
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


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
