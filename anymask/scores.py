"""Score modifications: functions (score, b, h, q_idx, kv_idx) -> score that compose with .then()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anymask.errors import InputError
from anymask.expr.trace import with_min_max

ScoreFunction = Callable[[Any, Any, Any, Any, Any], Any]


class ScoreMod:
    """A function of the scaled score q . k * scale. softcap(50.0).then(alibi(slopes)) caps first, then biases."""

    def __init__(self, function: ScoreFunction, name: str, *parameters: Any):
        self.function = function
        self.name = name
        self.parameters = parameters

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.function(score, b, h, q_idx, kv_idx)

    def then(self, other: ScoreFunction) -> ScoreMod:
        """This one first, other on its result. other: a ScoreMod or a plain function."""
        function, other_function = self.function, with_min_max(other)

        def both(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return other_function(function(score, b, h, q_idx, kv_idx), b, h, q_idx, kv_idx)

        return ScoreMod(both, "then", self, other)

    def __repr__(self) -> str:
        words = [getattr(x, "__name__", str(x)) for x in self.parameters]
        return f"{words[0]}.then({words[1]})" if self.name == "then" else f"{self.name}({', '.join(words)})"


def alibi(slopes: Tensor) -> ScoreMod:
    """score + slopes[h] * (kv_idx - q_idx), the linear bias of Press et al. 2022. slopes: [Hq] or [B, Hq], float."""
    if slopes.dim() not in (1, 2) or not slopes.is_floating_point():
        raise InputError(f"ALiBi slopes are floats [Hq] or [B, Hq], got {slopes.dtype} {tuple(slopes.shape)}")

    def biased(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        slope = slopes[h] if slopes.dim() == 1 else slopes[b, h]
        return score + slope * (kv_idx - q_idx)

    return ScoreMod(biased, "alibi", list(slopes.shape))


def softcap(cap: float) -> ScoreMod:
    """cap * tanh(score / cap): scores stay between -cap and cap (Gemma 2). cap > 0."""
    if not cap > 0:
        raise InputError(f"softcap needs a cap above 0, got {cap}")
    return ScoreMod(lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap), "softcap", cap)
