"""Pure calls in this process, or in several; none of which outlives the one that started them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


class Pool(Generic[S]):
    """Calls functions of a shared value and an item."""

    def __init__(
        self, shared: S, executor: concurrent.futures.ProcessPoolExecutor | None = None
    ) -> None:
        """Not for callers: use `open_pool`."""
        self._shared = shared
        self._executor = executor

    def run(self, call: Callable[[S, T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield ``call(shared, item)`` for each item, as they come; in order if in one process.

        Raises:
            Exception: That of the first call that raised.
            ChildProcessError: A process was killed.
        """
        if self._executor is None:
            for item in items:
                yield call(self._shared, item)
            return
        try:
            futures = [self._executor.submit(_call, call, item) for item in items]
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process of --processes ended before its work was done, killed perhaps for"
                " want of memory; run the same command again to go on, with fewer processes"
            ) from error


@contextlib.contextmanager
def open_pool(
    shared: S, num_processes: int, close: Callable[[S], None] = lambda shared: None
) -> Generator[Pool[S]]:
    """Start processes, if more than one is asked for, and end them all at the end.

    Args:
        shared: Travels once to each process; pickles.
        num_processes: 1: everything runs in this one.
        close: Gives back what ``shared`` has opened in this process.

    Raises:
        ValueError: ``num_processes`` is less than 1.
    """
    if num_processes < 1:
        raise ValueError(f"processes: got {num_processes}, expected 1 or more")
    if num_processes == 1:
        try:
            yield Pool(shared)
        finally:
            close(shared)
        return
    context = multiprocessing.get_context("spawn")
    # The processes see the end of this pipe when this process ends, however it does.
    theirs, ours = context.Pipe(duplex=False)
    executor = concurrent.futures.ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=_begin, initargs=(shared, theirs)
    )
    try:
        yield Pool(shared, executor)
    except BaseException:
        ours.close()
        executor.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        executor.shutdown(wait=True)
        ours.close()
        theirs.close()
        close(shared)


# Of a process of the pool: what all its calls share.
_shared: Any = None


def _begin(shared: Any, lifeline: Connection) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started this one ends it
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)


def _call(call: Callable[[Any, T], R], item: T) -> R:
    return call(_shared, item)
