"""What the headers of a request ask: conditions, ranges, digests, an object to copy. Pure."""

from __future__ import annotations

import base64
import binascii
import calendar
import hashlib
import hmac
import re
import urllib.parse
from email.utils import parsedate
from typing import Final

from concurrent_dataloader.testing._objects import (
    CHECKSUM_ALGORITHMS,
    Buckets,
    StoredObject,
    compute_checksum,
)
from concurrent_dataloader.testing._refusals import S3Error
from concurrent_dataloader.testing._request import Request

_RANGE = re.compile(rb"bytes=(\d*)-(\d*)").fullmatch
KEPT_HEADERS: Final = frozenset(
    {
        b"cache-control",
        b"content-disposition",
        b"content-encoding",
        b"content-language",
        b"content-type",
        b"expires",
    }
)


def check_conditions(headers: dict[bytes, bytes], stored: StoredObject) -> int:
    """Tell what a GET's conditions say of an object: 0 (send it), 304 or 412.

    Source: RFC 9110, section 13.2.2.
    """
    etag = stored.etag.encode()
    if b"if-match" in headers:
        if not _matches(headers[b"if-match"], etag):
            return 412
    elif b"if-unmodified-since" in headers:
        since_s = _read_date_s(headers[b"if-unmodified-since"])
        if since_s is not None and stored.modified_s > since_s:
            return 412
    if b"if-none-match" in headers:
        if _matches(headers[b"if-none-match"], etag):
            return 304
    elif b"if-modified-since" in headers:
        since_s = _read_date_s(headers[b"if-modified-since"])
        if since_s is not None and stored.modified_s <= since_s:
            return 304
    return 0


def is_conditional(headers: dict[bytes, bytes]) -> bool:
    """Tell whether the answer depends on conditions, or is to have checksums."""
    return b"x-amz-checksum-mode" in headers or any(name.startswith(b"if-") for name in headers)


def _matches(value: bytes, etag: bytes) -> bool:
    tags = [tag.strip().removeprefix(b"W/").strip(b'"') for tag in value.split(b",")]
    return b"*" in tags or etag in tags


def _read_date_s(value: bytes) -> int | None:
    date = parsedate(value.decode("latin-1"))
    return None if date is None else calendar.timegm(date)


def check_put_conditions(headers: dict[bytes, bytes], present: StoredObject | None) -> None:
    """Refuse a PUT whose conditions the object that is there, or its absence, does not meet."""
    if b"if-match" in headers:
        if present is None:
            raise S3Error("NoSuchKey")
        if not _matches(headers[b"if-match"], present.etag.encode()):
            raise S3Error("PreconditionFailed")
    if present is not None and _matches(headers.get(b"if-none-match", b""), present.etag.encode()):
        raise S3Error("PreconditionFailed")


def find_copy_source(request: Request, buckets: Buckets) -> StoredObject:
    """Find the object that a request copies; refuses one that does not meet its conditions."""
    raw = request.headers[b"x-amz-copy-source"].decode("latin-1")
    path = urllib.parse.unquote(raw.partition("?versionId=")[0]).removeprefix("/")
    bucket, _, key = path.partition("/")
    if not key:
        raise S3Error("InvalidArgument", "x-amz-copy-source must be bucket/key")
    source = buckets.find_object(bucket, key)
    prefix = b"x-amz-copy-source-"
    conditions = {
        name.removeprefix(prefix): value
        for name, value in request.headers.items()
        if name.startswith(prefix)
    }
    if check_conditions(conditions, source):
        raise S3Error("PreconditionFailed")
    return source


def has_range(headers: dict[bytes, bytes]) -> bool:
    """Tell whether the Range header, which is there, is one that S3 follows."""
    match = _RANGE(headers[b"range"].strip())
    if match is None or match[0] == b"bytes=-":
        return False
    return not (match[1] and match[2] and _read_place(match[2]) < _read_place(match[1]))


def read_range(value: bytes | None, size_bytes: int) -> tuple[int, int]:
    """Read a Range header; one that says nothing that S3 knows is as good as none."""
    if value is None or not has_range({b"range": value}):
        return 0, size_bytes
    match = _RANGE(value.strip())
    assert match is not None, "has_range has matched it"
    first, last = match[1], match[2]
    if not first:
        start, stop = max(0, size_bytes - _read_place(last)), size_bytes
    else:
        start = _read_place(first)
        stop = min(_read_place(last) + 1, size_bytes) if last else size_bytes
    if start >= stop:
        raise S3Error("InvalidRange")
    return start, stop


def _read_place(digits: bytes) -> int:
    """Read a place in an object; one of more digits than any object needs lies behind its end."""
    # `int` makes nothing of more than 4,300 digits.
    return int(digits) if len(digits) <= 1000 else 10**1000


def kept_headers(request: Request) -> dict[str, str]:
    """Give the headers of a PUT that are stored with the object, and sent with it again."""
    kept: dict[str, str] = {}
    for name, value in request.headers.items():
        if name == b"content-encoding":
            codings = [coding.strip() for coding in value.split(b",")]
            value = b",".join(coding for coding in codings if coding != b"aws-chunked")
        if (name in KEPT_HEADERS or name.startswith(b"x-amz-meta-")) and value:
            kept[name.decode("latin-1")] = value.decode("latin-1")
    return kept


def is_public(request: Request) -> bool:
    """Tell whether a PUT asks for an object, or a bucket, that anybody may read."""
    acl = request.headers.get(b"x-amz-acl", b"")
    return acl in (b"public-read", b"public-read-write")


def check_length(request: Request) -> None:
    """Refuse a body that did not say its length."""
    if b"content-length" not in request.headers and (
        b"x-amz-decoded-content-length" not in request.headers
    ):
        raise S3Error("MissingContentLength")


def check_digests(request: Request) -> dict[str, str]:
    """Check the digests that came with a body, and give its S3 checksums by algorithm."""
    content_md5 = request.headers.get(b"content-md5")
    if content_md5 is not None:
        try:
            digest = base64.b64decode(content_md5, validate=True)
        except binascii.Error as error:
            raise S3Error("InvalidDigest") from error
        if len(digest) != 16:
            raise S3Error("InvalidDigest")
        if digest != hashlib.md5(request.body, usedforsecurity=False).digest():
            raise S3Error("BadDigest")
    checksums: dict[str, str] = {}
    for algorithm in CHECKSUM_ALGORITHMS:
        announced = request.headers.get(f"x-amz-checksum-{algorithm}".encode())
        if announced is not None:
            checksums[algorithm] = compute_checksum(algorithm, request.body)
            if not hmac.compare_digest(checksums[algorithm].encode(), announced):
                raise S3Error("BadDigest")
    return checksums
