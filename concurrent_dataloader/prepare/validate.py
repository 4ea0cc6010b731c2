"""Is a data set whole? What is named is compared with what is there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.errors import IndexFormatError, ShardFormatError
from concurrent_dataloader.formats.tar import check_name
from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.checksums import (
    Algorithm,
    FileFacts,
    Finding,
    compare_files,
    digest_objects,
    find_duplicates,
)
from concurrent_dataloader.prepare.deep import count_samples
from concurrent_dataloader.prepare.metadata import Metadata, ShardMetadata, checksum
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.shard_names import METADATA_NAME, find_kind, find_split
from concurrent_dataloader.stores.base import ObjectInfo, Store, WritableStore

INDEX_ENDING = "-index.npz"

IMAGENET_TREES = {
    "train": "17aed9504492852ddcc2ac247413aa95",
    "validation": "8d6a57a773cf3c3354c92155a5b1d5bd",
}
"""`metadata.checksum` of the files of ILSVRC2012's raw trees. Source: the CNN examples of
Graphcore, validate_dataset.py."""

_DISTRIBUTED = "distributed/"

OnFile = Callable[[str, int], None]
"""Told of each file that was read whole: its key and size."""


@dataclasses.dataclass
class Report:
    """What was checked, and what is wrong."""

    findings: list[Finding] = dataclasses.field(default_factory=list[Finding])
    notes: list[str] = dataclasses.field(default_factory=list[str])
    """What is worth knowing and not wrong."""

    counted: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Size of each file that was checked."""
    num_samples: int | None = None
    """None where samples were not counted."""

    @property
    def num_files(self) -> int:
        """Files that were checked."""
        return len(self.counted)

    @property
    def size_bytes(self) -> int:
        """Of the files that were checked, all together."""
        return sum(self.counted.values())

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def count(self, infos: Sequence[ObjectInfo]) -> None:
        """Count files that were checked."""
        self.counted |= {info.key: info.size_bytes for info in infos}


class ShardFiles(NamedTuple):
    """What lies in the folder of a packed data set, and what its own files say of it."""

    shards: dict[str, ObjectInfo]
    """Files directly in it that are shards by their name."""

    others: dict[str, ObjectInfo]
    """All other files, those of ``distributed/`` left out: they are made of the shards."""

    indexes: dict[str, ShardIndex]
    """By split."""

    metadata: Metadata | None
    findings: list[Finding]
    """What could not be understood."""


def list_files(store: WritableStore) -> list[ObjectInfo]:
    """List a data set, sorted by key, without markers of folders."""
    return [info for info in store.list() if not (info.key.endswith("/") and info.size_bytes == 0)]


# -- trees of single files


def validate_tree(
    store: Store,
    infos: Sequence[ObjectInfo],
    expected: Mapping[str, FileFacts],
    *,
    by: str,
    is_complete: bool,
    concurrency: int = 8,
    on_file: OnFile = lambda key, size_bytes: None,
) -> Report:
    """Compare single files with what an index or recorded checksums say of them.

    Args:
        store: Where they lie.
        infos: What lies there.
        expected: What should.
        by: What says so.
        is_complete: Whether a file that is not expected is wrong, and not only worth a note.
        concurrency: Files read at once.
        on_file: Told of each file that was read; none is where no MD5 is expected.

    Raises:
        StoreError: A file cannot be read.
    """
    report = Report()
    found = {info.key: FileFacts(info.size_bytes) for info in infos}
    if any(facts.md5 is not None for facts in expected.values()):
        found = digest_objects(store, infos, concurrency=concurrency, on_file=on_file)
    for finding in compare_files(expected, found, by=by):
        if finding.problem == "extra" and not is_complete:
            continue
        report.findings.append(finding)
    num_extra = len(found.keys() - expected.keys())
    if num_extra and not is_complete:
        report.notes.append(f"{num_extra} files that {by} does not name")
    report.count([info for info in infos if info.key in expected])
    return report


