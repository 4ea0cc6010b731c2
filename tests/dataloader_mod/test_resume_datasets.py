"""Datasets that have a state of their own go on in it, in the processes that read them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset
from torch.utils.data.datapipes.iter import IterableWrapper

from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from tests.dataloader_mod import doubles
from tests.dataloader_mod.test_resume import through_a_file


def find_worker() -> tuple[int, int]:
    info = torch.utils.data.get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


class Walk(IterableDataset[int]):
    """A random walk of each worker, of its own length; the state is changed in place."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"walked": []}
        self.goes_on = False

    def __iter__(self) -> Iterator[int]:
        worker, num_workers = find_worker()
        if not (self.goes_on and self.state["walked"]):
            self.state["walked"] = [100 * worker]
        self.goes_on = False
        while len(self.state["walked"]) < 14 // num_workers + 3 * worker:
            self.state["walked"].append(self.state["walked"][-1] + random.randrange(3))
            yield self.state["walked"][-1]

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state, self.goes_on = state, True


class IteratorHasIt(IterableDataset[int]):
    """An iterable dataset whose iterators have a state, and it has none."""

    class Iterator:
        def __init__(self, worker: int) -> None:
            self.worker, self.position = worker, 0

        def __next__(self) -> int:
            if self.position == 9:
                raise StopIteration
            self.position += 1
            return 100 * self.worker + self.position

        def state_dict(self) -> dict[str, Any]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.position = state["position"]

    def __iter__(self) -> Any:
        return self.Iterator(find_worker()[0])


class Counting(Dataset[tuple[int, int]]):
    """Counts what it was asked for; the samples say it."""

    def __init__(self) -> None:
        self.count = 0

    def __len__(self) -> int:
        return 40

    def __getitems__(self, positions: list[int]) -> list[tuple[int, int]]:
        self.count += len(positions)
        return [(position, self.count) for position in positions]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def make(dataset: Any, **settings: Any) -> DataLoader[Any]:
    settings = {"batch_size": 3, **settings}
    return DataLoader(dataset, **settings)


def to_lists(batches: Any) -> list[Any]:
    return [
        [part.tolist() for part in batch] if isinstance(batch, list) else batch.tolist()
        for batch in batches
    ]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("kind", [Walk, IteratorHasIt, Counting])
def test_it_goes_on_twice(kind: Any, num_workers: int) -> None:
    # What is begun ahead would be counted too.
    settings: Any = {"num_workers": num_workers, "batch_pool": 0}
    random.seed(5)
    torch.manual_seed(1)
    whole = to_lists(make(kind(), **settings))
    for cuts in [(1, 1), (len(whole) - 1, 1), (len(whole), 0)]:
        got: list[Any] = []
        state: Any = None
        random.seed(5)
        torch.manual_seed(1)
        for cut in [*cuts, None]:
            loader = make(kind(), **settings)
            if state is not None:
                loader.load_state_dict(state)
            got += to_lists(itertools.islice(loader, cut))
            if cut is not None:
                state = through_a_file(loader.state_dict())
            loader.close()
            torch.manual_seed(2)

        assert got == whole


def test_without_workers_the_state_between_epochs_is_the_datasets() -> None:
    loader = make(Counting())
    list(loader)
    state = through_a_file(loader.state_dict())
    other = make(Counting())
    other.load_state_dict(state)

    assert to_lists(other)[0] == [[0, 1, 2], [43, 43, 43]]


class NotSaved(Walk):
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("the disk is gone")


def test_a_state_that_cannot_be_read_is_an_error_of_the_loop() -> None:
    with pytest.raises(RuntimeError, match="the disk is gone"):
        list(make(NotSaved(), num_workers=1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_has_no_state_is_refused(num_workers: int) -> None:
    loader = make(doubles.Counting(30), num_workers=num_workers)
    loader.load_state_dict(loader.state_dict())  # nothing was taken yet
    next(iter(loader))

    with pytest.raises(ValueError, match="an iterable one that has no state_dict, nor has its"):
        loader.state_dict()
    loader.close()


def test_data_pipes_are_refused() -> None:
    pipe = IterableWrapper(range(9))

    with pytest.raises(ValueError, match="dataset: got an iterable one that has no state_dict"):
        make(pipe).state_dict()


@pytest.mark.parametrize(
    ("dataset", "num_workers", "message"),
    [
        (Counting(), 1, "num_workers: got 1, expected 2 as in the state"),
        (doubles.PlainSquares(40), 2, "got PlainSquares, which has no load_state_dict"),
    ],
)
def test_what_is_made_otherwise_is_refused(dataset: Any, num_workers: int, message: str) -> None:
    loader = make(Counting(), num_workers=2)
    next(iter(loader))
    state = loader.state_dict()
    loader.close()

    with pytest.raises(ValueError, match=message):
        make(dataset, num_workers=num_workers).load_state_dict(state)
