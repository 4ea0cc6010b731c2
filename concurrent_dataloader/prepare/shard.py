"""Pack samples into shards: planned first, then written by any number of processes.

```text
Source -> survey (keys, sizes) -> ShardPlan -> shards, each whole or not there, with a receipt
                                            -> SPLIT-index.npz, SPLIT-FileInfo.json, metadata.json
```

Shard ``i`` depends on nothing but the source, the settings and ``i``: the same seed gives the same
bytes on any machine, whatever the number of processes. Until a run has finished, what is needed to
go on after it lies in ``.unfinished-SPLIT`` in the target: the fingerprint of its plan, a receipt
for each whole shard, and shards that are being written.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import orjson
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.formats.crc32c import CrcTable, crc32c
from concurrent_dataloader.formats.fields import LABEL_FIELD, RAW_FIELDS, TENSOR_FIELD
from concurrent_dataloader.formats.tar import (
    BLOCK_BYTES,
    END_OF_ARCHIVE,
    TarWriter,
    check_name,
    count_sample_bytes,
    encode_header,
    split_name,
)
from concurrent_dataloader.prepare.metadata import ShardMetadata, SplitMetadata
from concurrent_dataloader.prepare.plan import (
    NamePattern,
    ShardPlan,
    find_duplicate,
    index_digits,
    shuffle_positions,
    split_by_count,
    split_by_size,
)
from concurrent_dataloader.prepare.pool import Pool, open_pool
from concurrent_dataloader.prepare.reading import Reader
from concurrent_dataloader.prepare.source import Box, Source
from concurrent_dataloader.prepare.steps import Preparation
from concurrent_dataloader.prepare.target import HashedFile, ShardTarget, WrittenShard
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import (
    SampleCrcs,
    Shard,
    ShardIndex,
    ShardIndexBuilder,
    ShardKind,
)
from concurrent_dataloader.stores import WritableStore

KeyStyle = Literal["path", "stem", "index"]
"""What a sample is called in its shard.

- ``"path"``: its path in the source without ending, as ``n01440764/n01440764_10026``.
- ``"stem"``: its file name without ending.
- ``"index"``: its number in the order of writing, of seven digits or more.
"""

DEFAULT_MAX_BYTES = 300_000_000
"""Some 490 shards of ImageNet's training set."""

