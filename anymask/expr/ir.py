"""The expression of a mask or a score change: one immutable, interned node type, and its canonical text.

A mask is an Expr of dtype BOOL over the indices `b h q_idx kv_idx`; a score function is an Expr of dtype FLOAT that
also reads `score`. Operands of one operation always have the same dtype (casts are nodes), so every pass is a table
with one rule per Op and no promotion rules of its own.

Numeric model: INT32 and INT64 wrap as in two's complement. FLOAT is float32 in kernels and float64 in the reference;
16-bit captured tensors are widened when they are read. Integer `//` and `%` round towards minus infinity as in Python,
and `x // 0 = x % 0 = 0`. A captured read counts negative indices from the end, as torch does, and yields 0 outside the
tensor.
"""

from __future__ import annotations

import enum
import functools
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

Value = bool | int | float | str | None


class DType(enum.Enum):
    BOOL = "bool"
    INT32 = "i32"
    INT64 = "i64"
    FLOAT = "f32"

    @property
    def is_int(self) -> bool:
        return self in (DType.INT32, DType.INT64)

    @property
    def rank(self) -> int:
        """Position in the promotion order BOOL < INT32 < INT64 < FLOAT."""
        return _RANK[self]


_RANK = {dtype: rank for rank, dtype in enumerate(DType)}


class Op(enum.Enum):
    # leaves; `value` holds the name, the constant or the slot
    INDEX = "index"  # b, h, q_idx, kv_idx
    SCORE = "score"
    CONST = "const"
    NUMBER = "number"  # slot of a captured number: travels as an argument, so a new value compiles nothing
    LOAD = "load"  # slot of a captured tensor; args are its indices
    # arithmetic
    ADD = "add"
    SUB = "sub"
    MUL = "mul"
    DIV = "div"  # FLOAT only
    FLOORDIV = "floordiv"
    MOD = "mod"
    NEG = "neg"
    ABS = "abs"
    MIN = "min"
    MAX = "max"
    POW = "pow"  # FLOAT only
    SHL = "shl"
    SHR = "shr"
    # logic, bitwise on integers
    AND = "and"
    OR = "or"
    XOR = "xor"
    NOT = "not"
    # comparison; > and >= are written with swapped operands
    EQ = "eq"
    NE = "ne"
    LT = "lt"
    LE = "le"
    # selection and casts
    WHERE = "where"
    CAST = "cast"
    # pointwise functions of a FLOAT
    EXP = "exp"
    EXP2 = "exp2"
    LOG = "log"
    LOG2 = "log2"
    LOG1P = "log1p"
    SQRT = "sqrt"
    RSQRT = "rsqrt"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    ERF = "erf"
    SIN = "sin"
    COS = "cos"
    FLOOR = "floor"
    CEIL = "ceil"
    SIGN = "sign"  # also of integers


COMPARISONS = frozenset({Op.EQ, Op.NE, Op.LT, Op.LE})
INDEX_NAMES = ("b", "h", "q_idx", "kv_idx")


@dataclass(frozen=True, eq=False, repr=False)
class Expr:
    """One node. Interned: structurally equal expressions are the same object, so `is` and `==` and hash agree.

    op: what is computed.  dtype: of the result.  args: operand nodes.
    value: INDEX its name; CONST a bool, int or float; NUMBER and LOAD their slot; None for every other op.
    """

    op: Op
    dtype: DType
    args: tuple[Expr, ...] = ()
    value: Value = None

    @staticmethod
    def of(op: Op, dtype: DType, args: tuple[Expr, ...] = (), value: Value = None) -> Expr:
        """The one node with these fields."""
        key = (op, dtype, args, repr(value))  # repr: 1, True, 1.0, 0.0 and -0.0 stay apart, nan meets itself
        node = _INTERNED.get(key)
        if node is None:
            node = Expr(op, dtype, args, value)
            node = _INTERNED.setdefault(key, node)
        return node

    def __repr__(self) -> str:
        return f"Expr({to_text(self)!r})"

    def walk(self) -> Iterator[Expr]:
        """Every distinct node once, operands before their users."""
        done: set[Expr] = set()
        stack: list[tuple[Expr, bool]] = [(self, False)]
        while stack:
            node, is_ready = stack.pop()
            if node in done:
                continue
            if is_ready or not node.args:
                done.add(node)
                yield node
            else:
                stack.append((node, True))
                stack.extend((arg, False) for arg in reversed(node.args))

    def indices(self) -> frozenset[str]:
        """Which of b, h, q_idx, kv_idx and score the value depends on."""
        return _indices(self)

    def slots(self) -> tuple[int, ...]:
        """Slots of the captured tensors that are read, ascending."""
        return tuple(sorted({int(node.value) for node in self.walk() if node.op is Op.LOAD}))  # type: ignore[arg-type]


