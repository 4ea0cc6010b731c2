"""A part of a data set's samples, kept in memory that all workers share, once they were read.

What is kept are the bytes as they came, not decoded images. The memory is there before workers
start, so that these map it however they are started, and those of the next epoch find what those of
the last one left. A sample's place holds a checksum of it, 0 as long as there is nothing:

```text
places   (K,) uint64   1 << 32 | checksum, written after the bytes
bodies   (sum of sizes,) uint8
```
"""

from __future__ import annotations

import concurrent.futures
import operator
import zlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import Buffer, override

from concurrent_dataloader import shared_memory
from concurrent_dataloader.datasets.contract import SampleLocation, StagedDataset
from concurrent_dataloader.datasets.indexed import IndexedDataset
from concurrent_dataloader.datasets.labelled import DecodedImage
from concurrent_dataloader.formats.crc32c import IS_FAST, crc32c
from concurrent_dataloader.stores.base import SizedStore

_checksum = crc32c if IS_FAST else zlib.crc32

_NUM_HEADS = 32
"""Objects whose size is asked for at once."""

_THERE = 1 << 32
_PLACE_BYTES = 8


class MemoryCachedDataset(StagedDataset[DecodedImage, Any]):
    """A data set of which a share is read from the store only once, by whichever worker is first.

    Items, their order and their random transforms are those of the data set inside. What that has
    beside them (``classes``, ``labels``, ``set_transform``, ...) is had from here as well.
    """

    dataset: IndexedDataset

    def __init__(self, dataset: IndexedDataset, ratio: float, *, seed: int = 0) -> None:
        """Reserve the memory; nothing is read yet. Sizes that the index lacks are asked for.

        Args:
            dataset: Whose samples to keep.
            ratio: Share of them, 0 keeps none, 1 all. What a smaller share keeps, a larger one
                keeps too.
            seed: Chooses which.

        Raises:
            TypeError: The data set is another one, or overrides ``__getitem__``.
            ValueError: ``ratio`` is not in 0 to 1, or neither index nor store tells sizes.
            StoreError: An object whose size is asked for is not there.
            MemoryError: There is not so much shared memory.
        """
        if not isinstance(dataset, IndexedDataset):  # pyright: ignore[reportUnnecessaryIsInstance]: a caller's
            raise TypeError(
                f"dataset: got a {type(dataset).__name__}, expected an S3Dataset, ScratchDataset"
                " or ShardDataset"
            )
        if type(dataset).__getitem__ is not StagedDataset.__getitem__:
            raise TypeError(
                f"dataset: got a class {type(dataset).__name__} with a __getitem__ of its own,"
                " which would not be called; override decode or apply_transform instead"
            )
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"ratio: got {ratio}, expected 0 to 1")
        self.dataset = dataset
        num_kept = round(ratio * len(dataset))
        chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:num_kept])
        self._slots = np.full(len(dataset), -1, np.int32)
        self._slots[chosen] = np.arange(num_kept)
        self._stops = np.cumsum(_sizes_of(dataset, chosen.tolist()), dtype=int)
        self._block = _reserve(_PLACE_BYTES * num_kept + self._num_body_bytes, ratio)
        self._views: tuple[NDArray[np.uint64], memoryview] | None = None

    @property
    def _num_body_bytes(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    @property
    def memory_bytes(self) -> int:
        """What it takes in all, however many workers there are."""
        return self._block.numel()

    @property
    def num_kept(self) -> int:
        """Samples that are there as of now."""
        return int(np.count_nonzero(self._map()[0]))

    def describe(self) -> str:
        """Say in words what is kept, and what that takes."""
        return (
            f"{len(self._stops):,} of {len(self):,} samples are kept in memory once they were read:"
            f" {self.memory_bytes / 1e6:,.1f} MB (10^6 bytes), shared by all workers"
        )

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._stops)} of {self.dataset!r})"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in self.__dict__:  # asked for while unpickled
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_views": None}

    # -- the three stages

    @override
    def fetch(self, position: int) -> Buffer:
        """Give what is kept, or read it as the data set inside does."""
        found = self._find(position)
        return self._keep(position, self.dataset.fetch(position)) if found is None else found

    @override
    async def fetch_async(self, position: int) -> Buffer:
        """Read as `fetch` does, without blocking the event loop."""
        found = self._find(position)
        if found is not None:
            return found
        return self._keep(position, await self.dataset.fetch_async(position))

    @override
    def plan_requests(self, positions: Sequence[int]) -> list[list[int]]:
        """Leave each that is kept alone, and plan the others as the data set inside does."""
        is_there = [self._is_there(position) for position in positions]
        others = [number for number, there in enumerate(is_there) if not there]
        planned = self.dataset.plan_requests([positions[number] for number in others])
        return [
            *([number] for number, there in enumerate(is_there) if there),
            *([others[place] for place in group] for group in planned),
        ]

    @override
    def fetch_many(self, positions: Sequence[int]) -> Sequence[Buffer]:
        """Read a group that `plan_requests` made."""
        raws = self.dataset.fetch_many(positions)
        return [self._keep(position, raw) for position, raw in zip(positions, raws, strict=True)]

    @override
    async def fetch_many_async(self, positions: Sequence[int]) -> Sequence[Buffer]:
        """Read as `fetch_many` does, without blocking the event loop."""
        raws = await self.dataset.fetch_many_async(positions)
        return [self._keep(position, raw) for position, raw in zip(positions, raws, strict=True)]

    @override
    def decode(self, position: int, raw: Buffer) -> DecodedImage:
        """Decode as the data set inside does."""
        return self.dataset.decode(position, raw)

    @override
    def apply_transform(self, decoded: DecodedImage) -> Any:
        """Transform as the data set inside does."""
        return self.dataset.apply_transform(decoded)

    @override
    def locate_sample(self, position: int) -> SampleLocation | None:
        """Say where it lies in the store."""
        return self.dataset.locate_sample(position)

    # -- the memory

    def _map(self) -> tuple[NDArray[np.uint64], memoryview]:
        if self._views is None:
            block = self._block.numpy()
            num_bytes = _PLACE_BYTES * len(self._stops)
            self._views = block[:num_bytes].view(np.uint64), block[num_bytes:].data
        return self._views

    def _slot(self, position: int) -> int:
        at = operator.index(position)
        return int(self._slots[at]) if -len(self) <= at < len(self) else -1

    def _is_there(self, position: int) -> bool:
        slot = self._slot(position)
        return slot >= 0 and bool(self._map()[0][slot])

    def _body(self, slot: int) -> memoryview:
        start = int(self._stops[slot - 1]) if slot else 0
        return self._map()[1][start : int(self._stops[slot])]

    def _find(self, position: int) -> Buffer | None:
        slot = self._slot(position)
        if slot < 0:
            return None
        place = int(self._map()[0][slot])
        body = self._body(slot).toreadonly()
        # Another worker may be writing it: then it is read anew.
        return body if place and place == _THERE | _checksum(body) else None

    def _keep(self, position: int, raw: Buffer) -> Buffer:
        slot = self._slot(position)
        if slot >= 0:
            body, read = self._body(slot), memoryview(raw)
            if body.nbytes == read.nbytes:  # else the object is not what the index says
                body[:] = read
                self._map()[0][slot] = _THERE | _checksum(raw)
        return raw


def _sizes_of(dataset: IndexedDataset, positions: list[int]) -> list[int]:
    sizes = [dataset.size_bytes(position) for position in positions]
    unknown = [number for number, size_bytes in enumerate(sizes) if size_bytes is None]
    if unknown:
        store = dataset.store
        if not isinstance(store, SizedStore):
            raise ValueError(
                f"{dataset!r}: neither index nor store tells how large samples are, which memory "
                "for them is reserved by; give the index sizes, or the store head()"
            )
        with concurrent.futures.ThreadPoolExecutor(_NUM_HEADS) as threads:
            keys = [dataset.key(positions[number]) for number in unknown]
            for number, info in zip(unknown, threads.map(store.head, keys), strict=True):
                sizes[number] = info.size_bytes
    return cast(list[int], sizes)


def _reserve(num_bytes: int, ratio: float) -> torch.Tensor:
    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    try:
        storage = shared_memory.reserve(num_bytes)
    except RuntimeError as error:
        raise MemoryError(
            f"ratio: {ratio:g} of the samples take {num_bytes / 1e6:,.1f} MB (10^6 bytes) of shared"
            f" memory, which cannot be had: {error}; keep less, or give it more (docker run"
            " --shm-size)"
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)
