"""Where the bytes of samples lie: objects of a store, or byte ranges of some of them."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.errors import ByteRangeError, ShardFormatError
from concurrent_dataloader.index import Index
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import Store


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
    """

    store: Store
    keys: tuple[str, ...]
    archive: NDArray[np.int32]
    ranges: NDArray[np.int64]

    def read(self, position: int) -> Buffer:
        """Read a file.

        Raises:
            ShardFormatError: The archive is shorter than it was.
        """
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
            self, archive=self.archive[positions], ranges=self.ranges[positions]
        )

    def close(self) -> None:
        """Give back what this process has opened."""
        self.store.close()

    def _place(self, position: int) -> tuple[str, ByteRange]:
        row: Any = self.ranges[position]
        return self.keys[int(self.archive[position])], ByteRange(*row.tolist())
