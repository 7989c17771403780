"""The functions of the mask language: what each torch function on an index writes down. FUNCTIONS is all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from anymask.errors import MaskError
from anymask.expr.ir import DType, Op

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


class Recorder(Protocol):
    """What a function of the language asks of the tape (tape.py), which documents it."""

    values: list[Tensor]

    def knows(self, x: Any) -> bool: ...
    def type_of(self, x: Any) -> DType: ...
    def common_type(self, *operands: Any) -> DType: ...
    def operand(self, x: Any, dtype: DType) -> int: ...
    def record(self, op: Op, dtype: DType, *operands: Any, result: DType | None = None) -> Tensor: ...
    def put(self, op: Op, dtype: DType, args: tuple[int, ...] | list[int] = (), value: Any = None) -> Tensor: ...


def _arithmetic(op: Op, is_reflected: bool = False) -> Callable[..., Tensor]:
    def handler(tape: Recorder, x: Any, y: Any, *, alpha: Any = 1) -> Tensor:
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
    def handler(tape: Recorder, x: Any, y: Any, *, rounding_mode: str | None = None) -> Tensor:
        if is_reflected:
            x, y = y, x
        if rounding_mode is None:
            return tape.record(Op.DIV, DType.FLOAT, x, y)
        if rounding_mode == "floor":
            return _arithmetic(Op.FLOORDIV)(tape, x, y)
        raise MaskError("div with rounding_mode='trunc' is not in the mask language: use // (rounds down)")

    return handler


def _of_float(op: Op, is_reflected: bool = False) -> Callable[..., Tensor]:
    def handler(tape: Recorder, *operands: Any) -> Tensor:
        return tape.record(op, DType.FLOAT, *(operands[::-1] if is_reflected else operands))

    return handler


def _rounding(op: Op) -> Callable[..., Tensor]:
    def handler(tape: Recorder, x: Any) -> Tensor:
        return x if tape.type_of(x).is_int else tape.record(op, DType.FLOAT, x)

    return handler


def _comparison(op: Op, is_swapped: bool = False) -> Callable[..., Tensor]:
    def handler(tape: Recorder, x: Any, y: Any) -> Tensor:
        dtype = tape.common_type(x, y)
        if dtype is DType.BOOL and op in (Op.LT, Op.LE):
            dtype = DType.INT32
        if is_swapped:
            x, y = y, x
        return tape.record(op, dtype, x, y, result=DType.BOOL)

    return handler


def _bitwise(op: Op) -> Callable[..., Tensor]:
    def handler(tape: Recorder, *operands: Any) -> Tensor:
        dtype = tape.common_type(*operands)
        if dtype is DType.FLOAT:
            raise MaskError(f"'{op.value}' needs bool or integer operands, got float: compare first, for example x > 0")
        return tape.record(op, dtype, *operands)

    return handler


def _shift(op: Op, is_reflected: bool = False) -> Callable[..., Tensor]:
    def handler(tape: Recorder, x: Any, y: Any) -> Tensor:
        if is_reflected:
            x, y = y, x
        dtype = tape.common_type(x, y)
        if not dtype.is_int:
            raise MaskError(f"a shift needs integers, got {dtype.value}")
        return tape.record(op, dtype, x, y)

    return handler


def _logical(op: Op) -> Callable[..., Tensor]:
    def handler(tape: Recorder, *operands: Any) -> Tensor:
        return tape.record(op, DType.BOOL, *operands)

    return handler


def _same_type(op: Op) -> Callable[..., Tensor]:
    def handler(tape: Recorder, x: Any) -> Tensor:
        dtype = tape.type_of(x)
        if dtype is DType.BOOL:
            raise MaskError(f"{op.value} of a bool is not defined" + (": write ~x" if op is Op.NEG else ""))
        return tape.record(op, dtype, x)

    return handler


def _min_max(op: Op) -> Callable[..., Tensor]:
    def handler(tape: Recorder, x: Any, *rest: Any, **kwargs: Any) -> Tensor:
        operands = (x, *rest, *tuple(kwargs.values()))
        if len(operands) != 2:
            raise MaskError(f"{op.value} takes two operands here: torch.{op.value}imum(x, y)")
        return _arithmetic(op)(tape, *operands)

    return handler


def _where(tape: Recorder, condition: Any, input: Any, other: Any) -> Tensor:
    if tape.type_of(condition) is not DType.BOOL:
        raise MaskError("the condition of torch.where must be bool: compare first, for example x != 0")
    dtype = tape.common_type(input, other)
    lines = [tape.operand(condition, DType.BOOL), tape.operand(input, dtype), tape.operand(other, dtype)]
    return tape.put(Op.WHERE, dtype, lines)


def _masked_fill(tape: Recorder, x: Any, mask: Any, value: Any) -> Tensor:
    return _where(tape, mask, value, x)


def _clamp(tape: Recorder, x: Any, min: Any = None, max: Any = None) -> Tensor:
    if min is not None:  # not MAX: at the limit the gradient is 1, as torch.clamp has it
        x = _where(tape, _comparison(Op.LT)(tape, x, min), min, x)
    if max is not None:
        x = _where(tape, _comparison(Op.LT, True)(tape, x, max), max, x)
    return x


def _relu(tape: Recorder, x: Any, inplace: bool = False) -> Tensor:
    return _where(tape, _comparison(Op.LE)(tape, x, 0), 0, x)  # at 0 the gradient is 0


def _silu(tape: Recorder, x: Any, inplace: bool = False) -> Tensor:
    return tape.record(Op.MUL, DType.FLOAT, x, tape.record(Op.SIGMOID, DType.FLOAT, x))


def _softplus(tape: Recorder, x: Any) -> Tensor:
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|))"""
    tail = tape.record(Op.EXP, DType.FLOAT, tape.record(Op.NEG, DType.FLOAT, tape.record(Op.ABS, DType.FLOAT, x)))
    return tape.record(Op.ADD, DType.FLOAT, _relu(tape, x), tape.record(Op.LOG1P, DType.FLOAT, tail))


