"""The reference: attention in dense float64 torch. Slow and obvious; it defines every edge case.

    S = q k^T * scale;  S = score_mod(S);  S = -inf where the mask hides
    P = softmax(S);  out = P v;  lse = logsumexp(S)

A row that sees no key has out = 0, lse = -inf and gives no gradient. A pair that the mask hides has no influence at
all, also where the score function or its derivative is inf or nan there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymask.expr.bindings import Bindings
from anymask.expr.evaluate import evaluate
from anymask.expr.grad import derivative
from anymask.expr.mods import Mods
from anymask.problem import dense_like


def forward(q: Tensor, k: Tensor, v: Tensor, mods: Mods, bindings: Bindings, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Sq, Dv] in q's dtype and lse [B, Hq, Sq] float32, natural log."""
    P, lse, _, _ = _probabilities(q, k, mods, bindings, scale)
    # O = P V
    out = P @ _heads(v, q)
    return dense_like(q, v.shape[3]).copy_(out), lse.float()


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mods: Mods, bindings: Bindings, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v for the gradients dout of out and dlse (None: 0) of lse."""
    P, _, S, mask = _probabilities(q, k, mods, bindings, scale)
    B, Hkv, Skv, _ = k.shape
    dO, K, V = dout.double(), _heads(k, q), _heads(v, q)
    # dV = P^T dO
    dV = P.mT @ dO
    # dP = dO V^T
    dP = dO @ V.mT
    # delta = rowsum(O * dO) = rowsum(P * dP)
    delta = (P * dP).sum(-1, keepdim=True)
    # dS = P * (dP - delta + dlse), through the score function, 0 where hidden
    dS = P * (dP - delta + (0.0 if dlse is None else dlse.double()[..., None]))
    if mods.has_score:
        dS = dS * evaluate(derivative(mods.score), bindings, **_indices(S), score=S)
    dS = torch.where(mask, dS, 0.0)
    # dQ = dS K * scale, dK = dS^T Q * scale
    dQ = dS @ K * scale
    dK = dS.mT @ q.double() * scale
    dK, dV = (x.view(B, Hkv, q.shape[1] // Hkv, Skv, x.shape[-1]).sum(2) for x in (dK, dV))
    dq, dk, dv = (dense_like(x, x.shape[3]).copy_(dX) for x, dX in ((q, dQ), (k, dK), (v, dV)))
    return dq, dk, dv


def _probabilities(
    q: Tensor, k: Tensor, mods: Mods, bindings: Bindings, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, lse, the scores before the score function, and the mask, all [B, Hq, Sq, Skv] but lse [B, Hq, Sq]; float64."""
    # S = Q K^T * scale
    S = q.double() @ _heads(k, q).mT * scale
    mask = evaluate(mods.mask, bindings, **_indices(S)).expand(S.shape)
    modified = evaluate(mods.score, bindings, **_indices(S), score=S) if mods.has_score else S
    visible = torch.where(mask, modified, -torch.inf)
    if S.shape[-1] == 0:
        return visible, visible.new_full(S.shape[:3], -torch.inf), S, mask
    lse = torch.logsumexp(visible, -1)
    P = torch.where(visible == -torch.inf, 0.0, torch.exp(visible - lse[..., None]))
    return P, lse, S, mask


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """k or v in float64 with each head repeated for the query heads that share it."""
    return x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _indices(S: Tensor) -> dict[str, Any]:
    names = ("b", "h", "q_idx", "kv_idx")
    return {
        name: torch.arange(size, device=S.device).view([-1 if i == axis else 1 for i in range(4)])
        for axis, (name, size) in enumerate(zip(names, S.shape, strict=True))
    }
