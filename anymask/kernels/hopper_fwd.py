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

from anymask.kernels.functions import near
from anymask.kernels.hopper_pipeline import Ring, RowQueue, allocate_tiles, begin_store, pass_turn, seen_as, wait_turn
from anymask.kernels.hopper_softmax import OnlineSoftmax, pack_pairs, unpack_pairs
from anymask.kernels.record import record
from anymask.kernels.tile import (
    LN_2,
    LOG2_E,
    hidden,
    map_of,
    natural_score,
    next_tile,
    open_row,
    ranked_row,
    start_of,
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
class Walking:
    """Where the walk of a row's masked, or full, tiles stands (kernels/tile.py)."""

    words: gl.tensor
    num_words: gl.tensor
    bits: gl.tensor
    first: gl.tensor
    place: gl.tensor
    ahead: gl.tensor
    TILE_KV: gl.constexpr
    BLOCK_KV: gl.constexpr

    @gluon.jit
    def open(call, row, IS_FULL: gl.constexpr):
        """At the first of row's tiles, and how many steps they take."""
        STEPS: gl.constexpr = call.TILE_KV // call.BLOCK_KV
        words, num_tiles, bits, first, ahead = open_row(call.walk, call.num_words, row, call.Skv, call.TILE_KV, IS_FULL)
        place = gl.to_tensor(0)
        walking = Walking(words, call.num_words, bits, first, place, ahead, call.TILE_KV, call.BLOCK_KV)
        return walking, num_tiles * STEPS

    @gluon.jit
    def kv_start(self, step):
        """First key of step `step`."""
        return start_of(self.num_words, self.bits, self.first, step, self.TILE_KV, self.BLOCK_KV)

    @gluon.jit
    def after(self, step):
        """Where it stands after step `step`."""
        STEPS: gl.constexpr = self.TILE_KV // self.BLOCK_KV
        bits, first, place, ahead = next_tile(
            self.words, self.num_words, self.bits, self.first, self.place, self.ahead, step, STEPS
        )
        return Walking(self.words, self.num_words, bits, first, place, ahead, self.TILE_KV, self.BLOCK_KV)


@record
class Counting:
    """Tiles one after the other from a first key on: what a row visits that has no walk."""

    first: gl.tensor
    BLOCK_KV: gl.constexpr

    @gluon.jit
    def kv_start(self, step):
        return self.first + step * self.BLOCK_KV

    @gluon.jit
    def after(self, step):
        return self


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
def row_of(call, number, OFFSET: gl.constexpr):
    """Row `number` in the order of work_of, from query OFFSET on.

    Without a walk it visits all keys: first the tile that hangs over their end, if one does.
    """
    BLOCK_Q: gl.constexpr = call.BLOCK_Q
    BLOCK_KV: gl.constexpr = call.BLOCK_KV
    TILE_Q: gl.constexpr = call.TILE_Q
    head, rank, part = work_of(number, call.num_rows, call.num_heads, call.heads_together, TILE_Q, BLOCK_Q)
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
        masked, num_masked = Walking.open(call, first_row + row, False)
        full, num_full = Walking.open(call, first_row + row, True)
        q_start = row * TILE_Q + part * BLOCK_Q + OFFSET
        return Row(b, h, q_start, num_masked, num_full, masked, full)


@gluon.jit
def num_rows_of(call):
    """Of all heads."""
    PARTS: gl.constexpr = call.TILE_Q // call.BLOCK_Q
    return call.num_rows * PARTS * call.num_heads


@record
class Rings:
    """Q of each consumer, K and V; and where out is staged, None: in Q's place.

    queue: of the rows after the first of a persistent program, None: there is one row.
    """

    q: Ring
    k: Ring
    v: Ring
    out: gl.tuple | gl.constexpr
    queue: RowQueue | gl.constexpr


# --- the producer ---


@gluon.jit
def load_tiles(call, rings):
    """Role of one warp: load what the consumers read.

    A persistent program draws the number of its next row when a row's loads are on their way, so that nobody waits for
    the counter. Who counts itself out last sets the counter back: all have drawn their last number by then.
    """
    number = gl.program_id(0)
    n = gl.to_tensor(0)
    i = gl.to_tensor(0)
    if rings.queue is None:
        load_row(call, rings, row_of(call, number, 0), n, i)
    else:
        num_rows = num_rows_of(call)
        while number < num_rows:
            i = load_row(call, rings, row_of(call, number, 0), n, i)
            number = gl.num_programs(0) + gl.atomic_add(call.counter, 1)
            rings.queue.put(n, number)
            n += 1
        if gl.atomic_add(call.counter + 1, 1) == gl.num_programs(0) - 1:
            gl.store(call.counter, 0)
            gl.store(call.counter + 1, 0)


@gluon.jit
def load_row(call, rings, row, n, i):
    """Q of row number n of this program, and K and V of its tiles, the first of which is tile i; the i after them.

    The walk is a step ahead of the loads.
    """
    kv_head = row.h // call.G
    NUM_CONSUMERS: gl.constexpr = call.BLOCK_Q // ROWS
    for consumer in gl.static_range(NUM_CONSUMERS):
        rings.q.load(n * NUM_CONSUMERS + consumer, call.q, row.b, row.h, row.q_start + consumer * ROWS)
    for IS_FULL in gl.static_range(2):
        if IS_FULL:
            tiles = row.full
            num_steps = row.num_full
        else:
            tiles = row.masked
            num_steps = row.num_masked
        for step in range(num_steps):
            kv_start = tiles.kv_start(step)
            tiles = tiles.after(step)
            rings.k.load(i, call.k, row.b, kv_head, kv_start)
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
    """O = O * correction + P V(i), issued, for each chunk of columns    of each chunk [ROWS, columns] f32"""
    rings.v.wait(i)
    issued = ()
    for c in gl.static_range(len(acc)):
        issued += (chunk_product(rings.v.tile(i, c), pairs, correction, acc[c]),)
    return issued


@gluon.jit
def chunk_product(v_tile, pairs, correction, acc):
    """O = O * correction + P V, issued    [ROWS, columns] f32"""
    O_LAYOUT: gl.constexpr = acc.type.layout
    p = unpack_pairs(pairs, v_tile.dtype, gl.DotOperandLayout(0, O_LAYOUT, 2))
    correction = gl.convert_layout(correction, gl.SliceLayout(1, O_LAYOUT))
    # behind the wait for V, so that it stays behind the issue of Q K^T
    acc = acc * correction[:, None]
    return warpgroup_mma(p, v_tile, acc, is_async=True)


@gluon.jit
def all_done(products):
    """The tuple of products, when none is in flight any more."""
    if len(products) == 1:
        return (warpgroup_mma_wait(0, deps=[products[0]]),)
    else:
        a, b = warpgroup_mma_wait(0, deps=[products[0], products[1]])
        return (a, b)


@gluon.jit
def attend_step(
    i,
    kv_start,
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
    rings.k.wait(i)
    if call.HAS_TURNS:
        wait_turn(WARPGROUP)
    s = score_product(rings, q_load, i, S_LAYOUT)
    acc = output_product(rings, pairs, correction, acc, i - 1)
    if call.HAS_TURNS:
        pass_turn(WARPGROUP)
    s = warpgroup_mma_wait(len(acc), deps=[s])
    rings.k.release(i)
    s, factor = scores(call, row, kv_start, s)
    if IS_MASKED:
        s = shown(call, row, kv_start, s)
    softmax, p, correction = softmax.add(s, factor, IS_MASKED or call.SCORE is not None)
    acc = all_done(acc)
    rings.v.release(i - 1)
    pairs = pack_pairs(p, call.q[0].dtype)  # only now are the registers of the previous P free: else C7513
    return acc, softmax, pairs, correction


@gluon.jit
def empty_outputs(out):
    """Of each chunk of out: [ROWS, columns] f32 0."""
    acc = ()
    for c in gl.static_range(len(out)):
        acc += (empty_output(out[c].block_type.shape[3]),)
    return acc


@gluon.jit
def empty_output(COLUMNS: gl.constexpr):
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    return gl.zeros([ROWS, COLUMNS], gl.float32, O_LAYOUT)


@gluon.jit
def store_chunk(out, rings, acc, factor, row, column, C: gl.constexpr, WARPGROUP: gl.constexpr):
    """acc * factor [:, None], which is chunk C of out, from column `column` on."""
    O_LAYOUT: gl.constexpr = acc.type.layout
    if rings.out is None:
        # Q has been read
        staged = seen_as(rings.q.tiles[C].index(WARPGROUP), out)
    else:
        staged = rings.out[C].index(WARPGROUP)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT))
    staged.reshape([ROWS, acc.shape[1]]).store((acc * factor[:, None]).to(out.dtype))
    fence_async_shared()
    begin_store(out, [row.b, row.h, row.q_start, column], staged)


