"""Which sample goes into which shard: pure, made before anything is written, the same anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_PLACE = re.compile(r"%(0?)(\d*)d")
_MIN_INDEX_DIGITS = 7


class ShardPlan(NamedTuple):
    """Shard ``i`` holds the source's samples ``order[bounds[i] : bounds[i + 1]]``."""

    order: NDArray[np.int64]
    """Positions in the source, in the order of writing, (N,)."""

    bounds: NDArray[np.int64]
    """(number of shards + 1,), from 0 to N."""

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return len(self.bounds) - 1

    def positions(self, shard: int) -> NDArray[np.int64]:
        """Give the positions in the source of a shard's samples."""
        return self.order[self.bounds[shard] : self.bounds[shard + 1]]


def shuffle_positions(num_samples: int, seed: int | None) -> NDArray[np.int64]:
    """Give the order of writing: a permutation of all, or the source's own order.

    Numpy promises that its ``RandomState`` gives the same permutation for a seed in all releases.

    Args:
        num_samples: How many there are.
        seed: 0 to 2**32 - 1; None: do not shuffle.

    Raises:
        ValueError: The seed is out of range.
    """
    if seed is None:
        return np.arange(num_samples, dtype=np.int64)
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed: got {seed}, expected 0 to {(1 << 32) - 1}")
    return np.random.RandomState(seed).permutation(num_samples).astype(np.int64)


def split_by_count(order: NDArray[np.int64], max_count: int | None) -> ShardPlan:
    """Put ``max_count`` samples into each shard but the last, or all into one.

    Raises:
        ValueError: ``max_count`` is less than 1.
    """
    if max_count is not None and max_count < 1:
        raise ValueError(f"maxcount: got {max_count}, expected 1 or more")
    bounds = np.append(np.arange(0, len(order), max_count or max(len(order), 1)), len(order))
    return ShardPlan(order, bounds.astype(np.int64))


def split_by_size(
    order: NDArray[np.int64],
    sizes: NDArray[np.int64],
    max_bytes: int,
    *,
    max_count: int | None = None,
    fixed_bytes: int = 0,
) -> ShardPlan:
    """Fill each shard up to ``max_bytes``; a sample that is larger is alone in its shard.

    Args:
        order: Positions in the order of writing.
        sizes: What each position takes in a shard, headers and padding included, in bytes.
        max_bytes: Of the whole file.
        max_count: Samples of a shard, at most.
        fixed_bytes: What a shard takes besides its samples.

    Raises:
        ValueError: ``max_bytes`` or ``max_count`` is less than 1.
    """
    if max_bytes < 1:
        raise ValueError(f"maxsize: got {max_bytes} bytes, expected 1 or more")
    split_by_count(order[:0], max_count)
    ends = np.cumsum(sizes[order])
    bounds = [0]
    while bounds[-1] < len(order):
        start = bounds[-1]
        begun = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, begun + max_bytes - fixed_bytes, side="right"))
        if max_count is not None:
            stop = min(stop, start + max_count)
        bounds.append(max(stop, start + 1))
    return ShardPlan(order, np.array(bounds, np.int64))


class NamePattern:
    """Names of numbered files, such as ``train-%06d.tar``, that sort as their numbers do.

    A second place, as in ``train-%05d-of-%05d``, is the number of files. Numbers get as many digits
    as the pattern says, or more if the last one needs more.
    """

    def __init__(self, pattern: str) -> None:
        """Take a pattern apart.

        Raises:
            ValueError: It has no place for the number, more than two, or leads out of the folder.
        """
        self.pattern = pattern
        self._places = [int(found[2] or 1) for found in _PLACE.finditer(pattern)]
        self._texts = [part.replace("%%", "%") for part in _PLACE.sub("\0", pattern).split("\0")]
        if not 1 <= len(self._places) <= 2 or any(re.search(r"[%/\0]", t) for t in self._texts):
            raise ValueError(
                f"pattern: got {pattern!r}, expected a file name with one '%06d' or the like, and"
                " another one where the number of shards is to stand"
            )
        if self._texts[0].startswith("."):
            raise ValueError(f"pattern: got {pattern!r}, expected no dot at the begin")

    @property
    def begin(self) -> str:
        """What all names begin with."""
        return self._texts[0]

    def names(self, num_files: int) -> list[str]:
        """Give all names, in order."""
        return list(self._names(num_files))

    def _names(self, num_files: int) -> Iterator[str]:
        digits = max(self._places[0], len(str(max(num_files - 1, 0))))
        for number in range(num_files):
            parts = [self._texts[0], f"{number:0{digits}d}", self._texts[1]]
            if len(self._places) == 2:
                parts += [f"{num_files:0{max(self._places[1], digits)}d}", self._texts[2]]
            yield "".join(parts)

    def matches(self, name: str) -> bool:
        """Tell whether a file may be one of these, whatever the number of digits."""
        return re.fullmatch(r"\d+".join(map(re.escape, self._texts)), name, re.ASCII) is not None


def index_digits(num_samples: int) -> int:
    """Tell how many digits the number of a sample gets: 7 as in the older shards, or more."""
    return max(_MIN_INDEX_DIGITS, len(str(max(num_samples - 1, 0))))


def find_duplicate(hashes: NDArray[Any]) -> tuple[int, int] | None:
    """Give two places that hold the same value, if there are any."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    return (int(order[same[0]]), int(order[same[0] + 1])) if len(same) else None
