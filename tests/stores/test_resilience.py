from __future__ import annotations

import asyncio
import bisect
import contextlib
import logging
import pickle
import random
import selectors
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from typing_extensions import Buffer

from concurrent_dataloader.errors import (
    BodyMismatchError,
    DeadlineError,
    KeyNotFoundError,
    StoreUnavailableError,
    ThrottledError,
)
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import (
    HedgePolicy,
    InFlightPolicy,
    ObjectInfo,
    ResilientStore,
    RetryPolicy,
    in_flight,
)
from concurrent_dataloader.stores._flow import Flow, log_counts
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.stores.resilience import ResilientWritableStore
from concurrent_dataloader.stores.retries import draw_wait_s

T = TypeVar("T")


class FakeClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.slept_s.append(duration_s)
        self.now_s += duration_s

    async def sleep_async(self, duration_s: float) -> None:
        self.sleep(duration_s)


class ScriptedStore:
    """Plays a list of answers: bytes, an error, or seconds to let pass before the next."""

    def __init__(self, answers: list[bytes | Exception | float], clock: FakeClock) -> None:
        self.answers = answers
        self.num_asked = 0
        self.num_closed = 0
        self._clock = clock

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        del key, byte_range
        self.num_asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, float):
            self._clock.now_s += answer
            answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, bytes), "one wait, then an answer"
        return answer

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        return self.get(key, byte_range)

    def head(self, key: str) -> ObjectInfo:
        return ObjectInfo(key, len(bytes(self.get(key))))

    def describe(self, key: str) -> str:
        return f"scripted://{key}"

    def close(self) -> None:
        self.num_closed += 1


def fail(words: str = "scripted://key: not now") -> StoreUnavailableError:
    return StoreUnavailableError(words)


def wrap(
    answers: list[bytes | Exception | float], policy: RetryPolicy, deadline_s: float = 60.0
) -> tuple[ResilientStore, ScriptedStore, FakeClock]:
    clock = FakeClock()
    scripted = ScriptedStore(answers, clock)
    store = ResilientStore(
        scripted,
        policy,
        deadline_s,
        clock=clock,
        sleep=clock.sleep,
        sleep_async=clock.sleep_async,
        rng=random.Random(0),
    )
    return store, scripted, clock


def read(store: ResilientStore, colour: str) -> bytes:
    if colour == "blocking":
        return bytes(store.get("key"))
    return bytes(asyncio.run(store.get_async("key")))


both_colours = pytest.mark.parametrize("colour", ["blocking", "awaited"])


@both_colours
def test_an_attempt_that_succeeds_is_the_only_one(colour: str) -> None:
    store, scripted, clock = wrap([b"body"], RetryPolicy())

    assert read(store, colour) == b"body"
    assert (scripted.num_asked, clock.slept_s) == (1, [])


@both_colours
def test_what_may_be_repeated_is_repeated_with_growing_waits(colour: str) -> None:
    policy = RetryPolicy(max_attempts=4, first_wait_s=1.0, max_wait_s=2.0)
    store, scripted, clock = wrap([fail(), fail(), fail(), b"body"], policy)

    assert read(store, colour) == b"body"
    assert scripted.num_asked == 4
    assert all(0 <= got <= bound for got, bound in zip(clock.slept_s, [1, 2, 2], strict=True))


@both_colours
def test_the_last_error_says_attempts_and_time_and_keeps_its_type(colour: str) -> None:
    last = BodyMismatchError("scripted://key: got 3 bytes from http://host:1, expected 4")
    policy = RetryPolicy(max_attempts=2, first_wait_s=0.0)
    store, _, _ = wrap([fail(), 1.5, last], policy)

    with pytest.raises(BodyMismatchError) as raised:
        read(store, colour)

    assert str(raised.value).startswith(f"{last}; gave up after 2 attempts in 1.50 s")
    assert raised.value.__cause__ is last


@both_colours
def test_what_may_not_be_repeated_goes_through_at_once(colour: str) -> None:
    final = KeyNotFoundError("scripted://key: no such object")
    store, scripted, _ = wrap([final], RetryPolicy())

    with pytest.raises(KeyNotFoundError) as raised:
        read(store, colour)

    assert raised.value is final
    assert scripted.num_asked == 1


