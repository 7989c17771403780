"""The Hopper backward without a GPU: what it is started with, and the two plain Triton kernels around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anymask import block_map, causal, clear_cache, document
from anymask.errors import UnsupportedError
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import trace
from anymask.kernels import hopper_launch, launch, plan
from anymask.kernels.configs import HopperBackwardConfig
from anymask.kernels.footprint import chunks
from anymask.kernels.recipe import Layout, Recipe
from anymask.problem import Problem, dense_like
from anymask.testing import inputs

NAN = float("nan")


@pytest.mark.parametrize("D, Dv", [(64, 128), (72, 40)])
@pytest.mark.parametrize("has_dlse", [False, True])
@pytest.mark.parametrize("is_fused", [False, True])
def test_rows(is_fused: bool, has_dlse: bool, D: int, Dv: int) -> None:
    B, Hq, Sq = 2, 3, 70
    *_, dout, dlse = inputs(B, Hq, Hq, Sq, 8, D, Dv, torch.float16)
    out = torch.randn(B, Sq, Hq, Dv).half().transpose(1, 2)
    lse = torch.randn(B, Hq, Sq)
    lse[0, 1, 3] = -torch.inf
    q = Layout.of(torch.empty(B, Hq, Sq, D, dtype=torch.float16))
    layout = hopper_launch.rows_layout(q)
    memory = torch.full((B * Hq * 2 * layout.strides[2],), NAN)
    rows = memory.as_strided(layout.shape, layout.strides)
    sums = torch.full(hopper_launch.sum_layout(q).shape, NAN)
    recipe = hopper_launch.rows_recipe(
        Layout.of(out), Layout.of(dout), layout, D, has_dlse, is_fused, {"ALIGN": 1, "WIDE": False}
    )
    recipe(out, dout, lse, *[dlse] * has_dlse, rows, *[sums] * is_fused)
    expected = lse / torch.tensor(2.0).log()
    expected[0, 1, 3] = torch.inf
    torch.testing.assert_close(rows[:, :, 0], expected)
    delta = (out.float() * dout.float()).sum(-1) - (dlse if has_dlse else 0)
    torch.testing.assert_close(rows[:, :, 1], -delta, rtol=1e-5, atol=1e-4)
    assert int(memory.isnan().sum()) == B * Hq * 2 * (layout.strides[2] - Sq)  # nothing past the end
    assert bool((sums == 0).all()) == is_fused


@pytest.mark.parametrize("BLOCK_Q", [64, 128])
@pytest.mark.parametrize("D", [8, 64, 72])
def test_dq_of_its_sum(D: int, BLOCK_Q: int) -> None:
    """Of each product, by columns, chunks or queries, a warp has 16 rows, a thread two pairs of neighbours."""
    B, Hq, Sq = 2, 3, 70
    dq = torch.full((B, Sq, Hq, D), NAN, dtype=torch.float16).transpose(1, 2)
    config = HopperBackwardConfig(num_stages=2, is_fused=True, BLOCK_Q=BLOCK_Q)
    sums = torch.randn(hopper_launch.sum_layout(Layout.of(dq)).shape)
    recipe = hopper_launch.dq_of_sum_recipe(Layout.of(dq), 0.5, config, {"ALIGN": 8, "WIDE": False})
    recipe(sums, dq)
    parts = 2 if BLOCK_Q == 64 and len(chunks(D)) == 1 else 1
    products = [columns // parts for columns in chunks(D) for _ in range(parts)]
    tiles = sums.reshape(B, Hq, 2, 64 * sum(products))
    expected = torch.empty(B, Hq, 2, 64, sum(products))
    first = 0
    for columns in products:
        for row in range(64):
            for column in range(columns):
                thread = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
                place = 64 * first + (column // 8 * 128 + thread) * 4 + row // 8 % 2 * 2 + column % 2
                expected[..., row, first + column] = tiles[..., place]
        first += columns
    assert torch.equal(dq, (expected.reshape(B, Hq, 128, -1)[:, :, :Sq, :D] * 0.5).half())


Launch = tuple[str, tuple[Tensor, ...]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Kernels' names and the tensors that their recipes are called with. They do not run."""
    noted: list[Launch] = []
    clear_cache()  # of walks that an earlier test made

    def note(recipe: Any, *tensors: Tensor) -> None:
        noted.append((recipe._kernel.__name__, tensors))

    monkeypatch.setattr(Recipe, "__call__", note)
    monkeypatch.setattr(plan, "_triton_version", lambda: "3.6.0")
    return noted


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, of_dkdv: dict[str, Any], **of_dq: Any
) -> tuple[Tensor, ...]:
    program = trace(mask, None, q.device)
    mods = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats)
    problem = Problem.of(q, k, v)
    chosen = plan.choose(problem, mods, (64, 64), arch="sm_90", config={"dkdv": of_dkdv, **of_dq})
    blocks = block_map(mask, problem.B, problem.Hq, problem.Sq, problem.Skv, device="cpu", tile=64)
    out, lse = torch.empty_like(dout), torch.empty(*q.shape[:3])
    prepared = launch.prepare(q, k, v, mods, program.bindings, blocks, chosen, 0.125)
    return prepared.backward(dout, None, q, k, v, out, lse, program.bindings.captures)


