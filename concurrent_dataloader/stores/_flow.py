"""What a process knows of a store: who is under way, what was asked for, how it went."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import random
import threading
import weakref
from collections.abc import Callable

from concurrent_dataloader.stores._races import RaceThreads
from concurrent_dataloader.stores.hedging import HedgePlan, HedgePolicy
from concurrent_dataloader.stores.in_flight import Gate, InFlightPolicy, Outcome
from concurrent_dataloader.stores.retries import RetryBudget

log = logging.getLogger(__name__)

SILENCE_TOLD_AFTER_S = 5.0
"""After which a person is told that a store has fallen silent."""

_SIGN_OF_LIFE_EVERY_S = 1.0
"""How often a store that gives none is asked for a sign of life."""


@dataclasses.dataclass(kw_only=True, slots=True)
class RequestCounts:
    """What one process has asked a store for."""

    num_requests: int = 0
    """All that were made for reading, repeated ones and those for a sign of life included."""

    num_retries: int = 0
    num_throttled: int = 0
    """Requests that the store refused for being too many (429, 503)."""

    num_hedges: int = 0
    num_hedges_won: int = 0

    def describe(self) -> str:
        """Say it in words."""
        return (
            f"{self.num_requests:,} requests, {self.num_retries:,} of them retries, "
            f"{self.num_throttled:,} refused as too many, {self.num_hedges:,} hedges "
            f"({self.num_hedges_won:,} of use)"
        )


class Flow:
    """What one process knows of a store; shared by its threads and loops."""

    def __init__(
        self,
        name: str,
        hedge: HedgePolicy | None,
        limits: InFlightPolicy | None,
        clock: Callable[[], float],
    ) -> None:
        now_s = clock()
        self.name = name
        self.pid = os.getpid()
        self.clock = clock
        self.gate = None if limits is None else Gate(limits, now_s)
        self.threads = RaceThreads()
        # Guarded by `_lock`.
        self._lock = threading.Lock()
        self._budget = RetryBudget(now_s)
        self._hedges = None if hedge is None else HedgePlan(hedge)
        self._max_hedges = 0 if hedge is None else hedge.max_hedges
        self._answered_s = -math.inf
        self._silence_told = False
        self._answered_keys: tuple[str | None, str | None] = (None, None)
        self._is_asking = False
        self._asked_s = -math.inf
        self.counts = RequestCounts()
        _flows.add(self)

    @property
    def hedges(self) -> bool:
        """Whether requests that are late are made again."""
        return self._hedges is not None

    @property
    def watches(self) -> bool:
        """Whether blocking reads are to be watched, so that late ones are made again."""
        return self._hedges is not None and self._hedges.is_awake

    @property
    def max_hedges(self) -> int:
        """How often one request is made again, at most."""
        return self._max_hedges

    def begin(self) -> None:
        """Count a request that is made."""
        with self._lock:
            self.counts.num_requests += 1
            if self._hedges is not None:
                self._hedges.begin()

    def end(
        self, key: str, size_class: int, begun_s: float, now_s: float, outcome: Outcome
    ) -> None:
        """Take in how a request ended."""
        with self._lock:
            if outcome == "answered":
                self._answered_s, self._silence_told = now_s, False
                if key != self._answered_keys[0]:
                    self._answered_keys = key, self._answered_keys[0]
                self._budget.succeed()
                if self._hedges is not None:
                    self._hedges.end(size_class, now_s - begun_s)
            elif outcome == "throttled":
                self.counts.num_throttled += 1

    def late_after_s(self, size_class: int) -> float | None:
        """Give the age at which a request is late; None while too few have been seen."""
        with self._lock:
            return None if self._hedges is None else self._hedges.late_after_s(size_class)

    def try_hedge(self) -> bool:
        """Take the right to make one request again, and count it."""
        with self._lock:
            if self._hedges is None or not self._hedges.try_take():
                return False
            self.counts.num_hedges += 1
            self.counts.num_requests += 1
            return True

    def win_by_hedge(self) -> None:
        """Count a request whose first answer was that of a hedge."""
        with self._lock:
            self.counts.num_hedges_won += 1

    def is_silent_since(self, since_s: float) -> bool:
        """Whether a store that has answered gave nobody of this process an answer since then."""
        with self._lock:
            return -math.inf < self._answered_s < since_s

    def try_sign_of_life(self, key: str, now_s: float) -> str | None:
        """Take the right to ask for an object, other than this one, that was answered before.

        Returns:
            Its key; to be followed by `end_sign_of_life`. None: somebody asks, or did so a moment
            ago in vain, or no other was answered.
        """
        with self._lock:
            others = [each for each in self._answered_keys if each not in (key, None)]
            is_vain = self._answered_s < self._asked_s > now_s - _SIGN_OF_LIFE_EVERY_S
            if not others or self._is_asking or is_vain:
                return None
            self._is_asking, self._asked_s = True, now_s
            return others[0]

    def end_sign_of_life(self) -> None:
        """Let the next one ask."""
        with self._lock:
            self._is_asking = False

    def take_retry(self, now_s: float, max_wait_s: float, rng: random.Random) -> float:
        """Count a retry; gives the seconds until the budget has one more."""
        with self._lock:
            self.counts.num_retries += 1
            wait_s = self._budget.take(now_s, max_wait_s, rng)
            # While it never answered, attempts are counted, which is bound enough.
            return wait_s if self._answered_s > -math.inf else 0.0

    def is_silence_to_tell(self, now_s: float) -> bool:
        """Whether the store has been silent for so long that a person should know; once."""
        with self._lock:
            is_long = now_s - self._answered_s > SILENCE_TOLD_AFTER_S
            is_to_tell = is_long and self._answered_s > -math.inf and not self._silence_told
            self._silence_told = self._silence_told or is_to_tell
            return is_to_tell

    def close(self) -> None:
        """End the threads; a request that hangs in one goes on by itself."""
        self.threads.stop()


# Those of a parent are left out by their process's number.
_flows: weakref.WeakSet[Flow] = weakref.WeakSet()


def log_counts(who: str) -> None:
    """Log what this process has asked each store for, if it has asked any.

    Args:
        who: The process, for a person.
    """
    for flow in list(_flows):
        if flow.pid == os.getpid() and flow.counts.num_requests:
            log.info("%s, %s: %s", who, flow.name, flow.counts.describe())
