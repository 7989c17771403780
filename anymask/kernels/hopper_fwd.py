"""Forward on Hopper (sm_90): a producer warp loads tiles by TMA, consumer warpgroups of 64 queries each compute.

A consumer's step i:  S = Q K(i)^T issued; O += P V(i-1) issued; mask and softmax of S while that runs; P packed.
So both products of a step are in flight together, and with two consumers that take turns, one's softmax overlaps the
other's products. Masked tiles come first, then full ones, in one pipeline. docs/notes/004-hopper-forward.md has why.
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
from anymask.kernels.hopper_pipeline import Ring, pass_turn, wait_turn
from anymask.kernels.hopper_softmax import OnlineSoftmax, pack_pairs, unpack_pairs
from anymask.kernels.hopper_walk import Counting, Walking
from anymask.kernels.record import record
from anymask.kernels.tile import (
    LN_2,
    LOG2_E,
    changed_score,
    hidden,
    map_of,
    ranked_row,
    work_of,
)

ROWS = gl.constexpr(64)  # of a consumer: what one wgmma of a warpgroup takes


@record
class Call:
    """The arguments of hopper_forward_kernel, as its roles read them."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    out: tma.tensor_descriptor
    lse_pointer: gl.tensor
    walk: gl.tuple | gl.constexpr
    num_words: gl.tensor | gl.constexpr
    map_strides: gl.tuple
    num_rows: gl.tensor
    num_heads: gl.tensor
    heads_together: gl.tensor
    Hq: gl.tensor
    Sq: gl.tensor
    Skv: gl.tensor
    scale: gl.tensor
    bindings: gl.tuple
    MASK: gl.constexpr
    SCORE: gl.constexpr
    G: gl.constexpr
    BLOCK_Q: gl.constexpr
    BLOCK_KV: gl.constexpr
    TILE_Q: gl.constexpr
    TILE_KV: gl.constexpr
    IS_EVEN_KV: gl.constexpr
    HAS_TURNS: gl.constexpr


@record
class Row:
    """A tile of queries of one head, and its steps over tiles of keys: num_masked, then num_full."""

    b: gl.tensor
    h: gl.tensor
    q_start: gl.tensor
    num_masked: gl.tensor
    num_full: gl.tensor
    masked: Walking | Counting
    full: Walking | Counting


@gluon.jit
def row_of_program(call, OFFSET: gl.constexpr):
    """The row of this program, in the order of work_of, from query OFFSET on.

    Without a walk it visits all keys: first the tile that hangs over their end, if one does.
    """
    BLOCK_Q: gl.constexpr = call.BLOCK_Q
    BLOCK_KV: gl.constexpr = call.BLOCK_KV
    TILE_Q: gl.constexpr = call.TILE_Q
    TILE_KV: gl.constexpr = call.TILE_KV
    head, rank, part = work_of(gl.program_id(0), call.num_rows, call.num_heads, call.heads_together, TILE_Q, BLOCK_Q)
    b = head // call.Hq
    h = head % call.Hq
    if call.walk is None:
        num_full = call.Skv // BLOCK_KV
        num_masked = gl.cdiv(call.Skv, BLOCK_KV) - num_full
        masked = Counting(num_full * BLOCK_KV, BLOCK_KV)
        full = Counting(gl.to_tensor(0), BLOCK_KV)
        return Row(b, h, rank * BLOCK_Q + OFFSET, num_masked, num_full, masked, full)
    else:
        first_row = map_of(call.map_strides, b, h) * call.num_rows
        row = ranked_row(call.walk, first_row, rank)
        masked, num_masked = Walking.open(call.walk, call.num_words, first_row + row, TILE_KV, BLOCK_KV, False)
        full, num_full = Walking.open(call.walk, call.num_words, first_row + row, TILE_KV, BLOCK_KV, True)
        q_start = row * TILE_Q + part * BLOCK_Q + OFFSET
        return Row(b, h, q_start, num_masked, num_full, masked, full)


@record
class Rings:
    """Q of each consumer, K and V; and where out is staged, None: in Q's place."""

    q: Ring
    k: Ring
    v: Ring
    out: gl.shared_memory_descriptor | gl.constexpr


# --- the producer ---


@gluon.jit
def load_tiles(call, rings):
    """Role of one warp: load what the consumers read. The walk is a step ahead of the loads."""
    row = row_of_program(call, 0)
    kv_head = row.h // call.G
    for consumer in gl.static_range(rings.q.STAGES):
        rings.q.load(consumer, call.q, row.b, row.h, row.q_start + consumer * ROWS)
    i = 0
    for IS_FULL in gl.static_range(2):
        if IS_FULL:
            tiles = row.full
            num_steps = row.num_full
        else:
            tiles = row.masked
            num_steps = row.num_masked
        for step in range(num_steps):
            kv_start = tiles.start(step)
            tiles = tiles.after(step)
            rings.k.load(i, call.k, row.b, kv_head, kv_start)
            rings.v.load(i, call.v, row.b, kv_head, kv_start)
            i += 1


# --- a consumer ---


