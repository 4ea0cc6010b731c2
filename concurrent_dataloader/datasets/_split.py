"""Who reads which samples of which shards: pure, the same on every rank and in every worker.

The samples of an epoch stand in one row, shard after shard in the order of the epoch. A rank gets a
span of it, a worker spans of its rank's, and a span is cut where shards end:

```text
row       | shard 2        | shard 0        | shard 1        |
ranks     | rank 0                  | rank 1                  |
workers   | worker 0   | worker 1   | worker 0   | worker 1   |
segments  | 2 [0, 6)   | 2 [6, 8), 0 [0, 4) | ...
```

So there may be fewer shards than readers, and nobody idles. Where it is not known how many samples
a shard has, readers get whole shards. What is left of an epoch that others began is a row of pieces
of shards, and parted alike.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import ShardIndex

Uneven = Literal["drop", "pad", "exact"]
"""What to do where ranks cannot have equally many samples: leave some out, repeat some, or let some
have one more."""


MAX_GAP_BYTES = 64 << 10
"""What is read for nothing, where samples are picked out, rather than asked for apart."""


class Span(NamedTuple):
    """Part of a row of samples: ``start`` up to, not including, ``stop``."""

    start: int
    stop: int


class Reader(NamedTuple):
    """Who reads: one of the workers of one of the ranks."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    num_workers: int = 1


class Piece(NamedTuple):
    """Samples of a shard that stand side by side: numbers ``start`` up to ``stop`` in it."""

    shard: int
    start: int
    stop: int


class Segment(NamedTuple):
    """Samples of a shard that are read in one piece."""

    shard: int
    """Its number in the list of shards."""

    byte_range: ByteRange | None = None
    """None: the whole shard."""

    num_samples: int | None = None
    """None where that is not known."""

    first: int | None = None
    """Place of its first sample in the index; None without one."""

    picked: tuple[Span, ...] = ()
    """Places in the index of its samples, if others lie between them; empty: none do."""

    def spans_after(self, num_read: int) -> list[Span]:
        """Give the places in the index of all samples but the first ones."""
        assert self.first is not None, "there is an index"
        assert self.num_samples is not None, "there is an index"
        found: list[Span] = []
        for start, stop in self.picked or (Span(self.first, self.first + self.num_samples),):
            passed = min(num_read, stop - start)
            num_read -= passed
            if start + passed < stop:
                found.append(Span(start + passed, stop))
        return found


class ShardTable:
    """How many samples each shard has, and where they lie in it."""

    def __init__(
        self, counts: NDArray[np.int64], firsts: NDArray[np.int64], extents: NDArray[np.int64]
    ) -> None:
        """Take over the arrays.

        Args:
            counts: Samples of each shard, (S,).
            firsts: Row of each shard's first sample in ``extents``, (S,).
            extents: Start and stop of each sample in its shard, (N, 2); rows of a shard in the
                order of its bytes.
        """
        self.counts = counts
        self.firsts = firsts
        self._extents = extents
        self.num_samples = int(counts.sum())
        self.num_indexed = len(extents)
        """Samples of the index, which may be that of more shards."""

    @classmethod
    def from_index(cls, index: ShardIndex, numbers: Sequence[int]) -> ShardTable:
        """Take the shards that have these numbers in the index, in the order given."""
        counts = np.bincount(index.shard_numbers, minlength=len(index.shards)).astype(np.int64)
        firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)[:-1]])
        chosen = np.asarray(numbers, np.int64)
        return cls(counts[chosen], firsts[chosen], index.extents)

    @classmethod
    def from_counts(cls, counts: Sequence[int]) -> ShardTable:
        """Make up shards in which each sample takes one byte."""
        sizes = np.asarray(counts, np.int64)
        places = np.concatenate([np.arange(n, dtype=np.int64) for n in counts])
        firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)[:-1]])
        return cls(sizes, firsts, np.stack([places, places + 1], axis=1))

    def find_bytes(self, shard: int, start: int, stop: int) -> ByteRange:
        """Give the bytes of samples ``[start, stop)`` of a shard; at least one."""
        first = int(self.firsts[shard])
        begin, end = self._extents[first + start, 0], self._extents[first + stop - 1, 1]
        return ByteRange(int(begin), int(end))

    def segment(self, pieces: Sequence[Piece]) -> Segment:
        """Join pieces of one shard, in their order; at least one."""
        shard, start, _ = pieces[0]
        first, stop = int(self.firsts[shard]), pieces[-1].stop
        picked: tuple[Span, ...] = ()
        if len(pieces) > 1:
            picked = tuple(Span(first + piece.start, first + piece.stop) for piece in pieces)
        return Segment(
            shard,
            self.find_bytes(shard, start, stop),
            sum(piece.stop - piece.start for piece in pieces),
            first + start,
            picked,
        )

    def whole_row(self, order: Iterable[int]) -> list[Piece]:
        """Give all samples, shard after shard."""
        return [Piece(shard, 0, int(self.counts[shard])) for shard in order]


def draw_order(num_shards: int, seed: int, epoch: int | None) -> list[int]:
    """Give the order of the shards in an epoch; None: as they stand."""
    order = list(range(num_shards))
    if epoch is not None:
        random.Random(f"shards {seed} {epoch}").shuffle(order)
    return order


def rank_span(num_samples: int, rank: int, world_size: int, uneven: Uneven) -> Span:
    """Give a rank's part of the row; with "pad" it may reach beyond the end, and goes on in front.

    With "drop" and "pad" all ranks have equally many; with "exact" the first ones one more.
    """
    if uneven == "exact":
        size, extra = divmod(num_samples, world_size)
        start = rank * size + min(rank, extra)
        return Span(start, start + size + (rank < extra))
    size = num_samples // world_size if uneven == "drop" else -(-num_samples // world_size)
    return Span(rank * size, (rank + 1) * size)


