"""Latency, bandwidth, limits and faults, seen by a client that hides nothing."""

from __future__ import annotations

import collections
import contextlib
import random
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from concurrent_dataloader.testing import Fault, Latency, ObjectServer
from concurrent_dataloader.testing.behaviour import FaultPlan, Pacer
from tests.testing.s3_conformance import connect, head
from tests.testing.s3_raw import Endpoint, RawAnswer, ask_signed, endpoint_of, sign

BODIES = {f"k{number}": bytes([number]) * (20_000 + number) for number in range(4)}


@pytest.fixture
def server(object_server: ObjectServer) -> ObjectServer:
    object_server.put_objects("bucket", BODIES)
    return object_server


@pytest.fixture
def endpoint(server: ObjectServer) -> Endpoint:
    return endpoint_of(server)


def get(endpoint: Endpoint, key: str = "k0", **headers: str) -> RawAnswer:
    return ask_signed(endpoint, "GET", f"/bucket/{key}", headers)


class Heard:
    """What came over a connection, and how it ended."""

    def __init__(self) -> None:
        self.received = b""
        self.end = ""

    @property
    def body(self) -> bytes:
        return self.received.partition(b"\r\n\r\n")[2]


def listen(endpoint: Endpoint, key: str, *, silence_s: float) -> Heard:
    """Ask for an object, and hear until the end, a reset, or a silence."""
    heard = Heard()
    with connect(endpoint) as connection:
        connection.sendall(
            head("GET", f"/bucket/{key}", endpoint, sign(endpoint, "GET", f"/bucket/{key}"))
        )
        connection.settimeout(silence_s)
        try:
            while data := connection.recv(65536):
                heard.received += data
            heard.end = "closed"
        except ConnectionResetError:
            heard.end = "reset"
        except TimeoutError:
            heard.end = "silence"
    return heard


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("internal_error", 500, "InternalError"),
        ("slow_down", 503, "SlowDown"),
        ("service_unavailable", 503, "ServiceUnavailable"),
        ("expired_token", 400, "ExpiredToken"),
    ],
)
def test_a_fault_may_be_an_error_of_s3(
    server: ObjectServer, endpoint: Endpoint, kind: Any, status: int, code: str
) -> None:
    server.set_faults([Fault(kind)])

    answer = get(endpoint)

    assert (answer.status, answer.code) == (status, code)
    counters = server.counters()
    assert counters.num_by_fault == {kind: 1}
    assert counters.num_by_status == {status: 1}
    assert counters.num_by_error == {code: 1}


def test_a_reset_before_the_headers_says_nothing(server: ObjectServer, endpoint: Endpoint) -> None:
    server.set_faults([Fault("reset_before_headers")])

    heard = listen(endpoint, "k0", silence_s=20)

    assert (heard.end, heard.received) == ("reset", b"")
    counters = server.counters()
    assert (counters.num_by_status, counters.num_in_flight) == ({}, 0)


def test_a_reset_before_the_body_comes_after_the_headers(
    server: ObjectServer, endpoint: Endpoint
) -> None:
    server.set_faults([Fault("reset_before_body")])

    heard = listen(endpoint, "k0", silence_s=20)

    assert heard.end == "reset"
    assert b"Content-Length: 20000\r\n" in heard.received
    assert heard.body == b""


def test_a_reset_inside_the_body_comes_after_half_of_it(
    server: ObjectServer, endpoint: Endpoint
) -> None:
    server.set_faults([Fault("reset_inside_body")])

    heard = listen(endpoint, "k0", silence_s=20)

    assert heard.end == "reset"
    assert heard.body == BODIES["k0"][:10_000]


def test_a_truncated_body_ends_in_an_orderly_way(server: ObjectServer, endpoint: Endpoint) -> None:
    server.set_faults([Fault("truncated_body")])

    heard = listen(endpoint, "k0", silence_s=20)

    assert heard.end == "closed"
    assert b"Content-Length: 20000\r\n" in heard.received
    assert heard.body == BODIES["k0"][:10_000]
    assert server.counters().body_bytes_sent == 10_000


def test_a_stalled_body_falls_silent_half_way(server: ObjectServer, endpoint: Endpoint) -> None:
    server.set_faults([Fault("stalled_body")])

    heard = listen(endpoint, "k0", silence_s=0.2)

    assert heard.end == "silence"
    assert heard.body == BODIES["k0"][:10_000]


