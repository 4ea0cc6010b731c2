"""How many threads to read with, where no store says how many requests are of use.

Threads that wait for a disk or a network cost little, and many of them hide the latency. Threads
that decode and compute wait for the cores and for the interpreter's lock, and take each other's
caches, so that many of them cost more CPU for each image than a few do (benchmarking:
``loader_epoch --only plain``). Which they are is seen by their CPU time, and by what fewer bring.
"""

from __future__ import annotations

import os
import threading

import torch.utils.data


class ThreadLimit:
    """Says how many threads may read at once; learns from what calls cost. Pure, but for a lock.

    Decides once a round, of half a second or more, and of as many calls as there may be threads;
    after a change, one set of calls goes by before it begins:

    - threads that are on a core for less than half of the time that this process may use one wait
      for something else, or have nothing to do: four times as many, up to the maximum;
    - else a quarter as many, taken back if the cores are less busy by them, at once or, since a
      round may mislead, in the mean of later ones; then nothing is tried for some rounds, more of
      them each time. What is done in a round's time says less: it is
      shared with other workers, and differs by a tenth from round to round.

    Called from any thread.
    """

    _MIN_CALLS = 64
    _MIN_ROUND_S = 0.5
    _MINIMUM = 8
    """Few enough to be cheap, and enough to hide some waiting."""

    _FACTOR = 4
    _BUSY = 0.5
    _KEPT = 0.9
    """The share of how busy the cores were that is as good as all of it, for a round's noise."""

    _MEMORY = 0.7
    """How much of it is kept of the rounds before."""

    _FIRST_WAIT, _MAX_WAIT = 2, 64

    def __init__(self, maximum: int, cores: float, now_s: float) -> None:
        """Begin with the maximum.

        Args:
            maximum: Threads, at most.
            cores: How many cores this process may use; one counts at most, since the interpreter
                runs one thread at a time.
            now_s: Of a clock that does not go back.
        """
        self._maximum = maximum
        self._minimum = min(maximum, self._MINIMUM)
        self._is_busy_from = self._BUSY * min(1.0, cores)
        self._lock = threading.Lock()
        # Guarded by `_lock`.
        self._limit = maximum
        self._before: int | None = None
        """What was allowed before fewer were tried; None while nothing is tried."""
        self._usual: float | None = None
        """How busy the cores were, as far back as threads computed."""
        self._most: float | None = None
        """How busy they were before the first of the falls that stand; None while none does."""
        self._wait = 0
        self._next_wait = self._FIRST_WAIT
        self._num_settling = maximum
        """Calls that are to end before a round begins: they were begun under other conditions."""
        self._begin_round(now_s)

    @property
    def limit(self) -> int:
        """Threads, at most, as of now."""
        return self._limit

    def end(self, cpu_s: float, now_s: float) -> None:
        """Take in that a call ended, which took so much CPU time of its thread."""
        with self._lock:
            self._num_calls += 1
            self._cpu_s += cpu_s
            if self._num_settling:
                if self._num_calls >= self._num_settling:
                    self._num_settling = 0
                    self._begin_round(now_s)
                return
            lasted_s = now_s - self._begun_s
            if lasted_s >= self._MIN_ROUND_S and self._num_calls >= max(
                self._MIN_CALLS, self._limit
            ):
                limit, self._limit = self._limit, self._decide(self._cpu_s / lasted_s)
                if self._limit != limit:
                    self._num_settling = max(self._limit, limit)
                self._begin_round(now_s)

    def _begin_round(self, now_s: float) -> None:
        self._begun_s = now_s
        self._num_calls = 0
        self._cpu_s = 0.0

    def _decide(self, busy: float) -> int:
        before, self._before = self._before, None
        usual = busy if self._usual is None else self._usual
        if before is not None:
            if busy < (self._most or usual) * self._KEPT:
                self._rest()
                return before
            self._most = self._most or usual
        if busy < self._is_busy_from:
            self._usual = self._most = None
            self._next_wait = self._FIRST_WAIT
            return min(self._FACTOR * self._limit, self._maximum)
        self._usual = self._MEMORY * usual + (1.0 - self._MEMORY) * busy
        if self._most is not None and self._usual < self._most * self._KEPT:
            self._rest()
            self._usual = None
            more = min(self._FACTOR * self._limit, self._maximum)
            if more == self._maximum:
                self._most = None
            return more
        if self._wait > 0:
            self._wait -= 1
            return self._limit
        if self._limit <= self._minimum:
            return self._limit
        self._before = self._limit
        return max(self._limit // self._FACTOR, self._minimum)

    def _rest(self) -> None:
        """Try nothing for some rounds, and for more of them the next time."""
        self._wait = self._next_wait
        self._next_wait = min(2 * self._next_wait, self._MAX_WAIT)


def count_cores() -> float:
    """Give this process's share of the cores, as one of the workers of its loader."""
    if hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    worker = torch.utils.data.get_worker_info()
    return num_cores / (1 if worker is None else worker.num_workers)
