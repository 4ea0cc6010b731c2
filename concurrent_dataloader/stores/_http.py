"""Objects over HTTP by the standard library alone: the client that survives a fork.

No thread, no loop, no native runtime: a connection is a socket in a pool of its process, so a
parent may read with it and fork afterwards. It costs about the CPU of obstore for one object of 100
kB.
"""

from __future__ import annotations

import collections
import http.client
import select
import socket
import ssl
import time
from collections.abc import Callable
from functools import partial
from urllib.parse import urljoin, urlsplit

from typing_extensions import Buffer, override

from concurrent_dataloader.errors import (
    BodyMismatchError,
    StoreError,
)
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores._answers import (
    broken_connection,
    check_body,
    error_for_status,
    parse_s3_error,
    timeout_error,
)
from concurrent_dataloader.stores._cancelling import holding
from concurrent_dataloader.stores._checksums import Checksums
from concurrent_dataloader.stores._sigv4 import sign
from concurrent_dataloader.stores._time_left import end_of_call
from concurrent_dataloader.stores._timed_connection import TimedConnection
from concurrent_dataloader.stores.address import (
    Address,
    ClientOptions,
    HttpAddress,
    Origin,
    S3Address,
    Verify,
    check_byte_range,
    parse_origin,
    show_url,
)
from concurrent_dataloader.stores.base import BlockingStore, ObjectInfo, PerProcess

