import random
import statistics

import pytest

from benchmarking.statistics import Estimate, estimate, paired_ratio


def test_the_interval_of_five_values_is_smallest_to_largest() -> None:
    figure = estimate([3.0, 1.0, 5.0, 2.0, 4.0])

    assert (figure.low, figure.median, figure.high) == (1.0, 3.0, 5.0)
    assert figure.coverage == pytest.approx(1 - 2 / 2**5)


def test_the_interval_of_eight_values_leaves_out_none_and_of_nine_one_on_each_side() -> None:
    # Two-sided 95 % intervals of the median, from the binomial table: n=8 -> (1, 8), n=9 -> (2, 8).
    eight = estimate([float(value) for value in range(1, 9)])
    nine = estimate([float(value) for value in range(1, 10)])

    assert (eight.low, eight.high) == (1.0, 8.0)
    assert (nine.low, nine.high) == (2.0, 8.0)
    assert nine.coverage >= 0.95


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        figure = estimate([rng.expovariate(1.0) for _ in range(9)])
        hits += figure.low <= 0.6931 <= figure.high

    assert hits / 2000 == pytest.approx(estimate([0.0] * 9).coverage, abs=0.015)


def test_a_single_value_is_its_own_interval_with_no_coverage() -> None:
    figure = estimate(7.0)

    assert (figure.low, figure.median, figure.high, figure.coverage) == (7.0, 7.0, 7.0, 0.0)


def test_the_paired_ratio_is_the_median_of_the_ratios_of_the_pairs() -> None:
    ours, theirs = [10.0, 40.0, 90.0], [10.0, 20.0, 30.0]

    ratio = paired_ratio(ours, theirs)

    assert ratio.values == (1.0, 2.0, 3.0)
    assert ratio.median == 2.0
    assert statistics.median(ours) / statistics.median(theirs) == 2.0


def test_a_machine_that_slows_down_halfway_leaves_the_paired_ratio_alone() -> None:
    speeds = [1.0, 0.9, 0.5, 0.4, 0.3]

    ratio = paired_ratio([1.5 * speed for speed in speeds], speeds)

    assert ratio.low == pytest.approx(1.5)
    assert ratio.high == pytest.approx(1.5)


def test_nothing_measured_is_an_error_and_no_figure() -> None:
    with pytest.raises(ValueError, match="got none"):
        Estimate(())


def test_sides_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 values, expected 2"):
        paired_ratio([1.0, 2.0], [1.0])


def test_a_ratio_to_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        paired_ratio([1.0], [0.0])
