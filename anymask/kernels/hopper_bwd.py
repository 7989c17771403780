"""Backward on Hopper (sm_90): a producer warp loads tiles by TMA, two consumer warpgroups of 64 keys each compute.

A program has a tile of keys and walks the queries that see them. A consumer's step, everything transposed:
S^T = K Q^T and dP^T = V dO^T issued; P^T while dP^T runs; dV += P^T dO issued; dS^T to shared memory, where the other
consumer reads it; dQ = dS K issued, of which each consumer computes half the columns; dK += dS^T Q issued; dQ added to
its accumulator by TMA. P^T and dS^T are operands in registers, dK and dV stay there to the end.
docs/notes/006-hopper-backward.md has why; hopper_rows.py what comes before and after.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from anymask.kernels.functions import opaque
from anymask.kernels.hopper_pipeline import Ring, meet, reduce_add
from anymask.kernels.hopper_walk import Counting, Walking
from anymask.kernels.record import record
from anymask.kernels.tile import hidden, log2_probability, map_of, ranked_row, work_of

ROWS = gl.constexpr(64)  # keys of a consumer, and queries of a step
NUM_CONSUMERS = gl.constexpr(2)


@record
class Call:
    """The arguments of hopper_backward_kernel, as its roles read them."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    dout: tma.tensor_descriptor
    rows: tma.tensor_descriptor
    dq: tma.tensor_descriptor | gl.constexpr
    dk: tma.tensor_descriptor
    dv: tma.tensor_descriptor
    walk: gl.tuple | gl.constexpr
    num_words: gl.tensor | gl.constexpr
    map_strides: gl.tuple
    num_rows: gl.tensor
    num_heads: gl.tensor
    heads_together: gl.tensor
    Hkv: gl.tensor
    Sq: gl.tensor
    Skv: gl.tensor
    scale: gl.tensor
    bindings: gl.tuple
    MASK: gl.constexpr
    SCORE: gl.constexpr
    SCORE_GRAD: gl.constexpr
    G: gl.constexpr
    BLOCK_KV: gl.constexpr
    TILE_Q: gl.constexpr
    TILE_KV: gl.constexpr
    IS_EVEN_Q: gl.constexpr
    IS_EVEN_KV: gl.constexpr


@record
class Work:
    """A tile of keys of one head: the row of the transposed map, and its first key."""

    b: gl.tensor
    h_kv: gl.tensor
    row: gl.tensor
    kv_start: gl.tensor


@gluon.jit
def work_of_program(call):
    """Where query heads have maps of their own, the first one's order holds for all that share keys."""
    head, rank, part = work_of(
        gl.program_id(0), call.num_rows, call.num_heads, call.heads_together, call.TILE_KV, call.BLOCK_KV
    )
    b = head // call.Hkv
    h_kv = head % call.Hkv
    row = ranked_row(call.walk, map_of(call.map_strides, b, h_kv * call.G) * call.num_rows, rank)
    return Work(b, h_kv, row, row * call.TILE_KV + part * call.BLOCK_KV)


@record
class Visit:
    """The steps of one query head over tiles of queries: num_masked, then num_full."""

    h: gl.tensor
    num_masked: gl.tensor
    num_full: gl.tensor
    masked: Walking | Counting
    full: Walking | Counting


@gluon.jit
def visit_of(call, work, g):
    """Of the g-th query head that reads these keys.

    Without a walk it is all queries, as masked ones where the tile hangs over the end of the keys. (Queries past the
    end are zeros, and so are their lse and delta: P dO = 0 and dS = 0.)
    """
    TILE_Q: gl.constexpr = call.TILE_Q
    h = work.h_kv * call.G + g
    if call.walk is None:
        num_steps = gl.cdiv(call.Sq, ROWS)
        num_masked = gl.where(work.kv_start + call.BLOCK_KV > call.Skv, num_steps, 0)
        tiles = Counting(gl.to_tensor(0), ROWS)
        return Visit(h, num_masked, num_steps - num_masked, tiles, tiles)
    else:
        row = map_of(call.map_strides, work.b, h) * call.num_rows + work.row
        masked, num_masked = Walking.open(call.walk, call.num_words, row, TILE_Q, ROWS, False)
        full, num_full = Walking.open(call.walk, call.num_words, row, TILE_Q, ROWS, True)
        return Visit(h, num_masked, num_full, masked, full)


