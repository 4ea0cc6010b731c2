"""Samples in TFRecord shards: read through once, since their labels lie inside the records.

After that, reading a sample is one ranged read of its image file, compared with the checksum that
it had when the record, whose own checksums were compared, was read through.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import io
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image

from concurrent_dataloader.boxes import BoxTable
from concurrent_dataloader.errors import KeyNotFoundError, ShardFormatError
from concurrent_dataloader.formats.crc32c import crc32c
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.index import Index
from concurrent_dataloader.labels import LabelSpace
from concurrent_dataloader.prepare.metadata import Metadata
from concurrent_dataloader.prepare.scan import (
    RecordSample,
    find_meaning,
    iter_record_samples,
)
from concurrent_dataloader.prepare.sources.archives import Archives, map_archives
from concurrent_dataloader.prepare.sources.files import join, split_file_name
from concurrent_dataloader.prepare.sources.found import Found, Sieve, clean_name
from concurrent_dataloader.prepare.sources.layouts import Place, Search
from concurrent_dataloader.prepare.sources.places import ObjectPlaces, RangePlaces
from concurrent_dataloader.shard_index import MAX_LABEL, NO_LABEL
from concurrent_dataloader.shard_names import (
    METADATA_NAME,
    check_finished,
    describes_shards,
    find_kind,
    find_split,
    sort_shards,
)

_INDEX_ENDINGS = (".json", ".packed")
_PAYLOAD_OFFSET = 12  # a length and its CRC stand before it


def find_named_records(search: Search, text: str, *, takes_labels: bool) -> Place | None:
    """Find the samples of TFRecord shards that are named, outright or by a pattern.

    Args:
        search: How they are looked for.
        text: What the user gave.
        takes_labels: Whether the labels in the records count.

    Returns:
        What was found; None if ``text`` names something else.

    Raises:
        ShardFormatError: A shard is damaged, or holds no images.
        KeyNotFoundError: A shard is not there.
    """
    if any(sign in text for sign in "*?{"):
        folder, names = search._expand(text)
        names = sort_shards(name for name in names if not describes_shards(name))
    elif find_kind(text) == "tfrecord" and not text.endswith("/"):
        folder, name = split_file_name(text)
        names = [name]
    else:
        return None
    if not names or any(find_kind(name) != "tfrecord" for name in names):
        return None
    return _find_in_records(search, folder, names, takes_labels=takes_labels)


def find_records_of_folder(search: Search, place: Place, *, takes_labels: bool) -> Place:
    """Give back what was found; or, if it is no sample in a folder, those in TFRecords there.

    Args:
        search: As in `find_named_records`.
        place: What was found.
        takes_labels: As in `find_named_records`.

    Raises:
        ValueError: There are records of several splits, and none was asked for.
        ShardFormatError: A shard is damaged, holds no images, or is still being written.
        KeyNotFoundError: There are records, but none of the split.
    """
    found = place.found
    is_index = found.where.endswith(_INDEX_ENDINGS)
    if len(found.names) or is_index or not isinstance(found.places, ObjectPlaces):
        return place
    place.close()
    with contextlib.closing(search.files.open_folder(found.where)) as store:
        listed = [info.key for info in store.list()]
    names = [key for key in listed if "/" not in key and find_kind(key) == "tfrecord"]
    if not names:
        return place
    check_finished(listed, found.where)
    chosen = _choose_split(search, found.where, names)
    return _find_in_records(search, found.where, chosen, takes_labels=takes_labels)


def _choose_split(search: Search, where: str, names: Sequence[str]) -> list[str]:
    splits = {name: find_split(name) for name in sort_shards(names)}
    present = sorted({split for split in splits.values() if split is not None})
    if search.split is None:
        if len(present) > 1:
            raise ValueError(
                f"split: got None for {where}, which holds TFRecords of {', '.join(present)};"
                " expected one of these"
            )
        return list(splits)
    wanted = find_split(search.split) or search.split
    chosen = [name for name, split in splits.items() if split == wanted]
    if not chosen and present:
        raise KeyNotFoundError(
            f"{where}: holds no TFRecord of split {search.split!r}, but of {', '.join(present)}"
        )
    return chosen or list(splits)


class _Scan:
    """What a shard holds; flat arrays, since a million samples go through here."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.ranges = array.array("q")
        """Start and stop of each image file, one after the other."""
        self.crcs = array.array("q")
        self.labels = array.array("i")
        """As they stand in the records."""
        self.boxes: list[tuple[Box, ...]] = []
        self.class_names: dict[int, set[str | None]] = {}
        """By label."""
        self.strays: list[str] = []

    def add(self, sample: RecordSample, name: str) -> None:
        record, example = sample.record, sample.example
        if example.label is not None and example.label > MAX_LABEL:
            raise ShardFormatError(
                f"{name}: got label {example.label} in the record at offset {record.start}, "
                f"expected {MAX_LABEL} at most"
            )
        start = record.start + _PAYLOAD_OFFSET + record.payload.index(example.encoded)
        self.names.append(name)
        self.ranges.extend((start, start + len(example.encoded)))
        self.crcs.append(crc32c(example.encoded))
        self.boxes.append(example.boxes)
        self.labels.append(NO_LABEL if example.label is None else example.label)
        if example.label is not None:
            self.class_names.setdefault(example.label, set()).add(sample.class_name)


