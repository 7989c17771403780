"""The Hopper kernels on the emulator: right, and free of races and deadlocks, in two orders of events each.

In processes of their own: this one may run Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# tests/emulator/attention.py has the cases; it cannot be imported here
FAST = ("unmasked_64_wide", "documents_128_persistent", "causal_192_128")
SLOW = (
    "causal_64_fused",
    "causal_64_wide_persistent",
    "window_64_192_queries",
    "nothing_64",
    "unmasked_128_apart",
    "documents_128_lone",
    "tree_128_fused",
    "tensor_128_deterministic",
    "capped_128_64_fused",
    "biased_64_128_apart",
    "causal_96_fused",
    "causal_72_112_lone",
    "flashmask_256",
    "one_query",
)


def emulated(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.emulator", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [*FAST, *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]])
def test_hopper_kernels(name: str) -> None:
    assert "seed 1" in emulated("--seeds", "0", "1", "--", name)


def test_the_emulator_finds_every_fault_and_computes_every_product() -> None:
    emulated("--faults")


def test_every_case_is_here() -> None:
    assert {line.split()[0] for line in emulated("--list").splitlines()} == {*FAST, *SLOW}
