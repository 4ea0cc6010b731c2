"""Spread the shards that do not divide evenly, so that N instances train on equally many samples.

Each instance reads as many whole shards as every other. What is left, the remainder, is cut into N
parts whose sizes differ by at most a sample:

```text
train-000000.tar ... train-000009.tar          10 shards, 4 instances: 8 are read whole, 2 each
distributed/4-instances/train-000000.tar ...   the samples of the last 2, in order, in 4 parts
distributed/4-instances/train-index.npz        byte ranges of the parts
distributed/4-instances/train-manifest.json    which shards they were made of; written last
```

The remainder is the last ``S mod N`` of S shards, or the last N where that is 0, since the last
shard may hold fewer samples than the others. Bytes of samples are copied as they are; the shards
themselves, their index and ``metadata.json`` stay as they were, and so do their checksums.

Source: the rule and the names are those of Graphcore's CNN data sets, whose readers find the parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
from typing_extensions import Buffer

from concurrent_dataloader.errors import IndexFormatError, KeyNotFoundError, ShardFormatError
from concurrent_dataloader.prepare.extents import Copies, add_copies
from concurrent_dataloader.prepare.metadata import ShardMetadata
from concurrent_dataloader.prepare.shard_set import (
    OpenRoot,
    ShardSet,
    check_safe,
    count_per_shard,
    existing_sizes,
    has_md5s,
    index_name,
    open_shard_set,
    places_of,
    write_object,
)
from concurrent_dataloader.shard_index import Shard, ShardIndex, ShardIndexBuilder
from concurrent_dataloader.stores import WritableStore, open_writable_store

_VERSION = 1


class SourceShard(NamedTuple):
    """A shard as it was when parts were made."""

    name: str
    num_samples: int
    size_bytes: int
    layout: str
    """Stands for the keys in it and where they lie, in hex."""

    md5: str | None
    """Of the whole file; None where it was not known."""

    crc32c: str | None = None
    """Of the whole file; None where it was not known."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Which parts there are for N instances, and what they were made of."""

    split: str
    num_instances: int
    shards: tuple[SourceShard, ...]
    """Of the whole split, in order."""

    num_remainder: int
    """So many shards at the end were cut into parts."""

    parts: tuple[ShardMetadata, ...]
    """One for each instance; names relative to the folder of the whole shards."""

    def to_bytes(self) -> bytes:
        """Give the content of the file."""
        content = {
            "version": _VERSION,
            "split": self.split,
            "num_instances": self.num_instances,
            "num_remainder": self.num_remainder,
            "shards": [shard._asdict() for shard in self.shards],
            "parts": [dataclasses.asdict(part) for part in self.parts],
        }
        return orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def from_bytes(cls, raw: Buffer, where: str) -> Manifest:
        """Read the content of a file.

        Raises:
            IndexFormatError: It is no manifest, or of a later version.
        """
        try:
            content: Any = orjson.loads(bytes(raw))
            if content["version"] != _VERSION:
                raise ValueError(f"got version {content['version']!r}, expected {_VERSION}")
            return cls(
                split=content["split"],
                num_instances=content["num_instances"],
                num_remainder=content["num_remainder"],
                shards=tuple(SourceShard(**shard) for shard in content["shards"]),
                parts=tuple(ShardMetadata(**part) for part in content["parts"]),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise IndexFormatError(
                f"{where}: no manifest of distributed shards ({error}); write it anew with"
                " `concurrent-dataloader distribute`"
            ) from error


class InstanceShard(NamedTuple):
    """What an instance reads of a shard."""

    name: str
    """Relative to the folder of the shards."""

    num_samples: int
    """So many, from its begin."""


class InstanceShards(NamedTuple):
    """What an instance reads in an epoch."""

    shards: tuple[InstanceShard, ...]
    """Whole shards, and then its part of the remainder."""

    num_skipped: int
    """Samples of the set that no instance reads, since they were not distributed."""

    @property
    def names(self) -> list[str]:
        """Names of the shards, relative to their folder."""
        return [shard.name for shard in self.shards]

    @property
    def num_samples(self) -> int:
        """How many samples the instance delivers."""
        return sum(shard.num_samples for shard in self.shards)


def part_names(split: str, num_instances: int) -> list[str]:
    """Give the names of the parts, relative to the folder of the whole shards."""
    folder = _folder(num_instances)
    return [f"{folder}/{split}-{instance:06d}.tar" for instance in range(num_instances)]


def count_remainder(num_shards: int, num_instances: int) -> int:
    """Tell how many shards at the end are cut into parts."""
    return num_shards % num_instances or num_instances


def share(num_samples: int, num_instances: int) -> list[int]:
    """Tell how many samples each part holds: equally many, the first ones one more."""
    each, more = divmod(num_samples, num_instances)
    return [each + (instance < more) for instance in range(num_instances)]


# -- writing


def distribute(
    location: str,
    num_instances: int,
    split: str = "train",
    *,
    open_root: OpenRoot = open_writable_store,
    on_part: Callable[[ShardMetadata], None] = lambda part: None,
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
        shard_set.store.delete(_manifest_name(split, num_instances))
        return _write_parts(shard_set, num_instances, shards, on_part)


def _write_parts(
    shard_set: ShardSet,
    num_instances: int,
    shards: tuple[SourceShard, ...],
    on_part: Callable[[ShardMetadata], None],
) -> Manifest:
    index, store = shard_set.index, shard_set.store
    num_remainder = count_remainder(len(shards), num_instances)
    first = sum(shard.num_samples for shard in shards[: len(shards) - num_remainder])
    builder = ShardIndexBuilder("tar")
    parts: list[ShardMetadata] = []
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
        part = ShardMetadata(
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
    store.put(f"{_folder(num_instances)}/{index_name(shard_set.split)}", parts_index.to_bytes())
    store.put(_manifest_name(shard_set.split, num_instances), manifest.to_bytes())
    return manifest


# -- what is there


def describe_shards(index: ShardIndex) -> tuple[SourceShard, ...]:
    """Say of each shard what tells it from another one of the same name."""
    counts = count_per_shard(index).tolist()
    names = index.names.keys()
    described: list[SourceShard] = []
    first = 0
    for shard, count in zip(index.shards, counts, strict=True):
        digest = hashlib.blake2b(
            index.extents[first : first + count].astype("<i8").tobytes(),
            digest_size=16,
            usedforsecurity=False,
        )
        for _ in range(count):
            digest.update(next(names).encode("utf-8", "surrogatepass") + b"\0")
        first += count
        described.append(
            SourceShard(
                shard.name, count, shard.size_bytes, digest.hexdigest(), shard.md5, shard.crc32c
            )
        )
    return tuple(described)


def read_manifest(store: WritableStore, split: str, num_instances: int) -> Manifest | None:
    """Read the manifest for a number of instances; None if there is none.

    Raises:
        IndexFormatError: It is none.
    """
    name = _manifest_name(split, num_instances)
    try:
        raw = store.get(name)
    except KeyNotFoundError:
        return None
    return Manifest.from_bytes(raw, store.describe(name))


def find_mismatch(
    manifest: Manifest, shards: Sequence[SourceShard], store: WritableStore
) -> str | None:
    """Say why parts do not belong to the shards that are there now; None if they do.

    Args:
        manifest: Of the parts.
        shards: As `describe_shards` describes the shards now.
        store: Holds the parts.
    """
    if len(manifest.shards) != len(shards):
        return f"made of {len(manifest.shards)} shards, there are {len(shards)} now"
    for then, now in zip(manifest.shards, shards, strict=True):
        if then.name != now.name:
            return f"made of {then.name}, where {now.name} is now"
        if then[1:4] != now[1:4] or any(
            one and other and one != other
            for one, other in ((then.md5, now.md5), (then.crc32c, now.crc32c))
        ):
            return (
                f"made of another {then.name} ({then.num_samples} samples in {then.size_bytes}"
                f" bytes, now {now.num_samples} in {now.size_bytes})"
            )
    sizes = existing_sizes(store, f"{_folder(manifest.num_instances)}/{manifest.split}-")
    for part in manifest.parts:
        if sizes.get(part.name) != part.size_bytes:
            return f"{part.name} has {sizes.get(part.name, 0)} bytes, expected {part.size_bytes}"
    return None


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


def shards_of_instance(
    location: str,
    instance: int,
    num_instances: int,
    split: str = "train",
    *,
    percentage: float = 100.0,
    seed: int | None = None,
    epoch: int = 0,
    open_root: OpenRoot = open_writable_store,
) -> InstanceShards:
    """Tell what one of N instances reads: whole shards, and its part of the remainder.

    All instances together read each sample once. Where the parts were not made, the remainder is
    left out, with a warning.

    Args:
        location: Folder of the shards, or ``s3://bucket/prefix``.
        instance: From 0 on.
        num_instances: How many there are.
        split: Such as ``"train"``.
        percentage: How much of each shard is read, from its begin, rounded up to samples; the same
            samples in each epoch, whoever reads them.
        seed: Whole shards change hands by seed and epoch; None: each instance keeps its own.
        epoch: Only counts with a seed.
        open_root: Opens the store at the location.

    Raises:
        ValueError: An argument is out of range.
        FileNotFoundError: There are no such shards.
        ShardFormatError: The parts were made of other shards.
    """
    _check_share(instance, num_instances, percentage)
    shard_set = open_shard_set(location, split, open_root)
    with contextlib.closing(shard_set.store):
        shards = describe_shards(shard_set.index)
        manifest = read_manifest(shard_set.store, split, num_instances)
        if manifest is not None:
            mismatch = find_mismatch(manifest, shards, shard_set.store)
            if mismatch is not None:
                raise ShardFormatError(
                    f"{shard_set.store.describe(_folder(num_instances))}: out of date, {mismatch};"
                    f" run `concurrent-dataloader distribute {location} -n {num_instances}`"
                )
    num_left = len(shards) % num_instances if manifest is None else manifest.num_remainder
    num_whole = len(shards) - num_left
    num_each = num_whole // num_instances
    order = np.arange(num_whole)
    if seed is not None:
        order = np.random.RandomState([seed, epoch]).permutation(num_whole)
    own = [shards[at] for at in order[instance * num_each : (instance + 1) * num_each].tolist()]
    chosen = [InstanceShard(shard.name, shard.num_samples) for shard in own]
    num_skipped = 0
    if manifest is not None:
        part = manifest.parts[instance]
        chosen.append(InstanceShard(part.name, part.num_samples))
    elif num_left:
        num_skipped = sum(shard.num_samples for shard in shards[num_whole:])
        warnings.warn(
            f"{location}: {num_skipped} samples of the last {num_left} of {len(shards)} shards are"
            f" skipped by all {num_instances} instances; run `concurrent-dataloader distribute"
            f" {location} -n {num_instances}`",
            UserWarning,
            stacklevel=2,
        )
    read = (
        InstanceShard(shard.name, math.ceil(shard.num_samples * percentage / 100))
        for shard in chosen
    )
    return InstanceShards(tuple(read), num_skipped)


def check_instances(num_instances: int) -> None:
    """Raise unless there are instances to share shards between.

    Raises:
        ValueError: There is one, or none.
    """
    if num_instances < 2:
        raise ValueError(f"num_instances: got {num_instances}, expected 2 or more")


def _check_share(instance: int, num_instances: int, percentage: float) -> None:
    if num_instances < 1:
        raise ValueError(f"num_instances: got {num_instances}, expected 1 or more")
    if not 0 <= instance < num_instances:
        raise ValueError(f"instance: got {instance}, expected 0 to {num_instances - 1}")
    if not 0 < percentage <= 100:
        raise ValueError(f"percentage: got {percentage}, expected more than 0, and at most 100")


def _folder(num_instances: int) -> str:
    return f"distributed/{num_instances}-instances"


def _manifest_name(split: str, num_instances: int) -> str:
    return f"{_folder(num_instances)}/{split}-manifest.json"
