"""Daemon threads: as many as are needed, none after the end."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from concurrent_dataloader.threads import DaemonThreads, FutureThreads


def test_calls_that_follow_each_other_share_one_thread() -> None:
    threads = DaemonThreads(8, "t")
    names: list[str] = []
    for _ in range(5):
        done = threading.Event()
        threads.submit(lambda: names.append(threading.current_thread().name))
        threads.submit(done.set)
        assert done.wait(10)
        until_s = time.monotonic() + 10
        while threads._num_outstanding:  # the thread may have ended the call, and not said so yet
            assert time.monotonic() < until_s
            time.sleep(0.001)
    threads.stop(5)

    assert set(names) <= {"t-0", "t-1"}


def test_no_more_calls_run_at_once_than_there_may_be_threads() -> None:
    threads = DaemonThreads(3, "t")
    lock, running, most, done = threading.Lock(), [0], [0], threading.Semaphore(0)

    def call() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.005)
        with lock:
            running[0] -= 1
        done.release()

    for _ in range(30):
        threads.submit(call)
    for _ in range(30):
        assert done.acquire(timeout=10)
    threads.stop(5)

    assert most[0] == 3


class MovingLimit:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_held_back = 0

    def hold_back(self) -> None:
        self.num_held_back += 1


def test_a_limit_that_moves_is_followed_and_told_when_calls_wait_for_it() -> None:
    limit, going_on, most = MovingLimit(2), threading.Semaphore(0), [0]
    threads = DaemonThreads(limit, "moving")
    lock, running = threading.Lock(), [0]

    def call() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        assert going_on.acquire(timeout=20)
        with lock:
            running[0] -= 1

    def wait_until(is_so: Callable[[], bool]) -> None:
        until_s = time.monotonic() + 10
        while not is_so():
            assert time.monotonic() < until_s
            time.sleep(0.001)

    def wait_for_running(number: int) -> None:
        wait_until(lambda: running[0] == number)

    for _ in range(40):
        threads.submit(call)
    wait_for_running(2)
    assert limit.num_held_back == 0

    limit.limit = 6
    for _ in range(4):  # each call that ends starts one thread more
        going_on.release()
    wait_for_running(6)
    wait_until(lambda: limit.num_held_back == 4)

    limit.limit = 7
    threads.grow()
    wait_for_running(7)

    limit.limit = 1
    going_on.release(6)
    wait_for_running(1)
    going_on.release(40)
    wait_for_running(0)

    assert most[0] == 7
    threads.stop(5)


def test_stop_gives_back_what_had_not_begun_and_ends_every_thread() -> None:
    threads = DaemonThreads(2, "ending")
    begun, go, ran = threading.Semaphore(0), threading.Event(), list[int]()

    def hold() -> None:
        begun.release()
        go.wait(10)

    threads.submit(hold)
    threads.submit(hold)
    assert begun.acquire(timeout=10)
    assert begun.acquire(timeout=10)
    for number in range(5):
        threads.submit(ran.append, number)
    left = threads.stop()
    go.set()

    assert [arguments for _, arguments in left] == [(number,) for number in range(5)]
    assert threads.stop(5) == []
    for thread in threading.enumerate():
        if thread.name.startswith("ending-"):
            thread.join(10)
            assert not thread.is_alive()
    assert ran == []
    with pytest.raises(RuntimeError, match="closed"):
        threads.submit(ran.append, 9)


def test_a_thread_that_waits_holds_nothing_of_its_last_call() -> None:
    class Body:
        pass

    threads = DaemonThreads(1, "t")
    body: Any = Body()
    gone = weakref.ref(body)
    done = threading.Event()
    threads.submit(lambda held: None, body)
    threads.submit(done.set)
    assert done.wait(10)
    del body
    gc.collect()

    assert gone() is None
    threads.stop(5)


def test_a_future_holds_what_a_call_returns_or_raises() -> None:
    threads = FutureThreads(2, "t")

    assert threads.submit(divmod, 7, 2).result(timeout=10) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 7, 0).result(timeout=10)
    threads.stop(5)


def test_a_call_that_was_cancelled_or_not_begun_at_the_end_is_not_made() -> None:
    threads = FutureThreads(1, "t")
    begun, go_on = threading.Event(), threading.Event()
    made: list[str] = []
    first = threads.submit(wait_between, begun, go_on)
    cancelled = threads.submit(made.append, "cancelled")
    assert begun.wait(10)
    cancelled.cancel()
    late = threads.submit(made.append, "late")

    threads.stop()
    go_on.set()

    assert first.result(timeout=20)
    assert late.cancelled()
    assert made == []


def test_a_thread_that_cannot_be_started_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = FutureThreads(2, "t")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            threads.submit(divmod, 7, 2)

    assert threads.submit(divmod, 7, 2).result(timeout=10) == (3, 1)
    threads.stop(5)


def wait_between(begun: threading.Event, go_on: threading.Event) -> bool:
    begun.set()
    return go_on.wait(10)


def refuse(thread: threading.Thread) -> None:
    del thread
    raise RuntimeError("can't start new thread")


class Impatient(DaemonThreads):
    IDLE_S = 0.02


def test_threads_with_nothing_to_do_end_and_come_again() -> None:
    threads = Impatient(4, "restless")
    done = threading.Semaphore(0)

    for _ in range(3):
        for _ in range(20):
            threads.submit(done.release)
        for _ in range(20):
            assert done.acquire(timeout=20)
        until_s = time.monotonic() + 20
        # By name: the collector may start threads of what other tests have left.
        while own := [each.name for each in threading.enumerate() if "restless" in each.name]:
            assert time.monotonic() < until_s, own

    threads.stop()


def test_no_call_is_lost_to_threads_that_end() -> None:
    threads = Impatient(3, "impatient")
    done = threading.Semaphore(0)

    for number in range(300):
        threads.submit(done.release)
        if number % 3 == 0:
            threading.Event().wait(0.02)  # as long as the threads wait

    for _ in range(300):
        assert done.acquire(timeout=20)
    threads.stop()