def validate_checksum(
    store: Store,
    infos: Sequence[ObjectInfo],
    expected: str,
    *,
    where: str,
    concurrency: int = 8,
    on_file: OnFile = lambda key, size_bytes: None,
) -> Report:
    """Compare all files together with one checksum, as the older system does for raw trees.

    It does not say which file is wrong; recorded checksums do.

    Raises:
        StoreError: A file cannot be read.
    """
    report = Report()
    found = digest_objects(store, infos, concurrency=concurrency, on_file=on_file)
    report.findings += _compare_checksum(found, expected, where, "")
    report.count(infos)
    return report


def expect_index(index: Index) -> dict[str, FileFacts]:
    """Say what an index tells of files: that they are there, and how large they are."""
    return {key: FileFacts(index.size_bytes(at)) for at, key in enumerate(index.keys())}


def _compare_checksum(
    found: Mapping[str, FileFacts], expected: str, where: str, advice: str
) -> list[Finding]:
    got = checksum(facts.md5 for facts in found.values() if facts.md5 is not None)
    if got == expected:
        return []
    detail = f"the checksum of all {len(found)} files is {got}, expected {expected}{advice}"
    return [Finding(where, "content", detail)]


# -- packed data


def find_shard_files(store: Store, infos: Sequence[ObjectInfo]) -> ShardFiles:
    """Sort the files of a packed data set, and read those that speak of the others."""
    shards: dict[str, ObjectInfo] = {}
    others: dict[str, ObjectInfo] = {}
    for info in infos:
        if info.key.startswith(_DISTRIBUTED):
            continue
        is_shard = "/" not in info.key and info.key[0] != "." and find_kind(info.key) is not None
        (shards if is_shard else others)[info.key] = info
    indexes: dict[str, ShardIndex] = {}
    metadata: Metadata | None = None
    findings: list[Finding] = []
    for key in others:
        try:
            if key == METADATA_NAME:
                metadata = Metadata.from_bytes(store.get(key), key)
            elif "/" not in key and key.endswith(INDEX_ENDING):
                index = ShardIndex.from_bytes(store.get(key), key)
                indexes[key.removesuffix(INDEX_ENDING)] = index
        except IndexFormatError as error:
            findings.append(Finding(key, "metadata", str(error)))
    return ShardFiles(shards, others, indexes, metadata, findings)


def is_packed(infos: Sequence[ObjectInfo]) -> bool:
    """Tell by the names of files whether a folder holds shards."""
    return any(
        "/" not in info.key
        and (
            info.key == METADATA_NAME
            or info.key.endswith(INDEX_ENDING)
            or (info.key[0] != "." and find_kind(info.key) is not None)
        )
        for info in infos
    )


def validate_shards(
    store: Store,
    files: ShardFiles,
    *,
    concurrency: int = 8,
    on_file: OnFile = lambda key, size_bytes: None,
) -> Report:
    """Compare shards with their index and metadata; without these, look at their structure.

    Shards are those that the index or the metadata names, whatever their names look like; another
    one beside them is wrong, another file is not. Of a split that neither knows, all that look like
    shards by their names are.

    Args:
        store: Where they lie.
        files: As `find_shard_files` sorted them.
        concurrency: Shards read at once.
        on_file: Told of each shard that was read.

    Raises:
        StoreError: A shard cannot be read.
    """
    report = Report(findings=list(files.findings))
    expected = _expect_shards(files, report)
    named = {key: files.others[key] for key in expected if key in files.others}
    present = files.shards | named
    found = digest_objects(
        store,
        list(present.values()),
        concurrency=concurrency,
        algorithms=_choose_algorithms(files, expected),
        on_file=on_file,
    )
    unrecorded = {key: facts for key, facts in found.items() if key not in expected}
    if expected:
        covered = _covered_splits(files)
        unrecorded = {
            key: facts
            for key, facts in unrecorded.items()
            if find_split(key) is not None and find_split(key) not in covered
        }
        recorded = {key: facts for key, facts in found.items() if key not in unrecorded}
        report.findings += compare_files(expected, recorded, by=_names_of_records(files))
    # Shards without samples, as `map` writes where all of one were dropped, are all alike.
    alike = find_duplicates(unrecorded)
    infos = [present[finding.where] for finding in alike]
    lengths = count_samples(store, infos, [], concurrency=concurrency)
    report.findings += [finding for finding in alike if lengths.get(finding.where) != 0]
    report.findings += _find_gaps(list(unrecorded))
    report.count(list(present.values()))
    bad = {finding.where for finding in report.findings}
    unsure = [
        info
        for key, info in present.items()
        if key not in bad
        and (key in unrecorded or key in expected)
        and expected.get(key, FileFacts()).content is None
    ]
    counts = count_samples(store, unsure, report.findings, concurrency=concurrency)
    num_empty = sum(count == 0 for count in counts.values())
    if num_empty:
        report.notes.append(f"{num_empty} shards hold no sample")
    _check_lengths(files, expected, counts, report)
    _check_old_checksum(store, files, found, report, concurrency)
    return report


