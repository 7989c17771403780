"""Recipe: a kernel's launch, worked out once for all tensors that are laid out alike.

`kernel[grid](...)` looks at every argument of every call, to find the variant that Triton compiled for it. A recipe
fixes all arguments but the tensors. What the variant still depends on is which pointers are multiples of 16 bytes:
after one ordinary launch with a pattern of these, the next one takes its compiled kernel as it is. Of the 16 us that
Triton 3.6 takes for a launch with 35 arguments, some of them tuples, that leaves 3 (2026-11-22). Tensor maps for TMA
are kept by address: with four of them it is 3 too, where Triton makes them anew 8.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from anymask.expr.bindings import wide_slots
from anymask.expr.emit import odd
from anymask.kernels import ahead

TENSOR = object()  # stands for a tensor among a recipe's arguments, also inside a tuple

# Triton versions whose CompiledKernel.run is known to take the grid, stream, function, metadata, two hooks and then
# every argument of the kernel in order, constexprs too, and a pointer as a number. With any other, each launch is an
# ordinary one. (On AMD a variant depends on the tensors' sizes too.)
_IS_KNOWN = triton.__version__.startswith(("3.5.", "3.6.", "3.7.")) and torch.version.hip is None
# Likewise those whose launcher is known to be wrapped by driver.wrap_handle_tensordesc, and how that calls it.
_ARE_TENSOR_MAPS_KNOWN = triton.__version__.startswith("3.6.0")


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

    def at(self, pointer: int) -> Any:
        """What Triton reads of a descriptor when it makes the tensor map, for a tensor at this address."""
        base = SimpleNamespace(data_ptr=lambda: pointer)
        return SimpleNamespace(base=base, shape=self.shape, strides=self.strides, padding="zero")


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
        self._arguments = (*arguments, *[keywords.pop(name) for name in kernel.arg_names[len(arguments) :]])
        self._ordinary = _filler(self._arguments)
        self._options = keywords
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._ahead: Any = None
        self.is_new = True

    def __call__(self, *tensors: Tensor) -> None:
        pointers = list(map(Tensor.data_ptr, tensors))
        alignment = tuple([pointer % 16 for pointer in pointers])
        launch = self._compiled.get(alignment)
        if launch is None or _is_hooked() or not is_current(self._device):
            self.is_new = False
            self.finish()
            with _made_current(self._device):
                compiled = self._kernel[self._grid](*self._ordinary(tensors), **self._options)
            if launch is None and _IS_KNOWN and compiled is not None:  # the interpreter compiles nothing
                self._compiled[alignment] = _launch_of(compiled, self._grid, self._arguments)
            return
        # the pointers as numbers: Triton would ask each tensor again, and the driver whether the GPU can read there
        launch(pointers, current_stream(self._device))

    def compile_ahead(self, *tensors: Tensor | Outline) -> None:
        """Begin to compile, if the recipe is new, what a launch with such tensors takes: the next launch waits for it.

        Not while a CUDA graph is captured. What goes wrong is left to the launch.
        """
        if self.is_new and not (self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self.is_new = False
            with contextlib.suppress(Exception), _made_current(self._device):
                arguments = self._ordinary([Outline.of(x) for x in tensors])
                self._ahead = ahead.begin(self._kernel, arguments, self._options)

    def finish(self) -> None:
        """Wait for what compile_ahead began."""
        if self._ahead is not None:
            ahead.finish(self._ahead)
            self._ahead = None


def _launch_of(compiled: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> Any:
    """The launch of a compiled kernel as a function of pointers and stream; None where nobody looked how to do it."""
    run = compiled.run
    start = f"launch({', '.join(map(str, grid))}, stream, function"
    names = {"function": compiled.function, "metadata": compiled.packed_metadata}
    if not any(isinstance(x, Descriptor) for x in arguments):
        return _filler(arguments, f"{start}, metadata, None, None, None, {{}})", launch=run, **names)
    if not _ARE_TENSOR_MAPS_KNOWN or run.global_scratch_size or run.profile_scratch_size:
        return None
    # past the wrapper, which makes every tensor map anew
    wrapped = inspect.getclosurevars(run.launch).nonlocals
    metas = iter(wrapped["tensordesc_meta"])
    arguments = tuple([_TensorMap(x, next(metas)) if isinstance(x, Descriptor) else x for x in arguments])
    names |= {"made": _made, "is_cooperative": run.launch_cooperative_grid, "is_pdl": run.launch_pdl}
    call = f"{start}, is_cooperative, is_pdl, None, None, metadata, None, None, None, {{}})"
    return _filler(arguments, call, launch=wrapped["launcher"], **names)


@dataclass(frozen=True, eq=False)
class _TensorMap:
    """Stands for what a launcher takes for a Descriptor: tensor map, sizes, strides.  meta: Triton's, of the map."""

    descriptor: Descriptor
    meta: Any


@functools.lru_cache(maxsize=4096)
def _made(x: _TensorMap, pointer: int) -> Any:
    """A matter of numbers alone: whatever else comes to lie at this address has the same."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    return make_tensordesc_arg(x.descriptor.at(pointer), x.meta)


def _filler(arguments: tuple[Any, ...], call: str = "({})", **names: Any) -> Any:
    """The arguments, or a call with them in the place of {}, as a function of the sequence of what TENSOR stands for
    and, for a call, of the stream: code, as Triton's own binders are.  names: what else the call speaks of.
    """
    number = itertools.count()
    last = "tensors[0]"

    def tensor(is_again: bool = False) -> str:
        nonlocal last
        last = last if is_again else f"tensors[{next(number)}]"
        return last

    def source(x: Any) -> str:
        if x is TENSOR:
            return tensor()
        if _holds_tensor(x):
            return f"({''.join(f'{source(part)}, ' for part in x)})"
        name = f"fixed_{len(names)}"
        names[name] = x
        if isinstance(x, Descriptor):
            return f"{name}.of({tensor(x.is_again)})"
        if isinstance(x, _TensorMap):
            return f"*made({name}, {tensor(x.descriptor.is_again)})"
        return name

    filled = call.format("".join(f"{source(x)}, " for x in arguments))
    return eval(f"lambda tensors, stream=None: {filled}", names)


def _holds_tensor(x: Any) -> bool:
    return x is TENSOR or (isinstance(x, tuple) and any(map(_holds_tensor, x)))


def is_current(device: torch.device) -> bool:
    """Launches go to this device. One without an index is the CPU, of the interpreter."""
    return device.index is None or device.index == torch._C._cuda_getDevice()


def current_stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


def _made_current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if is_current(device) else torch.cuda.device(device)


def _is_hooked() -> bool:
    """Somebody, such as a profiler, is told of launches: an ordinary one does that."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def readable(captures: tuple[Tensor, ...]) -> list[Tensor]:
    """float64 as float32: it is read so anyway, and takes half the shared memory."""
    return [x.float() if x.dtype is torch.float64 else x for x in captures]


def bound(
    captures: tuple[Layout, ...], ints: tuple[int, ...], floats: tuple[float, ...]
) -> tuple[tuple[Any, ...], frozenset[int]]:
    """Bindings as kernels take them, and the slots whose offsets take 64 bits."""
    tensors = tuple((TENSOR, tuple(odd(size) for size in x.shape), x.strides) for x in captures)
    return (tensors, tuple(odd(n) for n in ints), floats), wide_slots((x.shape, x.strides) for x in captures)
