"""Byte ranges of objects, and pure plans over many of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class ByteRange(NamedTuple):
    """Part of an object: bytes ``start`` up to, not including, ``stop``."""

    start: int
    stop: int


def merge_near(
    ranges: Sequence[ByteRange], *, max_gap_bytes: int, max_length_bytes: int
) -> list[list[int]]:
    """Plan which ranges of one object to read together.

    Greedy from the first byte on: a range joins those before it if the gap to them, which would be
    read for nothing, and the length of all together stay within the bounds. Ranges may overlap, and
    be equal. One that is longer than the bound is read alone.

    Args:
        ranges: Of one object, in any order.
        max_gap_bytes: The longest gap to read over.
        max_length_bytes: The longest read that may come of joining.

    Returns:
        Groups of indices into ``ranges``, each of these in just one, in ascending order; the groups
        in the order of their first members.
    """
    groups: list[list[int]] = []
    start = stop = 0
    for number in sorted(range(len(ranges)), key=ranges.__getitem__):
        byte_range = ranges[number]
        joined_stop = max(stop, byte_range.stop)
        is_near = byte_range.start - stop <= max_gap_bytes
        if groups and is_near and joined_stop - start <= max_length_bytes:
            groups[-1].append(number)
            stop = joined_stop
        else:
            groups.append([number])
            start, stop = byte_range
    return sorted(sorted(group) for group in groups)


def cover(ranges: Sequence[ByteRange]) -> ByteRange:
    """Give the smallest range that holds all of them.

    Raises:
        ValueError: There are none.
    """
    if not ranges:
        raise ValueError("ranges: got none, expected at least one")
    return ByteRange(
        min(byte_range.start for byte_range in ranges),
        max(byte_range.stop for byte_range in ranges),
    )
