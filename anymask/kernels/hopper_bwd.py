"""Backward on Hopper (sm_90): a producer warp loads tiles by TMA (hopper_work.py), consumer warpgroups of 64 keys each
compute.

A program has a tile of keys and walks the queries that see them. A consumer's step, everything transposed:
S^T = K Q^T and dP^T = V dO^T issued; P^T while dP^T runs; dV += P^T dO issued; dS^T to shared memory, where the other
consumer reads it; dQ = dS K issued, of which each consumer computes half; dK += dS^T Q issued; dQ added to its
accumulator by TMA. P^T and dS^T are operands in registers, dK and dV stay there to the end. With ROWS queries a step dQ
is late, that of the step before, so that consumers need not wait for each other.
dQ may be left to hopper_dq.py. Then consumers take turns, or there is one: half the keys, and two programs on a
multiprocessor, one of which computes while the other begins or ends. And above head dim 128 two consumers share the
work on 64 keys (hopper_split.py). A persistent program goes on with further tiles of keys, which come while its
gradients leave.
docs/notes/006-hopper-backward.md has why; hopper_rows.py what comes before, hopper_sum.py where dQ is added up.
"""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from anymask.kernels.hopper_chunks import accumulator, accumulators, allocate_tiles, chunks_of, finished
from anymask.kernels.hopper_pipeline import (
    FIRST_BARRIER,
    LAST_BARRIER,
    Exchange,
    Handover,
    Ring,
    RowQueue,
    meet,
    pass_turn,
    reduce_add,
    seen_as,
    wait_turn,
)
from anymask.kernels.hopper_split import differentiate_keys, differentiate_values
from anymask.kernels.hopper_step import (
    copies,
    first_query,
    indices,
    probability,
    product_of_columns,
    products_of_rows,
    row_vector,
    score_slope,
    store_chunks,
)
from anymask.kernels.hopper_sum import LINE, columns_of, lines_of
from anymask.kernels.hopper_work import NUM_FIELDS, ROWS, find_works, load_tiles, taken_work, visit_of
from anymask.kernels.record import record
from anymask.kernels.tile import WALK_SIZES


@record
class Call:
    """The arguments of hopper_backward_kernel, as its roles read them."""

    q: gl.tuple  # of descriptors, one for each chunk of columns
    k: gl.tuple
    v: gl.tuple
    dout: gl.tuple
    rows: tma.tensor_descriptor
    dq: gl.tuple | gl.constexpr
    dk: gl.tuple
    dv: gl.tuple
    counter: gl.tensor | gl.constexpr
    walk: gl.tuple | gl.constexpr
    num_words: gl.tensor | gl.constexpr
    map_strides: gl.tuple
    num_rows: gl.tensor
    num_heads: gl.tensor
    heads_together: gl.tensor
    heads_last: gl.tensor
    Hkv: gl.tensor
    Sq: gl.tensor
    Skv: gl.tensor
    scale: gl.tensor
    bindings: gl.tuple
    MASK: gl.constexpr
    SCORE: gl.constexpr
    SCORE_GRAD: gl.constexpr
    G: gl.constexpr
    NUM_CONSUMERS: gl.constexpr
    BLOCK_Q: gl.constexpr
    BLOCK_KV: gl.constexpr
    TILE_Q: gl.constexpr
    TILE_KV: gl.constexpr
    IS_EVEN_Q: gl.constexpr
    IS_EVEN_KV: gl.constexpr
    KEY_TILES: gl.constexpr
    HAS_TURNS: gl.constexpr


@record
class Shared:
    """What lies in shared memory. In k and v a stage is the keys of a consumer.

    works: that a persistent program works on, else None.
    tiles: which BLOCK_Q queries each stage of q has.  rows: their lse and -delta, one after the other.
    ds: dS^T of the consumers, of the last steps.  dq: of each chunk dQ, a place for each who computes it. Both are
    None, and exchange, where dQ is not computed here.  p: P^T * dT/dS, where one consumer has dv and the other dk.
    """

    works: RowQueue | gl.constexpr
    q: Ring
    dout: Ring
    k: Ring
    v: Ring
    tiles: gl.shared_memory_descriptor  # [STAGES, 1] int32
    rows: gl.shared_memory_descriptor  # [STAGES, 1, 1, 2, BLOCK_Q] f32
    ds: gl.shared_memory_descriptor | gl.constexpr  # [NUM_CONSUMERS * STEPS, ROWS, BLOCK_Q]
    dq: gl.tuple | gl.constexpr  # [places, 1, 1, lines, LINE] f32
    p: Handover | gl.constexpr
    exchange: Exchange | gl.constexpr  # of ds


