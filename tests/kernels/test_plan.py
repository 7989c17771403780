"""choose(): a configuration for every problem on every architecture; what is forced is obeyed or raises."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from anymask.errors import UnsupportedError
from anymask.expr.bindings import Bindings
from anymask.expr.ir import SCORE, TRUE, DType, Expr, Op, apply, const, index
from anymask.expr.mods import Mods
from anymask.kernels import plan as plan_module
from anymask.kernels.configs import (
    FAMILIES,
    HOPPER_BACKWARD_ROWS,
    HOPPER_BACKWARD_STAGES,
    HOPPER_REGISTERS,
    HOPPER_ROWS,
    REGULAR_BYTES,
    ROWS,
    SEGMENTED_BYTES,
    SHARED_LIMITS,
    Config,
    HopperBackwardConfig,
    HopperConfig,
    HopperDqConfig,
    hopper_dq_config,
)
from anymask.kernels.footprint import (
    Need,
    chunks,
    hopper_backward_shared_memory,
    hopper_dq_shared_memory,
    hopper_shared_memory,
    padded,
    shared_memory,
)
from anymask.kernels.plan import (
    KERNELS,
    Plan,
    choose,
    default_tile,
    family_of,
    tma_obstacle_of,
    walk_shapes,
)
from anymask.problem import Problem

ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_999", "gfx942", "gfx1100")
CPU = torch.device("cpu")
NONE = Mods()
# a bias for each pair, which the kernels stage in shared memory, and ids for each row
BIAS = Expr.of(Op.LOAD, DType.FLOAT, (index("q_idx"), index("kv_idx")), 0)
IDS = [Expr.of(Op.LOAD, DType.INT64, (index(name),), 1) for name in ("q_idx", "kv_idx")]
CAUSAL = apply(Op.LE, index("kv_idx"), index("q_idx"))
HEAVY = Mods(apply(Op.EQ, *IDS), apply(Op.ADD, SCORE, BIAS))


@pytest.fixture(autouse=True)
def triton_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_triton_version", lambda: "3.6.0")


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
            plan = choose(problem(D, Dv, dtype), mods, tile, arch=arch, backend="triton")
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
        ("sm_90", torch.bfloat16, (128, 128), None, "gluon"),
        ("sm_90", torch.float16, (64, 64), None, "gluon"),
        ("sm_90", torch.float16, (32, 64), None, "triton"),
        ("sm_90", torch.float16, (32, 64), "gluon", "gluon"),
        ("sm_90", torch.float32, (128, 128), None, "triton"),
        ("sm_90", torch.bfloat16, (128, 128), "triton", "triton"),
        ("sm_80", torch.bfloat16, (128, 128), None, "triton"),
        ("sm_100", torch.bfloat16, (128, 128), None, "triton"),
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
    plan = choose(problem(128, dtype=dtype), NONE, tile, arch=arch, backend=backend)
    assert plan.backend == expected
    assert expected in plan.why and arch in plan.why


def test_why_says_what_was_chosen() -> None:
    plan = choose(problem(128), HEAVY, (128, 128), arch="sm_90")
    assert "sm_90" in plan.why and "score function" in plan.why
    assert all(f"{kernel} {getattr(plan, kernel)}" in plan.why for kernel in ("forward", "dkdv"))
    portable = choose(problem(128), HEAVY, (128, 128), arch="sm_90", backend="triton")
    assert all(f"{kernel} {getattr(portable, kernel)}" in portable.why for kernel in KERNELS)
    assert "float64" in choose(problem(dtype=torch.float64), NONE, (128, 128), arch="sm_90").why


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"backend": "triton", "arch": "cpu"}, "no kernels for cpu"),
        ({"backend": "triton", "dtype": torch.float64}, "not in float64"),
        ({"backend": "triton", "tile": (96, 128)}, "powers of two"),
        ({"backend": "triton", "tile": (128, 8)}, "powers of two"),
        ({"backend": "triton", "arch": "sm_75"}, "Ampere"),
        ({"backend": "cuda"}, "none of gluon, triton, eager, reference"),
        ({"backend": "gluon", "arch": "sm_80"}, "for sm_90, not sm_80"),
        ({"backend": "gluon", "arch": "cpu"}, "no kernels for cpu"),
        ({"backend": "gluon", "dtype": torch.float32}, "not in torch.float32"),
        ({"backend": "gluon", "D": 264}, "up to 256, not 264 and 264"),
        ({"backend": "gluon", "tma_obstacle": "q is odd"}, "q is odd. backend='triton' can"),
        ({"backend": "gluon", "config": {"forward": {"num_warps": 4}}}, "has_turns"),
        ({"backend": "gluon", "config": {"forward": {"BLOCK_Q": 256}}}, "BLOCK_Q 64, 128 or 192"),
        ({"backend": "gluon", "config": {"forward": {"BLOCK_Q": 64}}}, "two or three warpgroups take turns, not one"),
        ({"backend": "gluon", "D": 256, "config": {"forward": {"BLOCK_Q": 64, "has_turns": False}}}, "BLOCK_Q is 128"),
        ({"backend": "gluon", "config": {"forward": {"BLOCK_Q": 192}}}, "none divides"),
        ({"backend": "gluon", "tile": (64, 64), "config": {"forward": {"BLOCK_Q": 192}}}, "fewer stages"),
        ({"backend": "gluon", "config": {"forward": {"num_stages": 4}}}, "fewer stages"),
        ({"D": 16, "backend": "gluon", "config": {"forward": {"num_stages": 5}}}, "num_stages from 2 to 4"),  # barriers
        ({"D": 16, "backend": "gluon", "config": {"forward": {"num_stages": 1}}}, "num_stages from 2 to 4"),
        ({"arch": "sm_80", "config": {"dkdv": {"is_fused": True}}}, "Gluon backward.* for sm_90, not sm_80"),
        ({"D": 136, "config": {"dkdv": {"is_fused": True}}}, "dq is a kernel of its own"),
        ({"D": 136, "config": {"dkdv": {"is_fused": False, "is_split": False}}}, "is_split is for D or Dv above 128"),
        ({"config": {"dkdv": {"is_fused": False, "is_split": True}}}, "is_split is for D or Dv above 128"),
        ({"backend": "triton", "config": {"dkdv": {"is_fused": True}}}, "Gluon backward.* backend='triton'"),
        ({"tma_obstacle": "q is odd", "config": {"dkdv": {"is_fused": True}}}, "q is odd"),
        (
            {"config": {"dkdv": {"is_fused": True, "BLOCK_KV": 64}}},
            "should name is_fused, is_split, num_consumers, BLOCK_Q",
        ),
        ({"config": {"dkdv": {"is_fused": False, "num_consumers": 3}}}, "1 or 2 consumers, not 3"),
        ({"config": {"dkdv": {"is_fused": True, "num_consumers": 1}}}, "leaves dq to another kernel"),
        ({"config": {"dkdv": {"is_fused": False, "is_persistent": True}}}, "persistent only where is_fused"),
        ({"config": {"dkdv": {"is_fused": True, "is_persistent": False, "num_key_tiles": 2}}}, "2 where is_persistent"),
        (
            {"config": {"dkdv": {"is_fused": True, "BLOCK_Q": 128}}},
            "BLOCK_Q 64, or, with two consumers and D and Dv of",
        ),
        ({"D": 64, "config": {"dkdv": {"is_fused": False, "num_consumers": 1, "BLOCK_Q": 128}}}, "with two consumers"),
        ({"D": 256, "config": {"dkdv": {"is_fused": False, "num_stages": 3}}}, "would take 281088"),
        ({"D": 16, "config": {"dkdv": {"is_fused": True, "num_stages": 4}}}, "num_stages from 1 to 3"),  # barriers
        ({"config": {"dkdv": {"is_fused": True, "num_stages": 0}}}, "num_stages from 1 to 3"),
        ({"D": 192, "config": {"dkdv": {"is_fused": False, "num_stages": 1}}}, "num_stages from 2 to 3"),
        ({"config": {"dkdv": {"is_fused": True}, "dq": {"BLOCK_Q": 64}}}, "dq too"),
        ({"deterministic": True, "config": {"dkdv": {"is_fused": True}}}, "Try is_fused=False"),
        ({"config": {"dq": {"num_v_stages": 1}}}, "goes with the Gluon backward"),
        (
            {"config": {"dq": {"num_v_stages": 1, "BLOCK_Q": 64}, "dkdv": {"is_fused": False}}},
            "should name BLOCK_KV, num_v_stages and",
        ),
        ({"config": {"dq": HopperDqConfig(128, 3), "dkdv": {"is_fused": False}}}, "would take 295936"),
        ({"config": {"dq": HopperDqConfig(32, 3), "dkdv": {"is_fused": False}}}, "BLOCK_KV 64 or 128"),
        ({"D": 16, "config": {"dq": HopperDqConfig(64, 5), "dkdv": {"is_fused": False}}}, "num_v_stages from 1 to 4"),
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
    p = problem(arguments.pop("D", 128), dtype=arguments.pop("dtype"))
    with pytest.raises(UnsupportedError, match=words):
        choose(p, NONE, arguments.pop("tile"), **arguments)


def test_config_is_obeyed() -> None:
    default = choose(problem(128), NONE, (128, 128), arch="sm_90", backend="triton")
    config = {"forward": {"BLOCK_Q": 64, "num_stages": 2}, "dq": Config(32, 32, 4, 1)}
    plan = choose(problem(128), NONE, (128, 128), arch="sm_90", config=config)
    assert plan.backend == "triton" and "config= sets the portable forward" in plan.why
    assert isinstance(plan.forward, Config) and isinstance(default.forward, Config)
    assert (plan.forward.BLOCK_Q, plan.forward.num_stages) == (64, 2)
    assert plan.forward.BLOCK_KV == default.forward.BLOCK_KV
    assert plan.dq == Config(32, 32, 4, 1) and plan.dkdv == default.dkdv
    again = choose(problem(128), Mods(TRUE), (128, 128), arch="sm_90", backend="triton", deterministic=True)
    assert again == default
    assert isinstance(hash(default), int) and isinstance(default, Plan)


def test_small_numbers() -> None:
    assert [padded(D) for D in (8, 16, 24, 64, 72, 136, 256)] == [16, 16, 32, 64, 128, 256, 256]
    assert [family_of(arch) for arch in ("sm_89", "gfx90a", "sm_90", "sm_130")] == ["sm_86", "gfx942", "sm_90", "sm_86"]
    assert default_tile("cpu", 100) == (128, 64)
    assert [default_tile("cuda", S) for S in (65536, 65537, 524289)] == [(64, 64), (128, 128), (256, 256)]


def test_masks_and_score_functions_have_rows_of_their_own() -> None:
    ragged, regular = Mods(apply(Op.EQ, *IDS)), Mods(apply(Op.LE, index("kv_idx"), index("q_idx")))

    def plan(D: int, mods: Mods) -> Plan:
        return choose(problem(D), mods, (64, 64), arch="sm_90", backend="triton")

    plans = [plan(128, mods) for mods in (ragged, regular, NONE)]
    assert [plan.shared_bytes for plan in plans] == [SEGMENTED_BYTES, REGULAR_BYTES, (0, 0)]
    assert plan(128, HEAVY).dkdv != plans[0].dkdv == plans[1].dkdv != plans[2].dkdv
    dense, masked = (plan(64, mods) for mods in (NONE, regular))
    assert dense.forward != masked.forward and dense.dkdv == masked.dkdv


# --- the Hopper forward ---


def test_gluon_forward_and_triton_backward() -> None:
    plan = choose(problem(32), HEAVY, (64, 64), arch="sm_90")
    portable = choose(problem(32), HEAVY, (64, 64), arch="sm_90", backend="triton")
    assert plan.has_kernels and isinstance(plan.forward, HopperConfig) and isinstance(portable.forward, Config)
    assert (plan.dkdv, plan.dq) == (portable.dkdv, portable.dq)
    assert "gluon forward and triton backward" in plan.why and f"forward {plan.forward}" in plan.why
    assert portable.why.endswith("no gluon forward: backend='triton'")
    assert walk_shapes(plan, (64, 64))[0] == ((plan.forward.BLOCK_Q, plan.forward.BLOCK_KV), False)
    assert walk_shapes(plan, (256, 64))[0] == ((256, plan.forward.BLOCK_KV), False)


def test_gluon_refusals_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(**arguments: Any) -> str:
        plan = choose(problem(arguments.pop("D", 64)), NONE, (128, 128), arch="sm_90", **arguments)
        assert plan.backend == "triton"
        return plan.why

    assert "no gluon forward: v begins at an odd place" in why(tma_obstacle="v begins at an odd place")
    assert "not been measured with D 8 and Dv 8" in why(D=8)
    for version, words in (("3.5.1", "not 3.5.1"), ("3.9.0", "Triton 3.6, not 3.9.0"), ("", "not none")):
        monkeypatch.setattr(plan_module, "_triton_version", lambda version=version: version)
        assert words in why()
    assert "gluon" not in choose(problem(), NONE, (128, 128), arch="sm_80").why


def test_hopper_config_is_obeyed() -> None:
    wanted = {"BLOCK_Q": 192, "num_stages": 2, "has_turns": False, "is_persistent": False}
    plan = choose(problem(64), NONE, (64, 64), arch="sm_90", backend="gluon", config={"forward": wanted})
    assert plan.forward == HopperConfig(192, 128, 2, False) and "config= sets forward 192x128" in plan.why
    assert walk_shapes(plan, (64, 64))[0] == ((192, 128), False)
    wanted = {"is_persistent": True}
    plan = choose(problem(128), NONE, (64, 64), arch="sm_90", backend="gluon", config={"forward": wanted})
    assert plan.forward == HopperConfig(128, 128, 2, True, True) and "in turns, persistent" in plan.why


@pytest.mark.parametrize("is_given_as_object", [False, True])
def test_the_hopper_backward_is_taken_where_config_asks_for_it(is_given_as_object: bool) -> None:
    def plan(is_fused: bool, tile: tuple[int, int] = (64, 64), **arguments: Any) -> Plan:
        stages = HOPPER_BACKWARD_STAGES[128]
        wanted = HopperBackwardConfig(stages, is_fused) if is_given_as_object else {"is_fused": is_fused}
        return choose(problem(128), HEAVY, tile, arch="sm_90", config={"dkdv": wanted}, **arguments)

    portable = choose(problem(128), HEAVY, (64, 64), arch="sm_90", config={"dq": {}})
    assert isinstance(portable.dkdv, Config) and isinstance(portable.dq, Config)
    for arguments in ({}, {"backend": "gluon"}):
        fused, apart = plan(True, **arguments), plan(False, **arguments, deterministic=True)
        assert fused.forward == apart.forward == portable.forward
        assert isinstance(fused.dkdv, HopperBackwardConfig) and fused.dkdv.is_fused and fused.dq is None
        assert isinstance(apart.dkdv, HopperBackwardConfig) and not apart.dkdv.is_fused
        assert apart.dq == HopperDqConfig(64, 1, num_consumers=1)  # HEAVY is as of documents
        assert "config= sets dkdv 64x128 and dq in Gluon" in fused.why and "dkdv 64x128 in Gluon" in apart.why
        assert f"dq {apart.dq}" in apart.why and "dq 64x64 in Gluon" in apart.why
        assert walk_shapes(fused, (64, 64))[1:] == (((64, 128), True),) * 2
        assert walk_shapes(apart, (64, 64))[1:] == (((64, 128), True), ((64, 64), False))
    assert walk_shapes(plan(True, (256, 256)), (256, 256))[1] == ((256, 256), True)
    # where the map's tiles are too small for the forward, which is portable then
    assert isinstance(plan(True, (16, 32)).forward, Config) and plan(True, (16, 32)).dkdv == fused.dkdv
    wide = {"dkdv": {"is_fused": True, "BLOCK_Q": 128, "num_stages": 2}}
    assert "dkdv 128x128 and dq" in choose(problem(64), HEAVY, (64, 64), arch="sm_90", config=wide).why
    one = choose(problem(64), HEAVY, (64, 64), arch="sm_90", config={"dkdv": {"is_fused": False, "num_consumers": 1}})
    assert one.dkdv == HopperBackwardConfig(3, False, num_consumers=1) and "64x64 in Gluon, 1 warpgroup," in one.why
    assert walk_shapes(one, (64, 64))[1] == ((64, 64), True) and walk_shapes(one, (16, 16))[1] == ((64, 64), True)


def test_dq_has_a_config_of_its_own_where_it_is_apart() -> None:
    def dq(wanted: Any, mods: Mods = NONE) -> Config | HopperDqConfig | None:
        config = {"dq": wanted, "dkdv": {"is_fused": False}}
        plan = choose(problem(128), mods, (64, 64), arch="sm_90", config=config)
        assert isinstance(plan.dkdv, HopperBackwardConfig) and f"dq {plan.dq}" in plan.why
        return plan.dq

    assert dq(HopperDqConfig(64, 2)) == dq({"BLOCK_KV": 64, "num_v_stages": 2}) == HopperDqConfig(64, 2)
    assert dq({"num_v_stages": 1}) == HopperDqConfig(128, 1) and dq({"num_v_stages": 1}, HEAVY) == HopperDqConfig(
        64, 1, 1
    )
    assert isinstance(dq({"BLOCK_KV": 64}), Config) and isinstance(dq({}), Config)
    by_kinds = [hopper_dq_config(128, 64, 65536, frozenset(kinds)) for kinds in (("regular", "dense"), ("ragged",), ())]
    assert [config.BLOCK_KV for config in by_kinds] == [128, 64, 64]


def test_the_faster_backward_is_taken() -> None:
    def plan(D: int, S: int, Dv: int | None = None, mods: Mods = NONE, **arguments: Any) -> Plan:
        p = Problem(1, 4, 2, S, 4096, D, Dv or D, torch.bfloat16, CPU)
        return choose(p, mods, (64, 64), arch="sm_90", **arguments)

    ragged = Mods(apply(Op.OR, apply(Op.EQ, *IDS), CAUSAL))
    for D, S, Dv in ((128, 100, 128), (72, 100, 128), (64, 2048, 64), (64, 100, 128), (64, 100, 96), (48, 2048, 64)):
        chosen = plan(D, S, Dv)
        assert isinstance(chosen.dkdv, HopperBackwardConfig) and chosen.dkdv.is_fused and chosen.dq is None
        block_q = 128 if D == Dv == 64 else 64
        assert block_q == chosen.dkdv.BLOCK_Q and chosen.why.startswith("gluon on sm_90")
        assert chosen.dkdv.is_persistent == (D != 48)
        for mods in (HEAVY, Mods(ragged.mask, HEAVY.score)):
            other = plan(D, S, Dv, mods).dkdv
            assert not (isinstance(other, HopperBackwardConfig) and other.is_persistent)
        assert plan(D, max(S, 1024), Dv, ragged).dkdv.is_persistent == (max(D, Dv) == 128)
    for S, Skv, key_tiles in ((512, 512, 2), (512, 4096, 2), (512, 4097, 1), (8192, 8192, 1)):
        p = Problem(1, 4, 2, S, Skv, 64, 64, torch.bfloat16, CPU)
        short = choose(p, Mods(CAUSAL), (64, 64), arch="sm_90").dkdv
        assert (short.BLOCK_Q, short.num_key_tiles, short.is_persistent) == (128, key_tiles, True)
    deterministic = [plan(64, 4096, mods=mods, deterministic=True).dkdv.BLOCK_Q for mods in (NONE, ragged)]
    assert deterministic == [128, 64]  # queries a step
    for apart in (plan(128, 100, deterministic=True), plan(192, 100, 128), plan(256, 100, deterministic=True)):
        assert isinstance(apart.dkdv, HopperBackwardConfig) and not apart.dkdv.is_fused
        assert isinstance(apart.dq, HopperDqConfig) and apart.dkdv.is_split == (apart.dkdv.BLOCK_KV == 64)
        assert apart.why.startswith("gluon on sm_90") and f"dq {apart.dq}" in apart.why
    for portable in (
        plan(64, 511),
        plan(64, 1000, mods=ragged),
        plan(64, 1000, deterministic=True),
        plan(48, 1000),
        plan(32, 2048),
        plan(128, 2048, backend="triton"),
        plan(128, 2048, config={"dkdv": {"num_stages": 2}}),
    ):
        assert isinstance(portable.dkdv, Config) and isinstance(portable.dq, Config)
    assert isinstance(plan(64, 500, backend="gluon").dkdv, HopperBackwardConfig)


def test_the_backward_of_documents_has_one_consumer() -> None:
    def consumers(mods: Mods, Skv: int, **arguments: Any) -> int:
        backward = choose(Problem(1, 4, 2, 100, Skv, 128, 128, torch.bfloat16, CPU), mods, (64, 64), **arguments).dkdv
        assert isinstance(backward, HopperBackwardConfig)
        return backward.num_consumers

    segmented = Mods(apply(Op.AND, CAUSAL, apply(Op.EQ, *IDS)))
    for backend in (None, "gluon"):
        how = {"arch": "sm_90", "backend": backend}
        assert [consumers(segmented, Skv, **how) for Skv in (100, 32768, 32769)] == [1, 1, 2]
        assert consumers(Mods(CAUSAL), 100, **how) == 2 and consumers(segmented, 100, **how, deterministic=True) == 1


def test_masks_of_indices_alone_have_tiles_as_fine_as_they_are() -> None:
    def plan(mods: Mods, window: int, D: int = 128, Dv: int | None = None, **arguments: Any) -> Plan:
        p = Problem(1, 4, 2, 4096, 4096, D, Dv or D, torch.bfloat16, CPU)
        return choose(p, mods, (64, 64), arch="sm_90", bindings=Bindings(ints=(window,)), **arguments)

    def blocks(*arguments: Any) -> list[int]:
        chosen = plan(*arguments)
        return [chosen.forward.BLOCK_Q, chosen.forward.BLOCK_KV, chosen.dkdv.BLOCK_KV]

    reach = apply(Op.SUB, index("q_idx"), index("kv_idx"))
    window = Mods(apply(Op.AND, CAUSAL, apply(Op.LE, reach, Expr.of(Op.NUMBER, DType.INT32, (), 0))))
    assert [blocks(window, n) for n in (64, 512, 1024)] == [[64, 64, 64], [128, 128, 64], [128, 128, 128]]
    assert [blocks(window, n, 64) for n in (64, 512, 1024)] == [[64, 64, 64], [64, 128, 128], [192, 128, 128]]
    assert [blocks(window, n, 192, 128)[:2] for n in (64, 512)] == [[64, 64], [128, 128]]
    lone = plan(window, 64)
    assert lone.dq == HopperDqConfig(64, 1, num_consumers=1) and lone == plan(window, 64, deterministic=True)
    # a score function is computed once more where dq is apart
    scored = plan(Mods(window.mask, HEAVY.score), 512)
    assert isinstance(scored.dkdv, HopperBackwardConfig) and scored.dkdv.is_fused
    unknown = choose(problem(128), window, (64, 64), arch="sm_90")
    assert unknown == choose(problem(128), Mods(CAUSAL), (64, 64), arch="sm_90")


def test_costly_masks_have_small_tiles() -> None:
    p = problem(128)
    shifted = apply(Op.SUB, index("kv_idx"), const(5, DType.INT32))
    costly, cheap = (Mods(Expr.of(Op.LOAD, DType.BOOL, (at,), 0)) for at in (shifted, index("kv_idx")))
    assert [choose(p, mods, (64, 64), arch="sm_90").forward.BLOCK_KV for mods in (costly, cheap)] == [64, 128]


def test_the_faster_forward_is_taken() -> None:
    def rows(Skv: int, D: int, tile: int = 64, Sq: int = 1000) -> list[int]:
        p = Problem(1, 4, 2, Sq, Skv, D, D, torch.bfloat16, CPU)
        plans = [choose(p, mods, (tile, tile), arch="sm_90") for mods in (NONE, regular, ragged, segmented, score)]
        return [plan.forward.BLOCK_Q * (-1) ** plan.forward.is_persistent for plan in plans]

    same = apply(Op.EQ, *IDS)
    ragged, segmented = Mods(apply(Op.OR, same, CAUSAL)), Mods(apply(Op.AND, CAUSAL, same))
    regular, score = Mods(CAUSAL), Mods(score=HEAVY.score)
    assert rows(1024, 64) == [-192, -64, -64, -64, -64]
    assert rows(4096, 64) == [-192, -192, -64, -64, -64]
    assert rows(4096, 64, tile=128) == [-64, -64, -64, -64, -64]  # 192 is no multiple of the map's tile
    assert rows(8192, 128) == [-128, -128, -128, -64, -128]
    assert rows(32768, 128) == [-128, -128, -128, -64, -128]
    assert rows(65536, 128) == [-128, -128, -128, -128, -128]
    assert rows(8192, 192) == [128, 128, 128, 128, 128]
    assert rows(8192, 128, Sq=64) == [64] * 5


def test_head_dims_are_short_sums_of_powers_of_two() -> None:
    sums = {8: (16,), 16: (16,), 24: (32,), 48: (32, 16), 64: (64,), 72: (64, 16), 80: (64, 16), 96: (64, 32)}
    sums |= {112: (128,), 128: (128,), 136: (128, 32), 160: (128, 32), 192: (128, 64), 200: (256,), 256: (256,)}
    assert {D: chunks(D) for D in sums} == sums
    for D in range(8, 257, 8):
        assert D <= sum(chunks(D)) <= padded(D) and all(n & (n - 1) == 0 and n >= 16 for n in chunks(D))


def test_hopper_rows_fit() -> None:
    for D, Dv in itertools.product((*range(8, 160, 8), 160, 192, 200, 256), repeat=2):
        config = choose(problem(D, Dv), NONE, (64, 64), arch="sm_90", backend="gluon").forward
        assert isinstance(config, HopperConfig)
        assert hopper_shared_memory(config, D, Dv) <= SHARED_LIMITS["sm_90"]
        for kinds in (frozenset(("regular",)), frozenset[str]()):
            assert hopper_dq_shared_memory(hopper_dq_config(D, Dv, 65536, kinds), D, Dv) <= SHARED_LIMITS["sm_90"]
    dims = range(8, 257, 8)
    for D, Dv, num_consumers, is_fused in itertools.product(dims, dims, (1, 2), (False, True)):
        if (is_fused and num_consumers == 1) or (max(D, Dv) > 128 and (is_fused or num_consumers == 1)):
            continue
        config = {"dkdv": {"is_fused": is_fused, "num_consumers": num_consumers}}
        backward = choose(problem(D, Dv), NONE, (64, 64), arch="sm_90", backend="gluon", config=config).dkdv
        assert isinstance(backward, HopperBackwardConfig)
        # two programs with one consumer fit together: of 228 KB the system takes 1 KB a program
        limit = SHARED_LIMITS["sm_90"] if num_consumers == 2 else 113 * 1024
        assert hopper_backward_shared_memory(backward, D, Dv) <= limit
    for of_backward in HOPPER_BACKWARD_ROWS:
        for D, Dv in itertools.product(range(of_backward.min_D, of_backward.max_D + 1, 8), repeat=2):
            assert hopper_backward_shared_memory(of_backward.backward, D, Dv) <= SHARED_LIMITS["sm_90"]
    for row in HOPPER_ROWS:
        at_entry, roles = HOPPER_REGISTERS[row.forward.num_consumers]
        # the first role gets what the others leave; the producer's registers are taken for a whole warpgroup
        assert len(roles) == row.forward.num_consumers
        assert at_entry * (len(roles) + 1) - sum(roles) >= roles[0] and all(n % 8 == 0 for n in roles)
        assert at_entry * (len(roles) + 1) * 128 <= 65536


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x, None),
        (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), None),
        (lambda x: x[..., :64], None),
        (lambda x: x[:, :, ::2], None),
        (lambda x: x[:1].as_strided((1, 3, 40, 128), (7, 40 * 128, 128, 1)), None),
        (lambda x: x.mT.contiguous().mT, "contiguous last dimension"),
        (lambda x: x[..., 4:68], "multiple of 16 bytes"),
        (lambda x: x.new_empty(2, 3, 40, 132)[..., :128], "multiples of 16 bytes"),
        (lambda x: x[:, :1].expand(2, 3, 40, 128), "not 0"),
    ],
)
def test_what_tma_reads(change: Any, words: str | None) -> None:
    x = torch.empty(2, 3, 40, 128, dtype=torch.bfloat16)
    changed = change(x)
    assert tma_obstacle_of(x, x, x) is None
    for tensors in ((changed, x, x), (x, changed, x), (x, x, changed)):
        obstacle = tma_obstacle_of(*tensors)
        if words is None:
            assert obstacle is None
        else:
            assert obstacle is not None and words in obstacle
