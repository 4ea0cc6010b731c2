from __future__ import annotations

import pickle
import struct
import sys
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrent_dataloader.errors import MissingDependencyError, ShardFormatError
from concurrent_dataloader.formats.lmdb_record import (
    DatabaseMetadata,
    Record,
    count_record_bytes,
    pack_labels,
    pack_metadata,
    pack_record,
    parse_labels,
    parse_metadata,
    parse_older_keys,
    parse_older_record,
    parse_record,
    position_of_key,
    record_key,
)

IMAGE = bytes(range(256)) * 3
METADATA = DatabaseMetadata(
    num_records=3,
    order="shuffled",
    seed=7,
    split="train",
    classes=["cat", "dog"],
    label_space="custom",
    plan="p",
    complete=True,
)


@given(st.text(max_size=80), st.none() | st.integers(0, 2**31 - 1), st.binary(max_size=300))
def test_a_record_comes_back_as_it_was(name: str, label: int | None, payload: bytes) -> None:
    name = name.encode("utf-8", "replace").decode()

    packed = pack_record(Record(name, label, payload))
    record = parse_record(packed, "db, record 0")

    assert (record.name, record.label, bytes(record.payload)) == (name, label, payload)
    assert len(packed) == count_record_bytes(name, len(payload))


def test_a_record_has_the_layout_that_is_documented() -> None:
    packed = pack_record(Record("a/é.jpg", 5, b"bytes"))

    name = "a/é.jpg".encode()
    assert packed[:8] == struct.pack("<BBHi", 1, 0, len(name), 5)
    assert packed[12:] == name + b"bytes"


def test_the_payload_is_no_copy() -> None:
    packed = pack_record(Record("a", 1, IMAGE))

    payload = parse_record(packed, "db").payload

    assert isinstance(payload, memoryview)
    assert payload.obj is packed


@given(st.integers(0, 12 + 1 + len(IMAGE) - 1), st.integers(1, 255))
def test_a_changed_byte_is_found_wherever_it_is(at: int, change: int) -> None:
    packed = bytearray(pack_record(Record("a", 1, IMAGE)))
    packed[at] ^= change

    with pytest.raises(ShardFormatError, match="db, record 4: got a record"):
        parse_record(packed, "db, record 4")


@given(st.integers(0, 12 + 1 + len(IMAGE) - 1))
def test_a_record_that_is_cut_short_is_found(length: int) -> None:
    packed = pack_record(Record("a", 1, IMAGE))[:length]

    with pytest.raises(ShardFormatError, match="got a record"):
        parse_record(packed, "db")


def test_a_record_of_a_later_version_says_so() -> None:
    packed = b"\x02" + pack_record(Record("a", 1, IMAGE))[1:]

    with pytest.raises(ShardFormatError, match=r"version 2 .* expected version 1"):
        parse_record(packed, "db")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record("n" * 65536, 0, b""), "name: got 65536 bytes"),
        (Record("n", -1, b""), "got label -1, expected 0"),
        (Record("n", 2**31, b""), "got label 2147483648"),
    ],
)
def test_what_does_not_fit_is_refused(record: Record, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_record(record)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2))
def test_keys_sort_as_positions_do(positions: list[int]) -> None:
    keys = sorted(map(record_key, positions))

    assert [position_of_key(key) for key in keys] == sorted(positions)


@pytest.mark.parametrize("key", [b"metadata", b"labels", b"r", b"00000001", b"__keys__"])
def test_other_keys_are_no_positions(key: bytes) -> None:
    assert position_of_key(key) is None


def test_metadata_come_back_as_they_were() -> None:
    assert parse_metadata(pack_metadata(METADATA), "db") == METADATA


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x80\x04N.", "no JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "got format None"),
        (pack_metadata(METADATA).replace(b'"version":1', b'"version":2'), "of version 2"),
        (pack_metadata(METADATA).replace(b'"plan":"p",', b""), "lacks fields"),
        (pack_metadata(METADATA).replace(b'"num_records":3', b'"num_records":"3"'), "other types"),
        (pack_metadata(METADATA).replace(b'["cat","dog"]', b'[1,"dog"]'), "other types"),
    ],
)
def test_metadata_that_are_not_ours_are_refused(raw: bytes, message: str) -> None:
    with pytest.raises(ShardFormatError, match=f"^db: .*{message}"):
        parse_metadata(raw, "db")


def test_labels_come_back_as_they_were() -> None:
    labels = parse_labels(pack_labels([3, None, 0]), 3, "db")

    assert labels.tolist() == [3, -1, 0]


def test_labels_that_are_too_few_are_refused() -> None:
    with pytest.raises(ShardFormatError, match="got 8 bytes of labels, expected 12"):
        parse_labels(pack_labels([3, None]), 3, "db")


# -- the older system's


