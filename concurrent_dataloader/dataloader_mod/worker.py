"""The worker process: torch's own loop, over a queue that looks ahead.

```text
index queue -> Lookahead -submit-> Fetcher -future-> FetchedDataset -> torch's loop -> data queue
```

Seeding, resuming, error transport and shutdown stay torch's, whatever its release. torch's loop
asks `Lookahead` for the next list of positions, and gets one whose samples are on their way; it
asks the dataset for these samples, and `FetchedDataset` finishes them in order, in the same thread,
so that the global random generators are drawn from as ever.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import ctypes
import functools
import itertools
import math
import queue
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from concurrent_dataloader.dataloader_mod import requests, torch_internals
from concurrent_dataloader.dataloader_mod.dataset_state import WorkerWatch, make_watch
from concurrent_dataloader.dataloader_mod.error_policy import (
    FAILED,
    FailureLog,
    LeftOut,
    explain,
    is_of_sample,
    make_deadline_error,
    make_failure_log,
    report_through,
)
from concurrent_dataloader.dataloader_mod.fetch import AsyncioFetcher, Fetcher, ThreadedFetcher
from concurrent_dataloader.dataloader_mod.orphan import (
    CHECK_INTERVAL_S,
    ParentWatch,
    SocketFolder,
    WatchedQueue,
    be_silent_of_hang_ups,
)
from concurrent_dataloader.dataloader_mod.recycle import RecyclingQueue, SlotPool, collate_into
from concurrent_dataloader.dataloader_mod.resume import write_generators
from concurrent_dataloader.dataloader_mod.settings import FetchSettings, read_environment
from concurrent_dataloader.dataloader_mod.stages import Stages, find_stages
from concurrent_dataloader.datasets.contract import SampleLocation
from concurrent_dataloader.stores._flow import log_counts

_NUM_BATCHES_HELD = 2
"""Batches that a training loop holds: the one it works on, and the one before it meanwhile."""

_MAX_BATCHES_HELD = 4
"""Batches that are held in recycled memory, at most; a user that holds more gets fresh memory."""


class BatchTaken:
    """Sent on the index queue, as the class itself: the parent handed out a batch from here."""


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


class Lookahead:
    """The index queue as torch's loop sees it: begins batches before it hands them out.

    Up to ``batch_pool + 1`` batches are begun and not handed out. When the parent says which
    batches it took, no more than ``prefetch_factor`` are handed out beyond those. Used in one
    thread only.
    """

    def __init__(
        self,
        source: Any,
        dataset: FetchedDataset,
        settings: FetchSettings,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._source = source
        self._dataset = dataset
        self._settings = settings
        self._is_over = is_over
        # Batches as (number, Batch), and signals of torch's, in the order in which they came.
        self._ahead: collections.deque[Any] = collections.deque()
        self._num_allowed = settings.prefetch_factor
        # Whether memory may be trimmed when nothing is left to do. That is so at the end of an
        # epoch if index lists come before they are due, else between two batches too.
        self._has_worked = False

    def get(self, timeout: float) -> Any:
        """Take the next batch or signal.

        Raises:
            queue.Empty: There was none for ``timeout`` seconds.
        """
        self.refill()
        while not self._may_hand_out():
            self._wait(timeout)
            self.refill()
        item = self._ahead.popleft()
        if isinstance(item, tuple):
            self._num_allowed -= 1
            self._has_worked = self._settings.takes_counted and self._settings.batch_pool > 0
        elif item is not None:  # a new epoch of persistent workers: nothing is outstanding
            self._num_allowed = self._settings.prefetch_factor
        self._begin(self._dataset.batch_pool)
        return item

    def refill(self) -> None:
        """Accept what has come, and begin what may begin. Does not wait."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._accept(self._source.get(block=False))
        self._begin(self._dataset.batch_pool)

    def _wait(self, timeout: float) -> None:
        """Accept the next item, or the end if the loader is shut down and its signal does not come.

        A loader that the garbage collector finds sends none: its queues are closed before it is.
        """
        waited_s = 0.0
        if self._has_worked and not self._ahead:
            _trim_memory()
            self._has_worked = False
        while True:
            try:
                return self._accept(self._source.get(timeout=min(timeout, CHECK_INTERVAL_S)))
            except queue.Empty:
                if self._is_over():
                    return self._accept(None)
                waited_s += CHECK_INTERVAL_S
                if waited_s >= timeout:
                    raise

    def _may_hand_out(self) -> bool:
        if not self._ahead:
            return False
        is_batch = isinstance(self._ahead[0], tuple)
        return not is_batch or not self._settings.takes_counted or self._num_allowed > 0

    def _begin(self, num_batches: int) -> None:
        begun: list[Batch] = []
        for item in itertools.islice(self._ahead, num_batches):
            if not isinstance(item, tuple):
                break
            begun.append(item[1])
        self._dataset.begin(*begun)

    def _accept(self, item: Any) -> None:
        if item is BatchTaken:
            self._num_allowed += 1
        elif isinstance(item, tuple):
            number, positions = item
            self._ahead.append((number, Batch(positions)))
        else:
            # The end of the loader, or of an epoch that the user left in the middle. What torch
            # would have sent by now is still made, as its transforms draw random numbers; the rest
            # is not.
            keep = 0 if item is None else self._num_allowed
            while self._settings.takes_counted and len(self._ahead) > keep:
                dropped = self._ahead.pop()
                # A signal is not under way: the end comes twice if it is seen before it is sent.
                if isinstance(dropped, tuple):
                    dropped[1].cancel()
            self._ahead.append(item)


