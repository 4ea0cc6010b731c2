"""Copy a data set from one store to another: many objects at once, again where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from typing_extensions import Buffer

from concurrent_dataloader.errors import KeyNotFoundError, LoaderError, StoreError
from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.index import is_folder, split_url
from concurrent_dataloader.prepare.made_folders import make_folders
from concurrent_dataloader.prepare.parallel import ByteBudget, call_concurrently
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_names import DESCRIPTIONS, METADATA_NAME, check_finished
from concurrent_dataloader.stores import Store, WritableStore, open_store
from concurrent_dataloader.stores.base import ObjectInfo, SizedStore

_PART_BYTES = 64 << 20
"""A larger object is read in parts of this size, each with a deadline of its own."""

_MEMORY_BYTES = 1 << 30
"""Bodies in memory at once, in all; one larger object travels alone."""


_DISTRIBUTED = re.compile(r"distributed/\d+-instances/")


class CopyItem(NamedTuple):
    """An object that is to be copied under its own key."""

    key: str
    size_bytes: int | None
    """None: the source is asked."""


class Copied(NamedTuple):
    """What became of one object."""

    key: str
    size_bytes: int
    is_skipped: bool
    """It was there already."""

    error: LoaderError | OSError | None
    """Why it is not there now."""


class CopyReport(NamedTuple):
    """What became of all of them."""

    num_copied: int
    num_skipped: int
    num_failed: int
    copied_bytes: int
    """Of those that were not there already."""

    duration_s: float
    held_back: tuple[str, ...] = ()
    """What describes the others, and was not copied since some of them failed; not in counts."""


def items_of_index(index: Index) -> Iterator[CopyItem]:
    """Yield the objects of an index, each key once, in its order."""
    seen: set[str] = set()
    for position, key in enumerate(index.keys()):
        if key not in seen:
            seen.add(key)
            yield CopyItem(key, index.size_bytes(position))


def items_below(source: WritableStore) -> Iterator[CopyItem]:
    """Yield all objects of a store, as it lists them, but the markers of folders.

    Raises:
        ShardFormatError: Shards are being written there, or a run that did was stopped.
    """
    for info in source.list():
        check_finished([info.key], source.describe(""))
        if not (info.key.endswith("/") and info.size_bytes == 0):
            yield CopyItem(info.key, info.size_bytes)


def copy_objects(
    items: Iterable[CopyItem],
    source: SizedStore,
    target: WritableStore,
    *,
    concurrency: int = 32,
    verify: bool = False,
    on_object: Callable[[Copied], None] = lambda copied: None,
) -> CopyReport:
    """Copy objects from one store to another, each under its own key.

    What describes other objects is copied behind them, and only if none of them failed: indexes of
    shards, and ``metadata.json`` last. Where it lies, all that it speaks of is there.

    What the target has with the same size is left as it is, so that a copy goes on where one was
    stopped; if the target's metadata or indexes are not the source's, contents are compared. The
    size of each copy is asked for after it was written. One that fails does not stop the others.
    Objects become visible whole. Memory is bounded by 1 GiB, or the largest object, and does not
    grow with their number.

    Args:
        items: The objects.
        source: Where they are.
        target: Where they are to be.
        concurrency: Objects under way at once.
        verify: Whether the content is compared, by MD5 of what is read back: of objects that are
            there already, and of those copied.
        on_object: Told of each object, in this thread, in the order in which they are done.

    Raises:
        StoreError: The objects, or the target, cannot be listed.
        ValueError: ``concurrency`` is less than 1.
    """
    begun_s = time.monotonic()
    # Asking an empty target for each object would double the requests of a first copy.
    is_fresh = next(iter(target.list()), None) is None
    # Shards of other data may well have the same size; what describes them has not.
    verify = verify or (not is_fresh and _describes_others(source, target))
    copier = _Copier(source, target, is_fresh=is_fresh, verify=verify)
    counts = {"copied": 0, "skipped": 0, "failed": 0}
    copied_bytes = 0
    descriptions: list[CopyItem] = []
    metadata: list[CopyItem] = []
    held_back: list[str] = []

    def described() -> Iterator[CopyItem]:
        for item in items:
            name = item.key.rpartition("/")[2]
            if name == METADATA_NAME:
                metadata.append(item)
            elif name.endswith(DESCRIPTIONS):
                descriptions.append(item)
            else:
                yield item

    for some in (described(), descriptions, metadata):
        if counts["failed"]:
            held_back += [item.key for item in some]
            continue
        with contextlib.closing(call_concurrently(copier.copy, some, concurrency)) as results:
            for copied in results:
                if copied.error is not None:
                    counts["failed"] += 1
                elif copied.is_skipped:
                    counts["skipped"] += 1
                else:
                    counts["copied"] += 1
                    copied_bytes += copied.size_bytes
                on_object(copied)
    return CopyReport(
        counts["copied"],
        counts["skipped"],
        counts["failed"],
        copied_bytes,
        time.monotonic() - begun_s,
        tuple(held_back),
    )


def copy_to_folder(
    url: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    index_file: str | os.PathLike[str] | None = None,
    concurrency: int = 32,
    open_root: Callable[[str], Store] = open_store,
    on_object: Callable[[Copied], None] = lambda copied: None,
) -> CopyReport:
    """Copy a data set to a folder of this machine, to be read from there; skips what is there.

    What `distribute` made of shards, ``distributed/N-instances/``, is left out: it holds samples of
    the shards again, for loaders that cannot share them.

    The report's ``duration_s`` is the time that this took, to be told beside the time of training.

    Args:
        url: Where the data set is: ``s3://bucket[/prefix]``, a web server's folder, or a folder.
        folder: Where it is to be; made if it is not there.
        index_file: Copies what this index names, and not all that lies below ``url``.
        concurrency: Objects under way at once.
        open_root: Opens the store at ``url``.
        on_object: As in `copy_objects`.

    Raises:
        StoreError: An object could not be copied; the first one's error, after all others are done.
        ValueError: Without an index, ``url`` is a web server, which cannot be listed.
    """
    failures: list[Copied] = []

    def collect(copied: Copied) -> None:
        if copied.error is not None:
            failures.append(copied)
        on_object(copied)

    with (
        make_folders(Path(folder).expanduser()),
        contextlib.closing(open_root(os.fspath(url))) as source,
        contextlib.closing(open_store(folder)) as target,
    ):
        assert isinstance(target, WritableStore), "a folder can be written"
        report = copy_objects(
            (
                item
                for item in find_items(source, os.fspath(url), index_file)
                if not _DISTRIBUTED.match(item.key)
            ),
            check_sized(source, os.fspath(url)),
            target,
            concurrency=concurrency,
            on_object=collect,
        )
    if failures:
        first = failures[0]
        raise StoreError(
            f"{os.fspath(url)}: {len(failures)} objects could not be copied, the first one is "
            f"{first.key!r}: {first.error}"
        ) from first.error
    return report


def find_items(
    source: Store, where: str, index_file: str | os.PathLike[str] | None
) -> Iterator[CopyItem]:
    """Yield what an index names, or all that lies in a store if there is none.

    Raises:
        ValueError: There is no index, and the store cannot be listed.
        IndexFormatError: It is no index.
    """
    if index_file is not None:
        return items_of_index(Index.load(index_file))
    if isinstance(source, WritableStore):
        return items_below(source)
    raise ValueError(f"{where}: cannot be listed; give an index of its objects")


def check_sized(source: Store, where: str) -> SizedStore:
    """Give back a store that tells the sizes of objects.

    Raises:
        ValueError: It does not.
    """
    if not isinstance(source, SizedStore):
        raise ValueError(f"{where}: its store has no head(), which a copy needs")
    return source


class IndexPlace(NamedTuple):
    """An index file on this machine, and its key below the root of the data set."""

    path: Path
    key: str


def place_index(index: str, source: str) -> IndexPlace:
    """Say which key a local index file gets in a copy: its own if it lies below the source.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(index)
    if not path.is_file():
        raise FileNotFoundError(f"{index}: no such index file; write it with `index`, or check it")
    if is_folder(source):
        root = Path(source.removeprefix("file://")).expanduser().absolute()
        with contextlib.suppress(ValueError):
            return IndexPlace(path, path.absolute().relative_to(root).as_posix())
    return IndexPlace(path, path.name)


