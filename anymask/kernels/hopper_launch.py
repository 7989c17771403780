"""What the Hopper kernels are started with.

launch.py imports this only where the plan wants one: it imports Gluon.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from anymask.kernels.configs import HOPPER_REGISTERS, HopperConfig
from anymask.kernels.hopper_fwd import hopper_forward_kernel
from anymask.kernels.plan import chunks
from anymask.kernels.recipe import TENSOR, Descriptor, Layout, Recipe

DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
CONSUMER_ROWS = 64


def forward_recipe(
    q: Layout,
    k: Layout,
    v: Layout,
    out: Layout,
    walk: tuple[Any, ...],
    tile: tuple[int, int],
    scale: float,
    bindings: Any,
    mask: Any,
    score: Any,
    config: HopperConfig,
) -> Recipe:
    """For q, k, v, out, lse, a counter if it is persistent, the walk's tensors, captured ones.

    walk: the arguments walk to heads_together of kernels/tile.py, the walk None where no mask hides anything.  tile: of
    the walk.  mask, score: jitted functions or None.
    """
    Hq, Sq, Skv = q.shape[1], q.shape[2], k.shape[2]
    num_rows, num_heads = walk[3:5]
    programs = num_heads * num_rows * tile[0] // config.BLOCK_Q
    if config.is_persistent:
        programs = min(programs, _num_multiprocessors(q.device) * config.programs_together)
    registers, of_roles = HOPPER_REGISTERS[config.num_consumers]
    return Recipe(
        q.device,
        hopper_forward_kernel,
        programs,
        *_descriptors(q, CONSUMER_ROWS),
        *_descriptors(k, config.BLOCK_KV),
        *_descriptors(v, config.BLOCK_KV),
        *_descriptors(out, CONSUMER_ROWS),
        TENSOR,
        TENSOR if config.is_persistent else None,
        *walk,
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


@functools.lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    """132 where nothing runs: an H200's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _descriptors(x: Layout, rows: int) -> tuple[Descriptor, Descriptor | None]:
    """x [B, H, S, D] for TMA, in blocks of so many rows of one head and of the columns of each chunk of D."""
    B, H, S, D = x.shape
    # a dimension of size 1 may have any stride, also one that TMA does not take
    strides = [stride if size > 1 else 8 for size, stride in zip((B, H, S), x.strides, strict=False)]
    made: list[Descriptor] = []
    for columns in chunks(D):
        block = [1, 1, rows, columns]
        layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[x.dtype])
        made.append(Descriptor([B, H, S, D], [*strides, 1], block, layout, is_again=bool(made)))
    return made[0], made[1] if len(made) > 1 else None
