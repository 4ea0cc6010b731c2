"""How many threads read a data set that computes, and one that waits."""

import itertools
import random
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from concurrent_dataloader.dataloader_mod.fetch import ThreadedFetcher
from concurrent_dataloader.dataloader_mod.thread_limit import ThreadLimit

MAXIMUM = 128


class Machine:
    """A core that is shared by threads, each of which waits and computes in turn."""

    def __init__(self, *, seed: int = 0, cores: float = 1.0) -> None:
        self.now_s = 0.0
        self.limit = ThreadLimit(MAXIMUM, cores, 0.0)
        self._cores = min(1.0, cores)
        self._noise = random.Random(seed)

    def speed(self, num_threads: int, wait_s: float, cpu_s: float) -> float:
        """Calls a second."""
        return min(num_threads / (wait_s + cpu_s), self._cores / cpu_s)

    def run(self, seconds: float, wait_s: float, cpu_s: float) -> list[int]:
        """Let time pass; gives the limits that there were, a number for each call."""
        until_s, limits = self.now_s + seconds, []
        while self.now_s < until_s:
            mean_s = 1.0 / self.speed(self.limit.limit, wait_s, cpu_s)
            self.now_s += mean_s * self._noise.uniform(0.6, 1.4)
            self.limit.end(cpu_s, self.now_s)
            limits.append(self.limit.limit)
        return limits


@pytest.mark.parametrize("cores", [2.0, 1.0, 0.25])
def test_few_threads_compute(cores: float) -> None:
    machine = Machine(cores=cores)

    machine.run(20.0, 0.0, 0.0035)

    assert machine.limit.limit == 8


def test_many_threads_wait() -> None:
    machine = Machine()

    assert set(machine.run(60.0, 0.1, 0.0002)) == {MAXIMUM}


@settings(max_examples=60, deadline=None)
@given(
    wait_s=st.floats(0.0, 0.5),
    cpu_s=st.floats(0.0002, 0.02),
    seed=st.integers(0, 1000),
)
@example(wait_s=0.36328125, cpu_s=0.01, seed=31)  # one round of a fall misled
def test_as_much_is_done_as_by_all_threads(wait_s: float, cpu_s: float, seed: int) -> None:
    machine = Machine(seed=seed)
    limits = machine.run(120.0, wait_s, cpu_s)

    late = limits[len(limits) // 2 :]
    done = sum(machine.speed(limit, wait_s, cpu_s) for limit in late) / len(late)

    assert done >= 0.85 * machine.speed(MAXIMUM, wait_s, cpu_s)


def test_threads_come_back_where_a_data_set_begins_to_wait() -> None:
    machine = Machine()
    machine.run(20.0, 0.0, 0.0035)

    machine.run(10.0, 0.3, 0.0005)

    assert machine.limit.limit == MAXIMUM


def test_what_was_in_vain_is_tried_less_often() -> None:
    machine = Machine()
    limits = machine.run(300.0, 0.05, 0.0035)  # 15 threads are needed

    falls = [now for now, (a, b) in enumerate(itertools.pairwise(limits)) if b == 8 < a]
    late = sum(now > len(limits) / 2 for now in falls)
    assert 1 <= late <= len(falls) / 3


def test_a_small_maximum_stays() -> None:
    limit = ThreadLimit(4, 1.0, 0.0)
    for number in range(10_000):
        limit.end(0.01, number * 0.01)

    assert limit.limit == 4


# -- threads


def compute(_: int) -> None:
    until_s = time.thread_time() + 0.002
    while time.thread_time() < until_s:
        pass


def wait(_: int) -> None:
    time.sleep(0.02)


def limit_after(fetcher: ThreadedFetcher, seconds: float) -> int:
    """Keep a fetcher busy for some time, or until it has fewer threads."""
    until_s, begun = time.monotonic() + seconds, []
    before = fetcher.limit
    while time.monotonic() < until_s and fetcher.limit == before:
        begun = [future for future in begun if not future.done()]
        begun += [fetcher.submit(0) for _ in range(2 * before - len(begun))]
        threading.Event().wait(0.005)
    fetcher.close()
    return fetcher.limit


@pytest.mark.slow
def test_a_fetcher_has_fewer_threads_for_a_data_set_that_computes() -> None:
    assert limit_after(ThreadedFetcher(compute, 64, 256), 30.0) == 16


@pytest.mark.slow
def test_a_fetcher_keeps_its_threads_for_a_data_set_that_waits() -> None:
    assert limit_after(ThreadedFetcher(wait, 64, 256), 2.0) == 64


@pytest.mark.slow
def test_a_number_that_was_given_stays() -> None:
    assert limit_after(ThreadedFetcher(compute, 64), 2.0) == 64
