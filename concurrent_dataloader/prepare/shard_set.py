"""A set of tar shards, in a folder or a bucket, as a whole: found, read by extents, written anew.

What `distribute`, `reshard` and `map` share. Which samples there are is what the index of byte
ranges beside the shards says, or, where there is none, what lies in them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import io
import mmap
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.errors import KeyNotFoundError, ShardFormatError
from concurrent_dataloader.files import write_whole
from concurrent_dataloader.formats.fields import LABEL_FIELD, find_payload_field
from concurrent_dataloader.formats.tar import (
    BLOCK_BYTES,
    END_OF_ARCHIVE,
    SampleMembers,
    split_name,
)
from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.index import is_folder
from concurrent_dataloader.prepare.metadata import METADATA_NAME, Metadata, SplitMetadata
from concurrent_dataloader.prepare.parallel import call_concurrently
from concurrent_dataloader.prepare.plan import find_duplicate
from concurrent_dataloader.prepare.scan import iter_tar_samples
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import NO_LABEL, Shard, ShardIndex, ShardIndexBuilder
from concurrent_dataloader.shard_names import UNFINISHED, check_finished
from concurrent_dataloader.stores import RangedFile, Store, WritableStore, open_writable_store
from concurrent_dataloader.threads import DaemonThreads

OpenRoot = Callable[[str], WritableStore]
"""Opens the store at a folder, or at ``s3://bucket/prefix``."""

READ_BYTES = 2 << 20
"""Samples that lie side by side are read in pieces of this size, or of one sample."""

_AHEAD_BYTES = 64 << 20
_AHEAD_READS = 64
_SCAN_BYTES = 1 << 20
_SCAN_THREADS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class ShardSet:
    """The shards of one split."""

    location: str
    """Folder or URL that holds them."""

    split: str
    store: WritableStore
    """Opened at the location; whoever opened the set closes it."""

    index: ShardIndex
    metadata: Metadata | None
    """Of all splits there; None if it is missing."""

    @property
    def split_metadata(self) -> SplitMetadata:
        """What the metadata says of the split, or what can be said without it."""
        known = None if self.metadata is None else self.metadata.splits.get(self.split)
        return SplitMetadata(num_samples=len(self.index)) if known is None else known


def index_name(split: str) -> str:
    """Give the name of the index of a split."""
    return f"{split}-index.npz"


# -- finding


def find_splits(store: WritableStore) -> list[str]:
    """Tell which splits have shards, or an index of them, directly below the store's root."""
    found: set[str] = set()
    for info in store.list():
        if match := re.fullmatch(r"([^/]+)-index\.npz|([^/]+?)-?\d+\.tar", info.key):
            found.add(match[1] or match[2])
    return sorted(found)


def open_shard_set(
    location: str, split: str, open_root: OpenRoot = open_writable_store
) -> ShardSet:
    """Find the shards of a split and the samples in them.

    The index beside the shards says so. Without one, the shards are read that ``metadata.json``
    names, or, if it names none, those called ``<split>-<number>.tar``. What else lies there does
    not matter.

    Args:
        location: Folder, or ``s3://bucket/prefix``.
        split: Such as ``"train"``.
        open_root: Opens the store at the location.

    Raises:
        FileNotFoundError: No such shards.
        ShardFormatError: A shard is damaged, or is not the one that the index speaks of.
        StoreError: The store cannot be read.
    """
    store = open_root(location)
    try:
        check_finished((info.key for info in store.list(UNFINISHED)), location)
        metadata = read_metadata(store)
        index = _find_index(store, split, location, metadata)
        return ShardSet(location, split, store, index, metadata)
    except BaseException:
        store.close()
        raise


def read_metadata(store: Store) -> Metadata | None:
    """Read the metadata at a store's root; None if there is none."""
    try:
        raw = store.get(METADATA_NAME)
    except KeyNotFoundError:
        return None
    return Metadata.from_bytes(raw, store.describe(METADATA_NAME))


