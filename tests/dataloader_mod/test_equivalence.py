"""Our batches are torch's, bit for bit: the promise that the rest stands on."""

import functools
import multiprocessing
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DistributedSampler,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
)

from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from tests.dataloader_mod import doubles
from tests.dataloader_mod.conftest import is_same, read_epochs, seed_all

NUM_SAMPLES = 45  # not a multiple of the batch size


@functools.cache
def torch_epochs(num_workers: int, is_persistent: bool):
    """What torch's own loader gives; it does not depend on the start method."""
    return read_epochs(
        torch.utils.data.DataLoader,
        doubles.StagedSquares(NUM_SAMPLES),
        batch_size=4,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=is_persistent,
    )


def our_epochs(start_method, num_workers, is_persistent, fetch_impl, batch_pool):
    return read_epochs(
        DataLoader,
        doubles.StagedSquares(NUM_SAMPLES),
        batch_size=4,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=is_persistent,
        multiprocessing_context=start_method,
        fetch_impl=fetch_impl,
        batch_pool=batch_pool,
    )


@pytest.mark.parametrize("batch_pool", [None, 0, 1, 3])
@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio", "vanilla"])
def test_batches_in_the_main_process_are_those_of_torch(fetch_impl, batch_pool):
    ours = our_epochs(None, 0, False, fetch_impl, batch_pool)

    assert is_same(ours, torch_epochs(0, False))


@pytest.mark.parametrize("batch_pool", [None, 0, 1, 3])
@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
@pytest.mark.parametrize("is_persistent", [False, True])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_of_forked_workers_are_those_of_torch(
    num_workers, is_persistent, fetch_impl, batch_pool
):
    ours = our_epochs("fork", num_workers, is_persistent, fetch_impl, batch_pool)

    assert is_same(ours, torch_epochs(num_workers, is_persistent))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start_method", "num_workers", "is_persistent", "fetch_impl", "batch_pool"),
    [
        ("spawn", 1, False, "threaded", None),
        ("spawn", 3, True, "asyncio", 0),
        ("spawn", 1, True, "threaded", 1),
        ("spawn", 1, True, "asyncio", 3),
        ("forkserver", 3, True, "threaded", None),
        ("forkserver", 1, False, "asyncio", 0),
        ("forkserver", 1, True, "asyncio", 1),
        ("forkserver", 1, True, "threaded", 3),
    ],
)
def test_batches_of_fresh_processes_are_those_of_torch(
    start_method, num_workers, is_persistent, fetch_impl, batch_pool
):
    multiprocessing.set_forkserver_preload(["tests.dataloader_mod.doubles"])

    ours = our_epochs(start_method, num_workers, is_persistent, fetch_impl, batch_pool)

    assert is_same(ours, torch_epochs(num_workers, is_persistent))


def make_subset():
    return Subset(doubles.StagedSquares(60), list(range(50, 10, -1)))


def make_concatenation():
    parts = [doubles.StagedSquares(7), doubles.StagedSquares(30), doubles.StagedSquares(5)]
    return ConcatDataset(parts)


def make_nested():
    return Subset(ConcatDataset([make_subset(), doubles.StagedSquares(9)]), [48, 0, 3, 40, 41, 39])


def make_merged():
    return doubles.MergedSquares(NUM_SAMPLES)


def make_merged_parts():
    return Subset(ConcatDataset([make_merged(), doubles.MergedSquares(20)]), list(range(60, 5, -1)))


def sampler_with_repeats():
    return RandomSampler(range(NUM_SAMPLES), replacement=True, num_samples=70)


def weighted_sampler():
    return WeightedRandomSampler([1.0 + position % 5 for position in range(NUM_SAMPLES)], 33)


def uneven_batches():
    return [[1, 2, 3], [4], [4, 4, 4, 4, 4], [0, 44], [9]]


CASES: dict[str, dict[str, Any]] = {
    "in order": {},
    "shuffled, last one dropped": {"batch_size": 7, "shuffle": True, "drop_last": True},
    "a subset": {"dataset": make_subset, "batch_size": 8, "shuffle": True},
    "a concatenation": {"dataset": make_concatenation, "batch_size": 8, "shuffle": True},
    "a subset of a concatenation": {"dataset": make_nested, "batch_size": 4},
    "requests for several": {"dataset": make_merged, "batch_size": 8, "shuffle": True},
    "requests for several of a part": {"dataset": make_merged_parts, "batch_size": 8},
    "no automatic batching": {"batch_size": None},
    "repeated positions": {"batch_size": 6, "sampler": sampler_with_repeats},
    "a weighted sampler": {"batch_size": 6, "sampler": weighted_sampler},
    "batches of the user's own": {"batch_sampler": uneven_batches},
    "positions as an array": {"batch_sampler": lambda: [np.array([3, 1]), np.array([2])]},
    "a batch sampler of torch's": {
        "batch_sampler": lambda: BatchSampler(RandomSampler(range(NUM_SAMPLES)), 5, True)
    },
    "one rank of two": {
        "batch_size": 4,
        "sampler": lambda: DistributedSampler(doubles.PlainSquares(NUM_SAMPLES), 2, 1, seed=3),
    },
    "a collate function": {"batch_size": 5, "collate_fn": lambda: doubles.collate_to_dict},
    "lists of samples": {"batch_size": 5, "collate_fn": lambda: list},
    "a generator": {
        "batch_size": 5,
        "shuffle": True,
        "generator": lambda: torch.Generator().manual_seed(5),
    },
    "large samples": {"dataset": lambda: doubles.StagedSquares(20, 30_000), "batch_size": 3},
    "one sample": {"dataset": lambda: doubles.StagedSquares(1), "batch_size": 4},
    "fewer batches than workers": {"dataset": lambda: doubles.StagedSquares(3), "batch_size": 2},
    "an iterable dataset": {"dataset": lambda: doubles.Counting(31), "batch_size": 4},
    "an iterable dataset, unbatched": {"dataset": lambda: doubles.Counting(9), "batch_size": None},
    "a thread-only dataset": {"dataset": lambda: doubles.ThreadOnlySquares(20), "batch_size": 4},
    "a plain dataset": {"dataset": lambda: doubles.PlainSquares(40), "batch_size": 6},
    "a dataset of batches": {"dataset": lambda: doubles.BatchedSquares(40), "batch_size": 6},
    "a subset of a dataset of batches": {
        "dataset": lambda: Subset(doubles.BatchedSquares(40), [3, 9, 2, 30]),
        "batch_size": 3,
    },
    "a plain mapping": {"dataset": lambda: {0: 1.5, 1: 2.5, 2: 3.5}, "batch_size": 2},
}


