from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import pytest

from concurrent_dataloader.errors import BodyMismatchError
from concurrent_dataloader.stores._checksums import Checksums
from concurrent_dataloader.stores.address import HttpAddress

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
