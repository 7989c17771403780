"""Block: the warps of one program, its shared memory and barriers, and what TMA does beside them.

Warps run in an order drawn from a seed: where a warp may have to wait, and at some other places, the turn may pass. TMA
copies in a random order, some time after it was told to; until then what it will write is 0xFF.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.emulator import tensor_core, tma
from tests.emulator.arithmetic import LANES, EmulatorError, u1, u4
from tests.emulator.barriers import MBarrier, Meeting
from tests.emulator.memory import Memory
from tests.emulator.shadow import NUM_BARRIERS, Race, Shadow
from tests.emulator.translate import Program

Array = np.ndarray[Any, Any]
Condition = Callable[[], bool] | None
KILOBYTE = 1024  # tiles are aligned to it; tensor_core and tma count from its multiples


class Block:
    """maps: tensor maps by the address of their parameter.  parameters: [32] each.  index, grid: x, y, z."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        maps: dict[int, tma.TensorMap],
        parameters: list[Array],
        num_shared_bytes: int,
        index: tuple[int, ...],
        grid: tuple[int, ...],
        seed: Any,
    ) -> None:
        self.program, self.memory, self.maps, self.parameters = program, memory, maps, parameters
        self.num_threads = program.kernel.num_threads
        self.index, self.grid = index, grid
        num_bytes = -(-max(num_shared_bytes, 1) // 16) * 16
        self.shared = np.full(num_bytes, 0xFF, u1)
        self.views = {size: self.shared.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.parts = self.shared.reshape(-1, 16)
        self.shadow = Shadow(num_bytes // 4, self.num_threads // 32, program.places)
        self.barriers: dict[int, MBarrier] = {}
        self.meetings: dict[int, Meeting] = {}
        self.issued: dict[int, list[int]] = {}  # by warpgroup the numbers of its products
        self.under_way: list[Callable[[], None]] = []  # what TMA has been told to do
        self.random = random.Random(str(seed))
        # how often the turn passes and TMA does something, and how slow each warp is: a matter of the seed, too
        self.switching = self.random.choice((0.02, 0.3, 1.0))
        self.copying = self.random.choice((0.05, 0.5, 0.95))
        self.warps = [Warp(self, i) for i in range(self.num_threads // 32)]
        self.weights = {warp: self.random.choice((1.0, 1.0, 0.1)) for warp in self.warps}

    def turns(self) -> Iterator[None]:
        """Runs the block, a warp's turn at a time."""
        draw = self.random.random
        live = list(self.warps)
        while live:
            if self.under_way and draw() < self.copying:
                self._copy()
            for warp in sorted(live, key=lambda warp: draw() * self.weights[warp], reverse=True):
                if warp.waits_for is None or warp.waits_for():
                    warp.waits_for = None
                    break
            else:
                if not self.under_way:
                    waiting = "\n".join(f"    warp {warp.index}: {self._where(warp)}" for warp in live)
                    raise EmulatorError(f"{self}: all warps wait for each other\n{waiting}")
                self._copy()
                continue
            if self._run_warp(warp):
                live.remove(warp)
            yield
        self._check_end()

    def _run_warp(self, warp: Warp) -> bool:
        """Until it waits or its turn is over; whether it has ended."""
        draw = self.random.random
        try:
            while True:
                condition = next(warp.steps)
                if condition is not None and not condition():
                    warp.waits_for = condition
                    return False
                if draw() < self.switching:
                    return False
        except StopIteration:
            return True
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == f"<{self.program.kernel.name}>"]
            where = self._instruction(lines[0]) if lines and lines[0] else "?"
            kind = type(error) if isinstance(error, EmulatorError) else EmulatorError
            what = f"{error}" if isinstance(error, EmulatorError) else f"{type(error).__name__}: {error}"
            raise kind(f"{self}, warp {warp.index}: {what}\n    at {where}") from error

    def _where(self, warp: Warp) -> str:
        return self._instruction(warp.steps.gi_frame.f_lineno)

    def _instruction(self, line: int) -> str:
        instruction = self.program.of_line[line - 1]
        return f"{instruction.place}: {instruction}"

    def __str__(self) -> str:
        return f"{self.program.kernel.name}, block {self.index[0]}"

    def _copy(self) -> None:
        i = self.random.randrange(len(self.under_way))
        self.under_way[i], self.under_way[-1] = self.under_way[-1], self.under_way[i]
        self.under_way.pop()()

    def _check_end(self) -> None:
        """Nobody writes or reads shared memory when the block has ended."""
        for address, barrier in self.barriers.items():
            if barrier.last_load > self.shadow.knows[:, barrier.agent].max():
                raise Race(f"{self} ends, but nobody has waited for the last load of the mbarrier at {address}")
        for warp in self.warps:
            if warp.stores.num_done < warp.stores.num_committed or warp.stores.open_group:
                raise Race(f"{self} ends, but warp {warp.index} has not waited for its TMA stores to be read")
            if warp.products.num_done < warp.products.num_committed:
                raise Race(f"{self} ends, but warp {warp.index} has not waited for its products")
            if warp.products.num_issued < len(self.issued.get(warp.index // 4, ())):
                raise EmulatorError(f"{self} ends, but warp {warp.index} has not issued all products of its warpgroup")
        while self.under_way:
            self._copy()

    def barrier(self, warp: Warp, address: int) -> MBarrier:
        barrier = self.barriers.get(address)
        if barrier is None:
            raise EmulatorError(f"there is no mbarrier at {address} of shared memory")
        maker, clock = barrier.made
        if self.shadow.knows[warp.index, maker] < clock:
            raise Race(f"the mbarrier at {address} may not be initialised yet")
        return barrier


class Warp:
    """What a translated program calls. Addresses come as registers and a constant to add, masks as lanes or None.

    number: of the instruction, for those that a race may name.  steps: the program; it yields what it waits for.
    """

    def __init__(self, block: Block, index: int) -> None:
        self.block, self.index, self.parameters = block, index, block.parameters
        self.thread = LANES + np.int32(32 * index)
        for axis, of_block, of_grid in zip("xyz", block.index, block.grid, strict=True):
            setattr(self, f"block_{axis}", np.full(32, of_block, np.int32))
            setattr(self, f"grid_{axis}", np.full(32, of_grid, np.int32))
        self.stores, self.products, self.copies = Stores(self), Products(self), Copies(self)
        self.waits_for: Condition = None
        self.steps: Any = block.program.run(self)

    # --- memory

    def load_global(
        self, base: Array, offset: int, size: int, count: int, mask: Array | None, number: int = 0
    ) -> Array:
        return self.block.memory.load(base + np.int64(offset), size, count, mask)

    def store_global(
        self, base: Array, offset: int, size: str, values: tuple[Array, ...], mask: Array | None, number: int
    ) -> None:
        self.block.memory.store(base + np.int64(offset), int(size), values, mask)

    def add_global(self, base: Array, offset: int, values: Array, mask: Array | None) -> Array:
        return self.block.memory.add(base + np.int64(offset), values, mask)

    def _shared(self, base: Array, offset: int, size: int, count: int, mask: Array | None) -> tuple[Array, Array]:
        """[count, lanes] numbers of `size` bytes, and the words that they are in."""
        addresses = base + u4(offset)
        if mask is not None:
            addresses = addresses[mask]
        if (addresses & u4(size * count - 1)).any():
            raise EmulatorError(f"a shared address is no multiple of {size * count} bytes")
        index = (addresses // u4(size))[None, :] + np.arange(count, dtype=u4)[:, None]
        if addresses.size and int(addresses.max()) + size * count > self.block.shared.size:
            raise EmulatorError(f"shared address {addresses.max()} is past the end, {self.block.shared.size}")
        if size == 8:
            words = np.concatenate((2 * index, 2 * index + u4(1)), 1)
        else:
            words = index if size == 4 else index // u4(4 // size)
        return index, words.reshape(-1)

    def load_shared(self, base: Array, offset: int, size: int, count: int, mask: Array | None, number: int) -> Array:
        index, words = self._shared(base, offset, size, count, mask)
        self.block.shadow.read(self.index, words, number)
        found = self.block.views[size][index]
        if mask is None:
            return found
        result = np.zeros((count, 32), f"u{size}")
        result[:, mask] = found
        return result

    def store_shared(
        self, base: Array, offset: int, size: int, values: tuple[Array, ...], mask: Array | None, number: int
    ) -> None:
        index, words = self._shared(base, offset, size, len(values), mask)
        stored = np.array(values) if mask is None else np.array(values)[:, mask]

        def changes() -> Array:
            changed = (self.block.views[size][index] != stored).reshape(len(values), -1)
            return (np.concatenate((changed, changed), 1) if size == 8 else changed & (size == 4)).reshape(-1)

        self.block.shadow.write(self.index, words, number, changes=changes)
        self.block.views[size][index] = stored

    def _matrices(self, base: Array, offset: int, count: int) -> Array:
        """[count, 32] words. Lanes 8 i .. 8 i + 7 give the rows of matrix i; lane 4 g + t has word t of row g."""
        addresses = (base + u4(offset))[: 8 * count].reshape(count, 8)
        if (addresses & u4(15)).any():
            raise EmulatorError("a row of a matrix is no multiple of 16 bytes")
        return (addresses // u4(4))[:, LANES // 4] + (LANES % 4).astype(u4)

    def store_matrices(
        self, base: Array, offset: int, values: tuple[Array, ...], is_transposed: bool, number: int
    ) -> None:
        words, view, stored = self._matrices(base, offset, len(values)), self.block.views[4], np.array(values)
        if is_transposed:
            stored = transposed(stored)
        changes = lambda: (view[words] != stored).reshape(-1)
        self.block.shadow.write(self.index, words.reshape(-1), number, changes=changes)
        view[words] = stored

    def load_matrices(self, base: Array, offset: int, count: int, is_transposed: bool, number: int) -> Array:
        words = self._matrices(base, offset, count)
        self.block.shadow.read(self.index, words.reshape(-1), number)
        found = self.block.views[4][words]
        return transposed(found) if is_transposed else found

    # --- barriers

    def _one(self, base: Array, offset: int, mask: Array | None) -> list[int]:
        """The shared address of each lane with the mask."""
        lanes = range(32) if mask is None else np.flatnonzero(mask)
        return [int(base[lane]) + offset for lane in lanes]

    def init_barrier(self, base: Array, offset: int, count: int, mask: Array | None, number: int) -> None:
        block = self.block
        for address in self._one(base, offset, mask):
            if address in block.barriers or address % 8:
                raise EmulatorError(f"an mbarrier at {address} of shared memory, a second time or at no multiple of 8")
            block.shadow.forbid(self.index, slice(address // 4, address // 4 + 2), number)
            agent = block.shadow.first_load + len(block.barriers)
            assert len(block.barriers) < NUM_BARRIERS
            made = (self.index, int(block.shadow.clock[self.index]))
            block.barriers[address] = MBarrier(count, agent, block.shadow.knows.shape[1], made)

    def arrive(self, base: Array, offset: int, count: int, mask: Array | None, number: int) -> None:
        for address in self._one(base, offset, mask):
            self.block.barrier(self, address).arrive(self.block.shadow.release(self.index), count)

    def expect(self, base: Array, offset: int, num_bytes: int, mask: Array | None, number: int) -> None:
        """And arrive."""
        for address in self._one(base, offset, mask):
            barrier = self.block.barrier(self, address)
            barrier.expect(num_bytes)
            barrier.arrive(self.block.shadow.release(self.index))

    def wait(self, base: Array, offset: int, parity: Array, mask: Array | None) -> Condition:
        """The condition that holds when the phase has ended."""
        waited = {
            (address, int(parity[lane])) for lane, address in zip(range(32), self._one(base, offset, None), strict=True)
            if mask is None or mask[lane]
        }  # fmt: skip
        if not waited:
            return None
        if len(waited) > 1:
            raise EmulatorError("lanes of a warp wait at different mbarriers")
        ((address, wanted),) = waited
        barrier = self.block.barrier(self, address)

        def has_ended() -> bool:
            if not barrier.has_ended(wanted):
                return False
            self.block.shadow.acquire(self.index, barrier.released)
            return True

        return has_ended

    def named_barrier(self, number: int, num_threads: int | None, is_sync: bool) -> Condition:
        if not 0 <= number < 16:
            raise EmulatorError(f"there is no named barrier {number}")
        block, shadow = self.block, self.block.shadow
        num_threads = num_threads or block.num_threads
        meeting = block.meetings.setdefault(number, Meeting(num_threads, shadow.knows.shape[1]))
        meeting.come(self.index, num_threads, shadow.release(self.index))
        if meeting.is_over:
            del block.meetings[number]
        if not is_sync:
            return None

        def is_over() -> bool:
            if not meeting.is_over:
                return False
            shadow.acquire(self.index, meeting.known)
            return True

        return is_over

    def fence(self) -> None:
        self.block.shadow.fence(self.index)

    # --- TMA

    def load_tile(
        self,
        base: Array,
        offset: int,
        handle: Array,
        coordinates: tuple[Array, ...],
        barrier_base: Array,
        barrier_offset: int,
        mask: Array | None,
        number: int,
    ) -> None:
        for lane in range(32) if mask is None else np.flatnonzero(mask):
            box = self.block.maps[int(handle[lane])]
            place = [int(c[lane]) for c in coordinates]
            self._load_box(int(base[lane]) + offset, box, place, int(barrier_base[lane]) + barrier_offset, number)

    def _load_box(self, start: int, box: tma.TensorMap, place: list[int], address: int, number: int) -> None:
        block, shadow = self.block, self.block.shadow
        barrier = block.barrier(self, address)
        if start % 128 or start + box.num_bytes > block.shared.size:
            raise EmulatorError(f"TMA writes {box.num_bytes} bytes to {start} of shared memory")
        maker, clock = barrier.made
        if shadow.fenced[self.index, maker] < clock:
            raise Race(f"TMA uses the mbarrier at {address}, initialised without a fence.proxy.async after it")
        words = slice(start // 4, (start + box.num_bytes) // 4)
        barrier.last_load = barrier.phase + 1
        shadow.write(self.index, words, number, barrier.agent, barrier.last_load)
        block.shared[start : start + box.num_bytes] = 0xFF

        def arrive() -> None:
            parts = tma.order(start % KILOBYTE, box.num_bytes, box.swizzle)
            block.parts[start // 16 + parts] = box.load(place).reshape(-1, 16)
            barrier.complete(box.num_bytes)

        block.under_way.append(arrive)


def transposed(matrices: Array) -> Array:
    """[count, 32] words: each matrix, of 8 x 8 halves of words, transposed."""
    halves = np.ascontiguousarray(matrices).view("u2").reshape(-1, 8, 8).transpose(0, 2, 1)
    return np.ascontiguousarray(halves).view(u4).reshape(-1, 32)


class Stores:
    """TMA stores of a warp: those between two commits are a group. PTX ISA, "Bulk async-group completion mechanism"."""

    def __init__(self, warp: Warp) -> None:
        self.warp = warp
        self.num_committed = self.num_done = self.open_group = 0
        self.unread: dict[int, int] = {}  # stores of each group that are still under way

    @property
    def agent(self) -> int:
        return 2 * self.warp.block.shadow.num_warps + self.warp.index

    def store(
        self,
        handle: Array,
        coordinates: tuple[Array, ...],
        base: Array,
        offset: int,
        is_sum: bool,
        mask: Array | None,
        number: int,
    ) -> None:
        for lane in range(32) if mask is None else np.flatnonzero(mask):
            box = self.warp.block.maps[int(handle[lane])]
            self._store_box(box, [int(c[lane]) for c in coordinates], int(base[lane]) + offset, is_sum, number)

    def _store_box(self, box: tma.TensorMap, place: list[int], start: int, is_sum: bool, number: int) -> None:
        block = self.warp.block
        if start % 128 or start + box.num_bytes > block.shared.size:
            raise EmulatorError(f"TMA reads {box.num_bytes} bytes from {start} of shared memory")
        group = self.num_committed + 1
        words = slice(start // 4, (start + box.num_bytes) // 4)
        block.shadow.read(self.warp.index, words, number, self.agent, group)
        self.open_group += 1
        self.unread[group] = self.unread.get(group, 0) + 1

        def store() -> None:
            parts = tma.order(start % KILOBYTE, box.num_bytes, box.swizzle)
            box.store(place, block.parts[start // 16 + parts].reshape(-1), is_sum)
            self.unread[group] -= 1

        block.under_way.append(store)

    def commit(self) -> None:
        self.num_committed += 1
        self.open_group = 0

    def wait(self, num_left: int) -> Condition:
        """All groups but the last so many have been read."""
        last = self.num_committed - num_left

        def is_done() -> bool:
            if any(count for group, count in self.unread.items() if group <= last):
                return False
            self.unread = {group: count for group, count in self.unread.items() if group > last}
            self.num_done = max(self.num_done, last)
            knows = self.warp.block.shadow.knows[self.warp.index]
            knows[self.agent] = max(knows[self.agent], last)
            return True

        return is_done


class Products:
    """wgmma of a warp: computed at once, but read from shared memory until the warp has waited.

    Each warp counts as a reader of all 64 rows of A: PTX does not say that it reads its own 16 alone.
    """

    def __init__(self, warp: Warp) -> None:
        self.warp = warp
        self.num_issued = self.num_committed = self.num_done = 0

    def multiply(
        self,
        before: Array | None,
        a: tuple[Array, ...] | int,
        b: int,
        columns: int,
        kind: str,
        is_a_transposed: bool,
        is_b_transposed: bool,
        number: int,
    ) -> Array:
        """[columns / 2, 32] f32: the registers of before (0 if None) + A @ B."""
        issued = self.warp.block.issued.setdefault(self.warp.index // 4, [])
        if self.num_issued == len(issued):
            issued.append(number)
        elif issued[self.num_issued] != number:
            raise EmulatorError("the warps of a warpgroup issue different products")
        self.num_issued += 1
        if isinstance(a, tuple):
            left = tensor_core.matrix_of_registers(a)
        else:
            first = self.warp.index % 4 * 16
            left = self._matrix(a, 64, is_a_transposed, number)[first : first + 16]
        right = self._matrix(b, columns, is_b_transposed, number)
        product = tensor_core.numbers(left, kind) @ tensor_core.numbers(right, kind).T
        registers = tensor_core.registers_of_matrix(product)
        return registers if before is None else before + registers

    def _matrix(self, descriptor: int, rows: int, is_transposed: bool, number: int) -> Array:
        """[rows, K] uint16."""
        block, shadow = self.warp.block, self.warp.block.shadow
        start = (descriptor & 0x3FFF) << 4
        layout = (descriptor & (2**64 - 1)) >> 16 << 16
        places, words = tensor_core.places(layout, start % KILOBYTE, rows, is_transposed)
        base = start // KILOBYTE * KILOBYTE
        agent = shadow.num_warps + self.warp.index
        shadow.read(self.warp.index, words + base // 4, number, agent, self.num_committed + 1)
        return block.views[2][places + base // 2]

    def commit(self) -> None:
        self.num_committed += 1

    def wait(self, num_left: int) -> None:
        self.num_done = max(self.num_done, self.num_committed - num_left)
        shadow = self.warp.block.shadow
        shadow.knows[self.warp.index, shadow.num_warps + self.warp.index] = self.num_done


class Copies:
    """cp.async of a warp: what it copies comes when the warp waits for it, and is 0xFF before."""

    def __init__(self, warp: Warp) -> None:
        self.warp = warp
        self.num_committed = 0
        self.open_group: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []

    def copy(
        self,
        to: Array,
        to_offset: int,
        of: Array,
        of_offset: int,
        size: int,
        read: Array | None,
        mask: Array | None,
        number: int,
    ) -> None:
        """size bytes a lane, of which `read` are read, and the others 0."""
        warp, count = self.warp, size // 4
        read = np.full(32, size) if read is None else read
        if not np.isin(read, (0, size)).all():
            raise NotImplementedError("cp.async of a part of its bytes")
        is_read = (read == size) if mask is None else (read == size) & mask
        values = warp.load_global(of, of_offset, 4, count, is_read, number)
        index, words = warp._shared(to, to_offset, 4, count, mask)
        shadow = warp.block.shadow
        shadow.write(warp.index, words, number, 3 * shadow.num_warps + warp.index, self.num_committed + 1)
        warp.block.views[4][index] = 0xFFFFFFFF

        def come() -> None:
            warp.block.views[4][index] = values if mask is None else values[:, mask]

        self.open_group.append(come)

    def commit(self) -> None:
        self.groups.append(self.open_group)
        self.open_group = []
        self.num_committed += 1

    def wait(self, num_left: int) -> None:
        while len(self.groups) > num_left:
            for come in self.groups.pop(0):
                come()
        shadow = self.warp.block.shadow
        shadow.knows[self.warp.index, 3 * shadow.num_warps + self.warp.index] = self.num_committed - len(self.groups)
