"""From the kinds of a block map to the walk of one kernel (blocks/walk.py): one launch packs, one orders the rows."""

import triton
import triton.language as tl

ALL_BUT_MAP = ["num_rows", "num_columns", "map_size", "row_stride", "column_stride", "num_whole", "num_words"]


@triton.jit(do_not_specialize=ALL_BUT_MAP)
def pack_kernel(
    kinds_pointer,  # [maps, ...] int8: map_size apart, a row and a column by row_stride and column_stride
    words_pointer,  # [maps, rows, 2, num_words] int64
    count_pointer,  # [maps, rows, 2] int32
    num_rows,  # of kinds
    num_columns,
    map_size,
    row_stride,
    column_stride,
    num_whole,  # tiles along kv, of the walk, that do not hang over the end of the keys
    num_words,
    ROW_FACTOR: tl.constexpr,  # tiles of kinds in one of the walk, along rows and along columns
    COLUMN_FACTOR: tl.constexpr,
    IS_KV_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a multiple of 32
):
    """Grid: ROWS rows of the walk each. Columns are read COLUMNS at a time, words with a tile written one by one."""
    WORDS: tl.constexpr = COLUMNS // 32
    walk_rows = (num_rows + ROW_FACTOR - 1) // ROW_FACTOR
    walk_columns = (num_columns + COLUMN_FACTOR - 1) // COLUMN_FACTOR
    row_blocks = (walk_rows + ROWS - 1) // ROWS
    map_index = (tl.program_id(0) // row_blocks).to(tl.int64)
    # [ROWS, 1]
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)[:, None]
    kinds = kinds_pointer + map_index * map_size
    # [ROWS, 1]: words written so far, tiles counted so far
    num_masked_words = tl.zeros([ROWS, 1], tl.int32)
    num_full_words = tl.zeros([ROWS, 1], tl.int32)
    num_masked = tl.zeros([ROWS], tl.int32)
    num_full = tl.zeros([ROWS], tl.int32)
    place = ((map_index * walk_rows + row) * 2) * num_words
    for start in range(0, walk_columns, COLUMNS):
        # [1, COLUMNS]
        column = start + tl.arange(0, COLUMNS)[None, :]
        is_visited = tl.zeros([ROWS, COLUMNS], tl.int32)
        is_full = (row < walk_rows) & (column < walk_columns)
        is_full = is_full & ((row if IS_KV_ROW else column) < num_whole)
        for part in tl.static_range(ROW_FACTOR * COLUMN_FACTOR):
            r = row * ROW_FACTOR + part // COLUMN_FACTOR
            c = column * COLUMN_FACTOR + part % COLUMN_FACTOR
            inside = (r < num_rows) & (c < num_columns)
            kind = tl.load(kinds + r.to(tl.int64) * row_stride + c.to(tl.int64) * column_stride, mask=inside, other=0)
            is_visited |= (kind != 0).to(tl.int32)
            is_full = is_full & ((kind == 2) | ~inside)
        full = is_full.to(tl.int32) & is_visited
        masked = is_visited - full
        num_masked_words = pack_words(
            masked, place, num_masked_words, start, row < walk_rows, words_pointer, ROWS, WORDS
        )
        num_full_words = pack_words(
            full, place + num_words, num_full_words, start, row < walk_rows, words_pointer, ROWS, WORDS
        )
        num_masked += tl.sum(masked, 1)
        num_full += tl.sum(full, 1)
    # [ROWS, 2]
    counts = count_pointer + (map_index * walk_rows + row) * 2 + tl.arange(0, 2)[None, :]
    tl.store(counts, tl.join(num_masked, num_full), mask=row < walk_rows)


@triton.jit
def pack_words(tiles, place, num_before, start, is_row, words_pointer, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Write the words of tiles [ROWS, 32 * WORDS] (0 or 1) that are not zero; how many there are now, [ROWS, 1]."""
    # [ROWS, WORDS]
    bits = tl.sum(tiles.reshape(ROWS, WORDS, 32) << tl.arange(0, 32)[None, None, :], 2)
    is_word = ((bits != 0) & is_row).to(tl.int32)
    target = place + num_before + tl.cumsum(is_word, 1) - is_word
    first = (start + 32 * tl.arange(0, WORDS)[None, :]).to(tl.int64)
    tl.store(words_pointer + target, (first << 32) | bits.to(tl.uint32).to(tl.int64), mask=is_word != 0)
    return num_before + tl.sum(is_word, 1)[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def order_kernel(
    count_pointer,  # [maps, num_rows, 2] int32
    order_pointer,  # [maps, num_rows] int32
    num_rows,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """order: the rows by their work, most first, equals by their number. A row's place is how many come before it."""
    row_blocks = (num_rows + ROWS - 1) // ROWS
    first = (tl.program_id(0) // row_blocks).to(tl.int64) * num_rows
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    work = row_work(count_pointer + first * 2, row, num_rows)
    rank = tl.zeros([ROWS], tl.int32)
    for start in range(0, num_rows, OTHERS):
        other = start + tl.arange(0, OTHERS)
        # [ROWS, OTHERS]; past the end: work -1, never before
        others = row_work(count_pointer + first * 2, other, num_rows)[None, :]
        is_before = (others > work[:, None]) | ((others == work[:, None]) & (other[None, :] < row[:, None]))
        rank += tl.sum(is_before.to(tl.int32), 1)
    tl.store(order_pointer + first + rank, row, mask=row < num_rows)


@triton.jit
def row_work(count, row, num_rows):
    """A masked tile takes about 1.3 times as long as a full one (H200, D 128). -1 past the end."""
    inside = row < num_rows
    masked = tl.load(count + row * 2, mask=inside, other=0)
    full = tl.load(count + row * 2 + 1, mask=inside, other=0)
    return tl.where(inside, masked * 4 + full * 3, -1)
