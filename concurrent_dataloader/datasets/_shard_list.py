"""Find shards, their sizes and their index, before anything is trained."""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concurrent_dataloader.datasets._metadata import (
    SplitFacts,
    check_index,
    find_facts,
    name_classes,
)
from concurrent_dataloader.datasets._places import METADATA_NAME
from concurrent_dataloader.datasets._sample_checks import SampleChecks
from concurrent_dataloader.datasets._shard_samples import ShardList
from concurrent_dataloader.datasets._split import ShardTable
from concurrent_dataloader.errors import AccessDeniedError, IndexFormatError, KeyNotFoundError
from concurrent_dataloader.formats.tar import Sample
from concurrent_dataloader.labels import Classes, LabelSpace
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.shard_names import (
    ShardSet,
    Split,
    expand_shards,
    find_kind,
    find_split,
    has_glob,
    locate_shards,
    match_names,
    split_url,
)
from concurrent_dataloader.stores import open_store, open_writable_store
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.stores.base import SizedStore, Store, WritableStore
from concurrent_dataloader.stores.cache import uncached

PIPE, FAKE = "pipe:", "fake:"

_NUM_HEADS_AT_ONCE = 32
_NUM_FAKES = 1000
_NUMBERING = re.compile(r"[-_.]?\d*(-of-\d+)?(\.[A-Za-z]\w*)*$")

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class FoundShards(NamedTuple):
    """Shards, and what their index and ``metadata.json`` say of them."""

    shards: ShardList

    table: ShardTable | None
    """None without an index."""

    labels: NDArray[np.int32] | None = None
    """Of each sample of the index; None if it has none."""

    classes: Classes | None = None
    """None where nobody says what the labels are."""

    facts: SplitFacts | None = None
    """Of ``metadata.json``; None where it was not looked for, or says nothing of them."""

    num_samples: int | None = None
    """Of shards without an index, as ``metadata.json`` says."""


def find_shards(
    source: Source,
    store: Store | None,
    store_options: dict[str, Any],
    *,
    split: Split | None,
    index: ShardIndex | str | os.PathLike[str] | None,
    allow_pipe: bool,
) -> FoundShards:
    """Find the shards and, where there is an index, their samples.

    With ``index="auto"``, ``metadata.json`` is asked for as the index is, by one request.

    Raises:
        ValueError: The source cannot be used.
        KeyNotFoundError: A shard is not there.
        IndexFormatError: The index is none, or not that of these shards; or ``metadata.json`` is
            damaged, or of others.
    """
    given = [source] if isinstance(source, str | os.PathLike) else source
    texts = [os.fspath(text) for text in given]
    if any(text.startswith(FAKE) for text in texts):
        return _make_up(texts)
    if any(text.startswith(PIPE) for text in texts):
        return FoundShards(_take_commands(texts, allow_pipe), None)
    found, store = _locate(texts, store, store_options)
    found = _choose_split(found, split, ", ".join(texts))
    names = found.names
    shard_index = _open_index(index, store, names, store_options)
    facts = _find_facts(store, names) if isinstance(index, str) and index == "auto" else None
    sizes = _find_sizes(store, names) if None in found.sizes else found.sizes
    shards = ShardList(store, names, sizes)
    if shard_index is None or not shards.has_ranges:
        if shard_index is not None and index != "auto":
            raise ValueError("index: got one for compressed shards, which have no byte ranges")
        if facts is None:
            return FoundShards(shards, None)
        num_samples = _match_facts(facts, shards, texts)
        classes = name_classes(facts.classes, facts.label_space, None)
        return FoundShards(shards, None, None, classes, facts, num_samples)
    if facts is not None:
        check_index(facts, shard_index)
    return _join_index(shards, shard_index, texts)._replace(facts=facts)


def _join_index(shards: ShardList, index: ShardIndex, texts: Sequence[str]) -> FoundShards:
    _refuse_missing([shard.name for shard in index.shards], "the index", shards, texts)
    shards.checks = SampleChecks.of(index)
    shards.extents = index.extents
    table, labels = _match_index(index, shards), index.labels
    if labels is None:
        return FoundShards(shards, table)
    space = LabelSpace(index.label_space or "custom")
    classes = name_classes(index.classes, space, int(labels.max()) + 1)
    return FoundShards(shards, table, labels, classes)


def _locate(
    texts: Sequence[str], store: Store | None, store_options: dict[str, Any]
) -> tuple[ShardSet, Store]:
    """Find the names of the shards, and the store in which they are keys."""
    if store is None:
        found = locate_shards(texts, functools.partial(_list_below, store_options))
        store = open_store(found.root, **store_options)
    elif store_options:
        raise ValueError(
            f"store: got one together with {', '.join(sorted(store_options))}, expected one of the "
            "two"
        )
    else:
        found = locate_shards(texts, functools.partial(_list_in, store))
        begin = "" if found.root == "." else f"{found.root.rstrip('/')}/"
        found = found._replace(names=tuple(begin + name for name in found.names))
    for name in found.names:
        if name.lower().endswith(".zst"):
            raise ValueError(
                f"shards: got {name!r}, expected .tar, .tar.gz, .tar.bz2 or .tar.xz; unpack it"
            )
    return found, store


