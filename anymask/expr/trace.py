"""trace(mask, score_mod): run the user's functions once on four 0-d tensors and write down what they do.

The functions run under a TorchFunctionMode, so that every torch operation on an index arrives here, also
`ids[b, q_idx]` on a captured tensor. Each becomes one line of program text (the grammar of ir.to_text). What is not in
language.FUNCTIONS is not in the mask language. The same code runs in eager and is inlined by torch.compile: there
captured tensors become graph inputs and captured numbers become op arguments, so a number that changes is never baked
in.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import os
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymask.errors import MaskError
from anymask.expr.bindings import Bindings
from anymask.expr.ir import INDEX_NAMES, DType, Op
from anymask.expr.language import LANGUAGE
from anymask.expr.tape import Tape

ModFunction = Callable[..., Any]

SIGNATURES = {"mask": "b, h, q_idx, kv_idx", "score_mod": "score, b, h, q_idx, kv_idx"}
TRUE_TEXT = "const bool True"
SCORE_TEXT = "score f32"


@dataclass(frozen=True)
class Trace:
    """What a call's mask and score function do: two program texts. The mask reads the first ones of the bindings."""

    mask: str
    mask_bindings: Bindings
    score: str
    bindings: Bindings


def trace(mask: ModFunction | None, score_mod: ModFunction | None, device: torch.device | None = None) -> Trace:
    """Trace both functions of a call (None: no mask, no score change).

    device: where captured tensors must be; None accepts any. Raises MaskError with file and line of the user's
      function.
    """
    if mask is None:
        return trace_score(TRUE_TEXT, Bindings(), score_mod, device)
    tape = Tape(Bindings(), device)
    text = _run("mask", mask, tape, DType.BOOL)
    return trace_score(text, tape.bindings, score_mod, device)


def trace_score(mask: str, bindings: Bindings, score_mod: ModFunction | None, device: torch.device | None) -> Trace:
    """Trace a score function beside a mask that is a program already."""
    if score_mod is None:
        return Trace(mask, bindings, SCORE_TEXT, bindings)
    tape = Tape(bindings, device)
    text = _run("score_mod", score_mod, tape, DType.FLOAT)
    return Trace(mask, bindings, text, tape.bindings)


def _run(role: str, function: ModFunction, tape: Tape, dtype: DType) -> str:
    score = tape.put(Op.SCORE, DType.FLOAT) if role == "score_mod" else None
    b, h, q_idx, kv_idx = [tape.put(Op.INDEX, DType.INT32, value=name) for name in INDEX_NAMES]

    user = with_min_max(function)

    def call() -> str:
        with tape:
            result = user(b, h, q_idx, kv_idx) if score is None else user(score, b, h, q_idx, kv_idx)
        return tape.finish(role, result, dtype)

    if torch.compiler.is_compiling():
        return call()
    try:
        return call()
    except Exception as error:
        raise _explain(role, function, error) from error


def with_min_max(function: ModFunction) -> ModFunction:
    """function, but where it says min or max and means Python's, these also take indices.

    Python's own would ask for the truth of a comparison. Only names in the function itself are seen, not in those that
    it calls; torch.compile knows min and max by itself.
    """
    if torch.compiler.is_compiling():
        return function
    plain = getattr(function, "__func__", function)
    if not isinstance(plain, types.FunctionType):
        return function
    names = {"min", "max"}.intersection(plain.__code__.co_names).difference(plain.__globals__)
    if not names:
        return function

    def call(*arguments: Any) -> Any:
        replaced = {"min": _smallest, "max": _largest}
        names_seen = {**plain.__globals__, **{name: replaced[name] for name in names}}  # as they are at this call
        copy = types.FunctionType(plain.__code__, names_seen, plain.__name__, plain.__defaults__, plain.__closure__)
        owner = getattr(function, "__self__", None)
        return copy(*arguments) if owner is None else copy(owner, *arguments)

    return call


def _smallest(*values: Any, **options: Any) -> Any:
    if not any(isinstance(value, Tensor) for value in values):
        return min(*values, **options)
    return functools.reduce(_smaller, values)


def _largest(*values: Any, **options: Any) -> Any:
    if not any(isinstance(value, Tensor) for value in values):
        return max(*values, **options)
    return functools.reduce(_larger, values)


def _smaller(x: Any, y: Any) -> Any:
    x, y = (x, y) if isinstance(x, Tensor) else (y, x)
    return torch.minimum(x, y) if isinstance(y, Tensor) else torch.clamp(x, max=y)


def _larger(x: Any, y: Any) -> Any:
    x, y = (x, y) if isinstance(x, Tensor) else (y, x)
    return torch.maximum(x, y) if isinstance(y, Tensor) else torch.clamp(x, min=y)


# errors

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))


def _explain(role: str, function: ModFunction, error: Exception) -> MaskError:
    """The error again, with file, line and source text of the user's function."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_OURS, _TORCH)) and not frame.filename.startswith("<frozen")
    ]
    if frames:
        place = f"{frames[-1].filename}:{frames[-1].lineno}"
        source = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
    else:
        code = getattr(inspect.unwrap(function), "__code__", None)
        place = f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)
        source = linecache.getline(code.co_filename, code.co_firstlineno).strip() if code else ""
        if isinstance(error, TypeError) and not isinstance(error, MaskError):
            error = MaskError(f"a {role} takes ({SIGNATURES[role]}): {error}")
    reason = str(error) if isinstance(error, MaskError) else f"{type(error).__name__}: {error}"
    if isinstance(error, TypeError):  # from torch's argument parser
        reason += f". {LANGUAGE}"
    return MaskError(f"{place}: {reason}" + (f"\n    {source}" if source else ""))
