"""Random problems through attention(): out, lse and gradients against the float64 reference, outputs poisoned with NaN.

A Program is all that compiled code depends on, and its Cases differ in the rest: lengths, layouts, scale, what tensors
hold. The lengths of a program are equal modulo Reach.period, so that its cases have the same tails, and 16 divides the
same strides. They compile the forward, each kernel of the backward and classify once; once more where a number becomes
0 or 1, such as the offset Skv - Sq, or where a table is as long as the longer of q and k and these differ in tails.

    pytest -n 14 --dist worksteal -m gpu tests/test_fuzz.py
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anymask import attention, block_map, causal, from_function
from anymask.testing import check
from tests.cases import MASKS, SCORES, Sizes
from tests.plain import expected

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")]

NAMES = ("q", "k", "v", "dout")
HALF = (torch.float16, torch.bfloat16)

# Where a tensor [B, H, S, D] may lie; new(*sizes) is memory of these sizes, and offset= so many elements further on. A
# dimension of size 1 stands for all.
LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "dense": lambda new, B, H, S, D: new(B, H, S, D),
    "tokens": lambda new, B, H, S, D: new(B, S, H, D).transpose(1, 2),
    "heads": lambda new, B, H, S, D: new(H, B, S, D).transpose(0, 1),
    "gaps": lambda new, B, H, S, D: new(B, H, S, D + 16)[..., :D],
    "window": lambda new, B, H, S, D: new(B, H + 1, S + 16, D)[:, 1:, 8:-8],
    "packed": lambda new, B, H, S, D: new(B, S, 3, H, D)[:, :, 1].transpose(1, 2),
}
ANY = tuple(LAYOUTS)
# These compile anew; TMA cannot read them.
LAYOUTS |= {
    "unaligned": lambda new, B, H, S, D: new(B, H, S, D, offset=1),
    "one head": lambda new, B, H, S, D: new(B, 1, S, D),
    "one batch": lambda new, B, H, S, D: new(1, H, S, D),
    "columns": lambda new, B, H, S, D: new(B, H, D, S).mT,
    "one number": lambda new, B, H, S, D: new(1, 1, 1, 1),  # as out.sum().backward() gives it
}
SPECIAL = {
    "q": ("unaligned",),
    "k": ("unaligned", "one head", "one batch"),
    "v": ("unaligned", "one head", "one batch"),
    "dout": ("unaligned", "columns", "one number"),
}
JOINED = ("", "{0}", "{0}", "{0}", "{0}", "~{0}", "{0} & {1}", "{0} | {1}", "{0} ^ {1}", "{0} & ~{1}", "~{0} | {1}")
# What is asked of the Hopper forward; None: the backend is left to the plan.
FORWARDS: tuple[dict[str, Any] | None, ...] = (
    *(None, None, None, {}),
    *({"is_persistent": True}, {"is_persistent": False}),
    *({"BLOCK_Q": 64, "BLOCK_KV": 64, "has_turns": False}, {"BLOCK_Q": 128, "has_turns": True}),
)
GRIDS, GRID_TOKENS = re.compile("neighbourhood|sliding_tile"), 40  # their windows need so many tokens

# Relative errors that plain torch does not have: of scores computed twice in float32, and of their exponentials.
ROUNDING = 2.0**-20


@dataclass(frozen=True)
class Reach:
    """What may be drawn: lengths below period * num_periods, and at most num_heads query heads in all batches.

    crowd: as many heads, and lengths below two periods, in every fifth program; 0 for none. A GPU has fewer
    multiprocessors, so that persistent programs take several rows.
    """

    dtypes: tuple[torch.dtype, ...]
    period: int
    num_periods: int
    num_heads: int
    crowd: int


ON_GPU = Reach((*HALF * 7, torch.float32), 128, 6, 12, 200)
ON_CPU = Reach((torch.float16, torch.float32), 32, 3, 4, 0)


@dataclass(frozen=True)
class Program:
    """mask: masks of the zoo joined by & | ^ ~, "" for none.  rests: of Sq and Skv modulo the period.

    num_periods: lengths are below so many.  tile: of the map, 0 for the default.  layouts: of NAMES, "" for another one
    in each case.  sign: of the scale.  forward: of FORWARDS.
    """

    seed: int
    mask: str
    score: str
    dtype: torch.dtype
    B: int
    Hq: int
    Hkv: int
    D: int
    Dv: int
    rests: tuple[int, int]
    num_periods: int
    tile: int
    layouts: tuple[str, ...]
    has_dlse: bool
    sign: int
    forward: dict[str, Any] | None


@dataclass(frozen=True)
class Case:
    """scale None: the default one.  seed: of all numbers."""

    Sq: int
    Skv: int
    layouts: tuple[str, ...]
    scale: float | None
    seed: int


def draw_program(seed: int, reach: Reach) -> Program:
    draw = random.Random(f"program {seed}")
    mask = draw.choice(JOINED).format(*draw.sample(list(MASKS), 2))
    B, Hkv, G = (draw.randint(1, most) for most in (3, 3, 4))
    while B * Hkv * G > reach.num_heads:
        B, Hkv, G = (draw.randint(1, most) for most in (3, 3, 4))
    is_crowd = draw.random() < 0.2 and reach.crowd > 0
    dims = draw.choice(
        [(64, 128), (64, 128), (64, 128), (16, 32, 80, 96, 112, 160, 192, 256), (8, 24, 40, 72, 104, 128, 136, 200)]
    )
    D, Dv = draw.choice(dims), draw.choice(dims)
    half = reach.period // 2
    rests = [0, 0, half, 1, half - 1, half + 1, reach.period - 1, draw.randrange(reach.period)]
    ordinary = [""] if D % 16 == Dv % 16 == 0 else ANY  # which strides 16 divides would depend on the layout
    layouts = tuple(draw.choice(SPECIAL[name] if draw.random() < 0.08 else ordinary) for name in NAMES)
    return Program(
        seed=seed,
        mask=mask,
        score=draw.choice(["", "", draw.choice(list(SCORES))]),
        dtype=draw.choice(reach.dtypes),
        B=reach.crowd // (Hkv * G) if is_crowd else B,
        Hq=Hkv * G,
        Hkv=Hkv,
        D=D,
        Dv=Dv,
        rests=(draw.choice(rests), draw.choice(rests)),
        num_periods=2 if is_crowd else reach.num_periods,
        tile=draw.choice([0, 0, half, reach.period]),
        layouts=layouts,
        has_dlse=draw.random() < 0.5,
        sign=draw.choice([1] * 9 + [-1]),
        forward=draw.choice(FORWARDS),
    )


def draw_cases(program: Program, reach: Reach, num: int) -> Iterator[Case]:
    draw = random.Random(f"cases {program.seed}")
    shortest = GRID_TOKENS if GRIDS.search(program.mask) else 1
    for i in range(num):
        Sq = Skv = 0
        while 0 in (Sq, Skv) or max(Sq, Skv) < shortest:
            Sq, Skv = (reach.period * draw.randrange(program.num_periods) + rest for rest in program.rests)
        layouts = tuple(layout or draw.choice(ANY) for layout in program.layouts)
        scale = None
        if program.sign < 0 or draw.random() < 0.4:
            scale = program.sign * draw.uniform(0.3, 1.3) / math.sqrt(program.D)
        yield Case(Sq, Skv, layouts, scale, 100 * program.seed + i)


def tensors_of(program: Program, case: Case, device: str) -> tuple[Any, ...]:
    """q, k, v, dout and dlse, which may be None. What lies around them is NaN."""

    def new(*sizes: int, offset: int = 0) -> Tensor:
        memory = torch.full((math.prod(sizes) + offset,), math.nan, device=device, dtype=program.dtype)
        return memory[offset:].view(sizes)

    B, Hq, Hkv, D, Dv = program.B, program.Hq, program.Hkv, program.D, program.Dv
    shapes = (B, Hq, case.Sq, D), (B, Hkv, case.Skv, D), (B, Hkv, case.Skv, Dv), (B, Hq, case.Sq, Dv)
    generator = torch.Generator().manual_seed(case.seed)
    made = []
    for shape, layout in zip(shapes, case.layouts, strict=True):
        x = LAYOUTS[layout](new, *shape)
        made.append(x.copy_(torch.randn(x.shape, generator=generator)).expand(shape))
    q, k, v, dout = made
    dlse = torch.randn(B, case.Sq, Hq, generator=generator).to(device).transpose(1, 2) if program.has_dlse else None
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout, dlse


def functions_of(program: Program, case: Case, device: str) -> tuple[Any, Any]:
    """The mask and the score function, None for none."""
    sizes = Sizes(program.B, program.Hq, case.Sq, case.Skv, device, case.seed)
    masks = {name: from_function(MASKS[name](sizes)) for name in re.findall(r"\w+", program.mask)}
    return eval(program.mask, masks) if masks else None, SCORES[program.score](sizes) if program.score else None


def check_case(program: Program, case: Case, device: str, **how: Any) -> None:
    """Compute on the backend that `how` asks for, on a GPU twice, and check. An error says what it was of."""
    call = f"check_case(\n    {program},\n    {case},\n    {device!r},\n    **{how},\n)"
    try:
        q, k, v, dout, dlse = tensors = tensors_of(program, case, device)
        mask, score_mod = functions_of(program, case, device)
        exact, rounded = expected(mask, score_mod, tensors, case.scale)
        if program.tile:
            sizes = program.B, program.Hq, case.Sq, case.Skv
            how["block_map"] = block_map(mask, *sizes, device=device, tile=program.tile)
        else:
            how["mask"] = mask
        runs = []
        for _ in range(2 if device == "cuda" else 1):
            out, lse = attention(q, k, v, score_mod=score_mod, scale=case.scale, return_lse=True, **how)
            given = (out, dout) if dlse is None else ((out, lse), (dout, dlse))
            runs.append((out, lse, *torch.autograd.grad(given[0], (q, k, v), given[1])))
        check(runs[0], exact, rounded, allowed=allowed_errors(tensors, exact, mask, score_mod, case.scale))
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), runs[0], runs[-1], strict=True):
            # the fast backward adds up dq in any order
            assert torch.equal(a, b) or (name == "dq" and how.get("deterministic") is False), f"{name}: two runs differ"
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{call}") from error


def allowed_errors(
    tensors: tuple[Any, ...], exact: tuple[Tensor, ...], mask: Any, score_mod: Any, scale: float | None
) -> list[float]:
    """Relative errors of out, lse, dq, dk, dv that plain torch does not have, and rows of few keys do.

    ROUNDING: in plain torch the P of a lone key is exactly 1. A sum of lse near 0 has it in absolute terms.
    That of delta: dS = P * (dP - delta) is 0 for a lone key, and the kernels take delta from out as it is stored.
    """
    q, k, v, dout, _ = tensors
    delta = (exact[0] * dout.double()).sum(-1)
    # dS = P * delta
    of_delta, _ = expected(mask, score_mod, (q, k, v, torch.zeros_like(dout), delta), scale)
    unit = max(torch.finfo(q.dtype).eps / 2, ROUNDING)

    def size(x: Tensor) -> float:
        return x[x.isfinite()].norm().item()

    of_gradients = [unit * size(part) / (size(e) or 1) for part, e in zip(of_delta[2:], exact[2:], strict=True)]
    of_lse = ROUNDING * math.sqrt(exact[1].numel()) / (size(exact[1]) or 1)
    return [ROUNDING, of_lse, *(ROUNDING + error for error in of_gradients)]


def backend_of(program: Program) -> dict[str, Any]:
    """What attention() is asked for on this GPU: program.forward where it can be had."""
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    is_read = not {"unaligned", "one head", "one batch"} & set(program.layouts[:3])
    if program.forward is None or not (is_hopper and is_read and program.dtype in HALF):
        return {}
    has_room = max(program.D, program.Dv) <= 128  # in shared memory for any config
    return {"backend": "gluon"} | ({"config": {"forward": program.forward}} if program.forward and has_room else {})


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(50))
def test_ten_cases_of_a_program(seed: int) -> None:
    program = draw_program(seed, ON_GPU)
    for case in draw_cases(program, ON_GPU, 10):
        check_case(program, case, "cuda", deterministic=seed % 2 == 0, **backend_of(program))


@pytest.mark.parametrize("seed", range(15))
def test_small_cases_on_eager(seed: int) -> None:
    program = draw_program(seed, ON_CPU)
    for case in draw_cases(program, ON_CPU, 2):
        check_case(program, case, "cpu", backend="eager")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Triton does not interpret")
@pytest.mark.parametrize("seed", range(15, 25))
def test_small_cases_in_the_interpreter(seed: int) -> None:
    program = draw_program(seed, ON_CPU)
    for case in draw_cases(program, ON_CPU, 1):
        check_case(program, case, "cpu", backend="triton")


@pytest.mark.parametrize("wrong", [{"scale": 0.3}, {"mask": causal(offset=1)}], ids=str)
def test_a_failure_says_how_to_repeat_it(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    program = replace(draw_program(0, ON_CPU), mask="causal_top_left", tile=0)
    case = next(draw_cases(program, ON_CPU, 1))
    right = attention
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="above") as failure:
        patch.setattr(f"{__name__}.attention", lambda *tensors, **how: right(*tensors, **how | wrong))
        check_case(program, case, "cpu", backend="eager")
    call = str(failure.value).partition("\n")[2]
    assert call.startswith("check_case(")
    eval(call)
