"""Pictures of masks and block maps. Needs matplotlib (`pip install 'anymask[draw]'`), imported when a picture is drawn.

A pair of query and key has the colour of its tile, strong where the query sees the key and pale where not; over that
lies the grid of the tiles. An axis of more than PIXELS positions is drawn by samples: a pixel then stands for several
pairs and takes the mean colour of POINTS x POINTS of them, so that its strength is the share of visible pairs. Nothing
of the size Sq x Skv is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymask.api import block_map
from anymask.blocks.block_map import EMPTY, FULL, PARTIAL, BlockMap
from anymask.errors import InputError, UnsupportedError
from anymask.expr.evaluate import evaluate
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import SCORE_TEXT
from anymask.masks import Mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart. A kind: (name, hidden pair, visible pair). A
# visible pair in an empty tile would be a wrong map, and is drawn black.
TILE_COLOURS = {
    EMPTY: ("empty", "#ffffff", "#000000"),
    PARTIAL: ("partial", "#fae6c0", "#e69f00"),
    FULL: ("full", "#cfe6f3", "#0072b2"),
}
GREY = "#808080"
PIXELS = 2048  # along an axis, at most
POINTS = 2  # samples of a pixel along an axis, where it stands for several positions
CHUNK = 1 << 20  # pairs evaluated at a time
MOST_COUNTED = 1 << 25  # pairs of partial tiles that are counted one by one; of more, SAMPLES random ones
SAMPLES = 1 << 20
LINE_SPACE, TICK_SPACE = 3, 50  # least between grid lines and between ticks, in points of 1/72 inch


def draw_mask(
    path_or_ax: str | PathLike[str] | Axes,
    mask: Mask,
    Sq: int,
    Skv: int,
    *,
    B: int = 1,
    H: int = 1,
    b: int = 0,
    h: int = 0,
    tile: int | tuple[int, int] | None = None,
) -> None:
    """Draw what batch b of B, head h of H of a mask shows to Sq queries of Skv keys: see draw_map.

    tile: positions per tile, one number or (q, kv); None: a power of two from 16 to 128, about an eighth of the longer
    length, and beyond 128 only to stay within 1,024 tiles.
    """
    if not (0 <= b < B and 0 <= h < H):
        raise InputError(f"there is no batch {b}, head {h} with {B=} and {H=}")
    captures = mask.trace(None).bindings.captures
    device = captures[0].device if captures else "cpu"
    tile = tile or _default_tile(max(Sq, Skv))
    draw_map(path_or_ax, block_map(mask, B, H, Sq, Skv, device=device, tile=tile), b=b, h=h)


def draw_map(path_or_ax: str | PathLike[str] | Axes, blocks: BlockMap, *, b: int = 0, h: int = 0) -> None:
    """Draw the tiles of batch b, head h of a map, and which of their pairs are visible.

    path_or_ax: a file to write, in the format of its suffix (.png, .svg), or the matplotlib Axes to draw into. Axes get
    the kinds of tiles as labels, which ax.legend() shows.
    The title says which share of the pairs is visible ("about" where that is estimated), how many tiles are visited,
    and which part of the attention's FLOPs the others save.
    Waits for the map's device. Raises InputError for an empty map, UnsupportedError without matplotlib.
    """
    B, H, nQ, nKV = blocks.shape
    b, h = (i if size > 1 else 0 for i, size in ((b, B), (h, H)))
    if not (0 <= b < B and 0 <= h < H and nQ and nKV):
        raise InputError(f"there is nothing to draw of batch {b}, head {h} in {blocks!r} for {blocks.Sq} queries")
    if not blocks.text:
        raise InputError(
            "this map does not know its mask: make maps by block_map(), BlockMap.from_dense or from_indices"
        )
    blocks.raise_doubts()
    try:
        from matplotlib.axes import Axes
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("pictures are drawn with matplotlib: pip install 'anymask[draw]'") from None
    if isinstance(path_or_ax, Axes):
        _draw(path_or_ax, blocks, b, h)
        return
    if not isinstance(path_or_ax, str | PathLike):
        raise InputError(f"a picture goes to a path or to matplotlib Axes, got a {type(path_or_ax).__name__}")
    # as wide as high for as many queries as keys; fewer queries make it lower
    figure = Figure(figsize=(7, 1.4 + 6 * min(1, max(blocks.Sq / blocks.Skv, 1 / 4))), dpi=150, layout="constrained")
    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    if Path(path_or_ax).suffix[1:].lower() not in formats:
        raise InputError(f"the suffix of {fspath(path_or_ax)!r} should say the picture's format: .png or .svg")
    _draw(figure.add_subplot(), blocks, b, h)
    figure.legend(loc="outside lower center", ncols=len(TILE_COLOURS), frameon=False)
    figure.savefig(path_or_ax)


def visible_pairs(blocks: BlockMap, b: int = 0, h: int = 0, most: int = MOST_COUNTED) -> tuple[int, bool]:
    """How many pairs of batch b, head h of a map its mask shows, and whether that number is exact.

    Only partial tiles are looked into. If they have more than `most` pairs, it is an estimate by SAMPLES random ones of
    them, the same in every run: its standard deviation is below 0.05% of the pairs in partial tiles.
    """
    kinds = blocks.kinds[b, h]
    pairs = pairs_of_tiles(blocks)
    in_full, in_partial = (int(pairs[kinds == kind].sum()) for kind in (FULL, PARTIAL))
    points = _all_points if in_partial <= most else _some_points
    looked = seen = 0
    for q_idx, kv_idx in points(blocks, *(kinds == PARTIAL).nonzero(as_tuple=True)):
        exists = (q_idx < blocks.Sq) & (kv_idx < blocks.Skv)
        looked += int(exists.sum())
        seen += int((_visible(blocks, b, h, q_idx, kv_idx) & exists).sum())
    return in_full + (in_partial * seen // looked if looked else 0), in_partial <= most


def pairs_of_tiles(blocks: BlockMap) -> Tensor:
    """How many pairs each tile has, int64 [nQ, nKV]: fewer in the last row and column."""
    _, _, nQ, nKV = blocks.shape
    (tile_q, tile_kv), device = blocks.tile, blocks.device
    queries = (blocks.Sq - torch.arange(nQ, device=device) * tile_q).clamp(max=tile_q)
    keys = (blocks.Skv - torch.arange(nKV, device=device) * tile_kv).clamp(max=tile_kv)
    return queries[:, None] * keys


def _all_points(blocks: BlockMap, q_block: Tensor, kv_block: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """q_idx [tiles, tile_q, 1] and kv_idx [tiles, 1, tile_kv] of these tiles, some tiles at a time."""
    (tile_q, tile_kv), device = blocks.tile, blocks.device
    num_tiles = max(CHUNK // (tile_q * tile_kv), 1)
    for q, kv in zip(q_block.split(num_tiles), kv_block.split(num_tiles), strict=True):
        q_idx = q[:, None] * tile_q + torch.arange(tile_q, device=device)
        kv_idx = kv[:, None] * tile_kv + torch.arange(tile_kv, device=device)
        yield q_idx[:, :, None], kv_idx[:, None, :]


def _some_points(blocks: BlockMap, q_block: Tensor, kv_block: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """q_idx and kv_idx, both [SAMPLES], of random pairs in these tiles."""
    generator = torch.Generator().manual_seed(0)
    sizes = (len(q_block), *blocks.tile)
    i, q, kv = (torch.randint(size, (SAMPLES,), generator=generator).to(blocks.device) for size in sizes)
    yield q_block[i] * blocks.tile[0] + q, kv_block[i] * blocks.tile[1] + kv


def _visible(blocks: BlockMap, b: int, h: int, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Whether the map's mask shows these pairs: bool, in their common shape."""
    mask = Mods.of(text_of(blocks.text, SCORE_TEXT), blocks.bindings.ints, blocks.bindings.floats).mask
    batch, head = (torch.tensor(i, device=blocks.device) for i in (b, h))
    visible = evaluate(mask, blocks.bindings, b=batch, h=head, q_idx=q_idx, kv_idx=kv_idx)
    return visible.expand(torch.broadcast_shapes(q_idx.shape, kv_idx.shape))


