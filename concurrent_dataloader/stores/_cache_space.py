"""The room that the disk cache takes: what is reserved, counted and removed, under one lock.

Bytes are counted, and room is made, before they are written. So the limit holds at every moment,
downloads included, whichever process is killed and when.

Least recently used is looked for in a sample: whole shards in turn, until it holds a thousand
entries. A cache with fewer entries is looked through as a whole.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Generator, Iterator

from concurrent_dataloader.stores._cache_entry import (
    NUM_SHARDS,
    Found,
    charge_bytes,
    plan_eviction,
)
from concurrent_dataloader.stores._cache_ledger import Books, Ledger, read_boot_id
from concurrent_dataloader.stores._file_lock import is_at, open_lock_file, release, try_lock

_ENTRY = re.compile(r"[0-9a-f]{40}")

_LEDGER_TIMEOUT_S = 10.0
"""For others to let go of the ledger. They hold it for microseconds, or milliseconds to evict."""

_NUM_SAMPLED = 1024
"""Entries among which the least recently used are looked for, at least, if there are so many."""

_MAX_VISITS = 8 * NUM_SHARDS
"""Of shards, to make room once."""

_MAX_SPARE_BYTES = 256 * 2**20
"""Freed beyond what is needed, at most, so that not every object has to look for room."""


class CacheSpace:
    """Keeps a folder of entries and downloads below a limit. May be used from many threads."""

    def __init__(self, root: str, limit_bytes: int) -> None:
        self.partial = os.path.join(root, "partial")
        self.num_evicted = 0
        """By this process; guarded by the ledger's lock."""
        self._root = root
        self._limit_bytes = limit_bytes
        self._ledger = Ledger(os.path.join(root, "ledger"), _LEDGER_TIMEOUT_S)

    def tidy(self) -> None:
        """Remove the downloads of dead processes, and what is above the limit."""
        for path, _ in _iter_files(self.partial):
            descriptor = open_lock_file(path)
            try:
                if try_lock(descriptor) and is_at(descriptor, path):
                    self.remove_download(path, descriptor)
            finally:
                release(descriptor)
        with self._open_books() as books:
            if books.boot_id != read_boot_id():
                # The machine may have gone down before all was on the disk.
                self._recount(books)
            self._make_room(books, 0)

    def reserve(self, path: str, descriptor: int, size_bytes: int) -> bool:
        """Give a download its size, which counts from now on; False if there is no room for it."""
        charge = charge_bytes(size_bytes)
        with self._open_books() as books:
            if not self._make_room(books, charge):
                return False
            books.shard_bytes[_shard_of(path)] += charge
            books.write()
            # From here on the file itself says how much was counted for it.
            os.truncate(descriptor, size_bytes)
        return True

    def remove_download(self, path: str, descriptor: int) -> None:
        """Remove a download that the caller has locked."""
        with self._open_books() as books:
            charge = charge_bytes(os.fstat(descriptor).st_size)
            os.unlink(path)
            books.shard_bytes[_shard_of(path)] -= charge
            books.write()

    def remove_entry(self, path: str, status: os.stat_result) -> None:
        """Remove an entry, unless another file than the one of ``status`` has taken its place."""
        with self._open_books() as books, contextlib.suppress(FileNotFoundError):
            there = os.stat(path, follow_symlinks=False)
            if (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino):
                os.unlink(path)
                books.shard_bytes[_shard_of(path)] -= charge_bytes(there.st_size)
                books.write()

    def remove_object(self, digest: bytes) -> None:
        """Remove an object's entry, and those of its ranges."""
        begin = digest.hex()
        with self._open_books() as books:
            for entry in self._visit(books, digest[0], self._list_downloads()):
                if os.path.basename(entry.path).startswith(begin):
                    self._unlink(books, entry)
            books.write()

    def _make_room(self, books: Books, charge: int) -> bool:
        """Evict until that many bytes more fit; False if they never do."""
        limit_bytes = self._limit_bytes
        if books.total_bytes + charge <= limit_bytes:
            return True
        if charge > limit_bytes:
            return False
        goal_bytes = max(0, limit_bytes - charge - min(limit_bytes // 20, _MAX_SPARE_BYTES))
        download_bytes = self._list_downloads()
        num_visited = 0
        while books.total_bytes + charge > limit_bytes and num_visited < _MAX_VISITS:
            sample: list[Found] = []
            first_visited = num_visited
            while len(sample) < _NUM_SAMPLED and num_visited - first_visited < NUM_SHARDS:
                sample += self._visit(books, books.cursor, download_bytes)
                books.cursor = (books.cursor + 1) % NUM_SHARDS
                num_visited += 1
            is_all = num_visited - first_visited == NUM_SHARDS
            max_entries = len(sample) if is_all else len(sample) // 2
            for entry in plan_eviction(sample, books.total_bytes - goal_bytes, max_entries):
                self._unlink(books, entry)
                self.num_evicted += 1
        books.write()
        return books.total_bytes + charge <= limit_bytes

    def _visit(self, books: Books, shard: int, download_bytes: list[int]) -> list[Found]:
        """List a shard, and set right what the ledger says of it."""
        found = [
            Found(path, charge_bytes(status.st_size), status.st_atime_ns)
            for path, status in _iter_files(os.path.join(self._root, f"{shard:02x}"))
        ]
        # A download that became an entry since the downloads were listed counts twice: too much
        # until the next visit, which is the side on which the limit holds.
        books.shard_bytes[shard] = download_bytes[shard] + sum(one.charge_bytes for one in found)
        return found

    def _unlink(self, books: Books, entry: Found) -> None:
        with contextlib.suppress(FileNotFoundError):  # removed by hand
            os.unlink(entry.path)
        books.shard_bytes[_shard_of(entry.path)] -= entry.charge_bytes

    def _list_downloads(self) -> list[int]:
        """Add up the downloads of each shard."""
        shard_bytes = [0] * NUM_SHARDS
        for path, status in _iter_files(self.partial):
            shard_bytes[_shard_of(path)] += charge_bytes(status.st_size)
        return shard_bytes

    @contextlib.contextmanager
    def _open_books(self) -> Generator[Books]:
        with self._ledger.open() as books:
            if not books.is_known:
                self._recount(books)
            yield books

    def _recount(self, books: Books) -> None:
        download_bytes = self._list_downloads()
        for shard in range(NUM_SHARDS):
            self._visit(books, shard, download_bytes)
        books.boot_id = read_boot_id()
        books.is_known = True
        books.write()


def _iter_files(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """Go through the entries, or downloads, of a folder; what is not named like one is not ours."""
    # No folder: nothing was kept in it yet. No file: it was just removed.
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as listed:
        for file in listed:
            if _ENTRY.match(file.name) is not None:
                with contextlib.suppress(FileNotFoundError):
                    yield file.path, file.stat(follow_symlinks=False)


def _shard_of(path: str) -> int:
    return int(os.path.basename(path)[:2], 16)
