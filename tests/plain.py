"""Plain torch attention in the dtype of its inputs: what a kernel's rounding error is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from anymask.expr.bindings import Bindings
from anymask.expr.evaluate import evaluate
from anymask.expr.mods import Mods


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
