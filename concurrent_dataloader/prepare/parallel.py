"""Many calls at once, in threads, with a bound on what is under way."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

from concurrent_dataloader.threads import DaemonThreads

T = TypeVar("T")
R = TypeVar("R")

_END_TIMEOUT_S = 10.0
"""How long an interrupted command waits for what is under way."""


def call_concurrently(
    call: Callable[[T], R], items: Iterable[T], concurrency: int
) -> Generator[R, None, None]:
    """Call for each item, up to ``concurrency`` at once; yield the results as they come.

    No more than twice ``concurrency`` items are taken beyond those whose results were yielded. An
    error of a call, or of ``items``, ends it. What is under way when it ends is waited for, a few
    seconds at most, what has not begun is dropped; so close it, or read it to its end.

    Raises:
        ValueError: ``concurrency`` is less than 1.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency: got {concurrency}, expected 1 or more")
    done: queue.SimpleQueue[tuple[R | None, BaseException | None]] = queue.SimpleQueue()

    def run(item: T) -> None:
        try:
            done.put((call(item), None))
        except BaseException as error:  # noqa: BLE001 - goes to the caller, through the queue
            done.put((None, error))

    threads = DaemonThreads(concurrency, "prepare")
    try:
        yield from _results(items, lambda item: threads.submit(run, item), done, 2 * concurrency)
    finally:
        threads.stop(_END_TIMEOUT_S)


def _results(
    items: Iterable[T],
    begin: Callable[[T], None],
    done: queue.SimpleQueue[tuple[R | None, BaseException | None]],
    max_outstanding: int,
) -> Iterator[R]:
    source = iter(items)
    outstanding = 0
    is_open = True
    while is_open or outstanding:
        while is_open and outstanding < max_outstanding:
            try:
                item = next(source)
            except StopIteration:
                is_open = False
                break
            begin(item)
            outstanding += 1
        if outstanding:
            result, error = done.get()
            outstanding -= 1
            if error is not None:
                raise error
            yield result  # pyright: ignore[reportReturnType]: None only beside an error


class ByteBudget:
    """Bounds the memory of calls in several threads; one that is larger than all goes alone."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._taken_bytes = 0  # guarded by `_changed`
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, num_bytes: int) -> Generator[None]:
        """Wait until so many bytes are free, and hold them."""
        num_bytes = min(num_bytes, self._max_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._taken_bytes + num_bytes <= self._max_bytes)
            self._taken_bytes += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._taken_bytes -= num_bytes
                self._changed.notify_all()
