"""When to ask a second time while the first answer is still out: pure policies."""

from __future__ import annotations

import collections
import dataclasses
import math

from concurrent_dataloader.stores._arguments import check_number, check_whole


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HedgePolicy:
    """When a request that takes long is made again; the first answer counts.

    Source:
        J. Dean, L. A. Barroso, "The Tail at Scale", CACM 56(2), 2013, "hedged requests"; the
        figures are of the benchmarking scenario ``faults``.
    """

    percentile: float = 0.95
    """Of the time that requests of about its size took lately; whole objects, whose size nobody
    knows beforehand, are compared with each other. Well below 1, since requests that stall are
    among these: with 1 % of them, the 99th percentile may be a stall."""

    factor: float = 1.5
    """A request is late after so many times that percentile. A lognormal latency (sigma 0.3) is
    beyond that once in 800 requests."""

    max_extra_share: float = 0.02
    """Requests made again, as a share of all; never more."""

    max_hedges: int = 2
    """How often one request is made again, at most: the second one may stall too."""

    def __post_init__(self) -> None:
        for name in ("percentile", "factor", "max_extra_share"):
            check_number(name, getattr(self, name))
        check_whole("max_hedges", self.max_hedges)
        if not 0 < self.percentile < 1:
            raise ValueError(f"percentile: got {self.percentile}, expected between 0 and 1")
        if not self.factor >= 1:
            raise ValueError(f"factor: got {self.factor}, expected 1 or more")
        if not 0 <= self.max_extra_share <= 1:
            raise ValueError(f"max_extra_share: got {self.max_extra_share}, expected 0 to 1")
        if self.max_hedges < 0:
            raise ValueError(f"max_hedges: got {self.max_hedges}, expected 0 or more")


class LatencyWindow:
    """The latest latencies, and a percentile of them that is renewed now and then."""

    NUM_KEPT = 256
    NUM_NEEDED = 16
    _RENEWED_EVERY = 16

    def __init__(self, percentile: float) -> None:
        self._percentile = percentile
        self._latencies_s: collections.deque[float] = collections.deque(maxlen=self.NUM_KEPT)
        self._num_new = 0
        self._value_s: float | None = None

    def add(self, latency_s: float) -> None:
        """Take in one latency."""
        self._latencies_s.append(latency_s)
        self._num_new += 1
        if self._num_new >= self._RENEWED_EVERY:
            self._num_new = 0
            ordered = sorted(self._latencies_s)
            self._value_s = ordered[math.ceil(self._percentile * len(ordered)) - 1]

    @property
    def value_s(self) -> float | None:
        """The percentile; None until `NUM_NEEDED` latencies have come."""
        return self._value_s


class Vigilance:
    """Tells whether a store has late answers at all, so that blocking reads are worth watching.

    To watch one costs a hand-over between threads, which next to decoding is as much as the request
    itself (benchmarking: ``store_get cpu``). So all are watched at first, and as long as two of
    the last thousand were late.
    """

    NUM_AT_FIRST = 400
    NUM_REMEMBERED = 1000

    def __init__(self) -> None:
        self._num_ended = 0
        self._late_ones: collections.deque[int] = collections.deque(maxlen=2)

    def end(self, is_late: bool) -> None:
        """Take in one request."""
        self._num_ended += 1
        if is_late:
            self._late_ones.append(self._num_ended)

    @property
    def is_awake(self) -> bool:
        """Whether reads are to be watched."""
        if self._num_ended < self.NUM_AT_FIRST:
            return True
        is_known = len(self._late_ones) == 2
        return is_known and self._num_ended - self._late_ones[0] < self.NUM_REMEMBERED


class HedgePlan:
    """Decides, for one process and store, when requests are late and whether one may be repeated.

    Requests are compared with those of about their size: up to 256 KiB, and by powers of four
    above; whole objects, whose size nobody knows beforehand, with each other.
    """

    _MAX_SAVED = 8.0
    _SMALL_BYTES = 256 * 1024

    def __init__(self, policy: HedgePolicy) -> None:
        self._policy = policy
        self._windows: dict[int, LatencyWindow] = {}
        self._vigilance = Vigilance()
        self._tokens = 0.0

    @classmethod
    def size_class(cls, size_bytes: int | None) -> int:
        """Say with which others a request is compared."""
        if size_bytes is None:
            return -1
        return max(0, (size_bytes - 1).bit_length() - cls._SMALL_BYTES.bit_length() + 2) // 2

    def begin(self) -> None:
        """Count a request, which earns a share of a hedge."""
        self._tokens = min(self._MAX_SAVED, self._tokens + self._policy.max_extra_share)

    def end(self, size_class: int, latency_s: float) -> None:
        """Take in how long a request took until the first answer."""
        window = self._windows.get(size_class)
        if window is None:
            window = self._windows[size_class] = LatencyWindow(self._policy.percentile)
        late_after_s = self.late_after_s(size_class)
        self._vigilance.end(late_after_s is not None and latency_s > late_after_s)
        window.add(latency_s)

    @property
    def is_awake(self) -> bool:
        """Whether blocking reads are to be watched: the store has late answers, or is new."""
        return self._vigilance.is_awake

    def late_after_s(self, size_class: int) -> float | None:
        """Give the age at which a request is late; None while too few have been seen."""
        window = self._windows.get(size_class)
        value_s = None if window is None else window.value_s
        return None if value_s is None else value_s * self._policy.factor

    def try_take(self) -> bool:
        """Take the right to make one request more, if there is one."""
        # A sum of shares such as 0.02 falls short of a whole by rounding.
        if self._tokens < 1.0 - 1e-9:
            return False
        self._tokens -= 1.0
        return True
