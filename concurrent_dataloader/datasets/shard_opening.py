"""Find the index of packed shards by a path or URL, and check that it is theirs."""

from __future__ import annotations

import inspect
import itertools
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from concurrent_dataloader.datasets._boxes import BoxSource, look_up_boxes
from concurrent_dataloader.datasets._metadata import check_index, find_facts
from concurrent_dataloader.datasets._places import (
    INDEX_SUFFIX,
    SPLITS,
    Place,
    is_local,
    local_path,
    look_into,
)
from concurrent_dataloader.datasets.shards import ShardDataset
from concurrent_dataloader.errors import (
    KeyNotFoundError,
    MissingIndexError,
    MissingSplitError,
    ShardFormatError,
)
from concurrent_dataloader.labels import Classes
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.shard_names import (
    UNFINISHED,
    check_finished,
    find_kind,
    find_split,
    has_glob,
    locate_shards,
    split_url,
)
from concurrent_dataloader.stores import SizedStore, Store, WritableStore, open_store
from concurrent_dataloader.stores.cache import uncached

_STORE_OPTIONS = frozenset(inspect.signature(open_store).parameters) - {"url", "credentials"}
_HEAD_THREADS = 32


def open_shards(
    location: str | os.PathLike[str],
    *,
    index_file: str | os.PathLike[str] | None = None,
    split: str | None = None,
    classes_file: str | os.PathLike[str] | None = None,
    s3_credential_file: str | os.PathLike[str] | None = None,
    check: bool = True,
    boxes: BoxSource | bool | None = False,
    **options: Any,
) -> ShardDataset:
    """Open packed shards for random access, by the index of byte ranges beside them.

    Args:
        location: The folder of the shards, ``s3://bucket[/prefix]`` or ``http(s)://host/folder``;
            the index in it, ``.../train-index.npz``; or shards of it, as brace range or glob.
        index_file: An index on this machine, instead of the one beside the shards.
        split: Which index to take: ``train-index.npz`` for "train". None: the only one, else that
            of "train".
        classes_file: JSON classes, where others than those of the index are to count.
        s3_credential_file: As in `S3Dataset`.
        check: Whether to compare the shards that are there with the index, by one listing (or, on
            a web server, a HEAD each).
        boxes: Whether items are ``((image, box), label)``, with the boxes that the shards hold, as
            `ShardDataset` says; or a table or XML files with those of names, as for
                `ScratchDataset`.
        options: What `ShardDataset` takes, and what `open_store` takes, such as ``endpoint_url``.
            ``baked_steps`` and ``raw_size`` are those that ``metadata.json`` beside an index says;
            ``baked_steps=()`` keeps the transform whole.

    Raises:
        MissingIndexError: There are shards, but no index beside them.
        MissingSplitError: There are shards or indexes, but of other splits; says of which.
        FileNotFoundError: There are none, or a shard that the index names is missing; says which.
        ShardFormatError: A shard has another size than the index says: one of them is stale.
        IndexFormatError: The index is malformed, or ``metadata.json`` speaks of another one.
        ValueError: The boxes are none, or none of them belongs to a sample.
        StoreError: The place cannot be read.
    """
    text = os.fspath(location)
    settings = take_store_options(options) | {"credentials": s3_credential_file}
    root, named = _split_location(text, settings)
    if named is not None and split is None:
        splits = {find_split(name) for name in named}
        split = splits.pop() if len(splits) == 1 else None
    store = open_place(root, settings)
    if index_file is not None:
        where = os.fspath(index_file)
        index = ShardIndex.load(where)
    else:
        key = (
            split_url(text)[1]
            if text.endswith(".npz")
            else _find_index(text, root, store, split, settings)
        )
        if "/" in key:  # in the split's own folder
            root, key = f"{root.rstrip('/')}/{key.rpartition('/')[0]}", key.rpartition("/")[2]
            store = open_place(root, settings)
        where = store.describe(key)
        index = ShardIndex.from_bytes(uncached(store).get(key), where)
        split = split or find_split(key) or key.removesuffix(f"-{INDEX_SUFFIX}")
        _apply_metadata(store, index, split, options)
    if check:
        check_shards(index, store, where)
    if named is not None:
        index = _select_shards(index, named, where)
    if classes_file is not None:
        options["classes"] = Classes.load(classes_file, label_rule=options.get("label_rule"))
    if not isinstance(boxes, bool):
        found = look_up_boxes(boxes, index.names, lambda url: open_place(url, settings))
        options["boxes"] = False if found is None else found
    else:
        options["boxes"] = boxes
    return ShardDataset(index, store, index_name=where, **options)


def take_store_options(options: dict[str, Any]) -> dict[str, Any]:
    """Move what `open_store` takes out of ``options``."""
    return {name: options.pop(name) for name in _STORE_OPTIONS & options.keys()}


