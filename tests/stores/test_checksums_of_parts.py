"""Objects whose ETag is no MD5: what obstore, which shows no checksums, leaves to another."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import http.server
import threading
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from concurrent_dataloader.errors import BodyMismatchError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import RetryPolicy
from concurrent_dataloader.testing.behaviour import Fault
from concurrent_dataloader.testing.object_server import ObjectServer
from tests.stores.conftest import CLIENTS, OpenBucket
from tests.stores.test_http import QuietServer

BODIES = {f"same{number}": bytes([number]) * 1000 for number in range(4)}
QUICK = RetryPolicy(max_attempts=4, first_wait_s=0.001)
OBSTORE, PLAIN = "object_store", "the standard library"

BODY = b"body"
MD5 = f'"{hashlib.md5(BODY).hexdigest()}"'
OF_PARTS = f'"{"0" * 32}-2"'
NOT_AN_MD5 = f'"{"0" * 32}"'
CRC32 = {"x-amz-checksum-crc32": b64encode(zlib.crc32(BODY).to_bytes(4, "big")).decode()}
OF_PARTS_CRC32 = {"x-amz-checksum-crc32": "AAAAAA==-2"}
KMS = {"x-amz-server-side-encryption": "aws:kms"}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("checksum", ["crc32", "crc32c", "crc64nvme", "sha256"])
def test_another_body_is_repeated_until_it_is_that_of_the_object_in_parts(
    client: str, checksum: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    object_server.put_objects("parts", BODIES, checksum=checksum, in_parts=True)
    store = open_bucket(client, "s3://parts", retry=QUICK)
    object_server.set_faults([Fault("foreign_body", first_attempts=2)])

    for _ in range(2):
        assert {key: bytes(store.get(key)) for key in BODIES} == BODIES


@pytest.mark.parametrize("client", CLIENTS)
def test_a_body_of_equal_length_that_stays_another_objects_in_parts_is_an_error(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    object_server.put_objects("parts", BODIES, checksum="crc32", in_parts=True)
    store = open_bucket(client, "s3://parts", retry=QUICK)
    object_server.set_faults([Fault("foreign_body", key_pattern="same2")])

    assert bytes(store.get("same1")) == BODIES["same1"]
    with pytest.raises(BodyMismatchError, match=r"s3://parts/same2: .*Mdy4CA=="):
        store.get("same2")


@pytest.mark.parametrize("client", CLIENTS)
def test_anonymous_readers_get_checksums_too(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    object_server.create_bucket("open", public=True)
    object_server.put_objects("open", BODIES, checksum="crc32", in_parts=True)
    url = object_server.endpoint_url
    store = open_bucket(client, "s3://open", anonymous=True, endpoint_url=url, retry=QUICK)
    object_server.set_faults([Fault("foreign_body", first_attempts=1)])

    assert {key: bytes(store.get(key)) for key in BODIES} == BODIES


@pytest.mark.parametrize(
    ("stored", "num_extra"),
    [
        ({}, 0),
        ({"checksum": "crc32"}, 0),
        ({"in_parts": True}, 1),
        ({"in_parts": True, "checksum": "crc32"}, 1),
    ],
)
def test_the_store_is_asked_once_more_and_only_where_etags_are_no_md5s(
    stored: dict[str, Any],
    num_extra: int,
    open_bucket: OpenBucket,
    object_server: ObjectServer,
) -> None:
    object_server.put_objects("counted", BODIES, **stored)
    store = open_bucket("obstore", "s3://counted", hedge=None)
    object_server.reset_counters()

    for _ in range(2):
        assert {key: bytes(store.get(key)) for key in BODIES} == BODIES

    counters = object_server.counters(by_key=True)
    assert counters.num_by_method == {"GET": 2 * len(BODIES) + num_extra}
    extras = [gets - 2 for gets in counters.num_gets_by_key.values()]
    assert sorted(extras) == [0, 0, 0, num_extra]


@pytest.mark.parametrize(("checksum", "most_extra"), [(None, 1), ("crc32", 8)])
def test_reads_at_once_wait_for_the_one_that_asks(
    checksum: str | None,
    most_extra: int,
    open_bucket: OpenBucket,
    object_server: ObjectServer,
) -> None:
    bodies = {f"{number:02}": bytes([number]) * 100 for number in range(16)}
    object_server.put_objects("counted", bodies, checksum=checksum, in_parts=True)
    store = open_bucket("obstore", "s3://counted", hedge=None)
    store.get("00", ByteRange(0, 1))  # opens it
    object_server.set_latency(0.2)
    object_server.reset_counters()

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        got = dict(zip(bodies, threads.map(store.get, bodies), strict=True))

    object_server.set_latency()
    assert got == bodies
    assert 16 < object_server.counters().num_requests <= 16 + most_extra


class Recorded(http.server.BaseHTTPRequestHandler):
    """Answers with the same body, and notes which client asked for it how."""

    protocol_version = "HTTP/1.1"
    timeout = 5
    fields: dict[str, str]
    asked: list[tuple[str, str]]

    def __init__(
        self, fields: dict[str, str], asked: list[tuple[str, str]], *arguments: Any
    ) -> None:
        self.fields, self.asked = fields, asked
        super().__init__(*arguments)

    def do_GET(self) -> None:
        agent = self.headers.get("User-Agent", PLAIN).partition("/")[0]
        self.asked.append((self.command, agent))
        body, status = BODY, 200
        if "Range" in self.headers:
            body, status = BODY[:1], 206
        self.send_response(status)
        for name, value in self.fields.items():
            if status == 200 or "checksum" not in name:
                self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes 0-0/{len(BODY)}")
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


Answering = Callable[[dict[str, str]], tuple[dict[str, Any], list[tuple[str, str]]]]


@pytest.fixture
def answering() -> Iterator[Answering]:
    """Start servers that add given fields; gives how to open them, and what they were asked."""
    servers: list[QuietServer] = []

    def start(fields: dict[str, str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        asked: list[tuple[str, str]] = []
        handler: Any = functools.partial(Recorded, fields, asked)
        server = QuietServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        return {"endpoint_url": url, "anonymous": True, "hedge": None}, asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("fields", "clients"),
    [
        ({"ETag": MD5}, [OBSTORE] * 3),
        ({"ETag": MD5, **CRC32}, [OBSTORE] * 3),
        ({"ETag": OF_PARTS}, [OBSTORE, PLAIN, OBSTORE, OBSTORE]),
        ({"ETag": OF_PARTS, **OF_PARTS_CRC32}, [OBSTORE, PLAIN, OBSTORE, OBSTORE]),
        ({"ETag": OF_PARTS, **CRC32}, [OBSTORE, PLAIN, PLAIN, PLAIN]),
        ({}, [OBSTORE, PLAIN, OBSTORE, OBSTORE]),
        (CRC32, [OBSTORE, PLAIN, PLAIN, PLAIN]),
        # Of these ETags only the store can say that they are no MD5s: it is asked by HEAD.
        ({"ETag": NOT_AN_MD5, **KMS}, [OBSTORE, PLAIN, PLAIN, OBSTORE, OBSTORE]),
        ({"ETag": NOT_AN_MD5, **KMS, **CRC32}, [OBSTORE, PLAIN, PLAIN, PLAIN, PLAIN]),
    ],
)
def test_obstore_reads_what_it_can_check_and_where_nothing_better_comes(
    fields: dict[str, str], clients: list[str], answering: Answering, open_bucket: OpenBucket
) -> None:
    settings, asked = answering(fields)
    store = open_bucket("obstore", **settings)

    for key in ("a", "b", "c"):
        assert store.get(key) == BODY

    assert [agent for _, agent in asked] == clients
    assert [method for method, _ in asked].count("HEAD") == len(clients) // 5


def test_parts_of_objects_stay_at_obstore(answering: Answering, open_bucket: OpenBucket) -> None:
    settings, asked = answering({"ETag": OF_PARTS, **CRC32})
    store = open_bucket("obstore", **settings)
    store.get("whole")
    asked.clear()

    assert store.get("part", ByteRange(0, 1)) == BODY[:1]

    assert asked == [("GET", OBSTORE)]


def test_nothing_is_asked_where_the_length_is_to_do(
    answering: Answering, open_bucket: OpenBucket
) -> None:
    settings, asked = answering({"ETag": OF_PARTS, **CRC32})
    store = open_bucket("obstore", verify="length", **settings)

    for key in ("a", "b"):
        assert store.get(key) == BODY

    assert asked == [("GET", OBSTORE)] * 2
