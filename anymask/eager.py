"""Attention over the tiles of a block map in plain torch: for a CPU, and for any device without Triton.

The walk goes over strips: one row of the map (a Q tile) for the heads that share it, and for each strip over chunks: KV
tiles that are computed at once. A score chunk is [heads, keys, queries], keys before queries: P^T and dS^T then are the
left operand of both dV = P^T dout and dK = dS^T q, which the CPU's matmul takes 1.3x faster than transposed operands
(2 Zen 5 cores, 8 x 128 x 1024 scores, D = 64: 0.81 -> 0.62 ns per score).

Scores are in units of log2: torch.exp2 is 3x faster than torch.exp on the same machine (0.31 -> 0.09 ns per score).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymask.blocks.block_map import PARTIAL, BlockMap
from anymask.expr.bindings import Bindings
from anymask.expr.evaluate import evaluate
from anymask.expr.grad import derivative
from anymask.expr.ir import Expr
from anymask.expr.mods import Mods
from anymask.problem import dense_like

LOG2_E = math.log2(math.e)
CHUNK_SIZE = 1 << 20  # most elements of any tensor of a chunk; only a single KV tile of a single head may exceed it


def forward(
    q: Tensor, k: Tensor, v: Tensor, mods: Mods, bindings: Bindings, blocks: BlockMap, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Sq, Dv] in q's dtype and lse [B, Hq, Sq] float32, natural log.

    q: [B, Hq, Sq, D].  k: [B, Hkv, Skv, D].  v: [B, Hkv, Skv, Dv].  Any strides; float16, bfloat16, float32 or float64.
    Accumulates in float32, or in float64 for float64 inputs. A row that sees no key has out = 0 and lse = -inf.
    """
    out, lse = _forward(q, k, v, mods, bindings, blocks, scale)
    return out, lse.float()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mods: Mods, bindings: Bindings, blocks: BlockMap, scale: float
) -> tuple[Tensor, Tensor]:
    """As forward, with lse in the dtype of the accumulators."""
    call = _Call(q, mods, bindings, scale)
    B, Hq, Sq, _ = q.shape
    Dv = v.shape[3]
    out = dense_like(q, Dv)
    lse = q.new_empty(B, Hq, Sq, dtype=call.dtype)
    for strip in _strips(blocks, q, v):
        # [heads, queries, D]
        q_tile = call.load_q(strip)
        # [heads, 1, queries] f32: the largest score so far, finite also where there is none
        row_max = q_tile.new_full((q_tile.shape[0], 1, q_tile.shape[1]), torch.finfo(call.dtype).min)
        # [heads, 1, queries] f32, [heads, queries, Dv] f32
        row_sum = torch.zeros_like(row_max)
        acc = q_tile.new_zeros(*q_tile.shape[:2], Dv)
        for chunk in strip.chunks:
            # [heads, keys, queries] f32
            p, _ = call.scores(q_tile, _gather(k, strip, chunk, call.dtype), strip, chunk)
            call.hide(p, strip, chunk, -math.inf)
            new_max = torch.maximum(row_max, p.amax(1, keepdim=True))
            # P^T = 2^(S^T - max)
            p.sub_(new_max).exp2_()
            alpha = row_max.sub_(new_max).exp2_()
            row_sum.mul_(alpha).add_(p.sum(1, keepdim=True))
            # acc = alpha * acc + P V
            acc.mul_(alpha.mT).baddbmm_(p.mT, _gather(v, strip, chunk, call.dtype))
            row_max = new_max
        # a row that saw a key has row_sum >= 1, from its largest score
        lse[strip.queries] = ((row_max + row_sum.log2()) / LOG2_E).view(strip.shape)
        acc.div_(row_sum.clamp_(min=1.0).mT)
        out[strip.queries] = acc.view(*strip.shape, Dv)
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mods: Mods,
    bindings: Bindings,
    blocks: BlockMap,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v: the gradients of a loss with gradients dout to out and dlse to lse.

    dout: [B, Hq, Sq, Dv], any strides.  dlse: [B, Hq, Sq] float32 or None.  q, k, v, out, lse: as in forward.
    A row that sees no key gives no gradient. Deterministic.
    """
    call = _Call(q, mods, bindings, scale)
    slope = derivative(mods.score) if mods.has_score else None
    if call.dtype is torch.float64:  # float32 lse would limit P to 7 digits
        _, lse = _forward(q, k, v, mods, bindings, blocks, scale)
    dq = dense_like(q, q.shape[3])
    dk, dv = (dense_like(x, x.shape[3], call.dtype).zero_() for x in (k, v))
    for strip in _strips(blocks, q, v):
        # [heads, queries, D], [heads, queries, Dv] x 2
        q_tile = call.load_q(strip)
        dout_tile = strip.fold(dout[strip.queries].to(call.dtype))
        out_tile = strip.fold(out[strip.queries].to(call.dtype))
        # delta = sum_d dout * out - dlse: [heads, 1, queries] f32
        delta = (dout_tile * out_tile).sum(-1)[:, None]
        if dlse is not None:
            delta -= dlse[strip.queries].reshape(delta.shape)
        # [heads, 1, queries] f32: +inf instead of -inf, so that P = 0 in a row that saw no key
        lse_log2 = lse[strip.queries].reshape(delta.shape) * LOG2_E
        lse_log2.masked_fill_(lse_log2 == -math.inf, math.inf)
        dq_tile = torch.zeros_like(q_tile)
        for chunk in strip.chunks:
            k_chunk = _gather(k, strip, chunk, call.dtype)
            # [heads, keys, queries] f32
            p, slope_value = call.scores(q_tile, k_chunk, strip, chunk, slope)
            # P^T = 2^(S^T - lse)
            p.sub_(lse_log2).exp2_()
            call.hide(p, strip, chunk, 0.0)
            # dV += P^T dout
            _scatter_add(dv, strip, chunk, torch.bmm(p, dout_tile))
            # dS^T = P^T * (V dout^T - delta)
            ds = call.buffer(2, p.shape)
            torch.baddbmm(delta, _gather(v, strip, chunk, call.dtype), dout_tile.mT, beta=-1, out=ds).mul_(p)
            if slope_value is not None:
                strip.unfold(ds).mul_(slope_value)
            call.hide(ds, strip, chunk, 0.0)
            # dK += dS^T q
            _scatter_add(dk, strip, chunk, torch.bmm(ds, q_tile))
            # dQ += dS k
            dq_tile.baddbmm_(ds.mT, k_chunk)
        dq[strip.queries] = dq_tile.mul_(scale).view(*strip.shape, -1)
    return dq, dk.mul_(1.0 / call.unit).to(k.dtype), dv.to(v.dtype)


@dataclass
class _Chunk:
    """KV tiles that are computed at once.

    runs: ranges of keys, in the order of the chunk's columns.  masked: ranges of columns whose tiles need the mask.
    kv_idx: [keys] int32.  visible: _Call.visible_bits of the masked columns, and for which batches and heads.
    """

    runs: list[tuple[int, int]]
    masked: list[tuple[int, int]]
    kv_idx: Tensor
    visible: tuple[tuple[int, int], Tensor] | None = None


@dataclass(frozen=True)
class _Strip:
    """One row of the map, for batches b, query heads h and their key/value heads h_kv, with its keys in chunks."""

    b: range
    h: range
    h_kv: range
    rows: range
    chunks: list[_Chunk]

    @property
    def queries(self) -> tuple[slice, slice, slice]:
        """Where the strip lies in a [B, Hq, Sq, ...] tensor."""
        return _slice(self.b), _slice(self.h), _slice(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.b), len(self.h), len(self.rows)

    def fold(self, x: Tensor) -> Tensor:
        """[b, h, rows, d] -> [heads, queries, d]: heads = b * h_kv, queries = G * rows."""
        return x.reshape(len(self.b) * len(self.h_kv), -1, x.shape[-1])

    def unfold(self, s: Tensor) -> Tensor:
        """[heads, keys, queries] -> [b, h_kv, keys, G, rows]."""
        G = len(self.h) // len(self.h_kv)
        return s.view(len(self.b), len(self.h_kv), s.shape[1], G, len(self.rows))


class _Call:
    """What every chunk of one call needs: the two expressions, dtype, scale and score buffers."""

    def __init__(self, q: Tensor, mods: Mods, bindings: Bindings, scale: float) -> None:
        self.q, self.mods, self.bindings = q, mods, bindings
        self.dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        self.bits_dtype = torch.int64 if self.dtype is torch.float64 else torch.int32
        self.unit = 1.0 if mods.has_score else LOG2_E  # a score function reads natural scores
        self.q_factor = scale * self.unit
        self.mask_reads = mods.mask.indices()
        self.buffers: dict[int, Tensor] = {}

    def buffer(self, slot: int, shape: torch.Size) -> Tensor:
        """An uninitialised tensor that is valid until the slot is used again."""
        size = math.prod(shape)
        held = self.buffers.get(slot)
        if held is None or held.numel() < size:
            held = self.q.new_empty(max(size, CHUNK_SIZE), dtype=self.dtype)
            self.buffers[slot] = held
        return held[:size].view(shape)

    def load_q(self, strip: _Strip) -> Tensor:
        """q * scale in the unit of the product: [heads, queries, D]."""
        return strip.fold(self.q[strip.queries].to(self.dtype) * self.q_factor)

    def indices(self, strip: _Strip, kv_idx: Tensor) -> dict[str, Any]:
        """Index tensors that broadcast to [b, h_kv, keys, G, rows]."""
        device = self.q.device
        h = torch.arange(strip.h.start, strip.h.stop, dtype=torch.int32, device=device)
        return {
            "b": torch.arange(strip.b.start, strip.b.stop, dtype=torch.int32, device=device).view(-1, 1, 1, 1, 1),
            "h": h.view(len(strip.h_kv), 1, -1, 1),
            "q_idx": torch.arange(strip.rows.start, strip.rows.stop, dtype=torch.int32, device=device),
            "kv_idx": kv_idx.view(-1, 1, 1),
        }

    def scores(
        self, q_tile: Tensor, k_chunk: Tensor, strip: _Strip, chunk: _Chunk, slope: Expr | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """S^T [heads, keys, queries] in log2 units, and the value of slope = d score_out / d score_in."""
        shape = torch.Size((q_tile.shape[0], k_chunk.shape[1], q_tile.shape[1]))
        # S^T = k q^T
        s = torch.bmm(k_chunk, q_tile.mT, out=self.buffer(0, shape))
        slope_value = None
        if self.mods.has_score:
            indices = self.indices(strip, chunk.kv_idx)
            raw, s = strip.unfold(s), self.buffer(1, shape)
            if slope is not None:
                slope_value = evaluate(slope, self.bindings, score=raw, **indices)
            torch.mul(
                evaluate(self.mods.score, self.bindings, score=raw, **indices).expand_as(raw),
                LOG2_E,
                out=strip.unfold(s),
            )
        return s, slope_value

    def hide(self, s: Tensor, strip: _Strip, chunk: _Chunk, value: float) -> None:
        """Put value, 0 or -inf, into s [heads, keys, queries] where the mask hides an element, also over a nan.

        On the bits, because masked_fill_ and where branch per element: 0.04 ns against 0.3 (causal) to 7 ns (random).
        """
        if not chunk.masked or not self.mods.has_mask:
            return
        key = (strip.b.start, strip.h.start if "h" in self.mask_reads else -1)
        if chunk.visible is None or chunk.visible[0] != key:
            chunk.visible = (key, self.visible_bits(strip, chunk))
        visible, begin = chunk.visible[1], 0
        for start, stop in chunk.masked:
            end = begin + stop - start
            part = visible[..., begin:end, :, :]
            bits = strip.unfold(s)[:, :, start:stop].view(part.dtype)
            bits.bitwise_and_(part)
            if value != 0:
                bits.bitwise_or_(part.bitwise_not() & self.value_bits(value))
            begin = end

    def value_bits(self, value: float) -> int:
        return int(torch.tensor(value, dtype=self.dtype).view(self.bits_dtype))

    def visible_bits(self, strip: _Strip, chunk: _Chunk) -> Tensor:
        """[b|1, h_kv|1, masked columns, G|1, rows|1] integers as wide as a score: all bits 1 where visible, else 0."""
        kv_idx = torch.cat([chunk.kv_idx[start:stop] for start, stop in chunk.masked])
        indices = self.indices(strip, kv_idx)
        is_visible = evaluate(self.mods.mask, self.bindings, **indices)
        # torch.broadcast_shapes would import sympy: 2 s at the first call
        is_visible, _ = torch.broadcast_tensors(is_visible, indices["kv_idx"])
        return is_visible.to(self.bits_dtype).neg_()


def _strips(blocks: BlockMap, q: Tensor, v: Tensor) -> Iterator[_Strip]:
    """All strips of a call. Heads that share a map walk it together, as many as CHUNK_SIZE allows."""
    B, Hq, _, D = q.shape
    G, width = Hq // v.shape[1], max(D, v.shape[3])
    tile_q, tile_kv = blocks.tile
    device = blocks.kinds.device
    kinds = blocks.kinds.cpu()
    B_map, H_map, num_rows, _ = kinds.shape
    for b_map in range(B_map):
        batches = range(B) if B_map == 1 else range(b_map, b_map + 1)
        for h_map in range(H_map):
            h = range(Hq) if H_map == 1 else range(h_map, h_map + 1)
            G_map = G if H_map == 1 else 1
            for q_block in range(num_rows):
                rows = range(q_block * tile_q, min((q_block + 1) * tile_q, blocks.Sq))
                size_per_key = max(G_map * len(rows), width)
                row = kinds[b_map, h_map, q_block]
                tiles = row.nonzero()[:, 0]
                per_chunk = max(1, CHUNK_SIZE // (size_per_key * tile_kv))
                tagged = list(zip(tiles.tolist(), (row[tiles] == PARTIAL).tolist(), strict=True))
                chunks = [
                    _chunk(tagged[i : i + per_chunk], tile_kv, blocks.Skv, device)
                    for i in range(0, len(tagged), per_chunk)
                ]
                keys = max((len(chunk.kv_idx) for chunk in chunks), default=0)
                num_heads = max(1, CHUNK_SIZE // (size_per_key * max(keys, width)))
                for b, h_part in _split(batches, h, G_map, num_heads):
                    yield _Strip(b, h_part, range(h_part.start // G, (h_part.stop - 1) // G + 1), rows, chunks)


def _chunk(tiles: list[tuple[int, bool]], tile_kv: int, Skv: int, device: torch.device) -> _Chunk:
    """The chunk of ascending (tile, needs the mask)."""
    runs: list[tuple[int, int]] = []
    masked: list[tuple[int, int]] = []
    column = 0
    for tile, is_masked in tiles:
        start, stop = tile * tile_kv, min((tile + 1) * tile_kv, Skv)
        _append(runs, start, stop)
        if is_masked:
            _append(masked, column, column + stop - start)
        column += stop - start
    parts = [torch.arange(start, stop, dtype=torch.int32, device=device) for start, stop in runs]
    return _Chunk(runs, masked, parts[0] if len(parts) == 1 else torch.cat(parts))


def _append(spans: list[tuple[int, int]], start: int, stop: int) -> None:
    """Add [start, stop) to ascending spans; join it with the last one if they touch."""
    if spans and spans[-1][1] == start:
        spans[-1] = (spans[-1][0], stop)
    else:
        spans.append((start, stop))


def _split(b: range, h: range, G: int, num_heads: int) -> Iterator[tuple[range, range]]:
    """Cut b x h into parts of at most num_heads key/value heads: whole batches, or some heads of one batch."""
    heads_per_batch = len(h) // G
    b_step = max(1, num_heads // heads_per_batch)
    h_step = G * min(num_heads, heads_per_batch)
    for b_start in range(b.start, b.stop, b_step):
        for h_start in range(h.start, h.stop, h_step):
            yield range(b_start, min(b_start + b_step, b.stop)), range(h_start, min(h_start + h_step, h.stop))


def _gather(x: Tensor, strip: _Strip, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
    """The chunk's rows of x [B, Hkv, Skv, d] as [heads, keys, d]: a view where runs, strides and dtype allow it."""
    parts = [x[_slice(strip.b), _slice(strip.h_kv), start:stop] for start, stop in chunk.runs]
    part = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return part.to(dtype).reshape(-1, *part.shape[2:])


def _scatter_add(x: Tensor, strip: _Strip, chunk: _Chunk, value: Tensor) -> None:
    """x [B, Hkv, Skv, d] += value [heads, keys, d] at the chunk's rows."""
    value = value.view(len(strip.b), len(strip.h_kv), *value.shape[1:])
    begin = 0
    for start, stop in chunk.runs:
        end = begin + stop - start
        x[_slice(strip.b), _slice(strip.h_kv), start:stop].add_(value[:, :, begin:end])
        begin = end


def _slice(positions: range) -> slice:
    return slice(positions.start, positions.stop)
