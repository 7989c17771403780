"""TensorMap: what TMA knows of a tensor; and how it lays out a box in shared memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.emulator.arithmetic import EmulatorError
from tests.emulator.memory import Memory

Array = np.ndarray[Any, Any]


class TensorMap:
    """Sizes and strides in the order of the tensor, the last stride 1; coordinates come the other way round.

    swizzle: bytes of a row of a box, whose 16-byte parts are permuted; 0 for none.
    """

    def __init__(
        self,
        memory: Memory,
        pointer: int,
        shape: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        itemsize: int,
        swizzle: int,
    ) -> None:
        self.box, self.shape, self.itemsize, self.swizzle = tuple(box), tuple(shape), itemsize, swizzle
        self.num_bytes = int(np.prod(box)) * itemsize
        steps = [stride * itemsize for stride in strides]
        # CUDA Driver API, cuTensorMapEncodeTiled
        if pointer % 16 or any(step % 16 for step in steps[:-1]) or strides[-1] != 1:
            raise EmulatorError(f"TMA reads no tensor at {pointer:#x} with strides of {steps} bytes")
        if max(box) > 256 or (swizzle and box[-1] * itemsize > swizzle) or box[-1] * itemsize % 16:
            raise EmulatorError(f"TMA takes no box {box} of {itemsize} bytes, swizzled by {swizzle} bytes")
        end = pointer + sum((size - 1) * step for size, step in zip(shape, steps, strict=True)) + itemsize
        storage = memory.storage(pointer, end)
        flat = storage.bytes[pointer - storage.start : end - storage.start].view(f"u{itemsize}")
        self.tensor = np.lib.stride_tricks.as_strided(flat, shape, steps)

    def load(self, coordinates: Sequence[int]) -> Array:
        """The box's bytes, 0 where it lies outside of the tensor."""
        inside, places = self._clipped(coordinates)
        values = np.zeros(self.box, self.tensor.dtype)
        values[places] = self.tensor[inside]
        return values.reshape(-1).view("u1")

    def store(self, coordinates: Sequence[int], data: Array, is_sum: bool) -> None:
        """What lies outside of the tensor is dropped. is_sum: floats are added."""
        inside, places = self._clipped(coordinates)
        values = data.view(self.tensor.dtype).reshape(self.box)[places]
        if is_sum:
            assert self.itemsize == 4, "sums of float32 alone"
            added = self.tensor[inside].view("f4") + values.view("f4")
            self.tensor[inside] = added.view("u4")
        else:
            self.tensor[inside] = values

    def _clipped(self, coordinates: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        starts = list(reversed(coordinates))
        assert len(starts) == len(self.shape)
        low = [min(max(start, 0), size) for start, size in zip(starts, self.shape, strict=True)]
        high = [max(min(start + b, size), 0) for start, b, size in zip(starts, self.box, self.shape, strict=True)]
        inside = tuple(slice(a, max(a, b)) for a, b in zip(low, high, strict=True))
        places = tuple(slice(a - s, max(a, b) - s) for a, b, s in zip(low, high, starts, strict=True))
        if any(a >= b for a, b in zip(low, high, strict=True)):
            places = inside = tuple(slice(0, 0) for _ in starts)
        return inside, places


def swizzled(addresses: Array, width: int) -> Array:
    """PTX ISA, "Swizzling modes": bits of the 16-byte part in a row of `width` bytes ^= those of the 128-byte line."""
    return addresses ^ ((addresses >> 7 & width // 16 - 1) << 4) if width else addresses


@functools.lru_cache(maxsize=1024)
def order(start: int, num_bytes: int, width: int) -> Array:
    """Of the 16-byte parts of a box, where each lies, counted from the box's start; start: its address modulo 1024."""
    addresses = start + np.arange(0, num_bytes, 16)
    return (swizzled(addresses, width) - start) // 16
