"""A request with all its attempts ends at its deadline, whoever makes it and in whatever thread."""

from __future__ import annotations

import contextlib
import http.server
import math
import socket
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest
from botocore.httpsession import URLLib3Session
from typing_extensions import Buffer

from concurrent_dataloader.errors import DeadlineError, StoreUnavailableError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import (
    InFlightPolicy,
    ResilientStore,
    RetryPolicy,
    open_store,
)
from concurrent_dataloader.stores._http import HttpStore
from concurrent_dataloader.stores._time_left import end_of_call, ending_in
from concurrent_dataloader.stores.address import ClientOptions, HttpAddress
from concurrent_dataloader.testing import Fault
from concurrent_dataloader.testing.object_server import ObjectServer
from tests.stores.conftest import OpenBucket
from tests.stores.test_http import QuietServer
from tests.stores.test_resilience import OneStalls, in_thread

DEADLINE_S = 2.0
LATE_S = 1.6
"""When the first attempt fails. One that had a whole deadline from then on would last for 3.6 s."""

IN_TIME_S = DEADLINE_S + 1.0
QUICK = RetryPolicy(first_wait_s=0.001)
METHODS = ("GET", "HEAD", "PUT")

CALLS: dict[str, Callable[[Any], object]] = {
    "get": lambda store: store.get("key"),
    "head": lambda store: store.head("key"),
    "put": lambda store: store.put("key", b"new"),
    "list": lambda store: list(store.list()),
}

is_told = pytest.mark.skipif(
    not hasattr(URLLib3Session, "_get_request_timeout"),
    reason="this botocore takes no time limit for a single request",
)


@contextlib.contextmanager
def in_time() -> Generator[None]:
    assert threading.current_thread() is threading.main_thread()
    begun_s = time.monotonic()
    yield
    assert time.monotonic() - begun_s < IN_TIME_S


# -- in the main thread, where nobody can cut


