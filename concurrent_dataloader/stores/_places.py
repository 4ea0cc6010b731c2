"""A place among the requests under way, and the line of those that wait for one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from functools import partial

from concurrent_dataloader.errors import StoreError, StoreUnavailableError, ThrottledError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import in_flight
from concurrent_dataloader.stores._flow import Flow
from concurrent_dataloader.stores.in_flight import Gate, Outcome
from concurrent_dataloader.stores.retries import RetryPlan


@dataclasses.dataclass(slots=True)
class Request:
    """One call of a user's, with all its attempts."""

    key: str
    byte_range: ByteRange | None
    begun_s: float
    until_s: float
    """When its time is up."""

    size_class: int
    plan: RetryPlan


class Place:
    """A place among the requests under way, for one attempt."""

    def __init__(self, flow: Flow, gate: Gate | None, request: Request, begun_s: float) -> None:
        self._flow = flow
        self._gate = gate
        self._request = request
        self.begun_s = begun_s
        self._outcome: Outcome | None = None

    def begin(self) -> None:
        """Count the attempt."""
        self._request.plan.begin()
        self._flow.begin()

    def succeed(self) -> None:
        """Note that the answer came."""
        self._outcome = "answered"

    def fail(self, error: StoreError) -> StoreError:
        """Note how the attempt failed."""
        if not isinstance(error, StoreUnavailableError):
            self._outcome = "answered"  # the store is there, and says no
        else:
            self._outcome = "throttled" if isinstance(error, ThrottledError) else "failed"
        return error

    @property
    def age_s(self) -> float:
        """Seconds since the attempt began."""
        return self._flow.clock() - self.begun_s

    @property
    def max_hedges(self) -> int:
        """How often the request may be made again."""
        return self._flow.max_hedges

    def late_after_s(self) -> float | None:
        """Give the age at which it is late; None while nobody knows."""
        return self._flow.late_after_s(self._request.size_class)

    def try_hedge(self) -> bool:
        """Take the right to make it again."""
        return self._flow.try_hedge()

    def win_by_hedge(self) -> None:
        """Note that a hedge was answered first."""
        self._flow.win_by_hedge()

    def leave(self) -> None:
        """Make room for the next."""
        now_s = self._flow.clock()
        if self._outcome is not None:
            request = self._request
            self._flow.end(request.key, request.size_class, self.begun_s, now_s, self._outcome)
        if self._gate is not None:
            self._gate.leave(self.begun_s, now_s, self._outcome)


def enter(flow: Flow, request: Request) -> Place:
    """Take a place for the next attempt; waits while all are taken.

    Raises:
        TimeoutError: The request's time was up before.
    """
    gate = _find_gate(flow)
    if gate is not None:
        woken = threading.Lock()
        woken.acquire()
        number = gate.enter(request.begun_s, woken.release)
        if number is not None and not woken.acquire(timeout=_left_s(flow, request)):
            if not gate.give_up(number):
                gate.leave(request.begun_s, flow.clock(), None)
            raise TimeoutError
    return Place(flow, gate, request, flow.clock())


async def enter_async(flow: Flow, request: Request) -> Place:
    """Take a place as `enter` does, without blocking the event loop."""
    gate = _find_gate(flow)
    if gate is not None:
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        number = gate.enter(request.begun_s, partial(_wake, loop, woken, gate))
        if number is not None:
            await _stand_in_line(flow, gate, number, woken, request)
    return Place(flow, gate, request, flow.clock())


async def _stand_in_line(
    flow: Flow, gate: Gate, number: int, woken: asyncio.Future[None], request: Request
) -> None:
    try:
        async with asyncio.timeout(_left_s(flow, request)):
            await woken
    except BaseException:
        if not gate.give_up(number):
            gate.leave(request.begun_s, flow.clock(), None)
        raise


def _left_s(flow: Flow, request: Request) -> float:
    return max(0.0, request.until_s - flow.clock())


def _find_gate(flow: Flow) -> Gate | None:
    callers = in_flight.callers.get()
    if callers is None or flow.gate is None:
        return flow.gate
    if callers.is_fixed:
        return None
    callers.meet(flow.gate)
    return flow.gate


def resting() -> contextlib.AbstractContextManager[None]:
    """Count the caller out while it waits to ask again."""
    callers = in_flight.callers.get()
    return contextlib.nullcontext() if callers is None else callers.resting()


def _wake(loop: asyncio.AbstractEventLoop, woken: asyncio.Future[None], gate: Gate) -> None:
    try:
        loop.call_soon_threadsafe(_settle, woken)
    except RuntimeError:  # the loop was closed, and whoever waited there with it
        gate.leave(0.0, 0.0, None)


def _settle(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
