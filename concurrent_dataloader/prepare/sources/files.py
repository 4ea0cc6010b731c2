"""Files that a user names, on this machine, in a bucket or on a web server."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.prepare.sources.archives import Archives
from concurrent_dataloader.stores import (
    SizedStore,
    Store,
    WritableStore,
    open_store,
    open_writable_store,
)


class FileName(NamedTuple):
    """A path or URL in two parts."""

    folder: str
    name: str


def split_file_name(text: str) -> FileName:
    """Part a path or URL of a file into its folder and its name.

    Raises:
        ValueError: It is a bucket or a server, and no file in it.
    """
    folder, slash, name = text.rpartition("/")
    if not name or folder.endswith(("/", ":")):
        if text.startswith("/") and text.count("/") == 1 and name:
            return FileName("/", name)
        raise ValueError(f"source: got {text!r}, expected the name of a file")
    return FileName(folder if slash else ".", name)


def join(folder: str, name: str) -> str:
    """Put a path or URL together."""
    return f"{folder.rstrip('/')}/{name}" if name else folder


def is_remote(text: str) -> bool:
    """Tell whether bytes come over the network."""
    return text.startswith(("s3://", "http://", "https://"))


@dataclasses.dataclass(frozen=True, slots=True)
class Files:
    """Opens what a user names; each store is the caller's to close."""

    store_options: Mapping[str, Any]
    """What `open_store` takes."""

    def open_folder(self, folder: str) -> WritableStore:
        """Open a folder or prefix that can be listed."""
        return open_writable_store(folder, **self.store_options)

    def open_archives(self, folder: str, names: Sequence[str]) -> Archives:
        """Open some tars of a folder."""
        return Archives(self._open(folder), tuple(names), is_remote(folder))

    @contextlib.contextmanager
    def open_file(self, text: str) -> Generator[BinaryIO]:
        """Open a file to be read front to back."""
        folder, name = split_file_name(text)
        archives = self.open_archives(folder, [name])
        with contextlib.closing(archives.store), archives.open_file(name) as file:
            yield file

    def read(self, text: str) -> bytes:
        """Read a file whole.

        Raises:
            StoreError: It cannot be read.
        """
        folder, name = split_file_name(text)
        with contextlib.closing(self._open(folder)) as store:
            return bytes(store.get(name))

    def has(self, text: str) -> bool:
        """Tell whether there is such a file."""
        folder, name = split_file_name(text)
        with contextlib.closing(self._open(folder)) as store:
            if not isinstance(store, SizedStore):
                return False
            try:
                store.head(name)
            except KeyNotFoundError:
                return False
        return True

    def _open(self, folder: str) -> Store:
        return open_store(folder, **self.store_options)
