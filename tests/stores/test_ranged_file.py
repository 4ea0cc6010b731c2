from __future__ import annotations

import io
import zipfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typing_extensions import Buffer

from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import RangedFile
from concurrent_dataloader.stores._memory import MemoryStore

TEN = b"0123456789"


class RecordingStore(MemoryStore):
    """Remembers the ranges that it was asked for."""

    def __init__(self, body: bytes) -> None:
        super().__init__({"key": body})
        self.asked: list[ByteRange | None] = []

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        self.asked.append(byte_range)
        return super().get(key, byte_range)


def open_ten() -> tuple[RangedFile, RecordingStore]:
    store = RecordingStore(TEN)
    return RangedFile(store, "key", size_bytes=10), store


def test_each_read_is_one_request_of_just_its_bytes() -> None:
    file, store = open_ten()

    assert [file.read(4), file.read(4), file.read()] == [b"0123", b"4567", b"89"]
    assert store.asked == [(0, 4), (4, 8), (8, 10)]


def test_readinto_and_readall_are_one_request_each() -> None:
    file, store = open_ten()
    buffer = bytearray(4)

    assert file.readinto(buffer) == 4
    assert bytes(buffer) == b"0123"
    assert file.readall() == b"456789"
    assert store.asked == [(0, 4), (4, 10)]


def test_past_the_end_it_gives_the_rest_and_then_nothing_without_a_request() -> None:
    file, store = open_ten()
    file.seek(8)

    assert file.read(100) == b"89"
    assert file.read(100) == b""
    file.seek(1000)
    assert file.read() == b""
    assert file.readinto(bytearray(3)) == 0
    assert store.asked == [(8, 10)]


@pytest.mark.parametrize(
    ("offset", "whence", "expected"), [(3, 0, 3), (2, 1, 7), (-2, 1, 3), (-4, 2, 6), (5, 2, 15)]
)
def test_seek_counts_from_begin_position_and_end(offset: int, whence: int, expected: int) -> None:
    file, _ = open_ten()
    file.seek(5)

    assert file.seek(offset, whence) == file.tell() == expected


def test_a_bad_whence_and_a_negative_position_are_value_errors() -> None:
    file, _ = open_ten()

    with pytest.raises(ValueError, match="whence: got 3"):
        file.seek(0, 3)
    with pytest.raises(ValueError, match="offset: got -11"):
        file.seek(-11, io.SEEK_END)
    assert file.tell() == 0


def test_a_closed_file_is_a_value_error_and_the_store_stays_open() -> None:
    file, store = open_ten()
    with file:
        pass

    with pytest.raises(ValueError, match="closed file"):
        file.read()
    assert bytes(store.get("key")) == TEN


def test_it_cannot_be_written() -> None:
    file, _ = open_ten()

    assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)


def test_the_size_is_asked_for_when_it_is_not_given() -> None:
    assert RangedFile(MemoryStore({"key": TEN}), "key").seek(0, io.SEEK_END) == 10
    with pytest.raises(KeyNotFoundError):
        RangedFile(MemoryStore(), "key")


class UnsizedStore:
    """The smallest storage of a user's own."""

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        raise NotImplementedError

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        raise NotImplementedError

    def describe(self, key: str) -> str:
        return key

    def close(self) -> None:
        pass


def test_a_store_without_head_needs_the_size() -> None:
    with pytest.raises(TypeError, match="size_bytes"):
        RangedFile(UnsizedStore(), "key")


@given(
    body=st.binary(max_size=50),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.integers(-1, 60)),
            st.tuples(st.just("seek"), st.integers(0, 60)),
        )
    ),
)
def test_it_reads_as_bytesio_does(body: bytes, steps: list[tuple[str, int]]) -> None:
    file, oracle = RangedFile(MemoryStore({"key": body}), "key"), io.BytesIO(body)

    for method, argument in steps:
        assert getattr(file, method)(argument) == getattr(oracle, method)(argument)
        assert file.tell() == oracle.tell()


def test_zipfile_and_pillow_read_it() -> None:
    picture = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 30, 40)).save(picture, "PNG")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("a/picture.png", picture.getvalue())
    store = MemoryStore({"zip": archive.getvalue(), "png": picture.getvalue()})

    with zipfile.ZipFile(RangedFile(store, "zip")) as reader:
        member = reader.read("a/picture.png")
    untyped: Any = RangedFile(store, "png")  # typeshed asks for IO[bytes], which RawIOBase is not
    with Image.open(untyped) as image:
        image.load()

    assert member == picture.getvalue()
    assert image.size == (30, 20)
    assert image.getpixel((5, 5)) == (200, 30, 40)


def test_h5py_reads_a_part_of_it() -> None:
    h5py = pytest.importorskip("h5py")
    file = io.BytesIO()
    with h5py.File(file, "w") as writer:
        writer["values"] = range(100_000)
    store = RecordingStore(file.getvalue())

    with h5py.File(RangedFile(store, "key"), "r") as reader:
        window = list(reader["values"][500:510])

    assert window == list(range(500, 510))
    fetched_bytes = sum(asked.stop - asked.start for asked in store.asked if asked is not None)
    assert fetched_bytes < len(file.getvalue()) / 10
