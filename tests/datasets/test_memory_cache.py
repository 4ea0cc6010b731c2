"""A share of a data set in memory: G-11's cases, what it costs, and who shares it."""

from __future__ import annotations

import asyncio
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data
from torch.utils.data import Dataset
from typing_extensions import override

from concurrent_dataloader import DataLoader, IndexedDataset, S3Dataset
from concurrent_dataloader.datasets import MemoryCachedDataset, ShardDataset
from concurrent_dataloader.index import Index
from concurrent_dataloader.labels import Classes
from concurrent_dataloader.stores import Credentials
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.shard_doubles import pack_tars

NUM_SAMPLES = 40
BODIES = {
    f"c{number % 5}/{number:02d}.jpg": np.random.default_rng(number).bytes(100 + 37 * number)
    for number in range(NUM_SAMPLES)
}


def to_noise(raw: Any) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy())[:100].float() + torch.rand(())


@pytest.fixture
def remote(object_server: ObjectServer) -> Callable[..., IndexedDataset]:
    object_server.put_objects("photos", BODIES)

    settings: dict[str, Any] = {
        "endpoint_url": object_server.endpoint_url,
        "hedge": None,  # a busy machine makes requests late that nothing is wrong with
        "credentials": Credentials(object_server.access_key, object_server.secret_key),
    }

    def open_remote() -> IndexedDataset:
        return S3Dataset(
            "photos",
            transform=to_noise,
            decode=bytes,
            **settings,
        )

    return open_remote


def open_local(bodies: dict[str, bytes] = BODIES, **options: Any) -> IndexedDataset:
    index = Index.from_keys(bodies, map(len, bodies.values()))
    return IndexedDataset(index, MemoryStore(bodies), decode=bytes, **options)


def read_epoch(loader_class: Any, dataset: Dataset[Any], epoch: int, **settings: Any) -> list[Any]:
    torch.manual_seed(epoch)
    return list(loader_class(dataset, batch_size=8, shuffle=True, **settings))


@pytest.mark.parametrize(
    ("ratio", "context"),
    [
        *((ratio, None) for ratio in (0.0, 0.1, 0.5, 1.0)),
        *((ratio, "fork") for ratio in (0.0, 0.5, 1.0)),
        pytest.param(0.5, "spawn", marks=pytest.mark.grid),
    ],
)
def test_what_is_kept_is_read_once_by_all_and_batches_stay_torchs_g11(
    remote: Callable[..., IndexedDataset],
    object_server: ObjectServer,
    ratio: float,
    context: str | None,
) -> None:
    settings: dict[str, Any] = {"num_workers": 0}
    if context is not None:
        settings = {"num_workers": 2, "multiprocessing_context": context}
    theirs: dict[str, Any] = settings | {"multiprocessing_context": context and "fork"}
    ordered = dict(sorted(BODIES.items()))  # as a listing is
    local = open_local(ordered, transform=to_noise, classes=Classes.from_keys(BODIES))
    expected = [
        read_epoch(torch.utils.data.DataLoader, local, epoch, **theirs) for epoch in range(3)
    ]
    dataset = MemoryCachedDataset(remote(), ratio)
    object_server.reset_counters()

    epochs = [read_epoch(DataLoader, dataset, epoch, **settings) for epoch in range(3)]

    for batches, others in zip(epochs, expected, strict=True):
        for batch, other in zip(batches, others, strict=True):
            assert torch.equal(batch[0], other[0])
            assert torch.equal(batch[1], other[1])
    num_kept = round(ratio * NUM_SAMPLES)
    assert dataset.num_kept == num_kept
    gets = object_server.counters(by_key=True).num_gets_by_key
    assert sorted(gets.values()) == [1] * num_kept + [3] * (NUM_SAMPLES - num_kept)


def test_near_samples_of_shards_are_merged_and_kept() -> None:
    shards = {
        f"train-{shard:06d}.tar": [
            (f"{shard}{at}", {"jpg": BODIES[f"c{at % 5}/{at:02d}.jpg"], "cls": b"1"})
            for at in range(shard * 10, shard * 10 + 10)
        ]
        for shard in range(4)
    }
    bodies, index = pack_tars(shards)
    inside = ShardDataset(index, MemoryStore(bodies), decode=bytes)
    dataset = MemoryCachedDataset(inside, 1.0)

    assert len(dataset.plan_requests(range(40))) == 4
    for _ in range(2):
        batches = list(DataLoader(dataset, batch_size=8, collate_fn=list))
        assert [raw for batch in batches for raw, _ in batch] == list(BODIES.values())
    assert len(dataset.plan_requests(range(40))) == 40, "each is there"
    assert dataset.memory_bytes == sum(map(len, BODIES.values())) + 8 * NUM_SAMPLES


def test_torchs_own_loader_shares_it_too() -> None:
    dataset = MemoryCachedDataset(open_local(), 0.5)

    for _ in range(2):
        batches = list(torch.utils.data.DataLoader(dataset, 8, num_workers=2, collate_fn=list))
        assert [raw for batch in batches for raw, _ in batch] == list(BODIES.values())

    assert dataset.num_kept == 20


