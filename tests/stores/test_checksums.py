from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

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


def test_a_store_whose_etags_are_no_md5s_is_read_after_a_second_look(
    caplog: pytest.LogCaptureFixture,
) -> None:
    checksums = Checksums("checksum")

    with caplog.at_level(logging.WARNING):
        for key in ("a", "b", "c"):
            with pytest.raises(BodyMismatchError):
                check(checksums, key, b"body", NOT_AN_MD5)
            check(checksums, key, b"body", NOT_AN_MD5)
        check(checksums, "d", b"body", NOT_AN_MD5)

    assert caplog.text.count("are no MD5s of the objects") == 1


def test_a_second_look_that_differs_is_no_confirmation() -> None:
    checksums = Checksums("checksum")

    for body in (b"one", b"two", b"three", b"four"):
        with pytest.raises(BodyMismatchError):
            check(checksums, "key", body, NOT_AN_MD5)


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
