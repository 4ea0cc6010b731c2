"""What one of N instances, such as machines, reads of a set of shards."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.datasets.shard_opening import open_shards
from concurrent_dataloader.datasets.shards import ShardDataset
from concurrent_dataloader.distribution import (
    Manifest,
    describe_shards,
    find_mismatch,
    folder_of,
    read_manifest,
)
from concurrent_dataloader.errors import IndexFormatError, ShardFormatError
from concurrent_dataloader.shard_index import IndexPiece, ShardIndex, join_indexes
from concurrent_dataloader.stores.base import Store, WritableStore
from concurrent_dataloader.stores.cache import uncached


class InstanceShard(NamedTuple):
    """What an instance reads of a shard."""

    name: str
    """Relative to the folder of the shards."""

    num_samples: int
    """So many, from its begin."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InstanceShards:
    """What an instance reads in an epoch: what `StreamedShards` takes."""

    shards: tuple[InstanceShard, ...]
    """Whole shards, and then its part of the remainder."""

    num_skipped: int
    """Samples of the set that no instance reads, since they were not distributed."""

    store: Store
    """Holds the shards, by their names."""

    index: ShardIndex
    """Of just these samples."""

    positions: NDArray[np.int64] = dataclasses.field(repr=False)
    """Of each sample of ``index`` in the index of the whole set, (N,)."""

    @property
    def names(self) -> list[str]:
        """Names of the shards, relative to their folder."""
        return [shard.name for shard in self.shards]

    @property
    def num_samples(self) -> int:
        """How many samples the instance delivers."""
        return sum(shard.num_samples for shard in self.shards)


def shards_of_instance(
    shards: str | os.PathLike[str] | ShardDataset,
    instance: int,
    num_instances: int,
    split: str = "train",
    *,
    percentage: float = 100.0,
    seed: int | None = None,
    epoch: int = 0,
    **options: Any,
) -> InstanceShards:
    """Tell what one of N instances reads: whole shards, and its part of the remainder.

    All instances together read each sample once. The parts are made beforehand, by
    ``concurrent-dataloader distribute``. Without them the remainder is left out, with a warning.

    ```python
    mine = shards_of_instance("s3://photos/shards", instance=2, num_instances=4)
    stream = StreamedShards(
        mine.names, store=mine.store, index=mine.index, rank=local_rank, world_size=num_local
    )
    ```

    The rank is that among the processes of the instance, which ``torch.distributed`` does not know:
    of all processes each would read a part of what is the instance's. Instances may differ by some
    samples; ``uneven="exact"`` with torch's ``Join`` trains on all of them.

    Args:
        shards: Folder of the shards, or ``s3://bucket/prefix``, with an index; or the whole of them
            as they were opened for random access.
        instance: From 0 on.
        num_instances: How many there are.
        split: Such as ``"train"``.
        percentage: How much of each shard is read, from its begin, rounded up to samples; the same
            samples in each epoch, whoever reads them.
        seed: Whole shards change hands by seed and epoch; None: each instance keeps its own.
        epoch: Only counts with a seed.
        options: As `open_shards` takes them, such as ``endpoint_url``.

    Raises:
        ValueError: An argument is out of range, or the shards cannot be listed.
        FileNotFoundError: There are no such shards, or no index of them.
        ShardFormatError: The parts were made of other shards, or a shard is not that of the index.
        IndexFormatError: An index or a manifest cannot be used.
    """
    _check_share(instance, num_instances, percentage)
    opened = shards
    if not isinstance(opened, ShardDataset):
        opened = open_shards(opened, split=split, **options)
    index, store = opened.shard_index, uncached(opened.store)
    if not index.shards:
        raise IndexFormatError(f"{shards}: got an index without shards, expected one or more")
    where = store.describe(index.shards[0].name).rpartition("/")[0]
    manifest = _find_manifest(index, store, where, split, num_instances)
    num_left = len(index.shards) % num_instances
    if manifest is not None:
        num_left = manifest.num_remainder
    num_whole = len(index.shards) - num_left
    counts = np.bincount(index.shard_numbers, minlength=len(index.shards)).astype(np.int64)
    firsts = np.cumsum(counts) - counts
    own = _choose_whole(num_whole, instance, num_instances, seed, epoch)
    heads = {number: _head(firsts[number], counts[number], percentage) for number in own}
    chosen = [InstanceShard(index.shards[number].name, len(heads[number])) for number in own]
    positions = _join([heads[number] for number in sorted(own)])
    pieces = [IndexPiece(index, sorted(own), positions)]
    num_skipped = int(counts[num_whole:].sum())
    if manifest is not None:
        num_skipped = 0
        folder = f"{folder_of(num_instances)}/"
        sizes = [part.num_samples for part in manifest.parts]
        before = sum(sizes[:instance])
        mine = _head(before, sizes[instance], percentage)
        parts = _read_index(store, f"{folder}{split}-index.npz", sizes)
        pieces.append(IndexPiece(parts, [instance], mine, folder))
        chosen.append(InstanceShard(manifest.parts[instance].name, len(mine)))
        positions = _join([positions, firsts[num_whole] + mine])
    elif num_left:
        how = f"run `concurrent-dataloader distribute {where} -n {num_instances}`"
        warnings.warn(
            f"{where}: {num_skipped} samples of the last {num_left} of {len(counts)} shards are"
            f" skipped by all {num_instances} instances; {how}",
            UserWarning,
            stacklevel=2,
        )
    return InstanceShards(
        shards=tuple(chosen),
        num_skipped=num_skipped,
        store=opened.store,
        index=join_indexes(pieces),
        positions=positions,
    )


