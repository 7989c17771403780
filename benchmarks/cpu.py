"""AnyMask and torch on this machine's CPU: each result checked against float64, then timed, then its memory measured.

    python benchmarks/cpu.py [work ...] [--out FILE.jsonl]        # --help lists the works; all by default

Writes one JSON row per work and implementation, and prints a table. Implementations take turns, so that what else runs
on the machine hits them alike; a ratio holds within one run. On a busy machine set OMP_NUM_THREADS=1: two threads then
mostly wait for each other.

Peak memory is that of a fresh process: the growth of its resident set over the call (forward and backward, or building
the map), inputs made before. A dense mask and a block map count, for they exist only for the call; what loading the
libraries takes does not, for a small call came before.

benchmarks/README.md says what each field means.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask

from anymask import attention, block_map, causal, document, sliding_window
from anymask.testing import relative_error

# ||result - exact|| / ||exact|| of float32 results; rounding gives 3e-7
MAX_RELATIVE_ERROR = 2e-6
NAMES = ("out", "dq", "dk", "dv")
H, D = 8, 64
MAP_TILE = 128
RESULTS = Path(__file__).parent / "results" / "cpu.jsonl"


class Wrong(Exception):
    """A result that is further from float64 than allowed. It is not timed."""


def document_ids(S: int) -> Tensor:
    """[S] int64: 16 documents of random lengths, the same in every run."""
    cuts = torch.randperm(S - 1, generator=torch.Generator().manual_seed(0))[:15] + 1
    return torch.bucketize(torch.arange(S), cuts.sort().values, right=True)


@dataclass(frozen=True)
class Attention:
    """Forward and backward in float32, B = 1. mask says to AnyMask what visible(q_idx, kv_idx) says in plain torch."""

    work: str
    S: int
    mask: Callable[[int], Any]
    visible: Callable[[int], Callable[[Tensor, Tensor], Tensor]]
    repeats: int = 5

    def providers(self, S: int) -> dict[str, Callable[[], Callable[..., Tensor]]]:
        """Each implementation at length S: a function that prepares its mask and returns (q, k, v) -> out."""

        def ours() -> Callable[..., Tensor]:
            mask = self.mask(S)
            return lambda q, k, v: attention(q, k, v, mask=mask)

        def sdpa() -> Callable[..., Tensor]:
            index = torch.arange(S)
            dense = self.visible(S)(index[:, None], index)
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense)

        return {"anymask": ours, "sdpa_dense_mask": sdpa}

    def inputs(self, S: int) -> list[Tensor]:
        """q, k, v, dout: [1, H, S, D]."""
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(1, H, S, D, generator=generator) for _ in NAMES]

    def exact(self) -> dict[str, Tensor]:
        """out and gradients in dense float64, a strip of rows of one head at a time."""
        q, k, v, dout = (x[0].double() for x in self.inputs(self.S))
        index, visible = torch.arange(self.S), self.visible(self.S)
        exact = {name: torch.zeros(H, self.S, D, dtype=torch.float64) for name in NAMES}
        for h in range(H):
            for rows in index.split(1024):
                tile = [x.clone().requires_grad_() for x in (q[h, rows], k[h], v[h])]
                scores = (tile[0] @ tile[1].mT / math.sqrt(D)).masked_fill(~visible(rows[:, None], index), -math.inf)
                out = scores.softmax(-1) @ tile[2]
                dq, dk, dv = torch.autograd.grad(out, tile, dout[h, rows])
                exact["out"][h, rows], exact["dq"][h, rows] = out.detach(), dq
                exact["dk"][h] += dk
                exact["dv"][h] += dv
        return exact

    def check(self, exact: dict[str, Tensor], results: dict[str, Tensor]) -> dict[str, Any]:
        """Largest error of each tensor. Raises Wrong."""
        for name in NAMES:
            error = relative_error(results[name], exact[name])
            if not error <= MAX_RELATIVE_ERROR:
                raise Wrong(f"{name}: relative error {error:.1e}, allowed {MAX_RELATIVE_ERROR:.0e}")
        return {"max_error": {name: (results[name].double() - exact[name]).abs().max().item() for name in NAMES}}

    def refuse_corruption(self, exact: dict[str, Tensor]) -> None:
        """The check must notice one lost tile."""
        for name in NAMES:
            corrupted = {**exact, name: exact[name].clone()}
            corrupted[name][H - 1, self.S // 2 : self.S // 2 + 64] = 0
            try:
                self.check(exact, corrupted)
            except Wrong:
                continue
            raise AssertionError(f"{self.work}: the check accepts a lost tile of {name}")

    def run(self, function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """One forward and backward: results, and seconds of the whole and of the forward."""
        q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
        start = time.perf_counter()
        out = function(q, k, v)
        middle = time.perf_counter()
        out.backward(inputs[3])
        end = time.perf_counter()
        results = dict(zip(NAMES, (x[0].detach() for x in (out, q.grad, k.grad, v.grad)), strict=True))
        return results, {"total": end - start, "forward": middle - start}

    def use(self, impl: str, S: int) -> Callable[[], None]:
        """What the memory measurement runs, with its inputs made: the mask, forward and backward."""
        inputs = self.inputs(S)
        prepare = self.providers(S)[impl]
        return lambda: self.run(prepare(), inputs) and None

    def measure(self) -> list[dict[str, Any]]:
        exact, inputs = self.exact(), self.inputs(self.S)
        self.refuse_corruption(exact)
        functions = {impl: prepare() for impl, prepare in self.providers(self.S).items()}
        rows = {impl: {"work": self.work, "impl": impl} for impl in functions}
        for impl, function in functions.items():
            try:
                rows[impl] |= self.check(exact, self.run(function, inputs)[0])
            except Exception as error:
                rows[impl]["failed"] = f"{type(error).__name__}: {error}"
        good = [impl for impl in functions if "failed" not in rows[impl]]
        turns = [{impl: self.run(functions[impl], inputs)[1] for impl in good} for _ in range(self.repeats)]
        for impl in good:
            rows[impl] |= spread([turn[impl]["total"] for turn in turns])
            rows[impl]["forward_ms"] = round(1e3 * statistics.median(turn[impl]["forward"] for turn in turns), 2)
        return list(rows.values())


@dataclass(frozen=True)
class BlockMaps:
    """From the mask causal() & document(ids) to its block map, tiles of MAP_TILE x MAP_TILE; nothing is reused."""

    work: str
    S: int
    repeats: int = 3
    has_peer: bool = True  # create_block_mask holds S x S elements

    def providers(self, S: int) -> dict[str, Callable[[Tensor], Any]]:
        def ours(ids: Tensor) -> Any:
            return block_map(causal() & document(ids), 1, 1, S, S, device="cpu", tile=MAP_TILE)

        def flex(ids: Tensor) -> Any:
            def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
                return (q_idx >= kv_idx) & (ids[q_idx] == ids[kv_idx])

            return create_block_mask(mask, None, None, S, S, device="cpu", BLOCK_SIZE=MAP_TILE)

        return {"anymask": ours} | ({"create_block_mask": flex} if self.has_peer else {})

    def exact(self) -> Tensor:
        """Kinds of the tiles by brute force: [nQ, nKV], 0 empty, 1 partial, 2 full."""
        ids, index = document_ids(self.S), torch.arange(self.S)
        kinds = []
        for rows in index.split(MAP_TILE):
            visible = (rows[:, None] >= index) & (ids[rows, None] == ids)
            tiles = visible.view(len(rows), -1, MAP_TILE).transpose(0, 1).flatten(1)
            kinds.append(tiles.any(1).int() + tiles.all(1).int())
        return torch.stack(kinds)

    def use(self, impl: str, S: int) -> Callable[[], None]:
        ids = document_ids(S)
        build = self.providers(S)[impl]
        return lambda: build(ids) and None

    def measure(self) -> list[dict[str, Any]]:
        exact, ids = self.exact(), document_ids(self.S)
        rows = {impl: {"work": self.work, "impl": impl} for impl in self.providers(self.S)}
        seconds: dict[str, list[float]] = {impl: [] for impl in rows}
        for _ in range(self.repeats):
            for impl, build in self.providers(self.S).items():
                fresh = ids.clone()  # a new tensor: a map that is kept for the old one does not serve
                start = time.perf_counter()
                built = build(fresh)
                seconds[impl].append(time.perf_counter() - start)
                kinds = built.to_dense()[0, 0]
                # a BlockMask's to_dense() does not tell partial from full
                if not torch.equal(kinds.int(), exact if impl == "anymask" else (exact > 0).int()):
                    rows[impl]["failed"] = "Wrong: tiles differ from brute force"
        for impl, row in rows.items():
            if "failed" not in row:
                row |= {"max_error": 0, **spread(seconds[impl])}
        return list(rows.values())


def is_causal(q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def is_causal_in_document(S: int) -> Callable[[Tensor, Tensor], Tensor]:
    ids = document_ids(S)
    return lambda q_idx, kv_idx: (q_idx >= kv_idx) & (ids[q_idx] == ids[kv_idx])


CASES: tuple[Attention | BlockMaps, ...] = (
    Attention("documents_causal_8192", 8192, lambda S: causal() & document(document_ids(S)), is_causal_in_document),
    Attention("causal_4096", 4096, lambda S: causal(), lambda S: is_causal),
    Attention(
        "window_512_4096",
        4096,
        lambda S: sliding_window(511, 0),
        lambda S: lambda q_idx, kv_idx: is_causal(q_idx, kv_idx) & (q_idx - kv_idx < 512),
    ),
    BlockMaps("block_map_16384", 16384),
    BlockMaps("block_map_65536", 65536, repeats=9, has_peer=False),
)


def spread(seconds: list[float]) -> dict[str, float]:
    return {
        "median_ms": round(1e3 * statistics.median(seconds), 3),
        "min_ms": round(1e3 * min(seconds), 3),
        "max_ms": round(1e3 * max(seconds), 3),
    }


def status_mib(field: str) -> float:
    """A memory field of this process in MiB: VmRSS now, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def print_peak(case: Attention | BlockMaps, impl: str) -> None:
    """Run one implementation in this process and print the growth of its resident set in MiB."""
    case.use(impl, 256)()
    use = case.use(impl, case.S)
    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    use()
    print(status_mib("VmHWM") - before)


