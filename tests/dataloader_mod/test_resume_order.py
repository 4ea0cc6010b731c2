"""Samplers: those with a state of their own are put into it, any other is replayed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.dataloader_mod.resume import write_generators
from tests.dataloader_mod import doubles
from tests.dataloader_mod.conftest import is_same, seed_all
from tests.dataloader_mod.test_resume import take, through_a_file

NUM_SAMPLES = 38


class Shuffler:
    """A sampler with a state: shuffles by a generator of its own, anew each epoch."""

    says_it_is_over = False

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.state = self._read_state(0)
        self.loaded: dict[str, Any] | None = None
        self.num_asked = 0

    def _read_state(self, num_given: int) -> dict[str, Any]:
        version, words, gauss = self.rng.getstate()
        return {"rng": [version, list(words), gauss], "given": num_given}

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __iter__(self) -> Iterator[int]:
        loaded, self.loaded = self.loaded, None
        if loaded is not None:
            version, words, gauss = loaded["rng"]
            self.rng.setstate((version, tuple(words), gauss))
        self.state = self._read_state(0)
        order = list(range(NUM_SAMPLES))
        self.rng.shuffle(order)
        for place in range(0 if loaded is None else loaded["given"], NUM_SAMPLES):
            self.state["given"] = place + 1
            self.num_asked += 1
            yield order[place]
        if not self.says_it_is_over:
            self.state = self._read_state(0)

    def state_dict(self) -> dict[str, Any]:
        return self.loaded or self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


class EndKeeper(Shuffler):
    """As its parent, but that it goes on saying that an epoch is over, as torchdata's do."""

    says_it_is_over = True


class Batches(Shuffler):
    """A batch sampler with a state, of batches whose sizes differ."""

    def __len__(self) -> int:
        return 2 + NUM_SAMPLES // 4

    def __iter__(self) -> Iterator[Any]:
        positions = super().__iter__()
        while True:
            given = (self.loaded or self.state)["given"]
            batch = list(itertools.islice(positions, 5 if given % 8 else 3))
            if not batch:
                return
            yield batch


class IteratorHasIt:
    """A sampler whose iterator has a state, and draws from a generator that nobody can find."""

    class Iterator:
        def __init__(self, words: list[int]) -> None:
            self.left = words

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> int:
            if not self.left:
                raise StopIteration
            return self.left.pop()

        def state_dict(self) -> dict[str, Any]:
            return {"left": self.left}  # by reference: the loader has to copy it

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.left = list(state["left"])

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __iter__(self) -> Any:
        return self.Iterator(self.rng.sample(range(NUM_SAMPLES), NUM_SAMPLES))


class OddBatches:
    """A batch sampler without a state, which draws from torch's generator when it is asked."""

    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[list[int]]:
        positions = torch.randperm(NUM_SAMPLES).tolist()
        for number in range(9):
            yield positions[number * 4 : number * 4 + 1 + number % 4]


SAMPLERS: dict[str, Any] = {
    "a sampler with a state": lambda seed: {"batch_size": 4, "sampler": Shuffler(seed)},
    "dropping the last": lambda seed: {
        "batch_size": 4,
        "sampler": Shuffler(seed),
        "drop_last": True,
    },
    "one that says it is over": lambda seed: {"batch_size": 4, "sampler": EndKeeper(seed)},
    "its iterator has one": lambda seed: {"batch_size": 4, "sampler": IteratorHasIt(seed)},
    "without batches": lambda seed: {"batch_size": None, "sampler": Shuffler(seed)},
    "without batches, its iterator": lambda seed: {
        "batch_size": None,
        "sampler": IteratorHasIt(seed),
    },
    "a batch sampler with a state": lambda seed: {"batch_sampler": Batches(seed)},
    "torch's batch sampler": lambda seed: {"batch_sampler": BatchSampler(Shuffler(seed), 5, False)},
    "a batch sampler without": lambda _seed: {"batch_sampler": OddBatches()},
    "without batches, torch's": lambda _seed: {"batch_size": None, "shuffle": True},
    "a list": lambda _seed: {"sampler": list(range(NUM_SAMPLES))[::-1], "batch_size": 4},
}