def _draw(ax: Axes, blocks: BlockMap, b: int, h: int) -> None:
    top, bottom = blocks.q_start, blocks.q_start + blocks.Sq
    ax.imshow(_image(blocks, b, h), extent=(0, blocks.Skv, bottom, top), aspect="auto", interpolation="antialiased")
    point = ax.figure.dpi / 72
    box = ax.get_window_extent()
    for axis, start, end, tile, size, draw_lines, ends in (
        (ax.xaxis, 0, blocks.Skv, blocks.tile[1], box.width / point, ax.vlines, (top, bottom)),
        (ax.yaxis, top, bottom, blocks.tile[0], box.height / point, ax.hlines, (0, blocks.Skv)),
    ):
        num = -(-(end - start) // tile)
        if size >= LINE_SPACE * num:
            draw_lines(range(start + tile, end, tile), *ends, color=GREY, linewidth=0.4)
        tiles_a_tick = 2 ** math.ceil(math.log2(max(num * TICK_SPACE / size, 1)))
        axis.set_ticks(range(start, end + 1, tile * tiles_a_tick))
        axis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("key (kv_idx)")
    ax.set_ylabel("query (q_idx)")
    ax.set_title(_title(blocks, b, h), fontsize=10)
    for kind, (name, hidden, visible) in TILE_COLOURS.items():
        num = int((blocks.kinds[b, h] == kind).sum())
        colour = visible if kind else hidden
        ax.plot([], [], "s", color=colour, markeredgecolor=GREY, label=f"{name}: {num:,} tile{'s' * (num != 1)}")
    ax.set(xlim=(0, blocks.Skv), ylim=(bottom, top))


def _title(blocks: BlockMap, b: int, h: int) -> str:
    B, H, _, _ = blocks.shape
    of = [f"batch {b} of {B}"] * (B > 1) + [f"head {h} of {H}"] * (H > 1)
    count, is_exact = visible_pairs(blocks, b, h)
    share = f"{'' if is_exact else 'about '}{count / (blocks.Sq * blocks.Skv):.1%} of pairs visible"
    visited, num = int((blocks.kinds[b, h] != EMPTY).sum()), blocks.kinds[b, h].numel()
    tiles = f"{visited:,} of {num:,} tiles visited ({blocks.tile[0]} × {blocks.tile[1]})"
    return f"{', '.join([*of, share])}\n{tiles}, {1 - visited / num:.1%} of the FLOPs saved"


def _image(blocks: BlockMap, b: int, h: int) -> Any:
    """The pixels: a NumPy array [rows, columns, 3] of bytes, at most PIXELS either way."""
    colours_of_kinds = [colour for _, *colours in TILE_COLOURS.values() for colour in colours]
    palette = torch.tensor([list(bytes.fromhex(colour[1:])) for colour in colours_of_kinds], dtype=torch.float32)
    rows, columns = _positions(blocks.Sq, 0), _positions(blocks.Skv, 1)
    kv_idx = columns.flatten()
    # [nQ, samples]
    kinds = blocks.kinds[b, h].cpu()[:, kv_idx // blocks.tile[1]]
    strips = []
    for strip in rows.split(max(CHUNK // (rows.shape[1] * len(kv_idx)), 1)):
        q_idx = strip.flatten()
        visible = _visible(blocks, b, h, q_idx[:, None].to(blocks.device), kv_idx[None].to(blocks.device)).cpu()
        colours = palette[kinds[q_idx // blocks.tile[0]] * 2 + visible.long()]
        # [rows, points, columns, points, 3] -> [rows, columns, 3]
        colours = colours.view(*strip.shape, *columns.shape, 3).mean((1, 3))
        strips.append(colours.round().to(torch.uint8))
    return torch.cat(strips).numpy()


def _positions(length: int, seed: int) -> Tensor:
    """The positions that the pixels along an axis show, [pixels, points]: all, or one at random in each equal part."""
    if length <= PIXELS:
        return torch.arange(length)[:, None]
    num = PIXELS * POINTS
    place = torch.arange(num) + torch.rand(num, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (place * length / num).long().clamp(max=length - 1).view(PIXELS, POINTS)


def _default_tile(length: int) -> int:
    wanted = max(min(length // 8, 128), length // 1024, 16)
    return 1 << (wanted - 1).bit_length()
