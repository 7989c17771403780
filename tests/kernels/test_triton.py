"""The Triton kernels against the float64 reference: on a GPU, else in Triton's interpreter (which lacks bfloat16)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from anymask import causal, from_function, full, reference, sliding_window, softcap
from anymask.blocks.block_map import BlockMap
from anymask.blocks.build import build
from anymask.expr.bindings import Bindings
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import trace
from anymask.kernels import launch, recipes
from anymask.kernels.configs import Config
from anymask.kernels.plan import Plan, arch_of, choose
from anymask.problem import Problem
from anymask.testing import check, inputs
from tests.cases import MASKS, SCORES, Sizes
from tests.plain import plain

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),  # numpy: nan, inf, deprecations
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def prepare(
    mask: Any,
    score_mod: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile: tuple[int, int],
    config: Mapping[str, Any] | None = None,
) -> tuple[Mods, Bindings, BlockMap, Plan]:
    program = trace(mask, score_mod, q.device)
    mods = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats)
    problem = Problem.of(q, k, v)
    sizes = (problem.B, problem.Hq, problem.Sq, problem.Skv)
    kinds = build(mods.mask, program.bindings, *sizes, q.device, tile)
    blocks = BlockMap(kinds, problem.Sq, problem.Skv, tile)
    plan = choose(problem, mods, tile, arch=arch_of(q.device), backend="triton", config=config)
    return mods, program.bindings, blocks, plan


def compute(
    mask: Any,
    score_mod: Any,
    tensors: tuple[Tensor, ...],
    tile: tuple[int, int] = (32, 32),
    scale: float | None = None,
    config: Mapping[str, Any] | None = None,
    slack: float = 2.0,
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv by the kernels, checked against the reference."""
    q, k, v, dout, dlse = (x.detach() for x in tensors)
    mods, bindings, blocks, plan = prepare(mask, score_mod, q, k, v, tile, config)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, lse = launch.forward(q, k, v, mods, bindings, blocks, plan, scale)
    gradients = launch.backward(dout, dlse, q, k, v, out, lse, mods, bindings, blocks, plan, scale)
    double = [x.double() for x in (q, k, v)]
    args = (mods, bindings, scale)
    exact = (*reference.forward(*double, *args), *reference.backward(dout, dlse, *double, *args))
    check((out, lse, *gradients), exact, plain(q, k, v, dout, dlse, *args), slack)
    return out, lse, *gradients


ZOO = (2, 2, 1, 40, 52, 16, 16)  # B, Hq, Hkv, Sq, Skv, D, Dv

# The masks of `make check`; `make test` runs all.
QUICK = {"everything", "nothing", "causal_offset_per_batch", "documents_unsorted_padded", "mode_1", "window_per_head"}
QUICK |= {"random_tensor", "block_diffusion", "neighbourhood_2d", "relative_table", "heads_differ", "flashmask"}


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in MASKS])
def test_mask(name: str) -> None:
    B, H, _, Sq, Skv, *_ = ZOO
    compute(MASKS[name](Sizes(B, H, Sq, Skv, DEVICE)), None, inputs(*ZOO, torch.float32, DEVICE))


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("mask", [full(), causal(offset=-3)], ids=["unmasked", "causal"])
def test_score_function(name: str, mask: Any) -> None:
    B, H, _, Sq, Skv, *_ = ZOO
    compute(mask, SCORES[name](Sizes(B, H, Sq, Skv, DEVICE)), inputs(*ZOO, torch.float32, DEVICE))


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 4, 1, 33, 65, 24, 40),
        (2, 6, 3, 17, 16, 8, 72),
        (1, 1, 1, 1, 70, 128, 8),
        (1, 2, 2, 70, 1, 16, 16),
        (1, 2, 1, 64, 64, 32, 32),
        (3, 1, 1, 5, 3, 96, 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["f16", "f32"])
