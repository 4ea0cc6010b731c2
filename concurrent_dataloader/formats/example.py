"""``tf.train.Example``: a map from a key to a list of bytes, float32 or int64; read, written.

In protobuf's wire format, without protobuf.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.errors import ShardFormatError

Feature: TypeAlias = list[bytes] | NDArray[np.float32] | NDArray[np.int64]
"""What an Example holds under one key; arrays have one dimension."""

# Source: protobuf.dev/programming-guides/encoding, and tensorflow/core/example/feature.proto.
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3
_MAX_TAG = (1 << 32) - 1
_MAX_VARINT_BYTES = 10
_UINT64_MASK = (1 << 64) - 1

# Below this a loop is faster than numpy's fixed costs.
_FEW_BYTES = 256


def parse_example(payload: Buffer, where: str = "example") -> dict[str, Feature]:
    """Read a ``tf.train.Example``. Pure; takes memory in proportion to the payload only.

    As protobuf does it: unknown fields are skipped, lists may be packed or not, of a key that is
    there twice the last one counts. A feature of no kind is left out.

    Args:
        payload: One record's.
        where: Names the record in errors.

    Returns:
        Features by key, in the order of the payload. Whether an array can be written to is not
        promised.

    Raises:
        ShardFormatError: It is not protobuf's wire format, or a key is not UTF-8.
    """
    wire = _Wire(bytes(payload), where)
    features: dict[str, Feature] = {}
    for message in wire.find_messages(1, 0, wire.size):
        for entry in wire.find_messages(1, *message):
            key, feature = wire.read_entry(*entry)
            if feature is None:
                features.pop(key, None)
            else:
                features[key] = feature
    return features


def serialize_example(features: Mapping[str, Feature]) -> bytes:
    """Write a ``tf.train.Example``, with its keys sorted, so that equal features are equal bytes.

    Raises:
        TypeError: A feature is neither a list of bytes nor an array of float32 or int64 with one
            dimension.
    """
    entries = (
        _field(1, key.encode()) + _field(2, _serialize_feature(key, features[key]))
        for key in sorted(features)
    )
    return _field(1, b"".join(_field(1, entry) for entry in entries))


class _Wire:
    """A payload in protobuf's wire format; parts of it are named by their start and stop."""

    def __init__(self, raw: bytes, where: str) -> None:
        self._raw = raw
        self._where = where
        self.size = len(raw)

    def find_messages(self, number: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Find the messages that stand in a message under one field number."""
        for got, wire_type, at, end in self._fields(start, stop):
            if got == number and wire_type == _LENGTH_DELIMITED:
                yield at, end

    def read_entry(self, start: int, stop: int) -> tuple[str, Feature | None]:
        """Read a key and its feature, which is None where it has no kind."""
        key = b""
        kind = 0
        lists: list[tuple[int, int]] = []
        for number, wire_type, at, end in self._fields(start, stop):
            if wire_type != _LENGTH_DELIMITED:
                continue
            if number == 1:
                key = self._raw[at:end]
            elif number == 2:
                for got, list_wire_type, *place in self._fields(at, end):
                    if list_wire_type != _LENGTH_DELIMITED or got not in (1, 2, 3):
                        continue
                    if got != kind:  # protobuf's "oneof": another kind replaces what was there
                        kind, lists = got, []
                    lists.append((place[0], place[1]))
        try:
            name = key.decode()
        except UnicodeDecodeError as error:
            raise self._error(start, f"got the key {key[:80]!r}, expected UTF-8") from error
        return name, self._read_feature(kind, lists)

    def _read_feature(self, kind: int, lists: list[tuple[int, int]]) -> Feature | None:
        if kind == _BYTES_LIST:
            return [
                self._raw[at:end] for place in lists for at, end in self.find_messages(1, *place)
            ]
        if kind == _FLOAT_LIST:
            blocks = self._read_blocks(lists, _FIXED32)
            return np.frombuffer(b"".join(blocks), "<f4")
        if kind == _INT64_LIST:
            return self._read_varints(b"".join(self._read_blocks(lists, _VARINT)), lists[0][0])
        return None

    def _read_blocks(self, lists: list[tuple[int, int]], unpacked: int) -> Iterator[bytes]:
        """Give the bytes of numbers, packed or one by one: joined, they are the same."""
        for place in lists:
            for number, wire_type, at, end in self._fields(*place):
                if number != 1 or wire_type not in (unpacked, _LENGTH_DELIMITED) or at == end:
                    continue
                if unpacked == _VARINT and self._raw[end - 1] >= 0x80:
                    raise self._error(end, "got a list of integers that ends within one")
                if unpacked == _FIXED32 and (end - at) % 4:
                    raise self._error(at, f"got {end - at} bytes of float32, expected 4 for each")
                yield self._raw[at:end]

    def _read_varints(self, block: bytes, at: int) -> NDArray[np.int64]:
        """Decode whole varints; ``at`` is where they are, for errors."""
        if len(block) > _FEW_BYTES:
            decoded = _decode_many_varints(block)
        else:
            decoded = _decode_few_varints(block)
        if decoded is None:
            raise self._error(at, f"got an integer of more than {_MAX_VARINT_BYTES} bytes")
        return decoded

    def _fields(self, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Give number, wire type, start and stop of each field; of a length's field, without it."""
        while at < stop:
            began = at
            tag, at = self._varint(at, stop)
            number, wire_type = tag >> 3, tag & 7
            if not number or tag > _MAX_TAG:
                raise self._error(began, f"got the field number {number}, which cannot be")
            if wire_type == _LENGTH_DELIMITED:
                length, at = self._varint(at, stop)
                end = at + length
            elif wire_type == _VARINT:
                end = self._varint(at, stop)[1]
            elif wire_type in _WIDTHS:
                end = at + _WIDTHS[wire_type]
            else:
                raise self._error(began, f"got wire type {wire_type}, expected 0, 1, 2 or 5")
            if end > stop:
                raise self._error(
                    began, f"got field {number} of {end - at} bytes, expected {stop - at} at most"
                )
            yield number, wire_type, at, end
            at = end

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        """Decode an unsigned number, and give it with the offset after it."""
        if at < stop and (value := self._raw[at]) < 0x80:  # nearly all of them
            return value, at + 1
        value = 0
        for place, octet in enumerate(self._raw[at : min(stop, at + _MAX_VARINT_BYTES)]):
            value |= (octet & 0x7F) << 7 * place
            if octet < 0x80:
                return value & _UINT64_MASK, at + place + 1
        raise self._error(at, "got a number that does not end")

    def _error(self, at: int, problem: str) -> ShardFormatError:
        return ShardFormatError(
            f"{self._where}: no tf.train.Example: at byte {at} of {self.size} {problem}; was"
            " it written as another kind of record"
        )


def _decode_few_varints(block: bytes) -> NDArray[np.int64] | None:
    values: list[int] = []
    value = shift = 0
    for octet in block:
        value |= (octet & 0x7F) << shift
        shift += 7
        if shift > 7 * _MAX_VARINT_BYTES:
            return None
        if octet < 0x80:
            values.append(value & _UINT64_MASK)
            value = shift = 0
    return np.array(values, np.uint64).view(np.int64)


def _decode_many_varints(block: bytes) -> NDArray[np.int64] | None:
    octets = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(octets < 0x80)
    widths = np.diff(ends, prepend=-1)
    if widths.max() > _MAX_VARINT_BYTES:
        return None
    starts = ends - widths + 1
    values = np.zeros(ends.size, np.uint64)
    for place in range(int(widths.max())):
        reaching = np.flatnonzero(widths > place)
        sevens = (octets[starts[reaching] + place] & 0x7F).astype(np.uint64)
        values[reaching] |= sevens << np.uint64(7 * place)
    return values.view(np.int64)


def _serialize_feature(key: str, feature: Feature) -> bytes:
    if is_list_of_bytes(feature):
        return _field(_BYTES_LIST, b"".join(_field(1, value) for value in feature))
    if isinstance(feature, np.ndarray) and feature.ndim == 1:
        if feature.dtype == np.float32:
            return _field(_FLOAT_LIST, _packed(feature.astype("<f4").tobytes()))
        if feature.dtype == np.int64:
            unsigned = feature.view(np.uint64).tolist()
            return _field(_INT64_LIST, _packed(b"".join(map(_encode_varint, unsigned))))
    got = f"{feature.ndim}-D {feature.dtype}" if isinstance(feature, np.ndarray) else type(feature)
    raise TypeError(
        f"feature {key!r}: got {got}, expected a list of bytes or a 1-D array of float32 or int64"
    )


def is_list_of_bytes(feature: Feature) -> TypeGuard[list[bytes]]:
    """Tell a list of bytes from arrays."""
    return isinstance(feature, list) and all(type(value) is bytes for value in feature)


def _packed(numbers: bytes) -> bytes:
    return _field(1, numbers) if numbers else b""


def _field(number: int, body: bytes) -> bytes:
    return bytes((number << 3 | _LENGTH_DELIMITED,)) + _encode_varint(len(body)) + body


def _encode_varint(value: int) -> bytes:
    octets = bytearray()
    while value >= 0x80:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)
