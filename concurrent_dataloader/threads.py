"""Daemon threads that are started as they are needed."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

Work = tuple[Callable[..., None], tuple[Any, ...]]


class Limit(Protocol):
    """Says how many threads there may be."""

    @property
    def limit(self) -> int:
        """So many as of now; 1 or more."""
        ...

    def hold_back(self) -> None:
        """Called after a call, when others wait only because there are as many threads."""
        ...


class FixedLimit:
    """A number of threads that stays as it is."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def hold_back(self) -> None:
        """Nothing comes of it."""


class DaemonThreads:
    """Runs calls in so many threads at most, first come first served.

    A thread that has nothing to do for `IDLE_S` seconds ends. Leaner than
    `concurrent.futures.ThreadPoolExecutor`, which adds a future and two semaphores to each call,
    and whose threads keep a process from exiting as long as one hangs in a client.
    """

    IDLE_S = 4.0

    def __init__(self, limit: int | Limit, name: str) -> None:
        """Start none yet.

        Args:
            limit: How many threads there may be; asked again after each call.
            name: What they are called, with a number.
        """
        self._limit = FixedLimit(limit) if isinstance(limit, int) else limit
        self._name = name
        self._num_started = 0
        self._waiting: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        # Guarded by `_lock`: threads, and calls that were submitted and have not ended.
        self._threads: list[threading.Thread] = []
        self._num_outstanding = 0
        self._lock = threading.Lock()
        self._is_stopped = False

    def submit(self, call: Callable[..., None], *arguments: Any) -> None:
        """Run a call, which must not raise, in a free thread, or in a new one while there may be.

        Raises:
            RuntimeError: The threads were stopped; if just now, the call may be among those that
                `stop` gave back.
        """
        self._check_open()
        with self._lock:
            self._num_outstanding += 1
            try:
                self._start_one_more()
            except RuntimeError:
                self._num_outstanding -= 1
                raise
        self._waiting.put((call, arguments))
        self._check_open()

    def grow(self) -> None:
        """Start one more thread if there is a call for it, and there may be."""
        with self._lock:
            self._start_one_more()

    def _start_one_more(self) -> None:
        if self._is_stopped or len(self._threads) >= min(self._num_outstanding, self._limit.limit):
            return
        thread = threading.Thread(
            target=self._run, name=f"{self._name}-{self._num_started}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the system gives no more
            if not self._threads:
                raise
        else:
            self._threads.append(thread)
            self._num_started += 1

    def _check_open(self) -> None:
        if self._is_stopped:
            raise RuntimeError(f"submit: the {self._name} threads are closed")

    def _run(self) -> None:
        while True:
            try:
                work = self._waiting.get(timeout=self.IDLE_S)
            except queue.Empty:
                if self._may_end():
                    return
                continue
            if work is None:
                self._waiting.put(None)  # for the next thread
                return
            call, arguments = work
            call(*arguments)
            del work, call, arguments  # or they would be held until the next call comes
            if not self._go_on():
                return

    def _go_on(self) -> bool:
        """Take in that a call has ended; say whether its thread is still wanted."""
        with self._lock:
            self._num_outstanding -= 1
            limit = self._limit.limit
            is_held_back = self._num_outstanding >= limit
            is_wanted = len(self._threads) <= limit
            if is_wanted:
                self._start_one_more()
            else:
                self._threads.remove(threading.current_thread())
        if is_held_back:
            self._limit.hold_back()
        return is_wanted

    def _may_end(self) -> bool:
        """Take the calling thread off the list, unless a call counts on it."""
        with self._lock:
            # A call that has been counted may not be in the queue yet.
            if len(self._threads) <= self._num_outstanding:
                return False
            self._threads.remove(threading.current_thread())
            return True

    def stop(self, timeout_s: float = 0.0) -> list[Work]:
        """End the threads, and give back the calls that had not begun. May be called twice.

        Args:
            timeout_s: How long to wait for what is under way; what hangs goes on by itself.
        """
        # Without the lock: a finaliser may run in a thread that the lock's holder waits for.
        if self._is_stopped:
            return []
        self._is_stopped = True
        left: list[Work] = []
        with contextlib.suppress(queue.Empty):
            while work := self._waiting.get_nowait():
                left.append(work)
        self._waiting.put(None)
        if timeout_s > 0:
            threads = list(self._threads)
            for thread in threads:
                if thread is not threading.current_thread():  # where the garbage collector may run
                    thread.join(timeout=timeout_s / len(threads))
        return left


class FutureThreads:
    """Daemon threads that run calls and keep what these return or raise."""

    def __init__(self, limit: int | Limit, name: str) -> None:
        """Start none yet; the arguments are those of `DaemonThreads`."""
        self._threads = DaemonThreads(limit, name)

    def submit(self, call: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run a call as `DaemonThreads.submit` does.

        Returns:
            A future, which can be cancelled until the call begins.

        Raises:
            RuntimeError: The threads were stopped.
        """
        future: Future[T] = Future()
        self._threads.submit(_settle, future, call, *arguments)
        return future

    def grow(self) -> None:
        """Start one more thread if there is a call for it, and there may be."""
        self._threads.grow()

    def stop(self, timeout_s: float = 0.0) -> None:
        """End the threads, and cancel the calls that had not begun. May be called twice.

        Args:
            timeout_s: How long to wait for what is under way; what hangs goes on by itself.
        """
        for _, (future, *_arguments) in self._threads.stop(timeout_s):
            future.cancel()


def _settle(future: Future[Any], call: Callable[..., Any], *arguments: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call(*arguments)
    except BaseException as error:  # noqa: BLE001 - goes to who waits for the future
        future.set_exception(error)
    else:
        future.set_result(result)
