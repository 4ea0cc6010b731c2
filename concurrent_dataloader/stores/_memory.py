"""Objects in a dictionary: for tests, and for data that is there already."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from typing_extensions import Buffer, override

from concurrent_dataloader.errors import ByteRangeError, KeyNotFoundError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores.address import check_byte_range
from concurrent_dataloader.stores.base import ObjectInfo, ValueObject


class MemoryStore(ValueObject):
    """Objects of one process. A pickle holds them all, so a worker works with a copy."""

    def __init__(self, objects: Mapping[str, bytes] | None = None, name: str = "") -> None:
        self._objects: dict[str, bytes] = dict(objects or {})
        self._name = name

    @override
    def _arguments(self) -> tuple[dict[str, bytes], str]:
        return self._objects, self._name

    @override
    def __hash__(self) -> int:
        return hash(self._name)

    @override
    def __repr__(self) -> str:
        return f"MemoryStore(<{len(self._objects)} objects>, {self._name!r})"

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return f"memory://{self._name}/{key}"

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get` says."""
        body = self._objects.get(key)
        if body is None:
            raise KeyNotFoundError(f"{self.describe(key)}: no such object, expected the object")
        if byte_range is None:
            return body
        check_byte_range(byte_range)
        if len(body) < byte_range.stop:
            raise ByteRangeError(
                f"{self.describe(key)} [{byte_range.start}, {byte_range.stop}): the object has "
                f"{len(body)} bytes, expected {byte_range.stop} or more; check the index"
            )
        return memoryview(body)[byte_range.start : byte_range.stop]

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `get` does."""
        return self.get(key, byte_range)

    def head(self, key: str) -> ObjectInfo:
        """Ask for an object's size."""
        return ObjectInfo(key, memoryview(self.get(key)).nbytes)

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """List as `WritableStore.list` says; a picture of the moment of the call."""
        keys = sorted(k for k in list(self._objects) if k.startswith(prefix) and k > start_after)
        return (ObjectInfo(key, len(self._objects[key])) for key in keys)

    def put(self, key: str, body: Buffer) -> None:
        """Write an object."""
        if not key:
            raise KeyNotFoundError(f"{self.describe('')}: got an empty key, expected a name")
        self._objects[key] = bytes(body)

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._objects.pop(key, None)

    def close(self) -> None:
        """Do nothing: nothing was opened."""


_named: dict[str, MemoryStore] = {}
_naming = threading.Lock()


def open_named(name: str) -> MemoryStore:
    """Give the store of that name; there is one of each name in a process."""
    with _naming:
        return _named.setdefault(name, MemoryStore(name=name))