def _find_index(
    store: WritableStore, split: str, location: str, metadata: Metadata | None
) -> ShardIndex:
    name = index_name(split)
    try:
        raw = store.get(name)
    except KeyNotFoundError:
        return _scan(store, split, location, metadata)
    index = ShardIndex.from_bytes(raw, store.describe(name))
    if index.kind != "tar":
        raise ValueError(
            f"{store.describe(name)}: got shards of kind {index.kind!r}, expected tar; re-pack them"
            " with `concurrent-dataloader shard`"
        )
    _check_sizes(store, index.shards, name)
    return index


def _scan(store: WritableStore, split: str, location: str, metadata: Metadata | None) -> ShardIndex:
    known = None if metadata is None else metadata.splits.get(split)
    if known is not None and known.kind != "tar":
        raise ValueError(
            f"{location}: split {split!r} has shards of kind {known.kind!r}, expected tar; re-pack"
            " them with `concurrent-dataloader shard`"
        )
    if known is not None and known.shards is not None:
        shards = [Shard(shard.name, shard.size_bytes, shard.md5) for shard in known.shards]
        _check_sizes(store, shards, METADATA_NAME)
    else:
        shards = _list_shards(store, split, location)
    scans = call_concurrently(
        lambda shard: (shard.name, list(find_samples(store, shard))), shards, _SCAN_THREADS
    )
    with contextlib.closing(scans):
        samples = dict(scans)
    builder = ShardIndexBuilder("tar")
    for shard in shards:
        for sample in samples.pop(shard.name):
            builder.add_sample(*sample)
        builder.add_shard(shard)
    return builder.build() if known is None else builder.build(known.classes, known.label_space)


def _list_shards(store: WritableStore, split: str, location: str) -> list[Shard]:
    pattern = re.compile(rf"{re.escape(split)}-?(\d+)\.tar")
    found = [
        (int(match[1]), info)
        for info in store.list(split)
        if (match := pattern.fullmatch(info.key))
    ]
    if not found:
        raise KeyNotFoundError(
            f"{location}: no shard of split {split!r}, expected {index_name(split)} or"
            f" {split}-000000.tar; splits with shards are {find_splits(store)}"
        )
    return [Shard(info.key, info.size_bytes) for _, info in sorted(found)]


def _check_sizes(store: WritableStore, shards: Sequence[Shard], by: str) -> None:
    begin = os.path.commonprefix([shard.name for shard in shards])  # noqa: RUF071 - keys, no paths
    sizes = existing_sizes(store, begin)
    for shard in shards:
        if sizes.get(shard.name) != shard.size_bytes:
            got = f"{sizes[shard.name]} bytes" if shard.name in sizes else "no such shard"
            raise ShardFormatError(
                f"{store.describe(shard.name)}: got {got}, expected {shard.size_bytes} bytes by"
                f" {by}; the shard was cut, or {by} is another set's: fetch it anew, or remove {by}"
            )


class FoundSample(NamedTuple):
    """What an index says of a sample."""

    name: str
    extent: ByteRange
    payload: ByteRange
    label: int | None


def find_samples(store: Store, shard: Shard) -> Iterator[FoundSample]:
    """Yield the samples of a shard in order; only headers and labels are looked at.

    Raises:
        ShardFormatError: The shard is damaged.
    """
    where = store.describe(shard.name)
    with io.BufferedReader(RangedFile(store, shard.name, shard.size_bytes), _SCAN_BYTES) as file:
        for sample, small in iter_tar_samples(cast(BinaryIO, file), where):
            label = parse_label(small[LABEL_FIELD]) if LABEL_FIELD in small else None
            yield describe_sample(sample, label)


def describe_sample(sample: SampleMembers, label: int | None) -> FoundSample:
    """Say of a sample what its index is to say."""
    fields = list(sample.members)
    field = find_payload_field(fields) or fields[0]
    return FoundSample(f"{sample.key}.{field}", sample.extent, sample.members[field].data, label)


def parse_label(content: Buffer) -> int | None:
    """Read the field ``cls``; None if it is no number from 0 on."""
    text = bytes(content).strip()
    return int(text) if text.isdigit() and len(text) < 10 else None


# -- reading


Positions = Sequence[int] | NDArray[np.int64]

Place = tuple[Store, str]
"""Where a shard lies: the store, and the key in it."""


def places_of(shard_set: ShardSet) -> list[Place]:
    """Give the place of each shard of a set, in the order of its index."""
    return [(shard_set.store, shard.name) for shard in shard_set.index.shards]


