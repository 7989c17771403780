"""Maps that are given, not derived: chosen tiles, alone and joined with a mask, and rows cut out of a map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anymask import BlockMap, InputError, alibi, attention, block_map, causal, document, mask_from, sliding_window
from anymask.testing import relative_error

BACKENDS = ("eager", pytest.param("triton", marks=pytest.mark.slow))


def qkv(Sq: int = 90, Skv: int = 110, D: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, Sq, D), (2, 2, Skv, D), (2, 2, Skv, D))
    q, k, v = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    return q, k, v


def chosen(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4


def dense(blocks: Tensor, tile: tuple[int, int], Sq: int, Skv: int) -> Tensor:
    return blocks.repeat_interleave(tile[0], -2).repeat_interleave(tile[1], -1)[..., :Sq, :Skv]


def same(block_map: BlockMap, mask: Tensor, backend: str) -> None:
    """Attention by the map, and its gradients, are those of the dense mask."""
    q, k, v = qkv()
    results = []
    for arguments in ({"block_map": block_map, "backend": backend}, {"mask": mask, "backend": "reference"}):
        out = attention(q, k, v, **arguments)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for got, expected in zip(*results, strict=True):
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("shape", [(6, 7), (1, 1, 6, 7), (2, 1, 6, 7), (1, 4, 6, 7), (2, 4, 6, 7)])
def test_chosen_tiles(shape: tuple[int, ...], backend: str) -> None:
    blocks = chosen(*shape)
    made = BlockMap.from_dense(blocks, Sq=90, Skv=110, tile=16)
    assert made.to_dense().eq(2).eq(blocks).all()
    same(made, dense(blocks, (16, 16), 90, 110), backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_chosen_tiles_and_a_mask(backend: str) -> None:
    blocks = chosen(2, 4, 6, 7)
    ids = torch.randint(0, 3, (2, 110), generator=torch.Generator().manual_seed(2))
    mask = causal(12) & document(ids)
    made = BlockMap.from_dense(blocks, Sq=90, Skv=110, tile=16) & mask
    visible = dense(blocks, (16, 16), 90, 110) & mask.to_dense(2, 4, 90, 110)
    derived = block_map(mask_from(visible), 2, 4, 90, 110, device="cpu", tile=16)
    assert torch.equal(made.to_dense(), derived.to_dense())
    same(made, visible, backend)
    with_function = BlockMap.from_dense(blocks, Sq=90, Skv=110, tile=16) & (lambda b, h, q, k: k <= q + 12)
    same(with_function, dense(blocks, (16, 16), 90, 110) & causal(12).to_dense(1, 1, 90, 110), backend)


def test_indices_are_the_tiles_they_list() -> None:
    indices = torch.tensor([[0, 2, 5], [1, 3, 0], [4, 0, 0]])
    counts = torch.tensor([3, 2, 1])
    made = BlockMap.from_indices(indices, counts, Sq=40, Skv=96, tile=16, validate=True)
    expected = torch.zeros(3, 6, dtype=torch.int8)
    for row, tiles in enumerate(([0, 2, 5], [1, 3], [4])):
        expected[row, tiles] = 2
    assert torch.equal(made.to_dense()[0, 0], expected)
    per_head = BlockMap.from_indices(indices.expand(1, 4, 3, 3), counts.expand(1, 4, 3), Sq=40, Skv=96, tile=16)
    assert torch.equal(per_head.to_dense(), expected.expand(1, 4, 3, 6))


@pytest.mark.parametrize(
    "indices, counts, words",
    [
        ([[0, 9]], [2], "outside 0 .. 4 - 1"),
        ([[-1, 2]], [2], "outside 0 .. 4 - 1"),
        ([[0, 1]], [3], "more than the row"),
        ([[0, 1]], [-1], "negative"),
        ([[2, 1]], [2], "not ascending"),
        ([[1, 1]], [2], "not ascending"),
    ],
)
def test_wrong_lists_are_reported_and_read_nothing(indices: list, counts: list, words: str) -> None:
    arguments = (torch.tensor(indices), torch.tensor(counts))
    with pytest.raises(InputError, match=words):
        BlockMap.from_indices(*arguments, Sq=16, Skv=64, tile=16, validate=True)
    made = BlockMap.from_indices(*arguments, Sq=16, Skv=64, tile=16)
    expected = [0] * 4
    for tile in indices[0][: max(counts[0], 0)]:
        if 0 <= tile < 4:
            expected[tile] = 2
    assert made.to_dense().flatten().tolist() == expected
    for look in (str, BlockMap.density):
        with pytest.raises(InputError, match=words):
            look(made)


def test_what_does_not_fit_raises() -> None:
    blocks = chosen(6, 7)
    q, k, v = qkv()
    for wrong, words in (
        (lambda: BlockMap.from_dense(blocks.int()), "must be bool"),
        (lambda: BlockMap.from_dense(blocks[0]), "must be bool"),
        (lambda: BlockMap.from_dense(blocks, Sq=97, tile=16), "Sq=97 takes 7 tiles of 16, blocks has 6"),
        (lambda: BlockMap.from_indices(blocks.long(), blocks.long(), Sq=96, Skv=96, tile=16), "must fit"),
        (
            lambda: BlockMap.from_indices(torch.zeros(5, 2).long(), torch.zeros(5).long(), Sq=96, Skv=96),
            "takes 1 tiles",
        ),
        (lambda: block_map(causal(), 1, 1, 96, 96, device="cpu") & causal(), "joined before"),
        (lambda: BlockMap.from_dense(blocks, tile=16) & document(torch.zeros(2, 112).int()), "expand the tiles"),
        (lambda: attention(q, k, v, block_map=BlockMap.from_dense(blocks, tile=16)), "Sq=96 Skv=112"),
        (
            lambda: attention(q, k, v, mask=causal(), block_map=BlockMap.from_dense(blocks, Sq=90, Skv=110, tile=16)),
            "another mask",
        ),
    ):
        with pytest.raises(InputError, match=words):
            wrong()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_rows_go_on_counting_queries(backend: str) -> None:
    q, k, v = qkv()
    ids = torch.randint(0, 3, (2, 110), generator=torch.Generator().manual_seed(2))
    mask, score_mod = (causal(20) | sliding_window(30, 30)) & document(ids), alibi(torch.tensor([0.5, 0.2, 0.1, 0.0]))
    whole = block_map(mask, 2, 4, 90, 110, device="cpu", tile=16)
    expected = attention(q, k, v, mask=mask, score_mod=score_mod, backend="reference")
    for start, stop in ((0, 32), (32, 80), (80, 90), (16, 16)):
        part = whole.rows(start, stop)
        got = attention(q[:, :, start:stop], k, v, block_map=part, score_mod=score_mod, backend=backend)
        torch.testing.assert_close(got, expected[:, :, start:stop], rtol=1e-5, atol=1e-5)
        derived = block_map(mask.shift(q=start), 2, 4, stop - start, 110, device="cpu", tile=16)
        assert torch.equal(part.to_dense(), derived.to_dense())
    again = whole.rows(32, 90).rows(16, 58)
    got = attention(q[:, :, 48:90], k, v, block_map=again, score_mod=score_mod, backend=backend)
    torch.testing.assert_close(got, expected[:, :, 48:90], rtol=1e-5, atol=1e-5)


def test_a_map_of_a_tensor_that_was_changed_since_is_refused() -> None:
    q, k, v = qkv()
    ids = torch.zeros(110, dtype=torch.int32)
    chosen_documents = BlockMap.from_dense(chosen(6, 7), Sq=90, Skv=110, tile=16) & document(ids)
    part = block_map(document(ids), 2, 4, 90, 110, device="cpu", tile=16).rows(0, 32)
    ids[50:] = 1
    for length, stale in ((90, chosen_documents), (32, part)):
        with pytest.raises(InputError, match="was changed since the map was built"):
            attention(q[:, :, :length], k, v, block_map=stale)


def test_rows_of_a_selection() -> None:
    blocks = chosen(6, 7)
    q, k, v = qkv()
    made = BlockMap.from_dense(blocks, Sq=90, Skv=110, tile=16)
    expected = attention(q, k, v, block_map=made)
    got = attention(q[:, :, 48:], k, v, block_map=made.rows(48, 90), backend="reference")
    torch.testing.assert_close(got, expected[:, :, 48:], rtol=1e-5, atol=1e-5)


def test_rows_that_cut_a_tile_raise() -> None:
    whole = block_map(causal(), 1, 1, 90, 90, device="cpu", tile=16)
    for start, stop in ((8, 32), (0, 40), (32, 16), (-16, 16), (80, 96)):
        with pytest.raises(InputError, match="cut it at multiples of 16"):
            whole.rows(start, stop)
