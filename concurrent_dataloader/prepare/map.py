"""Put every sample of a set of shards through a function, and write what it gives into new shards.

Shard ``i`` of the new set holds what became of the samples of shard ``i`` of the old one, in their
order: the bytes do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from typing_extensions import Buffer

from concurrent_dataloader.distribution import describe_shards
from concurrent_dataloader.errors import LoaderError, ShardFormatError
from concurrent_dataloader.formats.fields import LABEL_FIELD, find_field
from concurrent_dataloader.formats.tar import END_OF_ARCHIVE, Sample, check_name, read_samples
from concurrent_dataloader.formats.tar_writer import TarWriter
from concurrent_dataloader.prepare.extents import read_extents
from concurrent_dataloader.prepare.metadata import ShardMetadata, SplitMetadata
from concurrent_dataloader.prepare.nesting import refuse_target_in_source
from concurrent_dataloader.prepare.plan import NamePattern
from concurrent_dataloader.prepare.pool import open_pool
from concurrent_dataloader.prepare.reshard import SplitAt, check_target_keys
from concurrent_dataloader.prepare.shard_file import HashedFile, WrittenShard
from concurrent_dataloader.prepare.shard_set import (
    FoundSample,
    OpenRoot,
    Place,
    ShardSet,
    check_safe,
    describe_sample,
    find_samples,
    has_md5s,
    open_shard_set,
    parse_label,
    places_of,
)
from concurrent_dataloader.prepare.target import ShardTarget
from concurrent_dataloader.shard_index import SampleCrcs, Shard, ShardIndex, ShardIndexBuilder
from concurrent_dataloader.stores import open_writable_store

KEY = "__key__"
"""In what the function gives: the key of the new sample, in the place of the old one."""

Fields = Mapping[str, Buffer]

SampleFunction = Callable[[str, dict[str, bytes]], Fields | Sequence[Fields] | None]
"""Gets a sample's key, and its content by field. Gives the new content, or a list of several
samples, which are called ``<key>_0`` and so on unless they say `KEY`, or None to drop it."""


def map_shards(
    source: SplitAt,
    target: str | os.PathLike[str],
    function: str,
    *,
    open_root: OpenRoot = open_writable_store,
    num_processes: int = 1,
    overwrite: bool = False,
    resume: bool = True,
    on_shard: Callable[[ShardMetadata, int], None] = lambda shard, num_shards: None,
) -> SplitMetadata:
    """Write new shards with the names of the old ones, with their index and metadata.

    Args:
        source: The split to read.
        target: Folder or URL of the new shards; not that of the old ones, and not below it.
        function: ``module:function``, a `SampleFunction`; imported in each process.
        open_root: Opens the stores; pickles if there are several processes.
        num_processes: Each works on whole shards.
        overwrite: Remove what is there of the split first.
        resume: Whether to go on after a run that did not finish, if neither the source nor the
            module of the function has changed since.
        on_shard: Called with each shard as it is there, and with their number.

    Returns:
        What ``metadata.json`` says of the split.

    Raises:
        FileNotFoundError: The source has no such shards.
        FileExistsError: The target holds this split already.
        ValueError: There is no such function, it drops all samples, or the target lies in the
            source.
        LoaderError: The function raised, or gave what cannot be written; names shard and key.
        ShardFormatError: A shard is damaged, an old key is unsafe, or two new samples share a key.
        StoreError: A store cannot be read or written.
    """
    load_function(function)
    refuse_target_in_source(source.location, os.fspath(target), in_buckets=False)
    with contextlib.ExitStack() as stack:
        old = open_shard_set(source.location, source.split, open_root)
        stack.callback(old.store.close)
        check_safe(old)
        place = ShardTarget(open_root(os.fspath(target)), source.split)
        stack.callback(place.store.close)
        recipe = _Recipe(old.index, places_of(old), place, function)
        names = [shard.name for shard in old.index.shards]
        num_shards = len(names)
        stack.enter_context(place.lock())
        fingerprint = _fingerprint(old, function)
        written = place.begin(
            fingerprint, names, _find_pattern(names), overwrite=overwrite, resume=resume
        )
        samples: dict[str, list[FoundSample]] = {}
        for name, shard in written.items():
            found = Shard(name, shard.shard.size_bytes)
            samples[name] = [
                sample._replace(crcs=SampleCrcs(*crcs))
                for sample, crcs in zip(
                    find_samples(place.store, found), shard.crcs.tolist(), strict=True
                )
            ]
            on_shard(shard.shard, num_shards)
        tasks = [number for number, name in enumerate(names) if name not in written]
        pool = stack.enter_context(open_pool(recipe, num_processes, works_here=False))
        for shard, found in pool.run(_map_shard, tasks):
            place.put_receipt(shard)
            written[shard.shard.name] = shard
            samples[shard.shard.name] = found
            on_shard(shard.shard, num_shards)
        result = dataclasses.replace(
            old.split_metadata,
            num_samples=sum(map(len, samples.values())),
            shards=tuple(written[name].shard for name in names),
            function=function,
            fingerprint=fingerprint,
        )
        _finish(old, place, result, [samples[name] for name in names])
        return result


def load_function(name: str) -> SampleFunction:
    """Import a function.

    Raises:
        ValueError: It is not called ``module:function``, or cannot be imported.
    """
    module, colon, path = name.partition(":")
    if not colon or not module or not path:
        raise ValueError(f"function: got {name!r}, expected 'module:function'")
    try:
        function = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"function: got {name!r}, which cannot be imported ({error}); expected"
            " 'module:function' on the Python path"
        ) from error
    if not callable(function):
        raise ValueError(
            f"function: got {name!r}, a {type(function).__name__}; expected a function"
        )
    return cast(SampleFunction, function)


def _fingerprint(old: ShardSet, function: str) -> str:
    digest = hashlib.blake2b(digest_size=16, usedforsecurity=False)
    digest.update(repr((describe_shards(old.index), function)).encode())
    # Who mends the function must not get shards of both.
    file = importlib.import_module(function.partition(":")[0]).__file__
    if file is not None:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _find_pattern(names: Sequence[str]) -> NamePattern:
    """Give the pattern of the shards' names: numbers instead of their last digits."""
    digits = list(re.finditer(r"\d+", names[0], re.ASCII))
    if not digits:
        raise ValueError(f"{names[0]}: got a shard's name without a number, expected one")
    last = digits[-1]
    begin, end = (
        text.replace("%", "%%") for text in (names[0][: last.start()], names[0][last.end() :])
    )
    return NamePattern(f"{begin}%0{len(last[0])}d{end}")


