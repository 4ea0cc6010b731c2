"""What the server does to a request beyond answering it: latency, faults, limits."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import re
from collections.abc import Sequence
from typing import Literal, get_args

FaultKind = Literal[
    "internal_error",
    "slow_down",
    "service_unavailable",
    "expired_token",
    "reset_before_headers",
    "reset_before_body",
    "reset_inside_body",
    "truncated_body",
    "stalled_body",
    "stalled_headers",
    "empty_body",
    "foreign_body",
]
"""What can go wrong, as `Fault` says."""

OutageKind = Literal["refused", "reset", "unavailable"]
"""How a server is down: connections are refused; each request is answered by a connection reset, or
by 503 ServiceUnavailable."""


@dataclasses.dataclass(frozen=True, slots=True)
class Latency:
    """How long a request waits before its answer begins.

    Constant by default; lognormal with a ``sigma``; uniform in ``median_s`` plus or minus
    ``spread_s`` with a ``spread_s``.
    """

    median_s: float = 0.0
    sigma: float = 0.0
    spread_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("median_s", "sigma", "spread_s"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: got {value!r}, expected 0 or more")
        if self.sigma and self.spread_s:
            raise ValueError("sigma, spread_s: got both, expected one; lognormal or uniform")
        if self.spread_s > self.median_s:
            raise ValueError(
                f"spread_s: got {self.spread_s!r}, expected at most median_s, {self.median_s!r}"
            )

    def draw_s(self, rng: random.Random) -> float:
        """Draw the wait of one request, in seconds."""
        if self.sigma:
            return self.median_s * math.exp(rng.gauss(0.0, self.sigma))
        if self.spread_s:
            return rng.uniform(self.median_s - self.spread_s, self.median_s + self.spread_s)
        return self.median_s


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One way to go wrong, and which requests it hits.

    The kinds: ``internal_error`` (500 InternalError), ``slow_down`` (503 SlowDown),
    ``service_unavailable`` (503 ServiceUnavailable), ``expired_token`` (400 ExpiredToken);
    ``reset_before_headers`` (a connection reset, and nothing before it), ``reset_before_body``
    (headers, then a reset), ``reset_inside_body`` (half of the body, then a reset),
    ``truncated_body`` (half of the body, then an orderly close), ``stalled_body`` (half of the
    body, then silence), ``stalled_headers`` (silence from the beginning), ``empty_body`` (the right
    status and no bytes), ``foreign_body`` (the headers of the object that was asked for, with the
    bytes of another one of its bucket).
    """

    kind: FaultKind
    rate: float = 1.0
    """Share of the requests that it hits, drawn with the server's seed."""

    key_pattern: str = ""
    """Hits only keys in which this regular expression is found."""

    methods: tuple[str, ...] = ("GET",)
    """Hits only these HTTP methods."""

    hits_listings: bool = False
    """Hits requests that name a bucket alone, in place of those that name an object; the pattern is
    then looked for in the prefix."""

    first_attempts: int | None = None
    """Hits only the first so many requests of each key (those that fit the pattern and the
    methods)."""

    max_count: int | None = None
    """Stops after so many hits in all."""

    stall_s: float | None = None
    """A stall ends after so many seconds, and the rest is sent; None: it lasts until the client
    leaves."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            kinds = ", ".join(map(repr, get_args(FaultKind)))
            raise ValueError(f"kind: got {self.kind!r}, expected one of {kinds}")
        if self.hits_listings and self.kind == "foreign_body":
            raise ValueError("hits_listings: got True for 'foreign_body', which only objects have")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate: got {self.rate!r}, expected 0 to 1")
        try:
            re.compile(self.key_pattern)
        except re.error as error:
            raise ValueError(
                f"key_pattern: got {self.key_pattern!r}, expected a regular expression; {error}"
            ) from error
        for name in ("first_attempts", "max_count", "stall_s"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: got {value!r}, expected None or 0 or more")


class FaultPlan:
    """Decides which request is hit by which fault; the first fault of the list that hits wins."""

    def __init__(self, faults: Sequence[Fault], rng: random.Random) -> None:
        self._rules = [(fault, re.compile(fault.key_pattern)) for fault in faults]
        self._rng = rng
        self._num_attempts: collections.Counter[tuple[int, str]] = collections.Counter()
        self._num_hits: collections.Counter[int] = collections.Counter()

    def pick(self, method: str, key: str, *, is_listing: bool = False) -> Fault | None:
        """Pick the fault that hits this request, if any does; counts it as an attempt."""
        for number, (fault, pattern) in enumerate(self._rules):
            if method not in fault.methods or fault.hits_listings != is_listing:
                continue
            if not pattern.search(key):
                continue
            self._num_attempts[number, key] += 1
            num_attempts = self._num_attempts[number, key]
            if fault.first_attempts is not None and num_attempts > fault.first_attempts:
                continue
            if fault.max_count is not None and self._num_hits[number] >= fault.max_count:
                continue
            if fault.rate < 1 and self._rng.random() >= fault.rate:
                continue
            self._num_hits[number] += 1
            return fault
        return None


class Pacer:
    """A rate that is never exceeded for long: says when the next bytes, or requests, may go."""

    def __init__(self, per_s: float, burst: float = 0.0) -> None:
        self._per_s = per_s
        self._burst_s = burst / per_s
        self._free_at_s = -math.inf

    def reserve(self, amount: float, now_s: float) -> float:
        """Take ``amount``, and give the time at which it has gone through."""
        start_s = max(self._free_at_s, now_s - self._burst_s)
        self._free_at_s = start_s + amount / self._per_s
        return max(self._free_at_s, now_s)

    def try_take(self, now_s: float) -> bool:
        """Take one if it may be used now; False, and nothing taken, if not."""
        start_s = max(self._free_at_s, now_s - self._burst_s)
        if start_s + 1 / self._per_s > now_s + 1e-9:
            return False
        self._free_at_s = start_s + 1 / self._per_s
        return True
