"""Samples of a source in a given order, read ahead by threads where reading waits."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from typing_extensions import Buffer

from concurrent_dataloader.prepare.source import Source
from concurrent_dataloader.threads import FutureThreads

_AHEAD_BYTES = 64 << 20
# Handing a sample over between threads costs some 0.05 ms, and a read from a disk's cache less than
# 0.1 ms; one that takes longer than this waits for something.
_SLOW_READ_S = 2e-3
_NUM_TIMED_READS = 7


class Reader:
    """Reads samples of a source; one for each process, used by one thread."""

    def __init__(self, source: Source, num_readers: int) -> None:
        """Start no thread yet.

        Args:
            source: The samples.
            num_readers: Reads at once, at most.
        """
        self._source = source
        self._num_readers = num_readers
        self._threads: FutureThreads | None = None
        self._durations_s: collections.deque[float] = collections.deque(maxlen=_NUM_TIMED_READS)
        self._mean_bytes = 0.0

    def read(self, positions: Sequence[int]) -> Iterator[Buffer]:
        """Yield samples in the order of ``positions``.

        Raises:
            LoaderError: As `Source.read`; samples before that one have been yielded.
        """
        done = 0
        while self._threads is None and done < len(positions):
            yield self._read_timed(positions[done])
            done += 1
            if self._is_slow():
                self._threads = FutureThreads(self._num_readers, "shard-reader")
        if self._threads is not None:
            yield from self._read_ahead(self._threads, positions[done:])

    def _read_timed(self, position: int) -> Buffer:
        begin = time.perf_counter()
        raw = self._source.read(position)
        self._durations_s.append(time.perf_counter() - begin)
        return raw

    def _is_slow(self) -> bool:
        """Tell by the median, since a single read may have waited for a busy machine."""
        durations_s = sorted(self._durations_s)
        return (
            len(durations_s) == _NUM_TIMED_READS
            and durations_s[_NUM_TIMED_READS // 2] > _SLOW_READ_S
        )

    def _read_ahead(self, threads: FutureThreads, positions: Sequence[int]) -> Iterator[Buffer]:
        waiting: collections.deque[tuple[Future[Buffer], float]] = collections.deque()
        ahead_bytes = 0.0
        begun = 0
        try:
            while waiting or begun < len(positions):
                while begun < len(positions) and len(waiting) < self._num_readers:
                    size = self._expected_bytes(positions[begun])
                    if waiting and ahead_bytes + size > _AHEAD_BYTES:
                        break
                    future = threads.submit(self._source.read, positions[begun])
                    waiting.append((future, size))
                    ahead_bytes += size
                    begun += 1
                future, size = waiting.popleft()
                raw = future.result()
                ahead_bytes -= size
                self._mean_bytes += (memoryview(raw).nbytes - self._mean_bytes) / 8
                yield raw
        finally:
            for future, _ in waiting:
                future.cancel()

    def _expected_bytes(self, position: int) -> float:
        size = self._source.size_bytes(position)
        return self._mean_bytes if size is None else size

    def close(self) -> None:
        """End the threads; may be called twice."""
        if self._threads is not None:
            self._threads.stop()
            self._threads = None
