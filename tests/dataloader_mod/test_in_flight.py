"""As many samples in flight as the store lets through: no more threads or tasks than that."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from concurrent_dataloader.dataloader_mod.fetch import AsyncioFetcher, ThreadedFetcher
from concurrent_dataloader.stores import Credentials, InFlightPolicy, open_store
from concurrent_dataloader.stores.in_flight import Callers, Gate
from concurrent_dataloader.testing import ObjectServer

KEYS = [f"{number:03d}" for number in range(120)]


@pytest.fixture
def server(make_object_server: Callable[..., ObjectServer]) -> ObjectServer:
    server = make_object_server()
    server.put_objects("bucket", {key: key.encode() for key in KEYS})
    server.set_latency(median_s=0.05, sigma=0.0)
    return server


def fetch_all(
    server: ObjectServer, fetch_impl: str, policy: InFlightPolicy, number: int, maximum: int | None
) -> tuple[int, int]:
    """Give the most requests that were under way, and how many threads are left to fetch."""
    before = set(threading.enumerate())
    store: Any = open_store(
        "s3://bucket",
        endpoint_url=server.endpoint_url,
        region=server.region,
        credentials=Credentials(server.access_key, server.secret_key),
        in_flight=policy,
        hedge=None,
    )
    with contextlib.closing(store):
        fetcher: Any = (
            AsyncioFetcher(store.get_async, number, maximum)
            if fetch_impl == "asyncio"
            else ThreadedFetcher(store.get, number, maximum)
        )
        with contextlib.closing(fetcher):
            futures = [fetcher.submit(key) for key in KEYS]
            bodies = [bytes(future.result(timeout=30)) for future in futures]
            time.sleep(0.5)  # the last ones that are too many are on their way out
            left = set(threading.enumerate()) - before
    assert bodies == [key.encode() for key in KEYS]
    num_threads = sum(thread.name.startswith("fetch-") for thread in left)
    return server.counters().max_in_flight, num_threads


@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
@pytest.mark.parametrize(("let_through", "number"), [(3, 20), (12, 4)])
def test_the_store_may_let_fewer_or_more_through_than_would_fetch(
    server: ObjectServer, fetch_impl: str, let_through: int, number: int
) -> None:
    policy = InFlightPolicy(start=let_through, maximum=let_through)

    most, num_threads = fetch_all(server, fetch_impl, policy, number, 40)

    assert most == let_through
    assert num_threads <= (let_through if fetch_impl == "threaded" else 1)  # the loop's own


@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
def test_the_number_rises_beyond_the_first_one_while_throughput_does(
    server: ObjectServer, fetch_impl: str
) -> None:
    policy = InFlightPolicy(start=2, maximum=64)

    most, _ = fetch_all(server, fetch_impl, policy, 4, 40)

    assert 8 <= most <= 40


@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
def test_a_number_that_a_person_chose_stays(server: ObjectServer, fetch_impl: str) -> None:
    policy = InFlightPolicy(start=2, maximum=64)

    most, _ = fetch_all(server, fetch_impl, policy, 7, None)

    assert most == 7


def test_one_that_rests_is_counted_out() -> None:
    callers = Callers(8, 16)
    calls: list[int] = []
    callers.grow = lambda: calls.append(callers.limit)
    gate = Gate(InFlightPolicy(start=3, maximum=3), 0.0)
    assert callers.limit == 8
    callers.meet(gate)

    with callers.resting():
        assert callers.limit == 4

    assert callers.limit == 3
    assert calls == [4]


def test_a_store_that_was_closed_counts_no_more() -> None:
    callers = Callers(8, 16)
    first, second = (Gate(InFlightPolicy(start=3, maximum=3), 0.0) for _ in range(2))
    callers.meet(first)
    callers.meet(second)
    assert callers.limit == 6

    del second

    assert callers.limit == 3


def test_more_is_asked_for_only_where_places_are_taken() -> None:
    callers = Callers(8, 16)
    busy, idle = (Gate(InFlightPolicy(start=10, maximum=20), 0.0) for _ in range(2))
    for gate in (busy, idle):
        callers.meet(gate)
    for _ in range(9):
        busy.enter(0.0, lambda: None)

    most = 0
    for number in range(1, 200):
        callers.hold_back()
        for gate in (busy, idle):
            gate.enter(number / 10, lambda: None)
            gate.leave(number / 10, number / 10 + 0.05, "answered")
        most = max(most, busy.limit)

    assert most == 20
    assert idle.limit == 10
