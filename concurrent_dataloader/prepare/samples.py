"""Can a sample be used? One at a time, and again from the report of an earlier run."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import numpy as np
import orjson
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.errors import (
    IndexFormatError,
    LoaderError,
    SampleDecodeError,
    ShardFormatError,
    UnknownClassError,
)
from concurrent_dataloader.formats import tfrecord
from concurrent_dataloader.formats.crc32c import crc32c
from concurrent_dataloader.formats.fields import (
    ANY_FIELD,
    ANY_FIELD_SIZE,
    IMAGE_FIELDS,
    TENSOR_FIELD,
    find_label_field,
    find_payload_field,
)
from concurrent_dataloader.formats.image import decode_image, is_image_file
from concurrent_dataloader.formats.tar import END_OF_ARCHIVE, check_name, read_samples
from concurrent_dataloader.labels import Classes
from concurrent_dataloader.prepare.checksums import Finding
from concurrent_dataloader.prepare.tensors import check_tensor
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.shard_names import find_kind
from concurrent_dataloader.stores import RangedFile
from concurrent_dataloader.stores.base import SizedStore, Store

SampleKind = Literal["tar", "tfrecord", "object", "payload", "lmdb", "bytes"]
"""What a byte range holds: a tar sample with its headers, a framed record, a whole file, an image
file inside of something; a record of a database, which ``sample`` gives the number of; or bytes of
which nothing is known but that they can be read. A loader's quarantine file has the same words."""

