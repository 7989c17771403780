"""trace(mask, score_mod): run the user's functions once on four 0-d tensors and write down what they do.

The functions run under a TorchFunctionMode, so that every torch operation on an index arrives here, also
`ids[b, q_idx]` on a captured tensor. Each becomes one line of program text (the grammar of ir.to_text). What is not in
FUNCTIONS below is not in the mask language. The same code runs in eager and is inlined by torch.compile: there captured
tensors become graph inputs and captured numbers become op arguments, so a number that changes is never baked in.
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
from torch.overrides import TorchFunctionMode

from anymask.errors import MaskError
from anymask.expr.bindings import Bindings
from anymask.expr.ir import INDEX_NAMES, DType, Op

ModFunction = Callable[..., Any]

SIGNATURES = {"mask": "b, h, q_idx, kv_idx", "score_mod": "score, b, h, q_idx, kv_idx"}

TORCH_TYPE = {
    DType.BOOL: torch.bool,
    DType.INT32: torch.int32,
    DType.INT64: torch.int64,
    DType.FLOAT: torch.float32,
}
# what a captured tensor or a cast of this dtype is in the language
LANGUAGE_TYPE = {
    torch.bool: DType.BOOL,
    torch.uint8: DType.INT32,
    torch.int8: DType.INT32,
    torch.int16: DType.INT32,
    torch.int32: DType.INT32,
    torch.int64: DType.INT64,
    torch.float16: DType.FLOAT,
    torch.bfloat16: DType.FLOAT,
    torch.float32: DType.FLOAT,
    torch.float64: DType.FLOAT,
}
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


class Tape(TorchFunctionMode):
    """Writes one line for each operation on an index. `values[i]` is the 0-d stand-in for the result of `lines[i]`."""

    def __init__(self, bindings: Bindings, device: torch.device | None):
        super().__init__()
        self.lines: list[str] = []
        self.values: list[Tensor] = []
        self.views: list[tuple[Tensor, Tensor, tuple[Any, ...]]] = []  # stand-in, captured tensor, its first indices
        self.captures = list(bindings.captures)
        self.ints = list(bindings.ints)
        self.floats = list(bindings.floats)
        self.device = device

    @property
    def bindings(self) -> Bindings:
        return Bindings(tuple(self.captures), tuple(self.ints), tuple(self.floats))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if self.knows(args[0]) or self.view_of(args[0]) is not None or any(self.knows(index) for index in indices):
                return self.load(args[0], indices)
            return func(*args, **kwargs)
        operands = list(args) + list(kwargs.values())
        if not any(self.knows(x) or self.view_of(x) is not None for x in operands):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # .dtype, .device, .shape ... of a stand-in
            return func(*args, **kwargs)
        if func is Tensor.where:  # x.where(condition, y)
            args = (args[1], args[0], *args[2:])
        if name in FUNCTIONS:  # by name: under torch.compile `//` arrives as another object than in eager
            return FUNCTIONS[name](self, *args, **kwargs)
        raise MaskError(ADVICE.get(name) or f"torch's {name}() is not in the mask language. {LANGUAGE}")

    # stand-ins

    def line_of(self, x: Any) -> int:
        """The line whose result x stands for, -1 for anything else."""
        if isinstance(x, Tensor):
            for i in range(len(self.values)):
                if self.values[i] is x:
                    return i
        return -1

    def knows(self, x: Any) -> bool:
        return self.line_of(x) >= 0

    def view_of(self, x: Any) -> tuple[Tensor, tuple[Any, ...]] | None:
        """The captured tensor and first indices that x = tensor[b] stands for, None for anything else."""
        for view, tensor, indices in self.views:
            if view is x:
                return tensor, indices
        return None

    def put(self, op: Op, dtype: DType, args: tuple[int, ...] | list[int] = (), value: Any = None) -> Tensor:
        """Write one line; its stand-in."""
        words = [op.value, dtype.value]
        if value is not None:
            words.append(str(value))
        for arg in args:
            words.append(f"%{arg}")
        self.lines.append(" ".join(words))
        self.values.append(torch.empty((), dtype=TORCH_TYPE[dtype], device="meta"))
        return self.values[-1]

    # operands

    def type_of(self, x: Any) -> DType:
        """The language's dtype of an operand."""
        if isinstance(x, Tensor):
            if x.dtype not in LANGUAGE_TYPE:
                raise MaskError(
                    f"captured tensors of dtype {x.dtype} cannot be read: use an integer, float or bool dtype"
                )
            return LANGUAGE_TYPE[x.dtype]
        if isinstance(x, bool):
            return DType.BOOL
        if isinstance(x, (int, torch.SymInt)):
            return DType.INT32
        if isinstance(x, (float, torch.SymFloat)):
            return DType.FLOAT
        raise MaskError(f"cannot compute with a {type(x).__name__}: operands are indices, captured tensors and numbers")

    def common_type(self, *operands: Any) -> DType:
        """Promotion as in torch: bool < int32 < int64 < float; a Python integer widens nothing but bool."""
        common = DType.BOOL
        for x in operands:
            dtype = self.type_of(x)
            if dtype.rank > common.rank:
                common = dtype
        return common

    def operand(self, x: Any, dtype: DType) -> int:
        """The line that holds x as dtype."""
        own = self.type_of(x)
        line = self.line_of(x)
        if isinstance(x, Tensor):
            if line < 0:
                if self.view_of(x) is not None or x.dim() > 0:
                    raise MaskError(
                        f"a captured tensor of shape {tuple(x.shape)} must be indexed down to one element, "
                        "for example ids[b, q_idx]"
                    )
                line = self.line_of(self.load(x, ()))
        elif isinstance(x, bool):
            self.put(Op.CONST, DType.BOOL, value=x)
            line = len(self.lines) - 1
        elif own is DType.FLOAT:
            self.floats.append(x)
            self.put(Op.NUMBER, DType.FLOAT, value=len(self.floats) - 1)
            line = len(self.lines) - 1
        else:
            own = DType.INT64 if dtype is DType.INT64 else DType.INT32
            self.ints.append(x)
            self.put(Op.NUMBER, own, value=len(self.ints) - 1)
            line = len(self.lines) - 1
        if own is dtype:
            return line
        self.put(Op.CAST, dtype, (line,))
        return len(self.lines) - 1

    def record(self, op: Op, dtype: DType, *operands: Any, result: DType | None = None) -> Tensor:
        """One operation on operands that are first brought to dtype."""
        lines = [self.operand(x, dtype) for x in operands]
        return self.put(op, dtype if result is None else result, lines)

    def load(self, tensor: Tensor, indices: tuple[Any, ...]) -> Tensor:
        """Read a captured tensor at computed indices; with fewer indices than dimensions, a view to index further."""
        view = self.view_of(tensor)
        if view is not None:
            tensor, indices = view[0], view[1] + tuple(indices)
        if self.knows(tensor):
            raise MaskError("an index is one number and cannot be indexed: index a captured tensor, ids[q_idx]")
        for index in indices:
            if index is None or index is Ellipsis or isinstance(index, (slice, list)):
                raise MaskError(
                    "a captured tensor takes one number for each dimension: ids[b, q_idx]; no slice, None or ..."
                )
            if self.type_of(index) in (DType.BOOL, DType.FLOAT):
                raise MaskError(f"an index must be an integer, got {self.type_of(index).value}: use .to(torch.int32)")
        check_capture(tensor, self.device)
        if len(indices) > tensor.dim():
            raise MaskError(f"{len(indices)} indices for a captured tensor of shape {tuple(tensor.shape)}")
        if len(indices) < tensor.dim():
            stand_in = torch.empty((), dtype=tensor.dtype, device="meta").expand(tensor.shape[len(indices) :])
            self.views.append((stand_in, tensor, tuple(indices)))
            return stand_in
        lines = [self.operand(index, self.type_of(index)) for index in indices]
        return self.put(Op.LOAD, self.type_of(tensor), lines, self.slot_of(tensor))

    def slot_of(self, tensor: Tensor) -> int:
        for slot in range(len(self.captures)):
            if self.captures[slot] is tensor:
                return slot
        self.captures.append(tensor)
        return len(self.captures) - 1

    def finish(self, role: str, result: Any, dtype: DType) -> str:
        """The program text whose last line is the function's result."""
        if not isinstance(result, (Tensor, bool)) and not (role == "score_mod" and isinstance(result, (int, float))):
            raise MaskError(
                f"the {role} returned a {type(result).__name__}; return one value computed from its arguments"
            )
        own = self.type_of(result)
        if role == "mask" and own is not DType.BOOL:
            raise MaskError(
                f"the mask returned {own.value}, not bool: True where the query sees the key, e.g. q_idx >= kv_idx. "
                "A value that is added to the score belongs in score_mod"
            )
        line = self.operand(result, dtype)
        if line != len(self.lines) - 1:
            self.lines.append(
                f"and bool %{line} %{line}" if dtype is DType.BOOL else f"where f32 %{self.true()} %{line} %{line}"
            )
        return "\n".join(self.lines)

    def true(self) -> int:
        self.put(Op.CONST, DType.BOOL, value=True)
        return len(self.lines) - 1


