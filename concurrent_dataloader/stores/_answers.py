"""What an HTTP answer means: pure functions that every HTTP client of ours shares."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.sax.saxutils import unescape

from typing_extensions import Buffer

from concurrent_dataloader.errors import (
    AccessDeniedError,
    BodyMismatchError,
    ByteRangeError,
    DeadlineError,
    ExpiredCredentialsError,
    KeyNotFoundError,
    StoreError,
    StoreUnavailableError,
    ThrottledError,
)
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores._checksums import Checksums
from concurrent_dataloader.stores.address import Address, ClientOptions

MD5_OF_NOTHING = "d41d8cd98f00b204e9800998ecf8427e"

_MD5 = re.compile(r"[0-9a-f]{32}")
_CERTIFICATE = re.compile(r"certificate|SSL validation failed", re.IGNORECASE)
# OpenSSL's words, and those of rustls, for an answer that is no TLS.
_NO_TLS = re.compile(r"WRONG_VERSION_NUMBER|InvalidContentType|record layer failure", re.IGNORECASE)
_CODE = re.compile(r"<Code>([^<]{1,200})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,400})</Message>")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

_THROTTLED_STATUSES = frozenset({429, 503})
_THROTTLED_CODES = frozenset({"ServiceUnavailable", "SlowDown", "TooManyRequests"})
_REPEATED_STATUSES = frozenset({408, 425, 500, 502, 504})
_REPEATED_CODES = frozenset({"InternalError", "OperationAborted", "RequestTimeout"})
_MAX_RETRY_AFTER_S = 60.0
# S3 says 400, not 403, to a token that has run out.
_EXPIRED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
_DENIED_CODES = frozenset({"AuthorizationHeaderMalformed", "InvalidToken"})


def parse_s3_error(text: str) -> tuple[str, str]:
    """Take code and message out of S3's error document; both empty where it is none."""
    code, message = _CODE.search(text), _MESSAGE.search(text)
    return (
        unescape(code.group(1)) if code else "",
        unescape(message.group(1)).strip() if message else "",
    )


def error_for_status(
    address: Address,
    key: str,
    status: int,
    code: str = "",
    message: str = "",
    retry_after: str | None = None,
) -> StoreError:
    """Translate a refusal into the error to raise; `StoreUnavailableError` may be repeated.

    Args:
        address: The place that was asked.
        key: The object that was asked for; empty for a listing.
        status: HTTP status.
        code: S3's code, such as ``NoSuchKey``.
        message: S3's message.
        retry_after: The header of this name; only whole seconds are heeded, up to 60.
    """
    where = address.describe(key)
    detail = f" ({code}: {message})" if code and message else f" ({code})" if code else ""
    said = f"got status {status}{detail} from {address.endpoint_url}"
    said = " ".join(said.split())
    if code == "NoSuchBucket":
        return KeyNotFoundError(
            f"{where}: no such bucket, {said}, expected {address.where} to exist; "
            "check the bucket's name and the endpoint"
        )
    if status == 404:
        return KeyNotFoundError(
            f"{where}: no such object, {said}, expected the object; check the key, "
            "and the prefix that comes before it"
        )
    if code in _EXPIRED_CODES:
        return ExpiredCredentialsError(
            f"{where}: the credentials have expired, {said}, expected ones that are renewed; have "
            "the credentials file replaced before they run out, or use the AWS chain, which renews "
            "those of profiles and roles"
        )
    if status in (401, 403, 407) or code in _DENIED_CODES:
        return AccessDeniedError(
            f"{where}: access denied, {said}, expected a right to read; check the credentials, "
            "their expiry, the region and the policy of the bucket"
        )
    if status == 416:
        return ByteRangeError(
            f"{where}: the object ends before the byte range begins, {said}; check the index"
        )
    if status in _THROTTLED_STATUSES or code in _THROTTLED_CODES:
        throttled = ThrottledError(
            f"{where}: the store takes fewer requests, {said}, expected the object"
        )
        if retry_after is not None and re.fullmatch(r"\s*[0-9]{1,9}\s*", retry_after):
            throttled.retry_after_s = min(float(retry_after), _MAX_RETRY_AFTER_S)
        return throttled
    if status in _REPEATED_STATUSES or code in _REPEATED_CODES:
        return StoreUnavailableError(
            f"{where}: the store is not ready, {said}, expected the object"
        )
    if 300 <= status < 400:
        return StoreError(
            f"{where}: redirected, {said}, expected the object; check the region and the endpoint"
        )
    return StoreError(f"{where}: refused, {said}, expected the object; check the settings")


