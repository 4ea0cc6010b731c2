"""An epoch goes on over other ranks and workers: each sample once."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler

from concurrent_dataloader import ElasticDistributedSampler
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from tests.dataloader_mod import doubles

worlds = st.integers(1, 9)


class Sized:
    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples


@given(
    num_samples=st.integers(1, 60),
    world_size=worlds,
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
)
@settings(deadline=None)
def test_a_whole_epoch_is_that_of_a_distributed_sampler(
    num_samples: int, world_size: int, shuffle: bool, drop_last: bool, epoch: int
) -> None:
    for rank in range(world_size):
        arguments: Any = (Sized(num_samples), world_size, rank, shuffle, 5, drop_last)
        ours, torchs = ElasticDistributedSampler(*arguments), DistributedSampler(*arguments)
        for sampler in (ours, torchs):
            sampler.set_epoch(epoch)

        assert list(ours) == list(torchs)
        assert list(ours) == list(torchs)  # and anew
        assert len(ours) == len(torchs)


class Leg:
    """A part of an epoch: so many ranks take so many batches of such a size."""

    def __init__(self, world_size: int, batch_size: int, num_batches: int | None) -> None:
        self.world_size, self.batch_size, self.num_batches = world_size, batch_size, num_batches

    def __repr__(self) -> str:
        return f"{self.num_batches} batches of {self.batch_size} on each of {self.world_size}"


legs = st.lists(
    st.builds(Leg, worlds, st.integers(1, 7), st.integers(0, 6)), min_size=1, max_size=4
)


def run_leg(
    leg: Leg, num_samples: int, state: Any, **arguments: Any
) -> tuple[list[int], list[dict[str, Any]]]:
    """Let all ranks take their batches; give the samples, and the state of each rank."""
    delivered: list[int] = []
    states: list[dict[str, Any]] = []
    for rank in range(leg.world_size):
        sampler = ElasticDistributedSampler(Sized(num_samples), leg.world_size, rank, **arguments)
        if state is not None:
            sampler.load_state_dict(state)
        sampler.set_epoch(2)
        batches = iter(BatchSampler(sampler, leg.batch_size, False))
        for batch in itertools.islice(batches, leg.num_batches):
            delivered += batch
        states.append(sampler.state_dict())
    return delivered, states


@given(num_samples=st.integers(1, 80), legs=legs, last=worlds, drop_last=st.booleans())
@settings(deadline=None, max_examples=300)
def test_the_rest_of_an_epoch_comes_once_over_any_ranks(
    num_samples: int, legs: list[Leg], last: int, drop_last: bool
) -> None:
    delivered: list[int] = []
    state: Any = None
    for leg in [*legs, Leg(last, 3, None)]:
        got, states = run_leg(leg, num_samples, state, drop_last=drop_last)
        delivered += got
        assert all(each == states[0] for each in states)
        state = states[0]

    counts = Counter(delivered)
    num_extra = len(delivered) - len(counts)
    largest = max(leg.world_size for leg in [*legs, Leg(last, 3, None)])
    assert set(counts) <= set(range(num_samples))
    if drop_last:
        assert num_extra == 0
        assert num_samples - len(counts) < largest
    else:
        assert len(counts) == num_samples
        assert num_extra < largest
    assert state["num_consumed"] == num_samples


@given(num_samples=st.integers(1, 60), world_size=worlds, cuts=st.lists(st.integers(0, 9)))
@settings(deadline=None)
def test_over_the_same_ranks_the_order_stays(
    num_samples: int, world_size: int, cuts: list[int]
) -> None:
    rank = world_size - 1
    arguments: Any = (Sized(num_samples), world_size, rank)
    expected = list(DistributedSampler(*arguments))
    got: list[int] = []
    state: Any = None
    for cut in [*cuts, num_samples]:
        sampler = ElasticDistributedSampler(*arguments)
        if state is not None:
            sampler.load_state_dict(state)
        got += itertools.islice(sampler, cut)
        state = sampler.state_dict()

    assert got == expected


def test_a_loader_that_keeps_no_state_is_told_what_was_delivered() -> None:
    def make(state: Any = None) -> tuple[ElasticDistributedSampler, Any]:
        sampler = ElasticDistributedSampler(Sized(50), 2, 1)
        if state is not None:
            sampler.load_state_dict(state)
        dataset = doubles.PlainSquares(50)
        return sampler, torch.utils.data.DataLoader(dataset, 4, sampler=sampler, num_workers=1)

    _, whole = make()
    expected = [labels.tolist() for _, labels in whole]
    sampler, loader = make()
    first = [labels.tolist() for _, labels in itertools.islice(loader, 3)]
    asked, state = sampler.state_dict(), sampler.state_dict(num_delivered=3 * 4)
    _, resumed = make(state)

    assert asked["num_consumed"] > state["num_consumed"] == 24
    assert [*first, *(labels.tolist() for _, labels in resumed)] == expected


def test_another_epoch_begins_at_its_first_sample() -> None:
    sampler = ElasticDistributedSampler(Sized(20), 1, 0)
    sampler.set_epoch(3)
    head = list(itertools.islice(sampler, 15))
    state = sampler.state_dict()
    same, other = (ElasticDistributedSampler(Sized(20), 1, 0) for _ in range(2))
    for each, epoch in ((same, 3), (other, 4)):
        each.load_state_dict(state)
        each.set_epoch(epoch)

    assert sorted([*head, *same]) == list(range(20))
    assert sorted(other) == list(range(20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_positions": 21}, "got num_positions 21, expected 20"),
        ({"seed": 9}, "got seed 9, expected 0"),
        ({"shuffle": False}, "got shuffle False, expected True"),
        ({"version": 7}, "got version 7, expected 1"),
    ],
)
def test_the_state_of_another_row_is_refused(change: dict[str, Any], message: str) -> None:
    sampler = ElasticDistributedSampler(Sized(20), 1, 0)

    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**sampler.state_dict(), **change})
    with pytest.raises(ValueError, match="got epoch None, expected a number"):
        sampler.load_state_dict({"version": 1})


# -- under the loader, which asks ahead


def make_loader(world_size: int, rank: int, **arguments: Any) -> DataLoader[Any]:
    dataset = doubles.PlainSquares(101)
    sampler = ElasticDistributedSampler(dataset, world_size, rank, seed=4)
    arguments = {"batch_size": 4, "num_workers": 1, **arguments}
    return DataLoader(dataset, sampler=sampler, **arguments)


def take_on_each(
    world_size: int, num_batches: int | None, state: Any, **arguments: Any
) -> tuple[list[int], Any]:
    """Let each rank's loader deliver some batches; give the samples and the first rank's state."""
    delivered: list[int] = []
    states: list[Any] = []
    for rank in range(world_size):
        loader = make_loader(world_size, rank, **arguments)
        if state is not None:
            loader.load_state_dict(state)
        for _, labels in itertools.islice(loader, num_batches):
            delivered += labels.tolist()
        states.append(loader.state_dict())
        loader.close()
    assert all(each["sampler"] == states[0]["sampler"] for each in states)
    return delivered, states[0]


@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
def test_a_loaders_epoch_goes_on_over_other_ranks_workers_and_batches(fetch_impl: Any) -> None:
    settings: Any = {"fetch_impl": fetch_impl}
    first, state = take_on_each(3, 2, None, num_workers=2, **settings)
    second, state = take_on_each(2, 3, state, num_workers=1, batch_size=6, **settings)
    third, state = take_on_each(4, 1, state, num_workers=0, batch_size=3, **settings)
    last, _ = take_on_each(2, None, state, **settings)

    assert (len(first), len(second), len(third)) == (24, 36, 12)
    counts = Counter([*first, *second, *third, *last])
    assert set(counts) == set(range(101))
    assert counts.total() == 102  # 29 are left for 2 ranks: one comes twice


def test_the_state_after_an_epoch_begins_the_next_one() -> None:
    loader = make_loader(2, 1)
    list(loader)
    state = loader.state_dict()
    loader.sampler.set_epoch(1)  # pyright: ignore[reportAttributeAccessIssue]: ours
    expected = [labels.tolist() for _, labels in loader]
    resumed = make_loader(2, 1)
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(1)  # pyright: ignore[reportAttributeAccessIssue]: ours

    assert [labels.tolist() for _, labels in resumed] == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_after_its_last_batch_nothing_of_an_epoch_is_left(num_workers: int) -> None:
    loader = make_loader(2, 0, num_workers=num_workers)
    list(itertools.islice(loader, 13))
    state = loader.state_dict()
    loader.close()
    resumed = make_loader(2, 0, num_workers=num_workers)
    resumed.load_state_dict(state)

    assert list(resumed) == []
    assert len(list(resumed)) == 13


def test_a_distributed_sampler_is_not_resumed_over_other_ranks() -> None:
    dataset = doubles.PlainSquares(40)
    loader = DataLoader(dataset, 4, sampler=DistributedSampler(dataset, 2, 0))
    next(iter(loader))
    state = loader.state_dict()
    other = DataLoader(dataset, 4, sampler=DistributedSampler(dataset, 3, 0))

    with pytest.raises(ValueError, match=r"one for 3 ranks, expected 2 .* ElasticDistributedSampl"):
        other.load_state_dict(state)