@both_colours
def test_no_attempt_begins_after_the_deadline(colour: str) -> None:
    policy = RetryPolicy(max_attempts=100, first_wait_s=0.0)
    store, scripted, _ = wrap([4.0, fail(), 4.0, fail(), 4.0, fail(), b"too late"], policy, 10.0)

    with pytest.raises(DeadlineError, match=r"3 attempts in 12\.00 s, allowed are 10 s"):
        read(store, colour)

    assert scripted.num_asked == 3


def test_one_attempt_means_no_repetition() -> None:
    store, scripted, _ = wrap([fail(), b"body"], RetryPolicy(max_attempts=1))

    with pytest.raises(StoreUnavailableError, match="1 attempt in"):
        store.get("key")

    assert scripted.num_asked == 1


def test_head_is_repeated_too() -> None:
    store, _, _ = wrap([fail(), b"body"], RetryPolicy())

    assert store.head("key").size_bytes == 4


class StallingStore(ScriptedStore):
    """Never answers; tells when it was cancelled."""

    was_cancelled = False

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        self.num_asked += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        raise AssertionError


def test_an_awaited_read_is_cut_at_the_deadline() -> None:
    stalling = StallingStore([], FakeClock())
    store = ResilientStore(stalling, RetryPolicy(), 0.05)

    with pytest.raises(DeadlineError, match=r"scripted://key: no answer in 0\.\d\d s"):
        asyncio.run(store.get_async("key"))

    assert stalling.was_cancelled
    assert stalling.num_asked == 1


def test_an_attempt_that_is_cut_says_how_the_one_before_failed() -> None:
    class ThenStalling(StallingStore):
        async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
            if self.num_asked == 0:
                self.num_asked += 1
                raise ThrottledError("scripted://key: status 503")
            return await super().get_async(key, byte_range)

    store = ResilientStore(ThenStalling([], FakeClock()), RetryPolicy(first_wait_s=0.01), 0.1)

    said = (
        r"no answer in 0\.\d\d s; the attempt before: scripted://key: status 503; gave up after 2"
    )
    with pytest.raises(DeadlineError, match=said):
        asyncio.run(store.get_async("key"))


def test_a_cancelled_read_ends_at_once_and_is_not_repeated() -> None:
    stalling = StallingStore([], FakeClock())
    store = ResilientStore(stalling, RetryPolicy(), 60.0)

    async def cancel() -> None:
        task = asyncio.create_task(store.get_async("key"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())

    assert stalling.was_cancelled
    assert stalling.num_asked == 1


class BreakingStore(MemoryStore):
    """Breaks each listing after two objects."""

    num_listings = 0

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        self.num_listings += 1
        for number, info in enumerate(super().list(prefix, start_after=start_after)):
            if number == 2:
                raise fail()
            yield info


def test_a_listing_that_breaks_goes_on_after_the_last_key() -> None:
    inner = BreakingStore(dict.fromkeys("abcdefg", b""))
    clock = FakeClock()
    store = ResilientWritableStore(
        inner, RetryPolicy(max_attempts=2), 60.0, clock=clock, sleep=clock.sleep
    )

    assert [info.key for info in store.list()] == list("abcdefg")
    assert inner.num_listings == 4


def test_closing_closes_the_store_inside() -> None:
    store, scripted, _ = wrap([], RetryPolicy())

    store.close()

    assert scripted.num_closed == 1


def test_it_pickles_with_its_settings() -> None:
    store = ResilientStore(MemoryStore({"a": b"x"}), RetryPolicy(max_attempts=7), 5.0)

    twin = pickle.loads(pickle.dumps(store))

    assert twin == store
    assert bytes(twin.get("a")) == b"x"


@given(
    num_failed=st.integers(1, 10_000),
    first_wait_s=st.floats(0, 10),
    more_s=st.floats(0, 100),
    seed=st.integers(),
)
def test_a_wait_is_within_its_bounds(
    num_failed: int, first_wait_s: float, more_s: float, seed: int
) -> None:
    policy = RetryPolicy(first_wait_s=first_wait_s, max_wait_s=first_wait_s + more_s)

    wait_s = draw_wait_s(num_failed, policy, random.Random(seed))

    assert 0 <= wait_s <= policy.max_wait_s
    if num_failed == 1:
        assert wait_s <= first_wait_s


def test_waits_do_not_touch_the_global_generator() -> None:
    random.seed(7)
    before = random.getstate()
    store, _, _ = wrap([fail(), b"body"], RetryPolicy())

    store.get("key")
    ResilientStore(ScriptedStore([fail(), b""], FakeClock()), RetryPolicy(first_wait_s=0), 9).get(
        ""
    )

    assert random.getstate() == before


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_attempts": 0}, "max_attempts: got 0, expected 1 or more"),
        ({"first_wait_s": -1.0}, "first_wait_s: got -1.0 s"),
        ({"first_wait_s": 9.0, "max_wait_s": 1.0}, "first_wait_s: got 9.0 s"),
    ],
)
def test_a_policy_checks_itself(settings: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RetryPolicy(**settings)  # pyright: ignore[reportArgumentType]: from a table


def test_a_deadline_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="deadline_s: got 0"):
        ResilientStore(MemoryStore(), RetryPolicy(), 0)
    with pytest.raises(ValueError, match="num_failed: got 0"):
        draw_wait_s(0, RetryPolicy(), random.Random(0))


