"""Shards cut for N instances: which parts there are, what they were made of, and if they still fit.

Each instance reads as many whole shards as every other. What is left, the remainder, is cut into N
parts whose sizes differ by at most a sample:

```text
train-000000.tar ... train-000009.tar          10 shards, 4 instances: 8 are read whole, 2 each
distributed/4-instances/train-000000.tar ...   the samples of the last 2, in order, in 4 parts
distributed/4-instances/train-index.npz        byte ranges of the parts
distributed/4-instances/train-manifest.json    which shards they were made of; written last
```

The remainder is the last ``S mod N`` of S shards, or the last N where that is 0, since the last
shard may hold fewer samples than the others.

Source: the rule and the names are those of Graphcore's CNN data sets, whose readers find the parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
from typing_extensions import Buffer

from concurrent_dataloader.errors import IndexFormatError, KeyNotFoundError
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.stores import WritableStore

_VERSION = 1


class Part(NamedTuple):
    """One of the parts of the remainder."""

    name: str
    """Relative to the folder of the whole shards."""

    num_samples: int
    size_bytes: int
    md5: str | None = None
    """Of the whole file, in hex; None where it was not known of the shards."""

    crc32c: str | None = None
    """Of the whole file, in hex; None where it was not known of the shards."""


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

    parts: tuple[Part, ...]
    """One for each instance."""

    def to_bytes(self) -> bytes:
        """Give the content of the file."""
        content = {
            "version": _VERSION,
            "split": self.split,
            "num_instances": self.num_instances,
            "num_remainder": self.num_remainder,
            "shards": [shard._asdict() for shard in self.shards],
            "parts": [part._asdict() for part in self.parts],
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
                parts=tuple(Part(**part) for part in content["parts"]),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise IndexFormatError(
                f"{where}: no manifest of distributed shards ({error}); write it anew with"
                " `concurrent-dataloader distribute`"
            ) from error


def part_names(split: str, num_instances: int) -> list[str]:
    """Give the names of the parts, relative to the folder of the whole shards."""
    folder = folder_of(num_instances)
    return [f"{folder}/{split}-{instance:06d}.tar" for instance in range(num_instances)]


def count_remainder(num_shards: int, num_instances: int) -> int:
    """Tell how many shards at the end are cut into parts."""
    return num_shards % num_instances or num_instances


def share(num_samples: int, num_instances: int) -> list[int]:
    """Tell how many samples each part holds: equally many, the first ones one more."""
    each, more = divmod(num_samples, num_instances)
    return [each + (instance < more) for instance in range(num_instances)]


# -- what is there


def describe_shards(index: ShardIndex) -> tuple[SourceShard, ...]:
    """Say of each shard what tells it from another one of the same name."""
    counts = np.bincount(index.shard_numbers, minlength=len(index.shards)).tolist()
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
    name = manifest_name(split, num_instances)
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
    sizes = _find_sizes(store, f"{folder_of(manifest.num_instances)}/{manifest.split}-")
    for part in manifest.parts:
        if sizes.get(part.name) != part.size_bytes:
            return f"{part.name} has {sizes.get(part.name, 0)} bytes, expected {part.size_bytes}"
    return None


def _find_sizes(store: WritableStore, prefix: str) -> dict[str, int]:
    try:
        return {info.key: info.size_bytes for info in store.list(prefix)}
    except KeyNotFoundError:  # no such folder
        return {}


def folder_of(num_instances: int) -> str:
    """Give the folder of the parts, relative to that of the whole shards."""
    return f"distributed/{num_instances}-instances"


def manifest_name(split: str, num_instances: int) -> str:
    """Give the name of the manifest, relative to the folder of the whole shards."""
    return f"{folder_of(num_instances)}/{split}-manifest.json"
