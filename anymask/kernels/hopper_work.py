"""What a program of the Hopper backward works on: tiles of keys, and of each the queries that see them.

And the roles of one warp each that find the tiles and load them; hopper_bwd.py has those that compute.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.kernels.hopper_chunks import bytes_of
from anymask.kernels.hopper_pipeline import begin_load, write_number
from anymask.kernels.hopper_walk import WANTED_AHEAD, Counting, Walking, draw_rows
from anymask.kernels.record import record
from anymask.kernels.tile import map_of, ranked_row, work_of

ROWS = gl.constexpr(64)  # keys of a consumer: what one wgmma of a warpgroup takes


@record
class Work:
    """A tile of keys of one head: the row of the transposed map, and its first key. b < 0: there is none."""

    b: gl.tensor
    h_kv: gl.tensor
    row: gl.tensor
    kv_start: gl.tensor


NUM_FIELDS = gl.constexpr(4)


@gluon.jit
def work_fields(call, number):
    """Of the work with this number, in the order of Work's.

    Where query heads have maps of their own, the first one's order holds for all that share keys.
    """
    head, rank, part = work_of(
        number, call.num_rows, call.num_heads, call.heads_together, call.heads_last, call.TILE_KV, call.BLOCK_KV
    )
    b = head // call.Hkv
    h_kv = head % call.Hkv
    row = ranked_row(call.walk, map_of(call.map_strides, b, h_kv * call.G) * call.num_rows, rank)
    return b, h_kv, row, row * call.TILE_KV + part * call.BLOCK_KV


@gluon.jit
def taken_work(call, shared, n, NUM_WARPS: gl.constexpr):
    """The n-th work of this program, for a role of so many warps."""
    if call.counter is None:
        fields = work_fields(call, gl.program_id(0))
    else:
        fields = shared.works.take(n, NUM_WARPS)
    return Work(fields[0], fields[1], fields[2], fields[3])


@gluon.jit
def find_works(call, shared):
    """Role of one warp of a persistent program: see draw_rows."""
    num_works = call.num_rows * (call.TILE_KV // call.BLOCK_KV) * call.num_heads
    draw_rows(shared.works, call, num_works, work_fields)


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
        num_steps = gl.cdiv(call.Sq, call.BLOCK_Q)
        num_masked = gl.where(work.kv_start + call.BLOCK_KV > call.Skv, num_steps, 0)
        tiles = Counting(gl.to_tensor(0), call.BLOCK_Q)
        return Visit(h, num_masked, num_steps - num_masked, tiles, tiles)
    else:
        row = map_of(call.map_strides, work.b, h) * call.num_rows + work.row
        masked, num_masked = Walking.open(call.walk, call.num_words, row, TILE_Q, call.BLOCK_Q, False)
        full, num_full = Walking.open(call.walk, call.num_words, row, TILE_Q, call.BLOCK_Q, True)
        return Visit(h, num_masked, num_full, masked, full)


# --- the producer ---


@gluon.jit
def load_tiles(call, shared):
    """Role of one warp: load what the consumers read."""
    n = gl.to_tensor(0)
    i = gl.to_tensor(0)
    work = taken_work(call, shared, n, 1)
    if call.counter is None:
        load_keys(call, shared, work, n)
        load_queries(call, shared, work, n, i)
    else:
        while work.b >= 0:
            i = load_queries(call, shared, work, n, i)
            n += 1
            work = taken_work(call, shared, n, 1)


@gluon.jit
def load_keys(call, shared, work, n):
    """K and V of work number n of this program. V first: its place is given back before the last product with K."""
    PARTS: gl.constexpr = call.BLOCK_KV // ROWS
    for part in gl.static_range(PARTS):
        shared.v.load(n * PARTS + part, call.v, work.b, work.h_kv, work.kv_start + part * ROWS)
    for part in gl.static_range(PARTS):
        shared.k.load(n * PARTS + part, call.k, work.b, work.h_kv, work.kv_start + part * ROWS)


@gluon.jit
def load_queries(call, shared, work, n, i):
    """Q, dO, lse and delta of the steps of work number n, the first of which is step i; the i after them.

    The walk is a step ahead of the loads. In a persistent program the next work is wanted when WANTED_AHEAD loads are
    left; and K and V, if they have one place, come after the first step's loads, which need not wait until the work
    before has its gradients.
    """
    first = i
    if call.KEY_TILES > 1:
        load_keys(call, shared, work, n)
    for g in range(call.G):
        visit = visit_of(call, work, g)
        wanted = i + visit.num_masked + visit.num_full - WANTED_AHEAD
        if call.counter is not None and g == call.G - 1 and wanted < i:
            shared.works.want()
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
                shared.q.wait_empty(i)
                if call.counter is not None and g == call.G - 1 and i == wanted:
                    shared.works.want()
                stage = i % shared.q.STAGES
                # so consumers need no walk; the barrier of q tells them of it
                write_number(shared.tiles.index(stage), q_start // call.BLOCK_Q)
                full = shared.q.begin(i, bytes_of(call.q) + call.rows.block_type.nbytes)
                begin_load(call.rows, [work.b, visit.h, 0, q_start], full, shared.rows.index(stage))
                shared.q.fill(i, call.q, work.b, visit.h, q_start, full)
                shared.dout.load(i, call.dout, work.b, visit.h, q_start)
                if call.counter is not None and call.KEY_TILES == 1 and i == first:
                    load_keys(call, shared, work, n)
                i += 1
    if call.counter is not None and call.KEY_TILES == 1 and i == first:
        load_keys(call, shared, work, n)
    return i