# Endings that readers would not take for an image; these files are called ``img``.
_OTHER_IMAGES = frozenset({"", "gif", "jfif", "jpe", "pnm", "pbm"})
_PAYLOAD_FIELDS = {"jpeg": "jpg", "tensor": TENSOR_FIELD, "raw": RAW_FIELDS[0], "ppm": "ppm"}
_SYNSET = re.compile(r"n\d{8}", re.ASCII)
_TFRECORD_FRAME_BYTES = 16  # a length and two CRCs
_TFRECORD_LABEL_BASE = 1  # 0 is the background, as TensorFlow's builder counts
_PLAIN_NAME_BYTES = 100
_PLAIN_SIZE_BYTES = 8 << 30
_MEASURED_AT_ONCE = 256
_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """How a split is packed; what the bytes of its shards depend on, besides the source.

    Raises:
        ValueError: On making it: a value that cannot be, or settings that do not go together.
    """

    split: str = "train"
    kind: ShardKind = "tar"
    pattern: str | None = None
    """Names of the shards; None: ``SPLIT-%06d.tar`` or ``SPLIT-%05d-of-%05d``."""

    seed: int | None = 0
    """Of the permutation of all samples; None: keep the source's order."""

    max_count: int | None = None
    """Samples of a shard; every shard but the last has exactly as many, unless ``max_bytes`` ends
    it before."""

    max_bytes: int | None = DEFAULT_MAX_BYTES
    """Of a shard's file; never exceeded, but by a sample that is larger alone. Sizes that the
    source does not know, or that a preparation changes, cost a first pass over all samples."""

    key_style: KeyStyle = "path"
    key_prefix: str | None = None
    """Stands before each key; None: ``SPLIT-`` for the key style "index", else nothing."""

    field: str | None = None
    """Of the payload, such as ``jpg``; None: the file's ending in lower case."""

    boxes: bool = False
    """Whether each sample gets its bounding boxes: ``{"bbox": [x1, y1, x2, y2]}``, or null. If it
    has several, "bbox" is the smallest box around them, and "bboxes" has them all."""

    preparation: Preparation = dataclasses.field(default_factory=Preparation)

    md5: bool = False
    """Whether the MD5 of each shard is recorded too, which takes four times as long as the rest.
    The older system's checksum of a set is made of them."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ShardKind):
            raise ValueError(f"format: got {self.kind!r}, expected 'tar' or 'tfrecord'")
        if self.key_style not in get_args(KeyStyle):
            styles = ", ".join(get_args(KeyStyle))
            raise ValueError(f"key_style: got {self.key_style!r}, expected one of {styles}")
        if not self.split or self.split.startswith(".") or "/" in self.split or "%" in self.split:
            raise ValueError(f"split: got {self.split!r}, expected a name such as 'train'")
        if self.field is not None and (
            split_name(f"x.{self.field}") != ("x", self.field) or self.field in ("cls", "json")
        ):
            raise ValueError(
                f"field: got {self.field!r}, expected an ending in lower case such as 'jpg', and"
                " neither 'cls' nor 'json'"
            )
        if self.kind == "tfrecord" and self.preparation.payload in ("tensor", "raw"):
            raise ValueError(
                f"payload: got {self.preparation.payload!r} in a TFRecord, expected 'file', 'jpeg'"
                " or 'ppm', since readers take it for an image file"
            )
        shuffle_positions(0, self.seed)
        none = np.zeros(0, np.int64)
        split_by_count(none, self.max_count)
        if self.max_bytes is not None:
            split_by_size(none, none, self.max_bytes)
        self.names.names(1)
        check_name(self.prefix + "x")

    @property
    def names(self) -> NamePattern:
        """The names of the shards."""
        end = "-%06d.tar" if self.kind == "tar" else "-%05d-of-%05d"
        return NamePattern(self.split + end if self.pattern is None else self.pattern)

    @property
    def prefix(self) -> str:
        """What stands before each key."""
        if self.key_prefix is not None:
            return self.key_prefix
        return f"{self.split}-" if self.key_style == "index" else ""

    def key(self, name: str, place: int, digits: int) -> str:
        """Give the key of the sample that is called ``name`` and is written as number ``place``.

        Dots in the last part of a path would begin the field; they become underscores.
        """
        if self.key_style == "index":
            return f"{self.prefix}{place:0{digits}d}"
        folder, slash, base = name.rpartition("/")
        stem = _split_ending(base)[0].replace(".", "_")
        return self.prefix + (stem if self.key_style == "stem" else folder + slash + stem)

    def payload_field(self, name: str) -> str:
        """Give the field of the payload of the sample that is called ``name``."""
        if self.field is not None:
            return self.field
        if self.preparation.payload != "file":
            return _PAYLOAD_FIELDS[self.preparation.payload]
        ending = _split_ending(name)[1].lower()
        return "img" if ending in _OTHER_IMAGES else ending


def write_shards(
    source: Source,
    target: str | os.PathLike[str] | WritableStore,
    settings: ShardSettings | None = None,
    *,
    num_processes: int = 1,
    num_readers: int = 64,
    overwrite: bool = False,
    resume: bool = True,
    in_memory: bool = False,
    scratch: str | os.PathLike[str] | None = None,
    file_info: bool = True,
    on_shard: Callable[[ShardMetadata, int], None] = lambda shard, num_shards: None,
) -> SplitMetadata:
    """Pack all samples of a source.

    Args:
        source: The samples.
        target: Folder, URL or store where the shards are to be; folders are made.
        settings: What is written; None: the defaults of `ShardSettings`.
        num_processes: Each writes whole shards; this process is one of them, unless a function of
            the user's is called. With more than one, the calling script must be importable (``if
            __name__ == "__main__"``), since they are spawned.
        num_readers: Reads at once in each process, where reading takes longer than from a disk's
            cache; they hold 64 MiB at most, but for a sample that is larger alone.
        overwrite: Remove the shards of this split, its index and its metadata first.
        resume: Whether to go on after a run with the same source and settings that did not finish.
        in_memory: Compose shards in memory. Otherwise one for a bucket is composed in a temporary
            file that has no name, so that nothing can be left of it.
        scratch: Folder of those files; None: the system's.
        file_info: Whether to write ``SPLIT-FileInfo.json`` as well.
        on_shard: Called with each shard as it is there, and with their number.

    Returns:
        What ``metadata.json`` says of the split.

    Raises:
        FileExistsError: The target holds this split already.
        ValueError: The source is empty, or two samples would get the same key.
        LoaderError: A sample cannot be read or prepared.
        OSError: The target cannot be written.
    """
    settings = ShardSettings() if settings is None else settings
    place = ShardTarget(
        target,
        settings.split,
        in_memory=in_memory,
        scratch=None if scratch is None else os.fspath(scratch),
    )
    survey = survey_source(source, settings)
    recipe = _Recipe(source, settings, place, num_readers)
    pool_of = functools.partial(open_pool, works_here=settings.preparation.function is None)
    with place.lock(), pool_of(recipe, num_processes, _Recipe.close) as pool:
        _check_other_splits(place, survey, source, settings)
        plan = _make_plan(recipe, survey, pool)
        names = settings.names.names(plan.num_shards)
        written = place.begin(
            survey.fingerprint, names, settings.names, overwrite=overwrite, resume=resume
        )
        for shard in written.values():
            on_shard(shard.shard, plan.num_shards)
        tasks = [
            _Task(name, int(plan.bounds[number]), plan.positions(number))
            for number, name in enumerate(names)
            if name not in written
        ]
        for shard in pool.run(_write_shard, tasks):
            place.put_receipt(shard)
            written[shard.shard.name] = shard
            on_shard(shard.shard, plan.num_shards)
        shards = [written[name] for name in names]
        result = _describe_split(recipe, shards, survey.fingerprint)
        place.finish(
            _build_index(recipe, plan, shards).to_bytes(),
            _describe_samples(recipe, plan, shards) if file_info else None,
            lambda metadata: metadata.with_split(settings.split, result),
        )
        return result


# -- before anything is written


class Survey(NamedTuple):
    """What is known of a source before it is read."""

    key_hashes: NDArray[np.uint64]
    """Of the key of each sample, (N,)."""

    sizes: NDArray[np.int64]
    """Of each sample's file, in bytes, (N,); -1 where the source does not know."""

    json_sizes: NDArray[np.int64] | None
    """Of the JSON of each sample's boxes, in bytes, (N,); None if boxes are not packed."""

    fingerprint: str
    """Stands for names, labels and sizes of the source, and for the settings."""


