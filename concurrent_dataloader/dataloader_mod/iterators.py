"""torch's iterators over batches, in workers and without, made to look ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from concurrent_dataloader.dataloader_mod import order, torch_internals
from concurrent_dataloader.dataloader_mod.dataset_state import MapSource, Source, StreamSource
from concurrent_dataloader.dataloader_mod.error_policy import (
    LeftOut,
    collate_what_is_left,
    make_failure_log,
)
from concurrent_dataloader.dataloader_mod.failures import (
    FailedSamples,
    count_samples,
)
from concurrent_dataloader.dataloader_mod.fetched import Batch, FetchedDataset
from concurrent_dataloader.dataloader_mod.held_signals import HeldSignals
from concurrent_dataloader.dataloader_mod.loans import forget_worker
from concurrent_dataloader.dataloader_mod.lookahead import BatchTaken
from concurrent_dataloader.dataloader_mod.orphan import (
    SocketFolder,
    describe_deaths,
    remove_shared_memory,
    watch_senders,
)
from concurrent_dataloader.dataloader_mod.resume import (
    EpochState,
    StatesAfter,
    WorkerStates,
    generators_at,
    write_generators,
)
from concurrent_dataloader.dataloader_mod.settings import FetchSettings
from concurrent_dataloader.dataloader_mod.worker import _worker_loop
from concurrent_dataloader.errors import DeadlineError
from concurrent_dataloader.stores.credentials_chain import prepare_for_workers

if TYPE_CHECKING:
    from concurrent_dataloader.dataloader_mod.dataloader import DataLoader

_MIN_GRACE_S, _MAX_GRACE_S = 1.0, 10.0
"""How much longer than a worker, for a batch, the main process waits for the worker."""

_CLOSED = "the loader was closed; iterate over it anew"

_queues_in_use: dict[int, list[Any]] = {}
"""The queues of each iterator whose workers run, by its `WorkersIter._number`.

