"""Every mask and score function of the zoo, on each backend that runs here, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anymask import attention, block_map, causal, from_function, reference
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import trace
from anymask.masks import mask_from
from anymask.testing import check, inputs
from tests.cases import MASKS, SCORES, Sizes
from tests.plain import expected, plain

B, HQ, HKV, SQ, SKV, D, DV = 2, 4, 2, 75, 52, 24, 40
TILE = 32


def run(
    backend: str,
    mask: Any,
    score_mod: Any,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    tile: int = TILE,
    **options: Any,
) -> dict[str, float]:
    """Compute on a backend, check against the reference, return the errors. options: of attention()."""
    q, k, v, dout, dlse = tensors = inputs(*sizes, dtype, device)
    exact, rounded = expected(mask, score_mod, tensors)
    blocks = block_map(mask, *sizes[:2], *sizes[3:5], device=device, tile=tile)
    out, lse = attention(q, k, v, block_map=blocks, score_mod=score_mod, return_lse=True, backend=backend, **options)
    got = (out, lse, *gradients(out, lse, (q, k, v), dout, dlse))
    return check(got, exact, rounded)


def gradients(out: Tensor, lse: Tensor, qkv: tuple[Tensor, ...], dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out, lse), qkv, (dout, dlse))


@pytest.mark.parametrize("name", MASKS)
def test_mask_on_eager(name: str) -> None:
    run("eager", MASKS[name](Sizes(B, HQ, SQ, SKV)), None, (B, HQ, HKV, SQ, SKV, D, DV), torch.float32)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("mask", [None, causal()], ids=["unmasked", "causal"])
def test_score_function_on_eager(name: str, mask: Any) -> None:
    run("eager", mask, SCORES[name](Sizes(B, HQ, SQ, SKV)), (B, HQ, HKV, SQ, SKV, D, DV), torch.float32)


@pytest.mark.parametrize("name", MASKS)
def test_map_equals_brute_force(name: str) -> None:
    mask = from_function(MASKS[name](Sizes(B, HQ, SQ, SKV)))
    blocks = block_map(mask, B, HQ, SQ, SKV, device="cpu", tile=(16, 32))
    dense = mask.to_dense(B, HQ, SQ, SKV)
    kinds = blocks.to_dense().expand(B, HQ, -1, -1)
    for i, rows in enumerate(dense.split(16, dim=2)):
        for j, tile in enumerate(rows.split(32, dim=3)):
            some, every = tile.flatten(2).any(-1), tile.flatten(2).all(-1)
            assert torch.equal(kinds[:, :, i, j], (some.int() + every.int()).to(torch.int8)), (i, j)


@pytest.mark.parametrize("name", ["causal_top_left", "documents_unsorted_padded", "random_tensor"])
def test_a_tensor_mask_is_the_function_mask(name: str) -> None:
    mask = from_function(MASKS[name](Sizes(B, HQ, SQ, SKV)))
    q, k, v, *_ = inputs(B, HQ, HKV, SQ, SKV, D, DV, torch.float32)
    dense = mask.to_dense(B, HQ, SQ, SKV)
    torch.testing.assert_close(attention(q, k, v, mask=dense), attention(q, k, v, mask=mask))
    assert torch.equal(mask_from(dense).to_dense(B, HQ, SQ, SKV), dense)


def test_the_checker_refuses_a_wrong_result() -> None:
    q, k, v, dout, dlse = inputs(1, 1, 1, 20, 20, 16, 16, torch.float32)
    program = trace(causal(), None)
    args = (Mods.of(text_of(program.mask, program.score), program.bindings.ints), program.bindings, 0.25)
    exact = (*reference.forward(q, k, v, *args), *reference.backward(dout, dlse, q, k, v, *args))
    right = plain(q, k, v, dout, dlse, *args)
    check(right, exact, right)
    for i in range(5):
        for wrong in (
            right[i] * 1.001,
            right[i].roll(1, dims=2),
            torch.where(right[i] == right[i].max(), torch.nan, right[i]),
        ):
            with pytest.raises(AssertionError):
                check((*right[:i], wrong, *right[i + 1 :]), exact, right)
