"""Shards of another size, count or order, made of shards: merged, cut, shuffled anew.

Samples are copied as they lie in their shards, headers and all, by their byte ranges. So any order
costs no more memory than another, and the same arguments give the same bytes on any machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.distribution import describe_shards, share
from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.formats.tar import END_OF_ARCHIVE
from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.extents import Copies, add_copies
from concurrent_dataloader.prepare.metadata import ShardMetadata, SplitMetadata
from concurrent_dataloader.prepare.nesting import refuse_target_in_source
from concurrent_dataloader.prepare.plan import (
    NamePattern,
    ShardPlan,
    shuffle_positions,
    split_by_count,
    split_by_size,
)
from concurrent_dataloader.prepare.pool import open_pool
from concurrent_dataloader.prepare.shard_file import HashedFile, WrittenShard
from concurrent_dataloader.prepare.shard_set import (
    OpenRoot,
    Place,
    ShardSet,
    check_keys,
    check_safe,
    extents_bytes,
    has_md5s,
    hash_keys,
    key_of,
    open_shard_set,
    places_of,
)
from concurrent_dataloader.prepare.target import ShardTarget
from concurrent_dataloader.shard_index import NO_LABEL, Shard, ShardIndex, ShardIndexBuilder
from concurrent_dataloader.stores import open_writable_store

DEFAULT_MAX_BYTES = 300_000_000
"""As of `shard.write_shards`."""


class SplitAt(NamedTuple):
    """A split of a set of shards."""

    location: str
    """Folder, or ``s3://bucket/prefix``."""

    split: str = "train"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReshardSettings:
    """How shards are cut anew.

    Raises:
        ValueError: On making it: a value that cannot be, or settings that do not go together.
    """

    split: str = "train"
    """Of the new shards."""

    max_count: int | None = None
    """Samples of a shard."""

    max_bytes: int | None = None
    """Of a shard; never exceeded, but by a sample that is larger alone. None, and no other size
    given: `DEFAULT_MAX_BYTES`."""

    num_shards: int | None = None
    """So many, which differ by a sample at most; excludes the two above."""

    start: int = 0
    stop: int | None = None
    """Which samples of all that the sources hold, in their order."""

    seed: int | None = None
    """Shuffle all samples by it; None: keep the order of the sources."""

    pattern: str | None = None
    """Names of the shards; None: ``SPLIT-%06d.tar``."""

    def __post_init__(self) -> None:
        if self.num_shards is not None and (self.max_count, self.max_bytes) != (None, None):
            raise ValueError(
                "shards: given together with maxcount or maxsize, expected one way to say how large"
                " shards are"
            )
        if self.num_shards is not None and self.num_shards < 1:
            raise ValueError(f"shards: got {self.num_shards}, expected 1 or more")
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise ValueError(
                f"slice: got {self.start}:{'' if self.stop is None else self.stop}, expected a"
                " start from 0 on and a stop behind it"
            )
        nothing = np.zeros(0, np.int64)
        least_bytes = 1 if self.max_bytes is None else self.max_bytes
        split_by_size(nothing, nothing, least_bytes, max_count=self.max_count)
        shuffle_positions(0, self.seed)
        self.names.names(1)

    @property
    def names(self) -> NamePattern:
        """The names of the shards."""
        return NamePattern(f"{self.split}-%06d.tar" if self.pattern is None else self.pattern)


def reshard(
    sources: Sequence[SplitAt],
    target: str | os.PathLike[str],
    settings: ReshardSettings | None = None,
    *,
    open_root: OpenRoot = open_writable_store,
    num_processes: int = 1,
    overwrite: bool = False,
    resume: bool = True,
    on_shard: Callable[[ShardMetadata, int], None] = lambda shard, num_shards: None,
) -> SplitMetadata:
    """Write the samples of some sets of shards into new shards, with their index and metadata.

    Args:
        sources: Sets, taken one after the other.
        target: Folder or URL of the new shards; not one of the sources, and in none of them.
        settings: What is taken and how it is cut; None: the defaults of `ReshardSettings`.
        open_root: Opens the stores; pickles if there are several processes.
        num_processes: Each writes whole shards.
        overwrite: Remove what is there of the split first.
        resume: Whether to go on after a run with the same sources and settings that did not finish.
        on_shard: Called with each shard as it is there, and with their number.

    Returns:
        What ``metadata.json`` says of the split.

    Raises:
        FileNotFoundError: A source has no such shards.
        FileExistsError: The target holds this split already.
        ValueError: The sources do not go together, the slice holds nothing, or the target lies in a
            source.
        ShardFormatError: A key stands twice or is unsafe, or a shard is damaged.
        StoreError: A store cannot be read or written.
    """
    with open_resharding(sources, target, settings, open_root=open_root) as resharding:
        return resharding.write(
            num_processes=num_processes, overwrite=overwrite, resume=resume, on_shard=on_shard
        )


