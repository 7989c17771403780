"""Compile every kernel ahead of time, on a machine without a GPU, and print what each one takes on each architecture.

    python benchmarks/aot.py            every mask and score function of the zoo, dtypes, head dims and architectures
    python benchmarks/aot.py --sample   a covering sample, about half a minute
    PYTHONPATH=.venv/newest python benchmarks/aot.py --kernels hopper_forward   some kernels, with the newest Triton
    python benchmarks/aot.py --lengths 200   how often each kernel would compile for 200 random lengths of one mask

Exits with 1 where a kernel does not compile, needs more shared memory than the device has or than footprint.py
estimates, where ptxas serialises the products of a case whose speed is measured or of any Hopper kernel, or where a
Hopper kernel of a case whose speed is measured spills more than SPILL_LIMITS (a persistent one: more than a few
constants). The arguments are those that recipes.py passes: its launches are recorded instead of run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import compute_cache_key, create_function_from_signature

from anymask import causal, document
from anymask.blocks.block_map import BlockMap
from anymask.errors import UnsupportedError
from anymask.expr.interval import Grid
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import trace
from anymask.kernels import hopper_launch, launch, map_launch, recipes
from anymask.kernels import plan as planning
from anymask.kernels.configs import SHARED_LIMITS, AnyConfig, HopperConfig
from anymask.kernels.footprint import (
    Need,
    hopper_backward_shared_memory,
    hopper_dq_shared_memory,
    hopper_shared_memory,
    shared_memory,
)
from anymask.kernels.plan import choose, family_of, kinds_of
from anymask.problem import Problem

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cases import MASKS, SCORES, Sizes

# Hopper kernels compile with this Triton, whether or not they have run with it
planning.GLUON_VERSIONS = (".".join(triton.__version__.split(".")[:2]),)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
KERNELS = ("forward", "dkdv", "dq", "classify", "walk", "order")
# The variants of hopper_backward. hopper_fused to hopper_wide: with dQ in it, after rows and before dq_of_sum.
HOPPER_BACKWARDS: dict[str, dict[str, Any]] = {
    "hopper_dkdv": {"is_fused": False},
    "hopper_lone": {"is_fused": False, "num_consumers": 1},
    "hopper_fused": {"is_fused": True},
    "hopper_persistent": {"is_fused": True, "is_persistent": True},
    "hopper_wide": {"is_fused": True, "BLOCK_Q": 128, "num_stages": 2, "is_persistent": True, "num_key_tiles": 2},
    "hopper_apart": {"is_fused": False, "BLOCK_Q": 128, "num_stages": 2},
}
OF_KINDS = {"hopper_persistent": "regular", "hopper_wide": "regular", "hopper_apart": "regular"}  # as plan.kinds_of
# By the variant that it comes after.
HOPPER_DQS = {"hopper_dkdv": "hopper_dq", "hopper_lone": "hopper_lone_dq"}
# Only where plan.py has one.
HOPPER_KERNELS = ("hopper_forward", "rows", "dq_of_sum", *HOPPER_BACKWARDS, *HOPPER_DQS.values())
TWO = {"BLOCK_Q": 128, "BLOCK_KV": 128, "num_stages": 2, "has_turns": True}
THREE = TWO | {"BLOCK_Q": 192, "num_stages": 3}
ONE = TWO | {"BLOCK_Q": 64, "BLOCK_KV": 64, "has_turns": False, "is_persistent": True}
# head dims and configs that the plan does not choose, or not for all masks
HOPPER_VARIANTS: tuple[tuple[int, tuple[tuple[str, Any], ...]], ...] = (
    *((D, (*TWO.items(), ("is_persistent", is_persistent))) for D in (128, 64) for is_persistent in (True, False)),
    *((64, (*THREE.items(), ("is_persistent", is_persistent))) for is_persistent in (True, False)),
    (128, tuple(ONE.items())),
    *((D, ()) for D in (16, 48, 72, 96, 112, 160, 192)),
)
# Bytes. dK and dV of head dim 128 take 128 registers a thread: of what is left, masked and scored steps keep some
# addresses in memory, which they read once a step. A late dQ keeps where it belongs, too, and a persistent program what
# it works on.
SPILL_LIMITS = dict.fromkeys(HOPPER_BACKWARDS, 128) | {
    "hopper_fused": 136,
    "hopper_persistent": 136,
    "hopper_wide": 176,  # under a causal mask; still 4 to 8% faster than 64 queries a step
}


@dataclass(frozen=True)
class Job:
    """One mask and one score function of the zoo ("" for none), dtype and head dims, for one architecture."""

    mask: str
    score: str
    dtype: str
    D: int
    Dv: int
    arch: str
    Sq: int = 1024  # a multiple of the tile: kernels drop their tail tests
    kernels: tuple[str, ...] = KERNELS + HOPPER_KERNELS
    tile: int = 64
    hopper: tuple[tuple[str, Any], ...] = ()  # config= of the Hopper forward

    @property
    def is_tuned(self) -> bool:
        """A case whose speed is measured: serialised products would lose it."""
        masks = ("everything", "causal_top_left", "documents_causal", "mode_1", "window")
        is_measured = self.mask in masks and self.score in ("", "capped", "linear_bias")
        return is_measured and self.arch == "sm_90" and self.dtype != "f32" and max(self.D, self.Dv) <= 128


@dataclass(frozen=True)
class Row:
    job: Job
    kernel: str
    config: AnyConfig | None
    registers: int
    spills: int  # bytes on NVIDIA, registers on AMD
    is_serial: bool  # ptxas says that it serialised the wgmma products
    shared: int
    estimate: int | None  # of shared memory, by footprint.py
    error: str = ""

    @property
    def is_good(self) -> bool:
        limit = SHARED_LIMITS[family_of(self.job.arch)]
        is_hopper = self.kernel in HOPPER_KERNELS
        if self.is_serial and (is_hopper or self.job.is_tuned):
            return False
        allowed = SPILL_LIMITS.get(self.kernel, 0)
        if isinstance(self.config, HopperConfig) and self.config.is_persistent:
            allowed = 32  # divisors of row numbers, read once a row
        if is_hopper and self.job.is_tuned and self.spills > allowed:
            return False
        return not self.error and self.shared <= (limit if self.estimate is None else min(limit, self.estimate))


def full_jobs() -> Iterator[Job]:
    for arch in ARCHS:
        for mask in MASKS:
            yield Job(mask, "", "bf16", 64, 64, arch, Sq=1000)
        for score in SCORES:
            yield Job("causal_top_left", score, "bf16", 128, 128, arch, Sq=1000)
        for dtype in DTYPES:
            for D, Dv in ((8, 8), (40, 40), (64, 64), (128, 128), (256, 256), (192, 128), (64, 256), (256, 16)):
                yield Job("documents_causal", "", dtype, D, Dv, arch, tile=128)
    for D, options in HOPPER_VARIANTS:
        # three consumers have too few registers for documents
        masks = ("everything", "causal_top_left", "window", "documents_causal")
        for mask in masks[: 3 if ("BLOCK_Q", 192) in options else 4]:
            yield Job(
                mask,
                "",
                "bf16",
                D,
                D,
                "sm_90",
                kernels=("hopper_forward",) if options else HOPPER_KERNELS,
                hopper=options,
            )
    for mask in ("window", "neighbourhood_3d"):
        yield Job(mask, "", "bf16", 192, 128, "sm_90", kernels=("hopper_forward",))
    for arch in TARGETS:
        for D in (64, 256):
            yield Job("documents_causal", "capped", "bf16", D, D, arch, Sq=1000, tile=16)


def sample_jobs() -> Iterator[Job]:
    """Each architecture, mask, score function, dtype and padded head dim at least once, each only in some kernels."""
    yield Job("documents_causal", "", "bf16", 128, 128, "sm_90")
    yield Job("everything", "capped", "f16", 64, 128, "sm_90", Sq=1000, kernels=HOPPER_KERNELS)
    yield Job("mode_1", "linear_bias", "bf16", 128, 64, "sm_90", kernels=HOPPER_KERNELS)
    yield Job("tree", "", "bf16", 64, 64, "sm_90", kernels=HOPPER_KERNELS)
    persistent = HOPPER_VARIANTS[0][1]
    yield Job("documents_causal", "", "bf16", 128, 128, "sm_90", kernels=("hopper_forward",), hopper=persistent)
    yield Job("causal_top_left", "capped", "bf16", 128, 128, "sm_90", kernels=tuple(HOPPER_BACKWARDS))
    yield Job("window", "", "bf16", 128, 128, "sm_90", kernels=("hopper_persistent",))
    yield Job("everything", "", "bf16", 64, 64, "sm_90", kernels=("hopper_persistent", "hopper_wide", "hopper_apart"))
    yield Job("documents_causal", "", "bf16", 192, 128, "sm_90", kernels=("hopper_forward", "hopper_dkdv", "hopper_dq"))
    yield Job("block_diffusion", "capped_and_biased", "f16", 64, 64, "sm_80", Sq=1000)
    yield Job("bit_table", "", "bf16", 256, 256, "sm_90", kernels=("forward", "dkdv"))
    yield Job("tree", "", "f32", 64, 64, "sm_90", kernels=("forward",))
    yield Job("causal_window", "polynomial", "bf16", 40, 96, "sm_100", kernels=("forward", "dkdv"))
    yield Job("mode_1", "", "bf16", 64, 64, "gfx942", kernels=("forward", "dq", "classify"))
    yield Job("neighbourhood_2d", "", "f16", 8, 8, "sm_86", kernels=("dq", "classify"), tile=16)


def compile_job(job: Job) -> list[Row]:
    """Compile the kernels of a job; an error is a row."""
    sizes = Sizes(B=2, H=4, Sq=job.Sq, Skv=job.Sq)
    program = trace(MASKS[job.mask](sizes), SCORES[job.score](sizes) if job.score else None, torch.device("cpu"))
    bindings = program.bindings
    mods = Mods.of(text_of(program.mask, program.score), bindings.ints, bindings.floats)
    dtype = DTYPES[job.dtype]
    q, k, v, dout = (
        torch.empty(2, heads, job.Sq, D, dtype=dtype) for heads, D in ((4, job.D), (2, job.D), (2, job.Dv), (4, job.Dv))
    )
    out, lse = torch.empty_like(dout), torch.empty(2, 4, job.Sq)
    problem = Problem.of(q, k, v)
    tile = (job.tile, job.tile)
    plan = choose(problem, mods, tile, arch=job.arch, backend="triton")
    num_tiles = -(-job.Sq // job.tile)
    blocks = BlockMap(torch.zeros(2, 4, num_tiles, num_tiles, dtype=torch.int8), job.Sq, job.Sq, tile)
    hopper_plans: dict[str, Any] = {}
    of_dq: dict[str, Any] = {}
    with Recorder() as recorder:
        launch.forward(q, k, v, mods, bindings, blocks, plan, 0.125)
        launch.backward(dout, None, q, k, v, out, lse, mods, bindings, blocks, plan, 0.125)
        map_launch.classify(mods.mask, bindings, Grid(2, 4, job.Sq, job.Sq, tile, torch.device("cpu")))
        with contextlib.suppress(UnsupportedError):
            config = {"forward": dict(job.hopper)} if job.hopper else None
            gluon_plan = choose(problem, mods, tile, arch=job.arch, backend="gluon", bindings=bindings, config=config)
            launch.forward(q, k, v, mods, bindings, blocks, gluon_plan, 0.125)
            for name, wanted in HOPPER_BACKWARDS.items():
                if OF_KINDS.get(name, "any") not in {*kinds_of(mods), "any"}:
                    continue
                hopper_config = {"dkdv": wanted}
                hopper_plans[name] = choose(problem, mods, tile, arch=job.arch, backend="gluon", config=hopper_config)
                launch.backward(dout, None, q, k, v, out, lse, mods, bindings, blocks, hopper_plans[name], 0.125)
                recorder.calls[name] = recorder.calls.pop("hopper_backward")
                if name in HOPPER_DQS and "hopper_dq" in recorder.calls:
                    of_dq[HOPPER_DQS[name]] = recorder.calls.pop("hopper_dq")
    need = Need.of(job.D, job.Dv, dtype, mods, family_of(job.arch))
    configs: dict[str, Any] = {name: getattr(plan, name, None) for name in KERNELS}
    estimates = {name: shared_memory(name, config, need) for name, config in configs.items() if config}
    if "hopper_forward" in recorder.calls:
        configs["hopper_forward"] = gluon_plan.forward
        estimates["hopper_forward"] = hopper_shared_memory(gluon_plan.forward, job.D, job.Dv)
    recorder.calls |= of_dq
    for name, hopper_plan in hopper_plans.items():
        configs[name] = hopper_plan.dkdv
        estimates[name] = hopper_backward_shared_memory(hopper_plan.dkdv, job.D, job.Dv)
        if (of_variant := HOPPER_DQS.get(name)) in of_dq:
            configs[of_variant] = hopper_plan.dq
            estimates[of_variant] = hopper_dq_shared_memory(hopper_plan.dq, job.D, job.Dv)
    # without a mask there is nothing to walk
    return [
        _compile(job, configs.get(name), estimates.get(name), name, *recorder.calls[name])
        for name in job.kernels
        if name in recorder.calls
    ]


class Recorder:
    """Within it, a launch only notes down its arguments: calls[name] = (kernel, args, kwargs)."""

    def __init__(self) -> None:
        kernels = vars(recipes) | vars(map_launch) | vars(hopper_launch)
        self.kernels = {name: kernels[f"{name}_kernel"] for name in KERNELS}
        names = ("hopper_forward", "rows", "dq_of_sum", "hopper_backward", "hopper_dq")
        self.kernels |= {name: kernels[f"{name}_kernel"] for name in names}
        self.calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __enter__(self) -> Recorder:
        for name, kernel in self.kernels.items():

            def note(
                *args: Any, grid: Any, warmup: bool, name: str = name, kernel: Any = kernel, **kwargs: Any
            ) -> None:
                self.calls[name] = (kernel, args, kwargs)

            kernel.run = note
        return self

    def __exit__(self, *error: object) -> None:
        for kernel in self.kernels.values():
            del kernel.run


def _compile(
    job: Job,
    config: AnyConfig | None,
    estimate: int | None,
    name: str,
    kernel: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Row:
    target = TARGETS[job.arch]
    backend = make_backend(target)
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **kwargs
    )
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    try:
        source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs, attrs)
        compiled = triton.compile(source, target=target, options=options.__dict__)
        if name in HOPPER_KERNELS:
            check_barriers(compiled.asm["llir"], compiled.metadata.shared)
        registers, spills, is_serial = resources(compiled, target)
    except Exception as error:
        return Row(
            job, name, config, 0, 0, False, 0, estimate, f"{type(error).__name__}: {error}"[-300:].replace("\n", " ")
        )
    return Row(job, name, config, registers, spills, is_serial, compiled.metadata.shared, estimate)


def check_barriers(llir: str, shared: int) -> None:
    """Raise where the compiler gave a barrier's memory to tiles too, as it does if nothing waits at the barrier.

    Barriers have the last places, being small. An H200 that turns to another process and back may write such a barrier
    over the tile: NaN.
    """
    places = [int(offset or 0) for offset in re.findall(r"mbarrier\.init.*@global_smem(?:, i32 (\d+))?", llir)]
    if places and min(places) < shared - 1024:
        raise ValueError(f"a barrier at {min(places)} of {shared} bytes of shared memory: among the tiles")


def resources(compiled: Any, target: GPUTarget) -> tuple[int, int, bool]:
    """Registers per thread, what is spilled (bytes on NVIDIA, registers on AMD), whether products are serialised."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
        return int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]), int(spills[1]) if spills else 0, False
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        arch = re.search(r"\.target (\w+)", ptx)[1]
        command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={arch}", str(path), "-o", f"{folder}/cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = (
        int(re.search(pattern, log)[1]) for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill stores")
    )
    return registers, spills, bool(re.search(r"\(C75\d\d\)", log))


