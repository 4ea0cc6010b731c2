"""How far a scenario has come, said on standard error while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

_EVERY_S = 10.0


class Progress:
    """One line that is written anew on a terminal; elsewhere a line now and then.

    Args:
        clock: Gives seconds; never goes back.
        every_s: Time between two lines where they cannot be written anew.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, every_s: float = _EVERY_S
    ) -> None:
        self._clock = clock
        self._every_s = every_s
        self._said_at_s = clock()

    def report(self, text: str) -> None:
        """Say what is being done now."""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K   {text}")
        elif self._clock() - self._said_at_s >= self._every_s:
            self._said_at_s = self._clock()
            sys.stderr.write(f"   {text}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """Leave an empty line on a terminal, for what comes next."""
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


PROGRESS = Progress()
"""What all scenarios report to."""
