"""How a role of a Hopper kernel walks the tiles of a row: as values that it carries from step to step."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.kernels.record import record
from anymask.kernels.tile import next_tile, open_row, start_of


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
