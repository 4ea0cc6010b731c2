"""What lies at the top of a folder, or of a prefix of a bucket: told by one small listing."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.shard_names import METADATA_NAME, Split, find_kind
from concurrent_dataloader.stores import Store, WritableStore

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Taken for images where no index says so, in any case. Source: torchvision's ImageFolder."""

INDEX_SUFFIX = "index.npz"
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_KAGGLE_IMAGES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_ORIGINAL = re.compile(
    r"ILSVRC2012_(img_(train|val|test)(_t3|_v10102019)?|devkit_t\d+|bbox_\w+)\.(tar|tar\.gz|tgz)"
)
_PAGE_KEYS = 1000  # what S3 gives for one LIST
_MAX_ENTRIES = 20_000


class Place(NamedTuple):
    """Names at the top of a place."""

    files: tuple[str, ...]
    folders: tuple[str, ...]
    image: str | None
    """A file in one of the folders, or a folder of these, that is an image."""

    @property
    def indexes(self) -> list[str]:
        """Names of the indexes of shards."""
        return sorted(name for name in self.files if name.endswith(INDEX_SUFFIX))

    @property
    def shards(self) -> list[str]:
        """Names of what ends as shards do, but for ImageNet's original archives."""
        names = [name for name in self.files if find_kind(name) is not None]
        return [name for name in names if not _ORIGINAL.fullmatch(name)]

    @property
    def originals(self) -> list[str]:
        """Names of ImageNet's original archives, which torchvision keeps beside the images."""
        return [name for name in self.files if _ORIGINAL.fullmatch(name)]

    @property
    def databases(self) -> list[str]:
        """Names of LMDB files and folders."""
        named = [name for name in (*self.files, *self.folders) if name.endswith(".lmdb")]
        return sorted(named) or [name for name in self.files if name == "data.mdb"]

    @property
    def loose_images(self) -> list[str]:
        """Names of images that lie in no folder."""
        return [name for name in self.files if is_image(name)]


def is_image(name: str) -> bool:
    """Tell whether a file is taken for an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_local(text: str) -> bool:
    """Tell whether a path or URL is of this machine."""
    return "://" not in text or text.startswith("file://")


def local_path(text: str) -> Path:
    """Give the path that a path or a file URL names."""
    return Path(text.removeprefix("file://")).expanduser()


def look_into(root: str, store: Store) -> Place | None:
    """Tell what lies at the top of a root; None where that cannot be listed, as on web servers.

    Of a bucket, a page of the listing is read, and a few names are asked for beyond it.

    Raises:
        FileNotFoundError: There is no such folder or bucket.
        StoreError: The bucket cannot be listed.
    """
    if is_local(root):
        return _look_into_folder(local_path(root))
    return _look_into_bucket(store) if isinstance(store, WritableStore) else None


def find_kaggle(place: Place, root: str, store: Store) -> str | None:
    """Give the folder of a place where the splits lie in Kaggle's layout; None in any other."""
    for folder in _KAGGLE_IMAGES:
        # A page of a listing may end among the annotations, which come first.
        if not {folder.partition("/")[0], "Annotations"}.isdisjoint(place.folders):
            names = _walk_below(root, store, folder)
            if next(names, None) is not None:
                return folder
    return None


def has_classes_below(root: str, store: Store, folder: str) -> bool:
    """Tell whether the images of a folder lie in folders of it."""
    names = itertools.islice(_walk_below(root, store, folder), _PAGE_KEYS)
    first = next(filter(is_image, names), "")
    return "/" in first.removeprefix(f"{folder}/")


def _walk_below(root: str, store: Store, folder: str) -> Iterator[str]:
    if is_local(root):
        return _walk(local_path(root), [folder])
    assert isinstance(store, WritableStore), "what was listed can be listed"
    return (info.key for info in store.list(f"{folder}/"))


def _look_into_folder(root: Path) -> Place:
    if not root.is_dir():
        raise KeyNotFoundError(f"{root}: no such folder; check the path")
    with os.scandir(root) as entries:
        known = [(entry.name, entry.is_dir()) for entry in entries if entry.name[0] != "."]
    folders = sorted(name for name, is_folder in known if is_folder)
    walked = itertools.islice(_walk(root, folders), _MAX_ENTRIES)
    image = next(filter(is_image, walked), None)
    files = sorted(name for name, is_folder in known if not is_folder)
    return Place(tuple(files), tuple(folders), image)


def _walk(root: Path, folders: Iterable[str]) -> Iterator[str]:
    for folder in folders:
        for path, names, files in os.walk(root / folder):
            names.sort()
            yield from (os.path.relpath(os.path.join(path, name), root) for name in sorted(files))


def _look_into_bucket(store: WritableStore) -> Place:
    keys = [info.key for info in itertools.islice(store.list(), _PAGE_KEYS)]
    if len(keys) == _PAGE_KEYS:
        for name in (METADATA_NAME, *(f"{split}-{INDEX_SUFFIX}" for split in SPLITS)):
            listed = itertools.islice(store.list(name), 1)
            keys.extend(info.key for info in listed if info.key == name)
    nested = [key for key in keys if "/" in key]
    files = sorted({key for key in keys if key and "/" not in key})
    folders = sorted({key.partition("/")[0] for key in nested})
    return Place(tuple(files), tuple(folders), next(filter(is_image, nested), None))
