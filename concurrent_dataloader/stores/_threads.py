"""Blocking calls awaited: threads that wake an event loop once for many results."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from concurrent_dataloader.threads import DaemonThreads

T = TypeVar("T")


class AwaitableThreads:
    """Threads of one process, started as they are needed, for the event loops of any thread.

    `asyncio.loop.run_in_executor` writes to the loop's pipe for each result. Here a result that
    comes while the loop has yet to look at the ones before goes with them (benchmarking: store_get
    --only cpu).
    """

    def __init__(self, max_threads: int) -> None:
        self._threads = DaemonThreads(max_threads, "store")
        # Touched in the loops; each has its own entry, and dictionary operations are atomic.
        self._returns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Returns] = (
            weakref.WeakKeyDictionary()
        )

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """Call in a thread, and await what it returns or raises.

        Cancelled, a call that has not begun is left out; one that has goes on by itself.
        """
        loop = asyncio.get_running_loop()
        returns = self._returns.get(loop)
        if returns is None:
            returns = self._returns[loop] = _Returns(loop)
        future: asyncio.Future[T] = loop.create_future()
        self._threads.submit(_run, returns, future, call, arguments)
        return await future

    def stop(self) -> None:
        """Leave out what has not begun; what has goes on by itself. Does not wait."""
        for _, (returns, future, *_) in self._threads.stop():
            returns.post(future, None, asyncio.CancelledError())


class _Returns:
    """What threads have for one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # the key of this value must be free to go
        self._ended: collections.deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = (
            collections.deque()
        )
        self._is_woken = False

    def post(self, future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
        """Hand over a result, in any thread."""
        # Without a lock: this appends before it looks, `_deliver` clears before it empties. So a
        # result is either seen by the delivery under way, or finds that none is.
        self._ended.append((future, value, error))
        if self._is_woken:
            return
        self._is_woken = True
        loop = self._loop()
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # closed: nobody awaits any more
                loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_woken = False
        while self._ended:
            future, value, error = self._ended.popleft()
            if future.done():  # cancelled meanwhile
                continue
            if error is None:
                future.set_result(value)
            elif isinstance(error, asyncio.CancelledError):
                future.cancel()
            else:
                future.set_exception(error)


def _run(
    returns: _Returns,
    future: asyncio.Future[Any],
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    if future.cancelled():
        return
    try:
        value = call(*arguments)
    except BaseException as error:  # noqa: BLE001 - goes to who awaits it
        returns.post(future, None, error)
    else:
        returns.post(future, value, None)