def read_extents(
    index: ShardIndex, positions: Positions, places: Sequence[Place]
) -> Generator[Buffer]:
    """Read samples as they lie in their shards, headers and all, one after the other.

    Those that lie side by side are read together; several reads are under way at once. What is held
    in memory does not depend on the number of samples.

    Args:
        index: Says where they lie.
        positions: Which, in which order.
        places: Of the index's shards.

    Yields:
        Pieces that are whole samples. Close it, or read it to its end.

    Raises:
        ShardFormatError: What lies there is no sample.
        StoreError: It cannot be read.
    """

    def read(shard: int, extent: ByteRange) -> Buffer:
        store, name = places[shard]
        piece = store.get(name, extent)
        try:
            tarfile.TarInfo.frombuf(bytes(memoryview(piece)[:BLOCK_BYTES]), "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise ShardFormatError(
                f"{store.describe(name)} [{extent.start}, {extent.stop}): no header of a sample"
                f" ({error}), expected one by the index, which is another set's: write it anew"
            ) from error
        return piece

    return _read_in_order(read, plan_reads(index, positions))


def plan_reads(index: ShardIndex, positions: Positions) -> Iterator[tuple[int, ByteRange]]:
    """Join the extents of samples that follow each other in their shard; pure.

    Yields:
        The shard's number, and a range in it.
    """
    numbers, extents = index.shard_numbers, index.extents
    shard, start, stop = -1, 0, 0
    for position in positions:
        number, (begin, end) = int(numbers[position]), extents[position].tolist()
        if number == shard and begin == stop and end - start <= READ_BYTES:
            stop = end
            continue
        if stop > start:
            yield shard, ByteRange(start, stop)
        shard, start, stop = number, begin, end
    if stop > start:
        yield shard, ByteRange(start, stop)


def _read_in_order(
    read: Callable[[int, ByteRange], Buffer], planned: Iterable[tuple[int, ByteRange]]
) -> Generator[Buffer]:
    threads = DaemonThreads(_AHEAD_READS, "read-ahead")
    waiting: collections.deque[tuple[Future[Buffer], int]] = collections.deque()
    ahead_bytes = 0

    def fulfil(future: Future[Buffer], shard: int, extent: ByteRange) -> None:
        try:
            future.set_result(read(shard, extent))
        except BaseException as error:  # noqa: BLE001 - goes to whoever waits for the piece
            future.set_exception(error)

    try:
        for shard, extent in planned:
            size = extent.stop - extent.start
            while waiting and (ahead_bytes + size > _AHEAD_BYTES or len(waiting) >= _AHEAD_READS):
                first, first_size = waiting.popleft()
                yield first.result()
                ahead_bytes -= first_size
            future: Future[Buffer] = Future()
            threads.submit(fulfil, future, shard, extent)
            waiting.append((future, size))
            ahead_bytes += size
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        threads.stop()


class Copies(NamedTuple):
    """Where samples lie in a shard into which they were copied one after the other."""

    extents: NDArray[np.int64]
    """Start and stop of each sample, (n, 2)."""

    payloads: NDArray[np.int64]
    """Start and stop of each sample's payload, (n, 2)."""

    size_bytes: int
    """Of the shard, its end included."""


def place_copies(index: ShardIndex, positions: Positions) -> Copies:
    """Tell where copies of samples will lie."""
    old = index.extents[np.asarray(positions, np.int64)]
    stops = np.cumsum(old[:, 1] - old[:, 0])
    starts = stops - (old[:, 1] - old[:, 0])
    payloads = np.array([index.payload(int(position)) for position in positions], np.int64)
    return Copies(
        np.stack([starts, stops], axis=1),
        payloads.reshape(-1, 2) + (starts - old[:, 0])[:, None],
        (int(stops[-1]) if len(stops) else 0) + len(END_OF_ARCHIVE),
    )