@record
class Shared:
    """What lies in shared memory. In k and v a stage is the keys of a consumer.

    starts: the first query of each stage of q.  rows: their lse and -delta, one after the other.
    ds: dS^T of the consumers, of even and odd steps.  dq: half the columns of dQ, of each consumer. Both are None where
    dQ is not computed here.
    """

    q: Ring
    dout: Ring
    k: Ring
    v: Ring
    starts: gl.shared_memory_descriptor  # [STAGES, 1] int32
    rows: gl.shared_memory_descriptor  # [STAGES, 1, 1, 2, ROWS] f32
    ds: gl.shared_memory_descriptor | gl.constexpr  # [2 * NUM_CONSUMERS, ROWS, ROWS]
    dq: gl.shared_memory_descriptor | gl.constexpr  # [NUM_CONSUMERS, 1, 1, ROWS, D / 2] f32


# --- the producer ---


@gluon.jit
def load_tiles(call, shared):
    """Role of one warp: load what the consumers read. The walk is a step ahead of the loads."""
    work = work_of_program(call)
    for consumer in gl.static_range(NUM_CONSUMERS):
        shared.k.load(consumer, call.k, work.b, work.h_kv, work.kv_start + consumer * ROWS)
        shared.v.load(consumer, call.v, work.b, work.h_kv, work.kv_start + consumer * ROWS)
    i = 0
    for g in range(call.G):
        visit = visit_of(call, work, g)
        for IS_FULL in gl.static_range(2):
            if IS_FULL:
                tiles = visit.full
                num_steps = visit.num_full
            else:
                tiles = visit.masked
                num_steps = visit.num_masked
            for step in range(num_steps):
                q_start = tiles.start(step)
                tiles = tiles.after(step)
                full = shared.q.begin(i, call.q.block_type.nbytes + call.rows.block_type.nbytes)
                stage = i % shared.q.STAGES
                # so consumers need no walk; the barrier of dout, whose load begins after this, tells them of it
                shared.starts.index(stage).store(gl.full([1], q_start, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
                tma.async_copy_global_to_shared(
                    call.rows, [work.b, visit.h, 0, q_start], full, shared.rows.index(stage)
                )
                tma.async_copy_global_to_shared(
                    call.q, [work.b, visit.h, q_start, 0], full, shared.q.tiles.index(stage)
                )
                shared.dout.load(i, call.dout, work.b, visit.h, q_start)
                i += 1


# --- a consumer ---


@gluon.jit
def row_vector(call, shared, i, WHICH: gl.constexpr, LAYOUT: gl.constexpr):
    """[1, ROWS] f32 of step i's queries: lse in base 2 (0), -delta (1)."""
    STAGES: gl.constexpr = shared.q.STAGES
    VECTOR: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)
    vectors = shared.rows._reinterpret(gl.float32, [STAGES * 2, ROWS], VECTOR)
    return vectors.index(i % STAGES * 2 + WHICH).load(gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def held(tile):
    """tile as a left operand in registers: a ROWS x ROWS product then reads half as much shared memory."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    return tile.load(gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.jit
def copies(vector, x):
    """vector in the shape of x, each element in a register of its own.

    An accumulator that begins so must have them before the product before it is issued, or ptxas waits for that one
    (C7517).
    """
    _, vector = gl.broadcast(x, vector)
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [vector], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def shown(x, other, call, work, h, q_idx, kv_idx, IS_MASKED: gl.constexpr):
    """x, and other where the mask hides the pair or there is no such pair."""
    MASK: gl.constexpr = call.MASK if IS_MASKED else None
    CHECK_Q: gl.constexpr = call.SCORE is not None and not call.IS_EVEN_Q
    x = hidden(x, other, q_idx, call.Sq, work.b, h, q_idx, kv_idx, call.bindings, MASK, CHECK_Q)
    if IS_MASKED and not call.IS_EVEN_KV:
        x = gl.where(opaque(kv_idx) < call.Skv, x, other)
    return x


@gluon.jit
def gradient_step(i, dk, dv, k, v, call, work, h, shared, IS_MASKED: gl.constexpr, WARPGROUP: gl.constexpr):
    """dk and dv with the queries of step i added, whose dq gains the keys of both consumers. k, v: held, or None."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    DTYPE: gl.constexpr = call.q.dtype
    # 0, but the compiler can't know: so it computes anew, each step, where tiles that stay the same lie, and their
    # addresses take no registers
    zero = i >> 30
    q_tile = shared.q.tile(i)
    dout_tile = shared.dout.tile(i)
    if k is None:
        k = shared.k.tile(WARPGROUP + zero)
    if v is None:
        v = shared.v.tile(WARPGROUP + zero)
    zeros = gl.zeros([ROWS, ROWS], gl.float32, S_LAYOUT)
    shared.q.wait(i)
    less_delta = copies(row_vector(call, shared, i, 1, S_LAYOUT), zeros)
    # S^T = K Q^T    [ROWS, ROWS] f32
    s = warpgroup_mma(k, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    # dP^T - delta = V dO^T - delta    [ROWS, ROWS] f32
    shared.dout.wait(i)
    dp = warpgroup_mma(v, dout_tile.permute((1, 0)), less_delta, is_async=True)
    q_start = gl.max(shared.starts.index(i % shared.q.STAGES).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    lse_log2 = row_vector(call, shared, i, 0, S_LAYOUT)
    s = warpgroup_mma_wait(1, deps=[s])
    # P^T    [ROWS, ROWS] f32
    q_idx = (q_start + gl.arange(0, ROWS, layout=gl.SliceLayout(0, S_LAYOUT)))[None, :]
    kv_idx = (work.kv_start + WARPGROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT)))[:, None]
    p = log2_probability(s, lse_log2, work.b, h, q_idx, kv_idx, call.scale, call.bindings, call.SCORE)
    p = gl.exp2(shown(p, float("-inf"), call, work, h, q_idx, kv_idx, IS_MASKED))
    # dV += P^T dO
    p_operand = gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, dv.type.layout, 2))
    dv = warpgroup_mma(p_operand, dout_tile, dv, is_async=True)
    # dS^T = P^T * dT/dS * (dP^T - delta)    [ROWS, ROWS] f32. In this order S is done with before dP^T
    if call.SCORE_GRAD is not None:
        bindings = call.bindings
        p *= call.SCORE_GRAD(s * call.scale, work.b, h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2])
        p = shown(p, 0.0, call, work, h, q_idx, kv_idx, IS_MASKED)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = (p * dp).to(DTYPE)
    ds_operand = gl.convert_layout(ds, gl.DotOperandLayout(0, dk.type.layout, 2))
    if shared.dq is None:
        # dK += dS^T Q
        dk = warpgroup_mma(ds_operand, q_tile, dk, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv])
        shared.dout.release(i)
    else:
        even_or_odd = (i & 1) * NUM_CONSUMERS
        shared.ds.index(even_or_odd + WARPGROUP).store(ds)
        fence_async_shared()
        meet()  # and who is here has read dS^T of the step before, whose place the next step's takes
        # dQ = dS K, its half of the columns    [ROWS, D / 2] f32
        HALF: gl.constexpr = dk.shape[1] // 2
        DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
        dq = gl.zeros([ROWS, HALF], gl.float32, DQ_LAYOUT)
        for other in gl.static_range(NUM_CONSUMERS):
            half = shared.k.tile(other + zero).slice(WARPGROUP * HALF, HALF, 1)
            of_other = shared.ds.index(even_or_odd + other).permute((1, 0))
            dq = warpgroup_mma(of_other, half, dq, use_acc=other > 0, is_async=True)
        # dK += dS^T Q
        dk = warpgroup_mma(ds_operand, q_tile, dk, is_async=True)
        dq, dv = warpgroup_mma_wait(1, deps=[dq, dv])
        shared.dout.release(i)
        staged = shared.dq.index(WARPGROUP + zero)
        tma.store_wait(0)  # until the previous step's has been read
        staged.reshape([ROWS, HALF]).store(dq)
        fence_async_shared()
        reduce_add(call.dq, [work.b, h, q_start, WARPGROUP * HALF], staged)
    dk = warpgroup_mma_wait(0, deps=[dk])
    shared.q.release(i)
    return dk, dv


