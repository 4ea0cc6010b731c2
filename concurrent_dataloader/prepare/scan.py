"""Make an index of shards that have none, by reading them once: headers, and the labels.

```text
tar        headers are walked; contents are skipped but for cls and json, which hold labels. Files
           are sought in; objects are read in large ranges, of which long members are left out
TFRecord   read whole, and CRCs checked, since the labels lie inside the records
```
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from concurrent_dataloader.errors import (
    KeyNotFoundError,
    SampleDecodeError,
    ShardFormatError,
)
from concurrent_dataloader.formats.fields import (
    LABEL_FIELD,
    find_field,
    find_label_field,
    find_payload_field,
    is_image_field,
    read_json,
    read_label,
)
from concurrent_dataloader.formats.tar import (
    Member,
    SampleMembers,
    check_members,
    group_members,
    read_members,
    split_name,
)
from concurrent_dataloader.formats.tfrecord import (
    ImageExample,
    ReadableFile,
    Record,
    iter_records,
    parse_image_example,
)
from concurrent_dataloader.labels import LabelSpace, imagenet_classes
from concurrent_dataloader.prepare.index import is_folder
from concurrent_dataloader.prepare.parallel import call_concurrently
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import (
    NO_LABEL,
    Shard,
    ShardIndex,
    ShardIndexBuilder,
    ShardKind,
)
from concurrent_dataloader.shard_names import ShardSet, Source, find_kind, locate_shards
from concurrent_dataloader.stores.base import Store, WritableStore
from concurrent_dataloader.stores.ranged_file import RangedFile

OpenStore = Callable[[str], Store]
"""Opens the store at a folder, or at ``s3://bucket/prefix``."""

CONCURRENCY = 8
"""Shards that are read at once."""

_FILE_BUFFER_BYTES = 8 << 10  # headers and labels side by side; more would read the images too
_OBJECT_BUFFER_BYTES = 4 << 20  # eight at once: 32 MiB in flight, 320 MB/s at 100 ms
_MAX_LABEL_BYTES = 1 << 20
_NUM_CLASSES = 1000
_LABEL_SPACES = (
    (LabelSpace.SORTED_WNID, 0),
    (LabelSpace.ILSVRC2012_ID, 1),
    (LabelSpace.ILSVRC2012_ID, 0),
    (LabelSpace.TF_BUILDER, 1),
)


class _Found(NamedTuple):
    """A sample of a shard, with its label as it stands there."""

    name: str
    extent: ByteRange
    payload: ByteRange
    label: int | None
    class_name: str | None


class _Scanned(NamedTuple):
    """A shard, read."""

    number: int
    shard: Shard
    samples: list[_Found]


def find_shards(source: Source, open_root: OpenStore) -> ShardSet:
    """Find the shards that a folder, a URL, brace ranges, globs or a list of these name.

    Args:
        source: As `locate_shards` takes it.
        open_root: Opens the place where shards are to be listed.

    Raises:
        ValueError: The source cannot be expanded, or a web server would have to be listed.
        FileNotFoundError: Nothing is there.
        StoreError: The place cannot be listed.
    """

    def list_objects(root: str, prefix: str) -> Iterable[tuple[str, int]]:
        with contextlib.closing(open_root(root)) as store:
            if not isinstance(store, WritableStore):
                raise ValueError(
                    f"{root}: cannot be listed, expected the names of shards, such as "
                    f"{root}/train-{{000000..000099}}.tar"
                )
            yield from store.list(prefix)

    return locate_shards(source, list_objects)


def rebase(shards: ShardSet, folder: str) -> ShardSet:
    """Name shards relative to the folder that their index will lie in, if they lie below it."""
    begin = f"{folder.rstrip('/')}/"
    if not shards.root.startswith(begin):
        return shards
    below = shards.root.removeprefix(begin)
    return ShardSet(folder, tuple(f"{below}/{name}" for name in shards.names), shards.sizes)


