"""Shadow: who read and wrote each word of shared memory last, and whether whoever comes next has waited for that.

Vector clocks, as in race detectors for threads (Flanagan, Freund: FastTrack, PLDI 2009). An agent is somebody with a
clock of his own: a warp; the products (wgmma) of a warp, its TMA stores, its copies (cp.async), whose clocks count
committed groups; the TMA loads of an mbarrier, whose clock counts its phases. knows[warp, agent]: up to which of the
agent's ticks all is done, as far as the warp can know from what it waited for. A warp may touch a word only if it knows
of the last write, and may write it only if it knows of all reads, too. So a missing wait shows in any order of events.

Words have four bytes. Different warps may write different bytes of a word, and all the same into one, as the compiler
lets them do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator.arithmetic import EmulatorError
from tests.emulator.ptx import Place

Array = np.ndarray[Any, Any]
Words = Array | slice
NUM_BARRIERS = 96
FORBIDDEN = 2**31 - 1  # the clock of what nobody may touch: an mbarrier


class Race(EmulatorError):
    """Two accesses that nothing orders."""


class Shadow:
    """Agents, in order: num_warps warps, their products, their stores, their copies; then the loads of mbarriers."""

    def __init__(self, num_words: int, num_warps: int, places: list[Place]) -> None:
        self.num_warps, self.num_readers, self.first_load, self.places = num_warps, 3 * num_warps, 4 * num_warps, places
        # What each warp knows is done, and of that what lies behind a fence.proxy.async: TMA and wgmma see no other
        # stores of warps. The fence may be any warp's on the way: PTX ISA, "Proxy-preserved base causality order".
        # (Of copies this is not asked: Triton, in loops that it pipelines, puts no fence between them and wgmma.)
        self.state = np.zeros((num_warps, 2, self.first_load + NUM_BARRIERS), np.int32)
        self.knows, self.fenced = self.state[:, 0], self.state[:, 1]
        self.fenced[:, num_warps:] = FORBIDDEN - 1
        self.clock = np.ones(num_warps, np.int32)
        for warp in range(num_warps):
            self.knows[warp, warp] = 1
        self.writer = np.zeros(num_words, np.int16)
        self.written = np.zeros(num_words, np.int32)
        self.written_at = np.zeros(num_words, np.int32)
        self.read_by = np.zeros((self.num_readers, num_words), np.int32)
        self.read_at = np.zeros((self.num_readers, num_words), np.int32)

    def release(self, warp: int) -> Array:
        """What others learn who wait for this moment."""
        known = self.state[warp].copy()
        self._tick(warp)
        return known

    def acquire(self, warp: int, known: Array) -> None:
        np.maximum(self.state[warp], known, out=self.state[warp])

    def read(self, warp: int, words: Words, number: int, agent: int | None = None, clock: int = 0) -> None:
        """By the warp, or by an agent of it at such a clock, which sees what the warp knows, if it is fenced."""
        self._check_written(warp, words, number, "reads")
        if agent is None:
            agent, clock = warp, int(self.clock[warp])
        else:
            self._check_fenced(warp, words, number, "reads")
        self.read_by[agent, words] = clock
        self.read_at[agent, words] = number

    def write(
        self,
        warp: int,
        words: Words,
        number: int,
        agent: int | None = None,
        clock: int = 0,
        changes: Callable[[], Array] | None = None,
    ) -> None:
        """By the warp, or by an agent: its copies, or the loads of an mbarrier.

        changes: which words it changes, where not all.
        """
        self._check_written(warp, words, number, "writes", changes)
        if agent is not None and agent >= self.first_load:
            self._check_fenced(warp, words, number, "writes over")
        late = self.read_by[:, words] > self.knows[warp, : self.num_readers, None]
        if late.any():
            reader, column = np.argwhere(late)[0]
            place = self.places[self.read_at[reader, words][column]]
            raise Race(f"{self.places[number]} writes what {self.name(int(reader))} may still read at {place}")
        if agent is None:
            agent, clock = warp, int(self.clock[warp])
        self.writer[words], self.written[words], self.written_at[words] = agent, clock, number

    def fence(self, warp: int) -> None:
        np.maximum(self.fenced[warp], self.knows[warp], out=self.fenced[warp])
        self._tick(warp)

    def _tick(self, warp: int) -> None:
        self.clock[warp] += 1
        self.knows[warp, warp] = self.clock[warp]

    def _check_fenced(self, warp: int, words: Words, number: int, what: str) -> None:
        late = self.fenced[warp][self.writer[words]] < self.written[words]
        if late.any():
            place = self.places[self.written_at[words][late][0]]
            raise Race(f"{self.places[number]} {what} what {place} wrote, without a fence.proxy.async after it")

    def _check_written(
        self, warp: int, words: Words, number: int, what: str, changes: Callable[[], Array] | None = None
    ) -> None:
        late = self.knows[warp][self.writer[words]] < self.written[words]
        if late.any() and changes:
            late &= changes() | (self.written[words] == FORBIDDEN)
        if late.any():
            writer, place = self.writer[words][late][0], self.places[self.written_at[words][late][0]]
            if self.written[words][late][0] == FORBIDDEN:
                raise Race(f"{self.places[number]} {what} the mbarrier of {place}")
            raise Race(f"{self.places[number]} {what} what {self.name(int(writer))} may still write at {place}")

    def forbid(self, warp: int, words: Words, number: int) -> None:
        """These are an mbarrier now."""
        self.write(warp, words, number)
        self.written[words] = FORBIDDEN

    def name(self, agent: int) -> str:
        of, warp = divmod(agent, self.num_warps)
        kinds = ("", "wgmma of ", "a TMA store of ", "cp.async of ")
        return f"{kinds[of]}warp {warp}" if of < len(kinds) else "a TMA load"
