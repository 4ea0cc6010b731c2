from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrent_dataloader.stores.hedging import HedgePlan, HedgePolicy, LatencyWindow


@given(st.lists(st.floats(0, 100), min_size=1, max_size=600), st.floats(0.01, 0.99))
def test_the_percentile_is_that_of_the_latest_latencies(
    latencies_s: list[float], percentile: float
) -> None:
    window = LatencyWindow(percentile)

    for latency_s in latencies_s:
        window.add(latency_s)

    num_renewed = len(latencies_s) // 16 * 16
    if not num_renewed:
        assert window.value_s is None
    else:
        seen = latencies_s[max(0, num_renewed - 256) : num_renewed]
        assert window.value_s is not None
        assert sum(each <= window.value_s for each in seen) >= percentile * len(seen)
        assert sum(each < window.value_s for each in seen) < percentile * len(seen)


@given(
    events=st.lists(st.booleans(), max_size=2000), share=st.sampled_from([0.0, 0.005, 0.02, 0.3])
)
def test_hedges_never_exceed_their_share(events: list[bool], share: float) -> None:
    plan = HedgePlan(HedgePolicy(max_extra_share=share))
    num_begun = num_hedges = 0

    for is_begun in events:
        if is_begun:
            plan.begin()
            num_begun += 1
        else:
            num_hedges += plan.try_take()

        assert num_hedges <= num_begun * share + 1e-6


def test_with_one_stall_in_a_hundred_stalls_are_late_and_the_rest_is_not() -> None:
    rng = random.Random(3)
    plan = HedgePlan(HedgePolicy())
    num_late = num_false = 0

    for _ in range(10_000):
        plan.begin()
        latency_s = 0.03 * math.exp(rng.gauss(0, 0.3))
        late_after_s = plan.late_after_s(0)
        if rng.random() < 0.01:
            latency_s += 2.0
            num_late += late_after_s is not None and late_after_s < 0.2
        else:
            num_false += late_after_s is not None and latency_s > late_after_s
        plan.end(0, latency_s)

    assert num_late > 90
    assert num_false < 50


def test_large_ranges_are_not_compared_with_small_ones() -> None:
    plan = HedgePlan(HedgePolicy())
    small, large = plan.size_class(100_000), plan.size_class(64 * 2**20)

    for _ in range(32):
        plan.end(small, 0.03)
        plan.end(large, 2.0)

    late_small_s, late_large_s = plan.late_after_s(small), plan.late_after_s(large)
    assert late_small_s == pytest.approx(0.045)
    assert late_large_s == pytest.approx(3.0)
    assert plan.late_after_s(plan.size_class(None)) is None


@pytest.mark.parametrize(
    ("size_bytes", "others"),
    [(0, [1, 2**18]), (2**18 + 1, [2**20]), (2**20 + 1, [2**22]), (2**30 + 1, [2**32])],
)
def test_size_classes_are_powers_of_four(size_bytes: int, others: list[int]) -> None:
    classes = {HedgePlan.size_class(size) for size in [size_bytes, *others]}

    assert len(classes) == 1
    assert HedgePlan.size_class(others[-1] + 1) == HedgePlan.size_class(size_bytes) + 1


def test_nothing_is_late_before_enough_was_seen() -> None:
    plan = HedgePlan(HedgePolicy())

    for _ in range(15):
        plan.end(0, 0.03)

    assert plan.late_after_s(0) is None
    plan.end(0, 0.03)
    assert plan.late_after_s(0) == pytest.approx(statistics.mean([0.03]) * 1.5)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"percentile": 1.0}, "percentile: got 1.0"),
        ({"factor": 0.5}, "factor: got 0.5"),
        ({"max_extra_share": 1.5}, "max_extra_share: got 1.5"),
        ({"max_hedges": -1}, "max_hedges: got -1"),
    ],
)
def test_a_policy_checks_itself(settings: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        HedgePolicy(**settings)  # pyright: ignore[reportArgumentType]: from a table


def test_a_store_that_is_never_late_is_no_longer_watched() -> None:
    plan = HedgePlan(HedgePolicy())

    for _ in range(399):
        plan.end(0, 0.03)
        assert plan.is_awake
    plan.end(0, 0.03)

    assert not plan.is_awake


def test_one_late_answer_is_chance_and_two_are_watched_for_a_thousand() -> None:
    plan = HedgePlan(HedgePolicy())
    for _ in range(600):
        plan.end(0, 0.03)

    plan.end(0, 2.0)
    assert not plan.is_awake
    for _ in range(300):
        plan.end(0, 0.03)
    plan.end(0, 2.0)
    assert plan.is_awake
    for _ in range(600):
        plan.end(0, 0.03)
    assert plan.is_awake
    for _ in range(400):
        plan.end(0, 0.03)
    assert not plan.is_awake


def test_with_one_stall_in_a_hundred_it_stays_awake() -> None:
    rng = random.Random(4)
    plan = HedgePlan(HedgePolicy())
    num_asleep = 0

    for _ in range(20_000):
        plan.end(0, 2.0 if rng.random() < 0.01 else 0.03 * math.exp(rng.gauss(0, 0.3)))
        num_asleep += not plan.is_awake

    assert num_asleep < 200
