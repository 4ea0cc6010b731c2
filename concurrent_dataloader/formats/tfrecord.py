"""Where records lie in a TFRecord file, what an image record holds; read both, write both.

A file is a row of framed records and nothing else, each readable by one byte range:

```text
start                                                        stop
| length, u64 | CRC of length, u32 | payload | CRC of payload, u32 |      little-endian
```

A payload is a ``tf.train.Example`` (`example`); what ImageNet's TFRecords keep in it is
`ImageExample`.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from typing import NamedTuple, NoReturn, Protocol

import google_crc32c
import numpy as np
from typing_extensions import Buffer

from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.formats.example import (
    Feature,
    is_list_of_bytes,
    parse_example,
    serialize_example,
)
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.ranges import ByteRange

_HEAD = struct.Struct("<QI")  # length of the payload, masked CRC of these eight bytes
_CRC = struct.Struct("<I")
_FRAME_BYTES = _HEAD.size + _CRC.size

# A length is believed only as far as bytes follow, so that a wrong one cannot fill the memory.
_MAX_READ_BYTES = 16 << 20


class ReadableFile(Protocol):
    """A binary file that is read front to back, such as a response's body or ``gzip.open``'s."""

    def read(self, size: int, /) -> bytes | None:
        """Read up to ``size`` bytes; none at the end only."""
        ...


class SeekableFile(ReadableFile, Protocol):
    """A binary file that says whether it can be read at any offset."""

    def seekable(self) -> bool:
        """Tell whether `seek` works."""
        ...

    def seek(self, offset: int, whence: int = ..., /) -> int:
        """Move to an offset, and give it."""
        ...

    def tell(self) -> int:
        """Give the offset of the byte that is read next."""
        ...


class WritableFile(Protocol):
    """A binary file that takes all bytes it is given, as buffered ones do."""

    def write(self, data: bytes, /) -> int | None:
        """Write ``data``."""
        ...


class Record(NamedTuple):
    """A record, and where it lies."""

    start: int
    """Offset of its frame, with the length and both CRCs."""
    stop: int
    """Offset of the byte after its frame."""
    payload: bytes

    @property
    def byte_range(self) -> ByteRange:
        """What to read for `parse_record`."""
        return ByteRange(self.start, self.stop)


def iter_records(file: ReadableFile, where: str, *, start: int = 0) -> Iterator[Record]:
    """Read a file front to back, and check both CRCs of each record.

    Holds one record at a time. A file of no bytes is one of no records.

    Args:
        file: Positioned at the beginning of a record. It is left open.
        where: Names the file in errors.
        start: Offset of that position.

    Yields:
        Records in the order of the file.

    Raises:
        ShardFormatError: The file is damaged, was cut short, is compressed, holds something after
            its last record, or is no TFRecord file. Records before that place have been yielded.
    """
    while head := _read_up_to(file, _HEAD.size):
        length = _parse_head(head, where, start)
        payload = _read_up_to(file, length)
        crc = _read_up_to(file, _CRC.size) if len(payload) == length else b""
        stop = start + _FRAME_BYTES + length
        if len(crc) < _CRC.size:
            _refuse_cut(where, start, stop, _HEAD.size + len(payload) + len(crc))
        _check_payload(payload, crc, where, ByteRange(start, stop))
        yield Record(start, stop, payload)
        start = stop


def find_records(file: SeekableFile, where: str) -> Iterator[ByteRange]:
    """Find where records lie, for an index of byte ranges.

    Where the file is seekable only the lengths are read, 12 bytes a record, and their CRCs are
    checked; payloads are checked by `parse_record` when they are used. Where it is not, all of it
    is read and checked as by `iter_records`.

    Args:
        file: Positioned at the beginning of a record. It is left open, at no certain position.
        where: Names the file in errors.

    Yields:
        Ranges of whole frames in the order of the file, without gaps.

    Raises:
        ShardFormatError: As by `iter_records`, payloads apart.
    """
    if not file.seekable():
        yield from (record.byte_range for record in iter_records(file, where))
        return
    start = file.tell()
    end = file.seek(0, io.SEEK_END)
    while start < end:
        file.seek(start)
        stop = start + _FRAME_BYTES + _parse_head(_read_up_to(file, _HEAD.size), where, start)
        if stop > end:
            _refuse_cut(where, start, stop, end - start)
        yield ByteRange(start, stop)
        start = stop


def parse_record(raw: Buffer, where: str = "record", *, start: int = 0) -> bytes:
    """Take a record out of its frame, and check both CRCs.

    Args:
        raw: One whole frame, as read from a byte range that `find_records` gave.
        where: Names the file in errors.
        start: Offset of the frame in the file, for errors.

    Raises:
        ShardFormatError: It is damaged, or not exactly one frame.
    """
    view = memoryview(raw).cast("B")
    length = _parse_head(bytes(view[: _HEAD.size]), where, start)
    stop = start + _FRAME_BYTES + length
    if len(view) < _FRAME_BYTES + length:
        _refuse_cut(where, start, stop, len(view))
    if len(view) > _FRAME_BYTES + length:
        raise ShardFormatError(
            f"{where} [{start}, {start + len(view)}): got {len(view)} bytes, expected the"
            f" {_FRAME_BYTES + length} of one record; index the file again"
        )
    payload = bytes(view[_HEAD.size : -_CRC.size])
    _check_payload(payload, bytes(view[-_CRC.size :]), where, ByteRange(start, stop))
    return payload


class TFRecordWriter:
    """Writes records to a file that the caller opens and closes."""

    def __init__(self, file: WritableFile, *, start: int = 0) -> None:
        """Write to ``file`` from its present position on, which is the offset ``start``."""
        self._file = file
        self._stop = start
        self._num_records = 0

    @property
    def num_records(self) -> int:
        """How many records were written here."""
        return self._num_records

    @property
    def stop(self) -> int:
        """Offset of the byte after the last record."""
        return self._stop

    def write(self, payload: bytes) -> ByteRange:
        """Write a record, and give the range of its frame.

        Raises:
            OSError: The file did not take all of it; it then ends within a record.
        """
        length = len(payload).to_bytes(8, "little")
        head = length + _CRC.pack(_masked_crc(length))
        for part in (head, payload, _CRC.pack(_masked_crc(payload))):
            num_written = self._file.write(part)
            if num_written != len(part):
                raise OSError(
                    f"record at {self._stop}: the file took {num_written} bytes of {len(part)};"
                    " open it buffered"
                )
        start, self._stop = self._stop, self._stop + _FRAME_BYTES + len(payload)
        self._num_records += 1
        return ByteRange(start, self._stop)


def _masked_crc(data: bytes) -> int:
    """CRC-32C (RFC 3720, B.4), rotated and shifted so that data may hold CRCs itself.

    Source: TensorFlow, tensorflow/core/lib/hash/crc32c.h.
    """
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _read_up_to(file: ReadableFile, size: int) -> bytes:
    """Read ``size`` bytes, or all that are left."""
    part = file.read(min(size, _MAX_READ_BYTES)) or b""
    if len(part) == size:
        return part
    parts = [part]
    left = size - len(part)
    while left and part:
        part = file.read(min(left, _MAX_READ_BYTES)) or b""
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _parse_head(head: bytes, where: str, start: int) -> int:
    """Give the length of a payload."""
    if len(head) < _HEAD.size:
        raise ShardFormatError(
            f"{where} [{start}, {start + len(head)}): got {len(head)} bytes, expected the"
            f" {_HEAD.size} of a record's length and its CRC; the file was cut short, or something"
            " follows its last record"
        )
    length, got = _HEAD.unpack(head)
    expected = _masked_crc(head[: -_CRC.size])
    if got == expected:
        return length
    if start == 0 and (compression := _find_compression(head)) is not None:
        raise ShardFormatError(
            f"{where}: got a file compressed by {compression}, expected plain TFRecords, which can"
            " be read by byte range; decompress it once and read the result"
        )
    raise ShardFormatError(
        f"{where} [{start}, {start + _HEAD.size}): CRC of a record's length: got {got:#010x},"
        f" expected {expected:#010x} for the length {length}; the file is damaged, or no TFRecord"
        " file"
    )


def _find_compression(head: bytes) -> str | None:
    """Tell which of TensorFlow's two compressions a file begins with. Source: RFC 1952, 1950."""
    if head[:2] == b"\x1f\x8b":
        return "GZIP"
    if head[0] == 0x78 and int.from_bytes(head[:2], "big") % 31 == 0:
        return "ZLIB"
    return None


