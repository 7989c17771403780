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
hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
# the Hopper backward, with dQ in it and without: the fast mode and the deterministic one; the latter with one consumer;
# and the first with 128 queries a step, for head dims up to 64
FUSED, APART = ({"dkdv": {"is_fused": is_fused}} for is_fused in (True, False))
LONE = {"dkdv": {"is_fused": False, "num_consumers": 1}}
WIDE = {"dkdv": {"is_fused": True, "BLOCK_Q": 128, "num_stages": 2}}
BACKWARDS = (FUSED, APART, LONE)


@pytest.mark.parametrize("i, name", list(enumerate(MASKS)))
def test_mask(i: int, name: str) -> None:
    sizes = (2, 4, 2, 333, 290, 64, 64)
    run("triton", MASKS[name](Sizes(2, 4, 333, 290, "cuda")), None, sizes, HALF[i % 2], "cuda", 128)


@hopper
@pytest.mark.parametrize("D, Dv", [(8, 8), (16, 40), (48, 32), (72, 72), (96, 96), (112, 80), (160, 160)], ids=str)
def test_head_dims_on_hopper(D: int, Dv: int) -> None:
    for mask in (None, causal()):
        for config in (FUSED, APART, LONE) if max(D, Dv) <= 128 else (None,):
            run("gluon", mask, None, (2, 4, 2, 300, 270, D, Dv), torch.bfloat16, "cuda", 128, config=config)


@hopper
@pytest.mark.parametrize("D, Dv", [(192, 128), (192, 192), (256, 256), (256, 24), (32, 256)], ids=str)
def test_big_head_dims_on_hopper(D: int, Dv: int) -> None:
    for mask in (None, causal()):
        run("gluon", mask, None, (2, 4, 2, 300, 270, D, Dv), torch.float16, "cuda", 128)


@hopper
@pytest.mark.parametrize("score", ["", "capped_and_biased"])
@pytest.mark.parametrize("name", ["documents_causal", "mode_1", "nothing", "flashmask", "tree", "random_tensor"])
def test_masks_of_big_head_dims_on_hopper(name: str, score: str) -> None:
    for D, Dv, Hkv in ((192, 128, 1), (256, 256, 4)):
        sizes = Sizes(2, 4, 333, 290, "cuda")
        score_mod = SCORES[score](sizes) if score else None
        run("gluon", MASKS[name](sizes), score_mod, (2, 4, Hkv, 333, 290, D, Dv), torch.bfloat16, "cuda", 64)