@gluon.constexpr_function
def is_late(BLOCK_Q):
    """A step computes dQ of the step before. Not with more queries: slower there."""
    return BLOCK_Q == ROWS


@gluon.constexpr_function
def steps_of_ds(BLOCK_Q):
    """So many steps' dS^T are kept. A consumer that has taken the other's of step i - 1 knows that step i - 2 of the
    other is done, which read dS^T of step i - 2, or, late, of step i - 3: so it may write over that.
    """
    return 3 if is_late(BLOCK_Q) else 2


@gluon.constexpr_function
def is_by_chunks(chunks, BLOCK_Q):
    """Each consumer computes dQ of a chunk: what it reads dS^T for is then as wide as can be, once."""
    return len(chunks) == 2 and BLOCK_Q == ROWS


@gluon.constexpr_function
def own_chunks(chunks, BLOCK_Q, WARPGROUP):
    """The chunks of dQ that a consumer computes, or computes half of."""
    return (WARPGROUP,) if is_by_chunks(chunks, BLOCK_Q) else tuple(range(len(chunks)))


@gluon.jit
def half_products(call, shared, i, keys, zero, WARPGROUP: gl.constexpr):
    """A consumer's half of dQ = dS K of step i, issued: half the queries; or, of ROWS queries, one of two chunks, or
    half the columns    of each chunk [ROWS, columns] f32

    keys: the first place of K.
    """
    CHUNKS: gl.constexpr = own_chunks(call.dq, call.BLOCK_Q, WARPGROUP)
    step = i % steps_of_ds(call.BLOCK_Q)
    issued = ()
    for j in gl.static_range(len(CHUNKS)):
        issued += (half_product(call, shared, step, keys, zero, CHUNKS[j], WARPGROUP),)
    return issued


@gluon.jit
def half_product(call, shared, step, keys, zero, C: gl.constexpr, WARPGROUP: gl.constexpr):
    """Of chunk C."""
    COLUMNS: gl.constexpr = columns_of(call.dq[C])
    dq = accumulator(ROWS, COLUMNS)
    for consumer in gl.static_range(call.NUM_CONSUMERS):
        ds = shared.ds.index(consumer * steps_of_ds(call.BLOCK_Q) + step)
        k = shared.k.tile(keys + consumer, C, zero)
        if call.BLOCK_Q > ROWS:
            ds = ds.slice(WARPGROUP * ROWS, ROWS, 1)
        elif not is_by_chunks(call.dq, call.BLOCK_Q):
            k = k.slice(WARPGROUP * COLUMNS, COLUMNS, 1)
        dq = warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=consumer > 0, is_async=True)
    return dq


@gluon.jit
def keys_of(call, n):
    """The first place of K and V of work number n."""
    gl.assume(n >= 0)
    return n % call.KEY_TILES * call.NUM_CONSUMERS


@gluon.jit
def give_ds(ds, call, shared, i, WARPGROUP: gl.constexpr):
    """dS^T of step i is where the other consumer reads it."""
    STEPS: gl.constexpr = steps_of_ds(call.BLOCK_Q)
    shared.ds.index(WARPGROUP * STEPS + i % STEPS).store(ds)
    fence_async_shared()
    shared.exchange.give(i, WARPGROUP)


@gluon.jit
def add_half(dq, call, work, where, shared, zero, WARPGROUP: gl.constexpr):
    """dq, a half, is on its way to the sum of dQ (hopper_sum.py). What this consumer added before has been read.

    where: the head and the first query; past the end, nothing is added.
    """
    CHUNKS: gl.constexpr = own_chunks(call.dq, call.BLOCK_Q, WARPGROUP)
    for j in gl.static_range(len(CHUNKS)):
        lines = lines_of(dq[j])
        own_place(call, shared, CHUNKS[j], zero, WARPGROUP).reshape(lines.shape).store(lines)
    fence_async_shared()
    h, q_start = where
    tile = q_start // ROWS
    if call.BLOCK_Q > ROWS:
        tile += WARPGROUP
    for j in gl.static_range(len(CHUNKS)):
        line = tile * lines_before(call.q, len(call.q)) + lines_before(call.q, CHUNKS[j])
        if call.BLOCK_Q == ROWS and len(call.dq) == 1:
            line += WARPGROUP * call.dq[0].block_type.shape[2]
        place = own_place(call, shared, CHUNKS[j], zero, WARPGROUP)
        reduce_add(call.dq[CHUNKS[j]], [work.b, h, line, 0], place)


