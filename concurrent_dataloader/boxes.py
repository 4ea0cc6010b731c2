"""Bounding boxes of samples, and the tables and the JSON that hold them."""

from __future__ import annotations

import array
import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
import orjson
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.devkit import stem_of
from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.index import Index

_NUM_COLUMNS = 5
_ROUNDING = 1e-3


class NoBoxesError(ValueError):
    """What was to hold boxes has none of these samples."""


class BoxLookup(Protocol):
    """Boxes by position; pickles, and may be asked from many threads."""

    def boxes(self, position: int) -> tuple[Box, ...]:
        """Give the boxes of a sample."""
        ...

    def select(self, positions: NDArray[np.int64]) -> BoxLookup:
        """Give those of some samples, in the order given."""
        ...

    def close(self) -> None:
        """Give back what this process has opened."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class BoxTable:
    """Boxes in memory, as arrays.

    Shapes:
        first: (N,) int64, row of a sample's first box.
        count: (N,) int64, how many it has.
        rows: (M, 4) float64, x1, y1, x2, y2.
    """

    first: NDArray[np.int64]
    count: NDArray[np.int64]
    rows: NDArray[np.float64]

    @classmethod
    def of(cls, boxes_of_samples: Iterable[Sequence[Box]]) -> Self:
        """Make a table of each sample's boxes."""
        counts, values = array.array("q"), array.array("d")
        for boxes in boxes_of_samples:
            counts.append(len(boxes))
            for box in boxes:
                values.extend(box)
        count = np.array(counts, np.int64)
        return cls(np.cumsum(count) - count, count, np.array(values, np.float64).reshape(-1, 4))

    def boxes(self, position: int) -> tuple[Box, ...]:
        """Give the boxes of a sample."""
        first = int(self.first[position])
        rows: Any = self.rows[first : first + int(self.count[position])]
        return tuple(Box(*row) for row in rows.tolist())

    def select(self, positions: NDArray[np.int64]) -> BoxTable:
        """Give those of some samples, in the order given."""
        return BoxTable(self.first[positions], self.count[positions], self.rows)

    def close(self) -> None:
        """Do nothing."""


def merge(boxes: Sequence[Box]) -> tuple[Box, ...]:
    """Give the one box that holds all of them, which is their union; none of none."""
    if not boxes:
        return ()
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return (Box(min(x1), min(y1), max(x2), max(y2)),)


def check_box(values: Sequence[float], where: str) -> Box:
    """Give a relative box, with what rounding put outside of the image cut off.

    Raises:
        ValueError: It is no relative box.
    """
    x1, y1, x2, y2 = (min(1.0, max(0.0, value)) for value in values)
    far = max(abs(given - cut) for given, cut in zip(values, (x1, y1, x2, y2), strict=True))
    # Also false for what is not a number.
    if not (far <= _ROUNDING and x1 <= x2 and y1 <= y2):
        raise ValueError(
            f"{where}: got box {', '.join(f'{value:g}' for value in values)}, expected x1, y1, x2,"
            " y2 with 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1, relative to the image"
        )
    return Box(x1, y1, x2, y2)


def parse_box_table(raw: bytes, where: str) -> dict[str, list[Box]]:
    """Read rows ``name,x1,y1,x2,y2``, relative to the image, with or without a line of titles.

    Args:
        raw: The content.
        where: What errors call the file.

    Raises:
        ValueError: A row is no box.
    """
    found: dict[str, list[Box]] = {}
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: no text ({error}), expected rows name,x1,y1,x2,y2") from error
    for number, row in enumerate(csv.reader(io.StringIO(text)), start=1):
        if not row:
            continue
        try:
            name, *values = row
            corners = [float(value) for value in values]
            if len(row) != _NUM_COLUMNS:
                raise ValueError(f"{len(row)} columns")
        except ValueError as error:
            if number == 1 and len(row) == _NUM_COLUMNS:
                continue  # titles
            raise ValueError(
                f"{where}, line {number}: got {','.join(row)!r} ({error}), expected"
                " name,x1,y1,x2,y2"
            ) from error
        found.setdefault(name, []).append(check_box(corners, f"{where}, line {number}"))
    return found


def boxes_from_table(
    names: Index, table: Mapping[str, Sequence[Box]], where: str, *, is_merged: bool
) -> BoxTable:
    """Give each sample the boxes of the rows with its name: whole, without folders, or its stem.

    Samples without a row have no box.

    Raises:
        NoBoxesError: No row belongs to any sample.
    """
    num_matched = 0

    def look_up() -> Iterable[Sequence[Box]]:
        nonlocal num_matched
        for name in names.keys():  # noqa: SIM118 - no dict
            base = name[name.rfind("/") + 1 :]
            boxes = table.get(name) or table.get(base) or table.get(stem_of(base)) or ()
            num_matched += bool(boxes)
            yield merge(boxes) if is_merged else boxes

    boxes = BoxTable.of(look_up())
    if not num_matched:
        raise NoBoxesError(
            f"{where}: no row belongs to any of the {len(names)} samples, the first of which is"
            f" {names.key(0)!r}; check the names"
        )
    return boxes


def parse_boxes(content: Buffer, where: str) -> tuple[Box, ...]:
    """Read the ``json`` member of a sample: ``{"bbox": [x1, y1, x2, y2]}``, rows of these, or null.

    Args:
        content: The member's.
        where: What errors call it.

    Raises:
        ShardFormatError: It holds something else as its box.
    """
    try:
        table = orjson.loads(bytes(content))
        found = table.get("bbox") if isinstance(table, dict) else None
        if not found:
            return ()
        rows = found if isinstance(found[0], list) else [found]
        return tuple(check_box([float(value) for value in row], where) for row in rows)
    except (ValueError, TypeError, KeyError) as error:
        raise ShardFormatError(
            f'{where}: no boxes ({error}), expected {{"bbox": [x1, y1, x2, y2]}} or null'
        ) from error