def _find_in_records(
    search: Search, folder: str, names: Sequence[str], *, takes_labels: bool
) -> Place:
    for name in names:
        search.check_archive(join(folder, name))
    archives = search.files.open_archives(folder, names)
    sieve = Sieve(join(folder, names[0] if len(names) == 1 else ""), search.suffixes)
    try:
        scans = map_archives(archives, lambda key: _scan(archives, key, sieve), names)
        found = _join(archives, scans, sieve)
        if takes_labels:
            found = _with_labels(found, scans, _find_base(search, folder))
    except BaseException:
        archives.store.close()
        raise
    has_classes = not takes_labels or found.labels is not None
    return Place(found=found, beside=(folder,), has_classes=has_classes)


def _scan(archives: Archives, key: str, sieve: Sieve) -> _Scan:
    scan = _Scan()
    where = archives.store.describe(key)
    with archives.open_file(key) as file:
        for sample in iter_record_samples(file, where, key):
            name = clean_name(_with_ending(sample), where)
            if sieve.keeps(name):
                scan.add(sample, name)
            else:
                scan.strays.append(name)
    return scan


def _with_ending(sample: RecordSample) -> str:
    """Give a name that says what the image file is, where the record does not say it."""
    stem, dot, ending = sample.name.rpartition(".")
    if ending != "img":
        return sample.name
    try:
        with Image.open(io.BytesIO(sample.example.encoded)) as image:
            return f"{stem}{dot}{(image.format or ending).lower()}"
    except (Image.UnidentifiedImageError, OSError):
        return sample.name


def _find_base(search: Search, folder: str) -> int | None:
    """Tell what the first class is called, if ``metadata.json`` beside the records says so."""
    text = join(folder, METADATA_NAME)
    if not search.files.has(text):
        return None
    splits = Metadata.from_bytes(search.files.read(text), text).splits
    told = splits.get(search.split or "") or next(iter(splits.values()), None)
    return told.label_base if told is not None and told.kind == "tfrecord" else None


def _join(archives: Archives, scans: Sequence[_Scan], sieve: Sieve) -> Found:
    names = [name for scan in scans for name in scan.names]
    archive = np.repeat(np.arange(len(scans), dtype=np.int32), [len(scan.names) for scan in scans])
    for scan in scans:
        for name in scan.strays:
            sieve.count_stray(name)
    order = sorted(range(len(names)), key=names.__getitem__)
    for first, second in pairwise(order):
        if names[first] == names[second]:
            keys = [
                archives.store.describe(archives.keys[int(archive[at])]) for at in (first, second)
            ]
            raise ShardFormatError(
                f"{keys[0]}: {names[first]!r} stands there, and again in {keys[1]}; expected each"
                " sample once"
            )
    ranges = np.concatenate([np.array(scan.ranges, np.int64) for scan in scans]).reshape(-1, 2)
    boxes = [boxes for scan in scans for boxes in scan.boxes]
    return Found(
        where=sieve.where,
        names=Index.from_keys(names, (ranges[:, 1] - ranges[:, 0]).tolist()),
        places=RangePlaces(
            store=archives.store,
            keys=archives.keys,
            archive=archive,
            ranges=ranges,
            crcs=np.concatenate([np.array(scan.crcs, np.int64) for scan in scans]),
        ),
        num_stray=sieve.num_stray,
        strays=tuple(sieve.strays),
        boxes=BoxTable.of(boxes) if any(boxes) else None,
    )


def _with_labels(found: Found, scans: Sequence[_Scan], label_base: int | None) -> Found:
    """Give the samples with the labels that stand in their records, counted from 0, if any do."""
    class_names: dict[int, set[str | None]] = {}
    for scan in scans:
        for label, names in scan.class_names.items():
            class_names.setdefault(label, set()).update(names)
    if not class_names:
        return found
    space, base, classes = find_meaning(class_names, "tfrecord", label_base=label_base)
    if min(class_names) < base:
        raise ShardFormatError(
            f"{found.where}: got label {min(class_names)}, expected {base} or more, as TensorFlow's"
            " builder counts; say otherwise which class each sample has, such as by a class map"
        )
    labels = np.concatenate([np.array(scan.labels, np.int32) for scan in scans])
    labels[labels != NO_LABEL] -= base
    if space is LabelSpace.TF_BUILDER:  # the same order, which counts from 0 here
        space = LabelSpace.SORTED_WNID
    return dataclasses.replace(
        found,
        labels=labels,
        classes=None if classes is None else tuple(classes),
        label_space=None if space is None else space.value,
    )
