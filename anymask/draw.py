"""Pictures of masks. Needs matplotlib (`pip install 'anymask[draw]'`), which is imported on the first picture."""

from __future__ import annotations

from os import PathLike

import torch

# Okabe and Ito's colours, which colour-blind readers can tell apart. A kind: (name, hidden pair, visible pair).
TILE_COLOURS = {
    0: ("empty", "#ffffff", "#000000"),
    1: ("partial", "#fae6c0", "#e69f00"),
    2: ("full", "#cfe6f3", "#0072b2"),
}


def picture(path: str | PathLike[str], dense: torch.Tensor, kinds: torch.Tensor, tile: int | tuple[int, int]) -> None:
    """Save a PNG of one mask: each visible pair, coloured by the kind of tile it lies in.

    dense: [Sq, Skv], bool, True where a query sees a key.  kinds: [nQ, nKV], int8, 0 empty, 1 partial, 2 full.
    tile: the tile's size, one int or (q, kv).  A visible pair in an empty tile, which is a wrong map, is drawn black.
    """
    import matplotlib.colors
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    tile_q, tile_kv = (tile, tile) if isinstance(tile, int) else tile
    num_q, num_kv = dense.shape
    dense, kinds = dense.cpu(), kinds.cpu().long()
    palette = torch.tensor([[matplotlib.colors.to_rgb(c) for c in colours[1:]] for colours in TILE_COLOURS.values()])
    # [Sq, Skv]
    kind_of_pair = kinds.repeat_interleave(tile_q, 0)[:num_q].repeat_interleave(tile_kv, 1)[:, :num_kv]
    # [Sq, Skv, 3]
    image = palette[kind_of_pair, dense.long()]

    figure = Figure(figsize=(7, 7.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(image.numpy(), extent=(0, num_kv, num_q, 0), aspect="auto", interpolation="antialiased")
    for x in range(0, num_kv + 1, tile_kv):
        axes.axvline(x, color="#b0b0b0", linewidth=0.4)
    for y in range(0, num_q + 1, tile_q):
        axes.axhline(y, color="#b0b0b0", linewidth=0.4)
    axes.set_xlabel("key (kv_idx)")
    axes.set_ylabel("query (q_idx)")
    visited = int((kinds > 0).sum())
    axes.set_title(
        f"density {dense.float().mean().item():.1%} of pairs, {visited} of {kinds.numel()} tiles visited "
        f"({tile_q} × {tile_kv})"
    )
    counts = {kind: int((kinds == kind).sum()) for kind in TILE_COLOURS}
    patches = [
        Patch(facecolor=visible if kind else hidden, edgecolor="#b0b0b0", label=f"{name}: {counts[kind]} tiles")
        for kind, (name, hidden, visible) in TILE_COLOURS.items()
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)
