"""What the forward and the backward share: addressing, reading and writing tiles, walking a row of the map, scores.

Conventions of every kernel here. A tensor is a pointer and a stride tuple in shape order (b, h, row, column). Offsets
to b, h and the first row of a tile are 64-bit; offsets inside a tile are 32-bit unless WIDE. A head dim is padded to a
power of two by reading zeros. `bindings` is (captures, ints, floats); MASK and SCORE are functions made by jit.py.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# --- tiles of tensors ---


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """stride, which ALIGN divides: said so that the compiler sees it (by itself it only looks for multiples of 16)."""
    if ALIGN > 1:
        stride = stride // ALIGN * ALIGN
    return stride


@triton.jit
def head_pointer(pointer, strides, b, h, ALIGN: tl.constexpr):
    """Where head h of batch b begins."""
    return pointer + b.to(tl.int64) * aligned(strides[0], ALIGN) + h.to(tl.int64) * aligned(strides[1], ALIGN)


@triton.jit
def tile_offsets(start, strides, BLOCK: tl.constexpr, D_PAD: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """Offset of the first row (64-bit scalar) and of each element from there. ALIGN divides the row stride."""
    # [BLOCK, 1] and [1, D_PAD]
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, D_PAD)[None, :]
    if WIDE:
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    row_stride = aligned(strides[2], ALIGN)
    return start.to(tl.int64) * row_stride, row * row_stride + column * strides[3]


@triton.jit
def tile_inside(start, num_rows, BLOCK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """[BLOCK, D_PAD] which elements exist, or None where all do. CHECK_ROWS: rows from num_rows on do not exist."""
    # [BLOCK, 1] and [1, D_PAD]
    row_inside = start + tl.arange(0, BLOCK)[:, None] < num_rows
    column_inside = tl.arange(0, D_PAD)[None, :] < D
    if CHECK_ROWS and D < D_PAD:
        inside = row_inside & column_inside
    elif CHECK_ROWS:
        inside = row_inside
    elif D < D_PAD:
        inside = column_inside
    else:
        inside = None
    return inside


@triton.jit
def load_tile(
    pointer,
    start,
    num_rows,
    strides,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """[BLOCK, D_PAD] rows start .. start + BLOCK of one head; 0 where there is no element."""
    first, offsets = tile_offsets(start, strides, BLOCK, D_PAD, ALIGN, WIDE)
    inside = tile_inside(start, num_rows, BLOCK, D, D_PAD, CHECK_ROWS)
    if inside is None:
        tile = tl.load(pointer + first + offsets)
    else:
        tile = tl.load(pointer + first + offsets, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(
    pointer,
    tile,
    start,
    num_rows,
    strides,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the elements of [BLOCK, D_PAD] that exist, in the dtype of the tensor."""
    first, offsets = tile_offsets(start, strides, BLOCK, D_PAD, ALIGN, WIDE)
    inside = tile_inside(start, num_rows, BLOCK, D, D_PAD, True)
    tl.store(pointer + first + offsets, tile.to(pointer.dtype.element_ty), mask=inside)


# --- the map: what a program works on, and how it walks its row (blocks/walk.py) ---


@triton.jit
def map_of(map_strides, b, h):
    """Which map head h of batch b has. map_strides: maps from one batch and one head to the next, 0 if shared."""
    return b.to(tl.int64) * map_strides[0] + h.to(tl.int64) * map_strides[1]


# The numbers among the arguments that say what a kernel walks (recipes.walk_arguments): no kernel is compiled for one.
WALK_SIZES = ("num_words", "num_rows", "num_heads", "heads_together", "heads_last")


