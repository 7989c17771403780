"""FlexAttention's BlockMask and our BlockMap become each other."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from anymask import Mask, attention, block_map, causal, document, full, sliding_window
from anymask.compat.flex import from_block_mask, to_block_mask

IDS = torch.arange(300) // 90
MASKS = {
    "full": full(),
    "causal": causal(),
    "documents": causal() & document(IDS),
    "window": sliding_window(40, 10),
    "heads": Mask(lambda b, h, q, k: (k <= q) | (h == 1), "heads"),
}


@pytest.mark.parametrize("name", MASKS)
def test_round_trip(name: str) -> None:
    mask = MASKS[name]
    theirs = create_block_mask(mask, None, 2, 260, 300, device="cpu", BLOCK_SIZE=(64, 32))
    ours = block_map(mask, 1, 2, 260, 300, device="cpu", tile=(64, 32))
    read = from_block_mask(theirs)
    kinds = ours.to_dense().expand(1, 2, -1, -1).clone()
    hanging = read.to_dense() != kinds  # they call a ragged full tile partial
    assert bool((kinds[hanging] == 2).all()) and not hanging[..., :-1, :-1].any()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, S, 16) for S in (260, 300, 300))
    expected = attention(q, k, v, mask=mask, backend="reference")
    torch.testing.assert_close(attention(q, k, v, block_map=read), expected)
    written = to_block_mask(ours, mask)
    assert isinstance(written, BlockMask) and written.seq_lengths == (260, 300)
    assert torch.equal(from_block_mask(written).to_dense(), ours.to_dense())
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=written), expected)
