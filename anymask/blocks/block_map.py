"""BlockMap: which KV tiles each Q tile visits, and which Q tiles visit each KV tile."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from anymask.expr.bindings import Bindings

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True, eq=False, repr=False)
class BlockMap:
    """The tiles of one mask. B and H are 1 where the mask is the same for every batch or head.

    kinds     [B, H, nQ, nKV] int8: EMPTY no pair of the tile is visible, FULL every pair that exists is, PARTIAL else
    kv_order  [B, H, nQ, nKV] int32: the KV tiles of each Q tile: masked ones, then full ones, each group ascending
    kv_count  [B, H, nQ, 2] int32: how many are masked, how many are full; entries of kv_order past their sum are valid
              tile numbers without a meaning
    q_order   [B, H, nKV, nQ] int32, q_count [B, H, nKV, 2] int32: the same for the Q tiles of each KV tile

    In a masked tile the mask must be applied: in PARTIAL ones, and in FULL ones that hang over the end of the keys.
    A tile is masked in both directions or in none.

    Sq, Skv: lengths.  tile: positions per tile along q and kv.  text, bindings: the mask that the map was built for.
    built_from: cache.identities of the captured tensors then; None where they are not compared.
    """

    kinds: Tensor
    kv_order: Tensor
    kv_count: Tensor
    q_order: Tensor
    q_count: Tensor
    Sq: int
    Skv: int
    tile: tuple[int, int]
    text: str = ""
    bindings: Bindings = field(default_factory=Bindings)
    built_from: Hashable = None

    @staticmethod
    def from_kinds(
        kinds: Tensor, Sq: int, Skv: int, tile: tuple[int, int], text: str = "", bindings: Bindings | None = None
    ) -> BlockMap:
        """The map of kinds [B|1, H|1, nQ, nKV] int8, on its device. No host synchronisation."""
        is_full = kinds == FULL
        if Skv % tile[1] != 0:
            is_full[..., -1] = False
        is_masked = (kinds != EMPTY) ^ is_full
        kv_order, kv_count = _partition(is_masked, is_full)
        q_order, q_count = _partition(is_masked.mT.contiguous(), is_full.mT.contiguous())
        return BlockMap(kinds, kv_order, kv_count, q_order, q_count, Sq, Skv, tile, text, bindings or Bindings())

    @staticmethod
    def from_tensors(
        tensors: Sequence[Tensor],
        Sq: int,
        Skv: int,
        tile: tuple[int, int],
        text: str = "",
        bindings: Bindings | None = None,
        built_from: Hashable = None,
    ) -> BlockMap:
        """The map whose `tensors` these are."""
        kinds, kv_order, kv_count, q_order, q_count = tensors
        lists = (kv_order, kv_count, q_order, q_count)
        return BlockMap(kinds, *lists, Sq, Skv, tile, text, bindings or Bindings(), built_from)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """kinds, kv_order, kv_count, q_order, q_count: what an op carries."""
        return self.kinds, self.kv_order, self.kv_count, self.q_order, self.q_count

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
        tensors = [tensor.to(device) for tensor in self.tensors]
        captures = tuple(tensor.to(device) for tensor in self.bindings.captures)
        bindings = replace(self.bindings, captures=captures)
        return BlockMap.from_tensors(tensors, self.Sq, self.Skv, self.tile, self.text, bindings)

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


def _partition(is_masked: Tensor, is_full: Tensor) -> tuple[Tensor, Tensor]:
    """Order each row: masked tiles, full tiles, the others, each group ascending; and how many are masked and full.

    is_masked, is_full: [..., n] bool, never both.  Returns [..., n] int32 and [..., 2] int32.
    """
    tile = torch.arange(is_masked.shape[-1], device=is_masked.device)
    num_masked, num_full = is_masked.sum(-1, keepdim=True), is_full.sum(-1, keepdim=True)
    masked, full = is_masked.cumsum(-1), is_full.cumsum(-1)  # the tile itself counts
    place = torch.where(is_full, num_masked + full - 1, num_masked + num_full + tile - masked - full)
    place = torch.where(is_masked, masked - 1, place)
    order = torch.empty(place.shape, dtype=torch.int32, device=place.device)
    order.scatter_(-1, place, tile.int().expand_as(place))
    return order, torch.cat((num_masked, num_full), -1).int()
