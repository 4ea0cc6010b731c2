"""torchdata itself: its loader over our data sets and sampler, its samplers in our loader (N11).

What one loader is told by the other's convention is told here by the other.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from concurrent_dataloader import (
    DataLoader,
    ElasticDistributedSampler,
    IndexedDataset,
    StreamedShards,
    open_dataset,
)
from concurrent_dataloader.index import Index
from concurrent_dataloader.stores import open_store
from tests.dataloader_mod.conftest import seed_all
from tests.datasets.shards import write_shards

torchdata: Any = pytest.importorskip("torchdata.stateful_dataloader")

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

NUM_TAKEN = 3


def add_up(raw: Any) -> int:
    return sum(raw)


def make_objects(folder: Path) -> Any:
    for number in range(30):
        (folder / f"{number:02}").write_bytes(bytes([number]) * 100)
    keys = [f"{number:02}" for number in range(30)]
    return IndexedDataset(Index.from_keys(keys), open_store(folder), decode=add_up)


def make_shards(folder: Path) -> Any:
    write_shards(folder, [10, 7, 0, 13])
    return open_dataset(folder, decode=add_up)


def make_stream(folder: Path) -> Any:
    write_shards(folder, [10, 7, 0, 13])
    stream: Any = StreamedShards(
        folder, decode=add_up, shuffle=True, seed=5, batch_size=4, uneven="exact"
    )
    stream.set_epoch(0)  # else workers draw its order with the loader's seed
    return stream


KINDS: dict[str, Callable[[Path], Any]] = {
    "objects": make_objects,
    "shards at random": make_shards,
    "a stream of shards": make_stream,
}
LOADERS: dict[str, Any] = {"torchdata's": torchdata.StatefulDataLoader, "ours": DataLoader}


def through_a_file(state: Any) -> Any:
    return pickle.loads(pickle.dumps(state))


def read(batches: Any) -> list[Any]:
    return [[each.tolist() for each in batch] for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_goes_on_in_either_loader(
    loader: str, kind: str, num_workers: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "num_workers": num_workers}
    if kind != "a stream of shards":
        settings["shuffle"] = True

    def make(seed: int) -> Any:
        seed_all(seed)
        return LOADERS[loader](KINDS[kind](tmp_path), **settings)

    whole = read(make(3))

    first = make(3)
    taken = read(itertools.islice(first, NUM_TAKEN))
    state = through_a_file(first.state_dict())
    second = make(99)
    second.load_state_dict(state)

    assert taken + read(second) == whole
    assert sum(len(labels) for _, labels in whole) == 30


@pytest.mark.parametrize("num_workers", [0, 2])
def test_both_loaders_give_the_same_batches_of_a_stream(num_workers: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "num_workers": num_workers}

    theirs, ours = (read(LOADERS[name](make_stream(tmp_path), **settings)) for name in LOADERS)

    assert theirs == ours


@pytest.mark.parametrize("num_workers", [0, 2])
def test_our_sampler_parts_what_torchdatas_loader_has_left(
    num_workers: int, tmp_path: Path
) -> None:
    dataset = make_objects(tmp_path)

    def make(num_ranks: int, rank: int) -> Any:
        sampler = ElasticDistributedSampler(dataset, num_ranks, rank)
        return torchdata.StatefulDataLoader(
            dataset, batch_size=3, sampler=sampler, num_workers=num_workers
        )

    before = [make(2, rank) for rank in range(2)]
    taken = [read(itertools.islice(loader, 2)) for loader in before]
    after = make(1, 0)
    states = [through_a_file(loader.state_dict()) for loader in before]
    sampler_state = find_sampler_state(states[0])
    assert sampler_state == find_sampler_state(states[1])
    after.sampler.load_state_dict(sampler_state)

    seen = [pixel for batches in [*taken, read(after)] for pixels, _ in batches for pixel in pixels]
    assert sorted(seen) == [100 * number for number in range(30)]


def find_sampler_state(state: Any) -> Any:
    """Give what torchdata's state of a loader holds of our sampler, wherever that is."""
    if isinstance(state, dict):
        if "num_consumed" in state:
            return state
        for each in state.values():
            found = find_sampler_state(each)
            if found is not None:
                return found
    return None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_torchdatas_samplers_go_on_in_our_loader(num_workers: int, tmp_path: Path) -> None:
    from torchdata.stateful_dataloader.sampler import (
        StatefulDistributedSampler,
    )

    dataset = make_objects(tmp_path)

    def make() -> DataLoader[Any]:
        sampler: Any = StatefulDistributedSampler(dataset, 2, 1, shuffle=True, seed=4)
        return DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=num_workers)

    whole = read(make())
    first = make()
    taken = read(itertools.islice(first, NUM_TAKEN))
    second = make()
    second.load_state_dict(through_a_file(first.state_dict()))

    assert taken + read(second) == whole
    assert len(whole) == 4