def check_captures(bindings: Bindings, device: torch.device | None) -> None:
    """check_capture for a program that was traced before."""
    for tensor in bindings.captures:
        check_capture(tensor, device)


def check_capture(tensor: Tensor, device: torch.device | None) -> None:
    """Raise MaskError where a mask or score function cannot read a captured tensor."""
    if tensor.device.type == "meta":  # stand-ins are there: one went through an operation that did not arrive here
        raise MaskError(
            "an operation on an index did not reach the tracer; under torch.compile the builtin abs() is one: "
            "write torch.abs(x)"
        )
    if device is not None and tensor.device != device:
        raise MaskError(
            f"a captured tensor of shape {tuple(tensor.shape)} is on {tensor.device} but q is on {device}: "
            f'move it once, outside the mask, with .to("{device}")'
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise MaskError(
            f"a captured tensor of shape {tuple(tensor.shape)} requires grad, and gradients to captured tensors "
            "are not computed: capture it as tensor.detach(), or call under torch.no_grad()"
        )


# the functions of the language


def _arithmetic(op: Op, is_reflected: bool = False) -> Callable[..., Tensor]:
    def handler(tape: Tape, x: Any, y: Any, *, alpha: Any = 1) -> Tensor:
        if alpha != 1:
            y = tape.record(Op.MUL, tape.common_type(y, alpha), y, alpha)
        if is_reflected:
            x, y = y, x
        dtype = tape.common_type(x, y)
        if dtype is DType.BOOL:
            if op is Op.SUB:
                raise MaskError("bool - bool is not defined: use ^ for 'one but not both'")
            if op in (Op.ADD, Op.MUL):
                return tape.record(Op.OR if op is Op.ADD else Op.AND, dtype, x, y)
            dtype = DType.INT32
        return tape.record(op, dtype, x, y)

    return handler


def _division(is_reflected: bool = False) -> Callable[..., Tensor]:
    def handler(tape: Tape, x: Any, y: Any, *, rounding_mode: str | None = None) -> Tensor:
        if is_reflected:
            x, y = y, x
        if rounding_mode is None:
            return tape.record(Op.DIV, DType.FLOAT, x, y)
        if rounding_mode == "floor":
            return _arithmetic(Op.FLOORDIV)(tape, x, y)
        raise MaskError("div with rounding_mode='trunc' is not in the mask language: use // (rounds down)")

    return handler


def _of_float(op: Op, is_reflected: bool = False) -> Callable[..., Tensor]:
    def handler(tape: Tape, *operands: Any) -> Tensor:
        return tape.record(op, DType.FLOAT, *(operands[::-1] if is_reflected else operands))

    return handler


def _rounding(op: Op) -> Callable[..., Tensor]:
    def handler(tape: Tape, x: Any) -> Tensor:
        return x if tape.type_of(x).is_int else tape.record(op, DType.FLOAT, x)

    return handler


def _comparison(op: Op, is_swapped: bool = False) -> Callable[..., Tensor]:
    def handler(tape: Tape, x: Any, y: Any) -> Tensor:
        dtype = tape.common_type(x, y)
        if dtype is DType.BOOL and op in (Op.LT, Op.LE):
            dtype = DType.INT32
        if is_swapped:
            x, y = y, x
        return tape.record(op, dtype, x, y, result=DType.BOOL)

    return handler


def _bitwise(op: Op) -> Callable[..., Tensor]:
    def handler(tape: Tape, *operands: Any) -> Tensor:
        dtype = tape.common_type(*operands)
        if dtype is DType.FLOAT:
            raise MaskError(f"'{op.value}' needs bool or integer operands, got float: compare first, for example x > 0")
        return tape.record(op, dtype, *operands)

    return handler


def _shift(op: Op, is_reflected: bool = False) -> Callable[..., Tensor]:
    def handler(tape: Tape, x: Any, y: Any) -> Tensor:
        if is_reflected:
            x, y = y, x
        dtype = tape.common_type(x, y)
        if not dtype.is_int:
            raise MaskError(f"a shift needs integers, got {dtype.value}")
        return tape.record(op, dtype, x, y)

    return handler


def _logical(op: Op) -> Callable[..., Tensor]:
    def handler(tape: Tape, *operands: Any) -> Tensor:
        return tape.record(op, DType.BOOL, *operands)

    return handler


def _same_type(op: Op) -> Callable[..., Tensor]:
    def handler(tape: Tape, x: Any) -> Tensor:
        dtype = tape.type_of(x)
        if dtype is DType.BOOL:
            raise MaskError(f"{op.value} of a bool is not defined" + (": write ~x" if op is Op.NEG else ""))
        return tape.record(op, dtype, x)

    return handler


def _min_max(op: Op) -> Callable[..., Tensor]:
    def handler(tape: Tape, x: Any, *rest: Any, **kwargs: Any) -> Tensor:
        operands = (x, *rest, *tuple(kwargs.values()))
        if len(operands) != 2:
            raise MaskError(f"{op.value} takes two operands here: torch.{op.value}imum(x, y)")
        return _arithmetic(op)(tape, *operands)

    return handler


def _where(tape: Tape, condition: Any, input: Any, other: Any) -> Tensor:
    if tape.type_of(condition) is not DType.BOOL:
        raise MaskError("the condition of torch.where must be bool: compare first, for example x != 0")
    dtype = tape.common_type(input, other)
    lines = [tape.operand(condition, DType.BOOL), tape.operand(input, dtype), tape.operand(other, dtype)]
    return tape.put(Op.WHERE, dtype, lines)


def _masked_fill(tape: Tape, x: Any, mask: Any, value: Any) -> Tensor:
    return _where(tape, mask, value, x)


def _clamp(tape: Tape, x: Any, min: Any = None, max: Any = None) -> Tensor:
    if min is not None:  # not MAX: at the limit the gradient is 1, as torch.clamp has it
        x = _where(tape, _comparison(Op.LT)(tape, x, min), min, x)
    if max is not None:
        x = _where(tape, _comparison(Op.LT, True)(tape, x, max), max, x)
    return x


def _relu(tape: Tape, x: Any, inplace: bool = False) -> Tensor:
    return _where(tape, _comparison(Op.LE)(tape, x, 0), 0, x)  # at 0 the gradient is 0


def _silu(tape: Tape, x: Any, inplace: bool = False) -> Tensor:
    return tape.record(Op.MUL, DType.FLOAT, x, tape.record(Op.SIGMOID, DType.FLOAT, x))


def _softplus(tape: Tape, x: Any) -> Tensor:
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|))"""
    tail = tape.record(Op.EXP, DType.FLOAT, tape.record(Op.NEG, DType.FLOAT, tape.record(Op.ABS, DType.FLOAT, x)))
    return tape.record(Op.ADD, DType.FLOAT, _relu(tape, x), tape.record(Op.LOG1P, DType.FLOAT, tail))


def _square(tape: Tape, x: Any) -> Tensor:
    return _arithmetic(Op.MUL)(tape, x, x)


def _reciprocal(tape: Tape, x: Any) -> Tensor:
    return tape.record(Op.DIV, DType.FLOAT, 1.0, x)


def _power(is_reflected: bool = False) -> Callable[..., Tensor]:
    def handler(tape: Tape, x: Any, y: Any) -> Tensor:
        if is_reflected:
            x, y = y, x
        if tape.common_type(x, y) is DType.FLOAT:
            return tape.record(Op.POW, DType.FLOAT, x, y)
        if isinstance(y, int) and 1 <= y <= 8:
            result = x
            for _ in range(y - 1):
                result = _arithmetic(Op.MUL)(tape, result, x)
            return result
        raise MaskError(
            "an integer power needs a fixed exponent from 1 to 8; or make the base float: q_idx.float() ** y"
        )

    return handler


def _to_type(tape: Tape, x: Any, dtype: torch.dtype) -> Tensor:
    if dtype not in LANGUAGE_TYPE:
        raise MaskError(f"cannot cast to {dtype}: the language has bool, int32, int64 and float32")
    target = LANGUAGE_TYPE[dtype]
    return x if tape.type_of(x) is target and tape.knows(x) else tape.values[tape.operand(x, target)]


def _cast_to(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda tape, x: _to_type(tape, x, dtype)


def _to(tape: Tape, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    for value in args + tuple(kwargs.values()):
        if isinstance(value, torch.dtype):
            return _to_type(tape, x, value)
        if isinstance(value, Tensor):
            return _to_type(tape, x, value.dtype)
    return x


def _filled(value: bool | int | None) -> Callable[..., Tensor]:
    """ones_like, new_zeros, full_like ... of an index: a constant."""

    def handler(tape: Tape, x: Any, *args: Any, fill_value: Any = value, dtype: Any = None, **kwargs: Any) -> Tensor:
        if value is None and args:
            fill_value = args[-1]
        target = tape.type_of(x) if dtype is None else LANGUAGE_TYPE[dtype]
        return tape.values[tape.operand(bool(fill_value) if target is DType.BOOL else fill_value, target)]

    return handler


def _in_place(tape: Tape, *args: Any, **kwargs: Any) -> Tensor:
    raise MaskError("a mask has no in-place operations: write m = m & x, not m &= x")


_HANDLERS: dict[str, Callable[..., Tensor]] = {
    "add __add__ __radd__": _arithmetic(Op.ADD),
    "sub subtract __sub__": _arithmetic(Op.SUB),
    "rsub __rsub__": _arithmetic(Op.SUB, True),
    "mul multiply __mul__ __rmul__": _arithmetic(Op.MUL),
    "div divide true_divide __truediv__ __div__": _division(),
    "__rtruediv__ __rdiv__": _division(True),
    "floor_divide __floordiv__": _arithmetic(Op.FLOORDIV),
    "__rfloordiv__": _arithmetic(Op.FLOORDIV, True),
    "remainder __mod__": _arithmetic(Op.MOD),
    "__rmod__": _arithmetic(Op.MOD, True),
    "pow __pow__": _power(),
    "__rpow__": _power(True),
    "minimum fmin": _arithmetic(Op.MIN),
    "maximum fmax": _arithmetic(Op.MAX),
    "min": _min_max(Op.MIN),
    "max": _min_max(Op.MAX),
    "neg negative __neg__": _same_type(Op.NEG),
    "abs absolute __abs__": _same_type(Op.ABS),
    "sign sgn": _same_type(Op.SIGN),
    "bitwise_and __and__ __rand__": _bitwise(Op.AND),
    "bitwise_or __or__ __ror__": _bitwise(Op.OR),
    "bitwise_xor __xor__ __rxor__": _bitwise(Op.XOR),
    "bitwise_not __invert__": _bitwise(Op.NOT),
    "logical_and": _logical(Op.AND),
    "logical_or": _logical(Op.OR),
    "logical_xor": _logical(Op.XOR),
    "logical_not": _logical(Op.NOT),
    "bitwise_left_shift __lshift__": _shift(Op.SHL),
    "bitwise_right_shift __rshift__": _shift(Op.SHR),
    "__rlshift__": _shift(Op.SHL, True),
    "__rrshift__": _shift(Op.SHR, True),
    "eq __eq__": _comparison(Op.EQ),
    "ne not_equal __ne__": _comparison(Op.NE),
    "lt less __lt__": _comparison(Op.LT),
    "le less_equal __le__": _comparison(Op.LE),
    "gt greater __gt__": _comparison(Op.LT, True),
    "ge greater_equal __ge__": _comparison(Op.LE, True),
    "where": _where,
    "masked_fill": _masked_fill,
    "clamp clip": _clamp,
    "clamp_min": lambda tape, x, min: _clamp(tape, x, min=min),
    "clamp_max": lambda tape, x, max: _clamp(tape, x, max=max),
    "relu": _relu,
    "silu": _silu,
    "softplus": _softplus,
    "square": _square,
    "reciprocal": _reciprocal,
    "exp": _of_float(Op.EXP),
    "exp2 special_exp2": _of_float(Op.EXP2),
    "log": _of_float(Op.LOG),
    "log2": _of_float(Op.LOG2),
    "log1p special_log1p": _of_float(Op.LOG1P),
    "sqrt": _of_float(Op.SQRT),
    "rsqrt": _of_float(Op.RSQRT),
    "tanh": _of_float(Op.TANH),
    "sigmoid special_expit": _of_float(Op.SIGMOID),
    "erf special_erf": _of_float(Op.ERF),
    "sin": _of_float(Op.SIN),
    "cos": _of_float(Op.COS),
    "floor": _rounding(Op.FLOOR),
    "ceil": _rounding(Op.CEIL),
    "to type type_as": _to,
    "bool": _cast_to(torch.bool),
    "int": _cast_to(torch.int32),
    "long": _cast_to(torch.int64),
    "float": _cast_to(torch.float32),
    "half": _cast_to(torch.float16),
    "bfloat16": _cast_to(torch.bfloat16),
    "double": _cast_to(torch.float64),
    "ones_like new_ones": _filled(1),
    "zeros_like new_zeros": _filled(0),
    "full_like new_full": _filled(None),
    "__iadd__ __isub__ __imul__ __iand__ __ior__ __ixor__ __itruediv__ __ifloordiv__ __imod__ __ilshift__ __irshift__ "
    "add_ sub_ mul_ div_ logical_and_ logical_or_ logical_not_ masked_fill_ clamp_": _in_place,
}
FUNCTIONS = {name: handler for names, handler in _HANDLERS.items() for name in names.split()}

LANGUAGE = (
    "It has + - * / // % ** << >> & | ^ ~, comparisons, abs, torch.where, minimum, maximum, clamp, casts, indexing of "
    "captured tensors, and exp, exp2, log, log2, log1p, sqrt, rsqrt, tanh, sigmoid, erf, sin, cos, floor, ceil, sign, "
    "relu, silu, softplus"
)
_NO_BRANCH = (
    "a mask is computed for every pair at once, so Python's if, and, or, not cannot look at an index: "
    "write & for and, | for or, ~ for not, torch.where(condition, x, y) for if, and in functions that a mask calls "
    "torch.minimum and torch.maximum for min and max"
)
_NO_NUMBER = "an index is not one number while the mask is traced: {} cannot be used; compute with q_idx itself"
ADVICE = {
    "__bool__": _NO_BRANCH,
    "is_nonzero": _NO_BRANCH,
    "__contains__": "`in` cannot look at an index: compare with each value and join with |, or index a bool table",
    "__index__": _NO_NUMBER.format("range() or a list index"),
    "__int__": _NO_NUMBER.format("int()"),
    "__float__": _NO_NUMBER.format("float()"),
    "__len__": _NO_NUMBER.format("len()"),
    "__iter__": _NO_NUMBER.format("a loop over an index"),
    "item": _NO_NUMBER.format(".item()"),
    "tolist": _NO_NUMBER.format(".tolist()"),
    "numpy": _NO_NUMBER.format(".numpy()"),
}

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
