"""Write samples into a tar, in the layout that `tar` reads: the same bytes on any machine."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.formats.crc32c import CrcTable, crc32c
from concurrent_dataloader.formats.tar import (
    BLOCK_BYTES,
    END_OF_ARCHIVE,
    Member,
    SampleMembers,
    split_name,
)
from concurrent_dataloader.ranges import ByteRange

_ZEROS = bytes(BLOCK_BYTES)
# Contents up to this size are written together with the headers around them.
_SMALL_BYTES = 4096


class Writable(Protocol):
    """What is written front to back."""

    def writelines(self, pieces: Iterable[Any], /) -> None:
        """Write all of each piece, one after the other; pieces do not change any more."""
        ...


class TarChecksums(NamedTuple):
    """CRC-32Cs of what a `TarWriter` has written."""

    tar: str
    """Of the whole file, in hex."""

    samples: NDArray[np.int64]
    """Of the extent of each sample, (N,) int64."""


class TarWriter:
    """Writes samples; the same samples in the same order give the same bytes, on any machine.

    Owner, time and rights are the same for all members. Names that ustar cannot hold, and members
    of 8 GiB and more, get pax headers.
    """

    def __init__(self, file: Writable) -> None:
        """Begin a tar.

        Args:
            file: Written to front to back; stays the caller's to close.
        """
        self._file = file
        self._crcs = CrcTable()
        self.size_bytes = 0
        """Bytes written so far."""

    def write(self, key: str, fields: Mapping[str, Buffer]) -> SampleMembers:
        """Write a sample, its fields in the order of their names.

        Args:
            key: Name without field; no dot after its last slash, since that would begin the field.
            fields: Content by field.

        Returns:
            Where it lies in the tar.

        Raises:
            ValueError: The key, or a field, would be read back as another, or there is no field.
        """
        if not fields:
            raise ValueError(f"{key!r}: got no field, expected at least one")
        members: dict[str, Member] = {}
        pieces: list[Buffer] = []
        small: list[Buffer] = []  # headers, paddings and labels, which are written as one
        for field, content in sorted(fields.items()):
            name = f"{key}.{field}"
            if split_name(name) != (key, field):
                raise ValueError(
                    f"{name!r}: would be read as {split_name(name)}, expected key {key!r} and field"
                    f" {field!r}; no dot in the last part of a key, no upper case in a field"
                )
            data = memoryview(content).cast("B")
            num_bytes, crc = data.nbytes, crc32c(content)
            header = encode_header(name, num_bytes)
            start = self.size_bytes
            data_start = start + len(header)
            small.append(header)
            if num_bytes <= _SMALL_BYTES:
                small.append(data)
            else:
                self._add_small(pieces, small)
                self._crcs.add(crc, num_bytes)
                pieces.append(data)
            small.append(_ZEROS[: -num_bytes % BLOCK_BYTES])
            self.size_bytes = data_start + num_bytes + -num_bytes % BLOCK_BYTES
            members[field] = Member(name, start, ByteRange(data_start, data_start + num_bytes), crc)
        self._add_small(pieces, small)
        self._crcs.end_sample()
        self._file.writelines(pieces)
        return SampleMembers(key, members)

    def _add_small(self, pieces: list[Buffer], small: list[Buffer]) -> None:
        joined = b"".join(small)
        small.clear()
        if joined:
            self._crcs.add(crc32c(joined), len(joined))
            pieces.append(joined)

    def close(self) -> TarChecksums:
        """Write the end of the archive, and give the checksums of all that was written."""
        self._crcs.add(crc32c(END_OF_ARCHIVE), len(END_OF_ARCHIVE))
        self._file.writelines([END_OF_ARCHIVE])
        self.size_bytes += len(END_OF_ARCHIVE)
        return TarChecksums(self._crcs.of_all(), self._crcs.of_samples())


def encode_header(name: str, size_bytes: int) -> bytes:
    """Make the header of a regular file, the same on any machine."""
    if len(name) > _PLAIN_NAME_BYTES or size_bytes >= _PLAIN_SIZE_BYTES or not name.isascii():
        return _encode_any_header(name, size_bytes)
    # The same bytes, from the header of an empty name: 2 instead of 13 us, twice a sample.
    raw_name, size = name.encode("ascii"), b"%011o" % size_bytes
    checksum = _PLAIN_CHECKSUM + sum(raw_name) + sum(size)
    return b"".join(
        (
            raw_name.ljust(_PLAIN_NAME_BYTES, b"\0"),
            _PLAIN_HEADER[100:124],
            size,
            _PLAIN_HEADER[135:148],
            b"%06o" % checksum,
            _PLAIN_HEADER[154:],
        )
    )


def _encode_any_header(name: str, size_bytes: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    info.mode = 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


# What ustar has room for: more takes an extended header.
_PLAIN_NAME_BYTES = 100
_PLAIN_SIZE_BYTES = 8 << 30
_PLAIN_HEADER = _encode_any_header("", 0)
# With the size left out, whose eleven digits are zeros there.
_PLAIN_CHECKSUM = int(_PLAIN_HEADER[148:154], 8) - 11 * ord("0")


def count_sample_bytes(key: str, fields: Mapping[str, Buffer]) -> int:
    """Tell how much of a tar a sample takes, headers and padding included."""
    total = 0
    for field, content in fields.items():
        size = memoryview(content).nbytes
        total += len(encode_header(f"{key}.{field}", size)) + size + -size % BLOCK_BYTES
    return total
