"""How warpgroups of a Hopper kernel wait for each other: rings of tiles that TMA fills, turns at the tensor cores.

And the TMA operation that Triton 3.6 has no name for.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from anymask.kernels.record import record


@record
class Ring:
    """Tiles in shared memory that one producer fills by TMA and consumers read, load after load.

    Load i lies in stage i % STAGES. Barrier full of a stage: its load has come. empty: all consumers are done with it.
    A fresh barrier lets the wait for the phase before its first pass, so the first STAGES loads wait for nobody.
    """

    tiles: gl.shared_memory_descriptor  # [STAGES, 1, 1, BLOCK, D]
    full: gl.shared_memory_descriptor  # [STAGES, 1]
    empty: gl.shared_memory_descriptor  # [STAGES, 1]
    STAGES: gl.constexpr

    @gluon.jit
    def create(tensor, STAGES: gl.constexpr, NUM_CONSUMERS: gl.constexpr):
        """An empty ring for tiles of the descriptor `tensor`."""
        BLOCK: gl.constexpr = tensor.block_type.shape[2]
        D: gl.constexpr = tensor.block_type.shape[3]
        tiles = gl.allocate_shared_memory(tensor.dtype, [STAGES, 1, 1, BLOCK, D], tensor.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=NUM_CONSUMERS)
        return Ring(tiles, full, empty, STAGES)

    @gluon.jit
    def begin(self, i, num_bytes):
        """The barrier that load i, of so many bytes, is to complete, once its stage is empty."""
        stage = i % self.STAGES
        full = self.full.index(stage)
        mbarrier.wait(self.empty.index(stage), (i // self.STAGES & 1) ^ 1)
        mbarrier.expect(full, num_bytes)
        return full

    @gluon.jit
    def load(self, i, tensor, b, h, start):
        """Load i: rows start .. start + BLOCK of head h of batch b, zeros where the tensor ends."""
        full = self.begin(i, tensor.block_type.nbytes)
        tma.async_copy_global_to_shared(tensor, [b, h, start, 0], full, self.tiles.index(i % self.STAGES))

    @gluon.jit
    def wait(self, i):
        """Until load i has come."""
        mbarrier.wait(self.full.index(i % self.STAGES), i // self.STAGES & 1)

    @gluon.jit
    def tile(self, i):
        """[BLOCK, D] of load i."""
        return self.tiles.index(i % self.STAGES).reshape([self.tiles.shape[3], self.tiles.shape[4]])

    @gluon.jit
    def release(self, i):
        """This consumer is done with load i."""
        mbarrier.arrive(self.empty.index(i % self.STAGES), count=1)


@builtin
def reduce_add(tensor, coord, tile, _semantic=None):
    """Add a tile in shared memory to the tensor (f32) of a descriptor, by TMA: what lies past its end is dropped.

    Committed like a store: tma.store_wait waits until the tile has been read. Newer Tritons: tma.async_atomic_add.
    """
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor.handle, coord, tile.handle)


# --- turns: two warpgroups issue their products one after the other, so that one's softmax overlaps the other's
# products. Named barrier 14 is the turn of warpgroup 0, 15 of warpgroup 1 (the compiler uses the first few itself): who
# waits for a turn and who passes it on are 128 threads each.


@gluon.constexpr_function
def barrier_asm(what, turn):
    return f"bar.{what} {14 + turn}, 256; mov.u32 $0, 0;"


@gluon.jit
def wait_turn(WARPGROUP: gl.constexpr):
    ASM: gl.constexpr = barrier_asm("sync", WARPGROUP)
    gl.inline_asm_elementwise(ASM, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(WARPGROUP: gl.constexpr):
    """The other warpgroup's turn begins."""
    ASM: gl.constexpr = barrier_asm("arrive", 1 - WARPGROUP)
    gl.inline_asm_elementwise(ASM, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def meet():
    """Both consumers wait for each other, in a kernel without turns."""
    ASM: gl.constexpr = barrier_asm("sync", 0)
    gl.inline_asm_elementwise(ASM, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
