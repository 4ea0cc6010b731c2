"""A part of what is read, kept in memory: G-11's cases, and what it costs."""

from __future__ import annotations

import asyncio
import pickle
from collections import Counter
from collections.abc import Mapping

import pytest
from typing_extensions import Buffer, override

from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets import IndexedDataset
from concurrent_dataloader.errors import ByteRangeError, KeyNotFoundError
from concurrent_dataloader.index import Index
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import Credentials, open_store
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.stores.memory_cache import MemoryCachedStore
from concurrent_dataloader.testing import ObjectServer
from tests.stores.contract import OBJECTS, SizedStoreContract

EXPECTED = [3, 4, 8, 11]
"""Of the keys 0.jpg to 11.jpg, with a ratio of 0.5."""

MANY = {f"train/{number}.jpg": bytes([number % 251]) * (number + 1) for number in range(1000)}


class CountedStore(MemoryStore):
    """Counts what is read of it."""

    def __init__(self, objects: Mapping[str, bytes], name: str = "") -> None:
        super().__init__(objects, name)
        self.reads: Counter[tuple[str, ByteRange | None]] = Counter()

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        self.reads[key, byte_range] += 1
        return super().get(key, byte_range)


class TestMemoryCachedStore(SizedStoreContract):
    @pytest.fixture(params=[0.0, 0.5, 1.0])
    def store(self, request: pytest.FixtureRequest) -> MemoryCachedStore:
        return MemoryCachedStore(MemoryStore(OBJECTS), request.param)


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.25, 0.5, 1.0])
def test_what_is_kept_is_read_once_and_the_rest_in_each_epoch_g11(ratio: float) -> None:
    inner = CountedStore(MANY)
    store = MemoryCachedStore(inner, ratio)

    for _ in range(3):
        for key, body in MANY.items():
            assert bytes(store.get(key)) == body

    kept = {key for key in MANY if store.keeps(key)}
    assert {key for (key, _), count in inner.reads.items() if count == 1} == kept
    assert {key for (key, _), count in inner.reads.items() if count == 3} == set(MANY) - kept
    assert store.counts == (
        2 * len(kept),
        3 * len(MANY) - 2 * len(kept),
        len(kept),
        sum(len(MANY[key]) for key in kept),
    )


@pytest.mark.parametrize(
    ("ratio", "fewest", "most"), [(0, 0, 0), (0.25, 200, 300), (1, 1000, 1000)]
)
def test_the_share_that_is_kept_is_the_ratio(ratio: float, fewest: int, most: int) -> None:
    store = MemoryCachedStore(MemoryStore(MANY), ratio)

    assert fewest <= sum(map(store.keeps, MANY)) <= most


def test_a_larger_ratio_keeps_what_a_smaller_one_does() -> None:
    small, large = (MemoryCachedStore(MemoryStore(), ratio) for ratio in (0.2, 0.6))

    assert {key for key in MANY if small.keeps(key)} < {key for key in MANY if large.keeps(key)}


def test_the_choice_is_the_same_in_each_process_and_on_each_machine() -> None:
    store = MemoryCachedStore(MemoryStore(), 0.5)

    assert [number for number in range(12) if store.keeps(f"{number}.jpg")] == EXPECTED
    other = MemoryCachedStore(MemoryStore(), 0.5, salt="other")
    assert [number for number in range(12) if other.keeps(f"{number}.jpg")] != EXPECTED


def test_the_estimate_is_what_is_kept_in_the_end() -> None:
    store = MemoryCachedStore(MemoryStore(MANY), 0.3)
    estimate = store.count_bytes((key, len(body)) for key, body in MANY.items())

    for key in MANY:
        store.get(key)

    assert estimate == store.counts.kept_bytes > 0


def test_no_more_is_kept_than_allowed() -> None:
    inner = CountedStore(MANY)
    store = MemoryCachedStore(inner, 1.0, max_bytes=10_000)

    for _ in range(2):
        for key, body in MANY.items():
            assert bytes(store.get(key)) == body

    assert 9_000 < store.counts.kept_bytes <= 10_000
    assert store.count_bytes((key, len(body)) for key, body in MANY.items()) == 10_000
    assert inner.reads["train/0.jpg", None] == 1
    assert inner.reads["train/999.jpg", None] == 2


