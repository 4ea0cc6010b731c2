"""How many shards, and how large: a rule, with its reasons."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.prepare.index import IMAGE_SUFFIXES
from concurrent_dataloader.prepare.shard_set import OpenRoot, padded_bytes, read_metadata
from concurrent_dataloader.shard_names import find_kind
from concurrent_dataloader.stores import open_writable_store

GB = 1_000_000_000
MIN_SHARD_BYTES = 1 * GB
"""Below it, opening shards counts: a request, and a place in a listing, for each."""
MAX_SHARD_BYTES = 10 * GB
"""Above it, one is slow to copy and to write again, and few of them are a coarse shuffle."""

_WANTED_PER_READER = 4
_LABEL_BYTES = 1
_PROGRESS_OBJECTS = 1000


class Amount(NamedTuple):
    """How much there is to pack."""

    num_bytes: int
    """In shards, headers and padding included."""

    num_samples: int | None = None
    """None: not known."""

    is_tfrecord: bool = False
    """Whether it lies in TFRecord shards, which `reshard` does not take, but `shard` does."""


class Advice(NamedTuple):
    """What to do, and why."""

    num_shards: int
    shard_bytes: int
    """Mean size of one."""

    max_count: int | None
    """Samples in each but the last; None where it is not known how many samples there are."""

    last_count: int | None
    """Samples in the last."""

    reasons: tuple[str, ...]


def advise(amount: Amount, num_ranks: int = 1, num_workers: int = 1) -> Advice:
    """Recommend a number of shards: of 1 to 10 GB, but at least one for each reader; pure.

    A multiple of the number of readers, so that all get equally many; some for each of them where
    the size allows it, since shards are what is shuffled first.

    Args:
        amount: How much there is.
        num_ranks: Processes that train.
        num_workers: Of the loader of each; 0 counts as 1.

    Raises:
        ValueError: An argument is out of range.
    """
    num_bytes, num_samples = amount.num_bytes, amount.num_samples
    if num_bytes < 1:
        raise ValueError(f"bytes: got {num_bytes}, expected 1 or more")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"samples: got {num_samples}, expected 1 or more")
    if num_ranks < 1:
        raise ValueError(f"ranks: got {num_ranks}, expected 1 or more")
    if num_workers < 0:
        raise ValueError(f"workers: got {num_workers}, expected 0 or more")
    readers = num_ranks * max(1, num_workers)
    fewest = math.ceil(num_bytes / MAX_SHARD_BYTES / readers)
    most = num_bytes // MIN_SHARD_BYTES // readers
    per_reader = max(1, fewest, min(_WANTED_PER_READER, most))
    num_shards = per_reader * readers
    named = f"{readers} readers ({num_ranks} ranks x {max(1, num_workers)} workers)"
    reasons = [
        f"{named} with {per_reader} {'shards' if per_reader > 1 else 'shard'} each: none idles,"
        " none is skipped"
    ]
    if most >= 1:
        reasons.append(
            f"shards of {MIN_SHARD_BYTES // GB} to {MAX_SHARD_BYTES // GB} GB: large enough to be"
            " read at full speed, small enough to copy, to write again and to shuffle"
        )
    else:
        reasons.append(
            f"smaller than {MIN_SHARD_BYTES // GB} GB, since fewer shards than readers would leave"
            " some idle in loaders that hand out whole shards"
        )
    if num_samples is not None and num_shards > num_samples:
        num_shards = num_samples
        reasons.append("no more shards than samples; fewer readers would do")
    reasons.append(
        "streaming and random access of this library also part shards by samples, so a number that"
        " does not divide evenly costs it nothing"
    )
    if num_samples is None:
        return Advice(num_shards, math.ceil(num_bytes / num_shards), None, None, tuple(reasons))
    max_count = math.ceil(num_samples / num_shards)
    num_filled = math.ceil(num_samples / max_count)
    if num_filled < readers:
        reasons[0] = f"{named} are more than the shards that {num_samples} samples fill"
    if num_filled < num_shards:
        reasons.append(
            f"{num_filled} shards instead of {num_shards}: with {max_count} samples each,"
            f" {num_samples} fill no more"
        )
    last_count = num_samples - (num_filled - 1) * max_count
    mean_bytes = math.ceil(num_bytes / num_filled)
    return Advice(num_filled, mean_bytes, max_count, last_count, tuple(reasons))


def measure(
    location: str,
    *,
    open_root: OpenRoot = open_writable_store,
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Amount:
    """Count what lies in a folder or a bucket: image files, or shards where there are some.

    Shards are told by their names, as `find_kind` says. LMDB databases are not counted.

    Args:
        location: Folder, or ``s3://bucket/prefix``.
        open_root: Opens the store at the location.
        suffixes: Endings of files that are samples, in any case.
        on_progress: Told now and then, and at the end, how many objects were listed.

    Raises:
        FileNotFoundError: There is neither.
        StoreError: It cannot be listed.
    """
    num_images = image_bytes = shard_bytes = count = 0
    kinds: set[str | None] = set()
    database = ""
    endings = tuple(suffix.lower() for suffix in suffixes)
    with contextlib.closing(open_root(location)) as store:
        for count, info in enumerate(store.list(), 1):
            name = info.key.lower()
            if name.endswith(endings):
                num_images += 1
                image_bytes += padded_bytes(info.size_bytes) + padded_bytes(_LABEL_BYTES)
            elif find_kind(name) in ("tar", "tfrecord") and not name.startswith("distributed/"):
                shard_bytes += info.size_bytes
                kinds.add(find_kind(name))
            elif name.endswith((".lmdb", ".mdb")) or ".lmdb/" in name:
                database = database or info.key
            if count % _PROGRESS_OBJECTS == 0:
                on_progress(count)
        on_progress(count)
        if shard_bytes:
            metadata = read_metadata(store)
            known = None if metadata is None else metadata.splits.values()
            return Amount(
                shard_bytes,
                None if known is None else sum(split.num_samples for split in known),
                is_tfrecord="tfrecord" in kinds,
            )
    if not num_images:
        others = f"; {database!r} is of a database, which needs no shards" if database else ""
        raise KeyNotFoundError(
            f"{location}: no file that ends in {', '.join(suffixes)}, no tar shard (.tar), and no"
            f" TFRecord shard (.tfrecord, or such as train-00000-of-01024){others}; check the"
            " place, or give --bytes and --samples"
        )
    return Amount(image_bytes, num_images)
