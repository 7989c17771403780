"""Kernels compile for every architecture without a GPU, within its shared memory and the plan's estimate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


NEWEST_TRITON = ROOT / ".venv" / "newest"  # where `make` installs it
# but hopper_fused and its variants: Triton 3.9 spills 420 bytes of it, see docs/notes/006-hopper-backward.md
HOPPER_KERNELS = ("hopper_forward", "rows", "dq_of_sum", "hopper_dkdv", "hopper_lone", "hopper_dq", "hopper_lone_dq")


def aot(*arguments: str, first: Path = ROOT) -> str:
    """What benchmarks/aot.py prints, in a process of its own: this one may run Triton's interpreter.

    first: where that process looks first for packages.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/aot.py", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": f"{first}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_sample_compiles() -> None:
    printed = aot("--sample")
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert arch in printed


@pytest.mark.slow
def test_hopper_kernels_compile_with_the_newest_triton() -> None:
    assert NEWEST_TRITON.exists(), f"no Triton in {NEWEST_TRITON}: `make {NEWEST_TRITON.relative_to(ROOT)}` installs it"
    printed = aot("--sample", "--kernels", *HOPPER_KERNELS, first=NEWEST_TRITON)
    (version,) = (line for line in (ROOT / "requirements" / "newest.txt").read_text().splitlines() if "==" in line)
    assert printed.startswith(f"Triton {version.removeprefix('triton==')}\n")


def test_new_lengths_and_documents_compile_next_to_nothing() -> None:
    counts = json.loads(aot("--lengths", "200"))
    assert set(counts) == {"forward", "dkdv", "dq", "classify", "walk", "order"}
    assert max(counts.values()) <= 2, counts  # tiles that are all whole, and tiles that are not
