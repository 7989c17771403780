"""BlockMap: what each tile of the score matrix holds."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from anymask.expr.bindings import Bindings

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True, eq=False, repr=False)
class BlockMap:
    """The tiles of one mask. B and H are 1 where the mask is the same for every batch or head.

    kinds: [B, H, nQ, nKV] int8, contiguous: EMPTY no pair of the tile is visible, FULL every pair that exists is,
    PARTIAL else.
    Sq, Skv: lengths.  tile: positions per tile along q and kv.  text, bindings: the mask that the map was built for.
    built_from: cache.identities of the captured tensors then; None where they are not compared.
    """

    kinds: Tensor
    Sq: int
    Skv: int
    tile: tuple[int, int]
    text: str = ""
    bindings: Bindings = field(default_factory=Bindings)
    built_from: Hashable = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B|1, H|1, tiles along q, tiles along kv."""
        B, H, nQ, nKV = self.kinds.shape
        return B, H, nQ, nKV

    @property
    def device(self) -> torch.device:
        return self.kinds.device

    def to_dense(self) -> Tensor:
        """Kinds of the tiles, int8 [B|1, H|1, nQ, nKV]: 0 empty, 1 partial, 2 full."""
        return self.kinds

    def density(self) -> float:
        """Fraction of the tiles that are visited; 0 if there are none. Waits for the device."""
        return int((self.kinds != EMPTY).sum()) / max(self.kinds.numel(), 1)

    def to(self, device: torch.device | str) -> BlockMap:
        """This map, with the tensors that its mask reads, on another device."""
        captures = tuple(tensor.to(device) for tensor in self.bindings.captures)
        bindings = replace(self.bindings, captures=captures)
        return BlockMap(self.kinds.to(device), self.Sq, self.Skv, self.tile, self.text, bindings)

    def __repr__(self) -> str:
        B, H, nQ, nKV = self.shape
        return f"BlockMap({B} x {H} x {nQ} x {nKV} tiles of {self.tile[0]} x {self.tile[1]}, {self.device})"

    def __str__(self) -> str:
        """A drawing for a terminal, of at most 32 lines of 64 characters, with its legend and the density."""
        B, H, nQ, nKV = self.shape
        head = f"{self.Sq} x {self.Skv}, tiles of {self.tile[0]} x {self.tile[1]}, {self.density():.1%} visited"
        if self.kinds.numel() == 0:
            return head
        if B * H > 1:
            head += f"; drawn: batch 0 of {B}, head 0 of {H}"
        rows, columns = -(-nQ // 32), -(-nKV // 64)
        legend = f"{_FULL} full  {_PARTIAL} partial  {_EMPTY} empty"
        if rows * columns > 1:
            legend += f"  (one character is {rows} x {columns} tiles)"
        kinds = self.kinds[0, 0].cpu()
        lines = ["".join(map(_character, line.split(columns, dim=1))) for line in kinds.split(rows)]
        return "\n".join([head, *lines, legend])


_EMPTY, _PARTIAL, _FULL = "·▒█"


def _character(kinds: Tensor) -> str:
    if bool((kinds == EMPTY).all()):
        return _EMPTY
    return _FULL if bool((kinds == FULL).all()) else _PARTIAL
