"""The Hopper backward above head dim 128, where dK and dV of 64 keys are too many registers for one consumer: of the
same keys one has S, P and dV, the other dP, dS and dK.

Both gradients are a step late, as the forward's out: what a step computes in registers runs beside dV, or dK, of the
step before.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_wait

from anymask.kernels.hopper_chunks import accumulators, finished
from anymask.kernels.hopper_pipeline import meet
from anymask.kernels.hopper_softmax import pack_pairs, unpack_pairs
from anymask.kernels.hopper_step import (
    copies,
    first_query,
    indices,
    probability,
    product_of_columns,
    row_vector,
    score_slope,
    store_chunks,
)
from anymask.kernels.hopper_work import ROWS, taken_work, visit_of


@gluon.jit
def value_step(i, dv, pairs, call, work, h, shared, IS_MASKED: gl.constexpr):
    """dv with the queries of step i - 1 added, whose P^T is `pairs`, and P^T of step i.

    P^T * dT/dS is handed to who has dk.
    """
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_Q, 16])
    DTYPE: gl.constexpr = call.q[0].dtype
    gl.assume(i >= 0)
    zero = i >> 30  # see gradient_step
    previous = step_before(i)
    shared.q.wait(i)
    # behind products that were issued it would come when the last of them has begun
    q_start = first_query(call, shared, i)
    lse_log2 = row_vector(call, shared, i, 0, S_LAYOUT)
    shared.dout.wait(previous)
    s = gl.zeros([ROWS, call.BLOCK_Q], gl.float32, S_LAYOUT)
    s = product_of_columns(shared.k.chunks(0, zero), shared.q.chunks(i), s, False)
    dv = products_of_pairs(pairs, shared.dout.chunks(previous), dv)
    s = warpgroup_mma_wait(len(dv), deps=[s])
    q_idx, kv_idx = indices(call, q_start, work.kv_start, S_LAYOUT)
    p = probability(s, lse_log2, call, work, h, q_idx, kv_idx, IS_MASKED)
    shared.q.release(i)
    shared.p.put(i, score_slope(p, s, call, work, h, q_idx, kv_idx, IS_MASKED).to(DTYPE))
    shared.k.wait(0)  # K has come long ago, but ptxas moves nothing past this: else it waits for dV first
    dv = finished(dv, 0)
    if i > 0:
        shared.dout.release(i - 1)
    return dv, pack_pairs(p, DTYPE)


@gluon.jit
def key_step(i, dk, pairs, call, shared):
    """dk with the queries of step i - 1 added, whose dS^T is `pairs`, and dS^T of step i."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_Q, 16])
    gl.assume(i >= 0)
    zero = i >> 30  # see gradient_step
    previous = step_before(i)
    shared.q.wait(i)
    less_delta = copies(row_vector(call, shared, i, 1, S_LAYOUT), gl.zeros([ROWS, call.BLOCK_Q], gl.float32, S_LAYOUT))
    shared.dout.wait(i)
    dp = product_of_columns(shared.v.chunks(0, zero), shared.dout.chunks(i), less_delta, True)
    dk = products_of_pairs(pairs, shared.q.chunks(previous), dk)
    p = shared.p.take(i, S_LAYOUT)
    dp = warpgroup_mma_wait(len(dk), deps=[dp])
    shared.dout.release(i)
    ds = p.to(gl.float32) * dp
    shared.v.wait(0)  # as that for K
    dk = finished(dk, 0)
    if i > 0:
        shared.q.release(i - 1)
    return dk, pack_pairs(ds, call.q[0].dtype)


@gluon.jit
def step_before(i):
    """Of the first step itself: what it multiplies with zeros is at least there."""
    return gl.maximum(i - 1, 0)


@gluon.jit
def no_pairs(call):
    """[ROWS, BLOCK_Q / 2] int32 zeros, as pack_pairs leaves them."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_Q, 16])
    return pack_pairs(gl.zeros([ROWS, call.BLOCK_Q], gl.float32, S_LAYOUT), call.q[0].dtype)


@gluon.jit
def products_of_pairs(pairs, right, acc):
    """acc + left right, issued, for each chunk of columns; left as pairs    of each chunk [ROWS, columns] f32"""
    issued = ()
    for c in gl.static_range(len(acc)):
        left = unpack_pairs(pairs, right[c].dtype, gl.DotOperandLayout(0, acc[c].type.layout, 2))
        issued += (warpgroup_mma(left, right[c], acc[c], is_async=True),)
    return issued


@gluon.jit
def differentiate_values(call, shared):
    """Role of a warpgroup: dv of ROWS keys, summed over the query heads that read them."""
    MAY_HIDE: gl.constexpr = call.MASK is not None or not call.IS_EVEN_KV
    work = taken_work(call, shared, 0, 4)
    dv = accumulators(call.dv)
    pairs = no_pairs(call)
    shared.k.wait(0)
    i = gl.to_tensor(0)
    for g in range(call.G):
        visit = visit_of(call, work, g)
        if MAY_HIDE:
            for _ in range(visit.num_masked):
                dv, pairs = value_step(i, dv, pairs, call, work, visit.h, shared, True)
                i += 1
        for _ in range(visit.num_full):
            dv, pairs = value_step(i, dv, pairs, call, work, visit.h, shared, False)
            i += 1
    if i > 0:
        shared.dout.wait(i - 1)
        dv = finished(products_of_pairs(pairs, shared.dout.chunks(i - 1), dv), 0)
    meet()  # K has been read, and V
    store_chunks(call.dv, dv, 1.0, shared.v.blocks(0), work.b, work.h_kv, work.kv_start)
    tma.store_wait(0)


@gluon.jit
def differentiate_keys(call, shared):
    """Role of a warpgroup: dk of the same keys."""
    work = taken_work(call, shared, 0, 4)
    dk = accumulators(call.dk)
    pairs = no_pairs(call)
    shared.v.wait(0)
    i = gl.to_tensor(0)
    for g in range(call.G):
        visit = visit_of(call, work, g)
        for _ in range(visit.num_masked + visit.num_full):
            dk, pairs = key_step(i, dk, pairs, call, shared)
            i += 1
    if i > 0:
        dk = finished(products_of_pairs(pairs, shared.q.chunks(i - 1), dk), 0)
    meet()
    store_chunks(call.dk, dk, call.scale, shared.k.blocks(0), work.b, work.h_kv, work.kv_start)
    tma.store_wait(0)
