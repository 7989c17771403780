"""The Gluon kernels on a Hopper GPU: the zoo, head dims, sizes, tiles, determinism, other processes beside them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from anymask import attention, block_map, causal, document, sliding_window, softcap
from anymask.testing import inputs, relative_error
from tests.cases import MASKS, SCORES, Sizes
from tests.test_zoo import run

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")]
# the Hopper backward, with dQ in it and without: the fast mode and the deterministic one; the latter with one consumer;
# the first also persistent, and the first two with 128 queries a step, for head dims up to 64
FUSED, APART = ({"dkdv": {"is_fused": is_fused}} for is_fused in (True, False))
LONE = {"dkdv": {"is_fused": False, "num_consumers": 1}}
PERSISTENT = {"dkdv": FUSED["dkdv"] | {"is_persistent": True}}
WIDE = {"dkdv": {"is_fused": True, "BLOCK_Q": 128, "num_stages": 2}}
WIDE_PERSISTENT = {"dkdv": WIDE["dkdv"] | {"is_persistent": True}}
TWO_TILES = {"dkdv": WIDE_PERSISTENT["dkdv"] | {"num_key_tiles": 2}}
WIDE_APART = {"dkdv": WIDE["dkdv"] | {"is_fused": False}}
# a forward with another number of places for K and V than the plan's
DEEP = {"forward": {"BLOCK_Q": 128, "BLOCK_KV": 64, "num_stages": 3, "has_turns": False}}
BACKWARDS = (FUSED, APART, LONE, PERSISTENT)


@pytest.mark.parametrize("D, Dv", [(8, 8), (16, 40), (48, 32), (72, 72), (96, 96), (112, 80), (160, 160)], ids=str)
def test_head_dims_on_hopper(D: int, Dv: int) -> None:
    for mask in (None, causal()):
        for config in (*BACKWARDS, DEEP) if max(D, Dv) <= 128 else (None,):
            run("gluon", mask, None, (2, 4, 2, 300, 270, D, Dv), torch.bfloat16, "cuda", 128, config=config)


@pytest.mark.parametrize("D, Dv", [(192, 128), (192, 192), (256, 256), (256, 24), (32, 256)], ids=str)
def test_big_head_dims_on_hopper(D: int, Dv: int) -> None:
    for mask in (None, causal()):
        run("gluon", mask, None, (2, 4, 2, 300, 270, D, Dv), torch.float16, "cuda", 128)


@pytest.mark.parametrize("score", ["", "capped_and_biased"])
@pytest.mark.parametrize("name", ["documents_causal", "mode_1", "nothing", "flashmask", "tree", "random_tensor"])
def test_masks_of_big_head_dims_on_hopper(name: str, score: str) -> None:
    for D, Dv, Hkv in ((192, 128, 1), (256, 256, 4)):
        sizes = Sizes(2, 4, 333, 290, "cuda")
        score_mod = SCORES[score](sizes) if score else None
        run("gluon", MASKS[name](sizes), score_mod, (2, 4, Hkv, 333, 290, D, Dv), torch.bfloat16, "cuda", 64)


@pytest.mark.parametrize("D, is_persistent", [(64, True), (128, True), (128, False), (256, False)])
def test_maxima_that_grow_by_little_and_by_much(D: int, is_persistent: bool) -> None:
    """Of the rows of a warp some are scaled anew in every step, others never: by less than SLACK, and downwards."""

    def slopes(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + (q_idx % 16 - 5) * kv_idx * 0.015

    config = {"forward": {"is_persistent": is_persistent}} if D <= 128 else None
    for mask in (None, causal()):
        run("gluon", mask, slopes, (2, 2, 2, 300, 1100, D, D), torch.bfloat16, "cuda", 64, config=config)


def test_beside_another_process() -> None:
    """Processes share a GPU by turns, in the midst of a kernel: what its shared memory holds comes back."""
    code = "import torch; x = torch.randn(4096, 4096, device='cuda').bfloat16(); print(flush=True)\nwhile 1: x @ x"
    works = [(None, 128, 128, {"is_persistent": False}), (causal(), 128, 128, {"is_persistent": True})]
    works += [(causal(), 192, 128, {})]
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


@pytest.mark.parametrize("mask", [None, causal(), sliding_window(100, 30)], ids=["unmasked", "causal", "window"])
@pytest.mark.parametrize("D, options", [(128, {}), (64, {}), (64, {"BLOCK_Q": 192})], ids=str)
def test_a_persistent_forward_gives_the_same_bits(D: int, options: dict[str, Any], mask: Any) -> None:
    for sizes in ((1, 1, 1, 1, 1), (8, 16, 4, 500, 700), (3, 40, 40, 1024, 1024), (2000, 1, 1, 130, 5)):
        q, k, v, *_ = inputs(*sizes, D, D, torch.bfloat16, "cuda")
        blocks = block_map(mask, *sizes[:2], *sizes[3:], device="cuda", tile=64)
        options = {"BLOCK_Q": 128, "BLOCK_KV": 128, "has_turns": True, "is_persistent": False} | options
        results = [
            attention(q, k, v, block_map=blocks, return_lse=True, backend="gluon", config={"forward": chosen})
            for chosen in (options, *[options | {"is_persistent": True}] * 3)
        ]
        assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("kernel", ["forward", "dkdv"])
def test_persistent_kernels_beside_each_other_and_in_a_graph(kernel: str) -> None:
    q, k, v, dout, _ = inputs(2, 16, 16, 2048, 2048, 128, 128, torch.bfloat16, "cuda")

    def step(is_persistent: bool = True) -> tuple[Tensor, ...]:
        config = {"dkdv": {"is_fused": True}}
        config[kernel] = config.get(kernel, {}) | {"is_persistent": is_persistent}
        out = attention(q, k, v, mask=causal(), backend="gluon", config=config)
        # dq is added up in any order
        return (out.detach(),) if kernel == "forward" else torch.autograd.grad(out, (q, k, v), dout)[1:]

    expected = step(is_persistent=False)
    step()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for i in range(30):
        with torch.cuda.stream(streams[i % 3]):
            results.append(step())
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            results.append(step())
    for _ in range(10):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for result in results for a, b in zip(expected, result, strict=True))


@pytest.mark.parametrize("i, name", list(enumerate(MASKS)))
def test_mask_on_hopper(i: int, name: str) -> None:
    D, dtype, tile = ((64, torch.bfloat16, 64), (128, torch.float16, 128))[i % 2]
    sizes = (2, 4, 2, 333, 290, D, D)
    config = BACKWARDS[i // 2 % 4]
    run("gluon", MASKS[name](Sizes(2, 4, 333, 290, "cuda")), None, sizes, dtype, "cuda", tile, config=config)


@pytest.mark.parametrize("i, name", list(enumerate(SCORES)))
def test_score_function_on_hopper(i: int, name: str) -> None:
    sizes = (2, 4, 2, 200, 170, 128, 64)
    score_mod = SCORES[name](Sizes(2, 4, 200, 170, "cuda"))
    for j, mask in enumerate((None, causal())):
        config = BACKWARDS[(i + j) % 4]
        run("gluon", mask, score_mod, sizes, torch.bfloat16, "cuda", 128, config=config)


@pytest.mark.parametrize("cap", [0.3, 3.0, 50.0])
def test_caps_below_and_above_the_scores(cap: float) -> None:
    """A warp takes a polynomial where all its scores are below half the cap: always, never, or as it comes."""
    for config in (*BACKWARDS, WIDE, WIDE_APART):
        D = 64 if config in (WIDE, WIDE_APART) else 128
        run("gluon", causal(), softcap(cap), (2, 4, 2, 200, 170, D, 64), torch.bfloat16, "cuda", 128, config=config)


@pytest.mark.parametrize("D, Dv", [(64, 64), (64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
def test_sizes_on_hopper(heads: tuple[int, int], D: int, Dv: int) -> None:
    configs = (*BACKWARDS, WIDE, TWO_TILES, WIDE_APART, WIDE_PERSISTENT)[: 8 if max(D, Dv) <= 64 else 4]
    for i, S in enumerate(((1, 1), (7, 200), (128, 128), (127, 129), (700, 1500), (1500, 700))):
        for j, mask in enumerate((None, sliding_window(300, 20))):
            config = configs[(i + j) % len(configs)]
            run("gluon", mask, None, (2, *heads, *S, D, Dv), torch.bfloat16, "cuda", 128, config=config)


@pytest.mark.parametrize("config", BACKWARDS, ids=["fused", "apart", "lone", "persistent"])
@pytest.mark.parametrize("tile", [16, 64, 256])
def test_map_tiles_on_hopper(tile: int, config: Any) -> None:
    ids = torch.randint(0, 3, (1000,), device="cuda").sort().values
    sizes = (1, 2, 2, 1000, 900, 128, 128)
    run("gluon", causal() & document(ids), None, sizes, torch.bfloat16, "cuda", tile, config=config)


@pytest.mark.parametrize("heads", [(16, 16), (16, 4)], ids=str)
@pytest.mark.parametrize("D, Dv", [(64, 64), (128, 128), (96, 40), (72, 112)], ids=str)
def test_persistent_backward_of_many_rows(D: int, Dv: int, heads: tuple[int, int]) -> None:
    """Each program works on several tiles of keys, some of which no query sees."""
    for config in (PERSISTENT, WIDE_PERSISTENT, TWO_TILES) if max(D, Dv) <= 64 else (PERSISTENT,):
        for i, name in enumerate(("", "causal_offset_per_batch", "documents_unsorted_padded", "window_per_head")):
            S = (600, 500) if i % 2 else (512, 640)
            mask = MASKS[name](Sizes(8, heads[0], *S, "cuda")) if name else None
            run("gluon", mask, None, (8, *heads, *S, D, Dv), torch.bfloat16, "cuda", 64, config=config)


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


def test_keys_past_the_end_do_not_reach_dq() -> None:
    """Their score is 0. Where all others are about -300, and so lse, their P would be inf, were they not hidden."""
    q, k, v, dout, _ = inputs(1, 1, 1, 100, 100, 64, 64, torch.bfloat16, "cuda")
    q, k = (8 * q.abs()).detach().requires_grad_(), (-8 * k.abs()).detach().requires_grad_()
    for mask in (None, causal()):
        *results, expected = (
            torch.autograd.grad(attention(q, k, v, mask=mask, config=config), (q, k, v), dout)
            for config in (*BACKWARDS, None)
        )
        for result in results:
            assert all(relative_error(a, b) < 2e-2 for a, b in zip(result, expected, strict=True))


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


def test_the_hopper_backward_run_to_run() -> None:
    """All bitwise equal where it is to be deterministic; else all but dq, which differs by float32 roundings."""
    for D in (64, 128):
        q, k, v, dout, _ = inputs(2, 8, 4, 2048, 2048, D, D, torch.bfloat16, "cuda")
        for mask in (None, causal()):
            apart = WIDE_APART if D == 64 else APART
            for config, deterministic in ((apart, True), (LONE, True), (FUSED, False), (PERSISTENT, False)):
                first: tuple[Tensor, ...] | None = None
                for _ in range(10):
                    out = attention(q, k, v, mask=mask, config=config, deterministic=deterministic)
                    results = torch.autograd.grad(out, (q, k, v), dout)
                    first = first or results
                    start = 0 if deterministic else 1
                    assert all(torch.equal(a, b) for a, b in zip(first[start:], results[start:], strict=True))
                    torch.testing.assert_close(results[0], first[0], rtol=2e-2, atol=1e-3)


def test_what_tma_does_not_take_goes_to_triton() -> None:
    from anymask import UnsupportedError

    x = torch.randn(1, 2, 200, 72, device="cuda", dtype=torch.float16)[..., 1:65]
    with pytest.raises(UnsupportedError, match="multiple of 16 bytes"):
        attention(x, x, x, mask=causal(), backend="gluon")
    expected = attention(*[x.contiguous()] * 3, mask=causal(), backend="gluon")
    torch.testing.assert_close(attention(x, x, x, mask=causal()), expected, rtol=2e-2, atol=2e-2)
