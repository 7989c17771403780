"""What steps of the Hopper backward are made of: vectors of queries, products, P and what it is multiplied by,
gradients on their way out. call, shared: as in hopper_bwd.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from anymask.kernels.functions import kept, opaque
from anymask.kernels.hopper_pipeline import begin_store, read_number, seen_as
from anymask.kernels.hopper_work import ROWS
from anymask.kernels.tile import hidden, log2_probability


@gluon.jit
def row_vector(call, shared, i, WHICH: gl.constexpr, LAYOUT: gl.constexpr):
    """[1, BLOCK_Q] f32 of step i's queries: lse in base 2 (0), -delta (1)."""
    STAGES: gl.constexpr = shared.q.STAGES
    VECTOR: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)
    vectors = seen_as(shared.rows, gl.float32, [STAGES * 2, call.BLOCK_Q], VECTOR)
    return vectors.index(i % STAGES * 2 + WHICH).load(gl.SliceLayout(0, LAYOUT))[None, :]


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
    COLUMN: gl.constexpr = call.BLOCK_Q - 7  # see near()
    x = hidden(x, other, 0, 0, work.b, h, q_idx, kv_idx, call.bindings, MASK, False)
    if call.SCORE is not None and not call.IS_EVEN_Q:
        x = kept(x, other, q_idx & COLUMN, call.Sq - (q_idx & ~COLUMN), "lt")
    if IS_MASKED and not call.IS_EVEN_KV:
        x = gl.where(opaque(kv_idx) < call.Skv, x, other)
    return x


@gluon.jit
def product_of_columns(left, right, acc, HAS_ACC: gl.constexpr):
    """left right^T, plus acc if HAS_ACC, issued, for each chunk of columns    [rows of left, rows of right] f32"""
    for c in gl.static_range(len(left)):
        acc = warpgroup_mma(left[c], right[c].permute((1, 0)), acc, use_acc=HAS_ACC or c > 0, is_async=True)
    return acc


@gluon.jit
def products_of_rows(left, right, acc):
    """acc + left right, issued, for each chunk of columns    of each chunk [ROWS, columns] f32"""
    issued = ()
    for c in gl.static_range(len(acc)):
        operand = gl.convert_layout(left, gl.DotOperandLayout(0, acc[c].type.layout, 2))
        issued += (warpgroup_mma(operand, right[c], acc[c], is_async=True),)
    return issued


@gluon.jit
def first_query(call, shared, i):
    """Of step i. As a multiple of BLOCK_Q, so that the compiler sees that captured vectors may be read two numbers at a
    time.
    """
    return read_number(shared.tiles.index(i % shared.q.STAGES), 4) * call.BLOCK_Q


@gluon.jit
def indices(call, q_start, kv_start, LAYOUT: gl.constexpr):
    """[1, BLOCK_Q] and [ROWS, 1] i32 positions of S^T."""
    q_idx = q_start + gl.arange(0, call.BLOCK_Q, layout=gl.SliceLayout(0, LAYOUT))
    kv_idx = kv_start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    return q_idx[None, :], kv_idx[:, None]


@gluon.jit
def probability(s, lse_log2, call, work, h, q_idx, kv_idx, IS_MASKED: gl.constexpr):
    """P^T of S^T    [ROWS, BLOCK_Q] f32"""
    p = log2_probability(s, lse_log2, work.b, h, q_idx, kv_idx, call.scale, call.bindings, call.SCORE)
    return gl.exp2(shown(p, float("-inf"), call, work, h, q_idx, kv_idx, IS_MASKED))


@gluon.jit
def score_slope(p, s, call, work, h, q_idx, kv_idx, IS_MASKED: gl.constexpr):
    """P^T * dT/dS    [ROWS, BLOCK_Q] f32"""
    if call.SCORE_GRAD is not None:
        bindings = call.bindings
        p *= call.SCORE_GRAD(s, call.scale, work.b, h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2])
        p = shown(p, 0.0, call, work, h, q_idx, kv_idx, IS_MASKED)
    return p


@gluon.jit
def store_chunks(tensor, acc, factor, blocks, b, h, start):
    """acc * factor is on its way to rows from start on of the tensor, by way of a block of each of its descriptors."""
    for c in gl.static_range(len(acc)):
        blocks[c].reshape(acc[c].shape).store((acc[c] * factor).to(tensor[c].dtype))
    fence_async_shared()
    column = 0
    for c in gl.static_range(len(acc)):
        begin_store(tensor[c], [b, h, start, column], blocks[c])
        column += acc[c].shape[1]
