"""When to ask again: pure policies, told the time by their caller."""

from __future__ import annotations

import dataclasses
import random

from concurrent_dataloader.errors import (
    BodyMismatchError,
    DeadlineError,
    ExpiredCredentialsError,
    StoreError,
    StoreUnavailableError,
    ThrottledError,
)
from concurrent_dataloader.stores._arguments import check_number, check_whole

DEFAULT_MAX_ATTEMPTS = 6
"""Attempts that count, if the policy says no number. With the default waits a request is given up
after 3.1 s at most."""

_MAX_THROTTLED_WAIT_S = 1.0
"""A store that refuses what is too much still answers the rest: the limit on requests in flight
slows down, and one sample must not hold up those after it."""

_RENEWAL_S = 1.2
"""In which new credentials are noticed: files are looked at once a second, obstore asks again after
a tenth. A request that came in between is made once more then."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """When to ask again after a request that failed and may be repeated.

    A store that refuses a request for being too many and says when to come again (``Retry-After``,
    in seconds) is left alone for so long, up to a minute; but for obstore, which shows no headers
    of a refusal, so that its requests come again after the waits below.
    """

    max_attempts: int | None = None
    """Requests in all, the first one included. None tells an object that cannot be had from a store
    that is away: 6, counting those that failed while the store answered others, or before it ever
    answered this process; those that it refuses for being too many, and those of an outage, are
    repeated until the deadline. Where nobody else asks, one byte of an object that was answered
    before is asked for, to tell which it is. One that is refused since the credentials have expired
    is made once more beside these, when they are renewed."""

    first_wait_s: float = 0.1
    """Upper bound of the first wait; about a median request to S3."""

    max_wait_s: float = 5.0
    """Upper bound of any wait."""

    def __post_init__(self) -> None:
        if self.max_attempts is not None:
            check_whole("max_attempts", self.max_attempts, "None or a whole number")
        check_number("first_wait_s", self.first_wait_s, "a number of seconds")
        check_number("max_wait_s", self.max_wait_s, "a number of seconds")
        if self.max_attempts is not None and self.max_attempts < 1:
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


class RetryPlan:
    """Decides for one request whether it is made again, and when.

    `begin` each attempt; when one failed, `fail`, then `wait_s`.
    """

    __slots__ = (
        "_deadline_s",
        "_has_expired",
        "_num_counted",
        "_policy",
        "failure",
        "num_attempts",
    )

    def __init__(self, policy: RetryPolicy, deadline_s: float) -> None:
        """Plan for a request of which no attempt was made.

        Args:
            policy: How often and how soon.
            deadline_s: For all attempts and waits together.
        """
        self._policy = policy
        self._deadline_s = deadline_s
        self._num_counted = 0
        self._has_expired = False
        self.num_attempts = 0
        self.failure = ""
        """Of the attempt before, in words."""

    def begin(self) -> None:
        """Count an attempt."""
        self.num_attempts += 1

    def fail(self, error: StoreError, elapsed_s: float, *, is_silent: bool) -> bool:
        """Take in how an attempt failed.

        Args:
            error: How.
            elapsed_s: Since the request began.
            is_silent: Whether the store, having answered this process before, gave nobody an answer
                since the attempt began.

        Returns:
            Whether the next attempt is one that the `RetryBudget` bounds.

        Raises:
            StoreError: There is to be no other; the same, or one of its class that says how many
                there were.
        """
        if not isinstance(error, StoreUnavailableError):
            is_renewable = isinstance(error, ExpiredCredentialsError) and not self._has_expired
            if not is_renewable or elapsed_s + _RENEWAL_S >= self._deadline_s:
                raise error
            self._has_expired = True
            return False
        self.failure = str(error)
        self._num_counted += self._counts(error, is_silent=is_silent)
        if self._num_counted >= (self._policy.max_attempts or DEFAULT_MAX_ATTEMPTS):
            raise type(error)(
                f"{error}; gave up after {self._tried(elapsed_s)}; check the endpoint and the "
                "network, or allow more attempts (RetryPolicy.max_attempts)"
            ) from error
        return True

    def _counts(self, error: StoreUnavailableError, *, is_silent: bool) -> bool:
        """Whether a failure says something of the object, or of an endpoint that is none."""
        if isinstance(error, ThrottledError):
            return self._policy.max_attempts is not None
        return not (is_silent and self.may_be_outage(error))

    def may_be_outage(self, error: StoreError) -> bool:
        """Whether a failure may be that of an outage, which is waited for."""
        return (
            self._policy.max_attempts is None
            and isinstance(error, StoreUnavailableError)
            and not isinstance(error, BodyMismatchError | ThrottledError)
        )

    def wait_s(
        self, error: StoreError, elapsed_s: float, budget_s: float, rng: random.Random
    ) -> float:
        """Say how long to wait before the next attempt.

        Args:
            error: That of the last one, which `fail` let pass.
            elapsed_s: Since the request began.
            budget_s: When the `RetryBudget` has a token for it.
            rng: Draws the wait.

        Returns:
            Seconds, less than are left until the deadline.

        Raises:
            DeadlineError: There is no time left for another attempt.
        """
        if not isinstance(error, StoreUnavailableError):
            return _RENEWAL_S
        policy = self._policy
        wait_s = draw_wait_s(self.num_attempts, policy, rng)
        if isinstance(error, ThrottledError):
            wait_s = min(wait_s, _MAX_THROTTLED_WAIT_S)
        wait_s = max(wait_s, budget_s, error.retry_after_s)
        left_s = self._deadline_s - elapsed_s
        if wait_s < left_s:
            return wait_s
        if left_s > policy.first_wait_s:
            return left_s / 2  # the time that was allowed is used: the store may come back
        raise DeadlineError(
            f"{error}; gave up after {self._tried(elapsed_s)}, allowed are "
            f"{self._deadline_s:.4g} s; check the endpoint and the network, or allow a longer "
            "deadline_s"
        ) from error

    def _tried(self, elapsed_s: float) -> str:
        return f"{count_attempts(self.num_attempts)} in {elapsed_s:.2f} s"


def count_attempts(number: int) -> str:
    """Say a number of attempts in words."""
    return f"{number} {'attempt' if number == 1 else 'attempts'}"


class RetryBudget:
    """Bounds the retries of a process: half of what succeeds, and ten a second beside that.

    A store that is down is asked by a few at a time instead of by all that wait for it. A bucket
    of tokens: a retry takes one, and may borrow from those of the next seconds by waiting for them,
    up to the longest wait. Those for which that is not enough wait for half of it or more, each
    for a time of its own, so that they do not come back together: 256 that wait for a dead store
    ask about 66 times a second, and not more than 128 times in any.

    Source:
        M. Brooker, "Fixing retries with token buckets and circuit breakers", 2022, for the tokens
        of successes; figures: benchmarking scenario ``faults``.
    """

    PER_SUCCESS = 0.5
    PER_S = 10.0
    CAPACITY = 64.0

    def __init__(self, now_s: float) -> None:
        self._tokens = self.CAPACITY
        self._filled_s = now_s

    def succeed(self) -> None:
        """Count a request that was answered."""
        self._tokens = min(self.CAPACITY, self._tokens + self.PER_SUCCESS)

    def take(self, now_s: float, max_wait_s: float, rng: random.Random) -> float:
        """Take a token for a retry, and say in how many seconds it may be used.

        Args:
            now_s: The time; never before that of the call before.
            max_wait_s: The longest answer; debts beyond it are forgiven.
            rng: Draws the waits of those for whom there is no token within that time.
        """
        passed_s = max(0.0, now_s - self._filled_s)
        self._filled_s = now_s
        self._tokens = min(self.CAPACITY, self._tokens + passed_s * self.PER_S) - 1.0
        if self._tokens < -max_wait_s * self.PER_S:
            self._tokens = -max_wait_s * self.PER_S
            return rng.uniform(max_wait_s / 2, max_wait_s)
        return max(0.0, -self._tokens / self.PER_S)