def peak_mib(case: Attention | BlockMaps, impl: str) -> float:
    command = [sys.executable, __file__, case.work, "--peak-of", impl]
    return round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout), 1)


def environment() -> dict[str, Any]:
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "commit": os.environ.get("ANYMASK_COMMIT", commit),
        "cpu": cpu[0].split(":")[1].strip() if cpu else "unknown",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def line_of(row: dict[str, Any], baseline: dict[str, Any]) -> str:
    start = f"{row['work']:<22} {row['impl']:<18}"
    if "failed" in row:
        return f"{start} {row['failed']}"
    error = row["max_error"]
    error = max(error.values()) if isinstance(error, dict) else error
    line = f"{start} {row['median_ms']:9.1f} ms ({row['min_ms']:.1f} to {row['max_ms']:.1f})"
    line += f" {row['peak_mib']:8.1f} MiB  max error {error:.1e}"
    if row is not baseline and "failed" not in baseline:
        speed = baseline["median_ms"] / row["median_ms"]
        memory = baseline["peak_mib"] / max(row["peak_mib"], 0.1)
        line += f"  {speed:.1f}x faster, memory 1/{memory:.1f} of {baseline['impl']}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description="AnyMask against torch on this CPU; results as JSON lines.")
    works = [case.work for case in CASES]
    parser.add_argument("works", nargs="*", metavar="work", help=f"of {', '.join(works)}; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of rows, written anew")
    parser.add_argument("--peak-of", metavar="IMPL", help="only print the memory of one implementation of one work")
    arguments = parser.parse_args()
    unknown = set(arguments.works) - set(works)
    if unknown:
        parser.error(f"no work {', '.join(sorted(unknown))}; there are {', '.join(works)}")
    cases = [case for case in CASES if not arguments.works or case.work in arguments.works]
    if arguments.peak_of:
        print_peak(cases[0], arguments.peak_of)
        return
    common = environment()
    print(json.dumps(common), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w") as file:
        for case in cases:
            rows = case.measure()
            for row in rows:
                if "failed" not in row:
                    row["peak_mib"] = peak_mib(case, row["impl"])
                file.write(json.dumps({**row, **common}) + "\n")
            for row in rows:
                print(line_of(row, rows[-1]), flush=True)


if __name__ == "__main__":
    main()