def compilations(num_lengths: int) -> dict[str, int]:
    """How many variants of each kernel Triton would compile for documents + causal of so many random lengths."""
    lengths = random.Random(0)
    binders: dict[str, Any] = {}
    variants: dict[str, set[str]] = {}
    backend = make_backend(TARGETS["sm_90"])
    for _ in range(num_lengths):
        S, num_documents = lengths.randint(1, 4000), lengths.randint(1, 9)
        ids = torch.arange(S) * num_documents // S
        program = trace((causal() & document(ids)).function, None, torch.device("cpu"))
        mods = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats)
        q, lse, num_tiles = torch.empty(1, 2, S, 64, dtype=torch.bfloat16), torch.empty(1, 2, S), -(-S // 64)
        plan = choose(Problem.of(q, q, q), mods, (64, 64), arch="sm_90", backend="triton")
        blocks = BlockMap(torch.zeros(1, 1, num_tiles, num_tiles, dtype=torch.int8), S, S, (64, 64))
        with Recorder() as recorder:
            launch.forward(q, q, q, mods, program.bindings, blocks, plan, 0.125)
            launch.backward(q, None, q, q, q, q, lse, mods, program.bindings, blocks, plan, 0.125)
            map_launch.classify(mods.mask, program.bindings, Grid(1, 1, S, S, (64, 64), torch.device("cpu")))
        for name, (kernel, args, kwargs) in recorder.calls.items():
            if name not in binders:
                binders[name] = create_function_from_signature(kernel.signature, kernel.params, backend)
            _, specialization, options = binders[name](*args, **kwargs)
            variants.setdefault(name, set()).add(compute_cache_key({}, specialization, options))
    return {name: len(found) for name, found in variants.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", action="store_true", help="a covering sample")
    parser.add_argument("--only", default="", help="jobs whose printed line matches this regular expression")
    parser.add_argument("--kernels", nargs="+", choices=(*KERNELS, *HOPPER_KERNELS), help="these alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--lengths", type=int, help="count compilations for so many random lengths, and do nothing else"
    )
    options = parser.parse_args()
    if options.lengths is not None:
        print(json.dumps(compilations(options.lengths)))
        return 0
    jobs = [job for job in (sample_jobs if options.sample else full_jobs)() if re.search(options.only, repr(job))]
    if options.kernels:
        of_jobs = [tuple(name for name in job.kernels if name in options.kernels) for job in jobs]
        jobs = [replace(job, kernels=kernels) for job, kernels in zip(jobs, of_jobs, strict=True) if kernels]
    print(f"Triton {triton.__version__}")
    head = f"{'arch':7} {'dtype':5} {'D':>3} {'Dv':>3} {'mask':26} {'score':18} {'kernel':14} {'tiles':48}"
    print(f"{head} {'regs':>4} {'spills':>6} {'shared':>7} {'estimate':>8}")
    bad = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for rows in pool.map(compile_job, jobs):
            for row in rows:
                job = row.job
                what = f"{job.arch:7} {job.dtype:5} {job.D:3} {job.Dv:3} {job.mask:26} {job.score:18} {row.kernel:14}"
                takes = f"{row.registers:4} {row.spills:6} {row.shared:7} {row.estimate or '-':>8}"
                verdict = ("serial " if row.is_serial else "") + ("" if row.is_good else f"BAD {row.error}")
                print(f"{what} {row.config or '-'!s:48} {takes} {verdict}", flush=True)
                bad += not row.is_good
    print(f"Triton {triton.__version__}: {len(jobs)} jobs, {bad} bad rows")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
