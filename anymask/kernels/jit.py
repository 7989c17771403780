"""jitted(text): a Triton function made from emitted text, one object per text."""

import functools
import hashlib
import linecache
from typing import Any

import triton
import triton.language as tl

from anymask.kernels import bounds, functions

NAMESPACE = {"tl": tl, "triton": triton} | {
    name: value
    for name, value in (*vars(functions).items(), *vars(bounds).items())
    if isinstance(value, triton.runtime.KernelInterface)
}


@functools.lru_cache(maxsize=4096)
def jitted(text: str, name: str) -> Any:
    """The function `name` that text defines. Through linecache its source is readable to Triton and in tracebacks."""
    file = f"<anymask {name} {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    namespace: dict[str, Any] = dict(NAMESPACE)
    exec(compile(text, file, "exec"), namespace)
    return namespace[name]