def _square(tape: Recorder, x: Any) -> Tensor:
    return _arithmetic(Op.MUL)(tape, x, x)


def _reciprocal(tape: Recorder, x: Any) -> Tensor:
    return tape.record(Op.DIV, DType.FLOAT, 1.0, x)


def _power(is_reflected: bool = False) -> Callable[..., Tensor]:
    def handler(tape: Recorder, x: Any, y: Any) -> Tensor:
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


def _to_type(tape: Recorder, x: Any, dtype: torch.dtype) -> Tensor:
    if dtype not in LANGUAGE_TYPE:
        raise MaskError(f"cannot cast to {dtype}: the language has bool, int32, int64 and float32")
    target = LANGUAGE_TYPE[dtype]
    return x if tape.type_of(x) is target and tape.knows(x) else tape.values[tape.operand(x, target)]


def _cast_to(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda tape, x: _to_type(tape, x, dtype)


def _to(tape: Recorder, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    for value in args + tuple(kwargs.values()):
        if isinstance(value, torch.dtype):
            return _to_type(tape, x, value)
        if isinstance(value, Tensor):
            return _to_type(tape, x, value.dtype)
    return x


def _filled(value: bool | int | None) -> Callable[..., Tensor]:
    """ones_like, new_zeros, full_like ... of an index: a constant."""

    def handler(
        tape: Recorder, x: Any, *args: Any, fill_value: Any = value, dtype: Any = None, **kwargs: Any
    ) -> Tensor:
        if value is None and args:
            fill_value = args[-1]
        target = tape.type_of(x) if dtype is None else LANGUAGE_TYPE[dtype]
        return tape.values[tape.operand(bool(fill_value) if target is DType.BOOL else fill_value, target)]

    return handler


def _in_place(tape: Recorder, *args: Any, **kwargs: Any) -> Tensor:
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
