"""The kernels on a real GPU: the zoo, dtypes, head dims, sizes, layouts, determinism, memory, torch.compile."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from anymask import BlockMap, attention, block_map, causal, clear_cache, document, mask_from, sliding_window, softcap
from anymask.testing import inputs, relative_error
from tests.cases import MASKS, SCORES, Sizes
from tests.test_zoo import gradients, run

pytestmark = pytest.mark.gpu
HALF = (torch.float16, torch.bfloat16)
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize("i, name", list(enumerate(MASKS)))
def test_mask(i: int, name: str) -> None:
    sizes = (2, 4, 2, 333, 290, 64, 64)
    run("triton", MASKS[name](Sizes(2, 4, 333, 290, "cuda")), None, sizes, HALF[i % 2], "cuda", 128)


@pytest.mark.parametrize("name", ["documents_causal", "random_tensor", "nothing", "mode_1"])
def test_mask_in_float32(name: str) -> None:
    sizes = (2, 4, 2, 200, 170, 64, 32)
    run("triton", MASKS[name](Sizes(2, 4, 200, 170, "cuda")), None, sizes, torch.float32, "cuda", 64)


@pytest.mark.parametrize("backend", ["triton", "gluon"] if IS_HOPPER else ["triton"])
def test_ties_of_floats_are_decided_as_torch_does(backend: str) -> None:
    """x y + z against a number that it nearly is: one instruction for both would decide half of them otherwise."""
    S = 1000
    x, y, w = (torch.rand(S, generator=torch.Generator().manual_seed(i)).cuda() for i in range(3))
    z = 1 - x * y  # so query i and key i tie
    mask = lambda b, h, q, k: (x[q] * y[k] + z[q] > 1) | (torch.sqrt(w[q]) / (y[k] + 0.1) > 1.25)
    shown = (x[:, None] * y + z[:, None] > 1) | (torch.sqrt(w)[:, None] / (y + 0.1) > 1.25)
    q, k = torch.zeros(2, 1, 1, S, 64, dtype=torch.bfloat16, device="cuda")
    _, lse = attention(q, k, k, mask=mask, backend=backend, return_lse=True)
    assert torch.equal(lse[0, 0].exp().round().int(), shown.sum(-1).int())


@pytest.mark.parametrize("i, name", list(enumerate(SCORES)))
def test_score_function(i: int, name: str) -> None:
    sizes, dtypes = (2, 4, 2, 200, 170, 64, 64), (torch.bfloat16, torch.float32)
    for j, mask in enumerate((None, causal())):
        run("triton", mask, SCORES[name](Sizes(2, 4, 200, 170, "cuda")), sizes, dtypes[(i + j) % 2], "cuda", 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("D", "Dv"),
    [(8, 8), (16, 24), (40, 8), (64, 64), (72, 72), (96, 96), (128, 128), (192, 128), (128, 256), (256, 256)],
)
def test_head_dims(D: int, Dv: int, dtype: torch.dtype) -> None:
    run("triton", causal() & sliding_window(150, 0), None, (1, 4, 2, 260, 260, D, Dv), dtype, "cuda", 128)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1),
        (3, 8, 1, 1, 400),
        (1, 2, 2, 400, 1),
        (2, 6, 3, 127, 129),
        (1, 2, 2, 256, 128),
        (70000, 1, 1, 2, 3),
    ],
    ids=str,
)
def test_sizes(sizes: tuple[int, ...]) -> None:
    run("triton", sliding_window(300, 20), None, (*sizes, 32, 32), torch.float16, "cuda", 128)


def test_a_captured_number_may_change() -> None:
    for width in (1, 2, 3, 16, 100, 1000):
        run("triton", sliding_window(width, 0), None, (1, 2, 2, 200, 200, 32, 32), torch.float16, "cuda", 64)


def test_sizes_of_zero() -> None:
    for sizes in ((0, 2, 2, 5, 5), (2, 2, 1, 0, 7), (2, 2, 2, 7, 0)):
        q, k, v, dout, dlse = inputs(*sizes, 64, 64, torch.float16, "cuda")
        out, lse = attention(q, k, v, return_lse=True)
        assert bool((out == 0).all()) and bool((lse == -torch.inf).all())
        assert all(bool((g == 0).all()) for g in gradients(out, lse, (q, k, v), dout, dlse))


def test_more_than_2_to_the_31_elements() -> None:
    """The last sequence of a batch whose tensors exceed 2^31 elements is what it is alone."""
    B, H, S, D = 132, 8, 16384, 128
    k = torch.randn(B, H, S, D, device="cuda", dtype=torch.bfloat16)
    assert k.numel() > 2**31
    q = torch.randn(B, H, 64, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mask = sliding_window(None, S // 2)
    out = attention(q, k, k, mask=mask, deterministic=True)
    last = attention(q[-1:], k[-1:], k[-1:], mask=mask, deterministic=True)
    assert torch.equal(out[-1:], last)
    (dq,) = torch.autograd.grad(out[-1].float().sum(), q)
    (alone,) = torch.autograd.grad(last.float().sum(), q)
    assert torch.equal(dq[-1], alone[-1])


def test_a_row_stride_above_2_to_the_31() -> None:
    """[S, B, H, D] with enough batches that one row of a sequence lies gigabytes from the next."""
    S, B, H, D = 3, 70000, 64, 256
    x = torch.empty(S, B, H, D, device="cuda", dtype=torch.float16)
    assert x.stride(0) > 2**30
    x[:, -1].normal_()
    q = x.permute(1, 2, 0, 3)[-1:]
    torch.testing.assert_close(attention(q, q, q), attention(*[q.contiguous()] * 3))


def big(S: int = 4096, **options: Any) -> tuple[Tensor, ...]:
    return inputs(1, 8, 4, S, S, 128, 128, torch.bfloat16, "cuda", **options)


def test_two_runs_are_bitwise_equal() -> None:
    q, k, v, dout, dlse = big()
    ids = torch.randint(0, 4, (4096,), device="cuda").sort().values
    mask = causal() & document(ids)
    first: tuple[Tensor, ...] | None = None
    for _ in range(3):
        out, lse = attention(q, k, v, mask=mask, score_mod=softcap(20.0), return_lse=True, deterministic=True)
        results = (out, lse, *gradients(out, lse, (q, k, v), dout, dlse))
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_memory_is_linear() -> None:
    """Peak extra memory of forward and backward: the outputs, lse, delta and the map, nothing of S x S."""
    peaks = []
    for S in (8192, 16384):
        q, k, v, dout, _ = big(S)
        mask = causal()
        for _ in range(2):
            gc.collect()  # what other tests left is not freed while this one measures
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(attention(q, k, v, mask=mask), (q, k, v), dout)
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
        outputs = 2 * (dout.nbytes + k.nbytes + v.nbytes)
        assert peak < 2 * outputs, (peak, outputs)
    assert peaks[1] < 2.2 * peaks[0]


def test_no_host_synchronisation() -> None:
    q, k, v, dout, _ = big()
    ids = torch.randint(0, 40, (4096,), device="cuda")

    def step() -> None:
        for mask in (causal(), document(ids), ~(causal() & document(ids))):
            torch.autograd.grad(attention(q, k, v, mask=mask), (q, k, v), dout)

    step()
    ids += 1  # the maps must be built again
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_cuda_graph_builds_the_map_anew_from_new_documents(deterministic: bool) -> None:
    q, k, v, dout, _ = big(1024)
    ids = torch.randint(0, 4, (1024,), device="cuda").sort().values.int()
    mask = causal() & document(ids)

    def step() -> tuple[Tensor, ...]:
        out = attention(q, k, v, mask=mask, deterministic=deterministic)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
        return dq, out, dk, dv

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for num_documents in (1, 9, 100):
        ids.copy_(torch.randint(0, num_documents, (1024,), device="cuda").sort().values)
        graph.replay()
        dq, *results = [x.clone() for x in captured]
        expected_dq, *expected = step()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        assert torch.equal(dq, expected_dq) if deterministic else relative_error(dq, expected_dq) < 4e-3


def test_new_lengths_and_documents_compile_next_to_nothing() -> None:
    from triton import knobs

    compiled = []
    knobs.compilation.listener = lambda *, src, **_: compiled.append(src.name)
    try:
        generator = torch.Generator().manual_seed(0)
        for S in torch.randint(1, 2000, (200,), generator=generator).tolist():
            q = torch.randn(1, 2, S, 32, device="cuda", dtype=torch.float16, requires_grad=True)
            ids = torch.randint(0, 5, (S,), device="cuda").int()
            attention(q, q, q, mask=causal() & document(ids)).backward(torch.ones_like(q))
    finally:
        knobs.compilation.listener = None
    assert len(compiled) <= 14, compiled  # seven kernels, with and without ragged tiles


def test_chosen_tiles_wait_for_nothing() -> None:
    q, k, v, *_ = big()
    indices = torch.arange(16, device="cuda").expand(32, 16).contiguous()
    counts = torch.randint(0, 17, (32,), device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        chosen = BlockMap.from_indices(indices, counts, Sq=4096, Skv=4096, tile=128) & causal()
        return attention(q, k, v, block_map=chosen.rows(0, 4096)), chosen.to_dense()

    step()
    counts += 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, kinds = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    is_chosen = (torch.arange(32, device="cuda") < counts[:, None]) & (torch.arange(32, device="cuda") < 16)
    tiles = is_chosen.repeat_interleave(128, 0).repeat_interleave(128, 1)
    torch.testing.assert_close(out, attention(q, k, v, mask=mask_from(tiles) & causal()), rtol=1e-2, atol=1e-2)
    assert torch.equal(kinds[0, 0] > 0, is_chosen.tril())


def test_map_on_the_gpu_equals_map_on_the_cpu() -> None:
    for name, make in MASKS.items():
        for tile in ((128, 128), (100, 24)):
            kinds = [
                block_map(make(Sizes(2, 3, 700, 650, device)), 2, 3, 700, 650, device=device, tile=tile)
                .to_dense()
                .cpu()
                for device in ("cuda", "cpu")
            ]
            assert torch.equal(*kinds), name


def test_torch_compile() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, width: int) -> Tensor:
        return attention(q, k, v, mask=document(ids) & sliding_window(width, 0))

    compiled = torch.compile(step, fullgraph=True)
    for S, width in ((300, 40), (300, 60), (420, 60), (511, 7)):
        q, k, v, dout, _ = inputs(2, 4, 2, S, S, 64, 64, torch.float16, "cuda")
        # as compiled graphs lay it out; another layout is read in another order, and delta rounds otherwise
        dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
        ids = torch.randint(0, 3, (2, S), device="cuda")
        for a, b in zip(
            *(
                (out, *torch.autograd.grad(out, (q, k, v), dout))
                for out in (compiled(q, k, v, ids, width), step(q, k, v, ids, width))
            ),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_a_forced_config_is_obeyed_or_raises() -> None:
    from anymask import UnsupportedError

    q, k, v, *_ = big(512)
    expected = attention(q, k, v, mask=causal())
    config = {"forward": {"BLOCK_Q": 64, "BLOCK_KV": 32, "num_warps": 4, "num_stages": 2}}
    torch.testing.assert_close(attention(q, k, v, mask=causal(), config=config), expected, rtol=2e-2, atol=2e-2)
    for wrong in ({"BLOCK_Q": 96}, {"BLOCK_Q": 512}, {"num_stages": 40}, {"BLOCK": 1}):
        with pytest.raises(UnsupportedError):
            attention(q, k, v, mask=causal(), config={"forward": wrong})


def test_another_device_than_the_current_one_or_a_stream() -> None:
    q, k, v, *_ = big(512)
    expected = attention(q, k, v, mask=causal())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = attention(q, k, v, mask=causal())
    stream.synchronize()
    assert torch.equal(got, expected)


def changing_calls(D: int) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
    """Calls each of which differs from the first in one thing: data, alignment, strides, documents, numbers."""

    def laid_out(offset: int, is_transposed: bool = False) -> tuple[Tensor, ...]:
        tensors = []
        for H in (4, 2, 2):
            flat = torch.randn(H * 512 * D + 8, device="cuda", dtype=torch.bfloat16)[offset : offset + H * 512 * D]
            x = flat.view(1, 512, H, D).transpose(1, 2) if is_transposed else flat.view(1, H, 512, D)
            tensors.append(x.detach().requires_grad_())
        return tuple(tensors)

    ids = torch.arange(516, device="cuda", dtype=torch.int32) // 100
    aligned, others = laid_out(0), laid_out(8)  # 16 bytes on
    mask = causal() & document(ids[:512])
    yield aligned, mask
    yield others, mask
    yield laid_out(1), mask
    yield (laid_out(1)[0], *aligned[1:]), mask
    yield (*aligned[:2], laid_out(3)[2]), mask
    yield laid_out(0, is_transposed=True), mask
    yield (aligned[0][:, :, :500].detach().requires_grad_(), *aligned[1:]), mask
    yield aligned, causal() & document(ids[1:513])  # 4 bytes on
    yield aligned, causal() & document(ids[:512].long())
    yield aligned, causal() & document(ids[:512].clone() // 2)
    for width in (1, 16, 100):
        yield aligned, sliding_window(width, 0)
    yield aligned, None


def outcome(tensors: tuple[Tensor, ...], mask: Any) -> tuple[Tensor, ...]:
    out, lse = attention(*tensors, mask=mask, return_lse=True, deterministic=True)
    generator = torch.Generator("cuda").manual_seed(0)
    dout = torch.randn(out.shape, device="cuda", dtype=out.dtype, generator=generator)
    return (out, lse, *torch.autograd.grad(out, tensors, dout))


def forget_recipes() -> None:
    from anymask.kernels import likeness, map_launch, recipes

    clear_cache()
    made = (recipes.forward_recipe, recipes.backward_recipes, recipes.hopper_backward_recipes)
    for kept in (likeness.likeness, *made, map_launch._walk_recipes, map_launch._classify_recipe):
        kept.cache_clear()


@pytest.mark.parametrize("D", [64, 128])
def test_repeated_calls_are_bitwise_what_ordinary_launches_give(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from anymask.kernels import recipe

    assert recipe._IS_KNOWN, "this Triton's launches are not prepared: see kernels/recipe.py"
    calls = list(changing_calls(D))
    monkeypatch.setattr(recipe, "_IS_KNOWN", False)
    forget_recipes()
    expected = [outcome(*call) for call in calls]
    monkeypatch.setattr(recipe, "_IS_KNOWN", True)
    forget_recipes()
    for _ in range(3):
        for call, results in zip(calls, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(outcome(*call), results, strict=True))
    clear_cache()  # maps and walks by prepared launches too
    with ThreadPoolExecutor(4) as pool:
        for i, got in enumerate(pool.map(lambda i: outcome(*calls[i % len(calls)]), range(4 * len(calls)))):
            assert all(torch.equal(a, b) for a, b in zip(got, expected[i % len(calls)], strict=True))


def test_a_warm_call_launches_without_asking_triton_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And tells hooks of it, as a profiler sets them."""
    from triton import knobs

    from anymask.kernels import hopper_launch, recipes

    call = next(changing_calls(64))
    outcome(*call)
    forward = hopper_launch.hopper_forward_kernel if IS_HOPPER else recipes.forward_kernel
    for kernel in (forward, recipes.dq_kernel, recipes.dkdv_kernel):
        monkeypatch.setattr(kernel, "run", lambda *args, **options: pytest.fail("an ordinary launch"))
    outcome(*call)
    monkeypatch.undo()
    seen: list[str] = []
    hook = lambda metadata: seen.append(metadata.get()["name"])
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        outcome(*call)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == [forward.__name__, "dq_kernel", "dkdv_kernel"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    tensors, _ = next(changing_calls(64))
    expected = outcome(tensors, causal())
    others = tuple(x.detach().to("cuda:1").requires_grad_() for x in tensors)
    for _ in range(2):
        for current in (0, 1):
            with torch.cuda.device(current):
                out = attention(*others, mask=causal())
                dq, dk, dv = torch.autograd.grad(out.sum(), others)
            assert torch.equal(out.to("cuda:0"), expected[0]) and dq.device == dk.device == dv.device == out.device


def test_error_about_a_captured_tensor_on_the_cpu() -> None:
    from anymask import MaskError

    q, k, v, *_ = big(512)
    ids = torch.zeros(512, dtype=torch.int32)
    with pytest.raises(MaskError, match="is on cpu but q is on cuda:0"):
        attention(q, k, v, mask=document(ids))


def test_first_call_in_a_fresh_process() -> None:
    code = (
        "import torch, anymask; q = torch.randn(1, 2, 300, 64, device='cuda', dtype=torch.half, requires_grad=True);"
        "anymask.attention(q, q, q, mask=anymask.causal()).sum().backward(); assert q.grad.isfinite().all()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