_MAX_ERROR_CHARACTERS = 500
_READ_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What a sample has to satisfy, beside that its image can be decoded."""

    num_classes: int | None = None
    """Labels are 0 to this, less one, and each sample has one; None: any label, or none."""

    label_base: int = 1
    """What TFRecords call the first class."""

    classes: Classes | None = None
    """Of single files: each must belong to one of these."""

    raw_bytes: int | None = None
    """Size of each payload that is no image file, such as pixels without a header; None: any."""


class BadSample(NamedTuple):
    """A sample that cannot be used."""

    key: str
    """The shard or file, relative to the data set."""

    sample: str
    """Its own key within the shard; empty where that could not be read."""

    byte_range: ByteRange | None
    """None: the whole object."""

    kind: SampleKind
    error: str

    @property
    def is_rest(self) -> bool:
        """Whether it is no sample, but what follows in a shard where one could not be read."""
        return not self.sample and self.byte_range is not None and self.kind in ("tar", "tfrecord")

    def to_finding(self) -> Finding:
        """Say so in a line."""
        place = "" if self.byte_range is None else f" [{self.byte_range[0]}, {self.byte_range[1]})"
        sample = f" sample {self.sample!r}" if self.sample else ""
        return Finding(f"{self.key}{place}{sample}", "sample", self.error)

    def to_line(self) -> bytes:
        """Give its line in a report, JSON."""
        content = {
            "key": self.key,
            "range": None if self.byte_range is None else list(self.byte_range),
            "sample": self.sample,
            "kind": self.kind,
            "error": self.error,
        }
        return orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)


class Seen(NamedTuple):
    """A sample that was looked at."""

    key: str
    digest: bytes
    """Of its payload; eight bytes."""

    label: int | None


class ParsedSample(NamedTuple):
    """A sample that was taken out of its shard, and is still to be checked."""

    key: str
    image: Buffer | None
    """None where it has no image file, but a tensor for instance."""

    payload: Buffer
    label: int | None
    is_tensor: bool = False
    """Whether the payload is a tensor as ``torch.save`` writes it."""

    may_be_pixels: bool = False
    """Whether the image may be pixels without a header instead, as those of ``img`` may."""


def parse_tar_fields(fields: dict[str, bytes], key: str, where: str) -> ParsedSample:
    """Find image and class among the fields of a tar sample.

    Raises:
        ShardFormatError: There is nothing that could be an image, the class is no number, or the
            key leads out of the folder that it would be extracted to.
    """
    check_name(key)
    label: int | None = None
    try:
        label_field = find_label_field(fields)
    except SampleDecodeError as error:
        raise ShardFormatError(f"{where}: {error}") from error
    if label_field is not None:
        text = fields[label_field].strip()
        if not text.isdigit() or len(text) > 9:
            raise ShardFormatError(f"{where}: got class {text[:20]!r}, expected a number from 0 on")
        label = int(text)
    name = find_payload_field(list(fields))
    if name is None:
        raise ShardFormatError(f"{where}: got fields {', '.join(fields)}, expected an image")
    kind = name.rpartition(".")[2]
    image = fields[name] if kind in IMAGE_FIELDS else None
    return ParsedSample(
        key,
        image,
        fields[name],
        label,
        is_tensor=kind == TENSOR_FIELD,
        may_be_pixels=kind == ANY_FIELD,
    )


def parse_record(raw: Buffer, rules: Rules, where: str, start: int) -> ParsedSample:
    """Find image and class in a framed TFRecord.

    Raises:
        ShardFormatError: It is damaged, or no image record, or its class is out of range.
    """
    payload = tfrecord.parse_record(raw, where, start=start)
    example = tfrecord.parse_image_example(
        payload, label_base=rules.label_base, num_classes=rules.num_classes, where=where
    )
    return ParsedSample(example.filename or "", example.encoded, example.encoded, example.label)


def check_sample(parsed: ParsedSample, rules: Rules) -> bool:
    """Decode an image or a tensor, compare the size of pixels, and look at the label.

    Returns:
        Whether the payload was looked into: not if it is none of these, or if nothing says how many
        pixels it should have.

    Raises:
        LoaderError: It cannot be used.
        MissingDependencyError: A package that is needed to look into it is not installed.
    """
    is_known = _check_payload(parsed, rules)
    label, count = parsed.label, rules.num_classes
    if count is not None and label is None:
        raise UnknownClassError(f"got no class, expected 0 to {count - 1}")
    if count is not None and label is not None and not 0 <= label < count:
        raise UnknownClassError(f"got class {label}, expected 0 to {count - 1}")
    return is_known


def _check_payload(parsed: ParsedSample, rules: Rules) -> bool:
    size = memoryview(parsed.payload).nbytes
    if parsed.is_tensor:
        check_tensor(parsed.payload)
        return True
    is_pixels = parsed.image is None or parsed.may_be_pixels
    if is_pixels and rules.raw_bytes is not None:
        if size != rules.raw_bytes:
            raise SampleDecodeError(f"got {size} bytes of pixels, expected {rules.raw_bytes}")
        return True
    if parsed.image is None:
        return False
    is_usual = parsed.may_be_pixels and size == 3 * math.prod(ANY_FIELD_SIZE)
    if not is_usual or is_image_file(parsed.image):
        decode_image(parsed.image)
    return True


def see_sample(parsed: ParsedSample) -> Seen:
    """Keep of a sample what is compared with others."""
    digest = hashlib.blake2b(parsed.payload, digest_size=8, usedforsecurity=False).digest()
    return Seen(parsed.key, digest, parsed.label)


def one_line(error: Exception) -> str:
    """Give what an error says, as one line that is not too long."""
    return " ".join(str(error).split())[:_MAX_ERROR_CHARACTERS]


# -- reports of bad samples


def read_report(raw: Buffer, where: str) -> list[BadSample]:
    """Read what `BadSample.to_line` or a loader's quarantine file wrote, a line each.

    More fields than these are left alone. A sample that stands in several lines, as one does that
    failed in several epochs, is given once, with its last error.

    Raises:
        IndexFormatError: A line is no such object.
    """
    samples: dict[tuple[object, ...], BadSample] = {}
    for number, line in enumerate(bytes(raw).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = orjson.loads(line)
            span = entry.get("range")
            byte_range = None if span is None else ByteRange(int(span[0]), int(span[1]))
            kind = entry.get("kind") or ("object" if span is None else "payload")
            if not isinstance(entry["key"], str) or kind not in get_args(SampleKind):
                raise ValueError(f"got key {entry['key']!r} and kind {kind!r}")
            sample = str(entry.get("sample") or "")
            error = str(entry.get("error"))
            found = BadSample(entry["key"], sample, byte_range, kind, error)
            samples[found[:-1]] = found
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise IndexFormatError(
                f"{where}, line {number}: no bad sample ({type(error).__name__}: {error}), expected"
                ' an object with "key", and "range" where it is not the whole object'
            ) from error
    return list(samples.values())


def _check_rest(store: SizedStore, sample: BadSample, rules: Rules) -> None:
    """Look at the samples from where a shard could not be read on, to its end as it is now.

    Raises:
        LoaderError: One cannot be used.
    """
    assert sample.byte_range is not None, "the caller looked at is_rest"
    start, where = sample.byte_range.start, sample.key
    with io.BufferedReader(RangedFile(store, where), _READ_BYTES) as file:
        file.seek(start)
        if sample.kind == "tar":
            for found in read_samples(file, where, offset=start):
                check_sample(parse_tar_fields(found.fields, found.key, where), rules)
            return
        for record in tfrecord.iter_records(file, where, start=start):
            first, stop = record.byte_range
            file.seek(first)
            check_sample(parse_record(file.read(stop - first), rules, where, first), rules)


class IndexedSamples:
    """What indexes say of the bytes of samples, which a report names by their byte ranges."""

    def __init__(self, indexes: Iterable[ShardIndex] = ()) -> None:
        self._shards = {
            shard.name: (index, number)
            for index in indexes
            for number, shard in enumerate(index.shards)
        }

    def compare(self, store: Store, sample: BadSample, raw: Buffer, rules: Rules) -> None:
        """Compare what was read with its checksum, or with that of the record which it lies in.

        Raises:
            ShardFormatError: It is not what was written.
        """
        index, number = self._shards.get(sample.key, (None, 0))
        if index is None or sample.byte_range is None:
            return
        positions = np.flatnonzero(index.shard_numbers == number)

        def find(ranges: NDArray[np.int64]) -> list[int]:
            return positions[(ranges[positions] == sample.byte_range).all(axis=1)].tolist()

        crcs = [index.extent_crc(position) for position in find(index.extents)]
        for position in find(index.payloads):
            crcs.append(index.payload_crc(position))
            if index.kind == "tfrecord":
                extent = index.extent(position)
                parse_record(store.get(sample.key, extent), rules, sample.key, extent.start)
        if any(crc is not None and crc32c(raw) != crc for crc in crcs):
            raise ShardFormatError("got bytes that differ from the checksum of the index")


def check_again(
    store: Store, sample: BadSample, rules: Rules, indexed: IndexedSamples
) -> BadSample | None:
    """Look at a sample of a report again; None if nothing is wrong with it any more.

    Args:
        store: Where the data set lies.
        sample: As the report has it.
        rules: What it has to satisfy.
        indexed: What is known of its bytes.
    """
    is_part = sample.byte_range is not None or sample.kind == "tar"
    if is_part and find_kind(sample.key) == "compressed tar":
        error = "a compressed tar has no byte ranges; look at all of it again with --deep"
        return sample._replace(error=error)
    try:
        if sample.is_rest and isinstance(store, SizedStore):
            _check_rest(store, sample, rules)
            return None
        raw = store.get(sample.key, sample.byte_range)
        start = 0 if sample.byte_range is None else sample.byte_range.start
        indexed.compare(store, sample, raw, rules)
        if sample.kind == "tar":
            for found in read_samples(io.BytesIO(bytes(raw) + END_OF_ARCHIVE), sample.key):
                check_sample(parse_tar_fields(found.fields, found.key, sample.key), rules)
        elif sample.kind == "tfrecord":
            check_sample(parse_record(raw, rules, sample.key, start), rules)
        elif sample.kind == "bytes":
            pass
        elif sample.kind == "object" and rules.classes is not None:
            label = int(rules.classes.labels_of([sample.key])[0])
            check_sample(ParsedSample(sample.key, raw, raw, label), rules)
        else:
            decode_image(raw)
    except LoaderError as error:
        return sample._replace(error=one_line(error))
    return None
