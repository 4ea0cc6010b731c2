"""Which part of a sample may run in the background, which early, and which in its turn only."""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from torch.utils.data import ConcatDataset, Subset

from concurrent_dataloader.datasets.contract import SampleLocation, StagedDataset


class Stages(Protocol):
    """A sample in three stages: fetched in any thread, decoded in any order, finished in turn."""

    has_fetch_async: bool
    """Whether `fetch_async` may be awaited; else ``fetch`` runs in threads in any case."""

    merges_requests: bool
    """Whether `plan_requests` has something to say; else each position is a request."""

    takes_batches: bool
    """Whether a position stands for a whole batch, since the dataset has ``__getitems__``."""

    def fetch(self, position: Any, /) -> Any:
        """Do what takes time and draws no random number."""
        ...

    def fetch_async(self, position: Any, /) -> Awaitable[Any]:
        """Do as `fetch` does, without blocking the event loop."""
        ...

    def plan_requests(self, positions: Sequence[Any], /) -> list[list[int]]:
        """Say which of these are fetched together, as `StagedDataset.plan_requests` does."""
        ...

    def fetch_many(self, positions: Sequence[Any], /) -> Sequence[Any]:
        """Do as `fetch` does, for positions that are fetched together."""
        ...

    def fetch_many_async(self, positions: Sequence[Any], /) -> Awaitable[Sequence[Any]]:
        """Do as `fetch_many` does, without blocking the event loop."""
        ...

    def decode(self, position: Any, fetched: Any, /) -> Any:
        """Do what is pure, so that it may be done before its turn, or twice."""
        ...

    def finish(self, decoded: Any, /) -> Any:
        """Make the sample, in sampler order: it may draw random numbers."""
        ...

    def locate_sample(self, position: Any, /) -> SampleLocation | None:
        """Say where a sample lies, for messages; None where the dataset does not."""
        ...


class _StagedStages:
    """A staged dataset: its own stages."""

    takes_batches = False

    def __init__(self, dataset: StagedDataset[Any, Any]) -> None:
        self.fetch = dataset.fetch
        self.fetch_async = dataset.fetch_async
        self.fetch_many = dataset.fetch_many
        self.fetch_many_async = dataset.fetch_many_async
        self.plan_requests = dataset.plan_requests
        self.merges_requests = type(dataset).plan_requests is not StagedDataset.plan_requests
        self.has_fetch_async = type(dataset).fetch_async is not StagedDataset.fetch_async
        self.decode = dataset.decode
        self.finish = dataset.apply_transform
        self.locate_sample = dataset.locate_sample


