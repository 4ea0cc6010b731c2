"""Where the bytes of samples lie: objects of a store, or byte ranges of some of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.errors import ByteRangeError, ShardFormatError
from concurrent_dataloader.formats.crc32c import check_crc, crc32c
from concurrent_dataloader.index import Index
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import NO_CRC, ShardIndex
from concurrent_dataloader.stores import Store

_START_BITS = 44  # 16 TiB in each of half a million archives


class Places(Protocol):
    """Where each of many files lies, by position; pickles, and may be read from many threads."""

    def read(self, position: int) -> Buffer:
        """Read a file."""
        ...

    def describe(self, position: int) -> str:
        """Name a file for a person."""
        ...

    def select(self, positions: NDArray[np.int64]) -> Places:
        """Give some of them, in the order given."""
        ...

    def close(self) -> None:
        """Give back what this process has opened."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ObjectPlaces:
    """Each file is an object."""

    store: Store
    keys: Index

    def read(self, position: int) -> Buffer:
        """Read a file."""
        return self.store.get(self.keys.key(position))

    def describe(self, position: int) -> str:
        """Name a file for a person."""
        return self.store.describe(self.keys.key(position))

    def select(self, positions: NDArray[np.int64]) -> Self:
        """Give some of them, in the order given."""
        return dataclasses.replace(self, keys=self.keys.select(positions))

    def close(self) -> None:
        """Give back what this process has opened."""
        self.store.close()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RangePlaces:
    """Each file is a byte range of an archive: one ranged read.

    Shapes:
        archive: (N,) int32, the number of its archive in ``keys``.
        ranges: (N, 2) int64, start and stop.
        crcs: (N,) int64, the CRC-32C that an index beside shards has of it; `NO_CRC`: none.
    """

    store: Store
    keys: tuple[str, ...]
    archive: NDArray[np.int32]
    ranges: NDArray[np.int64]
    crcs: NDArray[np.int64] | None = None

    def read(self, position: int) -> Buffer:
        """Read a file, once more if it does not fit its checksum.

        Raises:
            ShardFormatError: The archive is shorter than it was.
            ChecksumError: The file was changed after it was packed.
        """
        raw = self._read(position)
        expected = NO_CRC if self.crcs is None else int(self.crcs[position])
        if expected != NO_CRC and crc32c(raw) != expected:
            raw = self._read(position)
            check_crc(raw, expected, self.describe(position), "the index beside it")
        return raw

    def _read(self, position: int) -> Buffer:
        key, byte_range = self._place(position)
        try:
            return self.store.get(key, byte_range)
        except ByteRangeError as error:
            raise ShardFormatError(
                f"{error}; the archive has changed since it was opened"
            ) from error

    def describe(self, position: int) -> str:
        """Name a file for a person."""
        key, byte_range = self._place(position)
        return f"{self.store.describe(key)} [{byte_range.start}, {byte_range.stop})"

    def select(self, positions: NDArray[np.int64]) -> Self:
        """Give some of them, in the order given."""
        return dataclasses.replace(
            self,
            archive=self.archive[positions],
            ranges=self.ranges[positions],
            crcs=None if self.crcs is None else self.crcs[positions],
        )

    def with_crcs(self, indexes: Iterable[ShardIndex]) -> Self:
        """Give a twin that knows the checksums that indexes beside the archives have."""
        crcs = np.full(len(self.archive), NO_CRC, np.int64)
        numbers = {key: number for number, key in enumerate(self.keys)}
        mine = _place_numbers(self.archive, self.ranges)
        for index in indexes:
            if index.crcs is None or index.kind != "tar":
                continue
            archives = np.array([numbers.get(shard.name, -1) for shard in index.shards], np.int64)
            payloads, payload_crcs = index.payloads, index.crcs[:, 1]
            theirs = _place_numbers(archives[index.shard_numbers], payloads)
            order = np.argsort(theirs)
            found = order[np.searchsorted(theirs, mine, sorter=order).clip(max=len(order) - 1)]
            is_same = (theirs[found] == mine) & (payloads[found, 1] == self.ranges[:, 1])
            crcs[is_same] = payload_crcs[found[is_same]]
        return dataclasses.replace(self, crcs=crcs)

    def close(self) -> None:
        """Give back what this process has opened."""
        self.store.close()

    def _place(self, position: int) -> tuple[str, ByteRange]:
        row: Any = self.ranges[position]
        return self.keys[int(self.archive[position])], ByteRange(*row.tolist())


def _place_numbers(archive: NDArray[Any], ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give a number for each archive and start in it; negative where there is no archive."""
    return (archive.astype(np.int64) << _START_BITS) + ranges[:, 0]