def scan_shards(
    shards: ShardSet,
    open_root: OpenStore,
    *,
    payload: str | None = None,
    label_space: LabelSpace | None = None,
    label_base: int | None = None,
    concurrency: int = CONCURRENCY,
    on_shard: Callable[[str, int], None] = lambda name, num_samples: None,
) -> ShardIndex:
    """Read where samples lie in shards, and their labels.

    Args:
        shards: What to read; all tar, or all TFRecord.
        open_root: Opens the store at their root.
        payload: Which field is the image, as alternatives ``"jpg;png"``; None: the first that is
            one, else the first that is neither label nor JSON.
        label_space: What the labels mean; None: found out from the WordNet ids in the keys or
            records, if these leave no doubt.
        label_base: What the first class is called; None: the space's first id, or what the
            WordNet ids say, else 0, and for TFRecords 1, as TensorFlow's builder has it.
        concurrency: Shards that are read at once.
        on_shard: Told the name of each, and its number of samples, in their order.

    Raises:
        ShardFormatError: A shard is damaged or compressed, a name in it is unsafe, members of a
            sample do not stand side by side, it has no payload, or a label is below
            ``label_base``.
        KeyNotFoundError: A shard is not there, or none holds a sample.
        ValueError: The shards are not of one kind.
        StoreError: A shard cannot be read.
    """
    kind = _find_kind(shards)
    where = shards.root
    builder = ShardIndexBuilder(kind)
    names: dict[int, set[str | None]] = {}
    with contextlib.closing(open_root(where)) as store:

        def scan(numbered: tuple[int, str]) -> _Scanned:
            number, name = numbered
            with _open_shard(store, shards, number) as (file, size_bytes):
                if kind == "tar":
                    samples = list(_scan_tar(file, store.describe(name), payload))
                else:
                    samples = list(_scan_tfrecord(file, store.describe(name), name))
            return _Scanned(number, Shard(name, size_bytes), samples)

        scans = call_concurrently(scan, enumerate(shards.names), concurrency)
        with contextlib.closing(scans):
            for scanned in _in_order(scans):
                for found in scanned.samples:
                    builder.add_sample(found.name, found.extent, found.payload, found.label)
                    if found.label is not None:
                        names.setdefault(found.label, set()).add(found.class_name)
                builder.add_shard(scanned.shard)
                on_shard(scanned.shard.name, len(scanned.samples))
    return _finish(builder, names, kind, label_space, label_base, where)


def _find_kind(shards: ShardSet) -> ShardKind:
    kinds = {find_kind(name): name for name in shards.names}
    if "compressed tar" in kinds:
        raise ShardFormatError(
            f"{shards.root}/{kinds['compressed tar']}: a compressed tar has no byte ranges of "
            "samples, expected a plain tar; stream it, or convert it with "
            "`concurrent-dataloader shard`"
        )
    if None in kinds or len(kinds) > 1:
        raise ValueError(
            f"{shards.root}: got {', '.join(sorted(kinds.values()))}, expected shards of one kind, "
            "which end in .tar or .tfrecord, or are called such as train-00000-of-01024"
        )
    return "tar" if "tar" in kinds else "tfrecord"


@contextlib.contextmanager
def _open_shard(store: Store, shards: ShardSet, number: int) -> Generator[tuple[BinaryIO, int]]:
    """Open a shard as a seekable file, and tell its size."""
    name = shards.names[number]
    if is_folder(shards.root):
        path = Path(shards.root.removeprefix("file://")).expanduser() / name
        try:
            with path.open("rb", buffering=_FILE_BUFFER_BYTES) as file:
                yield file, os.fstat(file.fileno()).st_size
        except FileNotFoundError as error:
            raise KeyNotFoundError(
                f"{path}: no such shard; check the names of the shards"
            ) from error
        return
    ranged = RangedFile(store, name, shards.sizes[number])
    size_bytes = ranged.seek(0, io.SEEK_END)
    ranged.seek(0)
    with io.BufferedReader(ranged, _OBJECT_BUFFER_BYTES) as file:
        yield cast(BinaryIO, file), size_bytes


def _in_order(scans: Iterable[_Scanned]) -> Iterator[_Scanned]:
    waiting: dict[int, _Scanned] = {}
    number = 0
    for scanned in scans:
        waiting[scanned.number] = scanned
        while number in waiting:
            yield waiting.pop(number)
            number += 1


# -- tar


