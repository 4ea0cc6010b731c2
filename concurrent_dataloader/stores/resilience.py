"""A Store around a Store: deadlines, retries, hedged requests, and how many at once.

The one layer that repeats: the clients' own retries are off. What may be repeated is what the store
inside raises as `StoreUnavailableError`; anything else goes through at once. The policies are pure
(`retries`, `hedging`, `in_flight`); here is what waits, sleeps and counts.

```text
get -> Gate: wait for a place -> attempt ---------------------> bytes
       ^                         | late: made again, the first answer counts
       +-- back-off <-- failed --+
```
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from typing import Any, TypeVar

from typing_extensions import Buffer, override

from concurrent_dataloader.errors import DeadlineError, StoreError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores._flow import SILENCE_TOLD_AFTER_S, Flow, RequestCounts
from concurrent_dataloader.stores._places import Place, Request, enter, enter_async, resting
from concurrent_dataloader.stores._races import AwaitedRace, BlockingRace
from concurrent_dataloader.stores._time_left import ending_in
from concurrent_dataloader.stores.base import (
    ObjectInfo,
    PerProcess,
    SizedStore,
    ValueObject,
    WritableStore,
)
from concurrent_dataloader.stores.hedging import HedgePlan, HedgePolicy
from concurrent_dataloader.stores.in_flight import InFlightPolicy
from concurrent_dataloader.stores.retries import RetryPlan, RetryPolicy, count_attempts

T = TypeVar("T")

log = logging.getLogger(__name__)

_SIGN_OF_LIFE_S = 5.0
"""Within which an object that was answered before is answered again, or the store is away."""

_FIRST_BYTE = ByteRange(0, 1)

_UNNOTICED_S, _UNNOTICED_SHARE = 1.0, 0.1
"""How much of its time a request may have spent before an attempt, in seconds and as a share, while
that ends by the limits of the client, which are those of a whole request."""


class ResilientStore(ValueObject):
    """Repeats what may be repeated, within a deadline for the request with all its attempts.

    Awaited reads are cut at the deadline. Blocking ones are, and are hedged, while they are made in
    threads of this store's own: retries, first attempts while answers are late now and then
    (`Vigilance`), and those that stood in line before. Other first attempts are made in the
    caller's thread and end by `ClientOptions.total_timeout_s`; in a process's main thread all are,
    so that a parent that forks later has no threads of ours; and so is, in any thread, what does
    not read. There a client is told how much time is left (`_time_left`), where that is less than
    the whole: the standard library's ends by it, boto3 as far as it can (`Boto3Store`).
    """

    def __init__(
        self,
        store: SizedStore,
        policy: RetryPolicy,
        deadline_s: float,
        hedge: HedgePolicy | None = None,
        limits: InFlightPolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        sleep_async: Callable[[float], Awaitable[object]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        """Wrap a store.

        Args:
            store: The store whose failures are repeated.
            policy: How often and how soon.
            deadline_s: For a request with all its attempts.
            hedge: When a request that is late is made again; None: never.
            limits: Of the number of requests at once, which follows what the store takes; None:
                as many as are asked for.
            clock: Gives seconds; never goes back. Pickles do not hold this and the following.
            sleep: Waits between blocking attempts.
            sleep_async: Waits between awaited attempts.
            rng: Draws the waits; None: a generator for each process, seeded by the system.

        Raises:
            ValueError: ``deadline_s`` is not above 0.
        """
        if not deadline_s > 0:
            raise ValueError(f"deadline_s: got {deadline_s} s, expected more than 0 s")
        self._store = store
        self._policy = policy
        self._deadline_s = deadline_s
        self._hedge = hedge
        self._limits = limits
        self._clock = clock
        self._sleep = sleep
        self._sleep_async = sleep_async
        # A forked child that inherited the parent's generator would wait as its brothers do.
        self._rng = PerProcess(random.Random if rng is None else lambda: rng, _forget)
        self._flow = PerProcess(partial(Flow, store.describe(""), hedge, limits, clock), Flow.close)
        self._run_awaited: Callable[[Coroutine[Any, Any, Buffer]], Buffer] | None = getattr(
            store, "run_awaited", None
        )

    @override
    def _arguments(
        self,
    ) -> tuple[SizedStore, RetryPolicy, float, HedgePolicy | None, InFlightPolicy | None]:
        return self._store, self._policy, self._deadline_s, self._hedge, self._limits

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return self._store.describe(key)

    def close(self) -> None:
        """Give back what the store inside has opened in this process."""
        self._flow.close()
        self._store.close()

    def counts(self) -> RequestCounts:
        """Say what this process has asked for so far; reads only."""
        return dataclasses.replace(self._flow.get().counts)

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get` says."""
        if self._run_awaited is not None:  # its client awaits anyway, and can be cancelled there
            return self._run_awaited(self.get_async(key, byte_range))
        flow = self._flow.get()
        request = self._begin(key, byte_range)
        while True:
            place = self._enter(flow, request)
            try:
                return self._attempt(flow, request, place)
            except StoreError as error:
                failure = place.fail(error)
            finally:
                place.leave()
            with resting():
                self._rest(flow, request, failure, place.begun_s)

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `get` does, without blocking the event loop; cancelled at once."""
        flow = self._flow.get()
        request = self._begin(key, byte_range)
        while True:
            place = await self._enter_async(flow, request)
            try:
                return await self._attempt_async(flow, request, place)
            except StoreError as error:
                failure = place.fail(error)
            finally:
                place.leave()
            with resting():
                sign = self._look_for_life(flow, request, failure, place.begun_s)
                if sign is not None:
                    await self._ask_for_life_async(flow, sign)
                await self._sleep_async(self._plan_retry_s(flow, request, failure, place.begun_s))

    def _begin(self, key: str, byte_range: ByteRange | None) -> Request:
        size_bytes = None if byte_range is None else byte_range.stop - byte_range.start
        begun_s = self._clock()
        until_s = begun_s + self._deadline_s
        plan = RetryPlan(self._policy, self._deadline_s)
        return Request(key, byte_range, begun_s, until_s, HedgePlan.size_class(size_bytes), plan)

    # -- a place among those under way

    def _enter(self, flow: Flow, request: Request) -> Place:
        try:
            return enter(flow, request)
        except TimeoutError as error:
            raise self._crowded_error(request) from error

    async def _enter_async(self, flow: Flow, request: Request) -> Place:
        try:
            return await enter_async(flow, request)
        except TimeoutError as error:
            raise self._crowded_error(request) from error

    def _left_s(self, request: Request) -> float:
        return request.until_s - self._clock()

    def _crowded_error(self, request: Request) -> DeadlineError:
        return DeadlineError(
            f"{self.describe(request.key)}: waited {self._deadline_s:.4g} s for others to be "
            f"answered, after {count_attempts(request.plan.num_attempts)}; the store takes only "
            "few requests at once; allow a longer deadline_s, or use fewer workers"
        )

    # -- one attempt

    def _attempt(self, flow: Flow, request: Request, place: Place) -> Buffer:
        call = partial(self._store.get, request.key, request.byte_range)
        place.begin()
        is_repeated = request.plan.num_attempts > 1
        is_watched = flow.watches or is_repeated or self._is_short(request, place.begun_s)
        if not is_watched:
            body = call()
        elif threading.current_thread() is threading.main_thread():
            body = self._call(request, place.begun_s, call)
        else:
            try:
                body = BlockingRace(call, flow.threads).run(place, self._left_s(request))
            except TimeoutError as error:
                if isinstance(error, StoreError):
                    raise
                raise self._no_answer(request, place.age_s) from error
        place.succeed()
        return body

    def _is_short(self, request: Request, begun_s: float) -> bool:
        """Whether an attempt that began then has less time than a client gives a request."""
        spent_s = self._deadline_s - (request.until_s - begun_s)
        return spent_s > min(_UNNOTICED_S, _UNNOTICED_SHARE * self._deadline_s)

    def _call(self, request: Request, begun_s: float, call: Callable[[], T]) -> T:
        """Make a call in this thread; its client is told of the time if that is short."""
        if not self._is_short(request, begun_s):
            return call()
        left_s = request.until_s - begun_s
        try:
            with ending_in(left_s):
                return call()
        except DeadlineError as error:
            if self._clock() < request.until_s:  # by a limit of the client's own
                raise
            raise self._no_answer(request, left_s) from error

    async def _attempt_async(self, flow: Flow, request: Request, place: Place) -> Buffer:
        call = partial(self._store.get_async, request.key, request.byte_range)
        place.begin()
        left_s = self._left_s(request)
        try:
            if flow.hedges:
                body = await AwaitedRace(call).run(place, left_s)
            else:
                async with asyncio.timeout(left_s):
                    body = await call()
        except TimeoutError as error:
            if isinstance(error, StoreError):
                raise
            raise self._no_answer(request, place.age_s) from error
        place.succeed()
        return body

    def _no_answer(self, request: Request, waited_s: float) -> DeadlineError:
        failure = request.plan.failure
        before = f"; the attempt before: {failure}" if failure else ""
        name = self.describe(request.key)
        return DeadlineError(f"{name}: no answer in {waited_s:.2f} s{before}")

    # -- all but reading

    def head(self, key: str) -> ObjectInfo:
        """Ask for an object's size."""
        return self._repeat(key, lambda: self._store.head(key))

    def _repeat(self, key: str, call: Callable[[], T]) -> T:
        flow, request = self._flow.get(), self._begin(key, None)
        while True:
            begun_s = self._clock()
            request.plan.begin()
            try:
                return self._call(request, begun_s, call)
            except StoreError as error:
                self._rest(flow, request, error, begun_s)

    def _rest(
        self, flow: Flow, request: Request, failure: StoreError, attempt_begun_s: float
    ) -> None:
        """Wait for the next attempt, or raise if there is to be none."""
        sign = self._look_for_life(flow, request, failure, attempt_begun_s)
        if sign is not None:
            self._ask_for_life(flow, sign)
        self._sleep(self._plan_retry_s(flow, request, failure, attempt_begun_s))

    # -- between attempts

    def _plan_retry_s(
        self, flow: Flow, request: Request, error: StoreError, attempt_begun_s: float
    ) -> float:
        """Say how long to wait before the next attempt, or raise if there is to be none."""
        now_s, plan, rng = self._clock(), request.plan, self._rng.get()
        elapsed_s = now_s - request.begun_s
        is_silent = flow.is_silent_since(attempt_begun_s)
        budget_s = 0.0
        if plan.fail(error, elapsed_s, is_silent=is_silent):
            budget_s = flow.take_retry(now_s, self._policy.max_wait_s, rng)
        wait_s = plan.wait_s(error, elapsed_s, budget_s, rng)
        if flow.is_silence_to_tell(now_s):
            log.warning(
                "%s; nothing was answered for %g s; requests are repeated, each until it is %g s "
                "old",
                error,
                SILENCE_TOLD_AFTER_S,
                self._deadline_s,
            )
        return wait_s

    # -- whether the store is away, where nobody else asks: all wait for this object

    def _look_for_life(
        self, flow: Flow, request: Request, error: StoreError, attempt_begun_s: float
    ) -> Request | None:
        """Give what is to be asked for, to tell an object that cannot be had from an outage."""
        now_s = self._clock()
        left_s = min(_SIGN_OF_LIFE_S, self._left_s(request))
        is_doubtful = request.plan.may_be_outage(error) and left_s > 0
        if not (is_doubtful and flow.is_silent_since(attempt_begun_s)):
            return None
        key = flow.try_sign_of_life(request.key, now_s)
        if key is None:
            return None
        plan = RetryPlan(self._policy, left_s)
        plan.begin()
        size_class = HedgePlan.size_class(1)
        return Request(key, _FIRST_BYTE, now_s, now_s + left_s, size_class, plan)

    def _ask_for_life(self, flow: Flow, sign: Request) -> None:
        place = Place(flow, None, sign, sign.begun_s)
        try:
            self._attempt(flow, sign, place)
        except StoreError as error:
            place.fail(error)
        finally:
            place.leave()
            flow.end_sign_of_life()

    async def _ask_for_life_async(self, flow: Flow, sign: Request) -> None:
        place = Place(flow, None, sign, sign.begun_s)
        try:
            await self._attempt_async(flow, sign, place)
        except StoreError as error:
            place.fail(error)
        finally:
            place.leave()
            flow.end_sign_of_life()


