"""Walk: a block map as one kernel reads it, row by row, in its own tile and direction."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

WORD = 32  # tiles a word


class Walk(NamedTuple):
    """The tiles that each row visits. Rows are Q tiles and columns KV tiles, or the other way round for dK and dV.

    words  [B, H, rows, 2, W] int64: the masked (0) and the full (1) tiles. Low half: bit i stands for column c + i;
           high half: c, a multiple of 32. Only words with a bit, packed to the front, ascending; what follows them is
           of no meaning.  W: columns / 32, rounded up
    rows   [B, H, rows, 3] int32: how many tiles a row has masked, how many full; and, apart from that, the number of
           the row that comes i-th by its work, most first

    In a masked tile the mask must be applied: in PARTIAL ones, and in FULL ones that hang over the end of the keys.
    """

    words: Tensor
    rows: Tensor
