"""The folder of the disk cache: entries that many processes read, write and remove at once.

```text
FOLDER/objects-v1/          only the owner's; all below is ours to remove
├── ledger                  bytes of each shard; the lock under which files are counted or removed
├── partial/NAME            a download: locked by who makes it, renamed when it is whole
└── 00/ ... ff/NAME         entries, by the first byte of their digest
```

A download is a file that its maker has locked from before the request until it is renamed. Whoever
wants the same entry meanwhile waits for that lock, which the kernel takes from a process that dies.
Bytes are counted in the ledger, and room is made, before they are written: so the limit holds at
every moment, with the downloads, whoever is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import multiprocessing.util
import os
import stat
import threading
import time
import weakref
from concurrent.futures import Future
from typing import NamedTuple

from typing_extensions import Buffer

from concurrent_dataloader.errors import StoreError
from concurrent_dataloader.stores._arguments import (
    check_cache_folder,
    check_number,
    check_whole,
)
from concurrent_dataloader.stores._cache_entry import (
    HEADER_BYTES,
    EntryName,
    is_whole,
    pack_header,
)
from concurrent_dataloader.stores._cache_space import CacheSpace
from concurrent_dataloader.stores._file_lock import (
    is_at,
    open_lock_file,
    release,
    try_lock,
    watch,
)

_LOGGER = logging.getLogger(__name__)

_SUBFOLDER = "objects-v1"
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_NS_PER_S = 10**9

_TOUCH_AFTER_NS = 60 * _NS_PER_S
"""An entry is marked as used no more often than that."""

_PAUSE_S = 60.0
"""After the folder could not be written, until that is tried again."""


@dataclasses.dataclass(frozen=True, slots=True)
class DiskCache:
    """Where and how much to keep of what is read."""

    folder: str | os.PathLike[str]
    """On a local disk; any number of processes may share it. Made if it is missing. What is kept
    lies in a folder of its own in it, which only its owner can open."""

    limit_bytes: int = 20 * 10**9
    """What all entries and downloads may take together, in blocks of 4 KiB."""

    max_age_s: float | None = dataclasses.field(default=None, kw_only=True)
    """An entry that was written longer ago is fetched again; None: objects never change."""

    max_wait_s: float = dataclasses.field(default=60.0, kw_only=True)
    """For the download of the same object by another process; then it is fetched here too."""

    def __post_init__(self) -> None:
        check_cache_folder("folder", self.folder)
        check_whole("limit_bytes", self.limit_bytes, "a whole number of bytes, such as 5 * 10**9")
        if self.max_age_s is not None:
            check_number("max_age_s", self.max_age_s, "a number of seconds, or None")
        check_number("max_wait_s", self.max_wait_s, "a number of seconds")
        object.__setattr__(self, "folder", os.path.abspath(os.path.expanduser(self.folder)))
        if self.limit_bytes < 1:
            raise ValueError(f"limit_bytes: got {self.limit_bytes} bytes, expected 1 or more")
        if self.max_age_s is not None and not self.max_age_s >= 0:
            raise ValueError(f"max_age_s: got {self.max_age_s} s, expected 0 s or more, or None")
        if not 0 <= self.max_wait_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"max_wait_s: got {self.max_wait_s} s, expected 0 s or more")


class DiskCacheCounts(NamedTuple):
    """What a process's disk cache has done so far."""

    num_hits: int = 0
    num_misses: int = 0
    """Reads that went to the store inside, kept or not."""

    num_waits: int = 0
    """Waits for another's download."""

    num_kept: int = 0
    num_evicted: int = 0
    num_wrong: int = 0
    """Entries that were not what they should be, or too old, and were removed."""

    num_not_kept: int = 0
    """Objects larger than the limit, or that could not be written."""


class Download:
    """The right to fetch an entry, which nobody else has; given up when it is garbage."""

    def __init__(self, name: EntryName, path: str, descriptor: int) -> None:
        self.name = name
        self.path = path
        self.descriptor = descriptor
        _under_way[descriptor] = path
        self._finalizer = weakref.finalize(self, _give_up, path, descriptor, os.getpid())
        # At the exit threads may still write to it, and it has to stay open: see `remove_begun`.
        self._finalizer.atexit = False

    def give_up(self) -> None:
        """Remove the file, if it is still a download, and let others fetch."""
        self._finalizer()


def _give_up(path: str, descriptor: int, pid: int) -> None:
    if pid != os.getpid():  # a forked child's copy
        return
    _under_way.pop(descriptor, None)
    try:
        with contextlib.suppress(OSError):  # `CacheSpace.tidy` finds it again
            if is_at(descriptor, path):
                os.unlink(path)
    finally:
        release(descriptor)


