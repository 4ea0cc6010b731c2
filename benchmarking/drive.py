"""Keep a store busy without a loader, and count. Imports no torch, so its processes start fast."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import time
from typing import NamedTuple

from concurrent_dataloader.stores.base import Store

NUM_IN_FLIGHT = 64


class Rate(NamedTuple):
    """How fast a client was, and at what CPU of its process."""

    requests_per_s: float
    cpu_ms_per_request: float


class _Clock:
    """Counts objects from the 128th on, until the time is over."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._num_left_out = 2 * NUM_IN_FLIGHT
        self._num_counted = 0
        self._begin_s = self._begin_cpu_s = 0.0

    def count(self) -> bool:
        """Count one more object; tells whether to go on."""
        if self._num_left_out:
            self._num_left_out -= 1
            if not self._num_left_out:
                self._begin_s, self._begin_cpu_s = time.perf_counter(), time.process_time()
            return True
        self._num_counted += 1
        return time.perf_counter() - self._begin_s < self._seconds

    def rate(self) -> Rate:
        """Give what was counted."""
        cpu_s = time.process_time() - self._begin_cpu_s
        elapsed_s = time.perf_counter() - self._begin_s
        return Rate(self._num_counted / elapsed_s, cpu_s / self._num_counted * 1e3)


def drive_threads(store: Store, keys: list[str], seconds: float) -> Rate:
    """Keep 64 threads asking."""
    clock, more = _Clock(seconds), itertools.cycle(keys)
    with concurrent.futures.ThreadPoolExecutor(NUM_IN_FLIGHT) as threads:
        begun = {threads.submit(store.get, next(more)) for _ in range(NUM_IN_FLIGHT)}
        while True:
            done, begun = concurrent.futures.wait(
                begun, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for one in done:
                one.result()
                if not clock.count():
                    return clock.rate()
                begun.add(threads.submit(store.get, next(more)))


def drive_asyncio(store: Store, keys: list[str], seconds: float) -> Rate:
    """Keep 64 tasks asking."""
    clock, more = _Clock(seconds), itertools.cycle(keys)

    async def ask() -> None:
        while clock.count():
            await store.get_async(next(more))

    async def ask_all() -> Rate:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(NUM_IN_FLIGHT):
                tasks.create_task(ask())
        return clock.rate()

    rate = asyncio.run(ask_all())
    store.close()
    return rate
