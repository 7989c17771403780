"""The mask zoo: each mask is written once, and every stage (trace, interval, map, emit, eager, Triton) runs over all
rows.

A row makes its mask for given sizes, with captured tensors of those sizes on the device that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import anymask
from anymask import alibi, causal, document, full, mask_from, padding, prefix_lm, sliding_window, softcap


@dataclass(frozen=True)
class Sizes:
    B: int
    H: int
    Sq: int
    Skv: int
    device: str = "cpu"
    seed: int = 0  # other contents of the captured tensors

    @property
    def S(self) -> int:
        """Long enough for any index, for masks that read one vector with both q_idx and kv_idx."""
        return max(self.Sq, self.Skv)

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(seed + 1000 * self.seed)

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator(high), dtype=dtype).to(self.device)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator(7)).to(self.device)


Make = Callable[[Sizes], Any]
MASKS: dict[str, Make] = {}
SCORES: dict[str, Make] = {}


def mask(make: Make) -> Make:
    MASKS[make.__name__] = make
    return make


def score(make: Make) -> Make:
    SCORES[make.__name__] = make
    return make


def packed_ids(z: Sizes, documents: int = 4, dtype: torch.dtype = torch.int32) -> Tensor:
    """Ascending document ids [B, S] of random lengths."""
    return z.randint(0, documents, z.B, z.S, dtype=dtype).sort(dim=-1).values


@mask
def everything(z: Sizes) -> Any:
    return full()


@mask
def nothing(z: Sizes) -> Any:
    return ~full()


@mask
def causal_top_left(z: Sizes) -> Any:
    return causal()


@mask
def causal_bottom_right(z: Sizes) -> Any:
    return causal(offset=z.Skv - z.Sq)


@mask
def anti_causal(z: Sizes) -> Any:
    return ~causal()


@mask
def causal_offset_per_batch(z: Sizes) -> Any:
    return causal(offset=z.randint(-5, 30, z.B))


@mask
def window(z: Sizes) -> Any:
    return sliding_window(19, 6)


@mask
def causal_window(z: Sizes) -> Any:
    return causal() & sliding_window(40, None)


@mask
def dilated_window(z: Sizes) -> Any:
    return anymask.dilated_window(10, 7, 3)


@mask
def strided(z: Sizes) -> Any:
    return anymask.sparse_strided(16)


@mask
def strided_by_distance(z: Sizes) -> Any:
    return lambda b, h, q, k: ((q - k) % 16 == 0) | (abs(q - k) < 10)


@mask
def fixed(z: Sizes) -> Any:
    return anymask.sparse_fixed(16, 3)


@mask
def documents_causal(z: Sizes) -> Any:
    return causal() & document(packed_ids(z, dtype=torch.int64))


@mask
def documents_shared(z: Sizes) -> Any:
    return document(packed_ids(z)[0])


@mask
def documents_unsorted_padded(z: Sizes) -> Any:
    return document(z.randint(-1, 3, z.B, z.S))


@mask
def documents_cu_seqlens(z: Sizes) -> Any:
    bounds = torch.tensor([0, z.S // 5, z.S // 5, z.S // 2, z.S - z.S // 8], device=z.device)
    return document(cu_seqlens=bounds, total=z.S)


@mask
def documents_window(z: Sizes) -> Any:
    return document(packed_ids(z)) & sliding_window(24, 0)


@mask
def documents_sinks(z: Sizes) -> Any:
    return anymask.packed_sink_window(packed_ids(z), 12, 3)


@mask
def documents_prefix(z: Sizes) -> Any:
    return anymask.packed_prefix_lm(packed_ids(z, dtype=torch.int64), z.randint(0, 20, z.B, 4))


@mask
def documents_shared_prefix(z: Sizes) -> Any:
    return anymask.shared_prefix(packed_ids(z, 6) - 1, torch.tensor([0, 0, 0, 3, 3], device=z.device))


@mask
def documents_cross(z: Sizes) -> Any:
    q_ids, kv_ids = (z.randint(-1, 4, z.B, length).sort(dim=-1).values for length in (z.Sq, z.Skv))
    return anymask.cross_document(q_ids, kv_ids)


@mask
def documents_cross_causal(z: Sizes) -> Any:
    bounds = torch.tensor([0, 1, 1, 3, 4], device=z.device)
    q_ids, kv_ids = (anymask.document_ids(bounds * length // 4, length) for length in (z.Sq, z.Skv))
    return anymask.cross_document(q_ids, kv_ids, causal=True)


@mask
def prefix(z: Sizes) -> Any:
    return prefix_lm(z.S // 3)


@mask
def prefix_per_batch(z: Sizes) -> Any:
    return prefix_lm(z.randint(1, max(2, z.Skv), z.B))


@mask
def keys_padded(z: Sizes) -> Any:
    return padding(z.randint(0, z.Skv + 1, z.B))


@mask
def mode_1(z: Sizes) -> Any:
    eq, ek = z.randint(-3, 2, z.B, z.H, z.Sq), z.randint(-3, 2, z.B, z.H, z.Skv)
    return lambda b, h, q, k: (eq[b, h, q] >= 0) | (eq[b, h, q] == ek[b, h, k])


@mask
def window_per_head(z: Sizes) -> Any:
    reach = z.randint(1, 50, z.H)
    return lambda b, h, q, k: (q >= k) & (q - k < reach[h])


@mask
def random_tensor(z: Sizes) -> Any:
    return mask_from(z.rand(z.B, 1, z.Sq, z.Skv) < 0.3)


@mask
def random_tensor_2d(z: Sizes) -> Any:
    return mask_from(z.rand(z.Sq, z.Skv) < 0.5)


@mask
def key_padding_tensor(z: Sizes) -> Any:
    return mask_from(z.rand(z.B, 1, 1, z.Skv) < 0.6)


@mask
def chunked(z: Sizes) -> Any:
    return causal() & anymask.chunked(24)


@mask
def block_diffusion(z: Sizes) -> Any:
    return anymask.block_diffusion(max(z.S // 2, 1), 8)


@mask
def neighbourhood_1d(z: Sizes) -> Any:
    return anymask.neighbourhood(z.S, 9, dilation=3)


@mask
def neighbourhood_2d(z: Sizes) -> Any:
    return anymask.neighbourhood((z.S // 11, 11), (3, 5))


@mask
def neighbourhood_2d_dilated_causal(z: Sizes) -> Any:
    return anymask.neighbourhood((z.S // 9, 9), (2, 3), dilation=(2, 3), causal=(True, False))


@mask
def neighbourhood_3d(z: Sizes) -> Any:
    return anymask.neighbourhood((z.S // 20 + 1, 4, 5), (3, 2, 3), causal=(True, False, False))


@mask
def box_2d(z: Sizes) -> Any:
    width = 12
    return lambda b, h, q, k: (abs(q // width - k // width) <= 2) & (abs(q % width - k % width) <= 2)


@mask
def sliding_tile(z: Sizes) -> Any:
    return anymask.sliding_tile((z.S // 24 + 1, 4, 6), (1, 2, 2), (2, 1, 2))


@mask
def tree(z: Sizes) -> Any:
    return anymask.tree((torch.arange(z.S, device=z.device) - 1) // 3, prefix_len=5)


@mask
def images_in_text(z: Sizes) -> Any:
    ids = packed_ids(z, 9)
    return anymask.bidirectional_spans(torch.where(ids % 2 == 0, -1, ids))


@mask
def flamingo(z: Sizes) -> Any:
    return anymask.flamingo(z.rand(z.B, z.Sq) < 0.1, 7)


@mask
def flashmask_causal(z: Sizes) -> Any:
    bounds = z.randint(0, z.Sq + 1, z.B, 1, z.Skv, 2).sort(dim=-1).values
    return anymask.flashmask(bounds, causal=True, offset=z.Skv - z.Sq)


@mask
def flashmask(z: Sizes) -> Any:
    ids = packed_ids(z)[0, : z.Skv].contiguous()
    start, end = (torch.searchsorted(ids, ids, right=right) for right in (False, True))
    return anymask.flashmask(torch.stack([end, end + 20, 0 * start, start], dim=-1)[None, None])


@mask
def slices(z: Sizes) -> Any:
    q, kv = z.Sq // 8, z.Skv // 8
    q_ranges = torch.tensor([[0, 3 * q], [2 * q, 6 * q], [5 * q, 8 * q], [7 * q, z.Sq]], device=z.device)
    k_ranges = torch.tensor([[0, 3 * kv], [0, 5 * kv], [4 * kv, 8 * kv], [2 * kv, z.Skv]], device=z.device)
    return anymask.slices(q_ranges, k_ranges, torch.tensor([1, 3, 2, 0], device=z.device))


@mask
def bigbird(z: Sizes) -> Any:
    side = z.S // 8 + 1
    return anymask.bigbird(anymask.random_blocks(side, side, 1, heads=z.H, device=z.device), 8)


@mask
def block_table(z: Sizes) -> Any:
    side = z.S // 16 + 1
    chosen = z.rand(z.B, side, side) < 0.4
    return lambda b, h, q, k: chosen[b, q // 16, k // 16]


@mask
def bit_table(z: Sizes) -> Any:
    words = z.randint(0, 2**31 - 1, z.Sq, z.Skv // 32 + 1)
    return lambda b, h, q, k: (words[q, k // 32] >> (k % 32)) & 1 == 1


@mask
def global_tokens(z: Sizes) -> Any:
    return anymask.longformer(20, z.rand(z.S) < 0.05)


@mask
def sinks(z: Sizes) -> Any:
    return anymask.sink_window(17)


@mask
def heads_differ(z: Sizes) -> Any:
    return lambda b, h, q, k: torch.where(h % 2 == 0, q >= k, abs(q - k) <= 8)


@mask
def every_other_head(z: Sizes) -> Any:
    return lambda b, h, q, k: (h % 2 == 0) & (b >= 0) & (q >= k)


@mask
def exclusive_or(z: Sizes) -> Any:
    return causal() ^ document(packed_ids(z))


@mask
def relative_table(z: Sizes) -> Any:
    allowed = z.rand(2 * z.S + 1) < 0.5
    return lambda b, h, q, k: allowed[q - k + allowed.shape[0] // 2]


@mask
def learned_threshold(z: Sizes) -> Any:
    where_q, where_k = z.rand(z.S), z.rand(z.S)
    return lambda b, h, q, k: where_q[q] * 0.5 + torch.sqrt(where_k[k]) > 0.8


@mask
def reads_outside(z: Sizes) -> Any:
    short = z.rand(max(z.S // 2, 1)) < 0.7
    return lambda b, h, q, k: short[q + 3] | short[k - 5]


@score
def capped(z: Sizes) -> Any:
    return softcap(1.5)


@score
def linear_bias(z: Sizes) -> Any:
    return alibi(z.rand(z.H))


@score
def capped_and_biased(z: Sizes) -> Any:
    return softcap(2.0).then(alibi(z.rand(z.B, z.H)))


@score
def relative_bias(z: Sizes) -> Any:
    table = z.rand(z.H, 33)
    return lambda s, b, h, q, k: s * 1.25 + table[h, (q - k).clamp(-16, 16) + 16]


@score
def full_bias(z: Sizes) -> Any:
    bias = z.rand(z.B, z.Sq, z.Skv)
    return lambda s, b, h, q, k: s + bias[b, q, k]


@score
def hides_by_inf(z: Sizes) -> Any:
    return lambda s, b, h, q, k: torch.where((q + k) % 3 == 0, s, -float("inf"))


@score
def polynomial(z: Sizes) -> Any:
    return lambda s, b, h, q, k: 0.5 * s**2 - torch.relu(s) + torch.sigmoid(s) * 3
