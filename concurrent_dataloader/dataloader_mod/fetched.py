"""A worker's samples: begun before torch's loop asks for them, finished in order when it does."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from concurrent_dataloader.dataloader_mod import requests
from concurrent_dataloader.dataloader_mod.error_policy import (
    FAILED,
    FailureLog,
    LeftOut,
    explain,
    is_of_sample,
    make_deadline_error,
)
from concurrent_dataloader.dataloader_mod.fetch import AsyncioFetcher, Fetcher, ThreadedFetcher
from concurrent_dataloader.dataloader_mod.orphan import CHECK_INTERVAL_S
from concurrent_dataloader.dataloader_mod.settings import FetchSettings
from concurrent_dataloader.dataloader_mod.stages import Stages, find_stages
from concurrent_dataloader.datasets.contract import SampleLocation


class Batch:
    """What torch's loop takes for a list of positions: one whose samples may be under way."""

    def __init__(self, positions: Any) -> None:
        self.positions = positions
        self.units: list[Any] = []
        """What is fetched by itself: each position, or all of them where the dataset wants that."""
        self.futures: collections.deque[Future[Any]] | None = None
        self.early: dict[int, Any] = {}
        """Units that are decoded before their turn, by number."""
        self.is_split = False
        """Whether each unit is a list of one position, of a batch that failed as a whole."""
        self.begun_s = 0.0
        self.asked_s = 0.0
        """When it was begun, and when torch's loop asked for it, by ``time.monotonic``."""

    def cancel(self) -> None:
        """Give up what has not begun."""
        for future in self.futures or ():
            future.cancel()


