"""A head dim as chunks of columns, whose widths are powers of two (footprint.chunks): 96 = 64 + 32.

Of each chunk there is a TMA descriptor of the tensor, its own shared memory, and an accumulator.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait


@gluon.jit
def chunks_of(first, rest):
    """The descriptors of a tensor as a tuple."""
    if rest is None:
        return (first,)
    else:
        return (first, rest)


@gluon.constexpr_function
def bytes_of(chunks):
    return sum(chunk.block_type.nbytes for chunk in chunks)


@gluon.constexpr_function
def stages_of(chunk, STAGES):
    return [STAGES, *chunk.block_type.shape]


@gluon.jit
def allocate_tiles(chunks, STAGES: gl.constexpr):
    """Of each chunk shared memory for STAGES blocks of its descriptor."""
    tiles = ()
    for c in gl.static_range(len(chunks)):
        tiles += (gl.allocate_shared_memory(chunks[c].dtype, stages_of(chunks[c], STAGES), chunks[c].layout),)
    return tiles


@gluon.jit
def accumulators(chunks):
    """Of each chunk: [rows, columns] f32 0, laid out as a warpgroup's product."""
    acc = ()
    for c in gl.static_range(len(chunks)):
        acc += (accumulator(chunks[c].block_type.shape[2], chunks[c].block_type.shape[3]),)
    return acc


@gluon.jit
def accumulator(ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    return gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)


@gluon.jit
def finished(products, PENDING: gl.constexpr):
    """The tuple of products, when none is in flight but the PENDING that were issued last."""
    results = warpgroup_mma_wait(PENDING, deps=products)
    if len(products) == 1:
        return (results,)
    else:
        return results
