"""What the Hopper kernels are started with.

recipes.py imports this only where the plan wants one: it imports Gluon.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from anymask.kernels.configs import HOPPER_REGISTERS, HopperBackwardConfig, HopperConfig, HopperDqConfig
from anymask.kernels.footprint import chunks, padded
from anymask.kernels.hopper_bwd import hopper_backward_kernel
from anymask.kernels.hopper_dq import hopper_dq_kernel
from anymask.kernels.hopper_fwd import hopper_forward_kernel
from anymask.kernels.hopper_rows import rows_kernel
from anymask.kernels.hopper_sum import LINE, dq_of_sum_kernel
from anymask.kernels.recipe import TENSOR, Descriptor, Layout, Recipe

DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
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

    walk: the arguments walk to heads_last of kernels/tile.py, the walk None where no mask hides anything.  tile: of
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
        REGISTERS=(*of_roles, of_roles[-1]),  # the warp that finds rows is of the producer's warpgroup
        num_warps=4,
        maxnreg=registers,
    )


@functools.lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    """132 where nothing runs: an H200's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def rows_recipe(
    out: Layout, dout: Layout, rows: Layout, D: int, has_dlse: bool, is_fused: bool, addressing: dict[str, Any]
) -> Recipe:
    """For out, dout, lse, dlse if there is one, rows, the sum of dQ if the backward is fused."""
    B, Hq, Sq, Dv = out.shape
    columns = sum(chunks(D))
    return Recipe(
        out.device,
        rows_kernel,
        B * Hq * -(-Sq // CONSUMER_ROWS),
        TENSOR,
        TENSOR,
        TENSOR,
        TENSOR if has_dlse else None,
        TENSOR,
        TENSOR if is_fused else None,
        out.strides,
        dout.strides,
        rows.strides[2],
        Hq,
        Sq,
        BLOCK_Q=CONSUMER_ROWS,
        SUM_COLUMNS=columns,
        SUM_PAD=padded(columns),
        DV=Dv,
        DV_PAD=padded(Dv),
        num_warps=4,
        **addressing,
    )


def rows_layout(q: Layout) -> Layout:
    """[B, Hq, 2, Sq] f32: lse and delta, each beginning where TMA can read it."""
    B, Hq, Sq, _ = q.shape
    padded = -(-Sq // 4) * 4
    return Layout((B, Hq, 2, Sq), (Hq * 2 * padded, 2 * padded, padded, 1), torch.float32, q.device)


def sum_layout(q: Layout) -> Layout:
    """[B, Hq, lines, LINE] f32: what dQ is added up in (hopper_sum.py), of tiles of CONSUMER_ROWS queries."""
    B, Hq, Sq, D = q.shape
    line = LINE.value
    lines = -(-Sq // CONSUMER_ROWS) * CONSUMER_ROWS * sum(chunks(D)) // line
    return Layout((B, Hq, lines, line), (Hq * lines * line, lines * line, line, 1), torch.float32, q.device)


def sum_parts(D: int, config: HopperBackwardConfig) -> int:
    """So many products make a chunk of a tile of the sum: consumers share dQ by columns, else by chunks or queries."""
    return 2 if config.BLOCK_Q == CONSUMER_ROWS and len(chunks(D)) == 1 else 1


def backward_recipe(
    q: Layout,
    k: Layout,
    v: Layout,
    dout: Layout,
    dk: Layout,
    dv: Layout,
    walk: tuple[Any, ...],
    tile: tuple[int, int],
    scale: float,
    bindings: Any,
    mask: Any,
    score: Any,
    score_gradient: Any,
    config: HopperBackwardConfig,
) -> Recipe:
    """For q, k, v, dout, rows, the sum of dQ if config is fused, dk, dv, a counter if it is persistent, the walk's
    tensors, captured ones.

    Arguments as of forward_recipe; the walk's rows are tiles of keys.
    """
    (_, Hq, Sq, _), (_, Hkv, Skv, _) = q.shape, k.shape
    num_rows, num_heads = walk[3:5]
    registers, of_roles = HOPPER_REGISTERS[config.num_consumers]
    programs = num_heads * num_rows * tile[1] // config.BLOCK_KV
    if config.is_persistent:
        programs = min(programs, _num_multiprocessors(q.device))
        of_roles = (*of_roles, of_roles[-1])
    return Recipe(
        q.device,
        hopper_backward_kernel,
        programs,
        *_descriptors(q, config.BLOCK_Q),
        *_descriptors(k, CONSUMER_ROWS),
        *_descriptors(v, CONSUMER_ROWS),
        *_descriptors(dout, config.BLOCK_Q),
        _descriptor(rows_layout(q), (2, config.BLOCK_Q)),
        *(_sum_descriptors(q, config) if config.is_fused else (None, None)),
        *_descriptors(dk, CONSUMER_ROWS),
        *_descriptors(dv, CONSUMER_ROWS),
        TENSOR if config.is_persistent else None,
        *walk,
        Hkv,
        Sq,
        Skv,
        scale,
        bindings,
        MASK=mask,
        SCORE=score,
        SCORE_GRAD=score_gradient,
        G=Hq // Hkv,
        NUM_CONSUMERS=config.num_consumers,
        BLOCK_Q=config.BLOCK_Q,
        TILE_Q=tile[0],
        TILE_KV=tile[1],
        IS_EVEN_Q=Sq % tile[0] == 0,
        IS_EVEN_KV=Skv % tile[1] == 0,
        IS_SPLIT=config.is_split,
        STAGES=config.num_stages,
        KEY_TILES=config.num_key_tiles,
        REGISTERS=of_roles,
        num_warps=4,
        maxnreg=registers,
    )


def dq_recipe(
    q: Layout,
    k: Layout,
    v: Layout,
    dout: Layout,
    dq: Layout,
    walk: tuple[Any, ...],
    tile: tuple[int, int],
    scale: float,
    bindings: Any,
    mask: Any,
    score: Any,
    score_gradient: Any,
    config: HopperDqConfig,
) -> Recipe:
    """For q, k, v, dout, dq, rows, the walk's tensors, captured ones. Arguments as of forward_recipe."""
    (_, Hq, Sq, _), (_, Hkv, Skv, _) = q.shape, k.shape
    num_rows, num_heads = walk[3:5]
    registers, of_roles = HOPPER_REGISTERS[config.num_consumers]
    return Recipe(
        q.device,
        hopper_dq_kernel,
        num_heads * num_rows * tile[0] // config.BLOCK_Q,
        *_descriptors(q, CONSUMER_ROWS),
        *_descriptors(k, config.BLOCK_KV),
        *_descriptors(v, config.BLOCK_KV),
        *_descriptors(dout, CONSUMER_ROWS),
        *_descriptors(dq, CONSUMER_ROWS),
        TENSOR,
        rows_layout(q).strides[2],
        *walk,
        Hq,
        Sq,
        Skv,
        scale,
        bindings,
        MASK=mask,
        SCORE=score,
        SCORE_GRAD=score_gradient,
        G=Hq // Hkv,
        BLOCK_Q=config.BLOCK_Q,
        BLOCK_KV=config.BLOCK_KV,
        TILE_Q=tile[0],
        TILE_KV=tile[1],
        IS_EVEN_KV=Skv % tile[1] == 0,
        STAGES=config.num_v_stages,
        REGISTERS=of_roles,
        num_warps=4,
        maxnreg=registers,
    )


def dq_of_sum_recipe(dq: Layout, scale: float, config: HopperBackwardConfig, addressing: dict[str, Any]) -> Recipe:
    """For the sum of dQ and dq."""
    B, Hq, Sq, D = dq.shape
    parts = sum_parts(D, config)
    return Recipe(
        dq.device,
        dq_of_sum_kernel,
        B * Hq * -(-Sq // CONSUMER_ROWS),
        TENSOR,
        TENSOR,
        dq.strides,
        Hq,
        Sq,
        scale,
        PARTS=tuple(columns // parts for columns in chunks(D) for _ in range(parts)),
        D=D,
        num_warps=4,
        **addressing,
    )


def _descriptors(x: Layout, rows: int) -> tuple[Descriptor, Descriptor | None]:
    """x [B, H, S, D] in blocks of so many rows and of the columns of each chunk of D."""
    first, *rest = chunks(x.shape[3])
    others = [_descriptor(x, (rows, columns), is_again=True) for columns in rest]
    return _descriptor(x, (rows, first)), others[0] if others else None


def _sum_descriptors(q: Layout, config: HopperBackwardConfig) -> tuple[Descriptor, Descriptor | None]:
    """The sum of dQ in blocks of a product, of each chunk of D."""
    shape, strides, *_ = sum_layout(q)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=4)
    blocks = [columns * CONSUMER_ROWS // sum_parts(q.shape[3], config) // shape[3] for columns in chunks(q.shape[3])]
    first, *others = [
        Descriptor(list(shape), list(strides), [1, 1, lines, shape[3]], layout, is_again=i > 0)
        for i, lines in enumerate(blocks)
    ]
    return first, others[0] if others else None


def _descriptor(x: Layout, block: tuple[int, int], is_again: bool = False) -> Descriptor:
    """x [B, H, S, D] for TMA, in such blocks of one head."""
    # a dimension of size 1 may have any stride, also one that TMA does not take
    strides = [stride if size > 1 else 8 for size, stride in zip(x.shape[:3], x.strides, strict=False)]
    layout = gl.NVMMASharedLayout.get_default_for([1, 1, *block], DTYPES[x.dtype])
    return Descriptor(list(x.shape), [*strides, 1], [1, 1, *block], layout, is_again)
