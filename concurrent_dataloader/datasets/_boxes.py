"""The bounding box of each image, from a table or XML files, as it stands in an item."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch

from concurrent_dataloader.annotations import AUTO_BOXES
from concurrent_dataloader.boxes import BoxLookup, boxes_from_table, check_box, parse_box_table
from concurrent_dataloader.datasets._annotation_boxes import AnnotationBoxes
from concurrent_dataloader.datasets._places import is_local, local_path
from concurrent_dataloader.errors import IndexFormatError, KeyNotFoundError
from concurrent_dataloader.files import is_hidden
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.index import Index, choose_positions
from concurrent_dataloader.shard_names import split_url
from concurrent_dataloader.stores import ObjectInfo, Store, WritableStore
from concurrent_dataloader.stores.cache import uncached

BoxSource: TypeAlias = str | os.PathLike[str] | Mapping[str, Sequence[Sequence[float]]]
"""A table ``name,x1,y1,x2,y2`` as path or URL, or the boxes of each name: 0 is the left or upper
side of the image, 1 the other. A name is an image's key, or its file name, or that without its
ending, whichever of them is there first. Or a folder or prefix of XML files, as `AnnotationBoxes`
has them; "auto": that of Kaggle's layout, in which the images lie."""

_EXPECTED = "expected a table name,x1,y1,x2,y2, or a folder of XML files"
_KAGGLE = re.compile(r"(.*/|)Data/CLS-LOC/([^/]+)/")
_TAR = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2|txz)$", re.IGNORECASE)


def look_up_boxes(
    given: BoxSource | bool | None,
    names: Index,
    open_root: Callable[[str], Store],
    *,
    root: str | None = None,
    limit: int | None = None,
    sample_seed: int | None = None,
) -> BoxLookup | None:
    """Find the boxes of samples by their names. XML files are listed, but not yet read.

    Args:
        given: Where they are; None or False: there are none.
        names: The samples.
        open_root: Opens the store of XML files, or of a table that is no local file.
        root: What the names are relative to; None: they are names in shards.
        limit: Give those of so many samples.
        sample_seed: And of which, as `Index.limit`.

    Raises:
        TypeError: It is neither a path nor a table.
        FileNotFoundError: There is no such table or folder.
        ValueError: It is none, or none of its rows or files belongs to any sample.
    """
    if given is None or given is False:
        return None
    if given is True:
        raise TypeError(f"boxes: got True, but single images hold none, {_EXPECTED}")
    chosen = choose_positions(len(names), limit, sample_seed)
    if isinstance(given, Mapping):
        where, table = "boxes", {name: _check_boxes(name, rows) for name, rows in given.items()}
    else:
        where = os.fspath(given)
        if where == AUTO_BOXES:
            where = _find_kaggle_folder(names, root)
            folder = _open_folder(where, open_root)
            if folder is None:
                raise KeyNotFoundError(
                    f"boxes: {where}: no such folder, where XML files lie in Kaggle's layout; give"
                    " the one in which they are"
                )
        else:
            folder = _open_folder(where, open_root)
        if folder is not None:
            store, listed = folder
            files = _take_xml(listed, where)
            return AnnotationBoxes.find(names, store, files, where, chosen)
        table = parse_box_table(_read_table(where, open_root), where)
    found = boxes_from_table(names, table, where, is_merged=True)
    return found if chosen is None else found.select(chosen)


def as_item(boxes: Sequence[Box], missing: float | None) -> torch.Tensor | None:
    """Give the box of an image as it stands in an item.

    Shapes:
        (4,) float32: x1, y1, x2, y2, each 0 to 1, or all ``missing`` where there is no box; None
        instead if that is None.
    """
    if boxes:
        return torch.tensor(boxes[0], dtype=torch.float32)
    return None if missing is None else torch.full((4,), missing, dtype=torch.float32)


def _check_boxes(name: str, rows: Sequence[Sequence[float]]) -> list[Box]:
    try:
        return [check_box([float(side) for side in row], f"boxes[{name!r}]") for row in rows]
    except TypeError as error:
        raise TypeError(
            f"boxes[{name!r}]: got {rows!r}, expected a list of boxes (x1, y1, x2, y2)"
        ) from error


def _find_kaggle_folder(names: Index, root: str | None) -> str:
    """Give the folder of the XML files of images in Kaggle's layout."""
    found = None
    if root is not None:
        top = os.path.abspath(local_path(root)) if is_local(root) else root
        found = _KAGGLE.match(f"{top}/{names.key(0)}")
    if found is None:
        what = "shards" if root is None else f"the images below {root}"
        raise ValueError(
            f"boxes: got {AUTO_BOXES!r} for {what}, which are not in Kaggle's layout, .../"
            f"Data/CLS-LOC/train; {_EXPECTED}{', or True' if root is None else ''}"
        )
    return f"{found[1]}Annotations/CLS-LOC/{found[2]}"


def _open_folder(
    where: str, open_root: Callable[[str], Store]
) -> tuple[Store, Iterable[ObjectInfo]] | None:
    """Open and list what may be a folder or a prefix; None if it is a file, or not there."""
    if is_local(where):
        path = local_path(where)
        if not path.is_dir():
            return None
        store = open_root(str(path))
        assert isinstance(store, WritableStore), "folders can be listed"
        return store, store.list()
    if where.casefold().endswith(".csv"):
        return None
    store = open_root(where)
    listed = store.list() if isinstance(store, WritableStore) else iter(())
    first = next(listed, None)
    return None if first is None else (store, itertools.chain((first,), listed))


def _take_xml(listed: Iterable[ObjectInfo], where: str) -> Index:
    seen = (info for info in listed if not is_hidden(info.key))
    files = Index.from_listing(seen, suffixes=(".xml",), ignore_case=True)
    if not len(files):
        raise IndexFormatError(f"boxes: {where}: holds no XML file, {_EXPECTED}")
    return files


def _read_table(where: str, open_root: Callable[[str], Store]) -> bytes:
    if _TAR.search(where):
        raise ValueError(
            f"boxes: {where}: is a tar, {_EXPECTED}; unpack it, or give it to"
            " `concurrent-dataloader shard --boxes`"
        )
    try:
        if is_local(where):
            return local_path(where).read_bytes()
        root, key = split_url(where)
        # Without a cache: images do not change, tables of them do.
        return bytes(uncached(open_root(root)).get(key))
    except FileNotFoundError as error:
        raise KeyNotFoundError(
            f"boxes: {where}: no such file, {_EXPECTED}; check the path"
        ) from error