def test_sizes_layouts_and_dtypes(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    compute(causal(offset=sizes[4] - sizes[3]), softcap(3.0), inputs(*sizes, dtype, DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("D", range(8, 257, 8))
def test_every_head_dim(D: int) -> None:
    half = (torch.bfloat16, torch.float16)[D // 8 % 2]
    for dtype in (half, torch.float32) if D % 24 == 8 else (half,):
        compute(causal(), None, inputs(1, 2, 1, 200, 200, D, 264 - D, dtype, DEVICE), (128, 128))


@pytest.mark.parametrize("tile", [(16, 64), (64, 16), (128, 32), (256, 256)], ids=str)
def test_kernel_tiles_divide_map_tiles(tile: tuple[int, int]) -> None:
    small = Config(max(16, tile[0] // 4), max(16, tile[1] // 2), 4, 1)
    config = {"forward": small, "dkdv": small, "dq": small}
    tensors = inputs(1, 2, 1, 75, 90, 16, 16, torch.float32, DEVICE)
    compute(sliding_window(30, 4), None, tensors, tile, config=config)


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.4])
@pytest.mark.parametrize("mask", [causal(), full()], ids=["causal", "full"])
def test_any_scale(mask: Any, scale: float) -> None:
    compute(mask, None, inputs(1, 2, 1, 40, 40, 16, 16, torch.float32, DEVICE), scale=scale)


def test_what_lies_around_the_tensors_is_not_read() -> None:
    """q, k, v, dout and a captured vector are windows into NaN; ragged in every dimension."""

    def window(x: Tensor, value: float = math.nan) -> Tensor:
        whole = torch.full([size + 3 for size in x.shape], value, dtype=x.dtype, device=DEVICE)
        inside = whole[tuple(slice(1, size + 1) for size in x.shape)]
        return inside.copy_(x.detach())

    q, k, v, dout, dlse = (window(x) for x in inputs(2, 2, 1, 37, 45, 24, 40, torch.float32, DEVICE))
    bias = window(torch.rand(45, device=DEVICE))
    biased = lambda s, b, h, q_idx, kv_idx: s + bias[kv_idx]
    for mask in (full(), causal(), from_function(lambda b, h, q_idx, kv_idx: bias[kv_idx] > 0.3)):
        for score_mod in (None, biased):
            results = compute(mask, score_mod, (q, k, v, dout, dlse))
            assert not any(x.isnan().any() for x in results)


def test_rows_without_keys() -> None:
    """Out 0, lse -inf, gradients 0: hidden by the mask inside a tile, by whole tiles, or by a score of -inf."""
    tensors = inputs(1, 2, 1, 70, 70, 16, 16, torch.float32, DEVICE)
    hides = lambda s, b, h, q_idx, kv_idx: torch.where(q_idx % 7 == 3, -math.inf, s)
    q_at_least = from_function(lambda b, h, q_idx, kv_idx: q_idx >= 40)
    for mask, score_mod in ((q_at_least, None), (causal(offset=-20), None), (full(), hides), (~full(), hides)):
        out, lse, dq, *_ = compute(mask, score_mod, tensors)
        empty = lse == -math.inf
        assert empty.any() and not out[empty].any() and not dq[empty].any()


def test_derivative_does_not_matter_where_hidden() -> None:
    """sqrt(kv - q) has derivative inf and nan on hidden pairs, also in rows past the end."""
    tensors = inputs(1, 1, 1, 20, 40, 16, 16, torch.float32, DEVICE)
    score_mod = lambda s, b, h, q_idx, kv_idx: s + torch.sqrt((kv_idx - q_idx) * torch.exp(s))
    compute(from_function(lambda b, h, q_idx, kv_idx: kv_idx > q_idx), score_mod, tensors)


def test_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64-bit variants of the address arithmetic give the same."""
    addressing = recipes.addressing
    monkeypatch.setattr(recipes, "addressing", lambda *strides: addressing(*strides) | {"WIDE": True})
    recipes.forward_recipe.cache_clear()
    recipes.backward_recipes.cache_clear()
    compute(causal(), None, inputs(1, 2, 1, 40, 40, 24, 16, torch.float32, DEVICE))
    assert Bindings((torch.empty_strided((2, 2**31), (2**31, 1), device="meta"),)).wide_slots() == {0}
    assert not addressing((2**40, 2**40, 0, 0))["WIDE"] and addressing((1, 1, 2**23, 1))["WIDE"]


def test_runs_repeat_bitwise() -> None:
    tensors = inputs(1, 4, 1, 50, 70, 16, 16, torch.float16, DEVICE)
    first, second = (compute(causal(offset=20), softcap(2.0), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_a_gradient_of_lse() -> None:
    q, k, v, dout, dlse = (x.detach() for x in inputs(1, 2, 1, 40, 40, 16, 16, torch.float32, DEVICE))
    mods, bindings, blocks, plan = prepare(causal(), None, q, k, v, (32, 32))
    out, lse = launch.forward(q, k, v, mods, bindings, blocks, plan, 0.25)
    rest = (q, k, v, out, lse, mods, bindings, blocks, plan, 0.25)
    for a, b in zip(launch.backward(dout, None, *rest), launch.backward(dout, dlse * 0, *rest), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("B, Sq, Skv", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_empty_sizes(B: int, Sq: int, Skv: int) -> None:
    q, k, v, dout, dlse = (x.detach() for x in inputs(B, 2, 1, Sq, Skv, 16, 24, torch.float32, DEVICE))
    mods, bindings, blocks, plan = prepare(causal(), None, q, k, v, (32, 32))
    out, lse = launch.forward(q, k, v, mods, bindings, blocks, plan, 0.25)
    assert out.shape == (B, 2, Sq, 24) and not out.any() and (lse == -math.inf).all()
    dq, dk, dv = launch.backward(dout, dlse, q, k, v, out, lse, mods, bindings, blocks, plan, 0.25)
    for gradient, x in ((dq, q), (dk, k), (dv, v)):
        assert gradient.shape == x.shape and not gradient.any()


def test_outputs_are_laid_out_as_inputs() -> None:
    q, k, v, dout, dlse = (x.detach() for x in inputs(1, 2, 2, 33, 33, 16, 16, torch.float32, DEVICE))
    out, _, dq, *_ = compute(causal(), None, (q, k, v, dout, dlse))
    assert out.transpose(1, 2).is_contiguous() and dq.transpose(1, 2).is_contiguous()  # as q, a [B, S, H, D] tensor
    assert compute(causal(), None, (q.contiguous(), k, v, dout, dlse))[0].is_contiguous()
