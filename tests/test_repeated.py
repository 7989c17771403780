"""Repeated calls of the kernels: what is kept from the first one never shows in a result, and holds no tensor."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from anymask import (
    UnsupportedError,
    alibi,
    attention,
    block_map,
    causal,
    clear_cache,
    document,
    ops,
    sliding_window,
    softcap,
)
from anymask.kernels import likeness, map_launch, recipes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter; tests/test_gpu.py has its own")
KERNELS = ("forward", "dq", "dkdv", "walk", "order")


def qkv(S: int = 40, Hq: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, H, S, 16, generator=generator) for H in (Hq, 1, 1))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def results(tensors: tuple[Tensor, ...], **call: Any) -> list[Tensor]:
    """out, lse and the gradients."""
    out, lse = attention(*tensors, return_lse=True, **call)
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.clamp_min(-10).sum(), tensors)]


def forget() -> None:
    clear_cache()
    made = (recipes.forward_recipe, recipes.backward_recipes, map_launch._walk_recipes)
    for kept in (likeness.likeness, *made):
        kept.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What kernels would be launched with, as far as it is the same for another call with the same tensors."""
    seen: list[Any] = []

    def described(x: Any) -> Any:
        if isinstance(x, Tensor):
            return (x.shape, x.stride(), x.dtype, x.data_ptr() % 16)
        return tuple(map(described, x)) if isinstance(x, tuple) else (type(x), x)

    for name in KERNELS:
        kernel = (vars(recipes) | vars(map_launch))[f"{name}_kernel"]

        def note(*args: Any, name: str = name, **options: Any) -> None:
            seen.append((name, described(args), options))

        monkeypatch.setattr(kernel, "run", note)
    yield seen
    forget()  # walks that no kernel wrote


