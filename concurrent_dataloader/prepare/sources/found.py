"""What is found where samples are looked for, before they have labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.boxes import BoxLookup
from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.files import is_hidden
from concurrent_dataloader.formats.tar import check_name
from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.sources.places import Places

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".ppm", ".bmp")
"""Endings of the files that are samples, in any case, unless told otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Files that are samples, and how many are not."""

    where: str
    names: Index
    """With sizes, where these are known without reading."""

    places: Places
    num_stray: int = 0
    strays: tuple[str, ...] = ()
    """Their names, in the order in which they were found."""

    labels: NDArray[np.int32] | None = None
    """Those that shards hold, (N,) int32, -1 where there is none; None where no sample has one."""

    boxes: BoxLookup | None = None
    """Those that shards hold."""

    classes: tuple[str, ...] | None = None
    """What shards themselves call the classes of these labels; None where they do not say."""

    label_space: str | None = None
    """As `Source.label_space`, of these classes."""

    def select(self, positions: NDArray[np.int64]) -> Found:
        """Give some of the files, in the order given."""
        return dataclasses.replace(
            self,
            names=self.names.select(positions),
            places=self.places.select(positions),
            labels=None if self.labels is None else self.labels[positions],
            boxes=None if self.boxes is None else self.boxes.select(positions),
        )


class Sieve:
    """Parts samples from stray files, by their names, and counts the latter."""

    def __init__(self, where: str, suffixes: Sequence[str]) -> None:
        """Begin to count.

        Args:
            where: What errors call the place.
            suffixes: Endings of samples, in any case; every file is one when empty.
        """
        if isinstance(suffixes, str):
            raise TypeError(f"suffixes: got {suffixes!r}, expected a tuple such as ('{suffixes}',)")
        self.where = where
        self.suffixes = tuple(suffix.casefold() for suffix in suffixes)
        self.num_stray = 0
        self.strays: list[str] = []

    def keeps(self, name: str) -> bool:
        """Tell whether a file is a sample; what is hidden, or of another ending, is none."""
        return not is_hidden(name) and (
            not self.suffixes or name.casefold().endswith(self.suffixes)
        )

    def count_stray(self, name: str) -> None:
        """Count a file that is no sample."""
        self.num_stray += 1
        self.strays.append(name)


def refuse_unsafe(name: str, where: str) -> None:
    """Raise for a name that does not stay below its folder, or is no text.

    Raises:
        ShardFormatError: It is absolute, leads out of the folder, or is not UTF-8.
    """
    try:
        check_name(name)
        name.encode()
    except ShardFormatError as error:
        raise ShardFormatError(f"{where}: {error}") from error
    except UnicodeEncodeError as error:
        raise ShardFormatError(
            f"{where}: the name {name!r} is not UTF-8, expected one that is; rename the file"
        ) from error


def clean_name(name: str, where: str) -> str:
    """Give a name without empty and ``.`` parts.

    Raises:
        ShardFormatError: As in `refuse_unsafe`.
    """
    refuse_unsafe(name, where)
    if "//" in name or "./" in name:
        return "/".join(part for part in name.split("/") if part not in ("", "."))
    return name
