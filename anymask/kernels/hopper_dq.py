"""dQ on Hopper (sm_90): a producer warp loads tiles by TMA, consumer warpgroups of 64 queries each compute.

For the backward whose gradients are bitwise equal from run to run: a program has a tile of queries and walks the keys
that they see, as the forward does, so nobody else adds to its dQ. A consumer's step: S = Q K^T and dP = dO V^T issued;
P while dP runs; dQ += dS K issued, with dS as an operand in registers. dQ stays in registers to the end.
hopper_rows.py has lse and delta, hopper_bwd.py dK and dV; docs/notes/006-hopper-backward.md has why.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma_wait

from anymask.kernels.functions import near
from anymask.kernels.hopper_chunks import accumulators, bytes_of, chunks_of, finished
from anymask.kernels.hopper_fwd import indices, row_from, row_of, walks_of
from anymask.kernels.hopper_pipeline import FIRST_BARRIER, LAST_BARRIER, Ring, meet_warps, read_number, write_number
from anymask.kernels.hopper_step import copies, product_of_columns, products_of_rows, store_chunks
from anymask.kernels.hopper_work import ROWS
from anymask.kernels.record import record
from anymask.kernels.tile import WALK_SIZES, hidden, log2_probability


@record
class Call:
    """The arguments of hopper_dq_kernel, as its roles read them."""

    q: gl.tuple  # of descriptors, one for each chunk of columns
    k: gl.tuple
    v: gl.tuple
    dout: gl.tuple
    dq: gl.tuple
    rows_pointer: gl.tensor
    row_stride: gl.tensor
    walk: gl.tuple | gl.constexpr
    num_words: gl.tensor | gl.constexpr
    map_strides: gl.tuple
    num_rows: gl.tensor
    num_heads: gl.tensor
    heads_together: gl.tensor
    heads_last: gl.tensor
    Hq: gl.tensor
    Sq: gl.tensor
    Skv: gl.tensor
    scale: gl.tensor
    bindings: gl.tuple
    MASK: gl.constexpr
    SCORE: gl.constexpr
    SCORE_GRAD: gl.constexpr
    G: gl.constexpr
    BLOCK_Q: gl.constexpr
    BLOCK_KV: gl.constexpr
    TILE_Q: gl.constexpr
    TILE_KV: gl.constexpr
    IS_EVEN_KV: gl.constexpr


@record
class Shared:
    """What lies in shared memory. In q and dout a stage is the queries of a consumer.

    tiles: which BLOCK_KV keys each stage of k has.
    """

    q: Ring
    dout: Ring
    k: Ring
    v: Ring
    tiles: gl.shared_memory_descriptor  # [STAGES, 1] int32


# --- the producer ---


@gluon.jit
def load_tiles(call, shared):
    """Role of one warp: load what the consumers read. The walk is a step ahead of the loads."""
    row = row_from(row_of(call, gl.program_id(0)), 0)
    kv_head = row.h // call.G
    masked, full = walks_of(call, row)
    NUM_CONSUMERS: gl.constexpr = call.BLOCK_Q // ROWS
    for consumer in gl.static_range(NUM_CONSUMERS):
        shared.q.load(consumer, call.q, row.b, row.h, row.q_start + consumer * ROWS)
    for consumer in gl.static_range(NUM_CONSUMERS):
        shared.dout.load(consumer, call.dout, row.b, row.h, row.q_start + consumer * ROWS)
    i = 0
    for IS_FULL in gl.static_range(2):
        if IS_FULL:
            tiles = full
            num_steps = row.num_full
        else:
            tiles = masked
            num_steps = row.num_masked
        for step in range(num_steps):
            kv_start = tiles.start(step)
            tiles = tiles.after(step)
            # so consumers need no walk; the barrier of K tells them of it
            shared.k.wait_empty(i)
            write_number(shared.tiles.index(i % shared.k.STAGES), kv_start // call.BLOCK_KV)
            shared.k.fill(i, call.k, row.b, kv_head, kv_start, shared.k.begin(i, bytes_of(call.k)))
            shared.v.load(i, call.v, row.b, kv_head, kv_start)
            i += 1


# --- a consumer ---


@gluon.jit
def row_vector(call, row, WHICH: gl.constexpr, LAYOUT: gl.constexpr):
    """[ROWS, 1] f32 of the consumer's queries: lse in base 2 (0), -delta (1); 0 past the end."""
    q_idx = row.q_start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    first = ((row.b * call.Hq + row.h).to(gl.int64) * 2 + WHICH) * call.row_stride
    return gl.load(call.rows_pointer + first + q_idx, mask=q_idx < call.Sq, other=0.0)[:, None]