@gluon.jit
def differentiate(call, shared, WARPGROUP: gl.constexpr):
    """Role of a warpgroup: dk and dv of ROWS keys, summed over the query heads that read them."""
    D: gl.constexpr = call.dk.block_type.shape[3]
    DV: gl.constexpr = call.dv.block_type.shape[3]
    MAY_HIDE: gl.constexpr = call.MASK is not None or not call.IS_EVEN_KV
    work = work_of_program(call)
    dk = gl.zeros([ROWS, D], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]))
    dv = gl.zeros([ROWS, DV], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16]))
    for consumer in gl.static_range(NUM_CONSUMERS):
        shared.k.wait(consumer)
    shared.v.wait(WARPGROUP)
    k = None
    v = None
    if D == 64:  # a wider one would take too many registers
        k = held(shared.k.tile(WARPGROUP))
    if DV == 64:
        v = held(shared.v.tile(WARPGROUP))
    i = 0
    for g in range(call.G):
        visit = visit_of(call, work, g)
        if MAY_HIDE:
            for _ in range(visit.num_masked):
                dk, dv = gradient_step(i, dk, dv, k, v, call, work, visit.h, shared, True, WARPGROUP)
                i += 1
        for _ in range(visit.num_full):
            dk, dv = gradient_step(i, dk, dv, k, v, call, work, visit.h, shared, False, WARPGROUP)
            i += 1
    if shared.dq is not None:
        tma.store_wait(0)
        meet()  # the other has read K for its last dQ
    # in the place of K and V
    shared.k.tile(WARPGROUP).store((dk * call.scale).to(call.dk.dtype))
    shared.v.tile(WARPGROUP).store(dv.to(call.dv.dtype))
    fence_async_shared()
    kv_start = work.kv_start + WARPGROUP * ROWS
    tma.async_copy_shared_to_global(call.dk, [work.b, work.h_kv, kv_start, 0], shared.k.tiles.index(WARPGROUP))
    tma.async_copy_shared_to_global(call.dv, [work.b, work.h_kv, kv_start, 0], shared.v.tiles.index(WARPGROUP))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_words", "num_rows", "num_heads", "heads_together", "Hkv", "Sq", "Skv"])
