"""choose(problem, ...): which backend runs a call, and with which tiles. Pure: no Triton, testable anywhere."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anymask.blocks.sparsity import Sparsity, sparsity_of
from anymask.errors import UnsupportedError
from anymask.expr.bindings import Bindings
from anymask.expr.emit import is_costly
from anymask.expr.mods import Mods
from anymask.kernels.configs import (
    FAMILIES,
    RAGGED_BYTES,
    REGULAR_BYTES,
    SEGMENTED_BYTES,
    SHARED_LIMITS,
    AnyConfig,
    Config,
    HopperBackwardConfig,
    HopperConfig,
    HopperDqConfig,
    hopper_backward_config,
    hopper_backward_default,
    hopper_config,
    hopper_dq_config,
    lookup,
)
from anymask.kernels.footprint import (
    Need,
    chunks,
    hopper_backward_shared_memory,
    hopper_dq_shared_memory,
    hopper_shared_memory,
    shared_memory,
)
from anymask.problem import Problem

BACKENDS = ("gluon", "triton", "eager", "reference")
KERNELS = ("forward", "dkdv", "dq")


@dataclass(frozen=True)
class Plan:
    """What launch obeys. All but backend, arch and why are for Triton.

    backend: "gluon" where the forward is the Hopper kernel.  dkdv: of the Hopper kernel where that computes dK and dV;
    dq is None where it computes dQ too.  dq: of the Hopper kernel beside that of dK and dV.
    precision: of float32 products, "ieee" or "tf32".  shared_bytes: heads run together while what their programs read
    in common stays below the first number, and those at the end while it stays below the second.
    """

    backend: str
    arch: str = ""
    forward: Config | HopperConfig | None = None
    dkdv: Config | HopperBackwardConfig | None = None
    dq: Config | HopperDqConfig | None = None
    precision: str = "ieee"
    shared_bytes: tuple[int, int] = (0, 0)
    why: str = ""

    @property
    def has_kernels(self) -> bool:
        """It is for kernels/launch.py."""
        return self.backend in ("gluon", "triton")

    @property
    def is_ptx(self) -> bool:
        """The kernels are for an NVIDIA GPU."""
        return self.arch.startswith("sm_")


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
    bindings: Bindings | None = None,
    backend: str | None = None,
    config: Mapping[str, AnyConfig | Mapping[str, Any]] | None = None,
    deterministic: bool | None = None,
    tma_obstacle: str | None = None,
) -> Plan:
    """The plan of a call whose map has tiles of `tile` (queries, keys) on `arch` (see arch_of).

    bindings: what mods capture; None: the plan does not ask how much the mask shows.
    backend: None for the best that can do it.  config: by kernel ("forward", "dkdv", "dq") a Config, or some of its
    fields by name, instead of the row's; for the forward of "gluon" those of HopperConfig; for "dkdv" those of
    HopperBackwardConfig, is_fused among them, ask for the Hopper kernel; then for "dq" those of HopperDqConfig,
    num_v_stages among them, for the Hopper one, any others for the portable one. All are obeyed or raise
    UnsupportedError.
    deterministic: every kernel is but the Hopper backward where is_fused, which is taken without.  tma_obstacle: what
    keeps TMA from reading q, k and v (see tma_obstacle_of).
    """
    if backend is not None and backend not in BACKENDS:
        raise UnsupportedError(f"backend={backend!r} is none of {', '.join(BACKENDS)}")
    obstacle = _obstacle(problem, tile, arch)
    if backend in ("gluon", "triton") and obstacle:
        raise UnsupportedError(f"backend={backend!r} cannot run this: {obstacle}. backend='eager' can")
    why_no_hopper = _gluon_obstacle(problem.D, problem.Dv, problem.dtype, arch, _triton_version()) or tma_obstacle
    why_no_gluon = why_no_hopper
    if backend == "gluon" and why_no_gluon:
        raise UnsupportedError(f"backend='gluon' cannot run this: {why_no_gluon}. backend='triton' can")
    if backend is None:
        if min(problem.D, problem.Dv) < 16:
            why_no_gluon = why_no_gluon or f"it has not been measured with D {problem.D} and Dv {problem.Dv}"
        if min(tile) < 64:
            why_no_gluon = why_no_gluon or f"the map's tiles of {tile[0]} x {tile[1]} are for smaller ones than its"
        if config and "forward" in config:
            why_no_gluon = why_no_gluon or "config= sets the portable forward"
    elif backend == "triton":
        why_no_gluon = why_no_hopper = "backend='triton'"
    hopper = hopper_backward = hopper_dq = None
    if not (obstacle or why_no_gluon):
        kinds = kinds_of(mods, _sparsity(problem, mods, bindings))
        hopper = hopper_config(problem.D, problem.Dv, problem.Sq, problem.Skv, tile[0], kinds)
        if not (config and {"dkdv", "dq"} & set(config)):
            length = min(problem.Sq, problem.Skv) if backend is None else 1 << 62
            hopper_backward = hopper_backward_config(
                problem.D, problem.Dv, length, problem.Skv, bool(deterministic), kinds
            )
            hopper_dq = hopper_backward and _hopper_dq_beside(hopper_backward, problem, kinds)
    if backend is None:
        backend = "eager" if obstacle or arch == "interpreter" else "triton" if why_no_gluon else "gluon"
    if backend not in ("gluon", "triton"):
        if config:
            raise UnsupportedError(
                f"config= is for Triton kernels, and this runs on {backend!r} ({obstacle or 'forced'})"
            )
        return Plan(backend, arch, why=f"{backend} on {arch}" + (f": {obstacle}" if obstacle else ""))

    unknown = set(config or ()) - set(KERNELS)
    if unknown:
        raise UnsupportedError(f"config= has the keys {sorted(unknown)}; it takes {', '.join(KERNELS)}")
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    dims = problem.D, problem.Dv, problem.dtype
    plan = _tuned(*dims, mods, tile, arch, precision, hopper, hopper_backward, hopper_dq, why_no_gluon)
    if not config:
        return plan
    need = Need.of(problem.D, problem.Dv, problem.dtype, mods, family_of(arch))
    wanted: dict[str, Any] = {}
    for kernel in (kernel for kernel in KERNELS if kernel in config):
        default = getattr(plan, kernel)
        if kernel == "dkdv" and _is_hopper_backward(config[kernel]):
            wanted |= _hopper_backward(config, why_no_hopper, deterministic, problem, mods)
        elif kernel == "dq" and _is_hopper_dq(config[kernel]):
            wanted[kernel] = _hopper_dq(config, problem, mods)
        elif isinstance(default, HopperConfig):
            wanted[kernel] = _override_hopper(default, config[kernel], tile, problem.D, problem.Dv)
        else:
            wanted[kernel] = _override(kernel, default, config[kernel], need)
    plan = replace(plan, **wanted)
    says = ", ".join(f"{name} {wanted[name]}" for name in wanted if wanted[name])
    return replace(plan, why=f"{plan.why}; config= sets {says}")


def _sparsity(problem: Problem, mods: Mods, bindings: Bindings | None) -> Sparsity | None:
    """None where it is not known on the host."""
    if bindings is None or mods.is_ragged or not mods.has_mask or 0 in (problem.B, problem.Hq, problem.Sq, problem.Skv):
        return None
    return sparsity_of(mods.mask, bindings, problem.B, problem.Hq, problem.Sq, problem.Skv)


@functools.lru_cache(maxsize=4096)
def kinds_of(mods: Mods, sparsity: Sparsity | None = None) -> frozenset[str]:
    """What a row of configs.py may be for only (HopperRow)."""
    is_regular = not (mods.is_ragged or mods.has_score)
    kinds = {
        "dense": is_regular and not mods.has_mask,
        "regular": is_regular,
        "ragged": mods.is_ragged and not mods.has_score,
        "segmented": mods.is_segmented,
        "costly": is_costly(mods.mask),
        "fine": sparsity is not None and sparsity.big > 1.2 * sparsity.small,
        "short": is_regular and sparsity is not None and sparsity.small <= 640,
    }
    return frozenset(kind for kind, holds in kinds.items() if holds)


@functools.lru_cache(maxsize=4096)
def _tuned(
    D: int,
    Dv: int,
    dtype: torch.dtype,
    mods: Mods,
    tile: tuple[int, int],
    arch: str,
    precision: str,
    hopper: HopperConfig | None,
    hopper_backward: HopperBackwardConfig | None,
    hopper_dq: HopperDqConfig | None,
    why_no_gluon: str | None,
) -> Plan:
    """The plan that the tuning rows give.

    hopper, hopper_backward: of both ways, None: it is the portable one. hopper_dq: beside hopper_backward, None where
    that is portable, or computes dQ too.  why_no_gluon: for the forward.
    """
    family = family_of(arch)
    arithmetic = "half" if dtype.itemsize == 2 else "ieee" if family == "interpreter" else precision
    need = Need.of(D, Dv, dtype, mods, family)
    row = lookup(family, arithmetic, max(need.D, need.Dv), mods.has_mask, mods.has_score)
    chosen: dict[str, Any] = {kernel: _fit(kernel, getattr(row, kernel), tile, need) for kernel in KERNELS}
    backend = runs = "triton"
    if hopper:
        backend, chosen["forward"] = "gluon", hopper
        runs = "gluon forward and triton backward"
    if hopper_backward:
        runs = "gluon"
        chosen |= {"dkdv": hopper_backward, "dq": hopper_dq}
    says = "; ".join(f"{kernel} {chosen[kernel]}" for kernel in KERNELS if chosen[kernel])
    works = " with a score function" if mods.has_score else ""
    why = f"{runs} on {arch}, {arithmetic}, D {D}, Dv {Dv}{works}: {says}"
    if family == "sm_90" and why_no_gluon:
        why += f"; no gluon forward: {why_no_gluon}"
    return Plan(backend, arch, **chosen, precision=precision, shared_bytes=_shared_bytes(mods), why=why)


def _shared_bytes(mods: Mods) -> tuple[int, int]:
    """See Plan."""
    if mods.is_segmented:
        return SEGMENTED_BYTES
    if mods.is_ragged:
        return RAGGED_BYTES
    return REGULAR_BYTES if mods.has_mask else (0, 0)


def default_tile(device_type: str, length: int) -> tuple[int, int]:
    """The tile of a map that nobody chose, (queries, keys), for the longer of Sq and Skv.

    On a GPU 64 x 64: of 16,384 tokens in 14 documents, causal, it visits 1.08 times the visible pairs, and
    128 x 128 1.18 times with twice the masked work. Beyond 65,536 and 524,288 tokens bigger ones keep the map small.
    On a CPU 128 x 64: 8,192 packed tokens forward and backward 276 ms, 128 x 128 297 ms (2 cores, 2026-11-22).
    """
    if device_type == "cpu":
        return 128, 64
    if length > 524288:
        return 256, 256
    return (64, 64) if length <= 65536 else (128, 128)


# A walk's tile, a multiple of the map's, and whether its rows are KV tiles, as dK and dV need.
Shape = tuple[tuple[int, int], bool]


@functools.lru_cache(maxsize=4096)
def walk_shapes(plan: Plan, tile: tuple[int, int]) -> tuple[Shape, ...]:
    """The shapes of the walks that KERNELS take of a map of this tile: the bigger of its tile and the kernel's.

    Where dkdv computes dQ too, its walk stands for that of dq.
    """
    shapes = {}
    for kernel in KERNELS:
        config: AnyConfig | None = getattr(plan, kernel)
        if config is not None:
            shapes[kernel] = (max(tile[0], config.BLOCK_Q), max(tile[1], config.BLOCK_KV)), kernel == "dkdv"
    return tuple(shapes.get(kernel, shapes["dkdv"]) for kernel in KERNELS)


def is_walked(plan: Plan, kernel: str, has_mask: bool) -> bool:
    """Whether this kernel walks the map. Without a mask the others count all tiles, but the portable dK/dV walks.

    Counted, its products are issued later, and dQ's are not: H200, no mask, D 64, dK/dV 4960 counted, 4095 us walked,
    dQ 2586 and 2951; D 128 3705 and 3814, 2624 and 2542.
    """
    return has_mask or (kernel == "dkdv" and isinstance(plan.dkdv, Config))


def family_of(arch: str) -> str:
    """The family whose limits and rows an architecture shares."""
    if arch.startswith("gfx"):
        return "gfx942"
    if arch in SHARED_LIMITS:
        return arch
    return FAMILIES.get(arch, "sm_86")  # an unknown NVIDIA device: the family that asks for least


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


GLUON_VERSIONS = ("3.6",)  # of Triton, whose Gluon the kernels are written in and compiled with


@functools.lru_cache
def _triton_version() -> str:
    """Of the installed Triton, which is not imported; "" without one."""
    for package in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


@functools.lru_cache(maxsize=4096)
def _gluon_obstacle(D: int, Dv: int, dtype: torch.dtype, arch: str, triton_version: str) -> str | None:
    """Why the Hopper forward cannot run this, whatever its tensors, or None."""
    if arch != "sm_90":
        return f"Gluon kernels are for sm_90, not {arch}"
    if dtype.itemsize != 2:
        return f"Gluon kernels compute in float16 and bfloat16, not in {dtype}"
    if max(D, Dv) > 256:
        return f"Gluon kernels take D and Dv up to 256, not {D} and {Dv}"
    if ".".join(triton_version.split(".")[:2]) not in GLUON_VERSIONS:
        return f"Gluon kernels are for Triton {', '.join(GLUON_VERSIONS)}, not {triton_version or 'none'}"
    return None


def tma_obstacle_of(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What keeps TMA from reading these tensors where they lie, or None."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_readable_by_tma(x):
            obstacle = _stride_obstacle(x.shape, x.stride(), x.dtype.itemsize)
            if obstacle:
                return f"{name} has the strides {x.stride()}: {obstacle}"
            return f"{name} does not begin at a multiple of 16 bytes"
    return None


def is_readable_by_tma(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and _stride_obstacle(x.shape, x.stride(), x.dtype.itemsize) is None


@functools.lru_cache(maxsize=4096)
def _stride_obstacle(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> str | None:
    if strides[3] != 1:
        return "TMA wants a contiguous last dimension"
    used = [stride * itemsize for size, stride in zip(shape[:3], strides[:3], strict=True) if size > 1]
    if any(stride % 16 or not 0 < stride < 1 << 40 for stride in used):
        return "TMA wants strides that are multiples of 16 bytes, not 0 and below 2^40"
    return None


def _override_hopper(default: HopperConfig, wanted: Any, tile: tuple[int, int], D: int, Dv: int) -> HopperConfig:
    """The user's config of the Hopper forward, checked."""
    try:
        config = wanted if isinstance(wanted, HopperConfig) else replace(default, **wanted)
    except TypeError:
        raise UnsupportedError(
            f"config['forward'] = {wanted} should name BLOCK_Q, BLOCK_KV, num_stages, has_turns or is_persistent of "
            "the Gluon forward"
        ) from None
    # a step waits for its values before it gives up those of the step before; there are barriers for four stages
    if config.BLOCK_Q not in (64, 128, 192) or config.BLOCK_KV not in (64, 128) or not 2 <= config.num_stages <= 4:
        raise UnsupportedError(
            "config['forward']: the Gluon forward takes BLOCK_Q 64, 128 or 192, BLOCK_KV 64 or 128, num_stages from 2 "
            f"to 4: {config}"
        )
    if max(config.BLOCK_Q, tile[0]) % min(config.BLOCK_Q, tile[0]):
        raise UnsupportedError(f"config['forward']: BLOCK_Q={config.BLOCK_Q} and the map's {tile[0]}: none divides")
    if config.num_consumers != 2 and max(chunks(Dv)) > 128:
        raise UnsupportedError(f"config['forward']: with Dv {Dv} BLOCK_Q is 128, not {config.BLOCK_Q}")
    if config.has_turns and config.num_consumers == 1:
        raise UnsupportedError("config['forward']: two or three warpgroups take turns, not one")
    size, limit = hopper_shared_memory(config, D, Dv), SHARED_LIMITS["sm_90"]
    if size > limit:
        raise UnsupportedError(
            f"config['forward']: {config} takes {size} bytes of shared memory of {limit}. Try fewer stages"
        )
    return config


