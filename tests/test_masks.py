"""Masks as values: what each one shows, written out as a dense tensor; composition, shift, repr."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anymask import (
    MaskError,
    alibi,
    attention,
    causal,
    document,
    from_function,
    full,
    mask_from,
    padding,
    prefix_lm,
    sliding_window,
    softcap,
)

Q, K = torch.arange(7)[:, None], torch.arange(9)[None, :]
IDS = torch.tensor([[0, 0, 2, 2, 1, 1, -1, -1, 0], [5, 5, 5, 5, 5, 5, 5, 5, 5]])


def dense(mask: Any, B: int = 1) -> torch.Tensor:
    return mask.to_dense(B, 1, 7, 9)[:, 0]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (full(), Q + K >= 0),
        (causal(), K <= Q),
        (causal(offset=2), K <= Q + 2),
        (sliding_window(2, 1), (K >= Q - 2) & (K <= Q + 1)),
        (sliding_window(None, 0), K <= Q),
        (sliding_window(3, None), K >= Q - 3),
        (sliding_window(None, None), Q + K >= 0),
        (prefix_lm(3), (K < 3) | (K <= Q)),
        (document(IDS[0]), (IDS[0, :7, None] == IDS[0]) & (IDS[0] >= 0)),
        (
            document(cu_seqlens=torch.tensor([0, 2, 2, 6, 9])),
            (K < 2) & (Q < 2) | (K >= 2) & (K < 6) & (Q >= 2) & (Q < 6) | (K >= 6) & (Q >= 6),
        ),
        (
            document(cu_seqlens=torch.tensor([0, 4, 6]), total=9),
            (K < 4) & (Q < 4) | (K >= 4) & (K < 6) & (Q >= 4) & (Q < 6),
        ),
        (mask_from((Q + K) % 3 == 0), (Q + K) % 3 == 0),
        (mask_from(K[0] > 4), (K > 4) & (Q >= 0)),
        (mask_from(Q > 4), (Q > 4) & (K >= 0)),
        (~causal(), K > Q),
        (causal() & ~sliding_window(2, 0), K < Q - 2),
        (causal() | sliding_window(0, 1), K <= Q + 1),
        (causal() ^ full(), K > Q),
        (causal().shift(q=2), K <= Q + 2),
        (causal().shift(kv=2), K + 2 <= Q),
        ((causal() & document(IDS[0])).shift(q=1), (K <= Q + 1) & (IDS[0, 1:8, None] == IDS[0]) & (IDS[0] >= 0)),
        (from_function(lambda b, h, q, k: q == k), Q == K),
    ],
    ids=str,
)
def test_what_a_mask_shows(mask: Any, expected: torch.Tensor) -> None:
    assert torch.equal(dense(mask)[0], expected)


def test_numbers_per_batch() -> None:
    per_batch = torch.tensor([1, 4])
    for mask, expected in (
        (causal(offset=per_batch), lambda n: Q + n >= K),
        (prefix_lm(per_batch), lambda n: (n > K) | (K <= Q)),
        (padding(per_batch), lambda n: (n > K) & (Q >= 0)),
        (causal().shift(q=per_batch), lambda n: Q + n >= K),
        (causal().shift(kv=per_batch), lambda n: K + n <= Q),
    ):
        assert torch.equal(dense(mask, B=2), torch.stack([expected(n) for n in (1, 4)])), mask
    both = document(IDS).to_dense(2, 1, 7, 9)[:, 0]
    assert torch.equal(both[0], dense(document(IDS[0]))[0]) and bool(both[1].all())


def test_bottom_right_is_causal_for_the_last_queries() -> None:
    """What the docstring promises: the last Sq of Skv tokens see what they would see among all Skv."""
    assert torch.equal(dense(causal(offset=9 - 7))[0], causal().to_dense(1, 1, 9, 9)[0, 0, 2:])


def test_repr_reads_like_the_code() -> None:
    mask = (causal() & document(IDS)) | ~sliding_window(3, 0).shift(q=1)
    assert repr(mask) == "((causal(0) & document(int64[2, 9])) | ~shift(sliding_window(3, 0), 1, 0))"
    assert repr(softcap(2.0).then(alibi(torch.rand(4)))) == "softcap(2.0).then(alibi([4]))"


def test_joining_by_words_is_refused() -> None:
    for join in (lambda: causal() and full(), lambda: not causal(), lambda: causal() if full() else None):
        with pytest.raises(MaskError, match="& for and"):
            join()


def test_plain_functions_join_masks() -> None:
    assert torch.equal(dense(causal() & (lambda b, h, q, k: k > 2))[0], (K <= Q) & (K > 2))


def test_score_functions_compose_in_order() -> None:
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    slopes = torch.tensor([0.5, 0.25])
    S = q @ k.mT / 4
    bias = slopes[:, None, None] * (torch.arange(9)[None, :] - torch.arange(9)[:, None])
    for score_mod, scores in (
        (softcap(2.0).then(alibi(slopes)), 2 * torch.tanh(S / 2) + bias),
        (alibi(slopes).then(softcap(2.0)), 2 * torch.tanh((S + bias) / 2)),
        (alibi(slopes[None]), S + bias),
        (softcap(2.0).then(lambda s, b, h, i, j: s * 3), 6 * torch.tanh(S / 2)),
    ):
        torch.testing.assert_close(attention(q, k, v, score_mod=score_mod), torch.softmax(scores, -1) @ v)


def test_works_as_a_flex_attention_mask() -> None:
    from torch.nn.attention.flex_attention import create_mask

    mask = causal() & document(IDS)
    assert torch.equal(create_mask(mask, 2, 1, 7, 9, device="cpu"), mask.to_dense(2, 1, 7, 9))
