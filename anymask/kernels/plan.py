"""choose(problem, ...): which backend runs a call, and with which tiles. Pure: no Triton, no device, testable anywhere."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace

import torch

from anymask.errors import UnsupportedError
from anymask.expr.mods import Mods
from anymask.kernels.configs import FAMILIES, SHARED_LIMITS, Config, Tiles, lookup
from anymask.problem import Problem

BACKENDS = ("triton", "eager", "reference")
KERNELS = ("forward", "dkdv", "dq")


@dataclass(frozen=True)
class Plan:
    """What launch obeys. forward, dkdv, dq and precision (of float32 products: "ieee" or "tf32") are for Triton."""

    backend: str
    forward: Tiles | None = None
    dkdv: Tiles | None = None
    dq: Tiles | None = None
    precision: str = "ieee"
    why: str = ""


def arch_of(device: torch.device) -> str:
    """Name of the architecture: sm_90, gfx942, "interpreter" (a CPU under TRITON_INTERPRET=1), else the device type."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    return _cuda_arch(device) if device.type == "cuda" else device.type


@functools.lru_cache
def _cuda_arch(device: torch.device) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def choose(
    problem: Problem,
    mods: Mods,
    tile: tuple[int, int],
    *,
    arch: str,
    backend: str | None = None,
    config: Config | str | None = None,
    deterministic: bool | None = None,
) -> Plan:
    """The plan of a call whose map has tiles of `tile` (queries, keys) on `arch` (see arch_of).

    backend: None for the best that can do it.  config: tiles to use instead of the tuning row's, a Config or its text.
    Both are obeyed or raise UnsupportedError.  deterministic: every backend is, so nothing depends on it.
    """
    if backend is not None and backend not in BACKENDS:
        raise UnsupportedError(f"backend={backend!r} is none of {', '.join(BACKENDS)}")
    obstacle = _obstacle(problem, tile, arch)
    if backend == "triton" and obstacle:
        raise UnsupportedError(f"backend='triton' cannot run this: {obstacle}. backend='eager' can")
    if backend is None:
        backend = "eager" if obstacle or arch == "interpreter" else "triton"
    if backend != "triton":
        if config:
            raise UnsupportedError(f"config= is for Triton kernels, and this runs on {backend!r} ({obstacle or 'forced'})")
        return Plan(backend, why=f"{backend} on {arch}" + (f": {obstacle}" if obstacle else ""))

    family = family_of(arch)
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    arithmetic = "half" if problem.dtype.itemsize == 2 else "ieee" if family == "interpreter" else precision
    need = _Need(padded(problem.D), padded(problem.Dv), problem.dtype.itemsize, arithmetic, SHARED_LIMITS[family])
    row = lookup(family, arithmetic, max(need.D, need.Dv))
    wanted = Config.of(config) if isinstance(config, str) else config or Config()
    chosen = {}
    for kernel in KERNELS:
        tiles = getattr(wanted, kernel)
        chosen[kernel] = _fit(kernel, getattr(row, kernel), tile, need) if tiles is None else tiles
        if tiles is not None:
            _check(kernel, tiles, tile, need)
    says = "; ".join(f"{kernel} {tiles}" for kernel, tiles in chosen.items())
    works = " with a score function" if mods.has_score else ""
    why = f"triton on {arch}, {arithmetic}, D {problem.D}, Dv {problem.Dv}{works}: {says}"
    return Plan("triton", **chosen, precision=precision, why=why)


def default_tile(problem: Problem) -> tuple[int, int]:
    """The tile of a map that nobody chose: (queries, keys). Every kernel's tiles divide it."""
    return 128, 128


def padded(D: int) -> int:
    """The head dim as kernels see it: the next power of two, at least 16."""
    return max(16, 1 << (D - 1).bit_length())


def family_of(arch: str) -> str:
    """The family whose limits and rows an architecture shares."""
    if arch.startswith("gfx"):
        return "gfx942"
    if arch in SHARED_LIMITS:
        return arch
    return FAMILIES.get(arch, "sm_86")  # an unknown NVIDIA device: the family that asks for least


@dataclass(frozen=True)
class _Need:
    """What decides how much shared memory tiles take: padded head dims, bytes per element, arithmetic; and the limit."""

    D: int
    Dv: int
    itemsize: int
    arithmetic: str
    limit: int


def shared_memory(kernel: str, tiles: Tiles, D: int, Dv: int, itemsize: int, arithmetic: str) -> int:
    """Bytes of shared memory that a kernel with padded head dims D, Dv needs at most; benchmarks/aot.py confirms it."""
    outer, inner = (tiles.BLOCK_KV, tiles.BLOCK_Q) if kernel == "dkdv" else (tiles.BLOCK_Q, tiles.BLOCK_KV)
    held = outer * (D if kernel == "forward" else D + Dv) * itemsize
    piped = tiles.num_stages * inner * (D + Dv) * itemsize
    scratch = tiles.BLOCK_Q * tiles.BLOCK_KV * itemsize
    return held + piped + scratch + 4096


def _obstacle(problem: Problem, tile: tuple[int, int], arch: str) -> str | None:
    """Why Triton cannot run this, or None."""
    if not (arch == "interpreter" or arch.startswith(("sm_", "gfx"))):
        return f"Triton has no kernels for {arch}"
    if arch.startswith("sm_") and int(arch[3:]) < 80:
        return f"{arch} is older than sm_80 (Ampere)"
    if problem.dtype == torch.float64:
        return "Triton kernels compute in float16, bfloat16 or float32, not in float64"
    if any(size < 16 or size & (size - 1) for size in tile):
        return f"the map's tile is {tile[0]} x {tile[1]}; Triton needs powers of two from 16 on, e.g. tile=128"
    return None


def _check(kernel: str, tiles: Tiles, tile: tuple[int, int], need: _Need) -> None:
    """Raise UnsupportedError where the user's tiles cannot run."""
    for name, block, size in (("BLOCK_Q", tiles.BLOCK_Q, tile[0]), ("BLOCK_KV", tiles.BLOCK_KV, tile[1])):
        if block < 16 or block & (block - 1) or size % block:
            raise UnsupportedError(
                f"config.{kernel}: {name}={block} must be a power of two from 16 on that divides the map's tile of {size}"
            )
    if _shared(kernel, tiles, need) > need.limit:
        raise UnsupportedError(
            f"config.{kernel}: {tiles} takes about {_shared(kernel, tiles, need)} bytes of shared memory and the device has "
            f"{need.limit}. Try fewer stages or smaller tiles"
        )


def _fit(kernel: str, tiles: Tiles, tile: tuple[int, int], need: _Need) -> Tiles:
    """tiles that divide the map's and, by fewer stages and then smaller tiles, fit the shared memory."""
    tiles = replace(tiles, BLOCK_Q=min(tiles.BLOCK_Q, tile[0]), BLOCK_KV=min(tiles.BLOCK_KV, tile[1]))
    while _shared(kernel, tiles, need) > need.limit:
        if tiles.num_stages > 1:
            tiles = replace(tiles, num_stages=tiles.num_stages - 1)
        elif tiles.BLOCK_KV >= tiles.BLOCK_Q:
            tiles = replace(tiles, BLOCK_KV=tiles.BLOCK_KV // 2)
        else:
            tiles = replace(tiles, BLOCK_Q=tiles.BLOCK_Q // 2)
    return tiles


def _shared(kernel: str, tiles: Tiles, need: _Need) -> int:
    return shared_memory(kernel, tiles, need.D, need.Dv, need.itemsize, need.arithmetic)
