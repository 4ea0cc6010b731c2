"""Full batches of partial ones, in the same order.

Workers that read parts of a stream each end with a batch that is not full. `Rebatch` puts batches
together as they come: the samples stay in order, and no batch but the last is short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch

T = TypeVar("T")

Path = tuple[Any, ...]
"""Keys and positions that lead to a part of a batch."""


class Rebatch(Generic[T]):
    """Batches of exactly ``batch_size`` samples, but for the last, of batches of any size.

    A batch may be a tensor or an array of which the first dimension counts samples, or tuples,
    lists, named tuples and mappings of such, as torch's ``default_collate`` makes them; or hold a
    list with an entry for each sample (texts, or boxes, of which each sample has its own number). A
    batch that has the right size already goes through as it is, without a copy.
    """

    def __init__(
        self,
        batches: Iterable[T],
        batch_size: int,
        *,
        drop_last: bool = False,
        num_samples: int | None = None,
        per_sample_lists: bool = False,
    ) -> None:
        """Wrap a loader.

        Args:
            batches: The loader; asked for a new iterator in each epoch.
            batch_size: Samples of a batch.
            drop_last: Leave a last batch out that is not full.
            num_samples: How many samples all batches hold together, for ``len``; None: not known.
            per_sample_lists: Whether every list has an entry for each sample, and tuples and
                mappings alone hold fields. Otherwise a list of arrays that all have as many rows as
                there are samples is taken for fields, as ``default_collate`` makes them.

        Raises:
            ValueError: ``batch_size`` is less than 1, or ``num_samples`` negative.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected 1 or more")
        if num_samples is not None and num_samples < 0:
            raise ValueError(f"num_samples: got {num_samples}, expected 0 or more")
        self.batches = batches
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_samples = num_samples
        self.per_sample_lists = per_sample_lists

    def __len__(self) -> int:
        """Count the batches of an epoch.

        Raises:
            TypeError: ``num_samples`` was not given.
        """
        if self.num_samples is None:
            raise TypeError("num_samples: got None, expected the number of samples for len()")
        full, rest = divmod(self.num_samples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[T]:
        """Yield the batches of an epoch.

        Raises:
            ValueError: A batch cannot be taken apart, two do not go together, or there are not as
                many samples as ``num_samples`` says (raised after the last batch).
        """
        # The samples that wait are `waiting`, from `first` on in the oldest of them.
        waiting: list[tuple[_Batch, int]] = []
        first = num_waiting = total = 0
        kinds: dict[Path, bool] = {}
        for whole in self.batches:
            batch = _Batch(whole, self.per_sample_lists, kinds)
            total += batch.size
            if batch.size == 0:
                continue
            if not waiting and batch.size == self.batch_size:
                yield whole
                continue
            waiting.append((batch, batch.size))
            num_waiting += batch.size
            while num_waiting >= self.batch_size:
                waiting, first, taken = _take(waiting, first, self.batch_size)
                num_waiting -= self.batch_size
                yield taken
        if num_waiting and not self.drop_last:
            yield _take(waiting, first, num_waiting)[2]
        if self.num_samples is not None and total != self.num_samples:
            raise ValueError(
                f"num_samples: got {self.num_samples}, but the batches held {total} samples; give"
                " the right number, on which len() relies"
            )


def _take(
    waiting: list[tuple[_Batch, int]], first: int, count: int
) -> tuple[list[tuple[_Batch, int]], int, Any]:
    """Take samples from the oldest batches; give what is left, where it begins, and the batch."""
    pieces: list[tuple[_Batch, int, int]] = []
    at = 0
    while count:
        batch, size = waiting[at]
        stop = min(size, first + count)
        pieces.append((batch, first, stop))
        count -= stop - first
        first = stop
        if stop == size:
            at, first = at + 1, 0
    return waiting[at:], first, _join(pieces)


class _Batch:
    """A batch taken apart: its leaves, and how to put such leaves together again."""

    def __init__(self, whole: Any, per_sample_lists: bool, kinds: dict[Path, bool]) -> None:
        self.leaves: dict[Path, Any] = {}
        self._per_sample_lists = per_sample_lists
        # Whether the list at a path has an entry for each sample, as earlier batches showed.
        self._kinds = kinds
        is_list = per_sample_lists and isinstance(whole, list)
        size = len(cast("list[Any]", whole)) if is_list else _find_size(whole)
        if size is None:
            raise ValueError(
                f"batch: got a {type(whole).__name__} without a tensor, an array or a list of"
                " samples in it; expected one to count samples by"
            )
        self.size = size
        self.build = self._take_apart(whole, ())

    def _take_apart(self, part: Any, path: Path) -> Callable[[Mapping[Path, Any]], Any]:
        if isinstance(part, (torch.Tensor, np.ndarray)):
            return self._add_leaf(path, part, part.shape[0] if part.ndim else None)
        if isinstance(part, Mapping):
            mapping = cast("Mapping[Any, Any]", part)
            fields = {key: self._take_apart(value, (*path, key)) for key, value in mapping.items()}
            kind: Any = type(mapping)
            return lambda leaves: _build_mapping(
                kind, {key: build(leaves) for key, build in fields.items()}
            )
        if isinstance(part, (list, tuple)):
            return self._take_sequence_apart(cast("Sequence[Any]", part), path)
        raise ValueError(
            f"batch: got a {type(part).__name__} at {_name(path)}, expected tensors, arrays, lists,"
            " tuples and mappings; make one of them in collate_fn"
        )

    def _take_sequence_apart(
        self, part: Sequence[Any], path: Path
    ) -> Callable[[Mapping[Path, Any]], Any]:
        if isinstance(part, list) and self._is_per_sample(part, path):
            return self._add_leaf(path, part, len(part))
        parts = [self._take_apart(value, (*path, at)) for at, value in enumerate(part)]
        kind: Any = type(part)
        if hasattr(kind, "_fields"):
            return lambda leaves: kind(*(build(leaves) for build in parts))
        return lambda leaves: kind([build(leaves) for build in parts])

    def _is_per_sample(self, part: list[Any], path: Path) -> bool:
        """Tell a list of samples from one of fields."""
        if self._per_sample_lists:
            return True
        could_be_fields = len(part) != self.size or all(
            _find_size(value) == self.size for value in part
        )
        if could_be_fields and len(part) == self.size:
            # Either, as two fields in a batch of two: what other batches showed decides.
            return self._kinds.get(path, False)
        if self._kinds.setdefault(path, not could_be_fields) == could_be_fields:
            raise ValueError(
                f"batch: the list at {_name(path)} holds fields in some batches, and samples in"
                " others; give per_sample_lists=True if it always has an entry for each sample"
            )
        return not could_be_fields

    def _add_leaf(
        self, path: Path, leaf: Any, size: int | None
    ) -> Callable[[Mapping[Path, Any]], Any]:
        if size != self.size:
            raise ValueError(
                f"batch: got {'a single number' if size is None else f'{size} samples'} at"
                f" {_name(path)}, and {self.size} samples elsewhere; expected equally many"
            )
        self.leaves[path] = leaf
        return lambda leaves: leaves[path]


def _build_mapping(kind: Any, fields: dict[Any, Any]) -> Any:
    try:
        return kind(fields)
    except TypeError:  # such as a defaultdict
        return fields


def _find_size(whole: Any) -> int | None:
    """Count samples by the array that lies least deep, or else by the first list."""
    level: list[Any] = [whole]
    num_entries: int | None = None
    while level:
        below: list[Any] = []
        for part in level:
            if isinstance(part, (torch.Tensor, np.ndarray)) and part.ndim:
                return int(part.shape[0])
            if isinstance(part, Mapping):
                below.extend(cast("Mapping[Any, Any]", part).values())
            elif isinstance(part, (list, tuple)):
                values = cast("Sequence[Any]", part)
                below.extend(values)
                if num_entries is None and isinstance(part, list):
                    num_entries = len(values)
        level = below
    return num_entries


def _join(pieces: Sequence[tuple[_Batch, int, int]]) -> Any:
    first = pieces[0][0]
    for batch, _, _ in pieces[1:]:
        if batch.leaves.keys() != first.leaves.keys():
            odd = next(iter(batch.leaves.keys() ^ first.leaves.keys()))
            raise ValueError(
                f"batch: {_name(odd)} is in some batches only, expected all to be built alike"
            )
    leaves = {
        path: _concatenate([batch.leaves[path][start:stop] for batch, start, stop in pieces])
        for path in first.leaves
    }
    return first.build(leaves)


def _concatenate(parts: list[Any]) -> Any:
    # One part is copied too: a slice would keep all of the batch that it is a view of.
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [value for part in parts for value in part]


def _name(path: Path) -> str:
    return "".join(f"[{step!r}]" for step in path) or "its top"
