"""A server that is down for a while, seen by a client that hides nothing."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from concurrent_dataloader.testing import ObjectServer
from tests.testing.s3_conformance import connect, head
from tests.testing.s3_raw import Endpoint, RawAnswer, ask_signed, endpoint_of, sign

BODY = bytes(range(256)) * 80


@pytest.fixture
def server(object_server: ObjectServer) -> ObjectServer:
    object_server.put_objects("bucket", {"a": BODY})
    return object_server


@pytest.fixture
def own_server(make_object_server: Callable[..., ObjectServer]) -> ObjectServer:
    """Give a server that no other test has to reach; it is not there for a while."""
    server = make_object_server()
    server.put_objects("bucket", {"a": BODY})
    return server


def get(endpoint: Endpoint) -> RawAnswer:
    return ask_signed(endpoint, "GET", "/bucket/a")


def get_when_it_is_back(endpoint: Endpoint, error: type[Exception]) -> RawAnswer:
    """Ask again and again until an answer comes."""
    end_s = time.monotonic() + 20.0
    while True:
        try:
            return get(endpoint)
        except error:
            assert time.monotonic() < end_s, "it does not come back"


def send_get(connection: socket.socket, endpoint: Endpoint) -> None:
    connection.sendall(head("GET", "/bucket/a", endpoint, sign(endpoint, "GET", "/bucket/a")))


def test_connections_are_refused_until_the_end_of_the_outage(own_server: ObjectServer) -> None:
    endpoint = endpoint_of(own_server)

    begin_s = time.monotonic()
    own_server.set_outage("refused", duration_s=0.3)

    with pytest.raises(ConnectionRefusedError):
        get(endpoint)
    answer = get_when_it_is_back(endpoint, ConnectionRefusedError)
    assert time.monotonic() - begin_s >= 0.3
    assert (answer.status, answer.body) == (200, BODY)


def test_a_server_can_be_down_again(own_server: ObjectServer) -> None:
    endpoint = endpoint_of(own_server)

    for _ in range(3):
        own_server.set_outage("refused", duration_s=0.05)
        with pytest.raises(ConnectionRefusedError):
            get(endpoint)
        assert get_when_it_is_back(endpoint, ConnectionRefusedError).status == 200


def test_nobody_else_is_given_the_port_of_a_server_that_is_down(own_server: ObjectServer) -> None:
    port = own_server.port
    own_server.set_outage("refused", duration_s=0.3)

    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))

    get_when_it_is_back(endpoint_of(own_server), ConnectionRefusedError)


def test_a_server_that_is_down_can_be_closed(own_server: ObjectServer) -> None:
    endpoint = endpoint_of(own_server)
    own_server.set_outage("refused", duration_s=60.0)

    own_server.close()

    with pytest.raises(ConnectionRefusedError):
        get(endpoint)


@pytest.mark.parametrize("kind", ["refused", "reset"])
def test_what_is_under_way_when_a_server_goes_down_is_dropped(
    own_server: ObjectServer, kind: Any
) -> None:
    endpoint = endpoint_of(own_server)
    own_server.set_latency(60.0)
    with connect(endpoint) as busy, connect(endpoint) as idle:
        send_get(busy, endpoint)
        while not own_server.counters().num_in_flight:
            pass

        own_server.set_outage(kind, duration_s=0.1)

        for connection in (busy, idle):
            connection.settimeout(20.0)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""


def test_each_request_to_a_server_that_resets_ends_without_an_answer(server: ObjectServer) -> None:
    endpoint = endpoint_of(server)

    server.set_outage("reset")

    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            get(endpoint)
    assert server.counters().num_by_fault == {"outage": 2}
    assert server.counters().num_by_status == {}
    server.set_outage(None)
    assert get(endpoint).body == BODY
    assert server.counters().num_in_flight == 0


def test_a_server_may_be_unavailable(server: ObjectServer) -> None:
    endpoint = endpoint_of(server)

    server.set_outage("unavailable")
    answer = get(endpoint)

    assert (answer.status, answer.code) == (503, "ServiceUnavailable")
    assert ask_signed(endpoint, "GET", "/bucket?list-type=2").status == 503
    assert server.counters().num_by_fault == {"outage": 2}


def test_an_outage_ends_by_itself(server: ObjectServer) -> None:
    begin_s = time.monotonic()

    server.set_outage("reset", duration_s=0.2)

    answer = get_when_it_is_back(endpoint_of(server), ConnectionResetError)
    assert time.monotonic() - begin_s >= 0.2
    assert answer.status == 200


def test_the_last_word_on_an_outage_counts(server: ObjectServer) -> None:
    server.set_outage("unavailable", duration_s=0.05)
    server.set_outage("reset")
    begin_s = time.monotonic()

    while time.monotonic() - begin_s < 0.2:
        with pytest.raises(ConnectionResetError):
            get(endpoint_of(server))


def test_restore_ends_an_outage(server: ObjectServer) -> None:
    server.set_outage("reset")

    server.restore()

    assert ask_signed(endpoint_of(server), "GET", "/").status == 200


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "flood"}, "kind: got 'flood', expected None or one of 'refused', 'reset'"),
        ({"kind": "reset", "duration_s": 0}, "duration_s: got 0, expected None or more than 0"),
        ({"kind": "refused"}, "duration_s: got None for 'refused', expected seconds"),
    ],
)
def test_an_outage_that_makes_no_sense_is_refused(
    server: ObjectServer, arguments: Any, named: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        server.set_outage(**arguments)
