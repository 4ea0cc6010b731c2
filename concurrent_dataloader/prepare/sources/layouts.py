"""Where the samples of a split lie: in folders, archives, ImageNet's and Kaggle's layouts."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import orjson

from concurrent_dataloader.annotations import match_annotations
from concurrent_dataloader.errors import AccessDeniedError, IndexFormatError, KeyNotFoundError
from concurrent_dataloader.index import Index
from concurrent_dataloader.label_rules import LabelRule
from concurrent_dataloader.prepare.sources.archives import (
    UnpackedTar,
    find_in_archives,
    is_compressed_tar,
    is_tar,
    tar_stem,
    unpack_tar,
)
from concurrent_dataloader.prepare.sources.box_files import XmlBoxes
from concurrent_dataloader.prepare.sources.files import Files, is_remote, join, split_file_name
from concurrent_dataloader.prepare.sources.folder_rule import find_folder_rule
from concurrent_dataloader.prepare.sources.found import Found, Sieve
from concurrent_dataloader.prepare.sources.listing import find_indexed, find_listed
from concurrent_dataloader.prepare.sources.places import RangePlaces
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.shard_names import find_split
from concurrent_dataloader.stores import ObjectInfo, Store, WritableStore

SPLIT_FOLDERS = ("train", "val", "validation", "test")
KAGGLE_IMAGES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
"""Folders of the splits in Kaggle's layout."""

