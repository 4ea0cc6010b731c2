"""Many short strings as three flat arrays, in memory or mapped from a file.

The packed file, version 1, little-endian:

```text
byte 0    8s   magic "CDLINDEX"
     8    u32  version, 1
     12   u32  flags; 1: object sizes are there
     16   u64  count, the number of keys
     24   u64  bytes of all keys
     32   u64  size of the JSON file that it was made of, in bytes; 0: of none
     40   i64  modification time of that file, in ns
     48   16s  BLAKE2b-128 of that file
     64   16s  BLAKE2b-128 of the offsets and the keys
     80   u32  CRC-32 of bytes 0 to 80
     128       offsets, i64 each, count + 1 of them; key i is at [offset[i], offset[i + 1])
               object sizes in bytes, i64 each, count of them, if the flag says so
               the keys, UTF-8, one after the other
```
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.errors import IndexFormatError

MAGIC = b"CDLINDEX"

_VERSION = 1
_HAS_SIZES = 1
_HEADER = struct.Struct("<8sIIQQQq16s16s")
_HEADER_BYTES = 128
# Each look-up maps up to 2 x 64 KiB (the kernel maps a page's neighbours), so 32 of them 4 MiB.
_LOOK_UPS_HELD = 32


class PackedSource(NamedTuple):
    """The JSON file of which a packed file was made."""

    size_bytes: int
    mtime_ns: int
    digest: bytes


NO_SOURCE = PackedSource(0, 0, bytes(16))


class MappedFile:
    """A packed file that is mapped; pages that were read are given back as look-ups go on.

    They are the page cache's, but would count as private memory of a process that alone has them
    mapped. ``_look_ups`` is not guarded: a lost count only moves the next release.
    """

    def __init__(
        self, path: Path, mapped: mmap.mmap, checksum: bytes, source: PackedSource, mtime_ns: int
    ) -> None:
        self.path = path
        self.checksum = checksum
        self.source = source
        self.mtime_ns = mtime_ns
        self._mapped = mapped
        self._look_ups = 0

    def count_look_up(self) -> None:
        """Say that a key was read."""
        self._look_ups += 1
        if self._look_ups >= _LOOK_UPS_HELD:
            self.release()

    def release(self) -> None:
        """Give the pages back; those that are read again come from the page cache."""
        self._look_ups = 0
        self._mapped.madvise(mmap.MADV_DONTNEED)


class PackedKeys(NamedTuple):
    """Packed keys, in memory or mapped: key i is ``blob[offsets[i]:offsets[i + 1]]``."""

    blob: memoryview
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64] | None
    file: MappedFile | None

    def release(self) -> None:
        """Give back what of a mapped file is held in memory."""
        if self.file is not None:
            self.file.release()


def pack(keys: list[str], sizes: list[int] | None, where: object) -> PackedKeys:
    """Join keys, after a look at each.

    Args:
        keys: What is to be strings, none of them empty.
        sizes: Size of each object in bytes, where known.
        where: Names the keys' file in errors.

    Raises:
        IndexFormatError: A key is none.
    """
    if set(map(type, keys)) - {str}:
        position = next(i for i, key in enumerate(keys) if type(key) is not str)
        raise IndexFormatError(
            f"{where}, position {position}: got {_shorten(keys[position])}, expected a string"
        )
    joined = "".join(keys)
    try:
        blob = joined.encode()
    except UnicodeEncodeError as error:
        bad = next(key for key in keys if not _is_utf8(key))
        raise IndexFormatError(
            f"{where}: the name {bad!r} is not UTF-8; rename the file"
        ) from error
    if len(blob) == len(joined):
        lengths = np.fromiter(map(len, keys), np.int64, len(keys))
    else:
        lengths = np.fromiter((len(key.encode()) for key in keys), np.int64, len(keys))
    if len(keys) and not lengths.all():
        position = int(np.argmin(lengths))
        raise IndexFormatError(f"{where}, position {position}: got '', expected a key")
    offsets = np.zeros(len(keys) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if sizes is not None and len(sizes) != len(keys):
        raise ValueError(f"sizes: got {len(sizes)} sizes, expected {len(keys)}, one for each key")
    packed_sizes = None if sizes is None else np.array(sizes, np.int64)
    return PackedKeys(memoryview(blob), offsets, packed_sizes, None)


def _is_utf8(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def digest_file(file: BufferedReader) -> bytes:
    """Hash an open file, from its beginning."""
    file.seek(0)
    return hashlib.file_digest(file, _blake2b).digest()


def _blake2b() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def digest_keys(blob: Buffer, offsets: NDArray[np.int64]) -> bytes:
    """Hash keys and their bounds: same keys in the same order, same digest."""
    digest = _blake2b()
    digest.update(np.ascontiguousarray(offsets, "<i8").data)
    digest.update(blob)
    return digest.digest()


def packed_pieces(
    blob: memoryview,
    offsets: NDArray[np.int64],
    sizes: NDArray[np.int64] | None,
    source: PackedSource,
) -> Iterator[Buffer]:
    """Yield the packed file, piece by piece."""
    header = _HEADER.pack(
        MAGIC,
        _VERSION,
        0 if sizes is None else _HAS_SIZES,
        len(offsets) - 1,
        len(blob),
        source.size_bytes,
        source.mtime_ns,
        source.digest,
        digest_keys(blob, offsets),
    )
    header += struct.pack("<I", zlib.crc32(header))
    yield header.ljust(_HEADER_BYTES, b"\0")
    yield np.ascontiguousarray(offsets, "<i8").data
    if sizes is not None:
        yield np.ascontiguousarray(sizes, "<i8").data
    yield blob


def map_packed(path: Path) -> PackedKeys:
    """Map a packed file; its header, length and offsets are checked, its keys are not read.

    Raises:
        OSError: It cannot be read.
        IndexFormatError: It is none, or damaged.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        header = file.read(_HEADER_BYTES)
        count, blob_bytes, flags, source, checksum = _parse_header(path, header)
        sizes_bytes = 8 * count if flags & _HAS_SIZES else 0
        blob_at = _HEADER_BYTES + 8 * (count + 1) + sizes_bytes
        if status.st_size != blob_at + blob_bytes:
            raise IndexFormatError(
                f"{path}: got {status.st_size} bytes, expected {blob_at + blob_bytes};"
                " the packed index was cut short, remove it"
            )
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    offsets = np.frombuffer(mapped, "<i8", count + 1, _HEADER_BYTES)
    sizes = None
    if sizes_bytes:
        sizes = np.frombuffer(mapped, "<i8", count, _HEADER_BYTES + 8 * (count + 1))
    if offsets[0] != 0 or offsets[-1] != blob_bytes or bool(np.any(offsets[1:] < offsets[:-1])):
        raise IndexFormatError(f"{path}: the offsets are damaged; remove it")
    handle = MappedFile(Path(os.path.abspath(path)), mapped, checksum, source, status.st_mtime_ns)
    handle.release()
    return PackedKeys(memoryview(mapped)[blob_at:], offsets, sizes, handle)


def _parse_header(path: Path, header: bytes) -> tuple[int, int, int, PackedSource, bytes]:
    if len(header) < _HEADER_BYTES:
        raise IndexFormatError(
            f"{path}: got {len(header)} bytes, expected {_HEADER_BYTES} or more;"
            " the packed index was cut short, remove it"
        )
    fields = header[: _HEADER.size]
    magic, version, flags, count, blob_bytes, size, mtime_ns, digest, checksum = _HEADER.unpack(
        fields
    )
    if magic != MAGIC:
        raise IndexFormatError(f"{path}: got {magic!r} at its start, expected {MAGIC!r}")
    if version != _VERSION:
        raise IndexFormatError(
            f"{path}: got version {version} of the packed form, expected {_VERSION}; remove it"
        )
    if header[_HEADER.size : _HEADER.size + 4] != struct.pack("<I", zlib.crc32(fields)):
        raise IndexFormatError(f"{path}: the header is damaged; remove it")
    return count, blob_bytes, flags, PackedSource(size, mtime_ns, digest), checksum
