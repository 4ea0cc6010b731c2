"""How many requests to have under way at once: a control loop, and the gate that keeps to it."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import heapq
import itertools
import math
import statistics
import threading
import weakref
from collections.abc import Callable, Generator
from typing import Literal

from concurrent_dataloader.stores._arguments import check_whole

Outcome = Literal["answered", "throttled", "failed"]
"""How a request ended: with its object or a final refusal; refused for being one too many (429,
503); otherwise."""

callers: contextvars.ContextVar[Callers | None] = contextvars.ContextVar("callers", default=None)
"""To whom the caller belongs, if to a fetcher."""


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

    Decides once a round, which lasts for two sets of requests, and half a second or more once
    doubling is over; after a change, one set goes by before it begins, if few of it are refused:

    - more than a tenth refused (429, 503): fewer by that share, a quarter of them at least; some
      refused: as many. Requests that were begun before such a cut count no more: they are those of
      the flood that it ended;
    - latency six times the lowest and more, so that requests wait for each other: no more of them.
      If throughput does not rise either, as many fewer as bring it to five times the lowest, a half
      at most, and not below 16; taken back if less comes by fewer, since then it was not they that
      waited for each other;
    - else, if all that were allowed were used: twice as many as long as throughput rises by a
      tenth; the doubling that brings no more in two rounds is taken back. From then on a quarter
      more is tried for some rounds now and then, and kept if throughput follows: beyond what hides
      the latency, requests cost the client and the store more, and bring nothing;
    - but for a minute after a refusal, one more, or a twentieth, a round; two more, four, and so on
      as long as no round brings a refusal, since a store that refused all for a second takes as
      many as before.

    Workers that share a store which refuses come to fair shares by themselves, since a cut takes
    more from those that have more, and each rises by the same steps in the same time.

    Source:
        D.-M. Chiu, R. Jain, "Analysis of the increase and decrease algorithms for congestion
        avoidance", 1989, for the fairness.
    """

    _MAX_REFUSED_SHARE = 0.1
    _SOME_REFUSED_SHARE = 0.02
    _MAX_CUT = 0.25
    _CAREFUL_S = 60.0
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
        self._proved = self._limit
        """What the last doubling that brought more came to."""
        self._proved_throughput = 0.0
        self._is_doubted = False
        """Whether a round of the doubling that is tried brought no more."""
        self._trial = _Trial()
        self._fall = _Fall()
        self._careful_until_s = -math.inf
        self._careful_step = 1.0
        self._cut_s = -math.inf
        self._lowest_s = math.inf
        self._throughput_before = 0.0
        self._begin_round(now_s)
        self._is_settling = True

    def _begin_round(self, now_s: float) -> None:
        self._round_begun_s = now_s
        self._is_settling = False
        self._latencies_s: list[float] = []
        self._num_refused = 0
        self._num_ended = 0
        self._is_used_up = False

    @property
    def limit(self) -> int:
        """Requests under way, at most; 1 or more."""
        return int(self._limit + 0.5)

    def hold_back(self) -> None:
        """Note that a request had to wait: all that are allowed are under way."""
        self._is_used_up = True

    def end(self, begun_s: float, now_s: float, outcome: Outcome) -> None:
        """Take in how one request ended, and move the limit when the round is over."""
        if begun_s < self._cut_s:
            return
        self._num_ended += 1
        if outcome == "throttled":
            self._num_refused += 1
        elif outcome == "answered":
            self._latencies_s.append(now_s - begun_s)
            self._lowest_s = min(self._lowest_s, now_s - begun_s)
        lasted_s = now_s - self._round_begun_s
        if not self._is_over(lasted_s):
            return
        if self._is_settling and not self._is_refused_much():
            self._begin_round(now_s)
            return
        limit_before = self.limit
        self._decide(lasted_s, now_s)
        self._begin_round(now_s)
        self._is_settling = self.limit != limit_before

    def _is_over(self, lasted_s: float) -> bool:
        if lasted_s >= self._MAX_ROUND_S:
            return True
        # Too many at once is seen within a set; throughput is not.
        is_short = self._is_settling or self._is_refused_much()
        num_sets = 1 if is_short else 2
        if self._num_ended < max(self._MIN_ENDED, num_sets * self.limit):
            return False
        is_fast = self._is_doubling or self._is_settling or self._num_refused > self._num_ended / 2
        return lasted_s > (0 if is_fast else self._MIN_ROUND_S)

    def _is_refused_much(self) -> bool:
        return self._num_refused > self._num_ended * self._MAX_REFUSED_SHARE

    def _decide(self, lasted_s: float, now_s: float) -> None:
        refused_share = self._num_refused / self._num_ended
        throughput = len(self._latencies_s) / lasted_s
        if refused_share > self._SOME_REFUSED_SHARE:
            self._careful_until_s = now_s + self._CAREFUL_S
            self._careful_step = 1.0
        if self._is_refused_much():
            self._cut(max(self._MAX_CUT, 1.0 - refused_share))
            self._cut_s = now_s
        elif refused_share <= self._SOME_REFUSED_SHARE and self._latencies_s:
            self._follow_latency(throughput, is_careful=now_s < self._careful_until_s)
        self._throughput_before = throughput

    def _follow_latency(self, throughput: float, *, is_careful: bool) -> None:
        rises = throughput > self._throughput_before * self._RISE
        latency_s = statistics.median(self._latencies_s)
        wait = latency_s / self._lowest_s if self._lowest_s > 0 else 1.0
        self._lowest_s *= self._LOWEST_DRIFT
        fewer = self._fall.next(self._limit, throughput, wait, rises=rises)
        if fewer is not None:
            if fewer != self._limit:
                self._is_doubling = False
                self._trial = _Trial()
            self._set(fewer)
        elif self._is_used_up:
            if self._is_doubling:
                self._go_on_doubling(throughput)
            elif is_careful:
                self._set(self._limit + max(self._careful_step, self._limit * 0.05))
                self._careful_step *= 2
            else:
                self._set(self._trial.next(self._limit, throughput))

    def _go_on_doubling(self, throughput: float) -> None:
        if throughput > self._proved_throughput * self._RISE:
            self._proved, self._proved_throughput = self._limit, throughput
            self._is_doubted = False
            self._set(self._limit * 2)
        elif not self._is_doubted:
            # Connections and threads that have just been made may have cost the difference.
            self._is_doubted = True
        else:
            self._is_doubling = False
            self._set(self._proved)

    def _cut(self, factor: float) -> None:
        self._is_doubling = False
        self._trial = _Trial()
        self._fall = _Fall()
        self._set(self._limit * factor)

    def _set(self, limit: float) -> None:
        self._limit = min(max(limit, self._policy.minimum), self._policy.maximum)


