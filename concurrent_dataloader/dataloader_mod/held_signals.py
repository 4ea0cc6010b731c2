"""Signals that come while a worker is forked: held until they can be heeded.

Python runs the handler of a signal as soon as it runs Python code again. After a fork that is what
modules have registered by ``os.register_at_fork``, as ``logging`` does, and an exception there is
printed and dropped: the ``KeyboardInterrupt`` of Ctrl-C would be without effect. One that comes
between two lines of torch's constructor would leave a worker of which torch does not know.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class HeldSignals:
    """Holds what interrupts a program; to be held and heeded in turn, as often as one likes."""

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._received: list[int] = []

    def hold(self) -> None:
        """Note signals from now on, instead of running their handlers.

        Does nothing in a thread that is not the main one, where no handler runs.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and number not in self._handlers:  # not ignored, nor the system's
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def heed(self) -> None:
        """Run handlers again, at first for what was noted; raises what they raise.

        All are put back and all that was noted is heeded, also where a handler raises meanwhile.
        """
        handlers, self._handlers = self._handlers, {}
        try:
            _call_each(signal.signal, list(handlers.items()))
        finally:
            received, self._received = self._received, []
            _call_each(lambda number: handlers[number](number, None), [(n,) for n in received])

    def forget(self) -> None:
        """Run handlers again, but not for what was noted: in a fork, whose parent heeds it."""
        handlers, self._handlers = self._handlers, {}
        _call_each(signal.signal, list(handlers.items()))
        self._received = []

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received.append(number)


def _call_each(call: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> None:
    """Call it with each of them, with the rest too where it raises.

    Not by `contextlib.ExitStack`, whose errors hold their own frames, and so a loader's iterator.
    """
    if arguments:
        try:
            call(*arguments[0])
        finally:
            _call_each(call, arguments[1:])
