"""Masks as values: what each one shows, written out as a dense tensor; composition, shift, repr."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from anymask import (
    InputError,
    Mask,
    MaskError,
    alibi,
    attention,
    bidirectional_spans,
    bigbird,
    block_diffusion,
    causal,
    chunked,
    cross_document,
    dilated_window,
    document,
    document_ids,
    flamingo,
    flashmask,
    from_function,
    full,
    longformer,
    mask_from,
    neighbourhood,
    packed_prefix_lm,
    packed_sink_window,
    padding,
    prefix_lm,
    random_blocks,
    shared_prefix,
    sink_window,
    slices,
    sliding_tile,
    sliding_window,
    softcap,
    sparse_fixed,
    sparse_strided,
    tree,
)
from anymask.blocks.build import stages
from anymask.expr.interval import Grid
from anymask.expr.mods import Mods, text_of

Q, K = torch.arange(7)[:, None], torch.arange(9)[None, :]
IDS = torch.tensor([[0, 0, 2, 2, 1, 1, -1, -1, 0], [5, 5, 5, 5, 5, 5, 5, 5, 5]])


def dense(mask: Any, B: int = 1) -> torch.Tensor:
    return mask.to_dense(B, 1, 7, 9)[:, 0]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (full(), Q + K >= 0),
        (causal(), K <= Q),
        (causal(offset=2), K <= Q + 2),
        (sliding_window(2, 1), (K >= Q - 2) & (K <= Q + 1)),
        (sliding_window(None, 0), K <= Q),
        (sliding_window(3, None), K >= Q - 3),
        (sliding_window(None, None), Q + K >= 0),
        (prefix_lm(3), (K < 3) | (K <= Q)),
        (document(IDS[0]), (IDS[0, :7, None] == IDS[0]) & (IDS[0] >= 0)),
        (
            document(cu_seqlens=torch.tensor([0, 2, 2, 6, 9])),
            (K < 2) & (Q < 2) | (K >= 2) & (K < 6) & (Q >= 2) & (Q < 6) | (K >= 6) & (Q >= 6),
        ),
        (
            document(cu_seqlens=torch.tensor([0, 4, 6]), total=9),
            (K < 4) & (Q < 4) | (K >= 4) & (K < 6) & (Q >= 4) & (Q < 6),
        ),
        (mask_from((Q + K) % 3 == 0), (Q + K) % 3 == 0),
        (mask_from(K[0] > 4), (K > 4) & (Q >= 0)),
        (mask_from(Q > 4), (Q > 4) & (K >= 0)),
        (~causal(), K > Q),
        (causal() & ~sliding_window(2, 0), K < Q - 2),
        (causal() | sliding_window(0, 1), K <= Q + 1),
        (causal() ^ full(), K > Q),
        (causal().shift(q=2), K <= Q + 2),
        (causal().shift(kv=2), K + 2 <= Q),
        ((causal() & document(IDS[0])).shift(q=1), (K <= Q + 1) & (IDS[0, 1:8, None] == IDS[0]) & (IDS[0] >= 0)),
        (from_function(lambda b, h, q, k: q == k), Q == K),
    ],
    ids=str,
)
def test_what_a_mask_shows(mask: Any, expected: torch.Tensor) -> None:
    assert torch.equal(dense(mask)[0], expected)


def test_numbers_per_batch() -> None:
    per_batch = torch.tensor([1, 4])
    for mask, expected in (
        (causal(offset=per_batch), lambda n: Q + n >= K),
        (prefix_lm(per_batch), lambda n: (n > K) | (K <= Q)),
        (padding(per_batch), lambda n: (n > K) & (Q >= 0)),
        (causal().shift(q=per_batch), lambda n: Q + n >= K),
        (causal().shift(kv=per_batch), lambda n: K + n <= Q),
    ):
        assert torch.equal(dense(mask, B=2), torch.stack([expected(n) for n in (1, 4)])), mask
    both = document(IDS).to_dense(2, 1, 7, 9)[:, 0]
    assert torch.equal(both[0], dense(document(IDS[0]))[0]) and bool(both[1].all())


def test_bottom_right_is_causal_for_the_last_queries() -> None:
    """What the docstring promises: the last Sq of Skv tokens see what they would see among all Skv."""
    assert torch.equal(dense(causal(offset=9 - 7))[0], causal().to_dense(1, 1, 9, 9)[0, 0, 2:])


def test_repr_reads_like_the_code() -> None:
    mask = (causal() & document(IDS)) | ~sliding_window(3, 0).shift(q=1)
    assert repr(mask) == "((causal(0) & document(int64[2, 9])) | ~shift(sliding_window(3, 0), 1, 0))"
    assert repr(neighbourhood((4, 5), 3) | tree(IDS)) == "(neighbourhood((4, 5), 3, 1, False) | tree(int64[2, 9], 0))"
    assert repr(softcap(2.0).then(alibi(torch.rand(4)))) == "softcap(2.0).then(alibi([4]))"


def test_joining_by_words_is_refused() -> None:
    for join in (lambda: causal() and full(), lambda: not causal(), lambda: causal() if full() else None):
        with pytest.raises(MaskError, match="& for and"):
            join()


def test_plain_functions_join_masks() -> None:
    assert torch.equal(dense(causal() & (lambda b, h, q, k: k > 2))[0], (K <= Q) & (K > 2))


def test_score_functions_compose_in_order() -> None:
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    slopes = torch.tensor([0.5, 0.25])
    S = q @ k.mT / 4
    bias = slopes[:, None, None] * (torch.arange(9)[None, :] - torch.arange(9)[:, None])
    for score_mod, scores in (
        (softcap(2.0).then(alibi(slopes)), 2 * torch.tanh(S / 2) + bias),
        (alibi(slopes).then(softcap(2.0)), 2 * torch.tanh((S + bias) / 2)),
        (alibi(slopes[None]), S + bias),
        (softcap(2.0).then(lambda s, b, h, i, j: s * 3), 6 * torch.tanh(S / 2)),
    ):
        torch.testing.assert_close(attention(q, k, v, score_mod=score_mod), torch.softmax(scores, -1) @ v)


def test_works_as_a_flex_attention_mask() -> None:
    from torch.nn.attention.flex_attention import create_mask

    mask = causal() & document(IDS)
    assert torch.equal(create_mask(mask, 2, 1, 7, 9, device="cpu"), mask.to_dense(2, 1, 7, 9))


# Masks of zoo.py, and of documents, each against its definition, written out for one query and one key.


def check(mask: Mask, sees: Callable[[int, int], bool], Sq: int, Skv: int | None = None) -> None:
    """The mask as a program, and called as FlexAttention calls it, on all pairs."""
    from torch.nn.attention.flex_attention import create_mask

    Skv = Sq if Skv is None else Skv
    expected = torch.tensor([[bool(sees(i, j)) for j in range(Skv)] for i in range(Sq)])
    assert torch.equal(mask.to_dense(1, 1, Sq, Skv)[0, 0], expected), mask
    assert torch.equal(create_mask(mask, 1, 1, Sq, Skv, device="cpu")[0, 0], expected), mask


def one_of(i: int, j: int, groups: Sequence[Sequence[int]]) -> bool:
    return any(i in group and j in group for group in groups)


GLOBAL = torch.arange(15) % 7 == 2


@pytest.mark.parametrize(
    ("mask", "sees"),
    [
        (chunked(1), lambda i, j: i == j),
        (chunked(4), lambda i, j: one_of(i, j, [range(4), range(4, 8), range(8, 12), range(12, 15)])),
        (chunked(20), lambda i, j: True),
        (dilated_window(2, 1, 3), lambda i, j: j in (i - 6, i - 3, i, i + 3)),
        (dilated_window(0, 0, 4), lambda i, j: i == j),
        (dilated_window(3, 2, 1), lambda i, j: i - 3 <= j <= i + 2),
        (sink_window(3, 2), lambda i, j: j in range(i - 2, i + 1) or j in range(min(2, i + 1))),
        (sink_window(1, 0), lambda i, j: i == j),
        (sparse_strided(4), lambda i, j: j in range(max(0, i - 4), i + 1) or j in range(i, -1, -4)),
        (sparse_strided(1), lambda i, j: j <= i),
        (sparse_fixed(4, 1), lambda i, j: j in range(i - i % 4, i + 1) or j in range(3, i + 1, 4)),
        (
            sparse_fixed(5, 2),
            lambda i, j: j in range(i - i % 5, i + 1) or j in (*range(3, i + 1, 5), *range(4, i + 1, 5)),
        ),
        (sparse_fixed(5, 0), lambda i, j: j in range(i - i % 5, i + 1)),
        (longformer(4, GLOBAL), lambda i, j: j in range(i - 2, i + 3) or i in (2, 9) or j in (2, 9)),
        (longformer(1, torch.zeros(15, dtype=torch.bool)), lambda i, j: i == j),
    ],
    ids=lambda value: str(value) if isinstance(value, Mask) else "",
)
def test_windows_chunks_strides(mask: Mask, sees: Any) -> None:
    check(mask, sees, 15)
    check(mask, sees, 9, 15)


@pytest.mark.parametrize(("window", "num_global"), [(3, 1), (1, 0), (4, 2), (1, 1)])
def test_bigbird(window: int, num_global: int) -> None:
    random = random_blocks(7, 7, 1, heads=2, seed=5)
    always = {*range(num_global), *range(7 - num_global, 7)}

    def sees(i: int, j: int) -> bool:
        q, kv = i // 3, j // 3
        window_blocks = range(q - window // 2, q + window // 2 + 1)
        return q in always or kv in always or kv in window_blocks or bool(random[0, q, kv])

    check(bigbird(random[0], 3, window, num_global), sees, 20)
    of_heads = bigbird(random, 3, window, num_global).to_dense(1, 2, 20, 20)[0]
    for h in range(2):
        assert torch.equal(of_heads[h], bigbird(random[h], 3, window, num_global).to_dense(1, 1, 20, 20)[0, 0])


def test_random_blocks() -> None:
    table = random_blocks(7, 9, 3, heads=4, seed=1)
    assert table.shape == (4, 7, 9) and bool((table.sum(-1) == 3).all()) and table[0].ne(table[1]).any()
    assert torch.equal(table, random_blocks(7, 9, 3, heads=4, seed=1))
    assert not torch.equal(table, random_blocks(7, 9, 3, heads=4, seed=2))
    assert random_blocks(2, 3, 3).all() and not random_blocks(2, 3, 0).any()


def nearest(i: int, length: int, window: int, dilation: int = 1, is_causal: bool = False) -> list[int]:
    """The neighbours along an axis: of the runs of `window` tokens in steps of dilation, the one best centred on i."""
    group = list(range(i % dilation, length, dilation))
    if is_causal:
        return [j for j in group if j <= i][-window:]
    runs = [group[start : start + window] for start in range(len(group) - window + 1)]
    return min(runs, key=lambda run: abs(run[window // 2] - i))


@pytest.mark.parametrize(
    ("shape", "window", "dilation", "is_causal"),
    [
        ((9,), 3, 1, False),
        ((9,), 4, 1, False),
        ((9,), 9, 1, False),
        ((9,), 1, 1, False),
        ((9,), 4, 1, True),
        ((11,), 3, 3, False),
        ((11,), 2, 4, False),
        ((11,), 2, 5, True),
        ((5, 7), 3, 1, False),
        ((5, 7), (5, 2), 1, (False, True)),
        ((7, 5), (3, 2), 2, False),
        ((7, 6), (2, 3), (3, 2), (True, False)),
        ((3, 4, 5), (1, 4, 3), 1, False),
        ((4, 3, 5), (2, 3, 2), (2, 1, 2), (True, False, False)),
        ((2, 2, 3, 2), (1, 2, 3, 2), 1, False),
    ],
    ids=str,
)
def test_neighbourhood(shape: Any, window: Any, dilation: Any, is_causal: Any) -> None:
    mask = neighbourhood(shape, window, dilation, is_causal)
    axes = [x if isinstance(x, tuple) else (x,) * len(shape) for x in (shape, window, dilation, is_causal)]
    tokens = list(itertools.product(*map(range, shape)))

    def sees(i: int, j: int) -> bool:
        return all(kv in nearest(q, *axis) for q, kv, *axis in zip(tokens[i], tokens[j], *axes, strict=True))

    check(mask, sees, len(tokens))
    dense = mask.to_dense(1, 1, len(tokens) + 3, len(tokens) + 4)[0, 0]
    assert not dense[len(tokens) :].any() and not dense[:, len(tokens) :].any()
    if not any(axes[3]):
        seen = torch.tensor(axes[1]).prod()
        assert bool((dense[: len(tokens)].sum(-1) == seen).all()) and bool(dense.diagonal()[: len(tokens)].all())


def test_neighbourhood_is_shifted_inwards_at_the_border() -> None:
    rows = [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    check(neighbourhood(5, 3), lambda i, j: j in rows[i], 5)
    rows = [[0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5], [2, 4, 6], [1, 3, 5], [2, 4, 6]]
    check(neighbourhood(7, 3, dilation=2), lambda i, j: j in rows[i], 7)
    rows = [[0], [1], [0, 2], [1, 3], [2, 4]]
    check(neighbourhood((5,), 2, dilation=2, causal=True), lambda i, j: j in rows[i], 5)


@pytest.mark.parametrize(
    ("shape", "tile", "window"),
    [((6, 4, 4), (2, 2, 2), (3, 1, 2)), ((5, 6, 2), (1, 2, 1), (3, 2, 1)), ((4, 6), (2, 2), 1), ((12,), (3,), 3)],
    ids=str,
)
def test_sliding_tile(shape: Any, tile: Any, window: Any) -> None:
    windows = window if isinstance(window, tuple) else (window,) * len(shape)

    def tile_of(token: Any) -> list[int]:
        return [at // size for at, size in zip(token, tile, strict=True)]

    tokens = sorted(itertools.product(*map(range, shape)), key=lambda token: (tile_of(token), token))
    num_tiles = [length // size for length, size in zip(shape, tile, strict=True)]

    def sees(i: int, j: int) -> bool:
        return all(
            kv in nearest(q, num, size)
            for q, kv, num, size in zip(tile_of(tokens[i]), tile_of(tokens[j]), num_tiles, windows, strict=True)
        )

    check(sliding_tile(shape, tile, window), sees, len(tokens))
    assert not sliding_tile(shape, tile, window).to_dense(1, 1, 200, 200)[0, 0, len(tokens) :].any()


PACKED = [0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3, -1, -1]
SHUFFLED = [2, 0, -1, 1, 0, 2, 2, 1, -1, 0, 2, 1, 3]


def test_document_ids() -> None:
    assert document_ids(torch.tensor([0, 3, 8, 9, 13]), total=15).tolist() == PACKED
    assert document_ids(torch.tensor([0, 2, 2, 3], dtype=torch.int32)).tolist() == [0, 0, 2]
    assert document_ids(torch.tensor([1, 3]), total=4).tolist() == [-1, 0, 0, -1]
    assert document_ids(torch.tensor([0]), total=2).tolist() == [-1, -1]


@pytest.mark.parametrize("ids", [PACKED, SHUFFLED])
def test_masks_of_packed_documents(ids: list[int]) -> None:
    tokens = {doc: [i for i, other in enumerate(ids) if other == doc] for doc in range(4)}
    prefix_lens = [2, 0, 9, 1]

    def in_prefix(i: int, j: int) -> bool:
        return ids[i] == ids[j] >= 0 and (j <= i or j in tokens[ids[j]][: prefix_lens[ids[j]]])

    def in_window(i: int, j: int) -> bool:
        return ids[i] == ids[j] >= 0 and j <= i and (j > i - 2 or j in tokens[ids[j]][:1])

    for dtype in (torch.int32, torch.int64):
        id_of = torch.tensor(ids, dtype=dtype)
        check(packed_prefix_lm(id_of, torch.tensor(prefix_lens)), in_prefix, len(ids))
        check(packed_sink_window(id_of, 2, 1), in_window, len(ids))
        check(packed_sink_window(id_of, 1, 0), lambda i, j: i == j and ids[i] >= 0, len(ids))


@pytest.mark.parametrize("prefix_of", [[0, 0, 0, 0], [-1, 0, 2, 2], [-1, -1, -1, -1]])
def test_shared_prefix(prefix_of: list[int]) -> None:
    expected = torch.zeros(15, 15, dtype=torch.bool)
    for doc in range(4):
        own = [i for i, other in enumerate(PACKED) if other == doc]
        both = own if prefix_of[doc] in (doc, -1) else [i for i, x in enumerate(PACKED) if x == prefix_of[doc]] + own
        alone = torch.ones(len(both), len(both), dtype=torch.bool).tril()
        expected[torch.tensor(own)[:, None], torch.tensor(both)] = alone[-len(own) :]
    check(shared_prefix(torch.tensor(PACKED), torch.tensor(prefix_of)), lambda i, j: bool(expected[i, j]), 15)


@pytest.mark.parametrize("is_causal", [False, True])
def test_cross_document(is_causal: bool) -> None:
    q_ids, kv_ids = [0, 0, 1, 1, 1, 3, 3, -1], [-1, 0, 0, 0, 0, 1, 2, 2, 3, 3, -1]
    expected = torch.zeros(len(q_ids), len(kv_ids), dtype=torch.bool)
    for doc in range(4):
        q, kv = (torch.tensor(ids).eq(doc).nonzero().flatten() for ids in (q_ids, kv_ids))
        block = torch.ones(len(q), len(kv), dtype=torch.bool)
        expected[q[:, None], kv] = block.tril(len(kv) - len(q)) if is_causal else block
    mask = cross_document(torch.tensor(q_ids), torch.tensor(kv_ids), causal=is_causal)
    check(mask, lambda i, j: bool(expected[i, j]), len(q_ids), len(kv_ids))


def test_documents_of_each_sequence() -> None:
    """Tables [B, S], [B, n] say for each sequence what [S], [n] say for all."""
    ids = torch.tensor([PACKED, [3, 3, 1, 1, 0, 0, 0, 2, -1, -1, 2, 2, 3, 3, 3]])
    lens, prefix_of = torch.tensor([[2, 0, 9, 1], [1, 1, 1, 3]]), torch.tensor([[0, 0, 0, 0], [3, 3, 3, 3]])
    is_global, parents = ids == 1, torch.tensor([[-1, 0, 0, 1], [1, 2, -1, 2]])
    for both, alone in (
        (packed_prefix_lm(ids, lens), lambda b: packed_prefix_lm(ids[b], lens[b])),
        (packed_prefix_lm(ids[0], lens), lambda b: packed_prefix_lm(ids[0], lens[b])),
        (packed_prefix_lm(ids, lens[0]), lambda b: packed_prefix_lm(ids[b], lens[0])),
        (packed_sink_window(ids, 3, 2), lambda b: packed_sink_window(ids[b], 3, 2)),
        (shared_prefix(ids, prefix_of), lambda b: shared_prefix(ids[b], prefix_of[b])),
        (shared_prefix(ids[0], prefix_of), lambda b: shared_prefix(ids[0], prefix_of[b])),
        (cross_document(ids, ids[0], causal=True), lambda b: cross_document(ids[b], ids[0], causal=True)),
        (bidirectional_spans(ids), lambda b: bidirectional_spans(ids[b])),
        (longformer(2, is_global), lambda b: longformer(2, is_global[b])),
        (flamingo(is_global, 4), lambda b: flamingo(is_global[b], 4)),
        (tree(parents, torch.tensor([0, 3])), lambda b: tree(parents[b], (0, 3)[b])),
    ):
        expected = torch.cat([alone(b).to_dense(1, 1, 15, 15) for b in range(2)])
        assert torch.equal(both.to_dense(2, 1, 15, 15), expected), both


@pytest.mark.parametrize(
    "parents",
    [[-1], [-1, 0, 1, 2, 3, 4, 5, 6, 7], [-1, 0, 0, 1, 1, 2, 2, 5], [-1, -1, 1, 0, -1], [4, 0, 0, 5, -1, 6, 4, 3]],
)
@pytest.mark.parametrize("prefix_len", [0, 3])
def test_tree(parents: list[int], prefix_len: int) -> None:
    def path(node: int) -> list[int]:
        return [] if node < 0 else [node, *path(parents[node])]

    mask = tree(torch.tensor(parents), prefix_len)
    check(mask, lambda i, j: j < prefix_len or j - prefix_len in path(i), len(parents), len(parents) + prefix_len)
    assert not mask.to_dense(1, 1, 20, 20)[0, 0, :, len(parents) + prefix_len :].any()


@pytest.mark.parametrize(("length", "block_size"), [(6, 2), (7, 3), (5, 1), (4, 9)])
def test_block_diffusion(length: int, block_size: int) -> None:
    noised = [("noised", i // block_size) for i in range(length)]
    token = noised + [("clean", block) for _, block in noised]

    def sees(i: int, j: int) -> bool:
        (q, q_block), (kv, kv_block) = token[i], token[j]
        if kv == "noised":
            return q == "noised" and q_block == kv_block
        return kv_block < q_block if q == "noised" else kv_block <= q_block

    check(block_diffusion(length, block_size), sees, 2 * length)


def test_images_in_text() -> None:
    spans = [-1, 0, 0, 0, -1, -1, 1, 1, 2, 2, -1, 3]
    images = [[1, 2, 3], [6, 7], [8, 9], [11]]
    check(bidirectional_spans(torch.tensor(spans)), lambda i, j: j <= i or one_of(i, j, images), 12)
    starts = [2, 3, 7]  # text tokens that stand for an image of 4 keys; the last of 4 images is never named
    is_image = torch.tensor([i in starts for i in range(9)])
    latest = [None, None, 0, 1, 1, 1, 1, 2, 2]
    check(flamingo(is_image, 4), lambda i, j: latest[i] == j // 4, 9, 16)
    assert not flamingo(is_image & False, 4).to_dense(1, 1, 9, 16).any()


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("is_causal", "num_bounds"), [(True, 1), (True, 2), (False, 2), (False, 4)])
def test_flashmask(is_causal: bool, num_bounds: int, batches: int, heads: int) -> None:
    B, H, Sq, Skv = 2, 3, 9, 11
    bounds = torch.randint(0, Sq + 1, (batches, heads, Skv, num_bounds), generator=torch.Generator().manual_seed(0))
    expected = torch.ones(batches, heads, Sq, Skv, dtype=torch.bool)
    for b, h, j in itertools.product(range(batches), range(heads), range(Skv)):
        column, bound = expected[b, h, :, j], bounds[b, h, j].tolist()
        if is_causal:
            column[bound[0] : bound[1] if num_bounds == 2 else Sq] = False
            column[: max(0, j - (Skv - Sq))] = False
        elif num_bounds == 2:
            column[bound[0] :] = False
            column[: bound[1]] = False
        else:
            column[bound[0] : bound[1]] = False
            column[bound[2] : bound[3]] = False
    mask = flashmask(bounds.int(), causal=is_causal, offset=Skv - Sq)
    assert torch.equal(mask.to_dense(B, H, Sq, Skv), expected.expand(B, H, Sq, Skv))


def test_flashmask_says_what_its_documentation_draws() -> None:
    ends, starts = [4, 4, 4, 4, 7, 7, 7, 10, 10, 10], [0, 0, 0, 0, 4, 4, 4, 7, 7, 7]
    documents = document(torch.tensor(ends)).to_dense(1, 1, 10, 10)
    causal_documents = flashmask(torch.tensor(ends)[None, None, :, None], causal=True)
    assert torch.equal(causal_documents.to_dense(1, 1, 10, 10), documents.tril())
    both_ways = flashmask(torch.tensor([ends, starts]).T[None, None])
    assert torch.equal(both_ways.to_dense(1, 1, 10, 10), documents)


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 9, 0, 12, 0)],
        [(0, 9, 0, 12, 1)],
        [(0, 9, 0, 12, 2)],
        [(0, 9, 0, 12, 3)],
        [(0, 9, 3, 8, kind) for kind in (1, 2)],
        [(1, 4, 2, 9, 3), (4, 9, 0, 2, 0), (3, 7, 5, 12, 1), (6, 9, 6, 11, 2)],
        [(2, 2, 0, 12, 0), (0, 9, 5, 5, 1), (8, 9, 11, 12, 3)],
        [],
    ],
    ids=str,
)
def test_slices(parts: list[tuple[int, ...]]) -> None:
    expected = torch.zeros(9, 12, dtype=torch.bool)
    for q_start, q_end, k_start, k_end, kind in parts:
        part = torch.ones(q_end - q_start, k_end - k_start, dtype=torch.bool)
        part = part.tril(part.shape[1] - part.shape[0]) if kind in (1, 3) else part
        expected[q_start:q_end, k_start:k_end] |= part.triu() if kind in (2, 3) else part
    table = torch.tensor(parts, dtype=torch.int32).view(-1, 5)
    mask = slices(table[:, :2], table[:, 2:4], table[:, 4])
    check(mask, lambda i, j: bool(expected[i, j]), 9, 12)
    if all(kind == 0 for *_, kind in parts):
        assert torch.equal(slices(table[:, :2], table[:, 2:4]).to_dense(1, 1, 9, 12)[0, 0], expected)


def test_slices_spell_other_masks() -> None:
    """A causal window of 4 keys is a causal slice and a bidirectional-causal one; prefix LM a full and a causal one."""
    window = slices(torch.tensor([[0, 3], [3, 9]]), torch.tensor([[0, 3], [0, 9]]), torch.tensor([1, 3]))
    assert torch.equal(window.to_dense(1, 1, 9, 9), sliding_window(3, 0).to_dense(1, 1, 9, 9))
    prefix = slices(torch.tensor([[0, 9], [0, 9]]), torch.tensor([[0, 4], [0, 9]]), torch.tensor([0, 1]))
    assert torch.equal(prefix.to_dense(1, 1, 9, 9), prefix_lm(4).to_dense(1, 1, 9, 9))


IDENTIFIERS, FLOATS, BOOLS = torch.zeros(9, dtype=torch.int32), torch.zeros(9), torch.zeros(9, dtype=torch.bool)
RANGES = torch.tensor([[0, 3], [3, 9]])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: document(FLOATS), "document ids: expected a tensor .* of integers, got torch.float32"),
        (lambda: document(IDENTIFIERS[None, None]), r"\[S\] or \[B, S\] .* got shape \(1, 1, 9\)"),
        (lambda: document(), "either ids or cu_seqlens"),
        (lambda: document_ids(RANGES), "cu_seqlens"),
        (lambda: document_ids([0, 3]), "got list"),
        (lambda: cross_document(IDENTIFIERS, FLOATS), "kv_ids"),
        (lambda: chunked(0), "size is an integer of at least 1, got 0"),
        (lambda: chunked(2.5), "got 2.5"),
        (lambda: dilated_window(-1, 2, 1), "left"),
        (lambda: dilated_window(1, 2, 0), "dilation"),
        (lambda: sink_window(0), "window"),
        (lambda: sink_window(3, -1), "num_sinks"),
        (lambda: sparse_strided(0), "stride"),
        (lambda: sparse_fixed(4, -1), "num_summary"),
        (lambda: longformer(4, IDENTIFIERS), "is_global: expected a tensor .* of bools, got torch.int32"),
        (lambda: bigbird(BOOLS, 16), r"random: .* \[nQ, nKV\] or \[H, nQ, nKV\]"),
        (lambda: random_blocks(4, 4, 5), "num_random"),
        (lambda: neighbourhood((), 3), "num_axes"),
        (lambda: neighbourhood((4, 5), 0), "window"),
        (lambda: neighbourhood((4, 5), (3, 3, 3)), "each of the 2 axes"),
        (lambda: neighbourhood((4, 5), 3, causal=(True,)), "causal is one value"),
        (lambda: neighbourhood((4, 5), 5), "window 5 times dilation 1 exceeds an axis of 4 .* at most 4"),
        (lambda: neighbourhood((9, 9), 3, dilation=4), "at most 2"),
        (lambda: sliding_tile((4, 5), (2, 2), 1), "divides the shape"),
        (lambda: sliding_tile((4, 4), (2, 2, 2), 1), "divides the shape"),
        (lambda: sliding_tile((4, 4), (2, 2), 3), "exceeds an axis of 2"),
        (lambda: packed_prefix_lm(IDENTIFIERS, FLOATS), "prefix_lens"),
        (lambda: packed_sink_window(FLOATS, 3), "ids"),
        (lambda: packed_sink_window(IDENTIFIERS, 0), "window"),
        (lambda: shared_prefix(IDENTIFIERS, 3), "prefix_of: .* got int"),
        (lambda: tree(FLOATS), "parents"),
        (lambda: block_diffusion(0, 4), "length"),
        (lambda: bidirectional_spans(FLOATS), "ids"),
        (lambda: flamingo(IDENTIFIERS, 4), "is_image"),
        (lambda: flamingo(BOOLS, 0), "tokens_per_image"),
        (lambda: flashmask(IDENTIFIERS), r"\[B, H, Skv, n\]"),
        (lambda: flashmask(IDENTIFIERS.view(1, 1, 9, 1)), "2 or 4 with causal=False bounds for each key, got 1"),
        (lambda: flashmask(IDENTIFIERS.view(1, 1, 3, 3), causal=True), "1 or 2 with causal=True"),
        (lambda: slices(RANGES, RANGES[:1]), r"got \(2, 2\), \(1, 2\), \(2,\)"),
        (lambda: slices(RANGES, RANGES, IDENTIFIERS), r"\(9,\)"),
    ],
)
def test_bad_arguments_say_what_to_pass(make: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()


@pytest.mark.slow
def test_masks_are_made_inside_a_compiled_region() -> None:
    ids, parents = torch.tensor([PACKED]), torch.tensor([-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6])

    def layer(q: torch.Tensor, ids: torch.Tensor, parents: torch.Tensor, width: int) -> torch.Tensor:
        mask = packed_sink_window(ids, width, 1) | neighbourhood((3, 5), (2, width), causal=(True, False)) & tree(
            parents
        )
        return attention(q, q, q, mask=mask | slices(ids[:, :2], ids[:, 3:5]) | chunked(width))

    q, compiled = torch.randn(1, 1, 15, 16), torch.compile(layer, fullgraph=True)
    for width in (2, 3):
        torch.testing.assert_close(compiled(q, ids, parents, width), layer(q, ids, parents, width))


LONG_IDS = torch.repeat_interleave(
    torch.arange(12), torch.tensor([60, 500, 1, 31, 300, 256, 64, 65, 63, 400, 200, 108])
)


@pytest.mark.parametrize(
    "mask",
    [
        causal(),
        causal(-77),
        sliding_window(700, 3),
        document(LONG_IDS),
        causal() & document(LONG_IDS),
        ~(causal() & document(LONG_IDS)),
        prefix_lm(333),
        chunked(100) & causal(),
        chunked(512) | sliding_window(100, 100),
        block_diffusion(1024, 32),
        block_diffusion(1020, 24),
        neighbourhood((2048,), 101),
        neighbourhood((32, 64), 13),
        neighbourhood((20, 100), 13),
        neighbourhood((32, 64), 7, dilation=3),
        neighbourhood((8, 16, 16), 5),
        neighbourhood((10, 10, 20), 5),
    ],
    ids=str,
)
def test_only_mixed_tiles_are_evaluated_pair_by_pair(mask: Mask) -> None:
    program = mask.trace(None)
    mods = Mods.of(text_of(program.mask, program.score), program.bindings.ints, program.bindings.floats)
    for tile in ((64, 64), (128, 64)):
        counts = stages(mods.mask, program.bindings, Grid(1, 1, 2048, 2048, tile, torch.device("cpu")))
        assert counts["all points"] == counts["mixed"], counts


def test_dense_in_float32_or_float64() -> None:
    x = torch.tensor([0.1])  # a little more, and 3 times that is the float32 next to 0.3
    mask = from_function(lambda b, h, q, k: x[q] * 3 > 0.3)
    assert mask.to_dense(1, 1, 1, 1).item() and not mask.to_dense(1, 1, 1, 1, dtype=torch.float32).item()
