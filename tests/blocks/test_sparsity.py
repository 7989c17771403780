"""sparsity_of(): the keys of visited tiles, as the map has them."""

from __future__ import annotations

import pytest
import torch

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


def mods_of(name: str, Sq: int, Skv: int) -> tuple[Mods, Bindings]:
    program = trace(MASKS[name](Sizes(B, H, Sq, Skv)), None, CPU)
    bindings = program.bindings
    return Mods.of(text_of(program.mask, program.score), bindings.ints, bindings.floats), bindings


OF_INDICES = [name for name in MASKS if not mods_of(name, 90, 64)[0].is_ragged]


def of_map(mods: Mods, bindings: Bindings, Sq: int, Skv: int) -> Sparsity:
    counts = []
    for size in (64, 128):
        kinds = build(mods.mask, bindings, B, H, Sq, Skv, CPU, (size, size))
        counts.append(float((kinds != EMPTY).sum()) * size / kinds[..., 0].numel())
    return Sparsity(*counts)


@pytest.mark.parametrize(("Sq", "Skv"), [(256, 384), (300, 300), (65, 700), (90, 64)])
@pytest.mark.parametrize("name", OF_INDICES)
def test_it_is_what_the_map_has(name: str, Sq: int, Skv: int) -> None:
    mods, bindings = mods_of(name, Sq, Skv)
    found, exact = sparsity_of(mods.mask, bindings, B, H, Sq, Skv), of_map(mods, bindings, Sq, Skv)
    assert found.small >= exact.small and found.big >= exact.big
    # intervals leave no tile of these undecided that is empty
    if name.startswith(("causal", "window", "prefix", "chunked", "everything", "nothing")):
        assert found == exact


def test_a_default_device_changes_nothing() -> None:
    mods, bindings = mods_of("window", 999, 998)
    with torch.device("meta"):
        found = sparsity_of(mods.mask, bindings, B, H, 999, 998)
    assert found == of_map(mods, bindings, 999, 998)


def test_of_many_rows_some_are_looked_at() -> None:
    assert sparsity_of(TRUE, Bindings(), 1, 1, 1 << 20, 1 << 16) == Sparsity(1 << 16, 1 << 16)
