"""Where the server listens: a port that may be shut for a while, and stays ours meanwhile."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

_BACKLOG: Final = 4096
_SEND_BUFFER_BYTES: Final = 1 << 20


class Door:
    """A port on one host; used in the loop's thread only.

    Args:
        host: Address to listen on.
        port: 0: a free one.
        loop: The running loop.

    Raises:
        OSError: The port is taken.
    """

    def __init__(self, host: str, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self._host = host
        self._loop = loop
        self._bound: socket.socket | None = self._bind(port)
        self.port: int = self._bound.getsockname()[1]
        self._listener: asyncio.Server | None = None
        self._make_connection: Callable[[], asyncio.BaseProtocol] | None = None
        self._opening: asyncio.Task[None] | None = None

    def _bind(self, port: int) -> socket.socket:
        bound = socket.socket()
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Taken over by each connection: room for a whole small object, so that it goes in one
            # call.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            bound.bind((self._host, port))
        except OSError as error:
            bound.close()
            raise OSError(
                error.errno, f"port: got {port}, which cannot be had; {error.strerror}"
            ) from error
        return bound

    async def open(self, make_connection: Callable[[], asyncio.BaseProtocol]) -> None:
        """Take connections, each with a protocol that ``make_connection`` gives."""
        self._make_connection = make_connection
        bound, self._bound = self._bound, None
        self._listener = await self._loop.create_server(
            make_connection, sock=bound, backlog=_BACKLOG
        )

    def shut(self) -> None:
        """Refuse connections until `reopen`; those that are there stay."""
        if self._listener is None:
            return
        self._listener.close()
        self._listener = None
        # A port that is bound, and not listened on, refuses, and nobody else is given it.
        self._bound = self._bind(self.port)

    def reopen(self) -> None:
        """Take connections again, at once as far as clients can tell."""
        if self._listener is None and self._make_connection is not None:
            self._opening = self._loop.create_task(self.open(self._make_connection))

    def close(self) -> None:
        """Give the port back. May be called twice."""
        if self._opening is not None:
            self._opening.cancel()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._bound is not None:
            self._bound.close()
            self._bound = None
