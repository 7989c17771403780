"""Text, simplification and differentiation keep what an expression means."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from anymask import MaskError, reference
from anymask.expr.bindings import Bindings
from anymask.expr.evaluate import RULES as MEANING
from anymask.expr.evaluate import evaluate
from anymask.expr.grad import RULES as DERIVATIVES
from anymask.expr.grad import derivative
from anymask.expr.ir import SCORE, TRUE, DType, Expr, Op, apply, cast, const, from_text, index, to_text
from anymask.expr.mods import Mods, bind_structural
from anymask.expr.simplify import simplify
from anymask.expr.trace import trace
from tests.cases import MASKS, SCORES, Sizes
from tests.expr.expressions import OPERATIONS, bindings, expressions

INDICES = {
    name: torch.arange(size).view([-1 if i == axis else 1 for i in range(4)])
    for axis, (name, size) in enumerate({"b": 2, "h": 2, "q_idx": 9, "kv_idx": 11}.items())
}
SHAPE = (2, 2, 9, 11)


def value(expr: Expr, bound: Bindings, score: Tensor | None = None) -> Tensor:
    return evaluate(expr, bound, **INDICES, score=score).expand(SHAPE)


@pytest.mark.parametrize("dtype", DType)
@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(data=st.data())
def test_text_and_back_is_the_same_object(dtype: DType, data: st.DataObject) -> None:
    expr = data.draw(expressions(dtype))
    assert from_text(to_text(expr)) is expr


@hypothesis.settings(max_examples=250, deadline=None)
@hypothesis.given(expr=expressions(DType.FLOAT), seed=st.integers(0, 9))
def test_simplify_and_binding_numbers_keep_the_value(expr: Expr, seed: int) -> None:
    bound = bindings(seed)
    for changed in (simplify(expr), simplify(bind_structural(expr, bound.ints, bound.floats))):
        # x / c = x * (1 / c) rounds the last bit
        torch.testing.assert_close(value(changed, bound), value(expr, bound), rtol=1e-9, atol=1e-300, equal_nan=True)


INTEGER_ONLY = st.deferred(lambda: expressions(DType.INT32)).filter(
    lambda expr: all(node.dtype is not DType.FLOAT for node in expr.walk())
)


@hypothesis.settings(max_examples=150, deadline=None, suppress_health_check=[hypothesis.HealthCheck.filter_too_much])
@hypothesis.given(expr=INTEGER_ONLY, seed=st.integers(0, 9))
def test_simplify_is_exact_on_integers(expr: Expr, seed: int) -> None:
    bound = bindings(seed)
    assert torch.equal(value(simplify(expr), bound), value(expr, bound))


def test_every_op_has_a_meaning_and_float_ops_a_derivative() -> None:
    by_hand = {Op.INDEX, Op.SCORE, Op.CONST, Op.NUMBER, Op.LOAD, Op.CAST}
    assert set(MEANING) | by_hand == set(Op)
    of_floats = {op for op in Op if op in {o for arity in OPERATIONS[DType.FLOAT].values() for o in arity}}
    assert of_floats | {Op.WHERE, Op.CAST} == set(DERIVATIVES)


Q = cast(index("q_idx"), DType.FLOAT)


@st.composite
def smooth(draw: st.DrawFn, depth: int = 3) -> Expr:
    """A random function of the score that is finite, with every differentiable Op."""
    if depth == 0:
        return draw(st.sampled_from([SCORE, SCORE, Q, const(0.7, DType.FLOAT), Expr.of(Op.NUMBER, DType.FLOAT, (), 0)]))
    x, y = draw(smooth(depth - 1)), draw(smooth(depth - 1))
    bounded = apply(Op.TANH, x)
    above = apply(Op.ADD, apply(Op.ABS, bounded), const(0.5, DType.FLOAT))
    kind = draw(st.sampled_from([op for op in DERIVATIVES if op is not Op.CAST]))
    if kind is Op.WHERE:
        return apply(kind, apply(Op.LT, x, y), x, y)
    if kind in (Op.LOG, Op.LOG2, Op.LOG1P, Op.SQRT, Op.RSQRT):
        return apply(kind, above)
    if kind in (
        Op.EXP,
        Op.EXP2,
        Op.SIN,
        Op.COS,
        Op.ERF,
        Op.TANH,
        Op.SIGMOID,
        Op.FLOOR,
        Op.CEIL,
        Op.SIGN,
        Op.NEG,
        Op.ABS,
    ):
        return apply(kind, bounded)
    if kind in (Op.DIV, Op.MOD, Op.FLOORDIV):
        return apply(kind, x, above)
    if kind is Op.POW:
        return apply(kind, above, apply(Op.TANH, y))
    return apply(kind, x, y)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(expr=smooth(), seed=st.integers(0, 99))
def test_derivative_equals_autograd(expr: Expr, seed: int) -> None:
    score = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    bound = Bindings((), (), (1.3,))
    result = value(expr, bound, score)
    expected = torch.zeros_like(score)
    if result.requires_grad:
        (expected,) = torch.autograd.grad(result.sum(), score)
    got = value(derivative(expr), bound, score.detach())
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_derivative_of_a_masking_score_is_finite() -> None:
    """where(visible, s, -inf) has derivative 0 where it hides, not nan."""
    hidden = apply(Op.LT, index("q_idx"), index("kv_idx"))
    slope = derivative(apply(Op.WHERE, hidden, const(-torch.inf, DType.FLOAT), SCORE))
    got = value(slope, Bindings(), torch.zeros(SHAPE, dtype=torch.float64))
    assert torch.equal(got, (INDICES["q_idx"] >= INDICES["kv_idx"]).expand(SHAPE).double())


@pytest.mark.parametrize("name", SCORES)
def test_reference_backward_is_the_gradient_of_its_forward(name: str) -> None:
    """The reference's backward is written out; autograd through a plain dense forward must agree, in float64."""
    from anymask.expr.mods import text_of
    from anymask.expr.trace import trace
    from anymask.testing import inputs, relative_error
    from tests.plain import plain

    q, k, v, dout, dlse = inputs(2, 4, 2, 13, 17, 8, 16, torch.float64)
    dlse = dlse.double()
    program = trace(lambda b, h, i, j: (i >= j) & (i % 4 != 1), SCORES[name](Sizes(2, 4, 13, 17)))
    mods = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats)
    args = (mods, program.bindings, 0.3)
    got = (*reference.forward(q, k, v, *args), *reference.backward(dout, dlse, q, k, v, *args))
    expected = plain(q, k, v, dout, dlse, *args)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-6  # plain keeps its scores in float32


