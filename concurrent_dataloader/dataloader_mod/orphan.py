"""What becomes of a worker whose parent dies, and of the files of a worker that is killed.

torch's loop looks at the parent's number, every five seconds. That is late, and of no use where a
fork server is the parent of all workers: it lives as long as one of them does.

The other way round, a worker that is killed while it sends leaves a message that has no end, and
other workers hold the pipe open; hence a read that looks whether all workers are there. One that
is killed while its memory is handed over ends that connection before it counts as dead; hence a
moment's wait before the error of the connection is believed to be all there is to tell.

A worker hands its shared memory over by a socket, which Python puts into a temporary folder that
the worker removes when it ends by itself. A worker that is killed does not, and at Ctrl-C
multiprocessing kills those that are left; hence a folder that the parent removes.
"""

from __future__ import annotations

import contextlib
import glob
import multiprocessing
import multiprocessing.util
import os
import queue
import select
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import resource_sharer
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

CHECK_INTERVAL_S = 0.5
"""How often a worker that waits, for positions or a sample, looks whether it is still wanted."""

_DYING_S = 2.0
"""In which a worker whose files are closed is dead: milliseconds, but on a busy machine more."""


class ParentWatch:
    """Knows whether the process that started this one still runs. Made in the worker, early."""

    def __init__(self) -> None:
        self._pid = os.getppid()
        self._poll = select.poll()
        parent = multiprocessing.parent_process()
        if parent is not None:
            # A pipe whose other end the parent holds. Workers that it forked later hold it as
            # well, so it does not do alone.
            self._poll.register(parent.sentinel, select.POLLIN)

    def is_gone(self) -> bool:
        """Look, without waiting; costs two system calls."""
        return os.getppid() != self._pid or bool(self._poll.poll(0))


class WatchedQueue:
    """A worker's index queue that ends the worker when nobody is left to write to it."""

    def __init__(self, source: Any, parent: ParentWatch) -> None:
        self._source = source
        self._parent = parent

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Get as `multiprocessing.Queue.get` does.

        Raises:
            queue.Empty: There was nothing in time.
            SystemExit: The parent is gone. Locks that it shared may be held for ever, so the way
                out leads past all that would take them.
        """
        if not block:
            return self._source.get(block=False)
        until_s = None if timeout is None else time.monotonic() + timeout
        while True:
            left_s = CHECK_INTERVAL_S if until_s is None else max(0.0, until_s - time.monotonic())
            try:
                return self._source.get(timeout=min(left_s, CHECK_INTERVAL_S))
            except queue.Empty:
                if self._parent.is_gone():
                    raise SystemExit(1) from None
                if left_s <= CHECK_INTERVAL_S and until_s is not None:
                    raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


class SocketFolder:
    """The folder of the workers' sockets, made in the parent; it pickles for the workers."""

    def __init__(self) -> None:
        # Named as Python names its own.
        self._path = tempfile.mkdtemp(prefix="pymp-")
        # As Python removes its own: at the exit, after the workers have been ended.
        self._remove: Any = multiprocessing.util.Finalize(
            None, shutil.rmtree, (self._path,), {"ignore_errors": True}, exitpriority=-100
        )

    def __getstate__(self) -> str:
        return self._path

    def __setstate__(self, path: str) -> None:
        self._path = path
        self._remove = lambda: None

    def remove(self) -> None:
        """Remove it, in the parent, after the workers. May be called twice."""
        self._remove()

    def use(self, parent: ParentWatch) -> None:
        """Have this process, a worker, make its sockets there; the last orphan removes it."""
        config: dict[str, Any] = vars(multiprocessing.current_process())["_config"]
        config["tempdir"] = self._path
        multiprocessing.util.Finalize(None, self._remove_after, (parent,), exitpriority=-100)

    def _remove_after(self, parent: ParentWatch) -> None:
        if parent.is_gone():
            with contextlib.suppress(OSError):  # the others have sockets in it yet
                os.rmdir(self._path)


def watch_senders(results: Any, find_senders: Callable[[], Sequence[Any]]) -> None:
    """Let what a dead worker has not sent to its end not be waited for, and not be an error.

    Whoever reads then finds the queue empty, whereupon torch looks which worker is dead: the
    parent itself, or its thread that pins memory, which an error would end.

    Args:
        results: The queue that the workers write to, in the parent.
        find_senders: Gives the process objects of those that may have something to send yet.
    """

    def is_one_dead() -> bool:
        return not all(worker.is_alive() for worker in find_senders())

    def read(handle: int, num_bytes: int) -> bytes:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        while not poll.poll(1000 * CHECK_INTERVAL_S):
            if is_one_dead():
                raise ConnectionError("a worker died while it sent a batch")
        return os.read(handle, num_bytes)

    def get(*args: Any, **kwargs: Any) -> Any:
        try:
            return type(itself()).get(itself(), *args, **kwargs)
        except (EOFError, OSError) as error:
            if not wait_for(is_one_dead, _DYING_S):
                raise
            raise queue.Empty from error

    # Weak references, or circles would keep the workers, and with them their shared memory.
    itself: Any = weakref.ref(results)
    reader = weakref.ref(results._reader)
    # Its own method takes the function that reads as an argument, which nobody gives.
    results._reader._recv = lambda num_bytes: Connection._recv(reader(), num_bytes, read)  # pyright: ignore[reportAttributeAccessIssue]: private
    results.get = get


def wait_for(is_so: Callable[[], bool], timeout_s: float) -> bool:
    """Look at short intervals until something is so; say whether it came to be in time.

    For a worker's death after its connection has ended: the system closes what a process has open
    before the process counts as dead. Nothing tells the second moment that might not wait for
    ever: a sentinel is a connection too.
    """
    until_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() >= until_s:
            return False
        time.sleep(0.01)
    return True


def be_silent_of_hang_ups() -> None:
    """Have this process, a worker, not print that its parent stopped taking memory over.

    That is what Ctrl-C in the parent comes to, now and then: Python's thread that hands memory over
    then gives a traceback to the hook for what nobody catches. Whatever went wrong is told where
    it did, in the parent.
    """
    tell = sys.excepthook

    def tell_others(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        where = None if traceback is None else traceback.tb_frame.f_globals.get("__name__")
        is_hang_up = isinstance(error, EOFError | ConnectionError)
        if not (is_hang_up and where == resource_sharer.__name__):
            tell(kind, error, traceback)

    sys.excepthook = tell_others


def describe_deaths(workers: Sequence[Any]) -> str:
    """Say by what workers that are dead have died."""
    deaths: list[str] = []
    for number, worker in enumerate(workers):
        status = worker.exitcode
        if status is not None and status < 0:
            name = signal.Signals(-status).name
            hint = "; the system does so when memory runs out" if name == "SIGKILL" else ""
            deaths.append(f"worker {number} (pid {worker.pid}) was killed by {name}{hint}")
        elif status is not None:
            deaths.append(f"worker {number} (pid {worker.pid}) exited with status {status}")
    return ", ".join(deaths)


def remove_shared_memory(workers: Sequence[Any]) -> None:
    """Remove the names of shared memory that workers had when a signal killed them.

    torch makes a segment, and takes its name away at once; a worker that is killed in between
    leaves the name, and with it the memory. Whoever has such a segment open keeps it.
    """
    for worker in workers:
        if worker.exitcode is not None and worker.exitcode < 0:
            for path in glob.glob(f"/dev/shm/torch_{worker.pid}_*"):
                with contextlib.suppress(OSError):
                    os.unlink(path)