def _check_payload(payload: bytes, crc: bytes, where: str, place: ByteRange) -> None:
    (got,) = _CRC.unpack(crc)
    expected = _masked_crc(payload)
    if got != expected:
        raise ShardFormatError(
            f"{where} [{place.start}, {place.stop}): CRC of a record's payload: got {got:#010x},"
            f" expected {expected:#010x}; the file is damaged, fetch it again"
        )


def _refuse_cut(where: str, start: int, stop: int, num_bytes: int) -> NoReturn:
    raise ShardFormatError(
        f"{where} [{start}, {stop}): got {num_bytes} bytes, expected {stop - start}; the file was"
        " cut short"
    )


class ImageExample(NamedTuple):
    """What a record of ImageNet's TFRecords holds; None for what it does not say.

    ``colorspace``, ``image_format`` and the sizes are what the writer said. Nothing relies on them:
    an image that is a PNG, grey or CMYK is decoded as any other.
    """

    encoded: bytes
    """The image file, under ``image/encoded``."""
    label: int | None = None
    """Counts from 0, whatever ``image/class/label`` counts from."""
    boxes: tuple[Box, ...] = ()
    """``image/object/bbox/*``, in their order."""
    filename: str | None = None
    synset: str | None = None
    """WordNet id, under ``image/class/synset``."""
    text: str | None = None
    """Name of the class, under ``image/class/text``."""
    image_format: str | None = None
    colorspace: str | None = None
    height: int | None = None
    width: int | None = None
    channels: int | None = None

    @property
    def box(self) -> Box | None:
        """The smallest box around all boxes."""
        if not self.boxes:
            return None
        lefts, tops, rights, bottoms = zip(*self.boxes, strict=True)
        return Box(min(lefts), min(tops), max(rights), max(bottoms))


