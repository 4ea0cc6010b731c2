from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrent_dataloader.stores.retries import RetryBudget, RetryPolicy, draw_wait_s

RNG = random.Random(0)


@given(
    events=st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=300),
    max_wait_s=st.floats(0.1, 10),
)
def test_retries_are_bounded_by_time_and_by_successes(
    events: list[tuple[float, bool]], max_wait_s: float
) -> None:
    budget, now_s = RetryBudget(0.0), 0.0
    at_once, num_successes = 0, 0

    for passed_s, succeeds in events:
        now_s += passed_s
        if succeeds:
            budget.succeed()
            num_successes += 1
        else:
            wait_s = budget.take(now_s, max_wait_s, RNG)
            assert 0 <= wait_s <= max_wait_s
            at_once += wait_s == 0

    assert at_once <= 64 + 10 * now_s + 0.5 * num_successes + 1e-6


def test_many_that_fail_together_come_back_ten_a_second() -> None:
    budget = RetryBudget(0.0)

    waits_s = [budget.take(0.0, 5.0, RNG) for _ in range(100)]

    assert waits_s[:64] == [0.0] * 64
    assert waits_s[64:67] == [0.1, 0.2, 0.3]
    assert waits_s[99] == 3.6


def test_a_store_that_answers_again_is_asked_again_at_once() -> None:
    budget = RetryBudget(0.0)
    for _ in range(200):
        budget.take(0.0, 5.0, RNG)

    for _ in range(110):
        budget.succeed()

    assert budget.take(0.0, 5.0, RNG) == 0.0


def test_those_for_whom_there_is_no_token_wait_for_times_of_their_own() -> None:
    budget = RetryBudget(0.0)

    waits_s = [budget.take(0.0, 5.0, RNG) for _ in range(256)][64 + 50 :]

    assert all(2.5 <= wait_s <= 5.0 for wait_s in waits_s)
    for tenth in range(25, 50):
        together = [wait_s for wait_s in waits_s if tenth <= wait_s * 10 < tenth + 1]
        assert len(together) < 20, "142 in 25 tenths of a second"


@pytest.mark.parametrize("num_failed", [1, 4, 20])
def test_a_wait_is_anything_up_to_its_bound(num_failed: int) -> None:
    bound_s = {1: 0.1, 4: 0.8, 20: 5.0}[num_failed]

    waits_s = [draw_wait_s(num_failed, RetryPolicy(), RNG) for _ in range(1000)]

    for tenth in range(10):  # full jitter: uniform, so that a hundred are in each tenth
        low_s, high_s = bound_s * tenth / 10, bound_s * (tenth + 1) / 10
        assert 60 < sum(low_s <= wait_s <= high_s for wait_s in waits_s) < 140
