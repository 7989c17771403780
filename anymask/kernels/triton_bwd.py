"""Backward: dQ (one program per query tile), then dK and dV (one program per key tile). No atomics.

The first also writes what the second needs of each row, lse in base 2 and delta = rowsum(out * dout) - dlse. P is
recomputed from lse. With S = scale Q K^T, T = SCORE(S), P = softmax(T):
dV = P^T dO,  dP = dO V^T,  dT = P * (dP - delta),  dS = dT * dT/dS,  dQ = scale dS K,  dK = scale dS^T Q.
"""

import triton
import triton.language as tl

from anymask.kernels.tile import (
    LOG2_E,
    WALK_SIZES,
    aligned,
    head_pointer,
    hidden,
    load_tile,
    log2_probability,
    map_of,
    next_tile,
    open_row,
    ranked_row,
    score_gradient,
    start_of,
    store_tile,
    work_of,
)


@triton.jit
def dkdv_steps(
    dk,
    dv,
    k,
    v,
    q_pointer,
    dout_pointer,
    rows_pointer,
    q_strides,
    dout_strides,
    tiles,
    num_words,
    b,
    h,
    kv_idx,
    Sq,
    scale,
    bindings,
    MASK: tl.constexpr,
    SCORE: tl.constexpr,
    SCORE_GRAD: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_EVEN_Q: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The masked, or the full, tiles of a row: dk [BLOCK_KV, D_PAD] and dv [BLOCK_KV, DV_PAD] with their queries added.

    Keys past the end need no test: each fills only its own row, which is not stored.
    """
    STEPS: tl.constexpr = TILE_Q // BLOCK_Q
    words, num_tiles, bits, first, ahead = tiles
    place = 0
    for step in tl.range(0, num_tiles * STEPS):
        q_start = start_of(num_words, bits, first, step, TILE_Q, BLOCK_Q)
        bits, first, place, ahead = next_tile(words, num_words, bits, first, place, ahead, step, STEPS)
        q = load_tile(q_pointer, q_start, Sq, q_strides, BLOCK_Q, D, D_PAD, ALIGN, WIDE, not IS_EVEN_Q)
        # [BLOCK_Q] f32. One load of pairs: in the layout of a row of S^T every thread copies every fourth pair, and 16
        # bytes at a time need a quarter of the instructions of 4
        pairs = tl.load(rows_pointer + q_start * 2 + tl.arange(0, 2 * BLOCK_Q))
        lse_log2, delta = tl.split(pairs.reshape(BLOCK_Q, 2))
        if not IS_EVEN_Q:  # past the end of the queries nothing was written: P = 0 there
            is_row = q_start + tl.arange(0, BLOCK_Q) < Sq
            lse_log2 = tl.where(is_row, lse_log2, float("inf"))
            delta = tl.where(is_row, delta, 0.0)
        # S^T = K Q^T    [BLOCK_KV, BLOCK_Q] f32
        qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dout = load_tile(dout_pointer, q_start, Sq, dout_strides, BLOCK_Q, DV, DV_PAD, ALIGN, WIDE, not IS_EVEN_Q)
        # dP^T = V dO^T    [BLOCK_KV, BLOCK_Q] f32
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        # [1, BLOCK_Q]
        q_idx = q_start + tl.arange(0, BLOCK_Q)[None, :]
        # P^T    [BLOCK_KV, BLOCK_Q] f32
        p = log2_probability(qk, lse_log2[None, :], b, h, q_idx, kv_idx, scale, bindings, SCORE)
        CHECK_Q: tl.constexpr = SCORE is not None and not IS_EVEN_Q
        SHOWS: tl.constexpr = MASK if IS_MASKED else None
        # hidden before exp2, whose results LLVM would pack in pairs, with the conditions as bits
        p = tl.exp2(hidden(p, float("-inf"), q_idx, Sq, b, h, q_idx, kv_idx, bindings, SHOWS, CHECK_Q))
        # dV += P^T dO
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        # dS^T
        ds = score_gradient(p, dp, delta[None, :], qk, b, h, q_idx, kv_idx, scale, bindings, SCORE_GRAD)
        if SCORE_GRAD is not None:
            ds = hidden(ds, 0.0, q_idx, Sq, b, h, q_idx, kv_idx, bindings, SHOWS, CHECK_Q)
        # dK += dS^T Q
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=[*WALK_SIZES, "Hkv", "Sq", "Skv", "padded_Sq"])
def dkdv_kernel(
    q_pointer,  # [B, Hq, Sq, D]
    k_pointer,  # [B, Hkv, Skv, D]
    v_pointer,  # [B, Hkv, Skv, Dv]
    dout_pointer,  # [B, Hq, Sq, Dv]
    dk_pointer,  # [B, Hkv, Skv, D]
    dv_pointer,  # [B, Hkv, Skv, Dv]
    rows_pointer,  # [B, Hq, padded_Sq, 2] f32, contiguous: lse in base 2, delta; from dq_kernel
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    walk,  # (words, rows) of blocks/walk.py; None without a map, and then num_words too
    num_words,
    map_strides,  # see map_of
    num_rows,  # see work_of
    num_heads,
    heads_together,
    heads_last,
    Hkv,
    Sq,
    Skv,
    padded_Sq,
    scale,
    bindings,
    MASK: tl.constexpr,
    SCORE: tl.constexpr,
    SCORE_GRAD: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    IS_EVEN_Q: tl.constexpr,  # no map tile hangs over the end of the queries
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one key tile, summed over the G query heads that read it. Grid: as the forward, over key tiles.

    Where query heads have maps of their own, the first one's order holds for all that share keys.
    """
    head, rank, part = work_of(tl.program_id(0), num_rows, num_heads, heads_together, heads_last, TILE_KV, BLOCK_KV)
    b = head // Hkv
    h_kv = head % Hkv
    row = ranked_row(walk, map_of(map_strides, b, h_kv * G) * num_rows, rank)
    kv_start = row * TILE_KV + part * BLOCK_KV

    # [BLOCK_KV, D_PAD] and [BLOCK_KV, DV_PAD]
    k = load_tile(
        head_pointer(k_pointer, k_strides, b, h_kv, ALIGN),
        kv_start,
        Skv,
        k_strides,
        BLOCK_KV,
        D,
        D_PAD,
        ALIGN,
        WIDE,
        True,
    )
    v = load_tile(
        head_pointer(v_pointer, v_strides, b, h_kv, ALIGN),
        kv_start,
        Skv,
        v_strides,
        BLOCK_KV,
        DV,
        DV_PAD,
        ALIGN,
        WIDE,
        True,
    )
    # [BLOCK_KV, 1]
    kv_idx = kv_start + tl.arange(0, BLOCK_KV)[:, None]

    dk = tl.zeros([BLOCK_KV, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK_KV, DV_PAD], tl.float32)
    for g in range(G):
        h = h_kv * G + g
        map_row = map_of(map_strides, b, h) * num_rows + row
        first_pair = (b * (Hkv * G) + h).to(tl.int64) * aligned(padded_Sq, 16) * 2
        for IS_FULL in tl.static_range(walk is None and IS_EVEN_Q, 2):
            dk, dv = dkdv_steps(
                dk,
                dv,
                k,
                v,
                head_pointer(q_pointer, q_strides, b, h, ALIGN),
                head_pointer(dout_pointer, dout_strides, b, h, ALIGN),
                rows_pointer + first_pair,
                q_strides,
                dout_strides,
                open_row(walk, num_words, map_row, Sq, TILE_Q, IS_FULL),
                num_words,
                b,
                h,
                kv_idx,
                Sq,
                scale,
                bindings,
                MASK,
                SCORE,
                SCORE_GRAD,
                D,
                DV,
                D_PAD,
                DV_PAD,
                BLOCK_Q,
                TILE_Q,
                not IS_FULL,
                IS_EVEN_Q,
                ALIGN,
                WIDE,
                PRECISION,
            )

    store_tile(
        head_pointer(dk_pointer, dk_strides, b, h_kv, ALIGN),
        dk * scale,
        kv_start,
        Skv,
        dk_strides,
        BLOCK_KV,
        D,
        D_PAD,
        ALIGN,
        WIDE,
    )
    store_tile(
        head_pointer(dv_pointer, dv_strides, b, h_kv, ALIGN),
        dv,
        kv_start,
        Skv,
        dv_strides,
        BLOCK_KV,
        DV,
        DV_PAD,
        ALIGN,
        WIDE,
    )


@triton.jit
def dq_steps(
    dq,
    q,
    dout,
    lse_log2,
    delta,
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
    SCORE_GRAD: tl.constexpr,
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
    """The masked, or the full, tiles of a row: dq [BLOCK_Q, D_PAD] plus their keys. lse_log2, delta: [BLOCK_Q, 1]."""
    CHECK_KV: tl.constexpr = IS_MASKED and not IS_EVEN_KV
    STEPS: tl.constexpr = TILE_KV // BLOCK_KV
    words, num_tiles, bits, first, ahead = tiles
    place = 0
    for step in tl.range(0, num_tiles * STEPS):
        kv_start = start_of(num_words, bits, first, step, TILE_KV, BLOCK_KV)
        bits, first, place, ahead = next_tile(words, num_words, bits, first, place, ahead, step, STEPS)
        k = load_tile(k_pointer, kv_start, Skv, k_strides, BLOCK_KV, D, D_PAD, ALIGN, WIDE, CHECK_KV)
        v = load_tile(v_pointer, kv_start, Skv, v_strides, BLOCK_KV, DV, DV_PAD, ALIGN, WIDE, CHECK_KV)
        # S = Q K^T    [BLOCK_Q, BLOCK_KV] f32
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        # dP = dO V^T    [BLOCK_Q, BLOCK_KV] f32
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        # [1, BLOCK_KV]
        kv_idx = kv_start + tl.arange(0, BLOCK_KV)[None, :]
        # P    [BLOCK_Q, BLOCK_KV] f32
        p = log2_probability(qk, lse_log2, b, h, q_idx, kv_idx, scale, bindings, SCORE)
        SHOWS: tl.constexpr = MASK if IS_MASKED else None
        p = tl.exp2(hidden(p, float("-inf"), kv_idx, Skv, b, h, q_idx, kv_idx, bindings, SHOWS, CHECK_KV))
        # dS    [BLOCK_Q, BLOCK_KV] f32
        ds = score_gradient(p, dp, delta, qk, b, h, q_idx, kv_idx, scale, bindings, SCORE_GRAD)
        if SCORE_GRAD is not None:
            ds = hidden(ds, 0.0, kv_idx, Skv, b, h, q_idx, kv_idx, bindings, SHOWS, CHECK_KV)
        # dQ += dS K
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=[*WALK_SIZES, "Hq", "Sq", "Skv", "padded_Sq"])
def dq_kernel(
    q_pointer,  # [B, Hq, Sq, D]
    k_pointer,  # [B, Hkv, Skv, D]
    v_pointer,  # [B, Hkv, Skv, Dv]
    out_pointer,  # [B, Hq, Sq, Dv]
    dout_pointer,  # [B, Hq, Sq, Dv]
    lse_pointer,  # [B, Hq, Sq] f32, contiguous
    dlse_pointer,  # the same, or None
    dq_pointer,  # [B, Hq, Sq, D]
    rows_pointer,  # [B, Hq, padded_Sq, 2] f32, contiguous: lse in base 2 (+inf for a row without keys: P = 0), delta;
    # or None, and then padded_Sq too
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    dout_strides,
    dq_strides,
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
    padded_Sq,
    scale,
    bindings,
    MASK: tl.constexpr,
    SCORE: tl.constexpr,
    SCORE_GRAD: tl.constexpr,
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
    """dq of one query tile, and lse in base 2 and delta of its rows. Grid: as the forward."""
    head, rank, part = work_of(tl.program_id(0), num_rows, num_heads, heads_together, heads_last, TILE_Q, BLOCK_Q)
    b = head // Hq
    h = head % Hq
    first_row = map_of(map_strides, b, h) * num_rows
    row = ranked_row(walk, first_row, rank)
    q_start = row * TILE_Q + part * BLOCK_Q

    # [BLOCK_Q, 1]
    q_idx = q_start + tl.arange(0, BLOCK_Q)[:, None]
    offsets = head.to(tl.int64) * Sq + q_idx
    lse = tl.load(lse_pointer + offsets, mask=q_idx < Sq, other=float("-inf"))
    # before q and dout, for each of which Triton waits as soon as it is read
    tiles = (
        open_row(walk, num_words, first_row + row, Skv, TILE_KV, False),
        open_row(walk, num_words, first_row + row, Skv, TILE_KV, True),
    )
    # [BLOCK_Q, DV_PAD] and [BLOCK_Q, D_PAD]
    out = load_tile(
        head_pointer(out_pointer, out_strides, b, h, ALIGN),
        q_start,
        Sq,
        out_strides,
        BLOCK_Q,
        DV,
        DV_PAD,
        ALIGN,
        WIDE,
        True,
    )
    q = load_tile(
        head_pointer(q_pointer, q_strides, b, h, ALIGN), q_start, Sq, q_strides, BLOCK_Q, D, D_PAD, ALIGN, WIDE, True
    )
    dout = load_tile(
        head_pointer(dout_pointer, dout_strides, b, h, ALIGN),
        q_start,
        Sq,
        dout_strides,
        BLOCK_Q,
        DV,
        DV_PAD,
        ALIGN,
        WIDE,
        True,
    )
    # [BLOCK_Q, 1] f32
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1, keep_dims=True)
    if dlse_pointer is not None:
        delta -= tl.load(dlse_pointer + offsets, mask=q_idx < Sq, other=0.0)
    lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    if rows_pointer is not None:
        # [BLOCK_Q, 2]
        pairs = (head.to(tl.int64) * aligned(padded_Sq, 16) + q_idx) * 2 + tl.arange(0, 2)[None, :]
        tl.store(rows_pointer + pairs, tl.where(tl.arange(0, 2)[None, :] == 0, lse_log2, delta), mask=q_idx < Sq)

    dq = tl.zeros([BLOCK_Q, D_PAD], tl.float32)
    for IS_FULL in tl.static_range(walk is None and IS_EVEN_KV, 2):
        dq = dq_steps(
            dq,
            q,
            dout,
            lse_log2,
            delta,
            head_pointer(k_pointer, k_strides, b, h // G, ALIGN),
            head_pointer(v_pointer, v_strides, b, h // G, ALIGN),
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
            SCORE_GRAD,
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

    store_tile(
        head_pointer(dq_pointer, dq_strides, b, h, ALIGN),
        dq * scale,
        q_start,
        Sq,
        dq_strides,
        BLOCK_Q,
        D,
        D_PAD,
        ALIGN,
        WIDE,
    )