def survey_source(source: Source, settings: ShardSettings) -> Survey:
    """Look at the names of all samples, and check that each gets a key of its own.

    Raises:
        ValueError: There is no sample, two would get the same key, a name cannot be one in a
            shard, or a label is not among the classes.
    """
    num_samples = len(source)
    if num_samples == 0:
        raise ValueError(
            "source: got no samples, expected one at least; check its path and the endings that"
            " count as samples"
        )
    digits = index_digits(num_samples)
    hashes = np.empty(num_samples, np.uint64)
    sizes = np.empty(num_samples, np.int64)
    json_sizes = np.empty(num_samples, np.int64) if settings.boxes else None
    digest = hashlib.blake2b(repr((_FORMAT_VERSION, settings)).encode(), digest_size=16)
    digest.update(repr((source.classes, source.label_space)).encode(errors="surrogateescape"))
    num_classes = None if source.classes is None else len(source.classes)
    for position in range(num_samples):
        name = source.name(position)
        # The set of keys that are numbers is the same in any order.
        hashes[position] = _hash_key(_check_key(settings, name, position, digits))
        size = source.size_bytes(position)
        sizes[position] = -1 if size is None else size
        label = source.label(position)
        if label is not None and (label < 0 or (num_classes is not None and label >= num_classes)):
            raise ValueError(f"{name!r}: got label {label}, expected one of {num_classes} classes")
        boxes = b""
        if json_sizes is not None:
            boxes = _encode_boxes(source.boxes(position))
            json_sizes[position] = len(boxes)
        line = f"{name}\0{sizes[position]}\0{label}\0".encode(errors="surrogateescape")
        digest.update(line + boxes + b"\n")
    same = find_duplicate(hashes)
    if same is not None:
        names = [source.name(position) for position in same]
        raise ValueError(
            f"{names[0]!r} and {names[1]!r}: both get the key"
            f" {settings.key(names[0], same[0], digits)!r}, expected one for each; rename one,"
            " or choose another key style: 'index' numbers them"
        )
    return Survey(hashes, sizes, json_sizes, digest.hexdigest())


def check_splits(splits: Sequence[tuple[Source, ShardSettings]]) -> None:
    """Make sure, before several splits are written, that no two of their samples share a key.

    Raises:
        ValueError: Two do, or two splits have the same names for their shards.
    """
    patterns = [settings.names.pattern for _, settings in splits]
    for pattern in patterns:
        if patterns.count(pattern) > 1:
            raise ValueError(
                f"pattern: got {pattern!r} for more than one split, expected one for each; write"
                " them one by one, or into folders of their own"
            )
    seen: dict[str, NDArray[np.uint64]] = {}
    for source, settings in splits:
        survey = survey_source(source, settings)
        for split, hashes in seen.items():
            _refuse_common(settings, survey, source, split, hashes)
        seen[settings.split] = survey.key_hashes