def _is_hopper_backward(wanted: Any) -> bool:
    return isinstance(wanted, HopperBackwardConfig) or (isinstance(wanted, Mapping) and "is_fused" in wanted)


def _hopper_backward(
    config: Mapping[str, Any], why_not: str | None, deterministic: bool | None, problem: Problem, mods: Mods
) -> dict[str, Any]:
    """What the user's config["dkdv"] makes of the plan, checked. why_not: why no Hopper kernel can run."""
    wanted = config["dkdv"]
    if why_not:
        raise UnsupportedError(
            f"config['dkdv'] = {wanted} asks for the Gluon backward, which cannot run this: {why_not}"
        )
    D, Dv = problem.D, problem.Dv
    try:
        default = hopper_backward_default(D, Dv)
        chosen = wanted if isinstance(wanted, HopperBackwardConfig) else replace(default, **wanted)
    except TypeError:
        raise UnsupportedError(
            f"config['dkdv'] = {wanted} should name is_fused, is_split, num_consumers, BLOCK_Q, num_stages, "
            "is_persistent and num_key_tiles of the Gluon backward"
        ) from None
    if chosen.num_consumers not in (1, 2):
        raise UnsupportedError(f"config['dkdv']: the Gluon backward has 1 or 2 consumers, not {chosen.num_consumers}")
    if chosen.is_fused and chosen.num_consumers == 1:
        raise UnsupportedError("config['dkdv']: one consumer leaves dq to another kernel. Try is_fused=False")
    if chosen.is_fused and deterministic:
        raise UnsupportedError(
            "config['dkdv']: where is_fused, the Gluon backward adds up dq in any order, and deterministic=True was "
            "asked for. Try is_fused=False"
        )
    if chosen.is_persistent and not chosen.is_fused:
        raise UnsupportedError("config['dkdv']: the Gluon backward is persistent only where is_fused")
    if chosen.num_key_tiles not in (1, 2) or (chosen.num_key_tiles == 2 and not chosen.is_persistent):
        raise UnsupportedError(
            f"config['dkdv']: num_key_tiles is 1, or 2 where is_persistent, not {chosen.num_key_tiles}"
        )
    if chosen.is_split == (max(D, Dv) <= 128):
        raise UnsupportedError(f"config['dkdv']: is_split is for D or Dv above 128, and they are {D} and {Dv}")
    if chosen.is_split and (chosen.is_fused or chosen.num_consumers == 1):
        raise UnsupportedError(
            f"config['dkdv']: with D {D} and Dv {Dv} dq is a kernel of its own, and one consumer has dk, another dv. "
            "Try is_fused=False, num_consumers=2"
        )
    if chosen.BLOCK_Q != 64 and not (chosen.BLOCK_Q == 128 and chosen.num_consumers == 2 and max(D, Dv) <= 64):
        raise UnsupportedError(
            "config['dkdv']: the Gluon backward takes BLOCK_Q 64, or, with two consumers and D and Dv of at most 64, "
            f"128: {chosen} for D {D} and Dv {Dv}"
        )
    if chosen.is_fused and "dq" in config:
        raise UnsupportedError("config['dq']: the Gluon backward computes dq too where is_fused. Try is_fused=False")
    size, limit = hopper_backward_shared_memory(chosen, D, Dv), SHARED_LIMITS["sm_90"]
    fewest = 2 if chosen.is_split else 1  # split, a step reads queries of the step before
    if not fewest <= chosen.num_stages <= 3 or size > limit:
        raise UnsupportedError(
            f"config['dkdv']: the Gluon backward takes num_stages from {fewest} to 3 and {limit} bytes of shared "
            f"memory: {chosen} would take {size}"
        )
    of_dq = {} if "dq" in config else {"dq": _hopper_dq_beside(chosen, problem, kinds_of(mods))}
    return {"dkdv": chosen, **of_dq}