@hopper
@pytest.mark.parametrize("D, is_persistent", [(64, True), (128, True), (128, False), (256, False)])
def test_maxima_that_grow_by_little_and_by_much(D: int, is_persistent: bool) -> None:
    """Of the rows of a warp some are scaled anew in every step, others never: by less than SLACK, and downwards."""

    def slopes(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + (q_idx % 16 - 5) * kv_idx * 0.015

    config = {"forward": {"is_persistent": is_persistent}} if D <= 128 else None
    for mask in (None, causal()):
        run("gluon", mask, slopes, (2, 2, 2, 300, 1100, D, D), torch.bfloat16, "cuda", 64, config=config)


@hopper
def test_beside_another_process() -> None:
    """Processes share a GPU by turns, in the midst of a kernel: what its shared memory holds comes back."""
    code = "import torch; x = torch.randn(4096, 4096, device='cuda').bfloat16(); print(flush=True)\nwhile 1: x @ x"
    works = [(None, 128, 128, {}), (causal(), 128, 128, {"is_persistent": True}), (causal(), 192, 128, {})]
    calls = []
    for mask, D, Dv, options in works:
        q, k, v, dout, _ = inputs(1, 16, 16, 16384, 16384, D, Dv, torch.bfloat16, "cuda")
        leaves = [x.requires_grad_() for x in (q, k, v)]
        config = {"forward": options} if options else None

        def call(
            leaves: Any = leaves, dout: Tensor = dout, mask: Any = mask, config: Any = config
        ) -> tuple[Tensor, ...]:
            out = attention(*leaves, mask=mask, backend="gluon", deterministic=True, config=config)
            return (out, *torch.autograd.grad(out, leaves, dout))

        calls.append((call, call()))
    torch.cuda.synchronize()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline(), "the other process found no GPU"
            for call, alone in calls:
                for _ in range(10):
                    assert all(torch.equal(a, b) for a, b in zip(call(), alone, strict=True))
            assert other.poll() is None, "the other process ended too soon"
        finally:
            other.kill()


@hopper
@pytest.mark.parametrize("mask", [None, causal(), sliding_window(100, 30)], ids=["unmasked", "causal", "window"])
@pytest.mark.parametrize("D, options", [(128, {}), (64, {}), (64, {"BLOCK_Q": 192})], ids=str)
def test_a_persistent_forward_gives_the_same_bits(D: int, options: dict[str, Any], mask: Any) -> None:
    for sizes in ((1, 1, 1, 1, 1), (8, 16, 4, 500, 700), (3, 40, 40, 1024, 1024), (2000, 1, 1, 130, 5)):
        q, k, v, *_ = inputs(*sizes, D, D, torch.bfloat16, "cuda")
        blocks = block_map(mask, *sizes[:2], *sizes[3:], device="cuda", tile=64)
        options = {"BLOCK_Q": 128, "has_turns": True, "is_persistent": False} | options
        results = [
            attention(q, k, v, block_map=blocks, return_lse=True, backend="gluon", config={"forward": chosen})
            for chosen in (options, *[options | {"is_persistent": True}] * 3)
        ]
        assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


@hopper
def test_persistent_forwards_beside_each_other_and_in_a_graph() -> None:
    q, k, v, *_ = inputs(2, 16, 16, 2048, 2048, 128, 128, torch.bfloat16, "cuda")
    config = {"forward": {"is_persistent": True}}

    def step() -> Tensor:
        return attention(q, k, v, mask=causal(), backend="gluon", config=config)

    expected = attention(q, k, v, mask=causal(), backend="gluon", config={"forward": {"is_persistent": False}})
    step()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    outs = []
    for i in range(30):
        with torch.cuda.stream(streams[i % 3]):
            outs.append(step())
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    captured = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            captured.append(step())
    for _ in range(10):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in captured)