def make_loader(seed: int, sampler: str, **settings: Any) -> DataLoader[Any]:
    seed_all(seed)
    dataset = doubles.StagedSquares(NUM_SAMPLES)
    return DataLoader(dataset, **SAMPLERS[sampler](seed), **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_goes_on_twice_and_into_the_next_epoch(sampler: str, num_workers: int) -> None:
    uninterrupted = make_loader(1, sampler, num_workers=num_workers)
    expected = list(uninterrupted), list(uninterrupted)

    first, state, generators = take(make_loader(1, sampler, num_workers=num_workers), 2)
    loader = make_loader(2, sampler, num_workers=num_workers)
    loader.load_state_dict(state)
    write_generators(generators)
    second, state, generators = take(loader, 3)
    loader = make_loader(3, sampler, num_workers=num_workers)
    loader.load_state_dict(state)
    write_generators(generators)
    rest, after = list(loader), list(loader)

    assert is_same([*first, *second, *rest], expected[0])
    # An iterator's state says nothing of the next one.
    assert "iterator" in sampler or is_same(after, expected[1])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "sampler",
    ["a sampler with a state", "one that says it is over", "a batch sampler with a state"],
)
def test_the_next_epoch_follows_a_state_from_between(sampler: str, num_workers: int) -> None:
    whole = make_loader(1, sampler, num_workers=num_workers)
    list(whole)
    state = through_a_file(whole.state_dict())
    expected = [labels for _, labels in whole]
    other = make_loader(2, sampler, num_workers=num_workers)
    other.load_state_dict(state)
    assert is_same(through_a_file(other.state_dict()), state)

    assert is_same([labels for _, labels in other], expected)


