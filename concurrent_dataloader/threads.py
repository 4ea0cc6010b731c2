"""Daemon threads that are started as they are needed."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

Work = tuple[Callable[..., None], tuple[Any, ...]]


class DaemonThreads:
    """Runs calls in at most ``max_threads`` threads, first come first served.

    A thread that has nothing to do for `IDLE_S` seconds ends. Leaner than
    `concurrent.futures.ThreadPoolExecutor`, which adds a future and two semaphores to each call,
    and whose threads keep a process from exiting as long as one hangs in a client.
    """

    IDLE_S = 4.0

    def __init__(self, max_threads: int, name: str) -> None:
        self._max_threads = max_threads
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
            num_threads = len(self._threads)
            if num_threads < min(self._num_outstanding, self._max_threads):
                thread = threading.Thread(
                    target=self._run, name=f"{self._name}-{self._num_started}", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # the system gives no more
                    if not self._threads:
                        self._num_outstanding -= 1
                        raise
                else:
                    self._threads.append(thread)
                    self._num_started += 1
        self._waiting.put((call, arguments))
        self._check_open()

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
            with self._lock:
                self._num_outstanding -= 1

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

    def __init__(self, max_threads: int, name: str) -> None:
        self._threads = DaemonThreads(max_threads, name)

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