def open_place(root: str, settings: dict[str, Any]) -> Store:
    """Open the store at a path or URL."""
    return open_store(local_path(root) if is_local(root) else root, **settings)


def names_shards(text: str) -> bool:
    """Tell whether a text names shards, not the place where they lie."""
    return find_kind(text) is not None or "{" in text or has_glob(text)


def _split_location(text: str, settings: dict[str, Any]) -> tuple[str, Sequence[str] | None]:
    """Part a location into the root, and the shards that it names, if any."""
    if text.endswith(".npz"):
        return split_url(text)[0], None
    if (is_local(text) and local_path(text).is_dir()) or not names_shards(text):
        return text, None

    def list_objects(root: str, prefix: str) -> Iterable[tuple[str, int]]:
        store = open_place(root, settings)
        if not isinstance(store, WritableStore):
            raise ValueError(f"{root}: cannot be listed, expected a brace range instead of a glob")
        return store.list(prefix)

    shards = locate_shards(text, list_objects)
    return shards.root, shards.names


def _find_index(
    text: str, root: str, store: Store, split: str | None, settings: Mapping[str, Any]
) -> str:
    """Give the key of the index; with a slash, if it lies in the folder of its split."""
    place = look_into(root, store)
    if place is None:
        return _probe_index(text, root, store, split, settings)
    key = choose_index(place.indexes, split)
    if key is not None:
        return key
    if isinstance(store, WritableStore):  # else indexes of parts of sets would be advised
        check_finished((info.key for info in itertools.islice(store.list(UNFINISHED), 1)), root)
    folder = split or next((name for name in SPLITS if name in place.folders), None)
    if not place.indexes and folder in place.folders:
        inner = f"{root.rstrip('/')}/{folder}"
        names = _names_below(inner, f"{folder}/", store)
        below = [f"{folder}/{name}" for name in names if name.endswith(INDEX_SUFFIX)]
        if below:
            return below[0]
        if not place.shards and any(find_kind(name) for name in names):
            root, split = inner, folder
            place = Place(tuple(names), (), None)
    error = _missing_index(root, place, split, settings)
    if isinstance(error, MissingIndexError) and names_shards(text):
        error.location = text  # those that were named, and no others
    raise error


def _names_below(root: str, prefix: str, store: Store) -> list[str]:
    """Give the names in a folder of a place; of a bucket, what a page of the listing has."""
    if is_local(root):
        found = look_into(root, store)
        return [] if found is None else list(found.files)
    assert isinstance(store, WritableStore), "what was listed can be listed"
    keys = (info.key.removeprefix(prefix) for info in itertools.islice(store.list(prefix), 1000))
    return [key for key in keys if "/" not in key]


def choose_index(names: Sequence[str], split: str | None) -> str | None:
    """Choose among the names of indexes that of a split; None if there is none, or a doubt."""
    if split is None and len(names) == 1:
        return names[0]
    wanted = split or "train"
    exact = f"{wanted}-{INDEX_SUFFIX}"
    if exact in names:
        return exact
    fitting = [name for name in names if find_split(name) == wanted]
    if len(fitting) == 1:
        return fitting[0]
    return names[0] if len(names) == 1 and find_split(names[0]) is None else None


def _probe_index(
    text: str, root: str, store: Store, split: str | None, settings: Mapping[str, Any]
) -> str:
    """Ask a web server for the usual names."""
    names = [f"{name}-{INDEX_SUFFIX}" for name in ([split] if split else SPLITS)]
    for name in names:
        try:
            uncached(store).get(name)
        except KeyNotFoundError:
            continue
        return name
    missing = f"{root}: no index of shards, looked for {', '.join(names)}; give its URL, or "
    if not names_shards(text):
        raise KeyNotFoundError(f"{missing}index_file")
    command = _index_command(text, settings, names[0])
    raise _unindexed(
        text,
        f"{missing}write it with `{command}`, which reads each shard once, and pass"
        f" index_file={names[0]!r}",
    )


def _missing_index(
    root: str, place: Place, split: str | None, settings: Mapping[str, Any]
) -> KeyNotFoundError:
    wanted = [name for name in place.shards if find_split(name) == (split or "train")]
    others = {find_split(name) for name in place.shards}
    if place.indexes and not wanted:
        return missing_split(root, "index", split or "train", place.indexes)
    if split is not None and others and None not in others and split not in others:
        return missing_split(root, "shard", split, place.shards)
    shards = wanted if place.indexes else place.shards
    if not shards:
        return KeyNotFoundError(f"{root}: no shards and no index of them; check the path")
    if all(find_kind(name) == "compressed tar" for name in shards):
        return _unindexed(
            root,
            f"{root}: {len(shards)} compressed tars, in which no sample has a byte range; convert "
            "them with `concurrent-dataloader shard`",
        )
    name = f"{split or _first_split(shards) or 'train'}-{INDEX_SUFFIX}"
    place_of_index = f"{root.rstrip('/')}/{name}"
    if is_local(root):
        command = _index_command(root, settings, place_of_index)
    else:
        command = _index_command(root, settings, name, "--upload", place_of_index)
    return _unindexed(
        root,
        f"{root}: {len(shards)} shards such as {shards[0]} without an index of byte ranges; write "
        f"it once with `{command}`, which reads {'headers' if is_local(root) else 'all'} of them",
    )