_ENCODED = "image/encoded"
_LABEL = "image/class/label"
_BOX_LABEL = "image/object/bbox/label"
_BOX_SIDES = tuple(f"image/object/bbox/{side}" for side in ("xmin", "ymin", "xmax", "ymax"))
_TEXTS = {
    "filename": "image/filename",
    "synset": "image/class/synset",
    "text": "image/class/text",
    "image_format": "image/format",
    "colorspace": "image/colorspace",
}
_NUMBERS = {"height": "image/height", "width": "image/width", "channels": "image/channels"}


def parse_image_example(
    payload: Buffer, *, label_base: int, num_classes: int | None = 1000, where: str = "example"
) -> ImageExample:
    """Read a record of ImageNet's TFRecords, as TensorFlow's builder lays them out. Pure.

    Args:
        payload: One record's.
        label_base: What the records call the first class: 1 in those of TensorFlow's builder,
            where 0 is the background.
        num_classes: How many classes there are; None for any number.
        where: Names the record in errors.

    Returns:
        What the record says. Text that is not UTF-8 keeps its bytes as backslash escapes.

    Raises:
        ShardFormatError: It is no ``tf.train.Example``, has no image, a label out of range, or
            boxes that are none.
    """
    features = _ImageFeatures(parse_example(payload, where), where)
    encoded = features.read_bytes(_ENCODED)
    if encoded is None:
        raise features.error(_ENCODED, "got no image", f"one; keys are {features.keys()}")
    label = features.read_int(_LABEL)
    if label is not None:
        label -= label_base
        if label < 0 or (num_classes is not None and label >= num_classes):
            most = "or more" if num_classes is None else f"to {label_base + num_classes - 1}"
            raise features.error(
                _LABEL,
                f"got {label + label_base}",
                f"{label_base} {most} (label_base={label_base}); declare what the labels count"
                " from, and drop images of the background",
            )
    return ImageExample(
        encoded,
        label,
        features.read_boxes(),
        filename=features.read_text(_TEXTS["filename"]),
        synset=features.read_text(_TEXTS["synset"]),
        text=features.read_text(_TEXTS["text"]),
        image_format=features.read_text(_TEXTS["image_format"]),
        colorspace=features.read_text(_TEXTS["colorspace"]),
        height=features.read_int(_NUMBERS["height"]),
        width=features.read_int(_NUMBERS["width"]),
        channels=features.read_int(_NUMBERS["channels"]),
    )