@triton.jit
def work_of(program, num_rows, num_heads, heads_together, heads_last, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Head, rank of the row and part of the row of a program: TILE // BLOCK parts.

    Heads go in groups of heads_together, but the last heads_last, which leave a multiple of it, in one group; and in a
    group the rows that come first in the walk's order first, for all its heads.
    """
    PARTS: tl.constexpr = TILE // BLOCK
    group = program // (num_rows * PARTS * heads_together)
    heads_before = num_heads - heads_last
    first = tl.minimum(group * heads_together, heads_before)
    heads = tl.where(first < heads_before, heads_together, heads_last)
    rest = program - first * num_rows * PARTS
    place = rest // heads
    return first + rest % heads, place // PARTS, place % PARTS


@triton.jit
def ranked_row(walk, first_row, rank):
    """The row of a map that comes rank-th by its work. first_row: of the map among all."""
    if walk is None:
        return rank
    else:
        return tl.load(walk[1] + (first_row + rank) * 3 + 2)


@triton.jit
def num_tiles_of(walk, row, IS_FULL: tl.constexpr):
    """How many masked, or full, tiles a row has. row: among those of all maps."""
    return tl.load(walk[1] + row * 3 + IS_FULL)


@triton.jit
def open_row(walk, num_words, row, length, TILE: tl.constexpr, IS_FULL: tl.constexpr):
    """The masked, or the full, tiles of a row: where its words begin (pointer), how many tiles, and the state of a walk
    at the first: the bits of a word that are left, the tile of its bit 0, and the word after it.

    walk None: no map, all tiles of TILE positions up to length, of which the one that hangs over it is masked. Then no
    words, no bits, and the number of the first tile.
    """
    if walk is None:
        num_whole = length // TILE
        if IS_FULL:
            return 0, num_whole, 0, 0, 0
        else:
            return 0, tl.cdiv(length, TILE) - num_whole, 0, num_whole, 0
    else:
        words = walk[0] + (row * 2 + IS_FULL) * num_words
        word = tl.load(words)
        ahead = tl.load(words + tl.minimum(1, num_words - 1))
        return words, num_tiles_of(walk, row, IS_FULL), word.to(tl.int32), (word >> 32).to(tl.int32), ahead


@triton.jit
def next_tile(words, num_words, bits, first, place, ahead, step, STEPS: tl.constexpr):
    """The state after step `step` of a walk, whose tiles take STEPS steps each: after the last, drop the lowest bit.

    Past the row's end it is of no meaning. The word after this one is read before it is needed: no step waits for it.
    And without a condition: a predicate on the load made ptxas serialise the products of dQ (C7515 on sm_90).
    """
    if num_words is None:
        return bits, first, place, ahead
    else:
        rest = bits & (bits - 1)
        if STEPS > 1:
            rest = tl.where(step % STEPS == STEPS - 1, rest, bits)
        is_next = rest == 0
        bits = tl.where(is_next, ahead.to(tl.int32), rest)
        first = tl.where(is_next, (ahead >> 32).to(tl.int32), first)
        place += is_next.to(tl.int32)
        return bits, first, place, tl.load(words + tl.minimum(place + 1, num_words - 1))


@triton.jit
def start_of(num_words, bits, first, step, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The first position of step `step` of a walk, whose tiles of TILE positions take TILE // BLOCK steps each."""
    if num_words is None:
        return first * TILE + step * BLOCK
    else:
        return tile_at(bits, first) * TILE + step % (TILE // BLOCK) * BLOCK


@triton.jit
def tile_at(bits, first):
    """Number of the tile that the lowest set bit stands for; first, a multiple of 32: that of bit 0.

    As a float, 2^n has the exponent field n + 127, which is n - 1 modulo 32.
    """
    lowest = (bits & -bits).to(tl.uint32).to(tl.float32).to(tl.int32, bitcast=True)
    return first | (((lowest >> 23) + 1) & 31)


# --- scores ---


@triton.jit
def natural_score(qk, b, h, q_idx, kv_idx, scale, bindings, SCORE: tl.constexpr):
    """SCORE(scale * qk), in the shape of qk."""
    score = SCORE(qk, scale, b, h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2])
    qk, score = tl.broadcast(qk, score)
    return score


@triton.jit
def changed_score(qk, b, h, q_idx, kv_idx, scale, bindings, SCORE: tl.constexpr):
    """SCORE(scale * qk) in base 2, in the shape of qk."""
    return natural_score(qk, b, h, q_idx, kv_idx, scale, bindings, SCORE) * LOG2_E


@triton.jit
def hidden(x, other, index, length, b, h, q_idx, kv_idx, bindings, MASK: tl.constexpr, CHECK: tl.constexpr):
    """x where the mask shows the pair, else other. MASK None: it shows all.

    CHECK: also other where index, which is q_idx or kv_idx, has reached length, so that there is no such pair.
    """
    if MASK is not None:
        x = MASK(x, other, b, h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2])
    if CHECK:
        x = tl.where(index < length, x, other)
    return x


@triton.jit
def log2_probability(qk, lse_log2, b, h, q_idx, kv_idx, scale, bindings, SCORE: tl.constexpr):
    """log2 P = score - lse in base 2, recomputed in the backward."""
    if SCORE is None:
        return qk * (scale * LOG2_E) - lse_log2
    else:
        return changed_score(qk, b, h, q_idx, kv_idx, scale, bindings, SCORE) - lse_log2


@triton.jit
def score_gradient(p, dp, delta, qk, b, h, q_idx, kv_idx, scale, bindings, SCORE_GRAD: tl.constexpr):
    """dS = P * (dP - delta), times d score_out / d score_in, which may be anything where the pair is hidden."""
    ds = p * (dp - delta)
    if SCORE_GRAD is not None:
        ds *= SCORE_GRAD(qk, scale, b, h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2])
    return ds
