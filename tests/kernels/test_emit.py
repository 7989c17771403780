"""Emitted text means what evaluate() says: every Op, random expressions, captured reads of every dtype."""

from __future__ import annotations

import itertools
import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anymask.expr.bindings import Bindings
from anymask.expr.emit import BOOL_TEMPLATES, TEMPLATES, emit, emit_hide, emit_score
from anymask.expr.evaluate import evaluate
from anymask.expr.ir import SCORE, TRUE, DType, Expr, Op, apply, cast, const, index
from anymask.kernels.functions import TANH_COEFFICIENTS
from anymask.kernels.jit import jitted
from tests.expr.expressions import as_kernels_take

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 16
FLOAT, I32, I64, BOOL = DType.FLOAT, DType.INT32, DType.INT64, DType.BOOL
B_, H_, Q_, KV_ = (index(name) for name in ("b", "h", "q_idx", "kv_idx"))


@triton.jit
def tile_kernel(result, score, b, h, q_start, kv_start, bindings, FN: tl.constexpr, HAS_SCORE: tl.constexpr):
    q_idx = q_start + tl.arange(0, 16)[:, None]
    kv_idx = kv_start + tl.arange(0, 16)[None, :]
    offsets = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    b = b + tl.program_id(0)  # a tensor, as in the kernels
    h = h + tl.program_id(0)
    if HAS_SCORE:
        value = FN(tl.load(score + offsets), b, h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2])
    else:
        value = FN(b, h, q_idx, kv_idx, bindings[0], bindings[1], bindings[2])
    tl.store(result + offsets, tl.broadcast_to(value, [16, 16]))


def run(expr: Expr, bindings: Bindings, score: Tensor, b: int, h: int, q: int, kv: int, wide: bool = False) -> Tensor:
    """The emitted function on one 16 x 16 tile."""
    dtypes = {BOOL: torch.bool, I32: torch.int32, I64: torch.int64, FLOAT: torch.float32}
    result = torch.empty(BLOCK, BLOCK, dtype=dtypes[expr.dtype], device=DEVICE)
    slots = frozenset(range(len(bindings.captures))) if wide else frozenset()
    fn = jitted(emit(expr, "function", slots), "function")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy in the interpreter: overflow, nan
        tile_kernel[(1,)](result, score, b, h, q, kv, as_kernels_take(bindings), FN=fn, HAS_SCORE=expr.dtype is FLOAT)
    return result


def meaning(expr: Expr, bindings: Bindings, score: Tensor, b: int, h: int, q: int, kv: int) -> Tensor:
    def tensor(start: int, *shape: int) -> Tensor:
        return start + torch.arange(math.prod(shape), dtype=torch.int32, device=DEVICE).view(shape)

    indices = {"b": tensor(b, 1, 1), "h": tensor(h, 1, 1), "q_idx": tensor(q, BLOCK, 1), "kv_idx": tensor(kv, 1, BLOCK)}
    return evaluate(expr, bindings, score=score.double(), **indices).expand(BLOCK, BLOCK)


NOTHING = Bindings()


def check(expr: Expr, bindings: Bindings = NOTHING, score: Tensor | None = None, wide: bool = False) -> None:
    if score is None:
        score = torch.linspace(-3, 3, BLOCK * BLOCK, device=DEVICE).view(BLOCK, BLOCK)
    got = run(expr, bindings, score, 1, 2, 16, 8, wide)
    want = meaning(expr, bindings, score, 1, 2, 16, 8)
    if expr.dtype is FLOAT:
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6, equal_nan=True)
    else:
        assert torch.equal(got, want.to(got.dtype)), emit(expr, "function")


def integer(value: int, dtype: DType = I32) -> Expr:
    return const(value, dtype)


def test_every_op_has_a_template() -> None:
    assert set(TEMPLATES) == set(Op)
    assert set(BOOL_TEMPLATES) <= set(Op)


