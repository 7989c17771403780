"""choose(): a configuration for every problem on every architecture; what is forced is obeyed or raises."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from anymask.errors import UnsupportedError
from anymask.expr.ir import SCORE, TRUE, DType, Expr, Op, apply, index
from anymask.expr.mods import Mods
from anymask.kernels.configs import FAMILIES, RAGGED_BYTES, REGULAR_BYTES, ROWS, SHARED_LIMITS, Config
from anymask.kernels.plan import KERNELS, Need, Plan, choose, default_tile, family_of, padded, shared_memory
from anymask.problem import Problem

ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_999", "gfx942", "gfx1100")
CPU = torch.device("cpu")
NONE = Mods()
# a bias for each pair, which the kernels stage in shared memory, and ids for each row
BIAS = Expr.of(Op.LOAD, DType.FLOAT, (index("q_idx"), index("kv_idx")), 0)
IDS = [Expr.of(Op.LOAD, DType.INT64, (index(name),), 1) for name in ("q_idx", "kv_idx")]
HEAVY = Mods(apply(Op.EQ, *IDS), apply(Op.ADD, SCORE, BIAS))


def problem(D: int = 64, Dv: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem(2, 4, 2, 1000, 1000, D, Dv or D, dtype, CPU)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_problem_fits_every_architecture(arch: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    dims = (8, 16, 24, 40, 64, 72, 128, 136, 192, 256)
    tiles = ((16, 16), (16, 256), (64, 128), (128, 128), (256, 32))
    for D, Dv, tile, mods in itertools.product(dims, dims, tiles, (NONE, HEAVY)):
        for dtype in (torch.bfloat16, torch.float32):
            plan = choose(problem(D, Dv, dtype), mods, tile, arch=arch)
            need = Need.of(D, Dv, dtype, mods, family_of(arch))
            assert plan.backend == "triton" and plan.precision == ("ieee" if precision == "highest" else "tf32")
            for kernel in KERNELS:
                config: Config = getattr(plan, kernel)
                for block, size in zip((config.BLOCK_Q, config.BLOCK_KV), tile, strict=True):
                    assert block <= size or size >= 64  # small tiles were chosen for their sparsity
                assert min(config.BLOCK_Q, config.BLOCK_KV) >= 16 and config.num_stages >= 1
                assert shared_memory(kernel, config, need) <= SHARED_LIMITS[need.family]


def test_rows_are_well_formed() -> None:
    families = {*SHARED_LIMITS, "any"}
    assert {row.family for row in ROWS} <= families and set(FAMILIES.values()) <= families
    for row in ROWS:
        for kernel in KERNELS:
            config = getattr(row, kernel)
            assert all(size & (size - 1) == 0 for size in (config.BLOCK_Q, config.BLOCK_KV, config.num_warps))


@pytest.mark.parametrize(
    "arch, dtype, tile, backend, expected",
    [
        ("sm_90", torch.bfloat16, (128, 128), None, "triton"),
        ("gfx942", torch.float16, (128, 128), None, "triton"),
        ("cpu", torch.float32, (128, 128), None, "eager"),
        ("mps", torch.float32, (128, 128), None, "eager"),
        ("interpreter", torch.float32, (128, 128), None, "eager"),
        ("interpreter", torch.float32, (128, 128), "triton", "triton"),
        ("sm_90", torch.float64, (128, 128), None, "eager"),
        ("sm_90", torch.bfloat16, (96, 128), None, "eager"),
        ("sm_75", torch.float16, (128, 128), None, "eager"),
        ("sm_90", torch.bfloat16, (128, 128), "eager", "eager"),
        ("cpu", torch.float64, (128, 128), "reference", "reference"),
    ],
)
def test_backend(arch: str, dtype: torch.dtype, tile: tuple[int, int], backend: str | None, expected: str) -> None:
    plan = choose(problem(dtype=dtype), NONE, tile, arch=arch, backend=backend)
    assert plan.backend == expected
    assert expected in plan.why and arch in plan.why


def test_why_says_what_was_chosen() -> None:
    plan = choose(problem(128), HEAVY, (128, 128), arch="sm_90")
    assert "sm_90" in plan.why and "score function" in plan.why
    assert all(f"{kernel} {getattr(plan, kernel)}" in plan.why for kernel in KERNELS)
    assert "float64" in choose(problem(dtype=torch.float64), NONE, (128, 128), arch="sm_90").why


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"backend": "triton", "arch": "cpu"}, "no kernels for cpu"),
        ({"backend": "triton", "dtype": torch.float64}, "not in float64"),
        ({"backend": "triton", "tile": (96, 128)}, "powers of two"),
        ({"backend": "triton", "tile": (128, 8)}, "powers of two"),
        ({"backend": "triton", "arch": "sm_75"}, "Ampere"),
        ({"backend": "cuda"}, "none of triton, eager, reference"),
        ({"backend": "eager", "config": {"forward": {"BLOCK_Q": 64}}}, "Triton kernels"),
        ({"config": {"backward": {"BLOCK_Q": 64}}}, "forward, dkdv, dq"),
        ({"config": {"forward": {"BLOCK_M": 64}}}, "BLOCK_Q, BLOCK_KV"),
        ({"config": {"forward": {"BLOCK_Q": 512}}}, "from 16 to 256"),
        ({"config": {"dq": {"BLOCK_KV": 48}}}, "power of two"),
        ({"config": {"dq": {"num_warps": 3}}}, "num_warps"),
        ({"config": {"forward": Config(128, 128, 8, 9)}}, "fewer stages"),
    ],
)
def test_impossible_requests_raise(arguments: dict[str, Any], words: str) -> None:
    arguments = {"arch": "sm_90", "tile": (128, 128), "dtype": torch.bfloat16} | arguments
    p = problem(128, dtype=arguments.pop("dtype"))
    with pytest.raises(UnsupportedError, match=words):
        choose(p, NONE, arguments.pop("tile"), **arguments)


def test_config_is_obeyed() -> None:
    default = choose(problem(128), NONE, (128, 128), arch="sm_90")
    config = {"forward": {"BLOCK_Q": 64, "num_stages": 2}, "dq": Config(32, 32, 4, 1)}
    plan = choose(problem(128), NONE, (128, 128), arch="sm_90", config=config)
    assert plan.forward is not None and default.forward is not None
    assert (plan.forward.BLOCK_Q, plan.forward.num_stages) == (64, 2)
    assert plan.forward.BLOCK_KV == default.forward.BLOCK_KV
    assert plan.dq == Config(32, 32, 4, 1) and plan.dkdv == default.dkdv
    assert choose(problem(128), Mods(TRUE), (128, 128), arch="sm_90", deterministic=True) == default
    assert isinstance(hash(default), int) and isinstance(default, Plan)


def test_small_numbers() -> None:
    assert [padded(D) for D in (8, 16, 24, 64, 72, 136, 256)] == [16, 16, 32, 64, 128, 256, 256]
    assert [family_of(arch) for arch in ("sm_89", "gfx90a", "sm_90", "sm_130")] == ["sm_86", "gfx942", "sm_90", "sm_86"]
    assert default_tile("cpu", 100) == (128, 64)
    assert [default_tile("cuda", S) for S in (65536, 65537, 524289)] == [(64, 64), (128, 128), (256, 256)]


def test_masks_and_score_functions_have_rows_of_their_own() -> None:
    ragged, regular = Mods(apply(Op.EQ, *IDS)), Mods(apply(Op.LE, index("kv_idx"), index("q_idx")))
    plans = [choose(problem(128), mods, (64, 64), arch="sm_90") for mods in (ragged, regular, NONE)]
    assert [plan.shared_bytes for plan in plans] == [RAGGED_BYTES, REGULAR_BYTES, 0]
    assert choose(problem(128), HEAVY, (64, 64), arch="sm_90").dkdv != plans[0].dkdv == plans[1].dkdv != plans[2].dkdv
    dense, masked = (choose(problem(64), mods, (64, 64), arch="sm_90") for mods in (NONE, regular))
    assert dense.forward != masked.forward and dense.dkdv == masked.dkdv
