"""The Hopper backward above head dim 128, where dK and dV of 64 keys are too many registers for one consumer: of the
same keys one has S, P and dV, the other dP, dS and dK.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma_wait

from anymask.kernels.hopper_chunks import accumulators, finished
from anymask.kernels.hopper_pipeline import meet
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
from anymask.kernels.hopper_work import ROWS, taken_work, visit_of


@gluon.jit
def value_step(i, dv, call, work, h, shared, IS_MASKED: gl.constexpr):
    """dv with the queries of step i added. P^T * dT/dS is handed to who has dk."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_Q, 16])
    DTYPE: gl.constexpr = call.q[0].dtype
    gl.assume(i >= 0)
    zero = i >> 30  # see gradient_step
    shared.q.wait(i)
    # behind products that were issued it would come when the last of them has begun
    q_start = first_query(call, shared, i)
    lse_log2 = row_vector(call, shared, i, 0, S_LAYOUT)
    s = gl.zeros([ROWS, call.BLOCK_Q], gl.float32, S_LAYOUT)
    s = product_of_columns(shared.k.chunks(0, zero), shared.q.chunks(i), s, False)
    shared.dout.wait(i)
    s = warpgroup_mma_wait(0, deps=[s])
    q_idx, kv_idx = indices(call, q_start, work.kv_start, S_LAYOUT)
    p = probability(s, lse_log2, call, work, h, q_idx, kv_idx, IS_MASKED)
    shared.q.release(i)
    dv = products_of_rows(p.to(DTYPE), shared.dout.chunks(i), dv)
    shared.p.put(i, score_slope(p, s, call, work, h, q_idx, kv_idx, IS_MASKED).to(DTYPE))
    dv = finished(dv, 0)
    shared.dout.release(i)
    return dv


@gluon.jit
def key_step(i, dk, call, shared):
    """dk with the queries of step i added."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_Q, 16])
    gl.assume(i >= 0)
    zero = i >> 30  # see gradient_step
    shared.q.wait(i)
    less_delta = copies(row_vector(call, shared, i, 1, S_LAYOUT), gl.zeros([ROWS, call.BLOCK_Q], gl.float32, S_LAYOUT))
    shared.dout.wait(i)
    dp = product_of_columns(shared.v.chunks(0, zero), shared.dout.chunks(i), less_delta, True)
    p = shared.p.take(i, S_LAYOUT)
    dp = warpgroup_mma_wait(0, deps=[dp])
    shared.dout.release(i)
    ds = (p.to(gl.float32) * dp).to(call.q[0].dtype)
    dk = finished(products_of_rows(ds, shared.q.chunks(i), dk), 0)
    shared.q.release(i)
    return dk


@gluon.jit
def differentiate_values(call, shared):
    """Role of a warpgroup: dv of ROWS keys, summed over the query heads that read them."""
    MAY_HIDE: gl.constexpr = call.MASK is not None or not call.IS_EVEN_KV
    work = taken_work(call, shared, 0, 4)
    dv = accumulators(call.dv)
    shared.k.wait(0)
    i = 0
    for g in range(call.G):
        visit = visit_of(call, work, g)
        if MAY_HIDE:
            for _ in range(visit.num_masked):
                dv = value_step(i, dv, call, work, visit.h, shared, True)
                i += 1
        for _ in range(visit.num_full):
            dv = value_step(i, dv, call, work, visit.h, shared, False)
            i += 1
    meet()  # K has been read, and V
    store_chunks(call.dv, dv, 1.0, shared.v.blocks(0), work.b, work.h_kv, work.kv_start)
    tma.store_wait(0)


@gluon.jit
def differentiate_keys(call, shared):
    """Role of a warpgroup: dk of the same keys."""
    work = taken_work(call, shared, 0, 4)
    dk = accumulators(call.dk)
    shared.v.wait(0)
    i = 0
    for g in range(call.G):
        visit = visit_of(call, work, g)
        for _ in range(visit.num_masked + visit.num_full):
            dk = key_step(i, dk, call, shared)
            i += 1
    meet()
    store_chunks(call.dk, dk, call.scale, shared.k.blocks(0), work.b, work.h_kv, work.kv_start)
    tma.store_wait(0)