@functools.cache
def _find_trim() -> Callable[[int], int] | None:
    # Only glibc has it, and only glibc needs it.
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _trim_memory() -> None:
    """Give memory that is free in fragments back to the system.

    Bodies of 100 kB and more come and go in many threads, and leave holes: without this, workers go
    on growing over the epochs (benchmarking: memory). Lower thresholds in the allocator would keep
    them small as well, but cost more CPU for each sample than a fetch does.
    """
    trim = _find_trim()
    if trim is not None:
        trim(0)


def _worker_loop(
    dataset_kind: Any,
    dataset: Any,
    index_queue: Any,
    data_queue: Any,
    done_event: Any,
    auto_collation: bool,
    collate_fn: Any,
    drop_last: bool,
    base_seed: int,
    init_fn: Any,
    worker_id: int,
    num_workers: int,
    persistent_workers: bool,
    shared_seed: int | None,
    *,
    settings: FetchSettings | None = None,
    sockets: SocketFolder | None = None,
) -> None:
    """Run a worker of a data loader, ours or torch's own.

    May be assigned over ``torch.utils.data._utils.worker._worker_loop``, whose arguments it takes;
    plain torch loaders then fetch many samples at once, with the same batches as before. Settings
    that no loader of ours gives come from the environment (`read_environment`).

    Raises:
        ValueError: A variable of the environment cannot be used; reaches the training loop.
    """
    user_dataset = torch_internals.take_dataset(dataset)
    parent = ParentWatch()
    be_silent_of_hang_ups()
    prepare: list[Callable[[], None]] = []
    if sockets is not None:
        prepare.append(functools.partial(sockets.use, parent))
    if settings is None:
        settings = _read_settings(prepare)
    seen_dataset, torch_queue = user_dataset, data_queue
    seen_queue: Any = WatchedQueue(index_queue, parent)
    fetched: FetchedDataset | None = None
    watch: WorkerWatch | None = None
    if settings.fetch_impl != "vanilla":
        pool = SlotPool(
            settings.prefetch_factor + _NUM_BATCHES_HELD,
            settings.prefetch_factor + _MAX_BATCHES_HELD,
        )
        is_map = dataset_kind == torch_internals.DatasetKind.Map
        failures = make_failure_log(settings.on_error)
        watch = make_watch(
            user_dataset, settings, worker_id, is_stream=not is_map, failures=failures
        )
        if collate_fn is torch_internals.default_collate:
            collate_fn = collate_into(pool)
        data_queue, collate_fn = report_through(failures, data_queue, collate_fn)
        if is_map:
            fetched = FetchedDataset(
                user_dataset,
                settings,
                auto_collation,
                failures,
                lambda: parent.is_gone() or done_event.is_set(),
            )
            seen_queue = Lookahead(seen_queue, fetched, settings, done_event.is_set)
            fetched.refill = seen_queue.refill
            seen_dataset = fetched
        elif watch is not None:
            seen_dataset = watch.source
        prepare.append(functools.partial(torch_internals.show_dataset, user_dataset))
        data_queue = RecyclingQueue(data_queue, pool, worker_id, watch)
        # multiprocessing's hook, which would print the error; the parent would wait for ever.
        torch_queue._on_queue_feeder_error = data_queue.send_error
    try:
        torch_internals.torch_worker_loop(
            dataset_kind,
            torch_internals.give_dataset(seen_dataset),
            seen_queue,
            data_queue,
            done_event,
            auto_collation,
            collate_fn,
            drop_last,
            base_seed if settings.base_seed is None else settings.base_seed,
            functools.partial(_initialise, prepare, init_fn, watch, settings),
            worker_id,
            num_workers,
            persistent_workers,
            shared_seed,
        )
    finally:
        if fetched is not None:
            fetched.close()
            log_counts(f"worker {worker_id}")
        if parent.is_gone():
            # Nobody reads the queue any more, and the process would wait for ever to have it empty.
            data_queue.cancel_join_thread()


def _read_settings(prepare: list[Callable[[], None]]) -> FetchSettings:
    try:
        return read_environment()
    except ValueError as error:
        prepare.append(functools.partial(_raise, error))
        return FetchSettings(fetch_impl="vanilla")


def _initialise(
    prepare: list[Callable[[], None]],
    init_fn: Any,
    watch: WorkerWatch | None,
    settings: FetchSettings,
    worker_id: int,
) -> None:
    for step in prepare:
        step()
    if init_fn is not None:
        init_fn(worker_id)
    if watch is not None:
        watch.source.load()
    if worker_id in settings.generators:
        write_generators(settings.generators[worker_id])


def _raise(error: Exception) -> None:
    raise error
