"""Objects over HTTP by aiohttp; signed by us."""

from __future__ import annotations

import ssl
from functools import partial

import aiohttp
import yarl
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
from concurrent_dataloader.stores._checksums import Checksums
from concurrent_dataloader.stores._http import HttpStore, build_headers, follow_redirect
from concurrent_dataloader.stores.address import (
    Address,
    ClientOptions,
    S3Address,
    check_byte_range,
)
from concurrent_dataloader.stores.base import AwaitingStore, ObjectInfo, PerLoop

_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class AiohttpStore(AwaitingStore):
    """One aiohttp session for each event loop."""

    def __init__(self, address: Address, options: ClientOptions) -> None:
        super().__init__()
        self._address = address
        self._options = options
        self._plain = HttpStore(address, options)
        self._checksums = Checksums(options.verify)
        self._sessions = PerLoop(partial(_open_session, options))

    @override
    def _arguments(self) -> tuple[Address, ClientOptions]:
        return self._address, self._options

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return self._address.describe(key)

    def head(self, key: str) -> ObjectInfo:
        """Ask for an object's size; blocks, so by the standard library's client."""
        return self._plain.head(key)

    @override
    def close(self) -> None:
        """Give back what this process has opened, but for the clients of event loops of others."""
        super().close()
        self._plain.close()

    @override
    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get_async` says."""
        if byte_range is not None and check_byte_range(byte_range) == 0:
            return b""
        origin, path = self._address.origin, self._address.request_path(key)
        session = await self._sessions.get()
        for _ in range(_MAX_REDIRECTS + 1):
            headers = build_headers(
                self._address, "GET", origin, path, byte_range, self._options.verify
            )
            url = yarl.URL(f"{origin}{path}", encoded=True)
            try:
                async with session.get(url, headers=headers, allow_redirects=False) as response:
                    body = await response.read()
            except (aiohttp.ClientError, OSError) as error:
                raise self._translate(error, key) from error
            if response.status in (200, 206):
                return check_body(
                    self._address,
                    key,
                    byte_range,
                    response.status,
                    response.headers.get,
                    body,
                    self._checksums,
                )
            location = response.headers.get("Location")
            if (
                response.status not in _REDIRECTS
                or location is None
                or isinstance(self._address, S3Address)
            ):
                code, message = parse_s3_error(body.decode("utf-8", "replace"))
                raise error_for_status(
                    self._address,
                    key,
                    response.status,
                    code,
                    message,
                    response.headers.get("Retry-After"),
                )
            origin, path = follow_redirect(self._address, key, origin, path, location)
        raise StoreError(
            f"{self.describe(key)}: got more than {_MAX_REDIRECTS} redirects, expected the object"
        )

    def _translate(self, error: Exception, key: str) -> StoreError:
        where, endpoint = self.describe(key), self._address.endpoint_url
        if isinstance(error, TimeoutError):
            return timeout_error(self._address, key, self._options)
        reason = str(error) or type(error).__name__
        if isinstance(error, aiohttp.ClientPayloadError):
            return BodyMismatchError(f"{where}: the body from {endpoint} was cut short: {reason}")
        return broken_connection(self._address, key, reason)


async def ask_once(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Keep aiohttp from asking again by itself where a connection that was kept open breaks.

    It repeats idempotent requests by the class of the error, and looks at what its middlewares
    raise; so one of them raises another class. What says that no connection was made stays, since
    it is not repeated and tells more.
    """
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(str(error) or type(error).__name__) from error


def _open_session(options: ClientOptions) -> aiohttp.ClientSession:
    """Make a session; it belongs to the event loop that runs."""
    tls: ssl.SSLContext | bool = True
    if options.ca_file is not None:
        tls = ssl.create_default_context(cafile=options.ca_file)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=options.max_connections, ssl=tls),
        timeout=aiohttp.ClientTimeout(
            total=options.total_timeout_s,
            sock_connect=options.connect_timeout_s,
            sock_read=options.stall_timeout_s,
        ),
        auto_decompress=False,  # the bytes as they were stored
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity"},
        middlewares=(ask_once,),
    )
