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

import functools
from collections.abc import Callable
from typing import Any

from concurrent_dataloader import core_files
from concurrent_dataloader.dataloader_mod import torch_internals
from concurrent_dataloader.dataloader_mod.allocator import settle_memory
from concurrent_dataloader.dataloader_mod.dataset_state import WorkerWatch, make_watch
from concurrent_dataloader.dataloader_mod.error_policy import make_failure_log, report_through
from concurrent_dataloader.dataloader_mod.fetched import FetchedDataset
from concurrent_dataloader.dataloader_mod.lookahead import Lookahead
from concurrent_dataloader.dataloader_mod.orphan import (
    ParentWatch,
    SocketFolder,
    WatchedQueue,
    be_silent_of_hang_ups,
)
from concurrent_dataloader.dataloader_mod.recycle import RecyclingQueue, SlotPool, collate_into
from concurrent_dataloader.dataloader_mod.resume import write_generators
from concurrent_dataloader.dataloader_mod.settings import FetchSettings, read_environment
from concurrent_dataloader.stores._cache_folder import remove_begun
from concurrent_dataloader.stores._flow import log_counts

_NUM_BATCHES_HELD = 2
"""Batches that a training loop holds: the one it works on, and the one before it meanwhile."""

_MAX_BATCHES_HELD = 4
"""Batches that are held in recycled memory, at most; a user that holds more gets fresh memory."""


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
    that no loader of ours gives come from the environment (`read_environment`). The process leaves
    no core file, unless it is asked to (`core_files`).

    Raises:
        ValueError: A variable of the environment cannot be used; reaches the training loop.
    """
    core_files.forbid()
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
        settle_memory()
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
        _end(fetched, worker_id, is_early=not done_event.is_set())
        if parent.is_gone():
            # Nobody reads the queue any more, and the process would wait for ever to have it empty.
            data_queue.cancel_join_thread()


def _end(fetched: FetchedDataset | None, worker_id: int, *, is_early: bool) -> None:
    if is_early:  # at Ctrl-C, or an error, the parent may kill this process at any moment
        remove_begun()
    if fetched is not None:
        fetched.close()
        log_counts(f"worker {worker_id}")


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
