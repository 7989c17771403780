"""The only file that starts kernels: forward, backward, exact. It obeys the plan and owns every buffer it writes."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from anymask.blocks.block_map import BlockMap
from anymask.expr.bindings import Bindings
from anymask.expr.emit import emit, emit_hide, odd
from anymask.expr.grad import derivative
from anymask.expr.ir import Expr
from anymask.expr.mods import Mods
from anymask.kernels.configs import Config
from anymask.kernels.jit import jitted
from anymask.kernels.plan import Plan, padded
from anymask.kernels.triton_bwd import delta_kernel, dkdv_kernel, dq_kernel
from anymask.kernels.triton_fwd import forward_kernel
from anymask.kernels.triton_map import classify_kernel
from anymask.problem import dense_like

DELTA_BLOCK = 32


def forward(
    q: Tensor, k: Tensor, v: Tensor, mods: Mods, bindings: Bindings, blocks: BlockMap, plan: Plan, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Sq, Dv] laid out as q (problem.dense_like), lse [B, Hq, Sq] float32, natural log.

    A row that sees no key: out = 0, lse = -inf.
    """
    B, Hq, Sq, D = q.shape
    Hkv, Skv, Dv = v.shape[1:]
    out = dense_like(q, Dv)
    lse = torch.empty(B, Hq, Sq, dtype=torch.float32, device=q.device)
    if out.shape.numel() == 0 or Skv == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    config = _config(plan.forward)
    arguments = _bind(bindings)
    mask, score, _ = _functions(mods, arguments.wide, plan.is_ptx, has_gradient=False)
    if score is None and scale <= 0:  # the identity: the kernel's short cut needs scale > 0
        score = _function(mods.score, "score", arguments.wide, plan.is_ptx)
    with _device_of(q):
        forward_kernel[(B * Hq * _ceil(Sq, config.BLOCK_Q),)](
            q,
            k,
            v,
            out,
            lse,
            q.stride(),
            k.stride(),
            v.stride(),
            out.stride(),
            *_map_arguments(blocks.kv_order, blocks.kv_count),
            Hq,
            Sq,
            Skv,
            scale,
            arguments.values,
            MASK=mask,
            SCORE=score,
            G=Hq // Hkv,
            BLOCK_Q=config.BLOCK_Q,
            BLOCK_KV=config.BLOCK_KV,
            TILE_Q=blocks.tile[0],
            TILE_KV=blocks.tile[1],
            IS_EVEN_KV=Skv % blocks.tile[1] == 0,
            PRECISION=plan.precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **_head_dims(D, Dv),
            **_addressing(q.stride(), k.stride(), v.stride(), out.stride()),
        )
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mods: Mods,
    bindings: Bindings,
    blocks: BlockMap,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, each in the shape and dtype of q, k, v, laid out by problem.dense_like.

    dlse: the gradient of lse, or None for 0.
    Deterministic: each gradient tile has one program that adds in the order of the map.
    """
    B, Hq, Sq, D = q.shape
    Hkv, Skv, Dv = v.shape[1:]
    dq, dk, dv = dense_like(q, D), dense_like(k, D), dense_like(v, Dv)
    if B == 0 or Hq == 0 or Sq == 0 or Skv == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    arguments = _bind(bindings)
    mask, score, score_gradient = _functions(mods, arguments.wide, plan.is_ptx, has_gradient=True)
    tile_q, tile_kv = blocks.tile
    padded_Sq = _ceil(Sq, tile_q) * tile_q
    rows = torch.empty(B, Hq, padded_Sq, 2, dtype=torch.float32, device=q.device)
    shared = dict(
        MASK=mask,
        SCORE=score,
        SCORE_GRAD=score_gradient,
        G=Hq // Hkv,
        TILE_Q=tile_q,
        TILE_KV=tile_kv,
        PRECISION=plan.precision,
        **_head_dims(D, Dv),
        **_addressing(*(x.stride() for x in (q, k, v, dout, dq, dk, dv))),
    )
    with _device_of(q):
        delta_kernel[(B * Hq * _ceil(padded_Sq, DELTA_BLOCK),)](
            out,
            dout,
            lse,
            None if dlse is None else dlse.contiguous(),
            rows,
            out.stride(),
            dout.stride(),
            Hq,
            Sq,
            padded_Sq,
            DV=Dv,
            DV_PAD=padded(Dv),
            BLOCK_Q=DELTA_BLOCK,
            num_warps=4,
            **_addressing(out.stride(), dout.stride()),
        )
        config = _config(plan.dkdv)
        dkdv_kernel[(B * Hkv * _ceil(Skv, config.BLOCK_KV),)](
            q,
            k,
            v,
            dout,
            dk,
            dv,
            rows,
            q.stride(),
            k.stride(),
            v.stride(),
            dout.stride(),
            dk.stride(),
            dv.stride(),
            *_map_arguments(blocks.q_order, blocks.q_count),
            Hkv,
            Sq,
            Skv,
            padded_Sq,
            scale,
            arguments.values,
            BLOCK_Q=config.BLOCK_Q,
            BLOCK_KV=config.BLOCK_KV,
            IS_EVEN_Q=Sq % tile_q == 0,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **shared,
        )
        config = _config(plan.dq)
        dq_kernel[(B * Hq * _ceil(Sq, config.BLOCK_Q),)](
            q,
            k,
            v,
            dout,
            dq,
            rows,
            q.stride(),
            k.stride(),
            v.stride(),
            dout.stride(),
            dq.stride(),
            *_map_arguments(blocks.kv_order, blocks.kv_count),
            Hq,
            Sq,
            Skv,
            padded_Sq,
            scale,
            arguments.values,
            BLOCK_Q=config.BLOCK_Q,
            BLOCK_KV=config.BLOCK_KV,
            IS_EVEN_KV=Skv % tile_kv == 0,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **shared,
        )
    return dq, dk, dv


def exact(kinds: Tensor, mask: Expr, bindings: Bindings, Sq: int, Skv: int, tile: tuple[int, int]) -> None:
    """Where kinds [Bm, Hm, num_q, num_kv] int8 is 3 (undecided), write 0 empty, 1 partial or 2 full. In place."""
    if kinds.numel() == 0:
        return
    arguments = _bind(bindings)
    _, Hm, num_q, num_kv = kinds.shape
    with _device_of(kinds):
        classify_kernel[(kinds.numel(),)](
            kinds,
            Hm,
            num_q,
            num_kv,
            Sq,
            Skv,
            arguments.values,
            MASK=_function(mask, "mask", arguments.wide),
            TILE_Q=tile[0],
            TILE_KV=tile[1],
            BLOCK_Q=min(_power_of_two(tile[0]), 64),
            BLOCK_KV=min(_power_of_two(tile[1]), 64),
            num_warps=4,
        )


class _Arguments:
    """Bindings as kernels take them. wide: slots of captured tensors that reach 2^31 elements."""

    def __init__(self, bindings: Bindings) -> None:
        captures = []
        wide = []
        for slot, tensor in enumerate(bindings.captures):
            if tensor.dtype == torch.float64:
                tensor = tensor.float()  # read as float32 anyway, and in half the shared memory
            sizes, strides = tensor.shape, tensor.stride()
            captures.append((tensor, tuple(odd(size) for size in sizes), strides))
            if sum(size * stride for size, stride in zip(sizes, strides, strict=True)) >= 1 << 31:
                wide.append(slot)
        self.values = (tuple(captures), tuple(odd(n) for n in bindings.ints), bindings.floats)
        self.wide = frozenset(wide)


_bind = _Arguments


@functools.lru_cache(maxsize=4096)
def _function(expr: Expr, name: str, wide: frozenset[int], is_ptx: bool = False) -> Any:
    text = emit_hide(expr, name, wide, is_ptx) if name == "hide" else emit(expr, name, wide, is_ptx)
    return jitted(text, name)


@functools.lru_cache(maxsize=4096)
def _functions(mods: Mods, wide: frozenset[int], is_ptx: bool, has_gradient: bool) -> tuple[Any, Any, Any]:
    """The mask, the score function and its derivative, the last two None where the score is unchanged."""
    mask = _function(mods.mask, "hide", wide, is_ptx)
    if not mods.has_score:
        return mask, None, None
    score = _function(mods.score, "score", wide, is_ptx)
    if not has_gradient:
        return mask, score, None
    return mask, score, _function(derivative(mods.score), "score_gradient", wide, is_ptx)


def _map_arguments(order: Tensor, count: Tensor) -> tuple[Tensor, Tensor, tuple[int, int], int]:
    """order_pointer, count_pointer, map_strides, row_length of kernels/tile.py's map_row."""
    Bm, Hm, num_rows, row_length = order.shape
    strides = (Hm * num_rows if Bm > 1 else 0, num_rows if Hm > 1 else 0)
    return order, count, strides, row_length


def _head_dims(D: int, Dv: int) -> dict[str, int]:
    return {"D": D, "DV": Dv, "D_PAD": padded(D), "DV_PAD": padded(Dv)}


@functools.lru_cache(maxsize=4096)
def _addressing(*strides: tuple[int, ...]) -> dict[str, Any]:
    """ALIGN: what divides every stride but the last.  WIDE: a tile of up to 256 x 256 can span 2^31 elements."""
    is_aligned = all(stride % 8 == 0 for of_tensor in strides for stride in of_tensor[:3])
    is_wide = any(stride >= 1 << 22 for of_tensor in strides for stride in of_tensor[2:])
    return {"ALIGN": 8 if is_aligned else 1, "WIDE": is_wide}


def _config(config: Config | None) -> Config:
    assert config is not None, "a plan of another backend"
    return config


def _ceil(x: int, y: int) -> int:
    return -(-x // y)


def _power_of_two(x: int) -> int:
    """The smallest power of two from x on."""
    return 1 << (x - 1).bit_length()


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
