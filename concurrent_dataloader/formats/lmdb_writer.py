"""LMDB databases of records, written in portions, each of which is on the disk or not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.formats.lmdb_environment import (
    check_whole,
    explain,
    import_lmdb,
    naming_damage,
)
from concurrent_dataloader.formats.lmdb_file import _count_records
from concurrent_dataloader.formats.lmdb_record import (
    LABELS_KEY,
    METADATA_KEY,
    DatabaseMetadata,
    pack_metadata,
    parse_metadata,
    record_key,
)

if TYPE_CHECKING:
    import lmdb

DEFAULT_MAP_BYTES = 64 << 20
COMMIT_BYTES = 64 << 20
"""Records are written to the disk in portions of this size, which is what a killed run loses."""

_COMMIT_RECORDS = 4096
# Leaves, branches and the list of free pages, for which a portion may need pages besides.
_SLACK_BYTES = 16 << 20
_PAGE_HEADER_BYTES = 16
_RIGHTS = 0o666  # less the umask, as for other files


class _Portion(NamedTuple):
    num_records: int
    num_bytes: int


class LmdbWriter:
    """Writes records one after the other, in portions, each of which is on the disk or not.

    One process may write to a file at a time. The map grows as it is needed: the file is never
    larger than what is in it, and is not sparse.
    """

    def __init__(
        self,
        path: Path,
        *,
        map_bytes: int = DEFAULT_MAP_BYTES,
        commit_bytes: int = COMMIT_BYTES,
    ) -> None:
        """Open a file for writing; makes it, or goes on with what it holds.

        Args:
            path: The file; its folder exists.
            map_bytes: Address space to begin with; doubled as often as need be.
            commit_bytes: Size of a portion, and thus of what is held in memory.

        Raises:
            ValueError: A size is not above 0.
            OSError: It cannot be written, or another process is writing it.
            ShardFormatError: What it holds is no database, or is damaged.
            MissingDependencyError: lmdb is not installed.
        """
        for name, value in (("map_bytes", map_bytes), ("commit_bytes", commit_bytes)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected 1 or more")
        self._lmdb = import_lmdb()
        self._path = path
        self._commit_bytes = commit_bytes
        self._transaction: Any = None
        self._portion = _Portion(0, 0)
        self._lock_file = _lock(path)
        try:
            self._environment = self._open(map_bytes)
        except BaseException:
            os.close(self._lock_file)
            raise
        self._page_bytes = self._environment.stat()["psize"]
        self._is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def read_metadata(self) -> DatabaseMetadata | None:
        """Read what the file says of itself; None if it is new."""
        with (
            naming_damage(str(self._path)),
            self._environment.begin(buffers=True) as transaction,
        ):
            raw = transaction.get(METADATA_KEY)
            return None if raw is None else parse_metadata(raw, str(self._path))

    def count_records(self) -> int:
        """Count the records that are on the disk."""
        with naming_damage(str(self._path)), self._environment.begin() as transaction:
            return _count_records(transaction)

    def put_record(self, position: int, packed: bytes) -> None:
        """Add a record; its position is one more than that of the one before.

        Raises:
            OSError: The disk is full, or fails.
        """
        pages_bytes = self._count_bytes(packed)
        portion = self._portion
        if portion.num_records and (
            portion.num_bytes + pages_bytes > self._commit_bytes
            or portion.num_records == _COMMIT_RECORDS
        ):
            self.commit()
            portion = self._portion
        if self._transaction is None:
            self._make_room(max(self._commit_bytes, pages_bytes))
        self._put(record_key(position), packed, append=True)
        self._portion = _Portion(portion.num_records + 1, portion.num_bytes + pages_bytes)

    def put_metadata(self, metadata: DatabaseMetadata, labels: bytes | None = None) -> None:
        """Add what the database says of itself, and its labels where they are known.

        Raises:
            OSError: The disk is full, or fails.
        """
        self.commit()
        packed = pack_metadata(metadata)
        self._make_room(len(packed) + len(labels or b""))
        if labels is not None:
            self._put(LABELS_KEY, labels)
        self._put(METADATA_KEY, packed)
        self.commit()

    def commit(self) -> None:
        """Put what was added on the disk.

        Raises:
            OSError: The disk is full, or fails.
        """
        if self._transaction is None:
            return
        transaction, self._transaction = self._transaction, None
        self._portion = _Portion(0, 0)
        with self._translated():
            try:
                transaction.commit()
            except BaseException:
                transaction.abort()
                raise

    def close(self) -> None:
        """Drop what was not committed, and close the file. May be called twice."""
        if not self._is_open:
            return
        self._is_open = False
        if self._transaction is not None:
            self._transaction.abort()
            self._transaction = None
        self._environment.close()
        os.close(self._lock_file)

    def _open(self, map_bytes: int) -> lmdb.Environment:
        try:
            environment = self._lmdb.open(
                os.fspath(self._path),
                subdir=False,
                lock=False,
                map_size=map_bytes,
                mode=_RIGHTS,
                readahead=False,
            )
        except self._lmdb.Error as error:
            size_bytes = self._path.stat().st_size
            raise ShardFormatError(
                f"{self._path}: got {size_bytes} bytes that are no LMDB database"
                f" ({explain(str(self._path), error)}); remove it, and write it anew"
            ) from error
        try:
            # A new file has no page yet, but is said to have two.
            if self._path.stat().st_size:
                check_whole(environment, self._path, self._path.stat().st_size)
        except BaseException:
            environment.close()
            raise
        return environment

    def _count_bytes(self, packed: bytes) -> int:
        """Count what a record takes in the file, in whole pages."""
        return -(-(len(packed) + _PAGE_HEADER_BYTES) // self._page_bytes) * self._page_bytes

    def _make_room(self, more_bytes: int) -> None:
        """Double the map until so much more fits; only between transactions."""
        info = self._environment.info()
        used_bytes = (info["last_pgno"] + 1) * self._page_bytes
        map_bytes = info["map_size"]
        while map_bytes < used_bytes + more_bytes + _SLACK_BYTES:
            map_bytes *= 2
        if map_bytes != info["map_size"]:
            self._environment.set_mapsize(map_bytes)

    def _put(self, key: bytes, value: bytes, *, append: bool = False) -> None:
        with self._translated():
            if self._transaction is None:
                self._transaction = self._environment.begin(write=True)
            self._transaction.put(key, value, append=append)

    @contextlib.contextmanager
    def _translated(self) -> Generator[None]:
        try:
            yield
        except self._lmdb.Error as error:
            raise self._as_os_error(error) from error

    def _as_os_error(self, error: Exception) -> OSError:
        """Tell a full disk, a quota and a limit of the file's size from what else fails."""
        where = str(self._path)
        try:
            # LMDB calls a write that was cut short an input/output error, whatever the reason.
            self._try_to_grow()
        except OSError as reason:
            if reason.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                return OSError(
                    reason.errno,
                    f"{reason.strerror}; make room and run it again: it goes on where it stopped",
                    where,
                )
        return OSError(errno.EIO, explain(where, error), where)

    def _try_to_grow(self) -> None:
        size_bytes = os.fstat(self._lock_file).st_size
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._lock_file, size_bytes, self._commit_bytes)
        finally:
            os.ftruncate(self._lock_file, size_bytes)


def _lock(path: Path) -> int:
    """Make the file if need be, and keep other processes from writing it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _RIGHTS)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BlockingIOError(
            error.errno, "another process is writing it; wait for it to end", str(path)
        ) from error
    except OSError:
        pass  # a file system without locks: whoever uses it sees to it that one writes at a time
    return descriptor