@gluon.jit
def indices(row, kv_start, s):
    """[ROWS, 1] and [1, BLOCK_KV] i32 positions of s."""
    LAYOUT: gl.constexpr = s.type.layout
    q_idx = row.q_start + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    kv_idx = kv_start + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    return q_idx[:, None], kv_idx[None, :]


@gluon.jit
def scores(call, row, kv_start, s):
    """s = q k^T as scores of base 2 but for a factor > 0, which is the second result."""
    if call.SCORE is None:
        return s, call.scale * LOG2_E
    else:
        q_idx, kv_idx = indices(row, kv_start, s)
        s = changed_score(s, row.b, row.h, q_idx, kv_idx, call.scale, call.bindings, call.SCORE)
        return s, gl.to_tensor(1.0)


@gluon.jit
def shown(call, row, kv_start, s):
    """s, and -inf where the mask hides the pair or there is no such key."""
    q_idx, kv_idx = indices(row, kv_start, s)
    s = hidden(s, float("-inf"), 0, 0, row.b, row.h, q_idx, kv_idx, call.bindings, call.MASK, False)
    if not call.IS_EVEN_KV:
        s = gl.where(opaque(kv_idx) < call.Skv, s, float("-inf"))
    return s


@gluon.jit
def score_product(rings, q_tile, i, S_LAYOUT: gl.constexpr):
    """S = Q K(i)^T, issued    [ROWS, BLOCK_KV] f32"""
    k_tile = rings.k.tile(i)
    BLOCK_KV: gl.constexpr = k_tile.shape[0]
    zeros = gl.zeros([ROWS, BLOCK_KV], gl.float32, S_LAYOUT)
    return warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def output_product(rings, pairs, correction, acc, i):
    """O = O * correction + P V(i), issued    [ROWS, DV] f32"""
    v_tile = rings.v.tile(i)
    O_LAYOUT: gl.constexpr = acc.type.layout
    p = unpack_pairs(pairs, v_tile.dtype, gl.DotOperandLayout(0, O_LAYOUT, 2))
    correction = gl.convert_layout(correction, gl.SliceLayout(1, O_LAYOUT))
    rings.v.wait(i)
    acc = acc * correction[:, None]  # behind the wait, so that it stays behind the issue of Q K^T
    return warpgroup_mma(p, v_tile, acc, is_async=True)


@gluon.jit
def attend_step(
    i,
    kv_start,
    acc,
    softmax,
    pairs,
    correction,
    q_tile,
    call,
    row,
    rings,
    IS_MASKED: gl.constexpr,
    WARPGROUP: gl.constexpr,
):
    """Scores of tile i, and the output of tile i - 1, whose P is `pairs`."""
    S_LAYOUT: gl.constexpr = softmax.row_max.type.layout.parent
    rings.k.wait(i)
    if call.HAS_TURNS:
        wait_turn(WARPGROUP)
    s = score_product(rings, q_tile, i, S_LAYOUT)
    acc = output_product(rings, pairs, correction, acc, i - 1)
    if call.HAS_TURNS:
        pass_turn(WARPGROUP)
    s = warpgroup_mma_wait(1, deps=[s])
    rings.k.release(i)
    s, factor = scores(call, row, kv_start, s)
    if IS_MASKED:
        s = shown(call, row, kv_start, s)
    softmax, p, correction = softmax.add(s, factor, IS_MASKED or call.SCORE is not None)
    acc = warpgroup_mma_wait(0, deps=[acc])
    rings.v.release(i - 1)
    pairs = pack_pairs(p, q_tile.dtype)  # only now are the registers of the previous P free: else C7513
    return acc, softmax, pairs, correction


