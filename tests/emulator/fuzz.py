"""Random problems of tests/test_fuzz.py on the emulator: any lengths, layouts, head dims, masks, scores, configs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from anymask.testing import check
from tests.emulator.attention import emulate
from tests.emulator.launch import Emulator
from tests.plain import expected
from tests.test_fuzz import (
    HALF,
    Case,
    Program,
    Reach,
    allowed_errors,
    draw_cases,
    draw_program,
    functions_of,
    tensors_of,
)
from tests.test_hopper import BACKWARDS, WIDE, WIDE_PERSISTENT

REACH = Reach(HALF, 128, 4, 4, 0)


@dataclass(frozen=True)
class Drawn:
    """how: what is asked of the plan."""

    program: Program
    case: Case
    how: dict[str, Any]

    def run(self, seed: int) -> tuple[dict[str, float], Emulator]:
        """The errors, checked as in tests/test_fuzz.py."""
        program, scale = self.program, self.case.scale
        tensors = tensors_of(program, self.case, "cpu")
        mask, score_mod = functions_of(program, self.case, "cpu")
        exact, rounded = expected(mask, score_mod, tensors, scale)
        results, emulator = emulate(tensors, mask, score_mod, scale, program.tile or 64, seed, **self.how)
        allowed = allowed_errors(tensors, exact, mask, score_mod, scale)
        return check(results, exact, rounded, allowed=allowed), emulator


def problems(numbers: range) -> Iterator[tuple[str, Drawn]]:
    for number in numbers:
        program = draw_program(number, REACH)
        (case,) = draw_cases(program, REACH, 1)
        yield f"problem {number}", Drawn(program, case, drawn_plan(program))


def drawn_plan(program: Program) -> dict[str, Any]:
    """The Hopper kernels, of any config that fits, for tensors that TMA can read."""
    draw = random.Random(f"plan {program.seed}")
    how: dict[str, Any] = {"deterministic": draw.random() < 0.3}
    is_read = not {"unaligned", "one head", "one batch"} & set(program.layouts[:3])
    if not is_read:
        return how
    how["backend"] = "gluon"
    if max(program.D, program.Dv) <= 128:
        backwards = [*BACKWARDS, WIDE, WIDE_PERSISTENT] if max(program.D, program.Dv) <= 64 else BACKWARDS
        asked = [x for x in backwards if not (how["deterministic"] and x["dkdv"]["is_fused"])]
        how["config"] = {**draw.choice(asked)} | ({"forward": program.forward} if program.forward else {})
    return how