_MAX_REDIRECTS = 5
_MAX_ERROR_BYTES = 64 * 1024
_READ_BYTES = 256 * 1024
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class HttpStore(BlockingStore):
    """Objects of an S3-compatible store, or of a plain web server, over HTTP/1.1."""

    def __init__(
        self, address: Address, options: ClientOptions, checksums: Checksums | None = None
    ) -> None:
        """Share the checksums of the store that this is a part of, if it is one."""
        super().__init__(options.max_connections)
        self._address = address
        self._options = options
        self._checksums = Checksums(options.verify) if checksums is None else checksums
        self._connections = PerProcess(partial(_Connections, options), _Connections.close)
        self._origin = address.origin

    @override
    def _arguments(self) -> tuple[Address, ClientOptions]:
        return self._address, self._options

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return self._address.describe(key)

    @override
    def close(self) -> None:
        """Close this process's connections."""
        super().close()
        self._connections.close()

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get` says."""
        if byte_range is not None and check_byte_range(byte_range) == 0:
            return b""
        status, headers, body = self._request("GET", key, byte_range)
        if status in (200, 206):
            return check_body(
                self._address, key, byte_range, status, headers.get, body, self._checksums
            )
        raise error_for_status(
            self._address, key, status, *_parse_error(body), headers.get("Retry-After")
        )

    def head(self, key: str) -> ObjectInfo:
        """Ask for an object's size."""
        status, headers, _ = self._request("HEAD", key, None)
        if status != 200:
            raise error_for_status(self._address, key, status)
        size = headers.get("Content-Length")
        if size is None:
            raise StoreError(
                f"{self.describe(key)}: got no Content-Length from {self._address.endpoint_url}, "
                "expected the object's size"
            )
        return ObjectInfo(key, int(size))

    def ask_header(self, key: str) -> Callable[[str], str | None]:
        """Ask for an object's headers; gives a look-up by their usual names."""
        status, headers, _ = self._request("HEAD", key, None)
        if status != 200:
            raise error_for_status(self._address, key, status)
        return headers.get

    def _request(
        self, method: str, key: str, byte_range: ByteRange | None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        origin, path = self._origin, self._address.request_path(key)
        until_s = min(end_of_call(), time.monotonic() + self._options.total_timeout_s)
        for _ in range(_MAX_REDIRECTS + 1):
            headers = build_headers(
                self._address, method, origin, path, byte_range, self._options.verify
            )
            try:
                status, answer, body = self._ask(origin, method, path, headers, until_s)
            except (OSError, http.client.HTTPException) as error:
                raise self._translate(error, key) from error
            location = answer.get("Location")
            if status not in _REDIRECTS or location is None or isinstance(self._address, S3Address):
                return status, answer, body
            origin, path = follow_redirect(self._address, key, origin, path, location)
        raise StoreError(
            f"{self.describe(key)}: got more than {_MAX_REDIRECTS} redirects, expected the object"
        )

    def _ask(
        self, origin: Origin, method: str, path: str, headers: dict[str, str], until_s: float
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connections = self._connections.get()
        connection = connections.take(origin)
        try:
            connection.begin(until_s)
            with holding(connection.sock):
                connection.request(method, path, headers=headers)
                response = connection.getresponse()
                body = _read_body(response)
        except BaseException:
            connection.close()
            raise
        if response.will_close or not response.isclosed():
            connection.close()
        else:
            connections.put_back(origin, connection)
        return response.status, response.headers, body

    def _translate(self, error: Exception, key: str) -> StoreError:
        where, endpoint = self.describe(key), self._address.endpoint_url
        if isinstance(error, TimeoutError):
            return timeout_error(self._address, key, self._options)
        if isinstance(error, http.client.IncompleteRead):
            expected = f", expected {error.expected} more" if error.expected is not None else ""
            return BodyMismatchError(
                f"{where}: got {len(error.partial)} bytes from {endpoint}{expected}"
            )
        reason = str(error) or type(error).__name__
        return broken_connection(self._address, key, reason)


def build_headers(
    address: Address,
    method: str,
    origin: Origin,
    path: str,
    byte_range: ByteRange | None,
    verify: Verify,
) -> dict[str, str]:
    """Give the headers of a request, signed if the address has credentials."""
    headers: dict[str, str] = {}
    is_s3 = isinstance(address, S3Address)
    asks_checksum = is_s3 and method == "GET" and byte_range is None and verify == "checksum"
    if isinstance(address, S3Address) and address.credentials is not None:
        credentials = address.credentials.resolve()
        headers = sign(
            method,
            origin.netloc,
            path,
            address.region,
            credentials,
            time.time(),
            asks_checksum=asks_checksum,
        )
    elif asks_checksum:
        headers["x-amz-checksum-mode"] = "ENABLED"
    headers["Host"] = origin.netloc
    if byte_range is not None:
        headers["Range"] = f"bytes={byte_range.start}-{byte_range.stop - 1}"
    return headers


def follow_redirect(
    address: HttpAddress, key: str, origin: Origin, path: str, location: str
) -> tuple[Origin, str]:
    """Say where a redirect of a plain web server leads; pure.

    Raises:
        StoreError: From https to http, or to no web server.
    """
    url = urlsplit(urljoin(f"{origin}{path}", location))
    if url.scheme not in ("http", "https") or not url.hostname:
        raise StoreError(
            f"{address.describe(key)}: redirected to {show_url(location)!r}, expected http(s)"
        )
    if origin.scheme == "https" and url.scheme == "http":
        raise StoreError(
            f"{address.describe(key)}: redirected from https to http, expected https to stay"
        )
    path = url.path or "/"
    return parse_origin(url.geturl()), f"{path}?{url.query}" if url.query else path


def _parse_error(body: bytes) -> tuple[str, str]:
    return parse_s3_error(body[:_MAX_ERROR_BYTES].decode("utf-8", "replace"))


def _read_body(response: http.client.HTTPResponse) -> bytes:
    chunks: list[bytes] = []
    while chunk := response.read1(_READ_BYTES):
        chunks.append(chunk)
        if response.length == 0:
            response.close()
            break
    else:
        if response.length:
            raise http.client.IncompleteRead(b"".join(chunks), response.length)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class _Connections:
    """Open connections of one process that nobody uses just now, by server."""

    def __init__(self, options: ClientOptions) -> None:
        self._options = options
        # Appending and popping are atomic: no lock.
        self._idle: collections.defaultdict[Origin, collections.deque[TimedConnection]] = (
            collections.defaultdict(collections.deque)
        )
        self._tls: ssl.SSLContext | None = None
        self._is_closed = False

    def take(self, origin: Origin) -> TimedConnection:
        """Give an idle connection that still stands, the one used last, or one to be made."""
        idle = self._idle[origin]
        while True:
            try:
                connection = idle.pop()
            except IndexError:
                return self._make(origin)
            if _is_quiet(connection.sock):
                return connection
            connection.close()

    def put_back(self, origin: Origin, connection: TimedConnection) -> None:
        """Keep a connection for the next request, unless the pool was closed meanwhile."""
        self._idle[origin].append(connection)
        if self._is_closed:  # looked at after appending: either this or `close` finds it
            self.close()

    def close(self) -> None:
        """Close the idle ones; one in use is closed when it is put back."""
        self._is_closed = True
        for idle in list(self._idle.values()):
            while idle:
                idle.pop().close()

    def _make(self, origin: Origin) -> TimedConnection:
        if origin.scheme != "https":
            return TimedConnection(origin, self._options, None)
        if self._tls is None:
            self._tls = ssl.create_default_context(cafile=self._options.ca_file)
        return TimedConnection(origin, self._options, self._tls)


def _is_quiet(sock: socket.socket | None) -> bool:
    """Whether an idle connection can be used: the server has not closed it."""
    if sock is None:
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)
