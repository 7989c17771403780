"""A small case of each kernel, to be run under NVIDIA's compute-sanitizer; each result is checked too.

    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/sanitize.py --only "hopper causal"
    compute-sanitizer --tool synccheck --error-exitcode 1 python benchmarks/sanitize.py --only "triton|hopper"

Masked cases also run the kernels that build maps and walks. Each case runs twice: the second time by prepared launches.

`control` is a kernel of nothing but roles, and numbers that one writes, then arrives at an mbarrier for which others
wait before they read: what PTX asks for. racecheck reports it all the same, for these numbers and for how Triton hands
arguments to roles. A Hopper kernel is clean where racecheck reports nothing but these two.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask import attention, block_map
from anymask.kernels.hopper_pipeline import RowQueue
from anymask.testing import check, inputs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cases import MASKS, SCORES, Sizes
from plain import expected

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """sizes: B Hq Hkv Sq Skv D Dv.  mask, score: of the zoo, "" for none.  forward, dkdv: their configs."""

    backend: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    mask: str = ""
    score: str = ""
    forward: dict[str, Any] = field(default_factory=dict)
    dkdv: dict[str, Any] = field(default_factory=dict)


# Hopper configs by their consumers.
ONE: dict[str, Any] = {"BLOCK_Q": 64, "BLOCK_KV": 64, "num_stages": 2, "has_turns": False, "is_persistent": False}
TWO = ONE | {"BLOCK_Q": 128, "BLOCK_KV": 128, "has_turns": True}
THREE = TWO | {"BLOCK_Q": 192, "num_stages": 3}
PERSISTENT = {"is_persistent": True}
# the Hopper backward, with dQ in it, also with 128 queries a step, and without dQ
FUSED, APART = {"is_fused": True}, {"is_fused": False}
WIDE = FUSED | {"BLOCK_Q": 128, "num_stages": 2}
LONE = {"is_fused": False, "num_consumers": 1}
MANY = (150, 2, 1, 130, 140)  # more rows than multiprocessors have programs at a time

CASES = {
    "triton unmasked": Case("triton", (1, 1, 1, 200, 270, 64, 64), F16),
    "triton causal": Case("triton", (1, 2, 2, 256, 256, 64, 64), BF16, "causal_top_left"),
    "triton documents, GQA": Case("triton", (1, 2, 1, 200, 270, 128, 64), BF16, "documents_causal"),
    "triton softcap and ALiBi": Case("triton", (1, 1, 1, 200, 270, 64, 128), F16, "", "capped_and_biased"),
    "triton mode 1, bias, GQA": Case("triton", (1, 2, 1, 150, 170, 40, 24), BF16, "mode_1", "relative_bias"),
    "triton float32": Case("triton", (1, 2, 1, 150, 170, 40, 24), F32, "random_tensor", "full_bias"),
    "hopper unmasked": Case("gluon", (1, 1, 1, 200, 270, 128, 128), BF16, forward=TWO),
    "hopper causal": Case("gluon", (1, 2, 2, 256, 256, 128, 128), BF16, "causal_top_left", forward=TWO),
    "hopper documents, GQA": Case("gluon", (1, 2, 1, 200, 270, 128, 64), BF16, "documents_causal", forward=TWO),
    "hopper softcap and ALiBi": Case("gluon", (1, 1, 1, 200, 270, 64, 128), F16, "", "capped_and_biased", TWO),
    "hopper mode 1, bias, GQA": Case("gluon", (1, 2, 1, 200, 270, 64, 64), BF16, "mode_1", "relative_bias", TWO),
    "hopper one consumer": Case("gluon", (1, 1, 1, 300, 270, 64, 64), BF16, "documents_causal", forward=ONE),
    "hopper three consumers": Case("gluon", (1, 1, 1, 300, 270, 64, 64), BF16, "causal_top_left", forward=THREE),
    "hopper two chunks": Case("gluon", (1, 1, 1, 200, 270, 72, 96), BF16, "causal_top_left"),
    "hopper two chunks, 64 keys": Case("gluon", (1, 1, 1, 200, 270, 192, 192), BF16),
    "hopper persistent": Case("gluon", (*MANY, 128, 128), BF16, forward=TWO | PERSISTENT),
    "hopper persistent, one consumer": Case(
        "gluon", (*MANY, 64, 64), BF16, "documents_causal", forward=ONE | PERSISTENT
    ),
    "hopper persistent, three consumers": Case(
        "gluon", (*MANY, 64, 64), BF16, "causal_top_left", forward=THREE | PERSISTENT
    ),
    "hopper backward unmasked": Case("gluon", (1, 1, 1, 200, 270, 128, 128), BF16, dkdv=FUSED),
    "hopper backward unmasked, apart": Case("gluon", (1, 1, 1, 300, 270, 64, 64), BF16, dkdv=APART),
    "hopper backward documents, GQA": Case("gluon", (1, 2, 1, 200, 270, 128, 64), BF16, "documents_causal", dkdv=FUSED),
    "hopper backward documents, GQA, one consumer": Case(
        "gluon", (1, 2, 1, 200, 270, 128, 64), BF16, "documents_causal", dkdv=LONE
    ),
    "hopper backward, 128 queries": Case("gluon", (1, 1, 1, 300, 270, 64, 40), F16, "window", dkdv=WIDE),
    "hopper backward persistent": Case("gluon", (*MANY, 128, 128), BF16, "causal_top_left", dkdv=FUSED | PERSISTENT),
    "hopper backward persistent, 128 queries": Case("gluon", (*MANY, 64, 40), F16, "window", dkdv=WIDE | PERSISTENT),
    "hopper backward softcap and ALiBi": Case(
        "gluon", (1, 1, 1, 200, 270, 64, 128), F16, "", "capped_and_biased", dkdv=FUSED
    ),
    "hopper backward split": Case("gluon", (1, 2, 1, 200, 270, 192, 128), BF16, "documents_causal", dkdv=APART),
    "hopper backward mode 1, bias, GQA, apart": Case(
        "gluon", (1, 2, 1, 200, 270, 64, 64), BF16, "mode_1", "relative_bias", dkdv=APART
    ),
}


def functions(case: Case, sizes: Sizes) -> tuple[Any, Any]:
    """The mask and the score function, None for none."""
    return MASKS[case.mask](sizes) if case.mask else None, SCORES[case.score](sizes) if case.score else None


def run(case: Case) -> dict[str, float]:
    """The errors of out, lse and, where the case has a backward of its own, dq, dk, dv. Raises AssertionError where
    something is wrong.
    """
    B, Hq, _, Sq, Skv, *_ = case.sizes
    here, there = (functions(case, Sizes(B, Hq, Sq, Skv, device)) for device in ("cpu", "cuda"))
    # the reference on the CPU: there its many kernels cost a sanitizer nothing
    exact, rounded = expected(*here, inputs(*case.sizes, case.dtype))
    blocks = block_map(there[0], B, Hq, Sq, Skv, device="cuda", tile=64)
    on_cpu = block_map(here[0], B, Hq, Sq, Skv, device="cpu", tile=64)
    assert torch.equal(blocks.to_dense().cpu(), on_cpu.to_dense()), "the map is wrong"
    q, k, v, dout, dlse = inputs(*case.sizes, case.dtype, "cuda")
    config = {kernel: chosen for kernel, chosen in (("forward", case.forward), ("dkdv", case.dkdv)) if chosen}
    is_apart = case.dkdv.get("is_fused") is False
    how: dict[str, Any] = {"backend": case.backend, "config": config, "deterministic": is_apart}
    errors: dict[str, float] = {}
    for _ in range(2):
        results = attention(q, k, v, block_map=blocks, score_mod=there[1], return_lse=True, **how)
        if case.backend == "triton" or case.dkdv:  # the others have the portable one's
            results = (*results, *torch.autograd.grad(results, (q, k, v), (dout, dlse)))
        errors = check(tuple(x.cpu() for x in results), exact, rounded)
    return errors


@gluon.jit
def put_numbers(out_pointer, queue):
    queue.put(0, (7,))
    queue.put(1, (8,))


@gluon.jit
def take_numbers(out_pointer, queue, WARPGROUP: gl.constexpr):
    for n in range(2):
        gl.store(out_pointer + 2 * WARPGROUP + n, queue.take(n, 4)[0])


@gluon.jit
def control_kernel(out_pointer):
    queue = RowQueue.create(1, 2, False)
    gl.warp_specialize(
        [
            (take_numbers, (out_pointer, queue, gl.constexpr(0))),
            (take_numbers, (out_pointer, queue, gl.constexpr(1))),
            (put_numbers, (out_pointer, queue)),
        ],
        [4, 1],
        [64, 24],
    )


def run_control() -> dict[str, float]:
    out = torch.zeros(4, dtype=torch.int32, device="cuda")
    control_kernel[(1,)](out, num_warps=4, maxnreg=128)
    assert out.tolist() == [7, 8, 7, 8], out
    return {"numbers": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name matches this regular expression")
    only = parser.parse_args().only
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor an allocation of its own: its end is known
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    for name, case in {**CASES, "control": None}.items():
        if not re.search(only, name):
            continue
        if (case is None or case.backend == "gluon") and not is_hopper:
            print(f"{name}: left out, this is no Hopper GPU")
            continue
        print(f"{name} ...", flush=True)
        started = time.perf_counter()
        errors = run_control() if case is None else run(case)
        words = " ".join(f"{result} {error:.1e}" for result, error in errors.items())
        print(f"{name}: right ({words}), {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