@gluon.jit
def shown(x, other, call, row, q_idx, kv_idx, IS_MASKED: gl.constexpr):
    """x, and other where the mask hides the pair or there is no such key.

    (Queries past the end are not stored.)
    """
    if IS_MASKED:
        x = hidden(x, other, 0, 0, row.b, row.h, q_idx, kv_idx, call.bindings, call.MASK, False)
        if not call.IS_EVEN_KV:
            end, column = near(call.Skv, kv_idx)
            x = gl.where(column < end, x, other)
    return x


@gluon.jit
def gradient_step(i, dq, lse_log2, less_delta, call, row, shared, IS_MASKED: gl.constexpr, WARPGROUP: gl.constexpr):
    """dq with the keys of step i added."""
    BLOCK_KV: gl.constexpr = call.BLOCK_KV
    S_LAYOUT: gl.constexpr = lse_log2.type.layout
    DTYPE: gl.constexpr = call.q[0].dtype
    gl.assume(i >= 0)  # then stages are found without regard to the sign
    # 0, but the compiler can't know: so it computes anew, each step, where tiles that stay the same lie, and their
    # addresses take no registers
    zero = i >> 30
    q = shared.q.chunks(WARPGROUP + zero)
    dout = shared.dout.chunks(WARPGROUP + zero)
    k = shared.k.chunks(i)
    v = shared.v.chunks(i)
    zeros = gl.zeros([ROWS, BLOCK_KV], gl.float32, S_LAYOUT)
    shared.k.wait(i)
    # as a multiple of BLOCK_KV, so that the compiler sees that captured vectors may be read two numbers at a time.
    # Behind products that were issued it would come when the last of them has begun
    kv_start = read_number(shared.tiles.index(i % shared.k.STAGES), 4) * BLOCK_KV
    less_delta = copies(less_delta, zeros)
    # S = Q K^T    [ROWS, BLOCK_KV] f32
    s = product_of_columns(q, k, zeros, False)
    # dP - delta = dO V^T - delta    [ROWS, BLOCK_KV] f32
    shared.v.wait(i)
    dp = product_of_columns(dout, v, less_delta, True)
    s = warpgroup_mma_wait(len(v), deps=[s])
    # P    [ROWS, BLOCK_KV] f32
    q_idx, kv_idx = indices(row, kv_start, s)
    p = log2_probability(s, lse_log2, row.b, row.h, q_idx, kv_idx, call.scale, call.bindings, call.SCORE)
    p = gl.exp2(shown(p, float("-inf"), call, row, q_idx, kv_idx, IS_MASKED))
    # dS = P * dT/dS * (dP - delta)    [ROWS, BLOCK_KV] f32. In this order S is done with before dP
    if call.SCORE_GRAD is not None:
        bindings = call.bindings
        p *= call.SCORE_GRAD(s, call.scale, row.b, row.h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2])
        p = shown(p, 0.0, call, row, q_idx, kv_idx, IS_MASKED)
    # Q has come long ago, but ptxas moves nothing past this: else it waits for dP before most of the exponentials.
    # (With K's barrier instead, the compiler has the warps wait for each other twice a step, not once.)
    shared.q.wait(WARPGROUP)
    dp = warpgroup_mma_wait(0, deps=[dp])
    shared.v.release(i)
    # dQ += dS K
    dq = finished(products_of_rows((p * dp).to(DTYPE), k, dq), 0)
    shared.k.release(i)
    return dq


