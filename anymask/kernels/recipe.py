"""Recipe: a kernel's launch, worked out once for all tensors that are laid out alike.

`kernel[grid](...)` looks at every argument of every call, to find the variant that Triton compiled for it. A recipe
fixes all arguments but the tensors. What the variant still depends on is which pointers are multiples of 16 bytes:
after one ordinary launch with a pattern of these, the next one takes its compiled kernel as it is. Of the 16 us that
Triton 3.6 takes for a launch with 35 arguments, some of them tuples, that leaves 3 (2026-11-22).
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from anymask.kernels import ahead

TENSOR = object()  # stands for a tensor among a recipe's arguments, also inside a tuple

# Triton versions whose CompiledKernel.run is known to take the grid, stream, function, metadata, two hooks and then
# every argument of the kernel in order, constexprs too, and a pointer as a number. With any other, each launch is an
# ordinary one. (On AMD a variant depends on the tensors' sizes too.)
_IS_KNOWN = triton.__version__.startswith(("3.5.", "3.6.", "3.7.")) and torch.version.hip is None


class Layout(NamedTuple):
    """What a launch depends on of a tensor, but for its alignment."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> Layout:
        return Layout(x.shape, x.stride(), x.dtype, x.device)


@dataclass(frozen=True)
class Descriptor:
    """Stands for a TMA descriptor of a tensor, as TENSOR does for the tensor itself.

    is_again: of the same tensor as the argument before it.
    """

    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: Any
    is_again: bool = False

    def of(self, tensor: Tensor) -> Any:
        """The descriptor that Triton takes."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        return TensorDescriptor(tensor, self.shape, self.strides, self.block_shape, self.layout)

    def at(self, pointer: int) -> Located:
        """What Triton's launcher asks of a descriptor, without the checks that `of` makes each time."""
        return Located(pointer, self.shape, self.strides)


class Located:
    """A tensor for TMA: its own base, with an address."""

    padding = "zero"

    def __init__(self, pointer: int, shape: list[int], strides: list[int]) -> None:
        self.pointer, self.shape, self.strides = pointer, shape, strides

    @property
    def base(self) -> Located:
        return self

    def data_ptr(self) -> int:
        return self.pointer


@dataclass
class Outline:
    """What a kernel's variant depends on of a tensor: its type, and its address modulo 16."""

    dtype: torch.dtype
    pointer: int = 0

    def data_ptr(self) -> int:
        return self.pointer

    @staticmethod
    def of(x: Tensor | Outline) -> Outline:
        return Outline(x.dtype, x.data_ptr() % 16)


class Recipe:
    """Call it with the tensors, in the order in which TENSOR or a Descriptor stands for them: it launches.

    programs: the grid.  arguments, keywords: as in kernel[grid](...). A recipe holds no tensor; one serves all threads.
    is_new: nothing was launched, or compiled ahead.
    """

    def __init__(self, device: torch.device, kernel: Any, programs: int, *arguments: Any, **keywords: Any) -> None:
        self._device, self._kernel, self._grid = device, kernel, (programs, 1, 1)
        rest = [keywords.pop(name) for name in kernel.arg_names[len(arguments) :]]
        self._ordinary = _filler((*arguments, *rest), "of")
        self._prepared = _filler((*arguments, *rest), "at")
        self._options = keywords
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._ahead: Any = None
        self.is_new = True

    def __call__(self, *tensors: Tensor) -> None:
        pointers = [x.data_ptr() for x in tensors]
        alignment = tuple([pointer % 16 for pointer in pointers])
        compiled = self._compiled.get(alignment)
        if compiled is None or _is_hooked() or not is_current(self._device):
            self.is_new = False
            if self._ahead is not None:
                ahead.finish(self._ahead)
                self._ahead = None
            with _made_current(self._device):
                compiled = self._kernel[self._grid](*self._ordinary(tensors), **self._options)
            if _IS_KNOWN and compiled is not None:  # the interpreter compiles nothing
                self._compiled[alignment] = compiled
            return
        stream = current_stream(self._device)
        # the pointers as numbers: Triton would ask each tensor again, and the driver whether the GPU can read there
        arguments = self._prepared(pointers)
        compiled.run(*self._grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)

    def compile_ahead(self, *tensors: Tensor | Outline) -> None:
        """Begin to compile, if the recipe is new, what a launch with such tensors takes: the next launch waits for it.

        Not while a CUDA graph is captured. What goes wrong is left to the launch.
        """
        if self.is_new and not (self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self.is_new = False
            with contextlib.suppress(Exception), _made_current(self._device):
                arguments = self._ordinary([Outline.of(x) for x in tensors])
                self._ahead = ahead.begin(self._kernel, arguments, self._options)


def _filler(arguments: tuple[Any, ...], describe: str = "of") -> Any:
    """The arguments as a function of the sequence of what TENSOR stands for: code, as Triton's own binders are.

    describe: the method of Descriptor that makes one of it.
    """
    fixed: dict[str, Any] = {}
    number = itertools.count()
    last = [0]

    def source(x: Any) -> str:
        if isinstance(x, Descriptor):
            name = f"fixed_{len(fixed)}"
            fixed[name] = x
            last[0] = last[0] if x.is_again else next(number)
            return f"{name}.{describe}(tensors[{last[0]}])"
        if x is TENSOR:
            return f"tensors[{next(number)}]"
        if _holds_tensor(x):
            return f"({''.join(f'{source(part)}, ' for part in x)})"
        name = f"fixed_{len(fixed)}"
        fixed[name] = x
        return name

    return eval(f"lambda tensors: ({''.join(f'{source(x)}, ' for x in arguments)})", fixed)


def _holds_tensor(x: Any) -> bool:
    return x is TENSOR or (isinstance(x, tuple) and any(map(_holds_tensor, x)))


def is_current(device: torch.device) -> bool:
    """Launches go to this device."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def current_stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


def _made_current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if is_current(device) else torch.cuda.device(device)


def _is_hooked() -> bool:
    """Somebody, such as a profiler, is told of launches: an ordinary one does that."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