# Files of the downloads that this process makes, by descriptor. Dictionary operations are atomic.
_under_way: dict[int, str] = {}
_guarded_pid: int | None = None
_ending_pid: int | None = None

os.register_at_fork(after_in_child=_under_way.clear)


def _leave_nothing_at_the_end() -> None:
    """Have this process end without files of downloads; once a process.

    By multiprocessing, which passes over Python's own ways to clean up in the processes that it has
    forked, as workers are. One that a signal kills cleans nothing up: see `CacheSpace.tidy`.
    """
    global _guarded_pid
    if _guarded_pid != os.getpid():
        _guarded_pid = os.getpid()
        multiprocessing.util.Finalize(None, remove_begun, exitpriority=0)


def remove_begun() -> None:
    """End this process's downloads, since it ends itself: remove files with nothing in them yet.

    What has bytes is counted, and left to `CacheSpace.tidy`. Fetches go on meanwhile in daemon
    threads, and begin and keep nothing any more; files stay open for them, and locked.
    """
    global _ending_pid
    _ending_pid = os.getpid()
    for descriptor, path in list(_under_way.items()):
        with contextlib.suppress(OSError):
            if is_at(descriptor, path) and not os.fstat(descriptor).st_size:
                os.unlink(path)


def _is_ending() -> bool:
    return _ending_pid is not None and _ending_pid == os.getpid()


