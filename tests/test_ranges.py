"""Plans over byte ranges, against slicing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrent_dataloader.ranges import ByteRange, cover, merge_near

BODY = bytes(index % 251 for index in range(4096))

RANGES = st.lists(
    st.tuples(st.integers(0, len(BODY)), st.integers(0, len(BODY))).map(
        lambda pair: ByteRange(min(pair), max(pair))
    ),
    max_size=30,
)


@given(ranges=RANGES, max_gap=st.integers(0, 400), max_length=st.integers(0, 3000))
def test_every_sample_gets_exactly_its_own_bytes(
    ranges: list[ByteRange], max_gap: int, max_length: int
) -> None:
    groups = merge_near(ranges, max_gap_bytes=max_gap, max_length_bytes=max_length)

    got: dict[int, bytes] = {}
    for group in groups:
        whole = cover([ranges[number] for number in group])
        body = BODY[whole.start : whole.stop]
        for number in group:
            start, stop = ranges[number]
            got[number] = body[start - whole.start : stop - whole.start]
    assert got == {number: BODY[start:stop] for number, (start, stop) in enumerate(ranges)}


@given(ranges=RANGES, max_gap=st.integers(0, 400), max_length=st.integers(0, 3000))
def test_the_bounds_hold_and_nothing_is_read_twice_for_nothing(
    ranges: list[ByteRange], max_gap: int, max_length: int
) -> None:
    groups = merge_near(ranges, max_gap_bytes=max_gap, max_length_bytes=max_length)

    assert sorted(number for group in groups for number in group) == list(range(len(ranges)))
    assert groups == sorted(map(sorted, groups))
    for group in groups:
        members = sorted(ranges[number] for number in group)
        assert len(group) == 1 or cover(members).stop - cover(members).start <= max_length
        stop = members[0].stop
        for member in members[1:]:
            assert member.start - stop <= max_gap
            stop = max(stop, member.stop)


@given(ranges=RANGES, max_gap=st.integers(0, 400), max_length=st.integers(0, 3000))
def test_a_group_is_planned_as_itself_again(
    ranges: list[ByteRange], max_gap: int, max_length: int
) -> None:
    for group in merge_near(ranges, max_gap_bytes=max_gap, max_length_bytes=max_length):
        members = [ranges[number] for number in group]

        again = merge_near(members, max_gap_bytes=max_gap, max_length_bytes=max_length)

        assert again == [list(range(len(members)))]


def test_neighbours_are_one_read_in_order_and_groups_stand_by_their_first_member() -> None:
    ranges = [ByteRange(1000, 1100), ByteRange(0, 10), ByteRange(1110, 1200), ByteRange(30, 40)]

    assert merge_near(ranges, max_gap_bytes=20, max_length_bytes=500) == [[0, 2], [1, 3]]
    assert merge_near(ranges, max_gap_bytes=9, max_length_bytes=500) == [[0], [1], [2], [3]]
    assert merge_near(ranges, max_gap_bytes=5000, max_length_bytes=5000) == [[0, 1, 2, 3]]
    assert merge_near(ranges, max_gap_bytes=5000, max_length_bytes=150) == [[0], [1, 3], [2]]
    assert merge_near([], max_gap_bytes=1, max_length_bytes=1) == []


def test_no_range_has_no_cover() -> None:
    with pytest.raises(ValueError, match="ranges: got none"):
        cover([])
