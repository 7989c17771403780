"""Ahead: a kernel's compilation, begun in a thread before the kernel is launched.

Triton gives up Python's lock for most of a compilation, so that several take little longer than one. (Before 3.9 it
sets the process's warning filters while it reads a kernel: a change that somebody makes then may be lost.)
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import torch
import triton


def begin(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Begin to compile what a launch with such arguments takes, for finish(). Nothing for the interpreter, or on AMD.

    Which variant that is, is found out at once, as by the launch. There is a thread only if nobody compiles or has
    compiled it, and it ends with that.
    """
    if not isinstance(kernel, triton.runtime.JITFunction) or torch.version.hip is not None:
        return None

    def in_mode() -> Any:
        _mode().__enter__()  # and never left, which would wait: it ends with this context
        return kernel.warmup(*arguments, grid=(1, 1, 1), **options)

    return contextvars.Context().run(in_mode)


def finish(begun: Any) -> None:
    """Wait for what begin() gave. A launch then finds the kernel compiled, or compiles it and raises what is wrong."""
    if isinstance(begun, triton.FutureKernel):
        with contextlib.suppress(Exception):
            begun.result(ignore_errors=True)


@functools.cache
def _mode() -> Any:
    """One for all, as it knows what is being compiled."""
    return triton.AsyncCompileMode(_Threads(), ignore_errors=True)


class _Threads(Executor):
    """A thread for each compilation."""

    def submit(self, compile: Callable[[], Any]) -> Future[Any]:  # type: ignore[override]
        make_launcher = triton.runtime.driver.active.launcher_cls

        def with_launcher() -> Any:
            compiled = compile()
            make_launcher(compiled.src, compiled.metadata)  # up to Triton 3.8 it compiles C; the launch finds the file
            return compiled

        pool = ThreadPoolExecutor(1, __name__)
        future = pool.submit(with_launcher)
        pool.shutdown(wait=False)
        return future