class _EachAlone:
    """Stages in which each position is a request of its own."""

    merges_requests = False

    def plan_requests(self, positions: Sequence[Any]) -> list[list[int]]:
        return [[number] for number in range(len(positions))]

    def fetch_many(self, positions: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError

    def fetch_many_async(self, positions: Sequence[Any]) -> Awaitable[Sequence[Any]]:
        raise NotImplementedError


class _PlainStages(_EachAlone):
    """Any other dataset: all of ``__getitem__`` runs in the background, its transform included."""

    def __init__(self, dataset: Any, takes_batches: bool) -> None:
        self._dataset = dataset
        self.takes_batches = takes_batches
        self.has_fetch_async = not takes_batches and inspect.iscoroutinefunction(
            getattr(dataset, "getitem_async", None)
        )
        self.fetch: Callable[[Any], Any] = (
            dataset.__getitems__ if takes_batches else dataset.__getitem__
        )

    def fetch_async(self, position: Any) -> Awaitable[Any]:
        return self._dataset.getitem_async(position)

    def locate_sample(self, position: Any) -> SampleLocation | None:
        if isinstance(self._dataset, StagedDataset):
            return self._dataset.locate_sample(position)
        key = getattr(self._dataset, "key", None)
        return SampleLocation(str(key(position))) if callable(key) else None

    def decode(self, position: Any, fetched: Any) -> Any:
        return fetched

    def finish(self, decoded: Any) -> Any:
        return decoded


class _SubsetStages:
    """torch's Subset: the stages of what it is a subset of, at other positions."""

    def __init__(self, subset: Subset[Any], stages: Stages) -> None:
        self._indices = subset.indices
        self._stages = stages
        self.takes_batches = stages.takes_batches
        self.merges_requests = stages.merges_requests
        self.has_fetch_async = stages.has_fetch_async
        self.finish = stages.finish

    def _translate(self, position: Any) -> Any:
        if isinstance(position, list):
            return [self._indices[each] for each in position]
        return self._indices[position]

    def fetch(self, position: Any) -> Any:
        return self._stages.fetch(self._translate(position))

    def fetch_async(self, position: Any) -> Awaitable[Any]:
        return self._stages.fetch_async(self._translate(position))

    def plan_requests(self, positions: Sequence[Any]) -> list[list[int]]:
        return self._stages.plan_requests(list(map(self._translate, positions)))

    def fetch_many(self, positions: Sequence[Any]) -> Sequence[Any]:
        return self._stages.fetch_many(list(map(self._translate, positions)))

    def fetch_many_async(self, positions: Sequence[Any]) -> Awaitable[Sequence[Any]]:
        return self._stages.fetch_many_async(list(map(self._translate, positions)))

    def decode(self, position: Any, fetched: Any) -> Any:
        return self._stages.decode(self._translate(position), fetched)

    def locate_sample(self, position: Any) -> SampleLocation | None:
        return self._stages.locate_sample(self._translate(position))


class _ConcatStages:
    """torch's ConcatDataset: the stages of its part that holds the position."""

    takes_batches = False

    def __init__(self, concat: ConcatDataset[Any], parts: list[Stages]) -> None:
        self._stops = concat.cumulative_sizes
        self._parts = parts
        self.merges_requests = any(part.merges_requests for part in parts)
        self.has_fetch_async = all(part.has_fetch_async for part in parts)

    def _translate(self, position: Any) -> tuple[Stages, int]:
        length = self._stops[-1]
        if position < -length:  # torch's own words for it are these, and its type of error
            raise ValueError("absolute value of index should not exceed dataset length")
        if position < 0:
            position += length
        part = bisect.bisect_right(self._stops, position)
        start = self._stops[part - 1] if part else 0
        return self._parts[part], position - start

    def fetch(self, position: Any) -> Any:
        part, position = self._translate(position)
        return part.fetch(position)

    def fetch_async(self, position: Any) -> Awaitable[Any]:
        part, position = self._translate(position)
        return part.fetch_async(position)

    def plan_requests(self, positions: Sequence[Any]) -> list[list[int]]:
        of_part: dict[int, list[tuple[int, Any]]] = {}
        for number, position in enumerate(positions):
            part, own = self._translate(position)
            of_part.setdefault(self._parts.index(part), []).append((number, own))
        groups = [
            [members[member][0] for member in group]
            for part, members in of_part.items()
            for group in self._parts[part].plan_requests([own for _, own in members])
        ]
        return sorted(groups, key=min)  # what is wanted first is begun first

    def fetch_many(self, positions: Sequence[Any]) -> Sequence[Any]:
        # A request lies in one part: `plan_requests` made it.
        parts, own = zip(*map(self._translate, positions), strict=True)
        return parts[0].fetch_many(list(own))

    def fetch_many_async(self, positions: Sequence[Any]) -> Awaitable[Sequence[Any]]:
        parts, own = zip(*map(self._translate, positions), strict=True)
        return parts[0].fetch_many_async(list(own))

    def decode(self, position: Any, fetched: Any) -> tuple[Stages, Any]:
        part, position = self._translate(position)
        return part, part.decode(position, fetched)

    def finish(self, decoded: tuple[Stages, Any]) -> Any:
        part, own = decoded
        return part.finish(own)

    def locate_sample(self, position: Any) -> SampleLocation | None:
        part, own = self._translate(position)
        return part.locate_sample(own)


def find_stages(dataset: Any, auto_collation: bool = True) -> Stages:
    """Find the stages of a map-style dataset, through torch's ``Subset`` and ``ConcatDataset``.

    A class of the user's own that overrides ``__getitem__`` is taken as it is: what its method adds
    would be left out otherwise.

    Args:
        dataset: Any map-style dataset.
        auto_collation: Whether samples are asked for by the batch; ``__getitems__`` is used only
            then, as torch does.
    """
    if (
        isinstance(dataset, StagedDataset)
        and type(dataset).__getitem__ is StagedDataset.__getitem__
    ):
        return _StagedStages(dataset)
    if type(dataset) is Subset:
        return _SubsetStages(dataset, find_stages(dataset.dataset, auto_collation))
    if type(dataset) is ConcatDataset:
        return _ConcatStages(
            dataset, [find_stages(part, auto_collation=False) for part in dataset.datasets]
        )
    takes_batches = auto_collation and bool(getattr(dataset, "__getitems__", None))
    return _PlainStages(dataset, takes_batches)