def iter_tar_samples(
    file: BinaryIO, where: str
) -> Iterator[tuple[SampleMembers, Mapping[str, bytes]]]:
    """Walk a tar from header to header, and read the small fields that may hold a label.

    They are read when their header is, so that a file that is read in large pieces never goes back.

    Args:
        file: Seekable. It is left open, at no certain position.
        where: Names it in errors.

    Yields:
        Samples in the order of the tar, with what ``cls`` and ``json`` hold, where they have them.

    Raises:
        ShardFormatError: The tar is damaged or was cut short, or a name in it leads out of the
            folder that it is extracted to.
    """
    contents: dict[int, bytes] = {}  # by the offset of their member

    def read_small() -> Iterator[Member]:
        for member in check_members(read_members(file, where), where):
            parts = split_name(member.name)
            size_bytes = member.data.stop - member.data.start
            kind = parts[1].rpartition(".")[2] if parts else ""
            if kind in (LABEL_FIELD, "json") and size_bytes <= _MAX_LABEL_BYTES:
                # The walk goes on by offset, wherever the file stands.
                file.seek(member.data.start)
                contents[member.start] = file.read(size_bytes)
            yield member

    for sample in group_members(read_small(), where):
        starts = {field: member.start for field, member in sample.members.items()}
        yield (
            sample,
            {field: contents.pop(start) for field, start in starts.items() if start in contents},
        )


def _scan_tar(file: BinaryIO, where: str, payload: str | None) -> Iterator[_Found]:
    seen: set[str] = set()
    for sample, small in iter_tar_samples(file, where):
        key, members = sample.key, sample.members
        if key in seen:
            raise ShardFormatError(
                f"{where}: sample {key!r} comes back after others, expected its members side by "
                "side; write the tar anew, sorted by name"
            )
        seen.add(key)
        fields = list(members)
        if payload is None:
            _check_images(fields, f"{where}: sample {key!r}")
        field = find_payload_field(fields) if payload is None else find_field(payload, fields)
        if field is None:
            wanted = "an image or other content" if payload is None else repr(payload)
            raise ShardFormatError(
                f"{where}: sample {key!r} has fields {', '.join(fields)}, expected {wanted}"
            )
        yield _Found(
            f"{key}.{field}",
            sample.extent,
            members[field].data,
            _find_label(small, f"{where}: sample {key!r}"),
            _parent(key),
        )


def _check_images(fields: Sequence[str], where: str) -> None:
    """Raise if any of several images could be the one of a sample."""
    images = [field for field in fields if is_image_field(field)]
    if len(images) > 1 and all("." in field for field in images):
        raise ShardFormatError(
            f"{where} has the images {', '.join(images)}, expected one, or one without a dot; name "
            "the field by payload, or, if they are samples each, write the tar anew without dots "
            "in their names, since a name ends at its first dot"
        )


def _find_label(small: Mapping[str, bytes], where: str) -> int | None:
    try:
        if (field := find_label_field(small)) is not None:
            return read_label(small[field])
        if (field := find_field("json", small)) is not None:
            decoded: object = read_json(small[field])
            label = (
                cast(dict[str, Any], decoded).get("label") if isinstance(decoded, dict) else None
            )
            return label if isinstance(label, int) and not isinstance(label, bool) else None
    except SampleDecodeError as error:
        raise ShardFormatError(f"{where}: {error}") from error
    return None


def _parent(key: str) -> str | None:
    parts = key.rsplit("/", 2)
    return parts[-2] if len(parts) > 1 and parts[-2] not in ("", ".") else None


# -- TFRecord


class RecordSample(NamedTuple):
    """A sample of a TFRecord shard."""

    name: str
    """As a file would be called, with the folder of its class where that is known."""

    class_name: str | None
    record: Record
    example: ImageExample
    """Its label is as it stands in the record."""


def iter_record_samples(file: ReadableFile, where: str, shard_name: str) -> Iterator[RecordSample]:
    """Read the samples of a TFRecord shard, in order.

    Args:
        file: Read front to back. It is left open.
        where: Names it in errors.
        shard_name: Names samples that have no name of their own, with their number.

    Raises:
        ShardFormatError: It is damaged, or holds no images.
    """
    for number, record in enumerate(iter_records(file, where)):
        example = parse_image_example(
            record.payload, label_base=0, num_classes=None, where=f"{where}, record {number}"
        )
        name = (example.filename or f"{shard_name}/{number:07d}").lstrip("/")
        if split_name(name) is None:
            name = f"{name}.{(example.image_format or 'img').lower()}"
        if example.synset and "/" not in name:
            name = f"{example.synset}/{name}"
        class_name = example.synset or (_parent(name) if example.filename else None)
        yield RecordSample(name, class_name, record, example)