def _check_key(settings: ShardSettings, name: str, place: int, digits: int) -> str:
    key, field = settings.key(name, place, digits), settings.payload_field(name)
    if split_name(f"{key}.{field}") != (key, field) or field in ("cls", "json"):
        raise ValueError(
            f"{name!r}: would be called {key!r} with the field {field!r}, which cannot be read"
            " back; give a field such as 'jpg', or choose the key style 'index'"
        )
    check_name(key)
    return key


def _hash_key(key: str) -> int:
    try:
        raw = key.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key!r}: got a name that is not UTF-8; rename the file, or choose the key style"
            " 'index'"
        ) from error
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _refuse_common(
    settings: ShardSettings,
    survey: Survey,
    source: Source,
    other_split: str,
    others: NDArray[np.uint64],
) -> None:
    found = np.flatnonzero(np.isin(survey.key_hashes, others))
    if len(found):
        position = int(found[0])
        key = settings.key(source.name(position), position, index_digits(len(source)))
        raise ValueError(
            f"{source.name(position)!r} of split {settings.split!r}: gets the key {key!r}, which"
            f" split {other_split!r} has too; give a key prefix, such as '{settings.split}/'"
        )


def _check_other_splits(
    place: ShardTarget, survey: Survey, source: Source, settings: ShardSettings
) -> None:
    for split, index in place.read_other_indexes():
        keys = (split_name(index.names.key(position)) for position in range(len(index)))
        hashes = np.array([_hash_key(parts[0]) for parts in keys if parts], np.uint64)
        _refuse_common(settings, survey, source, split, hashes)


def _make_plan(recipe: _Recipe, survey: Survey, pool: Pool[_Recipe]) -> ShardPlan:
    settings = recipe.settings
    order = shuffle_positions(len(recipe.source), settings.seed)
    if settings.max_bytes is None:
        return split_by_count(order, settings.max_count)
    preparation = settings.preparation
    sizes = np.empty(len(order), np.int64)
    is_known = (survey.sizes >= 0) & preparation.keeps_bytes & (settings.kind == "tar")
    for position in np.flatnonzero(is_known).tolist():
        sizes[position] = _tar_bytes(recipe, survey, position)
    unknown = np.flatnonzero(~is_known)
    parts = [
        unknown[start : start + _MEASURED_AT_ONCE]
        for start in range(0, len(unknown), _MEASURED_AT_ONCE)
    ]
    for positions, measured in pool.run(_measure, parts):
        sizes[positions] = measured
    fixed_bytes = len(END_OF_ARCHIVE) if settings.kind == "tar" else 0
    return split_by_size(
        order, sizes, settings.max_bytes, max_count=settings.max_count, fixed_bytes=fixed_bytes
    )


# -- shards


class _Recipe:
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
            fields["json"] = _encode_boxes(sample.boxes)
        return fields


class _Sample(NamedTuple):
    """A sample as it is packed."""

    key: str
    field: str
    content: Buffer
    label: int | None
    boxes: Sequence[Box]


class _Task(NamedTuple):
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
    def __init__(self, file: HashedFile, recipe: _Recipe) -> None:
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

    def __init__(self, file: HashedFile, recipe: _Recipe) -> None:
        from concurrent_dataloader.formats.tfrecord import TFRecordWriter

        self._checked = _CheckedFile(file)
        self._writer = TFRecordWriter(self._checked)
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
    from concurrent_dataloader.formats import tfrecord

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
    return tfrecord.serialize_image_example(example, label_base=_TFRECORD_LABEL_BASE)


class _CheckedFile:
    """A file whose CRCs are computed as it is written."""

    def __init__(self, file: HashedFile) -> None:
        self._file = file
        self.crcs = CrcTable()

    def write(self, data: bytes) -> int:
        self.crcs.add(crc32c(data), len(data))
        return self._file.write(data)


def _write_shard(recipe: _Recipe, task: _Task) -> WrittenShard:
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