def variations() -> Iterator[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """One call, and calls that differ from it in one thing."""
    q, k, v = qkv()
    ids = torch.arange(40, dtype=torch.int32) // 11
    mask = causal() & document(ids)
    yield (q, k, v), {"mask": mask}
    yield qkv(seed=1), {"mask": mask}
    yield (q, k, v), {"mask": causal() & document(torch.arange(40, dtype=torch.int32) // 7)}
    yield (q, k, v), {"mask": causal() & document(ids.long())}
    yield (q, k, v), {"mask": causal() & document(torch.arange(41, dtype=torch.int32)[1:] // 9)}  # 4 bytes on
    for scale in (0.5, 1, 1.0, -1.0):
        yield (q, k, v), {"mask": mask, "scale": scale}
    yield (torch.randn(1, 40, 2, 16).transpose(1, 2).requires_grad_(), k, v), {"mask": mask}
    yield (torch.randn(1281)[1:].view(1, 2, 40, 16).requires_grad_(), k, v), {"mask": mask}
    yield (torch.randn(1, 2, 40, 16)[:, :, :20].requires_grad_(), k, v), {"mask": mask}  # the strides of q
    yield (q, k, k), {"mask": mask}
    for width in (1, 16, 17):
        yield (q, k, v), {"mask": sliding_window(width, 0)}
    yield qkv(48), {"mask": causal()}
    yield qkv(Hq=4), {"mask": mask}
    yield (q, k, v), {"mask": mask, "score_mod": softcap(2.0)}
    yield (q, k, v), {"mask": mask, "score_mod": softcap(3.0)}
    yield (q, k, v), {"mask": mask, "score_mod": alibi(torch.rand(2, dtype=torch.float64))}
    yield (q, k, v), {"mask": None}
    yield (q, k, v), {"mask": mask, "config": {"forward": {"BLOCK_Q": 16, "BLOCK_KV": 16}}}
    yield tuple(x.detach().double().half().requires_grad_() for x in (q, k, v)), {"mask": mask}


def test_a_repeated_call_launches_what_a_first_one_would(launches: list[Any]) -> None:
    forget()
    calls = list(variations())
    for tensors, call in calls:
        results(tensors, **call, backend="triton")
    for tensors, call in calls:
        launches.clear()
        results(tensors, **call, backend="triton")
        repeated = list(launches)
        assert [launch[0] for launch in repeated] == ["forward", "dq", "dkdv"]  # the walks are kept
        forget()
        launches.clear()
        results(tensors, **call, backend="triton")
        assert repeated == [launch for launch in launches if launch[0] not in ("walk", "order")]
        for others, other in calls:
            results(others, **other, backend="triton")


def test_a_scale_is_a_float(launches: list[Any]) -> None:
    seen = []
    for scale in (1, 1.0, True, torch.ones(())):
        forget()
        launches.clear()
        results(qkv(), mask=causal(), scale=scale, backend="triton")
        seen.append(list(launches))
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_what_changed_is_seen() -> None:
    q, k, v = qkv()
    ids = torch.zeros(40, dtype=torch.int32)
    slopes = torch.rand(2)

    def check(**call: Any) -> None:
        for got, expected in zip(results((q, k, v), **call, backend="triton"), results((q, k, v), **call), strict=True):
            torch.testing.assert_close(got, expected)

    for start in (13, 20, 33):
        check(mask=causal() & document(ids), score_mod=alibi(slopes))
        ids[start:] += 1
        slopes *= 2
    blocks = block_map(causal() & document(ids), 1, 2, 40, 40, device="cpu", tile=16)
    other = block_map(document(ids), 1, 2, 40, 40, device="cpu", tile=16)
    for given in (blocks, other, blocks):
        check(block_map=given)
    ids.set_(torch.arange(40, dtype=torch.int32) // 5)
    check(mask=causal() & document(ids))
    with torch.inference_mode():
        ids = torch.zeros(40, dtype=torch.int32)
        for start in (13, 20):
            ids[start:] += 1
            got = attention(q, k, v, mask=document(ids), backend="triton")
            torch.testing.assert_close(got, attention(q, k, v, mask=document(ids)))


def test_nothing_is_kept_alive() -> None:
    forget()
    q, k, v = qkv()
    ids = torch.zeros(40, dtype=torch.int32)
    blocks = block_map(document(ids), 1, 2, 40, 40, device="cpu", tile=16)
    for call in ({"mask": causal() & document(ids)}, {"block_map": blocks}):
        out, *gradients = results((q, k, v), **call, backend="triton")
        results((q, k, v), **call, backend="triton")
    clear_cache()  # the map of document(ids)
    results((q, k, v), block_map=blocks, backend="triton")
    seen = [weakref.ref(x) for x in (q, k, v, ids, out, *gradients, blocks.kinds)]
    del q, k, v, ids, out, gradients, blocks, call
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)


def test_saved_tensors_may_come_back_with_other_strides() -> None:
    """As those of torch.autograd.graph.save_on_cpu do."""
    q = torch.randn(1, 40, 2, 16).transpose(1, 2).requires_grad_()
    _, k, v = qkv()
    table = (torch.rand(40, 40) < 0.5).t()
    expected = results((q, k, v), mask=table, backend="triton")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous().clone(), lambda x: x):
        got = results((q, k, v), mask=table, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_captured_tensors_that_change_before_the_backward_are_noticed() -> None:
    q, k, v = qkv()
    ids = torch.zeros(40, dtype=torch.int32)
    for _ in range(2):
        out = attention(q, k, v, mask=document(ids), backend="triton")
    ids[5:] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_only_one_gradient_is_asked_for() -> None:
    q, k, v = qkv()
    for of in (0, 1):
        got = attention(q, k, v, mask=causal(), return_lse=True, backend="triton")[of].sum()
        expected = attention(q, k, v, mask=causal(), return_lse=True)[of].sum()
        for a, b in zip(torch.autograd.grad(got, (q, k)), torch.autograd.grad(expected, (q, k)), strict=True):
            torch.testing.assert_close(a, b)


def test_a_gradient_where_one_is_asked_for() -> None:
    q, k, v = qkv()
    plain = tuple(x.detach() for x in (q, k, v))
    expected = results((q, k, v), mask=causal(), backend="triton")
    for _ in range(2):
        for of, x in enumerate((q, k, v)):
            tensors = (*plain[:of], x, *plain[of + 1 :])
            out, lse = attention(*tensors, mask=causal(), return_lse=True, backend="triton")
            (got,) = torch.autograd.grad(out.square().sum() + lse.clamp_min(-10).sum(), x)
            assert torch.equal(got, expected[2 + of])
        out, lse = attention(*plain, mask=causal(), return_lse=True, backend="triton")
        assert not out.requires_grad and not lse.requires_grad
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                got = attention(q, k, v, mask=causal(), return_lse=True, backend="triton")
            assert not any(x.requires_grad for x in got)
            assert all(torch.equal(a, b) for a, b in zip(got, expected[:2], strict=True))


def test_forward_mode_is_not_passed_by() -> None:
    q, k, v = (x.detach() for x in qkv())
    attention(q, k, v, mask=causal(), backend="triton")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            attention(dual, k, v, mask=causal(), backend="triton")


def test_no_second_derivative_is_silent() -> None:
    q, k, v = qkv(8)
    (dq,) = torch.autograd.grad(attention(q, k, v, backend="triton").sum(), q, create_graph=True)
    torch.testing.assert_close(dq, torch.autograd.grad(attention(q, k, v).sum(), q)[0])
    with pytest.raises(UnsupportedError, match="second derivative"):
        torch.autograd.grad(dq.sum(), q)


def test_compiled_autograd() -> None:
    import torch._dynamo.compiled_autograd as compiled_autograd

    q, k, v = qkv()
    expected = results((q, k, v), mask=causal(), backend="triton")[2]
    out, lse = attention(q, k, v, mask=causal(), return_lse=True, backend="triton")
    with compiled_autograd._enable(torch.compile(backend="eager")):
        (out.square().sum() + lse.clamp_min(-10).sum()).backward()
    torch.testing.assert_close(q.grad, expected)
    torch._dynamo.reset()


def test_who_watches_sees_the_op() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    q, k, v = qkv()
    attention(q, k, v, mask=causal(), backend="triton")
    with Watch():
        attention(q, k, v, mask=causal(), backend="triton")
    assert ops.forward in seen
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.vmap(lambda x: attention(x, k, v, backend="triton"))(q[None])
