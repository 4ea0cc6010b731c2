"""The samples of one reader: several shards at once, mixed in a buffer, resumable by offset.

```text
segments -> slots, a sample from each in turn -> buffer, one drawn of it -> samples
```

The order depends on the segments, the settings and the seed, never on how fast bytes come.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from concurrent_dataloader.datasets._shard_samples import ShardList, each_place
from concurrent_dataloader.datasets._shard_streams import ReadAhead, ShardBytes
from concurrent_dataloader.datasets._split import MAX_GAP_BYTES, Segment
from concurrent_dataloader.datasets.contract import Loss
from concurrent_dataloader.errors import LoaderError, ShardFormatError
from concurrent_dataloader.formats.tar import Sample
from concurrent_dataloader.ranges import ByteRange, cover, merge_near

MIN_BUFFERED = 100
"""Samples in the buffer when the first is drawn of it: the first batch does not wait for it to be
full. It grows by one with each sample drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReadSettings:
    """How a worker reads its shards; the defaults hold 32 MiB a worker."""

    num_open: int = 4
    """Shards of which samples are taken in turn, when they are shuffled; else it is one."""

    part_bytes: int = 4 << 20
    """Bytes of a request."""

    max_parts: int = 8
    """Parts that are under way, or have come and were not used."""

    def __post_init__(self) -> None:
        for name, least in (("num_open", 1), ("part_bytes", 512), ("max_parts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {least} or more")


class RawSample(NamedTuple):
    """A sample as it was read."""

    segment: int
    """Number of its segment in the reader's list."""

    place: int | None
    """Of the sample in the index; None without one."""

    sample: Sample


class _Slot:
    """A segment that is being read, and how far."""

    def __init__(
        self,
        number: int,
        segment: Segment,
        shards: ShardList,
        ahead: ReadAhead,
        report: Callable[[Loss], None] | None,
        offset: int | None = None,
        num_read: int = 0,
    ) -> None:
        self.number = number
        self.offset = offset
        self.num_read = num_read
        self._report = report
        self._shards = shards
        self._segment = segment
        self._ahead = ahead
        self._stream = None if shards.repeated is not None else ahead.open_next()
        self._samples = shards.iter_samples(segment, self._stream, offset, num_read)
        # Of the samples that are left; without end, since there may be more than the index says.
        self._places: Iterator[int | None] = itertools.repeat(None)
        if segment.first is not None:
            self._places = itertools.chain(each_place(segment, num_read), self._places)
        self._last_key: str | None = None

    def read(self) -> RawSample | None:
        """Read the next sample that can be had; None at the end.

        Raises:
            LoaderError: One cannot be had, and nobody wants a report instead.
        """
        while True:
            place = next(self._places)
            try:
                sample = next(self._samples, None)
                self._check_count(is_over=sample is None)
                if sample is not None and self._report is not None:
                    self._check_place(place, sample)
            except LoaderError as error:
                self._lose(error, place, None)
                sample = None
            if sample is None:
                if self._stream is not None:
                    self._ahead.drop(self._stream)
                return None
            checked = None
            try:
                checked = self._shards.checked(self._segment.shard, place, sample)
            except LoaderError as error:
                self._lose(error, place, sample)
            self.offset = sample.extent.stop
            self.num_read += 1
            self._last_key = sample.key
            if checked is not None:
                return RawSample(self.number, place, checked)

    def _lose(self, error: LoaderError, place: int | None, sample: Sample | None) -> None:
        """Report the loss of a sample, or of the rest where None; raise if nobody wants that."""
        explained = self._explain(error)
        if self._report is None:
            raise explained from error
        explained.__cause__ = error
        shard = self._segment.shard
        if sample is not None:
            where, num_lost = self._shards.locate(shard, sample.extent, sample.key), 1
        else:
            expected = self._segment.num_samples
            num_lost = None if expected is None else max(1, expected - self.num_read)
            where = self._shards.locate(shard, self._find_rest())
        self._report(Loss(explained, where, place, num_lost))

    def _find_rest(self) -> ByteRange | None:
        """Give what was not delivered of the segment; None: all of it, or it is not known where."""
        start, stop = self._segment.byte_range or (0, self._shards.sizes[self._segment.shard])
        start = start if self.offset is None else self.offset
        return None if stop is None or stop <= start else ByteRange(start, stop)

    def _check_place(self, place: int | None, sample: Sample) -> None:
        """Refuse a sample that is not where the index has it: the next would get its label."""
        extents = self._shards.extents
        if place is None or extents is None:
            return
        expected = ByteRange(*extents[place].tolist())
        if sample.extent != expected:
            raise ShardFormatError(
                f"{self._shards.describe(self._segment.shard)}: got sample {sample.key!r} in "
                f"{sample.extent}, expected one in {expected}, as the index says; the shard is "
                "damaged, fetch or write it anew"
            )

    def _check_count(self, *, is_over: bool) -> None:
        expected = self._segment.num_samples
        if expected is None or (self.num_read == expected if is_over else self.num_read < expected):
            return
        got = f"{self.num_read}" if is_over else f"more than {expected}"
        raise ShardFormatError(
            f"{self._shards.describe(self._segment.shard)}: got {got} samples in "
            f"{self._segment.byte_range}, expected {expected}; the index does not belong to the "
            "shards, write it anew with `concurrent-dataloader index`"
        )

    def _explain(self, error: LoaderError) -> LoaderError:
        where = self._shards.describe(self._segment.shard)
        what = str(error) if where in str(error) else f"{where}: {error}"
        if self._last_key is None:
            return type(error)(f"{what}; no sample of it was read before")
        return type(error)(f"{what}; the sample read before it was {self._last_key!r}")


class ShardReader:
    """An iterator over the samples of some segments. One thread may use it; close it at the end."""

    def __init__(
        self,
        shards: ShardList,
        segments: Sequence[Segment],
        settings: ReadSettings,
        *,
        buffer_size: int,
        seed: str,
        state: Mapping[str, Any] | None = None,
        report: Callable[[Loss], None] | None = None,
    ) -> None:
        """Begin to read.

        Args:
            shards: The shards.
            segments: What to read of them, in this order.
            settings: How.
            buffer_size: Samples of which the next one is drawn; 1: they keep their order, and
                segments are read one after the other.
            seed: Seeds the draws.
            state: What `state` gave of a reader that was made alike: go on there.
            report: Told of a sample that cannot be had, and of the rest of a segment that cannot,
                which is then passed over; None: their errors are raised.
        """
        self._shards = shards
        self._segments = segments
        self._settings = settings
        self._num_open = settings.num_open if buffer_size > 1 else 1
        self._buffer_size = buffer_size
        self._rng = random.Random(seed)
        self._buffer: list[RawSample] = []
        self._target = min(buffer_size, MIN_BUFFERED)
        self._slots: list[_Slot] = []
        self._cursor = 0
        self._next_segment = 0
        self.num_delivered = 0
        self.has_lost = False
        """Whether anything was passed over."""
        self._report = None if report is None else functools.partial(self._note, report)
        self._is_replaying = False
        opened: Sequence[Sequence[Any]] = []
        if state is not None and shards.has_ranges:
            opened, self._next_segment = state["slots"], state["next_segment"]
        self._ahead = ReadAhead(
            shards.store,
            self._plan_bytes(opened),
            part_bytes=settings.part_bytes,
            max_parts=settings.max_parts,
            num_open=self._num_open,
        )
        try:
            if state is not None:
                self._restore(state)
        except BaseException:
            self.close()
            raise

    def _plan_bytes(self, opened: Sequence[Sequence[Any]]) -> list[ShardBytes]:
        if self._shards.repeated is not None:
            return []
        places = [(self._segments[number], offset) for number, offset, _ in opened]
        places += [(segment, None) for segment in self._segments[self._next_segment :]]
        return [self._shards.bytes_of(segment, offset) for segment, offset in places]

    def __iter__(self) -> ShardReader:
        """Give itself."""
        return self

    def __next__(self) -> RawSample:
        """Give the next sample; waits for its bytes.

        Raises:
            LoaderError: It cannot be read; says of which shard, and after which sample.
        """
        if self._buffer_size <= 1:
            raw = self._read()
            if raw is None:
                raise StopIteration
            self.num_delivered += 1
            return raw
        buffer = self._buffer
        while len(buffer) < self._target:
            raw = self._read()
            if raw is None:
                self._target = 0
                break
            buffer.append(raw)
        if not buffer:
            raise StopIteration
        # Drawn while it is as large as was said; the last one takes the free place.
        place = self._rng.randrange(len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        drawn = buffer.pop()
        if self._target:
            self._target = min(self._target + 1, self._buffer_size)
        self.num_delivered += 1
        return drawn

    def shard_of(self, raw: RawSample) -> int:
        """Give the number of the shard that holds a sample."""
        return self._segments[raw.segment].shard

    def _read(self) -> RawSample | None:
        """Read a sample of the slot whose turn it is; None when all is read."""
        while len(self._slots) < self._num_open and self._open_slot(len(self._slots)):
            pass
        while self._slots:
            self._cursor %= len(self._slots)
            slot = self._slots[self._cursor]
            raw = slot.read()
            if raw is not None:
                self._cursor += 1
                return raw
            del self._slots[self._cursor]
            self._open_slot(self._cursor)
        return None

    def _open_slot(self, place: int) -> bool:
        if self._next_segment == len(self._segments):
            return False
        number = self._next_segment
        self._next_segment += 1
        self._slots.insert(place, self._make_slot(number))
        return True

    def _make_slot(self, number: int, offset: int | None = None, num_read: int = 0) -> _Slot:
        return _Slot(
            number,
            self._segments[number],
            self._shards,
            self._ahead,
            self._report,
            offset,
            num_read,
        )

    def _note(self, report: Callable[[Loss], None], loss: Loss) -> None:
        if not self._is_replaying:  # else it was reported when it was first read
            report(loss)
        self.has_lost = True

    def close(self) -> None:
        """End what runs. May be called twice."""
        self._ahead.close()
        self._slots = []
        self._buffer = []

    # -- resuming

    def state(self) -> dict[str, Any]:
        """Say how far it is: numbers, lists and strings."""
        version, words, gauss = self._rng.getstate()
        return {
            "num_delivered": self.num_delivered,
            "slots": [[slot.number, slot.offset, slot.num_read] for slot in self._slots],
            "cursor": self._cursor,
            "next_segment": self._next_segment,
            "buffer": [[raw.segment, raw.place, *raw.sample.extent] for raw in self._buffer],
            "target": self._target,
            "rng": [version, list(words), gauss],
            "has_lost": self.has_lost,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        if not self._shards.has_ranges:  # what was delivered is read again, and not decoded
            self._is_replaying = True
            for _ in range(state["num_delivered"]):
                next(self)
            self._is_replaying = False
            return
        self.has_lost = state.get("has_lost", False)
        self._slots = [self._make_slot(*opened) for opened in state["slots"]]
        self._cursor = state["cursor"]
        self._target = state["target"]
        self.num_delivered = state["num_delivered"]
        version, words, gauss = state["rng"]
        self._rng.setstate((version, tuple(words), gauss))
        self._buffer = self._fetch_again(state["buffer"])

    def _fetch_again(self, places: Sequence[Sequence[Any]]) -> list[RawSample]:
        """Fetch the samples that lay in the buffer, near ones by one request, in their order.

        One that cannot be had any more is passed over, if it may be.
        """
        shards = self._shards
        if shards.repeated is not None:
            sample = shards.repeated
            return [
                RawSample(number, place, sample._replace(extent=ByteRange(start, stop)))
                for number, place, start, stop in places
            ]
        by_shard: dict[int, list[int]] = {}
        for at, (number, *_) in enumerate(places):
            by_shard.setdefault(self._segments[number].shard, []).append(at)
        requests: list[tuple[int, list[int], ByteRange]] = []
        for shard, members in by_shard.items():
            ranges = [ByteRange(*places[at][2:]) for at in members]
            for group in merge_near(
                ranges, max_gap_bytes=MAX_GAP_BYTES, max_length_bytes=self._settings.part_bytes
            ):
                chosen = [ranges[member] for member in group]
                requests.append((shard, [members[member] for member in group], cover(chosen)))
        futures = [
            self._ahead.submit(shards.store.get, shards.keys[shard], byte_range)
            for shard, _, byte_range in requests
        ]
        found: dict[int, RawSample] = {}
        for (shard, members, (begin, _)), future in zip(requests, futures, strict=True):
            for at in members:
                number, place, start, stop = places[at]
                extent = ByteRange(start, stop)
                try:
                    view = memoryview(future.result()).cast("B")[start - begin : stop - begin]
                    sample = shards.parse(shard, view)._replace(extent=extent)
                    found[at] = RawSample(number, place, shards.checked(shard, place, sample))
                except LoaderError as error:
                    if self._report is None:
                        raise
                    self._report(Loss(error, shards.locate(shard, extent), place, 1))
        return [found[at] for at in range(len(places)) if at in found]
