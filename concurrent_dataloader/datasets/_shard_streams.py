"""Bytes of shards, front to back, asked for ahead in large parts.

```text
segments -> ReadAhead -> RangedStream   parts by ranged requests, several under way   -> gunzip?
                      -> PipedStream    what a command writes, one part ahead         -> samples
```

Parts are requested in daemon threads and taken by the one consumer, who waits on a future: nothing
polls. What is under way or waits to be taken is at most ``max_parts`` parts.
"""

from __future__ import annotations

import abc
import bz2
import collections
import gzip
import lzma
import os
import signal
import subprocess
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from typing_extensions import Buffer, override

from concurrent_dataloader.errors import ShardFormatError, StoreError
from concurrent_dataloader.formats.tar import END_OF_ARCHIVE
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores.base import Store
from concurrent_dataloader.threads import FutureThreads

_SKIP_BYTES = 1 << 20
_KILL_TIMEOUT_S = 5.0
_EXIT_TIMEOUT_S = 10.0  # for what a command does after its last byte, such as removing files

_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".tgz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".tbz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".txz": lzma.LZMAFile,
}


class Bytes(Protocol):
    """What is read front to back."""

    def read(self, size: int, /) -> bytes:
        """Read ``size`` bytes, or fewer at the end only."""
        ...


class ShardBytes(NamedTuple):
    """Where the bytes of a segment come from."""

    key: str
    """In the store; or a command."""

    byte_range: ByteRange | None
    """None: all of it, at once."""

    is_command: bool = False
    has_end: bool = True
    """Whether the bytes hold the end of an archive; else zeros stand for it."""


class Stream(abc.ABC):
    """Bytes that arrive in parts; for one thread."""

    def __init__(self, ahead: ReadAhead) -> None:
        self._ahead = ahead
        self._begun: collections.deque[Future[Buffer]] = collections.deque()
        self._view = memoryview(b"")

    @property
    def num_held(self) -> int:
        """Parts that are under way, or have come and were not taken."""
        return len(self._begun)

    @abc.abstractmethod
    def begin(self) -> bool:
        """Ask for the next part; False, and nothing asked for, if there is none, or not now."""

    @abc.abstractmethod
    def _take_after_end(self) -> memoryview | None:
        """Give what follows the last part; None at the end."""

    def close(self) -> None:
        """Ask for no more."""
        self._begun.clear()

    def _take(self) -> memoryview | None:
        self._ahead.refill()
        if not self._begun and not self.begin():
            return self._take_after_end()
        view = memoryview(self._begun.popleft().result()).cast("B")
        self._ahead.refill()
        return view

    def read(self, size: int, /) -> bytes:
        """Read ``size`` bytes, or fewer at the end only. Waits for them."""
        view = self._view
        if size <= len(view):
            self._view = view[size:]
            return bytes(view[:size])
        pieces = [bytes(view)]
        left = size - len(view)
        self._view = memoryview(b"")
        while left:
            taken = self._take()
            if taken is None:
                break
            pieces.append(bytes(taken[:left]))
            self._view = taken[left:]
            left -= len(pieces[-1])
        return b"".join(pieces)

    def read_to_end(self) -> None:
        """Read what is left, for the errors that come at the end."""
        while self.read(_SKIP_BYTES):
            pass


class RangedStream(Stream):
    """A byte range of an object, by ranged requests of which several are under way."""

    def __init__(self, ahead: ReadAhead, source: ShardBytes) -> None:
        super().__init__(ahead)
        self._key = source.key
        self._end = b"" if source.has_end else END_OF_ARCHIVE
        self._parts: collections.deque[ByteRange | None] = collections.deque()
        if source.byte_range is None:
            self._parts.append(None)
        else:
            start, stop = source.byte_range
            for begin in range(start, stop, ahead.part_bytes):
                self._parts.append(ByteRange(begin, min(begin + ahead.part_bytes, stop)))

    @override
    def begin(self) -> bool:
        if not self._parts:
            return False
        self._begun.append(
            self._ahead.submit(_fetch, self._ahead.store, self._key, self._parts.popleft())
        )
        return True

    @override
    def _take_after_end(self) -> memoryview | None:
        end, self._end = self._end, b""
        return memoryview(end) if end else None

    @override
    def close(self) -> None:
        self._parts.clear()
        super().close()


