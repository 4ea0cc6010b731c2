"""An epoch that is left in the middle goes on elsewhere as if nothing had happened."""

import io
import itertools
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler, RandomSampler, WeightedRandomSampler

from concurrent_dataloader import S3Dataset
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.dataloader_mod.resume import read_generators, write_generators
from tests.dataloader_mod import doubles
from tests.dataloader_mod.conftest import is_same, seed_all

NUM_SAMPLES = 38


def take(loader, count):
    """Take some batches and leave; give them with the loader's state and the main generators."""
    taken = []
    for batch in loader:
        taken.append(batch)
        if len(taken) == count:
            break
    return taken, through_a_file(loader.state_dict()), read_generators()


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


SAMPLERS: dict[str, Any] = {
    "in order": dict,
    "shuffled": lambda: {"shuffle": True},
    "a generator": lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(3)},
    "weighted": lambda: {
        "sampler": WeightedRandomSampler([1.0 + n % 3 for n in range(NUM_SAMPLES)], 30)
    },
    "with repeats, from a generator": lambda: {
        "sampler": RandomSampler(
            range(NUM_SAMPLES),
            replacement=True,
            num_samples=40,
            generator=torch.Generator().manual_seed(9),
        )
    },
    "one rank of two": lambda: {
        "sampler": DistributedSampler(doubles.PlainSquares(NUM_SAMPLES), 2, 1)
    },
}


def make_loader(seed, sampler="shuffled", **settings: Any):
    seed_all(seed)
    settings = {"batch_size": 4, "num_workers": 2, **SAMPLERS[sampler](), **settings}
    return DataLoader(doubles.StagedSquares(NUM_SAMPLES), **settings)


@pytest.mark.parametrize("num_taken", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_rest_of_an_epoch_is_that_of_an_uninterrupted_one(sampler, num_workers, num_taken):
    whole = list(make_loader(1, sampler, num_workers=num_workers))
    first, state, generators = take(make_loader(1, sampler, num_workers=num_workers), num_taken)
    again = make_loader(2, sampler, num_workers=num_workers)
    again.load_state_dict(state)
    write_generators(generators)

    rest = list(again)

    assert is_same([*first, *rest], whole)


@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
def test_an_epoch_can_be_resumed_twice_and_the_next_ones_follow(fetch_impl):
    settings: Any = {"persistent_workers": True, "fetch_impl": fetch_impl}
    uninterrupted = make_loader(1, **settings)
    expected = [list(uninterrupted) for _ in range(3)]

    loader = make_loader(1, **settings)
    got = [list(loader)]
    first, state, generators = take(loader, 3)
    second_loader = make_loader(5, **settings)
    second_loader.load_state_dict(state)
    write_generators(generators)
    second, state, generators = take(second_loader, 2)
    third_loader = make_loader(6, **settings)
    third_loader.load_state_dict(state)
    write_generators(generators)
    got += [[*first, *second, *third_loader], list(third_loader)]

    assert is_same(got, expected)


def test_what_was_taken_is_not_fetched_again(tmp_path):
    class Recording(doubles.StagedSquares):
        def fetch(self, position):
            (tmp_path / str(position)).touch()
            return super().fetch(position)

    loader = make_loader(1, "in order")
    _, state, _ = take(loader, 5)
    again = DataLoader(Recording(NUM_SAMPLES), batch_size=4, num_workers=2)
    again.load_state_dict(state)

    labels = [label for _, batch in again for label in batch.tolist()]

    assert labels == list(range(20, NUM_SAMPLES))
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == labels


@pytest.mark.parametrize("num_workers", [0, 2])
def test_objects_that_were_taken_are_not_requested_again(object_server, num_workers):
    """What was begun ahead and not taken is."""
    object_server.create_bucket("public", public=True)
    object_server.put_objects(
        "public", {f"class/{n:02}.jpg": b"%d" % n for n in range(NUM_SAMPLES)}
    )

    def make():
        dataset = S3Dataset(
            "public",
            endpoint_url=object_server.endpoint_url,
            anonymous=True,
            decode=None,
        )
        return DataLoader(dataset, 4, num_workers=num_workers, collate_fn=list, batch_pool=2)

    first, state, _ = take(make(), 5)
    again = make()
    again.load_state_dict(state)
    object_server.reset_counters()
    rest = list(again)
    requests = object_server.counters(by_key=True).num_gets_by_key

    items = [bytes(raw) for batch in [*first, *rest] for raw, _ in batch]
    assert items == [b"%d" % n for n in range(NUM_SAMPLES)]
    keys = {key.rpartition("/")[2]: count for key, count in requests.items() if "class/" in key}
    assert keys == {f"{n:02}.jpg": 1 for n in range(20, NUM_SAMPLES)}


def test_resuming_leaves_the_generators_of_the_main_process_alone():
    _, state, _ = take(make_loader(1), 3)
    again = make_loader(4)
    again.load_state_dict(state)
    seed_all(11)
    expected = torch.rand(3)
    seed_all(11)

    next(iter(again))

    assert torch.equal(torch.rand(3), expected)


def test_between_epochs_the_state_says_that_none_has_begun():
    loader = make_loader(1)
    fresh = loader.state_dict()
    list(loader)

    assert loader.state_dict() == fresh
    loader.load_state_dict(fresh)
    assert len(list(loader)) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fetch_impl": "vanilla"}, "fetch_impl: got 'vanilla', expected"),
        ({"in_order": False}, "in_order: got False, expected True"),
    ],
)
def test_a_loader_without_a_fixed_order_has_no_state(settings, message):
    with pytest.raises(ValueError, match=message):
        make_loader(1, **settings).state_dict()


