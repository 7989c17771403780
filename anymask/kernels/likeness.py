"""Likeness: what calls that differ in tensors alone have in common."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from anymask.expr.mods import Mods
from anymask.kernels.configs import HopperBackwardConfig, HopperConfig
from anymask.kernels.plan import Plan, is_walked
from anymask.kernels.recipe import Layout
from anymask.problem import dense_strides

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