def test_numbers_that_shape_the_code_become_constants() -> None:
    width, offset = (Expr.of(Op.NUMBER, DType.INT32, (), slot) for slot in (0, 1))
    q_idx = index("q_idx")
    block = apply(Op.FLOORDIV, apply(Op.ADD, q_idx, offset), width)
    bound = bind_structural(block, (16, 100), ())
    assert bound is apply(Op.FLOORDIV, apply(Op.ADD, q_idx, offset), const(16, DType.INT32))
    assert simplify(bind_structural(apply(Op.ADD, q_idx, offset), (16, 0), ())) is q_idx
    with pytest.raises(MaskError, match="does not fit"):
        bind_structural(block, (2**40, 0), ())


def test_equal_expressions_are_one_object() -> None:
    one, two = (apply(Op.LE, index("kv_idx"), index("q_idx")) for _ in range(2))
    assert one is two and hash(one) == hash(two)
    assert const(1, DType.INT32) is not const(1.0, DType.FLOAT) and const(True, DType.BOOL) is TRUE
    assert const(0.0, DType.FLOAT) is not const(-0.0, DType.FLOAT)


def test_documents_are_segmented() -> None:
    sizes = Sizes(B=2, H=2, Sq=256, Skv=256)
    texts = {name: trace(make(sizes), None, torch.device("cpu")).mask for name, make in MASKS.items()}
    found = {name for name, text in texts.items() if Mods(from_text(text)).is_segmented}
    assert found == {name for name in MASKS if name.startswith("documents_")} - {"documents_shared_prefix"}
