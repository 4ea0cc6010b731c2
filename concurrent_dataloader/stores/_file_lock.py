"""Locks between processes: let go when their holder dies, and waited for with an end.

`flock` on a file of its own for each lock. A lock belongs to the open file, which a forked child
shares: so the child closes its copies at once, and who lets go says so instead of only closing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from concurrent.futures import Future

_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW

# Descriptors of lock files that this process has open. Set operations are atomic.
_open: set[int] = set()


def _close_inherited() -> None:
    for descriptor in _open:
        with contextlib.suppress(OSError):  # the parent was just closing it
            os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_close_inherited)


def open_lock_file(path: str) -> int:
    """Open a file that can be locked, for reading and writing; `release` closes it."""
    descriptor = os.open(path, _OPEN_FLAGS, 0o600)
    _open.add(descriptor)
    return descriptor


def release(descriptor: int) -> None:
    """Let go of the lock, if it is held, and close the file."""
    _open.discard(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def is_at(descriptor: int, path: str) -> bool:
    """Tell whether an open file is the one that lies at a path, and not one that was there."""
    opened = os.fstat(descriptor)
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (opened.st_dev, opened.st_ino) == (there.st_dev, there.st_ino)


def try_lock(descriptor: int) -> bool:
    """Lock the file, unless somebody else has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_within(descriptor: int, timeout_s: float) -> bool:
    """Lock the file; waits for others. Unless it was locked, the file is closed."""
    try:
        if try_lock(descriptor):
            return True
    except OSError:
        release(descriptor)
        raise
    future = _begin_to_lock(descriptor)
    try:
        future.result(timeout_s)
    except BaseException as error:
        if future.cancel():
            if isinstance(error, TimeoutError):
                return False
            raise
        future.result()  # it came, or failed, just now
    return True


def watch(descriptor: int) -> Future[None]:
    """Give a future that ends when the one who has locked the file lets go of it, or dies.

    The file is closed then. The wait runs in a daemon thread, and goes on if the future is
    cancelled.
    """
    future = _begin_to_lock(descriptor)

    def end(ended: Future[None]) -> None:
        if not ended.cancelled() and ended.exception() is None:
            release(descriptor)

    future.add_done_callback(end)
    return future


def _begin_to_lock(descriptor: int) -> Future[None]:
    future: Future[None] = Future()
    # flock itself knows no deadline; so who has one waits for a thread instead.
    thread = threading.Thread(
        target=_lock, args=(descriptor, future), name="cache-lock", daemon=True
    )
    thread.start()
    return future


def _lock(descriptor: int, future: Future[None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        _open.discard(descriptor)
        os.close(descriptor)
        if future.set_running_or_notify_cancel():
            future.set_exception(error)
        return
    if future.set_running_or_notify_cancel():
        future.set_result(None)
    else:
        release(descriptor)
