"""A bucket: one client reads, boto3 lists and writes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from typing_extensions import Buffer, override

from concurrent_dataloader.errors import MissingDependencyError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores.address import ClientOptions, S3Address
from concurrent_dataloader.stores.base import ObjectInfo, PerProcess, SizedStore, ValueObject

if TYPE_CHECKING:
    from concurrent_dataloader.stores._boto3 import Boto3Store


class S3Store(ValueObject):
    """A store that any client reads and boto3 lists and writes.

    Writing, paging and uploading in parts are rare and full of detail, so they are done by one
    client. It is imported when the first of them is called: a worker that only reads does not pay
    for it.
    """

    def __init__(self, reader: SizedStore, address: S3Address, options: ClientOptions) -> None:
        self._reader = reader
        self._address = address
        self._options = options
        self._writer = PerProcess(partial(_open_writer, address, options), _close_writer)
        self.run_awaited = getattr(reader, "run_awaited", None)
        """Runs a coroutine in the reader's own event loop; None if it has none."""

    @override
    def _arguments(self) -> tuple[SizedStore, S3Address, ClientOptions]:
        return self._reader, self._address, self._options

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get` says."""
        return self._reader.get(key, byte_range)

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get_async` says."""
        return await self._reader.get_async(key, byte_range)

    def head(self, key: str) -> ObjectInfo:
        """Ask for an object's size."""
        return self._reader.head(key)

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return self._reader.describe(key)

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """List as `WritableStore.list` says."""
        return self._writer.get().list(prefix, start_after=start_after)

    def put(self, key: str, body: Buffer) -> None:
        """Write an object whole."""
        self._writer.get().put(key, body)

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._writer.get().delete(key)

    def close(self) -> None:
        """Give back what this process has opened."""
        self._reader.close()
        self._writer.close()


def _open_writer(address: S3Address, options: ClientOptions) -> Boto3Store:
    try:
        from concurrent_dataloader.stores._boto3 import Boto3Store
    except ImportError as error:
        raise MissingDependencyError(
            f"{address.describe('')}: {error}; listing and writing a bucket need boto3, install it "
            "with `pip install boto3`"
        ) from error
    return Boto3Store(address, options)


def _close_writer(writer: Boto3Store) -> None:
    writer.close()