def _check_share(instance: int, num_instances: int, percentage: float) -> None:
    if num_instances < 1:
        raise ValueError(f"num_instances: got {num_instances}, expected 1 or more")
    if not 0 <= instance < num_instances:
        raise ValueError(f"instance: got {instance}, expected 0 to {num_instances - 1}")
    if not 0 < percentage <= 100:
        raise ValueError(f"percentage: got {percentage}, expected more than 0, and at most 100")


def _find_manifest(
    index: ShardIndex, store: Store, where: str, split: str, num_instances: int
) -> Manifest | None:
    """Read which parts there are, and check that they are of these shards; None if none are."""
    if not isinstance(store, WritableStore):
        raise ValueError(
            f"{where}: cannot be listed, expected a folder or s3://bucket/prefix to tell whether "
            "the parts of its shards are there"
        )
    manifest = read_manifest(store, split, num_instances)
    if manifest is None:
        return None
    mismatch = find_mismatch(manifest, describe_shards(index), store)
    if mismatch is not None:
        raise ShardFormatError(
            f"{where}/{folder_of(num_instances)}: out of date, {mismatch}; run "
            f"`concurrent-dataloader distribute {where} -n {num_instances}`"
        )
    return manifest


def _choose_whole(
    num_whole: int, instance: int, num_instances: int, seed: int | None, epoch: int
) -> list[int]:
    num_each = num_whole // num_instances
    order = np.arange(num_whole)
    if seed is not None:
        order = np.random.RandomState([seed, epoch]).permutation(num_whole)
    return order[instance * num_each : (instance + 1) * num_each].tolist()


def _head(first: int, count: int, percentage: float) -> NDArray[np.int64]:
    """Give the positions of the first samples of a shard."""
    return np.arange(first, first + math.ceil(count * percentage / 100), dtype=np.int64)


def _join(positions: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *positions])


def _read_index(store: Store, key: str, counts: Sequence[int]) -> ShardIndex:
    """Read the index of the parts."""
    where = store.describe(key)
    index = ShardIndex.from_bytes(store.get(key), where)
    got = np.bincount(index.shard_numbers, minlength=len(index.shards)).tolist()
    if got != list(counts):
        raise IndexFormatError(
            f"{where}: got {got[:8]} ... samples in the parts, expected {list(counts[:8])} ..., as "
            "the manifest beside it says; write both anew with `concurrent-dataloader distribute`"
        )
    return index
