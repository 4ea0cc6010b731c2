"""What ``metadata.json`` beside shards says of a split, and whether shards and index agree with it.

It is read loosely: that of an older system has lengths alone, and what another program wrote under
this name says nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import orjson

from concurrent_dataloader.datasets._places import METADATA_NAME
from concurrent_dataloader.errors import AccessDeniedError, IndexFormatError, KeyNotFoundError
from concurrent_dataloader.labels import Classes, LabelSpace, imagenet_classes
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.stores.base import Store
from concurrent_dataloader.stores.cache import uncached

log = logging.getLogger(__name__)

_OLD_NAMES = {"val": "validation"}


class ShardFacts(NamedTuple):
    """What is said of a shard."""

    num_samples: int
    size_bytes: int


class SplitFacts(NamedTuple):
    """What is said of a split; None where nothing is, or `LabelSpace.CUSTOM`."""

    where: str
    """Names the file in errors."""

    split: str
    num_samples: int | None
    shards: Mapping[str, ShardFacts] | None
    """By name, in their order."""

    image_size: tuple[int, int] | None
    """Height and width of pixels without a header."""

    baked_steps: tuple[str, ...]
    """What was done to the images before they were packed, such as ``Resize(256)``."""

    label_base: int | None
    """What records call the first class."""

    classes: tuple[str, ...] | None
    label_space: LabelSpace


def find_facts(
    store: Store, folder: str, split: str | None, names: Sequence[str]
) -> SplitFacts | None:
    """Read what is said of a split, by one request.

    Args:
        store: Where the shards lie.
        folder: Theirs in it, with a slash at its end if it has a name.
        split: Which one; None: that which names the first of ``names``.
        names: Of the shards, in the folder.

    Returns:
        None where there is no such file, or it does not speak of this split.

    Raises:
        IndexFormatError: It is damaged.
        StoreError: It cannot be read.
    """
    key = f"{folder}{METADATA_NAME}"
    try:
        raw = uncached(store).get(key)
    except KeyNotFoundError:
        return None
    except AccessDeniedError as error:  # so is a missing one, to those who may not list
        log.info("went on without what %s may say: %s", METADATA_NAME, error)
        return None
    where = store.describe(key)
    try:
        content = cast("dict[str, Any]", orjson.loads(bytes(raw)))
        splits: dict[str, Any] = content.get("splits") or {}
        if split is None:
            split = _find_split(splits, names)
        if split is None:
            return None
        return _read_split(content, splits.get(split) or {}, split, where)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise IndexFormatError(
            f"{where}: no metadata of shards ({error}); write it anew"
        ) from error


def _find_split(splits: Mapping[str, Any], names: Sequence[str]) -> str | None:
    for split, said in splits.items():
        if names and any(shard["name"] == names[0] for shard in said.get("shards") or ()):
            return split
    return None


def _read_split(
    content: Mapping[str, Any], said: Mapping[str, Any], split: str, where: str
) -> SplitFacts | None:
    old_name = _OLD_NAMES.get(split, split)
    length = said.get("num_samples", content.get(f"{old_name}_length"))
    if not said and not isinstance(length, int):
        return None
    listed: Sequence[Mapping[str, Any]] | None = said.get("shards")
    size, classes = said.get("image_size"), said.get("classes")
    old_steps = content.get("transform_pipeline", ())
    old_steps = content.get(f"{old_name}_transform_pipeline", old_steps)
    return SplitFacts(
        where,
        split,
        length if isinstance(length, int) else None,
        None
        if listed is None
        else {
            shard["name"]: ShardFacts(int(shard["num_samples"]), int(shard["size_bytes"]))
            for shard in listed
        },
        None if size is None else (int(size[0]), int(size[1])),
        tuple(map(str, said.get("transforms", old_steps))),
        said.get("label_base"),
        None if classes is None else tuple(classes),
        LabelSpace(said.get("label_space") or LabelSpace.CUSTOM.value),
    )


def check_index(facts: SplitFacts, index: ShardIndex) -> None:
    """Compare what is said with the index that lies beside the same shards.

    Raises:
        IndexFormatError: They speak of other shards, or of another number of samples.
    """
    how = "one of them is of another run, pack or index the shards anew"
    if facts.num_samples is not None and facts.num_samples != len(index):
        raise IndexFormatError(
            f"{facts.where}: says {facts.num_samples} samples of {facts.split!r}, but the index has"
            f" {len(index)}; {how}"
        )
    if facts.shards is None:
        return
    counts = np.bincount(index.shard_numbers, minlength=len(index.shards)).tolist()
    indexed = {shard.name: count for shard, count in zip(index.shards, counts, strict=True)}
    for name in facts.shards:
        if name not in indexed:
            raise IndexFormatError(f"{facts.where}: names {name}, but the index does not; {how}")
    for name, count in indexed.items():
        if name not in facts.shards:
            raise IndexFormatError(
                f"{facts.where}: does not name {name}, but the index does; {how}"
            )
        if facts.shards[name].num_samples != count:
            raise IndexFormatError(
                f"{facts.where}: says {facts.shards[name].num_samples} samples in {name}, but the "
                f"index has {count}; {how}"
            )


def name_classes(
    names: Sequence[str] | None, label_space: LabelSpace, num_labels: int | None
) -> Classes | None:
    """Make classes of what is said of the labels; None if nothing is.

    Args:
        names: Name of each label.
        label_space: What the labels mean.
        num_labels: Where there are no names, so many labels; None: not known.
    """
    if names is None and label_space is not LabelSpace.CUSTOM:
        return Classes.imagenet(label_space)
    if names is None and num_labels is None:
        return None
    known = dict(imagenet_classes())
    values = names or [str(label) for label in range(num_labels or 0)]
    return Classes(
        {value: label for label, value in enumerate(values)},
        names={label: known.get(value, value) for label, value in enumerate(values)},
        label_space=label_space,
        id_base=label_space.first_id,
        where="the index of shards",
    )
