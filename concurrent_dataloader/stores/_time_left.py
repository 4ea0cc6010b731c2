"""Until when a blocking call may last, told to the client that makes it.

A client knows limits of its own, which are those of a whole request. A retry, or who stood in line
before, has less time: whoever makes the call says so (`ending_in`), and a client that can end there
asks (`end_of_call`). Of one thread; what a client does in other threads is not told.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Generator


class _Told(threading.local):
    until_s: float = math.inf


_told = _Told()


@contextlib.contextmanager
def ending_in(left_s: float) -> Generator[None]:
    """Tell the calls that this thread makes that they may last so many seconds from now on."""
    before_s, _told.until_s = _told.until_s, time.monotonic() + left_s
    try:
        yield
    finally:
        _told.until_s = before_s


def end_of_call() -> float:
    """Give the time, by `time.monotonic`, at which the call must have ended; infinity: not told."""
    return _told.until_s
