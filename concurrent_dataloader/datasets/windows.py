"""Samples by windows of a sorted number, such as a time, over what can only be read forwards."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

S = TypeVar("S")


class SlidingWindow(Generic[S]):
    """The samples whose key lies in a window, in their order.

    A window that lies behind the one before it, overlapping or not, goes on reading where that
    ended; samples of the overlap are held, not read again. One that begins earlier reads from the
    begin. What is held is a window's samples, and one more.

    ```python
    hours = SlidingWindow(StreamedShards(..., fields={"image": "jpg", "time": "json"}), read_time)
    hours.set_window(8.0, 9.0)
    for sample in hours: ...
    hours.set_window(8.5, 9.5)
    ```
    """

    def __init__(self, samples: Iterable[S], key: Callable[[S], Any]) -> None:
        """Read nothing yet.

        Args:
            samples: Sorted by the key; each iteration gives them from the begin.
            key: A sample's number.
        """
        self._samples = samples
        self._key = key
        self._window: tuple[Any, Any] | None = None
        self._source: Iterator[S] | None = None
        self._held: collections.deque[tuple[Any, S]] = collections.deque()
        self._last_read: Any = None
        self._last_dropped: Any = None

    def set_window(self, start: Any, stop: Any) -> None:
        """Say which samples to give: keys from ``start`` up to, not including, ``stop``.

        Raises:
            ValueError: The window ends before it begins.
        """
        if stop < start:
            raise ValueError(f"window: got [{start}, {stop}), expected a stop of {start} or more")
        self._window = (start, stop)

    def __iter__(self) -> Iterator[S]:
        """Give the samples of the window; ends the iteration before it.

        Raises:
            ValueError: The samples are not sorted, or no window was set.
        """
        if self._window is None:
            raise ValueError("window: got none, expected set_window to be called before")
        start, stop = self._window
        if self._last_dropped is not None and start <= self._last_dropped:
            self._begin_anew()
        while self._held and self._held[0][0] < start:
            self._last_dropped = self._held.popleft()[0]
        # Those of the overlap stay held, for the next window.
        held = [sample for key, sample in self._held if key < stop]
        yield from held
        while not self._held or self._held[-1][0] < stop:
            if self._window != (start, stop):
                raise RuntimeError("window: it was set anew; iterate anew as well")
            read = self._read()
            if read is None:
                return
            key, sample = read
            if key < start:
                self._last_dropped = key
                continue
            self._held.append(read)
            if key < stop:
                yield sample

    def close(self) -> None:
        """Stop reading, and hold nothing. The next iteration begins anew."""
        self._begin_anew()

    def _begin_anew(self) -> None:
        close = getattr(self._source, "close", None)
        if close is not None:
            close()
        self._source = self._last_read = self._last_dropped = None
        self._held.clear()

    def _read(self) -> tuple[Any, S] | None:
        if self._source is None:
            self._source = iter(self._samples)
        for sample in self._source:
            key = self._key(sample)
            if self._last_read is not None and key < self._last_read:
                raise ValueError(f"key: got {key} after {self._last_read}, expected sorted samples")
            self._last_read = key
            return key, sample
        return None
