"""Where a dataset stands, in the process that reads it, by torchdata's convention.

A dataset that has ``state_dict`` and ``load_state_dict`` is asked after each batch, and told before
it is read; of an iterable one the iterator too, if it has them. The states travel to the main
process with the batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch.utils.data import IterableDataset

from concurrent_dataloader.dataloader_mod import torch_internals
from concurrent_dataloader.dataloader_mod.error_policy import FailureLog
from concurrent_dataloader.dataloader_mod.resume import (
    GeneratorWatch,
    StatesAfter,
    freeze,
    is_stateful,
    thaw,
)
from concurrent_dataloader.dataloader_mod.settings import FetchSettings


class Source(Protocol):
    """A dataset in the process that reads it."""

    def load(self) -> None:
        """Go on where it was saved, if it was; before it is read."""
        ...

    def begin(self) -> None:
        """Begin an epoch."""
        ...

    def read(self) -> bytes | None:
        """Say where it stands; None if it has no state."""
        ...


class MapSource:
    """A dataset with positions."""

    def __init__(self, dataset: Any, saved: bytes | None) -> None:
        self._dataset = dataset
        self._saved = saved
        self._is_stateful = is_stateful(dataset)

    def load(self) -> None:
        """Put it into the state that was saved."""
        if self._saved is not None:
            self._dataset.load_state_dict(thaw(self._saved)["dataset"])

    def begin(self) -> None:
        """Begin nothing: positions are asked for one by one."""

    def read(self) -> bytes | None:
        """Say where it stands."""
        return freeze({"dataset": self._dataset.state_dict()}) if self._is_stateful else None


class StreamSource(IterableDataset[Any]):
    """An iterable dataset, as torch's loop is to see it: it may begin in the middle."""

    def __init__(
        self, dataset: Any, saved: bytes | None, failures: FailureLog | None = None
    ) -> None:
        """Stand before a dataset.

        Args:
            dataset: The user's; a `SkippingStream` if ``failures`` is given.
            saved: Where it goes on; None: it begins.
            failures: Told of what is passed over; None: nothing is.
        """
        self._dataset = dataset
        self._saved = saved
        self._failures = failures
        if failures is not None:
            failures.num_given = 0
        self._iterator: Any = None
        self._is_over = False
        # The iterator, or what it raised, from `begin` until torch's loop asks for it.
        self._begun: Any = None

    def load(self) -> None:
        """Wait for `begin`: an iterator is put into its state too."""

    def begin(self) -> None:
        """Make the iterator; what that raises is raised when torch's loop asks for it."""
        try:
            self._begun = self._iterator = self._make_iterator()
        except Exception as error:  # noqa: BLE001 - raised in __iter__
            self._begun = error

    def _make_iterator(self) -> Any:
        saved, self._saved = thaw(self._saved), None
        self._is_over = False
        if saved is None:
            return self._open()
        if saved["dataset"] is not None:
            self._dataset.load_state_dict(saved["dataset"])
        if saved["is_over"]:
            # The dataset is beyond this epoch already: asked for an iterator, it began the next.
            self._is_over = True
            return iter(())
        iterator = self._open()
        if saved["iterator"] is not None:
            iterator.load_state_dict(saved["iterator"])
        return iterator

    def _open(self) -> Any:
        if self._failures is None:
            return iter(self._dataset)
        return self._dataset.iter_skipping(self._failures.add_loss)

    def __iter__(self) -> Iterator[Any]:
        if self._begun is None:
            self.begin()
        begun, self._begun = self._begun, None
        if isinstance(begun, Exception):
            raise begun
        return self

    def __next__(self) -> Any:
        try:
            sample = next(self._iterator)
        except StopIteration:
            self._is_over = True
            raise
        if self._failures is not None:
            self._failures.count_given()
        return sample

    def __repr__(self) -> str:
        return repr(self._dataset)

    def read(self) -> bytes | None:
        """Say where it stands."""
        dataset = self._dataset.state_dict() if is_stateful(self._dataset) else None
        iterator = None
        if self._iterator is not self._dataset and is_stateful(self._iterator):
            iterator = self._iterator.state_dict()
        if dataset is None and iterator is None:
            return None
        return freeze({"dataset": dataset, "iterator": iterator, "is_over": self._is_over})


def describe_unread(dataset: Any) -> bytes | None:
    """Say where a dataset stands that no iterator has been made of."""
    if not is_stateful(dataset):
        return None
    return freeze({"dataset": dataset.state_dict(), "iterator": None, "is_over": False})


class WorkerWatch:
    """Says, after each batch of a worker, what has changed of its generators and its dataset."""

    def __init__(self, worker_id: int, source: Source) -> None:
        self.source = source
        self._worker_id = worker_id
        self._generators = GeneratorWatch()
        self._last: bytes | None = None

    def read(self, number: Any) -> StatesAfter | None:
        """Read what is to be sent before a batch, or before the sign that an epoch begins."""
        if isinstance(number, torch_internals.ResumeIteration):
            self.source.begin()
        generators = self._generators.read_change()
        dataset = self.source.read()
        if dataset == self._last:
            dataset = None
        else:
            self._last = dataset
        if generators is None and dataset is None:
            return None
        return StatesAfter(self._worker_id, number, generators, dataset)


def make_watch(
    dataset: Any,
    settings: FetchSettings,
    worker_id: int,
    *,
    is_stream: bool,
    failures: FailureLog | None,
) -> WorkerWatch | None:
    """Make what tells of a worker, from where its dataset was saved; None if nobody wants it."""
    if not settings.sends_states or torch_internals.is_data_pipe(dataset):
        return None
    saved = settings.datasets.get(worker_id, settings.dataset)
    if is_stream:
        return WorkerWatch(worker_id, StreamSource(dataset, saved, failures))
    return WorkerWatch(worker_id, MapSource(dataset, saved))
