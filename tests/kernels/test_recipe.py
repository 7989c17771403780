"""Recipes: a repeated launch passes what the first one did, to the variant that Triton compiled for it."""

from __future__ import annotations

import itertools
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.backends.nvidia import driver as nvidia
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from anymask.kernels import recipe
from anymask.kernels.hopper_launch import _descriptors
from anymask.kernels.recipe import TENSOR, Layout, Recipe

CPU = torch.device("cpu")
needs_tensor_maps = pytest.mark.skipif(not recipe._ARE_TENSOR_MAPS_KNOWN, reason="for Triton 3.6.0")


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
    assert kernel.launches[-1][0] == 0
    monkeypatch.setattr(recipe, "_IS_KNOWN", False)  # another version of Triton
    unknown = of(kernel)
    for _ in range(3):
        unknown(a, b)
    assert [launch[0] for launch in kernel.launches[-3:]] == ["ordinary"] * 3


@dataclass(frozen=True)
class TmaKernel:
    """Launched through Triton's own wrapper of a launcher, which notes down what it gets; `filled` for which addresses
    tensor maps are made."""

    launches: list[Any]
    filled: list[int]
    scratch: int = 0
    arg_names = ("wide", "rest", "n", "narrow", "pointer")

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any) -> Any:
            is_tma = [isinstance(x, TensorDescriptor) for x in args]
            metas = [
                {"swizzle": i, "elem_size": 2, "elem_type": 6, "block_size": x.block_shape, "fp4_padded": False}
                for i, x in enumerate(itertools.compress(args, is_tma))
            ]
            run = object.__new__(nvidia.CudaLauncher)
            run.launch = nvidia.wrap_handle_tensordesc(
                lambda *args: self.launches.append(with_pointers(args)),
                {i: "tensordesc<fp16[1,1,64,128]>" if is_one else "*fp16" for i, is_one in enumerate(is_tma)},
                metas,
            )
            run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, "cooperative", "pdl"
            run.global_scratch_size = run.profile_scratch_size = self.scratch
            run.global_scratch_align = run.profile_scratch_align = 128
            run(*grid, 7, "function", "metadata", None, None, None, *args)
            return SimpleNamespace(run=run, function="function", packed_metadata="metadata")

        return launch


@pytest.fixture
def tma_kernel(monkeypatch: pytest.MonkeyPatch) -> TmaKernel:
    kernel = TmaKernel([], [])

    def fill(pointer: int, *numbers: Any) -> Any:
        kernel.filled.append(pointer)
        return ("map", pointer, repr(numbers))

    monkeypatch.setattr(recipe, "current_stream", lambda device: 7)
    monkeypatch.setattr(recipe, "_IS_KNOWN", True)
    active = SimpleNamespace(utils=SimpleNamespace(fill_tma_descriptor=fill))
    monkeypatch.setattr(recipe.triton.runtime.driver, "_active", active)
    recipe._made.cache_clear()
    return kernel


def tma_recipe(kernel: Any, wide: torch.Tensor, narrow: torch.Tensor) -> Recipe:
    of_wide, (of_narrow, none) = _descriptors(Layout.of(wide), 64), _descriptors(Layout.of(narrow), 128)
    assert None not in of_wide and none is None
    return Recipe(CPU, kernel, 5, *of_wide, 9, of_narrow, TENSOR)


@needs_tensor_maps
def test_tensor_maps_are_those_of_ordinary_launches_and_made_once_for_an_address(tma_kernel: TmaKernel) -> None:
    def tensors() -> tuple[torch.Tensor, ...]:
        return torch.zeros(1, 2, 70, 192).half(), torch.zeros(2, 3, 130, 64).half(), torch.zeros(4)

    a, b = tensors(), tensors()
    launch = tma_recipe(tma_kernel, *a[:2])
    launch(*a)
    filled = len(tma_kernel.filled)
    assert filled == 3
    for x in (a, b, (b[0], *a[1:]), a):
        tma_kernel.launches.clear()
        launch(*x)
        prepared = len(tma_kernel.filled)
        tma_recipe(tma_kernel, *a[:2])(*x)
        assert tma_kernel.launches[0] == tma_kernel.launches[1], "prepared and ordinary"
        del tma_kernel.filled[prepared:]
    assert tma_kernel.filled[filled:] == [x.data_ptr() for x in (a[0], a[0], a[1], b[0], b[0], b[1])]


@needs_tensor_maps
def test_an_ordinary_launch_where_it_is_not_known_how_tensor_maps_are_passed(
    tma_kernel: TmaKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, z = torch.zeros(1, 2, 70, 192).half(), torch.zeros(2, 3, 130, 64).half(), torch.zeros(4)
    monkeypatch.setattr(nvidia._allocation, "_allocator", ContextVar("allocator", default=lambda *size: "scratch"))
    monkeypatch.setattr(nvidia._allocation, "_profile_allocator", nvidia._allocation._allocator)
    launch = tma_recipe(replace(tma_kernel, scratch=1), x, y)
    for _ in range(3):
        launch(x, y, z)
        assert tma_kernel.launches[-1][7:9] == ("scratch", "scratch")
    monkeypatch.setattr(recipe, "_ARE_TENSOR_MAPS_KNOWN", False)
    launch = tma_recipe(tma_kernel, x, y)
    for _ in range(3):
        launch(x, y, z)
    assert len(tma_kernel.filled) == 3 * 6


def test_hooks_on_launches_are_seen() -> None:
    enter = recipe.triton.knobs.runtime.launch_enter_hook
    assert not recipe._is_hooked()
    enter.add(print)
    try:
        assert recipe._is_hooked()
    finally:
        enter.remove(print)
    assert not recipe._is_hooked()


def test_which_device_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    devices = (torch.device("cuda:0"), torch.device("cuda:1"), CPU)
    assert [recipe.is_current(device) for device in devices] == [False, True, True]


def test_a_layout_is_all_but_the_data() -> None:
    x = torch.zeros(3, 4)
    assert Layout.of(x) == Layout.of(torch.ones(3, 4)) == (x.shape, (4, 1), torch.float32, CPU)
    assert len({Layout.of(y) for y in (x, x.t(), x[:, :3], x.int(), x.view(4, 3), x.to("meta"))}) == 6
