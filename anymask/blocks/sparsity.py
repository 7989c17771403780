"""How much of a mask of indices alone its tiles hold, known on the host before there is a map."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from anymask.expr.bindings import Bindings
from anymask.expr.interval import Grid, Tiles, bounds_over
from anymask.expr.ir import Expr

SMALL = 64  # positions of a tile along each axis; a big one has twice as many
MOST_ROWS, MOST_HEADS = 16, 4  # big rows, and batches or heads, that are looked at


class Sparsity(NamedTuple):
    """small, big: the keys that a query's row of tiles holds on average, in tiles of 64 x 64 and of 128 x 128."""

    small: float
    big: float


def sparsity_of(mask: Expr, bindings: Bindings, B: int, H: int, Sq: int, Skv: int) -> Sparsity:
    """Of a mask that reads no tensor, from the bounds of some of its rows of tiles, evenly spread over the queries.

    A tile that bounds leave undecided counts as visited. Takes 0.1 to 3 ms, once for a mask, its numbers and sizes (2
    cores, up to 65,536 tokens, 2026-11-23).
    """
    return _sparsity(mask, bindings.ints, bindings.floats, B, H, Sq, Skv)


@functools.lru_cache(maxsize=1024)
def _sparsity(
    mask: Expr, ints: tuple[int, ...], floats: tuple[float, ...], B: int, H: int, Sq: int, Skv: int
) -> Sparsity:
    device = torch.device("cpu")
    grid = Grid(B, H, Sq, Skv, (SMALL, SMALL), device)
    _, _, num_q, num_kv = grid.shape
    num_big = (num_q + 1) // 2
    rows, b, h = (_spread(num, most) for num, most in ((num_big, MOST_ROWS), (B, MOST_HEADS), (H, MOST_HEADS)))
    q_block = torch.stack((rows * 2, rows * 2 + 1), 1).flatten()
    kv_block = torch.arange(num_kv + num_kv % 2, device=device)
    exists = (q_block < num_q)[:, None] & (kv_block < num_kv)
    # a block past the end stands for the last one
    tiles = Tiles(
        b[:, None, None, None],
        h[:, None, None],
        q_block.clamp(max=num_q - 1)[:, None],
        kv_block.clamp(max=num_kv - 1),
    )
    _, may_show = bounds_over(mask, Bindings((), ints, floats), grid.points(tiles, SMALL, SMALL), device)
    visited = may_show.expand(len(b), len(h), *exists.shape) & exists
    by_big = visited.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).any(5).any(3)
    num_small = int((q_block < num_q).sum()) * len(b) * len(h)
    return Sparsity(_keys(visited, SMALL, num_small), _keys(by_big, 2 * SMALL, by_big[..., 0].numel()))


def _spread(num: int, most: int) -> Tensor:
    """Up to so many of the numbers below num, evenly."""
    return torch.tensor([i * (num - 1) // max(min(num, most) - 1, 1) for i in range(min(num, most))], device="cpu")


def _keys(visited: Tensor, size: int, num_rows: int) -> float:
    return int(visited.sum()) * size / num_rows
