"""Bounding boxes of samples: from tables, from XML files, from shards."""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.formats.fields import Box


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


_ROUNDING = 1e-3
