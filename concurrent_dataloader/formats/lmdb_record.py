"""Records of an LMDB database: ours, in which nothing is executed, and those of an older system.

Ours has these keys, in the order in which LMDB keeps them:

```text
"labels"          labels of all records, int32, little-endian; -1: none
"metadata"        JSON: `DatabaseMetadata`; ``complete`` is set in the last transaction
"r" + position    a record; the position from 0 on as 8 bytes, most significant first
```

and a record is a header, the sample's name, and its bytes as they were, up to the record's end:

```text
version  uint8    1
flags    uint8    0
name     uint16   length of the name in bytes, UTF-8
label    int32    from 0 on; -1: none
crc      uint32   CRC-32 (zlib's) of the header before it, the name, and the bytes
```

all little-endian.

The older system kept ``[image bytes as a numpy array, label]`` under the position as eight decimal
digits, and the list of all keys under ``__keys__``, both as pickles or by msgpack with its numpy
extension. Source: tensorpack's and dataflow's ``LMDBSerializer``. Their pickles are read by an
unpickler that knows lists, numbers, bytes and numpy's arrays, and calls nothing else.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import orjson
from numpy.typing import NDArray
from typing_extensions import Buffer, override

from concurrent_dataloader.errors import MissingDependencyError, ShardFormatError

LABELS_KEY = b"labels"
METADATA_KEY = b"metadata"
OLDER_KEYS_KEY = b"__keys__"

NO_LABEL = -1

_FORMAT = "concurrent-dataloader records"
_VERSION = 1
_PREFIX = b"r"
_HEADER = struct.Struct("<BBHi")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _HEADER.size + _CRC.size
_MAX_NAME_BYTES = 0xFFFF
_MAX_LABEL = 0x7FFFFFFF

Order = Literal["shuffled", "list"]
"""Whether records stand in a random order drawn from the seed, or in that of their source."""


class Record(NamedTuple):
    """A sample."""

    name: str
    """Its path relative to the source, with its ending; empty where the database has no names."""

    label: int | None
    """From 0 on."""

    payload: Buffer
    """The bytes of its file; may be a view of what was parsed."""


class DatabaseMetadata(NamedTuple):
    """What a database of ours says of itself."""

    num_records: int
    """When it is complete."""

    order: Order
    seed: int | None
    """What the order was drawn from; None where it was not."""

    split: str
    classes: Sequence[str] | None
    """Name of each class in the order of the labels; None if samples have no labels."""

    label_space: str | None
    """A `LabelSpace`'s value where the classes are ImageNet's; None where that is not known."""

    plan: str
    """Digest of what was to be written, by which a run that goes on knows its own work."""

    complete: bool


def record_key(position: int) -> bytes:
    """Give the key of a record; keys sort as positions do."""
    return _PREFIX + position.to_bytes(8, "big")


def position_of_key(key: Buffer) -> int | None:
    """Give the position that a key stands for; None if it is no record's."""
    raw = bytes(key)
    if len(raw) != 9 or not raw.startswith(_PREFIX):
        return None
    return int.from_bytes(raw[1:], "big")


def count_record_bytes(name: str, payload_bytes: int) -> int:
    """Tell how large a record is, in bytes."""
    return _HEADER_BYTES + len(name.encode("utf-8", "surrogateescape")) + payload_bytes


def pack_record(record: Record) -> bytes:
    """Make a record.

    Raises:
        ValueError: Its name is longer than 65535 bytes, or its label below 0 or above 2**31 - 1.
    """
    name = record.name.encode("utf-8", "surrogateescape")
    label = NO_LABEL if record.label is None else record.label
    if len(name) > _MAX_NAME_BYTES:
        raise ValueError(
            f"name: got {len(name)} bytes that begin with {record.name[:40]!r}, expected"
            f" {_MAX_NAME_BYTES} at most"
        )
    if not (NO_LABEL if record.label is None else 0) <= label <= _MAX_LABEL:
        raise ValueError(f"{record.name}: got label {label}, expected 0 to {_MAX_LABEL}")
    head = _HEADER.pack(_VERSION, 0, len(name), label)
    crc = zlib.crc32(record.payload, zlib.crc32(name, zlib.crc32(head)))
    return b"".join((head, _CRC.pack(crc), name, record.payload))


