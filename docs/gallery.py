"""Make the gallery: docs/gallery.md and docs/gallery/*.png, every mask of tests/cases.py with its code and its picture.

    python docs/gallery.py        # or: make gallery; on the GPU where there is one, else on the CPU; some minutes

Each mask is checked against the reference and then timed against dense causal attention, PyTorch's SDPA with
is_causal=True. The two take turns, so that what else runs on the machine hits them alike. A result that is further from
the reference than allowed ends the program, and no page is written.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for tests.cases

from anymask import Mask, attention, block_map, causal, from_function  # noqa: E402
from anymask.kernels.plan import default_tile  # noqa: E402
from anymask.testing import relative_error  # noqa: E402
from tests.cases import MASKS, Sizes  # noqa: E402

H, S, D = 8, 4096, 64
DRAWN, DRAWN_TILE = 192, 16
STRIP = 64  # rows that are checked at a time
ROUNDS = 5
IS_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if IS_GPU else ("cpu", torch.float32)
CALLS = 20 if IS_GPU else 1  # of one timing
# ||out - exact|| / ||exact||: rounding the output alone gives 2e-3 in bfloat16
MAX_ERROR = 5e-3 if IS_GPU else 2e-6
FOLDER = ROOT / "docs" / "gallery"

HEAD = """\
# Gallery

Every mask of `tests/cases.py`, on which each stage of AnyMask is tested. `make gallery` makes this page anew.

The pictures show {drawn} queries (down) and keys (right), of head 0, in tiles of {drawn_tile} × {drawn_tile}. Orange: a
partial tile, strong where the query sees the key, pale where not. Blue: a full tile. White: an empty one, which is
skipped. `mask.draw("picture.png", {drawn}, {drawn})` draws one.

The code makes the mask for given sizes: `z.B` sequences, `z.H` heads, `z.Sq` queries and `z.Skv` keys, `z.S` being the
longer; `z.randint(low, high, *shape)` and `z.rand(*shape)` are random tensors, `packed_ids` the ascending ids of 4
documents of random lengths. The numbers suit the tests' small sizes: most masks get sparser as the sequence grows.

Tiles and times are for the forward of {length:,} tokens, {heads} heads of {head_dim}, {dtype}, in {tile} tiles,
the block map made before. Measured on {device}, torch {torch}, {date}: the best of {rounds}.
Dense causal attention is `scaled_dot_product_attention(q, k, v, is_causal=True)`, which does half of all pairs,
whatever the mask hides of them; it was timed beside each mask and took {fastest:.2f} to {slowest:.2f} ms. Before a mask
was timed, {checked} rows of its result were compared with the float64 reference: the relative error was at
most {error:.0e}.

{slower}

| mask | tiles visited | time | speed-up over dense causal attention |
|---|---:|---:|---:|
{table}
"""


@dataclass(frozen=True)
class Row:
    """What was measured of a mask. seconds, dense: of this mask and of dense causal attention in turns."""

    name: str
    density: float
    error: float
    seconds: float
    dense: float

    @property
    def speed(self) -> float:
        return self.dense / self.seconds

    @property
    def words(self) -> str:
        return f"{self.speed:.1f} ×" if self.speed >= 1 else f"{self.speed:.2f} × (slower)"


def inputs() -> list[Tensor]:
    """q, k, v: [1, H, S, D]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, H, S, D, generator=generator).to(DEVICE, DTYPE) for _ in range(3)]