def test_generators_of_the_users_are_kept_between_epochs() -> None:
    def make(seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(doubles.PlainSquares(NUM_SAMPLES), shuffle=True, generator=generator)

    whole = make(1)
    first = [int(label) for _, label in whole]
    state = through_a_file(whole.state_dict())
    expected = [int(label) for _, label in whole]
    other = make(2)
    other.load_state_dict(state)

    assert [int(label) for _, label in other] == expected != first


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_pool", [0, 5])
def test_a_sampler_with_a_state_is_not_asked_again(num_workers: int, batch_pool: int) -> None:
    settings: Any = {"num_workers": num_workers, "batch_pool": batch_pool}
    _, state, _ = take(make_loader(1, "a sampler with a state", **settings), 5)
    loader = make_loader(1, "a sampler with a state", **settings)
    loader.load_state_dict(state)

    rest = [label for _, labels in loader for label in labels.tolist()]

    assert state["sampler"]["sampler"]["given"] == 20
    assert len(rest) == 18
    assert loader.sampler.num_asked == 18  # pyright: ignore[reportAttributeAccessIssue]: ours


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("sampler", ["a sampler with a state", "a batch sampler without"])
def test_positions_go_on_with_any_number_of_workers(sampler: str, before: int, after: int) -> None:
    whole = [labels for _, labels in make_loader(1, sampler, num_workers=before)]
    first, state, _ = take(make_loader(1, sampler, num_workers=before), 3)
    loader = make_loader(4, sampler, num_workers=after)
    loader.load_state_dict(state)

    assert is_same([labels for _, labels in [*first, *loader]], whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_state_can_be_read_at_any_time(num_workers: int) -> None:
    """Loaded and not begun, begun and nothing taken, twice in a row, after the last batch."""
    sampler = "a sampler with a state"
    loader = make_loader(1, sampler, num_workers=num_workers)
    whole = [labels for _, labels in make_loader(1, sampler, num_workers=num_workers)]
    iterator = iter(loader)
    for taken in range(len(whole) + 1):
        state = through_a_file(loader.state_dict())
        assert is_same(through_a_file(loader.state_dict()), state)
        other = make_loader(2, sampler, num_workers=num_workers)
        other.load_state_dict(state)
        assert is_same(through_a_file(other.state_dict()), state)
        if taken % 4 in (0, 2) and taken < len(whole):
            assert is_same([labels for _, labels in other], whole[taken:])
        if taken < len(whole):
            next(iterator)
    loader.close()


def load(state: dict[str, Any], **settings: Any) -> None:
    settings = {"batch_size": 4, **settings}
    loader: DataLoader[Any] = DataLoader(doubles.PlainSquares(NUM_SAMPLES), **settings)
    loader.load_state_dict(state)
    next(iter(loader))


@pytest.mark.parametrize(
    ("sampler", "settings", "message"),
    [
        ("a list", {"batch_size": 5}, "batch_size: got 5, expected 4 as in the state"),
        ("a list", {"generator": torch.Generator()}, "got a state with 0 generators, expected 1"),
        ("a list", {"sampler": range(7)}, "sampler: got 2 batches, expected 3 or more"),
        ("a sampler with a state", {"shuffle": True}, "got RandomSampler, which has no load_st"),
        ("its iterator has one", {}, "got SequentialSampler, whose iterator has no load_state"),
    ],
)
def test_what_is_made_otherwise_is_refused(sampler: str, settings: Any, message: str) -> None:
    _, state, _ = take(make_loader(1, sampler), 3)

    with pytest.raises(ValueError, match=message):
        load(state, **settings)


def test_a_sampler_that_repeats_from_a_generator_is_replayed() -> None:
    def make(seed: int) -> DataLoader[Any]:
        dataset = doubles.PlainSquares(NUM_SAMPLES)
        generator = torch.Generator().manual_seed(seed)
        sampler = RandomSampler(dataset, replacement=True, num_samples=90, generator=generator)
        return DataLoader(dataset, 4, sampler=sampler, num_workers=1)

    whole = list(make(1))
    first, state, _ = take(make(1), 11)
    other = make(2)
    other.load_state_dict(state)

    assert is_same([*first, *other], whole)


# What is replayed has to be of the same kind

SIXTY: Any = range(60)
DATASET: Any = range(NUM_SAMPLES)
SHUFFLED = "RandomSampler(replacement=False, num_samples=60)"
OTHER_SAMPLERS: dict[str, tuple[dict[str, Any], str]] = {
    "not shuffled": ({"shuffle": False}, "SequentialSampler"),
    "replacement": (
        {"sampler": RandomSampler(range(60), replacement=True)},
        "RandomSampler(replacement=True, num_samples=60)",
    ),
    "fewer": (
        {"sampler": RandomSampler(range(60), num_samples=50)},
        "RandomSampler(replacement=False, num_samples=50)",
    ),
    "another class": ({"sampler": SubsetRandomSampler(range(60))}, "SubsetRandomSampler"),
    "a list": ({"sampler": list(range(60))}, "a plain iterable"),
}


@pytest.mark.parametrize("other", OTHER_SAMPLERS)
def test_a_state_is_refused_by_a_loader_with_another_kind_of_sampler(other: str) -> None:
    """60 samples came, of which 43 were distinct."""
    loader = DataLoader(SIXTY, 8, shuffle=True)
    taken = list(itertools.islice(loader, 3))
    state = through_a_file(loader.state_dict())
    settings, name = OTHER_SAMPLERS[other]

    with pytest.raises(ValueError, match=r"^sampler: got .*, expected .* as in the state") as error:
        DataLoader(SIXTY, 8, **settings).load_state_dict(state)

    assert f"got {name}, expected {SHUFFLED} as" in str(error.value)
    same = DataLoader(SIXTY, 8, sampler=RandomSampler(range(60)))
    same.load_state_dict(state)
    assert sorted(torch.cat([*taken, *same]).tolist()) == list(range(60))


def test_a_state_without_the_kind_of_its_sampler_is_taken() -> None:
    loader = DataLoader(SIXTY, 8, shuffle=True)
    taken = list(itertools.islice(loader, 3))
    state = loader.state_dict()
    assert state.pop("sampler_kind") == SHUFFLED

    resumed = DataLoader(SIXTY, 8, shuffle=True)
    resumed.load_state_dict(state)

    assert sorted(torch.cat([*taken, *resumed]).tolist()) == list(range(60))


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 4, "sampler": DistributedSampler(DATASET, 2, 0)},
        {"batch_sampler": BatchSampler(SequentialSampler(range(NUM_SAMPLES)), 4, True)},
        {"batch_size": 4, "sampler": Shuffler()},
    ],
    ids=["distributed", "batches", "stateful"],
)
def test_a_sampler_that_is_not_replayed_by_its_kind_has_none_in_the_state(
    settings: dict[str, Any],
) -> None:
    loader = DataLoader(DATASET, **settings)
    next(iter(loader))

    is_plain = "batch_sampler" in settings
    assert (loader.state_dict()["sampler_kind"] == "SequentialSampler") == is_plain