def _hopper_dq_beside(backward: HopperBackwardConfig, problem: Problem, kinds: frozenset[str]) -> HopperDqConfig | None:
    """None where dq is fused with dk and dv."""
    if backward.is_fused:
        return None
    beside = frozenset(("lone",)) if backward.num_consumers == 1 else frozenset()
    return hopper_dq_config(problem.D, problem.Dv, problem.Skv, kinds | beside)


def _is_hopper_dq(wanted: Any) -> bool:
    return isinstance(wanted, HopperDqConfig) or (isinstance(wanted, Mapping) and "num_v_stages" in wanted)


def _hopper_dq(config: Mapping[str, Any], problem: Problem, mods: Mods) -> HopperDqConfig:
    """The user's config["dq"] of the Hopper kernel, checked; that of config["dkdv"] is checked by itself."""
    wanted = config["dq"]
    if not _is_hopper_backward(config.get("dkdv")):
        raise UnsupportedError(
            f"config['dq'] = {wanted} asks for the Gluon dq, which goes with the Gluon backward: add 'dkdv': "
            "{'is_fused': False}"
        )
    try:
        default = hopper_dq_config(problem.D, problem.Dv, problem.Skv, kinds_of(mods))
        chosen = wanted if isinstance(wanted, HopperDqConfig) else replace(default, **wanted)
    except TypeError:
        raise UnsupportedError(
            f"config['dq'] = {wanted} should name BLOCK_KV, num_v_stages and num_consumers of the Gluon dq"
        ) from None
    size, limit = hopper_dq_shared_memory(chosen, problem.D, problem.Dv), SHARED_LIMITS["sm_90"]
    if (
        chosen.BLOCK_KV not in (64, 128)
        or chosen.num_v_stages not in (1, 2, 3, 4)
        or chosen.num_consumers not in (1, 2)
        or size > limit
    ):
        raise UnsupportedError(
            f"config['dq']: the Gluon dq takes BLOCK_KV 64 or 128, num_v_stages from 1 to 4, 1 or 2 consumers and "
            f"{limit} bytes of shared memory: {chosen} would take {size}"
        )
    return chosen


