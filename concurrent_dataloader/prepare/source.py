"""Samples that are to be packed or checked, wherever they lie: what every such command works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from typing_extensions import Buffer

from concurrent_dataloader.formats.fields import Box


class Source(Protocol):
    """A fixed list of samples whose bytes can be read in any order, from several threads at once.

    It pickles, so that processes can share the work; what it has opened stays with each process.
    """

    classes: Sequence[str] | None
    """Name of each class in the order of the labels; None if samples have no labels."""

    label_space: str | None
    """A `LabelSpace`'s value where the classes are ImageNet's; None where that is not known."""

    def __len__(self) -> int: ...

    def name(self, position: int) -> str:
        """Give a sample's path relative to the source, with its ending, as ``n01440764/1.JPEG``."""
        ...

    def label(self, position: int) -> int | None:
        """Give a sample's label, from 0 on."""
        ...

    def boxes(self, position: int) -> Sequence[Box]:
        """Give a sample's bounding boxes; none where none are known."""
        ...

    def size_bytes(self, position: int) -> int | None:
        """Give a sample's size, where it is known without reading it."""
        ...

    def read(self, position: int) -> Buffer:
        """Read a sample's bytes, as they are.

        Raises:
            StoreError: They cannot be had.
            ShardFormatError: The archive that holds them is damaged.
        """
        ...

    def close(self) -> None:
        """Give back what this process has opened, temporary files included. May be called twice."""
        ...


def check_same_classes(sources: Mapping[str, Source]) -> None:
    """Raise unless splits that belong together number their classes alike.

    Raises:
        ValueError: They do not; a model trained on one would be wrong on the other.
    """
    (first, one), *others = sources.items()
    for split, other in others:
        if other.classes is None or one.classes is None:
            if other.classes is not one.classes:
                raise ValueError(f"splits: of {first} and {split} one has classes, the other none")
        elif list(other.classes) != list(one.classes):
            unshared = sorted({*one.classes}.symmetric_difference(other.classes))
            what = f", as {unshared[0]!r} is in one of them only" if unshared else ""
            raise ValueError(
                f"splits: {first} has {len(one.classes)} classes and {split} others,"
                f" {len(other.classes)}{what}; give both the same by --class-map"
            )