def missing_split(
    where: str, what: str, split: str, names: Sequence[str], *, alone: str = "the index itself"
) -> MissingSplitError:
    """Make the error of a split of which there is nothing: what there is, and what to give."""
    found = {find_split(name) for name in names}
    splits = tuple(name for name in SPLITS if name in found)
    shown = f"{', '.join(names[:3])}{' ...' * (len(names) > 3)}"
    there = f"split={' or '.join(map(repr, splits))}" if splits else "no split"
    error = MissingSplitError(
        f"{where}: no {what} of split {split!r} among {shown}; give {there}, or {alone}"
    )
    error.splits = splits
    return error


def _unindexed(location: str, message: str) -> MissingIndexError:
    """Add what programs may do instead; the trainer shows the message alone, and says its own."""
    error = MissingIndexError(message)
    error.location = location
    error.add_note("StreamedShards reads shards front to back without an index")
    return error


def _first_split(shards: Sequence[str]) -> str | None:
    found = {find_split(name) for name in shards}
    return next((name for name in SPLITS if name in found), None)


def _index_command(source: str, settings: Mapping[str, Any], output: str, *more: str) -> str:
    """Write the command line that indexes shards, and reaches them as the caller does."""
    flags = ("endpoint_url", "credentials", "region", "client")
    words = ["concurrent-dataloader", "index", source, "--output", output, *more]
    for flag in flags:
        if isinstance(settings.get(flag), str | os.PathLike):
            words += [f"--{flag.replace('_', '-')}", os.fspath(settings[flag])]
    return shlex.join([*words, "--anonymous"] if settings.get("anonymous") else words)


def _apply_metadata(store: Store, index: ShardIndex, split: str, options: dict[str, Any]) -> None:
    """Compare the index with ``metadata.json``, and take how the images were made from it."""
    facts = find_facts(store, "", split, [shard.name for shard in index.shards])
    if facts is None:
        return
    check_index(facts, index)
    if facts.image_size is not None:
        options.setdefault("raw_size", facts.image_size)
    if facts.baked_steps:
        options.setdefault("baked_steps", facts.baked_steps)


def check_shards(index: ShardIndex, store: Store, where: str) -> None:
    """Compare the shards that are there with what an index says of them.

    Raises:
        KeyNotFoundError: One is missing; names the first.
        ShardFormatError: One has another size.
        StoreError: They cannot be listed.
    """
    names = [shard.name for shard in index.shards]
    if isinstance(store, WritableStore):
        begin = os.path.commonprefix(names)  # noqa: RUF071 - keys, no paths
        last = max(names)
        listed = itertools.takewhile(lambda info: info.key <= last, store.list(begin))
        sizes: dict[str, int] = dict(listed)
    elif isinstance(store, SizedStore):
        sizes = _head_all(store, names)
    else:
        return
    missing = [name for name in names if name not in sizes]
    if missing:
        raise KeyNotFoundError(
            f"{store.describe(missing[0])}: no such shard, one of {len(missing)} missing of the "
            f"{len(names)} in {where}; copy it there, or write the index anew"
        )
    for shard in index.shards:
        if sizes[shard.name] != shard.size_bytes:
            raise ShardFormatError(
                f"{store.describe(shard.name)}: got {sizes[shard.name]} bytes, expected "
                f"{shard.size_bytes} as {where} says; fetch it again, or write the index anew"
            )


def _head_all(store: SizedStore, names: Sequence[str]) -> dict[str, int]:
    def size_of(name: str) -> int | None:
        try:
            return store.head(name).size_bytes
        except KeyNotFoundError:
            return None

    with ThreadPoolExecutor(_HEAD_THREADS) as threads:
        sizes = zip(names, threads.map(size_of, names), strict=True)
        return {name: size for name, size in sizes if size is not None}


def _select_shards(index: ShardIndex, names: Sequence[str], where: str) -> ShardIndex:
    """Keep the samples of some shards, in the order of the index."""
    known = {shard.name: number for number, shard in enumerate(index.shards)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise KeyNotFoundError(
            f"{unknown[0]}: no such shard in {where}, which has {len(known)}, {min(known)} to "
            f"{max(known)}; write the index anew"
        )
    numbers = [known[name] for name in names]
    return index.select(np.flatnonzero(np.isin(index.shard_numbers, numbers)))
