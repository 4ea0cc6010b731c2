"""Files of bounding boxes: one XML file an image."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.annotations import (
    NO_FILE,
    Annotation,
    parse_annotation,
    relative_boxes,
)
from concurrent_dataloader.boxes import merge
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.prepare.sources.archives import UnpackedTar
from concurrent_dataloader.prepare.sources.found import Found


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class XmlBoxes:
    """Boxes in one XML file an image, each read when it is asked for.

    Shapes:
        rows: (N,) int64, position of a sample's file in ``found``; `NO_FILE`: it has none.
    """

    found: Found
    rows: NDArray[np.int64]
    is_merged: bool
    unpacked: tuple[UnpackedTar, ...] = ()

    def annotation(self, position: int) -> Annotation | None:
        """Read what the file of a sample says; None if there is none.

        Raises:
            ShardFormatError: It is no annotation.
        """
        row = int(self.rows[position])
        if row == NO_FILE:
            return None
        places = self.found.places
        return parse_annotation(bytes(places.read(row)), places.describe(row))

    def boxes(self, position: int) -> tuple[Box, ...]:
        """Give the boxes of a sample; raises as `annotation`."""
        annotation = self.annotation(position)
        boxes = () if annotation is None else relative_boxes(annotation)
        return merge(boxes) if self.is_merged else boxes

    def select(self, positions: NDArray[np.int64]) -> XmlBoxes:
        """Give those of some samples, in the order given."""
        return dataclasses.replace(self, rows=self.rows[positions])

    def close(self) -> None:
        """Give back what this process has opened."""
        self.found.places.close()
        for unpacked in self.unpacked:
            unpacked.close()