@gluon.jit
def attend(call, rings, WARPGROUP: gl.constexpr):
    """Role of a warpgroup: out and lse of ROWS queries, of each row of a persistent program."""
    OFFSET: gl.constexpr = WARPGROUP * ROWS
    number = gl.program_id(0)
    n = gl.to_tensor(0)
    i = gl.to_tensor(0)
    row = row_of(call, number, OFFSET)
    if call.HAS_TURNS and WARPGROUP == 1:
        pass_turn(WARPGROUP)
    if rings.queue is None:
        attend_row(call, rings, row, n, i, WARPGROUP)
    else:
        num_rows = num_rows_of(call)
        while number < num_rows:
            number, row, i = attend_row(call, rings, row, n, i, WARPGROUP)
            n += 1
        tma.store_wait(0)
    if call.HAS_TURNS and WARPGROUP == 0:
        wait_turn(WARPGROUP)  # the turn that the other passed on last


@gluon.jit
def attend_row(call, rings, row, n, first, WARPGROUP: gl.constexpr):
    """Row number n of this program, whose first tile is tile `first`.

    Of a persistent program: the number of its next row, that row, and the number of its first tile.
    """
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_KV, 16])
    MAY_HIDE: gl.constexpr = call.MASK is not None or not call.IS_EVEN_KV
    num_masked = row.num_masked
    num_steps = num_masked + row.num_full
    q_load = n * (call.BLOCK_Q // ROWS) + WARPGROUP

    acc = empty_outputs(call.out)
    softmax = OnlineSoftmax.create(ROWS, S_LAYOUT)
    rings.q.wait(q_load)
    if num_steps > 0:
        # tile 0: there is no P before it
        rings.k.wait(first)
        if call.HAS_TURNS:
            wait_turn(WARPGROUP)
        s = score_product(rings, q_load, first, S_LAYOUT)
        if call.HAS_TURNS:
            pass_turn(WARPGROUP)
        s = warpgroup_mma_wait(0, deps=[s])
        rings.k.release(first)
        masked = row.masked
        full = row.full
        kv_start = gl.where(num_masked > 0, masked.kv_start(0), full.kv_start(0))
        s, factor = scores(call, row, kv_start, s)
        if MAY_HIDE and num_masked > 0:
            s = shown(call, row, kv_start, s)
        softmax, p, correction = softmax.add(s, factor, MAY_HIDE or call.SCORE is not None)
        pairs = pack_pairs(p, call.q[0].dtype)

        if MAY_HIDE:
            masked = masked.after(0)
            for step in range(1, num_masked):
                i = first + step
                kv_start = masked.kv_start(step)
                masked = masked.after(step)
                acc, softmax, pairs, correction = attend_step(
                    i, kv_start, acc, softmax, pairs, correction, q_load, call, row, rings, True, WARPGROUP
                )
        if num_masked == 0:
            full = full.after(0)
        for step in range(gl.maximum(num_masked, 1), num_steps):
            i = first + step
            kv_start = full.kv_start(step - num_masked)
            full = full.after(step - num_masked)
            acc, softmax, pairs, correction = attend_step(
                i, kv_start, acc, softmax, pairs, correction, q_load, call, row, rings, False, WARPGROUP
            )
        if rings.queue is not None:
            rings.q.release(q_load)
        acc = output_product(rings, pairs, correction, acc, first + num_steps - 1)
        acc = all_done(acc)
        if rings.queue is not None:
            rings.v.release(first + num_steps - 1)
    else:
        if rings.queue is not None:
            rings.q.release(q_load)
    if rings.queue is not None:
        # its walk is read while this row is written
        number = rings.queue.take(n)
        next_row = row_of(call, gl.minimum(number, num_rows_of(call) - 1), WARPGROUP * ROWS)

    has_key = softmax.row_sum > 0
    row_sum = gl.where(has_key, softmax.row_sum, 1.0)
    lse = gl.where(has_key, (softmax.row_max + gl.log2(row_sum)) * LN_2, float("-inf"))
    rows = row.q_start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    head = row.b.to(gl.int64) * call.Hq + row.h
    gl.store(call.lse_pointer + head * call.Sq + rows, lse, mask=rows < call.Sq)
    if rings.queue is not None:
        tma.store_wait(0)  # the last row has left its place
    inverse = 1.0 / row_sum
    column = 0
    for c in gl.static_range(len(call.out)):
        store_chunk(call.out[c], rings, acc[c], inverse, row, column, c, WARPGROUP)
        column += call.out[c].block_type.shape[3]
    if rings.queue is None:
        tma.store_wait(0)
        return
    else:
        return number, next_row, first + num_steps


@gluon.jit
def chunks_of(first, rest):
    """The descriptors of a tensor as a tuple."""
    if rest is None:
        return (first,)
    else:
        return (first, rest)


@gluon.constexpr_function
def fits(out, q):
    """Each chunk of out has its place in that of q."""
    return len(out) <= len(q) and all(a.block_type.nbytes <= b.block_type.nbytes for a, b in zip(out, q, strict=False))


@gluon.jit(do_not_specialize=["num_words", "num_rows", "num_heads", "heads_together", "Hq", "Sq", "Skv"])
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
    q = chunks_of(q, q_rest)
    k = chunks_of(k, k_rest)
    v = chunks_of(v, v_rest)
    out = chunks_of(out, out_rest)
    staged = None
    if counter is not None or not fits(out, q):
        staged = allocate_tiles(out, NUM_CONSUMERS)
    queue = None
    if counter is not None:
        queue = RowQueue.create(NUM_CONSUMERS)
    rings = Rings(
        Ring.create(q, NUM_CONSUMERS if counter is None else NUM_CONSUMERS * 2, 1),
        Ring.create(k, STAGES, NUM_CONSUMERS),
        Ring.create(v, STAGES, NUM_CONSUMERS),
        staged,
        queue,
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
    if NUM_CONSUMERS == 1:
        gl.warp_specialize([(attend, (call, rings, gl.constexpr(0))), (load_tiles, (call, rings))], [1], REGISTERS)
    elif NUM_CONSUMERS == 2:
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