def add_copies(
    builder: ShardIndexBuilder,
    index: ShardIndex,
    positions: Positions,
    extents: NDArray[np.int64],
    payloads: NDArray[np.int64],
) -> None:
    """Add samples to the index of the shard that they were copied to."""
    labels = index.labels
    places = zip(positions, extents.tolist(), payloads.tolist(), strict=True)
    for position, extent, payload in places:
        label = NO_LABEL if labels is None else int(labels[position])
        builder.add_sample(
            index.names.key(int(position)),
            ByteRange(*extent),
            ByteRange(*payload),
            None if label == NO_LABEL else label,
        )


# -- writing


class Written(NamedTuple):
    """An object that was written."""

    size_bytes: int
    md5: str


def write_object(
    location: str, name: str, store: WritableStore, pieces: Iterable[Buffer]
) -> Written:
    """Write an object piece by piece, so that it is there whole or not at all.

    Args:
        location: Where ``store`` was opened.
        name: Its key below the location.
        store: Takes it.
        pieces: Content, in order; for a bucket it waits in a temporary file.

    Raises:
        OSError: It cannot be written.
        StoreError: The store does not take it.
    """
    md5 = hashlib.md5(usedforsecurity=False)
    size_bytes = 0

    def counted() -> Iterator[Buffer]:
        nonlocal size_bytes
        for piece in pieces:
            md5.update(piece)
            size_bytes += memoryview(piece).nbytes
            yield piece

    if is_folder(location):
        write_whole(Path(store.describe(name)), counted())
        return Written(size_bytes, md5.hexdigest())
    with tempfile.TemporaryFile() as file:
        file.writelines(counted())
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as body:
            store.put(name, body)
    return Written(size_bytes, md5.hexdigest())


def digest_object(store: Store, name: str, size_bytes: int) -> str:
    """Give the MD5 of an object, in hex, read piece by piece."""
    md5 = hashlib.md5(usedforsecurity=False)
    for start in range(0, size_bytes, READ_BYTES):
        md5.update(store.get(name, ByteRange(start, min(start + READ_BYTES, size_bytes))))
    return md5.hexdigest()


# -- keys


def check_keys(names: Index, where: Callable[[int], str]) -> NDArray[np.uint64]:
    """Raise if a key stands twice. Eight bytes a key are held, not the keys.

    Args:
        names: ``<key>.<field>`` of each sample.
        where: Says for a position where its sample lies.

    Returns:
        As `hash_keys`.

    Raises:
        ShardFormatError: One does.
    """
    hashes = hash_keys(names)
    twice = find_duplicate(hashes)
    if twice is not None:
        first, second = twice
        raise ShardFormatError(
            f"{where(second)}: key {key_of(names.key(second))!r} stands in {where(first)} already,"
            " expected each once; leave one of the two out, or give them other keys with"
            " `concurrent-dataloader map`"
        )
    return hashes


def hash_keys(names: Index) -> NDArray[np.uint64]:
    """Give 8 bytes that stand for the key of each sample."""
    return np.fromiter((_hash_key(name) for name in names.keys()), np.uint64)  # noqa: SIM118 - no dict


def key_of(name: str) -> str:
    """Give the key of ``<key>.<field>``."""
    parts = split_name(name)
    return name if parts is None else parts[0]


def _hash_key(name: str) -> int:
    digest = hashlib.blake2b(
        key_of(name).encode("utf-8", "surrogatepass"), digest_size=8, usedforsecurity=False
    )
    return int.from_bytes(digest.digest(), "big")


# -- counting


def count_per_shard(index: ShardIndex) -> NDArray[np.int64]:
    """Tell how many samples lie in each shard, (number of shards,) int64."""
    return np.bincount(index.shard_numbers, minlength=len(index.shards)).astype(np.int64)


def padded_bytes(size_bytes: int) -> int:
    """Tell how much of a tar a member of this size takes, its header included."""
    return BLOCK_BYTES + size_bytes + -size_bytes % BLOCK_BYTES


def extents_bytes(index: ShardIndex) -> NDArray[np.int64]:
    """Tell how much of a tar each sample takes, headers and padding included, (N,) int64."""
    return index.extents[:, 1] - index.extents[:, 0]


def existing_sizes(store: WritableStore, prefix: str) -> Mapping[str, int]:
    """Give the sizes of the objects whose key begins so; none where there is no such folder yet."""
    try:
        return {info.key: info.size_bytes for info in store.list(prefix)}
    except KeyNotFoundError:
        return {}