INTEGER_OPS = (
    Op.ADD, Op.SUB, Op.MUL, Op.FLOORDIV, Op.MOD, Op.MIN, Op.MAX, Op.SHL, Op.SHR, Op.AND, Op.OR, Op.XOR,
)  # fmt: skip
COMPARISONS = (Op.EQ, Op.NE, Op.LT, Op.LE)


@pytest.mark.parametrize("dtype", [I32, I64])
@pytest.mark.parametrize("op", INTEGER_OPS + COMPARISONS)
def test_integer_binary(op: Op, dtype: DType) -> None:
    x = apply(Op.SUB, cast(Q_, dtype), cast(KV_, dtype))  # -7 .. 23
    y = apply(Op.SUB, cast(KV_, dtype), integer(16, dtype))  # -8 .. 7
    check(apply(op, x, y))
    for constant in (-40, -3, -1, 1, 3, 8, 31, 70):
        check(apply(op, x, integer(constant, dtype)))
        check(apply(op, cast(Q_, dtype), integer(constant, dtype)))
    for extreme in (-(2**31), 2**31 - 1):
        check(apply(op, apply(Op.ADD, x, integer(extreme, dtype)), y))


@pytest.mark.parametrize("op", [Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.FLOORDIV, Op.MOD, Op.MIN, Op.MAX, *COMPARISONS])
def test_float_binary(op: Op) -> None:
    y = apply(Op.SUB, cast(KV_, FLOAT), const(15.5, FLOAT))
    result = apply(op, SCORE, y)
    check(cast(result, FLOAT))
    check(cast(apply(op, SCORE, const(1.5, FLOAT)), FLOAT))


UNARY = (
    Op.EXP, Op.EXP2, Op.LOG, Op.LOG2, Op.LOG1P, Op.SQRT, Op.RSQRT, Op.TANH, Op.SIGMOID, Op.ERF, Op.SIN, Op.COS,
    Op.FLOOR, Op.CEIL, Op.SIGN, Op.NEG, Op.ABS,
)  # fmt: skip


@pytest.mark.parametrize("op", UNARY)
def test_float_unary(op: Op) -> None:
    check(apply(op, SCORE))
    values = torch.tensor([0.0, 1e-30, 1e-8, -1e-8, 1e-4, -1e-4, 1e4, 88.0, -88.0, 1.0, -1.0, math.inf, -math.inf])
    if op in (Op.SIN, Op.COS):
        values = values[:9]
    if op in (Op.LOG, Op.LOG2, Op.LOG1P, Op.SQRT, Op.RSQRT):
        values = values[values >= (-0.5 if op is Op.LOG1P else 0.0)]
    score = values.repeat(BLOCK * BLOCK)[: BLOCK * BLOCK].view(BLOCK, BLOCK).to(DEVICE)
    if op in (Op.EXP, Op.EXP2):
        score = score.clamp(-80, 80)
    check(apply(op, SCORE), score=score)


def test_log1p_keeps_what_is_tiny() -> None:
    score = torch.full((BLOCK, BLOCK), 1e-12, device=DEVICE)
    got = run(apply(Op.LOG1P, SCORE), Bindings(), score, 0, 0, 0, 0)
    torch.testing.assert_close(got, score)


@pytest.mark.parametrize("exponent", [-3.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 17.0, 2.5])
def test_power(exponent: float) -> None:
    base = torch.linspace(-2, 2, BLOCK * BLOCK, device=DEVICE).view(BLOCK, BLOCK)
    check(apply(Op.POW, SCORE, const(exponent, FLOAT)), score=base)
    computed = apply(Op.ADD, cast(apply(Op.MUL, H_, integer(0)), FLOAT), const(exponent, FLOAT))
    got = run(apply(Op.POW, SCORE, computed), Bindings(), base, 0, 0, 0, 0)
    want = base.double() ** exponent
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6, equal_nan=True)


