"""From the kinds of a block map to the walks of its kernels (blocks/walk.py): one launch packs, one orders rows."""

import triton
import triton.language as tl

NUMBERS = ["num_maps", "num_q", "num_kv", "tile_kv", "Skv", "q0", "kv0", "turn0", "q1", "kv1", "turn1"]
NUMBERS += ["q2", "kv2", "turn2"]


@triton.jit(do_not_specialize=NUMBERS)
def walk_kernel(
    kinds,  # [maps, num_q, num_kv] int8, contiguous
    num_maps,
    num_q,
    num_kv,
    tile_kv,
    Skv,
    words0,  # of each walk: [maps, rows, 2, num_words] int64
    rows0,  # [maps, rows, 3] int32
    q0,  # tiles of the map along q and along kv in one of the walk
    kv0,
    turn0,  # 1: rows are KV tiles
    words1,
    rows1,
    q1,
    kv1,
    turn1,
    words2,
    rows2,
    q2,
    kv2,
    turn2,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a multiple of 32
):
    """Words and counts. Grid: for each of three walks, for each map, a program for ROWS rows.

    One body for all walks, with tile sizes as arguments: it compiles once.
    """
    program = tl.program_id(0)
    programs0 = num_maps * tl.cdiv(walk_sizes(num_q, num_kv, q0, kv0, turn0)[0], ROWS)
    programs1 = num_maps * tl.cdiv(walk_sizes(num_q, num_kv, q1, kv1, turn1)[0], ROWS)
    number = (program >= programs0).to(tl.int32) + (program >= programs0 + programs1).to(tl.int32)
    program -= tl.where(number > 0, programs0, 0) + tl.where(number > 1, programs1, 0)
    q_tiles = tl.where(number == 0, q0, tl.where(number == 1, q1, q2))
    kv_tiles = tl.where(number == 0, kv0, tl.where(number == 1, kv1, kv2))
    turn = tl.where(number == 0, turn0, tl.where(number == 1, turn1, turn2))
    words = tl.where(number == 0, words0, tl.where(number == 1, words1, words2))
    rows = tl.where(number == 0, rows0, tl.where(number == 1, rows1, rows2))

    num_rows, num_columns = walk_sizes(num_q, num_kv, q_tiles, kv_tiles, turn)
    row_blocks = tl.cdiv(num_rows, ROWS)
    map_index = (program // row_blocks).to(tl.int64)
    pack_rows(
        kinds + map_index * num_q * num_kv,
        words + map_index * num_rows * 2 * tl.cdiv(num_columns, 32),
        rows + map_index * num_rows * 3,
        program % row_blocks * ROWS,
        num_rows,
        num_columns,
        num_q,
        num_kv,
        Skv // (tile_kv * kv_tiles),
        q_tiles,
        kv_tiles,
        turn,
        ROWS,
        COLUMNS,
    )


@triton.jit
def walk_sizes(num_q, num_kv, q_tiles, kv_tiles, turn):
    """Rows and columns of a walk."""
    lines = tl.cdiv(num_q, q_tiles)
    columns = tl.cdiv(num_kv, kv_tiles)
    return tl.where(turn != 0, columns, lines), tl.where(turn != 0, lines, columns)


@triton.jit
def pack_rows(
    kinds,  # of one map
    words,
    rows,
    first_row,
    num_rows,
    num_columns,
    num_q,
    num_kv,
    num_whole,  # tiles along kv, of the walk, that do not hang over the end of the keys
    q_tiles,
    kv_tiles,
    turn,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Words and counts of ROWS rows. Columns are read COLUMNS at a time, words with a tile written one by one."""
    WORDS: tl.constexpr = COLUMNS // 32
    num_words = tl.cdiv(num_columns, 32)
    # [ROWS, 1]
    row = first_row + tl.arange(0, ROWS)[:, None]
    place = row.to(tl.int64) * 2 * num_words
    # [ROWS, 1] words written so far and [ROWS] tiles counted so far
    masked_words = tl.zeros([ROWS, 1], tl.int32)
    full_words = tl.zeros([ROWS, 1], tl.int32)
    num_masked = tl.zeros([ROWS], tl.int32)
    num_full = tl.zeros([ROWS], tl.int32)
    for start in range(0, num_columns, COLUMNS):
        # [1, COLUMNS]
        column = start + tl.arange(0, COLUMNS)[None, :]
        # [ROWS, COLUMNS]
        q_tile = tl.where(turn != 0, column, row)
        kv_tile = tl.where(turn != 0, row, column)
        is_visited = tl.zeros([ROWS, COLUMNS], tl.int32)
        full = ((row < num_rows) & (column < num_columns) & (kv_tile < num_whole)).to(tl.int32)
        for part in range(q_tiles * kv_tiles):
            q = q_tile * q_tiles + part // kv_tiles
            kv = kv_tile * kv_tiles + part % kv_tiles
            inside = (q < num_q) & (kv < num_kv)
            kind = tl.load(kinds + q.to(tl.int64) * num_kv + kv, mask=inside, other=0)
            is_visited |= (kind != 0).to(tl.int32)
            full &= ((kind == 2) | ~inside).to(tl.int32)
        full &= is_visited
        masked = is_visited - full
        masked_words = pack_words(masked, words + place, masked_words, start, row < num_rows, ROWS, WORDS)
        full_words = pack_words(full, words + place + num_words, full_words, start, row < num_rows, ROWS, WORDS)
        num_masked += tl.sum(masked, 1)
        num_full += tl.sum(full, 1)
    # [ROWS, 2]
    tl.store(rows + row * 3 + tl.arange(0, 2)[None, :], tl.join(num_masked, num_full), mask=row < num_rows)


@triton.jit
def pack_words(tiles, words, num_before, start, is_row, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Write the words of tiles [ROWS, 32 * WORDS] (0 or 1) that are not zero; how many there are now, [ROWS, 1]."""
    # [ROWS, WORDS]
    bits = tl.sum(tiles.reshape(ROWS, WORDS, 32) << tl.arange(0, 32)[None, None, :], 2)
    is_word = ((bits != 0) & is_row).to(tl.int32)
    place = num_before + tl.cumsum(is_word, 1) - is_word
    first = (start + 32 * tl.arange(0, WORDS)[None, :]).to(tl.int64)
    tl.store(words + place, (first << 32) | bits.to(tl.uint32).to(tl.int64), mask=is_word != 0)
    return num_before + tl.sum(is_word, 1)[:, None]


@triton.jit(do_not_specialize=["num_maps", "num_rows0", "num_rows1", "num_rows2"])
def order_kernel(
    rows0,  # of each walk: [maps, num_rows, 3] int32; the first two columns are read, the third is written
    rows1,
    rows2,
    num_maps,
    num_rows0,
    num_rows1,
    num_rows2,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """The order of the rows: by work, most first, equals by number. A row's place is how many rows come before it.

    Grid: for each of three walks, for each map, a program for ROWS rows, which it compares with OTHERS at a time.
    """
    program = tl.program_id(0)
    programs0 = num_maps * tl.cdiv(num_rows0, ROWS)
    programs1 = num_maps * tl.cdiv(num_rows1, ROWS)
    number = (program >= programs0).to(tl.int32) + (program >= programs0 + programs1).to(tl.int32)
    program -= tl.where(number > 0, programs0, 0) + tl.where(number > 1, programs1, 0)
    num_rows = tl.where(number == 0, num_rows0, tl.where(number == 1, num_rows1, num_rows2))
    rows = tl.where(number == 0, rows0, tl.where(number == 1, rows1, rows2))
    row_blocks = tl.cdiv(num_rows, ROWS)
    rows += (program // row_blocks).to(tl.int64) * num_rows * 3
    row = program % row_blocks * ROWS + tl.arange(0, ROWS)
    work = row_work(rows, row, num_rows)
    rank = tl.zeros([ROWS], tl.int32)
    for start in range(0, num_rows, OTHERS):
        # [1, OTHERS]; past the end: work -1, never before
        other = (start + tl.arange(0, OTHERS))[None, :]
        others = row_work(rows, other, num_rows)
        is_before = (others > work[:, None]) | ((others == work[:, None]) & (other < row[:, None]))
        rank += tl.sum(is_before.to(tl.int32), 1)
    tl.store(rows + rank * 3 + 2, row, mask=row < num_rows)


@triton.jit
def row_work(rows, row, num_rows):
    """A masked tile takes about 1.3 times as long as a full one (H200, D 128). -1 past the end."""
    inside = row < num_rows
    masked = tl.load(rows + row * 3, mask=inside, other=0)
    full = tl.load(rows + row * 3 + 1, mask=inside, other=0)
    return tl.where(inside, masked * 4 + full * 3, -1)
