"""An archive as a file that reads ahead as far as it pays."""

from __future__ import annotations

import io

from typing_extensions import Buffer, override

from concurrent_dataloader.stores import RangedFile, Store

_LOCAL_WINDOW_BYTES = 4096
# A header costs a request anyway; this much more costs 1 ms at 500 Mbit/s.
_REMOTE_WINDOW_BYTES = 64 << 10
# What is read in about the time that a request takes, so that latency is half of the whole.
_MAX_WINDOW_BYTES = 8 << 20


class ReadAheadFile(io.RawIOBase):
    """A read-only file over an object, for going through it from front to back with skips.

    How much is read at once doubles while the next read lies close behind what was read, and falls
    back when it lies far: members that stand side by side are read through, long ones are skipped.
    On this machine, where a request is cheap, only reading without any skip makes it grow. Not for
    several threads at once. Closing it leaves the store open.
    """

    def __init__(self, store: Store, key: str, stop: int | None, *, is_remote: bool) -> None:
        """Open the object.

        Args:
            store: Where it lies; the caller closes it.
            key: Its name.
            stop: Where the file is to end; None: at the end of the object, which is asked for.
            is_remote: Whether a request waits for a network.

        Raises:
            KeyNotFoundError: There is no such object.
        """
        super().__init__()
        self._file = RangedFile(store, key, stop)
        self._is_remote = is_remote
        self._min_bytes = _REMOTE_WINDOW_BYTES if is_remote else _LOCAL_WINDOW_BYTES
        self._window_bytes = self._min_bytes
        self._block = memoryview(b"")
        self._block_start = 0
        self._position = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._position

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Set the position; reads nothing."""
        if whence == io.SEEK_CUR:
            offset, whence = offset + self._position, io.SEEK_SET
        self._position = self._file.seek(offset, whence)
        return self._position

    @override
    def readinto(self, buffer: Buffer, /) -> int:
        """Fill the buffer, but at the end of the file."""
        target = memoryview(buffer).cast("B")
        filled = 0
        while filled < target.nbytes:
            begin = self._position - self._block_start
            if not 0 <= begin < self._block.nbytes and not self._fetch():
                break
            begin = self._position - self._block_start
            piece = self._block[begin : begin + target.nbytes - filled]
            target[filled : filled + piece.nbytes] = piece
            filled += piece.nbytes
            self._position += piece.nbytes
        return filled

    def _fetch(self) -> bool:
        """Read on from the position; tells whether there was anything."""
        gap = self._position - (self._block_start + self._block.nbytes)
        is_near = 0 <= gap < self._window_bytes if self._is_remote else gap == 0
        is_first = not self._block.nbytes
        if is_near and not is_first:
            self._window_bytes = min(2 * self._window_bytes, _MAX_WINDOW_BYTES)
        else:
            self._window_bytes = self._min_bytes
        self._file.seek(self._position)
        self._block_start = self._position
        self._block = memoryview(self._file.read(self._window_bytes))
        return self._block.nbytes > 0
