"""Medians, their intervals, and ratios of pairs.

Nothing here assumes a distribution: timings have long tails, and there are few of them.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

_WANTED_COVERAGE = 0.95


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """Values of one figure that were measured again and again, and what they say of its median.

    The interval is the narrowest symmetric pair of order statistics that covers the median with
    95 %. With five values or fewer none does; then it is smallest to largest, and `coverage` tells
    how good that is.

    Source: H. A. David and H. N. Nagaraja, "Order Statistics", 3rd edition, section 7.1.
    """

    values: tuple[float, ...]
    """In the order in which they were measured."""

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values: got none, expected at least one; was nothing measured?")

    @property
    def median(self) -> float:
        """The middle value, or the mean of the two in the middle."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """Lower end of the interval of the median."""
        return sorted(self.values)[self._num_outside]

    @property
    def high(self) -> float:
        """Upper end of the interval of the median."""
        return sorted(self.values)[len(self.values) - 1 - self._num_outside]

    @property
    def coverage(self) -> float:
        """How often an interval made like this one holds the true median; 0 for a single value."""
        return _coverage(len(self.values), self._num_outside)

    @property
    def _num_outside(self) -> int:
        """Values left out on each side."""
        num_values = len(self.values)
        num_outside = 0
        while (
            num_outside + 1 <= (num_values - 1) // 2
            and _coverage(num_values, num_outside + 1) >= _WANTED_COVERAGE
        ):
            num_outside += 1
        return num_outside


def _coverage(num_values: int, num_outside: int) -> float:
    """Compute how likely the median lies between the values ``num_outside`` from either end.

    It is missed when ``num_outside`` values or fewer fall on one side of it, each with one half.
    """
    missed = sum(math.comb(num_values, below) for below in range(num_outside + 1)) / 2.0**num_values
    return max(0.0, 1.0 - 2.0 * missed)


def estimate(values: Sequence[float] | float) -> Estimate:
    """Wrap what was measured: several values, or a single one."""
    if isinstance(values, int | float):
        return Estimate((float(values),))
    return Estimate(tuple(float(value) for value in values))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Divide pair by pair, so that what slows the machine for a while slows both sides of a pair.

    Args:
        ours: One value a pair, the numerators.
        theirs: The values measured next to them, the denominators.

    Returns:
        The estimate of the ratio; its median is no ratio of medians.

    Raises:
        ValueError: The sides differ in length, or a denominator is not above zero.
    """
    if len(ours) != len(theirs):
        raise ValueError(
            f"theirs: got {len(theirs)} values, expected {len(ours)}, one for each of ours"
        )
    for value in theirs:
        if value <= 0:
            raise ValueError(f"theirs: got {value!r}, expected values above 0 to divide by")
    return estimate([mine / other for mine, other in zip(ours, theirs, strict=True)])
