"""Whether and when a request is made again: the decision alone, over made-up failures and time."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrent_dataloader.errors import (
    AccessDeniedError,
    BodyMismatchError,
    ByteRangeError,
    DeadlineError,
    ExpiredCredentialsError,
    KeyNotFoundError,
    StoreError,
    StoreUnavailableError,
    ThrottledError,
)
from concurrent_dataloader.stores.retries import RetryPlan, RetryPolicy

UNAVAILABLE, THROTTLED = StoreUnavailableError, ThrottledError
FINAL = [KeyNotFoundError, AccessDeniedError, ByteRangeError, StoreError]
REPEATED = [UNAVAILABLE, BodyMismatchError, THROTTLED]


@dataclasses.dataclass(frozen=True)
class Failure:
    """How one attempt ends, and what others of the process say then."""

    kind: type[StoreError]
    lasts_s: float = 0.01
    is_silent: bool = False
    budget_s: float = 0.0
    retry_after_s: float = 0.0

    def make(self) -> StoreError:
        error = self.kind("scripted://key: not now")
        if isinstance(error, StoreUnavailableError):
            error.retry_after_s = self.retry_after_s
        return error


@dataclasses.dataclass
class Life:
    """What became of a request: each wait with the time at which it began, and the last error."""

    waits: list[tuple[Failure, float, float]]
    ended: StoreError | None
    num_attempts: int
    now_s: float


def live(
    failures: Iterable[Failure], policy: RetryPolicy, deadline_s: float, seed: int = 0
) -> Life:
    """Make a request by a plan, on a clock that nothing but attempts and waits moves."""
    plan, rng, now_s = RetryPlan(policy, deadline_s), random.Random(seed), 0.0
    life = Life([], None, 0, 0.0)
    for failure in failures:
        plan.begin()
        life.num_attempts += 1
        now_s += failure.lasts_s
        error = failure.make()
        try:
            is_bounded = plan.fail(error, now_s, is_silent=failure.is_silent)
            wait_s = plan.wait_s(error, now_s, failure.budget_s if is_bounded else 0.0, rng)
        except StoreError as last:
            life.ended = last
            break
        life.waits.append((failure, now_s, wait_s))
        now_s += wait_s
    life.now_s = now_s
    return life


def failures(*kinds: type[StoreError], max_lasts_s: float = 20.0) -> st.SearchStrategy[Failure]:
    return st.builds(
        Failure,
        kind=st.sampled_from(kinds),
        lasts_s=st.floats(0, max_lasts_s),
        is_silent=st.booleans(),
        budget_s=st.just(0.0) | st.floats(0, 10),
        retry_after_s=st.just(0.0) | st.floats(0, 60),
    )


@st.composite
def policies(draw: st.DrawFn, max_attempts: st.SearchStrategy[int | None]) -> RetryPolicy:
    first_wait_s = draw(st.floats(0, 5))
    return RetryPolicy(
        max_attempts=draw(max_attempts),
        first_wait_s=first_wait_s,
        max_wait_s=first_wait_s + draw(st.floats(0, 20)),
    )


any_policy = policies(st.none() | st.integers(1, 20))
any_failures = st.lists(
    failures(*REPEATED, ExpiredCredentialsError, max_lasts_s=2.0), min_size=1, max_size=60
)
deadlines_s = st.floats(0.001, 60)


@given(any_failures, any_policy, deadlines_s, st.integers())
def test_no_attempt_begins_after_the_deadline(
    failed: list[Failure], policy: RetryPolicy, deadline_s: float, seed: int
) -> None:
    life = live(failed, policy, deadline_s, seed)

    for _, now_s, wait_s in life.waits:
        assert wait_s >= 0
        assert now_s + wait_s <= deadline_s


@given(any_failures, policies(st.integers(1, 20)), deadlines_s)
def test_never_more_attempts_than_a_person_allows_and_one_for_new_credentials(
    failed: list[Failure], policy: RetryPolicy, deadline_s: float
) -> None:
    life = live(failed, policy, deadline_s)

    has_expired = any(failure.kind is ExpiredCredentialsError for failure, _, _ in life.waits)
    assert policy.max_attempts is not None
    assert life.num_attempts <= policy.max_attempts + has_expired


@given(
    st.lists(failures(*REPEATED, max_lasts_s=0.1), max_size=10),
    st.integers(1, 10),
    st.floats(0, 1),
)
def test_the_last_attempt_that_is_allowed_gives_up_with_its_own_error(
    failed: list[Failure], max_attempts: int, first_wait_s: float
) -> None:
    policy = RetryPolicy(max_attempts=max_attempts, first_wait_s=first_wait_s, max_wait_s=1.0)

    life = live(failed, policy, 1e6)

    if len(failed) < max_attempts:
        assert life.ended is None
    else:
        assert life.num_attempts == max_attempts
        assert type(life.ended) is failed[max_attempts - 1].kind
        assert "allow more attempts" in str(life.ended)


@given(
    st.lists(failures(*REPEATED, max_lasts_s=0.1), max_size=4),
    failures(*FINAL),
    any_policy,
    deadlines_s,
)
def test_what_may_not_be_repeated_goes_through_at_once(
    before: list[Failure], final: Failure, policy: RetryPolicy, deadline_s: float
) -> None:
    life = live([*before, final, Failure(UNAVAILABLE)], policy, deadline_s)

    if len(life.waits) == len(before):
        assert life.num_attempts == len(before) + 1
        assert type(life.ended) is final.kind
        assert str(life.ended) == "scripted://key: not now", "the same, not one made of it"
    else:
        assert life.num_attempts <= len(before), "it was given up before"


@given(any_failures, any_policy, deadlines_s, st.integers())
def test_a_wait_is_what_was_asked_for_and_else_within_its_bounds(
    failed: list[Failure], policy: RetryPolicy, deadline_s: float, seed: int
) -> None:
    life = live(failed, policy, deadline_s, seed)

    for number, (failure, now_s, wait_s) in enumerate(life.waits, 1):
        if failure.kind is ExpiredCredentialsError:
            assert wait_s == pytest.approx(1.2)
            continue
        bound_s = min(policy.max_wait_s, policy.first_wait_s * 2.0 ** (number - 1))
        if failure.kind is THROTTLED:
            bound_s = min(bound_s, 1.0)
        asked_s = max(failure.budget_s, failure.retry_after_s)
        assert wait_s <= max(bound_s, asked_s)
        is_cut = wait_s == (deadline_s - now_s) / 2
        assert wait_s >= asked_s or is_cut


@given(
    st.lists(failures(*REPEATED), max_size=60),
    policies(st.none()),
    deadlines_s,
)
def test_while_time_is_left_only_failures_that_tell_of_the_object_end_it(
    failed: list[Failure], policy: RetryPolicy, deadline_s: float
) -> None:
    life = live(failed, policy, deadline_s)

    tried = failed[: life.num_attempts]
    num_telling = sum(
        each.kind is BodyMismatchError or (each.kind is UNAVAILABLE and not each.is_silent)
        for each in tried
    )
    assert num_telling <= 6
    if num_telling == 6:
        assert "allow more attempts" in str(life.ended)
    elif life.ended is not None:
        assert type(life.ended) is DeadlineError
        assert deadline_s - life.now_s <= policy.first_wait_s, "time was left"


@given(st.integers(0, 200), st.integers(0, 200))
def test_neither_an_outage_nor_refusals_use_attempts_up(num_silent: int, num_busy: int) -> None:
    silent = [Failure(UNAVAILABLE, is_silent=True)] * num_silent
    busy = [Failure(THROTTLED)] * num_busy

    life = live([*silent, *busy, *[Failure(UNAVAILABLE)] * 9], RetryPolicy(), 1e6)

    assert life.num_attempts == num_silent + num_busy + 6
    assert type(life.ended) is UNAVAILABLE
    assert f"gave up after {life.num_attempts} attempts" in str(life.ended)


def test_credentials_that_have_expired_are_waited_for_once() -> None:
    expired = Failure(ExpiredCredentialsError)

    life = live([expired, expired, expired], RetryPolicy(), 60.0)

    assert life.num_attempts == 2
    assert type(life.ended) is ExpiredCredentialsError


def test_credentials_are_not_waited_for_beyond_the_deadline() -> None:
    life = live([Failure(ExpiredCredentialsError)], RetryPolicy(), 1.0)

    assert life.waits == []
    assert type(life.ended) is ExpiredCredentialsError, "which says what is wrong"


def test_a_request_of_which_nothing_failed_has_no_failure_to_tell() -> None:
    plan = RetryPlan(RetryPolicy(), 60.0)
    plan.begin()
    assert plan.failure == ""

    plan.fail(StoreUnavailableError("scripted://key: reset"), 0.1, is_silent=False)

    assert plan.failure == "scripted://key: reset"