def _finish(
    old: ShardSet,
    place: ShardTarget,
    result: SplitMetadata,
    samples: Sequence[Sequence[FoundSample]],
) -> None:
    if result.num_samples == 0:
        place.discard()
        raise ValueError(
            f"function: {result.function!r} dropped all samples of {old.location}; expected one to"
            " be left at least"
        )
    shards = result.shards or ()
    builder = ShardIndexBuilder("tar")
    for shard, found in zip(shards, samples, strict=True):
        for sample in found:
            builder.add_sample(*sample)
        builder.add_shard(Shard(shard.name, shard.size_bytes, shard.md5, shard.crc32c))
    index = builder.build(old.index.classes, old.index.label_space)
    try:
        check_target_keys(
            place, index.names, lambda at: place.store.describe(index.shard_of(at).name)
        )
    except ShardFormatError:
        place.discard()
        raise
    place.finish(index.to_bytes(), None, lambda metadata: metadata.with_split(old.split, result))


# -- shards


@dataclasses.dataclass(frozen=True, slots=True)
class _Recipe:
    """What all shards of a run share."""

    index: ShardIndex
    places: list[Place]
    place: ShardTarget
    function: str


def _map_shard(recipe: _Recipe, number: int) -> tuple[WrittenShard, list[FoundSample]]:
    function = load_function(recipe.function)
    index = recipe.index
    (store, key), shard = recipe.places[number], index.shards[number]
    where = store.describe(key)
    new: list[tuple[FoundSample, int]] = []
    with (
        recipe.place.compose(shard.name) as file,
        HashedFile(file, md5=has_md5s(index)) as target,
    ):
        writer = TarWriter(target)
        for old in _read_shard(recipe, number, where):
            try:
                made = list(_apply(function, old, index.classes))
            except Exception as error:
                # Whatever the user's function raises goes to the user, with its traceback.
                raise _blame(recipe.function, old, where, error) from error
            for key, fields, label in made:
                try:
                    new.append(_write(writer, key, fields, label))
                except ValueError as error:  # names that cannot be; a full disk is another's fault
                    raise _blame(recipe.function, old, where, error) from error
        checksums = writer.close()
        md5 = target.hexdigest()
    found = [
        sample._replace(crcs=SampleCrcs(extent_crc, payload_crc))
        for (sample, payload_crc), extent_crc in zip(new, checksums.samples.tolist(), strict=True)
    ]
    metadata = ShardMetadata(
        name=shard.name,
        num_samples=len(found),
        size_bytes=writer.size_bytes,
        md5=md5,
        crc32c=checksums.tar,
    )
    extents, payloads, crcs = (
        np.array([sample[what] for sample in found], np.int64).reshape(-1, 2) for what in (1, 2, 4)
    )
    return WrittenShard(metadata, extents, payloads, crcs), found


