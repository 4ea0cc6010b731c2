"""Blocking calls that another thread may end: it shuts the connection that they wait for.

A client takes part by saying, while it makes a request, which connection that is on (`holding`).
The standard library's does (`_http`). One that cannot leaves calls that may lose to that one
(`may_lose`), or goes on until its time is up.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_is_race: ContextVar[bool] = ContextVar("_is_race", default=False)
"""Of what a task awaits; threads are told by their call."""


class CancellableCall:
    """One call, for which somebody waits who may come not to need it any more."""

    __slots__ = ("_is_cancelled", "_lock", "_socket", "may_lose")

    def __init__(self, may_lose: bool | None = None) -> None:
        """Begin nothing yet.

        Args:
            may_lose: Whether to expect that it will be cancelled; None: as `racing` says.
        """
        self.may_lose = _is_race.get() if may_lose is None else may_lose
        # Guarded by `_lock`: a connection that was let go may serve another request by now, and
        # must not be shut any more. To shut one is a system call that does not wait.
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_cancelled = False

    def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """Make the call in this thread.

        Raises:
            BaseException: As the call; once it is cancelled, as if its connection were broken.
        """
        _current.call = self
        try:
            return call(*arguments)
        finally:
            _current.call = None

    def cancel(self) -> None:
        """End the call at once, if its client can be ended and it has not; in any thread."""
        with self._lock:
            self._is_cancelled = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # the other side was faster
                    # Not the method of TLS, which would touch what the other thread reads by.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def hold(self, connection: socket.socket) -> None:
        """Let `cancel` shut this connection from now on.

        Raises:
            ConnectionAbortedError: Nobody waits for the call.
        """
        with self._lock:
            if self._is_cancelled:
                raise ConnectionAbortedError("nobody waits for this request any more")
            self._socket = connection

    def let_go(self) -> None:
        """Let `cancel` do nothing any more."""
        with self._lock:
            self._socket = None


class _Current(threading.local):
    call: CancellableCall | None = None


_current = _Current()


@contextlib.contextmanager
def racing(is_race: bool) -> Generator[None]:
    """Let what this task awaits be made so that it can be ended, if it may lose a race."""
    token = _is_race.set(is_race)
    try:
        yield
    finally:
        _is_race.reset(token)


def may_lose() -> bool:
    """Whether the call that this thread makes is likely to be ended before it is answered."""
    return _current.call is not None and _current.call.may_lose


@contextlib.contextmanager
def holding(connection: socket.socket) -> Generator[None]:
    """Let the call that this thread makes, if it can be, be ended by shutting a connection.

    To be left before the connection is closed, or used for another request.

    Raises:
        ConnectionAbortedError: Nobody waits for the call.
    """
    call = _current.call
    if call is None:
        yield
        return
    call.hold(connection)
    try:
        yield
    finally:
        call.let_go()
