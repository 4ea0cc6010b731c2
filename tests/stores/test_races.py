"""Requests made twice: by threads and by tasks, whose ends the tests decide."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from concurrent_dataloader.errors import KeyNotFoundError, StoreUnavailableError
from concurrent_dataloader.stores._races import AwaitedRace, BlockingRace, RaceThreads


class Eager:
    """A judge for whom everything is late at once."""

    age_s = 0.0
    num_won = 0
    num_hedged = 0

    def __init__(self, max_hedges: int = 1) -> None:
        self.max_hedges = max_hedges

    def late_after_s(self) -> float | None:
        return 0.001

    def try_hedge(self) -> bool:
        self.num_hedged += 1
        return True

    def win_by_hedge(self) -> None:
        self.num_won += 1


class LateEager(Eager):
    """For whom time is always past what is late."""

    age_s = 1.0


class Copies:
    """A blocking call whose copies end as the test says."""

    def __init__(self) -> None:
        self.begun: queue.Queue[queue.Queue[bytes | Exception]] = queue.Queue()

    def __call__(self) -> bytes:
        end: queue.Queue[bytes | Exception] = queue.Queue()
        self.begun.put(end)
        outcome = end.get(timeout=30)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def run_in_thread(call: Callable[[], Any]) -> queue.Queue[Any]:
    """Give the result, or the error, when it is there."""
    ended: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            ended.put(call())
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            ended.put(error)

    threading.Thread(target=run, daemon=True).start()
    return ended


def race(copies: Copies, judge: Eager, timeout_s: float = 30.0) -> queue.Queue[Any]:
    threads = RaceThreads()
    return run_in_thread(lambda: BlockingRace(copies, threads).run(judge, timeout_s))


def test_the_hedge_wins_when_the_first_stalls() -> None:
    copies, judge = Copies(), LateEager()
    ended = race(copies, judge)
    first, hedge = copies.begun.get(timeout=30), copies.begun.get(timeout=30)

    hedge.put(b"body")

    assert ended.get(timeout=30) == b"body"
    assert judge.num_won == 1
    first.put(b"too late")  # nobody minds


def test_the_first_may_still_win() -> None:
    copies, judge = Copies(), LateEager()
    ended = race(copies, judge)
    first, hedge = copies.begun.get(timeout=30), copies.begun.get(timeout=30)

    first.put(b"body")

    assert ended.get(timeout=30) == b"body"
    assert judge.num_won == 0
    hedge.put(b"too late")


def test_a_copy_that_fails_leaves_it_to_the_other() -> None:
    copies = Copies()
    ended = race(copies, LateEager())
    first, hedge = copies.begun.get(timeout=30), copies.begun.get(timeout=30)

    first.put(StoreUnavailableError("reset"))
    hedge.put(b"body")

    assert ended.get(timeout=30) == b"body"


def test_when_all_copies_fail_the_last_error_is_raised() -> None:
    copies = Copies()
    blocking = BlockingRace(copies, RaceThreads())
    ended = run_in_thread(lambda: blocking.run(LateEager(), 30.0))
    begun = [copies.begun.get(timeout=30) for _ in range(2)]

    # In this thread, since nothing says which of two threads hands over first.
    blocking.end_copy(None, StoreUnavailableError("hedge"), is_hedge=True)
    blocking.end_copy(None, StoreUnavailableError("first"), is_hedge=False)

    assert str(ended.get(timeout=30)) == "first"
    for copy in begun:
        copy.put(b"too late")


def test_a_final_refusal_is_not_waited_over() -> None:
    copies = Copies()
    ended = race(copies, LateEager())
    first, hedge = copies.begun.get(timeout=30), copies.begun.get(timeout=30)

    first.put(KeyNotFoundError("no such object"))

    assert isinstance(ended.get(timeout=30), KeyNotFoundError)
    hedge.put(b"")


def test_no_more_copies_than_allowed() -> None:
    copies, judge = Copies(), LateEager(max_hedges=2)
    ended = race(copies, judge)
    *_, last = (copies.begun.get(timeout=30) for _ in range(3))

    last.put(b"body")

    assert ended.get(timeout=30) == b"body"
    assert judge.num_hedged == 2
    assert copies.begun.empty()


class Ageing(Eager):
    """For whom a second passes at each look."""

    def __init__(self) -> None:
        super().__init__(max_hedges=0)
        self._looks = 0.0

    @property
    def age_s(self) -> float:
        self._looks += 1.0
        return self._looks


def test_it_ends_when_its_time_is_up() -> None:
    copies = Copies()

    ended = race(copies, Ageing(), timeout_s=2.0)

    assert isinstance(ended.get(timeout=30), TimeoutError)
    copies.begun.get(timeout=30).put(b"")


def test_a_race_whose_threads_are_stopped_does_not_wait() -> None:
    threads = RaceThreads()
    threads.stop()

    ended = run_in_thread(lambda: BlockingRace(lambda: b"", threads).run(Eager(), 30.0))

    assert isinstance(ended.get(timeout=30), RuntimeError)


# -- awaited


class Tasks:
    """An awaited call whose copies end as the test says."""

    def __init__(self) -> None:
        self.copies: list[asyncio.Future[bytes]] = []
        self.num_cancelled = 0
        self.has_hedge = asyncio.Event()

    async def __call__(self) -> bytes:
        copy: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.copies.append(copy)
        if len(self.copies) == 2:
            self.has_hedge.set()
        try:
            return await copy
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise


def run_awaited(
    play: Callable[[Tasks], Coroutine[Any, Any, None]], judge: Eager
) -> tuple[Any, Tasks]:
    """Race, while ``play`` decides how the copies end."""

    async def main() -> tuple[Any, Tasks]:
        tasks = Tasks()
        racing = asyncio.create_task(AwaitedRace(tasks).run(judge, 30.0))
        async with asyncio.timeout(20):
            await tasks.has_hedge.wait()
            await play(tasks)
            (result,) = await asyncio.gather(racing, return_exceptions=True)
            await asyncio.sleep(0)
        return result, tasks

    return asyncio.run(main(), debug=True)


def test_a_hedge_that_wins_cancels_the_first() -> None:
    judge = LateEager()

    async def play(tasks: Tasks) -> None:
        tasks.copies[1].set_result(b"body")

    result, tasks = run_awaited(play, judge)

    assert result == b"body"
    assert judge.num_won == 1
    assert tasks.num_cancelled == 1


def test_a_hedge_is_cancelled_when_the_first_answer_comes() -> None:
    async def play(tasks: Tasks) -> None:
        tasks.copies[0].set_result(b"body")

    result, tasks = run_awaited(play, LateEager())

    assert result == b"body"
    assert tasks.num_cancelled == 1


def test_both_at_once_are_one_answer() -> None:
    async def play(tasks: Tasks) -> None:
        tasks.copies[1].set_result(b"hedge")
        tasks.copies[0].set_result(b"first")

    result, _ = run_awaited(play, LateEager())

    assert result in (b"first", b"hedge")


def test_an_awaited_copy_that_fails_leaves_it_to_the_other() -> None:
    async def play(tasks: Tasks) -> None:
        tasks.copies[0].set_exception(StoreUnavailableError("reset"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        tasks.copies[1].set_result(b"body")

    result, _ = run_awaited(play, LateEager())

    assert result == b"body"


def test_when_all_awaited_copies_fail_the_first_error_is_raised() -> None:
    async def play(tasks: Tasks) -> None:
        tasks.copies[0].set_exception(StoreUnavailableError("first"))
        tasks.copies[1].set_exception(StoreUnavailableError("hedge"))

    result, _ = run_awaited(play, LateEager())

    assert isinstance(result, StoreUnavailableError)
    assert str(result) == "first"


def test_a_race_that_is_cancelled_cancels_its_copies() -> None:
    async def main() -> Tasks:
        tasks = Tasks()
        racing = asyncio.create_task(AwaitedRace(tasks).run(LateEager(), 30.0))
        await asyncio.wait_for(tasks.has_hedge.wait(), 20)
        racing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await racing
        await asyncio.sleep(0)
        return tasks

    tasks = asyncio.run(main(), debug=True)

    assert tasks.num_cancelled == 2


def test_an_awaited_race_ends_when_its_time_is_up() -> None:
    async def main() -> None:
        tasks = Tasks()
        with pytest.raises(TimeoutError):
            await AwaitedRace(tasks).run(Eager(max_hedges=0), 0.05)
        assert tasks.num_cancelled == 1

    asyncio.run(main())
