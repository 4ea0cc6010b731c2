"""A connection of the standard library's on which no wait outlasts its request.

A time limit of a socket is one for each wait. Here it is set anew before each, so that a body that
drips, a head that does, and one address of a server after the other end together with the request.
Looking up a host's name is left to the system, which takes no limit.
"""

from __future__ import annotations

import http.client
import io
import math
import socket
import ssl
import time
from typing import Any

from typing_extensions import Buffer, override

from concurrent_dataloader.stores.address import ClientOptions, Origin


class TimedConnection(http.client.HTTPConnection):
    """To a server, with TLS or without; `begin` each request."""

    def __init__(self, origin: Origin, options: ClientOptions, tls: ssl.SSLContext | None) -> None:
        """Connect to nothing yet.

        Args:
            origin: The server.
            options: How long one wait may last.
            tls: For https; None: plain.
        """
        super().__init__(origin.host, origin.port)
        self._options = options
        self._tls = tls
        self._until_s = math.inf

    def begin(self, until_s: float) -> None:
        """Connect if need be, and let all up to the next `begin` last until then.

        Args:
            until_s: By `time.monotonic`.

        Raises:
            TimeoutError: Time is up.
            OSError: No connection can be made.
        """
        self._until_s = until_s
        if self.sock is None:
            self.connect()
        assert self.sock is not None
        limit_wait(self.sock, self._options.stall_timeout_s, until_s)

    @override
    def connect(self) -> None:
        """Connect, within the time of one wait for each address."""
        most_s = self._options.connect_timeout_s
        sock = _dial(self.host, self.port, most_s, self._until_s)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                limit_wait(sock, most_s, self._until_s)
                sock = self._tls.wrap_socket(sock, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise
        self.sock = sock

    def response_class(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, sock: socket.socket, *arguments: Any, **settings: Any
    ) -> http.client.HTTPResponse:
        """Make what reads an answer; named, and called, as `http.client` does it."""
        source: Any = _Received(sock, self._options.stall_timeout_s, self._until_s)
        return http.client.HTTPResponse(source, *arguments, **settings)


class _Received(io.RawIOBase):
    """What comes on a connection."""

    def __init__(self, sock: socket.socket, most_s: float, until_s: float) -> None:
        self._sock = sock
        self._most_s = most_s
        self._until_s = until_s
        self._raw = sock.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Give the file that `http.client` asks a socket for."""
        del mode  # "rb"
        return io.BufferedReader(self)

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Buffer, /) -> int | None:
        """Receive once.

        Raises:
            TimeoutError: Nothing came within the time of one wait, or the request's time is up.
        """
        limit_wait(self._sock, self._most_s, self._until_s)
        return self._raw.readinto(buffer)

    @override
    def close(self) -> None:
        """Leave the connection, which its owner closes."""
        self._raw.close()
        super().close()


def limit_wait(sock: socket.socket, most_s: float, until_s: float) -> None:
    """Let the next wait on a connection last ``most_s`` at most, and not beyond ``until_s``.

    Raises:
        TimeoutError: Time is up.
    """
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    wait_s = min(most_s, left_s)
    if sock.gettimeout() != wait_s:  # a system call saved
        sock.settimeout(wait_s)


def _dial(host: str, port: int, most_s: float, until_s: float) -> socket.socket:
    """Connect to the first of a server's addresses that answers, all of them in time."""
    failure: OSError | None = None
    try:
        for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            try:
                return socket.create_connection((str(address[0]), port), min(most_s, left_s))
            except OSError as error:
                failure = error
        raise OSError(f"{host} has no address") if failure is None else failure
    finally:
        failure = None  # else error and frame hold each other