def test_a_stall_before_the_headers_says_nothing(server: ObjectServer, endpoint: Endpoint) -> None:
    server.set_faults([Fault("stalled_headers")])

    heard = listen(endpoint, "k0", silence_s=0.2)

    assert (heard.end, heard.received) == ("silence", b"")
    assert server.counters().num_by_status == {}


@pytest.mark.parametrize("kind", ["stalled_body", "stalled_headers"])
def test_a_stall_may_end(server: ObjectServer, endpoint: Endpoint, kind: Any) -> None:
    server.set_faults([Fault(kind, stall_s=0.1)])

    begin_s = time.monotonic()
    answers = [get(endpoint), get(endpoint)]

    assert time.monotonic() - begin_s >= 0.2
    assert [answer.body for answer in answers] == [BODIES["k0"]] * 2
    assert server.counters().num_by_fault == {kind: 2}


def test_an_empty_body_is_a_success_without_bytes(server: ObjectServer, endpoint: Endpoint) -> None:
    server.set_faults([Fault("empty_body")])

    answer = get(endpoint)

    assert (answer.status, answer.headers["content-length"], answer.body) == (200, "0", b"")


def test_a_foreign_body_has_the_headers_of_the_right_object(
    server: ObjectServer, endpoint: Endpoint
) -> None:
    etag = get(endpoint, "k1").headers["etag"]
    server.set_faults([Fault("foreign_body")])

    answer = get(endpoint, "k1")

    assert answer.body == BODIES["k2"]
    assert answer.headers["content-length"] == "20002"
    assert answer.headers["etag"] == etag
    assert get(endpoint, "k3").body == BODIES["k0"]
    ranged = get(endpoint, "k1", Range="bytes=5-9")
    assert (ranged.status, ranged.body) == (206, b"\x02" * 5)


def test_the_only_object_of_a_bucket_comes_back_inverted(
    server: ObjectServer, endpoint: Endpoint
) -> None:
    server.put_objects("single", {"a": b"\x00\x01"})
    server.set_faults([Fault("foreign_body")])

    assert ask_signed(endpoint, "GET", "/single/a").body == b"\xff\xfe"


def test_faults_hit_only_the_keys_and_methods_they_are_for(
    server: ObjectServer, endpoint: Endpoint
) -> None:
    server.set_faults([Fault("internal_error", key_pattern="[13]$", methods=("GET", "PUT"))])

    statuses = {key: get(endpoint, key).status for key in BODIES}

    assert statuses == {"k0": 200, "k1": 500, "k2": 200, "k3": 500}
    assert ask_signed(endpoint, "HEAD", "/bucket/k1").status == 200
    assert ask_signed(endpoint, "PUT", "/bucket/k1", body=b"x").status == 500
    assert ask_signed(endpoint, "GET", "/bucket?prefix=k1").status == 200


def test_faults_of_listings_hit_listings_alone(server: ObjectServer, endpoint: Endpoint) -> None:
    server.set_faults([Fault("slow_down", hits_listings=True, key_pattern="^train/")])

    assert ask_signed(endpoint, "GET", "/bucket?list-type=2&prefix=train%2F").status == 503
    assert ask_signed(endpoint, "GET", "/bucket?list-type=2&prefix=val%2F").status == 200
    assert get(endpoint).status == 200


def test_faults_may_hit_only_the_first_attempts_at_each_key(
    server: ObjectServer, endpoint: Endpoint
) -> None:
    server.set_faults([Fault("slow_down", first_attempts=2)])

    statuses = [get(endpoint, key).status for key in ("k0", "k0", "k1", "k0", "k1", "k1")]

    assert statuses == [503, 503, 503, 200, 503, 200]


def test_faults_end_when_they_are_taken_away(server: ObjectServer, endpoint: Endpoint) -> None:
    server.set_faults([Fault("slow_down")])
    assert get(endpoint).status == 503

    server.set_faults([])

    assert get(endpoint).status == 200


def test_a_fault_stops_after_its_hits() -> None:
    plan = FaultPlan([Fault("slow_down", max_count=2), Fault("empty_body")], random.Random(0))

    kinds = [fault.kind for _ in range(4) if (fault := plan.pick("GET", "a"))]

    assert kinds == ["slow_down", "slow_down", "empty_body", "empty_body"]


