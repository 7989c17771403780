"""How much shared memory kernels take, by their tiles: at most; benchmarks/aot.py confirms it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from anymask.expr.ir import DType, Op
from anymask.expr.mods import Mods
from anymask.kernels.configs import Config, HopperBackwardConfig, HopperConfig, HopperDqConfig


def padded(D: int) -> int:
    """The head dim as kernels see it: the next power of two, at least 16."""
    return max(16, 1 << (D - 1).bit_length())


@dataclass(frozen=True)
class Need:
    """What decides how much shared memory tiles take. D, Dv: padded head dims.

    per_index, per_pair: bytes that mods read from captured tensors for each query or key, and for each pair of both.
    """

    D: int
    Dv: int
    itemsize: int
    family: str
    per_index: int
    per_pair: int

    @staticmethod
    def of(D: int, Dv: int, dtype: torch.dtype, mods: Mods, family: str) -> Need:
        return Need(padded(D), padded(Dv), dtype.itemsize, family, *_read_bytes(mods))


READ_BYTES = {DType.BOOL: 1, DType.INT32: 4, DType.INT64: 8, DType.FLOAT: 4}


@functools.lru_cache(maxsize=4096)
def _read_bytes(mods: Mods) -> tuple[int, int]:
    per_index = per_pair = 0
    for node in dict.fromkeys((*mods.mask.walk(), *mods.score.walk())):
        if node.op is Op.LOAD:
            if {"q_idx", "kv_idx"} <= node.indices():
                per_pair += READ_BYTES[node.dtype]
            else:
                per_index += READ_BYTES[node.dtype]
    return per_index, per_pair


def shared_memory(kernel: str, config: Config, need: Need) -> int:
    """Bytes of shared memory that a kernel needs at most.

    Held tiles (AMD keeps them in registers); per stage, at least two, the tiles that the loop reads; what mods read,
    staged where there is a pipeline; P, and on sm_100 dS, as an operand of a product.
    """
    outer, inner = (config.BLOCK_KV, config.BLOCK_Q) if kernel == "dkdv" else (config.BLOCK_Q, config.BLOCK_KV)
    pairs = config.BLOCK_Q * config.BLOCK_KV
    held = outer * (need.D if kernel == "forward" else need.D + need.Dv) * need.itemsize
    tiles = inner * (need.D + need.Dv) * need.itemsize
    reads = (config.num_stages - 1) * (inner * (need.per_index + 8) + pairs * need.per_pair)
    operands = pairs * need.itemsize * (4 if need.family == "sm_100" else 1)
    if need.family == "gfx942":
        return max(held, config.num_stages * tiles) + reads + operands + 2048
    return held + max(2, config.num_stages) * tiles + reads + operands + 2048


def chunks(D: int) -> tuple[int, ...]:
    """Columns of the products that the Hopper forward makes of a head dim: one power of two, or two if that is less.

    The second is not below a quarter of the first: a row of HOPPER_ROWS then fits all head dims up to its own.
    """
    first = 1 << (D.bit_length() - 1)
    rest = max(padded(D - first), first // 4) if first < D else 0
    return (first, rest) if first >= 16 and 0 < rest < first else (padded(D),)


def hopper_shared_memory(config: HopperConfig, D: int, Dv: int) -> int:
    """Bytes of shared memory that the Hopper forward needs at most: Q, out where it does not fit in Q's place, K, V.

    A persistent one has the next row's Q and the last row's out.
    """
    of_q, of_out = chunks(D), chunks(Dv)
    has_place = len(of_out) > len(of_q) or any(a > b for a, b in zip(of_out, of_q, strict=False))
    D, Dv = sum(of_q), sum(of_out)
    staged = 2 * D + Dv if config.is_persistent else D + (Dv if has_place else 0)
    return 2 * (config.BLOCK_Q * staged + config.num_stages * config.BLOCK_KV * (D + Dv)) + 1024


def hopper_backward_shared_memory(config: HopperBackwardConfig, D: int, Dv: int) -> int:
    """Bytes of shared memory that the Hopper backward needs at most: K, V, stages of Q and dO with lse and delta; dS of
    two or three steps, and dQ; P of two steps, where it is handed over.
    """
    block_q, block_kv = config.BLOCK_Q, config.BLOCK_KV
    D, Dv = sum(chunks(D)), sum(chunks(Dv))
    steps = 3 if block_q == 64 else 2
    fused = steps * 2 * block_q * block_kv + 4 * block_q * D if config.is_fused else 0
    handed = 2 * 2 * block_q * block_kv if config.is_split else 0
    staged = config.num_stages * block_q * (2 * (D + Dv) + 8)
    return 2 * config.num_key_tiles * block_kv * (D + Dv) + staged + fused + handed + 1024


def hopper_dq_shared_memory(config: HopperDqConfig, D: int, Dv: int) -> int:
    """Bytes of shared memory that the Hopper dQ needs at most: Q and dO, stages of V, of K one more."""
    D, Dv = sum(chunks(D)), sum(chunks(Dv))
    stages = config.BLOCK_KV * (config.num_v_stages * (D + Dv) + D)
    return 2 * (config.BLOCK_Q * (D + Dv) + stages) + 1024
