"""Samples copied as they lie in their shards, headers and all: read by their byte ranges, checked.

The checksum of a copy is the one that the sample had where it was copied from: what changes on the
way is found when the copy is read.
"""

from __future__ import annotations

import collections
import tarfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.formats.crc32c import CrcTable, check_crc, crc32c
from concurrent_dataloader.formats.tar import BLOCK_BYTES, END_OF_ARCHIVE
from concurrent_dataloader.prepare.shard_set import Place, key_of
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import NO_LABEL, SampleCrcs, ShardIndex, ShardIndexBuilder
from concurrent_dataloader.stores import Store
from concurrent_dataloader.threads import FutureThreads

READ_BYTES = 2 << 20
"""Samples that lie side by side are read in pieces of this size, or of one sample."""

_AHEAD_BYTES = 64 << 20
_AHEAD_READS = 64

Positions = Sequence[int] | NDArray[np.int64]


class Piece(NamedTuple):
    """Samples that lie side by side."""

    content: Buffer
    crcs: list[SampleCrcs]
    """Of each."""


class PlannedRead(NamedTuple):
    """A read of samples that lie side by side."""

    shard: int
    byte_range: ByteRange
    positions: list[int]


def read_extents(
    index: ShardIndex, positions: Positions, places: Sequence[Place]
) -> Generator[Piece]:
    """Read samples one after the other, and compare them with the checksums of the index.

    Those that lie side by side are read together; several reads are under way at once. What is held
    in memory does not depend on the number of samples. What does not fit its checksum is read once
    more.

    Args:
        index: Says where they lie.
        positions: Which, in which order.
        places: Of the index's shards.

    Yields:
        Whole samples. Close it, or read it to its end.

    Raises:
        ShardFormatError: What lies there is no sample.
        ChecksumError: A sample does not fit its checksum.
        StoreError: It cannot be read.
    """

    def read(planned: PlannedRead) -> Piece:
        store, name = places[planned.shard]
        piece = store.get(name, planned.byte_range)
        _check_size(piece, planned, store.describe(name))
        _check_header(piece, planned, store.describe(name))
        crcs = _find_crcs(index, planned, piece)
        if any(crc.extent != index.extent_crc(at) for at, crc in crcs.items() if _knows(index, at)):
            piece = store.get(name, planned.byte_range)
            _check_size(piece, planned, store.describe(name))
            _check_piece(index, planned, piece, store, name)
            crcs = _find_crcs(index, planned, piece)
        return Piece(piece, list(crcs.values()))

    return _read_in_order(read, plan_reads(index, positions))


def _check_size(piece: Buffer, planned: PlannedRead, where: str) -> None:
    # What comes behind it in a copy would lie elsewhere than the index of the copy says.
    start, stop = planned.byte_range
    got = memoryview(piece).nbytes
    if got != stop - start:
        raise ShardFormatError(
            f"{where} [{start}, {stop}): got {got} bytes, expected {stop - start}; the shard was"
            " changed meanwhile, run the command again"
        )


def _check_header(piece: Buffer, planned: PlannedRead, where: str) -> None:
    try:
        tarfile.TarInfo.frombuf(bytes(memoryview(piece)[:BLOCK_BYTES]), "utf-8", "replace")
    except tarfile.HeaderError as error:
        start, stop = planned.byte_range
        raise ShardFormatError(
            f"{where} [{start}, {stop}): no header of a sample ({error}), expected one by the"
            " index, which is another set's: write it anew"
        ) from error


def _knows(index: ShardIndex, position: int) -> bool:
    return index.extent_crc(position) is not None


def _cut(
    index: ShardIndex, planned: PlannedRead, piece: Buffer
) -> Iterator[tuple[int, ByteRange, memoryview]]:
    view, begin = memoryview(piece).cast("B"), planned.byte_range.start
    for position in planned.positions:
        extent = index.extent(position)
        yield position, extent, view[extent.start - begin : extent.stop - begin]


def _find_crcs(index: ShardIndex, planned: PlannedRead, piece: Buffer) -> dict[int, SampleCrcs]:
    """Compute the checksums of extents; those of payloads too where the index has none."""
    found: dict[int, SampleCrcs] = {}
    for position, extent, view in _cut(index, planned, piece):
        payload_crc = index.payload_crc(position)
        if payload_crc is None:
            start, stop = index.payload(position)
            payload_crc = crc32c(view[start - extent.start : stop - extent.start])
        found[position] = SampleCrcs(crc32c(view), payload_crc)
    return found


