"""Many processes read through one disk cache, and are killed at random: is anything ever wrong?

The bytes of an object follow from its key, so that each process can tell whether what it got is
right. The parent kills with SIGKILL, starts anew, and looks at the folder all the while.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import multiprocessing
import pathlib
import random
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from typing_extensions import Buffer, override

from concurrent_dataloader.errors import ByteRangeError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores.base import ValueObject
from concurrent_dataloader.stores.cache import CachedStore, DiskCache

_BLOCK_BYTES = 512  # of ``st_blocks``, whatever the disk's own are
_STOP_TIMEOUT_S = 30.0


class Load(NamedTuple):
    """What the processes do."""

    num_processes: int = 8
    num_objects: int = 4000
    mean_bytes: int = 110_000
    total_bytes: int = 10**9
    """Read by all processes together, hits included."""

    limit_bytes: int = 100 * 10**6
    kill_every_s: float = 0.2
    """Mean time between two kills."""

    min_kills: int = 20
    """They read on until there were as many."""

    max_s: float = 300.0
    """After which it counts as hung."""


class Damage(NamedTuple):
    """What was seen."""

    num_wrong: int
    """Reads whose bytes were not the object's."""

    max_over_bytes: int
    """The most that the folder ever held above the limit; below 0 if it never reached it."""

    num_kills: int
    read_bytes: int
    elapsed_s: float
    left_bytes: int
    """In unfinished downloads after a last process has opened the folder."""


class DerivedStore(ValueObject):
    """Objects that are computed: nothing to wait for, so that all time goes to the cache."""

    def __init__(self, mean_bytes: int) -> None:
        self._mean_bytes = mean_bytes

    @override
    def _arguments(self) -> tuple[int]:
        return (self._mean_bytes,)

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Compute an object, or a part of it."""
        rng = random.Random(key)
        body = rng.randbytes(rng.randrange(1, 2 * self._mean_bytes))
        if byte_range is None:
            return body
        if byte_range.stop > len(body):
            raise ByteRangeError(f"{key}: got {byte_range}, expected less than {len(body)}")
        return body[byte_range.start : byte_range.stop]

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Compute an object, or a part of it."""
        return self.get(key, byte_range)

    def describe(self, key: str) -> str:
        """Name an object."""
        return f"derived://{self._mean_bytes}/{key}"

    def close(self) -> None:
        """Do nothing: nothing was opened."""


def kill_readers(folder: pathlib.Path, load: Load, seed: int = 0) -> Damage:
    """Let processes read from an empty cache in ``folder``, and kill them at random.

    Raises:
        TimeoutError: They did not read all of it in time: one of them hangs.
    """
    rng = random.Random(seed)
    store = CachedStore(DerivedStore(load.mean_bytes), DiskCache(folder, load.limit_bytes))
    # Forked, not spawned: a process that starts for half a second is killed before it does much.
    fork = multiprocessing.get_context("fork")
    # Without locks, which a process that is killed would keep; each has numbers of its own.
    read_bytes: Any = fork.RawArray("q", load.num_processes)
    num_wrong: Any = fork.RawArray("q", load.num_processes)

    def start(number: int) -> BaseProcess:
        arguments = (store, load, rng.randrange(2**32), number, read_bytes, num_wrong)
        process = fork.Process(target=_read, args=arguments, daemon=True)
        process.start()
        return process

    begin_s = time.perf_counter()
    next_kill_s = begin_s
    max_held_bytes = num_kills = 0
    readers = [start(number) for number in range(load.num_processes)]
    try:
        while sum(read_bytes) < load.total_bytes or num_kills < load.min_kills:
            max_held_bytes = max(max_held_bytes, count_bytes(folder))
            now_s = time.perf_counter()
            if now_s - begin_s > load.max_s:
                raise TimeoutError(
                    f"{folder}: {sum(read_bytes)} bytes read in {load.max_s:g} s, expected "
                    f"{load.total_bytes}; a process waits for something that does not come"
                )
            if now_s >= next_kill_s:
                number = rng.randrange(load.num_processes)
                readers[number].kill()
                readers[number].join()
                readers[number] = start(number)
                num_kills += 1
                next_kill_s = now_s + rng.expovariate(1 / load.kill_every_s)
        elapsed_s = time.perf_counter() - begin_s
    finally:
        _stop(readers)
    max_held_bytes = max(max_held_bytes, count_bytes(folder))
    store.get("last")  # opens the folder, and so tidies it up
    store.close()
    return Damage(
        num_wrong=sum(num_wrong),
        max_over_bytes=max_held_bytes - load.limit_bytes,
        num_kills=num_kills,
        read_bytes=sum(read_bytes),
        elapsed_s=elapsed_s,
        left_bytes=sum(file.stat().st_size for file in folder.glob("*/partial/*")),
    )


def count_bytes(folder: pathlib.Path) -> int:
    """Count what the entries and downloads take on the disk, or will when they are written.

    Nothing is added or removed meanwhile, since that takes the ledger's lock; what is renamed while
    the folders are gone through counts once.
    """
    with contextlib.ExitStack() as stack:
        for ledger in folder.glob("*/ledger"):
            file = stack.enter_context(ledger.open("rb"))
            fcntl.flock(file, fcntl.LOCK_EX)
        sizes: dict[int, int] = {}
        # Downloads first, and one after the other: what is renamed meanwhile is found as an entry.
        for path in itertools.chain(folder.glob("*/partial/*"), folder.glob("*/??/*")):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat(follow_symlinks=False)
                sizes[status.st_ino] = max(status.st_blocks * _BLOCK_BYTES, status.st_size)
        return sum(sizes.values())


def _stop(readers: Sequence[BaseProcess]) -> None:
    for reader in readers:
        reader.kill()
    for reader in readers:
        reader.join(_STOP_TIMEOUT_S)
        reader.close()


def _read(
    store: CachedStore, load: Load, seed: int, number: int, read_bytes: Any, num_wrong: Any
) -> None:
    rng = random.Random(seed)
    while True:
        # Some keys are asked for far more often: hits, and several processes after the same.
        key = f"train/{int(load.num_objects * rng.random() ** 3)}.jpg"
        whole = bytes(store.inside.get(key))
        byte_range = None
        if rng.random() < 0.2:
            start = rng.randrange(len(whole))
            byte_range = ByteRange(start, min(len(whole), start + 1000))
        expected = whole if byte_range is None else whole[byte_range.start : byte_range.stop]
        got = bytes(store.get(key, byte_range))
        num_wrong[number] += got != expected
        read_bytes[number] += len(got)
