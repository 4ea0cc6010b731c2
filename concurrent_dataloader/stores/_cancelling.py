"""Blocking calls that another thread may end: it shuts the connection that they wait for.

A client takes part by saying, while it makes a request, which connection that is on (`holding`).
The standard library's does (`_http`); others go on until their time is up, and may note for how
long (`Leftovers`).
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")


class CancellableCall:
    """One call, for which somebody waits who may come not to need it any more."""

    __slots__ = ("_is_cancelled", "_leftovers", "_lock", "_socket")

    def __init__(self) -> None:
        # Guarded by `_lock`: a connection that was let go may serve another request by now, and
        # must not be shut any more. To shut one is a system call that does not wait.
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._leftovers: Leftovers | None = None
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
            if self._leftovers is not None:
                self._leftovers.begin(self)

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

    def go_on_for(self, leftovers: Leftovers | None) -> None:
        """Have it noted from now on when the call is cancelled, and goes on; None: no more."""
        with self._lock:
            self._leftovers = leftovers


class Leftovers:
    """Calls of one client that nobody waits for, and that cannot be ended; for any thread."""

    LONG_S = 0.5
    """Of a call that goes on; most are answered soon after the one that was faster."""

    KNOWN_S = 60.0
    """For which it is known that there are such."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Entries are set and taken out by one thread each, and dictionary operations are atomic.
        self._begun_s: dict[CancellableCall, float] = {}
        self._known_until_s = -math.inf

    def begin(self, call: CancellableCall) -> None:
        """Note a call that goes on though nobody waits for it."""
        self._begun_s[call] = self._clock()

    def end(self, call: CancellableCall) -> None:
        """Take note that a call has come to its end, whether anybody waited or not."""
        begun_s = self._begun_s.pop(call, None)
        if begun_s is not None and (now_s := self._clock()) - begun_s > self.LONG_S:
            self._known_until_s = now_s + self.KNOWN_S

    @property
    def last_long(self) -> bool:
        """Whether some go on for long, or did so a while ago."""
        if not self._begun_s and self._known_until_s == -math.inf:
            return False
        now_s = self._clock()
        return now_s < self._known_until_s or any(
            now_s - begun_s > self.LONG_S for begun_s in list(self._begun_s.values())
        )


class _Current(threading.local):
    call: CancellableCall | None = None


_current = _Current()


def current_call() -> CancellableCall | None:
    """Give the call that this thread makes, if it can come to be cancelled."""
    return _current.call


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