def test_logic_casts_and_selection() -> None:
    even = apply(Op.EQ, apply(Op.MOD, Q_, integer(2)), integer(0))
    below = apply(Op.LT, KV_, Q_)
    for op in (Op.AND, Op.OR, Op.XOR, Op.MIN, Op.MAX, *COMPARISONS):
        check(apply(op, even, below))
    for value in (even, TRUE, apply(Op.SUB, Q_, KV_), cast(KV_, I64)):
        for dtype in DType:
            check(cast(value, dtype))
            check(cast(cast(value, dtype), BOOL))
    for dtype in DType:
        check(cast(cast(SCORE, dtype), FLOAT))
    check(apply(Op.NOT, even))
    check(apply(Op.NOT, Q_))
    check(apply(Op.WHERE, below, Q_, KV_))
    check(apply(Op.WHERE, even, SCORE, const(-math.inf, FLOAT)))
    check(apply(Op.WHERE, TRUE, Q_, KV_))
    check(apply(Op.SIGN, apply(Op.SUB, Q_, KV_)))
    for value in (math.nan, math.inf, -math.inf, 1e-45, 0.1):
        check(const(value, FLOAT))
    for constant in (const(False, BOOL), TRUE, integer(-5), integer(2**40, I64)):
        check(constant)


CAPTURED = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]


@pytest.mark.parametrize("name", CAPTURED if DEVICE == "cpu" else [*CAPTURED, "bfloat16"])
@pytest.mark.parametrize("wide", [False, True])
def test_captured_reads(name: str, wide: bool) -> None:
    """Negative indices wrap once, the rest outside reads 0; strided, transposed, expanded and 0-d tensors."""
    dtype = getattr(torch, name)
    result = {torch.bool: BOOL, torch.int64: I64}.get(dtype, FLOAT if dtype.is_floating_point else I32)
    table = (torch.arange(24 * 20, device=DEVICE).view(24, 20) % 111 - (0 if dtype is torch.uint8 else 50)).to(dtype)
    captures = (table.t(), table[::2, 3], table[:1].expand(40, 20), table[5, 5], table[:0, 0])
    bindings = Bindings(captures)
    difference = apply(Op.SUB, Q_, KV_)
    reads = [
        Expr.of(Op.LOAD, result, (Q_, KV_), 0),
        Expr.of(Op.LOAD, result, (difference, apply(Op.SUB, KV_, integer(60))), 0),
        Expr.of(Op.LOAD, result, (difference,), 1),
        Expr.of(Op.LOAD, result, (B_,), 1),
        Expr.of(Op.LOAD, result, (Q_, H_), 2),
        Expr.of(Op.LOAD, result, (), 3),
        Expr.of(Op.LOAD, result, (cast(KV_, I64),), 4),
    ]
    for read in reads:
        check(read, bindings, wide=wide)


def test_captured_numbers() -> None:
    bindings = Bindings((), (0, 1, 16, -7, 2**30 - 1, 2**40), (0.25, -1e30))
    for slot in range(5):
        check(apply(Op.SUB, Q_, Expr.of(Op.NUMBER, I32, (), slot)), bindings)
    check(apply(Op.ADD, cast(Q_, I64), Expr.of(Op.NUMBER, I64, (), 5)), bindings)
    for slot in range(2):
        check(apply(Op.MUL, SCORE, Expr.of(Op.NUMBER, FLOAT, (), slot)), bindings)


def test_row_work_stays_on_rows() -> None:
    """What depends on q_idx alone is one load of [BLOCK_Q, 1], before the operation that needs both indices."""
    ids = [Expr.of(Op.LOAD, I64, (B_, i), 0) for i in (Q_, KV_)]
    text = emit(apply(Op.EQ, *ids), "mask")
    assert text.count("tl.load") == 2 and text.count("tl.where") == 0
    assert emit(apply(Op.FLOORDIV, Q_, integer(48)), "f").count("//") == 1
    assert ">> 4" in emit(apply(Op.FLOORDIV, apply(Op.SUB, Q_, KV_), integer(16)), "f")
    assert "floor_divide" in emit(apply(Op.FLOORDIV, apply(Op.SUB, Q_, KV_), integer(12)), "f")