Where an iterator is garbage in a cycle, such as that of an error and the frame that keeps it, the
collector would finalise the connections of its queues, which closes their files, and then the
iterator, which sends by them and has them closed again: by then the numbers may be another's.
"""

_numbers = itertools.count()


class WorkersIter(torch_internals.MultiProcessingIter):
    """torch's iterator over workers, with our loop in them and more index lists sent ahead."""

    def __init__(
        self, loader: DataLoader[Any], settings: FetchSettings, state: EpochState, resumes: bool
    ) -> None:
        # torch counts by these numbers in its constructor already.
        self._worker_of_task: dict[int, int] = {}
        self._received_task = -1
        self._is_finished = False
        self._failures = loader._failures
        self._pid = os.getpid()
        self._state = state
        self._resumes = resumes
        self._order = order.Order(loader, state, resumes)
        self._sampler_after: dict[int, bytes | None] = {}
        self._states = WorkerStates(state)
        is_alike = (state.num_workers, state.place) == (
            loader.num_workers,
            order.find_place(loader),
        )
        if resumes:
            settings = dataclasses.replace(
                settings, dataset=state.dataset, datasets=dict(state.datasets)
            )
        if resumes and is_alike:
            self._states.go_on()
            settings = dataclasses.replace(
                settings, base_seed=state.base_seed, generators=dict(state.workers)
            )
        self._settings = settings
        self._sockets = SocketFolder()
        self._number = next(_numbers)
        self._held_signals = HeldSignals()
        # torch's constructor sets it at the end, and looks at it also if it does not come so far.
        self._workers_status = [True] * loader.num_workers
        prepare_for_workers()
        view = _LoaderView(loader, settings, self._sockets, self._held_signals)
        _queues_in_use[self._number] = view.multiprocessing_context.queues
        try:
            try:
                super().__init__(view)
            finally:
                self._held_signals.heed()
        except BaseException:
            self._shutdown_workers()  # not only when the error has gone, which may be kept
            raise
        itself = weakref.ref(self)
        watch_senders(
            self._worker_result_queue,
            lambda: () if (iterator := itself()) is None else iterator._find_senders(),
        )

    def _find_senders(self) -> list[Any]:
        """Those workers that have not come to the end of an iterable data set."""
        status: list[bool] = self._workers_status
        return [worker for worker, is_on in zip(self._workers, status, strict=True) if is_on]

    def _next_index(self) -> Any:
        if not self._order.is_open:
            self._sampler_iter = self._order.open(self._sampler_iter)
            for _ in range(self._state.next_worker % self._num_workers):
                next(self._worker_queue_idx_cycle)  # each batch to the worker that it went to
        positions = super()._next_index()
        self._sampler_after[self._send_idx] = self._order.read()
        if self._failures is not None:
            num_samples = count_samples(positions, is_batch=self._auto_collation)
            self._failures.ask(self._send_idx, num_samples)
        return positions

    def _try_put_index(self) -> None:
        task = self._send_idx
        super()._try_put_index()
        if self._send_idx > task:
            self._worker_of_task[task] = self._task_info[task][0]

    def _try_get_data(self, *timeout_s: float) -> Any:
        try:
            return super()._try_get_data(*timeout_s)
        except RuntimeError as error:
            deaths = describe_deaths(self._workers)
            if deaths:
                error.add_note(deaths)
                remove_shared_memory(self._workers)
            raise

    def _get_data(self) -> Any:
        received = self._receive()
        while isinstance(sent := received[0], StatesAfter | FailedSamples):
            if isinstance(sent, StatesAfter):
                self._states.receive(sent)
            elif self._failures is not None:
                self._failures.hold(sent)
            received = self._receive()
        self._received_task = received[0]
        return received

    def _receive(self) -> Any:
        try:
            return super()._get_data()
        except RuntimeError as error:
            if self._timeout <= 0 or "timed out" not in str(error):
                raise
            worker_id, *_ = self._task_info.get(self._rcvd_idx, (None,))
            pid = "" if worker_id is None else f" (pid {self._workers[worker_id].pid})"
            raise DeadlineError(
                f"worker {worker_id}{pid}: no batch in {self._timeout:.4g} s (timeout is "
                f"{self._settings.timeout_s:.4g} s) and no word of what it "
                "waits for, expected one or the other; it is stopped, or stuck in the data "
                "set's own code; look at it with py-spy, or allow a longer timeout"
            ) from error

    def _process_data(self, data: Any, *worker: Any) -> Any:
        # In order, torch has just counted this task; out of order it is the one received last.
        task = self._rcvd_idx - 1 if self._in_order else self._received_task
        worker_id = self._worker_of_task.pop(task)
        self._states.take(task, worker_id)
        self._state.sampler = self._sampler_after.pop(task)
        if self._settings.takes_counted:
            self._index_queues[worker_id].put(BatchTaken)
        is_error = isinstance(data, torch_internals.ExceptionWrapper)
        super()._process_data(None if is_error else data, *worker)
        if self._failures is not None:
            self._failures.take(task, may_raise=not is_error)
        if not is_error:
            return data
        error = torch_internals.unwrap_error(data)
        try:
            raise error
        finally:
            del error  # else error and frame hold each other, and with them the workers

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        self._held_signals.heed()  # all workers are known to torch
        self._worker_of_task.clear()
        self._sampler_after.clear()
        base_seed = self._settings.base_seed
        if self._failures is not None and not first_iter:
            self._failures.restart()
        if first_iter and self._resumes:
            self._order.begin()
            if base_seed is None:  # other workers than before
                self._state.base_seed, self._state.workers = self._base_seed, {}
                self._state.num_workers = self._num_workers
                self._state.place = order.find_place(loader)
            with generators_at(self._state.begin):
                super()._reset(loader, first_iter)
            return
        self._order.begin(
            base_seed=self._base_seed if base_seed is None else base_seed,
            num_workers=self._num_workers,
        )
        super()._reset(loader, first_iter)
        self._states.begin_epoch()
        if self._failures is not None:
            self._failures.forget_held()

    def close(self) -> None:
        """End the workers now."""
        self._shutdown_workers()

    def _shutdown_workers(self) -> None:
        # A child that was forked meanwhile has a copy of this, and must leave the workers alone.
        if self.__dict__.get("_pid") != os.getpid():
            return
        if "_workers" in self.__dict__:  # else torch's constructor did not come so far
            super()._shutdown_workers()
            self._sockets.remove()
            for worker in self._workers:
                forget_worker(worker.pid)
        _queues_in_use.pop(self.__dict__.get("_number", -1), None)

    def _next_data(self) -> Any:
        if self._shutdown and not self._is_finished:
            raise RuntimeError(_CLOSED)
        try:
            while (data := super()._next_data()) is LeftOut:
                pass  # nothing is left of this batch
            return data
        except StopIteration:
            self._is_finished = not self._persistent_workers
            self._state.restart()
            if self._failures is not None:
                self._failures.end()
            raise


