"""Tracing: every function of the language means what torch computes, and what is not in it is refused with a reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from anymask import MaskError, causal, from_function
from anymask.expr.evaluate import evaluate
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import SCORE_TEXT, TRUE_TEXT, trace

IDS = torch.randint(-3, 3, (2, 9), generator=torch.Generator().manual_seed(0))
BIAS = torch.randn(3, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float16)
OFFSET = torch.tensor(3)

# (s, b, h, q, k) -> value; evaluated by torch on dense index tensors and by the language, they must agree
FUNCTIONS: dict[str, Any] = {
    text: eval(f"lambda s, b, h, q, k: {text}", {"torch": torch, "F": F, "IDS": IDS, "BIAS": BIAS, "OFFSET": OFFSET})
    for line in """
        q + k; q - k; 2 * q * k; q / (k + 1); q // 3; (q - k) // 3; (q - k) % 4; -7 // (k + 1); 7 % (k + 1); -q
        3 - q; 3 / (q + 1)
        abs(q - k); (q - k).abs(); torch.abs(k - q); q**2; q.float() ** 0.5; 2 ** q.float()
        torch.pow(q.float(), k.float())
        q << 1; q >> 1; 1 << k; q & 3; q | 4; q ^ 5; ~q; q // -2; q % -3
        torch.minimum(q, k); torch.maximum(q, k); torch.min(q, k); q.max(k); q.clamp(2, 5); torch.clamp(q, max=3)
        q.clamp_min(2)
        torch.where(q > k, q, k); torch.where(q > k, 1, 0); torch.where(q > k, q, 0.5); q.where(q > k, k)
        s.masked_fill(q < k, 0.0)
        (q > k).int() + (q < k).int(); q.float() * 0.5; q.to(torch.float32); q.to(dtype=torch.int64)
        (s * 3).to(torch.int32)
        q.long() * 5; (q > k).float(); q.bool().int(); s.long() + 1
        s + k; s * 2 - q; s / 3; s // 0.5; s % 0.7; s.abs(); -s; s**2; s**3; s.square(); torch.sign(s); s.reciprocal()
        s.exp(); torch.exp2(s); torch.log(s.abs() + 1); s.abs().log2(); torch.log1p(s.abs()); s.abs().sqrt()
        torch.rsqrt(s.abs() + 1)
        s.tanh(); torch.sigmoid(s); F.sigmoid(s); torch.erf(s); torch.sin(s); torch.cos(s); torch.floor(s)
        s.ceil(); torch.relu(s)
        F.relu(s); F.silu(s); F.softplus(s)
        IDS[b, q]; IDS[1, q]; IDS[0, -1] + q; s + BIAS[h, q]; BIAS[h, k].float() * s; q + OFFSET; IDS[b, OFFSET] + q
        torch.ones_like(q) + q; torch.zeros_like(s) + q; torch.full_like(s, 3.5) + q; q.new_ones(()) * k
        torch.remainder(q, 4); torch.floor_divide(q, 4); torch.div(q, 4, rounding_mode="floor")
        torch.sub(q, k, alpha=2)
        torch.bitwise_and(q, 3); torch.true_divide(q, 4)
    """.replace("\n", ";").split(";")
    if (text := line.strip())
}
MASKS: dict[str, Any] = {
    text: eval(f"lambda b, h, q, k: {text}", {"torch": torch, "IDS": IDS})
    for line in """
        q > k; q >= k; q < k; q <= k; q == k; q != k; 5 > q; 5 <= q; 3 == q; q > 1.5 * k
        (q > k) & (q < 5); (q > k) | (q < 5); (q > k) ^ (q < 5); ~(q > k); True & (q > k); (q > k) | False
        torch.logical_and(q > k, q < 3); torch.logical_or(q > k, q < 3); torch.logical_not(q > k)
        torch.logical_xor(q > k, q < 3)
        IDS[b, q] == IDS[b, k]; (IDS[b, q] == IDS[b, k]) & (q // 2 >= k // 2); torch.where(h == 0, q >= k, k >= q)
        (q > k) == (k > 3); (q > k) > (k > 3); torch.ones_like(q, dtype=torch.bool); q.new_zeros((), dtype=torch.bool)
        (q.to(torch.int64) * 2**40 > k); (q > k) * (q > 2); (q > k) + (q > 2)
    """.replace("\n", ";").split(";")
    if (text := line.strip())
}
INDICES = {
    name: torch.arange(size).view([-1 if i == axis else 1 for i in range(4)])
    for axis, (name, size) in enumerate({"b": 2, "h": 3, "q_idx": 9, "kv_idx": 9}.items())
}
SHAPE = (2, 3, 9, 9)


@pytest.mark.parametrize("text", FUNCTIONS)
def test_score_function_means_what_torch_computes(text: str) -> None:
    score = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    program = trace(None, FUNCTIONS[text])
    mods = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats)
    got = evaluate(mods.score, program.bindings, **INDICES, score=score).expand(SHAPE)
    expected = FUNCTIONS[text](score, *INDICES.values()).double().expand(SHAPE)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)  # torch's own int / int is float32


@pytest.mark.parametrize("text", MASKS)
def test_mask_means_what_torch_computes(text: str) -> None:
    program = trace(MASKS[text], None)
    mods = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats)
    got = evaluate(mods.mask, program.bindings, **INDICES).expand(SHAPE)
    assert torch.equal(got, MASKS[text](*INDICES.values()).bool().expand(SHAPE))


def test_functions_may_call_functions_and_read_attributes() -> None:
    class Layer:
        window = 4

        def near(self, q: Any, k: Any) -> Any:
            return q - k < self.window

        def sees(self, b: Any, h: Any, q: Any, k: Any) -> Any:
            return self.near(q, k) & causal()(b, h, q, k)

    program = trace(Layer().sees, None)
    mods = Mods.of(text_of(program.mask, program.score), program.bindings.ints)
    q, k = INDICES["q_idx"], INDICES["kv_idx"]
    assert torch.equal(evaluate(mods.mask, program.bindings, **INDICES), (q - k < 4) & (k <= q))


def test_equal_functions_have_equal_text_and_a_number_is_no_part_of_it() -> None:
    def window(width: int) -> Any:
        return lambda b, h, q, k: q - k < width

    one, two = trace(window(5), None), trace(window(6), None)
    assert one.mask == two.mask
    assert (one.bindings.ints, two.bindings.ints) == ((5,), (6,))


def test_a_captured_tensor_is_captured_once() -> None:
    program = trace(lambda b, h, q, k: (IDS[b, q] == IDS[b, k]) & (IDS[b, q] > 0), lambda s, b, h, q, k: s + IDS[b, q])
    assert program.bindings.captures == (IDS,)
    assert trace(None, None).mask == TRUE_TEXT and trace(None, None).score == SCORE_TEXT


def nearer(q: Any, k: Any) -> Any:
    return min(q, k)


def _branch(b: Any, h: Any, q: Any, k: Any) -> Any:
    if q > k:
        return k > 0
    return k < 0


REFUSED: dict[str, tuple[Any, str]] = {
    "if": (_branch, "torch.where"),
    "and": (lambda b, h, q, k: q > k and q > 0, "& for and"),
    "or": (lambda b, h, q, k: q > k or q > 0, "| for or"),
    "not": (lambda b, h, q, k: not q > k, "~ for not"),
    "chained comparison": (lambda b, h, q, k: 0 < q < k, "& for and"),
    "min in a function that is called": (lambda b, h, q, k: nearer(q, k) > 3, "torch.minimum"),
    "range": (lambda b, h, q, k: sum(range(q)) > k, "range()"),
    "int": (lambda b, h, q, k: int(q) > k, "int()"),
    "float": (lambda b, h, q, k: float(q) > k, "float()"),
    "item": (lambda b, h, q, k: q.item() > k, ".item()"),
    "tolist": (lambda b, h, q, k: q.tolist() > k, ".tolist()"),
    "in": (lambda b, h, q, k: q in IDS, "bool table"),
    "unknown op": (lambda b, h, q, k: torch.fft.fft(q) > k, "not in the mask language"),
    "matmul": (lambda b, h, q, k: (IDS @ q) > k, "not in the mask language"),
    "whole tensor": (lambda b, h, q, k: q == IDS, "must be indexed"),
    "slice": (lambda b, h, q, k: IDS[0:1, q] > 0, "no slice"),
    "too many indices": (lambda b, h, q, k: IDS[b, q, k] > 0, "3 indices"),
    "float index": (lambda b, h, q, k: IDS[b, q * 0.5] > 0, "must be an integer"),
    "indexing an index": (lambda b, h, q, k: q[0] > 0, "cannot be indexed"),
    "no bool": (lambda b, h, q, k: q - k, "not bool"),
    "nothing": (lambda b, h, q, k: None, "NoneType"),
    "wrong arity": (lambda b, h, q: q > 0, "(b, h, q_idx, kv_idx)"),
    "in place": (lambda b, h, q, k: (q > k).logical_and_(q > 2), "in-place"),
    "text operand": (lambda b, h, q, k: q + "a" > k, "str"),
    "bool minus bool": (lambda b, h, q, k: ((q > k) - (q > 2)) > 0, "^"),
    "float and": (lambda b, h, q, k: q * 0.5 & k, "compare first"),
    "user error": (lambda b, h, q, k: undefined_name > k, "undefined_name"),  # noqa: F821
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_the_line_the_reason_and_the_remedy(what: str) -> None:
    function, remedy = REFUSED[what]
    with pytest.raises(MaskError) as caught:
        trace(function, None)
    assert f"{__file__}:" in str(caught.value)
    assert remedy in str(caught.value)


def test_the_named_line_is_the_one_that_fails() -> None:
    with pytest.raises(MaskError) as caught:
        trace(_branch, None)
    assert f"{__file__}:{_branch.__code__.co_firstlineno + 1}:" in str(caught.value)
    assert "if q > k:" in str(caught.value)


def test_captured_tensors_must_be_usable() -> None:
    ids = torch.zeros(4, device="meta")
    with pytest.raises(MaskError):
        trace(lambda b, h, q, k: ids[q] > 0, None, torch.device("cpu"))
    learned = torch.zeros(4, requires_grad=True)
    with pytest.raises(MaskError, match="requires grad"):
        trace(None, lambda s, b, h, q, k: s + learned[k])
    with torch.no_grad():
        assert trace(None, lambda s, b, h, q, k: s + learned[k]).bindings.captures == (learned,)
    complex_table = torch.zeros(4, dtype=torch.complex64)
    with pytest.raises(MaskError, match="complex64"):
        trace(None, lambda s, b, h, q, k: s + complex_table[k])


def test_a_number_too_large_for_its_type_is_an_error() -> None:
    big = 2**40
    program = trace(lambda b, h, q, k: q * 3 < big, None)
    with pytest.raises(MaskError, match="does not fit i32"):
        Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats)


def test_constants_that_are_not_finite() -> None:
    program = trace(None, lambda s, b, h, q, k: torch.where(q > k, s, -math.inf))
    mods = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats)
    got = evaluate(mods.score, program.bindings, **INDICES, score=torch.zeros(SHAPE))
    assert torch.equal(got == -math.inf, (INDICES["q_idx"] <= INDICES["kv_idx"]).expand(SHAPE))


def test_indexing_in_two_steps_is_indexing_at_once() -> None:
    at_once, in_steps = (
        trace(mask, None) for mask in (lambda b, h, q, k: IDS[b, k] > q, lambda b, h, q, k: IDS[b][k] > q)
    )
    assert at_once.mask == in_steps.mask


LIMIT = 4


def test_python_min_and_max_take_indices() -> None:
    class Layer:
        def sees(self, b: Any, h: Any, q: Any, k: Any) -> Any:
            return max(q - k, k - q, 1) < LIMIT

    q, k = INDICES["q_idx"], INDICES["kv_idx"]
    cases: list[tuple[Any, Any]] = [
        (lambda b, h, q, k: min(q, k, 5) < max(k - 3, 2), torch.minimum(q, k).clamp(max=5) < (k - 3).clamp(min=2)),
        (lambda b, h, q, k: max(2, 3) < min(q, k), torch.minimum(q, k) > 3),
        (Layer().sees, (q - k).abs().clamp(min=1) < LIMIT),
    ]
    for function, expected in cases:
        for mask in (from_function(function), from_function(function) & causal() | from_function(function)):
            got = mask.to_dense(2, 3, 9, 9)
            assert torch.equal(got, expected.expand(SHAPE))


def test_a_global_number_is_read_anew() -> None:
    global LIMIT
    mask = from_function(lambda b, h, q, k: max(q - k, 0) < LIMIT)
    for LIMIT in (4, 2):
        expected = (INDICES["q_idx"] - INDICES["kv_idx"]) < LIMIT
        assert torch.equal(mask.to_dense(2, 3, 9, 9), expected.expand(SHAPE))
