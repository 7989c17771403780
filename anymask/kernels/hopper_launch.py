"""Starts the Hopper kernels for launch.py, which imports this only where the plan wants one: it imports Gluon."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from anymask.blocks.walk import Walk
from anymask.kernels.configs import HOPPER_REGISTERS, HopperConfig
from anymask.kernels.hopper_fwd import hopper_forward_kernel

DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
CONSUMER_ROWS = 64


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    walk_arguments: tuple[Walk | None, int, tuple[int, int], int, int, int],
    tile: tuple[int, int],
    scale: float,
    bindings: Any,
    mask: Any,
    score: Any,
    config: HopperConfig,
) -> None:
    """Write out and lse.

    walk_arguments: walk to heads_together of kernels/tile.py, the walk None where no mask hides anything.  tile: of the
    walk.  mask, score: jitted functions or None.
    """
    Hq, Sq, Skv = q.shape[1], q.shape[2], k.shape[2]
    num_rows, num_heads = walk_arguments[3:5]
    registers, of_roles = HOPPER_REGISTERS[config.num_consumers]
    hopper_forward_kernel[(num_heads * num_rows * tile[0] // config.BLOCK_Q,)](
        _descriptor(q, CONSUMER_ROWS),
        _descriptor(k, config.BLOCK_KV),
        _descriptor(v, config.BLOCK_KV),
        _descriptor(out, CONSUMER_ROWS),
        lse,
        *walk_arguments,
        Hq,
        Sq,
        Skv,
        scale,
        bindings,
        MASK=mask,
        SCORE=score,
        G=Hq // k.shape[1],
        BLOCK_Q=config.BLOCK_Q,
        BLOCK_KV=config.BLOCK_KV,
        TILE_Q=tile[0],
        TILE_KV=tile[1],
        IS_EVEN_KV=Skv % tile[1] == 0,
        STAGES=config.num_stages,
        HAS_TURNS=config.has_turns,
        REGISTERS=of_roles,
        num_warps=4,
        maxnreg=registers,
    )


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """x [B, H, S, D] for TMA, in blocks of so many rows of one head."""
    B, H, S, D = x.shape
    # a dimension of size 1 may have any stride, also one that TMA does not take
    strides = [stride if size > 1 else 8 for size, stride in zip((B, H, S), x.stride(), strict=False)]
    return TensorDescriptor(x, [B, H, S, D], [*strides, 1], [1, 1, rows, D], _layout(rows, D, x.dtype))


@functools.lru_cache
def _layout(rows: int, D: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, D], DTYPES[dtype])