@hopper
@pytest.mark.parametrize("i, name", list(enumerate(MASKS)))
def test_mask_on_hopper(i: int, name: str) -> None:
    D, dtype, tile = ((64, torch.bfloat16, 64), (128, torch.float16, 128))[i % 2]
    sizes = (2, 4, 2, 333, 290, D, D)
    config = BACKWARDS[i // 2 % 3]
    run("gluon", MASKS[name](Sizes(2, 4, 333, 290, "cuda")), None, sizes, dtype, "cuda", tile, config=config)


@hopper
@pytest.mark.parametrize("i, name", list(enumerate(SCORES)))
def test_score_function_on_hopper(i: int, name: str) -> None:
    sizes = (2, 4, 2, 200, 170, 128, 64)
    score_mod = SCORES[name](Sizes(2, 4, 200, 170, "cuda"))
    for j, mask in enumerate((None, causal())):
        config = BACKWARDS[(i + j) % 3]
        run("gluon", mask, score_mod, sizes, torch.bfloat16, "cuda", 128, config=config)


@hopper
@pytest.mark.parametrize("D, Dv", [(64, 64), (64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
def test_sizes_on_hopper(heads: tuple[int, int], D: int, Dv: int) -> None:
    configs = (*BACKWARDS, WIDE)[: 4 if max(D, Dv) <= 64 else 3]
    for i, S in enumerate(((1, 1), (7, 200), (128, 128), (127, 129), (700, 1500), (1500, 700))):
        for j, mask in enumerate((None, sliding_window(300, 20))):
            config = configs[(i + j) % len(configs)]
            run("gluon", mask, None, (2, *heads, *S, D, Dv), torch.bfloat16, "cuda", 128, config=config)


@hopper
@pytest.mark.parametrize("config", [FUSED, LONE, APART], ids=["fused", "lone", "apart"])
@pytest.mark.parametrize("tile", [16, 64, 256])
def test_map_tiles_on_hopper(tile: int, config: Any) -> None:
    ids = torch.randint(0, 3, (1000,), device="cuda").sort().values
    sizes = (1, 2, 2, 1000, 900, 128, 128)
    run("gluon", causal() & document(ids), None, sizes, torch.bfloat16, "cuda", tile, config=config)


@hopper
@pytest.mark.parametrize(
    "tiles",
    [
        {},
        {"BLOCK_KV": 64, "num_v_stages": 1},
        {"BLOCK_KV": 128, "num_v_stages": 1},
        {"BLOCK_KV": 64, "num_v_stages": 1, "num_consumers": 1},
    ],
    ids=str,
)
def test_dq_kernels_beside_the_hopper_backward(tiles: dict[str, int]) -> None:
    """The portable one, and the Hopper one of each shape."""
    for mask in (None, causal()):
        sizes = (2, 4, 2, 300, 270, 64, 128)
        run("gluon", mask, None, sizes, torch.bfloat16, "cuda", 64, config=APART | {"dq": tiles})


@hopper
def test_keys_past_the_end_do_not_reach_dq() -> None:
    """Their score is 0. Where all others are about -300, and so lse, their P would be inf, were they not hidden."""
    q, k, v, dout, _ = inputs(1, 1, 1, 100, 100, 64, 64, torch.bfloat16, "cuda")
    q, k = (8 * q.abs()).detach().requires_grad_(), (-8 * k.abs()).detach().requires_grad_()
    for mask in (None, causal()):
        *results, expected = (
            torch.autograd.grad(attention(q, k, v, mask=mask, config=config), (q, k, v), dout)
            for config in (FUSED, LONE, APART, None)
        )
        for result in results:
            assert all(relative_error(a, b) < 2e-2 for a, b in zip(result, expected, strict=True))


@hopper
@pytest.mark.parametrize("D", [128, 192])
def test_a_thousand_deterministic_backwards(D: int) -> None:
    """Short ragged rows: many programs begin and end beside each other."""
    q, k, v, dout, _ = inputs(2, 16, 4, 1000, 1000, D, 128, torch.bfloat16, "cuda")
    mask = causal() & document(torch.randint(0, 9, (1000,), device="cuda").sort().values)
    out = attention(q, k, v, mask=mask, deterministic=True)
    first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    differs = torch.zeros((), device="cuda", dtype=torch.bool)
    for _ in range(1000):
        again = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        for a, b in zip(first, again, strict=True):
            differs |= (a != b).any()
    assert not differs


@hopper
def test_the_hopper_backward_run_to_run() -> None:
    """All bitwise equal where it is to be deterministic; else all but dq, which differs by float32 roundings."""
    for D in (64, 128):
        q, k, v, dout, _ = inputs(2, 8, 4, 2048, 2048, D, D, torch.bfloat16, "cuda")
        for mask in (None, causal()):
            for config, deterministic in ((APART, True), (LONE, True), (FUSED, False)):
                first: tuple[Tensor, ...] | None = None
                for _ in range(10):
                    out = attention(q, k, v, mask=mask, config=config, deterministic=deterministic)
                    results = torch.autograd.grad(out, (q, k, v), dout)
                    first = first or results
                    start = 0 if deterministic else 1
                    assert all(torch.equal(a, b) for a, b in zip(first[start:], results[start:], strict=True))
                    torch.testing.assert_close(results[0], first[0], rtol=2e-2, atol=1e-3)


@hopper
def test_what_tma_does_not_take_goes_to_triton() -> None:
    from anymask import UnsupportedError

    x = torch.randn(1, 2, 200, 72, device="cuda", dtype=torch.float16)[..., 1:65]
    with pytest.raises(UnsupportedError, match="multiple of 16 bytes"):
        attention(x, x, x, mask=causal(), backend="gluon")
    expected = attention(*[x.contiguous()] * 3, mask=causal(), backend="gluon")
    torch.testing.assert_close(attention(x, x, x, mask=causal()), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["documents_causal", "random_tensor", "nothing", "mode_1"])
def test_mask_in_float32(name: str) -> None:
    sizes = (2, 4, 2, 200, 170, 64, 32)
    run("triton", MASKS[name](Sizes(2, 4, 200, 170, "cuda")), None, sizes, torch.float32, "cuda", 64)


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
    from anymask.kernels import launch, map_launch

    clear_cache()
    recipes = (launch._forward_recipe, launch._backward_recipes, launch._hopper_backward_recipes)
    for kept in (launch.likeness, *recipes, map_launch._walk_recipes, map_launch._classify_recipe):
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

    from anymask.kernels import hopper_launch, launch

    call = next(changing_calls(64))
    outcome(*call)
    forward = hopper_launch.hopper_forward_kernel if IS_HOPPER else launch.forward_kernel
    for kernel in (forward, launch.dq_kernel, launch.dkdv_kernel):
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
