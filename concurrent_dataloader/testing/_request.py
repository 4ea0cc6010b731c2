"""HTTP/1.1 requests: the head, and bodies by length or in chunks."""

from __future__ import annotations

import re
import urllib.parse
from typing import Final

MAX_HEAD_BYTES: Final = 65536
MAX_BODY_BYTES: Final = 5 << 30  # S3's own bound of a single PUT

CONTROL_PREFIX: Final = "/-/"  # no bucket can have this name

_PLAIN_PATH = re.compile(rb"/[A-Za-z0-9\-._~/]*").fullmatch
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}").fullmatch


class MalformedRequestError(Exception):
    """Bytes that are no HTTP/1.1 request; the connection cannot go on after them."""


class Request:
    """One request, its body whole.

    ``path`` is as sent, ``plain_path`` decoded, and both are the same if ``is_plain``; names of
    ``headers`` are in lower case.
    """

    __slots__ = (
        "body",
        "headers",
        "is_control",
        "is_last",
        "is_plain",
        "method",
        "path",
        "plain_path",
        "query",
        "raw_query",
    )

    def __init__(self, head: bytes) -> None:
        lines = head.split(b"\r\n")
        try:
            self.method, target, version = lines[0].split(b" ")
        except ValueError:
            raise MalformedRequestError(f"request line: got {lines[0][:200]!r}") from None
        headers: dict[bytes, bytes] = {}
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            name = name.lower()
            if not colon or name in headers:
                _add_odd_line(headers, name, colon, value)
            else:
                headers[name] = value.strip()
        self.headers = headers
        self.path, _, self.raw_query = target.partition(b"?")
        self.query: dict[str, str] = _parse_query(self.raw_query) if self.raw_query else {}
        self.is_plain = _PLAIN_PATH(self.path) is not None
        if self.is_plain:
            self.plain_path = self.path.decode("ascii")
        else:
            self.plain_path = _decode_path(self.path)
        self.is_control = self.plain_path.startswith(CONTROL_PREFIX)
        connection = headers.get(b"connection", b"").lower()
        self.is_last = connection == b"close" or (
            version != b"HTTP/1.1" and connection != b"keep-alive"
        )
        self.body: bytes = b""


def _add_odd_line(headers: dict[bytes, bytes], name: bytes, colon: bytes, value: bytes) -> None:
    if not colon:
        raise MalformedRequestError(f"header line: got {name[:200]!r}, expected 'name: value'")
    headers[name] += b"," + value.strip()


def _decode_path(path: bytes) -> str:
    if not path.startswith(b"/"):
        raise MalformedRequestError(f"target: got {path[:200]!r}, expected a path")
    try:
        return urllib.parse.unquote_to_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise MalformedRequestError(f"target: got {path[:200]!r}, expected UTF-8") from error


def _parse_query(raw_query: bytes) -> dict[str, str]:
    try:
        return dict(urllib.parse.parse_qsl(raw_query.decode(), keep_blank_values=True))
    except (UnicodeDecodeError, ValueError) as error:
        raise MalformedRequestError(f"query: got {raw_query[:200]!r}") from error


class BodyReader:
    """Collects the body of one request from the bytes of its connection."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._parts: list[bytes] = []
        self._is_chunked = request.headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        self._state = "size" if self._is_chunked else "data"
        self._num_missing_bytes = 0 if self._is_chunked else _content_length(request)
        self._num_bytes = 0

    @staticmethod
    def is_needed(request: Request) -> bool:
        """Tell whether a request has a body at all."""
        headers = request.headers
        if b"transfer-encoding" in headers:
            return True
        return headers.get(b"content-length", b"0") != b"0"

    def feed(self, data: bytes) -> bytes | None:
        """Take bytes; give what follows the body once it is whole, None before."""
        while True:
            if self._state == "data":
                taken = data[: self._num_missing_bytes]
                self._parts.append(taken)
                self._num_bytes += len(taken)
                self._num_missing_bytes -= len(taken)
                if self._num_bytes > MAX_BODY_BYTES:
                    raise MalformedRequestError(f"body: got over {MAX_BODY_BYTES} bytes")
                if self._num_missing_bytes:
                    return None
                data = self._held(data[len(taken) :])
                if not self._is_chunked:
                    return self._finish(data)
                self._state = "end of chunk"
            else:
                line, newline, rest = self._held(data).partition(b"\r\n")
                if not newline:
                    self._hold = line
                    return None
                data = rest
                if self._take_line(line):
                    return self._finish(data)

    _hold: bytes = b""

    def _held(self, data: bytes) -> bytes:
        held, self._hold = self._hold, b""
        return held + data if held else data

    def _take_line(self, line: bytes) -> bool:
        """Take a line between chunks; True after the last one."""
        if self._state == "size":
            try:
                self._num_missing_bytes = read_chunk_size(line.partition(b";")[0])
            except ValueError as error:
                raise MalformedRequestError(f"chunk size: got {line[:100]!r}") from error
            self._state = "data" if self._num_missing_bytes else "trailer"
        elif self._state == "end of chunk":
            if line:
                raise MalformedRequestError(f"end of chunk: got {line[:100]!r}")
            self._state = "size"
        else:
            return not line
        return False

    def _finish(self, rest: bytes) -> bytes:
        self.request.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        return rest


def read_chunk_size(text: bytes) -> int:
    """Read the length of a chunk.

    Raises:
        ValueError: It is no hexadecimal number from 0 on; `int` alone takes ``-6``.
    """
    if not _CHUNK_SIZE(text.strip()):
        raise ValueError(f"chunk size: got {text[:100]!r}, expected hexadecimal digits")
    return int(text, 16)


def _content_length(request: Request) -> int:
    text = request.headers.get(b"content-length", b"0")
    # Of more than 4,300 digits `int` makes nothing.
    if not text.isdigit() or len(text) > 20 or int(text) > MAX_BODY_BYTES:
        raise MalformedRequestError(f"Content-Length: got {text[:100]!r}")
    return int(text)
