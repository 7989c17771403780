"""Forward: one program per query tile, online softmax over the key tiles that its row of the map visits."""

import triton
import triton.language as tl

from anymask.kernels.tile import (
    LN_2,
    LOG2_E,
    WALK_SIZES,
    changed_score,
    head_pointer,
    hidden,
    load_tile,
    map_of,
    next_tile,
    open_row,
    ranked_row,
    start_of,
    store_tile,
    work_of,
)


@triton.jit
def softmax_steps(
    acc,
    row_max,
    row_sum,
    q,
    k_pointer,
    v_pointer,
    k_strides,
    v_strides,
    tiles,
    num_words,
    b,
    h,
    q_idx,
    Skv,
    scale,
    bindings,
    MASK: tl.constexpr,
    SCORE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_KV: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_EVEN_KV: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The masked, or the full, tiles of a row: acc [BLOCK_Q, DV_PAD], row_max (base 2) and row_sum plus their keys."""
    CHECK_KV: tl.constexpr = IS_MASKED and not IS_EVEN_KV
    STEPS: tl.constexpr = TILE_KV // BLOCK_KV
    words, num_tiles, bits, first, ahead = tiles
    place = 0
    for step in tl.range(0, num_tiles * STEPS):
        kv_start = start_of(num_words, bits, first, step, TILE_KV, BLOCK_KV)
        bits, first, place, ahead = next_tile(words, num_words, bits, first, place, ahead, step, STEPS)
        k = load_tile(k_pointer, kv_start, Skv, k_strides, BLOCK_KV, D, D_PAD, ALIGN, WIDE, CHECK_KV)
        # S = Q K^T    [BLOCK_Q, BLOCK_KV] f32
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        # [1, BLOCK_KV]
        kv_idx = kv_start + tl.arange(0, BLOCK_KV)[None, :]
        if SCORE is not None:
            s = changed_score(s, b, h, q_idx, kv_idx, scale, bindings, SCORE)
        if IS_MASKED:
            s = hidden(s, float("-inf"), kv_idx, Skv, b, h, q_idx, kv_idx, bindings, MASK, CHECK_KV)
        # [BLOCK_Q] f32, base 2; without a score function the scale (> 0) is applied inside exp2's multiply-add
        factor = scale * LOG2_E if SCORE is None else 1.0
        new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
        if IS_MASKED or SCORE is not None:  # a row may have no key so far: exp2(-inf - 0) = 0
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            safe_max = new_max
        # P = exp2(S - max)    [BLOCK_Q, BLOCK_KV] f32
        p = tl.exp2(s * factor - safe_max[:, None])
        correction = tl.exp2(row_max - safe_max)
        row_sum = row_sum * correction + tl.sum(p, 1)
        row_max = new_max
        acc = acc * correction[:, None]
        v = load_tile(v_pointer, kv_start, Skv, v_strides, BLOCK_KV, DV, DV_PAD, ALIGN, WIDE, CHECK_KV)
        # O += P V    [BLOCK_Q, DV_PAD] f32
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=[*WALK_SIZES, "Hq", "Sq", "Skv"])
def forward_kernel(
    q_pointer,  # [B, Hq, Sq, D]
    k_pointer,  # [B, Hkv, Skv, D]
    v_pointer,  # [B, Hkv, Skv, Dv]
    out_pointer,  # [B, Hq, Sq, Dv]
    lse_pointer,  # [B, Hq, Sq] f32, contiguous
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    walk,  # (words, rows) of blocks/walk.py; None without a map, and then num_words too
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
    MASK: tl.constexpr,
    SCORE: tl.constexpr,  # None: the score is scale * qk, and scale > 0
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    IS_EVEN_KV: tl.constexpr,  # no map tile hangs over the end of the keys
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and lse of one query tile. Grid: a program for each tile of each head, in the order of work_of."""
    head, rank, part = work_of(tl.program_id(0), num_rows, num_heads, heads_together, heads_last, TILE_Q, BLOCK_Q)
    b = head // Hq
    h = head % Hq
    first_row = map_of(map_strides, b, h) * num_rows
    row = ranked_row(walk, first_row, rank)
    q_start = row * TILE_Q + part * BLOCK_Q

    # before q, for which Triton waits as soon as it is read
    tiles = (
        open_row(walk, num_words, first_row + row, Skv, TILE_KV, False),
        open_row(walk, num_words, first_row + row, Skv, TILE_KV, True),
    )
    q = load_tile(
        head_pointer(q_pointer, q_strides, b, h, ALIGN), q_start, Sq, q_strides, BLOCK_Q, D, D_PAD, ALIGN, WIDE, True
    )
    k_pointer = head_pointer(k_pointer, k_strides, b, h // G, ALIGN)
    v_pointer = head_pointer(v_pointer, v_strides, b, h // G, ALIGN)
    # [BLOCK_Q, 1]
    q_idx = q_start + tl.arange(0, BLOCK_Q)[:, None]

    acc = tl.zeros([BLOCK_Q, DV_PAD], tl.float32)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    for IS_FULL in tl.static_range(walk is None and IS_EVEN_KV, 2):
        acc, row_max, row_sum = softmax_steps(
            acc,
            row_max,
            row_sum,
            q,
            k_pointer,
            v_pointer,
            k_strides,
            v_strides,
            tiles[IS_FULL],
            num_words,
            b,
            h,
            q_idx,
            Skv,
            scale,
            bindings,
            MASK,
            SCORE,
            D,
            DV,
            D_PAD,
            DV_PAD,
            BLOCK_KV,
            TILE_KV,
            not IS_FULL,
            IS_EVEN_KV,
            ALIGN,
            WIDE,
            PRECISION,
        )

    has_key = row_sum > 0
    acc = acc / tl.where(has_key, row_sum, 1.0)[:, None]
    lse = tl.where(has_key, (row_max + tl.log2(row_sum)) * LN_2, float("-inf"))
    store_tile(
        head_pointer(out_pointer, out_strides, b, h, ALIGN),
        acc,
        q_start,
        Sq,
        out_strides,
        BLOCK_Q,
        DV,
        DV_PAD,
        ALIGN,
        WIDE,
    )
    rows = q_start + tl.arange(0, BLOCK_Q)
    tl.store(lse_pointer + head.to(tl.int64) * Sq + rows, lse, mask=rows < Sq)
