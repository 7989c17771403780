"""The prototype's interface: attention with two query and key labels, eq and ek, and a numbered mode.

A mode is one line in the mask language, a function of the labels of a pair. Masks of modes and `causal` are joined by
`&`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from anymask.api import attention as any_mask_attention
from anymask.errors import InputError
from anymask.masks import Mask
from anymask.masks import causal as causal_mask

ModeFunction = Callable[[Any, Any], Any]

_modes: list[ModeFunction | None] = []


def register_score_func_mode(function: ModeFunction | None) -> int:
    """The number of a new mode. function: (eq of the query, ek of the key) -> bool, True where it sees the key."""
    _modes.append(function)
    return len(_modes) - 1


SCORE_FUNC_MODE0_NOPE = register_score_func_mode(None)
SCORE_FUNC_MODE1_DOC = register_score_func_mode(lambda eq, ek: (eq >= 0) | (eq == ek))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    eq: Tensor | None = None,
    ek: Tensor | None = None,
    score_func_mode: int = SCORE_FUNC_MODE0_NOPE,
) -> Tensor:
    """out [B, H, Lq, Dv] of q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv].

    causal: aligned bottom-right, kv_idx <= q_idx + Lk - Lq; where Lq > Lk the first queries see no key and give 0.
    sm_scale: 1 / sqrt(D) if None.  eq: labels of the queries [B, H, Lq], ek: of the keys [B, H, Lk], needed by every
    mode but 0.  score_func_mode: SCORE_FUNC_MODE0_NOPE, SCORE_FUNC_MODE1_DOC or a number from
    register_score_func_mode().
    """
    if not 0 <= score_func_mode < len(_modes):
        raise InputError(f"score_func_mode {score_func_mode} is not registered: there are 0 to {len(_modes) - 1}")
    mask = causal_mask(offset=k.shape[2] - q.shape[2]) if causal else None
    mode = _modes[score_func_mode]
    if mode is not None:
        of_mode = _mode_mask(mode, score_func_mode, q, k, eq, ek)
        mask = of_mode if mask is None else mask & of_mode
    return any_mask_attention(q, k, v, mask=mask, scale=sm_scale)  # type: ignore[return-value]


def _mode_mask(mode: ModeFunction, number: int, q: Tensor, k: Tensor, eq: Tensor | None, ek: Tensor | None) -> Mask:
    for name, labels, length in (("eq", eq, q.shape[2]), ("ek", ek, k.shape[2])):
        expected = (q.shape[0], q.shape[1], length)
        if labels is None or tuple(labels.shape) != expected:
            got = "None" if labels is None else str(tuple(labels.shape))
            raise InputError(f"mode {number} needs {name} of shape [B, H, L] = {expected}, got {got}")
    assert eq is not None and ek is not None
    return Mask(lambda b, h, q_idx, kv_idx: mode(eq[b, h, q_idx], ek[b, h, kv_idx]), f"mode {number}")
