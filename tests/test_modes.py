"""The prototype's interface against a dense computation of what it says."""

from __future__ import annotations

import pytest
import torch

from anymask import InputError
from anymask.compat import modes


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("Lq", "Lk"), [(40, 40), (33, 57), (57, 33), (1, 9)])
@pytest.mark.parametrize("mode", [modes.SCORE_FUNC_MODE0_NOPE, modes.SCORE_FUNC_MODE1_DOC])
def test_modes(mode: int, Lq: int, Lk: int, is_causal: bool) -> None:
    torch.manual_seed(Lq + Lk)
    q, k, v = torch.randn(2, 3, Lq, 16), torch.randn(2, 3, Lk, 16), torch.randn(2, 3, Lk, 16)
    eq, ek = torch.randint(-4, 1, (2, 3, Lq)), torch.randint(-4, 1, (2, 3, Lk))
    visible = torch.ones(2, 3, Lq, Lk, dtype=torch.bool)
    if is_causal:
        visible &= torch.arange(Lk) <= torch.arange(Lq)[:, None] + Lk - Lq
    if mode == modes.SCORE_FUNC_MODE1_DOC:
        visible &= (eq >= 0)[..., None] | (eq[..., None] == ek[:, :, None])
    S = (q @ k.mT * 0.3).masked_fill(~visible, -torch.inf)
    expected = torch.softmax(S, -1).nan_to_num(0) @ v
    got = modes.attention(q, k, v, is_causal, 0.3, eq, ek, mode)
    torch.testing.assert_close(got, expected)


def test_a_new_mode_is_one_line() -> None:
    mode = modes.register_score_func_mode(lambda eq, ek: eq != ek)
    q, k, v = (torch.randn(1, 1, 9, 16) for _ in range(3))
    labels = torch.randint(0, 3, (1, 1, 9))
    S = (q @ k.mT / 4).masked_fill(labels[..., None] == labels[:, :, None], -torch.inf)
    got = modes.attention(q, k, v, eq=labels, ek=labels, score_func_mode=mode)
    torch.testing.assert_close(got, torch.softmax(S, -1).nan_to_num(0) @ v)


def test_bad_modes_are_named() -> None:
    q = torch.randn(1, 1, 9, 16)
    with pytest.raises(InputError, match="not registered"):
        modes.attention(q, q, q, score_func_mode=999)
    with pytest.raises(InputError, match=r"eq of shape .* got None"):
        modes.attention(q, q, q, score_func_mode=modes.SCORE_FUNC_MODE1_DOC)