@gluon.jit
def own_place(call, shared, C: gl.constexpr, zero, WARPGROUP: gl.constexpr):
    """Where this consumer's half of chunk C of dQ lies."""
    if is_by_chunks(call.dq, call.BLOCK_Q):
        return shared.dq[C].index(zero)
    else:
        return shared.dq[C].index(WARPGROUP + zero)


@gluon.constexpr_function
def lines_before(chunks, C):
    """Of ROWS queries in the sum of dQ, before chunk C."""
    return sum(chunk.block_type.shape[3] for chunk in chunks[:C]) * ROWS // LINE


@gluon.jit
def gradient_step(i, n, last, dk, dv, call, work, h, shared, IS_MASKED: gl.constexpr, WARPGROUP: gl.constexpr):
    """dk and dv with the queries of step i added, and the head and first query of these, whose dq gains the keys of all
    consumers. Late, the dq of the step before does, whose head and first query are `last`.  n: of the work.
    """
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_Q, 16])
    DTYPE: gl.constexpr = call.q[0].dtype
    IS_LATE: gl.constexpr = is_late(call.BLOCK_Q)
    READS_EARLY: gl.constexpr = call.BLOCK_Q == ROWS  # with more queries there are no registers for it
    gl.assume(i >= 0)  # then stages are found without regard to the sign
    # 0, but the compiler can't know: so it computes anew, each step, where tiles that stay the same lie, and their
    # addresses take no registers
    zero = i >> 30
    keys = keys_of(call, n) + zero
    q = shared.q.chunks(i)
    dout = shared.dout.chunks(i)
    k = shared.k.chunks(keys + WARPGROUP, zero)
    zeros = gl.zeros([ROWS, call.BLOCK_Q], gl.float32, S_LAYOUT)
    shared.q.wait(i)
    less_delta = copies(row_vector(call, shared, i, 1, S_LAYOUT), zeros)
    if READS_EARLY:
        # what is read of shared memory behind products that were issued comes when the last of them has begun
        q_start = first_query(call, shared, i)
        lse_log2 = row_vector(call, shared, i, 0, S_LAYOUT)
    if call.HAS_TURNS:
        shared.dout.wait(i)
        wait_turn(WARPGROUP)
    # S^T = K Q^T    [ROWS, BLOCK_Q] f32
    s = product_of_columns(k, q, zeros, False)
    if not READS_EARLY:
        q_start = first_query(call, shared, i)
        lse_log2 = row_vector(call, shared, i, 0, S_LAYOUT)
    v = shared.v.chunks(keys + WARPGROUP, zero)
    # dP^T - delta = V dO^T - delta    [ROWS, BLOCK_Q] f32
    if not call.HAS_TURNS:
        shared.dout.wait(i)
    dp = product_of_columns(v, dout, less_delta, True)
    if call.HAS_TURNS:
        pass_turn(WARPGROUP, call.NUM_CONSUMERS)
    s = warpgroup_mma_wait(len(v), deps=[s])
    q_idx, kv_idx = indices(call, q_start, work.kv_start + WARPGROUP * ROWS, S_LAYOUT)
    p = probability(s, lse_log2, call, work, h, q_idx, kv_idx, IS_MASKED)
    # dV += P^T dO
    dv = products_of_rows(p.to(DTYPE), dout, dv)
    # dS^T = P^T * dT/dS * dP^T    [ROWS, BLOCK_Q] f32. In this order S is done with before dP^T
    p = score_slope(p, s, call, work, h, q_idx, kv_idx, IS_MASKED)
    dp = warpgroup_mma_wait(len(dv), deps=[dp])
    ds = (p * dp).to(DTYPE)
    if shared.dq is None:
        # dK += dS^T Q
        dk = products_of_rows(ds, q, dk)
        dv = finished(dv, len(dk))
        shared.dout.release(i)
    else:
        # dQ = dS K, this consumer's half
        if IS_LATE:
            shared.exchange.take(i + 1, WARPGROUP)  # of step i - 1
            give_ds(ds, call, shared, i, WARPGROUP)
            dq = half_products(call, shared, i + 2, keys, zero, WARPGROUP)
            tma.store_wait(0)  # until what this consumer added to dQ has been read; its warps wait for each other here
        else:
            give_ds(ds, call, shared, i, WARPGROUP)
            tma.store_wait(0)
            shared.exchange.take(i, WARPGROUP)
            dq = half_products(call, shared, i, keys, zero, WARPGROUP)
        # dK += dS^T Q
        dk = products_of_rows(ds, q, dk)
        done = finished(dq + dv, len(dk))
        dq = done[: len(dq)]
        dv = done[len(dq) :]
        shared.dout.release(i)
        add_half(dq, call, work, last if IS_LATE else (h, q_start), shared, zero, WARPGROUP)
    dk = finished(dk, 0)
    shared.q.release(i)
    return (h, q_start), dk, dv


