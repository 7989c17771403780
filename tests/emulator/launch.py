"""Emulator: within it, a launch of a Triton or Gluon kernel compiles for sm_90 and runs here, on CPU tensors."""

from __future__ import annotations

import functools
import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from tests.emulator.machine import Block
from tests.emulator.memory import Memory
from tests.emulator.ptx import Kernel
from tests.emulator.tma import TensorMap
from tests.emulator.translate import PARAMETER_BYTES, Program, program_of

TARGET = GPUTarget("cuda", 90, 32)
# Blocks beside each other. So few that persistent programs work on several tiles.
NUM_MULTIPROCESSORS = 3
DTYPES = {
    "i1": "i1",
    "i8": "i1",
    "u8": "u1",
    "i16": "i2",
    "u16": "u2",
    "i32": "i4",
    "u32": "u4",
    "i64": "i8",
    "u64": "u8",
}
DTYPES |= {"fp32": "f4", "fp64": "f8"}


@dataclass
class Emulator:
    """launches: what ran, in order: kernel, blocks, seconds."""

    seed: int = 0
    launches: list[tuple[str, int, float]] = field(default_factory=list)

    def __enter__(self) -> Emulator:
        assert not triton.knobs.runtime.interpret, "a process in which Triton does not interpret"
        self._run, emulator = JITFunction.run, self
        knobs = triton.knobs
        self._knobs = knobs.runtime.add_stages_inspection_hook, knobs.cache.dir
        # PTX is all we need, in a cache of its own: no GPU must find these kernels without machine code
        knobs.runtime.add_stages_inspection_hook = _without_machine_code
        knobs.cache.dir = f"{knobs.cache.dir}-ptx"

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            if not warmup:
                emulator.launch(kernel, args, grid, options)

        JITFunction.run = run
        return self

    def __exit__(self, *error: object) -> None:
        JITFunction.run = self._run
        triton.knobs.runtime.add_stages_inspection_hook, triton.knobs.cache.dir = self._knobs

    def launch(self, kernel: Any, args: tuple[Any, ...], grid: Any, options: dict[str, Any]) -> None:
        """Some blocks beside each other, in the order of their numbers."""
        program, metadata, signature, bound = compiled(kernel, args, options)
        assert not metadata.global_scratch_size and not metadata.profile_scratch_size
        flat = list(_flat(signature, bound))
        memory = Memory(
            [x.base if sort.startswith("tensordesc") else x for sort, x in flat if not isinstance(x, int | float)]
        )
        maps: dict[int, TensorMap] = {}
        metas = iter(metadata.tensordesc_meta or ())
        parameters: list[Any] = []
        for sort, value in flat:
            if sort.startswith("tensordesc"):
                maps[PARAMETER_BYTES * (len(parameters) + 1)] = _tensor_map(memory, value, next(metas))
                parameters += [np.int64(0), *map(np.int32, value.shape), *map(np.int64, value.strides)]
            elif sort.startswith("*"):
                parameters.append(np.int64(value.data_ptr()))
            else:
                parameters.append(np.dtype(DTYPES[sort]).type(value))
        parameters += [np.int64(0)] * 2  # scratch
        arrays = [_of_all_lanes(x) for x in parameters]
        wanted = program.kernel.parameters
        assert len(arrays) == len(wanted), (len(arrays), wanted)
        start = time.perf_counter()
        grid = (*(grid(bound) if callable(grid) else grid), 1, 1)[:3]

        def block(index: tuple[int, ...]) -> Iterator[None]:
            seed = (self.seed, len(self.launches), index)
            return Block(program, memory, maps, arrays, metadata.shared, index[::-1], grid, seed).turns()

        waiting = map(block, itertools.product(*map(range, grid[::-1])))
        with np.errstate(all="ignore"):
            _run_beside(waiting, random.Random(f"{self.seed} {len(self.launches)}"))
        self.launches.append((program.kernel.name, math.prod(grid), time.perf_counter() - start))


def _run_beside(waiting: Iterator[Iterator[None]], order: random.Random) -> None:
    running = list(itertools.islice(waiting, NUM_MULTIPROCESSORS))
    while running:
        i = order.randrange(len(running))
        if next(running[i], "end") == "end":
            running[i : i + 1] = itertools.islice(waiting, 1)


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Program, Any, Any, dict[str, Any]]:
    """The program, Triton's metadata, the types and the values of the kernel's arguments."""
    backend = make_backend(TARGET)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = bind(*args, **options)
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, extra)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs, attrs)
    result = triton.compile(source, target=TARGET, options=parsed.__dict__)
    return _program(result.asm["ptx"]), result.metadata, signature, bound


@functools.lru_cache(maxsize=256)
def _program(ptx: str) -> Program:
    return program_of(Kernel.of(ptx))


def _without_machine_code(*compilation: Any) -> tuple[str, str]:
    """compilation: Triton's backend, the stages by name, and more. Triton 3.9 also asks, with nothing, for a key."""
    if compilation:
        compilation[1]["cubin"] = lambda source, metadata: b""
    return ("PTX alone",) * 2


def _flat(signature: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """What a compiled kernel takes, in order: tuples flattened, without constants."""
    for sort, value in zip(
        signature.values() if isinstance(signature, dict) else signature, _values(values), strict=True
    ):
        if isinstance(sort, tuple):
            yield from _flat(sort, value)
        elif sort != "constexpr":
            yield sort, value


def _values(values: Any) -> Any:
    return values.values() if isinstance(values, dict) else values


def _tensor_map(memory: Memory, descriptor: Any, meta: dict[str, Any]) -> TensorMap:
    """As make_tensordesc_arg of Triton's driver."""
    assert descriptor.padding == "zero" and not meta["fp4_padded"]
    base: Tensor = descriptor.base
    assert meta["elem_size"] == base.element_size()
    swizzle = (0, 32, 64, 128)[meta["swizzle"]]
    box = meta["block_size"]
    return TensorMap(memory, base.data_ptr(), descriptor.shape, descriptor.strides, box, base.element_size(), swizzle)


def _of_all_lanes(x: Any) -> Any:
    """As an array of the integer type that PTX reads it with."""
    array = np.full(32, x)
    if array.dtype.itemsize < 4:
        raise NotImplementedError(f"a parameter of {array.dtype.itemsize} bytes")
    array.flags.writeable = False
    return array.view(f"i{array.dtype.itemsize}")
