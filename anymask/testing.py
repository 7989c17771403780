"""Inputs in awkward layouts, and the error budget of a backend. For tests/ and benchmarks/ only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = ("out", "lse", "dq", "dk", "dv")


def inputs(
    B: int,
    Hq: int,
    Hkv: int,
    Sq: int,
    Skv: int,
    D: int,
    Dv: int,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (requiring grad), dout and dlse; q, k, v and dout each in a layout of its own."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    q = random(B, Sq, Hq, D).transpose(1, 2)  # heads of a token together
    k = random(B, Hkv, Skv, D + 8)[..., :D]  # rows with a gap
    v = random(Hkv, B, Skv, Dv).transpose(0, 1)  # batch inside heads
    dout = random(B, Hq, Dv, Sq).mT  # columns first
    dlse = torch.randn(B, Hq, Sq, generator=generator).to(device)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout, dlse


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected|| over entries that are finite in expected. inf if any entry is nan, or differs
    in being finite; 0 for two zeros."""
    got, expected = got.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.equal(got[~finite], expected[~finite]):
        return float("inf")
    difference, size = (got - expected)[finite].norm().item(), expected[finite].norm().item()
    return difference if size == 0 else difference / size


def check(
    got: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    plain: tuple[Tensor, ...],
    slack: float = 2.0,
    allowed: Sequence[float] = (0.0,) * len(NAMES),
) -> dict[str, float]:
    """Assert that each result's error is at most slack times that of plain torch in the same dtype.

    Both errors are against float64.  got, exact, plain: results in the order of NAMES.  Returns the errors by name.
    Two roundings that plain torch does not have are allowed on top: a float32 result's last bits (2e-7), and, for
    gradients, that of lse to float32: the backward computes P = exp(S - lse), whose relative error is |lse| * 2^-24.
    allowed: further relative errors, in the same order.
    """
    lse = exact[1].double()
    of_lse = 2.0**-24 * lse[lse.isfinite()].abs().mean().nan_to_num().item()
    errors = {}
    for name, a, e, p, more in zip(NAMES, got, exact, plain, allowed, strict=False):
        assert a.shape == e.shape and a.dtype == p.dtype, (name, a.shape, e.shape, a.dtype, p.dtype)
        error = relative_error(a, e)
        budget = slack * max(relative_error(p, e), 2e-7) + (of_lse if name.startswith("d") else 0.0) + more
        assert error <= budget, (
            f"{name}: error {error:.2e} is above {budget:.2e}; plain torch: {relative_error(p, e):.2e}"
        )
        errors[name] = error
    return errors
