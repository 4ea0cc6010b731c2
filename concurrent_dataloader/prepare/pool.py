"""Pure calls in this process, and in others; none of which outlives the one that started them."""

from __future__ import annotations

import collections
import contextlib
import functools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Generic, NamedTuple, TypeVar

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

MAX_PROCESSES = 4096

_ENDED = (
    "a process of --processes ended before its work was done, killed perhaps for want of memory;"
    " run the same command again to go on, with fewer processes"
)


class _Outcome(NamedTuple):
    """What came of a call."""

    value: Any
    error: BaseException | None


class _Job(NamedTuple):
    """A call to be made with each of some items, which several processes take from."""

    call: Callable[[Any, Any], Any]
    items: collections.deque[Any]
    outcomes: queue.SimpleQueue[_Outcome]


class _Child:
    """Another process, and the thread of this one that starts it and gives it work.

    Starting takes some 0.3 s, in which the caller is not held up.
    """

    def __init__(self, shared: bytes, lifeline: Connection) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, self._theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(shared, self._theirs, lifeline))
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pool", daemon=True)
        self._thread.start()

    def begin(self, job: _Job) -> None:
        """Let it take items until none is left, as soon as it has started."""
        self._jobs.put(job)

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            self._process.start()
            self._theirs.close()  # so that reading ends when the process does
            failure = self._receive().error
        except Exception as error:  # noqa: BLE001 - goes to the caller of `Pool.run`
            failure = error
        while (job := self._jobs.get()) is not None:
            failure = failure or self._work(job)
            if failure is not None:
                job.outcomes.put(_Outcome(None, failure))

    def _work(self, job: _Job) -> BaseException | None:
        """Have items worked on; give what keeps the process from working on more."""
        while True:
            try:
                item = job.items.popleft()
            except IndexError:
                return None
            try:
                self._ours.send((job.call, item))
                job.outcomes.put(self._receive())
            except Exception as error:  # noqa: BLE001 - goes to the caller of `Pool.run`
                return ChildProcessError(_ENDED) if isinstance(error, OSError) else error

    def _receive(self) -> _Outcome:
        try:
            return self._ours.recv()
        except (EOFError, OSError) as error:
            raise ChildProcessError(_ENDED) from error

    def close(self) -> None:
        """End the process, whatever it does; its lifeline has been cut."""
        self._jobs.put(None)
        if self._process.pid is not None:
            self._process.terminate()
        self._thread.join()
        if self._process.pid is not None:
            self._process.terminate()  # it may have been started just now
            self._process.join()
        self._ours.close()


class Pool(Generic[S]):
    """Calls functions of a shared value and an item."""

    def __init__(
        self,
        shared: S,
        children: list[_Child],
        start: Callable[[], _Child] | None,
        num_children: int,
        *,
        works_here: bool,
    ) -> None:
        """Not for callers: use `open_pool`."""
        self._shared = shared
        self._children = children
        self._start = start
        self._num_children = num_children
        self._works_here = works_here

    def run(self, call: Callable[[S, T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield ``call(shared, item)`` for each item, as they come; in order if in one process.

        Raises:
            Exception: That of the first call that raised.
            ChildProcessError: A process was killed.
        """
        left = collections.deque(items)
        num_due = len(left)
        outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        num_wanted = min(self._num_children, max(0, num_due - self._works_here))
        while self._start is not None and len(self._children) < num_wanted:
            self._children.append(self._start())
        for child in self._children[:num_wanted]:
            child.begin(_Job(call, left, outcomes))
        while num_due:
            if self._works_here and outcomes.empty() and (taken := _take(left)):
                outcomes.put(_Outcome(call(self._shared, taken[0]), None))
            # Ends: each item that was taken is answered, or its process's end is seen.
            outcome: _Outcome = outcomes.get()
            if outcome.error is not None:
                raise outcome.error
            num_due -= 1
            yield outcome.value


def _take(items: collections.deque[T]) -> list[T]:
    """Take the next item, if there is one: another process may have taken the last."""
    try:
        return [items.popleft()]
    except IndexError:
        return []


@contextlib.contextmanager
def open_pool(
    shared: S,
    num_processes: int,
    close: Callable[[S], None] = lambda shared: None,
    *,
    works_here: bool = True,
) -> Generator[Pool[S]]:
    """Have processes start as there is work for them, and end them all at the end.

    Args:
        shared: Travels once to each process; pickles.
        num_processes: At most; no more are started than there are items. 1: everything runs in
            this one.
        close: Gives back what ``shared`` has opened in this process.
        works_here: Whether this process is one of several, and works while the others start. Not
            for functions of a user, whose crash is to be told.

    Raises:
        ValueError: ``num_processes`` is less than 1, or more than any machine has use for.
    """
    if num_processes < 1:
        raise ValueError(f"processes: got {num_processes}, expected 1 or more")
    if num_processes > MAX_PROCESSES:
        raise ValueError(f"processes: got {num_processes}, expected {MAX_PROCESSES} or fewer")
    with contextlib.ExitStack() as stack:
        stack.callback(close, shared)
        if num_processes == 1:
            yield Pool(shared, [], None, 0, works_here=True)
            return
        # The processes see the end of this pipe when this process ends, however it does.
        theirs, ours = multiprocessing.get_context("spawn").Pipe(duplex=False)
        stack.callback(theirs.close)
        children: list[_Child] = []
        stack.callback(_close_all, children)
        stack.callback(ours.close)
        packed = pickle.dumps(shared)  # here, before anything works with it
        start = functools.partial(_Child, packed, theirs)
        num_children = num_processes - works_here
        yield Pool(shared, children, start, num_children, works_here=works_here)


def _close_all(children: list[_Child]) -> None:
    for child in children:
        child.close()


# -- in a process of the pool


def _serve(packed: bytes, connection: Connection, lifeline: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started this one ends it
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    started = _attempt(lambda: pickle.loads(packed))
    connection.send(started._replace(value=None))
    while True:
        call, item = connection.recv()
        connection.send(_attempt(lambda call=call, item=item: call(started.value, item)))


def _attempt(call: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(call(), None)
    except Exception as error:  # noqa: BLE001 - goes to the caller of `Pool.run`
        return _Outcome(None, _portable(error))


def _portable(error: Exception) -> Exception:
    """Give an error that survives the journey, with where it came from in a note."""
    note = "".join(traceback.format_exception(error))
    try:
        twin = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever it is, its text is what can be sent
        twin = RuntimeError(f"{type(error).__name__}: {error}")
    twin.add_note(note)
    return twin


def _end_with_parent(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)
