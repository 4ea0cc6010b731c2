"""Boxes in an XML file beside each image, each of which is read once, with its image."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader import shared_memory
from concurrent_dataloader.annotations import (
    NO_FILE,
    match_annotations,
    parse_annotation,
    relative_boxes,
)
from concurrent_dataloader.boxes import merge
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.index import Index
from concurrent_dataloader.stores import Store

_NO_BOX = -1.0
_ROW_BYTES = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AnnotationBoxes:
    """The box of each image, the union where its XML file has several.

    What was read is kept where all workers see it, however they are started, so that a file is
    read in the first epoch only. A number is written in one go, and is the same whoever writes it.
    So who sees a row without NaN sees all of it, and who sees one with NaN reads the file.

    Shapes:
        rows: (N,) int64, position of a sample's file in ``files``; `NO_FILE`: it has none.
        known: (K, 4) float32, the box of each file; NaN: not read yet; `_NO_BOX`: it has none.
    """

    store: Store
    files: Index
    rows: NDArray[np.int64]
    known: torch.Tensor

    @classmethod
    def find(
        cls,
        names: Index,
        store: Store,
        files: Index,
        where: str,
        chosen: NDArray[np.int64] | None = None,
    ) -> AnnotationBoxes:
        """Find which file is which sample's, by `match_annotations`; reads none.

        Args:
            names: The samples.
            store: Holds the files.
            files: Their keys.
            where: What errors call the place of the files.
            chosen: Give the boxes of these samples only, in this order.

        Raises:
            NoBoxesError: No file belongs to any sample.
            MemoryError: There is no shared memory for the boxes.
        """
        rows = match_annotations(names, files, where)
        if chosen is not None:
            rows = rows[chosen]
        taken, numbers = np.unique(rows[rows != NO_FILE], return_inverse=True)
        rows = rows.copy()
        rows[rows != NO_FILE] = numbers
        return cls(store=store, files=files.select(taken), rows=rows, known=_reserve(len(taken)))

    def boxes(self, position: int) -> tuple[Box, ...]:
        """Give the box of a sample, whose file is read if it was not.

        Raises:
            ShardFormatError: It is no annotation.
            StoreError: It cannot be read.
        """
        row = int(self.rows[position])
        if row == NO_FILE:
            return ()
        box = self._find(row)
        if box is None:
            box = self._keep(row, self.store.get(self.files.key(row)))
        return () if box[0] == _NO_BOX else (box,)

    def fetch(self, position: int) -> None:
        """Read the file of a sample, if it has one that was not read; raises as `boxes`."""
        self.boxes(position)

    async def fetch_async(self, position: int) -> None:
        """Read as `fetch` does, without blocking the event loop."""
        row = int(self.rows[position])
        if row != NO_FILE and self._find(row) is None:
            self._keep(row, await self.store.get_async(self.files.key(row)))

    def select(self, positions: NDArray[np.int64]) -> AnnotationBoxes:
        """Give those of some samples, in the order given, in the same memory."""
        return dataclasses.replace(self, rows=self.rows[positions])

    def close(self) -> None:
        """Do nothing: the store is closed by itself."""

    def _find(self, row: int) -> Box | None:
        box = Box(*self.known[row].tolist())
        return None if any(side != side for side in box) else box

    def _keep(self, row: int, raw: Buffer) -> Box:
        annotation = parse_annotation(bytes(raw), self.store.describe(self.files.key(row)))
        found = merge(relative_boxes(annotation))
        sides = torch.tensor(found[0] if found else (_NO_BOX,) * 4, dtype=torch.float32)
        self.known[row] = sides
        return Box(*sides.tolist())


def _reserve(num_files: int) -> torch.Tensor:
    if not num_files:
        return torch.empty(0, 4)
    num_bytes = _ROW_BYTES * num_files
    try:
        storage = shared_memory.reserve(num_bytes)
    except RuntimeError as error:
        raise MemoryError(
            f"boxes: those of {num_files} XML files take {num_bytes / 1e6:,.1f} MB (10^6 bytes) of"
            f" shared memory, which cannot be had: {error}; give it more (docker run --shm-size),"
            " or pack the images with `concurrent-dataloader shard --boxes`"
        ) from error
    block = torch.empty(0, dtype=torch.uint8).set_(storage)
    return block.view(torch.float32).reshape(num_files, 4).fill_(torch.nan)
