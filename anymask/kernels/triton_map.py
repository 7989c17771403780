"""Exact kinds of the map tiles that interval arithmetic left open."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["Hm", "num_q", "num_kv", "Sq", "Skv"])
def classify_kernel(
    kinds_pointer,  # [Bm, Hm, num_q, num_kv] int8, contiguous
    Hm,
    num_q,
    num_kv,
    Sq,
    Skv,
    bindings,
    MASK: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """Where the kind is 3 (undecided), evaluate the mask on the tile: 0 hides all, 2 shows all, else 1."""
    tile = tl.program_id(0).to(tl.int64)
    kind = tl.load(kinds_pointer + tile)
    if kind == 3:
        kv_tile = (tile % num_kv).to(tl.int32)
        q_tile = (tile // num_kv % num_q).to(tl.int32)
        head = tile // num_kv // num_q
        b = (head // Hm).to(tl.int32)
        h = (head % Hm).to(tl.int32)
        shows = 0
        hides = 0
        STEPS_KV: tl.constexpr = (TILE_KV + BLOCK_KV - 1) // BLOCK_KV
        for step in range((TILE_Q + BLOCK_Q - 1) // BLOCK_Q * STEPS_KV):
            # place in the tile: [BLOCK_Q, 1] and [1, BLOCK_KV]
            row = step // STEPS_KV * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
            column = step % STEPS_KV * BLOCK_KV + tl.arange(0, BLOCK_KV)[None, :]
            q_idx = q_tile * TILE_Q + row
            kv_idx = kv_tile * TILE_KV + column
            inside = (row < TILE_Q) & (column < TILE_KV) & (q_idx < Sq) & (kv_idx < Skv)
            keep = MASK(b, h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2])
            shows = tl.maximum(shows, tl.max((inside & keep).to(tl.int32)))
            hides = tl.maximum(hides, tl.max((inside & ~keep).to(tl.int32)))
        tl.store(kinds_pointer + tile, (shows * (2 - hides)).to(tl.int8))