# -- an outage, and an object that cannot be had


@both_colours
def test_an_outage_is_waited_out_once_the_store_has_answered(colour: str) -> None:
    store, scripted, clock = wrap([b"before", *[fail()] * 12, b"after"], RetryPolicy(), 120.0)

    assert read(store, colour) == b"before"
    clock.now_s += 1.0
    assert read(store, colour) == b"after"

    assert scripted.num_asked == 14


@both_colours
def test_an_endpoint_that_never_answered_is_given_up_soon(colour: str) -> None:
    store, scripted, clock = wrap([fail()] * 100, RetryPolicy(), 120.0)

    with pytest.raises(StoreUnavailableError, match="gave up after 6 attempts"):
        read(store, colour)

    assert scripted.num_asked == 6
    assert clock.now_s <= 3.1


@both_colours
def test_a_body_that_stays_wrong_is_no_outage(colour: str) -> None:
    wrong = BodyMismatchError("scripted://key: got 3 bytes, expected 4")
    store, scripted, clock = wrap([b"before", *[wrong] * 100], RetryPolicy(), 120.0)
    read(store, colour)
    clock.now_s += 1.0

    with pytest.raises(BodyMismatchError, match="gave up after 6 attempts"):
        read(store, colour)

    assert scripted.num_asked == 7


def test_what_fails_while_others_are_answered_is_no_outage() -> None:
    class OneBad(ScriptedStore):
        def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
            self.num_asked += 1
            if key == "bad":
                if not self.is_nested:
                    self.is_nested = True
                    store.get("good")  # another thread's, as it were, in the time of this attempt
                    self.is_nested = False
                raise fail("scripted://bad: status 500")
            clock.now_s += 0.01
            return b"good"

        is_nested = False

    clock = FakeClock()
    inner = OneBad([], clock)
    store = ResilientStore(
        inner, RetryPolicy(), 120.0, clock=clock, sleep=clock.sleep, rng=random.Random(0)
    )

    with pytest.raises(StoreUnavailableError, match="gave up after 6 attempts"):
        store.get("bad")


class MadeUpTime(selectors.DefaultSelector):
    """Has an event loop's time pass at once whenever all of its tasks wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            assert timeout is not None, "nobody would ever wake"
            self.now_s += timeout
        return events


class DyingStore(ScriptedStore):
    """Answers once, and refuses each connection from then on; notes when it was asked."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__([], FakeClock())
        self.asked_s: list[float] = []
        self._time = clock

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        self.asked_s.append(self._time())
        await asyncio.sleep(0.01)
        if len(self.asked_s) == 1:
            return b"body"
        raise fail(f"scripted://{key}: refused")


def ask_a_dead_store(num_requests: int, seed: int, duration_s: float) -> list[float]:
    """Give the times at which so many that wait for a store that died ask it."""
    time = MadeUpTime()
    loop = asyncio.SelectorEventLoop(time)
    loop.time = time.clock
    dying = DyingStore(time.clock)
    store = ResilientStore(
        dying, RetryPolicy(), 2 * duration_s, clock=time.clock, rng=random.Random(seed)
    )

    async def ask() -> None:
        await store.get_async("first")
        tasks = [asyncio.create_task(store.get_async(str(n))) for n in range(num_requests)]
        done, waiting = await asyncio.wait(tasks, timeout=duration_s)
        assert not done, "an outage is waited for"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    loop.run_until_complete(ask())
    loop.close()
    return dying.asked_s[1:]