def test_the_rate_of_a_fault_is_that_of_its_hits_and_is_seeded() -> None:
    def draw(seed: int) -> list[bool]:
        plan = FaultPlan([Fault("slow_down", rate=0.2)], random.Random(seed))
        return [plan.pick("GET", str(number)) is not None for number in range(5000)]

    assert draw(1) == draw(1) != draw(2)
    assert 0.17 < statistics.fmean(draw(1)) < 0.23


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "meteor"}, "kind: got 'meteor', expected one of 'internal_error'"),
        ({"kind": "slow_down", "rate": 1.5}, "rate: got 1.5"),
        ({"kind": "slow_down", "key_pattern": "("}, "key_pattern: got '('"),
        ({"kind": "slow_down", "first_attempts": -1}, "first_attempts: got -1"),
        ({"kind": "foreign_body", "hits_listings": True}, "hits_listings: got True"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(values: Any, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        Fault(**values)


# Latency


@pytest.mark.parametrize(
    ("latency", "median_s", "low_s", "high_s"),
    [
        (Latency(0.1), 0.1, 0.1, 0.1),
        (Latency(0.1, sigma=0.3), 0.1, 0.01, 1.0),
        (Latency(0.1, spread_s=0.05), 0.1, 0.05, 0.15),
    ],
)
def test_latency_has_the_distribution_it_says(
    latency: Latency, median_s: float, low_s: float, high_s: float
) -> None:
    rng = random.Random(0)

    drawn = [latency.draw_s(rng) for _ in range(20_000)]

    assert statistics.median(drawn) == pytest.approx(median_s, rel=0.02)
    assert low_s <= min(drawn)
    assert max(drawn) <= high_s
    if latency.sigma:
        quartiles = statistics.quantiles(drawn, n=4)
        # The quartiles of a lognormal lie exp(0.6745 sigma) from its median.
        assert quartiles[2] / quartiles[1] == pytest.approx(2.718281828 ** (0.6745 * 0.3), rel=0.02)


@pytest.mark.parametrize(
    "values", [{"median_s": -1}, {"median_s": 1, "sigma": 1, "spread_s": 1}, {"spread_s": 1}]
)
def test_a_latency_that_makes_no_sense_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="got"):
        Latency(**values)


def test_each_request_waits_before_its_answer(server: ObjectServer, endpoint: Endpoint) -> None:
    server.set_latency(0.15)
    begin_s = time.monotonic()
    get(endpoint)
    waited_s = time.monotonic() - begin_s

    server.set_latency()
    begin_s = time.monotonic()
    get(endpoint)

    assert waited_s >= 0.15
    assert time.monotonic() - begin_s < 0.15


def test_requests_of_one_connection_wait_one_after_the_other(
    server: ObjectServer, endpoint: Endpoint
) -> None:
    server.set_latency(0.05)
    sent = b"".join(
        head("GET", f"/bucket/{key}", endpoint, sign(endpoint, "GET", f"/bucket/{key}"))
        for key in BODIES
    )
    with connect(endpoint) as connection:
        begin_s = time.monotonic()
        connection.sendall(sent)
        received = b""
        while not received.endswith(BODIES["k3"]):
            received += connection.recv(65536)
        took_s = time.monotonic() - begin_s

    places = [received.index(BODIES[key]) for key in BODIES]
    assert places == sorted(places)
    assert took_s >= 4 * 0.05


def test_requests_wait_side_by_side(server: ObjectServer, endpoint: Endpoint) -> None:
    server.set_latency(0.3)
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(endpoint)) for _ in range(256)]
        sent = head("GET", "/bucket/k0", endpoint, sign(endpoint, "GET", "/bucket/k0"))

        begin_s = time.monotonic()
        for connection in connections:
            connection.sendall(sent)
        for connection in connections:
            received = b""
            while not received.endswith(BODIES["k0"]):
                received += connection.recv(65536)
        took_s = time.monotonic() - begin_s

    assert 0.3 <= took_s < 20
    counters = server.counters()
    assert counters.max_in_flight == 256
    assert counters.max_connections >= 256
    assert counters.num_by_status == {200: 256}


# Bandwidth and limits


