"""Refuses to write into what is read: afterwards the source would be another one."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from concurrent_dataloader.prepare.index import is_folder
from concurrent_dataloader.prepare.sources.archives import is_compressed_tar, is_tar
from concurrent_dataloader.prepare.sources.layouts import KAGGLE_IMAGES, split_folders


def refuse_target_in_source(source: str, target: str, *, in_buckets: bool = True) -> None:
    """Raise if a target is a source, or lies in it; looks at nothing but the names.

    Args:
        source: Folder or URL.
        target: Folder or URL that would be written.
        in_buckets: Whether what lies below a prefix of a bucket is read with it, as by a copy. A
            set of shards is what lies directly there, and the root of a bucket has no outside; a
            folder of shards has one, and whoever copies or checks it takes all of it.

    Raises:
        ValueError: It is, or does.
    """
    _refuse_same(source, target)
    if _lies_in(target, source) and (in_buckets or is_folder(source)):
        _refuse(source, target)


def refuse_target_in_samples(
    source: str, target: str, *, splits: Collection[str] = (), is_taken: bool
) -> None:
    """Raise if a target is a source of samples, or lies where these are looked for.

    What lies beside the folders of the splits that are read, or below the archives that are read,
    is no part of the source. In a bucket, what is not taken for a sample does no harm; in a folder
    it does, since each folder there is a class to who reads it later.

    Args:
        source: Whatever `open_source` takes.
        target: Folder or URL that would be written.
        splits: Which parts of the source are read; all of it when empty.
        is_taken: Whether what would be written there counts as samples of the source.

    Raises:
        ValueError: It is, or does.
    """
    _refuse_same(source, target)
    if not _lies_in(target, source):
        return
    if not is_folder(source):
        prefixes = [f"{source.rstrip('/')}/{split}" for split in splits] or [source]
        if is_taken and any(_lies_in(target, prefix) for prefix in prefixes):
            _refuse(source, target)
        return
    folders = _folders_read(_path(source), splits, is_taken=is_taken)
    if any(_path(target).is_relative_to(folder) for folder in folders):
        _refuse(source, target)


def _refuse_same(source: str, target: str) -> None:
    if _lies_in(target, source) and _lies_in(source, target):
        raise ValueError(
            f"target: got {target!r}, which is the source too; choose another folder or prefix"
        )


def _refuse(source: str, target: str) -> None:
    raise ValueError(
        f"target: got {target!r}, which lies in the source {source!r} and would be read with it"
        " from then on; choose a folder or prefix outside of it"
    )


def _lies_in(place: str, other: str) -> bool:
    """Tell whether a place is another one, or lies below it."""
    if is_folder(place) != is_folder(other):
        return False
    if is_folder(place):
        return _path(place).is_relative_to(_path(other))
    return f"{place.rstrip('/')}/".startswith(f"{other.rstrip('/')}/")


def _path(text: str) -> Path:
    return Path(text.removeprefix("file://")).expanduser().resolve()


def _folders_read(folder: Path, splits: Collection[str], *, is_taken: bool) -> Iterator[Path]:
    """Yield the folders in which samples are looked for, or would be if they were there."""
    for place in KAGGLE_IMAGES:
        if (folder / place).is_dir():
            yield folder / place
            return
    named = [[folder / name for name in split_folders(split)] for split in splits]
    for folders in named:
        yield from folders
    is_read_itself = not splits or not all(any(map(Path.is_dir, folders)) for folders in named)
    if is_read_itself and (is_taken or not _holds_tars(folder)):
        yield folder


def _holds_tars(folder: Path) -> bool:
    """Tell whether archives lie directly in a folder: what is below it is then not looked at."""
    names = os.listdir(folder) if folder.is_dir() else []
    return any(is_tar(name) or is_compressed_tar(name) for name in names)
