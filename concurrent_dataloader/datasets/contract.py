"""What the loader needs of a dataset: I/O, pure work and random work kept apart."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch.utils.data import Dataset
from typing_extensions import Buffer

from concurrent_dataloader.errors import StoreUnavailableError
from concurrent_dataloader.ranges import ByteRange

D = TypeVar("D")
S = TypeVar("S", covariant=True)


BytesKind = Literal["tar", "tfrecord", "object", "payload", "lmdb", "bytes"]
"""What lies somewhere: a tar sample with headers, a framed record, an image file, one inside of
something, a database's record of number ``sample``; or bytes that only the dataset understands."""


class SampleLocation(NamedTuple):
    """Where a sample lies, for messages and reports."""

    key: str
    """The object or file, relative to the data set's root."""

    byte_range: ByteRange | None = None
    """None: all of it."""

    sample: str = ""
    """Its own key in there, where there are others."""

    kind: BytesKind = "bytes"

    def describe(self) -> str:
        """Name it for a person."""
        place = "" if self.byte_range is None else f" [{self.byte_range[0]}, {self.byte_range[1]})"
        return f"{self.key}{place}{f' {self.sample!r}' if self.sample else ''}"


class Loss(NamedTuple):
    """What a stream could not give, and goes on without: a sample, or the rest of a shard."""

    error: Exception
    location: SampleLocation

    position: int | None
    """Of the first of the samples in the index; None without one."""

    num_samples: int | None
    """None where that is not known."""


@runtime_checkable
class SkippingStream(Protocol):
    """An iterable dataset that can go on after what it cannot read."""

    def iter_skipping(self, report: Callable[[Loss], None]) -> Iterator[Any]:
        """Begin an epoch as ``__iter__`` does, and tell what is passed over.

        Args:
            report: Called in the iterating thread, before the next sample that comes; raises what
                must not be passed over, which then ends the iteration.
        """
        ...


class ReaderState(NamedTuple):
    """Where a stream stood in one of the processes that read it: a worker of a rank."""

    state: Mapping[str, Any]
    """What its ``state_dict`` gave there; or in the main process, if nothing was taken of it."""

    rank: int
    world_size: int
    worker: int

    num_workers: int
    """1 also without workers."""

    is_over: bool
    """Whether it had given all that it was to give in the epoch."""


@runtime_checkable
class ElasticStream(Protocol):
    """An iterable dataset whose epoch may go on with other ranks and workers."""

    def find_place(self) -> tuple[int, int]:
        """Give the rank that this process reads for, and the number of ranks."""
        ...

    def merge_states(self, readers: Sequence[ReaderState]) -> Mapping[str, Any]:
        """Part the rest of an epoch anew.

        Args:
            readers: All of this rank; or of all ranks, if there were as many as there are now no
                more. Those of other ranks may be among the former.

        Returns:
            A state for ``load_state_dict``, the same for each reader that goes on.

        Raises:
            ValueError: A reader is missing or came twice, they are in different epochs, or it
                cannot be parted.
        """
        ...


class StagedDataset(Dataset[S], abc.ABC, Generic[D, S]):
    """A map-style dataset in three stages, the first of which the loader overlaps with the others.

    ``fetch`` waits for bytes; it may run in any order, many at once. ``decode`` is pure: same
    bytes, same result, in any thread. ``apply_transform`` may draw random numbers; it runs in
    sampler order, in the worker's main thread, which is why batches are bit-identical to torch's.
    """

    @abc.abstractmethod
    def fetch(self, position: int) -> Buffer:
        """Read the raw bytes of the sample at ``position``.

        Blocks; called from many threads at once.
        """

    async def fetch_async(self, position: int) -> Buffer:
        """Read as `fetch` does, without blocking the event loop.

        Only ``fetch_impl="asyncio"`` calls it. The default runs `fetch` in the event loop's
        threads.
        """
        return await asyncio.to_thread(self.fetch, position)

    def plan_requests(self, positions: Sequence[int]) -> list[list[int]]:
        """Say which positions one request can serve, such as near ranges of one file. Pure.

        Args:
            positions: Those that are begun at the same time.

        Returns:
            Groups of indices into ``positions``, each of these in just one group, in the order in
            which the requests are to be made. The default: each alone.
        """
        return [[number] for number in range(len(positions))]

    def fetch_many(self, positions: Sequence[int]) -> Sequence[Buffer]:
        """Read the raw bytes of a group that `plan_requests` made, in its order.

        If it raises anything but a `StoreUnavailableError`, each is fetched by itself, so that the
        error reaches the sample that it belongs to.
        """
        return [self.fetch(position) for position in positions]

    async def fetch_many_async(self, positions: Sequence[int]) -> Sequence[Buffer]:
        """Read as `fetch_many` does, without blocking the event loop."""
        return [await self.fetch_async(position) for position in positions]

    @abc.abstractmethod
    def decode(self, position: int, raw: Buffer) -> D:
        """Turn raw bytes into a decoded sample. Pure."""

    @abc.abstractmethod
    def apply_transform(self, decoded: D) -> S:
        """Turn a decoded sample into the one to train on. May be random."""

    def locate_sample(self, position: int) -> SampleLocation | None:
        """Say where a sample lies, without asking the store; None: not known. The default."""
        del position
        return None

    def __getitem__(self, position: int) -> S:
        """Fetch, decode and transform one sample, as torch's own loader would have it."""
        return self.apply_transform(self.decode(position, self.fetch(position)))

    @property
    def __getitems__(self) -> Callable[[Sequence[int]], list[S]] | None:
        """What torch's own loader asks for a batch; None where it is to ask for each sample.

        Requests are then made as `plan_requests` says, one after the other; decoding and transforms
        follow in the order of the positions, so that batches are those of ``__getitem__``. None
        where each sample is a request of its own, and for a class that overrides ``__getitem__``,
        since what that adds would be left out.
        """
        kind = type(self)
        merges = kind.plan_requests is not StagedDataset.plan_requests
        return self._get_batch if merges and kind.__getitem__ is StagedDataset.__getitem__ else None

    def _get_batch(self, positions: Sequence[int]) -> list[S]:
        raws: dict[int, Buffer] = {}
        for numbers in self.plan_requests(positions):
            raws |= zip(numbers, self._fetch_group([positions[n] for n in numbers]), strict=True)
        return [
            self.apply_transform(self.decode(position, raws.pop(number)))
            for number, position in enumerate(positions)
        ]

    def _fetch_group(self, positions: Sequence[int]) -> Sequence[Buffer]:
        if len(positions) == 1:
            return [self.fetch(positions[0])]
        try:
            return self.fetch_many(positions)
        except StoreUnavailableError:
            raise
        except Exception:  # noqa: BLE001 - raised again by the sample that it belongs to
            return [self.fetch(position) for position in positions]
