"""Score modifications: functions (score, b, h, q_idx, kv_idx) -> score that compose with .then()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anymask.errors import InputError

ScoreFunction = Callable[[Any, Any, Any, Any, Any], Any]


class ScoreMod:
    """A function of the scaled score q . k * scale. softcap(50.0).then(alibi(slopes)) caps first and adds the bias after."""

    def __init__(self, function: ScoreFunction, name: str):
        self.function = function
        self.name = name

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.function(score, b, h, q_idx, kv_idx)

    def then(self, other: ScoreFunction) -> ScoreMod:
        """This one first, other on its result. other: a ScoreMod or a plain function."""
        name = getattr(other, "name", getattr(other, "__name__", type(other).__name__))
        return ScoreMod(lambda score, *index: other(self(score, *index), *index), f"{self.name}.then({name})")

    def __repr__(self) -> str:
        return self.name


def alibi(slopes: Tensor) -> ScoreMod:
    """score + slopes[h] * (kv_idx - q_idx), the linear bias of Press et al. 2022. slopes: [Hq] or [B, Hq], float."""
    if slopes.dim() not in (1, 2) or not slopes.is_floating_point():
        raise InputError(f"ALiBi slopes are floats [Hq] or [B, Hq], got {slopes.dtype} {tuple(slopes.shape)}")

    def biased(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        slope = slopes[h] if slopes.dim() == 1 else slopes[b, h]
        return score + slope * (kv_idx - q_idx)

    return ScoreMod(biased, f"alibi({list(slopes.shape)})")


def softcap(cap: float) -> ScoreMod:
    """cap * tanh(score / cap): scores stay between -cap and cap (Gemma 2). cap > 0."""
    if not cap > 0:
        raise InputError(f"softcap needs a cap above 0, got {cap}")
    return ScoreMod(lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap), f"softcap({cap})")
