"""Workers that share a store which refuses what is too much: each asks for about as much as others.

No worker knows of another. The limits of each come to fair shares in minutes only
(`tests/stores/test_in_flight.py`); before that it is what a training loop takes of each that evens
them out: of a loader, and of ranks in step, none gets further ahead than its look-ahead. What a
worker asks for is told by a counter of its own, which travels with its samples.
"""

from __future__ import annotations

import collections
import itertools
from typing import Any, NamedTuple

import pytest
from torch.utils.data import get_worker_info

from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets import IndexedDataset
from concurrent_dataloader.index import Index
from concurrent_dataloader.stores import Credentials, RequestCounts, open_store
from concurrent_dataloader.testing import ObjectServer

PER_S = 200.0
"""Requests that the store answers; it refuses what is beyond."""

BATCH_SIZE = 10
KEYS = [f"{number:04}" for number in range(2000)]


class Told(NamedTuple):
    """What a worker had done when it handed a sample over."""

    worker: int
    num_requests: int
    num_throttled: int


class TellCounts:
    """A transform that gives, in place of the sample, what its worker has asked for so far."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __call__(self, raw: Any) -> Told:
        del raw
        info: Any = get_worker_info()
        counts: RequestCounts = self._store.counts()
        return Told(info.id, counts.num_requests, counts.num_throttled)


@pytest.fixture
def server(object_server: ObjectServer) -> ObjectServer:
    object_server.put_objects("bucket", {key: key.encode() * 100 for key in KEYS})
    object_server.set_latency(median_s=0.03)
    object_server.set_rate_limit(PER_S, burst=PER_S / 10)
    return object_server


def open_loader(server: ObjectServer, keys: list[str], num_workers: int) -> DataLoader[Any]:
    store = open_store(
        "s3://bucket",
        endpoint_url=server.endpoint_url,
        credentials=Credentials(server.access_key, server.secret_key),
    )
    dataset = IndexedDataset(
        Index.from_keys(keys), store, decode=None, transform=TellCounts(store), missing_label=None
    )
    return DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=num_workers, collate_fn=list)


def requests_in_the_second_half(batches: list[list[Told]]) -> dict[int, int]:
    """Give how many requests each worker made while the second half was handed over."""
    told: dict[int, list[Told]] = collections.defaultdict(list)
    for each in itertools.chain.from_iterable(batches[len(batches) // 2 :]):
        told[each.worker].append(each)
    assert sum(each[-1].num_throttled for each in told.values()) > 0, "the store was not busy"
    return {worker: each[-1].num_requests - each[0].num_requests for worker, each in told.items()}


# Alone on its machine: beside another process of tests the shares came to 2.7 once.
@pytest.mark.grid
@pytest.mark.slow
def test_the_workers_of_a_loader_ask_for_about_as_much_each(server: ObjectServer) -> None:
    with open_loader(server, KEYS, 4) as loader:
        batches: list[list[Told]] = list(loader)

    num_requests = requests_in_the_second_half(batches)
    assert sum(map(len, batches)) == len(KEYS)
    assert sorted(num_requests) == [0, 1, 2, 3]
    assert max(num_requests.values()) <= 2 * min(num_requests.values()), num_requests


@pytest.mark.grid
def test_so_do_the_workers_of_ranks_that_train_in_step(server: ObjectServer) -> None:
    with open_loader(server, KEYS[::2], 2) as one, open_loader(server, KEYS[1::2], 2) as other:
        steps: list[tuple[list[Told], list[Told]]] = list(zip(one, other, strict=True))

    ranks = [requests_in_the_second_half([step[rank] for step in steps]) for rank in range(2)]
    num_requests = [number for rank in ranks for number in rank.values()]
    assert len(steps) == len(KEYS) // 2 // BATCH_SIZE
    assert len(num_requests) == 4
    assert max(num_requests) <= 2 * min(num_requests), ranks