class CacheFolder:
    """One process's view of the folder. May be used from many threads at once."""

    def __init__(self, settings: DiskCache) -> None:
        self._settings = settings
        self._root = os.path.join(settings.folder, _SUBFOLDER)
        self._space = CacheSpace(self._root, settings.limit_bytes)
        _leave_nothing_at_the_end()
        # Guarded by `_lock`; no I/O under it.
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(DiskCacheCounts._fields, 0)
        self._has_warned = False
        # Held while the folder is set up, for which all who want to read have to wait anyway.
        self._setting_up = threading.Lock()
        # Set by any thread.
        self._is_open = False
        self._paused_until_s = -math.inf

    # -- counting

    def counts(self) -> DiskCacheCounts:
        """What this process has done."""
        with self._lock:
            counts = DiskCacheCounts(**self._counts)
        return counts._replace(num_evicted=self._space.num_evicted)

    def count(self, field: str) -> None:
        """Count one more."""
        with self._lock:
            self._counts[field] += 1

    # -- reading

    def look_up(self, name: EntryName) -> bytes | Download | Future[None] | None:
        """Give an entry, or say who is to fetch it.

        Returns:
            The body; or a `Download` for the caller to `keep` or give up; or a future that ends
            with somebody else's download, after which to look again; or None: fetch it, and keep
            nothing, since the folder cannot be used.
        """
        if not self._is_ready():
            return None
        try:
            body = self._read(name)
            if body is not None or self._is_paused():
                return body
            if _is_ending():
                return None
            turn = self._begin(name)
            if isinstance(turn, Future):
                self.count("num_waits")
                return turn
            if _is_ending():  # `remove_begun` may have come just before it was there
                turn.give_up()
                return None
            # It may have come between the first look and the lock.
            body = self._read(name)
        except OSError as error:
            self._pause(error)
            return None
        if body is None:
            return turn
        turn.give_up()
        return body

    def _read(self, name: EntryName) -> bytes | None:
        path = self._path(name)
        try:
            descriptor = os.open(path, _READ_FLAGS)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)
            header = os.pread(descriptor, HEADER_BYTES, 0)
            body = _read_body(descriptor, max(0, status.st_size - HEADER_BYTES))
            now_ns = time.time_ns()
            if is_whole(name, header, body) and not self._is_stale(status, now_ns):
                if now_ns - status.st_atime_ns > _TOUCH_AFTER_NS:
                    _touch(descriptor, now_ns, status.st_mtime_ns)
                self.count("num_hits")
                return body
        finally:
            os.close(descriptor)
        self.count("num_wrong")
        self._space.remove_entry(path, status)
        return None

    def _is_stale(self, status: os.stat_result, now_ns: int) -> bool:
        max_age_s = self._settings.max_age_s
        return max_age_s is not None and now_ns - status.st_mtime_ns > max_age_s * _NS_PER_S

    # -- downloading

    def _begin(self, name: EntryName) -> Download | Future[None]:
        path = os.path.join(self._space.partial, name.text)
        while True:  # ends: each turn somebody's download began, or ended
            descriptor = open_lock_file(path)
            try:
                if not try_lock(descriptor):
                    return watch(descriptor)
                if is_at(descriptor, path):
                    if not os.fstat(descriptor).st_size:
                        return Download(name, path, descriptor)
                    self._space.remove_download(path, descriptor)
            except BaseException:
                release(descriptor)
                raise
            release(descriptor)

    def keep(self, download: Download, body: Buffer) -> None:
        """Write what was fetched, and make it an entry; ends the download.

        If that cannot be done, others fetch for themselves.
        """
        if _is_ending():  # its file may be gone already
            download.give_up()
            return
        try:
            is_kept = self._write(download, bytes(body))
        except OSError as error:
            self._pause(error)
            is_kept = False
        finally:
            download.give_up()
        self.count("num_kept" if is_kept else "num_not_kept")

    def _write(self, download: Download, body: bytes) -> bool:
        size_bytes = HEADER_BYTES + len(body)
        if not self._space.reserve(download.path, download.descriptor, size_bytes):
            if size_bytes > self._settings.limit_bytes:
                self._warn(f"got an object of {len(body)} bytes, limit_bytes is less")
            return False
        try:
            _write_all(download.descriptor, pack_header(download.name, body), body)
            self._rename(download)
        except OSError:
            self._space.remove_download(download.path, download.descriptor)
            raise
        return True

    def _rename(self, download: Download) -> None:
        path = self._path(download.name)
        try:
            os.rename(download.path, path)
        except FileNotFoundError:
            _make_own_folder(os.path.dirname(path))
            os.rename(download.path, path)

    # -- the folder as a whole

    def _is_ready(self) -> bool:
        if self._is_open:
            return True
        with self._setting_up:
            return self._is_open or (not self._is_paused() and self._set_up())

    def _set_up(self) -> bool:
        """Make the folder if need be, remove what dead processes left, and keep to the limit."""
        try:
            os.makedirs(self._settings.folder, mode=0o700, exist_ok=True)
            for folder in (self._root, self._space.partial):
                _make_own_folder(folder)
        except OSError as error:
            self._pause(error)
            return False
        try:
            self._space.tidy()
        except OSError as error:  # it can be read, and not written
            self._pause(error)
        self._is_open = True
        return True

    def forget(self, digest: bytes) -> None:
        """Remove an object's entry, and those of its ranges.

        Raises:
            StoreError: They cannot be removed, and would be served.
        """
        if not self._is_ready():
            return
        try:
            self._space.remove_object(digest)
        except OSError as error:
            raise StoreError(
                f"disk cache {self._root}: {error.strerror or error}, so that what was kept of an "
                "object that was just written stays; remove the folder"
            ) from error

    def _path(self, name: EntryName) -> str:
        text = name.text
        return f"{self._root}/{text[:2]}/{text}"

    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until_s

    def _pause(self, error: OSError) -> None:
        """Write nothing for a while."""
        self._paused_until_s = time.monotonic() + _PAUSE_S
        if isinstance(error, FileNotFoundError):
            self._is_open = False  # somebody removed it
        self._warn(
            f"{error.strerror or error}; check the space on the disk and the folder's rights"
        )

    def _warn(self, what: str) -> None:
        with self._lock:
            has_warned, self._has_warned = self._has_warned, True
        if not has_warned:
            _LOGGER.warning(
                "disk cache %s: %s; goes on without keeping what is read", self._root, what
            )


def _make_own_folder(path: str) -> None:
    """Make a folder that nobody else can write to, or check that it is one."""
    if not os.path.isdir(path):  # asked first: a disk may be read-only
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
    status = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "got no folder, expected one", path)
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        # Whoever can write here could put other bytes under a right checksum.
        raise PermissionError(
            errno.EPERM, f"{path} can be written by others, expected a folder of one's own", path
        )


def _read_body(descriptor: int, length: int) -> bytes:
    body = os.pread(descriptor, length, HEADER_BYTES)
    if len(body) == length:
        return body
    chunks = [body]  # Linux gives at most 2 GiB at once
    got_bytes = len(body)
    while got_bytes < length and (chunk := os.pread(descriptor, length, HEADER_BYTES + got_bytes)):
        chunks.append(chunk)
        got_bytes += len(chunk)
    return b"".join(chunks)


def _write_all(descriptor: int, header: bytes, body: bytes) -> None:
    os.pwrite(descriptor, header, 0)
    view = memoryview(body)
    while view:
        view = view[os.pwrite(descriptor, view, HEADER_BYTES + len(body) - len(view)) :]


def _touch(descriptor: int, now_ns: int, written_ns: int) -> None:
    # Where the folder cannot be written, nothing is evicted either.
    with contextlib.suppress(OSError):
        os.utime(descriptor, ns=(now_ns, written_ns))
