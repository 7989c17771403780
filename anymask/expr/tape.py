"""Tape: the TorchFunctionMode that writes down, line by line, what a function does with its indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from anymask.errors import MaskError
from anymask.expr.bindings import Bindings
from anymask.expr.ir import DType, Op
from anymask.expr.language import ADVICE, FUNCTIONS, LANGUAGE, LANGUAGE_TYPE

TORCH_TYPE = {
    DType.BOOL: torch.bool,
    DType.INT32: torch.int32,
    DType.INT64: torch.int64,
    DType.FLOAT: torch.float32,
}


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
    if tensor.is_meta:  # stand-ins are there: one went through an operation that did not arrive here
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