@contextlib.contextmanager
def open_resharding(
    sources: Sequence[SplitAt],
    target: str | os.PathLike[str],
    settings: ReshardSettings | None = None,
    *,
    open_root: OpenRoot = open_writable_store,
) -> Generator[Resharding]:
    """Decide what goes where; nothing is written before `Resharding.write`.

    For callers who write several splits, and want to know of each that it can be written before
    they write the first. The arguments and errors are those of `reshard`.
    """
    settings = ReshardSettings() if settings is None else settings
    with contextlib.ExitStack() as stack:
        for source in sources:
            refuse_target_in_source(source.location, os.fspath(target), in_buckets=False)
        place = ShardTarget(open_root(os.fspath(target)), settings.split)
        stack.callback(place.store.close)
        sets: list[ShardSet] = []
        for source in sources:
            sets.append(open_shard_set(source.location, source.split, open_root))
            stack.callback(sets[-1].store.close)
            check_safe(sets[-1])
        described = _describe(sets, settings)
        recipe = _Recipe(*merge_sets(sets), place)
        yield Resharding(settings, described, recipe, plan_shards(recipe.index, settings))


@dataclasses.dataclass(frozen=True, slots=True)
class Resharding:
    """A split that can be written; what it reads and writes is open as long as its context."""

    _settings: ReshardSettings
    _described: SplitMetadata
    """But for its shards."""
    _recipe: _Recipe
    _plan: ShardPlan

    def write(
        self,
        *,
        num_processes: int = 1,
        overwrite: bool = False,
        resume: bool = True,
        on_shard: Callable[[ShardMetadata, int], None] = lambda shard, num_shards: None,
    ) -> SplitMetadata:
        """Write the split; arguments, result and errors are those of `reshard`."""
        settings, recipe, plan = self._settings, self._recipe, self._plan
        place = recipe.place
        with contextlib.ExitStack() as stack:
            stack.enter_context(place.lock())
            check_target_keys(
                place,
                recipe.index.names.select(plan.order),
                lambda at: recipe.index.shard_of(int(plan.order[at])).name,
            )
            names = settings.names.names(plan.num_shards)
            written = place.begin(
                str(self._described.fingerprint),
                names,
                settings.names,
                overwrite=overwrite,
                resume=resume,
            )
            for shard in written.values():
                on_shard(shard.shard, plan.num_shards)
            tasks = [
                (name, plan.positions(number))
                for number, name in enumerate(names)
                if name not in written
            ]
            pool = stack.enter_context(open_pool(recipe, num_processes))
            for shard in pool.run(_write_shard, tasks):
                place.put_receipt(shard)
                written[shard.shard.name] = shard
                on_shard(shard.shard, plan.num_shards)
            shards = [written[name] for name in names]
            result = dataclasses.replace(
                self._described,
                num_samples=len(plan.order),
                shards=tuple(shard.shard for shard in shards),
            )
            index = _build_index(recipe.index, plan, shards)
            place.finish(
                index.to_bytes(), None, lambda metadata: metadata.with_split(settings.split, result)
            )
            return result


# -- before anything is written


def merge_sets(sets: Sequence[ShardSet]) -> tuple[ShardIndex, list[Place]]:
    """Put sets one after the other.

    Returns:
        An index of all samples, whose shards are called by their URLs or paths, and the place of
        each shard.
    """
    places = [place for shard_set in sets for place in places_of(shard_set)]
    builder = ShardIndexBuilder("tar")
    for shard_set in sets:
        index, position = shard_set.index, 0
        labels = index.labels
        counts = np.bincount(index.shard_numbers, minlength=len(index.shards)).tolist()
        for shard, count in zip(index.shards, counts, strict=True):
            for _ in range(count):
                label = NO_LABEL if labels is None else int(labels[position])
                builder.add_sample(
                    index.names.key(position),
                    index.extent(position),
                    index.payload(position),
                    None if label == NO_LABEL else label,
                    index.sample_crcs(position),
                )
                position += 1
            name = shard_set.store.describe(shard.name)
            builder.add_shard(shard._replace(name=name))
    first = sets[0].index
    return builder.build(first.classes, first.label_space), places


def plan_shards(index: ShardIndex, settings: ReshardSettings) -> ShardPlan:
    """Decide which sample goes into which new shard; pure.

    Raises:
        ValueError: The slice holds nothing, or there are fewer samples than shards.
    """
    stop = len(index) if settings.stop is None else min(settings.stop, len(index))
    num_samples = max(0, stop - settings.start)
    if num_samples == 0:
        raise ValueError(
            f"slice: got a start of {settings.start}, expected less than {len(index)}, which is how"
            " many samples the sources hold"
        )
    if settings.num_shards is not None and num_samples < settings.num_shards:
        holder = "the sources" if num_samples == len(index) else "the slice of the sources"
        verb = "hold" if num_samples == len(index) else "holds"
        raise ValueError(
            f"shards: got {settings.num_shards}, expected {num_samples} or fewer, since {holder}"
            f" of split {settings.split!r} {verb} {num_samples} samples"
        )
    order = shuffle_positions(num_samples, settings.seed) + settings.start
    if settings.num_shards is not None:
        bounds = np.cumsum([0, *share(num_samples, settings.num_shards)])
        return ShardPlan(order, bounds.astype(np.int64))
    if settings.max_bytes is None and settings.max_count is not None:
        return split_by_count(order, settings.max_count)
    return split_by_size(
        order,
        extents_bytes(index),
        DEFAULT_MAX_BYTES if settings.max_bytes is None else settings.max_bytes,
        max_count=settings.max_count,
        fixed_bytes=len(END_OF_ARCHIVE),
    )


