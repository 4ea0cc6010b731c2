"""What shards there are, and how the samples of a part of one are found in its bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.datasets._sample_checks import SampleChecks
from concurrent_dataloader.datasets._shard_streams import (
    Decompressed,
    ShardBytes,
    Stream,
    describe_command,
    is_compressed,
    skip,
)
from concurrent_dataloader.datasets._split import Segment
from concurrent_dataloader.datasets.contract import BytesKind, SampleLocation
from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.formats.tar import Sample, parse_sample, read_samples
from concurrent_dataloader.formats.tfrecord import (
    iter_records,
    parse_image_example,
    parse_record,
)
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_names import find_kind
from concurrent_dataloader.stores.base import Store


class ShardList:
    """Shards, and what their samples are read by. Pickles."""

    def __init__(
        self,
        store: Store,
        keys: Sequence[str],
        sizes: Sequence[int | None],
        *,
        are_commands: bool = False,
        repeated: Sample | None = None,
        checks: SampleChecks | None = None,
    ) -> None:
        """Name the shards.

        Args:
            store: Where they lie.
            keys: Their keys in it; or commands.
            sizes: Bytes of each; None where that is not known, and it is read by one request.
            are_commands: Whether ``keys`` are commands.
            repeated: The sample of which made-up shards consist; segments then count samples.
            checks: What samples are compared with, where an index says it.
        """
        self.store = store
        self.keys = tuple(keys)
        self.sizes = tuple(sizes)
        self.are_commands = are_commands
        self.repeated = repeated
        self.checks = checks
        self.extents: NDArray[np.int64] | None = None
        """Start and stop of each sample of the index, (N, 2); None without one."""

    def __len__(self) -> int:
        return len(self.keys)

    def describe(self, shard: int) -> str:
        """Name a shard for a person."""
        key = self.keys[shard]
        if self.repeated is not None:
            return key
        return describe_command(key) if self.are_commands else self.store.describe(key)

    @property
    def has_ranges(self) -> bool:
        """Whether a sample can be read without what comes before it."""
        return not self.are_commands and not any(is_compressed(key) for key in self.keys)

    def is_records(self, shard: int) -> bool:
        """Whether a shard is a TFRecord file."""
        return find_kind(self.keys[shard]) == "tfrecord" and not self.are_commands

    def locate(
        self, shard: int, byte_range: ByteRange | None, sample: str = "", *, is_checked: bool = True
    ) -> SampleLocation:
        """Say where something lies, for reports.

        Args:
            shard: Its number.
            byte_range: Of the unpacked shard; None: all of it, or not known.
            sample: Its key, of a single one.
            is_checked: Whether it is to look as an image is stored; else it is any bytes.
        """
        if not self.has_ranges:
            byte_range = None
        kind: BytesKind = "tfrecord" if self.is_records(shard) else "tar"
        key = self.describe(shard) if self.are_commands else self.keys[shard]
        return SampleLocation(key, byte_range, sample, kind if is_checked else "bytes")

    def bytes_of(self, segment: Segment, offset: int | None) -> ShardBytes:
        """Say what to read for a segment; ``offset``: where its next sample begins."""
        key = self.keys[segment.shard]
        if self.are_commands:
            return ShardBytes(key, None, is_command=True)
        size = self.sizes[segment.shard]
        if segment.byte_range is not None:
            start, stop = segment.byte_range
            place = ByteRange(start if offset is None else offset, stop)
            return ShardBytes(key, place, has_end=self.is_records(segment.shard))
        if size is None:
            return ShardBytes(key, None)
        return ShardBytes(key, ByteRange(offset or 0, size))

    def parse(self, shard: int, raw: Buffer) -> Sample:
        """Read the one sample of which ``raw`` is the extent."""
        where = self.describe(shard)
        if not self.is_records(shard):
            return parse_sample(raw, where)
        return _sample_of_record(parse_record(raw, where), ByteRange(0, 0), where)

    def checked(self, shard: int, place: int | None, sample: Sample) -> Sample:
        """Give a sample whose payload is what was written, read once more if it was not.

        Raises:
            ChecksumError: It was not again.
        """
        if self.checks is None or place is None or not self.checks.is_changed(place, sample):
            return sample
        raw = self.store.get(self.keys[shard], sample.extent)
        again = self.parse(shard, raw)._replace(extent=sample.extent)
        self.checks.refuse_changed(place, again, self.describe(shard))
        return again

    def iter_samples(
        self, segment: Segment, stream: Stream | None, offset: int | None, num_read: int
    ) -> Iterator[Sample]:
        """Read the samples of a segment from where it begins, or after ``num_read`` of them.

        Args:
            segment: What to read.
            stream: Its bytes, from ``offset`` on.
            offset: Where the next sample may begin; None: at the begin of the segment.
            num_read: Samples before it.
        """
        if self.repeated is not None:
            for place in each_place(segment, num_read):
                yield self.repeated._replace(extent=ByteRange(place, place + 1))
            return
        assert stream is not None, "only made-up shards have none"
        if segment.picked:
            yield from self._iter_picked(segment, stream, offset, num_read)
            return
        where = self.describe(segment.shard)
        if self.sizes[segment.shard] == 0:
            raise ShardFormatError(
                f"{where}: got 0 bytes, expected a shard; fetch or write it anew"
            )
        begin = segment.byte_range.start if segment.byte_range is not None else 0
        here = begin if offset is None else offset
        file: Stream | Decompressed = stream
        if not self.are_commands and is_compressed(self.keys[segment.shard]):
            file = Decompressed(stream, self.keys[segment.shard], where)
        is_sought = self.has_ranges and self.sizes[segment.shard] is not None
        if not is_sought and segment.byte_range is None:
            skip(file, here)
        if self.is_records(segment.shard):
            yield from _iter_record_samples(file, where, here)
            return
        yield from read_samples(file, where, offset=here)
        if not self.has_ranges:
            file.read_to_end()  # how a command ends, or a checksum, says whether it is whole

    def _iter_picked(
        self, segment: Segment, stream: Stream, offset: int | None, num_read: int
    ) -> Iterator[Sample]:
        """Read samples between which others lie: these are passed over without being looked at."""
        assert segment.byte_range is not None, "there is an index"
        assert self.extents is not None, "there is an index"
        here = segment.byte_range.start if offset is None else offset
        for place in each_place(segment, num_read):
            extent = ByteRange(*self.extents[place].tolist())
            skip(stream, extent.start - here)
            raw = stream.read(extent.stop - extent.start)
            here = extent.stop
            yield self.parse(segment.shard, raw)._replace(extent=extent)


def each_place(segment: Segment, num_read: int) -> Iterator[int]:
    """Give the places in the index of a segment's samples, but for the first ones."""
    return itertools.chain(*itertools.starmap(range, segment.spans_after(num_read)))


def _iter_record_samples(file: Any, where: str, offset: int) -> Iterator[Sample]:
    for record in iter_records(file, where, start=offset):
        yield _sample_of_record(record.payload, record.byte_range, where)


def _sample_of_record(payload: Buffer, extent: ByteRange, where: str) -> Sample:
    """Give a record the fields that it would have in a tar; the class as the record counts it."""
    example = parse_image_example(
        payload, label_base=0, num_classes=None, where=f"{where} at {extent.start}"
    )
    fields = {"img": example.encoded}
    if example.label is not None:
        fields["cls"] = b"%d" % example.label
    box = example.box
    fields["json"] = orjson.dumps({"bbox": None if box is None else list(box)})
    key = str(extent.start) if example.filename is None else example.filename.rpartition(".")[0]
    return Sample(key or str(example.filename), fields, extent)
