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
     80   u32  CRC-32 of the object sizes
     84        zeros
     124  u32  CRC-32 of bytes 0 to 124
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
_HEADER = struct.Struct("<8sIIQQQq16s16sI40x")
_HEADER_BYTES = 128  # with its own CRC
# Each look-up maps up to 2 x 64 KiB (the kernel maps a page's neighbours), so 32 of them 4 MiB.
_LOOK_UPS_HELD = 32


class PackedSource(NamedTuple):
    """The JSON file of which a packed file was made."""

    size_bytes: int
    mtime_ns: int
    digest: bytes


NO_SOURCE = PackedSource(0, 0, bytes(16))


class _Header(NamedTuple):
    """What the head of a packed file says, in its order; `_HEADER` lays it out."""

    magic: bytes
    version: int
    flags: int
    num_keys: int
    blob_bytes: int
    source_bytes: int
    source_mtime_ns: int
    source_digest: bytes
    checksum: bytes
    sizes_crc: int


class MappedFile:
    """A packed file that is mapped; pages that were read are given back as look-ups go on.

    They are the page cache's, but would count as private memory of a process that alone has them
    mapped. ``_look_ups`` is not guarded: a lost count only moves the next release.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, header: _Header, mtime_ns: int) -> None:
        self.path = path
        self.checksum = header.checksum
        self.sizes_crc = header.sizes_crc
        self.source = PackedSource(
            header.source_bytes, header.source_mtime_ns, header.source_digest
        )
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

    def verify(self) -> None:
        """Compare all of a mapped file with its checksums; keys in memory are right.

        Raises:
            IndexFormatError: It is damaged.
        """
        if self.file is None:
            return
        same_keys = digest_keys(self.blob, self.offsets) == self.file.checksum
        same_sizes = _sizes_crc(self.sizes) == self.file.sizes_crc
        self.release()
        if not same_keys or not same_sizes:
            what = "object sizes" if same_keys else "keys"
            raise IndexFormatError(
                f"{self.file.path}: the {what} do not match the checksum in the file; remove it"
            )


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


def _sizes_crc(sizes: NDArray[np.int64] | None) -> int:
    return 0 if sizes is None else zlib.crc32(np.ascontiguousarray(sizes, "<i8").data)


def packed_pieces(
    blob: memoryview,
    offsets: NDArray[np.int64],
    sizes: NDArray[np.int64] | None,
    source: PackedSource,
) -> Iterator[Buffer]:
    """Yield the packed file, piece by piece."""
    fields = _Header(
        magic=MAGIC,
        version=_VERSION,
        flags=0 if sizes is None else _HAS_SIZES,
        num_keys=len(offsets) - 1,
        blob_bytes=len(blob),
        source_bytes=source.size_bytes,
        source_mtime_ns=source.mtime_ns,
        source_digest=source.digest,
        checksum=digest_keys(blob, offsets),
        sizes_crc=_sizes_crc(sizes),
    )
    header = _HEADER.pack(*fields)
    yield header + struct.pack("<I", zlib.crc32(header))
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
        header = _parse_header(path, file.read(_HEADER_BYTES))
        sizes_at = _HEADER_BYTES + 8 * (header.num_keys + 1)
        has_sizes = bool(header.flags & _HAS_SIZES)
        blob_at = sizes_at + (8 * header.num_keys if has_sizes else 0)
        if status.st_size != blob_at + header.blob_bytes:
            raise IndexFormatError(
                f"{path}: got {status.st_size} bytes, expected {blob_at + header.blob_bytes};"
                " the packed index was cut short, remove it"
            )
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    offsets = np.frombuffer(mapped, "<i8", header.num_keys + 1, _HEADER_BYTES)
    sizes = np.frombuffer(mapped, "<i8", header.num_keys, sizes_at) if has_sizes else None
    in_order = not np.any(offsets[1:] < offsets[:-1])
    if offsets[0] != 0 or offsets[-1] != header.blob_bytes or not in_order:
        raise IndexFormatError(f"{path}: the offsets are damaged; remove it")
    handle = MappedFile(Path(os.path.abspath(path)), mapped, header, status.st_mtime_ns)
    handle.release()
    return PackedKeys(memoryview(mapped)[blob_at:], offsets, sizes, handle)


def _parse_header(path: Path, raw: bytes) -> _Header:
    if len(raw) < _HEADER_BYTES:
        raise IndexFormatError(
            f"{path}: got {len(raw)} bytes, expected {_HEADER_BYTES} or more;"
            " the packed index was cut short, remove it"
        )
    header = _Header(*_HEADER.unpack(raw[: _HEADER.size]))
    if header.magic != MAGIC:
        raise IndexFormatError(f"{path}: got {header.magic!r} at its start, expected {MAGIC!r}")
    if header.version != _VERSION:
        raise IndexFormatError(
            f"{path}: got version {header.version} of the packed form, expected {_VERSION};"
            " remove it"
        )
    if raw[_HEADER.size :] != struct.pack("<I", zlib.crc32(raw[: _HEADER.size])):
        raise IndexFormatError(f"{path}: the header is damaged; remove it")
    return header
