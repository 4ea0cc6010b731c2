"""Spread the shards that do not divide evenly, so that N instances train on equally many samples.

What is left when each instance has as many whole shards as every other is cut into N parts, as
`concurrent_dataloader.distribution` says. Bytes of samples are copied as they are; the shards
themselves, their index and ``metadata.json`` stay as they were, and so do their checksums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from concurrent_dataloader.distribution import (
    Manifest,
    Part,
    SourceShard,
    count_remainder,
    describe_shards,
    find_mismatch,
    folder_of,
    manifest_name,
    part_names,
    read_manifest,
    share,
)
from concurrent_dataloader.prepare.extents import Copies, add_copies
from concurrent_dataloader.prepare.shard_set import (
    OpenRoot,
    ShardSet,
    check_safe,
    has_md5s,
    index_name,
    open_shard_set,
    places_of,
    write_object,
)
from concurrent_dataloader.shard_index import Shard, ShardIndexBuilder
from concurrent_dataloader.stores import open_writable_store


def distribute(
    location: str,
    num_instances: int,
    split: str = "train",
    *,
    open_root: OpenRoot = open_writable_store,
    on_part: Callable[[Part], None] = lambda part: None,
) -> Manifest:
    """Write the parts for a number of instances, unless they are there and belong to the shards.

    Parts for other numbers of instances stay. The manifest of parts that are out of date goes
    first, so that an interrupted run leaves none that look whole.

    Args:
        location: Folder of the shards, or ``s3://bucket/prefix``.
        num_instances: From 2 on.
        split: Such as ``"train"``.
        open_root: Opens the store at the location.
        on_part: Told of each part that was written; not called if all were there.

    Raises:
        ValueError: ``num_instances`` is less than 2.
        FileNotFoundError: There are no such shards.
        ShardFormatError: A shard is damaged, its index is another set's, or a key is unsafe.
        StoreError: The store cannot be read or written.
    """
    check_instances(num_instances)
    shard_set = open_shard_set(location, split, open_root)
    with contextlib.closing(shard_set.store):
        shards = describe_shards(shard_set.index)
        found = read_manifest(shard_set.store, split, num_instances)
        if found is not None and find_mismatch(found, shards, shard_set.store) is None:
            return found
        check_safe(shard_set)
        shard_set.store.delete(manifest_name(split, num_instances))
        return _write_parts(shard_set, num_instances, shards, on_part)


def _write_parts(
    shard_set: ShardSet,
    num_instances: int,
    shards: tuple[SourceShard, ...],
    on_part: Callable[[Part], None],
) -> Manifest:
    index, store = shard_set.index, shard_set.store
    num_remainder = count_remainder(len(shards), num_instances)
    first = sum(shard.num_samples for shard in shards[: len(shards) - num_remainder])
    builder = ShardIndexBuilder("tar")
    parts: list[Part] = []
    counts = share(len(index) - first, num_instances)
    names = part_names(shard_set.split, num_instances)
    for name, count in zip(names, counts, strict=True):
        positions = range(first, first + count)
        first += count
        copies = Copies(index, positions)
        with contextlib.closing(copies.read(places_of(shard_set))) as pieces:
            written = write_object(shard_set.location, name, store, pieces, md5=has_md5s(index))
        add_copies(builder, index, positions, copies.extents, copies.payloads, copies.crcs)
        size_bytes, md5 = written
        builder.add_shard(Shard(name.rpartition("/")[2], size_bytes, md5, copies.crc32c))
        part = Part(
            name=name, num_samples=count, size_bytes=size_bytes, md5=md5, crc32c=copies.crc32c
        )
        parts.append(part)
        on_part(part)
    manifest = Manifest(
        split=shard_set.split,
        num_instances=num_instances,
        shards=shards,
        num_remainder=num_remainder,
        parts=tuple(parts),
    )
    parts_index = builder.build(index.classes, index.label_space)
    store.put(f"{folder_of(num_instances)}/{index_name(shard_set.split)}", parts_index.to_bytes())
    store.put(manifest_name(shard_set.split, num_instances), manifest.to_bytes())
    return manifest


def check_distribution(
    location: str,
    num_instances: int,
    split: str = "train",
    *,
    open_root: OpenRoot = open_writable_store,
) -> str | None:
    """Say what is wrong with the parts for a number of instances; None if nothing is.

    Raises:
        As `distribute`.
    """
    check_instances(num_instances)
    shard_set = open_shard_set(location, split, open_root)
    with contextlib.closing(shard_set.store):
        manifest = read_manifest(shard_set.store, split, num_instances)
        if manifest is None:
            return "not distributed"
        return find_mismatch(manifest, describe_shards(shard_set.index), shard_set.store)


def check_instances(num_instances: int) -> None:
    """Raise unless there are instances to share shards between.

    Raises:
        ValueError: There is one, or none.
    """
    if num_instances < 2:
        raise ValueError(f"num_instances: got {num_instances}, expected 2 or more")
