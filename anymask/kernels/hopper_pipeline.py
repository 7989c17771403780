"""What warpgroups of a Hopper kernel wait for: tiles that TMA fills, numbers of rows, each other."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from anymask.kernels.hopper_chunks import allocate_tiles, bytes_of
from anymask.kernels.record import record

# Triton 3.6 has the longer names only, 3.9 the shorter ones only.
begin_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
begin_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
IS_NAMED_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@builtin
def _reduce_add(tensor, coord, tile, _semantic=None):
    """Add a tile in shared memory to the tensor (f32) of a descriptor, by TMA: what lies past its end is dropped.

    Committed like a store: tma.store_wait waits until the tile has been read.
    """
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor.handle, coord, tile.handle)


reduce_add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _reduce_add


@gluon.jit
def seen_as(place, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Shared memory as another tensor."""
    if IS_NAMED_REINTERPRET:
        return place.reinterpret(DTYPE, SHAPE, LAYOUT)
    else:
        return place._reinterpret(DTYPE, SHAPE, LAYOUT)


@gluon.jit
def write_number(place, number):
    """By a role of one warp, into [1] int32 in shared memory."""
    of_one_warp: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    place.store(gl.full([1], number, gl.int32, of_one_warp))


@gluon.jit
def read_number(place, NUM_WARPS: gl.constexpr):
    """By a role of so many warps."""
    of_a_role: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    return gl.max(place.load(of_a_role), 0)


@gluon.constexpr_function
def is_number(x):
    return isinstance(x, int)