def _choose_split(found: ShardSet, split: Split | None, where: str) -> ShardSet:
    """Keep the shards of one split; that of a single one is not asked."""
    splits = [find_split(name) for name in found.names]
    if split is None:
        several = sorted({name for name in splits if name is not None})
        if len(several) > 1:
            raise ValueError(
                f"split: got None for {where} with shards of {' and '.join(several)}, expected one "
                "of these, which would be mixed"
            )
        return found
    chosen = [number for number, name in enumerate(splits) if name == split]
    if not chosen:
        raise KeyNotFoundError(
            f"{where}: no shard of {split!r}, expected {split!r} in the names of some; got "
            f"{found.names[0]!r} and {len(found.names) - 1} more"
        )
    return found._replace(
        names=tuple(found.names[number] for number in chosen),
        sizes=tuple(found.sizes[number] for number in chosen),
    )


def _list_below(store_options: dict[str, Any], root: str, prefix: str) -> Iterable[tuple[str, int]]:
    return open_writable_store(root, **store_options).list(prefix)


def _list_in(store: Store, root: str, prefix: str) -> Iterable[tuple[str, int]]:
    if not isinstance(store, WritableStore):
        raise ValueError(
            f"shards: got a folder or a glob in a {type(store).__name__}, which cannot be listed; "
            "name the shards, such as by a brace range"
        )
    begin = "" if root == "." else f"{root}/"
    return ((key.removeprefix(begin), size) for key, size in store.list(begin + prefix))


def _find_sizes(store: Store, names: Sequence[str]) -> list[int | None]:
    """Ask how large each shard is; whoever is not there is named here."""
    if isinstance(store, WritableStore):
        try:
            listed = _list_around(store, names)
        except AccessDeniedError:  # there are keys that may read, and not list
            pass
        else:
            lacking = [name for name in names if name not in listed]
            if lacking:
                more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
                raise KeyNotFoundError(
                    f"{store.describe(lacking[0])}{more}: no such shard, expected the "
                    f"{len(names)} that were named; {len(names) - len(lacking)} of them are there"
                )
            return [listed[name] for name in names]
    if not isinstance(store, SizedStore):
        return [None] * len(names)
    with ThreadPoolExecutor(_NUM_HEADS_AT_ONCE) as executor:
        return [info.size_bytes for info in executor.map(store.head, names)]


def _list_around(store: WritableStore, names: Sequence[str]) -> dict[str, int]:
    """List what begins as the names do, folder by folder."""
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(name.rpartition("/")[0], []).append(name)
    listed: dict[str, int] = {}
    for own in by_folder.values():
        # Of characters, not of folders: what a listing takes.
        prefix = os.path.commonprefix(own)  # noqa: RUF071 - as the comment says
        listed |= dict(store.list(prefix))
    return listed


# -- the index


def _open_index(
    index: ShardIndex | str | os.PathLike[str] | None,
    store: Store,
    names: Sequence[str],
    store_options: dict[str, Any],
) -> ShardIndex | None:
    if index is None or isinstance(index, ShardIndex):
        return index
    text = os.fspath(index)
    if text == "auto":
        return _find_index(store, names)
    if "://" not in text:
        return ShardIndex.load(text)
    root, key = split_url(text)
    return ShardIndex.from_bytes(uncached(open_store(root, **store_options)).get(key), text)


def index_names(name: str) -> list[str]:
    """Give the names that the index of a shard may have: ``train-index.npz``."""
    folder, slash, base = name.rpartition("/")
    stems = [_NUMBERING.sub("", base), find_split(base)]
    return [f"{folder}{slash}{stem}-index.npz" for stem in dict.fromkeys(stems) if stem]


def _find_index(store: Store, names: Sequence[str]) -> ShardIndex | None:
    candidates = [index_names(name) for name in (names[0], names[-1])]
    if candidates[0] != candidates[1]:
        return None  # several splits, or several folders: none holds them all
    for key in candidates[0]:
        try:
            return ShardIndex.from_bytes(uncached(store).get(key), store.describe(key))
        except (KeyNotFoundError, AccessDeniedError):  # a key that may not list is denied
            continue
    return None


def _refuse_missing(named: Iterable[str], by: str, shards: ShardList, texts: Sequence[str]) -> None:
    """Raise if a folder, or a glob, lacks a shard that was named.

    Args:
        named: All that are said to be there.
        by: What says so.
        shards: What was found.
        texts: Where it was looked for.

    Raises:
        KeyNotFoundError: It does. Shards that were named one by one are what was wanted.
    """
    if not all(has_glob(text) or find_kind(text) is None for text in texts):
        return
    names = {name.rpartition("/")[2] for name in named}
    absent = names - {key.rpartition("/")[2] for key in shards.keys}
    for text in texts:
        pattern = text.rpartition("/")[2] if has_glob(text) else "*"
        missing = sorted(match_names(pattern, absent))
        if missing:
            raise KeyNotFoundError(
                f"{text}: no shard {missing[0]!r}, one of {len(missing)} missing of the "
                f"{len(names)} that {by} beside them names; fetch it, or name the "
                "shards that are to be read"
            )