def test_a_connection_is_no_faster_than_its_bound(server: ObjectServer, endpoint: Endpoint) -> None:
    server.put_objects("bucket", {"big": b"x" * 300_000})
    server.set_bandwidth(connection_bytes_per_s=1_000_000)

    begin_s = time.monotonic()
    body = get(endpoint, "big").body
    took_s = time.monotonic() - begin_s

    assert body == b"x" * 300_000
    assert took_s >= 0.25


def test_all_connections_together_are_no_faster_than_their_bound(
    server: ObjectServer, endpoint: Endpoint
) -> None:
    server.put_objects("bucket", {"big": b"x" * 100_000})
    server.set_bandwidth(total_bytes_per_s=1_000_000)

    begin_s = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: get(endpoint, "big"), range(4)))
    took_s = time.monotonic() - begin_s

    assert {answer.body for answer in answers} == {b"x" * 100_000}
    assert took_s >= 0.35


def test_a_pacer_gives_bytes_at_its_rate() -> None:
    pacer = Pacer(100.0)

    assert [pacer.reserve(50, 10.0) for _ in range(3)] == [10.5, 11.0, 11.5]
    assert pacer.reserve(50, 20.0) == 20.5


def test_requests_beyond_the_rate_are_told_to_slow_down(
    server: ObjectServer, endpoint: Endpoint
) -> None:
    server.set_rate_limit(0.001, burst=3)

    statuses = collections.Counter(get(endpoint).status for _ in range(10))

    assert statuses == {200: 3, 503: 7}
    assert server.counters().num_by_error == {"SlowDown": 7}
    server.set_rate_limit(None)
    assert get(endpoint).status == 200


def test_a_limit_lets_its_rate_through() -> None:
    limit = Pacer(10.0, burst=1.0)

    taken = [limit.try_take(5.0 + step * 0.02) for step in range(50)]

    assert sum(taken) == 10


# Counters


def test_what_was_done_is_counted(server: ObjectServer, endpoint: Endpoint) -> None:
    get(endpoint, "k1")
    get(endpoint, "k1", Range="bytes=0-9")
    get(endpoint, "none")
    ask_signed(endpoint, "HEAD", "/bucket/k2")
    ask_signed(endpoint, "PUT", "/bucket/new", body=b"12345")

    counters = server.counters(by_key=True)

    assert counters.num_by_method == {"GET": 3, "HEAD": 1, "PUT": 1}
    assert counters.num_requests == 5
    assert counters.num_by_status == {200: 3, 206: 1, 404: 1}
    assert counters.num_by_error == {"NoSuchKey": 1}
    assert counters.num_gets_by_key == {"bucket/k1": 2, "bucket/none": 1}
    assert counters.body_bytes_received == 5
    assert counters.body_bytes_sent >= 20_001 + 10
    assert counters.num_in_flight == 0
    assert counters.cpu_s > 0
    assert server.counters().num_gets_by_key == {}


def test_what_is_under_way_at_a_restore_is_not_counted_after_it(
    server: ObjectServer, endpoint: Endpoint
) -> None:
    server.set_faults([Fault("stalled_body")])
    with connect(endpoint) as connection:
        connection.sendall(head("GET", "/bucket/k0", endpoint, sign(endpoint, "GET", "/bucket/k0")))
        received = b""
        while len(received) < 10_000:
            received += connection.recv(65536)

        server.restore()

        counters = server.counters()
        assert (counters.num_in_flight, counters.body_bytes_sent) == (0, 0)


def test_counting_begins_again(server: ObjectServer, endpoint: Endpoint) -> None:
    get(endpoint)

    server.reset_counters()

    counters = server.counters(by_key=True)
    assert (counters.num_requests, counters.num_gets_by_key) == (0, {})


def test_all_connections_are_dropped_when_told(server: ObjectServer, endpoint: Endpoint) -> None:
    server.set_faults([Fault("stalled_headers", key_pattern="k0")])
    with connect(endpoint) as stalled, connect(endpoint) as idle:
        stalled.sendall(head("GET", "/bucket/k0", endpoint, sign(endpoint, "GET", "/bucket/k0")))
        idle.sendall(head("GET", "/bucket/k1", endpoint, sign(endpoint, "GET", "/bucket/k1")))
        while not idle.recv(65536).endswith(BODIES["k1"][-9:]):
            pass

        server.drop_connections()

        for connection in (stalled, idle):
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(65536) == b""
    assert server.counters().num_in_flight == 0
