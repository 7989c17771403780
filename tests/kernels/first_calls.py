"""First calls through Triton itself, with a driver that launches nothing and, but for `real`, a compiler that makes
nothing: what is compiled, and in which thread.

    python -m tests.kernels.first_calls WHAT ...    (functions below; one JSON line each; not in Triton's interpreter)
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from anymask import alibi, attention, blocks, causal, document, ops, sliding_window, softcap
from anymask.kernels import map_launch, recipe

HAS_GLUON = triton.__version__.startswith("3.6.")
PORTABLE = ("forward_kernel", "dq_kernel", "dkdv_kernel")
HOPPER = ("hopper_forward_kernel", "rows_kernel", "hopper_backward_kernel", "dq_of_sum_kernel", "hopper_dq_kernel")
ATTENTION = (*PORTABLE, *HOPPER)


class Driver:
    """One GPU, on which launches do nothing."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *binary: (None, None, 0, 0, 1024),
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *arguments: None


class Started:
    """A launch that does nothing, of a kernel with scratch memory: recipes leave such with descriptors to Triton."""

    global_scratch_size = profile_scratch_size = 1

    def __call__(self, *arguments: Any) -> None:
        pass


class Compiler:
    """Notes down what it is given: (kernel, variant, whether in a thread). seconds: that it takes.  fails: (kernel,
    whether in a thread) that it raises for."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bool]] = []
        self.seconds = 0.01
        self.fails: set[tuple[str, bool]] = set()

    def __call__(self, src: Any, target: Any, options: dict[str, Any], _env_vars: Any = None) -> Any:
        is_thread = threading.current_thread() is not threading.main_thread()
        self.seen.append((src.name, f"{src.hash()} {options}", is_thread))
        time.sleep(self.seconds)
        if (src.name, is_thread) in self.fails:
            raise ValueError(f"no {src.name}")
        kernel = {"src": src, "metadata": None, "function": None, "packed_metadata": None}
        return SimpleNamespace(**kernel, launch_metadata=lambda *_: None, run=Started())

    def take(self) -> list[tuple[str, str, bool]]:
        """What was noted down of attention's kernels since it was last asked."""
        seen, self.seen = self.seen, []
        return [one for one in seen if one[0] in ATTENTION]


@functools.cache
def install() -> Compiler:
    triton.runtime.driver.set_active(Driver())
    recipe.current_stream = lambda device: 0
    ops.arch_of = lambda device: "sm_90"
    ops.build = lambda *arguments: blocks.build.build(*arguments[:8], map_launch.classify)
    triton.compiler.compile = compiler = Compiler()
    return compiler


def qkv(S: int = 256, D: int = 64, Hkv: int = 2, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, H, S, D, dtype=dtype).requires_grad_() for H in (2, Hkv, Hkv))


