"""CRC-32C of bytes, and of bytes that lie one after the other, by their own CRCs and lengths.

So one pass over a sample gives the checksums of its payload, of the whole sample, and of the shard
that it is written to; and a copied sample keeps the checksum that it had where it was copied from.

Source: RFC 3720, B.4; putting CRCs together as zlib's ``crc32_combine`` does.
"""

from __future__ import annotations

import array
import functools

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.errors import ChecksumError

IS_FAST = google_crc32c.implementation == "c"
"""Whether 100 kB take some 5 us. Else they take 20 ms: compare nothing by default then."""

_POLYNOMIAL = 0x82F63B78


def crc32c(data: Buffer) -> int:
    """Compute the CRC of ``data``; holds the interpreter's lock, some 20 GB/s."""
    if isinstance(data, bytes):
        return int(google_crc32c.value(data))
    view = memoryview(data)
    if not IS_FAST or not view.nbytes:
        return int(google_crc32c.value(view.tobytes()))
    return int(google_crc32c.value(np.frombuffer(view, np.uint8)))  # it takes no memoryview


def join_crcs(crcs: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give the CRC of each row's pieces, one after the other.

    Args:
        crcs: Of each piece, (N, number of pieces).
        lengths: Of each piece in bytes, as ``crcs``.

    Returns:
        (N,).
    """
    # The CRC of all is the sum, without carries, of each piece's as if zeros followed it.
    following = lengths[:, ::-1].cumsum(axis=1)[:, ::-1] - lengths
    shifted = _shift(crcs.ravel(), following.ravel()).reshape(crcs.shape)
    return np.bitwise_xor.reduce(shifted, axis=1)


class CrcTable:
    """The CRCs of samples that are written one after the other, and of all of it together."""

    def __init__(self) -> None:
        self._crcs = array.array("q")
        self._lengths = array.array("q")
        self._ends = array.array("q", [0])

    def add(self, crc: int, num_bytes: int) -> None:
        """Add a piece of the sample that `end_sample` will end."""
        self._crcs.append(crc)
        self._lengths.append(num_bytes)

    def end_sample(self) -> None:
        """Say that the pieces since the last sample are all of it."""
        self._ends.append(len(self._crcs))

    def of_samples(self) -> NDArray[np.int64]:
        """Give the CRC of each sample, (N,) int64."""
        ends = np.array(self._ends, np.int64)
        counts = np.diff(ends)
        places = ends[:-1, None] + np.arange(counts.max(initial=0))
        is_piece = places < ends[1:, None]
        columns = np.where(is_piece, places, 0)
        crcs, lengths = (
            np.where(is_piece, np.array(values or [0], np.int64)[columns], 0)
            for values in (self._crcs, self._lengths)
        )
        return join_crcs(crcs, lengths)

    def of_all(self) -> str:
        """Give the CRC of all pieces, in hex; those after the last sample count too."""
        crcs = np.array(self._crcs, np.int64).reshape(1, -1)
        return format_crc(int(join_crcs(crcs, np.array(self._lengths, np.int64).reshape(1, -1))[0]))


def format_crc(crc: int) -> str:
    """Give a CRC as eight hexadecimal digits."""
    return f"{crc:08x}"


def check_crc(data: Buffer, expected: int, where: str, by: str) -> None:
    """Raise unless ``data`` has the CRC that is expected.

    Args:
        data: The bytes.
        expected: Their CRC.
        where: What errors call them: object, byte range and key.
        by: What says what to expect.

    Raises:
        ChecksumError: It has another.
    """
    got = crc32c(data)
    if got != expected:
        raise ChecksumError(
            f"{where}: got bytes of CRC-32C {format_crc(got)}, expected {format_crc(expected)} by"
            f" {by}; they were changed after they were written: run `concurrent-dataloader"
            " validate`, and fetch or write the shard anew"
        )


def _shift(crcs: NDArray[np.int64], num_zeros: NDArray[np.int64]) -> NDArray[np.int64]:
    """Move CRCs to what they count for when so many zero bytes follow."""
    shifted = crcs.copy()
    for bit in range(int(num_zeros.max(initial=0)).bit_length()):
        chosen = np.flatnonzero(num_zeros >> bit & 1)
        shifted[chosen] = _apply(_shift_table(bit), shifted[chosen])
    return shifted


def _apply(table: NDArray[np.int64], crcs: NDArray[np.int64]) -> NDArray[np.int64]:
    low = table[0][crcs & 255] ^ table[1][crcs >> 8 & 255]
    return low ^ table[2][crcs >> 16 & 255] ^ table[3][crcs >> 24]


@functools.cache
def _shift_table(bit: int) -> NDArray[np.int64]:
    """Tell what each byte of a CRC becomes by ``2**bit`` zero bytes, (4, 256)."""
    if bit:
        half = _shift_table(bit - 1)
        return _apply(half, half.ravel()).reshape(4, 256)
    values = np.arange(256, dtype=np.int64)
    lowest = values
    for _ in range(8):
        lowest = lowest >> 1 ^ (lowest & 1) * _POLYNOMIAL
    return np.stack([lowest, values, values << 8, values << 16])
