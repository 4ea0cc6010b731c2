"""Bytes by key: what a store can do, and nothing about what the bytes mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

from typing_extensions import Buffer

from concurrent_dataloader.ranges import ByteRange


class ObjectInfo(NamedTuple):
    """What a listing says of one object."""

    key: str
    size_bytes: int


@runtime_checkable
class Store(Protocol):
    """A flat namespace of objects, read by key.

    A store is a value: it pickles, compares by its settings, and opens its client on first use in each
    process, so that nothing of a parent's client lives on after a fork. `close` gives back the client of
    the calling process; a store that was closed opens a new one when it is used again.
    """

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read an object, or a part of it. Blocks. May be called from many threads at once.

        Args:
            key: Name of the object, without bucket and prefix.
            byte_range: Bytes to read; the whole object when None.

        Returns:
            Exactly the bytes asked for, read-only; may share memory with the client.

        Raises:
            KeyNotFoundError: There is no such object.
            AccessDeniedError: The store refuses these credentials.
            ByteRangeError: The object ends before ``byte_range.stop``.
            StoreUnavailableError: It failed in each allowed attempt.
        """
        ...

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `get` does, without blocking the event loop."""
        ...

    def describe(self, key: str) -> str:
        """Name the object for a person, such as ``s3://bucket/prefix/key``; holds no secret."""
        ...

    def close(self) -> None:
        """Give back what this process has opened. May be called twice."""
        ...


@runtime_checkable
class WritableStore(Store, Protocol):
    """A store that can also be listed and written, which preparing a data set needs."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List the objects whose key begins with ``prefix``, sorted by key, page by page."""
        ...

    def head(self, key: str) -> ObjectInfo:
        """Ask for an object's size; raises as `Store.get` does."""
        ...

    def put(self, key: str, body: Buffer) -> None:
        """Write an object whole; readers see the old one or the new one, never a part."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        ...