@pytest.mark.parametrize(
    "name", ["get", "head", pytest.param("put", marks=is_told), pytest.param("list", marks=is_told)]
)
def test_a_retry_that_stalls_has_only_the_time_that_is_left(
    name: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    object_server.put_objects("bucket", {"key": b"body"})
    store = open_bucket("http", deadline_s=DEADLINE_S, retry=QUICK)
    CALLS[name](store)  # what a client needs to begin is opened
    is_list = name == "list"
    object_server.set_latency(LATE_S)
    object_server.set_faults(
        [
            Fault("internal_error", first_attempts=1, methods=METHODS, hits_listings=is_list),
            Fault("stalled_headers", methods=METHODS, hits_listings=is_list),
        ]
    )

    said = (
        r"no answer in 0\.\d\d s; the attempt before: .* 500 .*; gave up after 2 attempts in "
        r"2\.\d+ s, allowed are 2 s"
    )
    with in_time(), pytest.raises(DeadlineError, match=said):
        CALLS[name](store)


@pytest.mark.parametrize("client", ["http", "boto3"])
def test_a_body_that_stalls_after_a_late_beginning_is_cut(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    object_server.put_objects("bucket", {"key": b"body" * 100})
    store = open_bucket(client, deadline_s=DEADLINE_S, retry=QUICK)
    store.get("key")
    object_server.set_latency(LATE_S)
    object_server.set_faults([Fault("stalled_body")])

    with in_time(), pytest.raises(DeadlineError, match="s3://bucket/key: no answer"):
        store.get("key")


class Dripping(http.server.BaseHTTPRequestHandler):
    """First a late error, and then an answer that comes byte by byte and without end."""

    protocol_version = "HTTP/1.1"
    is_first = True
    head = b""

    def do_GET(self) -> None:
        if type(self).is_first:
            type(self).is_first = False
            threading.Event().wait(LATE_S)
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.wfile.write(self.head)
        for _ in range(400):  # until the client leaves
            self.wfile.write(b"x")
            threading.Event().wait(0.05)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve(handler: type[Dripping]) -> Generator[str]:
    with QuietServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize(
    "head_of_answer",
    [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "],
    ids=["body", "head"],
)
def test_a_retry_that_drips_has_only_the_time_that_is_left(head_of_answer: bytes) -> None:
    class Handler(Dripping):
        head = head_of_answer

    with serve(Handler) as url:
        store = open_store(url, client="http", deadline_s=DEADLINE_S, retry=QUICK)

        with in_time(), pytest.raises(DeadlineError, match=r"no answer in 0\.\d\d s"):
            store.get("key")
        store.close()


def test_the_addresses_of_a_server_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as opened:
        full = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = full.getsockname()[1]
        for _ in range(4):  # from here on who connects waits
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        answer = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        look_up = socket.getaddrinfo

        def find(host: Any, *arguments: Any, **settings: Any) -> Any:
            is_ours = host == "many.invalid"
            return [answer] * 8 if is_ours else look_up(host, *arguments, **settings)

        monkeypatch.setattr(socket, "getaddrinfo", find)
        options = ClientOptions(connect_timeout_s=0.5, total_timeout_s=0.8)
        store = HttpStore(HttpAddress(base_url=f"http://many.invalid:{port}"), options)
        begun_s = time.monotonic()

        with pytest.raises(DeadlineError):
            store.get("key")

    assert time.monotonic() - begun_s < 1.8, "eight of half a second each"


# -- in a worker


class InTurn(OneStalls):
    """Answers ``first`` when it may; notes in which thread it was asked for what, and told what."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = threading.Event()
        self.asked: list[tuple[str, threading.Thread, float]] = []

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        self.asked.append((key, threading.current_thread(), end_of_call()))
        if key == "first":
            self.may_end.wait(30)
        return super().get(key, byte_range)


def test_a_first_attempt_that_stood_in_line_has_only_the_time_that_is_left() -> None:
    inner = InTurn()
    limits = InFlightPolicy(start=1, maximum=1)
    store = ResilientStore(inner, RetryPolicy(), DEADLINE_S, None, limits)
    first = in_thread(lambda: store.get("first"))
    while not inner.asked:
        threading.Event().wait(0.001)
    begun_s = time.monotonic()
    second = in_thread(lambda: store.get("slow"))
    threading.Timer(LATE_S, inner.may_end.set).start()

    with (
        contextlib.closing(store),
        pytest.raises(DeadlineError, match=r"stalling://slow: no answer in 0\.\d\d s; gave up"),
    ):
        second.result(timeout=15)

    assert time.monotonic() - begun_s < IN_TIME_S
    assert first.result(timeout=15) == b"first"


def test_any_other_first_attempt_is_made_in_the_callers_thread_and_told_nothing() -> None:
    inner = InTurn()
    store = ResilientStore(inner, RetryPolicy(), DEADLINE_S, None, InFlightPolicy())

    def read() -> threading.Thread:
        store.get("key")
        return threading.current_thread()

    caller = in_thread(read).result(timeout=15)
    store.get("key")

    assert inner.asked == [
        ("key", caller, math.inf),
        ("key", threading.main_thread(), math.inf),
    ]


# -- what a client of one's own is told


class FailsOnce(InTurn):
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        body = super().get(key, byte_range)
        if len(self.asked) == 1:
            threading.Event().wait(0.5)
            raise StoreUnavailableError("stalling://key: not now")
        return body


def test_what_is_told_is_the_deadline_and_told_of_that_call_alone() -> None:
    inner = FailsOnce()
    store = ResilientStore(inner, QUICK, DEADLINE_S)
    begun_s = time.monotonic()

    store.get("key")

    assert [told for *_, told in inner.asked] == [
        math.inf,
        pytest.approx(begun_s + DEADLINE_S, abs=0.3),
    ]
    assert end_of_call() == math.inf


def test_who_is_told_in_one_thread_is_not_in_another() -> None:
    with ending_in(5.0):
        told = end_of_call()
        with ending_in(1.0):
            assert end_of_call() < told
        assert end_of_call() == told
        assert in_thread(end_of_call).result(timeout=15) == math.inf