class _Trial:
    """Tries more requests for a while, and keeps them if they bring more; then waits, and again.

    It takes two rounds to see what came of it. The waits grow with each trial in vain.
    """

    _FACTOR = 1.25
    _GAIN = 1.08
    """What a quarter more has to bring: as good as nothing comes to 1 plus the noise of a round."""

    _NUM_ROUNDS = 2
    _MAX_WAIT = 32

    def __init__(self) -> None:
        self._wait = self._NUM_ROUNDS
        self._before: float | None = None
        """What was allowed before the trial; None while there is none."""
        self._num_rounds = 0
        self._throughputs: collections.deque[float] = collections.deque(maxlen=self._NUM_ROUNDS)
        self._throughput_before = 0.0

    def next(self, limit: float, throughput: float) -> float:
        """Take in a round's throughput, in requests a second; gives the limit for the next one."""
        self._num_rounds += 1
        self._throughputs.append(throughput)
        mean = statistics.fmean(self._throughputs)
        if self._before is None:
            if self._num_rounds < self._wait:
                return limit
            self._begin(limit)
            self._throughput_before = mean
            return max(limit + 1.0, limit * self._FACTOR)
        if self._num_rounds < self._NUM_ROUNDS:
            return limit
        before = self._before
        self._begin(None)
        if mean > self._throughput_before * self._GAIN:
            self._wait = self._NUM_ROUNDS
            return limit
        self._wait = min(2 * self._wait, self._MAX_WAIT)
        return before

    def _begin(self, before: float | None) -> None:
        self._before = before
        self._num_rounds = 0


