"""A shard that is being written: gathered, hashed beside the writing, and what is told of it."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.prepare.metadata import ShardMetadata

_GATHER_BYTES = 1 << 18
_MAX_GATHERED = 1000  # Linux takes 1024 pieces at once
_EAGER_BYTES = 8 << 20


class WrittenShard(NamedTuple):
    """A shard that is there, and where its samples lie in it."""

    shard: ShardMetadata
    extents: NDArray[np.int64]
    """Start and stop of each sample, (n, 2)."""

    payloads: NDArray[np.int64]
    """Start and stop of each sample's payload, (n, 2)."""

    crcs: NDArray[np.int64]
    """CRC-32C of each sample's extent and payload, (n, 2)."""


class ShardFile(Protocol):
    """A file that is written front to back."""

    def write(self, piece: bytes, /) -> int:
        """Write all of ``piece``, and give its length."""
        ...

    def writelines(self, pieces: Iterable[Any], /) -> None:
        """Write all of each piece; bytes, or flat views of bytes, that do not change any more."""
        ...


class Md5Thread:
    """MD5 of what is written, computed beside the writing: it takes longer than the writing."""

    _BATCH_BYTES = 1 << 20

    def __init__(self) -> None:
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._batch: list[Buffer] = []
        self._batch_bytes = 0
        self._batches: queue.Queue[list[Buffer] | None] = queue.Queue(maxsize=8)
        self._thread = threading.Thread(target=self._run, name="shard-md5", daemon=True)
        self._thread.start()

    def update(self, piece: Buffer, /) -> None:
        """Add a piece, which must not change any more."""
        self._batch.append(piece)
        self._batch_bytes += memoryview(piece).nbytes
        if self._batch_bytes >= self._BATCH_BYTES:
            self._batches.put(self._batch)
            self._batch, self._batch_bytes = [], 0

    def hexdigest(self) -> str:
        """Wait for the end, and give the MD5."""
        self._batches.put(self._batch)
        self._batch = []
        self.close()
        return self._md5.hexdigest()

    def close(self) -> None:
        """End the thread; may be called twice."""
        if self._thread.is_alive():
            self._batches.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            for piece in batch:
                self._md5.update(piece)


class HashedFile:
    """A `ShardFile` around another, whose MD5 is computed as it is written, if that is asked for.

    A context manager, which ends the thread that computes.
    """

    def __init__(self, file: ShardFile, *, md5: bool) -> None:
        self._file = file
        self._md5 = Md5Thread() if md5 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._md5 is not None:
            self._md5.close()

    def write(self, piece: bytes, /) -> int:
        """Write as `ShardFile.write` does."""
        self.writelines((piece,))
        return len(piece)

    def writelines(self, pieces: Iterable[Any], /) -> None:
        """Write as `ShardFile.writelines` does."""
        if self._md5 is not None:
            pieces = list(pieces)
            for piece in pieces:
                self._md5.update(piece)
        self._file.writelines(pieces)

    def hexdigest(self) -> str | None:
        """Give the MD5 of all that was written; None if it was not asked for."""
        return None if self._md5 is None else self._md5.hexdigest()


class GatheringFile:
    """A file that is written by few system calls, without copying what is written.

    Its pages begin their way to the disk early, so that `sync` hardly waits.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)
        self._pieces: list[Buffer] = []
        self._gathered_bytes = 0
        self._written_bytes = 0
        self._begun_bytes = 0

    def write(self, piece: bytes, /) -> int:
        """Write as `ShardFile.write` does."""
        self.writelines((piece,))
        return len(piece)

    def writelines(self, pieces: Iterable[Any], /) -> None:
        """Write as `ShardFile.writelines` does."""
        for piece in pieces:
            self._pieces.append(piece)
            self._gathered_bytes += len(piece)
            if self._gathered_bytes >= _GATHER_BYTES or len(self._pieces) >= _MAX_GATHERED:
                self._put()

    def _put(self) -> None:
        pieces, self._pieces = self._pieces, []
        left, self._gathered_bytes = self._gathered_bytes, 0
        while left:
            num_bytes = os.writev(self._descriptor, pieces)
            self._written_bytes += num_bytes
            left -= num_bytes
            if left:  # 2 GiB at once, or a full disk, of which the next attempt tells
                pieces = _skip_bytes(pieces, num_bytes)
        pending = self._written_bytes - self._begun_bytes
        if pending >= _EAGER_BYTES and hasattr(os, "posix_fadvise"):
            # Linux begins to write dirty pages that are so marked, and keeps nearly all of them in
            # its cache. It is advice only: where it does otherwise, fsync waits as ever.
            advice = os.POSIX_FADV_DONTNEED
            os.posix_fadvise(self._descriptor, self._begun_bytes, pending, advice)
            self._begun_bytes = self._written_bytes

    def sync(self) -> None:
        """Write what was gathered, and wait until all of it is on the disk."""
        self._put()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close it; what was not synced may be lost."""
        os.close(self._descriptor)


def _skip_bytes(pieces: Sequence[Buffer], num_bytes: int) -> list[Buffer]:
    """Give what is left of ``pieces`` after their first bytes."""
    for number, piece in enumerate(pieces):
        view = memoryview(piece)
        if num_bytes < view.nbytes:
            return [view[num_bytes:], *pieces[number + 1 :]]
        num_bytes -= view.nbytes
    return []