@gluon.jit
def differentiate(call, shared, WARPGROUP: gl.constexpr):
    """Role of a warpgroup: dq of ROWS queries."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_KV, 16])
    MAY_HIDE: gl.constexpr = call.MASK is not None or not call.IS_EVEN_KV
    row = row_from(row_of(call, gl.program_id(0)), WARPGROUP * ROWS)
    lse_log2 = row_vector(call, row, 0, S_LAYOUT)
    less_delta = row_vector(call, row, 1, S_LAYOUT)
    dq = accumulators(call.dq)
    shared.q.wait(WARPGROUP)
    shared.dout.wait(WARPGROUP)
    i = 0
    if MAY_HIDE:
        for _ in range(row.num_masked):
            dq = gradient_step(i, dq, lse_log2, less_delta, call, row, shared, True, WARPGROUP)
            i += 1
    for _ in range(row.num_full):
        dq = gradient_step(i, dq, lse_log2, less_delta, call, row, shared, False, WARPGROUP)
        i += 1
    # in the place of Q, which other warps' products may read: PTX does not say that a warp's reads its own rows alone
    meet_warps(WARPGROUP)
    store_chunks(call.dq, dq, call.scale, shared.q.blocks(WARPGROUP), row.b, row.h, row.q_start)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[*WALK_SIZES, "row_stride", "Hq", "Sq", "Skv"])
def hopper_dq_kernel(
    q,  # descriptors: [B, Hq, Sq, D] in blocks of ROWS and as many columns as the first chunk has
    q_rest,  # and the second one, or None
    k,  # [B, Hkv, Skv, D] in blocks of BLOCK_KV
    k_rest,
    v,  # [B, Hkv, Skv, DV] in blocks of BLOCK_KV
    v_rest,
    dout,  # [B, Hq, Sq, DV] in blocks of ROWS
    dout_rest,
    dq,  # [B, Hq, Sq, D] in blocks of ROWS
    dq_rest,
    rows_pointer,  # [B, Hq, 2, Sq] f32: lse in base 2 and -delta, of hopper_rows.py
    row_stride,  # of rows: from lse to -delta
    walk,  # (words, rows) of blocks/walk.py, or None: every row visits every key
    num_words,
    map_strides,  # see map_of
    num_rows,  # see work_of
    num_heads,
    heads_together,
    heads_last,
    Hq,
    Sq,
    Skv,
    scale,
    bindings,
    MASK: gl.constexpr,  # None: it shows all
    SCORE: gl.constexpr,
    SCORE_GRAD: gl.constexpr,
    G: gl.constexpr,
    BLOCK_Q: gl.constexpr,  # ROWS for each consumer
    BLOCK_KV: gl.constexpr,
    TILE_Q: gl.constexpr,
    TILE_KV: gl.constexpr,
    IS_EVEN_KV: gl.constexpr,  # no tile hangs over the end of the keys
    STAGES: gl.constexpr,  # of v; k, which the last product of a step reads, has one more
    REGISTERS: gl.constexpr,  # of the roles but the first
):
    """dq of one tile of queries. Grid: a program for each tile of each head, in the order of work_of."""
    NUM_CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    gl.static_assert(FIRST_BARRIER + 2 * STAGES + 1 <= LAST_BARRIER - NUM_CONSUMERS + 1)
    q = chunks_of(q, q_rest)
    k = chunks_of(k, k_rest)
    v = chunks_of(v, v_rest)
    dout = chunks_of(dout, dout_rest)
    dq = chunks_of(dq, dq_rest)
    shared = Shared(
        Ring.create(q, NUM_CONSUMERS, 1),
        Ring.create(dout, NUM_CONSUMERS, 1),
        Ring.create(k, STAGES + 1, NUM_CONSUMERS, FIRST_BARRIER),
        Ring.create(v, STAGES, NUM_CONSUMERS, FIRST_BARRIER + STAGES + 1),
        gl.allocate_shared_memory(gl.int32, [STAGES + 1, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    fence_async_shared()
    call = Call(
        q,
        k,
        v,
        dout,
        dq,
        rows_pointer,
        row_stride,
        walk,
        num_words,
        map_strides,
        num_rows,
        num_heads,
        heads_together,
        heads_last,
        Hq,
        Sq,
        Skv,
        scale,
        bindings,
        MASK,
        SCORE,
        SCORE_GRAD,
        G,
        BLOCK_Q,
        BLOCK_KV,
        TILE_Q,
        TILE_KV,
        IS_EVEN_KV,
    )
    if NUM_CONSUMERS == 1:
        gl.warp_specialize(
            [(differentiate, (call, shared, gl.constexpr(0))), (load_tiles, (call, shared))], [1], REGISTERS
        )
    else:
        gl.warp_specialize(
            [
                (differentiate, (call, shared, gl.constexpr(0))),
                (differentiate, (call, shared, gl.constexpr(1))),
                (load_tiles, (call, shared)),
            ],
            [4, 1],
            REGISTERS,
        )