@settings(max_examples=10, deadline=None, phases=[Phase.generate])  # to shrink it takes minutes
@given(num_requests=st.integers(1, 256), seed=st.integers(0, 2**32))
def test_a_dead_store_is_asked_at_a_bounded_rate_by_any_number(
    num_requests: int, seed: int
) -> None:
    asked_s = ask_a_dead_store(num_requests, seed, 60.0)

    num_soon = sum(at_s < 2.0 for at_s in asked_s)
    assert num_soon <= num_requests + 64 + 10 * 2 + 2, "once each, the budget, signs of life"
    later_s = [at_s for at_s in asked_s if at_s >= 2.0]
    for begin, at_s in enumerate(later_s):
        in_a_second = bisect.bisect_left(later_s, at_s + 1.0) - begin
        assert in_a_second <= 12 + num_requests / 2


class KeyedStore(ScriptedStore):
    """Fails for keys that begin with "bad", and for all while it is away."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__([], clock)
        self.is_away = False
        self.asked: list[tuple[str, ByteRange | None]] = []
        self._time = clock

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        self.asked.append((key, byte_range))
        self._time.now_s += 0.01
        if self.is_away or key.startswith("bad"):
            raise fail(f"scripted://{key}: status 500")
        return b"good"


def wrap_keyed(deadline_s: float = 120.0) -> tuple[ResilientStore, KeyedStore, FakeClock]:
    clock = FakeClock()
    inner = KeyedStore(clock)
    store = ResilientStore(
        inner,
        RetryPolicy(),
        deadline_s,
        clock=clock,
        sleep=clock.sleep,
        sleep_async=clock.sleep_async,
        rng=random.Random(0),
    )
    return store, inner, clock


def read_key(store: ResilientStore, colour: str, key: str) -> bytes:
    if colour == "blocking":
        return bytes(store.get(key))
    return bytes(asyncio.run(store.get_async(key)))


@both_colours
def test_an_object_that_cannot_be_had_is_no_outage_while_nobody_else_asks(colour: str) -> None:
    store, inner, clock = wrap_keyed()
    read_key(store, colour, "good")
    begin_s = clock.now_s = 10.0

    with pytest.raises(StoreUnavailableError, match="status 500; gave up after 6 attempts"):
        read_key(store, colour, "bad")

    assert inner.asked[1:] == [("bad", None), ("good", ByteRange(0, 1))] * 6
    assert clock.now_s - begin_s < 4
    assert store.counts().num_requests == 13


def test_who_asks_for_a_size_asks_for_a_sign_of_life_too() -> None:
    store, inner, clock = wrap_keyed()
    store.get("good")
    clock.now_s = 10.0

    with pytest.raises(StoreUnavailableError, match="gave up after 6 attempts"):
        store.head("bad")

    assert [key for key, _ in inner.asked].count("good") == 7


@both_colours
def test_a_store_that_is_away_is_asked_for_a_sign_of_life_now_and_then(colour: str) -> None:
    store, inner, clock = wrap_keyed(60.0)
    read_key(store, colour, "good")
    read_key(store, colour, "better")
    inner.is_away = True
    begin_s = clock.now_s = 10.0

    with pytest.raises(DeadlineError, match="status 500; gave up after"):
        read_key(store, colour, "best")

    assert clock.now_s - begin_s > 50, "an outage is waited for"
    num_signs = sum(byte_range is not None for _, byte_range in inner.asked)
    num_attempts = sum(key == "best" for key, _ in inner.asked)
    assert 5 < num_signs <= min(60, num_attempts)


def test_the_object_that_fails_is_no_sign_of_life_of_its_own() -> None:
    store, inner, clock = wrap_keyed(20.0)
    store.get("only")
    inner.is_away = True
    clock.now_s = 10.0

    with pytest.raises(DeadlineError):
        store.get("only")

    assert {byte_range for _, byte_range in inner.asked} == {None}


def test_one_at_a_time_asks_for_a_sign_of_life_and_seldom_in_vain() -> None:
    flow = Flow("store", None, None, FakeClock())
    assert flow.try_sign_of_life("bad", 0.0) is None, "nothing was answered yet"
    for at_s, key in enumerate(["a", "b", "b"]):
        flow.end(key, -1, at_s, at_s, "answered")

    assert flow.try_sign_of_life("b", 10.0) == "a"
    assert flow.try_sign_of_life("bad", 10.0) is None, "somebody asks"
    flow.end_sign_of_life()
    assert flow.try_sign_of_life("bad", 10.9) is None, "it was in vain"
    assert flow.try_sign_of_life("bad", 11.0) == "b"
    flow.end("b", -1, 11.0, 11.1, "answered")
    flow.end_sign_of_life()
    assert flow.try_sign_of_life("bad", 11.2) == "b", "it was not in vain"


@both_colours
def test_a_store_that_throttles_is_asked_until_the_deadline(colour: str) -> None:
    busy = ThrottledError("scripted://key: status 503")
    store, _, clock = wrap([busy] * 1000, RetryPolicy(), 20.0)

    with pytest.raises(DeadlineError, match="status 503; gave up after"):
        read(store, colour)

    assert max(clock.slept_s) <= 1.0
    assert clock.now_s > 15


@both_colours
def test_what_the_store_asks_for_is_waited(colour: str) -> None:
    busy = ThrottledError("scripted://key: status 429")
    busy.retry_after_s = 7.0
    store, _, clock = wrap([busy, b"body"], RetryPolicy())

    read(store, colour)

    assert clock.slept_s == [7.0]


def test_a_long_silence_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    store, _, clock = wrap([b"before", *[fail()] * 20, b"after"], RetryPolicy(), 200.0)
    store.get("key")
    clock.now_s += 1.0

    store.get("key")

    (record,) = [record for record in caplog.records if "nothing was answered" in record.message]
    assert "scripted://key: not now; nothing was answered for 5 s" in record.message
    assert "each until it is 200 s old" in record.message


@both_colours
def test_the_time_that_is_allowed_is_used(colour: str) -> None:
    policy = RetryPolicy(first_wait_s=0.1, max_wait_s=100.0)
    store, _, clock = wrap([ThrottledError("scripted://key: 503")] * 1000, policy, 10.0)

    with pytest.raises(DeadlineError, match="allowed are 10 s"):
        read(store, colour)

    assert 9.8 < clock.now_s < 10.0


# -- in threads


def in_thread(call: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class OneStalls:
    """Answers at once, but for the first read of ``slow``, which stalls until the end."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.is_over = threading.Event()
        self._is_first = True

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        del byte_range
        self.num_asked += 1
        if key == "slow" and self._is_first:
            self._is_first = False
            self.is_over.wait(30)
        return key.encode()

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        del byte_range
        self.num_asked += 1
        if key == "slow" and self._is_first:
            self._is_first = False
            await asyncio.sleep(30)
        return key.encode()

    def head(self, key: str) -> ObjectInfo:
        return ObjectInfo(key, len(key))

    def describe(self, key: str) -> str:
        return f"stalling://{key}"

    def close(self) -> None:
        self.is_over.set()