class PipedStream(Stream):
    """What a command writes to its standard output; one part is read while another is used."""

    def __init__(
        self,
        ahead: ReadAhead,
        source: ShardBytes,
        *,
        exit_timeout_s: float = _EXIT_TIMEOUT_S,
    ) -> None:
        super().__init__(ahead)
        self._exit_timeout_s = exit_timeout_s
        self._where = describe_command(source.key)
        # In a group of its own, so that all that the shell has started ends with it.
        self._process = subprocess.Popen(
            source.key,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._owner_pid = os.getpid()
        assert self._process.stdout is not None, "it is a pipe"
        self._pipe = self._process.stdout
        self._is_over = False

    @override
    def begin(self) -> bool:
        if self._begun or self._is_over:
            return False
        self._begun.append(self._ahead.submit(self._read_pipe, self._ahead.part_bytes))
        return True

    def _read_pipe(self, size: int) -> Buffer:
        """Read the next part, and at the end how the command ended; runs in a thread."""
        body = self._pipe.read(size)
        if len(body) == size:
            return body
        try:
            status = self._process.wait(self._exit_timeout_s)
        except subprocess.TimeoutExpired as error:
            end_command(self._process, self._where)
            raise StoreError(
                f"{self._where}: the command closed its output and had not ended"
                f" {self._exit_timeout_s:g} s later, expected it to end; it was killed, and what it"
                " wrote before is not used, as whether it succeeded is not known"
            ) from error
        if status:
            raise StoreError(
                f"{self._where}: the command ended with status {status}, expected 0; what it wrote "
                "before is not used, run it by hand to see why"
            )
        return body

    @override
    def _take(self) -> memoryview | None:
        view = super()._take()
        if view is not None and not view.nbytes:
            self._is_over = True
            return None
        return view

    @override
    def _take_after_end(self) -> memoryview | None:
        return None

    @override
    def close(self) -> None:
        self._is_over = True
        if os.getpid() != self._owner_pid:  # a forked child forgets it, and must not end it
            return
        pipe = self._pipe
        if self._process.poll() is None:
            end_command(self._process, self._where)
        if self._begun:  # a thread reads it, to the end that has just come
            self._begun[-1].add_done_callback(lambda _: pipe.close())
        else:
            pipe.close()
        super().close()


class ReadAhead:
    """The streams of a reader: which parts are asked for, and when.

    Touched by the consumer's thread only, but for the futures.
    """

    def __init__(
        self,
        store: Store,
        sources: Iterable[ShardBytes],
        *,
        part_bytes: int,
        max_parts: int,
        num_open: int,
    ) -> None:
        """Ask for nothing yet.

        Args:
            store: Read from many threads at once.
            sources: What will be opened, in that order.
            part_bytes: Bytes of a request.
            max_parts: Parts under way or waiting, in all streams.
            num_open: Streams that will be read at once.
        """
        self.store = store
        self.part_bytes = part_bytes
        self._max_parts = max_parts
        self._window = max(1, max_parts // num_open)
        self._waiting = collections.deque(sources)
        self._upcoming: collections.deque[Stream] = collections.deque()
        self._active: list[Stream] = []
        self._threads = FutureThreads(max_parts + num_open, "shard-reader")

    def open_next(self) -> Stream:
        """Open the next of the sources; at most as many at once as was said."""
        stream = self._upcoming.popleft() if self._upcoming else self._open()
        self._active.append(stream)
        self.refill()
        return stream

    def drop(self, stream: Stream) -> None:
        """Take note that a stream is at its end."""
        self._active.remove(stream)
        stream.close()
        self.refill()

    def refill(self) -> None:
        """Ask for what may be asked for: first of the streams that are read, then of the next.

        Those that are read hold ``max_parts`` at most (one each, where they are more than that), so
        the next ones get what is left when these come to their ends.
        """
        num_left = self._max_parts
        for stream in self._active:
            while stream.num_held < self._window and stream.begin():
                pass
            num_left -= stream.num_held
        for stream in self._upcoming:
            num_left -= stream.num_held
        for stream in self._each_upcoming():
            while num_left > 0 and stream.num_held < self._window and stream.begin():
                num_left -= 1
            if num_left <= 0:
                return

    def _each_upcoming(self) -> Iterator[Stream]:
        """Give the streams that come next, and open as many as there can be parts."""
        yield from list(self._upcoming)
        while self._waiting and len(self._upcoming) < self._max_parts:
            self._upcoming.append(self._open())
            yield self._upcoming[-1]

    def submit(self, call: Callable[..., Buffer], *arguments: Any) -> Future[Buffer]:
        """Run a call in a thread."""
        return self._threads.submit(call, *arguments)

    def close(self) -> None:
        """End threads and commands; what is under way ends by itself. May be called twice."""
        self._threads.stop()
        for stream in [*self._active, *self._upcoming]:
            stream.close()
        self._active, self._upcoming = [], collections.deque()
        self._waiting.clear()

    def _open(self) -> Stream:
        source = self._waiting.popleft()
        return PipedStream(self, source) if source.is_command else RangedStream(self, source)


def _fetch(store: Store, key: str, byte_range: ByteRange | None) -> Buffer:
    return store.get(key, byte_range)


def end_command(
    process: subprocess.Popen[bytes], where: str, *, timeout_s: float = _KILL_TIMEOUT_S
) -> None:
    """Kill a command with all that it has started; one that stays is told of by a warning."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        # It waits in the kernel, as for a network mount that is gone, where no signal ends it.
        warnings.warn(
            f"{where}: process {process.pid} was killed and is still there {timeout_s:g} s later;"
            " it ends when what it waits for in the system comes",
            ResourceWarning,
            stacklevel=2,
        )


def describe_command(command: str) -> str:
    """Name a command for a person, without its arguments, which may hold secrets."""
    program = command.split()[0] if command.split() else ""
    return "pipe:..." if "=" in program else f"pipe:{program} ..."


# -- compressed streams


def is_compressed(name: str) -> bool:
    """Tell whether the name is that of a compressed shard."""
    return _find_decompressor(name) is not None


def _find_decompressor(name: str) -> Callable[[Any], Any] | None:
    return next((_DECOMPRESSORS[end] for end in _DECOMPRESSORS if name.lower().endswith(end)), None)


class Decompressed:
    """The content of a compressed stream."""

    def __init__(self, stream: Bytes, name: str, where: str) -> None:
        decompress = _find_decompressor(name)
        assert decompress is not None, "the caller asked is_compressed"
        self._file = decompress(stream)
        self._where = where

    def read(self, size: int, /) -> bytes:
        """Read ``size`` bytes, or fewer at the end only.

        Raises:
            ShardFormatError: It is damaged or cut short.
        """
        try:
            return self._file.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, OSError) as error:
            if isinstance(error, StoreError):
                raise
            raise ShardFormatError(
                f"{self._where}: the compressed shard is damaged or cut short ({error}); fetch or "
                "write it anew"
            ) from error

    def read_to_end(self) -> None:
        """Read what is left, which checks that it is whole."""
        while self.read(_SKIP_BYTES):
            pass


def skip(stream: Bytes, num_bytes: int) -> None:
    """Read over bytes."""
    while num_bytes > 0:
        num_bytes -= len(stream.read(min(num_bytes, _SKIP_BYTES))) or num_bytes
