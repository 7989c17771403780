"""attention() and block_map(): edge cases, layouts, errors, and the cache of maps."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import anymask
from anymask import (
    InputError,
    MaskError,
    UnsupportedError,
    alibi,
    attention,
    block_map,
    cache_info,
    causal,
    clear_cache,
    document,
    padding,
    sliding_window,
    softcap,
)
from anymask.blocks import cache
from anymask.kernels.configs import HopperConfig
from anymask.testing import inputs


def grads(out: Tensor, lse: Tensor, qkv: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.sum() + lse.clamp_min(-9).sum(), qkv)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize(
    ("B", "Hq", "Hkv", "Sq", "Skv"),
    [
        (1, 1, 1, 1, 1),
        (2, 6, 2, 1, 37),
        (1, 2, 2, 33, 1),
        (0, 2, 2, 5, 5),
        (2, 2, 1, 0, 7),
        (2, 2, 2, 7, 0),
        (70, 1, 1, 3, 3),
    ],
)
def test_any_size(backend: str, B: int, Hq: int, Hkv: int, Sq: int, Skv: int) -> None:
    q, k, v, *_ = inputs(B, Hq, Hkv, Sq, Skv, 8, 16, torch.float32)
    out, lse = attention(q, k, v, mask=sliding_window(20, 20), return_lse=True, backend=backend)
    assert out.shape == (B, Hq, Sq, 16) and lse.shape == (B, Hq, Sq) and lse.dtype is torch.float32
    for gradient, x in zip(grads(out, lse, (q, k, v)), (q, k, v), strict=True):
        assert gradient.shape == x.shape and bool(gradient.isfinite().all())
    if Skv == 0:
        assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_a_row_that_sees_no_key(backend: str) -> None:
    q, k, v, dout, dlse = inputs(2, 2, 2, 40, 40, 16, 16, torch.float32)
    mask = padding(torch.tensor([40, 0])) & (lambda b, h, i, j: i % 3 != 0)
    out, lse = attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    hidden = torch.zeros(2, 1, 40, dtype=torch.bool)
    hidden[1], hidden[0, :, ::3] = True, True
    hidden = hidden.expand(2, 2, 40)
    assert bool((out[hidden] == 0).all()) and bool((lse[hidden] == -torch.inf).all())
    assert bool(lse[~hidden].isfinite().all())
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    assert bool((dq[hidden] == 0).all()) and bool((dk[1] == 0).all()) and bool((dv[1] == 0).all())
    assert all(bool(x.isfinite().all()) for x in (dq, dk, dv))


def test_gradient_checks_in_float64() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask, score_mod = (
        causal() & document(torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])),
        softcap(1.5).then(alibi(torch.rand(2))),
    )

    def outputs(*qkv: Tensor) -> Any:
        return attention(*qkv, mask=mask, score_mod=score_mod, return_lse=True)[0]

    assert torch.autograd.gradcheck(outputs, (q, k, v))


def test_out_keeps_the_layout_of_q() -> None:
    q, k, v = (torch.randn(2, 10, 3, 16).transpose(1, 2) for _ in range(3))
    assert attention(q, k, v).transpose(1, 2).is_contiguous()
    assert attention(q.contiguous(), k, v).is_contiguous()


def test_strides_do_not_matter() -> None:
    strange = inputs(2, 4, 2, 40, 50, 16, 24, torch.float32)
    plain = [x.detach().contiguous().requires_grad_() for x in strange[:3]]
    for got, expected in zip(
        *(
            (out, lse, *torch.autograd.grad((out, lse), qkv, strange[3:]))
            for qkv in (strange[:3], plain)
            for out, lse in [attention(*qkv, mask=sliding_window(9, 9), return_lse=True)]
        ),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    expanded = torch.randn(1, 1, 40, 16).expand(2, 4, 40, 16)
    torch.testing.assert_close(attention(expanded, expanded, expanded), attention(*[expanded.contiguous()] * 3))


BAD: dict[str, tuple[Any, str]] = {
    "three dimensions": (lambda q, k, v: attention(q[0], k, v), "transpose(1, 2)"),
    "no tensor": (lambda q, k, v: attention(q.tolist(), k, v), "must be a tensor"),
    "dtypes": (lambda q, k, v: attention(q, k.half(), v), "one dtype"),
    "integer": (lambda q, k, v: attention(q.int(), k.int(), v.int()), "float16, bfloat16"),
    "heads": (lambda q, k, v: attention(q[:, :3], k, v), "multiple of the 2"),
    "lengths": (lambda q, k, v: attention(q, k, v[:, :, :4]), "same length"),
    "batches": (lambda q, k, v: attention(q[:1], k, v), "batch sizes differ"),
    "head dims": (lambda q, k, v: attention(q[..., :8], k, v), "same head dim"),
    "odd head dim": (lambda q, k, v: attention(q[..., :12], k[..., :12], v), "multiple of 8"),
    "devices": (lambda q, k, v: attention(q, k.to("meta"), v), "one device"),
    "backend": (lambda q, k, v: attention(q, k, v, backend="cuda"), "none of gluon, triton, eager, reference"),
    "float mask": (lambda q, k, v: attention(q, k, v, mask=torch.zeros(8, 8)), "score_mod"),
    "short ids": (lambda q, k, v: attention(q, k, v, mask=document(torch.zeros(5).int())), "goes up to 7"),
    "ids of fewer batches": (lambda q, k, v: attention(q, k, v, mask=document(torch.zeros(1, 8).int())), "at b"),
    "config on eager": (lambda q, k, v: attention(q, k, v, config={"forward": {"BLOCK_Q": 64}}), "Triton kernels"),
    "hopper config on eager": (
        lambda q, k, v: attention(q, k, v, config={"forward": HopperConfig(128, 128, 2, True)}),
        "Triton kernels",
    ),
    "softcap 0": (lambda q, k, v: softcap(0.0), "above 0"),
    "ids and bounds": (lambda q, k, v: document(torch.zeros(3).int(), cu_seqlens=torch.zeros(3).int()), "either"),
    "map of other sizes": (
        lambda q, k, v: attention(q, k, v, block_map=block_map(causal(), 2, 4, 9, 8, device="cpu")),
        "Sq=9",
    ),
    "map of another mask": (
        lambda q, k, v: attention(
            q, k, v, mask=padding(torch.tensor([1, 2])), block_map=block_map(causal(), 2, 4, 8, 8, device="cpu")
        ),
        "another mask",
    ),
    "mask object as bool": (lambda q, k, v: causal() and causal(), "&"),
    "no function": (lambda q, k, v: causal() & 3, "a mask is a function"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what: str) -> None:
    call, expected = BAD[what]
    q, k, v = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    with pytest.raises((InputError, MaskError, UnsupportedError)) as caught:
        call(q, k, v)
    assert expected in str(caught.value)


def test_triton_on_a_cpu_raises_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.randn(1, 1, 8, 16)
    with pytest.raises(UnsupportedError, match="eager"):
        attention(q, q, q, backend="triton")


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from anymask import api

    built: list[int] = []
    original = api.ops.make_map
    monkeypatch.setattr(api.ops, "make_map", lambda *args: built.append(1) or original(*args))
    return built


def test_one_map_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    built = count_builds(monkeypatch)
    q = torch.randn(2, 2, 40, 16)
    ids = torch.randint(0, 3, (2, 40))
    mask = causal() & document(ids)
    for _ in range(3):
        attention(q, q, q, mask=mask)
        attention(q, q, q, mask=causal() & document(ids))  # an equal mask over the same ids
    assert len(built) == 1
    attention(q, q, q, mask=causal() & document(ids.clone()))
    assert len(built) == 2


def test_a_changed_mask_is_never_served_a_stale_map() -> None:
    q = torch.randn(2, 2, 40, 16)
    ids = torch.zeros(2, 40, dtype=torch.int32)
    mask = causal() & document(ids)
    before = attention(q, q, q, mask=mask)
    ids[:, 13:] = 1
    after = attention(q, q, q, mask=mask)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, attention(q, q, q, mask=mask, backend="reference"))
    width = 5

    def window(b: Any, h: Any, i: Any, j: Any) -> Any:
        return abs(i - j) < width

    narrow = attention(q, q, q, mask=window)
    width = 9
    wide = attention(q, q, q, mask=window)
    torch.testing.assert_close(wide, attention(q, q, q, mask=sliding_window(8, 8)))
    assert not torch.equal(narrow, wide)
    with torch.inference_mode():
        ids = torch.zeros(2, 40, dtype=torch.int32)
        mask = document(ids)
        attention(q, q, q, mask=mask)
        ids[:, 20:] = 1
        torch.testing.assert_close(attention(q, q, q, mask=mask), attention(q, q, q, mask=mask, backend="reference"))


def test_kept_maps_are_bounded_and_hold_no_captured_tensor() -> None:
    import gc
    import weakref

    q = torch.randn(1, 1, 8, 16)
    ids = torch.zeros(8, dtype=torch.int32)
    seen = weakref.ref(ids)
    attention(q, q, q, mask=document(ids))
    del ids
    gc.collect()
    assert seen() is None
    for n in range(cache.MOST + 9):
        attention(q, q, q, mask=sliding_window(n + 2, 0))
    assert len(cache._entries) == cache.MOST


def test_what_one_stream_made_is_not_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = 0
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: stream, raising=False)
    monkeypatch.setattr(cache, "_is_captured", lambda: False)

    def find() -> object:
        return cache.find("it", torch.device("cuda:0"), (), object)

    of_streams = []
    for stream in (0, 1, cache._PER_THREAD, 94628972954816):
        with ThreadPoolExecutor(1) as thread:
            mine, again, others = find(), find(), thread.submit(find).result()
        assert mine is again and (mine is others) == (stream != cache._PER_THREAD)
        of_streams.append(mine)
    assert len(set(of_streams)) == 4
    clear_cache()


def test_cache_info_tells_what_is_kept() -> None:
    clear_cache()
    assert cache_info() == (0, 0, 0, cache.MOST, 0)
    q, ids = torch.randn(1, 1, 256, 16), torch.zeros(256, dtype=torch.int32)
    mask = document(ids)
    for _ in range(3):
        attention(q, q, q, mask=mask)
    assert cache_info() == (2, 1, 1, cache.MOST, 2 * 4)  # tiles of 128 x 64, a byte each
    ids[100:] = 1
    attention(q, q, q, mask=mask)
    attention(q, q, q, mask=causal())
    assert cache_info()[:3] == (2, 3, 2)  # the map of the ids as they were is of no more use, and gone
    clear_cache()
    attention(q, q, q, mask=mask, backend="triton")
    attention(q, q, q, mask=mask, backend="triton")
    # a map; its walks: two words and three numbers for each of 2 rows, for forward and dQ, and of 4 rows; and the call
    assert cache_info() == (1, 3, 3, cache.MOST, 2 * 4 + (2 + 4) * (2 * 8 + 3 * 4))


def test_threads_share_maps() -> None:
    clear_cache()
    q = torch.randn(1, 1, 64, 16)
    masks = [sliding_window(n + 1, 0) for n in range(5)]
    expected = [attention(q, q, q, mask=mask, backend="reference") for mask in masks]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: attention(q, q, q, mask=masks[i % 5]), range(200)))
    for i, out in enumerate(results):
        torch.testing.assert_close(out, expected[i % 5])
    assert cache_info().kept == 5


def test_a_given_map_carries_its_mask() -> None:
    q = torch.randn(2, 2, 40, 16)
    ids = torch.randint(0, 3, (2, 40))
    mask = causal() & document(ids)
    blocks = block_map(mask, 2, 2, 40, 40, device="cpu", tile=(16, 8))
    alone = attention(q, q, q, block_map=blocks, score_mod=softcap(2.0))
    torch.testing.assert_close(alone, attention(q, q, q, mask=mask, score_mod=softcap(2.0)))
    torch.testing.assert_close(alone, attention(q, q, q, mask=mask, block_map=blocks, score_mod=softcap(2.0)))


def test_a_given_map_of_other_or_changed_ids_is_refused() -> None:
    q = torch.randn(2, 2, 40, 16)
    ids = torch.randint(0, 3, (2, 40))
    blocks = block_map(causal() & document(ids), 2, 2, 40, 40, device="cpu")
    with pytest.raises(InputError, match="another mask"):
        attention(q, q, q, mask=causal() & document(ids.clone()), block_map=blocks)
    with pytest.raises(InputError, match="B=1"):
        attention(q, q, q, block_map=block_map(causal() & document(ids), 1, 2, 40, 40, device="cpu"))
    attention(q, q, q, block_map=blocks)
    ids[0, 3] = 7
    with pytest.raises(InputError, match="build it anew"):
        attention(q, q, q, block_map=blocks)


def test_numbers_of_a_mask_reach_the_ops_as_numbers() -> None:
    """A new window traces to the same text, so that nothing is compiled for it."""
    from anymask.expr.trace import trace

    assert trace(sliding_window(100, 7), None).mask == trace(sliding_window(200, 9), None).mask


def test_import_is_light() -> None:
    """`import anymask` imports no Triton, and the first call on a CPU neither."""
    code = (
        "import sys, torch, anymask; assert 'triton' not in sys.modules, 'at import';"
        "q = torch.randn(1, 1, 8, 16); anymask.attention(q, q, q, mask=anymask.causal());"
        "assert 'triton' not in sys.modules, 'at the first call'"
    )
    before = "import sys, torch; assert 'triton' not in sys.modules"
    if subprocess.run([sys.executable, "-c", before]).returncode == 0:
        subprocess.run([sys.executable, "-c", code], check=True)
    else:
        pytest.fail("torch itself imports Triton here, so nothing is shown")


@pytest.mark.slow
def test_first_call_of_a_process_under_compile() -> None:
    code = (
        "import torch, anymask; f = torch.compile(anymask.attention, fullgraph=True);"
        "q = torch.randn(1, 2, 40, 16, requires_grad=True); out = f(q, q, q, mask=anymask.causal());"
        "torch.testing.assert_close(out, anymask.attention(q, q, q, mask=anymask.causal()));"
        "out.sum().backward(); assert q.grad is not None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_and_are_documented() -> None:
    for name in anymask.__all__:
        assert getattr(anymask, name).__doc__, name
