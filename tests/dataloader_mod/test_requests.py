"""Samples that travel in one request: fewer requests, the same batches."""

from __future__ import annotations

import random
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from concurrent_dataloader import DataLoader
from concurrent_dataloader.dataloader_mod import requests
from concurrent_dataloader.dataloader_mod.stages import find_stages
from concurrent_dataloader.errors import KeyNotFoundError
from tests.dataloader_mod.doubles import MergedSquares, StagedSquares


def batches_of(loader: Any, seed: int = 5) -> list[Any]:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return list(loader)


@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_those_of_torch(fetch_impl: Any, num_workers: int, shuffle: bool) -> None:
    settings: Any = {"batch_size": 20, "num_workers": num_workers, "shuffle": shuffle}
    dataset = MergedSquares(100)
    with DataLoader(dataset, fetch_impl=fetch_impl, **settings) as loader:
        ours = batches_of(loader)
    theirs = batches_of(torch.utils.data.DataLoader(StagedSquares(100), **settings))

    for our_batch, their_batch in zip(ours, theirs, strict=True):
        assert torch.equal(our_batch[0], their_batch[0])
        assert torch.equal(our_batch[1], their_batch[1])
    assert dataset.num_requests.value == 10 if not shuffle else dataset.num_requests.value < 100


def test_a_subset_and_a_concatenation_merge_as_their_parts_do() -> None:
    first, second = MergedSquares(20), MergedSquares(30)
    both = ConcatDataset([Subset(first, range(5, 15)), StagedSquares(7), second])

    with DataLoader(both, batch_size=len(both), num_workers=1) as loader:
        ((_, labels),) = loader

    assert labels.tolist() == [*range(5, 15), *range(7), *range(30)]
    assert first.num_requests.value == 2
    assert second.num_requests.value == 3


@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
def test_only_the_sample_that_is_to_blame_fails(fetch_impl: Any) -> None:
    dataset = MergedSquares(20, missing=13)

    with DataLoader(dataset, batch_size=5, num_workers=1, fetch_impl=fetch_impl) as loader:
        batches = iter(loader)
        assert [next(batches)[1].tolist() for _ in range(2)] == [[*range(5)], [*range(5, 10)]]
        with pytest.raises(KeyNotFoundError, match="no object 13"):
            next(batches)
        assert next(batches)[1].tolist() == [15, 16, 17, 18, 19]


def test_a_request_is_given_up_when_nobody_wants_any_of_its_samples() -> None:
    submitted: list[Future[Any]] = []

    def submit(request: Any) -> Future[Any]:
        submitted.append(Future())
        return submitted[-1]

    (parts,) = requests.begin(find_stages(MergedSquares(20)), [[1, 2, 3]], submit)
    parts[0].cancel()
    parts[1].cancel()
    assert not submitted[0].cancelled()
    parts[2].cancel()

    assert len(submitted) == 1
    assert submitted[0].cancelled()


def test_a_plan_that_leaves_out_a_position_is_an_error() -> None:
    class Forgetful(MergedSquares):
        def plan_requests(self, positions: Any) -> list[list[int]]:
            return super().plan_requests(positions[:-1])

    with pytest.raises(RuntimeError, match="got 4 of 5 positions"):
        next(iter(DataLoader(Forgetful(20), batch_size=5, batch_pool=0)))


def test_too_few_samples_of_a_request_are_an_error() -> None:
    class Short(MergedSquares):
        def fetch_many(self, positions: Any) -> list[bytes]:
            return super().fetch_many(positions)[:-1]

    with pytest.raises(RuntimeError, match="got 4 samples, expected 5"):
        next(iter(DataLoader(Short(20), batch_size=5, batch_pool=0)))


class Bounded(MergedSquares):
    """Plans by looking each position up, as a data set does that has an index."""

    def plan_requests(self, positions: Any) -> list[list[int]]:
        for position in positions:
            if not position < self.num_samples:
                raise IndexError(f"position: got {position}, expected less than {self.num_samples}")
        return super().plan_requests(positions)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_position_that_cannot_be_planned_fails_in_its_turn_with_its_error(
    num_workers: int,
) -> None:
    sampler: Any = [0, 1, 2, 3, 99, 5, 6, 7]
    with DataLoader(Bounded(20), 2, sampler=sampler, num_workers=num_workers) as loader:
        batches = iter(loader)
        assert [next(batches)[1].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(IndexError, match="got 99, expected less than 20"):
            next(batches)
        if num_workers:
            assert next(batches)[1].tolist() == [6, 7]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_plan_that_is_wrong_as_a_whole_is_an_error_in_the_loop(num_workers: int) -> None:
    class Doubling(MergedSquares):
        def plan_requests(self, positions: Any) -> list[list[int]]:
            groups = super().plan_requests(positions)
            return groups if len(positions) == 1 else [*groups, groups[0]]

    with (
        DataLoader(Doubling(20), batch_size=5, num_workers=num_workers) as loader,
        pytest.raises(RuntimeError, match="5 of 5 positions in 10 places, expected each once"),
    ):
        next(iter(loader))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("answer", [None, 7, "raises"])
def test_an_answer_that_is_no_list_of_samples_is_an_error_and_no_wait(
    num_workers: int, answer: Any
) -> None:
    class Odd(MergedSquares):
        def fetch_many(self, positions: Any) -> Any:
            return (1 // 0 for _ in positions) if answer == "raises" else answer

    error = ZeroDivisionError if answer == "raises" else TypeError
    with (
        DataLoader(Odd(20), batch_size=5, num_workers=num_workers) as loader,
        pytest.raises(error),
    ):
        next(iter(loader))
