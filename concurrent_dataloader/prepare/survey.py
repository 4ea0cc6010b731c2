"""What is known of samples before they are packed: keys, sizes, and that no two share a key."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.formats.fields import LABEL_FIELD
from concurrent_dataloader.formats.tar import BLOCK_BYTES, check_name, split_name
from concurrent_dataloader.formats.tar_writer import encode_header
from concurrent_dataloader.prepare.plan import find_duplicate, index_digits
from concurrent_dataloader.prepare.shard_settings import ShardSettings
from concurrent_dataloader.prepare.shard_writing import Recipe, encode_boxes
from concurrent_dataloader.prepare.source import Source
from concurrent_dataloader.prepare.target import ShardTarget

_FORMAT_VERSION = 1
_PLAIN_NAME_BYTES = 100
_PLAIN_SIZE_BYTES = 8 << 30


class Survey(NamedTuple):
    """What is known of a source before it is read."""

    key_hashes: NDArray[np.uint64]
    """Of the key of each sample, (N,)."""

    sizes: NDArray[np.int64]
    """Of each sample's file, in bytes, (N,); -1 where the source does not know."""

    json_sizes: NDArray[np.int64] | None
    """Of the JSON of each sample's boxes, in bytes, (N,); None if boxes are not packed."""

    fingerprint: str
    """Stands for names, labels and sizes of the source, and for the settings."""


def survey_source(source: Source, settings: ShardSettings) -> Survey:
    """Look at the names of all samples, and check that each gets a key of its own.

    Raises:
        ValueError: There is no sample, two would get the same key, a name cannot be one in a
            shard, or a label is not among the classes.
    """
    num_samples = len(source)
    if num_samples == 0:
        raise ValueError(
            "source: got no samples, expected one at least; check its path and the endings that"
            " count as samples"
        )
    digits = index_digits(num_samples)
    hashes = np.empty(num_samples, np.uint64)
    sizes = np.empty(num_samples, np.int64)
    json_sizes = np.empty(num_samples, np.int64) if settings.boxes else None
    digest = hashlib.blake2b(repr((_FORMAT_VERSION, settings)).encode(), digest_size=16)
    digest.update(repr((source.classes, source.label_space)).encode(errors="surrogateescape"))
    num_classes = None if source.classes is None else len(source.classes)
    for position in range(num_samples):
        name = source.name(position)
        # The set of keys that are numbers is the same in any order.
        hashes[position] = _hash_key(_check_key(settings, name, position, digits))
        size = source.size_bytes(position)
        sizes[position] = -1 if size is None else size
        label = source.label(position)
        if label is not None and (label < 0 or (num_classes is not None and label >= num_classes)):
            raise ValueError(f"{name!r}: got label {label}, expected one of {num_classes} classes")
        boxes = b""
        if json_sizes is not None:
            boxes = encode_boxes(source.boxes(position))
            json_sizes[position] = len(boxes)
        line = f"{name}\0{sizes[position]}\0{label}\0".encode(errors="surrogateescape")
        digest.update(line + boxes + b"\n")
    same = find_duplicate(hashes)
    if same is not None:
        names = [source.name(position) for position in same]
        raise ValueError(
            f"{names[0]!r} and {names[1]!r}: both get the key"
            f" {settings.key(names[0], same[0], digits)!r}, expected one for each; rename one,"
            " or choose another key style: 'index' numbers them"
        )
    return Survey(hashes, sizes, json_sizes, digest.hexdigest())


def check_splits(splits: Sequence[tuple[Source, ShardSettings]]) -> None:
    """Make sure, before several splits are written, that no two of their samples share a key.

    Raises:
        ValueError: Two do, or two splits have the same names for their shards.
    """
    patterns = [settings.names.pattern for _, settings in splits]
    for pattern in patterns:
        if patterns.count(pattern) > 1:
            raise ValueError(
                f"pattern: got {pattern!r} for more than one split, expected one for each; write"
                " them one by one, or into folders of their own"
            )
    seen: dict[str, NDArray[np.uint64]] = {}
    for source, settings in splits:
        survey = survey_source(source, settings)
        for split, hashes in seen.items():
            _refuse_common(settings, survey, source, split, hashes)
        seen[settings.split] = survey.key_hashes


def _check_key(settings: ShardSettings, name: str, place: int, digits: int) -> str:
    key, field = settings.key(name, place, digits), settings.payload_field(name)
    if split_name(f"{key}.{field}") != (key, field) or field in ("cls", "json"):
        raise ValueError(
            f"{name!r}: would be called {key!r} with the field {field!r}, which cannot be read"
            " back; give a field such as 'jpg', or choose the key style 'index'"
        )
    check_name(key)
    return key


def _hash_key(key: str) -> int:
    try:
        raw = key.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key!r}: got a name that is not UTF-8; rename the file, or choose the key style"
            " 'index'"
        ) from error
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _refuse_common(
    settings: ShardSettings,
    survey: Survey,
    source: Source,
    other_split: str,
    others: NDArray[np.uint64],
) -> None:
    found = np.flatnonzero(np.isin(survey.key_hashes, others))
    if len(found):
        position = int(found[0])
        key = settings.key(source.name(position), position, index_digits(len(source)))
        raise ValueError(
            f"{source.name(position)!r} of split {settings.split!r}: gets the key {key!r}, which"
            f" split {other_split!r} has too; give a key prefix, such as '{settings.split}/'"
        )


def check_other_splits(
    place: ShardTarget, survey: Survey, source: Source, settings: ShardSettings
) -> None:
    """Make sure that no sample has a key of another split that the target holds.

    Raises:
        ValueError: One has.
        IndexFormatError: The index of another split is damaged.
    """
    for split, index in place.read_other_indexes():
        keys = (split_name(index.names.key(position)) for position in range(len(index)))
        hashes = np.array([_hash_key(parts[0]) for parts in keys if parts], np.uint64)
        _refuse_common(settings, survey, source, split, hashes)


def count_tar_bytes(recipe: Recipe, survey: Survey, position: int) -> int:
    """Tell how much of a tar a sample takes whose file is packed as it is."""
    source, settings = recipe.source, recipe.settings
    name, label = source.name(position), source.label(position)
    sizes = {settings.payload_field(name): int(survey.sizes[position])}
    if label is not None:
        sizes[LABEL_FIELD] = len(str(label))
    if survey.json_sizes is not None:
        sizes["json"] = int(survey.json_sizes[position])
    key = settings.key(name, position, recipe.digits)
    return sum(_member_bytes(f"{key}.{field}", size) for field, size in sizes.items())


def _member_bytes(name: str, size_bytes: int) -> int:
    """Tell how much of a tar a member takes."""
    is_plain = len(name) <= _PLAIN_NAME_BYTES and name.isascii() and size_bytes < _PLAIN_SIZE_BYTES
    header_bytes = BLOCK_BYTES if is_plain else len(encode_header(name, size_bytes))
    return header_bytes + size_bytes + -size_bytes % BLOCK_BYTES
