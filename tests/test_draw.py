"""Pictures: files of each format, colours at known pairs, titles, and no memory of Sq x Skv."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

import anymask
from anymask import BlockMap, InputError, UnsupportedError, block_map, causal, from_function, sliding_window
from anymask.blocks.block_map import EMPTY, FULL, PARTIAL
from anymask.draw import SAMPLES, TILE_COLOURS, _default_tile, draw_map, draw_mask, visible_pairs
from tests.cases import MASKS, Sizes

PALE, STRONG = 1, 2


def rgb(kind: int, strength: int) -> tuple[int, ...]:
    return tuple(bytes.fromhex(TILE_COLOURS[kind][strength][1:]))


def axes_of(side: int = 512) -> tuple[Figure, Any]:
    """A figure of side x side pixels that its Axes fill."""
    figure = Figure(figsize=(side / 100, side / 100), dpi=100)
    FigureCanvasAgg(figure)
    return figure, figure.add_axes((0, 0, 1, 1))


def pixels(figure: Figure) -> torch.Tensor:
    """What is drawn: int [side, side, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    return torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(height, width, 4)[..., :3].int()


def test_colours_at_known_pairs() -> None:
    figure, ax = axes_of()
    causal().draw(ax, 128, 128)
    drawn = pixels(figure)  # 4 x 4 pixels a pair
    for (q, kv), colour in {
        (5, 3): rgb(PARTIAL, STRONG),
        (3, 5): rgb(PARTIAL, PALE),
        (100, 50): rgb(FULL, STRONG),
        (5, 100): rgb(EMPTY, PALE),
        (127, 127): rgb(PARTIAL, STRONG),
    }.items():
        assert tuple(drawn[4 * q + 1, 4 * kv + 1].tolist()) == colour, (q, kv)
    assert len(ax.collections) == 2, "the grid lines of both axes"


def test_colours_of_65536_tokens() -> None:
    figure, ax = axes_of()
    S = 65536
    ids = torch.arange(S) // 16384
    is_even = lambda b, h, q, k: (ids[q] == ids[k]) & ((q < 16384) | ((q + k) % 4 == 0))
    from_function(is_even).draw(ax, S, S)
    drawn = pixels(figure)  # a pixel is a tile
    assert tuple(drawn[20, 100].tolist()) == rgb(FULL, STRONG)
    assert tuple(drawn[300, 100].tolist()) == rgb(EMPTY, PALE)
    share = 0.75 * torch.tensor(rgb(PARTIAL, PALE)) + 0.25 * torch.tensor(rgb(PARTIAL, STRONG))
    found = drawn[140:250, 140:250].double().mean((0, 1))
    assert (found - share).abs().max() < 8, "a partial tile shows the share of its visible pairs"
    assert not ax.collections, "no grid of 512 lines"


@pytest.mark.parametrize(("Sq", "Skv"), [(128, 128), (65536, 65536), (300, 70000)])
def test_files(tmp_path: Path, Sq: int, Skv: int) -> None:
    blocks = block_map(causal() & sliding_window(2000, None), 1, 1, Sq, Skv, device="cpu")
    blocks.draw(tmp_path / "picture.png")
    blocks.draw(str(tmp_path / "picture.svg"))
    image = imread(tmp_path / "picture.png")
    height, width, _ = image.shape
    assert width == 1050 and 400 < height <= 1110
    # blue, orange and white are in it
    bytes_of = (255 * torch.tensor(image[..., :3])).round().int()
    for kind in (PARTIAL, FULL) if Sq > 128 else (EMPTY, PARTIAL):
        near = (bytes_of - torch.tensor(rgb(kind, STRONG if kind else PALE))).abs().amax(-1) < 16
        assert near.any(), TILE_COLOURS[kind]
    root = xml.etree.ElementTree.parse(tmp_path / "picture.svg").getroot()
    assert root.tag.endswith("svg")
    assert (tmp_path / "picture.svg").stat().st_size < 200_000


def test_titles_and_labels() -> None:
    _, ax = axes_of()
    causal().draw(ax, 128, 128)
    assert ax.get_title() == "50.4% of pairs visible\n36 of 64 tiles visited (16 × 16), 43.8% of the FLOPs saved"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key (kv_idx)", "query (q_idx)")
    assert ax.get_legend_handles_labels()[1] == ["empty: 28 tiles", "partial: 8 tiles", "full: 28 tiles"]
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 128), (128, 0))

    _, ax = axes_of()
    heads = torch.tensor([3, 1000])
    mask = from_function(lambda b, h, q, k: (q - k < heads[h]) & (k - q < heads[h] + b))
    mask.draw(ax, 64, 64, B=2, H=2, b=1, h=1, tile=(64, 32))
    assert ax.get_title() == (
        "batch 1 of 2, head 1 of 2, 100.0% of pairs visible\n2 of 2 tiles visited (64 × 32), 0.0% of the FLOPs saved"
    )
    _, ax = axes_of()
    mask.draw(ax, 64, 64, B=2, H=2, tile=32)
    assert ax.get_title().startswith("batch 0 of 2, head 0 of 2, 7.")

    _, ax = axes_of()
    anymask.sparse_strided(64).draw(ax, 65536, 65536)
    assert ax.get_title().startswith("about 0.9% of pairs visible\n131,328 of 262,144 tiles")


