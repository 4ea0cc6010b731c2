"""A Store around a Store that keeps a part of what it reads in memory.

Which part follows from the key alone, so that the same samples are kept in every epoch, process and
run, and nothing is evicted only to be read again. What is kept are the bytes as they came, not
decoded images. Each process keeps its own: a data set that four workers share is kept up to four
times, which `MemoryCachedStore.count_bytes` tells beforehand.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from typing import NamedTuple

from typing_extensions import Buffer, override

from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores.base import ObjectInfo, PerProcess, SizedStore, Store, ValueObject

_HASH_BYTES = 8
_HASHES = 1 << (8 * _HASH_BYTES)


class CacheCounts(NamedTuple):
    """What a process's cache has done so far."""

    num_hits: int
    num_misses: int
    """Reads that went to the store inside, kept or not."""

    num_kept: int
    kept_bytes: int


class MemoryCachedStore(ValueObject):
    """Keeps a share of the objects, or of the byte ranges, that are read through it.

    An object that is kept serves its ranges too. Ranges are told apart by start and stop: the cache
    helps where the same ones are asked for again, as samples of shards are that are not merged.
    """

    def __init__(
        self, store: Store, ratio: float, max_bytes: int | None = None, salt: str = ""
    ) -> None:
        """Wrap a store.

        Args:
            store: Where the bytes come from.
            ratio: Share of the objects, or ranges, to keep: 0 keeps none, 1 all.
            max_bytes: Keep no more than that in a process, whatever the ratio; None: no bound.
            salt: Another one chooses other objects.

        Raises:
            ValueError: ``ratio`` is not in 0 to 1, or ``max_bytes`` is negative.
        """
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"ratio: got {ratio}, expected 0 to 1")
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes: got {max_bytes} bytes, expected 0 or more")
        self._store = store
        self._ratio = ratio
        self._max_bytes = max_bytes
        self._salt = salt
        self._kept = PerProcess(_Kept, _Kept.clear)

    @override
    def _arguments(self) -> tuple[Store, float, int | None, str]:
        return self._store, self._ratio, self._max_bytes, self._salt

    def keeps(self, key: str, byte_range: ByteRange | None = None) -> bool:
        """Tell whether an object, or a range of one, is among those to keep."""
        name = key if byte_range is None else f"{key}\0{byte_range.start}\0{byte_range.stop}"
        return _draw(f"{self._salt}\0{name}") < self._ratio * _HASHES

    def count_bytes(self, objects: Iterable[tuple[str, int]]) -> int:
        """Tell how much memory a process's cache takes once it has read all of these.

        Args:
            objects: Key and size in bytes of each, as a listing or an index gives them.
        """
        total = sum(size for key, size in objects if self.keeps(key))
        return total if self._max_bytes is None else min(total, self._max_bytes)

    @property
    def counts(self) -> CacheCounts:
        """What this process's cache has done."""
        return self._kept.get().counts()

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get` says; two that ask at once for what is not there yet read twice."""
        kept = self._kept.get()
        found = kept.find(key, byte_range)
        if found is not None:
            return found
        body = self._store.get(key, byte_range)
        return self._keep(kept, key, byte_range, body)

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `get` does, without blocking the event loop."""
        kept = self._kept.get()
        found = kept.find(key, byte_range)
        if found is not None:
            return found
        body = await self._store.get_async(key, byte_range)
        return self._keep(kept, key, byte_range, body)

    def _keep(self, kept: _Kept, key: str, byte_range: ByteRange | None, body: Buffer) -> Buffer:
        if not self.keeps(key, byte_range):
            return body
        # A copy: the body may share memory with the client, and be larger than it looks.
        return kept.add(key, byte_range, bytes(body), self._max_bytes)

    def head(self, key: str) -> ObjectInfo:
        """Ask for an object's size.

        Raises:
            TypeError: The store inside cannot be asked.
        """
        if not isinstance(self._store, SizedStore):
            raise TypeError(f"head: got a {type(self._store).__name__}, which has no head()")
        return self._store.head(key)

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return self._store.describe(key)

    def close(self) -> None:
        """Forget what this process has kept, and close the store inside."""
        self._kept.close()
        self._store.close()


class _Kept:
    """What one process keeps. All fields are guarded by `_lock`; no I/O under it."""

    def __init__(self) -> None:
        self._bodies: dict[tuple[str, ByteRange | None], bytes] = {}
        self._num_bytes = 0
        self._num_hits = 0
        self._num_misses = 0
        self._lock = threading.Lock()

    def find(self, key: str, byte_range: ByteRange | None) -> Buffer | None:
        """Give what is kept, and count the look-up."""
        with self._lock:
            body: Buffer | None = self._bodies.get((key, byte_range))
            if body is None and byte_range is not None:
                whole = self._bodies.get((key, None))
                # What lies outside of the object is for the store inside to refuse.
                if whole is not None and 0 <= byte_range.start <= byte_range.stop <= len(whole):
                    body = memoryview(whole)[byte_range.start : byte_range.stop]
            if body is None:
                self._num_misses += 1
            else:
                self._num_hits += 1
            return body

    def add(
        self, key: str, byte_range: ByteRange | None, body: bytes, max_bytes: int | None
    ) -> bytes:
        """Keep a body, unless there is one, or it does not fit; give the one to hand out."""
        with self._lock:
            present = self._bodies.get((key, byte_range))
            if present is not None:
                return present
            if max_bytes is None or self._num_bytes + len(body) <= max_bytes:
                self._bodies[key, byte_range] = body
                self._num_bytes += len(body)
            return body

    def counts(self) -> CacheCounts:
        with self._lock:
            return CacheCounts(self._num_hits, self._num_misses, len(self._bodies), self._num_bytes)

    def clear(self) -> None:
        # Without the lock: the garbage collector may call this, in a thread that holds it.
        self._bodies = {}


def _draw(name: str) -> int:
    """Draw a number from 0 to `_HASHES` - 1, the same for the same name, on any machine."""
    digest = hashlib.blake2b(
        name.encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES, usedforsecurity=False
    )
    return int.from_bytes(digest.digest(), "big")
