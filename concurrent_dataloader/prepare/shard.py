"""Pack samples into shards: planned first, then written by any number of processes.

```text
Source -> survey (keys, sizes) -> ShardPlan -> shards, each whole or not there, with a receipt
                                            -> SPLIT-index.npz, SPLIT-FileInfo.json, metadata.json
```

Shard ``i`` depends on nothing but the source, the settings and ``i``: the same seed gives the same
bytes on any machine, whatever the number of processes. Until a run has finished, what is needed to
go on after it lies in ``.unfinished-SPLIT`` in the target: the fingerprint of its plan, a receipt
for each whole shard, and shards that are being written.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import orjson

from concurrent_dataloader.formats.tar import END_OF_ARCHIVE
from concurrent_dataloader.prepare.metadata import ShardMetadata, SplitMetadata
from concurrent_dataloader.prepare.plan import (
    ShardPlan,
    shuffle_positions,
    split_by_count,
    split_by_size,
)
from concurrent_dataloader.prepare.pool import Pool, open_pool
from concurrent_dataloader.prepare.shard_file import WrittenShard
from concurrent_dataloader.prepare.shard_settings import ShardSettings
from concurrent_dataloader.prepare.shard_writing import (
    TFRECORD_LABEL_BASE,
    Recipe,
    ShardTask,
    measure_samples,
    write_shard,
)
from concurrent_dataloader.prepare.source import Source
from concurrent_dataloader.prepare.survey import (
    Survey,
    check_other_splits,
    count_tar_bytes,
    survey_source,
)
from concurrent_dataloader.prepare.target import ShardTarget
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import SampleCrcs, Shard, ShardIndex, ShardIndexBuilder
from concurrent_dataloader.stores import WritableStore

_MEASURED_AT_ONCE = 256


def write_shards(
    source: Source,
    target: str | os.PathLike[str] | WritableStore,
    settings: ShardSettings | None = None,
    *,
    num_processes: int = 1,
    num_readers: int = 64,
    overwrite: bool = False,
    resume: bool = True,
    in_memory: bool = False,
    scratch: str | os.PathLike[str] | None = None,
    file_info: bool = True,
    on_shard: Callable[[ShardMetadata, int], None] = lambda shard, num_shards: None,
) -> SplitMetadata:
    """Pack all samples of a source.

    Args:
        source: The samples.
        target: Folder, URL or store where the shards are to be; folders are made.
        settings: What is written; None: the defaults of `ShardSettings`.
        num_processes: Each writes whole shards; this process is one of them, unless a function of
            the user's is called. With more than one, the calling script must be importable (``if
            __name__ == "__main__"``), since they are spawned.
        num_readers: Reads at once in each process, where reading takes longer than from a disk's
            cache; they hold 64 MiB at most, but for a sample that is larger alone.
        overwrite: Remove the shards of this split, its index and its metadata first.
        resume: Whether to go on after a run with the same source and settings that did not finish.
        in_memory: Compose shards in memory. Otherwise one for a bucket is composed in a temporary
            file that has no name, so that nothing can be left of it.
        scratch: Folder of those files; None: the system's.
        file_info: Whether to write ``SPLIT-FileInfo.json`` as well.
        on_shard: Called with each shard as it is there, and with their number.

    Returns:
        What ``metadata.json`` says of the split.

    Raises:
        FileExistsError: The target holds this split already.
        ValueError: The source is empty, two samples would get the same key, or ``num_readers`` is
            less than 1.
        LoaderError: A sample cannot be read or prepared.
        OSError: The target cannot be written.
    """
    if num_readers < 1:
        raise ValueError(f"num_readers: got {num_readers}, expected 1 or more")
    settings = ShardSettings() if settings is None else settings
    place = ShardTarget(
        target,
        settings.split,
        in_memory=in_memory,
        scratch=None if scratch is None else os.fspath(scratch),
    )
    survey = survey_source(source, settings)
    recipe = Recipe(source, settings, place, num_readers)
    pool_of = functools.partial(open_pool, works_here=settings.preparation.function is None)
    with place.lock(), pool_of(recipe, num_processes, Recipe.close) as pool:
        check_other_splits(place, survey, source, settings)
        plan = _make_plan(recipe, survey, pool)
        names = settings.names.names(plan.num_shards)
        written = place.begin(
            survey.fingerprint, names, settings.names, overwrite=overwrite, resume=resume
        )
        for shard in written.values():
            on_shard(shard.shard, plan.num_shards)
        tasks = [
            ShardTask(name, int(plan.bounds[number]), plan.positions(number))
            for number, name in enumerate(names)
            if name not in written
        ]
        for shard in pool.run(write_shard, tasks):
            place.put_receipt(shard)
            written[shard.shard.name] = shard
            on_shard(shard.shard, plan.num_shards)
        shards = [written[name] for name in names]
        result = _describe_split(recipe, shards, survey.fingerprint)
        place.finish(
            _build_index(recipe, plan, shards).to_bytes(),
            _describe_samples(recipe, plan, shards) if file_info else None,
            lambda metadata: metadata.with_split(settings.split, result),
        )
        return result


def _make_plan(recipe: Recipe, survey: Survey, pool: Pool[Recipe]) -> ShardPlan:
    settings = recipe.settings
    order = shuffle_positions(len(recipe.source), settings.seed)
    if settings.max_bytes is None:
        return split_by_count(order, settings.max_count)
    preparation = settings.preparation
    sizes = np.empty(len(order), np.int64)
    is_known = (survey.sizes >= 0) & preparation.keeps_bytes & (settings.kind == "tar")
    for position in np.flatnonzero(is_known).tolist():
        sizes[position] = count_tar_bytes(recipe, survey, position)
    unknown = np.flatnonzero(~is_known)
    parts = [
        unknown[start : start + _MEASURED_AT_ONCE]
        for start in range(0, len(unknown), _MEASURED_AT_ONCE)
    ]
    for positions, measured in pool.run(measure_samples, parts):
        sizes[positions] = measured
    fixed_bytes = len(END_OF_ARCHIVE) if settings.kind == "tar" else 0
    return split_by_size(
        order, sizes, settings.max_bytes, max_count=settings.max_count, fixed_bytes=fixed_bytes
    )


# -- what lies beside the shards


def _describe_split(
    recipe: Recipe, shards: Sequence[WrittenShard], fingerprint: str
) -> SplitMetadata:
    settings, source = recipe.settings, recipe.source
    preparation = settings.preparation
    return SplitMetadata(
        num_samples=len(source),
        shards=tuple(written.shard for written in shards),
        kind=settings.kind,
        payload=preparation.payload,
        image_size=preparation.image_size,
        image_quality=preparation.encoder_quality,
        transforms=tuple(map(str, preparation.steps)),
        function=preparation.function,
        shuffle=settings.seed is not None,
        seed=settings.seed,
        key_style=settings.key_style,
        pattern=settings.names.pattern,
        boxes=settings.boxes,
        label_base=0 if settings.kind == "tar" else TFRECORD_LABEL_BASE,
        label_space=source.label_space,
        classes=None if source.classes is None else tuple(source.classes),
        fingerprint=fingerprint,
    )


def _build_index(recipe: Recipe, plan: ShardPlan, shards: Sequence[WrittenShard]) -> ShardIndex:
    source, settings = recipe.source, recipe.settings
    builder = ShardIndexBuilder(settings.kind)
    place = 0
    for number, (shard, extents, payloads, crcs) in enumerate(shards):
        places = zip(extents.tolist(), payloads.tolist(), crcs.tolist(), strict=True)
        for position, (extent, payload, sample_crcs) in zip(
            plan.positions(number).tolist(), places, strict=True
        ):
            name = source.name(position)
            key = settings.key(name, place, recipe.digits)
            builder.add_sample(
                f"{key}.{settings.payload_field(name)}",
                ByteRange(*extent),
                ByteRange(*payload),
                source.label(position),
                SampleCrcs(*sample_crcs),
            )
            place += 1
        builder.add_shard(Shard(shard.name, shard.size_bytes, shard.md5, shard.crc32c))
    return builder.build(source.classes, source.label_space)


def _describe_samples(
    recipe: Recipe, plan: ShardPlan, shards: Sequence[WrittenShard]
) -> Iterator[bytes]:
    """Map each source name to its class, its shard, and the place of its sample there, as JSON."""
    source = recipe.source
    begin = b"{\n"
    for number, (shard, extents, *_) in enumerate(shards):
        starts_and_stops = zip(plan.positions(number).tolist(), extents.tolist(), strict=True)
        for position, (start, stop) in starts_and_stops:
            label = source.label(position)
            entry = {
                "class": None if label is None or source.classes is None else source.classes[label],
                "label": label,
                "shard": shard.name,
                "offset": start,
                "size": stop - start,
            }
            yield begin + orjson.dumps(source.name(position)) + b":" + orjson.dumps(entry)
            begin = b",\n"
    yield b"\n}\n"