def _read_shard(recipe: _Recipe, number: int, where: str) -> Iterator[Sample]:
    """Yield the samples of a shard, in order, compared with their checksums."""
    positions = np.flatnonzero(recipe.index.shard_numbers == number)
    with contextlib.closing(read_extents(recipe.index, positions, recipe.places)) as pieces:
        for piece in pieces:
            content = io.BytesIO(b"".join((piece.content, END_OF_ARCHIVE)))
            yield from read_samples(content, where)


def _blame(function: str, old: Sample, where: str, error: Exception) -> LoaderError:
    return LoaderError(
        f"{where}: sample {old.key!r}: function {function!r}: {type(error).__name__}: {error}; mend"
        " it, or let it return None to drop the sample"
    )


class _Made(NamedTuple):
    """A sample that the function made."""

    key: str
    fields: dict[str, Buffer]
    label: int | None


def _apply(
    function: SampleFunction, old: Sample, classes: tuple[str, ...] | None
) -> Iterator[_Made]:
    """Yield each sample that the function makes of one."""
    result: Any = function(old.key, dict(old.fields))
    if result is None:
        return
    if isinstance(result, Mapping):
        yield _check_fields(cast("Mapping[Any, Any]", result), old.key, classes)
        return
    if not isinstance(result, (list, tuple)):
        raise TypeError(f"gave a {type(result).__name__}, expected a dict, a list of them, or None")
    for number, fields in enumerate(cast("Sequence[Any]", result)):
        if not isinstance(fields, Mapping):
            raise TypeError(f"gave a list with a {type(fields).__name__}, expected dicts")
        key = f"{old.key}_{number}"
        yield _check_fields(cast("Mapping[Any, Any]", fields), key, classes)


def _check_fields(fields: Mapping[Any, Any], key: str, classes: tuple[str, ...] | None) -> _Made:
    checked: dict[str, Buffer] = {}
    new_key: Any = key
    for field, content in fields.items():
        if field == KEY:
            new_key = content
        elif isinstance(field, str) and isinstance(content, (bytes, bytearray, memoryview)):
            checked[field] = content
        else:
            raise TypeError(
                f"gave {type(content).__name__} as field {field!r}, expected bytes by a name"
            )
    if not isinstance(new_key, str):
        raise TypeError(f"gave a {type(new_key).__name__} as {KEY}, expected a str")
    field = find_field(LABEL_FIELD, checked)
    label = None if field is None else parse_label(checked[field])
    if field is not None and (label is None or (classes is not None and label >= len(classes))):
        expected = "a number" if classes is None else f"0 to {len(classes) - 1}"
        given = bytes(checked[field])[:20]
        raise ValueError(f"gave {given!r} as field {field!r}, expected {expected}")
    return _Made(check_name(new_key), checked, label)


def _write(
    writer: TarWriter, key: str, fields: dict[str, Buffer], label: int | None
) -> tuple[FoundSample, int]:
    """Write a sample; give what its index is to say, and the CRC-32C of its payload."""
    written = writer.write(key, fields)
    found = describe_sample(written, label)
    payload_crc = written.members[found.name.removeprefix(f"{key}.")].crc32c
    assert payload_crc is not None, "the writer has seen it"
    return found, payload_crc