def test_something_else_is_not_taken_for_a_state():
    with pytest.raises(ValueError, match="give it what state_dict"):
        make_loader(1).load_state_dict({"epoch": 3})


class Eager:
    """A batch sampler that draws its order when it is made an iterator, from a generator."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(11)

    def __iter__(self):
        order = torch.randperm(NUM_SAMPLES, generator=self.generator).tolist()
        return iter([order[start : start + 4] for start in range(0, NUM_SAMPLES, 4)])

    def __len__(self):
        return -(-NUM_SAMPLES // 4)


def make_plain(num_workers, sampler):
    torch.manual_seed(1)
    if sampler == "eager":
        return DataLoader(
            doubles.PlainSquares(NUM_SAMPLES), batch_sampler=Eager(), num_workers=num_workers
        )
    return DataLoader(
        doubles.PlainSquares(NUM_SAMPLES), 4, num_workers=num_workers, **SAMPLERS[sampler]()
    )


@pytest.mark.parametrize("sampler", [*SAMPLERS, "eager"])
@pytest.mark.parametrize("numbers", [(0, 2, 0), (2, 0, 2), (0, 1, 2), (2, 0, 0)])
def test_the_order_stays_with_and_without_workers(sampler, numbers):
    first = list(make_plain(numbers[0], sampler))
    again = make_plain(numbers[0], sampler)

    got, state, _ = take(again, 2)
    for num_workers in numbers[1:]:
        loader = make_plain(num_workers, sampler)
        loader.load_state_dict(state)
        more, state, _ = take(loader, 1)
        got += more
    last = make_plain(numbers[-1], sampler)
    last.load_state_dict(state)

    assert is_same([*got, *last], first)


@pytest.mark.parametrize("sampler", ["shuffled", "a generator", "eager"])
@pytest.mark.parametrize("num_taken", ["no iterator", 0, 2])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_order_is_that_which_the_saved_loader_goes_on_with(before, after, num_taken, sampler):
    if num_taken == "no iterator" and sampler == "eager":
        return  # torch makes two iterators of a sampler with workers, and one without
    loader = make_plain(before, sampler)
    rest: Any = loader
    if num_taken != "no iterator":
        rest = iter(loader)
        torch.rand(3)  # the training loop draws too
        list(itertools.islice(rest, num_taken))
    state, generators = through_a_file(loader.state_dict()), read_generators()
    expected = list(rest)
    loader.close()

    other = make_plain(after, sampler)
    other.load_state_dict(state)
    if num_taken == "no iterator":  # the epoch begins with the generators of this process
        write_generators(generators)

    assert is_same([labels for _, labels in other], [labels for _, labels in expected])


def test_a_state_of_another_dataset_is_refused():
    _, state, _ = take(make_loader(1), 2)
    other = DataLoader(doubles.StagedSquares(NUM_SAMPLES - 1), 4, shuffle=True, num_workers=2)

    with pytest.raises(ValueError, match="dataset: got one of 37 samples, expected 38"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_taken", -1),
        ("num_taken", "3"),
        ("num_workers", "junk"),
        ("next_worker", -1),
        ("place", "junk"),
        ("base_seed", "junk"),
        ("begin", "junk"),
    ],
)
def test_a_state_that_was_changed_is_refused(field, value):
    loader = make_loader(1)
    _, state, _ = take(loader, 2)

    with pytest.raises(ValueError, match=f"load_state_dict: {field}: got"):
        loader.load_state_dict({**state, field: value})


def test_no_state_at_all_is_refused():
    with pytest.raises(TypeError, match="load_state_dict: got NoneType"):
        make_loader(1).load_state_dict(None)  # pyright: ignore[reportArgumentType]: wrong
