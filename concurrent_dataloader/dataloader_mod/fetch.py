"""Begin the fetch of one sample now, have it later."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, Protocol

from concurrent_dataloader.dataloader_mod.thread_limit import ThreadLimit, count_cores
from concurrent_dataloader.stores import in_flight
from concurrent_dataloader.threads import FutureThreads

_CLOSE_TIMEOUT_S = 1.0
"""How long `Fetcher.close` waits for what is under way; what hangs is left to the process's end."""


class Fetcher(Protocol):
    """Fetches in the background, so many at once as are of use, first come first served."""

    @property
    def limit(self) -> int:
        """How many samples may be in flight as of now."""
        ...

    def submit(self, position: Any) -> Future[Any]:
        """Begin a sample; its future holds what was fetched, or the error that ended it.

        Called in one thread only. Samples may complete in any order.
        """
        ...

    def close(self) -> None:
        """Cancel what has not begun, and wait a moment for what has. May be called twice."""
        ...


class ThreadedFetcher:
    """Calls a blocking function in threads of its own, which are started as they are needed.

    The threads are daemons: one that hangs in a client must not keep a worker from exiting.
    """

    def __init__(
        self,
        fetch: Callable[[Any], Any],
        num_fetch_workers: int,
        max_fetch_workers: int | None = None,
    ) -> None:
        """Start no thread yet.

        Args:
            fetch: Called for each sample.
            num_fetch_workers: Samples in flight, as long as no store says what is of use; fewer
                where they turn out to compute, unless the number is fixed.
            max_fetch_workers: To how many stores may raise it; None: they have no say.
        """
        self._fetch = fetch
        self._limit = ThreadLimit(num_fetch_workers, count_cores(), time.perf_counter())
        self._callers = in_flight.Callers(num_fetch_workers, max_fetch_workers)
        self._threads = FutureThreads(self._callers, "fetch")
        self._callers.grow = self._threads.grow

    @property
    def limit(self) -> int:
        """How many samples may be in flight as of now."""
        return self._callers.limit

    def submit(self, position: Any) -> Future[Any]:
        """Begin a sample in a free thread, or in a new one while there are fewer than allowed."""
        return self._threads.submit(self._fetch_one, position)

    def _fetch_one(self, position: Any) -> Any:
        in_flight.callers.set(self._callers)
        if not self._callers.is_alone:
            return self._fetch(position)
        begun_s = time.thread_time()
        try:
            return self._fetch(position)
        finally:
            self._limit.end(time.thread_time() - begun_s, time.perf_counter())
            self._callers.set_number(self._limit.limit)

    def close(self) -> None:
        """Cancel what waits, end the threads."""
        self._callers.close()
        self._threads.stop(_CLOSE_TIMEOUT_S)


class AsyncioFetcher:
    """Awaits a coroutine function on an event loop in a thread of its own."""

    def __init__(
        self,
        fetch_async: Callable[[Any], Awaitable[Any]],
        num_fetch_workers: int,
        max_fetch_workers: int | None = None,
    ) -> None:
        """Start no thread yet; the arguments are those of `ThreadedFetcher`."""
        self._fetch_async = fetch_async
        self._callers = in_flight.Callers(num_fetch_workers, max_fetch_workers)
        self._callers.grow = self._begin_waiting
        self._num_blocking = max_fetch_workers or num_fetch_workers
        # Appended to by the submitting thread, taken from in the loop's thread; a deque needs no
        # lock.
        self._waiting: collections.deque[tuple[Any, Future[Any]]] = collections.deque()
        # Touched in the loop's thread only.
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def limit(self) -> int:
        """How many samples may be in flight as of now."""
        return self._callers.limit

    def submit(self, position: Any) -> Future[Any]:
        """Begin a sample as soon as fewer than the limit are in flight."""
        if self._closed:
            raise RuntimeError("submit: the fetcher is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fetch-loop", daemon=True)
            self._thread.start()
        future: Future[Any] = Future()
        self._waiting.append((position, future))
        if (
            len(self._waiting) == 1
        ):  # else the loop has not yet come to the one before, and sees both
            self._loop.call_soon_threadsafe(self._begin_waiting)
        return future

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        # For datasets whose `fetch_async` runs something that blocks in threads.
        executor = concurrent.futures.ThreadPoolExecutor(self._num_blocking, "fetch")
        self._loop.set_default_executor(executor)
        try:
            self._loop.run_forever()
            # Clients that live on the loop (aiohttp's) close themselves then.
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            self._loop.close()

    def _begin_waiting(self) -> None:
        while self._waiting and len(self._tasks) < self._callers.limit:
            position, future = self._waiting.popleft()
            task = self._loop.create_task(self._fetch_one(position, future))
            self._tasks.add(task)
            task.add_done_callback(self._end_task)

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._begin_waiting()
        if self._waiting:
            self._callers.hold_back()

    async def _fetch_one(self, position: Any, future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        in_flight.callers.set(self._callers)
        try:
            fetched = await self._fetch_async(position)
        except asyncio.CancelledError:
            future.set_exception(concurrent.futures.CancelledError())
            raise
        except BaseException as error:  # noqa: BLE001 - goes to the future, so to the worker
            future.set_exception(error)
        else:
            future.set_result(fetched)

    def close(self) -> None:
        """Cancel what waits and what is under way, end the loop and its thread."""
        if self._closed:
            return
        self._closed = True
        self._callers.close()
        if self._thread is None:
            self._loop.close()
            return
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=_CLOSE_TIMEOUT_S)

    async def _cancel_all(self) -> None:
        while self._waiting:
            self._waiting.popleft()[1].cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loop.stop()
