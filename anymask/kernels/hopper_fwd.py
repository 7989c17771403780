"""Forward on Hopper (sm_90): one warp finds the rows of the map that a program works on, a producer warp loads their
tiles by TMA, consumer warpgroups of 64 queries each compute.

A consumer's step i:  S = Q K(i)^T issued; O += P V(i-1) issued; mask and softmax of S while that runs; P packed.
So both products of a step are in flight together, and with consumers that take turns, one's softmax overlaps the
others' products. Masked tiles come first, then full ones, in one pipeline. docs/notes/004-hopper-forward.md has why.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from anymask.kernels.functions import near
from anymask.kernels.hopper_chunks import accumulators, allocate_tiles, bytes_of, chunks_of, finished
from anymask.kernels.hopper_pipeline import (
    FIRST_BARRIER,
    LAST_BARRIER,
    Ring,
    RowQueue,
    begin_store,
    pass_turn,
    read_number,
    seen_as,
    wait_turn,
    write_number,
)
from anymask.kernels.hopper_softmax import OnlineSoftmax, pack_pairs, rescaled, unpack_pairs
from anymask.kernels.hopper_walk import WANTED_AHEAD, Counting, Walking, draw_rows
from anymask.kernels.record import record
from anymask.kernels.tile import (
    LN_2,
    LOG2_E,
    WALK_SIZES,
    hidden,
    map_of,
    natural_score,
    num_tiles_of,
    ranked_row,
    work_of,
)

ROWS = gl.constexpr(64)  # of a consumer: what one wgmma of a warpgroup takes


@record
class Call:
    """The arguments of hopper_forward_kernel, as its roles read them."""

    q: gl.tuple  # of descriptors, one for each chunk of columns
    k: gl.tuple
    v: gl.tuple
    out: gl.tuple
    lse_pointer: gl.tensor
    counter: gl.tensor | gl.constexpr
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
    G: gl.constexpr
    NUM_CONSUMERS: gl.constexpr
    BLOCK_Q: gl.constexpr
    BLOCK_KV: gl.constexpr
    TILE_Q: gl.constexpr
    TILE_KV: gl.constexpr
    IS_EVEN_KV: gl.constexpr
    HAS_TURNS: gl.constexpr


@record
class Row:
    """A tile of queries of one head, and its steps over tiles of keys: num_masked, then num_full.

    map_row: among the rows of all maps.  b < 0: there is no row.
    """

    b: gl.tensor
    h: gl.tensor
    q_start: gl.tensor
    map_row: gl.tensor
    num_masked: gl.tensor
    num_full: gl.tensor


NUM_FIELDS = gl.constexpr(6)


@record
class Rings:
    """Q of each consumer, K and V, and where out is staged, None: in Q's place.  rows: that the program works on."""

    rows: RowQueue
    q: Ring
    k: Ring
    v: Ring
    places: gl.shared_memory_descriptor  # [STAGES, 1] int32: which BLOCK_KV keys each stage of k has
    out: gl.tuple | gl.constexpr


# --- the role that finds rows ---


