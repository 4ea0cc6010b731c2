"""Find out what lies at a path or URL, and open it."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch.utils.data import Dataset

from concurrent_dataloader.datasets._places import (
    INDEX_SUFFIX,
    METADATA_NAME,
    SPLITS,
    Place,
    find_kaggle,
    has_classes_below,
    is_local,
    local_path,
    look_into,
)
from concurrent_dataloader.datasets.indexed import IndexedDataset
from concurrent_dataloader.datasets.opening import S3Dataset, ScratchDataset
from concurrent_dataloader.datasets.shard_opening import (
    missing_split,
    names_shards,
    open_place,
    open_shards,
    take_store_options,
)
from concurrent_dataloader.datasets.shards import ShardDataset
from concurrent_dataloader.errors import IndexFormatError, MissingSplitError
from concurrent_dataloader.shard_names import Split, find_split
from concurrent_dataloader.stores import Store, open_store

if TYPE_CHECKING:
    from concurrent_dataloader.datasets.lmdb import LmdbDataset

Contents = Literal["shards", "lmdb", "images"]

LOOKED_FOR = (
    f"shards of tar or TFRecord (*.tar, train-00000-of-01024) with their *{INDEX_SUFFIX}, LMDB "
    "files (*.lmdb, data.mdb), images or folders of them, or a JSON index"
)


def open_dataset(
    path_or_url: str | os.PathLike[str], *, split: str | None = None, **options: Any
) -> IndexedDataset | LmdbDataset:
    """Open the images that a URL or a path names, whatever they lie in.

    Args:
        path_or_url: A folder, ``s3://bucket[/prefix]``, or ``http(s)://host/folder`` of shards; a
            file of it: an index of shards (``.npz``), a JSON index, whose keys are relative to its
            own folder unless ``data_path`` names another, or an LMDB file; or shards by a pattern,
            such as ``train-{000000..000489}.tar``. Of images, folders of splits are known, as
            torchvision and Kaggle (``ILSVRC/Data/CLS-LOC``) lay ImageNet out.
        split: "train", "val" or "test", where there are several. None: the only one, else "train".
        options: What the dataset takes besides: `ShardDataset` and `open_store` for shards,
            `LmdbDataset`, `S3Dataset` or `ScratchDataset`. ``boxes``: a table or XML files for
            images, True for shards that hold them. Steps that were baked into shards are left out
            of ``transform``.

    Returns:
        A `ShardDataset`, `LmdbDataset`, `S3Dataset` or `ScratchDataset`.

    Raises:
        TypeError: It is no path or URL, or what lies there does not take an option; says what does.
        ValueError: The URL is of a kind that is not known here.
        FileNotFoundError: There is nothing there, or shards have no index.
        MissingSplitError: There are data, but none of this split; says which splits there are.
        IndexFormatError: Nothing of what was looked for is there, or more than one kind of it.
        StoreError: The place cannot be listed.
    """
    text = _check_path_or_url(path_or_url)
    if is_local(text):
        return _open_local(text, split, options)
    if text.endswith(".npz") or names_shards(text) or text.startswith(("http://", "https://")):
        return _open_shards(text, split, options)
    if text.startswith("s3://"):
        return _open_bucket(text, split, options)
    raise ValueError(
        f"{text}: no kind of data set that is known, expected a path, s3://bucket[/prefix] or "
        f"http(s)://host/folder of {LOOKED_FOR}"
    )


def _open_local(
    text: str, split: str | None, options: dict[str, Any]
) -> IndexedDataset | LmdbDataset:
    path = local_path(text)
    if path.is_dir() and not path.name.endswith(".lmdb"):
        return _open_folder(path, split, options)
    if path.name.endswith((".lmdb", ".mdb")) and path.exists():
        return open_lmdb(path, options)
    if path.is_file() and path.suffix in (".json", ".packed"):
        given = {"data_path": path.parent, **options}
        return _open_images(text, given.pop("data_path"), given | {"index_file": path})
    if path.suffix == ".npz" or names_shards(text):
        return _open_shards(text, split, options)
    if not path.exists():
        raise FileNotFoundError(f"{text}: nothing there, expected {LOOKED_FOR}")
    raise ValueError(f"{text}: no kind of data set that is known, expected {LOOKED_FOR}")


def _open_folder(
    path: Path, split: str | None, options: dict[str, Any]
) -> IndexedDataset | LmdbDataset:
    index_file = options.get("index_file")
    if index_file is not None and not os.fspath(index_file).endswith(".npz"):
        return _open_images(str(path), path, options)
    store = open_place(str(path), {})
    place = look_into(str(path), store)
    assert place is not None, "folders can be listed"
    if kaggle := find_kaggle(place, str(path), store):
        return _open_folder(path / kaggle, split, options)
    split_folder = _split_folder(place, split, str(path), store)
    contents = find_contents(place, str(path), in_split_folder=split_folder is not None)
    if contents == "shards":
        return _open_shards(str(path), split, options)
    if contents == "lmdb":
        return open_lmdb_split(path, split, options)
    if split_folder is not None:
        return _open_folder(path / split_folder, None, options)
    _check_split(str(path), split, place)
    return _open_images(str(path), path, options)


def _open_bucket(
    url: str, split: str | None, options: dict[str, Any]
) -> IndexedDataset | LmdbDataset:
    index_file = options.get("index_file")
    bucket_name, _, prefix = url.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/")
    if index_file is not None:
        if os.fspath(index_file).endswith(".npz"):
            return _open_shards(url, split, options)
        _check_options(url, "images in a bucket", options)
        return S3Dataset(bucket_name, prefix=prefix, split=_as_split(split), **options)
    given = dict(options)
    credentials = options.get("s3_credential_file") or options.get("credentials")
    settings = take_store_options(given) | {"credentials": credentials}
    store = open_place(url, settings)
    place = look_into(url, store)
    assert place is not None, "buckets can be listed"
    if kaggle := find_kaggle(place, url, store):
        return _open_bucket(f"{url.rstrip('/')}/{kaggle}", split, options)
    split_folder = _split_folder(place, split, url, store)
    contents = find_contents(place, url, in_split_folder=split_folder is not None)
    if contents == "shards":
        return _open_shards(url, split, options)
    if contents == "lmdb":
        raise IndexFormatError(
            f"{url}: holds {', '.join(place.databases)}, which are read from a disk only; copy "
            "them there, or pack the images into shards"
        )
    if split_folder is not None:
        prefix = f"{prefix}/{split_folder}".lstrip("/")
    else:
        _check_split(url, split, place)
    _check_options(url, "images in a bucket", options)
    return S3Dataset(bucket_name, prefix=prefix, split=_as_split(split), **options)


def find_contents(place: Place, where: str, *, in_split_folder: bool = False) -> Contents:
    """Tell what a place holds.

    Args:
        place: Its names.
        where: What errors call it.
        in_split_folder: Whether what counts lies in a folder of a split.

    Raises:
        IndexFormatError: Nothing that is known, or more than one kind; says what was found.
    """
    found: dict[Contents, str] = {}
    shards = [*place.indexes, *place.shards]
    if shards:
        found["shards"] = f"shards ({shards[0]})"
    if place.databases:
        found["lmdb"] = f"LMDB ({place.databases[0]})"
    if place.image is not None:
        found["images"] = f"folders of images ({place.image})"
    if len(found) > 1:
        raise IndexFormatError(
            f"{where}: holds {' and '.join(found.values())}, expected one kind; give the folder, "
            "index or file that is meant, or the kind of data set"
        )
    if found:
        return next(iter(found))
    if place.loose_images:
        return "images"
    if in_split_folder:
        return "shards"  # `open_shards` looks there
    held = [*place.files, *place.folders]
    holds = f"{', '.join(held[:3])}{' ...' * (len(held) > 3)}" if held else "nothing"
    if METADATA_NAME in place.files:
        holds = f"{METADATA_NAME}, but no shards"
    if place.originals:
        raise IndexFormatError(
            f"{where}: holds {', '.join(place.originals)}, ImageNet's original archives, which are "
            "no shards; pack them with `concurrent-dataloader shard`, or unpack them"
        )
    raise IndexFormatError(f"{where}: holds {holds}, looked for {LOOKED_FOR}")


def _split_folder(place: Place, split: str | None, where: str, store: Store) -> str | None:
    """Give the folder of a split, where the folders are splits and not classes."""
    if split is not None:
        return split if split in place.folders else None
    names = [name for name in place.folders if name in SPLITS]
    if not names:
        return None
    if len(names) < len(place.folders):
        # Beside others, such as that of the development kit, two of them have to look like splits.
        is_split = "train" in names and len(names) > 1 and has_classes_below(where, store, "train")
        return "train" if is_split else None
    is_flat = place.image is not None and place.image.count("/") == 1
    if is_flat and not any(has_classes_below(where, store, name) for name in names):
        return None  # classes that happen to be called so
    return "train" if "train" in names else names[0] if len(names) == 1 else None


def _as_split(split: str | None) -> Split | None:
    """Give what a credentials file may have URLs for."""
    return next((known for known in SPLITS if known == split), None)


def _check_split(where: str, split: str | None, place: Place) -> None:
    """Raise if a split was asked for where there is no sign of one."""
    if split is None or where.rstrip("/").rpartition("/")[2] == split:
        return
    splits = tuple(name for name in SPLITS if name in place.folders)
    there = f"split={' or '.join(map(repr, splits))}, or " if splits else ""
    error = MissingSplitError(
        f"{where}: has no folder {split!r} for the split asked for; give {there}the folder of its "
        "images, without split"
    )
    error.splits = splits
    raise error


def choose_database(place: Place, split: str | None, where: str) -> str:
    """Give the name of the database of a split, or of the only one; ``data.mdb`` is its folder.

    Raises:
        FileNotFoundError: There is none of this split, or none of "train" among several.
    """
    names = place.databases
    if names == ["data.mdb"] or (len(names) == 1 and split in (None, find_split(names[0]))):
        return "" if names == ["data.mdb"] else names[0]
    if not names:
        raise FileNotFoundError(
            f"{where}: holds no LMDB database; write one with `concurrent-dataloader lmdb`"
        )
    wanted = split or "train"
    fitting = [name for name in names if find_split(name) == wanted]
    if not fitting:
        raise missing_split(where, "database", wanted, names, alone="the file itself")
    if len(fitting) > 1:
        raise FileNotFoundError(
            f"{where}: {len(fitting)} databases of split {wanted!r} among {', '.join(names)}, "
            "expected one; give split, or the file itself"
        )
    return fitting[0]


def open_lmdb_split(
    folder: str | os.PathLike[str], split: str | None, options: dict[str, Any]
) -> LmdbDataset:
    """Open the database of a split in a folder, or the database that the path names.

    Raises:
        FileNotFoundError: There is none.
    """
    path = local_path(os.fspath(folder))
    if path.name.endswith((".lmdb", ".mdb")):
        return open_lmdb(path, options)
    place = look_into(str(path), open_place(str(path), {}))
    assert place is not None, "folders can be listed"
    return open_lmdb(path / choose_database(place, split, str(path)), options)


def open_lmdb(path: Path, options: dict[str, Any]) -> LmdbDataset:
    """Open a database, which has its labels in it: indexes and classes of None are left out."""
    from concurrent_dataloader.datasets.lmdb import LmdbDataset

    elsewhere = ("index_file", "classes_file", "classes", "label_rule")
    given = _without_remote(options).items()
    kept = {name: value for name, value in given if name not in elsewhere or value is not None}
    _check_options(str(path), "an LMDB database", kept)
    return LmdbDataset(path, **kept)


def _open_shards(where: str, split: str | None, options: dict[str, Any]) -> IndexedDataset:
    _check_options(where, "shards", options)
    return open_shards(where, split=split, **options)


def _open_images(where: str, folder: Any, options: dict[str, Any]) -> IndexedDataset:
    given = _without_remote(options)
    _check_options(where, "images in a folder", given)
    return ScratchDataset(folder, **given)


def _check_path_or_url(path_or_url: object) -> str:
    if isinstance(path_or_url, (str, os.PathLike)):
        text = str(os.fspath(cast("str | os.PathLike[str]", path_or_url)))
        if not text.strip():
            raise ValueError(
                f"path_or_url: got {text!r}, expected a path or a URL; '.' is the working folder"
            )
        return text
    kind = type(path_or_url).__name__
    if isinstance(path_or_url, Dataset):
        raise TypeError(
            f"path_or_url: got a {kind}, expected a path or a URL; what is open already is given to"
            " a loader as it is"
        )
    raise TypeError(
        f"path_or_url: got a {kind}, expected a path or a URL such as 's3://bucket/prefix'"
    )


_Taker = Literal["images in a folder", "images in a bucket", "shards", "an LMDB database"]


def _check_options(where: str, taker: _Taker, options: dict[str, Any]) -> None:
    """Raise for an option that a data set does not take, with what does.

    Raises:
        TypeError: There is one.
    """
    options_of = _list_options()
    for name in options:
        if name in options_of[taker]:
            continue
        others = [other for other, names in options_of.items() if name in names]
        if others:
            raise TypeError(
                f"{where}: got the option {name!r}, which is for {' or '.join(others)}, but this is"
                f" {taker}; leave it out"
            )
        expected = ", ".join(sorted(options_of[taker]))
        raise TypeError(f"{where}: got the option {name!r} for {taker}, expected one of {expected}")


@functools.cache
def _list_options() -> dict[_Taker, frozenset[str]]:
    from concurrent_dataloader.datasets.lmdb import LmdbDataset

    def names(*takers: Callable[..., Any]) -> set[str]:
        taken = [inspect.signature(taker).parameters.values() for taker in takers]
        return {each.name for each in itertools.chain(*taken) if each.kind is not each.VAR_KEYWORD}

    # But for what says where it lies, which the path does, and what is found there.
    store = names(open_store) - {"url"}
    found = {"location", "split", "index", "store", "index_name"}
    shards = names(open_shards, ShardDataset) - found
    return {
        "images in a folder": frozenset(names(ScratchDataset) - {"data_path"}),
        "images in a bucket": frozenset(
            names(S3Dataset) - {"bucket_name", "prefix", "split"} | store
        ),
        "shards": frozenset(shards | store - {"credentials"}),
        "an LMDB database": frozenset(names(LmdbDataset) - {"path"}),
    }


def _without_remote(options: dict[str, Any]) -> dict[str, Any]:
    """Leave out what says how a bucket is reached, since a caller may have either."""
    remote = ("endpoint_url", "s3_credential_file")
    return {name: value for name, value in options.items() if name not in remote}