def _measure(
    recipe: _Recipe, positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tell what samples take in a shard whose size is not known without making them."""
    places: list[int] = positions.tolist()
    sizes = [
        recipe.packed_bytes(recipe.sample(position, position, raw))
        for position, raw in zip(places, recipe.reader.read(places), strict=True)
    ]
    return positions, np.array(sizes, np.int64)


def _tar_bytes(recipe: _Recipe, survey: Survey, position: int) -> int:
    """Tell how much of a tar a sample takes whose file is packed as it is."""
    source, settings = recipe.source, recipe.settings
    name, label = source.name(position), source.label(position)
    sizes = {settings.payload_field(name): int(survey.sizes[position])}
    if label is not None:
        sizes[LABEL_FIELD] = len(str(label))
    if survey.json_sizes is not None:
        sizes["json"] = int(survey.json_sizes[position])
    key = settings.key(name, position, recipe.digits)
    return sum(_member_bytes(f"{key}.{field}", size) for field, size in sizes.items())


def _member_bytes(name: str, size_bytes: int) -> int:
    """Tell how much of a tar a member takes."""
    is_plain = len(name) <= _PLAIN_NAME_BYTES and name.isascii() and size_bytes < _PLAIN_SIZE_BYTES
    header_bytes = BLOCK_BYTES if is_plain else len(encode_header(name, size_bytes))
    return header_bytes + size_bytes + -size_bytes % BLOCK_BYTES


def _encode_boxes(boxes: Sequence[Box]) -> bytes:
    """Give the JSON of a sample's boxes; as in the older shards "bbox" is one box, or null."""
    sides = [list(box) for box in boxes]
    if len(sides) < 2:
        return orjson.dumps({"bbox": sides[0] if sides else None})
    lefts, tops, rights, bottoms = zip(*sides, strict=True)
    around = [min(lefts), min(tops), max(rights), max(bottoms)]
    return orjson.dumps({"bbox": around, "bboxes": sides})


def _split_ending(name: str) -> tuple[str, str]:
    """Part a name at the last dot of its last part, but for one that it begins with."""
    base = name[name.rfind("/") + 1 :]
    stem, dot, ending = base.rpartition(".")
    if not dot or not stem:
        return name, ""
    return name[: -len(ending) - 1], ending


# -- what lies beside the shards


def _describe_split(
    recipe: _Recipe, shards: Sequence[WrittenShard], fingerprint: str
) -> SplitMetadata:
    settings, source = recipe.settings, recipe.source
    preparation = settings.preparation
    return SplitMetadata(
        num_samples=len(source),
        shards=tuple(written.shard for written in shards),
        kind=settings.kind,
        payload=preparation.payload,
        image_size=preparation.image_size,
        image_quality=preparation.encoder_quality,
        transforms=tuple(map(str, preparation.steps)),
        function=preparation.function,
        shuffle=settings.seed is not None,
        seed=settings.seed,
        key_style=settings.key_style,
        pattern=settings.names.pattern,
        boxes=settings.boxes,
        label_base=0 if settings.kind == "tar" else _TFRECORD_LABEL_BASE,
        label_space=source.label_space,
        classes=None if source.classes is None else tuple(source.classes),
        fingerprint=fingerprint,
    )


def _build_index(recipe: _Recipe, plan: ShardPlan, shards: Sequence[WrittenShard]) -> ShardIndex:
    source, settings = recipe.source, recipe.settings
    builder = ShardIndexBuilder(settings.kind)
    place = 0
    for number, (shard, extents, payloads, crcs) in enumerate(shards):
        places = zip(extents.tolist(), payloads.tolist(), crcs.tolist(), strict=True)
        for position, (extent, payload, sample_crcs) in zip(
            plan.positions(number).tolist(), places, strict=True
        ):
            name = source.name(position)
            key = settings.key(name, place, recipe.digits)
            builder.add_sample(
                f"{key}.{settings.payload_field(name)}",
                ByteRange(*extent),
                ByteRange(*payload),
                source.label(position),
                SampleCrcs(*sample_crcs),
            )
            place += 1
        builder.add_shard(Shard(shard.name, shard.size_bytes, shard.md5, shard.crc32c))
    return builder.build(source.classes, source.label_space)


def _describe_samples(
    recipe: _Recipe, plan: ShardPlan, shards: Sequence[WrittenShard]
) -> Iterator[bytes]:
    """Map each source name to its class, its shard, and the place of its sample there, as JSON."""
    source = recipe.source
    begin = b"{\n"
    for number, (shard, extents, *_) in enumerate(shards):
        starts_and_stops = zip(plan.positions(number).tolist(), extents.tolist(), strict=True)
        for position, (start, stop) in starts_and_stops:
            label = source.label(position)
            entry = {
                "class": None if label is None or source.classes is None else source.classes[label],
                "label": label,
                "shard": shard.name,
                "offset": start,
                "size": stop - start,
            }
            yield begin + orjson.dumps(source.name(position)) + b":" + orjson.dumps(entry)
            begin = b",\n"
    yield b"\n}\n"
