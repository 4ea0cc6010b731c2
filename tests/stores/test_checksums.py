from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import random
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from concurrent_dataloader.errors import BodyMismatchError
from concurrent_dataloader.stores import RetryPolicy
from concurrent_dataloader.stores._checksums import Checksums
from concurrent_dataloader.stores._crc64nvme import crc64nvme
from concurrent_dataloader.stores.address import HttpAddress
from concurrent_dataloader.testing._objects import compute_checksum
from tests.stores.conftest import CLIENTS, OpenBucket
from tests.stores.test_http import QuietServer

ADDRESS = HttpAddress(base_url="http://host")
NOT_AN_MD5 = "0123456789abcdef0123456789abcdef"


def md5(body: bytes) -> str:
    return hashlib.md5(body).hexdigest()


def check(
    checksums: Checksums, key: str, body: bytes, etag: str | None, headers: Mapping[str, str] = {}
) -> None:
    checksums.check(ADDRESS, key, headers.get, etag, body)


def test_an_etag_that_is_the_md5_is_believed() -> None:
    checksums = Checksums("checksum")

    check(checksums, "key", b"body", f'"{md5(b"body")}"')

    with pytest.raises(BodyMismatchError, match="http://host/key: got 5 bytes whose ETag is"):
        check(checksums, "key", b"other", f'"{md5(b"body")}"')
    with pytest.raises(BodyMismatchError):  # however often it comes
        check(checksums, "key", b"other", f'"{md5(b"body")}"')


@pytest.mark.parametrize("etag", [None, "", '"abc-3"', 'W/"0123"', '"not hexadecimal at all, no"'])
def test_an_etag_of_another_kind_says_nothing(etag: str | None) -> None:
    check(Checksums("checksum"), "key", b"body", etag)


def test_a_store_that_always_answers_with_other_objects_is_never_believed() -> None:
    checksums = Checksums("checksum")

    for _ in range(3):
        for key in ("a", "b", "c", "d", "e"):
            with pytest.raises(BodyMismatchError):
                check(checksums, key, b"the same other body", NOT_AN_MD5)


def test_the_etags_of_a_store_that_says_it_has_a_customers_key_are_not_looked_at_any_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    checksums = Checksums("checksum")
    asked: list[str] = []

    def ask(key: str) -> Any:
        asked.append(key)
        return {"x-amz-server-side-encryption": "aws:kms"}.get

    for key in ("a", "b"):
        ask_of = functools.partial(ask, key)
        assert not checksums.check_etag(ADDRESS, key, NOT_AN_MD5, b"body", ask_of)

    assert asked == ["a"]
    assert "encrypts objects with a customer's key" in caplog.text


def test_a_store_that_says_no_such_thing_has_sent_a_wrong_body() -> None:
    checksums = Checksums("checksum")

    with pytest.raises(BodyMismatchError, match="ETag"):
        checksums.check_etag(
            ADDRESS,
            "key",
            NOT_AN_MD5,
            b"body",
            lambda: {"x-amz-server-side-encryption": "AES256"}.get,
        )


@pytest.mark.parametrize(
    "headers",
    [
        {"x-amz-server-side-encryption": "aws:kms"},
        {"x-amz-server-side-encryption": "aws:kms:dsse"},
        {"x-amz-server-side-encryption-customer-algorithm": "AES256"},
    ],
)
def test_an_object_under_a_customers_key_has_no_md5(headers: Mapping[str, str]) -> None:
    check(Checksums("checksum"), "key", b"body", NOT_AN_MD5, headers)


@pytest.mark.parametrize(
    ("name", "value"),
    [  # of b"123456789", the check values of these algorithms
        ("x-amz-checksum-crc32", "y/Q5Jg=="),
        ("x-amz-checksum-crc32c", "4waSgw=="),
        ("x-amz-checksum-sha256", "FeKw08M4keuw8e9gnsQZQgwg4yDOlMZfvIwzEkSOsiU="),
        ("x-amz-checksum-sha1", "98O8HYCOBHMq32eZZczDTKeuNEE="),
    ],
)
def test_a_checksum_header_counts_before_the_etag(name: str, value: str) -> None:
    checksums = Checksums("checksum")
    try:
        check(checksums, "key", b"123456789", NOT_AN_MD5, {name: value})
    except BodyMismatchError as error:  # shows what was computed
        pytest.fail(str(error))

    with pytest.raises(BodyMismatchError, match=name):
        check(checksums, "key", b"12345678X", NOT_AN_MD5, {name: value})


def test_a_checksum_of_parts_is_left_alone() -> None:
    check(Checksums("checksum"), "key", b"body", None, {"x-amz-checksum-crc32c": "AAAAAA==-2"})


class OtherBody(http.server.BaseHTTPRequestHandler):
    """Answers with another body than its checksum says; the ETag is that of one sent in parts."""

    protocol_version = "HTTP/1.1"
    timeout = 5

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("x-amz-checksum-crc32", "y/Q5Jg==")  # of 123456789
        self.send_header("ETag", '"25cf327d6c359f63501fba1e20c1aa75-2"')
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.send_header("Content-Length", "9")
        self.end_headers()
        self.wfile.write(b"12345678X")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def settings() -> Iterator[dict[str, Any]]:
    """Give what a store on such a server is opened with."""
    server = QuietServer(("127.0.0.1", 0), OtherBody)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield {
        "endpoint_url": f"http://127.0.0.1:{server.server_port}",
        "anonymous": True,
        "retry": RetryPolicy(max_attempts=1),
    }
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("client", CLIENTS)
def test_an_object_that_was_sent_in_parts_is_compared_with_its_checksum_header(
    client: str, settings: dict[str, Any], open_bucket: OpenBucket
) -> None:
    store = open_bucket(client, **settings)

    for _ in range(3):
        with pytest.raises(BodyMismatchError, match=r"s3://bucket/key: .*8UFo6A=="):
            store.get("key")


def test_the_slow_checksum_is_that_of_another_implementation() -> None:
    body = random.Random(0).randbytes(3 * 8 * (1 << 15) + 5)

    for num_bytes in (*range(40), 1000, 8 * (1 << 15), 8 * (1 << 15) + 1, len(body)):
        part = memoryview(body)[len(body) - num_bytes :]
        got = base64.b64encode(crc64nvme(part).to_bytes(8, "big")).decode()

        assert got == compute_checksum("crc64nvme", bytes(part)), num_bytes


def test_the_slow_checksum_counts_where_the_etag_is_no_md5() -> None:
    header = {"x-amz-checksum-crc64nvme": "rosUhgp5mIg="}  # of b"123456789", its check value
    of_a_customers_key = {**header, "x-amz-server-side-encryption": "aws:kms"}

    for etag, headers in (
        (f'"{NOT_AN_MD5}-2"', header),
        (None, header),
        (NOT_AN_MD5, of_a_customers_key),
    ):
        check(Checksums("checksum"), "key", b"123456789", etag, headers)
        with pytest.raises(BodyMismatchError, match="crc64nvme"):
            check(Checksums("checksum"), "key", b"12345678X", etag, headers)
        check(Checksums("length"), "key", b"12345678X", etag, headers)
