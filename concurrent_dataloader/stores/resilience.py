"""A Store around a Store: deadlines and retries.

The one layer that repeats: the clients' own retries are off. What may be repeated is what the store
inside raises as `StoreUnavailableError`; anything else goes through at once. A hedged request or a
cache would be another store around a store, beside or around this one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from typing_extensions import Buffer, override

from concurrent_dataloader.errors import DeadlineError, StoreUnavailableError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores.base import (
    ObjectInfo,
    PerProcess,
    SizedStore,
    ValueObject,
    WritableStore,
)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """When to ask again after a request that failed and may be repeated."""

    max_attempts: int = 6
    """Requests in all, the first one included. With the waits below an endpoint that refuses
    connections is given up after 3.1 s at most."""

    first_wait_s: float = 0.1
    """Upper bound of the first wait; about a median request to S3."""

    max_wait_s: float = 5.0
    """Upper bound of any wait."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts: got {self.max_attempts}, expected 1 or more")
        if not 0 <= self.first_wait_s <= self.max_wait_s:
            raise ValueError(
                f"first_wait_s: got {self.first_wait_s} s, expected 0 s to max_wait_s "
                f"({self.max_wait_s} s)"
            )


def draw_wait_s(num_failed: int, policy: RetryPolicy, rng: random.Random) -> float:
    """Draw how long to wait before the next attempt.

    Full jitter: uniform between nothing and the exponential bound, so that workers that failed
    together do not come back together.

    Args:
        num_failed: Attempts that have failed, from 1.
        policy: Bounds of the wait.
        rng: A generator of the store's own; the global ones belong to the transforms.

    Returns:
        Seconds, in ``[0, policy.max_wait_s]``.

    Raises:
        ValueError: ``num_failed`` is below 1.

    Source:
        M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    if num_failed < 1:
        raise ValueError(f"num_failed: got {num_failed}, expected 1 or more")
    bound_s = min(policy.max_wait_s, policy.first_wait_s * 2.0 ** min(num_failed - 1, 60))
    return rng.uniform(0.0, bound_s)


class ResilientStore(ValueObject):
    """Repeats what may be repeated, within a deadline for the request with all its attempts.

    Blocking reads are cut by the client's own timeouts: no attempt is begun after the deadline, and
    one that is under way ends by `ClientOptions.total_timeout_s`. Awaited reads are cut at the
    deadline.
    """

    def __init__(
        self,
        store: SizedStore,
        policy: RetryPolicy,
        deadline_s: float,
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
        self._clock = clock
        self._sleep = sleep
        self._sleep_async = sleep_async
        # A forked child that inherited the parent's generator would wait as its brothers do.
        self._rng = PerProcess(random.Random if rng is None else lambda: rng, _forget)

    @override
    def _arguments(self) -> tuple[SizedStore, RetryPolicy, float]:
        return self._store, self._policy, self._deadline_s

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return self._store.describe(key)

    def close(self) -> None:
        """Give back what the store inside has opened in this process."""
        self._store.close()

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get` says."""
        begun_s = self._clock()
        num_failed = 0
        while True:
            try:
                return self._store.get(key, byte_range)
            except StoreUnavailableError as error:
                num_failed += 1
                wait_s = self._plan_wait_s(key, num_failed, error, begun_s)
            self._sleep(wait_s)

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `get` does, without blocking the event loop; cancelled at once."""
        begun_s = self._clock()
        left_s = self._deadline_s
        num_failed = 0
        while True:
            try:
                async with asyncio.timeout(left_s):
                    return await self._store.get_async(key, byte_range)
            except StoreUnavailableError as error:
                failure = error
            except TimeoutError as error:
                failure = DeadlineError(f"{self.describe(key)}: no answer in {left_s:.3g} s")
                failure.__cause__ = error
            num_failed += 1
            await self._sleep_async(self._plan_wait_s(key, num_failed, failure, begun_s))
            left_s = self._deadline_s - (self._clock() - begun_s)

    def head(self, key: str) -> ObjectInfo:
        """Ask for an object's size."""
        return self._repeat(key, lambda: self._store.head(key))

    def _repeat(self, key: str, request: Callable[[], T]) -> T:
        begun_s = self._clock()
        num_failed = 0
        while True:
            try:
                return request()
            except StoreUnavailableError as error:
                num_failed += 1
                wait_s = self._plan_wait_s(key, num_failed, error, begun_s)
            self._sleep(wait_s)

    def _plan_wait_s(
        self, key: str, num_failed: int, error: StoreUnavailableError, begun_s: float
    ) -> float:
        """Draw the wait before the next attempt, or raise if there is to be none."""
        elapsed_s = self._clock() - begun_s
        tried = f"{num_failed} {'attempt' if num_failed == 1 else 'attempts'} in {elapsed_s:.2f} s"
        wait_s = draw_wait_s(num_failed, self._policy, self._rng.get())
        if elapsed_s + wait_s >= self._deadline_s:
            raise DeadlineError(
                f"{error}; gave up after {tried}, allowed are {self._deadline_s:.4g} s; "
                "check the endpoint and the network, or allow a longer deadline_s"
            ) from error
        if num_failed >= self._policy.max_attempts:
            raise type(error)(
                f"{error}; gave up after {tried}; check the endpoint and the network, or allow "
                "more attempts (RetryPolicy.max_attempts)"
            ) from error
        return wait_s


class ResilientWritableStore(ResilientStore):
    """Repeats listing and writing too; both may be repeated without harm."""

    def __init__(
        self,
        store: WritableStore,
        policy: RetryPolicy,
        deadline_s: float,
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
        last, num_failed, begun_s = start_after, 0, self._clock()
        while True:
            try:
                for info in self._writable.list(prefix, start_after=last):
                    last, num_failed = info.key, 0
                    yield info
                    begun_s = self._clock()
                return
            except StoreUnavailableError as error:
                num_failed += 1
                wait_s = self._plan_wait_s(prefix, num_failed, error, begun_s)
            self._sleep(wait_s)

    def put(self, key: str, body: Buffer) -> None:
        """Write an object whole."""
        self._repeat(key, lambda: self._writable.put(key, body))

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._repeat(key, lambda: self._writable.delete(key))


def _forget(value: object) -> None:
    del value
