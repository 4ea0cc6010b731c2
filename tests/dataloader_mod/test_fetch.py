"""One contract for both fetchers."""

import asyncio
import concurrent.futures
import threading

import pytest

from concurrent_dataloader.dataloader_mod.fetch import AsyncioFetcher, ThreadedFetcher


class Gate:
    """A source of samples that are given out only when the test says so."""

    def __init__(self):
        self.lock = threading.Lock()
        self.opened: dict[int, threading.Event] = {}
        self.begun: list[int] = []
        self.changed = threading.Condition(self.lock)

    def event(self, position):
        with self.lock:
            return self.opened.setdefault(position, threading.Event())

    def note(self, position):
        with self.changed:
            self.begun.append(position)
            self.changed.notify_all()

    def wait_for_begun(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) >= count, timeout=20)

    def fetch(self, position):
        event = self.event(position)
        self.note(position)
        assert event.wait(20)
        if position < 0:
            raise LookupError(f"no sample {position}")
        return position * 10

    async def fetch_async(self, position):
        event = self.event(position)
        self.note(position)
        assert await asyncio.to_thread(event.wait, 20)
        if position < 0:
            raise LookupError(f"no sample {position}")
        return position * 10


class FetcherContract:
    """What the worker relies on, whichever fetcher it has."""

    def test_samples_complete_in_any_order(self, gate, fetcher):
        futures = [fetcher.submit(position) for position in (1, 2, 3)]

        gate.event(3).set()

        assert futures[2].result(timeout=20) == 30
        assert not futures[0].done()
        gate.event(1).set()
        gate.event(2).set()
        assert [future.result(timeout=20) for future in futures] == [10, 20, 30]

    def test_no_more_are_in_flight_than_allowed_and_the_first_come_first(self, gate, fetcher):
        futures = [fetcher.submit(position) for position in range(9)]
        gate.wait_for_begun(4)

        assert sorted(gate.begun) == [0, 1, 2, 3]

        gate.event(2).set()
        gate.wait_for_begun(5)
        assert gate.begun[4] == 4
        for position in range(9):
            gate.event(position).set()
        assert [future.result(timeout=20) for future in futures] == [p * 10 for p in range(9)]

    def test_an_error_lands_in_its_own_future(self, gate, fetcher):
        bad, good = fetcher.submit(-1), fetcher.submit(1)
        gate.event(-1).set()
        gate.event(1).set()

        assert good.result(timeout=20) == 10
        with pytest.raises(LookupError, match="no sample -1"):
            bad.result(timeout=20)

    def test_closing_cancels_what_has_not_begun(self, gate, fetcher):
        futures = [fetcher.submit(position) for position in range(9)]
        gate.wait_for_begun(4)
        for position in range(4):
            gate.event(position).set()

        fetcher.close()

        for future in futures[4:]:
            with pytest.raises((concurrent.futures.CancelledError, AssertionError)):
                assert future.result(timeout=20) is None

    def test_closing_twice_is_fine_and_a_closed_one_takes_nothing(self, fetcher):
        fetcher.close()
        fetcher.close()

        with pytest.raises(RuntimeError, match="closed"):
            fetcher.submit(1)

    def test_no_thread_is_left(self, gate, fetcher):
        before = set(threading.enumerate())
        futures = [fetcher.submit(position) for position in range(3)]
        for position in range(3):
            gate.event(position).set()
        concurrent.futures.wait(futures, timeout=20)
        during = set(threading.enumerate()) - before

        fetcher.close()

        mine = [thread for thread in during if thread.name.startswith("fetch")]
        assert mine
        for thread in mine:
            thread.join(5)  # it has been told, and may still be on its way out
            assert not thread.is_alive()

    @pytest.fixture
    def gate(self):
        return Gate()


class TestThreadedFetcher(FetcherContract):
    @pytest.fixture
    def fetcher(self, gate):
        fetcher = ThreadedFetcher(gate.fetch, num_fetch_workers=4)
        yield fetcher
        fetcher.close()

    def test_threads_are_started_only_as_they_are_needed(self, gate, fetcher):
        before = threading.active_count()
        for position in range(5):
            gate.event(position).set()
            fetcher.submit(position).result(timeout=20)

        assert threading.active_count() <= before + 2


class TestAsyncioFetcher(FetcherContract):
    @pytest.fixture
    def fetcher(self, gate):
        fetcher = AsyncioFetcher(gate.fetch_async, num_fetch_workers=4)
        yield fetcher
        fetcher.close()
