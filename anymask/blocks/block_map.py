"""BlockMap: what each tile of the score matrix holds."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymask.errors import InputError
from anymask.expr.bindings import Bindings
from anymask.expr.ir import DType, Expr, Op, apply, const, from_text, index, to_text
from anymask.expr.simplify import rewrite

if TYPE_CHECKING:
    from os import PathLike

EMPTY, PARTIAL, FULL = 0, 1, 2

DOUBTS = (
    "kv_indices lists a key tile outside 0 .. {nKV} - 1; it was dropped",
    "a count in kv_counts is negative or more than the row of kv_indices holds",
    "the tiles of a row are not ascending: sort them, kv_indices.sort(-1)",
)


@dataclass(frozen=True, eq=False, repr=False)
class BlockMap:
    """The tiles of one mask. B and H are 1 where the mask is the same for every batch or head.

    kinds: [B, H, nQ, nKV] int8, contiguous: EMPTY no pair of the tile is visible, FULL every pair that exists is,
    PARTIAL else.
    Sq, Skv: lengths.  tile: positions per tile along q and kv.  text, bindings: the mask that the map was built for.
    built_from: cache.identities of the captured tensors then; None where they are not compared.
    q_start: what query 0 of the map was in the map that rows() cut it from.
    doubts: what from_indices found wrong, on the device, [3] bool in the order of DOUBTS, or None.
    is_selection: the mask is a choice of whole tiles, by from_dense or from_indices.
    """

    kinds: Tensor
    Sq: int
    Skv: int
    tile: tuple[int, int]
    text: str = ""
    bindings: Bindings = field(default_factory=Bindings)
    built_from: Hashable = None
    q_start: int = 0
    doubts: Tensor | None = None
    is_selection: bool = False

    @staticmethod
    def from_dense(
        blocks: Tensor, *, Sq: int | None = None, Skv: int | None = None, tile: int | tuple[int, int] = 128
    ) -> BlockMap:
        """Block-sparse attention: queries see the keys of the tiles that are chosen, whole. Join with a mask by `&`.

        blocks: bool [B|1, H|1, nQ, nKV] or [nQ, nKV], True where a tile is visited; copied.
        Sq, Skv: lengths that nQ and nKV tiles just cover; by default nQ and nKV whole tiles.
        """
        tile = (tile, tile) if isinstance(tile, int) else tile
        if blocks.dtype != torch.bool or blocks.dim() not in (2, 4):
            raise InputError(
                f"blocks must be bool [B|1, H|1, nQ, nKV] or [nQ, nKV], got {blocks.dtype} {tuple(blocks.shape)}"
            )
        blocks = blocks.clone(memory_format=torch.contiguous_format).view((1,) * (4 - blocks.dim()) + blocks.shape)
        lengths = []
        for name, length, size, num in zip(("Sq", "Skv"), (Sq, Skv), tile, blocks.shape[2:], strict=True):
            lengths.append(num * size if length is None else length)
            if -(-lengths[-1] // size) != num:
                raise InputError(
                    f"{name}={lengths[-1]} takes {-(-lengths[-1] // size)} tiles of {size}, blocks has {num}"
                )
        return BlockMap._of_selection(blocks, lengths[0], lengths[1], tile)

    @staticmethod
    def from_indices(
        kv_indices: Tensor,
        kv_counts: Tensor,
        *,
        Sq: int,
        Skv: int,
        tile: int | tuple[int, int] = 128,
        validate: bool = False,
    ) -> BlockMap:
        """As from_dense, from lists: query tile i sees the key tiles kv_indices[..., i, : kv_counts[..., i]].

        kv_indices: integers [B|1, H|1, nQ, K] or [nQ, K], ascending in each list; entries past the count are not read.
        kv_counts: integers [B|1, H|1, nQ] or [nQ], at most K.
        No host synchronisation: a tile that does not exist is dropped, and what is wrong is reported by the next call
        that waits for the device (density(), print); validate=True waits for it here. Raises InputError.
        """
        tile = (tile, tile) if isinstance(tile, int) else tile
        nQ, nKV = -(-Sq // tile[0]), -(-Skv // tile[1])
        shape = kv_indices.shape
        if kv_indices.dim() not in (2, 4) or kv_counts.shape != shape[:-1] or kv_counts.device != kv_indices.device:
            raise InputError(
                "kv_indices [B|1, H|1, nQ, K] and kv_counts [B|1, H|1, nQ] must fit, on one device, got "
                f"{tuple(shape)} on {kv_indices.device} and {tuple(kv_counts.shape)} on {kv_counts.device}"
            )
        if kv_indices.is_floating_point() or kv_counts.is_floating_point() or shape[-2] != nQ:
            raise InputError(
                f"Sq={Sq} takes {nQ} tiles of {tile[0]}: kv_indices must be integers [..., {nQ}, K], got "
                f"{kv_indices.dtype} {tuple(shape)} with {kv_counts.dtype} counts"
            )
        indices = kv_indices.long().view((1,) * (4 - len(shape)) + shape)
        counts = kv_counts.view(indices.shape[:-1])[..., None]
        K = indices.shape[-1]
        is_listed = torch.arange(K, device=indices.device) < counts
        exists = (indices >= 0) & (indices < nKV)
        # one column more takes what is dropped
        blocks = torch.zeros(*indices.shape[:-1], nKV + 1, dtype=torch.bool, device=indices.device)
        blocks.scatter_(-1, torch.where(is_listed & exists, indices, nKV), True)
        is_descending = is_listed[..., 1:] & (indices[..., 1:] <= indices[..., :-1])
        doubts = torch.stack(((is_listed & ~exists).any(), ((counts > K) | (counts < 0)).any(), is_descending.any()))
        made = BlockMap._of_selection(blocks[..., :nKV].contiguous(), Sq, Skv, tile, doubts)
        if validate:
            made.raise_doubts()
        return made

    @staticmethod
    def _of_selection(
        blocks: Tensor, Sq: int, Skv: int, tile: tuple[int, int], doubts: Tensor | None = None
    ) -> BlockMap:
        """The map of the mask blocks[b, h, q_idx // tile, kv_idx // tile]."""
        zero = const(0, DType.INT32)
        at = [index(name) if size > 1 else zero for name, size in zip(("b", "h"), blocks.shape, strict=False)]
        for name, size in zip(("q_idx", "kv_idx"), tile, strict=True):
            at.append(apply(Op.FLOORDIV, index(name), const(size, DType.INT32)))
        text = to_text(Expr.of(Op.LOAD, DType.BOOL, tuple(at), 0))
        kinds = blocks.to(torch.int8) * FULL
        return BlockMap(kinds, Sq, Skv, tile, text, Bindings((blocks,)), doubts=doubts, is_selection=True)

    def __and__(self, mask: Any) -> BlockMap:
        """The tiles of this choice in which the mask shows something. mask: as for attention().

        The map must come from from_dense or from_indices: two masks are joined before a map is built, (a & b).
        """
        from anymask.api import select

        return select(self, mask)

    def rows(self, q_start: int, q_stop: int) -> BlockMap:
        """The map of queries q_start .. q_stop alone, for chunked prefill: pass it with q[:, :, q_start:q_stop].

        In the mask and in a score function given with this map, q_idx goes on counting from query 0 of the whole.
        q_start: a multiple of the tile.  q_stop: likewise, or Sq.
        """
        tile_q = self.tile[0]
        is_whole = q_start % tile_q == 0 and (q_stop % tile_q == 0 or q_stop == self.Sq)
        if not (0 <= q_start <= q_stop <= self.Sq and is_whole):
            raise InputError(
                f"rows({q_start}, {q_stop}) of a map with Sq={self.Sq} and tiles of {tile_q} queries: cut it at "
                f"multiples of {tile_q}, or at the end"
            )
        slot = Expr.of(Op.NUMBER, DType.INT32, (), len(self.bindings.ints))
        moved = apply(Op.ADD, index("q_idx"), slot)
        text = to_text(rewrite(from_text(self.text), lambda node: moved if node is index("q_idx") else node))
        return replace(
            self,
            kinds=self.kinds[:, :, q_start // tile_q : -(-q_stop // tile_q)].contiguous(),
            Sq=q_stop - q_start,
            text=text,
            bindings=replace(self.bindings, ints=(*self.bindings.ints, q_start)),
            q_start=self.q_start + q_start,
            is_selection=False,
        )

    def raise_doubts(self) -> None:
        """Raise InputError if from_indices was given lists that are wrong. Waits for the device."""
        wrong = [] if self.doubts is None else self.doubts.tolist()
        _, _, nQ, nKV = self.shape
        for is_wrong, what in zip(wrong, DOUBTS, strict=False):
            if is_wrong:
                raise InputError(f"from_indices, of {nQ} x {nKV} tiles: {what.format(nKV=nKV)}")

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
        self.raise_doubts()
        return int((self.kinds != EMPTY).sum()) / max(self.kinds.numel(), 1)

    def to(self, device: torch.device | str) -> BlockMap:
        """This map, with the tensors that its mask reads, on another device."""
        captures = tuple(tensor.to(device) for tensor in self.bindings.captures)
        bindings = replace(self.bindings, captures=captures)
        return replace(self, kinds=self.kinds.to(device), bindings=bindings, built_from=None)

    def draw(self, path_or_ax: str | PathLike[str] | Any, *, b: int = 0, h: int = 0) -> None:
        """A picture of batch b, head h, each pair in its tile, as PNG, SVG or on Axes: see anymask.draw.draw_map."""
        from anymask.draw import draw_map

        draw_map(path_or_ax, self, b=b, h=h)

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
