"""Answers: a head, and a body that may be a part of an object."""

from __future__ import annotations

import dataclasses
import functools
import http
import time
from email.utils import formatdate
from xml.sax.saxutils import escape

from concurrent_dataloader.testing._objects import Body, StoredObject
from concurrent_dataloader.testing._refusals import S3Error


@dataclasses.dataclass(slots=True)
class Answer:
    """What to send: ``head``, then the lines that all answers have, then ``body[start:stop]``."""

    status: int
    head: bytes
    """Status line and header lines, each with its line end, the empty line at the end not
    included."""
    body: Body = b""
    start: int = 0
    stop: int = 0


@functools.cache
def status_line(status: int) -> bytes:
    """Give the first line of an answer."""
    return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n".encode()


def answer_with(
    status: int,
    body: bytes = b"",
    *,
    content_type: str = "application/xml",
    headers: dict[str, str] | None = None,
) -> Answer:
    """Answer with bytes made for the purpose."""
    lines = [f"{name}: {value}\r\n" for name, value in (headers or {}).items()]
    if status != 204:
        lines.append(f"Content-Length: {len(body)}\r\n")
    if body:
        lines.append(f"Content-Type: {content_type}\r\n")
    head = status_line(status) + "".join(lines).encode("latin-1", "replace")
    return Answer(status, head, body, 0, len(body))


def answer_with_error(error: S3Error, resource: str, *, is_head: bool = False) -> Answer:
    """Answer with one of S3's errors; the answer to a HEAD has no body."""
    body = (
        b'<?xml version="1.0" encoding="UTF-8"?>\n'
        + (
            f"<Error><Code>{error.code}</Code><Message>{escape(error.words)}</Message>"
            f"<Resource>{escape_xml(resource)}</Resource><RequestId>0</RequestId></Error>"
        ).encode()
    )
    return answer_with(error.status, b"" if is_head else body)


def escape_xml(text: str) -> str:
    """Write text into XML; what XML 1.0 cannot hold becomes a question mark."""
    clean = "".join(c if c >= " " or c in "\t\n\r" else "?" for c in text)
    return escape(clean).replace("\r", "&#13;")


def object_fields(stored: StoredObject) -> bytes:
    """Give the header lines of each answer that carries this object."""
    if not stored.fields:
        lines = [
            f'ETag: "{stored.etag}"',
            f"Last-Modified: {http_date(stored.modified_s)}",
            "Accept-Ranges: bytes",
        ]
        if "content-type" not in stored.headers:
            lines.append("Content-Type: binary/octet-stream")
        lines += [f"{name}: {value}" for name, value in stored.headers.items()]
        stored.fields = "".join(line + "\r\n" for line in lines).encode("latin-1")
    return stored.fields


def plain_head(stored: StoredObject) -> bytes:
    """Give the beginning of the answer to a plain GET or HEAD."""
    if not stored.head:
        stored.head = (
            b"%sContent-Length: %d\r\n" % (status_line(200), stored.size_bytes)
        ) + object_fields(stored)
    return stored.head


def http_date(seconds: float) -> str:
    """Write a time as HTTP does."""
    return formatdate(seconds, usegmt=True)


def iso_date(seconds: float) -> str:
    """Write a time as S3 does in XML."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))