@gluon.jit
def find_rows(call, rings):
    """Role of one warp: the rows that this program works on, and their Q, so that nobody waits for the counter, the map
    or, with the producer at the row before, Q.
    """
    if call.counter is None:
        fields = row_of(call, gl.program_id(0))
        rings.rows.put(0, fields)
        load_queries(call, rings, gl.to_tensor(0), fields)
    else:
        num_rows = call.num_rows * (call.TILE_Q // call.BLOCK_Q) * call.num_heads
        draw_rows(rings.rows, call, num_rows, row_of, rings, load_queries)


@gluon.jit
def load_queries(call, rings, n, fields):
    """Q of row number n of this program."""
    b, h, q_start = fields[0], fields[1], fields[2]
    for consumer in gl.static_range(call.NUM_CONSUMERS):
        rings.q.load(n * call.NUM_CONSUMERS + consumer, call.q, b, h, q_start + consumer * ROWS)


@gluon.jit
def row_of(call, number):
    """The fields of row `number` in the order of work_of.

    Without a walk it visits all keys: first the tile that hangs over their end, if one does.
    """
    BLOCK_Q: gl.constexpr = call.BLOCK_Q
    BLOCK_KV: gl.constexpr = call.BLOCK_KV
    TILE_Q: gl.constexpr = call.TILE_Q
    head, rank, part = work_of(
        number, call.num_rows, call.num_heads, call.heads_together, call.heads_last, TILE_Q, BLOCK_Q
    )
    b = head // call.Hq
    h = head % call.Hq
    if call.walk is None:
        num_full = call.Skv // BLOCK_KV
        return (b, h, rank * BLOCK_Q, gl.to_tensor(0), gl.cdiv(call.Skv, BLOCK_KV) - num_full, num_full)
    else:
        STEPS: gl.constexpr = call.TILE_KV // BLOCK_KV
        first_row = map_of(call.map_strides, b, h) * call.num_rows
        row = ranked_row(call.walk, first_row, rank)
        num_masked = num_tiles_of(call.walk, first_row + row, False) * STEPS
        num_full = num_tiles_of(call.walk, first_row + row, True) * STEPS
        map_row = (first_row + row).to(gl.int32)
        return (b, h, row * TILE_Q + part * BLOCK_Q, map_row, num_masked, num_full)


@gluon.jit
def row_from(fields, OFFSET: gl.constexpr):
    """From query OFFSET of its tile on."""
    return Row(fields[0], fields[1], fields[2] + OFFSET, fields[3], fields[4], fields[5])


@gluon.jit
def taken_row(rings, n, OFFSET: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Row number n of this program, from query OFFSET of its tile on."""
    return row_from(rings.rows.take(n, NUM_WARPS), OFFSET)


# --- the producer ---


@gluon.jit
def load_tiles(call, rings):
    """Role of one warp: load the keys and values that the consumers read."""
    n = gl.to_tensor(0)
    i = gl.to_tensor(0)
    row = taken_row(rings, n, 0, 1)
    if call.counter is None:
        load_row(call, rings, row, i)
    else:
        while row.b >= 0:
            i = load_row(call, rings, row, i)
            n += 1
            row = taken_row(rings, n, 0, 1)


@gluon.jit
def walks_of(call, row):
    """The walk of a row's masked tiles, and of its full ones."""
    BLOCK_KV: gl.constexpr = call.BLOCK_KV
    TILE_KV: gl.constexpr = call.TILE_KV
    if call.walk is None:
        return Counting(row.num_full * BLOCK_KV, BLOCK_KV), Counting(gl.to_tensor(0), BLOCK_KV)
    else:
        map_row = row.map_row.to(gl.int64)
        masked, _ = Walking.open(call.walk, call.num_words, map_row, TILE_KV, BLOCK_KV, False)
        full, _ = Walking.open(call.walk, call.num_words, map_row, TILE_KV, BLOCK_KV, True)
        return masked, full


@gluon.jit
def load_row(call, rings, row, i):
    """K and V of the tiles of a row, the first of which is tile i; the i after them.

    The walk is a step ahead of the loads. The next row is wanted when WANTED_AHEAD loads are left.
    """
    kv_head = row.h // call.G
    masked, full = walks_of(call, row)
    wanted = i + row.num_masked + row.num_full - WANTED_AHEAD
    if call.counter is not None and wanted < i:
        rings.rows.want()
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
            rings.k.wait_empty(i)
            if call.counter is not None and i == wanted:
                rings.rows.want()
            write_number(rings.places.index(i % rings.k.STAGES), kv_start // call.BLOCK_KV)
            rings.k.fill(i, call.k, row.b, kv_head, kv_start, rings.k.begin(i, bytes_of(call.k)))
            rings.v.load(i, call.v, row.b, kv_head, kv_start)
            i += 1
    return i


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
    """s = q k^T as scores of base 2 but for a factor > 0, which is the second result.

    So exp2's multiply-add applies the factor.
    """
    if call.SCORE is None:
        return s, call.scale * LOG2_E
    else:
        q_idx, kv_idx = indices(row, kv_start, s)
        s = natural_score(s, row.b, row.h, q_idx, kv_idx, call.scale, call.bindings, call.SCORE)
        return s, gl.to_tensor(LOG2_E)


@gluon.jit
def shown(call, row, kv_start, s):
    """s, and -inf where the mask hides the pair or there is no such key."""
    q_idx, kv_idx = indices(row, kv_start, s)
    s = hidden(s, float("-inf"), 0, 0, row.b, row.h, q_idx, kv_idx, call.bindings, call.MASK, False)
    if not call.IS_EVEN_KV:
        end, column = near(call.Skv, kv_idx)
        s = gl.where(column < end, s, float("-inf"))
    return s


@gluon.jit
def start_of_tile(call, rings, i, IS_MASKED: gl.constexpr):
    """The first key of tile i, which has come, where a mask or a score function asks for it.

    As a multiple of BLOCK_KV, so that the compiler sees that captured vectors may be read two numbers at a time.
    """
    if IS_MASKED or call.SCORE is not None:
        return read_number(rings.places.index(i % rings.k.STAGES), 4) * call.BLOCK_KV
    else:
        return gl.to_tensor(0)


@gluon.jit
def score_product(rings, q_load, i, S_LAYOUT: gl.constexpr):
    """S = Q K(i)^T, issued, a product for each chunk of columns    [ROWS, BLOCK_KV] f32"""
    BLOCK_KV: gl.constexpr = rings.k.tiles[0].shape[3]
    s = gl.zeros([ROWS, BLOCK_KV], gl.float32, S_LAYOUT)
    for c in gl.static_range(len(rings.k.tiles)):
        k_tile = rings.k.tile(i, c).permute((1, 0))
        s = warpgroup_mma(rings.q.tile(q_load, c), k_tile, s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def output_product(rings, pairs, correction, acc, i):
    """O = O * correction + P V(i), which has come, issued, for each chunk of columns

    Of each chunk [ROWS, columns] f32.
    """
    issued = ()
    for c in gl.static_range(len(acc)):
        issued += (chunk_product(rings.v.tile(i, c), pairs, correction, acc[c]),)
    return issued


@gluon.jit
def chunk_product(v_tile, pairs, correction, acc):
    """O = O * correction + P V, issued    [ROWS, columns] f32"""
    O_LAYOUT: gl.constexpr = acc.type.layout
    p = unpack_pairs(pairs, v_tile.dtype, gl.DotOperandLayout(0, O_LAYOUT, 2))
    acc = rescaled(acc, correction)
    return warpgroup_mma(p, v_tile, acc, is_async=True)


@gluon.jit
def attend_step(
    i,
    acc,
    softmax,
    pairs,
    correction,
    q_load,
    call,
    row,
    rings,
    IS_MASKED: gl.constexpr,
    WARPGROUP: gl.constexpr,
):
    """Scores of tile i, and the output of tile i - 1, whose P is `pairs`."""
    S_LAYOUT: gl.constexpr = softmax.row_max.type.layout.parent
    gl.assume(i > 0)  # then stages are found without regard to the sign
    rings.k.wait(i)
    kv_start = start_of_tile(call, rings, i, IS_MASKED)  # behind products it would come when the last has begun
    if call.HAS_TURNS:
        wait_turn(WARPGROUP)
    s = score_product(rings, q_load, i, S_LAYOUT)
    acc = output_product(rings, pairs, correction, acc, i - 1)
    if call.HAS_TURNS:
        pass_turn(WARPGROUP, call.NUM_CONSUMERS)
    s = warpgroup_mma_wait(len(acc), deps=[s])
    if not IS_MASKED:
        rings.k.release(i)
    s, factor = scores(call, row, kv_start, s)
    if IS_MASKED:
        s = shown(call, row, kv_start, s)
        rings.k.release(i)  # ptxas moves no read past this: those of the mask now come while S is computed
    softmax, p, correction = softmax.add(s, factor, IS_MASKED or call.SCORE is not None)
    # V is for the next step, but ptxas moves nothing past this: else it waits for O before the exponentials
    rings.v.wait(i)
    acc = finished(acc, 0)
    rings.v.release(i - 1)
    pairs = pack_pairs(p, call.q[0].dtype)  # only now are the registers of the previous P free: else C7513
    return acc, softmax, pairs, correction


@gluon.jit
def store_chunk(out, rings, acc, factor, row, column, C: gl.constexpr, WARPGROUP: gl.constexpr):
    """acc * factor [:, None], which is chunk C of out, from column `column` on."""
    O_LAYOUT: gl.constexpr = acc.type.layout
    if rings.out is None:
        # Q has been read
        LAYOUT: gl.constexpr = out.layout
        staged = seen_as(rings.q.tiles[C].index(WARPGROUP), out.dtype, [1, 1, ROWS, acc.shape[1]], LAYOUT)
    else:
        staged = rings.out[C].index(WARPGROUP)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT))
    staged.reshape([ROWS, acc.shape[1]]).store((acc * factor[:, None]).to(out.dtype))
    fence_async_shared()
    begin_store(out, [row.b, row.h, row.q_start, column], staged)


@gluon.jit
def attend(call, rings, WARPGROUP: gl.constexpr):
    """Role of a warpgroup: out and lse of ROWS queries, of each row of a persistent program."""
    n = gl.to_tensor(0)
    i = gl.to_tensor(0)
    if call.HAS_TURNS and WARPGROUP == call.NUM_CONSUMERS - 1:
        pass_turn(WARPGROUP, call.NUM_CONSUMERS)
    row = taken_row(rings, n, WARPGROUP * ROWS, 4)
    if call.counter is None:
        attend_row(call, rings, row, n, i, WARPGROUP)
    else:
        while row.b >= 0:
            i = attend_row(call, rings, row, n, i, WARPGROUP)
            n += 1
            row = taken_row(rings, n, WARPGROUP * ROWS, 4)
    tma.store_wait(0)
    if call.HAS_TURNS and WARPGROUP == 0:
        wait_turn(WARPGROUP)  # the turn that was passed on last


@gluon.jit
def attend_row(call, rings, row, n, first, WARPGROUP: gl.constexpr):
    """Row number n of this program, whose first tile is tile `first`; the number of the tile after its last."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_KV, 16])
    MAY_HIDE: gl.constexpr = call.MASK is not None or not call.IS_EVEN_KV
    num_masked = row.num_masked
    num_steps = num_masked + row.num_full
    q_load = n * call.NUM_CONSUMERS + WARPGROUP

    acc = accumulators(call.out)
    softmax = OnlineSoftmax.create(ROWS, call.BLOCK_KV, S_LAYOUT)
    rings.q.wait(q_load)
    if num_steps > 0:
        # tile 0: there is no P before it
        rings.k.wait(first)
        kv_start = start_of_tile(call, rings, first, MAY_HIDE)
        if call.HAS_TURNS:
            wait_turn(WARPGROUP)
        s = score_product(rings, q_load, first, S_LAYOUT)
        if call.HAS_TURNS:
            pass_turn(WARPGROUP, call.NUM_CONSUMERS)
        s = warpgroup_mma_wait(0, deps=[s])
        s, factor = scores(call, row, kv_start, s)
        if MAY_HIDE and num_masked > 0:
            s = shown(call, row, kv_start, s)
        rings.k.release(first)
        softmax, p, correction = softmax.add(s, factor, MAY_HIDE or call.SCORE is not None)
        rings.v.wait(first)
        pairs = pack_pairs(p, call.q[0].dtype)

        if MAY_HIDE:
            for step in range(1, num_masked):
                acc, softmax, pairs, correction = attend_step(
                    first + step, acc, softmax, pairs, correction, q_load, call, row, rings, True, WARPGROUP
                )
        for step in range(gl.maximum(num_masked, 1), num_steps):
            acc, softmax, pairs, correction = attend_step(
                first + step, acc, softmax, pairs, correction, q_load, call, row, rings, False, WARPGROUP
            )
        if call.counter is not None:
            rings.q.release(q_load)
        acc = output_product(rings, pairs, correction, acc, first + num_steps - 1)
        acc = finished(acc, 0)
        if call.counter is not None:
            rings.v.release(first + num_steps - 1)
    else:
        if call.counter is not None:
            rings.q.release(q_load)

    row_sum = softmax.row_sum()
    has_key = row_sum > 0
    row_sum = gl.where(has_key, row_sum, 1.0)
    lse = gl.where(has_key, (softmax.row_max + gl.log2(row_sum)) * LN_2, float("-inf"))
    rows = row.q_start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    head = row.b.to(gl.int64) * call.Hq + row.h
    gl.store(call.lse_pointer + head * call.Sq + rows, lse, mask=rows < call.Sq)
    if call.counter is not None:
        tma.store_wait(0)  # the last row has left its place
    inverse = 1.0 / row_sum
    column = 0
    for c in gl.static_range(len(call.out)):
        store_chunk(call.out[c], rings, acc[c], inverse, row, column, c, WARPGROUP)
        column += call.out[c].block_type.shape[3]
    return first + num_steps


@gluon.constexpr_function
def fits(out, q):
    """Each chunk of out has its place in that of q."""
    return len(out) <= len(q) and all(a.block_type.nbytes <= b.block_type.nbytes for a, b in zip(out, q, strict=False))


@gluon.jit(do_not_specialize=[*WALK_SIZES, "Hq", "Sq", "Skv"])
def hopper_forward_kernel(
    q,  # descriptors: [B, Hq, Sq, D] in blocks of ROWS and as many columns as the first chunk has
    q_rest,  # and the second one, or None
    k,  # [B, Hkv, Skv, D] in blocks of BLOCK_KV
    k_rest,
    v,  # [B, Hkv, Skv, DV] in blocks of BLOCK_KV
    v_rest,
    out,  # [B, Hq, Sq, DV] in blocks of ROWS
    out_rest,
    lse_pointer,  # [B, Hq, Sq] f32, contiguous
    counter,  # of a persistent kernel: [2] int32, 0 before and after
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
    """out and lse of one query tile. Grid: a program for each tile of each head, in the order of work_of.

    A persistent one goes on with further tiles: numbers from the grid's size on, which programs draw from counter.
    """
    NUM_CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    gl.static_assert(FIRST_BARRIER + 2 * STAGES - 1 <= LAST_BARRIER - NUM_CONSUMERS)
    q = chunks_of(q, q_rest)
    k = chunks_of(k, k_rest)
    v = chunks_of(v, v_rest)
    out = chunks_of(out, out_rest)
    staged = None
    if counter is not None or not fits(out, q):
        staged = allocate_tiles(out, NUM_CONSUMERS)
    rings = Rings(
        RowQueue.create(NUM_FIELDS, NUM_CONSUMERS + 1, counter is not None),
        Ring.create(q, NUM_CONSUMERS if counter is None else NUM_CONSUMERS * 2, 1),
        Ring.create(k, STAGES, NUM_CONSUMERS, FIRST_BARRIER),
        Ring.create(v, STAGES, NUM_CONSUMERS, FIRST_BARRIER + STAGES),
        gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        staged,
    )
    fence_async_shared()
    call = Call(
        q,
        k,
        v,
        out,
        lse_pointer,
        counter,
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
        G,
        NUM_CONSUMERS,
        BLOCK_Q,
        BLOCK_KV,
        TILE_Q,
        TILE_KV,
        IS_EVEN_KV,
        HAS_TURNS,
    )
    if NUM_CONSUMERS == 1:
        gl.warp_specialize(
            [
                (attend, (call, rings, gl.constexpr(0))),
                (load_tiles, (call, rings)),
                (find_rows, (call, rings)),
            ],
            [1, 1],
            REGISTERS,
        )
    elif NUM_CONSUMERS == 2:
        gl.warp_specialize(
            [
                (attend, (call, rings, gl.constexpr(0))),
                (attend, (call, rings, gl.constexpr(1))),
                (load_tiles, (call, rings)),
                (find_rows, (call, rings)),
            ],
            [4, 1, 1],
            REGISTERS,
        )
    else:
        gl.warp_specialize(
            [
                (attend, (call, rings, gl.constexpr(0))),
                (attend, (call, rings, gl.constexpr(1))),
                (attend, (call, rings, gl.constexpr(2))),
                (load_tiles, (call, rings)),
                (find_rows, (call, rings)),
            ],
            [4, 4, 1, 1],
            REGISTERS,
        )
