"""Memory: the tensors that a launch was given, by address; what lies outside of them is out of bounds."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from tests.emulator.arithmetic import EmulatorError, i8, u1

Array = np.ndarray[Any, Any]


class Storage:
    """Bytes start .. end, seen as numbers of 1, 2, 4, 8 bytes."""

    def __init__(self, start: int, num_bytes: int) -> None:
        self.start, self.end = start, start + num_bytes
        self.bytes = np.frombuffer((ctypes.c_uint8 * num_bytes).from_address(start), u1)
        self.views = {size: self.bytes[: num_bytes // size * size].view(f"u{size}") for size in (1, 2, 4, 8)}


class Memory:
    def __init__(self, tensors: Iterable[Tensor]) -> None:
        # the storages, each once; the tensors are kept alive by whoever launches
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        self.storages = [Storage(start, size) for start, size in sorted(sizes.items()) if size]
        self.starts = [storage.start for storage in self.storages]

    def storage(self, low: int, high: int) -> Storage:
        """The one that holds bytes low .. high."""
        i = bisect.bisect_right(self.starts, low) - 1
        if i < 0 or high > self.storages[i].end:
            where = f", {low - self.storages[i].end} bytes past the end of a tensor" if i >= 0 else ""
            raise EmulatorError(f"global address {low:#x} .. {high:#x} is in no tensor of this launch{where}")
        return self.storages[i]

    def load(self, addresses: Array, size: int, count: int, mask: Array | None) -> Array:
        """[count, 32] numbers of `size` bytes; 0 for lanes without the mask."""
        active = addresses if mask is None else addresses[mask]
        result = np.zeros((count, 32), f"u{size}")
        for lanes, storage, index in self._places(active, size, count):
            found = storage.views[size][index[None, :] + np.arange(count)[:, None]]
            if mask is None:
                result[:, lanes] = found
            else:
                result[:, np.flatnonzero(mask)[lanes]] = found
        return result

    def store(self, addresses: Array, size: int, values: tuple[Array, ...], mask: Array | None) -> None:
        active = addresses if mask is None else addresses[mask]
        for lanes, storage, index in self._places(active, size, len(values)):
            for i, value in enumerate(values):
                storage.views[size][index + i] = (value if mask is None else value[mask])[lanes]

    def add(self, addresses: Array, values: Array, mask: Array | None) -> Array:
        """What was there before, lane by lane."""
        before = np.zeros(32, "u4")
        for lane in range(32) if mask is None else np.flatnonzero(mask):
            address = int(addresses[lane])
            storage = self.storage(address, address + 4)
            place = storage.views[4][(address - storage.start) // 4 :][:1]
            before[lane] = place[0]
            place += values[lane]
        return before

    def _places(self, addresses: Array, size: int, count: int) -> list[tuple[Any, Storage, Array]]:
        """Lanes by storage, with their indices there."""
        if not addresses.size:
            return []
        width = size * count
        if (addresses & (width - 1)).any():
            raise EmulatorError(f"a global address is no multiple of {width} bytes")
        low, high = int(addresses.min()), int(addresses.max())
        storage = self.storage(low, low + width)
        if high + width <= storage.end:
            return [(slice(None), storage, (addresses - i8(storage.start)) // size)]
        found = [self.storage(int(a), int(a) + width) for a in addresses]
        lanes = {id(storage): [i for i, x in enumerate(found) if x is storage] for storage in found}
        by_id = {id(storage): storage for storage in found}
        return [(own, by_id[k], (addresses[own] - by_id[k].start) // size) for k, own in lanes.items()]