_ALIASES = {"val": ("val", "validation"), "validation": ("validation", "val")}
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|validation|test)(?![a-z])", re.IGNORECASE)
_KAGGLE_SETS = {"train": "train_cls.txt", "val": "val.txt", "test": "test.txt"}
_NO_SAMPLES = ("devkit", "bbox")
_WNID = re.compile(r"n\d{8}")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What was found of a split, and where more about it may lie."""

    found: Found
    unpacked: tuple[UnpackedTar, ...] = ()
    beside: tuple[str, ...] = ()
    """Folders where ground truth, development kit and metadata may lie."""

    xml_folder: str | None = None
    """Where boxes lie as XML."""

    label_rule: LabelRule = "parent"
    """Which folder of a sample is its class, where nothing else says so."""

    has_classes: bool = True
    """False for a test split, whose classes nobody knows."""

    def close(self) -> None:
        """Give back what this process has opened, temporary files included."""
        self.found.places.close()
        for unpacked in self.unpacked:
            unpacked.close()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """How samples are looked for."""

    files: Files
    split: str | None
    root: str | None
    suffixes: Sequence[str]
    temporary_folder: str | os.PathLike[str] | None
    check_archive: Callable[[str], None]
    """Called with the path or URL of each archive before it is read."""

    def run(self, text: str) -> Place:
        """Find out what ``text`` is, and find its samples.

        Raises:
            ValueError: It does not tell which samples are meant.
            StoreError: There is nothing, or it cannot be read.
            ShardFormatError: An archive is damaged.
        """
        if re.search(r"\.(json|packed)$", text):
            return self._find_indexed(text)
        if any(sign in text for sign in "*?{"):
            folder, names = self._expand(text)
            return self._find_archives(folder, names)
        if is_tar(text) or is_compressed_tar(text):
            folder, name = split_file_name(text)
            return self._find_archives(folder, [name])
        return self._find_folder(text.rstrip("/") or "/")

    # -- index

    def _find_indexed(self, text: str) -> Place:
        root = split_file_name(text).folder if self.root is None else self.root
        if is_remote(text):
            keys = orjson.loads(self.files.read(text))
            if not isinstance(keys, list) or not keys:
                raise IndexFormatError(f"{text}: expected a JSON list of keys")
            index = Index.from_keys(keys)
        else:
            index = Index.load(text)
        sieve = Sieve(text, self.suffixes)
        if not self.files.has(join(root, index.key(0))):
            raise KeyNotFoundError(
                f"root: got {self.root!r}, and {join(root, index.key(0))!r}, the first file that"
                f" {text} names, is not there; give the folder or bucket that its keys are"
                " relative to"
            )
        store = self.files.open_folder(root)
        return Place(found=find_indexed(store, index, sieve), beside=(root,))

    # -- archives

    def _expand(self, text: str) -> tuple[str, list[str]]:
        """Give the tars that a pattern names, all of one folder."""
        texts = expand_braces(text)
        folders = {split_file_name(one).folder for one in texts}
        if len(folders) != 1 or any(sign in next(iter(folders)) for sign in "*?"):
            raise ValueError(f"source: got {text!r}, expected tars of one folder")
        folder = folders.pop()
        patterns = [split_file_name(one).name for one in texts]
        if not any(sign in pattern for pattern in patterns for sign in "*?"):
            return folder, patterns
        with contextlib.closing(self.files.open_folder(folder)) as store:
            names = [info.key for info in store.list() if "/" not in info.key]
        chosen = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
        if not chosen:
            raise KeyNotFoundError(f"{text}: no file fits the pattern; check the folder and it")
        return folder, sorted(chosen)

    def _find_archives(self, folder: str, names: Sequence[str]) -> Place:
        others = [name for name in names if not (is_tar(name) or is_compressed_tar(name))]
        if others:
            raise ValueError(f"source: got {join(folder, others[0])!r}, expected tars")
        for name in names:
            self.check_archive(join(folder, name))
        archives = self.files.open_archives(folder, names)
        unpacked: list[UnpackedTar] = []
        try:
            packed = [is_compressed_tar(name) for name in names]
            if any(packed):
                if not all(packed):
                    raise ValueError(
                        f"source: {folder} holds plain and compressed tars, expected one kind"
                    )
                for name in names:
                    unpacked.append(unpack_tar(archives, name, self.temporary_folder))  # noqa: PERF401 - what is unpacked must be known when the next one fails
                archives.store.close()
                where = os.path.dirname(os.path.abspath(unpacked[0].path))
                local = [os.path.basename(tar.path) for tar in unpacked]
                archives = Files({}).open_archives(where, local)
            sieve = Sieve(join(folder, names[0] if len(names) == 1 else ""), self.suffixes)
            found = find_in_archives(archives, sieve, _class_prefixes(names))
            if not unpacked and isinstance(found.places, RangePlaces):
                places = found.places.with_crcs(_find_indexes(archives.store, names))
                found = dataclasses.replace(found, places=places)
        except BaseException:
            archives.store.close()
            for tar in unpacked:
                tar.close()
            raise
        return Place(
            found=found,
            unpacked=tuple(unpacked),
            beside=(folder,),
            label_rule=find_folder_rule(found.names.keys()),
        )

    # -- folders

    def _find_folder(self, text: str) -> Place:
        if os.path.isfile(text):
            raise ValueError(
                f"source: got {text!r}, a file that is neither a tar nor an index; expected a"
                " folder, .tar, .tar.gz, .tar.bz2, .tar.xz, .json or .packed"
            )
        with contextlib.closing(self.files.open_folder(text)) as store:
            for place in KAGGLE_IMAGES:
                if _has(store, f"{place}/"):
                    return self._find_kaggle(text, place.removesuffix("Data/CLS-LOC"), store)
            folder = self._choose_split(text, store)
        if folder is None:
            return self._find_in_folder(text, (text,), holds_splits=self.split is not None)
        return self._find_in_folder(join(text, folder), (join(text, folder), text))

    def _choose_split(self, text: str, store: WritableStore) -> str | None:
        """Give the subfolder of the split, or None if the folder itself is meant."""
        there = [name for name in SPLIT_FOLDERS if _has(store, f"{name}/")]
        if self.split is None:
            if "train" in there and len(there) > 1:
                raise ValueError(
                    f"split: got None for {text}, which holds {', '.join(there)}; expected one of"
                    " these"
                )
            return None
        for name in split_folders(self.split):
            if name in there or (name not in SPLIT_FOLDERS and _has(store, f"{name}/")):
                return name
        return None

    def _find_in_folder(
        self, text: str, beside: tuple[str, ...], *, holds_splits: bool = False
    ) -> Place:
        """Take the images of a folder; if it holds none, those in the tars of the folder."""
        store = self.files.open_folder(text)
        tars: list[ObjectInfo] = []
        others: set[str] = set()

        def without_tars() -> Iterator[ObjectInfo]:
            for info in store.list():
                first, slash, _ = info.key.partition("/")
                if not slash and (is_tar(first) or is_compressed_tar(first)):
                    tars.append(info)
                elif slash and holds_splits and first in SPLIT_FOLDERS:
                    others.add(first)
                else:
                    yield info

        sieve = Sieve(text, self.suffixes)
        found = find_listed(store, without_tars(), sieve)
        if not len(found.names):
            store.close()
            names = [info.key for info in tars if not any(word in info.key for word in _NO_SAMPLES)]
            if names:
                return self._find_archives(text, self._choose_archives(text, names))
        if others:
            store.close()
            raise KeyNotFoundError(
                f"{text}: holds no split {self.split!r}, but {', '.join(sorted(others))}; give one"
                " of these"
            )
        for info in tars:
            sieve.count_stray(info.key)
        found = dataclasses.replace(found, num_stray=sieve.num_stray, strays=tuple(sieve.strays))
        rule = find_folder_rule(found.names.keys(), SPLIT_FOLDERS)
        return Place(found=found, beside=beside, label_rule=rule)

    def _choose_archives(self, text: str, names: Sequence[str]) -> list[str]:
        """Take the tars of the split."""
        splits = {name: _split_of(name) for name in names}
        present = {split for split in splits.values() if split is not None}
        if self.split is None:
            if len(present) > 1:
                raise ValueError(
                    f"split: got None for {text}, which holds tars of {', '.join(sorted(present))};"
                    " expected one of these"
                )
            return list(names)
        wanted = set(split_folders(self.split))
        chosen = [name for name, split in splits.items() if split in wanted]
        if not chosen and present:
            raise KeyNotFoundError(
                f"{text}: holds no tar of split {self.split!r}, but of {', '.join(sorted(present))}"
            )
        return chosen or list(names)

    # -- Kaggle

    def _find_kaggle(self, text: str, base: str, store: WritableStore) -> Place:
        split = "val" if self.split == "validation" else self.split
        if split not in _KAGGLE_SETS:
            raise ValueError(
                f"split: got {self.split!r} for Kaggle's layout in {text}, expected one of"
                f" {', '.join(_KAGGLE_SETS)}"
            )
        above = text if base else (os.path.dirname(text) or ".")
        place = self._find_in_folder(join(text, f"{base}Data/CLS-LOC/{split}"), (above, text))
        listed = f"{base}ImageSets/CLS-LOC/{_KAGGLE_SETS[split]}"
        found = place.found
        if _has(store, listed):
            found = _keep_listed(found, bytes(store.get(listed)), join(text, listed))
        return dataclasses.replace(
            place,
            found=found,
            xml_folder=join(text, f"{base}Annotations/CLS-LOC/{split}"),
            has_classes=split != "test",
        )


def split_folders(split: str) -> tuple[str, ...]:
    """Give what the folder of a split may be called."""
    return _ALIASES.get(split, (split,))


def find_xml(search: Search, text: str, names: Index, *, is_merged: bool) -> XmlBoxes:
    """Find the XML files of samples in a folder, prefix or tar; the caller closes them.

    Raises:
        ValueError: None belongs to any sample.
        StoreError: There are none.
    """
    place = dataclasses.replace(search, suffixes=(".xml",), split=None).run(text)
    try:
        rows = match_annotations(names, place.found.names, place.found.where)
    except BaseException:
        place.close()
        raise
    return XmlBoxes(found=place.found, rows=rows, is_merged=is_merged, unpacked=place.unpacked)


def _find_indexes(store: Store, names: Sequence[str]) -> Iterator[ShardIndex]:
    """Give the indexes that lie beside shards, for the checksums in them."""
    for split in sorted({split for name in names if (split := find_split(name)) is not None}):
        key = f"{split}-index.npz"
        try:
            raw = store.get(key)
        except (KeyNotFoundError, AccessDeniedError):  # some servers refuse what is not there
            continue
        yield ShardIndex.from_bytes(raw, store.describe(key))


def _keep_listed(found: Found, raw: bytes, where: str) -> Found:
    """Leave out the images that a list of images does not name."""
    listed = {line.split()[0] for line in raw.decode().splitlines() if line.strip()}
    positions = [
        position
        for position, name in enumerate(found.names.keys())
        if os.path.splitext(name)[0] in listed
    ]
    missing = len(listed) - len(positions)
    if missing:
        raise KeyNotFoundError(
            f"{found.where}: lacks {missing} of the {len(listed)} images that {where} lists;"
            " complete the folder, or remove the list to take what is there"
        )
    if len(positions) == len(found.names):
        return found
    kept = set(positions)
    strays = [n for position, n in enumerate(found.names.keys()) if position not in kept]
    return dataclasses.replace(
        found.select(np.array(positions, np.int64)),
        num_stray=found.num_stray + len(strays),
        strays=(*found.strays, *strays)[:20],
    )


def _has(store: WritableStore, prefix: str) -> bool:
    return next(iter(store.list(prefix)), None) is not None


def _split_of(name: str) -> str | None:
    words = _SPLIT_WORD.findall(tar_stem(name))
    return words[-1].lower() if words else None


def _class_prefixes(names: Sequence[str]) -> list[str]:
    """Give what names begin with in each tar: its class, where each tar holds one."""
    stems = [tar_stem(name) for name in names]
    numbered = any(stem[-1:].isdigit() for stem in stems)
    are_classes = all(_WNID.fullmatch(stem) for stem in stems) or (len(stems) > 1 and not numbered)
    return [f"{stem}/" if are_classes else "" for stem in stems]


def expand_braces(text: str) -> list[str]:
    """Expand ``{000..146}`` and ``{a,b}``, with leading zeros as given.

    Raises:
        ValueError: A brace holds neither.
    """
    found = _BRACES.search(text)
    if found is None:
        return [text]
    bounds = _RANGE.fullmatch(found[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        width = len(bounds[1]) if bounds[1].startswith("0") else 0
        inner = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        inner = found[1].split(",")
    if len(inner) < 1 or (not bounds and len(inner) < 2):
        raise ValueError(f"source: got {found[0]!r}, expected {{000..146}} or {{a,b}}")
    begin, end = text[: found.start()], text[found.end() :]
    return list(itertools.chain.from_iterable(expand_braces(begin + one + end) for one in inner))
