"""A source that is a table: names, labels and boxes in flat arrays, bytes at places of a store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.boxes import BoxLookup
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.labelling import Labelling
from concurrent_dataloader.prepare.sources.archives import UnpackedTar
from concurrent_dataloader.prepare.sources.found import Found


class SampleTable:
    """A `Source` over what was found and labelled; immutable, and read from many threads at once.

    It pickles, with 20 to 150 bytes a sample; the twin opens its own connections, and leaves
    temporary files to the process that made them.
    """

    def __init__(
        self,
        found: Found,
        labelling: Labelling | None,
        boxes: BoxLookup | None,
        unpacked: Sequence[UnpackedTar] = (),
    ) -> None:
        """Not for callers: use `open_source`."""
        self.where = found.where
        """What was opened, for a person."""
        self.classes: Sequence[str] | None = None if labelling is None else labelling.classes
        self.label_space: str | None = None if labelling is None else labelling.label_space
        self.num_stray = found.num_stray
        """Files that are no samples, and were left out."""
        self.strays = found.strays
        """Their names; in a pickled twin only the first one."""
        self.num_unlabelled = 0 if labelling is None else labelling.num_skipped
        """Samples that were left out, since their class is not known."""
        self._names = found.names
        self._places = found.places
        self._labels: NDArray[np.int32] | None = None if labelling is None else labelling.labels
        self._boxes = boxes
        self._unpacked = tuple(unpacked)

    def __len__(self) -> int:
        return len(self._names)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "strays": self.strays[:1]}

    def __repr__(self) -> str:
        return f"SampleTable({len(self)} samples, {self.where!r})"

    def name(self, position: int) -> str:
        """Give a sample's name, as `Source.name` says."""
        return self._names.key(position)

    def label(self, position: int) -> int | None:
        """Give a sample's label, from 0 on."""
        return None if self._labels is None else int(self._labels[position])

    def boxes(self, position: int) -> tuple[Box, ...]:
        """Give a sample's bounding boxes; reads its XML file, where they are in such."""
        return () if self._boxes is None else self._boxes.boxes(position)

    @property
    def has_boxes(self) -> bool:
        """Whether boxes of any sample are known."""
        return self._boxes is not None

    def size_bytes(self, position: int) -> int | None:
        """Give a sample's size, where it is known without reading it."""
        return self._names.size_bytes(position)

    def read(self, position: int) -> Buffer:
        """Read a sample, as `Source.read` says."""
        return self._places.read(position)

    def describe(self, position: int) -> str:
        """Name the place of a sample's bytes, for a person."""
        return self._places.describe(position)

    def close(self) -> None:
        """Give back what this process has opened, temporary files included."""
        self._places.close()
        if self._boxes is not None:
            self._boxes.close()
        for unpacked in self._unpacked:
            unpacked.close()

    @property
    def labels(self) -> NDArray[np.int32] | None:
        """Label of each sample, (N,) int32; None if there are none."""
        return self._labels