def parse_record(raw: Buffer, where: str) -> Record:
    """Take a record apart, and check that it is whole.

    Args:
        raw: The record.
        where: What errors call it.

    Returns:
        The record; its payload is a view of ``raw``.

    Raises:
        ShardFormatError: It is no record, or not the one that was written.
    """
    view = memoryview(raw)
    if len(view) < _HEADER_BYTES:
        raise ShardFormatError(
            f"{where}: got a record of {len(view)} bytes, expected {_HEADER_BYTES} or more"
        )
    version, flags, name_bytes, label = cast("tuple[int, int, int, int]", _HEADER.unpack_from(view))
    if version != _VERSION or flags:
        raise ShardFormatError(
            f"{where}: got a record of version {version} with flags {flags}, expected version"
            f" {_VERSION} without; write the database anew, or update the library"
        )
    stop = _HEADER_BYTES + name_bytes
    (expected,) = _CRC.unpack_from(view, _HEADER.size)
    crc = zlib.crc32(view[_HEADER_BYTES:], zlib.crc32(view[: _HEADER.size]))
    if stop > len(view) or crc != expected or label < NO_LABEL:
        raise ShardFormatError(
            f"{where}: got a record whose checksum is {crc:08x}, expected {expected:08x}; its"
            " bytes are not those that were written: copy or write the database anew"
        )
    name = bytes(view[_HEADER_BYTES:stop]).decode("utf-8", "surrogateescape")
    return Record(name, None if label == NO_LABEL else label, view[stop:])


def pack_metadata(metadata: DatabaseMetadata) -> bytes:
    """Make the value of the metadata's key; the same metadata gives the same bytes."""
    content = {"format": _FORMAT, "version": _VERSION, **metadata._asdict()}
    return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)


def parse_metadata(raw: Buffer, where: str) -> DatabaseMetadata:
    """Read the value of the metadata's key.

    Raises:
        ShardFormatError: It is not ours, or of a later version.
    """
    try:
        content = orjson.loads(memoryview(raw))
    except orjson.JSONDecodeError as error:
        raise ShardFormatError(f"{where}: got metadata that is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ShardFormatError(f"{where}: got metadata that is no JSON object")
    fields = cast("dict[str, Any]", content)
    given = fields.pop("format", None), fields.pop("version", None)
    if given != (_FORMAT, _VERSION):
        raise ShardFormatError(
            f"{where}: got format {given[0]!r} of version {given[1]!r}, expected {_FORMAT!r} of"
            f" version {_VERSION}; update the library, or write the database anew"
        )
    try:
        metadata = DatabaseMetadata(**fields)
    except TypeError as error:
        raise ShardFormatError(f"{where}: got metadata that lacks fields ({error})") from error
    _check_metadata(metadata, where)
    return metadata


def _check_metadata(metadata: DatabaseMetadata, where: str) -> None:
    fields = cast("dict[str, object]", metadata._asdict())
    num_records, classes = fields["num_records"], fields["classes"]
    is_sound = (
        type(num_records) is int
        and num_records >= 0
        and type(fields["complete"]) is bool
        and all(isinstance(fields[name], str) for name in ("plan", "split", "order"))
        and isinstance(fields["label_space"], str | None)
        and (
            classes is None
            or (
                isinstance(classes, list)
                and all(isinstance(name, str) for name in cast("list[object]", classes))
            )
        )
    )
    if not is_sound:
        raise ShardFormatError(f"{where}: got metadata with fields of other types than ours")


def pack_labels(labels: Sequence[int | None]) -> bytes:
    """Make the value of the labels' key."""
    numbers = (NO_LABEL if label is None else label for label in labels)
    return np.fromiter(numbers, np.dtype("<i4"), len(labels)).tobytes()


def parse_labels(raw: Buffer, count: int, where: str) -> NDArray[np.int32]:
    """Read the value of the labels' key: (count,) int32, -1 where there is no label.

    Raises:
        ShardFormatError: There are not as many as there are records.
    """
    view = memoryview(raw)
    if view.nbytes != 4 * count:
        raise ShardFormatError(
            f"{where}: got {view.nbytes} bytes of labels, expected {4 * count} for {count} records"
        )
    return np.frombuffer(view, np.dtype("<i4")).astype(np.int32)


# -- what an older system wrote


def older_key(position: int) -> bytes:
    """Give the key that the older system gave a record."""
    return b"%08d" % position


def parse_older_keys(raw: Buffer, where: str) -> list[bytes]:
    """Read the list of keys of a database of the older system.

    Raises:
        ShardFormatError: It is no such list, or holds what is not read.
        MissingDependencyError: It was written by msgpack, which is not installed.
    """
    keys = _load_older(raw, f"{where}, key '__keys__'")
    if not isinstance(keys, list | tuple):
        raise ShardFormatError(f"{where}, key '__keys__': got {type(keys).__name__}, expected list")
    found: list[bytes] = []
    for key in cast("Sequence[object]", keys):
        if not isinstance(key, bytes | str):
            raise ShardFormatError(
                f"{where}, key '__keys__': got a key of type {type(key).__name__}, expected bytes"
            )
        found.append(key.encode() if isinstance(key, str) else key)
    return found


def parse_older_record(raw: Buffer, where: str) -> Record:
    """Read a record of the older system: ``[image bytes, label]``.

    Raises:
        ShardFormatError: It is no such record, or holds what is not read.
        MissingDependencyError: It was written by msgpack, which is not installed.
    """
    content = _load_older(raw, where)
    if not isinstance(content, list | tuple) or len(cast("Sequence[object]", content)) != 2:
        raise ShardFormatError(
            f"{where}: got {type(content).__name__}, expected a list of an image's bytes and a"
            " label"
        )
    image, label = cast("Sequence[object]", content)
    if isinstance(image, np.ndarray):
        array = cast("NDArray[Any]", image)
        if array.dtype != np.uint8 or array.ndim != 1:
            raise ShardFormatError(
                f"{where}: got an array of {array.dtype} {array.shape}, expected an image file's"
                " bytes, uint8 (n,)"
            )
        image = array.tobytes()
    if not isinstance(image, bytes | bytearray):
        raise ShardFormatError(
            f"{where}: got an image of type {type(image).__name__}, expected its file's bytes"
        )
    if isinstance(label, bool) or not isinstance(label, int | np.integer) or label < 0:
        raise ShardFormatError(f"{where}: got label {label!r}, expected an integer from 0 on")
    return Record("", int(label), image)


def _load_older(raw: Buffer, where: str) -> object:
    view = memoryview(raw)
    first = view[0] if len(view) else 0
    if first == 0x80:  # pickle's PROTO, of protocol 2 and later
        return _load_pickle(view, where)
    if 0x90 <= first <= 0x9F or first in (0xDC, 0xDD):  # msgpack's arrays
        return _load_msgpack(view, where)
    raise ShardFormatError(
        f"{where}: got {len(view)} bytes that begin with {bytes(view[:8])!r}, expected a pickle of"
        " protocol 2 or later, or msgpack; databases by pyarrow are not read: convert them with"
        " the software that wrote them"
    )


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What pickles of protocol 2 make bytes by; ``_codecs.encode`` itself would take any codec."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"got bytes in the encoding {encoding!r}, expected 'latin1'")
    return text.encode("latin1")


def _known_globals() -> dict[tuple[str, str], object]:
    """All that a pickle may name: what numpy's arrays and scalars, and bytes, are made by."""
    array = np.zeros(1, np.uint8)
    scalar = np.int64(0)
    reconstruct = cast("Callable[..., object]", array.__reduce__()[0])
    make_scalar = cast("Callable[..., object]", scalar.__reduce__()[0])
    from_buffer = cast("Callable[..., object]", array.__reduce_ex__(5)[0])
    known: dict[tuple[str, str], object] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode_latin1,
        ("builtins", "bytearray"): bytearray,
        ("__builtin__", "bytearray"): bytearray,
    }
    for package in ("numpy.core", "numpy._core"):
        known[f"{package}.multiarray", "_reconstruct"] = reconstruct
        known[f"{package}.multiarray", "scalar"] = make_scalar
        known[f"{package}.numeric", "_frombuffer"] = from_buffer
    return known


