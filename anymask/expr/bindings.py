"""Bindings: the captured tensors and numbers that an expression reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bindings:
    """What an expression reads besides its indices.

    captures: captured tensors by LOAD slot, each of any shape.  ints, floats: captured numbers by NUMBER slot
    (a NUMBER of dtype FLOAT reads floats, any other reads ints).
    """

    captures: tuple[torch.Tensor, ...] = ()
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()

    def wide_slots(self) -> frozenset[int]:
        """Slots of captured tensors that reach 2^31 elements: offsets into them take 64 bits."""
        return wide_slots((x.shape, x.stride()) for x in self.captures)


def wide_slots(layouts: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> frozenset[int]:
    """Bindings.wide_slots from the shapes and strides of captured tensors."""
    return frozenset(
        slot
        for slot, (shape, strides) in enumerate(layouts)
        if sum(size * stride for size, stride in zip(shape, strides, strict=True)) >= 1 << 31
    )
