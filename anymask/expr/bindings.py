"""Bindings: the captured tensors and numbers that an expression reads."""

from __future__ import annotations

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
        return frozenset(
            slot
            for slot, x in enumerate(self.captures)
            if sum(size * stride for size, stride in zip(x.shape, x.stride(), strict=True)) >= 1 << 31
        )