def test_a_read_that_stalls_in_a_thread_is_made_again() -> None:
    inner = OneStalls()
    store = ResilientStore(inner, RetryPolicy(), 20.0, HedgePolicy(max_extra_share=0.5))

    def read_all() -> bytes:
        for _ in range(32):
            store.get("fast")
        return bytes(store.get("slow"))

    with contextlib.closing(store):
        assert in_thread(read_all).result(timeout=15) == b"slow"
        counts = store.counts()

    assert (counts.num_hedges, counts.num_hedges_won) == (1, 1)
    assert counts.num_requests == inner.num_asked == 34


def test_an_awaited_read_that_stalls_is_made_again() -> None:
    store = ResilientStore(OneStalls(), RetryPolicy(), 20.0, HedgePolicy(max_extra_share=0.5))

    async def read_all() -> bytes:
        for _ in range(32):
            await store.get_async("fast")
        async with asyncio.timeout(15):
            return bytes(await store.get_async("slow"))

    assert asyncio.run(read_all()) == b"slow"
    assert store.counts().num_hedges_won == 1


@pytest.mark.parametrize(
    ("slow_bytes", "is_late"), [(ByteRange(0, 2**22), False), (ByteRange(0, 9), True)]
)
def test_a_read_is_late_by_what_others_of_its_size_took(
    slow_bytes: ByteRange, is_late: bool
) -> None:
    inner = OneStalls()
    store = ResilientStore(inner, RetryPolicy(), 20.0, HedgePolicy(max_extra_share=0.5))

    def read_all() -> bytes:
        for _ in range(32):
            store.get("fast", ByteRange(0, 10))
        if not is_late:
            threading.Timer(0.5, inner.is_over.set).start()
        return bytes(store.get("slow", slow_bytes))

    with contextlib.closing(store):
        assert in_thread(read_all).result(timeout=15) == b"slow"
        assert store.counts().num_hedges == is_late


