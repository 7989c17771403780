"""emulate: a forward and a backward of the plan for a Hopper GPU, on the emulator.

Case: such a run against the float64 reference. CASES cover the Hopper kernels; zoo() are all masks and score functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from anymask import block_map, softcap
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import trace
from anymask.kernels import hopper_launch, launch
from anymask.kernels import plan as planning
from anymask.kernels.plan import tma_obstacle_of
from anymask.problem import Problem
from anymask.testing import check, inputs
from tests.cases import MASKS, SCORES, Sizes
from tests.emulator.launch import NUM_MULTIPROCESSORS, Emulator
from tests.plain import expected
from tests.test_hopper import (
    APART,
    BACKWARDS,
    DEEP,
    FUSED,
    LONE,
    PERSISTENT,
    TWO_TILES,
    WIDE,
    WIDE_APART,
    WIDE_PERSISTENT,
)

# Whether or not the kernels have run with it on a GPU.
planning.GLUON_VERSIONS = (".".join(triton.__version__.split(".")[:2]),)
hopper_launch._num_multiprocessors = lambda device: NUM_MULTIPROCESSORS


def emulate(
    tensors: tuple[Any, ...],
    mask: Any,
    score_mod: Any,
    scale: float | None = None,
    tile: int = 64,
    seed: int = 0,
    **how: Any,
) -> tuple[tuple[Tensor, ...], Emulator]:
    """out, lse, dq, dk and dv of q, k, v, dout and dlse (or None), and the emulator that knows what ran.

    seed: of the order of events.  how: backend, config, deterministic, as of attention().
    """
    q, k, v, dout, dlse = (x if x is None else x.detach() for x in tensors)
    (B, Hq, Sq, D), Skv = q.shape, k.shape[2]
    blocks = block_map(mask, B, Hq, Sq, Skv, device="cpu", tile=tile)
    program = trace(mask, score_mod, torch.device("cpu"))
    bindings = program.bindings
    mods = Mods.of(text_of(program.mask, program.score), bindings.ints, bindings.floats)
    problem = Problem.of(q, k, v)
    plan = planning.choose(
        problem, mods, blocks.tile, arch="sm_90", bindings=bindings, tma_obstacle=tma_obstacle_of(q, k, v), **how
    )
    arguments = (mods, bindings, blocks, plan, 1 / math.sqrt(D) if scale is None else scale)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    try:
        with Emulator(seed) as emulator:
            out, lse = launch.forward(q, k, v, *arguments)
            gradients = launch.backward(dout, dlse, q, k, v, out, lse, *arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    return (out, lse, *gradients), emulator


@dataclass(frozen=True)
class Case:
    """mask, score: of the zoo, "" for none; score may also be a cap.  sizes: B, Hq, Hkv, Sq, Skv, D, Dv."""

    mask: str
    score: str | float
    sizes: tuple[int, ...]
    config: Mapping[str, Any] | None = None
    tile: int = 64
    dtype: torch.dtype = torch.bfloat16
    deterministic: bool | None = None
    backend: str = "gluon"

    def run(self, seed: int) -> tuple[dict[str, float], Emulator]:
        """The errors, checked as on a GPU (tests/test_zoo.py)."""
        B, Hq, _, Sq, Skv = self.sizes[:5]
        sizes = Sizes(B, Hq, Sq, Skv)
        mask = MASKS[self.mask](sizes) if self.mask else None
        score = None
        if self.score:
            score = softcap(self.score) if isinstance(self.score, float) else SCORES[self.score](sizes)
        tensors = inputs(*self.sizes, self.dtype)
        exact, rounded = expected(mask, score, tensors)
        how = {"config": self.config, "backend": self.backend, "deterministic": self.deterministic}
        results, emulator = emulate(tensors, mask, score, tile=self.tile, seed=seed, **how)
        return check(results, exact, rounded), emulator


FORWARD: dict[str, Any] = {"forward": {"is_persistent": True}}
PERSISTENT_DEEP = {"forward": DEEP["forward"] | FORWARD["forward"]}
CASES = {
    "unmasked_64_wide": Case("", "", (1, 2, 1, 333, 290, 64, 64), WIDE),
    "causal_64_fused": Case("causal_bottom_right", "", (1, 4, 2, 333, 290, 64, 64), FUSED),
    "causal_64_wide_persistent": Case(
        "causal_bottom_right", "", (1, 4, 2, 333, 290, 64, 64), WIDE_PERSISTENT | FORWARD
    ),
    "documents_64_deep": Case("documents_causal", "", (1, 2, 1, 533, 490, 64, 64), DEEP),
    "documents_128_deep": Case("documents_unsorted_padded", "", (2, 2, 1, 333, 290, 128, 128), PERSISTENT_DEEP),
    "causal_64_two_tiles": Case("causal_bottom_right", "", (1, 4, 2, 533, 490, 64, 64), TWO_TILES),
    "window_64_wide_apart": Case("window", "", (1, 2, 1, 333, 290, 64, 64), WIDE_APART),
    "window_64_192_queries": Case("window", "", (1, 2, 2, 500, 400, 64, 64), {"forward": {"BLOCK_Q": 192}}),
    "nothing_64": Case("nothing", "", (1, 2, 1, 150, 140, 64, 64), APART),
    "unmasked_128_apart": Case("", "", (1, 2, 2, 256, 384, 128, 128), APART, 128),
    "documents_128_persistent": Case("documents_causal", "", (2, 2, 1, 333, 290, 128, 128), PERSISTENT | FORWARD),
    "documents_128_lone": Case("documents_unsorted_padded", "", (2, 2, 1, 333, 290, 128, 128), LONE, 64, torch.float16),
    "tree_128_fused": Case("tree", "", (1, 2, 2, 333, 290, 128, 128), FUSED, 128),
    "tensor_128_deterministic": Case("random_tensor", "", (1, 2, 1, 200, 170, 128, 128), deterministic=True),
    "capped_128_64_fused": Case("causal_top_left", 3.0, (1, 2, 1, 200, 170, 128, 64), FUSED, 128),
    "biased_64_128_apart": Case("", "capped_and_biased", (1, 2, 1, 200, 170, 64, 128), APART, 128),
    "causal_96_fused": Case("causal_top_left", "", (1, 2, 1, 300, 270, 96, 96), FUSED, 128),
    "window_72_96_persistent": Case("window", "", (1, 2, 1, 700, 600, 72, 96), PERSISTENT),
    "causal_72_112_lone": Case("causal_top_left", "", (1, 2, 1, 200, 170, 72, 112), LONE, 128),
    "causal_192_128": Case("causal_top_left", "", (1, 2, 1, 300, 270, 192, 128), tile=128),
    "flashmask_256": Case("flashmask", "", (1, 1, 1, 200, 170, 256, 256), tile=128),
    "one_query": Case("", "", (2, 2, 1, 1, 200, 128, 128), PERSISTENT),
    "sinks_64_apart": Case("sinks", "", (1, 2, 1, 200, 170, 64, 64), APART),
    "causal_64_portable": Case("causal_top_left", "", (1, 2, 1, 200, 170, 64, 64), backend="triton"),
    "causal_128_portable_dq": Case(
        "causal_top_left", "", (1, 2, 1, 200, 170, 128, 128), APART | {"dq": {"num_warps": 4}}
    ),
}


def zoo() -> Iterator[tuple[str, Case]]:
    """As tests/test_hopper.py on a GPU."""
    for i, name in enumerate(MASKS):
        D, dtype, tile = ((64, torch.bfloat16, 64), (128, torch.float16, 128))[i % 2]
        config = BACKWARDS[i // 2 % 4]
        yield name, Case(name, "", (2, 4, 2, 333, 290, D, D), config, tile, dtype)
    for i, name in enumerate(SCORES):
        for j, mask in enumerate(("", "causal_top_left")):
            config = BACKWARDS[(i + j) % 4]
            yield f"{name} {mask}", Case(mask, name, (2, 4, 2, 200, 170, 128, 64), config, 128)
