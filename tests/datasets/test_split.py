"""Readers part the samples of an epoch: disjoint, complete, in whole batches."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concurrent_dataloader.datasets._split import (
    Piece,
    Reader,
    ShardTable,
    Span,
    Uneven,
    cut_row,
    draw_order,
    halve_largest,
    plan_segments,
    plan_whole_shards,
    rank_span,
    worker_spans,
)

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)


def read(
    counts: list[int],
    reader: Reader,
    *,
    uneven: Uneven = "exact",
    batch_size: int | None = None,
    seed: int | None = None,
    epoch: int = 0,
) -> list[tuple[int, int]]:
    """Give the samples of a reader as (shard, place)."""
    table = ShardTable.from_counts(counts)
    segments = plan_segments(
        table,
        table.whole_row(draw_order(len(counts), seed or 0, None if seed is None else epoch)),
        reader,
        uneven=uneven,
        batch_size=batch_size,
        shuffle=None if seed is None else random.Random(f"{seed} {epoch} {reader}"),
        num_open=4,
    )
    samples: list[tuple[int, int]] = []
    for shard, byte_range, num_samples, *_ in segments:
        assert byte_range is not None
        places = range(*byte_range)
        assert len(places) == num_samples
        samples.extend((shard, place) for place in places)
    return samples


def everything(counts: list[int]) -> list[tuple[int, int]]:
    return [(shard, place) for shard, n in enumerate(counts) for place in range(n)]


def readers(world_size: int, num_workers: int) -> list[Reader]:
    return [
        Reader(rank, world_size, worker, num_workers)
        for rank in range(world_size)
        for worker in range(num_workers)
    ]


@settings(max_examples=150, deadline=None)
@given(
    counts=COUNTS,
    world_size=st.integers(1, 9),
    num_workers=st.integers(1, 5),
    batch_size=st.none() | st.integers(1, 9),
    seed=st.none() | st.integers(0, 3),
)
def test_w03_w06_a15_readers_part_all_samples_however_few_the_shards(
    counts: list[int], world_size: int, num_workers: int, batch_size: int | None, seed: int | None
) -> None:
    parts = [
        read(counts, reader, batch_size=batch_size, seed=seed)
        for reader in readers(world_size, num_workers)
    ]

    assert sorted(itertools.chain(*parts)) == everything(counts)


@settings(max_examples=150, deadline=None)
@given(
    num_samples=st.integers(0, 100),
    num_workers=st.integers(1, 6),
    batch_size=st.integers(1, 9),
    strided=st.booleans(),
)
def test_w05_workers_make_as_many_batches_as_one_would(
    num_samples: int, num_workers: int, batch_size: int, strided: bool
) -> None:
    sizes: list[list[int]] = []
    for worker in range(num_workers):
        spans = worker_spans(
            Span(7, 7 + num_samples), worker, num_workers, batch_size, strided=strided
        )
        mine = sum(stop - start for start, stop in spans)
        sizes.append([min(batch_size, mine - at) for at in range(0, mine, batch_size)])

    turns = itertools.chain(*itertools.zip_longest(*sizes))
    in_turn = [size for size in turns if size is not None]
    full, left = divmod(num_samples, batch_size)
    assert in_turn == [batch_size] * full + [left] * bool(left)


@pytest.mark.parametrize("uneven", ["drop", "pad"])
@pytest.mark.parametrize("num_samples", [7, 16, 100, 101])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_get_equally_many_samples(uneven: Uneven, num_samples: int, world_size: int) -> None:
    counts = [num_samples]
    parts = [
        read(counts, Reader(rank, world_size), uneven=uneven, seed=1) for rank in range(world_size)
    ]

    got = list(itertools.chain(*parts))
    assert len({len(part) for part in parts}) == 1
    if uneven == "drop":
        assert len(got) == len(set(got)) > num_samples - world_size
    else:
        assert set(got) == set(everything(counts))
        assert len(got) < num_samples + world_size


def test_exact_ranks_differ_by_one_sample_at_most() -> None:
    spans = [rank_span(10, rank, 4, "exact") for rank in range(4)]

    assert spans == [(0, 3), (3, 6), (6, 8), (8, 10)]


def test_a_dropped_tail_is_another_one_in_another_epoch() -> None:
    counts = [3] * 7

    dropped = {
        tuple(
            set(everything(counts))
            - set(
                itertools.chain(
                    *(
                        read(counts, Reader(rank, 4), uneven="drop", seed=1, epoch=epoch)
                        for rank in range(4)
                    )
                )
            )
        )
        for epoch in range(6)
    }

    assert len(dropped) > 1


def test_unshuffled_batches_of_all_workers_in_turn_are_in_order() -> None:
    counts = [5, 0, 9, 2, 11]
    parts = [read(counts, Reader(0, 1, worker, 3), batch_size=4) for worker in range(3)]

    batches = [[part[at : at + 4] for at in range(0, len(part), 4)] for part in parts]
    in_turn = [batch for turn in itertools.zip_longest(*batches) for batch in turn if batch]
    assert list(itertools.chain(*in_turn)) == everything(counts)


def test_a_span_beyond_the_end_goes_on_in_front() -> None:
    table = ShardTable.from_counts([2, 3])

    assert cut_row([Span(4, 7)], table.whole_row([0, 1])) == [(1, 2, 3), (0, 0, 2)]


def test_one_large_piece_is_cut_so_that_there_is_something_to_mix() -> None:
    assert halve_largest([Piece(0, 0, 8)], 3) == [(0, 0, 2), (0, 2, 4), (0, 4, 8)]


def test_pieces_of_one_sample_are_not_cut() -> None:
    assert halve_largest([Piece(0, 0, 1), Piece(1, 4, 5)], 4) == [(0, 0, 1), (1, 4, 5)]


def test_whole_shards_are_parted_by_rank_then_worker() -> None:
    order = draw_order(11, seed=5, epoch=2)

    parts = [
        [segment.shard for segment in plan_whole_shards(order, reader)] for reader in readers(2, 3)
    ]

    assert sorted(itertools.chain(*parts)) == list(range(11))
    assert {len(part) for part in parts} <= {1, 2}


def test_w07_the_order_of_shards_is_that_of_seed_and_epoch() -> None:
    assert draw_order(50, 1, 0) == draw_order(50, 1, 0)
    assert draw_order(50, 1, 0) != draw_order(50, 1, 1)
    assert draw_order(50, 1, 0) != draw_order(50, 2, 0)
    assert draw_order(5, 1, None) == [0, 1, 2, 3, 4]
