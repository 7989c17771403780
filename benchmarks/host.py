"""Host time of AnyMask's calls on one NVIDIA GPU: from Python to the launch, of works that the GPU does in no time.

    python benchmarks/host.py [--out FILE.jsonl]

One JSON row per work: documents and causal, the mask made once. Each is checked first, warm as it is timed.

| field | meaning |
|---|---|
| `host_us`, `host_us_min` | one call, until it returns: median and least over repeats of several calls |
| `launch_us`, `launch_us_min` | likewise until its last launch was handed to the driver |
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import maps
import torch
from gpu import Gate, documents_case, environment, make_inputs, reason

from anymask import attention, clear_cache
from anymask.kernels.recipe import Recipe

REPEATS, CALLS = 50, 10


def attention_works() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """By name what prepares a call, untimed, and the call."""
    case = documents_case(1024)
    inputs = make_inputs(case)
    *qkv, dout = inputs

    def forward() -> torch.Tensor:
        return attention(*qkv, mask=case.mask)

    def forward_no_grad() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), qkv, dout)

    gate = Gate(case, inputs)
    for _ in range(3):
        gate.check(forward(), both())
        gate.check(forward_no_grad(), both())
    nothing = lambda: None
    return {
        "forward": (nothing, forward),
        "forward_no_grad": (nothing, forward_no_grad),
        "forward_backward": (nothing, both),
    }


def map_works() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """The map and the walks of 65,536 tokens, nothing kept from before but the mask's trace."""
    work = maps.documents(65536)
    plan = maps.plan_of(work)
    for _ in range(3):
        clear_cache()
        blocks, _ = maps.build(work, plan)
        if not torch.equal(blocks.to_dense(), maps.brute_force(work, blocks.tile)):
            raise AssertionError("the map differs from brute force")
    return {"map_walks_S65536": (clear_cache, lambda: maps.build(work, plan))}


def measure(prepare: Callable[[], Any], call: Callable[[], Any]) -> dict[str, float]:
    last_launch = 0.0
    start_kernel = Recipe.__call__

    def noting(self: Recipe, *tensors: Any) -> None:
        nonlocal last_launch
        start_kernel(self, *tensors)
        last_launch = time.perf_counter()

    host, launched = [], []
    Recipe.__call__ = noting
    try:
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            host_s = launched_s = 0.0
            for _ in range(CALLS):
                prepare()
                start = time.perf_counter()
                call()
                host_s += time.perf_counter() - start
                launched_s += last_launch - start
            host.append(host_s / CALLS * 1e6)
            launched.append(launched_s / CALLS * 1e6)
    finally:
        Recipe.__call__ = start_kernel
    row = {}
    for name, times in (("host_us", host), ("launch_us", launched)):
        row[name], row[f"{name}_min"] = round(statistics.median(times), 1), round(min(times), 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "host.jsonl")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU")
    common = environment()
    rows: list[dict[str, Any]] = []
    for works in (attention_works, map_works):
        try:
            measured = {name: measure(*calls) for name, calls in works().items()}
            rows += [{"work": name, "impl": "anymask", **times} for name, times in measured.items()]
        except Exception as error:
            rows.append({"work": works.__name__, "impl": "anymask", "failed": reason(error)})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps({**row, **common}) + "\n" for row in rows))
    for row in rows:
        print(json.dumps(row))
    if any("failed" in row for row in rows):
        raise SystemExit("rows failed")


if __name__ == "__main__":
    main()
