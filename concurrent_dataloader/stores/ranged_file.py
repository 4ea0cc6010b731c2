"""An object as a file: seekable, read-only, one ranged request for each read."""

from __future__ import annotations

import io

from typing_extensions import Buffer, override

from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores.base import SizedStore, Store


class RangedFile(io.RawIOBase):
    """A read-only file over an object, for h5py, zipfile, PIL and whatever else seeks.

    Each `read` and `readinto` is exactly one ranged request, none at the end of the object. Wrap it
    in `io.BufferedReader` where many small reads lie side by side. Not for several threads at once.
    Closing it leaves the store open.
    """

    def __init__(self, store: Store, key: str, size_bytes: int | None = None) -> None:
        """Open the object.

        Args:
            store: Where it lies; the caller closes it.
            key: Its name.
            size_bytes: Its size; None: the store is asked, here, once.

        Raises:
            KeyNotFoundError: There is no such object.
            TypeError: No size is given, and the store cannot be asked for one.
        """
        super().__init__()
        if size_bytes is None:
            if not isinstance(store, SizedStore):
                raise TypeError(
                    f"size_bytes: got None and a {type(store).__name__}, which has no head(); "
                    "give the size"
                )
            size_bytes = store.head(key).size_bytes
        self._store = store
        self._key = key
        self._size_bytes = size_bytes
        self._position = 0

    @property
    def name(self) -> str:
        """The object's name for a person, as files have one."""
        return self._store.describe(self._key)

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        self._check_open()
        return self._position

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Set the position; past the end is allowed, and reads nothing there.

        Raises:
            ValueError: ``whence`` is not 0, 1 or 2, or the position would be before the begin.
        """
        self._check_open()
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}
        if whence not in bases:
            raise ValueError(f"whence: got {whence!r}, expected 0, 1 or 2")
        position = bases[whence] + offset
        if position < 0:
            raise ValueError(
                f"offset: got {offset} from {bases[whence]}, expected 0 or more in all"
            )
        self._position = position
        return position

    @override
    def read(self, size: int | None = -1, /) -> bytes:
        """Read ``size`` bytes, fewer only at the end; all that is left when negative or None."""
        return bytes(self._fetch(size))

    @override
    def readall(self) -> bytes:
        return bytes(self._fetch(-1))

    @override
    def readinto(self, buffer: Buffer, /) -> int:
        with memoryview(buffer).cast("B") as target:
            raw = self._fetch(target.nbytes)
            target[: raw.nbytes] = raw
            return raw.nbytes

    def _fetch(self, size: int | None) -> memoryview:
        self._check_open()
        left = max(0, self._size_bytes - self._position)
        length = left if size is None or size < 0 else min(size, left)
        if length == 0:
            return memoryview(b"")
        wanted = ByteRange(self._position, self._position + length)
        raw = memoryview(self._store.get(self._key, wanted)).cast("B")
        self._position = wanted.stop
        return raw

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"{self.name}: I/O on a closed file")
