"""sparsity_of(): the keys of visited tiles, as the map has them."""

from __future__ import annotations

import pytest
import torch

from anymask import sliding_window
from anymask.blocks.block_map import EMPTY
from anymask.blocks.build import build
from anymask.blocks.sparsity import Sparsity, sparsity_of
from anymask.expr.bindings import Bindings
from anymask.expr.ir import TRUE
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import trace
from tests.cases import MASKS, Sizes

CPU = torch.device("cpu")
B, H = 2, 4


@pytest.mark.parametrize(("Sq", "Skv"), [(256, 384), (300, 300), (65, 700), (90, 64)])
@pytest.mark.parametrize("name", MASKS)
def test_it_is_what_the_map_has(name: str, Sq: int, Skv: int) -> None:
    program = trace(MASKS[name](Sizes(B, H, Sq, Skv)), None, CPU)
    mods = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats)
    if mods.is_ragged:
        assert program.bindings.captures
        return
    found = sparsity_of(mods.mask, program.bindings, B, H, Sq, Skv)
    exact = []
    for size in (64, 128):
        kinds = build(mods.mask, program.bindings, B, H, Sq, Skv, CPU, (size, size))
        exact.append(float((kinds != EMPTY).sum()) * size / kinds[..., 0].numel())
    assert found.small >= exact[0] and found.big >= exact[1]
    # intervals leave no tile of these undecided that is empty
    if name.startswith(("causal", "window", "prefix", "chunked", "everything", "nothing")):
        assert found == Sparsity(*exact)


def test_a_default_device_changes_nothing() -> None:
    program = trace(sliding_window(64, 64), None, CPU)
    mods = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats)
    with torch.device("meta"):
        assert sparsity_of(mods.mask, program.bindings, 3, 5, 999, 998).small < 999


def test_of_many_rows_some_are_looked_at() -> None:
    assert sparsity_of(TRUE, Bindings(), 1, 1, 1 << 20, 1 << 16) == Sparsity(1 << 16, 1 << 16)
