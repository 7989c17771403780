"""eager against the reference in float64, and against plain torch in the same dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anymask import causal, document, eager, padding, reference, softcap
from anymask.blocks.block_map import BlockMap
from anymask.blocks.build import build
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import trace
from tests.cases import MASKS, SCORES, Sizes

# [B, Hq, Sq, d]: q, k, v and dout in four layouts, dout with d not innermost
LAYOUTS = {"q": (0, 2, 1, 3), "k": (0, 1, 2, 3), "v": (2, 0, 1, 3), "dout": (0, 1, 3, 2)}


@dataclass
class Attention:
    """Inputs of one call, and what runs it."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    mods: Mods
    bindings: Any
    blocks: BlockMap
    scale: float = 0.3

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def eager(self) -> dict[str, Tensor]:
        tail = (self.mods, self.bindings, self.blocks, self.scale)
        out, lse = eager.forward(*self.inputs, *tail)
        dq, dk, dv = eager.backward(self.dout, self.dlse, *self.inputs, out, lse, *tail)
        return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}

    def reference(self) -> dict[str, Tensor]:
        tail = (self.mods, self.bindings, self.scale)
        inputs = [x.double() for x in self.inputs]
        out, lse = reference.forward(*inputs, *tail)
        dq, dk, dv = reference.backward(self.dout.double(), self.dlse, *inputs, *tail)
        return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def laid_out(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random values in a tensor of this shape whose memory order is LAYOUTS[name]."""
    order = LAYOUTS[name]
    x = torch.randn([shape[axis] for axis in order], generator=generator, dtype=torch.float64)
    return x.to(dtype).permute([order.index(axis) for axis in range(4)])


def make(
    mask: Any = None,
    score_mod: Any = None,
    *,
    B: int = 2,
    Hq: int = 4,
    Hkv: int = 2,
    Sq: int = 75,
    Skv: int = 101,
    D: int = 16,
    Dv: int = 24,
    tile: tuple[int, int] = (32, 16),
    dtype: torch.dtype = torch.float32,
) -> Attention:
    generator = torch.Generator().manual_seed(5)
    program = trace(mask, score_mod)
    bindings = program.bindings
    mods = Mods.of(text_of(program.mask, program.score), bindings.ints, bindings.floats)
    return Attention(
        q=laid_out("q", (B, Hq, Sq, D), dtype, generator),
        k=laid_out("k", (B, Hkv, Skv, D), dtype, generator),
        v=laid_out("v", (B, Hkv, Skv, Dv), dtype, generator),
        dout=laid_out("dout", (B, Hq, Sq, Dv), dtype, generator),
        dlse=torch.randn(B, Hq, Sq, generator=generator),
        mods=mods,
        bindings=bindings,
        blocks=BlockMap(build(mods.mask, bindings, B, Hq, Sq, Skv, torch.device("cpu"), tile), Sq, Skv, tile),
    )


def check(case: Attention, tolerance: float = 2e-5) -> dict[str, Tensor]:
    """Compare all five results with the reference; the tolerance is relative to the largest element."""
    results = case.eager()
    for name, expected in case.reference().items():
        result = results[name]
        assert result.dtype == (torch.float32 if name == "lse" else case.q.dtype)
        assert result.shape == expected.shape
        largest = max([1.0, *expected[expected.isfinite()].abs().sort().values[-1:].tolist()])
        torch.testing.assert_close(
            result.double(), expected.double(), rtol=0, atol=tolerance * largest, msg=lambda text: f"{name}: {text}"
        )
    return results


SIZES = Sizes(B=2, H=4, Sq=75, Skv=101)


@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name: str) -> None:
    check(make(MASKS[name](SIZES)))


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("mask", [None, "documents_window", "window_per_head"])
def test_every_score_function(name: str, mask: str | None) -> None:
    check(make(mask and MASKS[mask](SIZES), SCORES[name](SIZES)))


@pytest.mark.parametrize("mask", ["strided", "block_table", "mode_1", "window_per_head", "heads_differ"])
@pytest.mark.parametrize("chunk_size", [1, 4000])
def test_chunks_of_keys_heads_and_batches(monkeypatch: pytest.MonkeyPatch, chunk_size: int, mask: str) -> None:
    monkeypatch.setattr(eager, "CHUNK_SIZE", chunk_size)
    check(make(MASKS[mask](SIZES), SCORES["capped_and_biased"](SIZES)))


@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 1, "Hq": 1, "Hkv": 1, "Sq": 1, "Skv": 1},
        {"B": 1, "Hq": 6, "Hkv": 1, "Sq": 1, "Skv": 300},
        {"B": 3, "Hq": 3, "Hkv": 3, "Sq": 130, "Skv": 7},
        {"B": 1, "Hq": 8, "Hkv": 2, "Sq": 64, "Skv": 64, "D": 64, "Dv": 8},
        {"tile": (128, 128)},
        {"tile": (16, 64)},
        {"Sq": 0},
        {"Skv": 0},
        {"B": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [None, causal(), lambda b, h, q, k: (k <= 2 * q) & (k % 7 != h)])
def test_shapes(sizes: dict[str, Any], mask: Any) -> None:
    check(make(mask, **sizes))


def test_row_without_keys() -> None:
    results = check(make(padding(torch.tensor([0, 40])) & (lambda b, h, q, k: (q != 3) & (q // 32 != 1))))
    for rows in (results[name][1, :, [3, *range(32, 64)]] for name in ("out", "dq")):
        assert (rows == 0).all()
    assert (results["lse"][0] == -math.inf).all()
    assert all((results[name][0] == 0).all() for name in ("out", "dq", "dk", "dv"))


def test_row_without_keys_by_the_score_function() -> None:
    results = check(make(causal(), lambda s, b, h, q, k: torch.where(q % 5 == 2, -float("inf"), s * s)))
    assert (results["lse"][:, :, 2::5] == -math.inf).all()


def test_hidden_scores_have_no_influence() -> None:
    """log(q - k) and its slope are nan above the diagonal and -inf on it."""
    check(make(causal(offset=-1), lambda s, b, h, q, k: s * torch.log((q - k) * 1.0)))


def test_hidden_key_may_be_nan() -> None:
    case = make(padding(torch.tensor([90, 60])))
    expected, _ = eager.forward(*case.inputs, case.mods, case.bindings, case.blocks, case.scale)
    case.k[0, :, 90:] = math.nan
    case.k[1, :, 60:] = math.inf
    out, _ = eager.forward(*case.inputs, case.mods, case.bindings, case.blocks, case.scale)
    assert torch.equal(out, expected)


def test_large_scores() -> None:
    case = make(causal(), softcap(900.0))
    case.scale = 300.0
    check(case, tolerance=1e-3)


def test_no_gradient_of_lse() -> None:
    case = make(causal())
    case.dlse = None
    check(case)


def test_map_per_head_and_batch_of_a_shared_mask() -> None:
    case = make(causal() & document(torch.arange(101) // 30))
    assert case.blocks.shape[:2] == (1, 1)
    shared = case.eager()
    kinds = case.blocks.kinds.expand(2, 4, -1, -1).contiguous()
    case.blocks = BlockMap(kinds, case.blocks.Sq, case.blocks.Skv, case.blocks.tile)
    for name, result in check(case).items():
        torch.testing.assert_close(result, shared[name])


def plain(case: Attention) -> dict[str, Tensor]:
    """Dense attention and its gradients in the dtype of the inputs, with torch's own operations."""
    B, Hq, Sq, Skv = *case.q.shape[:3], case.k.shape[2]
    q, k, v = (x.detach().clone().requires_grad_() for x in case.inputs)
    keys, values = (x.repeat_interleave(Hq // x.shape[1], 1) for x in (k, v))
    scores = (q @ keys.mT * case.scale).masked_fill(~causal(Skv - Sq).to_dense(B, Hq, Sq, Skv), -math.inf)
    out = scores.softmax(-1) @ values
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), case.dout)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_at_most_twice_that_of_plain_torch(dtype: torch.dtype) -> None:
    case = make(causal(26), Sq=300, Skv=326, D=64, Dv=48, tile=(64, 64), dtype=dtype)
    case.dlse = None
    exact, ours, theirs = case.reference(), case.eager(), plain(case)
    for name, result in theirs.items():
        error, budget = ((x.double() - exact[name]).abs().amax() for x in (ours[name], result))
        assert error <= 2 * budget, name


def test_float64_keeps_float64_accuracy() -> None:
    case = make(causal(), softcap(3.0), dtype=torch.float64)
    results = case.eager()
    for name, expected in case.reference().items():
        torch.testing.assert_close(results[name], expected, rtol=0, atol=1e-6 if name == "lse" else 1e-12)


@pytest.mark.parametrize("score_mod", [None, softcap(2.0)], ids=["plain", "softcap"])
def test_gradcheck(score_mod: Any) -> None:
    case = make(causal(2), score_mod, B=1, Hq=2, Hkv=1, Sq=5, Skv=7, D=8, Dv=8, tile=(4, 4), dtype=torch.float64)
    tail = (case.mods, case.bindings, case.blocks, case.scale)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            out, lse = eager.forward(*inputs, *tail)
            ctx.save_for_backward(*inputs, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> Any:
            return eager.backward(dout, None, *ctx.saved_tensors, *tail)

    assert torch.autograd.gradcheck(Function.apply, [x.requires_grad_() for x in case.inputs])


def test_bitwise_repeatable() -> None:
    case = make(MASKS["block_table"](SIZES))
    first = case.eager()
    assert all(torch.equal(result, first[name]) for name, result in case.eager().items())


class LargestStorage(TorchDispatchMode):
    """Remembers the bytes of the largest storage that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    "mask", [None, causal(), lambda b, h, q, k: (q - k) % 128 < 64], ids=["none", "causal", "strided"]
)
@pytest.mark.parametrize("sizes", [{"Sq": 512, "Skv": 512}, {"Sq": 1, "Skv": 4096}, {"B": 20, "Skv": 128}], ids=str)
def test_memory_of_a_chunk_is_bounded(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any], mask: Any) -> None:
    monkeypatch.setattr(eager, "CHUNK_SIZE", 1 << 13)
    case = make(mask, D=8, Dv=8, tile=(64, 64), **sizes)
    largest_input = max(x.untyped_storage().nbytes() for x in case.inputs)
    with LargestStorage() as largest:
        case.eager()
    assert largest.bytes <= max(4 << 13, largest_input)
