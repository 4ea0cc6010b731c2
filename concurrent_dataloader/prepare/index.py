"""Find the samples of a data set, and put the files that say so where they are needed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.index import Index
from concurrent_dataloader.stores.base import ObjectInfo, WritableStore

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
"""Endings of the files that are samples, unless told otherwise."""

_PROGRESS_OBJECTS = 1000


class ObjectUrl(NamedTuple):
    """A URL in two parts: where the store is, and the key within it."""

    root: str
    key: str


def split_url(url: str) -> ObjectUrl:
    """Part ``s3://bucket/prefix/name`` into ``s3://bucket`` and ``prefix/name``.

    The slash between the two belongs to neither.

    Raises:
        ValueError: It is no URL.
    """
    scheme, separator, rest = url.partition("://")
    if not scheme or not separator or not rest:
        raise ValueError(f"url: got {url!r}, expected one such as 's3://bucket/key'")
    bucket, _, key = rest.partition("/")
    return ObjectUrl(f"{scheme}://{bucket}", key.lstrip("/"))


def check_object_url(url: str) -> ObjectUrl:
    """Give back the parts of an object's URL.

    Raises:
        ValueError: It names no object.
    """
    parts = split_url(url)
    if not parts.key or parts.key.endswith("/"):
        raise ValueError(f"url: got {url!r}, expected the name of an object, 's3://bucket/key'")
    return parts


def is_folder(source: str) -> bool:
    """Tell whether a source of samples is a folder of this machine, not a bucket."""
    return "://" not in source or source.startswith("file://")


def find_samples(
    source: str,
    open_root: Callable[[str], WritableStore],
    *,
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
    ignore_case: bool = True,
    relative: bool = False,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Index:
    """List the samples of a bucket, a part of one, or a folder; sorted by key.

    Args:
        source: ``s3://bucket``, ``s3://bucket/prefix`` or a folder. The prefix is that of a folder:
            ``train`` does not take ``train2/`` in.
        open_root: Opens the store at ``s3://bucket``; not called for a folder.
        suffixes: Endings to keep; all objects when empty.
        ignore_case: Whether ``.jpeg`` also keeps ``.JPEG``.
        relative: Whether keys are relative to ``source``, as those of a folder always are, and not
            to its bucket. The same index then serves a copy elsewhere.
        on_progress: Told now and then, and at the end, how many objects were listed.

    Raises:
        FileNotFoundError: There is no such folder or bucket, or it holds no sample.
        StoreError: The store cannot be listed.
    """
    if is_folder(source):
        root = source.removeprefix("file://")
        index = Index.from_folder(root, suffixes=suffixes, ignore_case=ignore_case)
        on_progress(len(index))
    else:
        url = split_url(source)
        prefix = url.key if not url.key or url.key.endswith("/") else f"{url.key}/"
        with contextlib.closing(open_root(url.root)) as store:
            objects = _counted(store.list(prefix), on_progress)
            stripped = (
                (info.key.removeprefix(prefix) if relative else info.key, info.size_bytes)
                for info in objects
            )
            index = Index.from_listing(stripped, suffixes=suffixes, ignore_case=ignore_case)
    if not len(index):
        kept = f"with suffix {', '.join(suffixes)}" if suffixes else "at all"
        raise KeyNotFoundError(
            f"{source}: no object {kept}{'' if ignore_case or not suffixes else ' in this case'};"
            " check the source and the suffixes"
        )
    return index


def upload(
    path: str | os.PathLike[str], url: str, open_root: Callable[[str], WritableStore]
) -> None:
    """Put a file into a bucket, under exactly the key in ``url``.

    Raises:
        ValueError: The URL names no object.
        StoreError: The store does not take it.
    """
    target = check_object_url(url)
    with contextlib.closing(open_root(target.root)) as store:
        store.put(target.key, Path(path).read_bytes())


def _counted(
    objects: Iterator[ObjectInfo], on_progress: Callable[[int], None]
) -> Iterator[ObjectInfo]:
    count = 0
    for info in objects:
        count += 1
        if count % _PROGRESS_OBJECTS == 0:
            on_progress(count)
        yield info
    on_progress(count)