def _match_index(index: ShardIndex, shards: ShardList) -> ShardTable:
    """Find the shards in the index, which names them relative to its folder."""
    numbers = {shard.name: number for number, shard in enumerate(index.shards)}
    found: list[int] = []
    for key, size in zip(shards.keys, shards.sizes, strict=True):
        number = numbers.get(key, numbers.get(key.rpartition("/")[2]))
        where = shards.store.describe(key)
        how = "write the index anew with `concurrent-dataloader index`, or give index=None"
        if number is None:
            raise IndexFormatError(f"{where}: not in the index beside it, expected there; {how}")
        expected = index.shards[number].size_bytes
        if size is not None and size != expected:
            raise IndexFormatError(
                f"{where}: got {size} bytes, expected {expected}, as its index says; fetch it "
                f"again, {how}"
            )
        found.append(number)
    if not index_is_in_order(index):
        raise IndexFormatError(
            f"{shards.store.describe(shards.keys[0])}: got an index whose samples do not stand in "
            "the order of their bytes, expected a whole one, not a part of it"
        )
    return ShardTable.from_index(index, found)


# -- metadata.json


def _find_facts(store: Store, names: Sequence[str]) -> SplitFacts | None:
    folders = {name.rpartition("/")[0] for name in names}
    splits = {find_split(name) for name in names}
    if len(folders) > 1 or len(splits) > 1:
        return None
    (folder,), (split,) = folders, splits
    return find_facts(
        store, f"{folder}/" if folder else "", split, [name.rpartition("/")[2] for name in names]
    )


def _match_facts(facts: SplitFacts, shards: ShardList, texts: Sequence[str]) -> int | None:
    """Compare shards that have no index with what is said of them, and give their samples.

    Returns:
        None where it is not known: an older system's file does not list the shards, so that it
        tells the length of a whole folder alone, and one that lists none of these is of others.

    Raises:
        KeyNotFoundError: A folder, or a glob, lacks one that is listed.
        IndexFormatError: One is not listed, or has another size.
    """
    if facts.shards is None:
        is_whole = all(find_kind(text) is None and not has_glob(text) for text in texts)
        return facts.num_samples if is_whole else None
    names = [key.rpartition("/")[2] for key in shards.keys]
    if facts.shards.keys().isdisjoint(names):
        return None
    how = "one of them is of another run: fetch the set again, pack it anew, or give index=None"
    for shard, (name, size) in enumerate(zip(names, shards.sizes, strict=True)):
        if name not in facts.shards:
            raise IndexFormatError(
                f"{shards.describe(shard)}: not named by {facts.where}, expected there; {how}"
            )
        expected = facts.shards[name].size_bytes
        if size is not None and size != expected:
            raise IndexFormatError(
                f"{shards.describe(shard)}: got {size} bytes, expected {expected}, as "
                f"{facts.where} says; {how}"
            )
    _refuse_missing(facts.shards, METADATA_NAME, shards, texts)
    return sum(facts.shards[name].num_samples for name in names)


def index_is_in_order(index: ShardIndex) -> bool:
    """Tell whether samples stand in the order of the shards and of their bytes."""
    numbers, extents = index.shard_numbers, index.extents
    steps = np.diff(numbers)
    is_after = extents[1:, 0] >= extents[:-1, 1]
    return bool(((steps > 0) | ((steps == 0) & is_after)).all())


# -- shards that are no objects


def _take_commands(texts: Sequence[str], allow_pipe: bool) -> ShardList:
    if not all(text.startswith(PIPE) for text in texts):
        raise ValueError("shards: got commands and names, expected one of the two")
    if not allow_pipe:
        raise ValueError(
            "shards: got 'pipe:', which runs a command in a shell, expected names; give "
            "allow_pipe=True if you trust it"
        )
    commands = [text.removeprefix(PIPE) for text in expand_shards(texts)]
    return ShardList(MemoryStore(), commands, [None] * len(commands), are_commands=True)


def _make_up(texts: Sequence[str]) -> FoundShards:
    number = texts[0].removeprefix(FAKE)
    if len(texts) > 1 or not (number.isdecimal() or not number):
        raise ValueError(f"shards: got {', '.join(map(repr, texts))}, expected 'fake:N' alone")
    count = int(number) if number else _NUM_FAKES
    sample = Sample("fake", {"jpg": _draw_photo(), "cls": b"0"}, ByteRange(0, 1))
    shards = ShardList(MemoryStore(), [f"{FAKE}{count}"], [count], repeated=sample)
    return FoundShards(shards, ShardTable.from_counts([count]), None)


def _draw_photo() -> bytes:
    """Make a JPEG file of 500 x 375 pixels and about 100 kB, ImageNet's usual size."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
    pixels = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()