_KNOWN_GLOBALS = _known_globals()


class _Unpickler(pickle.Unpickler):
    """Makes lists, numbers, text, bytes and numpy's arrays; whatever else is named is an error."""

    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        known = _KNOWN_GLOBALS.get((module_name, global_name))
        if known is None:
            raise pickle.UnpicklingError(
                f"it names {module_name}.{global_name}, which no image and label need"
            )
        return known


def _load_pickle(view: memoryview, where: str) -> object:
    try:
        return _Unpickler(io.BytesIO(view)).load()
    except Exception as error:  # malformed pickles raise anything; it goes on as ours
        raise ShardFormatError(
            f"{where}: got a pickle that is not read here:"
            f" {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def _load_msgpack(view: memoryview, where: str) -> object:
    try:
        import msgpack
    except ImportError as error:
        raise MissingDependencyError(
            f"{where}: written by msgpack, which is not installed; run `pip install msgpack`"
        ) from error
    try:
        return msgpack.unpackb(view, raw=False, strict_map_key=False, object_hook=_find_array)
    except Exception as error:  # malformed msgpack raises anything; it goes on as ours
        raise ShardFormatError(
            f"{where}: got msgpack that is not read here:"
            f" {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def _find_array(fields: dict[Any, Any]) -> object:
    """Make arrays and scalars of what the numpy extension of msgpack writes: a map with ``nd``."""
    named = {key.decode() if isinstance(key, bytes) else key: fields[key] for key in fields}
    if "nd" not in named:
        return fields
    data, kind = named.get("data"), named.get("type")
    kind = kind.decode() if isinstance(kind, bytes) else kind
    if not isinstance(data, bytes) or kind not in ("|u1", "|i1", "<i2", "<i4", "<i8", "<u4"):
        raise ValueError(f"an array of type {kind!r}, expected bytes or whole numbers")
    array = np.frombuffer(data, np.dtype(kind))
    if not named["nd"]:
        return array[0]
    return array.reshape(named.get("shape", (-1,)))