@pytest.mark.parametrize("mask", [None, causal(), document(torch.zeros(90, dtype=torch.int32))], ids=str)
@pytest.mark.parametrize(
    "of_dkdv, of_dq, last",
    [
        ({"is_fused": False}, {}, "hopper_dq_kernel"),
        ({"is_fused": False, "num_consumers": 1}, {"dq": {"BLOCK_Q": 64}}, "dq_kernel"),
        ({"is_fused": True}, {}, "dq_of_sum_kernel"),
        ({"is_fused": True, "is_persistent": True}, {}, "dq_of_sum_kernel"),
    ],
)
def test_what_is_started(
    launches: list[Launch], of_dkdv: dict[str, Any], of_dq: dict[str, Any], last: str, mask: Any
) -> None:
    q, k, v, *_ = (x.detach() for x in inputs(2, 4, 2, 90, 80, 64, 128, torch.float16))
    dout = torch.randn(2, 4, 90, 128).half()
    gradients = backward(dout, q, k, v, mask, of_dkdv, **of_dq)
    is_fused, names = of_dkdv["is_fused"], ["rows_kernel", "hopper_backward_kernel", last]
    assert [name for name, _ in launches if not name.startswith(("walk", "order"))] == names
    assert (len(launches) > 3) == (mask is not None)  # only a mask is walked
    (_, first), (_, second), (_, third) = launches[-3:]
    assert all(a is b for a, b in zip(second[:4], (q, k, v, dout), strict=True))
    num_walk, num_captures = (2, 0) if mask is not None else (0, 0)
    num_captures = 1 if "document" in str(mask) else 0
    num_counters = 1 if "is_persistent" in of_dkdv else 0
    assert len(second) == 4 + 1 + is_fused + 2 + num_counters + num_walk + num_captures
    rows = second[4]
    assert rows is first[3] and rows.stride(2) == 92
    for gradient, x in zip(gradients, (q, k, v), strict=True):
        assert gradient.stride() == dense_like(x, x.shape[3]).stride() and gradient.dtype == x.dtype
    dk_dv = second[6:8] if is_fused else second[5:7]
    assert all(a is b for a, b in zip(dk_dv, gradients[1:], strict=True))
    if num_counters:
        assert second[8].dtype == torch.int32 and second[8].tolist() == [0, 0]
    if is_fused:
        sums = second[5]
        assert sums is first[4] and sums is third[0] and third[1] is gradients[0]
        assert sums.dtype == torch.float32 and sums.shape == (2, 4, 2 * 64 * 64 // 256, 256) and sums.is_contiguous()
    elif of_dq:
        assert third[6] is gradients[0]
    else:
        assert all(a is b for a, b in zip(third[:6], (q, k, v, dout, gradients[0], rows), strict=True))
        assert len(third) == 6 + num_walk + num_captures


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:, :, :1, :1].expand(x.shape),
        lambda x: torch.nn.functional.pad(x, (4, 4))[..., 4:-4],
    ],
    ids=["columns first", "expanded", "offset"],
)
def test_what_tma_cannot_read_is_copied(launches: list[Launch], change: Any) -> None:
    q, k, v = (torch.randn(1, 2, 70, 64).half() for _ in range(3))
    dout = change(torch.randn(1, 2, 70, 64).half())
    backward(dout, q, k, v, None, {"is_fused": True})
    copy = launches[1][1][3]
    assert copy is not dout and torch.equal(copy, dout) and plan.is_readable_by_tma(copy)


def test_gradients_keep_the_layout_of_what_was_copied(launches: list[Launch]) -> None:
    """A hook on saved tensors may bring them back laid out in a way that TMA cannot read."""
    q, k, v = (torch.randn(1, 2, 70, 64).half() for _ in range(3))
    program = trace(None, None, q.device)
    mods = Mods.of(text_of(program.mask, program.score), (), ())
    chosen = plan.choose(Problem.of(q, k, v), mods, (64, 64), arch="sm_90", config={"dkdv": {"is_fused": True}})
    blocks = block_map(None, 1, 2, 70, 70, device="cpu", tile=64)
    prepared = launch.prepare(q, k, v, mods, program.bindings, blocks, chosen, 0.125)
    dout, lse = torch.empty_like(q), torch.empty(1, 2, 70)
    other = q.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)[:, :, :, :].mT.contiguous().mT
    dq, *_ = prepared.backward(dout, None, other, k, v, dout, lse, ())
    assert launches[1][1][0].is_contiguous() and dq.stride() == dense_like(other, 64).stride()


def test_deterministic_and_fused_is_refused() -> None:
    q = torch.empty(1, 2, 70, 64, dtype=torch.float16)
    with pytest.raises(UnsupportedError, match="is_fused=False"):
        plan.choose(
            Problem.of(q, q, q),
            Mods(),
            (64, 64),
            arch="sm_90",
            config={"dkdv": {"is_fused": True}},
            deterministic=True,
        )