@gluon.jit
def differentiate(call, shared, WARPGROUP: gl.constexpr):
    """Role of a warpgroup: dk and dv of ROWS keys, summed over the query heads that read them, of each work of a
    persistent program.
    """
    n = gl.to_tensor(0)
    i = gl.to_tensor(0)
    work = taken_work(call, shared, n, 4)
    if call.counter is None:
        differentiate_work(call, shared, work, n, i, WARPGROUP)
    else:
        while work.b >= 0:
            i = differentiate_work(call, shared, work, n, i, WARPGROUP)
            n += 1
            work = taken_work(call, shared, n, 4)
    tma.store_wait(0)


@gluon.jit
def differentiate_work(call, shared, work, n, i, WARPGROUP: gl.constexpr):
    """Work number n of this program, whose first step is step i; the step after its last."""
    MAY_HIDE: gl.constexpr = call.MASK is not None or not call.IS_EVEN_KV
    dk = accumulators(call.dk)
    dv = accumulators(call.dv)
    visit = visit_of(call, work, 0)  # its numbers come while K does
    for consumer in gl.static_range(call.NUM_CONSUMERS):
        shared.k.wait(n * call.NUM_CONSUMERS + consumer)
    shared.v.wait(n * call.NUM_CONSUMERS + WARPGROUP)
    IS_LATE: gl.constexpr = is_late(call.BLOCK_Q)
    # dQ of the step before the first is anything: it is added nowhere, being that of the tile after the last
    last = (work.h_kv * call.G, call.Sq + ROWS - 1)
    if call.counter is not None:
        tma.store_wait(0)  # the gradients of the work before have left their places
    if shared.dq is not None and IS_LATE:
        shared.exchange.give(i + 1, WARPGROUP)  # as step i - 1
    if call.HAS_TURNS and WARPGROUP == call.NUM_CONSUMERS - 1:
        pass_turn(WARPGROUP, call.NUM_CONSUMERS)
    for g in range(call.G):
        if call.G > 1:
            visit = visit_of(call, work, g)
        if MAY_HIDE:
            for _ in range(visit.num_masked):
                last, dk, dv = gradient_step(i, n, last, dk, dv, call, work, visit.h, shared, True, WARPGROUP)
                i += 1
        for _ in range(visit.num_full):
            last, dk, dv = gradient_step(i, n, last, dk, dv, call, work, visit.h, shared, False, WARPGROUP)
            i += 1
    if call.HAS_TURNS and WARPGROUP == 0:
        wait_turn(WARPGROUP)  # the turn that was passed on last
    if call.counter is not None:
        shared.v.release(n * call.NUM_CONSUMERS + WARPGROUP)
    zero = i >> 30
    if shared.dq is not None:
        tma.store_wait(0)
        if IS_LATE:
            shared.exchange.take(i + 1, WARPGROUP)
            keys = keys_of(call, n) + zero
            dq = finished(half_products(call, shared, i + 2, keys, zero, WARPGROUP), 0)
            add_half(dq, call, work, last, shared, zero, WARPGROUP)
    kv_start = work.kv_start + WARPGROUP * ROWS
    if call.counter is not None:
        for consumer in gl.static_range(call.NUM_CONSUMERS):
            shared.k.release(n * call.NUM_CONSUMERS + consumer)
        if is_by_chunks(call.dq, call.BLOCK_Q):
            tma.store_wait(0)  # both write over what this consumer added to dQ last
        meet()  # the other has read dS^T for its last dQ
        store_aside(call, shared, dk, dv, work, kv_start, zero, WARPGROUP)
    else:
        if shared.dq is not None:
            tma.store_wait(0)
            meet()  # the other has read K for its last dQ
        # in the place of K and V
        store_chunks(call.dk, dk, call.scale, shared.k.blocks(WARPGROUP), work.b, work.h_kv, kv_start)
        store_chunks(call.dv, dv, 1.0, shared.v.blocks(WARPGROUP), work.b, work.h_kv, kv_start)
    return i


