"""Images as files in class folders, which everything can read, made of any source."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from typing_extensions import Buffer

from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.prepare.copy import Copied, CopyItem, CopyReport, copy_objects
from concurrent_dataloader.prepare.sources import SampleTable
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import ObjectInfo, WritableStore


def sort_into_folders(
    source: SampleTable,
    target: WritableStore,
    *,
    concurrency: int = 32,
    verify: bool = False,
    on_object: Callable[[Copied], None] = lambda copied: None,
) -> CopyReport:
    """Copy each sample to ``<class>/<file name>``, byte by byte.

    What is there with the same size is left as it is, so that a run goes on where one was stopped.

    Args:
        source: With labels.
        target: Where the folders are to be.
        concurrency: As in `copy_objects`.
        verify: As in `copy_objects`.
        on_object: As in `copy_objects`.

    Raises:
        ValueError: The samples have no classes, a class cannot be a folder, or two samples of a
            class have the same file name.
        StoreError: The target cannot be listed.
    """
    view = _ClassFolders(source)
    return copy_objects(
        view.items(),
        view,
        target,
        concurrency=concurrency,
        verify=verify,
        on_object=on_object,
    )


class _ClassFolders:
    """A source as a store, by class folder and file name; read from many threads."""

    def __init__(self, source: SampleTable) -> None:
        classes = source.classes
        if classes is None:
            raise ValueError(f"{source.where}: its samples have no classes to sort them by")
        for name in classes:
            if "/" in name or name in ("", ".", ".."):
                raise ValueError(f"{source.where}: class {name!r} cannot be the name of a folder")
        self._source = source
        self._positions: dict[str, int] = {}
        for position in range(len(source)):
            label = source.label(position)
            assert label is not None, "a source with classes has labels"
            name = source.name(position)
            key = f"{classes[label]}/{name[name.rfind('/') + 1 :]}"
            first = self._positions.setdefault(key, position)
            if first != position:
                raise ValueError(
                    f"{source.where}: {source.name(first)!r} and {name!r} would both be {key!r}"
                )

    def items(self) -> Iterator[CopyItem]:
        """Yield what is to be copied, in the order of the source."""
        for key, position in self._positions.items():
            yield CopyItem(key, self._source.size_bytes(position))

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read a sample, or a part of it."""
        raw = self._source.read(self._position(key))
        if byte_range is None:
            return raw
        return memoryview(raw).cast("B")[byte_range.start : byte_range.stop]

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `get` does; blocks, since copying does not await."""
        return self.get(key, byte_range)

    def head(self, key: str) -> ObjectInfo:
        """Tell a sample's size; reads it, where it is not known otherwise."""
        position = self._position(key)
        size_bytes = self._source.size_bytes(position)
        if size_bytes is None:
            size_bytes = memoryview(self._source.read(position)).nbytes
        return ObjectInfo(key, size_bytes)

    def describe(self, key: str) -> str:
        """Name the place of a sample."""
        return self._source.describe(self._position(key))

    def close(self) -> None:
        """Do nothing; the source is the caller's."""

    def _position(self, key: str) -> int:
        position = self._positions.get(key)
        if position is None:
            raise KeyNotFoundError(f"{self._source.where}: no sample is {key!r}")
        return position
