"""Write one shard, of tar or TFRecord; pure but for reading its samples and writing the file."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.formats import tfrecord
from concurrent_dataloader.formats.crc32c import CrcTable, crc32c
from concurrent_dataloader.formats.fields import LABEL_FIELD
from concurrent_dataloader.formats.tar_writer import TarWriter, count_sample_bytes
from concurrent_dataloader.prepare.metadata import ShardMetadata
from concurrent_dataloader.prepare.plan import index_digits
from concurrent_dataloader.prepare.reading import Reader
from concurrent_dataloader.prepare.shard_file import HashedFile, WrittenShard
from concurrent_dataloader.prepare.shard_settings import ShardSettings
from concurrent_dataloader.prepare.source import Box, Source
from concurrent_dataloader.prepare.target import ShardTarget
from concurrent_dataloader.ranges import ByteRange

_SYNSET = re.compile(r"n\d{8}", re.ASCII)
_TFRECORD_FRAME_BYTES = 16  # a length and two CRCs
TFRECORD_LABEL_BASE = 1  # 0 is the background, as TensorFlow's builder counts


class Recipe:
    """What all shards of a run share. It pickles; threads stay with each process."""

    def __init__(
        self, source: Source, settings: ShardSettings, place: ShardTarget, num_readers: int
    ) -> None:
        self.source = source
        self.settings = settings
        self.place = place
        self.digits = index_digits(len(source))
        self._num_readers = num_readers

    @functools.cached_property
    def reader(self) -> Reader:
        """Reads the source; this process's own."""
        return Reader(self.source, self._num_readers)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "reader"}

    def close(self) -> None:
        """End the threads of this process; the source is the caller's."""
        if "reader" in vars(self):
            self.reader.close()

    def sample(self, position: int, place: int, raw: Buffer) -> _Sample:
        """Prepare a sample."""
        source, settings = self.source, self.settings
        name = source.name(position)
        boxes = source.boxes(position) if settings.boxes else ()
        content, boxes = settings.preparation.apply(raw, boxes, name)
        return _Sample(
            settings.key(name, place, self.digits),
            settings.payload_field(name),
            content,
            source.label(position),
            boxes,
        )

    def packed_bytes(self, sample: _Sample) -> int:
        """Tell how much of a shard a sample takes."""
        if self.settings.kind == "tfrecord":
            content = bytes(sample.content)
            return _TFRECORD_FRAME_BYTES + len(_serialize(sample, content, self.source.classes))
        fields = {sample.field: sample.content, **self.side_fields(sample)}
        return count_sample_bytes(sample.key, fields)

    def side_fields(self, sample: _Sample) -> dict[str, bytes]:
        """Give the fields of a tar besides the payload."""
        fields: dict[str, bytes] = {}
        if sample.label is not None:
            fields[LABEL_FIELD] = b"%d" % sample.label
        if self.settings.boxes:
            fields["json"] = encode_boxes(sample.boxes)
        return fields


class _Sample(NamedTuple):
    """A sample as it is packed."""

    key: str
    field: str
    content: Buffer
    label: int | None
    boxes: Sequence[Box]


class ShardTask(NamedTuple):
    """A shard to write."""

    name: str
    first: int
    """Number of its first sample in the order of writing."""

    positions: NDArray[np.int64]


class _Place(NamedTuple):
    """Where a sample lies in its shard."""

    extent: ByteRange
    payload: ByteRange
    payload_crc: int | None
    """CRC-32C; None where the payload is the whole sample."""


class _Whole(NamedTuple):
    """A shard that was written."""

    size_bytes: int
    crc32c: str
    sample_crcs: NDArray[np.int64]
    """CRC-32C of each sample's extent, (n,)."""


class _Writer(Protocol):
    """Writes one shard."""

    def write(self, sample: _Sample) -> _Place:
        """Write a sample."""
        ...

    def close(self) -> _Whole:
        """Write the end, and describe the file."""
        ...


class _TarShardWriter:
    def __init__(self, file: HashedFile, recipe: Recipe) -> None:
        self._tar = TarWriter(file)
        self._side_fields = recipe.side_fields

    def write(self, sample: _Sample) -> _Place:
        fields: dict[str, Buffer] = {sample.field: sample.content, **self._side_fields(sample)}
        written = self._tar.write(sample.key, fields)
        payload = written.members[sample.field]
        assert payload.crc32c is not None, "the writer has seen it"
        return _Place(written.extent, payload.data, payload.crc32c)

    def close(self) -> _Whole:
        checksums = self._tar.close()
        return _Whole(self._tar.size_bytes, checksums.tar, checksums.samples)