class ResilientWritableStore(ResilientStore):
    """Repeats listing and writing too; both may be repeated without harm."""

    def __init__(
        self,
        store: WritableStore,
        policy: RetryPolicy,
        deadline_s: float,
        hedge: HedgePolicy | None = None,
        limits: InFlightPolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        sleep_async: Callable[[float], Awaitable[object]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        super().__init__(
            store,
            policy,
            deadline_s,
            hedge,
            limits,
            clock=clock,
            sleep=sleep,
            sleep_async=sleep_async,
            rng=rng,
        )
        self._writable = store

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """List as `WritableStore.list` says; goes on after the last key that came.

        The count of failures and the deadline begin anew with each object that comes.
        """
        flow, last, request = self._flow.get(), start_after, self._begin(prefix, None)
        while True:
            attempt_begun_s = begun_s = self._clock()
            request.plan.begin()
            try:
                infos = self._writable.list(prefix, start_after=last)
                find = partial(next, infos, None)
                while (info := self._call(request, begun_s, find)) is not None:
                    last = info.key
                    yield info
                    request = self._begin(prefix, None)
                    request.plan.begin()
                    begun_s = request.begun_s
                return
            except StoreError as error:
                self._rest(flow, request, error, attempt_begun_s)

    def put(self, key: str, body: Buffer) -> None:
        """Write an object whole."""
        self._repeat(key, lambda: self._writable.put(key, body))

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._repeat(key, lambda: self._writable.delete(key))


def _forget(value: object) -> None:
    del value