def serialize_image_example(example: ImageExample, *, label_base: int) -> bytes:
    """Write a payload that `parse_image_example` reads, with its keys sorted.

    What is None is left out. Boxes are rounded to float32, and each has the image's label.
    """
    features: dict[str, Feature] = {_ENCODED: [example.encoded]}
    fields = example._asdict()
    for name, key in _TEXTS.items():
        if fields[name] is not None:
            features[key] = [fields[name].encode()]
    for name, key in _NUMBERS.items():
        if fields[name] is not None:
            features[key] = np.array([fields[name]], np.int64)
    if example.label is not None:
        features[_LABEL] = np.array([example.label + label_base], np.int64)
        if example.boxes:
            features[_BOX_LABEL] = np.repeat(features[_LABEL], len(example.boxes))
    if example.boxes:
        sides = np.array(example.boxes, np.float32).T
        features.update(zip(_BOX_SIDES, sides, strict=True))
    return serialize_example(features)


class _ImageFeatures:
    """Features of one image, read as the kind that each is to be."""

    def __init__(self, features: dict[str, Feature], where: str) -> None:
        self._features = features
        self._where = where

    def keys(self) -> str:
        keys = ", ".join(map(repr, sorted(self._features)))
        return keys if len(keys) <= 400 else f"{keys[:400]}..."

    def read_bytes(self, key: str) -> bytes | None:
        feature = self._features.get(key, [])
        if not is_list_of_bytes(feature) or len(feature) > 1:
            raise self._unexpected(key, "one value of bytes")
        return feature[0] if feature else None

    def read_text(self, key: str) -> str | None:
        value = self.read_bytes(key)
        return None if value is None else value.decode(errors="backslashreplace")

    def read_int(self, key: str) -> int | None:
        feature = self._features.get(key)
        if feature is None:
            return None
        if isinstance(feature, list) or feature.dtype != np.int64 or feature.size > 1:
            raise self._unexpected(key, "one int64")
        return int(feature[0]) if feature.size else None

    def read_boxes(self) -> tuple[Box, ...]:
        sides = [self._read_floats(key) for key in _BOX_SIDES]
        counts = [len(side) for side in sides]
        if len(set(counts)) > 1:
            raise self.error("image/object/bbox", f"got {counts} sides", "as many of each")
        boxes = tuple(map(Box._make, zip(*sides, strict=True)))
        for box in boxes:
            if not (all(map(math.isfinite, box)) and box.x1 <= box.x2 and box.y1 <= box.y2):
                raise self.error("image/object/bbox", f"got {box}", "x1 <= x2 and y1 <= y2")
        return boxes

    def _read_floats(self, key: str) -> list[float]:
        feature = self._features.get(key)
        if feature is None:
            return []
        if isinstance(feature, list) or feature.dtype != np.float32:
            raise self._unexpected(key, "float32")
        return feature.tolist()

    def _unexpected(self, key: str, expected: str) -> ShardFormatError:
        feature = self._features[key]
        kind = "bytes" if isinstance(feature, list) else feature.dtype
        return self.error(key, f"got {len(feature)} of {kind}", expected)

    def error(self, key: str, got: str, expected: str) -> ShardFormatError:
        return ShardFormatError(f"{self._where}: {key}: {got}, expected {expected}")
