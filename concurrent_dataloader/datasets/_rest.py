"""What is left of an epoch, of how far all are who read it: pure.

```text
what a reader was to give      its segments, planned again
  what it still owes           segments it has not begun, the rest of the open ones, its buffer
all that they owe, less what any of them gave -> intervals -> a row, parted anew
```

Samples have numbers here: those of the first shard, as the data set lists them, then those of the
second. What is left is kept as intervals of these, packed into a short text, since it travels with
each state of the readers that part it.
"""

from __future__ import annotations

import base64
import binascii
import collections
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.datasets._split import Piece, Segment, ShardTable

Intervals: TypeAlias = NDArray[np.int64]
"""Start and stop of each, (K, 2), in order, with a gap between two."""


class Part(NamedTuple):
    """What is left of an epoch, as it is parted anew."""

    left: str
    """Numbers of samples, as of `pack`."""

    is_shared: bool
    """Whether all ranks part it; else it is that of one rank, for its workers."""


# -- intervals


def unite(intervals: Iterable[Sequence[int]] | Intervals) -> Intervals:
    """Bring intervals into order, and join those that overlap or touch."""
    given = np.asarray(
        intervals if isinstance(intervals, np.ndarray) else list(intervals), np.int64
    ).reshape(-1, 2)
    given = given[np.argsort(given[:, 0], kind="stable")]
    given = given[given[:, 1] > given[:, 0]]
    if not len(given):
        return given
    reached = np.maximum.accumulate(given[:, 1])
    begins = np.concatenate([[True], given[1:, 0] > reached[:-1]])
    ends = np.concatenate([begins[1:], [True]])
    return np.stack([given[begins, 0], reached[ends]], axis=1)


def subtract(intervals: Intervals, others: Intervals) -> Intervals:
    """Give what is in the first ones and not in the others; both as `unite` gives them."""
    points = np.unique(np.concatenate([intervals.ravel(), others.ravel()]))
    if len(points) < 2:
        return intervals
    starts = points[:-1]

    def holds(each: Intervals) -> NDArray[np.bool_]:
        return np.searchsorted(each.ravel(), starts, side="right") % 2 == 1

    kept = holds(intervals) & ~holds(others)
    return unite(np.stack([starts[kept], points[1:][kept]], axis=1))


def count(intervals: Intervals) -> int:
    """Give the number of samples."""
    return int((intervals[:, 1] - intervals[:, 0]).sum())


def pack(intervals: Intervals) -> str:
    """Write intervals as a text: their ends, each as the distance to the one before."""
    steps = np.diff(intervals.ravel(), prepend=0).astype("<i8")
    return base64.b64encode(zlib.compress(steps.tobytes())).decode("ascii")


NOTHING = pack(np.zeros((0, 2), np.int64))
"""What `pack` gives where nothing is left."""


def unpack(text: str, num_samples: int) -> Intervals:
    """Read what `pack` wrote.

    Args:
        text: The text.
        num_samples: Of all shards.

    Raises:
        ValueError: It is no such text, or names samples that are not there.
    """
    try:
        raw = zlib.decompress(base64.b64decode(text, validate=True))
        ends = np.cumsum(np.frombuffer(raw, "<i8"), dtype=np.int64)
        intervals = ends.reshape(-1, 2)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(
            f"state_dict: part: got {text[:40]!r} ..., expected samples that are left; give it "
            "what state_dict() gave"
        ) from error
    if len(ends) and not (ends[0] >= 0 and (np.diff(ends) > 0).all() and ends[-1] <= num_samples):
        raise ValueError(
            f"state_dict: part: got samples up to {ends.max()}, expected numbers from 0 to "
            f"{num_samples} in order; give it what state_dict() gave"
        )
    return intervals


def cut_at_shards(table: ShardTable, intervals: Intervals, order: Sequence[int]) -> list[Piece]:
    """Give the row of samples: shard after shard in this order, in each by their place."""
    stops = np.cumsum(table.counts)
    by_shard: collections.defaultdict[int, list[Piece]] = collections.defaultdict(list)
    for start, stop in intervals.tolist():
        at = start
        while at < stop:
            shard = int(np.searchsorted(stops, at, side="right"))
            end = min(stop, int(stops[shard]))
            begin = int(stops[shard]) - int(table.counts[shard])
            by_shard[shard].append(Piece(shard, at - begin, end - begin))
            at = end
    return [piece for shard in order for piece in by_shard[shard]]


# -- what readers owe


def find_owed(
    table: ShardTable, segments: Sequence[Segment], position: Mapping[str, Any] | None
) -> tuple[Intervals, Intervals]:
    """Give what a reader was to give, and what of it it has not given.

    What it passed over, since it could not be had, it has given.

    Args:
        table: Where the samples lie.
        segments: What it reads, in its order.
        position: As of ``ShardReader.state``; None: it has read nothing.
    """
    begins = np.cumsum(table.counts) - table.counts
    shifts: list[int] = (begins - table.firsts).tolist()

    def number(segment: Segment, num_read: int = 0) -> list[tuple[int, int]]:
        shift = shifts[segment.shard]
        return [(start + shift, stop + shift) for start, stop in segment.spans_after(num_read)]

    planned = [each for segment in segments for each in number(segment)]
    if position is None:
        return unite(planned), unite(planned)
    owed = [each for segment in segments[position["next_segment"] :] for each in number(segment)]
    for at, _, num_read in position["slots"]:
        owed += number(segments[at], num_read)
    for at, place, *_ in position["buffer"]:
        here = place + shifts[segments[at].shard]
        owed.append((here, here + 1))
    return unite(planned), unite(owed)


def find_left(owed: Iterable[tuple[Intervals, Intervals]]) -> Intervals:
    """Give what no reader has given, of what `find_owed` gave of each."""
    pairs = list(owed)
    given = [subtract(planned, still_owed) for planned, still_owed in pairs]
    left = unite(np.concatenate([still_owed for _, still_owed in pairs]))
    return subtract(left, unite(np.concatenate(given)))
