"""What warps wait for: mbarriers and named barriers, with what those learn who have waited."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulator.arithmetic import EmulatorError

Array = np.ndarray[Any, Any]
MAX_BYTES = 2**20 - 1


class MBarrier:
    """PTX ISA, "mbarrier": a phase ends when all expected have arrived and all expected bytes have come.

    agent: its loads, as the Shadow knows them.  made: the warp that initialised it, and its clock then.  known,
    released: what Shadow.release gives.
    """

    def __init__(self, count: int, agent: int, num_agents: int, made: tuple[int, int]) -> None:
        self.count = self.pending = count
        self.bytes = 0  # that are still to come, negative if they came before they were expected
        self.phase = 0
        self.agent, self.made = agent, made
        self.known = np.zeros((2, num_agents), np.int32)  # by those who arrived
        self.released = self.known.copy()  # of the phases that have ended
        self.last_load = 0

    def expect(self, num_bytes: int) -> None:
        self.bytes += num_bytes
        if abs(self.bytes) > MAX_BYTES:
            raise EmulatorError(f"an mbarrier expects {self.bytes} bytes")

    def arrive(self, known: Array, count: int = 1) -> None:
        if self.pending < count:
            raise EmulatorError(f"{count} arrive at an mbarrier that waits for {self.pending} of {self.count}")
        np.maximum(self.known, known, out=self.known)
        self.pending -= count
        self.end_phase()

    def complete(self, num_bytes: int) -> None:
        self.bytes -= num_bytes
        self.end_phase()

    def end_phase(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            self.known[0, self.agent] = self.phase
            self.released = self.known.copy()

    def has_ended(self, parity: int) -> bool:
        """The phase of this parity, if it is the current one or the one before it."""
        return self.phase % 2 != parity


class Meeting:
    """One use of a named barrier: until so many threads have come; they count as whole warps. PTX ISA, "barrier"."""

    def __init__(self, num_threads: int, num_agents: int) -> None:
        self.num_threads, self.num_here = num_threads, 0
        self.warps: set[int] = set()
        self.known = np.zeros((2, num_agents), np.int32)

    def come(self, warp: int, num_threads: int, known: Array) -> None:
        if num_threads != self.num_threads or num_threads % 32:
            raise EmulatorError(f"a named barrier of {self.num_threads} threads is used for {num_threads}")
        if warp in self.warps:
            raise EmulatorError("a warp comes again to a named barrier at which others are still to come")
        self.warps.add(warp)
        np.maximum(self.known, known, out=self.known)
        self.num_here += 32

    @property
    def is_over(self) -> bool:
        return self.num_here >= self.num_threads