def calls() -> Iterator[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """Calls of which each takes a kernel in a variant of its own."""
    ids = torch.arange(256, dtype=torch.int32) // 100
    documents = causal() & document(ids)
    yield qkv(), {"mask": documents}
    yield qkv(), {"mask": None}
    yield qkv(dtype=torch.float16), {"mask": documents}
    yield qkv(Hkv=1), {"mask": documents}
    yield qkv(250), {"mask": causal() & document(ids[:250])}
    yield qkv(192), {"mask": causal() & document(ids[1:193])}  # 4 bytes on
    yield qkv(), {"mask": causal() & document(ids.long())}
    yield qkv(), {"mask": sliding_window(16, 0)}
    yield qkv(), {"mask": causal(), "score_mod": softcap(2.0)}
    yield qkv(), {"mask": causal(), "score_mod": alibi(torch.rand(2, dtype=torch.float64))}
    yield qkv(), {"mask": torch.rand(256, 256) < 0.5, "scale": -1}
    numbers = torch.randn(1 << 16, dtype=torch.bfloat16)
    for strides, start in (((0, 9216, 72, 1), 0), ((0, 9216, 72, 2), 0), ((0, 8192, 64, 1), 1)):  # the last 2 bytes on
        q = numbers.as_strided((1, 2, 128, 64), strides, start).detach().requires_grad_()
        yield (q, *qkv(128)[1:]), {"mask": documents}
    for D, is_persistent in ((64, True), (128, True), (128, False), (72, False))[: 4 * HAS_GLUON]:
        config = {"forward": {"is_persistent": is_persistent}}
        yield qkv(D=D), {"mask": documents, "backend": "gluon", "config": config}
    narrow = sliding_window(16, 0)
    for D, is_fused, mask in ((64, True, narrow), (128, False, documents), (128, True, None))[: 3 * HAS_GLUON]:
        config = {"dkdv": {"is_fused": is_fused, "is_persistent": mask is None}}
        yield qkv(D=D), {"mask": mask, "backend": "gluon", "config": config, "deterministic": not is_fused}


def ahead() -> Any:
    """Each forward: how often a kernel was compiled, and whether always in a thread. No backward compiles any more."""
    compiler, rows = install(), []
    for tensors, call in calls():
        out = attention(*tensors, **{"backend": "triton"} | call)
        for thread in set(threading.enumerate()) - {threading.main_thread()}:
            thread.join()
        seen = compiler.take()
        torch.autograd.grad(out, tensors, torch.randn_like(out))
        rows.append([Counter(name for name, _, _ in seen), all(is_thread for _, _, is_thread in seen)])
        for _ in range(2):
            torch.autograd.grad(attention(*tensors, **{"backend": "triton"} | call), tensors, out)
        assert not compiler.take()
    return rows


def unforeseen() -> Any:
    """What a backward compiles that was not begun with the forward: a gradient of lse; a forward without gradients."""
    compiler, found = install(), []
    tensors, other = qkv(), lambda b, h, q_idx, kv_idx: q_idx != kv_idx
    out, lse = attention(*tensors, mask=causal(), backend="triton", return_lse=True)
    torch.autograd.grad((out, lse), tensors, (out, lse))
    found.append(compiler.take())
    with torch.no_grad():
        attention(*tensors, mask=other, backend="triton")
    found.append(compiler.take())
    out = attention(*tensors, mask=other, backend="triton")
    torch.autograd.grad(out, tensors, out)
    found.append(compiler.take())
    return [sorted([name, is_thread] for name, _, is_thread in seen) for seen in found]


def lengths() -> Any:
    """Threads that calls of new lengths start, when all variants are compiled."""
    compiler, counts = install(), []
    started = threading.Thread.start
    threading.Thread.start = lambda thread: (counts.append(1), started(thread))[1]
    for S in range(256, 64 * 24, 64):
        if S == 512:
            counts.clear()
            compiler.take()
        tensors = qkv(S)
        out = attention(*tensors, mask=causal(), backend="triton")
        torch.autograd.grad(out, tensors, torch.randn_like(out))
    return [len(counts), len(compiler.take())]


def errors() -> Any:
    """Where an error in compiling a kernel shows, by who meets it: a thread alone, or the launch too."""
    compiler, rows = install(), []
    kernels = ("forward_kernel", "dq_kernel", "dkdv_kernel")
    for D, (kernel, is_launch_too) in enumerate(itertools.product(kernels, (False, True)), start=1):
        compiler.fails = {(kernel, True)} | ({(kernel, False)} if is_launch_too else set())
        tensors, where = qkv(D=8 * D), "forward"
        try:
            out = attention(*tensors, mask=causal(), backend="triton")
            where = "backward"
            torch.autograd.grad(out, tensors, torch.randn_like(out))
            where = "nowhere"
        except ValueError as error:
            assert str(error) == f"no {kernel}"
        rows.append([kernel, is_launch_too, where])
    compiler.fails.clear()
    compiler.take()
    return rows


def leave() -> Any:
    """The process forks, and ends, while the backward is being compiled."""
    compiler = install()
    compiler.seconds = 1
    attention(*qkv(), mask=causal(), backend="triton")
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
    child.start()
    child.join(10)
    return [child.exitcode, threading.active_count() > 1]


def real() -> Any:
    """As `ahead`, but compiled."""
    install()
    triton.compiler.compile = triton.compiler.compiler.compile
    seen = []
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: seen.append(
        [src.name, cache_hit, threading.current_thread() is not threading.main_thread()]
    )
    tensors = qkv(64, 16)
    out = attention(*tensors, mask=causal(), backend="triton")
    torch.autograd.grad(out, tensors, torch.randn_like(out))
    return sorted(one for one in seen if one[0] in ATTENTION)


if __name__ == "__main__":
    for what in sys.argv[1:]:
        print(json.dumps(globals()[what]()))
