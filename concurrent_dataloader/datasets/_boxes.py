"""The bounding box of each image, from a table of the user's, as it stands in an item."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from concurrent_dataloader.boxes import BoxTable, boxes_from_table, check_box, parse_box_table
from concurrent_dataloader.datasets._places import is_local, local_path
from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.index import Index, choose_positions
from concurrent_dataloader.shard_names import split_url
from concurrent_dataloader.stores import Store

BoxSource: TypeAlias = str | os.PathLike[str] | Mapping[str, Sequence[Sequence[float]]]
"""A table ``name,x1,y1,x2,y2`` as path or URL, or the boxes of each name: 0 is the left or upper
side of the image, 1 the other. A name is an image's key, or its file name, or that without its
ending, whichever of them is there first."""


def look_up_boxes(
    given: BoxSource | bool | None,
    names: Index,
    open_root: Callable[[str], Store],
    *,
    limit: int | None = None,
    sample_seed: int | None = None,
) -> BoxTable | None:
    """Find the boxes of samples by their names.

    Args:
        given: Where they are; None or False: there are none.
        names: The samples.
        open_root: Opens the store of a table that is no local file.
        limit: Give those of so many samples.
        sample_seed: And of which, as `Index.limit`.

    Raises:
        TypeError: It is neither a path nor a table.
        FileNotFoundError: There is no such table.
        ValueError: It is none, or none of its rows belongs to any sample.
    """
    if given is None or given is False:
        return None
    if given is True:
        raise TypeError(
            "boxes: got True, but single images hold none, expected a table name,x1,y1,x2,y2"
        )
    if isinstance(given, Mapping):
        where, table = "boxes", {name: _check_boxes(name, rows) for name, rows in given.items()}
    else:
        where = os.fspath(given)
        table = parse_box_table(_read_table(where, open_root), where)
    found = boxes_from_table(names, table, where, is_merged=True)
    chosen = choose_positions(len(names), limit, sample_seed)
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


def _read_table(where: str, open_root: Callable[[str], Store]) -> bytes:
    try:
        if not is_local(where):
            root, key = split_url(where)
            return bytes(open_root(root).get(key))
        path = local_path(where)
        if path.is_dir():
            raise ValueError(
                f"boxes: {where}: is a folder, expected a table name,x1,y1,x2,y2; XML files are"
                " read by `concurrent-dataloader shard --boxes`"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise KeyNotFoundError(
            f"boxes: {where}: no such file, expected a table name,x1,y1,x2,y2; check the path"
        ) from error