_INTERNED: weakref.WeakValueDictionary[tuple[object, ...], Expr] = weakref.WeakValueDictionary()


@functools.lru_cache(maxsize=4096)
def _indices(expr: Expr) -> frozenset[str]:
    found = (node for node in expr.walk() if node.op in (Op.INDEX, Op.SCORE))
    return frozenset("score" if node.op is Op.SCORE else str(node.value) for node in found)


def index(name: str) -> Expr:
    """One of the four indices, INT32."""
    assert name in INDEX_NAMES
    return Expr.of(Op.INDEX, DType.INT32, (), name)


def const(value: bool | int | float, dtype: DType) -> Expr:
    """A constant, converted to dtype (integers must fit it)."""
    if dtype is DType.BOOL:
        return Expr.of(Op.CONST, dtype, (), bool(value))
    if dtype is DType.FLOAT:
        return Expr.of(Op.CONST, dtype, (), float(value))
    return Expr.of(Op.CONST, dtype, (), wrap(int(value), dtype))


TRUE = const(True, DType.BOOL)
FALSE = const(False, DType.BOOL)
SCORE = Expr.of(Op.SCORE, DType.FLOAT)


def wrap(value: int, dtype: DType) -> int:
    """value modulo 2^32 or 2^64, in the signed range."""
    bits = 32 if dtype is DType.INT32 else 64
    return (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))


def apply(op: Op, *args: Expr) -> Expr:
    """op(*args) with the dtype that follows from the operands. For CAST, LOAD and leaves use Expr.of."""
    if op in COMPARISONS:
        assert args[0].dtype is args[1].dtype, (op, args)
        return Expr.of(op, DType.BOOL, args)
    if op is Op.WHERE:
        assert args[0].dtype is DType.BOOL and args[1].dtype is args[2].dtype, args
        return Expr.of(op, args[1].dtype, args)
    assert all(arg.dtype is args[0].dtype for arg in args), (op, args)
    return Expr.of(op, args[0].dtype, args)


def cast(arg: Expr, dtype: DType) -> Expr:
    """arg as dtype; arg itself if it is that already. FLOAT to integer truncates, anything to BOOL is `!= 0`."""
    return arg if arg.dtype is dtype else Expr.of(Op.CAST, dtype, (arg,))


# Canonical text: one line per node, operands by line number, in the order of Expr.walk. The last line is the result.
#     index i32 q_idx
#     index i32 kv_idx
#     le bool %1 %0


def to_text(expr: Expr) -> str:
    """The canonical text: equal texts mean equal expressions, in every process."""
    number: dict[Expr, int] = {}
    lines: list[str] = []
    for node in expr.walk():
        words = [node.op.value, node.dtype.value]
        if node.value is not None:
            words.append(repr(node.value) if node.op is Op.CONST else str(node.value))
        words += [f"%{number[arg]}" for arg in node.args]
        number[node] = len(lines)
        lines.append(" ".join(words))
    return "\n".join(lines)


def from_text(text: str) -> Expr:
    """The expression of a canonical text, or of any text in its grammar."""
    nodes: list[Expr] = []
    for line in text.splitlines():
        op_name, dtype_name, *words = line.split()
        op, dtype = Op(op_name), DType(dtype_name)
        args = tuple(nodes[int(word[1:])] for word in words if word.startswith("%"))
        plain = [word for word in words if not word.startswith("%")]
        nodes.append(Expr.of(op, dtype, args, _read_value(op, dtype, plain[0]) if plain else None))
    return nodes[-1]


def _read_value(op: Op, dtype: DType, word: str) -> Value:
    if op is Op.INDEX:
        return word
    if op is not Op.CONST or dtype.is_int:
        return int(word)
    if dtype is DType.BOOL:
        return word == "True"
    return math.nan if word == "nan" else float(word)
