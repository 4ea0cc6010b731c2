from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from concurrent_dataloader.errors import BodyMismatchError
from concurrent_dataloader.stores import RetryPolicy, open_store
from concurrent_dataloader.stores._checksums import Checksums
from concurrent_dataloader.stores.address import HttpAddress
from tests.stores.in_worker import StoreInWorker, WorkerManager
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


def test_a_store_that_says_it_has_a_customers_key_is_compared_by_length_from_then_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    checksums = Checksums("checksum")
    asked: list[str] = []

    def ask(key: str) -> Any:
        asked.append(key)
        return {"x-amz-server-side-encryption": "aws:kms"}.get

    for key in ("a", "b"):
        checksums.check_etag(ADDRESS, key, NOT_AN_MD5, b"body", functools.partial(ask, key))

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


@pytest.mark.parametrize("client", ["http", "boto3", "aiobotocore", "aiohttp"])
def test_an_object_that_was_sent_in_parts_is_compared_with_its_checksum_header(
    client: Any, settings: dict[str, Any]
) -> None:
    store = open_store("s3://bucket", client=client, **settings)

    with pytest.raises(BodyMismatchError, match="s3://bucket/key"):
        store.get("key")
    store.close()


def test_obstore_shows_no_checksum_header_as_the_documents_say(
    settings: dict[str, Any], worker: WorkerManager
) -> None:
    store = StoreInWorker(worker, "s3://bucket", settings)

    assert store.get("key") == b"12345678X"
    store.close()
