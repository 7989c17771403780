"""Recipes: a repeated launch passes what the first one did, to the variant that Triton compiled for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anymask.kernels import recipe
from anymask.kernels.recipe import TENSOR, Layout, Recipe

CPU = torch.device("cpu")


class Kernel:
    """Notes down what it is launched with: "ordinary" through [grid], or a compiled variant's number."""

    arg_names = ("a", "pair", "n", "SIZE")

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.num_compiled = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            self.launches.append(("ordinary", grid, options, args))
            number, self.num_compiled = self.num_compiled, self.num_compiled + 1

            def run(x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *rest: Any) -> None:
                assert (stream, function, metadata, rest[:3]) == (7, "function", "metadata", (None, None, None))
                self.launches.append((number, (x, y, z), {}, rest[3:]))

            return SimpleNamespace(run=run, function="function", packed_metadata="metadata")

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(recipe, "current_stream", lambda device: 7)
    monkeypatch.setattr(recipe, "_IS_KNOWN", True)
    return Kernel()


def of(kernel: Any) -> Recipe:
    return Recipe(CPU, kernel, 5, TENSOR, ((TENSOR, (3, 4)), (), 2), SIZE=8, n=9, num_warps=4)


def with_pointers(args: Any) -> Any:
    if isinstance(args, torch.Tensor):
        return args.data_ptr()
    return tuple(map(with_pointers, args)) if isinstance(args, tuple) else args


def test_the_second_launch_takes_the_compiled_kernel_and_the_tensors_of_its_own_call(kernel: Kernel) -> None:
    launch = of(kernel)
    for _ in range(3):
        a, b = torch.zeros(4), torch.zeros(5)
        launch(a, b)
    first, *_, (number, grid, options, args) = kernel.launches
    assert first[:3] == ("ordinary", (5, 1, 1), {"num_warps": 4})
    assert (number, grid, options) == (0, (5, 1, 1), {})
    assert args == (a.data_ptr(), ((b.data_ptr(), (3, 4)), (), 2), 9, 8)
    assert [x for x in first[3][1:] if not isinstance(x, tuple)] == [9, 8] and isinstance(first[3][0], torch.Tensor)


def test_each_alignment_has_its_variant(kernel: Kernel) -> None:
    launch, a, b = of(kernel), torch.zeros(64), torch.zeros(64)
    patterns = [(a, b), (a[1:], b), (a, b[1:]), (a[1:], b[1:])]
    for tensors in (*patterns, *reversed(patterns)):
        launch(*tensors)
    ordinary, repeated = kernel.launches[:4], kernel.launches[4:]
    assert [launch[0] for launch in ordinary] == ["ordinary"] * 4
    assert [launch[0] for launch in repeated] == [3, 2, 1, 0]
    for first, second in zip(ordinary, reversed(repeated), strict=True):
        assert with_pointers(first[3]) == second[3]
    launch(a[4:], b[4:])  # 16 bytes on
    assert kernel.launches[-1][0] == 0


def test_the_ordinary_way_where_the_other_would_be_wrong(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, a, b = of(kernel), torch.zeros(4), torch.zeros(4)
    launch(a, b)
    for patch in (("_is_hooked", lambda: True), ("is_current", lambda device: False)):
        with monkeypatch.context() as context:
            context.setattr(recipe, *patch)
            context.setattr(recipe, "_made_current", lambda device: recipe.contextlib.nullcontext())
            launch(a, b)
        assert kernel.launches[-1][0] == "ordinary", patch
    launch(a, b)
    assert kernel.launches[-1][0] == 2
    monkeypatch.setattr(recipe, "_IS_KNOWN", False)  # another version of Triton
    unknown = of(kernel)
    for _ in range(3):
        unknown(a, b)
    assert [launch[0] for launch in kernel.launches[-3:]] == ["ordinary"] * 3


def test_hooks_on_launches_are_seen() -> None:
    enter = recipe.triton.knobs.runtime.launch_enter_hook
    assert not recipe._is_hooked()
    enter.add(print)
    try:
        assert recipe._is_hooked()
    finally:
        enter.remove(print)
    assert not recipe._is_hooked()


def test_a_layout_is_all_but_the_data() -> None:
    x = torch.zeros(3, 4)
    assert Layout.of(x) == Layout.of(torch.ones(3, 4)) == (x.shape, (4, 1), torch.float32, CPU)
    assert len({Layout.of(y) for y in (x, x.t(), x[:, :3], x.int(), x.view(4, 3), x.to("meta"))}) == 6
