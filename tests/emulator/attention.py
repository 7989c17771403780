"""run_emulated: a forward and a backward of the plan for a Hopper GPU, emulated, against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton

from anymask import block_map
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import trace
from anymask.kernels import launch
from anymask.kernels import plan as planning
from anymask.problem import Problem
from anymask.testing import check, inputs
from tests.emulator.launch import Emulator
from tests.plain import expected

# Whether or not the kernels have run with it on a GPU.
planning.GLUON_VERSIONS = (".".join(triton.__version__.split(".")[:2]),)


def run_emulated(
    mask: Any,
    score_mod: Any,
    sizes: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    config: Mapping[str, Any] | None = None,
    tile: int = 64,
    seed: int = 0,
    backend: str = "gluon",
    deterministic: bool | None = None,
) -> tuple[dict[str, float], Emulator]:
    """The errors, checked as on a GPU (tests/test_zoo.py), and the emulator that knows what ran.

    sizes: B, Hq, Hkv, Sq, Skv, D, Dv.  config: of attention().  seed: of the order of events.
    """
    q, k, v, dout, dlse = tensors = inputs(*sizes, dtype)
    exact, rounded = expected(mask, score_mod, tensors)
    blocks = block_map(mask, *sizes[:2], *sizes[3:5], device="cpu", tile=tile)
    program = trace(mask, score_mod, torch.device("cpu"))
    bindings = program.bindings
    mods = Mods.of(text_of(program.mask, program.score), bindings.ints, bindings.floats)
    q, k, v = (x.detach() for x in (q, k, v))
    plan = planning.choose(
        Problem.of(q, k, v),
        mods,
        blocks.tile,
        arch="sm_90",
        backend=backend,
        bindings=bindings,
        config=config,
        deterministic=deterministic,
    )
    arguments = (mods, bindings, blocks, plan, 1 / math.sqrt(sizes[5]))
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    try:
        with Emulator(seed) as emulator:
            out, lse = launch.forward(q, k, v, *arguments)
            gradients = launch.backward(dout, dlse, q, k, v, out, lse, *arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    return check((out, lse, *gradients), exact, rounded), emulator