def check(name: str, out: Tensor, mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The relative error of the first, middle and last STRIP rows of out against the reference, which must be small."""
    strips = [slice(start, start + STRIP) for start in (0, S // 2, S - STRIP)]
    keys, values = k.double(), v.double()
    exact = [
        attention(q[:, :, rows].double(), keys, values, mask=mask.shift(q=rows.start), backend="reference")
        for rows in strips
    ]
    error = relative_error(torch.cat([out[:, :, rows] for rows in strips], dim=2), torch.cat(exact, dim=2))
    if not error <= MAX_ERROR:
        raise SystemExit(f"{name}: relative error {error:.1e}, allowed {MAX_ERROR:.0e}")
    return error


def seconds(function: Callable[[], Tensor]) -> float:
    """Of one call."""
    if IS_GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        function()
    if IS_GPU:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / CALLS


def measure(name: str, mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> Row:
    blocks = block_map(mask, 1, H, S, S, device=DEVICE, tile=default_tile(DEVICE, S))
    ours = lambda: attention(q, k, v, block_map=blocks)
    dense = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    error = check(name, ours(), mask, q, k, v)
    turns = [(seconds(ours), seconds(dense)) for _ in range(ROUNDS)]
    return Row(name, blocks.density(), error, *map(min, zip(*turns, strict=True)))


def draw(name: str, mask: Mask) -> None:
    """Two pixels a position, so that every pair is as sharp as the next."""
    side, left, bottom = 2 * DRAWN, 64, 48
    width, height = side + left + 20, side + bottom + 10
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    mask.draw(axes, DRAWN, DRAWN, H=H, tile=DRAWN_TILE)
    axes.set_title("")
    figure.savefig(FOLDER / f"{name}.png", metadata={"Software": None})


def code_of(make: Callable[[Sizes], object]) -> str:
    """A case's source without its decorator."""
    lines = textwrap.dedent(inspect.getsource(make)).splitlines()
    return "\n".join(lines[next(i for i, line in enumerate(lines) if line.startswith("def ")) :])


def device_name() -> str:
    if IS_GPU:
        return f"one {torch.cuda.get_device_name()}"
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    num_threads = torch.get_num_threads()
    return f"{num_threads} thread{'s' * (num_threads > 1)} of a CPU ({model})"


def page(rows: list[Row]) -> str:
    dense = [1e3 * row.dense for row in rows]
    slow = [f"[{row.name}](#{row.name})" for row in rows if row.speed < 1]
    head = HEAD.format(
        drawn=DRAWN,
        drawn_tile=DRAWN_TILE,
        length=S,
        heads=H,
        head_dim=D,
        dtype=str(DTYPE).removeprefix("torch."),
        tile=" × ".join(map(str, default_tile(DEVICE, S))),
        device=device_name(),
        torch=torch.__version__,
        date=time.strftime("%Y-%m-%d"),
        rounds=ROUNDS,
        fastest=min(dense),
        slowest=max(dense),
        checked=3 * STRIP,
        error=max(row.error for row in rows),
        slower=f"Slower than dense causal attention, {len(slow)} of {len(rows)}: {', '.join(slow) or 'none'}.",
        table="\n".join(
            f"| [{row.name}](#{row.name}) | {row.density:.1%} | {1e3 * row.seconds:.2f} ms | {row.words} |"
            for row in rows
        ),
    )
    sections = [
        f"## {row.name}\n\n![{row.name}](gallery/{row.name}.png)\n\n```python\n{code_of(MASKS[row.name])}\n```\n\n"
        f"{row.density:.1%} of the tiles visited, {1e3 * row.seconds:.2f} ms, {row.words}\n"
        for row in rows
    ]
    return "\n".join([head, *sections])


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    q, k, v = inputs()
    check("SDPA", F.scaled_dot_product_attention(q, k, v, is_causal=True), causal(), q, k, v)
    rows = []
    for name, make in MASKS.items():
        rows.append(measure(name, from_function(make(Sizes(1, H, S, S, DEVICE))), q, k, v))
        print(f"{name:<32} {rows[-1].density:6.1%} {1e3 * rows[-1].seconds:8.2f} ms  {rows[-1].words}", flush=True)
    for old in FOLDER.glob("*.png"):
        old.unlink()
    for name, make in MASKS.items():
        draw(name, from_function(make(Sizes(1, H, DRAWN, DRAWN))))
    (ROOT / "docs" / "gallery.md").write_text(page(rows))


if __name__ == "__main__":
    main()