def index_key_of_url(index: str, source: str) -> str:
    """Give the key below ``source`` of an index that is an object of the same bucket.

    Raises:
        ValueError: It does not lie below ``source``.
    """
    parts, root = split_url(index), split_url(source)
    prefix = f"{root.key.rstrip('/')}/" if root.key else ""
    if parts.root != root.root or not parts.key.startswith(prefix) or parts.key == prefix:
        raise ValueError(f"--index: got {index!r}, expected a local file, or a URL below {source}")
    return parts.key.removeprefix(prefix)


def _describes_others(source: Store, target: Store) -> bool:
    """Tell whether what the target's metadata or indexes speak of is not what the source has."""
    for name in (METADATA_NAME, *(f"{split}-index.npz" for split in ("train", "val", "test"))):
        there = _read_small(target, name)
        if there is not None and there != _read_small(source, name):
            return True
    return False


def _read_small(store: Store, name: str) -> bytes | None:
    try:
        return bytes(store.get(name))
    except KeyNotFoundError:
        return None


class _Copier:
    """Copies one object at a time; called from many threads."""

    def __init__(
        self, source: SizedStore, target: WritableStore, *, is_fresh: bool, verify: bool
    ) -> None:
        self._source = source
        self._target = target
        self._is_fresh = is_fresh
        self._verify = verify
        self._budget = ByteBudget(_MEMORY_BYTES)

    def copy(self, item: CopyItem) -> Copied:
        """Copy an object, unless it is there; an error is in the result."""
        try:
            size_bytes = item.size_bytes
            if size_bytes is None:
                size_bytes = self._source.head(item.key).size_bytes
            with self._budget.take(size_bytes):
                is_skipped = self._is_there(item.key, size_bytes)
                if not is_skipped:
                    self._transfer(item.key, size_bytes)
            return Copied(item.key, size_bytes, is_skipped, None)
        except (LoaderError, OSError) as error:
            return Copied(item.key, 0, False, error)

    def _is_there(self, key: str, size_bytes: int) -> bool:
        if self._is_fresh:
            return False
        try:
            found = self._target.head(key)
        except KeyNotFoundError:
            return False
        if found.size_bytes != size_bytes:
            return False
        if not self._verify:
            return True
        return self._digest(self._source, key, size_bytes) == self._digest(
            self._target, key, size_bytes
        )

    def _transfer(self, key: str, size_bytes: int) -> None:
        body = _read_object(self._source, key, size_bytes)
        self._target.put(key, body)
        written: ObjectInfo = self._target.head(key)
        if written.size_bytes != size_bytes:
            raise StoreError(
                f"{self._target.describe(key)}: got {written.size_bytes} bytes after it was "
                f"written, expected {size_bytes}; copy it again"
            )
        if self._verify:
            expected = _md5(body)
            del body
            if self._digest(self._target, key, size_bytes) != expected:
                raise StoreError(
                    f"{self._target.describe(key)}: its content is not what was written; "
                    "copy it again"
                )

    def _digest(self, store: SizedStore, key: str, size_bytes: int) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        for start in range(0, size_bytes, _PART_BYTES):
            stop = min(start + _PART_BYTES, size_bytes)
            digest.update(store.get(key, ByteRange(start, stop)))
        return digest.hexdigest()


def _md5(body: Buffer) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


def _read_object(store: SizedStore, key: str, size_bytes: int) -> Buffer:
    if size_bytes <= _PART_BYTES:
        body = memoryview(store.get(key)).cast("B")
        if body.nbytes != size_bytes:
            raise StoreError(
                f"{store.describe(key)}: got {body.nbytes} bytes, expected {size_bytes} as listed; "
                "it was changed meanwhile, copy it again"
            )
        return body
    whole = bytearray(size_bytes)
    for start in range(0, size_bytes, _PART_BYTES):
        stop = min(start + _PART_BYTES, size_bytes)
        whole[start:stop] = memoryview(store.get(key, ByteRange(start, stop))).cast("B")
    return whole
