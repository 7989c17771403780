"""The Hopper kernels on the emulator: right, and free of races and deadlocks, in two orders of events each.

The cases are in tests/emulator/attention.py. In processes of their own: this one may run Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = 5


def emulated(*arguments: str) -> str:
    """What the command prints, if all is well."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.emulator", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_some_hopper_kernels() -> None:
    """Forward and backward; fused, persistent, 128 queries a step; a backward in two kernels."""
    printed = emulated("unmasked_64_wide", "documents_128_persistent", "causal_192_128")
    for kernel in ("hopper_forward", "hopper_backward", "hopper_dq", "rows", "dq_of_sum", "walk", "order"):
        assert kernel in printed


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_hopper_kernels(part: int) -> None:
    emulated("--seeds", "1", "2", "--part", f"{part}/{PARTS}")


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 8])
def test_random_problems_on_hopper(first: int) -> None:
    emulated("--fuzz", str(first), str(first + 8))


def test_every_fault_is_found_and_every_product_right() -> None:
    emulated("--faults")