def _override(kernel: str, default: Config, wanted: Any, need: Need) -> Config:
    """The user's config, checked."""
    try:
        config = wanted if isinstance(wanted, Config) else replace(default, **wanted)
    except TypeError:
        raise UnsupportedError(
            f"config[{kernel!r}] = {wanted} should name BLOCK_Q, BLOCK_KV, num_warps or num_stages"
        ) from None
    for name, block in (("BLOCK_Q", config.BLOCK_Q), ("BLOCK_KV", config.BLOCK_KV)):
        if block < 16 or block > 256 or block & (block - 1):
            raise UnsupportedError(f"config[{kernel!r}]: {name}={block} must be a power of two from 16 to 256")
    if config.num_warps not in (1, 2, 4, 8, 16) or config.num_stages < 1:
        raise UnsupportedError(f"config[{kernel!r}]: num_warps is 1, 2, 4, 8 or 16 and num_stages 1 or more: {config}")
    limit = SHARED_LIMITS[need.family]
    if shared_memory(kernel, config, need) > limit:
        raise UnsupportedError(
            f"config[{kernel!r}]: {config} can take {shared_memory(kernel, config, need)} bytes of shared memory "
            f"of {limit}. Try fewer stages or smaller tiles"
        )
    return config


def _fit(kernel: str, config: Config, tile: tuple[int, int], need: Need) -> Config:
    """config with tiles as small as the map's where those are below 64, and smaller until it fits the shared memory.

    First two stages, then tiles down to 32, then one stage, then tiles down to 16.
    """
    block_q, block_kv = (
        min(block, size) if size < 64 else block
        for block, size in zip((config.BLOCK_Q, config.BLOCK_KV), tile, strict=True)
    )
    config = replace(config, BLOCK_Q=block_q, BLOCK_KV=block_kv)
    for num_stages, smallest in ((2, 32), (1, 16)):
        while shared_memory(kernel, config, need) > SHARED_LIMITS[need.family]:
            if config.num_stages > num_stages:
                config = replace(config, num_stages=config.num_stages - 1)
                continue
            name = "BLOCK_KV" if config.BLOCK_KV >= config.BLOCK_Q else "BLOCK_Q"
            size = getattr(config, name)
            if size <= smallest:
                break
            config = replace(config, **{name: size // 2})
    return config
