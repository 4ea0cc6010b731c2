"""A Store around a Store that keeps what it reads in a folder of this machine.

The second epoch then makes no request. Any number of processes and threads may share the folder:
each object is fetched once, and the others wait for it; nothing that lies there is served unless it
is, to the last bit, what was once fetched from that store, by that key and range. A process that is
killed at any moment, and a disk that is full, cost requests and nothing else.

What is not known is whether an object has changed in the store since. Training sets are taken as
immutable, as they must be for an epoch to have a meaning; where they are not, `DiskCache.max_age_s`
bounds how old an entry may be, and what is put or deleted through this store is forgotten.

Who may read the folder may read the objects: the store is not asked again whether he may.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial

from typing_extensions import Buffer, override

from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores._cache_entry import EntryName, digest_key, name_entry
from concurrent_dataloader.stores._cache_folder import (
    CacheFolder,
    DiskCache,
    DiskCacheCounts,
    Download,
)
from concurrent_dataloader.stores._threads import AwaitableThreads
from concurrent_dataloader.stores.base import (
    ObjectInfo,
    PerProcess,
    SizedStore,
    Store,
    ValueObject,
    WritableStore,
)

__all__ = ["CachedStore", "CachedWritableStore", "DiskCache", "DiskCacheCounts", "cached"]

_NUM_DISK_THREADS = 32
"""For awaited reads."""


def cached(
    store: Store, cache: DiskCache | str | os.PathLike[str] | None, endpoint: str = ""
) -> Store:
    """Put a disk cache around a store; or nothing, if there is to be none.

    Args:
        store: Where the bytes come from.
        cache: The settings, or the folder alone.
        endpoint: What tells the store from others with the same ``describe``; no secret.
    """
    if cache is None:
        return store
    settings = cache if isinstance(cache, DiskCache) else DiskCache(cache)
    if isinstance(store, WritableStore):
        return CachedWritableStore(store, settings, endpoint)
    return CachedStore(store, settings, endpoint)


def uncached(store: Store) -> Store:
    """Give the store that a `CachedStore` is around, and any other as it is.

    For what changes while objects do not: an index, which is written anew beside the same shards.
    """
    return store.inside if isinstance(store, CachedStore) else store


class CachedStore(ValueObject):
    """Keeps objects, and byte ranges each by itself, in a folder."""

    def __init__(self, store: Store, settings: DiskCache, endpoint: str = "") -> None:
        """Wrap a store.

        Args:
            store: Where the bytes come from. What it says by ``describe`` is what tells an object
                from all others, beside ``endpoint``; no key is part of a path.
            settings: Which folder, and how much of it.
            endpoint: What else tells this store's objects from those of others.
        """
        self.inside = store
        self._settings = settings
        self._endpoint = endpoint
        self._folder = PerProcess(partial(CacheFolder, settings), _forget)
        self._threads = PerProcess(
            partial(AwaitableThreads, _NUM_DISK_THREADS), AwaitableThreads.stop
        )

    @override
    def _arguments(self) -> tuple[Store, DiskCache, str]:
        return self.inside, self._settings, self._endpoint

    @property
    def counts(self) -> DiskCacheCounts:
        """What this process's cache has done."""
        return self._folder.get().counts()

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get` says; waits while another thread or process fetches the same."""
        if byte_range is not None and byte_range.stop <= byte_range.start:
            return self.inside.get(key, byte_range)
        folder = self._folder.get()
        name = name_entry(self._digest(key), byte_range)
        give_up_s = time.monotonic() + self._settings.max_wait_s
        found = folder.look_up(name)
        while isinstance(found, Future):
            try:
                found.result(max(0.0, give_up_s - time.monotonic()))
            except OSError:  # not in time, or there are no locks
                found.cancel()
                found = None
            else:
                found = folder.look_up(name)
        if isinstance(found, bytes):
            return found
        folder.count("num_misses")
        if found is None:
            return self.inside.get(key, byte_range)
        try:
            body = self.inside.get(key, byte_range)
        except BaseException:
            found.give_up()
            raise
        folder.keep(found, body)
        return body

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `get` does, without blocking the event loop; the folder is read in a thread."""
        if byte_range is not None and byte_range.stop <= byte_range.start:
            return await self.inside.get_async(key, byte_range)
        threads = self._threads.get()
        name = name_entry(self._digest(key), byte_range)
        give_up_s = time.monotonic() + self._settings.max_wait_s
        found = await threads.run(self._look_up, name)
        while isinstance(found, Future):
            try:
                async with asyncio.timeout(max(0.0, give_up_s - time.monotonic())):
                    await asyncio.wrap_future(found)
            except OSError:  # not in time, or there are no locks
                found = None
            else:
                found = await threads.run(self._look_up, name)
        if isinstance(found, bytes):
            return found
        folder = self._folder.get()
        folder.count("num_misses")
        if found is None:
            return await self.inside.get_async(key, byte_range)
        try:
            body = await self.inside.get_async(key, byte_range)
        except BaseException:
            found.give_up()
            raise
        # Cancelled here, the thread goes on to write, or never gets to know of the download, which
        # is then given up as garbage.
        await threads.run(folder.keep, found, body)
        return body

    def _look_up(self, name: EntryName) -> bytes | Download | Future[None] | None:
        return self._folder.get().look_up(name)

    def _digest(self, key: str) -> bytes:
        return digest_key(self._endpoint, self.inside.describe(key))

    def head(self, key: str) -> ObjectInfo:
        """Ask the store inside for an object's size.

        Raises:
            TypeError: It cannot be asked.
        """
        if not isinstance(self.inside, SizedStore):
            raise TypeError(f"head: got a {type(self.inside).__name__}, which has no head()")
        return self.inside.head(key)

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return self.inside.describe(key)

    def close(self) -> None:
        """Give back what this process has opened; what was kept stays."""
        self._threads.close()
        self._folder.close()
        self.inside.close()


class CachedWritableStore(CachedStore):
    """Lists and writes too; what is written through it is forgotten first and last."""

    def __init__(self, store: WritableStore, settings: DiskCache, endpoint: str = "") -> None:
        super().__init__(store, settings, endpoint)
        self._writable = store

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """List as `WritableStore.list` says."""
        return self._writable.list(prefix, start_after=start_after)

    def put(self, key: str, body: Buffer) -> None:
        """Write an object whole, and forget what was kept of it."""
        try:
            self._writable.put(key, body)
        finally:
            self._folder.get().forget(self._digest(key))

    def delete(self, key: str) -> None:
        """Remove an object, and forget what was kept of it."""
        try:
            self._writable.delete(key)
        finally:
            self._folder.get().forget(self._digest(key))


def _forget(folder: CacheFolder) -> None:
    del folder