class _LoaderView:
    """A loader as torch's iterator over workers is to see it; the user's own stays as it is."""

    def __init__(
        self,
        loader: DataLoader[Any],
        settings: FetchSettings,
        sockets: SocketFolder,
        held_signals: HeldSignals,
    ) -> None:
        self._loader = loader
        context = loader.multiprocessing_context
        self.multiprocessing_context = _WorkerContext(
            torch.multiprocessing if context is None else context, settings, sockets, held_signals
        )
        self.prefetch_factor = loader.prefetch_factor
        if self.prefetch_factor:  # 0 is an error, and torch's to raise
            self.prefetch_factor += settings.max_batch_pool or settings.batch_pool
        self.timeout = loader.timeout
        if self.timeout and settings.takes_counted:
            # The worker is the first to say so, since it knows what is missing.
            self.timeout += min(max(self.timeout, _MIN_GRACE_S), _MAX_GRACE_S)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _WorkerContext:
    """A multiprocessing context whose processes run our loop in place of torch's."""

    def __init__(
        self,
        context: Any,
        settings: FetchSettings,
        sockets: SocketFolder,
        held_signals: HeldSignals,
    ) -> None:
        self._context = context
        self._loop = functools.partial(_worker_loop, settings=settings, sockets=sockets)
        self._held_signals = held_signals
        self.queues: list[Any] = []

    def Queue(self) -> Any:  # noqa: N802 - its name there
        queue = self._context.Queue()
        self.queues.append(queue)
        return queue

    def Process(self, *, target: Any, args: tuple[Any, ...]) -> Any:  # noqa: N802 - its name there
        del target
        self._held_signals.heed()  # the workers before this one are known to torch
        if self._context.get_start_method() != "fork":
            return self._context.Process(target=self._loop, args=args)
        # Heeded when torch asks for the next worker, or has the last one.
        self._held_signals.hold()
        loop = functools.partial(_run_forked, self._held_signals, self._loop)
        return self._context.Process(target=loop, args=args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _run_forked(
    held_signals: HeldSignals, loop: Callable[..., None], *args: Any, **kwargs: Any
) -> None:
    held_signals.forget()
    loop(*args, **kwargs)


class PlainMainProcessIter(torch_internals.SingleProcessIter):
    """torch's iterator without workers, but that it can be closed."""

    _is_closed = False

    def _next_data(self) -> Any:
        if self._is_closed:
            raise RuntimeError(_CLOSED)
        return super()._next_data()

    def close(self) -> None:
        """Give no more batches."""
        self._is_closed = True


def _keep_dataset(state: EpochState, source: Source) -> None:
    frozen = source.read()
    if frozen is not None:
        state.datasets[0] = frozen


class _StreamView:
    """A loader, but that its dataset is one which says where it stands."""

    def __init__(self, loader: DataLoader[Any], dataset: StreamSource) -> None:
        self._loader = loader
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class MainStreamIter(PlainMainProcessIter):
    """torch's iterator without workers, over an iterable dataset that may have a state."""

    def __init__(
        self, loader: DataLoader[Any], settings: FetchSettings, state: EpochState, resumes: bool
    ) -> None:
        self._state = state
        order.Order(loader, state, resumes).begin()
        self._failures = loader._failures
        self._log = make_failure_log(settings.on_error)
        saved = state.datasets.get(0, state.dataset) if resumes else None
        self._source = StreamSource(loader.dataset, saved, self._log)
        super().__init__(_StreamView(loader, self._source))

    def _next_data(self) -> Any:
        try:
            data = self._make_batch()
        except StopIteration:
            self._state.restart()
            if self._failures is not None:
                self._failures.end()
            raise
        self._state.num_taken += 1
        _keep_dataset(self._state, self._source)
        return data

    def _make_batch(self) -> Any:
        if self._failures is None or self._log is None:
            return super()._next_data()
        try:
            data = super()._next_data()
        finally:
            number = self._state.num_taken
            failed = self._log.take(number)
            if failed is not None:
                self._failures.hold(failed)
            self._failures.take(number, may_raise=False)
        self._failures.check()
        return data


class MainProcessIter(PlainMainProcessIter):
    """torch's iterator without workers, over samples that were fetched ahead in this process."""

    def __init__(
        self, loader: DataLoader[Any], settings: FetchSettings, state: EpochState, resumes: bool
    ) -> None:
        self._state = state
        self._order = order.Order(loader, state, resumes)
        self._order.begin()
        if resumes and state.begin is not None:
            write_generators(state.begin)  # for a while: the loader puts them back
        super().__init__(loader)
        self._ahead: list[tuple[Batch, bytes | None]] = []
        self._failures = loader._failures
        self._num_asked = 0
        failures = make_failure_log(settings.on_error)
        self._fetched = FetchedDataset(self._dataset, settings, self._auto_collation, failures)
        if self._failures is not None:
            self._collate_fn = functools.partial(collate_what_is_left, self._collate_fn)
        self._dataset_fetcher = torch_internals.DatasetKind.create_fetcher(
            self._dataset_kind,
            self._fetched,
            self._auto_collation,
            self._collate_fn,
            self._drop_last,
        )

        self._source = MapSource(loader.dataset, state.datasets.get(0) if resumes else None)
        self._source.load()
        if resumes and state.first is not None:
            self._begin_ahead()

    def _next_data(self) -> Any:
        data = self._make_batch()
        _keep_dataset(self._state, self._source)
        return data

    def _next_index(self) -> Batch:
        self._begin_ahead()
        if not self._ahead:
            self._fetched.close()
            self._state.restart()
            raise StopIteration
        self._state.num_taken += 1
        batch, self._state.sampler = self._ahead.pop(0)
        self._num_asked = count_samples(batch.positions, is_batch=self._auto_collation)
        return batch

    def _make_batch(self) -> Any:
        if self._failures is None or self._fetched.failures is None:
            return super()._next_data()
        data: Any = LeftOut
        while data is LeftOut:
            try:
                data = super()._next_data()
            except StopIteration:
                self._failures.end()
                raise
            finally:
                failed = self._fetched.failures.take(self._state.num_taken)
                self._failures.record(self._num_asked, () if failed is None else failed.failures)
                self._num_asked = 0
            self._failures.check()
        return data

    def _begin_ahead(self) -> None:
        if not self._order.is_open:
            self._sampler_iter = self._order.open(self._sampler_iter)
        with contextlib.suppress(StopIteration):
            while len(self._ahead) <= self._fetched.batch_pool:
                self._ahead.append((Batch(super()._next_index()), self._order.read()))
        self._fetched.begin(*(batch for batch, _ in self._ahead))

    def close(self) -> None:
        """End the threads that fetch."""
        super().close()
        self._ahead.clear()
        self._fetched.close()

    def __del__(self, is_at_end: Callable[[], bool] = sys.is_finalizing) -> None:
        # At Python's end threads stand still, and modules have been taken apart, so that `close`
        # could call nothing. The function is bound here, since `sys` may be gone, too.
        if "_fetched" in self.__dict__ and not is_at_end():
            self._fetched.close()
