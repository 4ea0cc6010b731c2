"""How many bytes the disk cache holds: one file, which all processes change under its lock.

What is written down is never less than what lies on the disk, wherever a process is killed: bytes
are added before they are written, and taken off after they were removed. What it is too much goes
away when the folder of the shard is listed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from collections.abc import Generator
from pathlib import Path

from concurrent_dataloader.stores._cache_entry import NUM_SHARDS
from concurrent_dataloader.stores._file_lock import lock_within, open_lock_file, release

_MAGIC = b"CDLbook1"
_LAYOUT = struct.Struct(f"<8s40sq{NUM_SHARDS}q")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Books:
    """The ledger while it is locked."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        content = os.pread(descriptor, _LAYOUT.size, 0)
        self.boot_id = b""
        self.cursor = 0
        """The shard to look at next when room is needed."""
        self.shard_bytes = [0] * NUM_SHARDS
        if len(content) == _LAYOUT.size and content.startswith(_MAGIC):
            _, boot_id, self.cursor, *self.shard_bytes = _LAYOUT.unpack(content)
            self.boot_id = boot_id.rstrip(b"\0")
            self.is_known = True
        else:
            self.is_known = False
            """Whether the bytes were counted; if not, they have to be."""

    @property
    def total_bytes(self) -> int:
        """All that the cache holds, or is about to."""
        return sum(self.shard_bytes)

    def write(self) -> None:
        """Write it down."""
        content = _LAYOUT.pack(_MAGIC, self.boot_id, self.cursor, *self.shard_bytes)
        os.pwrite(self._descriptor, content, 0)


class Ledger:
    """The file, and the lock on it."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s
        # Before the file's lock, so that a process waits for it in one thread only.
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def open(self) -> Generator[Books]:
        """Lock and read it. What is changed counts once it was written.

        Raises:
            TimeoutError: Others have had it for too long.
            OSError: It cannot be opened or written.
        """
        if not self._mutex.acquire(timeout=self._timeout_s):
            raise self._timeout()
        try:
            descriptor = open_lock_file(self._path)
            if not lock_within(descriptor, self._timeout_s):
                raise self._timeout()
            try:
                yield Books(descriptor)
            finally:
                release(descriptor)
        finally:
            self._mutex.release()

    def _timeout(self) -> TimeoutError:
        return TimeoutError(errno.ETIMEDOUT, f"locked by others for {self._timeout_s:g} s")


def read_boot_id() -> bytes:
    """Tell this run of the machine from others; empty where the system does not say."""
    try:
        return _BOOT_ID.read_bytes().strip()
    except OSError:  # not Linux
        return b""
