"""Problem: the shapes and dtypes of one attention call, derived and checked once, read everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anymask.errors import InputError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Problem:
    """q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv] -> out [B, Hq, Sq, Dv], lse [B, Hq, Sq]."""

    B: int
    Hq: int
    Hkv: int
    Sq: int
    Skv: int
    D: int
    Dv: int
    dtype: torch.dtype
    device: torch.device

    @property
    def G(self) -> int:
        """Query heads that share one key/value head."""
        return self.Hq // self.Hkv

    @staticmethod
    def of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Problem:
        """Check q, k, v against each other. Raises InputError that names both sides of what does not fit."""
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, torch.Tensor):
                raise InputError(f"{name} must be a tensor, got {type(x).__name__}")
        dtype, device = q.dtype, q.device
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dim() != 4:
                raise InputError(
                    f"{name} must be [batch, heads, sequence, head_dim], got {x.dim()} dimensions: {tuple(x.shape)}. "
                    f"A [B, S, H, D] tensor works transposed: {name}.transpose(1, 2)"
                )
            if x.dtype not in DTYPES:
                raise InputError(f"{name} has dtype {x.dtype}; expected float16, bfloat16 or float32")
            if x.dtype != dtype:
                raise InputError(f"q, k and v must have one dtype, got q {dtype} and {name} {x.dtype}")
            if x.device != device:
                raise InputError(f"q, k and v must be on one device, got q on {device} and {name} on {x.device}")
        B, Hq, Sq, D = q.shape
        _, Hkv, Skv, Dv = v.shape
        if k.shape[0] != B or v.shape[0] != B:
            raise InputError(f"batch sizes differ: q {B}, k {k.shape[0]}, v {v.shape[0]}")
        if k.shape[1] != Hkv:
            raise InputError(f"k and v must have the same heads, got k {k.shape[1]} and v {Hkv}")
        if k.shape[2] != Skv:
            raise InputError(f"k and v must have the same length, got k {k.shape[2]} and v {Skv}")
        if k.shape[3] != D:
            raise InputError(f"q and k must have the same head dim, got q {D} and k {k.shape[3]}")
        if Hkv == 0 or Hq % Hkv != 0:
            raise InputError(f"the {Hq} query heads must be a multiple of the {Hkv} key/value heads")
        for name, d in (("D of q and k", D), ("Dv of v", Dv)):
            if d < 8 or d > 256 or d % 8 != 0:
                raise InputError(f"{name} must be a multiple of 8 from 8 to 256, got {d}. Pad it with zeros")
        return Problem(B, Hq, Hkv, Sq, Skv, D, Dv, dtype, device)


def dense_like(x: torch.Tensor, last: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised dense tensor with the sizes of x but `last` in its last dimension.

    Laid out as [B, S, H, last] where x keeps the heads of one token together, else as [B, H, S, last], so that an
    output can be reshaped as its input could. One rule for kernels and fakes.
    """
    strides = dense_strides(x.shape, x.stride(), last)
    return torch.empty_strided((*x.shape[:3], last), strides, dtype=dtype or x.dtype, device=x.device)


def dense_strides(shape: tuple[int, ...], strides: tuple[int, ...], last: int) -> tuple[int, int, int, int]:
    """The strides of dense_like for an x of this shape and strides."""
    _, H, S, _ = shape
    if strides[1] < strides[2]:
        return S * H * last, last, H * last, 1
    return H * S * last, S * last, last, 1
