"""What block maps cost on one NVIDIA GPU, each checked against brute force first.

    python benchmarks/maps.py [--only REGEX] [--out FILE.jsonl]

One JSON row per mask and implementation. `anymask`: the map and the walks that a forward and a backward read (D = 128,
bf16). `flex`: FlexAttention's create_block_mask, compiled, in a process of its own.

| field | meaning |
|---|---|
| `gpu_us` | a CUDA graph of the whole build, replayed: GPU time with the gaps between launches |
| `wall_us` | from the call to the end of the GPU's work, no CUDA graph, nothing kept from before |
| `bytes` | what the map and its walks hold; `peak_extra_mib`: the most that was held while building |
| `read_us` | one read of the mask's tensor by torch.sum, where the mask is one |
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from gpu import document_ids, document_lengths, environment, peak_mib, reason
from torch.nn.attention.flex_attention import create_block_mask

from anymask import Mask, block_diffusion, block_map, causal, clear_cache, document, mask_from, neighbourhood, tree
from anymask.blocks.block_map import BlockMap
from anymask.blocks.build import tile_kinds
from anymask.blocks.walk import Walk
from anymask.expr.bindings import Bindings
from anymask.expr.interval import Grid
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import SCORE_TEXT
from anymask.kernels import map_launch
from anymask.kernels.plan import Plan, arch_of, choose, default_tile
from anymask.problem import Problem

DEVICE = "cuda"


@dataclass(frozen=True)
class Work:
    """A mask over S x S. reads: a tensor that any exact map must read whole. flex: the mask as the peer is given it."""

    name: str
    S: int
    mask: Mask
    reads: torch.Tensor | None = None
    flex: Callable | None = None


def documents(S: int) -> Work:
    ids = document_ids(document_lengths(S))
    return Work(f"documents_causal_S{S}", S, causal() & document(ids))


def random_tree(num_nodes: int) -> Work:
    generator = torch.Generator().manual_seed(0)
    parents = (torch.rand(num_nodes, generator=generator) * torch.arange(num_nodes)).long() - 1
    parents = parents.to(DEVICE)
    mask = tree(parents)
    return Work(f"tree_S{num_nodes}", num_nodes, mask, flex=mask.function)


def image(side: int, window: int) -> Work:
    mask = neighbourhood((side, side), window)
    return Work(f"neighbourhood_2d_{side}x{side}", side * side, mask, flex=mask.function)


def diffusion(length: int, block_size: int) -> Work:
    def sees(b, h, q_idx, kv_idx):  # Inductor cannot compile the comparison of two booleans in block_diffusion
        q_is_clean, kv_is_clean = q_idx >= length, kv_idx >= length
        q_block, kv_block = q_idx % length // block_size, kv_idx % length // block_size
        is_same = (q_is_clean & kv_is_clean) | (~q_is_clean & ~kv_is_clean)
        return (is_same & (q_block == kv_block)) | (kv_is_clean & (kv_block < q_block))

    return Work(f"block_diffusion_S{2 * length}", 2 * length, block_diffusion(length, block_size), flex=sees)


def opaque(S: int) -> Work:
    tensor = torch.rand(S, S, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)) < 0.5
    tensor[: S // 2, : S // 4] = False
    tensor[S // 2 :, : S // 4] = True
    return Work(f"opaque_S{S}", S, mask_from(tensor), tensor)


WORKS: dict[str, Callable[[], Work]] = {
    "documents_64k": lambda: documents(65536),
    "documents_1m": lambda: documents(1048576),
    "neighbourhood": lambda: image(256, 13),
    "diffusion": lambda: diffusion(16384, 32),
    "tree": lambda: random_tree(8192),
    "opaque": lambda: opaque(32768),
}


def plan_of(work: Work) -> Plan:
    """Of attention with this mask, D = 128, bf16."""
    program = work.mask.trace(torch.device(DEVICE, 0))
    bindings = program.mask_bindings
    mods = Mods.of(text_of(program.mask, SCORE_TEXT), bindings.ints, bindings.floats)
    q = torch.empty(1, 1, work.S, 128, dtype=torch.bfloat16, device="meta")
    return choose(Problem.of(q, q, q), mods, default_tile(DEVICE, work.S), arch=arch_of(torch.device("cuda", 0)))


def build(work: Work, plan: Plan) -> tuple[BlockMap, list[Walk]]:
    """The map, and the walks of a forward and a backward."""
    blocks = block_map(work.mask, 1, 1, work.S, work.S, device=DEVICE, tile=default_tile(DEVICE, work.S))
    walks = {id(walk): walk for walk, _ in map_launch.walks(blocks, plan).values()}
    return blocks, list(walks.values())


def brute_force(work: Work, tile: tuple[int, int]) -> torch.Tensor:
    """Kinds from every pair, [1, 1, nQ, nKV]; beyond 65,536 tokens from the torch stages on a CPU."""
    if work.S > 65536:
        program = work.mask.trace(None)
        bindings = Bindings(tuple(x.cpu() for x in program.bindings.captures), program.bindings.ints)
        mods = Mods.of(text_of(program.mask, SCORE_TEXT), bindings.ints, bindings.floats)
        return tile_kinds(mods.mask, bindings, Grid(1, 1, work.S, work.S, tile, torch.device("cpu"))).to(DEVICE)
    idx = torch.arange(work.S, device=DEVICE)
    zero = torch.zeros((), dtype=torch.int64, device=DEVICE)
    rows = []
    for start in range(0, work.S, tile[0]):
        # [tile_q, nKV, tile_kv]
        pairs = work.mask(zero, zero, idx[start : start + tile[0], None], idx).unflatten(1, (-1, tile[1]))
        rows.append(pairs.any(2).any(0).to(torch.int8) + pairs.all(2).all(0).to(torch.int8))
    return torch.stack(rows)[None, None]


def wall_us(make: Callable[[], Any], prepare: Callable[[], Any], repeats: int = 30) -> list[float]:
    def once() -> float:
        prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        make()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6

    awake = time.perf_counter() + 0.3
    while time.perf_counter() < awake:  # clocks rise while something runs
        once()
    return sorted(once() for _ in range(repeats))


def graph_us(make: Callable[[], Any], repeats: int = 20) -> list[float]:
    """Microseconds of one replay of a CUDA graph that holds the call."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        make()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        make()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)