def test_without_hedges_a_stall_is_waited_for() -> None:
    inner = OneStalls()
    store = ResilientStore(inner, RetryPolicy(), 20.0)

    reading = in_thread(lambda: bytes(store.get("slow")))
    with pytest.raises(TimeoutError):
        reading.result(timeout=0.3)
    inner.is_over.set()

    assert reading.result(timeout=15) == b"slow"
    assert store.counts().num_hedges == 0


def test_a_blocking_read_in_a_thread_is_cut_at_the_deadline() -> None:
    inner = OneStalls()
    store = ResilientStore(inner, RetryPolicy(), 0.2, HedgePolicy(max_hedges=0))

    with contextlib.closing(store), pytest.raises(DeadlineError, match=r"stalling://slow"):
        in_thread(lambda: store.get("slow")).result(timeout=15)


class Counted(OneStalls):
    """Counts how many read at once; each waits until so many do, or a moment."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._under_way = 0
        self.most = 0

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        with self._lock:
            self._under_way += 1
            self.most = max(self.most, self._under_way)
        self.is_over.wait(0.05)
        with self._lock:
            self._under_way -= 1
        return key.encode()


@pytest.mark.parametrize("is_fixed", [False, True])
def test_no_more_requests_at_once_than_the_limit_unless_the_caller_chose(is_fixed: bool) -> None:
    inner = Counted()
    limits = InFlightPolicy(start=3, maximum=3)
    store = ResilientStore(inner, RetryPolicy(), 20.0, None, limits)

    def read_one() -> bytes:
        in_flight.callers.set(in_flight.Callers(8, None if is_fixed else 8))
        return bytes(store.get("key"))

    reads = [in_thread(read_one) for _ in range(12)]
    for reading in reads:
        assert reading.result(timeout=15) == b"key"

    assert inner.most > 3 if is_fixed else inner.most <= 3


def test_who_waits_for_a_place_too_long_is_told_so() -> None:
    inner = OneStalls()
    store = ResilientStore(inner, RetryPolicy(), 0.3, None, InFlightPolicy(start=1, maximum=1))
    first = in_thread(lambda: store.get("slow"))
    while not inner.num_asked:
        threading.Event().wait(0.001)

    with pytest.raises(DeadlineError, match=r"waited 0\.3 s for others to be answered"):
        in_thread(lambda: store.get("fast")).result(timeout=15)

    inner.is_over.set()
    first.result(timeout=15)


def test_a_wait_for_a_place_that_is_cancelled_leaves_the_line() -> None:
    async def main() -> bytes:
        store = ResilientStore(
            OneStalls(), RetryPolicy(), 20.0, None, InFlightPolicy(start=1, maximum=1)
        )
        first = asyncio.create_task(store.get_async("slow"))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(store.get_async("fast"))
        await asyncio.sleep(0)
        waiting.cancel()
        first.cancel()
        await asyncio.gather(first, waiting, return_exceptions=True)
        async with asyncio.timeout(10):
            return bytes(await store.get_async("next"))

    assert asyncio.run(main()) == b"next"


def test_the_main_thread_reads_by_itself_so_that_it_may_fork() -> None:
    before = threading.active_count()
    store = ResilientStore(OneStalls(), RetryPolicy(), 20.0, HedgePolicy(), InFlightPolicy())

    store.get("fast")

    assert threading.active_count() == before


def test_what_was_asked_for_is_logged_in_words(caplog: pytest.LogCaptureFixture) -> None:
    store, _, _ = wrap([fail(), b"body"], RetryPolicy())
    store.get("key")

    with caplog.at_level(logging.INFO):
        log_counts("worker 3")

    assert (
        "worker 3, scripted://: 2 requests, 1 of them retries, 0 refused as too many, 0 hedges "
        "(0 of use)"
    ) in caplog.messages
