"""A set of tar shards, in a folder or a bucket, as a whole: found, read by extents, written anew.

What `distribute`, `reshard` and `map` share. Which samples there are is what the index of byte
ranges beside the shards says, or, where there is none, what lies in them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.errors import KeyNotFoundError, LoaderError, ShardFormatError
from concurrent_dataloader.files import write_whole
from concurrent_dataloader.formats.fields import LABEL_FIELD, find_field, find_payload_field
from concurrent_dataloader.formats.tar import BLOCK_BYTES, SampleMembers, check_name, split_name
from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.index import is_folder
from concurrent_dataloader.prepare.metadata import Metadata, SplitMetadata
from concurrent_dataloader.prepare.parallel import call_concurrently
from concurrent_dataloader.prepare.plan import find_duplicate
from concurrent_dataloader.prepare.scan import iter_tar_samples
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import (
    SampleCrcs,
    Shard,
    ShardIndex,
    ShardIndexBuilder,
)
from concurrent_dataloader.shard_names import METADATA_NAME, UNFINISHED, check_finished
from concurrent_dataloader.stores import RangedFile, Store, WritableStore, open_writable_store

OpenRoot = Callable[[str], WritableStore]
"""Opens the store at a folder, or at ``s3://bucket/prefix``."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
        shards = [
            Shard(shard.name, shard.size_bytes, shard.md5, shard.crc32c) for shard in known.shards
        ]
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
    crcs: SampleCrcs | None = None


def find_samples(store: Store, shard: Shard) -> Iterator[FoundSample]:
    """Yield the samples of a shard in order; only headers and labels are looked at.

    Raises:
        ShardFormatError: The shard is damaged.
    """
    where = store.describe(shard.name)
    with io.BufferedReader(RangedFile(store, shard.name, shard.size_bytes), _SCAN_BYTES) as file:
        for sample, small in iter_tar_samples(cast(BinaryIO, file), where):
            field = find_field(LABEL_FIELD, small)
            label = None if field is None else parse_label(small[field])
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

Place = tuple[Store, str]
"""Where a shard lies: the store, and the key in it."""


def places_of(shard_set: ShardSet) -> list[Place]:
    """Give the place of each shard of a set, in the order of its index."""
    return [(shard_set.store, shard.name) for shard in shard_set.index.shards]


# -- writing


class Written(NamedTuple):
    """An object that was written."""

    size_bytes: int
    md5: str | None
    """In hex; None unless it was asked for."""


def write_object(
    location: str, name: str, store: WritableStore, pieces: Iterable[Buffer], *, md5: bool = False
) -> Written:
    """Write an object piece by piece, so that it is there whole or not at all.

    Args:
        location: Where ``store`` was opened.
        name: Its key below the location.
        store: Takes it.
        pieces: Content, in order; for a bucket it waits in a temporary file.
        md5: Whether to compute its MD5.

    Raises:
        OSError: It cannot be written.
        StoreError: The store does not take it.
        Exception: What ``pieces`` raised.
    """
    digest = hashlib.md5(usedforsecurity=False) if md5 else None
    size_bytes = 0
    unread: list[LoaderError] = []

    def counted() -> Iterator[Buffer]:
        nonlocal size_bytes
        try:
            for piece in pieces:
                if digest is not None:
                    digest.update(piece)
                size_bytes += memoryview(piece).nbytes
                yield piece
        except LoaderError as error:  # some are OSErrors too, as those of writing are
            unread.append(error)
            raise

    is_file = is_folder(location)
    where = store.describe(name) if is_file else tempfile.gettempdir()
    try:
        if is_file:
            write_whole(Path(where), counted())
        else:
            with tempfile.TemporaryFile() as file:
                file.writelines(counted())
                file.flush()
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as body:
                    store.put(name, body)
    except OSError as error:
        if unread:
            raise unread[0] from None
        if error.errno is None or error.errno not in _FULL:
            raise
        advice = "it was not written, make room and run the command again"
        raise OSError(error.errno, f"{os.strerror(error.errno)}; {advice}", where) from error
    return Written(size_bytes, None if digest is None else digest.hexdigest())


# -- keys


def check_safe(shard_set: ShardSet) -> None:
    """Raise if a sample would be extracted to a place out of its folder, before it is copied.

    Raises:
        ShardFormatError: One would; names the shard, and the key.
    """
    for position, name in enumerate(shard_set.index.names.keys()):
        try:
            check_name(name)
        except ShardFormatError as error:
            where = shard_set.store.describe(shard_set.index.shard_of(position).name)
            raise ShardFormatError(
                f"{where}: {error}; unpack it with a tar that takes names below a folder only, and"
                " pack it anew"
            ) from error


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


# -- what is known of shards


def has_md5s(index: ShardIndex) -> bool:
    """Tell whether the MD5s of all shards are known, so that those made of them have some too."""
    return bool(index.shards) and all(shard.md5 is not None for shard in index.shards)


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