def _choose_algorithms(files: ShardFiles, expected: Mapping[str, FileFacts]) -> Sequence[Algorithm]:
    """Choose what is computed of all shards: what is recorded, so that contents can be compared."""
    metadata = files.metadata
    has_old = metadata is not None and metadata.checksum is not None and not _shards_of(metadata)
    algorithms: list[Algorithm] = []
    if has_old or any(facts.md5 is not None for facts in expected.values()):
        algorithms.append("md5")
    if not algorithms or any(facts.crc32c is not None for facts in expected.values()):
        algorithms.append("crc32c")
    return algorithms


def _covered_splits(files: ShardFiles) -> set[str | None]:
    """Name the splits of which an index or the metadata lists the shards."""
    covered: set[str | None] = {find_split(split) or split for split in files.indexes}
    if files.metadata is not None:
        for split, known in files.metadata.splits.items():
            if known.shards is not None:
                covered.add(find_split(split) or split)
    return covered


def _names_of_records(files: ShardFiles) -> str:
    names = [f"{split}{INDEX_ENDING}" for split in files.indexes]
    if files.metadata is not None and _shards_of(files.metadata):
        names.append(METADATA_NAME)
    return " and ".join(names[:2]) if len(names) < 3 else f"{names[0]} and others"


def _shards_of(metadata: Metadata) -> dict[str, ShardMetadata]:
    return {shard.name: shard for split in metadata.splits.values() for shard in split.shards or ()}


def _expect_shards(files: ShardFiles, report: Report) -> dict[str, FileFacts]:
    expected: dict[str, FileFacts] = {}
    described = {} if files.metadata is None else _shards_of(files.metadata)
    for name, shard in described.items():
        expected[name] = FileFacts(shard.size_bytes, shard.md5, shard.crc32c)
    for split, index in files.indexes.items():
        where = f"{split}{INDEX_ENDING}"
        for shard in index.shards:
            facts = FileFacts(shard.size_bytes, shard.md5, shard.crc32c)
            known = expected.get(shard.name)
            if described and known is None and _lists(files.metadata, split):
                detail = f"names {shard.name}, which {METADATA_NAME} does not"
                report.findings.append(Finding(where, "metadata", detail))
            if known is not None and _disagree(known, facts):
                detail = f"size or checksum of {shard.name} is another one than in {METADATA_NAME}"
                report.findings.append(Finding(where, "metadata", detail))
            if known is None or known.content is None:
                expected[shard.name] = facts
        if len(index) and bool((index.extents[:, 1] > _sizes_by_sample(index)).any()):
            detail = "a sample lies behind the end of its shard"
            report.findings.append(Finding(where, "metadata", detail))
        if index.kind == "tar":
            report.findings += _find_unsafe(index)
    return expected


def _find_unsafe(index: ShardIndex) -> list[Finding]:
    """Name each shard in which a sample would be extracted to a place out of its folder."""
    findings: dict[str, Finding] = {}
    for position, name in enumerate(index.names.keys()):
        try:
            check_name(name)
        except ShardFormatError as error:
            shard = index.shard_of(position).name
            findings.setdefault(shard, Finding(shard, "content", str(error)))
    return list(findings.values())


def _lists(metadata: Metadata | None, split: str) -> bool:
    known = None if metadata is None else metadata.splits.get(split)
    return known is not None and known.shards is not None


