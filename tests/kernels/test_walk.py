"""Walks, in Triton's interpreter: each row visits exactly its tiles of the map, in any tile and direction."""

from __future__ import annotations

import itertools

import hypothesis
import torch
import triton
import triton.language as tl
from hypothesis import strategies as st

from anymask.blocks.block_map import EMPTY, FULL, BlockMap
from anymask.blocks.walk import Walk
from anymask.kernels import map_launch, recipes
from anymask.kernels.plan import Plan
from anymask.kernels.tile import next_tile, open_row, start_of, work_of


def coarse(kinds: torch.Tensor, factors: tuple[int, int], num_whole: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tiles of the map's tiles times `factors` are masked, and which are full: [B, H, nQ, nKV] bool."""
    parts = [list(rows.split(factors[1], dim=3)) for rows in kinds.split(factors[0], dim=2)]
    visited, full = (
        torch.stack([torch.stack([reduce(part) for part in row], -1) for row in parts], -2)
        for reduce in (lambda x: (x != EMPTY).flatten(2).any(-1), lambda x: (x == FULL).flatten(2).all(-1))
    )
    full[..., num_whole:] = False
    return visited & ~full, full


def listed(words: torch.Tensor, num_tiles: int) -> list[int]:
    """The tiles of one row, by reading its words as blocks/walk.py describes them."""
    tiles: list[int] = []
    for word in words.tolist():
        if len(tiles) >= num_tiles:
            break
        bits = [bit for bit in range(32) if word >> bit & 1]
        assert bits, "a word without a tile"
        tiles += [(word >> 32) + bit for bit in bits]
    return tiles


def check_walk(walk: Walk, masked: torch.Tensor, full: torch.Tensor) -> None:
    B, H, num_rows, num_columns = masked.shape
    assert walk.words.shape == (B, H, num_rows, 2, max(1, -(-num_columns // 32)))
    for b in range(B):
        for h in range(H):
            for row in range(num_rows):
                for i, tiles in enumerate((masked, full)):
                    expected = tiles[b, h, row].nonzero().flatten().tolist()
                    assert int(walk.rows[b, h, row, i]) == len(expected)
                    assert listed(walk.words[b, h, row, i], len(expected)) == expected
            order = walk.rows[b, h, :, 2].tolist()
            work = [4 * int(masked[b, h, row].sum()) + 3 * int(full[b, h, row].sum()) for row in range(num_rows)]
            assert order == sorted(range(num_rows), key=lambda row: (-work[row], row))


def one_walk(blocks: BlockMap, tile: tuple[int, int] = (16, 16), is_kv_row: bool = False) -> Walk:
    (walk,) = map_launch.make_walks(blocks, (tile, is_kv_row))
    return walk


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(data=st.data())
def test_random_kinds(data: st.DataObject) -> None:
    shape = [data.draw(st.integers(1, high)) for high in (2, 2, 40, 70)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    likely = torch.tensor(data.draw(st.sampled_from([(1, 1, 1), (9, 1, 1), (1, 0, 9), (50, 1, 0)]))).float()
    kinds = torch.multinomial(likely, shape[0] * shape[1] * shape[2] * shape[3], True, generator=generator)
    kinds = kinds.view(shape).to(torch.int8)
    Sq, Skv = shape[2] * 16, shape[3] * 16 - data.draw(st.integers(0, 15))
    factors = (data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 2, 8])))
    tile = (16 * factors[0], 16 * factors[1])
    masked, full = coarse(kinds, factors, Skv // tile[1])
    lines, columns = map_launch.make_walks(BlockMap(kinds, Sq, Skv, (16, 16)), (tile, False), (tile, True))
    check_walk(lines, masked, full)
    check_walk(columns, masked.mT, full.mT)


def test_more_columns_than_are_packed_at_a_time() -> None:
    kinds = torch.randint(0, 3, (1, 1, 3, 1700), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    kinds[0, 0, 1, 100:1600] = EMPTY
    walk = one_walk(BlockMap(kinds, 48, 1700 * 16, (16, 16)))
    check_walk(walk, *coarse(kinds, (1, 1), 1700))


def test_a_full_tile_over_the_end_of_the_keys_is_masked() -> None:
    blocks = BlockMap(torch.full((1, 1, 3, 3), FULL, dtype=torch.int8), 40, 40, (16, 16))
    assert one_walk(blocks).rows[0, 0, :, :2].tolist() == [[1, 2]] * 3
    assert one_walk(blocks, is_kv_row=True).rows[0, 0, :, :2].tolist() == [[0, 3], [0, 3], [3, 0]]
    assert one_walk(blocks, (16, 32)).rows[0, 0, :, :2].tolist() == [[1, 1]] * 3


@triton.jit
def record_kernel(walk, num_words, row, length, steps_pointer, STEPS: tl.constexpr, IS_FULL: tl.constexpr):
    """The first index of each step of a row, in tiles of 10 * STEPS and steps of 10, as the kernels compute it."""
    TILE: tl.constexpr = 10 * STEPS
    words, num_tiles, bits, first, ahead = open_row(walk, num_words, row, length, TILE, IS_FULL)
    place = 0
    for step in range(num_tiles * STEPS):
        tl.store(steps_pointer + step, start_of(num_words, bits, first, step, TILE, 10))
        bits, first, place, ahead = next_tile(words, num_words, bits, first, place, ahead, step, STEPS)


def test_kernels_walk_what_is_listed() -> None:
    kinds = torch.randint(0, 3, (1, 1, 5, 200), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    kinds[0, 0, 2, 30:130] = EMPTY
    kinds[0, 0, 3] = FULL
    kinds[0, 0, 4] = EMPTY
    walk = one_walk(BlockMap(kinds, 80, 3200, (16, 16)))
    for row in range(5):
        for is_full in (0, 1):
            tiles = listed(walk.words[0, 0, row, is_full], int(walk.rows[0, 0, row, is_full]))
            for num_steps in (1, 2, 4):
                steps = torch.full((200 * num_steps,), -1, dtype=torch.int32)
                arguments = (tuple(walk), walk.words.shape[-1], row, 2000 * num_steps, steps)
                record_kernel[(1,)](*arguments, STEPS=num_steps, IS_FULL=is_full)
                expected = [(tile * num_steps + part) * 10 for tile in tiles for part in range(num_steps)]
                assert steps.tolist()[: len(expected) + 1] == [*expected, -1][: 200 * num_steps]


def test_without_a_map_all_tiles_are_walked_and_the_last_is_masked_where_it_hangs_over() -> None:
    for length in (0, 5, 40, 45):
        for num_steps in (1, 2):
            num_whole, num_tiles = length // (10 * num_steps), -(-length // (10 * num_steps))
            for is_full, tiles in ((1, range(num_whole)), (0, range(num_whole, num_tiles))):
                steps = torch.full((10,), -1, dtype=torch.int32)
                record_kernel[(1,)](None, None, 0, length, steps, STEPS=num_steps, IS_FULL=is_full)
                expected = [(tile * num_steps + part) * 10 for tile in tiles for part in range(num_steps)]
                assert steps.tolist() == expected + [-1] * (10 - len(expected))


@triton.jit
def work_kernel(work_pointer, num_rows, num_heads, heads_together, heads_last, TILE: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    head, rank, part = work_of(program, num_rows, num_heads, heads_together, heads_last, TILE, BLOCK)
    tl.store(work_pointer + program * 3, head)
    tl.store(work_pointer + program * 3 + 1, rank)
    tl.store(work_pointer + program * 3 + 2, part)


def test_groups_of_heads_have_rows_for_a_gpu() -> None:
    """A head of 8 MiB is alone where it has 128 rows; where a mask hides nothing each is. The last group takes what
    leaves whole groups before it.
    """
    for shared_mib, num_rows, head_mib, together, last in (
        ((8, 8), 64, 8, 2, 2),
        ((8, 8), 128, 8, 1, 1),
        ((8, 8), 128, 16, 1, 1),
        ((8, 8), 64, 1, 8, 8),
        ((8, 8), 1, 8, 40, 40),
        ((8, 32), 128, 8, 1, 4),
        ((8, 64), 128, 16, 1, 4),
        ((8, 64), 128, 3, 2, 22),
        ((8, 20), 40, 6, 4, 4),
        ((24, 32), 64, 8, 3, 4),
        ((8, 512), 128, 8, 1, 40),
        ((0, 0), 64, 8, 1, 1),
    ):
        plan = Plan("triton", shared_bytes=(shared_mib[0] << 20, shared_mib[1] << 20))
        for G in (1, 4):
            arguments = recipes.walk_arguments(None, 9, num_rows, 40 * G, G, head_mib << 20, plan)
            assert arguments[-2:] == (together * G, last * G)


def test_programs_share_out_all_work_in_groups_of_heads() -> None:
    for num_rows, num_heads, together, last, parts in (
        (3, 5, 2, 3, 1),
        (1, 4, 4, 4, 2),
        (4, 3, 1, 3, 2),
        (2, 6, 3, 3, 4),
        (3, 7, 1, 4, 2),
        (2, 7, 2, 5, 1),
    ):
        work = torch.empty(num_heads * num_rows * parts, 3, dtype=torch.int32)
        work_kernel[(len(work),)](work, num_rows, num_heads, together, last, TILE=16 * parts, BLOCK=16)
        starts = [*range(0, num_heads - last, together), num_heads - last, num_heads]
        expected = [
            [head, rank, part]
            for start, end in itertools.pairwise(starts)
            for rank in range(num_rows)
            for part in range(parts)
            for head in range(start, end)
        ]
        assert work.tolist() == expected
