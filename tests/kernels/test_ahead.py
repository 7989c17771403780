"""A first call compiles its kernels in threads, in the variants that its launches then take.

It runs in tests/kernels/first_calls.py, a process of its own, as this one may run Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anymask.kernels import ahead, map_launch, recipe
from anymask.kernels.recipe import TENSOR, Outline, Recipe

ROOT = Path(__file__).parents[2]


def first_calls(cache: Path, *what: str) -> list[Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.kernels.first_calls", *what]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    what = ("unforeseen", "errors", "ahead", "lengths")
    return dict(zip(what, first_calls(tmp_path_factory.mktemp("cache"), *what), strict=True))


def test_launches_find_what_they_take_compiled(found: dict[str, Any]) -> None:
    rows = found["ahead"]
    assert [sorted(counts) for counts, _ in rows[:14]] == [["dkdv_kernel", "dq_kernel", "forward_kernel"]] * 14
    assert all("hopper_forward_kernel" in counts for counts, _ in rows[14:18])
    assert not rows[14:] or "rows_kernel" in rows[14][0]
    assert all("hopper_backward_kernel" in counts for counts, _ in rows[18:])
    for counts, is_in_threads in rows:
        assert set(counts.values()) == {1} and is_in_threads


def test_a_backward_that_nobody_foresaw_compiles_its_kernels_side_by_side(found: dict[str, Any]) -> None:
    with_dlse, no_grad, later = found["unforeseen"]
    # dQ also without dlse, in vain
    assert with_dlse == [[name, True] for name in ("dkdv_kernel", "dq_kernel", "dq_kernel", "forward_kernel")]
    assert no_grad == [["forward_kernel", True]]
    assert later == [["dkdv_kernel", True], ["dq_kernel", True]]


def test_new_lengths_start_no_threads(found: dict[str, Any]) -> None:
    assert found["lengths"] == [0, 0]


def test_an_error_is_met_by_the_launch_or_by_nobody(found: dict[str, Any]) -> None:
    for kernel, is_launch_too, where in found["errors"]:
        expected = "forward" if kernel == "forward_kernel" else "backward"
        assert where == (expected if is_launch_too else "nowhere"), kernel


def test_the_process_may_fork_and_end_meanwhile(tmp_path: Path) -> None:
    assert first_calls(tmp_path, "leave") == [[0, True]]


def test_the_compiler_works_in_threads(tmp_path: Path) -> None:
    [compiled] = first_calls(tmp_path, "real")
    assert compiled == [[name, False, True] for name in ("dkdv_kernel", "dq_kernel", "forward_kernel")]


@pytest.mark.parametrize("is_captured", [False, True])
def test_nothing_is_begun_while_a_graph_is_captured(is_captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_captured)
    monkeypatch.setattr(recipe, "is_current", lambda device: True)
    monkeypatch.setattr(ahead, "begin", lambda *arguments: begun.append(arguments))
    kernel = map_launch.order_kernel
    made = Recipe(torch.device("cuda:0"), kernel, 1, *[TENSOR] * len(kernel.arg_names))
    for _ in range(2):
        made.compile_ahead(*[Outline(torch.int32, 20)] * len(kernel.arg_names))
    assert len(begun) == (0 if is_captured else 1) and made.is_new == is_captured
    assert all(x == Outline(torch.int32, 4) for _, arguments, _ in begun for x in arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter")
def test_nothing_is_begun_in_the_interpreter() -> None:
    assert ahead.begin(map_launch.order_kernel, (), {}) is None