def check_body(
    address: Address,
    key: str,
    byte_range: ByteRange | None,
    status: int,
    header: Callable[[str], str | None],
    body: bytes,
    checksums: Checksums,
) -> Buffer:
    """Give exactly the bytes that were asked for, or say why these are not.

    Args:
        address: The place that answered.
        key: The object.
        byte_range: What was asked for.
        status: 200 or 206.
        header: Looks up a header of the answer by its usual name.
        body: What came.
        checksums: Compares whole objects.

    Raises:
        BodyMismatchError: The body is short, or empty though the object is not, or another's.
        ByteRangeError: The object ends before the range does.
    """
    if byte_range is None:
        check_whole_body(address, key, len(body), header("Content-Length"), header("ETag"))
        if status == 206:
            raise BodyMismatchError(
                f"{address.describe(key)}: got a part from {address.endpoint_url}, "
                "expected the whole object"
            )
        checksums.check(address, key, header, header("ETag"), body)
        return body
    if status == 206:
        return _check_partial_body(address, key, byte_range, header("Content-Range"), body)
    # A web server that knows no ranges sends the whole object.
    check_whole_body(address, key, len(body), header("Content-Length"), header("ETag"))
    checksums.check(address, key, header, header("ETag"), body)
    if len(body) < byte_range.stop:
        raise range_error(address, key, byte_range, len(body))
    return memoryview(body)[byte_range.start : byte_range.stop]


def check_whole_body(
    address: Address, key: str, got_bytes: int, declared: str | None, etag: str | None
) -> None:
    """Check the length of a whole object, and that an empty one is truly empty.

    A body that is empty while the ETag is the MD5 of something is another answer than the object.
    """
    if declared is not None and int(declared) != got_bytes:
        raise BodyMismatchError(
            f"{address.describe(key)}: got {got_bytes} bytes from {address.endpoint_url}, "
            f"expected {declared}"
        )
    if got_bytes == 0 and etag is not None:
        digest = etag.strip('"')
        if _MD5.fullmatch(digest) and digest != MD5_OF_NOTHING:
            raise BodyMismatchError(
                f"{address.describe(key)}: got an empty body from {address.endpoint_url}, "
                f"expected the object whose ETag is {digest}"
            )


def _check_partial_body(
    address: Address, key: str, byte_range: ByteRange, content_range: str | None, body: bytes
) -> Buffer:
    match = _CONTENT_RANGE.fullmatch(content_range or "")
    if match is None or int(match[1]) != byte_range.start:
        raise BodyMismatchError(
            f"{address.describe(key)}: got bytes {content_range!r} from {address.endpoint_url}, "
            f"expected those from {byte_range.start} on"
        )
    length = byte_range.stop - byte_range.start
    if len(body) == length:
        return body
    if match[3] != "*" and int(match[3]) < byte_range.stop:
        raise range_error(address, key, byte_range, int(match[3]))
    raise short_body_error(address, key, len(body), length)


def range_error(
    address: Address, key: str, byte_range: ByteRange, size_bytes: int
) -> ByteRangeError:
    """Say that the object ends before the range does."""
    return ByteRangeError(
        f"{address.describe(key)} [{byte_range.start}, {byte_range.stop}): the object has "
        f"{size_bytes} bytes, expected {byte_range.stop} or more; check the index"
    )


def short_body_error(
    address: Address, key: str, got_bytes: int, expected_bytes: int | str
) -> BodyMismatchError:
    """Say that the body is not as long as it should be."""
    return BodyMismatchError(
        f"{address.describe(key)}: got {got_bytes} bytes from {address.endpoint_url}, "
        f"expected {expected_bytes}"
    )


def broken_connection(address: Address, key: str, reason: str, details: str = "") -> StoreError:
    """Say that no connection could be made, or that it ended; only a refused certificate is final.

    Args:
        address: Of the store.
        key: What was asked for.
        reason: The client's words.
        details: More of them, by which to tell a certificate that is not trusted.
    """
    where, endpoint = address.describe(key), address.endpoint_url
    if endpoint.startswith("https:") and _NO_TLS.search(details or reason):
        # To be asked again all the same: what stands before a store may do so while it starts.
        return StoreUnavailableError(
            f"{where}: {endpoint} answers, but not by TLS ({reason}), expected https; if it is a "
            f"server of plain http, the endpoint is http{endpoint.removeprefix('https')}"
        )
    if _CERTIFICATE.search(details or reason):
        return StoreError(
            f"{where}: the certificate of {endpoint} is not trusted ({reason}), expected one for "
            "this host by a known authority; check the endpoint, or name the authority's "
            "certificates by ca_file or AWS_CA_BUNDLE"
        )
    return StoreUnavailableError(f"{where}: the connection to {endpoint} broke: {reason}")


def timeout_error(address: Address, key: str, options: ClientOptions) -> DeadlineError:
    """Say that the answer, or a part of it, did not come in time."""
    return DeadlineError(
        f"{address.describe(key)}: no answer from {address.endpoint_url} in time (connect "
        f"{options.connect_timeout_s:g} s, next byte {options.stall_timeout_s:g} s, last byte "
        f"{options.total_timeout_s:g} s)"
    )