def test_an_awaited_read_is_kept_too() -> None:
    dataset = MemoryCachedDataset(open_local(), 1.0)

    for _ in range(2):
        raw = asyncio.run(dataset.fetch_async(7))
        assert bytes(raw) == list(BODIES.values())[7]

    assert dataset.num_kept == 1
    assert bytes(dataset.fetch(-33)) == bytes(dataset.fetch(7))


def test_bytes_that_are_half_written_are_read_anew() -> None:
    dataset = MemoryCachedDataset(open_local(), 1.0)
    dataset.fetch(3)
    dataset._body(3)[5] ^= 1

    assert bytes(dataset.fetch(3)) == list(BODIES.values())[3]
    assert bytes(dataset.fetch(3)) == list(BODIES.values())[3]


def test_what_is_kept_cannot_be_written_to() -> None:
    dataset = MemoryCachedDataset(open_local(), 1.0)
    dataset.fetch(3)

    assert memoryview(dataset.fetch(3)).readonly


def test_an_object_of_another_size_than_the_index_says_is_not_kept() -> None:
    changed = {key: body + b"more" for key, body in BODIES.items()}
    inside = open_local()
    inside.store = MemoryStore(changed)
    dataset = MemoryCachedDataset(inside, 1.0)

    assert bytes(dataset.fetch(3)) == list(changed.values())[3]
    assert dataset.num_kept == 0


def test_a_larger_share_keeps_what_a_smaller_one_does_and_says_what_it_takes() -> None:
    chosen = [
        set(np.flatnonzero(MemoryCachedDataset(open_local(), ratio)._slots >= 0).tolist())
        for ratio in (0.0, 0.25, 0.5, 1.0)
    ]

    assert list(map(len, chosen)) == [0, 10, 20, 40]
    assert chosen[0] <= chosen[1] <= chosen[2] <= chosen[3]
    said = MemoryCachedDataset(open_local(), 1.0).describe()
    assert said == (
        "40 of 40 samples are kept in memory once they were read: 0.0 MB (10^6 bytes), shared by "
        "all workers"
    )


def test_what_the_data_set_has_is_had() -> None:
    classes = Classes.from_keys(BODIES)
    dataset = MemoryCachedDataset(open_local(classes=classes), 0.5)
    dataset.set_transform(len)

    assert dataset.classes is classes
    assert dataset.label(3) == 3
    assert dataset[3] == (100 + 37 * 3, 3)
    with pytest.raises(AttributeError, match="no_such"):
        _ = dataset.no_such
    assert pickle.loads(pickle.dumps(dataset))[3] == dataset[3]
    with pytest.raises(IndexError):
        dataset[40]


class Overriding(IndexedDataset):
    @override
    def __getitem__(self, position: int) -> Any:
        return position


def test_what_cannot_be_is_refused() -> None:
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=re.escape(f"ratio: got {ratio}, expected 0 to 1")):
            MemoryCachedDataset(open_local(), ratio)
    index = Index.from_keys(list(BODIES))
    with pytest.raises(TypeError, match="got a class Overriding with a __getitem__"):
        MemoryCachedDataset(Overriding(index, MemoryStore(BODIES)), 0.5)
    with pytest.raises(TypeError, match="got a TensorDataset, expected an S3Dataset"):
        MemoryCachedDataset(torch.utils.data.TensorDataset(torch.zeros(3)), 0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="neither index nor store tells how large samples are"):
        MemoryCachedDataset(IndexedDataset(index, OnlyGet()), 0.5)


class OnlyGet:
    """A store of a user's own: the four methods that all have."""

    def get(self, key: str, byte_range: Any = None) -> bytes:
        raise NotImplementedError

    async def get_async(self, key: str, byte_range: Any = None) -> bytes:
        raise NotImplementedError

    def describe(self, key: str) -> str:
        return key

    def close(self) -> None:
        pass


def test_sizes_that_the_index_lacks_are_asked_for() -> None:
    inside = IndexedDataset(Index.from_keys(BODIES), MemoryStore(BODIES), decode=bytes)

    dataset = MemoryCachedDataset(inside, 1.0)

    assert dataset.memory_bytes == sum(map(len, BODIES.values())) + 8 * NUM_SAMPLES
    for _ in range(2):
        assert [dataset[position][0] for position in range(NUM_SAMPLES)] == list(BODIES.values())


def test_more_than_there_is_is_a_clear_error() -> None:
    class Huge(IndexedDataset):
        @override
        def size_bytes(self, position: int) -> int:
            return 1 << 44

    index = Index.from_keys(list(BODIES))

    with pytest.raises(MemoryError, match=r"ratio: 1 of the samples take .* MB .*cannot be had"):
        MemoryCachedDataset(Huge(index, MemoryStore(BODIES)), 1.0)