def test_rows_of_a_map_keep_their_numbers() -> None:
    figure, ax = axes_of()
    block_map(causal(), 1, 1, 128, 128, device="cpu", tile=16).rows(64, 128).draw(ax)
    assert ax.get_ylim() == (128, 64)
    drawn = pixels(figure)  # 4 pixels a key, 8 a query
    assert tuple(drawn[8 * 3 + 1, 4 * 66 + 1].tolist()) == rgb(PARTIAL, STRONG)
    assert tuple(drawn[8 * 3 + 1, 4 * 69 + 1].tolist()) == rgb(PARTIAL, PALE)


def test_a_choice_of_tiles() -> None:
    figure, ax = axes_of(128)
    blocks = BlockMap.from_dense(torch.eye(4, dtype=torch.bool), tile=32)
    blocks.draw(ax)
    drawn = pixels(figure)
    assert tuple(drawn[40, 40].tolist()) == rgb(FULL, STRONG)
    assert tuple(drawn[40, 10].tolist()) == rgb(EMPTY, PALE)


@pytest.mark.parametrize("name", MASKS)
def test_visible_pairs_are_those_of_brute_force(name: str) -> None:
    B, H, Sq, Skv = 2, 4, 75, 52
    mask = from_function(MASKS[name](Sizes(B, H, Sq, Skv)))
    blocks = block_map(mask, B, H, Sq, Skv, device="cpu", tile=(16, 32))
    dense = mask.to_dense(B, H, Sq, Skv)
    for b in range(blocks.shape[0]):
        for h in range(blocks.shape[1]):
            assert visible_pairs(blocks, b, h) == (int(dense[b, h].sum()), True)


def test_visible_pairs_of_a_large_map_are_estimated() -> None:
    S = 1000
    table = torch.rand(S, S, generator=torch.Generator().manual_seed(0)) < 0.3
    blocks = block_map(anymask.mask_from(table) | causal(), 1, 1, S, S, device="cpu", tile=64)
    exact, is_exact = visible_pairs(blocks)
    assert is_exact and exact == int((table | torch.ones(S, S, dtype=torch.bool).tril()).sum())
    about, is_exact = visible_pairs(blocks, most=1000)
    assert not is_exact
    assert abs(about - exact) < 5 * 0.5 * S * S / SAMPLES**0.5
    assert visible_pairs(blocks, most=1000)[0] == about, "the same in every run"


@pytest.mark.parametrize(
    ("length", "tile"), [(1, 16), (128, 16), (512, 64), (1024, 128), (131072, 128), (1 << 20, 1024)]
)
def test_default_tile(length: int, tile: int) -> None:
    assert _default_tile(length) == tile


def test_memory_does_not_grow_with_the_matrix(tmp_path: Path) -> None:
    script = f"""
import resource, torch, anymask
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
S = 65536
mask = anymask.causal() & anymask.document(torch.arange(S) // 5000)
assert "matplotlib" not in __import__("sys").modules
mask.draw({str(tmp_path / "a.png")!r}, 128, 128)
before = most()
mask.draw({str(tmp_path / "a.png")!r}, S, S)
print((most() - before) // 1024)
"""
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert int(printed) < 400  # MiB; the dense mask alone has 4,096


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'anymask\[draw\]'"):
        causal().draw(tmp_path / "a.png", 16, 16)


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    blocks = block_map(causal(), 1, 1, 32, 32, device="cpu", tile=16)
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        blocks.draw(tmp_path / "picture.jpeg2000")
    with pytest.raises(InputError, match="got a int"):
        draw_map(3, blocks)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no batch 1, head 0"):
        causal().draw(tmp_path / "a.png", 16, 16, b=1)
    with pytest.raises(InputError, match="nothing to draw"):
        draw_mask(tmp_path / "a.png", causal(), 0, 16)
    with pytest.raises(InputError, match="does not know its mask"):
        draw_map(tmp_path / "a.png", BlockMap(blocks.kinds, 32, 32, (16, 16)))
    wrong = BlockMap.from_indices(torch.tensor([[7]]), torch.tensor([1]), Sq=16, Skv=32, tile=16)
    with pytest.raises(InputError, match="outside"):
        wrong.draw(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
