"""CRC-32C, alone and put together."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrent_dataloader.formats.crc32c import crc32c, join_crcs


def test_the_crc_is_that_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's check value
    assert crc32c(bytes(32)) == 0x8A9136AA


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_any_buffer_has_the_crc_of_its_bytes(size: int) -> None:
    content = bytes(range(250)) * 4
    expected = google_crc32c.value(content[:size])

    assert crc32c(content[:size]) == expected
    assert crc32c(bytearray(content[:size])) == expected
    assert crc32c(memoryview(content)[:size]) == expected
    assert crc32c(memoryview(bytearray(content))[:size]) == expected


@given(st.lists(st.lists(st.binary(max_size=700), min_size=3, max_size=3), max_size=5))
def test_joined_crcs_are_those_of_the_joined_bytes(rows: list[list[bytes]]) -> None:
    crcs = np.array([[google_crc32c.value(piece) for piece in row] for row in rows], np.int64)
    lengths = np.array([[len(piece) for piece in row] for row in rows], np.int64)

    joined = join_crcs(crcs.reshape(-1, 3), lengths.reshape(-1, 3))

    assert joined.tolist() == [google_crc32c.value(b"".join(row)) for row in rows]


def test_crcs_of_gigabytes_are_joined_without_reading_them() -> None:
    zeros = bytes(1 << 20)
    crc, length = google_crc32c.value(zeros), len(zeros)
    for _ in range(12):  # 4 GiB
        crc = int(join_crcs(np.array([[crc, crc]]), np.array([[length, length]]))[0])
        length *= 2

    direct = google_crc32c.value(b"")
    for _ in range(4096):
        direct = google_crc32c.extend(direct, zeros)
    assert crc == direct