def run(work: Work) -> dict:
    row: dict[str, Any] = {"work": work.name, "impl": "anymask"}
    plan = plan_of(work)
    start = time.perf_counter()
    blocks, walks = build(work, plan)
    torch.cuda.synchronize()
    row["first_s"] = round(time.perf_counter() - start, 3)
    if not torch.equal(blocks.to_dense(), brute_force(work, blocks.tile)):
        return {**row, "failed": "the map differs from brute force"}
    row["tile"], row["density"] = list(blocks.tile), round(blocks.density(), 5)
    held = [blocks.kinds, *(tensor for walk in walks for tensor in walk)]
    row["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in held)
    del blocks, walks, held
    prepare = clear_cache
    prepare()
    row["peak_extra_mib"] = peak_mib(lambda: build(work, plan))
    for name, times in (
        ("wall_us", wall_us(lambda: build(work, plan), prepare)),
        ("gpu_us", graph_us(lambda: build(work, plan))),
    ):
        row[name], row[f"{name}_spread"] = (
            round(statistics.median(times), 1),
            [round(t, 1) for t in (times[0], times[-1])],
        )
    if work.reads is not None:
        words = work.reads.view(torch.int64)
        row["read_us"] = round(triton.testing.do_bench(lambda: words.sum(), return_mode="median") * 1e3, 1)
    return row


def run_flex(work: Work, lock: Path) -> dict:
    """create_block_mask, compiled. lock: held while timing, so that processes that compile side by side do not meet."""
    import fcntl

    row: dict[str, Any] = {"work": work.name, "impl": "flex"}
    make = torch.compile(create_block_mask)

    def call() -> Any:
        return make(work.flex, None, None, work.S, work.S, device=DEVICE)

    start = time.perf_counter()
    blocks = call()
    torch.cuda.synchronize()
    row["first_s"] = round(time.perf_counter() - start, 3)
    kinds = brute_force(work, (128, 128))
    if not torch.equal(blocks.to_dense().bool()[0, 0], kinds[0, 0] > 0):
        return {**row, "failed": "the map differs from brute force"}
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        row["peak_extra_mib"] = peak_mib(call)
        times = wall_us(call, lambda: None, 10)
        row["wall_us"], row["wall_us_spread"] = (
            round(statistics.median(times), 1),
            [round(times[0], 1), round(times[-1], 1)],
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="works whose key matches this regular expression")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "maps.jsonl")
    parser.add_argument("--flex", help=argparse.SUPPRESS)
    parser.add_argument("--lock", type=Path, default=Path("/tmp/anymask-maps.lock"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.flex:
        print(json.dumps(run_flex(WORKS[arguments.flex](), arguments.lock)))
        return
    common = environment()
    keys = [key for key in WORKS if re.search(arguments.only, key)]
    rows = []
    for key in keys:
        try:
            rows.append(run(WORKS[key]()))
        except Exception as error:
            rows.append({"work": key, "impl": "anymask", "failed": reason(error)})
        print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    processes = {
        key: subprocess.Popen(
            [sys.executable, __file__, "--flex", key], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for key in keys
        if WORKS[key]().flex is not None
    }
    for key, process in processes.items():
        out, err = process.communicate()
        lines = out.splitlines()
        rows.append(
            json.loads(lines[-1]) if process.returncode == 0 else {"work": key, "impl": "flex", "failed": err[-400:]}
        )
        print(json.dumps(rows[-1]), flush=True)
    ours = {row["work"]: row for row in rows if row["impl"] == "anymask"}
    for row in rows:
        if row["impl"] == "flex" and "wall_us" in row and "wall_us" in ours.get(row["work"], {}):
            ours[row["work"]]["speed_over_flex"] = round(row["wall_us"] / ours[row["work"]]["wall_us"], 1)
            print(row["work"], "speed over flex", ours[row["work"]]["speed_over_flex"])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps({**row, **common}) + "\n" for row in rows))
    if any("failed" in row for row in rows if row["impl"] == "anymask"):
        raise SystemExit("rows of AnyMask failed")


if __name__ == "__main__":
    main()