class FetchedDataset:
    """What torch's loop takes for the dataset: samples are begun before they are asked for."""

    def __init__(
        self,
        dataset: Any,
        settings: FetchSettings,
        auto_collation: bool,
        failures: FailureLog | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._dataset = dataset
        self._settings = settings
        self._auto_collation = auto_collation
        self._is_over = is_over
        self.failures = failures
        self.refill: Callable[[], None] = lambda: None
        """Called before each wait: there may be more to begin."""

    @functools.cached_property
    def _stages(self) -> Stages:
        # Not before the user's worker_init_fn, which may change the dataset.
        return find_stages(self._dataset, self._auto_collation)

    @functools.cached_property
    def _fetcher(self) -> Fetcher:
        stages, settings = self._stages, self._settings
        if settings.fetch_impl == "asyncio" and stages.has_fetch_async:
            return AsyncioFetcher(
                requests.make_fetch_async(stages),
                settings.num_fetch_workers,
                settings.max_fetch_workers,
            )
        return ThreadedFetcher(
            requests.make_fetch(stages), settings.num_fetch_workers, settings.max_fetch_workers
        )

    @property
    def batch_pool(self) -> int:
        """Batches to begin beyond the one that is being assembled, as of now."""
        settings = self._settings
        if settings.max_batch_pool is None or "_fetcher" not in self.__dict__:
            return settings.batch_pool
        share = self._fetcher.limit / settings.num_fetch_workers
        wanted = math.ceil(settings.batch_pool * share)
        return min(max(settings.batch_pool, wanted), settings.max_batch_pool)

    def begin(self, *batches: Batch) -> None:
        """Send samples of batches on their way, unless they are; together where that is cheaper."""
        new = [batch for batch in batches if batch.futures is None]
        if not new:
            return
        is_one = not self._auto_collation or self._stages.takes_batches
        for batch in new:
            # A list, since a sampler may give an iterator, which can be read only once.
            batch.units = [batch.positions] if is_one else list(batch.positions)
        units = [batch.units for batch in new]
        begun = requests.begin(self._stages, units, self._fetcher.submit)
        now_s = time.monotonic()
        for batch, futures in zip(new, begun, strict=True):
            batch.futures, batch.begun_s = collections.deque(futures), now_s

    def __getitems__(self, batch: Batch) -> Any:
        """Finish a batch's samples, in order; called by torch's loop with automatic batching."""
        finished = self._finish(batch)
        return finished[0] if self._stages.takes_batches else finished

    def __getitem__(self, batch: Batch) -> Any:
        """Finish one sample; called by torch's loop without automatic batching."""
        finished = self._finish(batch)
        return finished if isinstance(finished, LeftOut) else finished[0]

    def _finish(self, batch: Batch) -> list[Any]:
        self.begin(batch)
        batch.asked_s = time.monotonic()
        try:
            finished = [self._finish_unit(batch, number) for number in range(len(batch.units))]
        finally:
            batch.cancel()
        return finished if self.failures is None else self.failures.settle(finished)

    def _finish_unit(self, batch: Batch, number: int) -> Any:
        assert batch.futures is not None
        if not batch.futures[0].done():
            self._decode_early(batch, number)
        position = batch.units[number]
        future = batch.futures.popleft()
        if not future.done():
            raise RuntimeError("the loader was shut down while this sample was being fetched")
        try:
            if number in batch.early:
                decoded = batch.early.pop(number)
            else:
                decoded = self._stages.decode(position, future.result())
            return self._stages.finish(decoded)
        except Exception as error:
            named = explain(error, position, self._locate(position))
            if self.failures is None or not is_of_sample(named):
                if named is error:
                    raise
                raise named from error
            if self._stages.takes_batches and not batch.is_split:
                return self._finish_each(position)
            if batch.is_split:
                position = position[0]
            self.failures.add(named, position, self._locate(position), batch.begun_s)
            return FAILED

    def _finish_each(self, positions: list[Any]) -> list[Any]:
        """Finish the samples of a batch that failed as a whole, to tell which are to blame."""
        assert self.failures is not None
        split = Batch(positions)
        split.is_split = True
        split.units = [[position] for position in positions]
        split.futures = collections.deque(map(self._fetcher.submit, split.units))
        split.begun_s = split.asked_s = time.monotonic()
        try:
            finished = [self._finish_unit(split, number) for number in range(len(split.units))]
        finally:
            split.cancel()
        return self.failures.settle([each if each is FAILED else each[0] for each in finished])

    def _decode_early(self, batch: Batch, number: int) -> None:
        """Wait for the next in turn, and decode later samples of the batch as they come.

        Raises:
            DeadlineError: The batch was asked for longer ago than it may be.
        """
        futures, early = batch.futures, batch.early
        assert futures is not None
        while not futures[0].done() and not self._is_over():
            left_s = self._left_s(batch, number)
            self.refill()
            pending = [futures[0]]
            for ahead in range(1, len(futures)):
                future = futures[ahead]
                if not future.done():
                    pending.append(future)
                elif number + ahead not in early and future.exception() is None:
                    # What it raises, it raises again in its turn.
                    with contextlib.suppress(Exception):
                        position = batch.units[number + ahead]
                        early[number + ahead] = self._stages.decode(position, future.result())
                    if futures[0].done():
                        return
            # A deadline of the store's ends each fetch; this ends the wait if nobody wants it.
            wait_s = min(CHECK_INTERVAL_S, left_s)
            concurrent.futures.wait(pending, wait_s, concurrent.futures.FIRST_COMPLETED)

    def _left_s(self, batch: Batch, number: int) -> float:
        """Say how long a batch may still be waited for, of which a unit has not come."""
        timeout_s = self._settings.timeout_s
        if not timeout_s:
            return CHECK_INTERVAL_S
        assert batch.futures is not None
        waited_s = time.monotonic() - batch.asked_s
        if waited_s < timeout_s:
            return timeout_s - waited_s
        ahead = [at for at, future in enumerate(batch.futures) if not future.done()]
        missing = [batch.units[number + at] for at in ahead]
        count = len(batch.units)
        if self._stages.takes_batches and not batch.is_split:
            (missing,) = missing
            count = len(missing)
        raise make_deadline_error(missing, count, waited_s, timeout_s, self._locate)

    def _locate(self, position: Any) -> SampleLocation | None:
        try:
            return self._stages.locate_sample(position)
        except Exception:  # noqa: BLE001 - the sample's own error, of the same cause, is reported
            return None

    def close(self) -> None:
        """End the fetcher, if there is one."""
        if "_fetcher" in self.__dict__:
            self._fetcher.close()
