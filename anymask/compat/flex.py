"""FlexAttention's BlockMask <-> BlockMap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anymask.blocks import cache
from anymask.blocks.block_map import EMPTY, FULL, PARTIAL, BlockMap
from anymask.masks import MaskFunction, from_function

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def from_block_mask(block_mask: BlockMask) -> BlockMap:
    """The map of a BlockMask, with its mask_mod: attention(q, k, v, block_map=from_block_mask(block_mask)).

    What it calls full is taken as such, what it calls partial stays partial, as FlexAttention does. Raises MaskError
    where mask_mod is not in the mask language.
    """
    kinds = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, PARTIAL)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        kinds = torch.maximum(kinds, _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, FULL))
    Sq, Skv = block_mask.seq_lengths
    tile_q, tile_kv = block_mask.BLOCK_SIZE
    # kv_indices may have more columns than there are tiles
    kinds = kinds[:, :, : -(-Sq // tile_q), : -(-Skv // tile_kv)].contiguous()
    program = from_function(block_mask.mask_mod).trace(kinds.device)
    bindings = program.mask_bindings
    return BlockMap(kinds, Sq, Skv, (tile_q, tile_kv), program.mask, bindings, cache.identities(bindings.captures))


def to_block_mask(block_map: BlockMap, mask: MaskFunction) -> BlockMask:
    """The BlockMask of a map. mask: the one that the map was built for, as FlexAttention's mask_mod (a Mask is one)."""
    from torch.nn.attention.flex_attention import BlockMask

    lists = [_lists(block_map.kinds == kind) for kind in (PARTIAL, FULL)]
    return BlockMask.from_kv_blocks(
        *lists[0], *lists[1], BLOCK_SIZE=block_map.tile, mask_mod=mask, seq_lengths=(block_map.Sq, block_map.Skv)
    )


def _listed(counts: Tensor, indices: Tensor, kind: int) -> Tensor:
    """int8 [B, H, nQ, columns of indices]: kind where a row lists the tile, else EMPTY."""
    is_listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    kinds = torch.full((*indices.shape[:-1], indices.shape[-1] + 1), EMPTY, dtype=torch.int8, device=indices.device)
    kinds.scatter_(-1, torch.where(is_listed, indices, indices.shape[-1]).long(), kind)
    return kinds[..., :-1]


def _lists(is_listed: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [B, H, nQ] and indices [B, H, nQ, nKV] int32, those that are listed first, ascending."""
    order = torch.sort(is_listed.to(torch.int8), dim=-1, descending=True, stable=True).indices
    return is_listed.sum(-1, dtype=torch.int32), order.to(torch.int32)