@gluon.jit
def store_aside(call, shared, dk, dv, work, kv_start, zero, WARPGROUP: gl.constexpr):
    """By way of this consumer's places for dS^T and dQ: K and V may come meanwhile."""
    column = 0
    of_dv = ()
    for c in gl.static_range(len(dv)):
        # as many blocks of this width lie before it as fit in the columns before it
        of_dv += (own_block(shared.ds, call.dv[c], column // dv[c].shape[1], zero, WARPGROUP),)
        column += dv[c].shape[1]
    store_chunks(call.dv, dv, 1.0, of_dv, work.b, work.h_kv, kv_start)
    tma.store_wait(len(dv))  # what this consumer added to dQ last has been read
    of_dk = ()
    for c in gl.static_range(len(dk)):
        of_dk += (own_block(shared.dq[c], call.dk[c], 0, zero, WARPGROUP),)
    store_chunks(call.dk, dk, call.scale, of_dk, work.b, work.h_kv, kv_start)


@gluon.constexpr_function
def blocks_within(places, tensor):
    """[so many blocks of the descriptor, *block]"""
    block = tensor.block_type.shape
    size = math.prod(places.shape) * places.dtype.primitive_bitwidth
    return [size // (math.prod(block) * tensor.dtype.primitive_bitwidth), *block]


@gluon.jit
def own_block(places, tensor, number, zero, WARPGROUP: gl.constexpr):
    """Block `number` of a descriptor in shared memory of which the first half is consumer 0's: counted from its
    beginning, or for consumer 1 from its end.
    """
    SHAPE: gl.constexpr = blocks_within(places, tensor)
    DTYPE: gl.constexpr = tensor.dtype
    LAYOUT: gl.constexpr = tensor.layout
    if WARPGROUP == 1:
        number = SHAPE[0] - 1 - number
    return seen_as(places, DTYPE, SHAPE, LAYOUT).index(number + zero)


@gluon.jit(do_not_specialize=[*WALK_SIZES, "Hkv", "Sq", "Skv"])
def hopper_backward_kernel(
    q,  # descriptors: [B, Hq, Sq, D] in blocks of BLOCK_Q and as many columns as the first chunk has
    q_rest,  # and the second one, or None
    k,  # [B, Hkv, Skv, D]
    k_rest,
    v,  # [B, Hkv, Skv, DV]
    v_rest,
    dout,  # [B, Hq, Sq, DV]
    dout_rest,
    rows,  # [B, Hq, 2, Sq] f32: lse in base 2 and -delta, of hopper_rows.py
    dq,  # the sum of dQ, of hopper_sum.py, in blocks of a product: dQ / scale is added to it; or None
    dq_rest,
    dk,  # [B, Hkv, Skv, D]
    dk_rest,
    dv,  # [B, Hkv, Skv, DV]
    dv_rest,
    counter,  # of a persistent kernel, where dq is not None: [2] int32, 0 before and after; or None
    walk,  # (words, rows) of blocks/walk.py, or None: all queries see all keys
    num_words,
    map_strides,  # see map_of
    num_rows,  # see work_of
    num_heads,
    heads_together,
    heads_last,
    Hkv,
    Sq,
    Skv,
    scale,
    bindings,
    MASK: gl.constexpr,  # None: it shows all
    SCORE: gl.constexpr,
    SCORE_GRAD: gl.constexpr,
    G: gl.constexpr,
    NUM_CONSUMERS: gl.constexpr,  # 2, or 1 where dq is None
    BLOCK_Q: gl.constexpr,  # of a step: ROWS, or, with two consumers, two times ROWS
    TILE_Q: gl.constexpr,
    TILE_KV: gl.constexpr,
    IS_EVEN_Q: gl.constexpr,  # no tile hangs over the end of the queries
    IS_EVEN_KV: gl.constexpr,  # nor of the keys
    IS_SPLIT: gl.constexpr,  # one consumer has dk, the other dv
    STAGES: gl.constexpr,  # of q and dout
    KEY_TILES: gl.constexpr,  # works whose K and V have a place: 1, or 2 in a persistent program
    REGISTERS: gl.constexpr,  # of the roles but the first
):
    """dk and dv of one tile of keys, and what it adds to dq. Grid: a program for each tile of each head of keys, in the
    order of work_of.

    A persistent one goes on with further tiles: numbers from the grid's size on, which programs draw from counter.
    """
    BLOCK_KV: gl.constexpr = ROWS if IS_SPLIT else NUM_CONSUMERS * ROWS
    gl.static_assert(FIRST_BARRIER + 2 * STAGES + 4 < LAST_BARRIER)
    q = chunks_of(q, q_rest)
    k = chunks_of(k, k_rest)
    v = chunks_of(v, v_rest)
    dout = chunks_of(dout, dout_rest)
    dk = chunks_of(dk, dk_rest)
    dv = chunks_of(dv, dv_rest)
    staged_ds = None
    staged_dq = None
    if dq is not None:
        dq = chunks_of(dq, dq_rest)
        DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_Q], q[0].dtype)
        STEPS: gl.constexpr = steps_of_ds(BLOCK_Q)
        staged_ds = gl.allocate_shared_memory(q[0].dtype, [NUM_CONSUMERS * STEPS, ROWS, BLOCK_Q], DS_LAYOUT)
        staged_dq = allocate_tiles(dq, 1 if is_by_chunks(dq, BLOCK_Q) else NUM_CONSUMERS)
    works = None
    if counter is not None:
        works = RowQueue.create(NUM_FIELDS, NUM_CONSUMERS + 1, True)
    shared = Shared(
        works,
        Ring.create(q, STAGES, NUM_CONSUMERS, FIRST_BARRIER),
        Ring.create(dout, STAGES, NUM_CONSUMERS, FIRST_BARRIER + STAGES),
        Ring.create(k, BLOCK_KV // ROWS * KEY_TILES, NUM_CONSUMERS),
        Ring.create(v, BLOCK_KV // ROWS * KEY_TILES, 1),
        gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, 2, BLOCK_Q], rows.layout),
        staged_ds,
        staged_dq,
        Handover.create(ROWS, ROWS, q[0].dtype, FIRST_BARRIER + 2 * STAGES) if IS_SPLIT else None,
        None if dq is None else Exchange(FIRST_BARRIER + 2 * STAGES),
    )
    fence_async_shared()
    call = Call(
        q,
        k,
        v,
        dout,
        rows,
        dq,
        dk,
        dv,
        counter,
        walk,
        num_words,
        map_strides,
        num_rows,
        num_heads,
        heads_together,
        heads_last,
        Hkv,
        Sq,
        Skv,
        scale,
        bindings,
        MASK,
        SCORE,
        SCORE_GRAD,
        G,
        NUM_CONSUMERS,
        BLOCK_Q,
        BLOCK_KV,
        TILE_Q,
        TILE_KV,
        IS_EVEN_Q,
        IS_EVEN_KV,
        KEY_TILES,
        dq is None and NUM_CONSUMERS == 2 and not IS_SPLIT,  # fused, consumers are faster without turns
    )
    if IS_SPLIT:
        gl.warp_specialize(
            [
                (differentiate_values, (call, shared)),
                (differentiate_keys, (call, shared)),
                (load_tiles, (call, shared)),
            ],
            [4, 1],
            REGISTERS,
        )
    elif NUM_CONSUMERS == 1:
        gl.warp_specialize(
            [(differentiate, (call, shared, gl.constexpr(0))), (load_tiles, (call, shared))], [1], REGISTERS
        )
    elif counter is None:
        gl.warp_specialize(
            [
                (differentiate, (call, shared, gl.constexpr(0))),
                (differentiate, (call, shared, gl.constexpr(1))),
                (load_tiles, (call, shared)),
            ],
            [4, 1],
            REGISTERS,
        )
    else:
        gl.warp_specialize(
            [
                (differentiate, (call, shared, gl.constexpr(0))),
                (differentiate, (call, shared, gl.constexpr(1))),
                (load_tiles, (call, shared)),
                (find_works, (call, shared)),
            ],
            [4, 1, 1],
            REGISTERS,
        )