class _TFRecordShardWriter:
    """Records of ``tf.train.Example`` as TensorFlow's builder of ImageNet lays them out."""

    def __init__(self, file: HashedFile, recipe: Recipe) -> None:
        self._checked = _CheckedFile(file)
        self._writer = tfrecord.TFRecordWriter(self._checked)
        self._classes = recipe.source.classes

    def write(self, sample: _Sample) -> _Place:
        # The payload is the whole record, so that whoever reads it can check its CRC.
        extent = self._writer.write(_serialize(sample, bytes(sample.content), self._classes))
        self._checked.crcs.end_sample()
        return _Place(extent, extent, None)

    def close(self) -> _Whole:
        crcs = self._checked.crcs
        return _Whole(self._writer.stop, crcs.of_all(), crcs.of_samples())


def _serialize(sample: _Sample, content: bytes, classes: Sequence[str] | None) -> bytes:
    class_name = None if sample.label is None or classes is None else classes[sample.label]
    is_synset = class_name is not None and _SYNSET.fullmatch(class_name) is not None
    example = tfrecord.ImageExample(
        content,
        sample.label,
        tuple(tfrecord.Box(*box) for box in sample.boxes),
        filename=f"{sample.key}.{sample.field}",
        synset=class_name if is_synset else None,
        text=None if is_synset else class_name,
    )
    return tfrecord.serialize_image_example(example, label_base=TFRECORD_LABEL_BASE)


class _CheckedFile:
    """A file whose CRCs are computed as it is written."""

    def __init__(self, file: HashedFile) -> None:
        self._file = file
        self.crcs = CrcTable()

    def write(self, data: bytes) -> int:
        self.crcs.add(crc32c(data), len(data))
        return self._file.write(data)


def write_shard(recipe: Recipe, task: ShardTask) -> WrittenShard:
    """Write a shard, whole or not at all.

    Raises:
        LoaderError: A sample cannot be read or prepared.
        OSError: The target cannot be written.
    """
    positions: list[int] = task.positions.tolist()
    places: list[_Place] = []
    open_writer = _TarShardWriter if recipe.settings.kind == "tar" else _TFRecordShardWriter
    with (
        recipe.place.compose(task.name) as file,
        HashedFile(file, md5=recipe.settings.md5) as hashed,
    ):
        writer: _Writer = open_writer(hashed, recipe)
        for number, raw in enumerate(recipe.reader.read(positions)):
            sample = recipe.sample(positions[number], task.first + number, raw)
            places.append(writer.write(sample))
        whole = writer.close()
        md5 = hashed.hexdigest()
    shard = ShardMetadata(
        name=task.name,
        num_samples=len(positions),
        size_bytes=whole.size_bytes,
        md5=md5,
        crc32c=whole.crc32c,
    )
    extents, payloads = (
        np.array([place[what] for place in places], np.int64).reshape(-1, 2) for what in (0, 1)
    )
    payload_crcs = [
        extent_crc if place.payload_crc is None else place.payload_crc
        for place, extent_crc in zip(places, whole.sample_crcs.tolist(), strict=True)
    ]
    crcs = np.stack([whole.sample_crcs, np.array(payload_crcs, np.int64)], axis=1)
    return WrittenShard(shard, extents, payloads, crcs)


def measure_samples(
    recipe: Recipe, positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tell what samples take in a shard whose size is not known without making them."""
    places: list[int] = positions.tolist()
    sizes = [
        recipe.packed_bytes(recipe.sample(position, position, raw))
        for position, raw in zip(places, recipe.reader.read(places), strict=True)
    ]
    return positions, np.array(sizes, np.int64)


def encode_boxes(boxes: Sequence[Box]) -> bytes:
    """Give the JSON of a sample's boxes; as in the older shards "bbox" is one box, or null."""
    sides = [list(box) for box in boxes]
    if len(sides) < 2:
        return orjson.dumps({"bbox": sides[0] if sides else None})
    lefts, tops, rights, bottoms = zip(*sides, strict=True)
    around = [min(lefts), min(tops), max(rights), max(bottoms)]
    return orjson.dumps({"bbox": around, "bboxes": sides})