def _scan_tfrecord(file: BinaryIO, where: str, shard_name: str) -> Iterator[_Found]:
    for name, class_name, record, example in iter_record_samples(file, where, shard_name):
        yield _Found(name, record.byte_range, record.byte_range, example.label, class_name)


# -- labels


class LabelMeaning(NamedTuple):
    """What the labels of shards mean."""

    space: LabelSpace | None
    base: int
    """What the first class is called."""

    classes: list[str] | None
    """Name of each class in the order of the labels; None where that is not known."""


def find_meaning(
    names: Mapping[int, set[str | None]],
    kind: ShardKind,
    label_space: LabelSpace | None = None,
    label_base: int | None = None,
) -> LabelMeaning:
    """Find out what labels mean, as far as it was not told; pure.

    Args:
        names: The names of classes that stand beside each label.
        kind: Of the shards.
        label_space: As in `scan_shards`.
        label_base: As in `scan_shards`.
    """
    by_label = _names_by_label(names)
    if label_space is None and label_base is None:
        label_space, label_base = _recognise(by_label)
    if label_base is None:
        by_convention = 1 if kind == "tfrecord" else 0
        label_base = by_convention if label_space is None else label_space.first_id
    return LabelMeaning(label_space, label_base, _list_classes(by_label, label_space, label_base))


def _finish(
    builder: ShardIndexBuilder,
    names: dict[int, set[str | None]],
    kind: ShardKind,
    label_space: LabelSpace | None,
    label_base: int | None,
    where: str,
) -> ShardIndex:
    label_space, label_base, classes = find_meaning(names, kind, label_space, label_base)
    index = builder.build(classes, None if label_space is None else label_space.value)
    if not len(index):
        raise KeyNotFoundError(f"{where}: no sample in {len(index.shards)} shards; check them")
    labels = index.labels
    if labels is None:
        return index
    is_known = labels != NO_LABEL
    lowest, highest = int(labels[is_known].min()), int(labels.max())
    last = None if label_space in (None, LabelSpace.CUSTOM) else label_base + _NUM_CLASSES - 1
    if lowest < label_base or (last is not None and highest > last):
        got = lowest if lowest < label_base else highest
        position = int(np.flatnonzero(labels == got)[0])
        raise ShardFormatError(
            f"{where}/{index.shard_of(position).name}: sample {index.names.key(position)!r}: got "
            f"label {got}, expected {label_base} {'or more' if last is None else f'to {last}'}; "
            "declare what the labels mean (label_space), or count from (label_base)"
        )
    labels[is_known] -= label_base
    return index


def _names_by_label(names: Mapping[int, set[str | None]]) -> dict[int, str] | None:
    """Give the one name of each class; None unless each has one, and no two the same."""
    by_label = {
        label: name
        for label, found in names.items()
        if len(found) == 1 and (name := next(iter(found)))
    }
    is_clear = len(by_label) == len(names) == len(set(by_label.values()))
    return by_label if is_clear and by_label else None


def _recognise(by_label: dict[int, str] | None) -> tuple[LabelSpace | None, int | None]:
    """Tell what labels mean by the WordNet ids that stand beside them."""
    if by_label is None:
        return None, None
    is_dense = sorted(by_label) == list(range(len(by_label)))
    if is_dense and len(by_label) < _NUM_CLASSES:
        return None, 0  # numbered anew, as ImageFolder numbers the classes that occur
    for space, base in _LABEL_SPACES:
        wnids = _wnids(space)
        if all(
            base <= label < base + _NUM_CLASSES and wnids[label - base] == name
            for label, name in by_label.items()
        ):
            return space, base
    return None, None


def _wnids(space: LabelSpace) -> list[str]:
    """Give ImageNet's classes in the order of a space."""
    wnids = [entry.wnid for entry in imagenet_classes()]
    of_kit = (LabelSpace.ILSVRC2012_ID, LabelSpace.ILSVRC2012_VALIDATION)
    return wnids if space in of_kit else sorted(wnids)


def _list_classes(
    by_label: dict[int, str] | None, space: LabelSpace | None, base: int
) -> list[str] | None:
    if space is not None and space is not LabelSpace.CUSTOM:
        return _wnids(space)
    if by_label is None or sorted(by_label) != list(range(base, base + len(by_label))):
        return None
    return [by_label[label] for label in sorted(by_label)]