def as_extended(value: object) -> object:
    """What the numpy extension of msgpack makes of an array or a scalar."""
    if isinstance(value, np.ndarray):
        return {
            b"nd": True,
            b"type": value.dtype.str,
            b"kind": b"",
            b"shape": value.shape,
            b"data": value.tobytes(),
        }
    assert isinstance(value, np.generic)
    return {b"nd": False, b"type": value.dtype.str, b"data": value.tobytes()}


def as_msgpack(value: object) -> bytes:
    packed = msgpack.packb(value, use_bin_type=True, default=as_extended)
    assert packed is not None
    return packed


ARRAY = np.frombuffer(IMAGE, np.uint8)
OLDER_VALUES = [
    *(pickle.dumps([ARRAY, 281], protocol) for protocol in range(2, 6)),
    *(pickle.dumps([IMAGE, 281], protocol) for protocol in range(2, 6)),
    pickle.dumps((ARRAY.copy(), np.int64(281)), 4),
    as_msgpack([ARRAY, 281]),
    as_msgpack([ARRAY, np.int64(281)]),
    # numpy 1.x named its modules otherwise than 2.x; each reads the other's.
    pickle.dumps([ARRAY, 281], 2).replace(b"numpy._core", b"numpy.core"),
    pickle.dumps([ARRAY, 281], 2).replace(b"numpy.core", b"numpy._core"),
]


@pytest.mark.parametrize("raw", OLDER_VALUES, ids=range(len(OLDER_VALUES)))
def test_what_the_older_system_wrote_is_read(raw: bytes) -> None:
    record = parse_older_record(raw, "db")

    assert (record.name, record.label, bytes(record.payload)) == ("", 281, IMAGE)


@pytest.mark.parametrize("write", [lambda keys: pickle.dumps(keys, 4), as_msgpack])
def test_its_list_of_keys_is_read(write: Any) -> None:
    keys = [b"00000000", b"00000001"]

    assert parse_older_keys(write(keys), "db") == keys


class Runs:
    """A pickle that runs what it names when it is read."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call = call
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments


def _note_that_it_ran() -> None:
    ran.append(True)


ran: list[bool] = []


@pytest.mark.parametrize(
    "planted",
    [
        Runs(_note_that_it_ran),
        Runs(exec, "raise SystemExit"),
        Runs(eval, "1"),
        Runs(getattr, "text", "upper"),
        Runs(np.load, "file"),
        Runs(np.fromfile, "file"),
        Runs(__import__, "os"),
    ],
    ids=lambda planted: planted.call.__name__,
)
def test_b_09_a_planted_pickle_runs_nothing(planted: Runs) -> None:
    ran.clear()

    for protocol in range(2, 6):
        for raw in (pickle.dumps([planted, 1], protocol), pickle.dumps(planted, protocol)):
            with pytest.raises(ShardFormatError, match=r"^db: got a pickle that is not read here"):
                parse_older_record(raw, "db")

    assert not ran


def test_bytes_by_any_codec_but_latin1_are_refused() -> None:
    # What pickles of protocol 2 make bytes by, asked for a codec that unpacks.
    raw = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R."

    with pytest.raises(ShardFormatError, match="encoding 'hex', expected 'latin1'"):
        parse_older_record(raw, "db")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "got 0 bytes"),
        (b"\xff\xd8\xff\xe0", "got 4 bytes that begin with"),
        (pickle.dumps([IMAGE, 1], 4)[:-20], "got a pickle that is not read here"),
        (as_msgpack([IMAGE, 1])[:-20], "got msgpack that is not read here"),
        (pickle.dumps([IMAGE], 4), "got list, expected a list of an image's bytes and a label"),
        (pickle.dumps([IMAGE, "cat"], 4), "got label 'cat'"),
        (pickle.dumps([IMAGE, -1], 4), "got label -1"),
        (pickle.dumps([IMAGE, True], 4), "got label True"),
        (pickle.dumps(["text", 1], 4), "got an image of type str"),
        (pickle.dumps([np.zeros((2, 2), np.uint8), 1], 4), r"got an array of uint8 \(2, 2\)"),
        (pickle.dumps([np.zeros(2), 1], 4), "got an array of float64"),
        (pickle.dumps({}, 4), "got dict"),
    ],
)
def test_b_09_what_is_no_record_is_named(raw: bytes, message: str) -> None:
    with pytest.raises(ShardFormatError, match=f"^db: .*{message}"):
        parse_older_record(raw, "db")


@pytest.mark.parametrize("keys", [{"a": 1}, [1, 2], 5])
def test_a_list_of_keys_that_is_none_is_named(keys: object) -> None:
    with pytest.raises(ShardFormatError, match=r"^db, key '__keys__': got"):
        parse_older_keys(pickle.dumps(keys, 4), "db")


def test_without_msgpack_its_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)

    with pytest.raises(MissingDependencyError, match="pip install msgpack"):
        parse_older_record(as_msgpack([IMAGE, 1]), "db")
