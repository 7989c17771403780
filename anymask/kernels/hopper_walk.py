"""How a role of a Hopper kernel walks the tiles of a row: as values that it carries from step to step. And how a
persistent program comes by its rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.kernels.record import record
from anymask.kernels.tile import next_tile, open_row, start_of

# So many loads before its row ends, a producer wants the next one found: later it would come too late, and sooner the
# programs would take unequal parts of the work.
WANTED_AHEAD = gl.constexpr(2)


@gluon.jit
def draw_rows(queue, call, num_rows, FIELDS_OF: gl.constexpr, shared=None, THEN: gl.constexpr = None):
    """Put the rows that this program works on into the queue: of its own number, then of numbers from the counter.

    FIELDS_OF(call, number): a row's fields, the first of which is not negative; after the last row it is.
    THEN(call, shared, n, fields): done once row number n of this program has been put.
    Who counts itself out last sets the counter back: all have drawn their last number by then.
    """
    number = gl.program_id(0)
    n = gl.to_tensor(0)
    while number < num_rows:
        fields = FIELDS_OF(call, number)
        queue.put(n, fields)
        if THEN is not None:
            THEN(call, shared, n, fields)
        n += 1
        queue.wait(n)
        number = gl.num_programs(0) + gl.atomic_add(call.counter, 1)
    queue.put(n, (-1, 0, 0, 0, 0, 0))
    if gl.atomic_add(call.counter + 1, 1) == gl.num_programs(0) - 1:
        gl.store(call.counter, 0)
        gl.store(call.counter + 1, 0)


@record
class Walking:
    """Where the walk of a row's masked, or full, tiles stands (kernels/tile.py). A tile takes TILE // BLOCK steps."""

    words: gl.tensor
    num_words: gl.tensor
    bits: gl.tensor
    first: gl.tensor
    place: gl.tensor
    ahead: gl.tensor
    TILE: gl.constexpr
    BLOCK: gl.constexpr

    @gluon.jit
    def open(walk, num_words, row, TILE: gl.constexpr, BLOCK: gl.constexpr, IS_FULL: gl.constexpr):
        """At the first of row's tiles, and how many steps they take."""
        STEPS: gl.constexpr = TILE // BLOCK
        words, num_tiles, bits, first, ahead = open_row(walk, num_words, row, None, TILE, IS_FULL)
        place = gl.to_tensor(0)
        return Walking(words, num_words, bits, first, place, ahead, TILE, BLOCK), num_tiles * STEPS

    @gluon.jit
    def start(self, step):
        """First position of step `step`."""
        return start_of(self.num_words, self.bits, self.first, step, self.TILE, self.BLOCK)

    @gluon.jit
    def after(self, step):
        """Where it stands after step `step`."""
        STEPS: gl.constexpr = self.TILE // self.BLOCK
        bits, first, place, ahead = next_tile(
            self.words, self.num_words, self.bits, self.first, self.place, self.ahead, step, STEPS
        )
        return Walking(self.words, self.num_words, bits, first, place, ahead, self.TILE, self.BLOCK)


@record
class Counting:
    """Tiles one after the other from a first position on: what a row visits that has no walk."""

    first: gl.tensor
    BLOCK: gl.constexpr

    @gluon.jit
    def start(self, step):
        return self.first + step * self.BLOCK

    @gluon.jit
    def after(self, step):
        return self
