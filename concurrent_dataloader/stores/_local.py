"""Files below a folder, by key: the path from the folder, with slashes."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator

from typing_extensions import Buffer, override

from concurrent_dataloader.errors import (
    AccessDeniedError,
    BodyMismatchError,
    ByteRangeError,
    KeyNotFoundError,
    StoreError,
)
from concurrent_dataloader.files import is_link_to_nothing
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores.address import check_byte_range
from concurrent_dataloader.stores.base import BlockingStore, ObjectInfo

_UNFINISHED = ".unfinished-"
"""Begins the names of files that `LocalStore.put` is writing; listings leave them out."""

_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC


class LocalStore(BlockingStore):
    """Files of a disk or a network mount. Nothing is retried: the file system does that."""

    def __init__(self, root: str | os.PathLike[str], max_connections: int = 256) -> None:
        super().__init__(max_connections)
        self.root = os.path.abspath(os.fspath(root))
        self._max_connections = max_connections
        self._begin = self.root if self.root.endswith("/") else self.root + "/"

    @override
    def _arguments(self) -> tuple[str, int]:
        return self.root, self._max_connections

    def describe(self, key: str) -> str:
        """Name the file for a person: its path."""
        return self._begin + key

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get` says: one ``read`` of the whole file, or one ``pread``."""
        if ".." in key:
            self._path(key)
        try:
            file = os.open(self._begin + key, _OPEN_FLAGS)
        except (OSError, ValueError) as error:
            raise self._translate(error, key) from error
        try:
            size_bytes = os.fstat(file).st_size
            if byte_range is not None:
                return self._read_range(file, key, byte_range, size_bytes)
            body = os.read(file, size_bytes)
            if len(body) != size_bytes:
                body = self._read_on(file, key, body, size_bytes)
            elif size_bytes == 0:
                self._check_is_file(file, key)
            return body
        except OSError as error:
            raise self._translate(error, key) from error
        finally:
            os.close(file)

    def _read_range(self, file: int, key: str, byte_range: ByteRange, size_bytes: int) -> bytes:
        length = check_byte_range(byte_range)
        if size_bytes < byte_range.stop:
            self._check_is_file(file, key)
            raise ByteRangeError(
                f"{self.describe(key)} [{byte_range.start}, {byte_range.stop}): the file has "
                f"{size_bytes} bytes, expected {byte_range.stop} or more; check the index"
            )
        body = os.pread(file, length, byte_range.start)
        if len(body) != length:
            os.lseek(file, byte_range.start + len(body), os.SEEK_SET)
            body = self._read_on(file, key, body, length)
        return body

    def _read_on(self, file: int, key: str, begun: bytes, length: int) -> bytes:
        """Go on after a short read: Linux gives at most 2 GiB at once, and a signal may cut in."""
        chunks = [begun]
        missing = length - len(begun)
        while missing:
            chunk = os.read(file, missing)
            if not chunk:
                raise BodyMismatchError(
                    f"{self.describe(key)}: got {length - missing} bytes, expected {length}; "
                    "the file was cut while it was read"
                )
            chunks.append(chunk)
            missing -= len(chunk)
        return b"".join(chunks)

    def _check_is_file(self, file: int, key: str) -> None:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise KeyNotFoundError(f"{self.describe(key)}: got no regular file, expected a file")

    def head(self, key: str) -> ObjectInfo:
        """Ask for a file's size."""
        path = self._path(key)
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:
            raise self._translate(error, key) from error
        if not stat.S_ISREG(status.st_mode):
            raise KeyNotFoundError(f"{self.describe(key)}: got no regular file, expected a file")
        return ObjectInfo(key, status.st_size)

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """List the files; links are followed, but not in circles.

        The order is that of the keys as a store has it, whatever the file system's is: a folder's
        name counts with its slash. A link to nothing is listed, with 0 bytes, so that who reads
        or checks the file is told; leaving it out would make a data set smaller in silence.
        """
        folder, _, _ = prefix.rpartition("/")
        begin = self._path(folder) if folder else self.root
        if not os.path.isdir(self.root):
            raise KeyNotFoundError(
                f"{self.root}: no such folder, expected the folder of a data set; check the path"
            )
        if not os.path.isdir(begin):
            return
        walk = self._walk(begin, f"{folder}/" if folder else "", frozenset(), prefix, start_after)
        for info in walk:
            if info.key.startswith(prefix) and info.key > start_after:
                yield info

    def _walk(
        self, path: str, begin: str, above: frozenset[tuple[int, int]], prefix: str, after: str
    ) -> Iterator[ObjectInfo]:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return
        with os.scandir(path) as entries:
            names = sorted(
                (entry.name + "/" if entry.is_dir() else entry.name, entry) for entry in entries
            )
        for name, entry in names:
            key = begin + name
            if name.endswith("/"):
                # A folder whose every key sorts at or before ``after`` is not opened.
                is_wanted = key.startswith(prefix) or prefix.startswith(key)
                if is_wanted and (key > after or after.startswith(key)):
                    yield from self._walk(entry.path, key, above | {identity}, prefix, after)
            elif entry.is_file() and not name.startswith(_UNFINISHED):
                yield ObjectInfo(key, entry.stat().st_size)
            elif is_link_to_nothing(entry):
                yield ObjectInfo(key, 0)

    def put(self, key: str, body: Buffer) -> None:
        """Write a file under another name, then rename it; folders are made."""
        path = self._path(key)
        folder = os.path.dirname(path)
        unfinished = os.path.join(folder, f"{_UNFINISHED}{secrets.token_hex(8)}")
        try:
            os.makedirs(folder, exist_ok=True)
            try:
                with open(unfinished, "wb") as file:
                    file.write(body)
                os.replace(unfinished, path)
            except BaseException:
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    os.unlink(unfinished)
                raise
        except OSError as error:
            raise self._translate(error, key) from error

    def delete(self, key: str) -> None:
        """Remove a file; its folder stays."""
        path = self._path(key)
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._translate(error, key) from error

    def _path(self, key: str) -> str:
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise KeyNotFoundError(
                f"{self.root}: got key {key!r}, expected a path that stays inside the folder"
            )
        return self._begin + key

    def _translate(self, error: Exception, key: str) -> StoreError:
        where = self.describe(key)
        if isinstance(error, (FileNotFoundError, NotADirectoryError, ValueError)):
            return KeyNotFoundError(f"{where}: no such file, expected a file; check key and folder")
        if isinstance(error, IsADirectoryError):
            return KeyNotFoundError(f"{where}: got a folder, expected a file")
        if isinstance(error, PermissionError):
            return AccessDeniedError(f"{where}: permission denied, expected a right to it")
        return StoreError(f"{where}: {error}")
