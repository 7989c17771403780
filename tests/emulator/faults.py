"""Small kernels with one mistake each, which the emulator must find; and products of all layouts, to get right.

product_kernel: C = A @ B^T of one tile, by TMA, wgmma and TMA, on four warps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.emulator.arithmetic import EmulatorError
from tests.emulator.launch import Emulator
from tests.emulator.shadow import Race

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@gluon.jit
def product_kernel(
    a_map,
    b_map,
    c_map,
    M: gl.constexpr,
    N: gl.constexpr,
    A_IS_TRANSPOSED: gl.constexpr,
    B_IS_TRANSPOSED: gl.constexpr,
    A_IN_REGISTERS: gl.constexpr,
    FAULT: gl.constexpr,
):
    """a [M, K] or [K, M], b [N, K] or [K, N], c [M, N] f32."""
    a = gl.allocate_shared_memory(a_map.dtype, a_map.block_type.shape, a_map.layout)
    b = gl.allocate_shared_memory(b_map.dtype, b_map.block_type.shape, b_map.layout)
    c = gl.allocate_shared_memory(c_map.dtype, c_map.block_type.shape, c_map.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=2 if FAULT == "another count" else 1)
    if FAULT != "an unfenced mbarrier":
        fence_async_shared()
    LESS: gl.constexpr = 16 if FAULT == "fewer bytes" else 0
    mbarrier.expect(full, a_map.block_type.nbytes + b_map.block_type.nbytes - LESS)
    tma.async_copy_global_to_shared(a_map, [0, 0], full, a)
    tma.async_copy_global_to_shared(b_map, [0, 0], full, b)
    if FAULT != "no wait for the load":
        mbarrier.wait(full, 1 if FAULT == "a wait for another phase" else 0)
    if FAULT == "two waits":
        mbarrier.wait(full, 1)
    C_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    left = a.permute((1, 0)) if A_IS_TRANSPOSED else a
    right = b if B_IS_TRANSPOSED else b.permute((1, 0))
    if A_IN_REGISTERS:
        left = left.load(gl.DotOperandLayout(0, C_LAYOUT, 2))
    acc = warpgroup_mma(left, right, gl.zeros([M, N], gl.float32, C_LAYOUT), is_async=True)
    if FAULT == "no wait for the product":
        mbarrier.expect(full, a_map.block_type.nbytes)
        tma.async_copy_global_to_shared(a_map, [0, 0], full, a)
        mbarrier.wait(full, 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    c.store(acc)
    if FAULT != "no fence":
        fence_async_shared()
    tma.async_copy_shared_to_global(c_map, [0, 0], c)
    if FAULT == "a store into a tile in flight":
        c.store(acc)
    if FAULT != "no wait for the store":
        tma.store_wait(0)


@triton.jit
def beyond_kernel(x, out, size, BEYOND: tl.constexpr):
    place = tl.arange(0, 128)
    tl.store(out + place, tl.load(x + place + BEYOND, mask=place < size))


@gluon.jit
def meeting_kernel(COUNT: gl.constexpr):
    """Four warps come to a barrier of COUNT threads."""
    ASM: gl.constexpr = meeting_asm(COUNT)
    gl.inline_asm_elementwise(ASM, "=r,r,~{memory}", [gl.to_tensor(5)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def meeting_asm(count):
    return f"barrier.sync $1, {count}; mov.u32 $0, 0;"


def descriptor(x: Tensor) -> Any:
    """Of the whole tensor as one block."""
    layout = gl.NVMMASharedLayout.get_default_for(list(x.shape), DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(x.shape), layout)


def product(
    M: int = 64,
    N: int = 64,
    K: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    is_a_transposed: bool = False,
    is_b_transposed: bool = False,
    is_a_in_registers: bool = False,
    fault: str = "",
    seed: int = 0,
) -> None:
    """Raises where the product is wrong, or the emulator finds something."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, K, generator=generator).to(dtype) for rows in (M, N))
    given = (a.mT.contiguous() if is_a_transposed else a, b.mT.contiguous() if is_b_transposed else b)
    c = torch.full((M, N), float("nan"))
    with Emulator(seed):
        product_kernel[(1,)](
            *map(descriptor, (*given, c)), M, N, is_a_transposed, is_b_transposed, is_a_in_registers, fault, num_warps=4
        )
    np.testing.assert_allclose(c.numpy(), (a.double() @ b.double().mT).numpy(), rtol=1e-5, atol=1e-5)


def beyond(num_beyond: int) -> None:
    """Reads 100 numbers, the last one so far past the end of the tensor."""
    with Emulator():
        beyond_kernel[(1,)](torch.zeros(100), torch.zeros(128), 100, num_beyond)


def meeting(count: int) -> None:
    with Emulator():
        meeting_kernel[(1,)](count, num_warps=4)


# What must be right: wgmma reads rows of 32, 64 and 128 bytes, and several such side by side.
PRODUCTS: dict[str, dict[str, Any]] = {
    f"{'A^T ' * a}{'B ' if b else 'B^T '}M {M} N {N} K {K}": {
        "M": M,
        "N": N,
        "K": K,
        "is_a_transposed": a,
        "is_b_transposed": b,
    }
    for a in (False, True)
    for b in (False, True)
    for M, N, K in ((64, 16, 16), (64, 32, 32), (64, 64, 64), (128, 128, 128), (64, 256, 32))
}
PRODUCTS |= {
    "A in registers": {"is_a_in_registers": True},
    "A in registers, float16": {"is_a_in_registers": True, "dtype": torch.float16, "is_b_transposed": True},
    "float16": {"dtype": torch.float16},
}
# What must raise: the call, the kind of error, a regular expression of its message.
FAULTS: dict[str, tuple[Callable[[], None], type[Exception], str]] = {
    fault: (lambda fault=fault: product(fault=fault), kind, message)
    for fault, kind, message in (
        ("another count", EmulatorError, "all warps wait"),
        ("an unfenced mbarrier", Race, "without a fence"),
        ("fewer bytes", EmulatorError, "all warps wait"),
        ("no wait for the load", Race, "a TMA load may still write"),
        ("a wait for another phase", EmulatorError, "may still write|all warps wait"),  # by the order of events
        ("two waits", EmulatorError, "all warps wait"),
        ("no wait for the product", Race, "wgmma of warp"),
        ("no fence", Race, "without a fence"),
        ("a store into a tile in flight", Race, "a TMA store of warp"),
        ("no wait for the store", Race, "has not waited"),
    )
}
FAULTS |= {
    "one past the end": (lambda: beyond(1), EmulatorError, "in no tensor"),
    "far past the end": (lambda: beyond(1 << 20), EmulatorError, "in no tensor"),
    "before the start": (lambda: beyond(-1), EmulatorError, "in no tensor"),
    "a meeting of too many": (lambda: meeting(160), EmulatorError, "all warps wait"),
    "a meeting of too few": (lambda: meeting(96), EmulatorError, "all warps wait"),
}


def check_faults() -> list[str]:
    """What is not as it must be."""
    complaints = []
    beyond(0)
    meeting(128)
    for name, options in PRODUCTS.items():
        for seed in range(2):
            try:
                product(**options, seed=seed)
            except (EmulatorError, AssertionError) as error:
                complaints.append(f"{name}: {error}")
    for name, (call, kind, message) in FAULTS.items():
        try:
            call()
        except EmulatorError as error:
            if not isinstance(error, kind) or not re.search(message, str(error)):
                complaints.append(f"{name}: {type(error).__name__} {error}")
        else:
            complaints.append(f"{name}: nothing was found")
    return complaints