def settings_of(case):
    made: dict[str, Any] = {
        key: value() if callable(value) else value for key, value in CASES[case].items()
    }
    return made.pop("dataset", None) or doubles.StagedSquares(NUM_SAMPLES), made


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
@pytest.mark.parametrize("case", CASES)
def test_batches_are_those_of_torch_for(case, fetch_impl, num_workers):
    dataset, settings = settings_of(case)
    expected = read_epochs(
        torch.utils.data.DataLoader, dataset, num_workers=num_workers, **settings
    )
    dataset, settings = settings_of(case)

    ours = read_epochs(
        DataLoader, dataset, num_workers=num_workers, fetch_impl=fetch_impl, **settings
    )

    assert is_same(ours, expected)


@pytest.mark.parametrize("num_taken", [0, 1, 5])
@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
def test_an_epoch_left_in_the_middle_leaves_the_next_as_with_torch(fetch_impl, num_taken):
    """Persistent workers go on drawing for batches that nobody takes; ours for the same ones."""
    found = []
    for loader_class, extra in (
        (torch.utils.data.DataLoader, {}),
        (DataLoader, {"fetch_impl": fetch_impl}),
    ):
        seed_all(3)
        loader = loader_class(
            doubles.StagedSquares(60),
            batch_size=4,
            shuffle=True,
            num_workers=2,
            persistent_workers=True,
            **extra,
        )
        iterator = iter(loader)
        left = [next(iterator) for _ in range(num_taken)]
        found.append([left, list(loader), list(loader)])

    theirs, ours = found

    assert is_same(ours, theirs)


def test_a_sampler_that_draws_between_batches_does_so_in_the_main_process():
    class Drawing(torch.utils.data.Sampler):
        def __iter__(self):
            for _ in range(20):
                yield int(torch.randint(NUM_SAMPLES, ()))

    found = [
        read_epochs(
            loader_class, doubles.StagedSquares(NUM_SAMPLES), batch_size=4, sampler=Drawing()
        )
        for loader_class in (torch.utils.data.DataLoader, DataLoader)
    ]

    assert is_same(*found)


def test_a_batch_may_be_an_iterator_in_the_main_process():
    found = [
        read_epochs(
            loader_class,
            doubles.StagedSquares(9),
            num_epochs=1,
            batch_sampler=[iter([3, 1]), iter([2, 8])],
        )
        for loader_class in (torch.utils.data.DataLoader, DataLoader)
    ]

    assert is_same(*found)


@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
def test_out_of_order_batches_are_all_there_when_asked_for(fetch_impl):
    loader = DataLoader(
        doubles.StagedSquares(50),
        batch_size=4,
        num_workers=2,
        in_order=False,
        fetch_impl=fetch_impl,
    )

    labels = [label for _, labels in loader for label in labels.tolist()]

    assert sorted(labels) == list(range(50))


def test_a_coroutine_of_a_plain_dataset_is_awaited():
    batches = read_epochs(
        DataLoader, doubles.AwaitedSquares(20), batch_size=4, num_workers=1, fetch_impl="asyncio"
    )

    assert is_same(
        batches,
        read_epochs(torch.utils.data.DataLoader, doubles.PlainSquares(20), batch_size=4),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a device nothing is pinned")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_pinned_batches_are_those_of_torch(num_workers):
    """I-16."""
    settings: dict[str, Any] = {
        "batch_size": 4,
        "shuffle": True,
        "num_workers": num_workers,
        "pin_memory": True,
    }
    told = []
    for make in (torch.utils.data.DataLoader, DataLoader):
        seed_all(3)
        loader = make(doubles.StagedSquares(NUM_SAMPLES), **settings)
        told.append([(images, labels) for _ in range(2) for images, labels in loader])

    theirs, ours = told
    assert all(images.is_pinned() for images, _ in ours)
    assert is_same(ours, theirs)