@record
class Ring:
    """Tiles in shared memory that one producer fills by TMA and consumers read, load after load.

    Load i lies in stage i % STAGES. Barrier full of a stage: its load has come. empty: all consumers are done with it.
    The first STAGES loads wait for nobody.
    A tile is in chunks of columns, side by side, each with a descriptor of the tensor: D = 96 as 64 + 32.
    """

    tiles: gl.tuple  # of each chunk: [STAGES, 1, 1, BLOCK, columns]
    full: gl.shared_memory_descriptor  # [STAGES, 1]
    empty: gl.shared_memory_descriptor | gl.constexpr  # [STAGES, 1], or the first of STAGES named barriers
    STAGES: gl.constexpr
    NUM_CONSUMERS: gl.constexpr

    @gluon.jit
    def create(chunks, STAGES: gl.constexpr, NUM_CONSUMERS: gl.constexpr, EMPTY: gl.constexpr = None):
        """An empty ring for tiles of the descriptors `chunks`.

        EMPTY: the first of STAGES named barriers for empty; mbarriers if None. At a named barrier each warp arrives for
        itself; at an mbarrier a thread does for its warpgroup, whose warps wait for each other first.
        """
        tiles = allocate_tiles(chunks, STAGES)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
        if EMPTY is None:
            empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
            for stage in gl.static_range(STAGES):
                mbarrier.init(empty.index(stage), count=NUM_CONSUMERS)
            return Ring(tiles, full, empty, STAGES, NUM_CONSUMERS)
        else:
            return Ring(tiles, full, EMPTY, STAGES, NUM_CONSUMERS)

    @gluon.jit
    def wait_empty(self, i):
        """Until the stage of load i is empty. Once for each load."""
        if is_number(self.empty):
            if i >= self.STAGES:
                sync(self.empty + i % self.STAGES, 32 + 128 * self.NUM_CONSUMERS)
        else:
            # a fresh barrier lets the wait for the phase before its first pass
            mbarrier.wait(self.empty.index(i % self.STAGES), (i // self.STAGES & 1) ^ 1)

    @gluon.jit
    def begin(self, i, NUM_BYTES: gl.constexpr):
        """The barrier that load i, of so many bytes, completes when they have come. Its stage must be empty."""
        full = self.full.index(i % self.STAGES)
        mbarrier.expect(full, NUM_BYTES)
        return full

    @gluon.jit
    def fill(self, i, chunks, b, h, start, full):
        """Load i, begun: rows start .. start + BLOCK of head h of batch b, zeros where the tensor ends."""
        stage = i % self.STAGES
        column = 0
        for c in gl.static_range(len(chunks)):
            begin_load(chunks[c], [b, h, start, column], full, self.tiles[c].index(stage))
            column += chunks[c].block_type.shape[3]

    @gluon.jit
    def load(self, i, chunks, b, h, start):
        """Load i, which is a tile and nothing else."""
        self.wait_empty(i)
        self.fill(i, chunks, b, h, start, self.begin(i, bytes_of(chunks)))

    @gluon.jit
    def wait(self, i):
        """Until load i has come."""
        mbarrier.wait(self.full.index(i % self.STAGES), i // self.STAGES & 1)

    @gluon.jit
    def tile(self, i, C: gl.constexpr, zero=0):
        """[BLOCK, columns] of chunk C of load i. zero: 0, which the compiler may not know (see gradient_step)."""
        tiles = self.tiles[C]
        if self.STAGES == 1:
            stage = zero  # i % 1 would be known
        else:
            stage = i % self.STAGES
        return tiles.index(stage).reshape([tiles.shape[3], tiles.shape[4]])

    @gluon.jit
    def chunks(self, i, zero=0):
        """All chunks of load i, side by side."""
        tiles = ()
        for c in gl.static_range(len(self.tiles)):
            tiles += (self.tile(i, c, zero),)
        return tiles

    @gluon.jit
    def blocks(self, i):
        """All chunks of load i, each as a block of its descriptor."""
        blocks = ()
        for c in gl.static_range(len(self.tiles)):
            blocks += (self.tiles[c].index(i),)
        return blocks

    @gluon.jit
    def release(self, i):
        """This consumer is done with load i."""
        if is_number(self.empty):
            arrive(self.empty + i % self.STAGES, 32 + 128 * self.NUM_CONSUMERS)
        else:
            mbarrier.arrive(self.empty.index(i % self.STAGES), count=1)


@record
class Handover:
    """Tiles that one consumer hands to another by way of shared memory, one after the other.

    FIRST: of four named barriers, full and empty of both places.
    """

    tiles: gl.shared_memory_descriptor  # [2, rows, columns]
    FIRST: gl.constexpr

    @gluon.jit
    def create(ROWS: gl.constexpr, COLUMNS: gl.constexpr, DTYPE: gl.constexpr, FIRST: gl.constexpr):
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], DTYPE)
        return Handover(gl.allocate_shared_memory(DTYPE, [2, ROWS, COLUMNS], LAYOUT), FIRST)

    @gluon.jit
    def put(self, i, x):
        """The i-th tile, when the one before the last has been taken."""
        if i >= 2:
            sync(self.FIRST + 2 + i % 2, 256)
        self.tiles.index(i % 2).store(x)
        arrive(self.FIRST + i % 2, 256)

    @gluon.jit
    def take(self, i, LAYOUT: gl.constexpr):
        """The i-th tile, as soon as it is there."""
        sync(self.FIRST + i % 2, 256)
        x = self.tiles.index(i % 2).load(LAYOUT)
        arrive(self.FIRST + 2 + i % 2, 256)
        return x


@record
class Exchange:
    """Step by step each of two consumers gives the other something, and takes what the other gave, in either order.

    FIRST: of four named barriers: of even and odd steps, of each consumer. So one may be a step ahead.
    """

    FIRST: gl.constexpr

    @gluon.jit
    def give(self, i, WARPGROUP: gl.constexpr):
        """This consumer's part of step i is there."""
        arrive(self.FIRST + i % 2 * 2 + WARPGROUP, 256)

    @gluon.jit
    def take(self, i, WARPGROUP: gl.constexpr):
        """Until the other's part of step i is there."""
        sync(self.FIRST + i % 2 * 2 + 1 - WARPGROUP, 256)


@record
class RowQueue:
    """What rows a program works on: NUM_FIELDS numbers each, from the role that finds them to those that take all."""

    numbers: gl.shared_memory_descriptor  # [2 * NUM_FIELDS, 1] int32
    full: gl.shared_memory_descriptor  # [2, 1]
    empty: gl.shared_memory_descriptor  # [2, 1]
    wanted: gl.shared_memory_descriptor | gl.constexpr  # [1], or None
    NUM_FIELDS: gl.constexpr

    @gluon.jit
    def create(NUM_FIELDS: gl.constexpr, NUM_TAKERS: gl.constexpr, HAS_WANTED: gl.constexpr):
        """HAS_WANTED: who puts rows waits until they are wanted. Else there is no barrier for it: to one that nobody
        waits at, the compiler gives memory that tiles have too (see check_barriers of benchmarks/aot.py).
        """
        numbers = gl.allocate_shared_memory(gl.int32, [2 * NUM_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(2):
            mbarrier.init(full.index(slot), count=1)
            mbarrier.init(empty.index(slot), count=NUM_TAKERS)
        wanted: gl.constexpr = None
        if HAS_WANTED:
            wanted = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
            mbarrier.init(wanted, count=1)
        return RowQueue(numbers, full, empty, wanted, NUM_FIELDS)

    @gluon.jit
    def want(self):
        """The next row should be found: by a role that has taken all that were put."""
        mbarrier.arrive(self.wanted, count=1)

    @gluon.jit
    def wait(self, n):
        """Until the n-th row is wanted, n > 0, and all have taken the row before the last, so that it has a place."""
        mbarrier.wait(self.wanted, (n - 1) & 1)
        mbarrier.wait(self.empty.index(n % 2), (n // 2 & 1) ^ 1)

    @gluon.jit
    def put(self, n, fields):
        """The n-th row, which has a place."""
        slot = n % 2
        for j in gl.static_range(self.NUM_FIELDS):
            write_number(self.numbers.index(slot * self.NUM_FIELDS + j), fields[j])
        mbarrier.arrive(self.full.index(slot), count=1)

    @gluon.jit
    def take(self, n, NUM_WARPS: gl.constexpr):
        """The fields of the n-th row, as soon as it is there, for a role of so many warps."""
        slot = n % 2
        mbarrier.wait(self.full.index(slot), n // 2 & 1)
        fields = ()
        for j in gl.static_range(self.NUM_FIELDS):
            fields += (read_number(self.numbers.index(slot * self.NUM_FIELDS + j), NUM_WARPS),)
        mbarrier.arrive(self.empty.index(slot), count=1)
        return fields


# --- named barriers, where whole warps wait or only arrive. There are 16, and the compiler takes the first four.

FIRST_BARRIER = gl.constexpr(4)


@gluon.constexpr_function
def barrier_asm(what, NUM_THREADS):
    return f"{what} $1, {NUM_THREADS}; mov.u32 $0, 0;"


@gluon.jit
def sync(barrier, NUM_THREADS: gl.constexpr):
    """Until so many threads have come here, or arrived. What they wrote before, and read, they have."""
    # not bar: each role has an instruction of its own, and bar promises that it is the same for all threads
    ASM: gl.constexpr = barrier_asm("barrier.sync", NUM_THREADS)
    gl.inline_asm_elementwise(ASM, "=r,r,~{memory}", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def arrive(barrier, NUM_THREADS: gl.constexpr):
    """As one of the threads that others wait for."""
    ASM: gl.constexpr = barrier_asm("barrier.arrive", NUM_THREADS)
    gl.inline_asm_elementwise(ASM, "=r,r,~{memory}", [barrier], dtype=gl.int32, is_pure=False, pack=1)


# Turns: warpgroups issue their products one after the other, so that one's softmax overlaps the others' products.
# Barrier LAST_BARRIER is the turn of warpgroup 0, the one before it of warpgroup 1.
LAST_BARRIER = gl.constexpr(15)


@gluon.jit
def wait_turn(WARPGROUP: gl.constexpr):
    sync(gl.to_tensor(LAST_BARRIER - WARPGROUP), 256)


@gluon.jit
def pass_turn(WARPGROUP: gl.constexpr, NUM_CONSUMERS: gl.constexpr):
    """The next warpgroup's turn begins."""
    arrive(gl.to_tensor(LAST_BARRIER - (WARPGROUP + 1) % NUM_CONSUMERS), 256)


@gluon.jit
def meet():
    """Both consumers wait for each other, in a kernel without turns."""
    sync(gl.to_tensor(LAST_BARRIER), 256)


@gluon.jit
def meet_warps(WARPGROUP: gl.constexpr):
    """The warps of a consumer wait for each other, in a kernel without turns in which consumers do not meet."""
    sync(gl.to_tensor(LAST_BARRIER - WARPGROUP), 128)