def test_a_read_at_a_position_that_exists_needs_no_predicate() -> None:
    read, shifted = (Expr.of(Op.LOAD, I32, (B_, i), 0) for i in (KV_, apply(Op.ADD, KV_, Q_)))
    assert "mask=" in emit(read, "f") and "mask=" not in emit(read, "f", overhang=frozenset())
    assert emit(shifted, "f", overhang=frozenset()).count("<") == 1
    at_end = emit(read, "f", overhang=frozenset(("kv_idx",)))
    assert "mask=" not in at_end and "tl.minimum(kv_idx, (captures[0][1][1] >> 1) - 1)" in at_end


def test_distances_are_taken_near_the_tile() -> None:
    visible = apply(Op.AND, apply(Op.LE, KV_, Q_), apply(Op.LT, apply(Op.ADD, KV_, integer(3)), Q_))
    for column in ("q_idx", "kv_idx"):
        text = emit(visible, "f", is_ptx=True, overhang=frozenset(("q_idx",)), near=column)
        assert "near_kv_idx <= near_q_idx" in text and "opaque_q_idx" in text
    assert "near" not in emit(visible, "f", is_ptx=True) + emit(visible, "f", overhang=frozenset())


def test_masks_round_each_operation_of_floats_by_itself() -> None:
    x = cast(Q_, FLOAT)
    product = apply(Op.ADD, apply(Op.MUL, x, x), x)
    quotient = apply(Op.DIV, apply(Op.SQRT, x), x)
    for value, calls, of_ptx in ((product, ["rounded_product"], True), (quotient, ["tl.div_rn", "tl.sqrt_rn"], False)):
        mask, score = apply(Op.LT, x, value), apply(Op.ADD, SCORE, value)
        texts = [emit(mask, "f", is_ptx=True), emit(mask, "f"), emit(score, "f", is_ptx=True)]
        assert [all(f"{call}(" in text for call in calls) for text in texts] == [True, not of_ptx, False]


def test_tanh_of_small_numbers_is_a_polynomial() -> None:
    """By the constants of its PTX, in float32, for |x| < 0.5. It is taken for scores, in the Hopper kernels."""
    c0, c1, c2, c3 = (
        torch.tensor(int(text[2:], 16) - (1 << 32) * (text[2:] >= "8"), dtype=torch.int32).view(torch.float32)
        for text in TANH_COEFFICIENTS.value
    )
    w = torch.linspace(-2, 2, 100001)
    u = w * w
    y = w * (((c3 * u + c2) * u + c1) * u + c0)
    exact = (w.double() / 4).tanh()
    assert ((y - exact).abs() <= 7e-7 * exact.abs()).all()
    capped = apply(Op.TANH, SCORE)
    assert "tanh_of_tile(score, 1.0)" in emit(capped, "f", is_ptx=True, near="kv_idx")
    of_a_row = apply(Op.ADD, SCORE, apply(Op.TANH, cast(Q_, FLOAT)))
    assert "tanh_of_tile" not in emit(of_a_row, "f", is_ptx=True, near="kv_idx")


def test_nvidia_has_a_cheaper_tanh() -> None:
    capped = apply(Op.TANH, SCORE)
    assert "= tanh(score)" in emit(capped, "f") and "tanh_part(score, 1.0)" in emit(capped, "f", is_ptx=True)


def test_factors_of_a_score_are_gathered() -> None:
    """(score * scale * 0.5) * n, and n * tanh(score * scale * 0.5), take one multiplication of a tile each."""
    half, number = const(0.5, FLOAT), Expr.of(Op.NUMBER, FLOAT, (), 0)
    shrunk = apply(Op.MUL, SCORE, half)
    text = emit_score(apply(Op.MUL, number, shrunk), "f")
    last = text.splitlines()[-2].split(" = ")[1]
    assert last.startswith("score * v") and text.count("score *") == 1
    text = emit_score(apply(Op.MUL, number, apply(Op.TANH, shrunk)), "f", is_ptx=True)
    assert "tanh_part(score, v" in text and text.splitlines()[-2].endswith("_part")


