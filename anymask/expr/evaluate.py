"""evaluate(expr): the meaning of an expression, dense, in plain torch. Every other pass is tested against it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from anymask.expr.bindings import Bindings
from anymask.expr.ir import DType, Expr, Op


def evaluate(
    expr: Expr,
    bindings: Bindings,
    *,
    b: Tensor,
    h: Tensor,
    q_idx: Tensor,
    kv_idx: Tensor,
    score: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The value of expr at every combination of the indices.

    b, h, q_idx, kv_idx: integer tensors of mutually broadcastable shapes, on one device.  score: same, floating; its
    dtype then is the dtype of FLOAT, which else is `dtype`.  Returns a tensor broadcastable to their common shape: it
    is smaller where the value does not depend on an index. BOOL is torch.bool, INT32 torch.int32, INT64 torch.int64.
    """
    types = {
        DType.BOOL: torch.bool,
        DType.INT32: torch.int32,
        DType.INT64: torch.int64,
        DType.FLOAT: dtype if score is None else score.dtype,
    }
    indices = {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx}
    done: dict[Expr, Tensor] = {}
    for node in expr.walk():
        result_type = types[node.dtype]
        args = [done[arg] for arg in node.args]
        if node.op is Op.INDEX:
            value = indices[str(node.value)].to(result_type)
        elif node.op is Op.SCORE:
            assert score is not None, "a mask cannot read the score"
            value = score
        elif node.op is Op.CONST:
            value = torch.full((), node.value, dtype=result_type, device=q_idx.device)  # type: ignore[arg-type]
        elif node.op is Op.NUMBER:
            numbers = bindings.floats if node.dtype is DType.FLOAT else bindings.ints
            value = torch.full((), numbers[int(node.value)], dtype=result_type, device=q_idx.device)  # type: ignore[arg-type]
        elif node.op is Op.LOAD:
            value = load(bindings.captures[int(node.value)], args).to(result_type)  # type: ignore[arg-type]
        elif node.op is Op.CAST:
            value = args[0] != 0 if node.dtype is DType.BOOL else args[0].to(result_type)
        else:
            value = RULES[node.op](*args)
        done[node] = value
    return done[expr]


def evaluate_constant(expr: Expr) -> bool | int | float:
    """The value of one operation on constants, as a Python number."""
    zero = torch.zeros((), dtype=torch.int32)
    return evaluate(expr, Bindings(), b=zero, h=zero, q_idx=zero, kv_idx=zero).item()


def load(tensor: Tensor, indices: list[Tensor]) -> Tensor:
    """tensor[indices] as the language defines it: negative indices count from the end, outside the tensor reads 0."""
    if not indices:
        return tensor
    inside: Tensor | None = None
    safe = []
    for index, size in zip(indices, tensor.shape, strict=True):
        index = index.long()
        index = torch.where(index < 0, index + size, index)
        is_inside = (index >= 0) & (index < size)
        inside = is_inside if inside is None else inside & is_inside
        safe.append(index.clamp(0, max(size - 1, 0)))
    assert inside is not None
    if tensor.numel() == 0:
        return torch.zeros(inside.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.where(inside, tensor[tuple(safe)], torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def _floordiv(x: Tensor, y: Tensor) -> Tensor:
    if x.is_floating_point():
        return torch.floor(x / y)
    safe = torch.where((y == 0) | (y == -1), 1, y)  # y == -1: the hardware traps on INT_MIN // -1
    quotient = torch.where(y == -1, -x, torch.div(x, safe, rounding_mode="floor"))
    return torch.where(y == 0, torch.zeros((), dtype=x.dtype, device=x.device), quotient)


def _mod(x: Tensor, y: Tensor) -> Tensor:
    if x.is_floating_point():
        return x - torch.floor(x / y) * y
    safe = torch.where((y == 0) | (y == -1), 1, y)
    return torch.where(y == safe, torch.remainder(x, safe), torch.zeros((), dtype=x.dtype, device=x.device))


def _shift(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, is_left: bool) -> Tensor:
    bits = torch.iinfo(x.dtype).bits
    inside = (y >= 0) & (y < bits)
    shifted = function(x, torch.where(inside, y, 0))
    outside = torch.zeros_like(x) if is_left else torch.where(x < 0, -torch.ones_like(x), torch.zeros_like(x))
    return torch.where(inside, shifted, outside)


def _not(x: Tensor) -> Tensor:
    return torch.logical_not(x) if x.dtype == torch.bool else torch.bitwise_not(x)


RULES: dict[Op, Callable[..., Tensor]] = {
    Op.ADD: torch.add,
    Op.SUB: torch.sub,
    Op.MUL: torch.mul,
    Op.DIV: torch.div,
    Op.FLOORDIV: _floordiv,
    Op.MOD: _mod,
    Op.NEG: torch.neg,
    Op.ABS: torch.abs,
    Op.MIN: torch.minimum,
    Op.MAX: torch.maximum,
    Op.POW: torch.pow,
    Op.SHL: lambda x, y: _shift(torch.bitwise_left_shift, x, y, True),
    Op.SHR: lambda x, y: _shift(torch.bitwise_right_shift, x, y, False),
    Op.AND: torch.bitwise_and,
    Op.OR: torch.bitwise_or,
    Op.XOR: torch.bitwise_xor,
    Op.NOT: _not,
    Op.EQ: torch.eq,
    Op.NE: torch.ne,
    Op.LT: torch.lt,
    Op.LE: torch.le,
    Op.WHERE: torch.where,
    Op.EXP: torch.exp,
    Op.EXP2: torch.exp2,
    Op.LOG: torch.log,
    Op.LOG2: torch.log2,
    Op.LOG1P: torch.log1p,
    Op.SQRT: torch.sqrt,
    Op.RSQRT: torch.rsqrt,
    Op.TANH: torch.tanh,
    Op.SIGMOID: torch.sigmoid,
    Op.ERF: torch.erf,
    Op.SIN: torch.sin,
    Op.COS: torch.cos,
    Op.FLOOR: torch.floor,
    Op.CEIL: torch.ceil,
    Op.SIGN: torch.sign,
}
