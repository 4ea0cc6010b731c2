"""A request that nobody needs any more is ended at the server too, where its client can be."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import shutil
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from concurrent_dataloader.errors import DeadlineError
from concurrent_dataloader.stores import Credentials, HedgePolicy, open_store
from concurrent_dataloader.stores._cancelling import CancellableCall, Leftovers, holding
from concurrent_dataloader.testing import Fault
from concurrent_dataloader.testing.object_server import ObjectServer
from tests.stores.in_worker import start_worker
from tests.stores.test_resilience import in_thread
from tests.stores.tls_proxy import make_certificates, serve_tls

AT_ONCE_S = 3.0
"""What a busy machine may take for it; a request that is not ended lasts for a minute here."""

CANCELS = ["http", "aiohttp", "aiobotocore"]
BODIES = {f"{number:02}": b"%d" % number * 500 for number in range(40)} | {"slow": b"slow" * 500}


@pytest.fixture
def server(object_server: ObjectServer) -> ObjectServer:
    object_server.put_objects("bucket", BODIES)
    return object_server


def open_bucket(client: Any, server: ObjectServer, **settings: Any) -> Any:
    settings.setdefault("endpoint_url", server.endpoint_url)
    return open_store(
        "s3://bucket",
        client=client,
        credentials=Credentials(server.access_key, server.secret_key),
        deadline_s=60.0,
        stall_timeout_s=60.0,
        **settings,
    )


def read_all(store: Any, colour: str) -> tuple[bytes, int]:
    """Read forty objects, by which it is known what is late, and then the slow one.

    Gives the slow one, and how many hedges it won: of the others a few may on a busy machine.
    """
    *quick, slow = sorted(BODIES)
    if colour == "blocking":
        for key in quick:
            store.get(key)
        num_won = store.counts().num_hedges_won
        body = bytes(store.get(slow))
        return body, store.counts().num_hedges_won - num_won

    async def read() -> tuple[bytes, int]:
        for key in quick:
            await store.get_async(key)
        num_won = store.counts().num_hedges_won
        body = bytes(await store.get_async(slow))
        return body, store.counts().num_hedges_won - num_won

    return asyncio.run(read())


def is_soon(is_so: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + AT_ONCE_S
    while not is_so():
        if time.monotonic() > until_s:
            return False
        threading.Event().wait(0.02)
    return True


def has_nothing_open(server: ObjectServer) -> Callable[[], bool]:
    return lambda: server.counters().num_in_flight == 0


@pytest.mark.parametrize("fault", ["stalled_headers", "stalled_body"])
@pytest.mark.parametrize("colour", ["blocking", "awaited"])
@pytest.mark.parametrize("client", CANCELS)
def test_once_a_hedge_has_won_the_server_holds_no_request_any_more(
    client: str, colour: str, fault: Any, server: ObjectServer
) -> None:
    server.set_faults([Fault(fault, key_pattern="slow", first_attempts=1)])
    store = open_bucket(client, server, hedge=HedgePolicy(max_extra_share=0.5))

    with contextlib.closing(store):
        read = in_thread(lambda: read_all(store, colour)).result(timeout=30)

        assert read == (BODIES["slow"], 1)
        assert is_soon(has_nothing_open(server))


@pytest.mark.parametrize("fault", ["stalled_headers", "stalled_body"])
@pytest.mark.parametrize("colour", ["blocking", "awaited"])
def test_by_obstore_too_once_one_has_gone_on_for_long(
    colour: str, fault: Any, server: ObjectServer, credentials_file: pathlib.Path
) -> None:
    slow = {f"slow{number}": b"slow%d" % number for number in range(6)}
    server.put_objects("bucket", slow)
    server.set_faults([Fault(fault, key_pattern="slow[0-9]", first_attempts=1)])
    settings: dict[str, Any] = {
        "client": "obstore",
        "endpoint_url": server.endpoint_url,
        "credentials": credentials_file,
        "deadline_s": 60.0,
        "stall_timeout_s": 60.0,
        "hedge": HedgePolicy(max_extra_share=1.0),
    }
    quick = sorted(set(BODIES) - {"slow"})

    manager: Any = start_worker()
    with manager:
        worker = manager.WorkerSide("s3://bucket", settings)
        for key in quick:
            worker.call("get", key)
        for key, body in slow.items():
            threading.Event().wait(Leftovers.LONG_S + 0.1 if key == "slow1" else 0.0)
            if colour == "awaited":
                assert worker.fetch_async([key], None) == [body]
            else:
                assert worker.call("get", key) == body

        assert worker.call("counts").num_hedges >= len(slow)
        assert is_soon(lambda: server.counters().num_in_flight <= 1)
        worker.call("close")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the certificates")
def test_by_https_too(server: ObjectServer, tmp_path: pathlib.Path) -> None:
    server.set_faults([Fault("stalled_body", key_pattern="slow", first_attempts=1)])
    authority, certificate = make_certificates(tmp_path)
    with serve_tls(certificate, server.port) as url:
        store = open_bucket(
            "http",
            server,
            endpoint_url=url,
            ca_file=authority,
            hedge=HedgePolicy(max_extra_share=0.5),
        )

        with contextlib.closing(store):
            read = in_thread(lambda: read_all(store, "blocking")).result(timeout=30)

            assert read == (BODIES["slow"], 1)
            assert is_soon(has_nothing_open(server))


def test_a_read_in_a_thread_that_is_cut_at_its_deadline_is_ended_at_the_server(
    server: ObjectServer,
) -> None:
    server.set_faults([Fault("stalled_headers", key_pattern="slow")])
    # The client's own limits are not what ends it: they are the store's, of a minute.
    store = open_bucket("http", server, hedge=HedgePolicy(max_hedges=0))
    store._deadline_s = 0.5

    with contextlib.closing(store):
        with pytest.raises(DeadlineError):
            in_thread(lambda: store.get("slow")).result(timeout=30)

        assert is_soon(has_nothing_open(server))


def test_a_read_that_is_cancelled_is_ended_at_the_server(server: ObjectServer) -> None:
    server.set_faults([Fault("stalled_headers", key_pattern="slow")])
    store = open_bucket("http", server)

    async def cancel_one() -> None:
        reading = asyncio.create_task(store.get_async("slow"))
        assert await asyncio.to_thread(is_soon, lambda: server.counters().num_in_flight == 1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(cancel_one())

    assert is_soon(has_nothing_open(server))
    store.close()


def test_connections_of_calls_that_have_ended_are_used_again(server: ObjectServer) -> None:
    store = open_bucket("http", server, hedge=HedgePolicy(max_extra_share=0.5))

    with contextlib.closing(store):
        in_thread(lambda: read_all(store, "blocking")).result(timeout=30)

        num_opened = server.counters().num_connections_opened
    # One for each telling of the server, and few for the reads.
    assert num_opened < len(BODIES) / 2


# -- alone


@pytest.fixture
def connected() -> Any:
    near, far = socket.socketpair()
    for each in (near, far):
        each.settimeout(20)
    with near, far:
        yield near, far


def test_a_call_that_waits_for_its_connection_ends_when_it_is_cancelled(connected: Any) -> None:
    near, _ = connected
    call, is_held = CancellableCall(), threading.Event()

    def receive() -> bytes:
        with holding(near):
            is_held.set()
            return near.recv(10)

    received = in_thread(lambda: call.run(receive))
    assert is_held.wait(20)
    call.cancel()

    assert received.result(timeout=20) == b""


def test_a_connection_that_was_let_go_is_left_alone(connected: Any) -> None:
    near, far = connected
    call = CancellableCall()

    def use() -> None:
        with holding(near):
            near.send(b"first")

    call.run(use)
    call.cancel()
    near.send(b"second")

    assert far.recv(20) == b"firstsecond"


def test_a_call_that_was_cancelled_takes_no_connection(connected: Any) -> None:
    near, _ = connected
    call = CancellableCall()
    call.cancel()

    with pytest.raises(ConnectionAbortedError, match="nobody waits"):
        call.run(lambda: holding(near).__enter__())


def test_a_call_of_another_thread_or_of_nobody_is_none_of_its_business(connected: Any) -> None:
    near, far = connected
    call = CancellableCall()
    with pytest.raises(ZeroDivisionError):
        call.run(lambda: 1 // 0)

    with holding(near):
        call.cancel()
        near.send(b"whole")

    assert far.recv(20) == b"whole"


def test_calls_that_go_on_are_known_of_when_they_last() -> None:
    now_s = 100.0
    leftovers, call, short = Leftovers(lambda: now_s), CancellableCall(), CancellableCall()
    for each in (call, short):
        each.go_on_for(leftovers)

    short.cancel()
    now_s += 0.4
    leftovers.end(short)
    call.cancel()
    now_s += 0.4
    assert not leftovers.last_long
    now_s += 0.2
    assert leftovers.last_long
    leftovers.end(call)
    now_s += Leftovers.KNOWN_S - 1
    assert leftovers.last_long
    now_s += 2
    assert not leftovers.last_long


def test_a_call_that_has_ended_leaves_nothing() -> None:
    leftovers, call = Leftovers(lambda: 0.0), CancellableCall()
    call.go_on_for(leftovers)

    call.go_on_for(None)
    leftovers.end(call)
    call.cancel()

    assert not leftovers._begun_s