def _check_piece(
    index: ShardIndex, planned: PlannedRead, piece: Buffer, store: Store, name: str
) -> None:
    for position, (start, stop), view in _cut(index, planned, piece):
        expected = index.extent_crc(position)
        if expected is not None:
            key = key_of(index.names.key(position))
            where = f"{store.describe(name)} [{start}, {stop}) {key!r}"
            check_crc(view, expected, where, "the index of the shards")


def plan_reads(index: ShardIndex, positions: Positions) -> Iterator[PlannedRead]:
    """Join the extents of samples that follow each other in their shard; pure."""
    numbers, extents = index.shard_numbers, index.extents
    shard, start, stop = -1, 0, 0
    members: list[int] = []
    for position in positions:
        number, (begin, end) = int(numbers[position]), extents[position].tolist()
        if number == shard and begin == stop and end - start <= READ_BYTES:
            stop = end
            members.append(int(position))
            continue
        if members:
            yield PlannedRead(shard, ByteRange(start, stop), members)
        shard, start, stop, members = number, begin, end, [int(position)]
    if members:
        yield PlannedRead(shard, ByteRange(start, stop), members)


def _read_in_order(
    read: Callable[[PlannedRead], Piece], planned: Iterable[PlannedRead]
) -> Generator[Piece]:
    threads = FutureThreads(_AHEAD_READS, "read-ahead")
    waiting: collections.deque[tuple[Future[Piece], int]] = collections.deque()
    ahead_bytes = 0

    try:
        for each in planned:
            size = each.byte_range.stop - each.byte_range.start
            while waiting and (ahead_bytes + size > _AHEAD_BYTES or len(waiting) >= _AHEAD_READS):
                first, first_size = waiting.popleft()
                yield first.result()
                ahead_bytes -= first_size
            waiting.append((threads.submit(read, each), size))
            ahead_bytes += size
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        threads.stop()


class Copies:
    """A shard into which samples are copied one after the other."""

    def __init__(self, index: ShardIndex, positions: Positions) -> None:
        """Tell where copies will lie.

        Args:
            index: Says where the samples lie now.
            positions: Which, in which order.
        """
        self._index = index
        self._positions = positions
        old = index.extents[np.asarray(positions, np.int64)].reshape(-1, 2)
        stops = np.cumsum(old[:, 1] - old[:, 0])
        starts = stops - (old[:, 1] - old[:, 0])
        payloads = np.array([index.payload(int(position)) for position in positions], np.int64)
        self.extents: NDArray[np.int64] = np.stack([starts, stops], axis=1)
        """Start and stop of each sample, (n, 2)."""
        self.payloads: NDArray[np.int64] = payloads.reshape(-1, 2) + (starts - old[:, 0])[:, None]
        """Start and stop of each sample's payload, (n, 2)."""
        self.size_bytes = (int(stops[-1]) if len(stops) else 0) + len(END_OF_ARCHIVE)
        """Of the shard, its end included."""
        self._crcs: list[SampleCrcs] = []

    def read(self, places: Sequence[Place]) -> Generator[Buffer]:
        """Yield the content of the shard, piece by piece; raises what `read_extents` does."""
        pieces = read_extents(self._index, self._positions, places)
        try:
            for piece in pieces:
                self._crcs += piece.crcs
                yield piece.content
        finally:
            pieces.close()
        yield END_OF_ARCHIVE

    @property
    def crcs(self) -> NDArray[np.int64]:
        """CRC-32C of extent and payload of each sample that was read, (n, 2)."""
        return np.array(self._crcs, np.int64).reshape(-1, 2)

    @property
    def crc32c(self) -> str:
        """Of the whole shard, in hex, by those of the samples; known once all is read."""
        table = CrcTable()
        sizes = (self.extents[:, 1] - self.extents[:, 0]).tolist()
        for crcs, size in zip(self._crcs, sizes, strict=True):
            table.add(crcs.extent, size)
        table.add(crc32c(END_OF_ARCHIVE), len(END_OF_ARCHIVE))
        return table.of_all()


def add_copies(
    builder: ShardIndexBuilder,
    index: ShardIndex,
    positions: Positions,
    extents: NDArray[np.int64],
    payloads: NDArray[np.int64],
    crcs: NDArray[np.int64],
) -> None:
    """Add samples to the index of the shard that they were copied to."""
    labels = index.labels
    places = zip(positions, extents.tolist(), payloads.tolist(), crcs.tolist(), strict=True)
    for position, extent, payload, sample_crcs in places:
        label = NO_LABEL if labels is None else int(labels[position])
        builder.add_sample(
            index.names.key(int(position)),
            ByteRange(*extent),
            ByteRange(*payload),
            None if label == NO_LABEL else label,
            SampleCrcs(*sample_crcs),
        )
