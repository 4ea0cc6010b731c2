"""A store that refuses a request says when to come again, by a header."""

from __future__ import annotations

import asyncio
import http.server
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from concurrent_dataloader.stores import Credentials, open_store
from tests.stores.test_http import QuietServer

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"


class BusyAtFirst(http.server.BaseHTTPRequestHandler):
    """Refuses the first request for a second, and answers the others."""

    protocol_version = "HTTP/1.1"
    timeout = 5

    def do_GET(self) -> None:
        assert isinstance(self.server, BusyServer)
        self.server.asked_s.append(time.monotonic())
        is_first = len(self.server.asked_s) == 1
        self.send_response(503 if is_first else 200)
        if is_first:
            self.send_header("Retry-After", self.server.retry_after)
        body = SLOW_DOWN if is_first else b"body"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class BusyServer(QuietServer):
    """Notes when it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), BusyAtFirst)
        self.asked_s: list[float] = []
        self.retry_after = "1"


@pytest.fixture
def server() -> Iterator[BusyServer]:
    busy = BusyServer()
    threading.Thread(target=busy.serve_forever, args=(0.01,), daemon=True).start()
    yield busy
    busy.shutdown()
    busy.server_close()


# obstore shows no headers of a refusal, as the docstring of RetryPolicy says.
@pytest.mark.parametrize("client", ["http", "boto3", "aiobotocore", "aiohttp"])
@pytest.mark.parametrize("colour", ["blocking", "awaited"])
def test_a_store_is_left_alone_for_as_long_as_it_says(
    client: Any, colour: str, server: BusyServer
) -> None:
    store = open_store(
        "s3://bucket",
        client=client,
        credentials=Credentials("key", "secret"),
        endpoint_url=f"http://127.0.0.1:{server.server_port}",
    )

    if colour == "blocking":
        body = bytes(store.get("key"))
    else:
        body = bytes(asyncio.run(store.get_async("key")))
    store.close()

    first_s, second_s = server.asked_s
    assert body == b"body"
    assert second_s - first_s >= 0.95, "by its own jitter it would come again in a tenth"


@pytest.mark.parametrize("told", ["\xb2", "1" * 5000, "-1", "soon"])
def test_a_time_that_is_none_is_passed_over(told: str, server: BusyServer) -> None:
    server.retry_after = told
    store = open_store(
        "s3://bucket",
        client="http",
        credentials=Credentials("key", "secret"),
        endpoint_url=f"http://127.0.0.1:{server.server_port}",
    )

    assert bytes(store.get("key")) == b"body"
