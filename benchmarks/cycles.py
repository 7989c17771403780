"""Cycles of each kernel of AnyMask and its peers on one NVIDIA GPU, counted by Nsight Compute (`ncu`).

    python benchmarks/cycles.py [group ...] [--only REGEX] [--impls NAME ...]     # works and names of gpu.py
    python benchmarks/cycles.py dense --trees main=../main new=.                  # compares checkouts

Each result is checked against float64 in the process that is counted, before it is. Times differ by 5% from run to run
with the clock, cycles by 0.1%: so this tells variants of a kernel apart. What a kernel does per second is in gpu.py.
Writes one JSON row per work, implementation, checkout and kernel, and prints a table of millions at the end.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS = {
    "sm__cycles_elapsed.max": "cycles",
    "sm__cycles_active.avg": "active_cycles",
    "gpu__time_duration.sum": "ns",
}
MARKER = "spin_kernel"  # of torch.cuda._sleep: it stands before each forward and backward, and at the end


def count(works: list[str], impls: list[str]) -> None:
    """In the process that ncu looks into: check, then one forward and one backward of each, behind a marker each."""
    import gpu
    import torch

    cases = [case for group in gpu.CASES.values() if group is not gpu.zoo for case in group() if case.work in works]
    for case in cases:
        inputs = gpu.make_inputs(case)
        gate = gpu.Gate(case, inputs)
        for impl in impls:
            fn = gpu.PROVIDERS[impl](case)
            if fn is None:
                continue
            row = {"work": case.work, "impl": impl, **gpu.check(fn, inputs, gate)}
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
            out = fn(*inputs[:3])
            torch.cuda._sleep(1)
            gpu.backward(out, inputs)
            torch.cuda._sleep(1)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            print(json.dumps(row), flush=True)


def counted(tree: Path, works: list[str], impls: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each kernel, of the anymask in this folder."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "ncu.csv")
        command = ["ncu", "--csv", "--page", "raw", "--log-file", str(log), "--clock-control", "none"]
        command += ["--profile-from-start", "off", "--metrics", ",".join(METRICS)]
        command += [sys.executable, __file__, "--impls", *impls, "--count", *works]
        path = f"{tree}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        answer = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
        checked = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith('{"work"')]
        if answer.returncode:
            raise SystemExit(f"{' '.join(command)}\nfailed in {tree}; checked until then: {checked}")
        yield from rows_of(log.read_text(), checked)


def rows_of(log: str, checked: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What ncu wrote, as rows: kernels behind the first marker are of the first work's forward, and so on."""
    start = log.index('"ID"')
    place = -1
    for kernel in csv.DictReader(io.StringIO(log[start:])):
        if not kernel["ID"]:  # the line of units
            continue
        name = kernel["Kernel Name"]
        if MARKER in name:
            place += 1
            continue
        work, side = divmod(place, 3)
        numbers = {field: float(kernel[metric].replace(",", "")) for metric, field in METRICS.items()}
        yield {**checked[work], "side": ("fwd", "bwd")[side], "kernel": re.split(r"[(<]", name)[0], **numbers}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Millions of cycles of the longest kernel, and of all, a line for each work, side and implementation."""
    trees = list(dict.fromkeys(row["tree"] for row in rows))
    yield f"{'work':<40} {'side':4} {'impl':<22} " + " ".join(f"{tree:>17}" for tree in trees)
    for work, side, impl in dict.fromkeys((row["work"], row["side"], row["impl"]) for row in rows):
        line = f"{work:<40} {side:4} {impl:<22} "
        for tree in trees:
            of = [
                row["cycles"] / 1e6
                for row in rows
                if (row["work"], row["side"], row["impl"], row["tree"]) == (work, side, impl, tree)
            ]
            line += f" {max(of):8.3f}/{sum(of):8.3f}" if of else f" {'-':>17}"
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="group", help="which works, see gpu.py; all but zoo by default")
    parser.add_argument("--only", default="", help="works whose name matches this regular expression")
    parser.add_argument("--impls", nargs="+", default=["anymask"], help="as of gpu.py; anymask by default")
    parser.add_argument("--trees", nargs="+", default=["here=."], metavar="NAME=FOLDER", help="checkouts to compare")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cycles.jsonl")
    parser.add_argument("--count", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count:
        return count(arguments.count, arguments.impls)

    import gpu

    groups = arguments.groups or [group for group in gpu.CASES if group != "zoo"]
    works = [case.work for group in groups for case in gpu.CASES[group]() if re.search(arguments.only, case.work)]
    common = gpu.environment()
    rows: list[dict[str, Any]] = []
    with arguments.out.open("w") as file:
        for tree in arguments.trees:
            name, folder = tree.split("=")
            for row in counted(Path(folder).resolve(), works, arguments.impls):
                rows.append({"tree": name, **row})
                file.write(json.dumps({**rows[-1], **common}) + "\n")
                file.flush()
            print("\n".join(table(rows)), flush=True)


if __name__ == "__main__":
    main()
