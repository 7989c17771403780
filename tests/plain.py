"""Plain torch attention in the dtype of its inputs: what a kernel's rounding error is measured against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anymask import reference
from anymask.expr.bindings import Bindings
from anymask.expr.evaluate import evaluate
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import trace


def plain(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor, mods: Mods, bindings: Bindings, scale: float
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv by autograd through matmul and softmax in q's dtype; scores and lse in float32."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    heads = [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v)]
    S = (q @ heads[0].mT).float() * scale
    indices = {
        name: torch.arange(size, device=q.device).view([-1 if i == axis else 1 for i in range(4)])
        for axis, (name, size) in enumerate(zip(("b", "h", "q_idx", "kv_idx"), S.shape, strict=True))
    }
    mask = evaluate(mods.mask, bindings, **indices).expand(S.shape)
    S = evaluate(mods.score, bindings, **indices, score=torch.where(mask, S, 0.0)).expand(S.shape)
    S = torch.where(mask, S, -torch.inf)
    sees = (-torch.inf < S).any(-1)
    safe = torch.where(sees[..., None], S, 0.0)
    P = torch.where(sees[..., None], torch.softmax(safe, -1), 0.0)
    out = P.to(q.dtype) @ heads[1]
    lse = torch.where(sees, torch.logsumexp(safe, -1), -torch.inf)
    loss = (out.float() * dout.float()).sum() + (torch.where(sees, lse, 0.0) * dlse).sum()
    return (out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v)))


def expected(
    mask: Any, score_mod: Any, tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], scale: float | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """out, lse, dq, dk, dv for q, k, v, dout, dlse: those of the float64 reference, and those of plain()."""
    q, k, v, dout, dlse = (x if x is None else x.detach() for x in tensors)
    program = trace(mask, score_mod)
    mods = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats)
    args = (mods, program.bindings, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    double = [x.double() for x in (q, k, v)]
    exact = (*reference.forward(*double, *args), *reference.backward(dout, dlse, *double, *args))
    if dlse is None:
        dlse = torch.zeros_like(exact[1])
    return exact, plain(q, k, v, dout, dlse, *args)
