"""One request made several times: whichever is answered first counts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from typing_extensions import Buffer

from concurrent_dataloader.errors import StoreUnavailableError
from concurrent_dataloader.stores._cancelling import CancellableCall
from concurrent_dataloader.threads import DaemonThreads

_ASKED_AGAIN_AFTER_S = 0.1
"""When a request that may not be repeated yet looks again whether it may."""


class Judge(Protocol):
    """Says when a request is late, and whether it may be made again."""

    @property
    def age_s(self) -> float: ...

    @property
    def max_hedges(self) -> int: ...

    def late_after_s(self) -> float | None: ...

    def try_hedge(self) -> bool: ...

    def win_by_hedge(self) -> None: ...


class _Schedule:
    """When to look at a request next, and whether to make it again then."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._num_hedges = 0

    def look(self) -> tuple[bool, float | None]:
        """Decide.

        Returns:
            Whether to make the request once more now; in how many seconds to look again, None for
            never.
        """
        judge = self._judge
        if self._num_hedges >= judge.max_hedges:
            return False, None
        late_after_s = judge.late_after_s()
        if late_after_s is None:
            return False, _ASKED_AGAIN_AFTER_S
        left_s = late_after_s * (self._num_hedges + 1) - judge.age_s
        if left_s > 0:
            return False, left_s
        is_hedged = judge.try_hedge()
        self._num_hedges += is_hedged
        return is_hedged, max(late_after_s, 0.01) if is_hedged else _ASKED_AGAIN_AFTER_S


class RaceThreads:
    """Threads of one process for the copies of calls, started as they are needed."""

    _MAX_THREADS = 8192
    """Never met: the callers are fewer."""

    def __init__(self) -> None:
        self._threads = DaemonThreads(self._MAX_THREADS, "request")

    def start(self, race: BlockingRace, copy: CancellableCall, is_hedge: bool) -> None:
        """Make one copy."""
        self._threads.submit(_run_copy, race, copy, is_hedge)

    def stop(self) -> None:
        """Leave out what has not begun, whose callers are told; what has goes on by itself."""
        for _, (race, _copy, is_hedge) in self._threads.stop():
            race.end_copy(None, RuntimeError("the store was closed"), is_hedge)


def _run_copy(race: BlockingRace, copy: CancellableCall, is_hedge: bool) -> None:
    race.run_copy(copy, is_hedge)


class BlockingRace:
    """Copies of a blocking call, each in a thread of its own.

    A copy that loses is ended where its client can be: the standard library's, whose connection is
    shut. By obstore and boto3 it goes on until their time is up, and what it gives is dropped.
    """

    def __init__(self, call: Callable[[], Buffer], threads: RaceThreads) -> None:
        self._call = call
        self._threads = threads
        self._ended = threading.Lock()
        self._ended.acquire()
        # Touched in the thread that waits.
        self._copies: list[CancellableCall] = []
        # Guarded by `_lock`.
        self._lock = threading.Lock()
        self._num_out = 0
        self._is_decided = False
        self._body: Buffer | None = None
        self._error: BaseException | None = None
        self._is_won_by_hedge = False

    def run(self, judge: Judge, timeout_s: float) -> Buffer:
        """Wait for the first answer, and end the copies that are still out.

        Raises:
            TimeoutError: There was none in time.
            BaseException: As the call; what may be repeated only when no copy is out any more.
        """
        try:
            self._wait_for_one(judge, timeout_s)
        finally:
            with self._lock:
                self._is_decided = True  # what comes now is dropped
            for copy in self._copies:
                copy.cancel()
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # else error and frame hold each other
        if self._is_won_by_hedge:
            judge.win_by_hedge()
        assert self._body is not None
        return self._body

    def _wait_for_one(self, judge: Judge, timeout_s: float) -> None:
        schedule = _Schedule(judge)
        self._start(is_hedge=False)
        next_s: float | None = judge.late_after_s() or _ASKED_AGAIN_AFTER_S
        until_s = judge.age_s + timeout_s
        while not self._wait(until_s - judge.age_s, next_s):
            if judge.age_s >= until_s:
                raise TimeoutError
            is_hedged, next_s = schedule.look()
            if is_hedged:
                self._start(is_hedge=True)

    def _wait(self, left_s: float, next_s: float | None) -> bool:
        timeout_s = left_s if next_s is None else min(left_s, next_s)
        return self._ended.acquire(timeout=max(0.0, timeout_s))

    def _start(self, *, is_hedge: bool) -> None:
        copy = CancellableCall()
        self._copies.append(copy)
        with self._lock:
            self._num_out += 1
        self._threads.start(self, copy, is_hedge)

    def run_copy(self, copy: CancellableCall, is_hedge: bool) -> None:
        """Make the call, in any thread, and hand over how it ends."""
        try:
            body = copy.run(self._call)
        except BaseException as error:  # noqa: BLE001 - goes to who waits for the race
            self.end_copy(None, error, is_hedge)
        else:
            self.end_copy(body, None, is_hedge)

    def end_copy(self, body: Buffer | None, error: BaseException | None, is_hedge: bool) -> None:
        """Hand over how a copy ended."""
        with self._lock:
            self._num_out -= 1
            if self._is_decided:
                return
            if isinstance(error, StoreUnavailableError) and self._num_out > 0:
                return  # another copy may still be answered
            self._is_decided = True
            self._body, self._error, self._is_won_by_hedge = body, error, is_hedge
        self._ended.release()


class AwaitedRace:
    """Copies of an awaited call; the first is awaited in place, so that it costs no task."""

    def __init__(self, call: Callable[[], Coroutine[Any, Any, Buffer]]) -> None:
        self._call = call
        self._hedges: set[asyncio.Task[Buffer]] = set()
        self._won: Buffer | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False

    async def run(self, judge: Judge, timeout_s: float) -> Buffer:
        """Wait for the first answer; those that are still out are cancelled.

        Raises:
            TimeoutError: There was none in time.
            BaseException: As the call; what may be repeated only when no copy is out any more.
        """
        loop = asyncio.get_running_loop()
        schedule = _Schedule(judge)
        first_look_s = judge.late_after_s() or _ASKED_AGAIN_AFTER_S
        try:
            async with asyncio.timeout(timeout_s) as limit:
                self._timer = loop.call_later(first_look_s, self._look, schedule, limit)
                try:
                    return await self._call()
                except StoreUnavailableError:
                    if not self._hedges:
                        raise
                    self._timer.cancel()
                    await asyncio.wait(set(self._hedges))
                    if self._won is None:
                        raise
                    judge.win_by_hedge()
                    return self._won
        except TimeoutError:
            if self._won is None:
                raise
            judge.win_by_hedge()
            return self._won
        finally:
            self._is_over = True
            if self._timer is not None:
                self._timer.cancel()
            for task in self._hedges:
                task.cancel()

    def _look(self, schedule: _Schedule, limit: asyncio.Timeout) -> None:
        is_hedged, next_s = schedule.look()
        loop = asyncio.get_running_loop()
        if is_hedged:
            task = loop.create_task(self._call())
            self._hedges.add(task)
            task.add_done_callback(lambda task: self._end_hedge(task, limit))
        if next_s is not None:
            self._timer = loop.call_later(next_s, self._look, schedule, limit)

    def _end_hedge(self, task: asyncio.Task[Buffer], limit: asyncio.Timeout) -> None:
        self._hedges.discard(task)
        if task.cancelled() or task.exception() is not None or self._won is not None:
            return
        self._won = task.result()
        if not self._is_over and not limit.expired():
            # Ends the wait for the first copy, wherever it is.
            limit.reschedule(asyncio.get_running_loop().time())