def _describe(sets: Sequence[ShardSet], settings: ReshardSettings) -> SplitMetadata:
    """Say what the new split is, but for its shards.

    Raises:
        ValueError: The sets do not go together.
    """
    if not sets:
        raise ValueError("sources: got none, expected one at least")
    known = [shard_set.split_metadata for shard_set in sets]
    for shard_set, metadata in zip(sets, known, strict=True):
        _check_alike(sets[0], shard_set)
        for what in ("payload", "image_size", "transforms", "function", "boxes", "label_base"):
            got, expected = getattr(metadata, what), getattr(known[0], what)
            if got != expected:
                raise ValueError(
                    f"{shard_set.location}: its metadata says {what} {got!r}, and that of"
                    f" {sets[0].location} {expected!r}; expected sets that were made alike"
                )
    is_whole = len(sets) == 1 and settings.start == 0 and settings.stop is None
    first = known[0]
    qualities = {metadata.image_quality for metadata in known}
    return dataclasses.replace(
        first,
        image_quality=first.image_quality if len(qualities) == 1 else None,
        shuffle=settings.seed is not None or all(metadata.shuffle for metadata in known),
        seed=first.seed if is_whole and settings.seed is None else settings.seed,
        key_style=first.key_style if len(sets) == 1 else None,
        pattern=settings.names.pattern,
        label_space=sets[0].index.label_space,
        classes=sets[0].index.classes,
        fingerprint=_fingerprint(sets, settings),
    )


def _check_alike(first: ShardSet, other: ShardSet) -> None:
    """Raise if labels mean different things."""
    if first.index.label_space != other.index.label_space:
        raise ValueError(
            f"{other.location}: got label space {other.index.label_space!r}, and"
            f" {first.index.label_space!r} in {first.location}; expected the same"
        )
    if first.index.classes != other.index.classes:
        counts = [
            "unknown classes" if classes is None else f"{len(classes)} classes"
            for classes in (other.index.classes, first.index.classes)
        ]
        raise ValueError(
            f"{other.location}: its labels mean other classes ({counts[0]}) than those of"
            f" {first.location} ({counts[1]}); expected the same list in the same order"
        )


def _fingerprint(sets: Sequence[ShardSet], settings: ReshardSettings) -> str:
    digest = hashlib.blake2b(digest_size=16, usedforsecurity=False)
    for shard_set in sets:
        digest.update(repr(describe_shards(shard_set.index)).encode())
        digest.update(repr((shard_set.index.classes, shard_set.index.label_space)).encode())
    digest.update(repr(settings).encode())
    return digest.hexdigest()


def check_target_keys(place: ShardTarget, names: Index, where: Callable[[int], str]) -> None:
    """Raise if two samples of a new split share a key, or one of another split there has it.

    Args:
        place: Gets the split.
        names: ``<key>.<field>`` of each sample.
        where: Says for a position in ``names`` where the sample lies.

    Raises:
        ShardFormatError: They do.
    """
    hashes = check_keys(names, where)
    for split, index in place.read_other_indexes():
        common = np.flatnonzero(np.isin(hashes, hash_keys(index.names)))
        if len(common):
            at = int(common[0])
            raise ShardFormatError(
                f"{where(at)}: key {key_of(names.key(at))!r} stands in split {split!r} of the"
                " target already, expected each once; choose another target"
            )


# -- shards


@dataclasses.dataclass(frozen=True, slots=True)
class _Recipe:
    """What all shards of a run share."""

    index: ShardIndex
    places: list[Place]
    place: ShardTarget


def _write_shard(recipe: _Recipe, task: tuple[str, NDArray[np.int64]]) -> WrittenShard:
    name, positions = task
    copies = Copies(recipe.index, positions)
    with (
        recipe.place.compose(name) as file,
        HashedFile(file, md5=has_md5s(recipe.index)) as hashed,
        contextlib.closing(copies.read(recipe.places)) as pieces,
    ):
        for piece in pieces:
            hashed.writelines((memoryview(piece).cast("B"),))
        md5 = hashed.hexdigest()
    shard = ShardMetadata(
        name=name,
        num_samples=len(positions),
        size_bytes=copies.size_bytes,
        md5=md5,
        crc32c=copies.crc32c,
    )
    return WrittenShard(shard, copies.extents, copies.payloads, copies.crcs)


def _build_index(index: ShardIndex, plan: ShardPlan, shards: Sequence[WrittenShard]) -> ShardIndex:
    builder = ShardIndexBuilder("tar")
    for number, written in enumerate(shards):
        positions = plan.positions(number)
        add_copies(builder, index, positions, written.extents, written.payloads, written.crcs)
        shard = written.shard
        builder.add_shard(Shard(shard.name, shard.size_bytes, shard.md5, shard.crc32c))
    return builder.build(index.classes, index.label_space)
