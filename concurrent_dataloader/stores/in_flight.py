"""How many requests to have under way at once: a control loop, and the gate that keeps to it."""

from __future__ import annotations

import contextvars
import dataclasses
import heapq
import itertools
import statistics
import threading
from collections.abc import Callable
from typing import Literal

from concurrent_dataloader.stores._arguments import check_whole

Outcome = Literal["answered", "throttled", "failed"]
"""How a request ended: with its object or a final refusal; refused for being one too many (429,
503); otherwise."""

is_fixed: contextvars.ContextVar[bool] = contextvars.ContextVar("is_fixed", default=False)
"""Whether the caller has chosen how many requests to make at once, so that no gate holds them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InFlightPolicy:
    """Bounds of the number of requests under way, for one store in one process."""

    start: int = 64
    """To begin with; what one core decodes at 200 ms latency (benchmarking: ``in_flight``)."""

    minimum: int = 1
    maximum: int = 256

    def __post_init__(self) -> None:
        for name in ("minimum", "start", "maximum"):
            check_whole(name, getattr(self, name))
        if not 1 <= self.minimum <= self.start <= self.maximum:
            raise ValueError(
                f"minimum, start, maximum: got {self.minimum}, {self.start}, {self.maximum}, "
                "expected 1 or more, in this order"
            )


class InFlightLimit:
    """Says how many requests may be under way; learns from how they end. Pure.

    Decides once a round, which lasts for one set of requests, and half a second or more once
    it rises by small steps only:

    - more than a tenth refused (429, 503): fewer by that share, at most half at once; some refused:
      as many;
    - latency eight times the lowest, and no more throughput than in the round before: a tenth
      fewer, but not below 16, since latency rises on a busy machine too;
    - else, if all that were allowed were used: twice as many as long as throughput rises by a
      tenth, then one more, or a twentieth, a round.

    Workers that share a store come to fair shares by themselves, since a cut takes more from those
    that have more, and each rises by the same steps in the same time.

    Source:
        D.-M. Chiu, R. Jain, "Analysis of the increase and decrease algorithms for congestion
        avoidance", 1989, for the fairness.
    """

    _MAX_REFUSED_SHARE = 0.1
    _SOME_REFUSED_SHARE = 0.02
    _SLOW_FACTOR = 8.0
    _SLOW_CUT = 0.9
    _SLOW_MINIMUM = 16.0
    _RISE = 1.1
    _MIN_ENDED = 16
    _MIN_ROUND_S = 0.5
    _MAX_ROUND_S = 1.0
    _LOWEST_DRIFT = 1.001
    """By which the lowest latency is forgotten each round: networks change."""

    def __init__(self, policy: InFlightPolicy, now_s: float) -> None:
        self._policy = policy
        self._limit = float(policy.start)
        self._is_doubling = True
        self._lowest_s: float | None = None
        self._throughput_before = 0.0
        self._begin_round(now_s)

    def _begin_round(self, now_s: float) -> None:
        self._round_begun_s = now_s
        self._latencies_s: list[float] = []
        self._num_refused = 0
        self._num_ended = 0
        self._is_used_up = False

    @property
    def limit(self) -> int:
        """Requests under way, at most; 1 or more."""
        return int(self._limit)

    def hold_back(self) -> None:
        """Note that a request had to wait: all that are allowed are under way."""
        self._is_used_up = True

    def end(self, begun_s: float, now_s: float, outcome: Outcome) -> None:
        """Take in how one request ended, and move the limit when the round is over."""
        self._num_ended += 1
        if outcome == "throttled":
            self._num_refused += 1
        elif outcome == "answered":
            self._latencies_s.append(now_s - begun_s)
        lasted_s = now_s - self._round_begun_s
        if self._is_over(lasted_s):
            self._decide(lasted_s)
            self._begin_round(now_s)

    def _is_over(self, lasted_s: float) -> bool:
        if lasted_s >= self._MAX_ROUND_S:
            return True
        if self._num_ended < max(self._MIN_ENDED, self.limit):
            return False
        is_fast = self._is_doubling or self._num_refused > self._num_ended / 2
        return lasted_s > (0 if is_fast else self._MIN_ROUND_S)

    def _decide(self, lasted_s: float) -> None:
        refused_share = self._num_refused / self._num_ended
        throughput = len(self._latencies_s) / lasted_s
        if refused_share > self._MAX_REFUSED_SHARE:
            self._is_doubling = False
            self._set(self._limit * max(0.5, 1.0 - refused_share))
        elif refused_share <= self._SOME_REFUSED_SHARE and self._latencies_s:
            self._follow_latency(throughput)
        self._throughput_before = throughput

    def _follow_latency(self, throughput: float) -> None:
        rises = throughput > self._throughput_before * self._RISE
        lowest_s = min(self._latencies_s)
        if self._lowest_s is not None:
            lowest_s = min(lowest_s, self._lowest_s * self._LOWEST_DRIFT)
        self._lowest_s = lowest_s
        if statistics.median(self._latencies_s) > lowest_s * self._SLOW_FACTOR and not rises:
            self._is_doubling = False
            if self._limit > self._SLOW_MINIMUM:
                self._set(max(self._SLOW_MINIMUM, self._limit * self._SLOW_CUT))
        elif self._is_used_up:
            self._is_doubling = self._is_doubling and rises
            step = self._limit if self._is_doubling else max(1.0, self._limit * 0.05)
            self._set(self._limit + step)

    def _set(self, limit: float) -> None:
        self._limit = min(max(limit, self._policy.minimum), self._policy.maximum)


class Gate:
    """Lets requests through as the limit allows, those that were begun first before others."""

    def __init__(self, policy: InFlightPolicy, now_s: float) -> None:
        # Guarded by `_lock`; what wakes a waiter is called after it.
        self._lock = threading.Lock()
        self._limit = InFlightLimit(policy, now_s)
        self._num_in_flight = 0
        self._waiters: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    @property
    def limit(self) -> int:
        """Requests under way, at most, as of now."""
        return self._limit.limit

    def enter(self, begun_s: float, wake: Callable[[], None]) -> int | None:
        """Take a place, or stand in line for one.

        Args:
            begun_s: When the sample was first asked for: the line's order.
            wake: Called, from any thread and soon after, when the place is taken for the waiter.

        Returns:
            None if the place is taken now, else a number for `give_up`.
        """
        with self._lock:
            if self._num_in_flight < self._limit.limit and not self._waiters:
                self._num_in_flight += 1
                return None
            self._limit.hold_back()
            number = next(self._numbers)
            heapq.heappush(self._waiters, (begun_s, number, wake))
            return number

    def give_up(self, number: int) -> bool:
        """Leave the line; False if the place was taken meanwhile, and must be left."""
        with self._lock:
            for place, waiter in enumerate(self._waiters):
                if waiter[1] == number:
                    del self._waiters[place]
                    heapq.heapify(self._waiters)
                    return True
        return False

    def leave(self, begun_s: float, now_s: float, outcome: Outcome | None) -> None:
        """Give a place back, with how the request ended; None if it was not made to its end."""
        with self._lock:
            if outcome is not None:
                self._limit.end(begun_s, now_s, outcome)
            self._num_in_flight -= 1
            woken: list[Callable[[], None]] = []
            while self._waiters and self._num_in_flight < self._limit.limit:
                woken.append(heapq.heappop(self._waiters)[2])
                self._num_in_flight += 1
        for wake in woken:
            wake()