def _disagree(one: FileFacts, other: FileFacts) -> bool:
    return one.size_bytes != other.size_bytes or any(
        None not in pair and pair[0] != pair[1]
        for pair in ((one.md5, other.md5), (one.crc32c, other.crc32c))
    )


def _sizes_by_sample(index: ShardIndex) -> NDArray[np.int64]:
    return np.array([shard.size_bytes for shard in index.shards], np.int64)[index.shard_numbers]


def _find_gaps(names: Sequence[str]) -> list[Finding]:
    """Say which numbers are left out between shards whose names differ by a number only."""
    numbers: dict[str, dict[int, re.Match[str]]] = {}
    for name in names:
        if match := re.fullmatch(r"(.*?)(\d+)(\D*)", name):
            numbers.setdefault(match[1], {})[int(match[2])] = match
    findings: list[Finding] = []
    for begin, found in numbers.items():
        first, last = min(found), max(found)
        if len(found) * 2 <= last - first:
            continue  # numbers that mean something else
        width = min(len(match[2]) for match in found.values())
        for number in sorted(set(range(first, last)) - found.keys()):
            name = f"{begin}{number:0{width}d}{found[first][3]}"
            findings.append(Finding(name, "missing", "the numbers of its neighbours leave it out"))
    return findings


def _check_lengths(
    files: ShardFiles,
    expected: Mapping[str, FileFacts],
    counts: Mapping[str, int],
    report: Report,
) -> None:
    """Compare how many samples there are with how many metadata.json says there are."""
    lengths = {split: len(index) for split, index in files.indexes.items()}
    indexed = {shard.name for index in files.indexes.values() for shard in index.shards}
    for name, count in counts.items():
        if name not in indexed:
            split = find_split(name) or ""
            lengths[split] = lengths.get(split, 0) + count
    are_all_counted = (files.shards.keys() | expected.keys()) <= indexed | counts.keys()
    if lengths and are_all_counted:
        report.num_samples = sum(lengths.values())
    splits = {} if files.metadata is None else files.metadata.splits
    for split, known in splits.items():
        short = "val" if split == "validation" else split
        length = lengths.get(split, lengths.get(short))
        if length is not None and are_all_counted and length != known.num_samples:
            detail = f"got {length} samples of split {split!r}, expected {known.num_samples}"
            report.findings.append(Finding(METADATA_NAME, "metadata", detail))
        index = files.indexes.get(split)
        if index is not None and known.shards is not None:
            per_shard = np.bincount(index.shard_numbers, minlength=len(index.shards)).tolist()
            listed = {shard.name: shard.num_samples for shard in known.shards}
            for shard, count in zip(index.shards, per_shard, strict=True):
                if listed.get(shard.name, count) != count:
                    detail = (
                        f"got {count} samples of {shard.name} in {split}{INDEX_ENDING}, "
                        f"expected {listed[shard.name]}"
                    )
                    report.findings.append(Finding(METADATA_NAME, "metadata", detail))


def _check_old_checksum(
    store: Store,
    files: ShardFiles,
    found: Mapping[str, FileFacts],
    report: Report,
    concurrency: int,
) -> None:
    """Verify the checksum in metadata.json, which is of the shards that it lists.

    In the older layout it is of all files beside it but those of ``distributed/``; our own indexes
    may have come later.
    """
    metadata = files.metadata
    if metadata is None or metadata.checksum is None:
        return
    if _shards_of(metadata):
        if metadata.find_checksum() != metadata.checksum:
            detail = f"its checksum {metadata.checksum} is not that of the shards it lists"
            report.findings.append(Finding(METADATA_NAME, "metadata", detail))
        return
    rest = [
        info
        for key, info in files.others.items()
        if key != METADATA_NAME and key not in found and not key.endswith(INDEX_ENDING)
    ]
    every = {**found, **digest_objects(store, rest, concurrency=concurrency)}
    advice = (
        "; a file was changed, removed or added, and which one is recorded nowhere: fetch or"
        " write the set anew"
    )
    report.findings += _compare_checksum(every, metadata.checksum, METADATA_NAME, advice)
