"""torch.compile, checkpointing, autocast and the ops' contracts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anymask.ops as ops
from anymask import UnsupportedError, alibi, attention, block_map, causal, document, sliding_window, softcap
from anymask.expr.mods import text_of
from anymask.expr.trace import trace


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qkv(S: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, S, 16, generator=generator) for _ in range(3))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def results(function: Any, *args: Any) -> list[Tensor]:
    """out, lse and the gradients of a function of q, k, v and more."""
    out, lse = function(*args)
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.clamp_min(-10).sum(), args[:3])]


def packed(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, width: int, cap: float) -> Any:
    """Captured tensors, a captured int and a captured float, in functions made inside the compiled region."""

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (ids[b, q_idx] == ids[b, kv_idx]) & (max(q_idx - kv_idx, 0) < width)

    return attention(
        q, k, v, mask=causal() & mask, score_mod=lambda s, b, h, i, j: cap * torch.tanh(s / cap), return_lse=True
    )


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_equals_eager_when_sizes_tensors_and_numbers_change(dynamic: bool | None) -> None:
    compiled = torch.compile(packed, fullgraph=True, dynamic=dynamic)
    for S, width, cap in ((40, 9, 2.0), (40, 12, 2.0), (40, 15, 1.5), (57, 3, 1.5), (33, 3, 0.7)):
        ids = torch.randint(0, 3, (2, S), generator=torch.Generator().manual_seed(S + width))
        args = (*qkv(S, width), ids, width, cap)
        for got, expected in zip(results(compiled, *args), results(packed, *args), strict=True):
            torch.testing.assert_close(got, expected)


def test_a_mask_made_outside_the_compiled_region() -> None:
    ids = torch.randint(0, 3, (2, 40))
    mask, score_mod = causal() & document(ids), softcap(3.0).then(alibi(torch.rand(2)))

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Any:
        hidden = attention(q, k, v, mask=mask, score_mod=score_mod)
        return attention(hidden, k, v, mask=mask, return_lse=True)

    args = qkv()
    compiled = torch.compile(layers, fullgraph=True)
    for got, expected in zip(results(compiled, *args), results(layers, *args), strict=True):
        torch.testing.assert_close(got, expected)
    ids.zero_()  # in place: the compiled function must see it
    for got, expected in zip(results(compiled, *args), results(layers, *args), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_given_map_in_the_compiled_region() -> None:
    ids = torch.randint(0, 3, (2, 40))
    blocks = block_map(causal() & document(ids), 2, 2, 40, 40, device="cpu", tile=16)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention(q, k, v, block_map=blocks, score_mod=softcap(2.0), return_lse=True)

    args = qkv()
    compiled = torch.compile(layer, fullgraph=True)
    for got, expected in zip(results(compiled, *args), results(layer, *args), strict=True):
        torch.testing.assert_close(got, expected)


def test_ids_made_and_reused_inside_the_compiled_region() -> None:
    """Inductor may write the second ids into the first one's buffer: a map must never be served for the other."""

    def layers(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Any:
        first = attention(q, k, v, mask=document((ids + 1) // 2))
        return attention(first, k, v, mask=document((ids * 3) % 4), return_lse=True)

    args = (*qkv(), torch.randint(0, 9, (2, 40)))
    for got, expected in zip(
        results(torch.compile(layers, fullgraph=True), *args), results(layers, *args), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_a_mask_error_is_not_swallowed_by_the_compiler() -> None:
    def branch(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.fft.fft(q_idx) > 0

    with pytest.raises(Exception, match="not in the mask language"):
        torch.compile(lambda q, k, v: attention(q, k, v, mask=branch), fullgraph=True)(*qkv())


def test_opcheck() -> None:
    q, k, v = qkv(20)
    ids = torch.randint(0, 2, (2, 20))
    window = 7

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (ids[b, i] == ids[b, j]) & (i - j < window)

    program = trace(mask, lambda s, b, h, i, j: s * 0.5)
    captures, ints, floats = (list(x) for x in vars(program.bindings).values())
    text = text_of(program.mask, program.score)
    of_program = (captures, ints, floats, text)
    sizes = (2, 2, 20, 20, [16, 16], torch.device("cpu"))
    torch.library.opcheck(ops.block_map, (*of_program, *sizes))
    blocks = ops.block_map(*of_program, *sizes)
    how = (blocks, [16, 16], 0.25, None, None, None)
    torch.library.opcheck(ops.forward, (q, k, v, *of_program, *how))
    transposed = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.forward, (*transposed, *of_program, *how))
    out, lse = ops.forward(q.detach(), k.detach(), v.detach(), *of_program, *how)
    for dlse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), dlse, q.detach(), k.detach(), v.detach(), out, lse, *of_program, *how)
        torch.library.opcheck(ops.backward, arguments)


@pytest.mark.parametrize("is_selective", [False, True])
def test_activation_checkpointing(is_selective: bool) -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    ids = torch.randint(0, 3, (2, 40))
    calls: list[str] = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        calls.append(str(op))
        return CheckpointPolicy.MUST_SAVE if op is ops.forward else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention(q * 1.5, k, v, mask=causal() & document(ids), return_lse=True)

    options: dict[str, Any] = {"use_reentrant": False}
    if is_selective:
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)
    args = qkv()
    got = results(lambda *x: checkpoint(layer, *x, **options), *args)
    for a, b in zip(got, results(layer, *args), strict=True):
        torch.testing.assert_close(a, b)
    assert not is_selective or "anymask.forward.default" in calls


def test_autocast_casts_to_its_dtype() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k.double(), v, mask=causal())
    assert out.dtype is torch.bfloat16
    expected = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask=causal())
    assert torch.equal(out, expected)
    assert all(g.dtype is torch.float32 for g in torch.autograd.grad(out.float().sum(), (q, k, v)))


def test_functional_call() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(16, 16)
            self.register_buffer("ids", torch.randint(0, 3, (2, 40)))

        def forward(self, x: Tensor) -> Tensor:
            y = self.project(x)
            return attention(y, y, x, mask=causal() & document(self.ids))

    layer, x = Layer(), qkv()[0]
    parameters = {name: value.detach() * 2 for name, value in layer.state_dict().items() if name != "ids"}
    got = torch.func.functional_call(layer, parameters, (x,))
    with torch.no_grad():
        for value in layer.parameters():
            value.mul_(2)
    torch.testing.assert_close(got, layer(x))


def test_no_second_derivative_is_silent() -> None:
    q, k, v = qkv(8)
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        torch.autograd.grad(dq.sum(), q)


def test_a_window_that_changes_is_never_baked_in() -> None:
    def narrow(q: Tensor, k: Tensor, v: Tensor, width: int) -> Tensor:
        return attention(q, k, v, mask=sliding_window(width, 0))

    compiled = torch.compile(narrow, fullgraph=True)
    args = qkv()
    for width in (3, 5, 8, 0, 1, 21):
        torch.testing.assert_close(compiled(*args, width), narrow(*args, width))