def hopper_backward_kernel(
    q,  # descriptors: [B, Hq, Sq, D], all in blocks of ROWS
    k,  # [B, Hkv, Skv, D]
    v,  # [B, Hkv, Skv, DV]
    dout,  # [B, Hq, Sq, DV]
    rows,  # [B, Hq, 2, Sq] f32: lse in base 2 and -delta, of hopper_rows.py
    dq,  # [B, Hq, Sq, D] f32, in blocks of half the columns: dQ / scale is added to it; or None
    dk,  # [B, Hkv, Skv, D]
    dv,  # [B, Hkv, Skv, DV]
    walk,  # (words, rows) of blocks/walk.py, or None: all queries see all keys
    num_words,
    map_strides,  # see map_of
    num_rows,  # see work_of
    num_heads,
    heads_together,
    Hkv,
    Sq,
    Skv,
    scale,
    bindings,
    MASK: gl.constexpr,  # None: it shows all
    SCORE: gl.constexpr,
    SCORE_GRAD: gl.constexpr,
    G: gl.constexpr,
    TILE_Q: gl.constexpr,
    TILE_KV: gl.constexpr,
    IS_EVEN_Q: gl.constexpr,  # no tile hangs over the end of the queries
    IS_EVEN_KV: gl.constexpr,  # nor of the keys
    STAGES: gl.constexpr,  # of q and dout
    REGISTERS: gl.constexpr,  # of the roles but the first
):
    """dk and dv of one tile of keys, and what it adds to dq. Grid: a program for each tile of each head of keys, in the
    order of work_of.
    """
    D: gl.constexpr = q.block_type.shape[3]
    staged_ds = None
    staged_dq = None
    if dq is not None:
        DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, ROWS], q.dtype)
        staged_ds = gl.allocate_shared_memory(q.dtype, [2 * NUM_CONSUMERS, ROWS, ROWS], DS_LAYOUT)
        staged_dq = gl.allocate_shared_memory(gl.float32, [NUM_CONSUMERS, 1, 1, ROWS, D // 2], dq.layout)
    shared = Shared(
        Ring.create(q, STAGES, NUM_CONSUMERS),
        Ring.create(dout, STAGES, NUM_CONSUMERS),
        Ring.create(k, NUM_CONSUMERS, 1),
        Ring.create(v, NUM_CONSUMERS, 1),
        gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, 2, ROWS], rows.layout),
        staged_ds,
        staged_dq,
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
        walk,
        num_words,
        map_strides,
        num_rows,
        num_heads,
        heads_together,
        Hkv,
        Sq,
        Skv,
        scale,
        bindings,
        MASK,
        SCORE,
        SCORE_GRAD,
        G,
        NUM_CONSUMERS * ROWS,
        TILE_Q,
        TILE_KV,
        IS_EVEN_Q,
        IS_EVEN_KV,
    )
    gl.warp_specialize(
        [
            (differentiate, (call, shared, gl.constexpr(0))),
            (differentiate, (call, shared, gl.constexpr(1))),
            (load_tiles, (call, shared)),
        ],
        [4, 1],
        REGISTERS,
    )