def worker_spans(
    span: Span, worker: int, num_workers: int, batch_size: int | None, *, strided: bool
) -> list[Span]:
    """Give a worker's parts of its rank's span: whole batches, but for one of all of them.

    A loader takes batches from its workers in turn. So the numbers of batches differ by one at
    most, the first workers have one more, and the batch that is not full is the loader's last.

    Args:
        span: The rank's.
        worker: Its number.
        num_workers: How many there are.
        batch_size: Samples of a batch; None: not known, samples are parted evenly.
        strided: Each ``num_workers``-th batch, so that the loader's batches come in the order of
            the row; else batches side by side.
    """
    unit = batch_size or 1
    num_batches = -(-(span.stop - span.start) // unit)

    def place(first: int, last: int) -> Span:
        return Span(
            min(span.start + first * unit, span.stop), min(span.start + last * unit, span.stop)
        )

    if strided and num_workers > 1:
        return [place(batch, batch + 1) for batch in range(worker, num_batches, num_workers)]
    base, extra = divmod(num_batches, num_workers)
    first = worker * base + min(worker, extra)
    last = first + base + (worker < extra)
    missing = span.start + num_batches * unit - span.stop
    if not missing:
        return [place(first, last)] if last > first else []
    # The loader's last batch comes from this worker: its part, and those after it, begin earlier.
    short = (num_batches - 1) % num_workers
    start = span.start + first * unit - (missing if worker > short else 0)
    stop = span.start + last * unit - (missing if worker >= short else 0)
    return [Span(start, stop)] if stop > start else []


def cut_row(spans: Iterable[Span], row: Sequence[Piece]) -> list[Piece]:
    """Cut spans of a row where its pieces end.

    A span that reaches beyond the end goes on in front. Spans that touch are joined.
    """
    ends = np.cumsum([stop - start for _, start, stop in row], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    found: list[Piece] = []
    for start, stop in spans:
        while start < stop and total:
            at = start % total
            place = int(np.searchsorted(ends, at, side="right"))
            shard, _, end = row[place]
            left = int(ends[place]) - at
            first, size = end - left, min(stop - start, left)
            if found and found[-1].shard == shard and found[-1].stop == first:
                found[-1] = Piece(shard, found[-1].start, first + size)
            else:
                found.append(Piece(shard, first, first + size))
            start += size
    return found


def halve_largest(pieces: Sequence[Piece], num_wanted: int) -> list[Piece]:
    """Cut pieces of shards in halves, the largest first, until there are so many of them."""
    pieces = list(pieces)
    while pieces and len(pieces) < num_wanted:
        largest = max(pieces, key=lambda piece: piece.stop - piece.start)
        shard, start, stop = largest
        if stop - start < 2:
            break
        at = pieces.index(largest)
        middle = (start + stop) // 2
        pieces[at : at + 1] = [Piece(shard, start, middle), Piece(shard, middle, stop)]
    return pieces


def join_near(
    pieces: Sequence[Piece], table: ShardTable, *, max_gap_bytes: int, max_samples: int
) -> list[list[Piece]]:
    """Join pieces that follow one another in a shard, to be read in one go.

    Args:
        pieces: In the order of the row.
        table: Where the samples lie.
        max_gap_bytes: The longest gap between two of them to read over.
        max_samples: Of pieces that are joined, so that there is something left to mix.
    """
    groups: list[list[Piece]] = []
    last_bytes, num_samples = ByteRange(0, 0), 0
    for piece in pieces:
        size = piece.stop - piece.start
        place = table.find_bytes(*piece)
        is_near = (
            bool(groups)
            and groups[-1][-1].shard == piece.shard
            and 0 <= place.start - last_bytes.stop <= max_gap_bytes
        )
        if is_near and num_samples + size <= max_samples:
            groups[-1].append(piece)
            num_samples += size
        else:
            groups.append([piece])
            num_samples = size
        last_bytes = place
    return groups


def plan_segments(
    table: ShardTable,
    row: Sequence[Piece],
    reader: Reader,
    *,
    uneven: Uneven,
    batch_size: int | None,
    shuffle: random.Random | None,
    num_open: int,
) -> list[Segment]:
    """Plan what a reader reads, in its order.

    Args:
        table: Where the samples lie.
        row: The samples, as all readers have them.
        reader: Who reads.
        uneven: As of `rank_span`.
        batch_size: As of `worker_spans`.
        shuffle: Shuffles the segments; None: batches of all workers come in the order of the row.
        num_open: Segments that are read at once, of which shuffled samples are mixed.
    """
    num_samples = sum(stop - start for _, start, stop in row)
    span = rank_span(num_samples, reader.rank, reader.world_size, uneven)
    spans = worker_spans(
        span,
        reader.worker,
        reader.num_workers,
        batch_size,
        strided=shuffle is None and batch_size is not None,
    )
    pieces = cut_row(spans, row)
    if shuffle is None:
        return [table.segment([piece]) for piece in pieces]
    if len(pieces) < num_open:
        groups = [[piece] for piece in halve_largest(pieces, num_open)]
    else:
        num_mine = sum(stop - start for _, start, stop in pieces)
        groups = join_near(
            pieces, table, max_gap_bytes=MAX_GAP_BYTES, max_samples=-(-num_mine // num_open)
        )
    shuffle.shuffle(groups)
    return [table.segment(group) for group in groups]


def plan_whole_shards(order: Sequence[int], reader: Reader) -> list[Segment]:
    """Plan what a reader reads where it is not known what the shards hold: every so many-th."""
    mine = order[reader.rank :: reader.world_size][reader.worker :: reader.num_workers]
    return [Segment(shard) for shard in mine]
