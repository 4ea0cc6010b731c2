from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from concurrent_dataloader.stores.retries import RetryBudget


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
            wait_s = budget.take(now_s, max_wait_s)
            assert 0 <= wait_s <= max_wait_s
            at_once += wait_s == 0

    assert at_once <= 64 + 10 * now_s + 0.5 * num_successes + 1e-6


def test_many_that_fail_together_come_back_ten_a_second() -> None:
    budget = RetryBudget(0.0)

    waits_s = [budget.take(0.0, 5.0) for _ in range(100)]

    assert waits_s[:64] == [0.0] * 64
    assert waits_s[64:67] == [0.1, 0.2, 0.3]
    assert waits_s[99] == 3.6


def test_a_store_that_answers_again_is_asked_again_at_once() -> None:
    budget = RetryBudget(0.0)
    for _ in range(200):
        budget.take(0.0, 5.0)

    for _ in range(110):
        budget.succeed()

    assert budget.take(0.0, 5.0) == 0.0