@gluon.jit
def attend(call, rings, WARPGROUP: gl.constexpr):
    """Role of a warpgroup: out and lse of ROWS queries."""
    DV: gl.constexpr = call.out.block_type.shape[3]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_KV, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    MAY_HIDE: gl.constexpr = call.MASK is not None or not call.IS_EVEN_KV
    row = row_of_program(call, WARPGROUP * ROWS)
    num_masked = row.num_masked
    num_steps = num_masked + row.num_full
    q_tile = rings.q.tile(WARPGROUP)

    acc = gl.zeros([ROWS, DV], gl.float32, O_LAYOUT)
    softmax = OnlineSoftmax.create(ROWS, S_LAYOUT)
    rings.q.wait(WARPGROUP)
    if num_steps > 0:
        if call.HAS_TURNS and WARPGROUP == 1:
            pass_turn(WARPGROUP)
        # tile 0: there is no P before it
        rings.k.wait(0)
        if call.HAS_TURNS:
            wait_turn(WARPGROUP)
        s = score_product(rings, q_tile, 0, S_LAYOUT)
        if call.HAS_TURNS:
            pass_turn(WARPGROUP)
        s = warpgroup_mma_wait(0, deps=[s])
        rings.k.release(0)
        masked = row.masked
        full = row.full
        kv_start = gl.where(num_masked > 0, masked.start(0), full.start(0))
        s, factor = scores(call, row, kv_start, s)
        if MAY_HIDE and num_masked > 0:
            s = shown(call, row, kv_start, s)
        softmax, p, correction = softmax.add(s, factor, MAY_HIDE or call.SCORE is not None)
        pairs = pack_pairs(p, q_tile.dtype)

        if MAY_HIDE:
            masked = masked.after(0)
            for i in range(1, num_masked):
                kv_start = masked.start(i)
                masked = masked.after(i)
                acc, softmax, pairs, correction = attend_step(
                    i, kv_start, acc, softmax, pairs, correction, q_tile, call, row, rings, True, WARPGROUP
                )
        if num_masked == 0:
            full = full.after(0)
        for i in range(gl.maximum(num_masked, 1), num_steps):
            kv_start = full.start(i - num_masked)
            full = full.after(i - num_masked)
            acc, softmax, pairs, correction = attend_step(
                i, kv_start, acc, softmax, pairs, correction, q_tile, call, row, rings, False, WARPGROUP
            )
        if call.HAS_TURNS and WARPGROUP == 0:
            wait_turn(WARPGROUP)  # the turn that the other passed on last
        acc = output_product(rings, pairs, correction, acc, num_steps - 1)
        acc = warpgroup_mma_wait(0, deps=[acc])

    has_key = softmax.row_sum > 0
    row_sum = gl.where(has_key, softmax.row_sum, 1.0)
    lse = gl.where(has_key, (softmax.row_max + gl.log2(row_sum)) * LN_2, float("-inf"))
    rows = row.q_start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    head = row.b.to(gl.int64) * call.Hq + row.h
    gl.store(call.lse_pointer + head * call.Sq + rows, lse, mask=rows < call.Sq)
    inverse = gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, O_LAYOUT))
    if rings.out is None:
        place = rings.q.tiles.index(WARPGROUP)  # it has been read
        staged = place._reinterpret(call.out.dtype, call.out.block_type.shape, call.out.layout)
    else:
        staged = rings.out.index(WARPGROUP)
    staged.reshape([ROWS, DV]).store((acc * inverse[:, None]).to(call.out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(call.out, [row.b, row.h, row.q_start, 0], staged)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_words", "num_rows", "num_heads", "heads_together", "Hq", "Sq", "Skv"])
def hopper_forward_kernel(
    q,  # descriptors: [B, Hq, Sq, D] in blocks of ROWS
    k,  # [B, Hkv, Skv, D] in blocks of BLOCK_KV
    v,  # [B, Hkv, Skv, DV] in blocks of BLOCK_KV
    out,  # [B, Hq, Sq, DV] in blocks of ROWS
    lse_pointer,  # [B, Hq, Sq] f32, contiguous
    walk,  # (words, rows) of blocks/walk.py, or None: every row visits every key
    num_words,
    map_strides,  # see map_of
    num_rows,  # see work_of
    num_heads,
    heads_together,
    Hq,
    Sq,
    Skv,
    scale,
    bindings,
    MASK: gl.constexpr,  # None: it shows all
    SCORE: gl.constexpr,  # None: the score is scale * qk, and scale > 0
    G: gl.constexpr,
    BLOCK_Q: gl.constexpr,  # ROWS for each consumer
    BLOCK_KV: gl.constexpr,
    TILE_Q: gl.constexpr,
    TILE_KV: gl.constexpr,
    IS_EVEN_KV: gl.constexpr,  # no tile hangs over the end of the keys
    STAGES: gl.constexpr,
    HAS_TURNS: gl.constexpr,
    REGISTERS: gl.constexpr,  # of the roles but the first
):
    """out and lse of one query tile. Grid: a program for each tile of each head, in the order of work_of."""
    NUM_CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    D: gl.constexpr = q.block_type.shape[3]
    DV: gl.constexpr = out.block_type.shape[3]
    staged = None
    if DV > D:
        staged = gl.allocate_shared_memory(out.dtype, [NUM_CONSUMERS, 1, 1, ROWS, DV], out.layout)
    rings = Rings(
        Ring.create(q, NUM_CONSUMERS, 1),
        Ring.create(k, STAGES, NUM_CONSUMERS),
        Ring.create(v, STAGES, NUM_CONSUMERS),
        staged,
    )
    fence_async_shared()
    call = Call(
        q,
        k,
        v,
        out,
        lse_pointer,
        walk,
        num_words,
        map_strides,
        num_rows,
        num_heads,
        heads_together,
        Hq,
        Sq,
        Skv,
        scale,
        bindings,
        MASK,
        SCORE,
        G,
        BLOCK_Q,
        BLOCK_KV,
        TILE_Q,
        TILE_KV,
        IS_EVEN_KV,
        HAS_TURNS,
    )
    if NUM_CONSUMERS == 2:
        gl.warp_specialize(
            [
                (attend, (call, rings, gl.constexpr(0))),
                (attend, (call, rings, gl.constexpr(1))),
                (load_tiles, (call, rings)),
            ],
            [4, 1],
            REGISTERS,
        )
    else:
        gl.warp_specialize(
            [
                (attend, (call, rings, gl.constexpr(0))),
                (attend, (call, rings, gl.constexpr(1))),
                (attend, (call, rings, gl.constexpr(2))),
                (load_tiles, (call, rings)),
            ],
            [4, 4, 1],
            REGISTERS,
        )
