"""The kinds of all map tiles in one launch: by bounds of the mask, and pair by pair where these leave a tile open."""

import triton
import triton.language as tl

from anymask.kernels.tile import tile_at


@triton.jit
def positions(tile, step, length, TILE: tl.constexpr, IS_EVEN: tl.constexpr):
    """Position number `step` of a tile; past its end, or that of the sequence, the last one again."""
    if IS_EVEN:
        position = tile * TILE + step
    else:
        position = tl.minimum(tile * TILE + tl.minimum(step, TILE - 1), length - 1)
    return position


@triton.jit
def exact_kind(
    b,
    h,
    q_tile,
    kv_tile,
    Sq,
    Skv,
    bindings,
    MASK: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    IS_EVEN_Q: tl.constexpr,
    IS_EVEN_KV: tl.constexpr,
):
    """The kind of a tile, int8, from BLOCK_Q x BLOCK_KV pairs at a time, until some were visible and some hidden."""
    SIZE: tl.constexpr = BLOCK_Q * BLOCK_KV
    STEPS_KV: tl.constexpr = (TILE_KV + BLOCK_KV - 1) // BLOCK_KV
    STEPS: tl.constexpr = (TILE_Q + BLOCK_Q - 1) // BLOCK_Q * STEPS_KV
    step = 0
    visible = 0
    while (step < STEPS) & ((visible == 0) | (visible == step * SIZE)):
        piece = (STEPS - step) % STEPS  # first and last piece first: a border that crosses the tile shows
        # [1, BLOCK_Q] and [BLOCK_KV, 1]: where Triton cannot tell which index of a load runs along memory, neighbouring
        # threads take the first axis, and kv_idx is the one that does (tree of 8,192 nodes: 316 us the other way round)
        row = piece // STEPS_KV * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
        column = piece % STEPS_KV * BLOCK_KV + tl.arange(0, BLOCK_KV)[:, None]
        q_idx = positions(q_tile, row, Sq, TILE_Q, IS_EVEN_Q)
        kv_idx = positions(kv_tile, column, Skv, TILE_KV, IS_EVEN_KV)
        keep = MASK(b, h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2])
        visible += tl.sum(tl.broadcast_to(keep.to(tl.int32), [BLOCK_KV, BLOCK_Q]))
        step += 1
    return (visible > 0).to(tl.int8) + (visible == step * SIZE).to(tl.int8)


@triton.jit(do_not_specialize=["Hm", "num_q", "num_kv", "Sq", "Skv", "row_shares", "column_shares"])
def classify_kernel(
    kinds_pointer,  # [Bm, Hm, num_q, num_kv] int8, contiguous
    Hm,
    num_q,
    num_kv,
    Sq,
    Skv,
    row_shares,
    column_shares,
    bindings,
    BOUNDS: tl.constexpr,
    MASK: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    PADDED_Q: tl.constexpr,  # the next powers of two
    PADDED_KV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_EVEN_Q: tl.constexpr,  # all tiles are whole and a power of two
    IS_EVEN_KV: tl.constexpr,
):
    """ROWS x COLUMNS tiles, COLUMNS <= 32: 0 where the mask hides all pairs of a tile, 2 where it shows all, else 1.

    row_shares * column_shares programs find the same bounds and share the tiles that these leave open.
    """
    program = tl.program_id(0)
    row_share = program % row_shares
    column_share = program // row_shares % column_shares
    block = program // row_shares // column_shares
    num_columns = tl.cdiv(num_kv, COLUMNS)
    num_rows = tl.cdiv(num_q, ROWS)
    head = block // num_columns // num_rows
    b = head // Hm
    h = head % Hm
    q_start = block // num_columns % num_rows * ROWS
    kv_start = block % num_columns * COLUMNS
    # [ROWS] and [COLUMNS]
    row = q_start + tl.arange(0, ROWS)
    column = kv_start + tl.arange(0, COLUMNS)
    q_tile = tl.minimum(row, num_q - 1)
    kv_tile = tl.minimum(column, num_kv - 1)
    q_first = positions(q_tile, 0, Sq, TILE_Q, IS_EVEN_Q)
    q_last = positions(q_tile, TILE_Q - 1, Sq, TILE_Q, IS_EVEN_Q)
    kv_first = positions(kv_tile, 0, Skv, TILE_KV, IS_EVEN_KV)
    kv_last = positions(kv_tile, TILE_KV - 1, Skv, TILE_KV, IS_EVEN_KV)
    # [ROWS, PADDED_Q] and [COLUMNS, PADDED_KV]
    q_idx = positions(q_tile[:, None], tl.arange(0, PADDED_Q)[None, :], Sq, TILE_Q, IS_EVEN_Q)
    kv_idx = positions(kv_tile[:, None], tl.arange(0, PADDED_KV)[None, :], Skv, TILE_KV, IS_EVEN_KV)
    lo, hi = BOUNDS(q_first, q_last, kv_first, kv_last, b, h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2])

    # [ROWS, COLUMNS] int32; 3 is undecided
    kinds = tl.broadcast_to(3 * hi.to(tl.int32) - lo.to(tl.int32), [ROWS, COLUMNS])
    exists = (row < num_q)[:, None] & (column < num_kv)[None, :]
    # the corners of tiles: some visible and some hidden is partial
    visible = tl.zeros([ROWS, COLUMNS], tl.int32)
    num_corners = tl.where(tl.max(tl.max((exists & (kinds == 3)).to(tl.int32), 1), 0) != 0, 4, 0)
    for corner in range(num_corners):
        q_corner = tl.where(corner % 2 == 0, q_first, q_last)[:, None]
        kv_corner = tl.where(corner // 2 == 0, kv_first, kv_last)[None, :]
        visible += MASK(b, h, q_corner, kv_corner, bindings[0], bindings[1], bindings[2]).to(tl.int32)
    kinds = tl.where((kinds == 3) & (visible > 0) & (visible < num_corners), 1, kinds)
    kinds_pointer += head.to(tl.int64) * num_q * num_kv
    pointers = kinds_pointer + row.to(tl.int64)[:, None] * num_kv + column[None, :]
    tl.store(pointers, kinds.to(tl.int8), mask=exists & (kinds != 3))

    # [ROWS] int32: one bit a tile of this program's share
    is_open = exists & (kinds == 3) & (tl.arange(0, COLUMNS)[None, :] % column_shares == column_share)
    words = tl.sum(tl.where(is_open, 1 << tl.arange(0, COLUMNS)[None, :], 0), 1)
    num_open_rows = tl.where(tl.max((words != 0).to(tl.int32)) != 0, ROWS, 0)
    for number in range(row_share, num_open_rows, row_shares):
        word = tl.sum(tl.where(tl.arange(0, ROWS) == number, words, 0))
        while word != 0:
            open_tile = tile_at(word, 0) + kv_start
            kind = exact_kind(
                b,
                h,
                q_start + number,
                open_tile,
                Sq,
                Skv,
                bindings,
                MASK,
                TILE_Q,
                TILE_KV,
                BLOCK_Q,
                BLOCK_KV,
                IS_EVEN_Q,
                IS_EVEN_KV,
            )
            tl.store(kinds_pointer + (q_start + number).to(tl.int64) * num_kv + open_tile, kind)
            word = word & (word - 1)