class _Fall:
    """Tries fewer requests where they wait for each other, and takes it back if less comes by them.

    Latency also rises when the store, the network or the machine is busy with others; then fewer
    requests bring less, and nothing is tried for some rounds, more of them each time.
    """

    _SLOW = 6.0
    """Latency over the lowest: that of a store which is not busy comes to 3, and seldom to 5."""

    _WANTED = 5.0
    _MAX_CUT = 0.5
    _MINIMUM = 16.0
    """Latency rises on a busy machine too."""

    _KEPT = 0.92
    """The share of throughput that is as good as all of it, for the noise of a round."""

    _FIRST_WAIT, _MAX_WAIT = 2, 32

    def __init__(self) -> None:
        self._before: tuple[float, float] | None = None
        """What was allowed and what came before the fall; None while there is none."""
        self._wait = 0
        self._next_wait = self._FIRST_WAIT

    def next(self, limit: float, throughput: float, wait: float, *, rises: bool) -> float | None:
        """Take in a round.

        Args:
            limit: What was allowed.
            throughput: In requests a second.
            wait: Latency over the lowest.
            rises: Whether throughput is higher than in the round before.

        Returns:
            The limit for the next round; None: it says nothing.
        """
        before, self._before = self._before, None
        if before is not None:
            limit_before, throughput_before = before
            if throughput < throughput_before * self._KEPT:
                self._wait, self._next_wait = (
                    self._next_wait,
                    min(2 * self._next_wait, self._MAX_WAIT),
                )
                return limit_before
            self._next_wait = self._FIRST_WAIT
        if self._wait > 0:
            self._wait -= 1
            return None
        if wait < self._SLOW or limit <= self._MINIMUM:
            return None
        if rises:
            return limit
        self._before = limit, throughput
        return max(limit * max(self._WANTED / wait, self._MAX_CUT), self._MINIMUM)


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

    def hold_back(self) -> None:
        """Note that somebody would ask for more if more were allowed, unless places are empty."""
        with self._lock:
            if 2 * (self._num_in_flight + 1) >= self._limit.limit:
                self._limit.hold_back()

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


class Callers:
    """The threads or tasks of one fetcher: how many of them are of use, as stores come to know.

    Whoever has to wait in front of a gate would be woken by another one for each request, which
    costs a switch of threads; so a fetcher has no more of them than the gates let through. A gate
    is known as soon as one of them has come to it.
    """

    def __init__(self, number: int, maximum: int | None = None) -> None:
        """Make a fetcher's.

        Args:
            number: How many there may be as long as no gate is known; see `set_number`.
            maximum: How many gates may let there be; None: the number is fixed, no gate counts.
        """
        self._number = number
        self._maximum = maximum
        self.grow: Callable[[], None] = _do_nothing
        """Called, by any of them, when more may be of use than a moment before; until `close`."""
        # Guarded by `_lock`, which a thread may take twice: memory that is collected while it is
        # held may be that of a task that rests.
        self._lock = threading.RLock()
        self._gates: weakref.WeakSet[Gate] = weakref.WeakSet()
        self._num_resting = 0

    @property
    def is_fixed(self) -> bool:
        """Whether a person chose the number, so that no gate holds back."""
        return self._maximum is None

    @property
    def limit(self) -> int:
        """How many there may be as of now; 1 or more."""
        maximum = self._maximum
        if maximum is None or not self._gates:
            return self._number
        with self._lock:
            let_through = sum(gate.limit for gate in self._gates)
            return max(1, min(maximum, let_through) + self._num_resting)

    @property
    def is_alone(self) -> bool:
        """Whether nobody says how many are of use: neither a person nor a gate."""
        return self._maximum is not None and not self._gates

    def set_number(self, number: int) -> None:
        """Have so many of them from now on, as long as no gate is known."""
        is_more, self._number = number > self._number, number
        if is_more:
            self.grow()

    def close(self) -> None:
        """Grow no more, and forget who would have; else the two would hold each other."""
        self.grow = _do_nothing

    def meet(self, gate: Gate) -> None:
        """Take note of a gate that one of them has come to."""
        if gate not in self._gates:
            with self._lock:
                self._gates.add(gate)

    def hold_back(self) -> None:
        """Tell the gates that more would be asked for if there might be more of them."""
        with self._lock:
            gates = list(self._gates)
        for gate in gates:
            gate.hold_back()

    @contextlib.contextmanager
    def resting(self) -> Generator[None]:
        """Count one of them out for a while: it sleeps before it asks again."""
        with self._lock:
            self._num_resting += 1
        self.grow()
        try:
            yield
        finally:
            with self._lock:
                self._num_resting -= 1


def _do_nothing() -> None:
    pass