def test_ranges_are_kept_each_by_itself() -> None:
    inner = CountedStore({"shard.tar": bytes(range(200))})
    store = MemoryCachedStore(inner, 0.5)
    ranges = [ByteRange(start, start + 20) for start in range(0, 200, 20)]

    for _ in range(2):
        for wanted in ranges:
            assert bytes(store.get("shard.tar", wanted)) == bytes(range(200))[slice(*wanted)]

    kept = {wanted for wanted in ranges if store.keeps("shard.tar", wanted)}
    assert 0 < len(kept) < 10
    assert {wanted for (_, wanted), count in inner.reads.items() if count == 1} == kept


def test_an_object_that_is_kept_serves_its_ranges() -> None:
    inner = CountedStore({"a": b"0123456789"})
    store = MemoryCachedStore(inner, 1.0)
    store.get("a")

    assert bytes(store.get("a", ByteRange(3, 7))) == b"3456"
    assert inner.reads == {("a", None): 1}
    with pytest.raises(ByteRangeError):
        store.get("a", ByteRange(3, 11))


def test_an_awaited_read_is_kept_too() -> None:
    inner = CountedStore({"a": b"0123456789"})
    store = MemoryCachedStore(inner, 1.0)

    asyncio.run(store.get_async("a"))

    assert bytes(store.get("a")) == bytes(asyncio.run(store.get_async("a"))) == b"0123456789"
    assert inner.reads == {("a", None): 1}


def test_an_error_is_not_kept() -> None:
    inner = CountedStore({})
    store = MemoryCachedStore(inner, 1.0)
    with pytest.raises(KeyNotFoundError):
        store.get("a")
    inner.put("a", b"there now")

    assert bytes(store.get("a")) == b"there now"


def test_a_pickle_holds_no_bytes_so_that_each_worker_keeps_its_own() -> None:
    store = MemoryCachedStore(MemoryStore({"a": b"0123456789" * 1000}, "name"), 1.0)
    before = len(pickle.dumps(store))
    store.get("a")

    twin = pickle.loads(pickle.dumps(store))

    assert len(pickle.dumps(store)) == before
    assert twin.counts == (0, 0, 0, 0)
    assert store.counts.num_kept == 1


def test_closing_forgets_what_was_kept() -> None:
    store = MemoryCachedStore(MemoryStore({"a": b"1"}), 1.0)
    store.get("a")

    store.close()

    assert store.counts.num_kept == 0


@pytest.mark.parametrize(
    ("ratio", "max_bytes", "message"),
    [
        (-0.1, None, "ratio: got -0.1"),
        (1.1, None, "ratio: got 1.1"),
        (float("nan"), None, "ratio: got nan"),
        (0.5, -1, "max_bytes: got -1"),
    ],
)
def test_what_is_out_of_range_is_refused(ratio: float, max_bytes: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryCachedStore(MemoryStore(), ratio, max_bytes)


def test_workers_read_a_kept_sample_once_each_and_deliver_every_sample_in_every_epoch(
    object_server: ObjectServer,
) -> None:
    objects = {f"{number}.jpg": b"%d" % number for number in range(40)}
    object_server.put_objects("data", objects)
    remote = open_store(
        "s3://data",
        endpoint_url=object_server.endpoint_url,
        credentials=Credentials(object_server.access_key, object_server.secret_key),
    )
    store = MemoryCachedStore(remote, 0.5)
    dataset = IndexedDataset(Index.from_keys(objects), store, decode=bytes, missing_label=None)
    loader = DataLoader(
        dataset,
        batch_size=4,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        collate_fn=list,
    )

    for _ in range(5):
        assert sorted(raw for batch in loader for raw in batch) == sorted(objects.values())

    reads = object_server.counters(by_key=True).num_gets_by_key
    kept = {key for key in objects if store.keeps(key)}
    assert 10 < len(kept) < 30
    assert all(reads[f"data/{key}"] <= 2 for key in kept)
    assert all(reads[f"data/{key}"] == 5 for key in set(objects) - kept)