@pytest.mark.parametrize("is_number_first", [False, True])
def test_gathered_factors_mean_the_same(is_number_first: bool) -> None:
    """A tile of score * scale and of what the scale belongs to, against evaluate()."""
    number, column = Expr.of(Op.NUMBER, FLOAT, (), 0), cast(KV_, FLOAT)
    operands = (number, SCORE) if is_number_first else (SCORE, number)
    expr = apply(Op.ADD, apply(Op.MUL, apply(Op.MUL, *operands), column), apply(Op.MUL, apply(Op.TANH, SCORE), number))
    fn = jitted(emit_score(expr, "scaled"), "scaled")
    raw, out = (
        torch.linspace(-3, 3, BLOCK * BLOCK, device=DEVICE).view(BLOCK, BLOCK),
        torch.empty(BLOCK, BLOCK, device=DEVICE),
    )

    @triton.jit
    def kernel(raw_pointer, out_pointer, scale, floats, SCORE_FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
        q_idx, kv_idx = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        raw = tl.load(raw_pointer + q_idx * BLOCK + kv_idx)
        tl.store(out_pointer + q_idx * BLOCK + kv_idx, SCORE_FUNCTION(raw, scale, 0, 0, q_idx, kv_idx, (), (), floats))

    kernel[(1,)](raw, out, 0.25, (1.5,), fn, BLOCK)
    column_values = torch.arange(BLOCK, device=DEVICE)
    score = raw.double() * 0.25
    torch.testing.assert_close(out.double(), score * 1.5 * column_values + score.tanh() * 1.5, rtol=1e-5, atol=1e-5)


def test_comparisons_keep_the_score_near_the_tile() -> None:
    """Those of two axes and 32 bits that nothing else reads."""
    number, wide = (Expr.of(Op.NUMBER, dtype, (), 0) for dtype in (I32, I64))
    parts = [apply(Op.LE, KV_, Q_), apply(Op.LT, KV_, number), apply(Op.NE, cast(apply(Op.ADD, Q_, KV_), I64), wide)]
    text = emit_hide(apply(Op.AND, *parts), "f", is_ptx=True, near="kv_idx")
    assert text.count('x = kept(x, other, near_kv_idx, near_q_idx, "le")') == 1
    assert text.count("x = tl.where(") == 2 and "kept(" not in emit_hide(apply(Op.AND, *parts), "f", is_ptx=True)
    shared = emit_hide(apply(Op.AND, parts[0], apply(Op.OR, *parts[:2])), "f", is_ptx=True, near="kv_idx")
    assert "kept(" not in shared


@pytest.mark.parametrize("n", [0, 5, -17, 2**30, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("op", [Op.LE, Op.LT])
@pytest.mark.parametrize("column", ["q_idx", "kv_idx"])
def test_a_distance_compared_with_a_number(column: str, op: Op, n: int) -> None:
    """In plain torch: Triton's interpreter has no opaque()."""
    number = Expr.of(Op.NUMBER, I32, (), 0)
    columns = torch.arange(128, dtype=torch.int32)[None, :] + 1280
    rows = torch.tensor([[0], [1300], [1500], [2**30 - 1]], dtype=torch.int32)
    q_idx, kv_idx = (columns, rows) if column == "q_idx" else (rows, columns)
    start = columns & ~(128 - 7)
    functions = {
        "tl": SimpleNamespace(cast=lambda x, _: torch.tensor(x), int32=0, minimum=at_most, maximum=at_least),
        "triton": SimpleNamespace(jit=lambda function: function),
        "near": lambda q_idx, kv_idx: (q_idx - start, kv_idx - start),
        "opaque": lambda x: x,
    }
    for difference, value in ((apply(Op.SUB, KV_, Q_), kv_idx - q_idx), (apply(Op.SUB, Q_, KV_), q_idx - kv_idx)):
        for pair, left, right in (((difference, number), value, n), ((number, difference), n, value)):
            text = emit(apply(op, *pair), "f", is_ptx=True, overhang=frozenset(), near=column)
            namespace: dict[str, Any] = dict(functions)
            exec(text, namespace)
            got = namespace["f"](0, 0, q_idx, kv_idx, (), (2 * n + 1,), ())
            assert f"near_{column}" in text.splitlines()[-2]
            assert torch.equal(got, left <= right if op is Op.LE else left < right), text


def at_most(x: Tensor, limit: int) -> Tensor:
    return x.clamp(max=limit).int()


def at_least(x: Tensor, limit: int) -> Tensor:
    return x.clamp(min=limit)


TABLE = torch.arange(-30, 34, dtype=torch.int32, device=DEVICE).view(8, 8)


@st.composite
def expressions(draw: st.DrawFn, dtype: DType, depth: int) -> Expr:
    """A random expression of a dtype; INT32, BOOL and FLOAT parts mix."""
    if depth == 0:
        if dtype is I32:
            return draw(st.sampled_from([B_, H_, Q_, KV_, *map(integer, (-9, -1, 0, 1, 2, 7, 16, 100))]))
        if dtype is BOOL:
            return apply(draw(st.sampled_from(COMPARISONS)), Q_, draw(st.sampled_from([KV_, integer(20)])))
        return draw(st.sampled_from([SCORE, const(0.5, FLOAT), const(-2.0, FLOAT), cast(KV_, FLOAT)]))

    def part(kind: DType) -> Expr:
        return draw(expressions(kind, depth - 1))

    if dtype is I32:
        kind = draw(st.sampled_from(["binary", "binary", "where", "load", "unary"]))
        if kind == "binary":
            return apply(draw(st.sampled_from(INTEGER_OPS)), part(I32), part(I32))
        if kind == "where":
            return apply(Op.WHERE, part(BOOL), part(I32), part(I32))
        if kind == "load":
            return Expr.of(Op.LOAD, I32, (part(I32), part(I32)), 0)
        return apply(draw(st.sampled_from([Op.NEG, Op.ABS, Op.NOT, Op.SIGN])), part(I32))
    if dtype is BOOL:
        if draw(st.booleans()):
            return apply(draw(st.sampled_from(COMPARISONS)), part(I32), part(I32))
        return apply(draw(st.sampled_from([Op.AND, Op.OR, Op.XOR])), part(BOOL), part(BOOL))
    kind = draw(st.sampled_from(["binary", "where", "unary"]))
    if kind == "where":
        return apply(Op.WHERE, part(BOOL), part(FLOAT), part(FLOAT))
    if kind == "unary":
        return apply(draw(st.sampled_from([Op.TANH, Op.SIGMOID, Op.ABS, Op.NEG])), part(FLOAT))
    return apply(draw(st.sampled_from([Op.ADD, Op.SUB, Op.MUL, Op.MIN, Op.MAX])), part(FLOAT), part(FLOAT))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_expressions(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([I32, BOOL, BOOL, FLOAT]))
    expr = data.draw(expressions(dtype, data.draw(st.integers(1, 4))))
    bindings = Bindings((TABLE,))
    score = torch.linspace(-3, 3, BLOCK * BLOCK, device=DEVICE).view(BLOCK, BLOCK)
    at = data.draw(st.sampled_from(list(itertools.product((0, 1), (0, 3), (0, 16, 48), (0, 32)))))
    got = run(expr, bindings, score, *at)
    want = meaning(expr, bindings, score, *at)
    if dtype is FLOAT:  # float32 against float64: relative to the largest number that occurs on the way
        scale = max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got.double() / scale, want / scale, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(got, want), emit(expr, "function")
