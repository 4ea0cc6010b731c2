"""The loader: torch's, whose workers fetch many samples at once and several batches ahead."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.context import BaseContext
from typing import Any, Self, TypeVar

import torch
import torch.utils.data

from concurrent_dataloader.dataloader_mod import order, parting, torch_internals
from concurrent_dataloader.dataloader_mod.failures import (
    EpochFailures,
    ErrorBudget,
    ErrorReport,
    OnError,
    check_policy,
    check_timeout,
)
from concurrent_dataloader.dataloader_mod.iterators import (
    MainProcessIter,
    MainStreamIter,
    PlainMainProcessIter,
    WorkersIter,
)
from concurrent_dataloader.dataloader_mod.resume import (
    EpochState,
    generators_at,
    read_generators,
)
from concurrent_dataloader.dataloader_mod.settings import (
    DEFAULT_NUM_FETCH_WORKERS,
    MAX_BATCH_POOL,
    MAX_CHOSEN_FETCH_WORKERS,
    MAX_NUM_FETCH_WORKERS,
    FetchImpl,
    FetchSettings,
    check_count,
    check_dataset,
    check_fetch_impl,
    choose_batch_pool,
)

T_co = TypeVar("T_co", covariant=True)

_SAMPLERS_THAT_DRAW_AT_ONCE = (
    torch.utils.data.SequentialSampler,
    torch.utils.data.RandomSampler,
    torch.utils.data.SubsetRandomSampler,
    torch.utils.data.WeightedRandomSampler,
    torch.utils.data.DistributedSampler,
)
"""Samplers whose draws from the global generators do not lie between two batches."""


# Not an attribute, so that loaders can be pickled, and frameworks see only what the user gave.
_open_iterators: weakref.WeakKeyDictionary[DataLoader[Any], weakref.WeakSet[Any]]
_open_iterators = weakref.WeakKeyDictionary()


class DataLoader(torch.utils.data.DataLoader[T_co]):
    """torch's DataLoader for data behind latency: the same batches, without the waiting.

    Takes all that torch's takes, with the same meaning, and three settings of its own. For a
    map-style dataset each worker fetches up to ``num_fetch_workers`` samples at once, and begins up
    to ``batch_pool`` batches beyond the one that it assembles. Batches come in sampler order, each
    sample once. Of a `StagedDataset` only ``fetch`` runs in the background, so that random
    transforms draw as under torch's loader and batches are equal to its, bit for bit; of any other
    dataset all of ``__getitem__`` does. An iterable dataset is read as torch reads it.

    A batch lies in shared memory that is used again once nothing refers to it: no tensor, view,
    numpy array or saved gradient.

    Args:
        dataset: As torch's; so are all arguments up to ``in_order``. An iterable one that has
            ``set_batch_size`` is told it.
        batch_size: As torch's.
        shuffle: As torch's.
        sampler: As torch's, but asked for ``batch_pool`` batches more in advance.
        batch_sampler: As torch's, but asked likewise.
        num_workers: As torch's. With 0, threads of the main process fetch ahead.
        collate_fn: As torch's.
        pin_memory: As torch's.
        drop_last: As torch's.
        timeout: Seconds that a worker waits for the samples of a batch, from when it turns to the
            batch; the error then names what is missing. 0: without end. Should the worker not
            answer at all, it is named after as long again, 1 to 10 s; of an iterable dataset it is
            at once. Needs workers.
        worker_init_fn: As torch's.
        multiprocessing_context: As torch's: fork, spawn and forkserver.
        generator: As torch's.
        prefetch_factor: As torch's: finished batches that wait for the training loop, per worker.
        persistent_workers: As torch's.
        pin_memory_device: As torch's.
        in_order: As torch's.
        fetch_impl: ``"threaded"``; ``"asyncio"`` awaits the dataset's ``fetch_async`` (or
            ``getitem_async`` of a plain dataset) on an event loop, and falls back to threads for a
            dataset that has none; ``"vanilla"`` is torch's own loader.
        num_fetch_workers: Samples in flight per worker, up to 4096, and as many requests of stores
            of `open_store`; None: up to 256, as many as turn out to be of use; without such a store
            up to 128, fewer where they compute instead of waiting.
        batch_pool: Batches begun ahead of the one being assembled, per worker, up to 4096; 0 is
            off; None: so many that twice as many samples are begun as may be in flight, and at
            least two.
        on_error: What becomes of a sample whose fetch, decode or transform raises. ``"raise"``:
            its error is the batch's. ``"skip"``: it is left out; its batch is shorter, and a batch
            of which nothing is left is not handed out, so that there may be fewer than ``len`` of
            the loader says; no later sample moves up. ``"replace"``: a copy of the next good sample
            of the batch takes its place, so that there are as many batches as ever and each has its
            size; where none is good, the error is raised. The other samples are torch's, but for
            random numbers that a failed transform had drawn. What anything else raises is never
            passed over: the collate function, the sampler, ``worker_init_fn``, the loader, its
            ``timeout``. Of iterable datasets, only `StreamedShards` and others that are a
            `SkippingStream` go on, with ``"skip"``: after a sample, or with the next shard; later
            samples move up.
        error_budget: How many samples of an epoch may be passed over; None: `ErrorBudget()`. The
            rest of a shard counts by its samples, or as one where no index tells them.
        quarantine_file: The main process adds a line of JSON for each sample that is passed over,
            once its batch is handed out; ``concurrent-dataloader validate --from`` reads it. None:
            no file.

    Raises:
        ValueError: As torch's; ``fetch_impl`` or ``on_error`` is unknown, or does not go with the
            others; a count is below its minimum.
        TypeError: ``dataset`` is none, such as a store or a name; a count is not a whole number,
            ``timeout`` no number, a budget no `ErrorBudget`, or ``quarantine_file`` no path.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset[T_co],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: torch.utils.data.Sampler[Any] | Iterable[Any] | None = None,
        batch_sampler: torch.utils.data.Sampler[list[Any]] | Iterable[list[Any]] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: BaseContext | str | None = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        fetch_impl: FetchImpl = "threaded",
        num_fetch_workers: int | None = None,
        batch_pool: int | None = None,
        on_error: OnError = "raise",
        error_budget: ErrorBudget | None = None,
        quarantine_file: str | os.PathLike[str] | None = None,
    ) -> None:
        check_dataset(dataset)
        self.fetch_impl: FetchImpl = check_fetch_impl(fetch_impl)
        if num_fetch_workers is not None:
            check_count(num_fetch_workers, 1, "num_fetch_workers", MAX_NUM_FETCH_WORKERS)
        if batch_pool is not None:
            check_count(batch_pool, 0, "batch_pool", MAX_BATCH_POOL)
        check_timeout(timeout, num_workers)
        self.num_fetch_workers = num_fetch_workers
        self.batch_pool = batch_pool
        self.on_error: OnError = on_error
        self.error_budget = error_budget
        self.quarantine_file = quarantine_file
        self._failures: EpochFailures | None = None
        self._epoch_state = EpochState()
        self._resumes = False
        super().__init__(
            dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            num_workers,
            collate_fn,
            pin_memory,
            drop_last,
            timeout,
            worker_init_fn,
            multiprocessing_context,
            generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
            in_order=in_order,
        )
        is_map = self._dataset_kind == torch_internals.DatasetKind.Map
        check_policy(self, is_concurrent=is_map and fetch_impl != "vanilla")

    def close(self) -> None:
        """End what this loader's iterators have running: workers, threads, shared memory.

        Batches that were handed out stay as they are. An iterator that was in the middle of its
        epoch cannot go on; iterating anew begins anew. May be called twice.
        """
        for iterator in list(_open_iterators.get(self, ())):
            iterator.close()
        self._iterator = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def error_report(self) -> ErrorReport:
        """Say which samples of this epoch, or of the last one, were passed over by ``on_error``.

        It counts batches that were taken; after a `load_state_dict`, those since.
        """
        return ErrorReport(0, 0, 0, ()) if self._failures is None else self._failures.report()

    def state_dict(self) -> dict[str, Any]:
        """Say how far the epoch is, for `load_state_dict` of a loader that is made alike.

        Returns:
            What ``torch.save`` writes and ``torch.load(weights_only=True)`` reads, if a sampler's
            own state is. It is that after the last batch that was taken, whatever is under way.
            Between epochs it says that the next one has not begun.

        Raises:
            ValueError: The order cannot be had again: the dataset is iterable without a state of
                its own, ``in_order`` is off, or ``fetch_impl`` is "vanilla".
        """
        state = self._epoch_state
        self._check_resumable(state)
        if state.begin is None:
            state = order.describe_between_epochs(self)
        elif not self._resumes:
            state = order.describe_unasked(self, state)
        return state.to_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Let the next iteration go on where `state_dict` was called.

        It gives the batches after those that were taken, which are not fetched again; what was
        begun ahead and not taken is. A sampler, batch sampler or their iterator that has
        ``state_dict`` and ``load_state_dict`` is put into its state when the iteration begins; any
        other is asked again for what was taken. The order stays also with another number of
        workers. With as many workers, on the same rank, their transforms also draw the same random
        numbers; draws in the main process are the caller's to restore, and other workers are
        seeded as new ones. Another number of ranks needs an `ElasticDistributedSampler`. A sampler
        has to be told its epoch, as ever. Ends iterators that are under way.

        Of an iterable dataset that is an `ElasticStream`, as `StreamedShards` with an index, the
        rest of the epoch goes on with another number of workers, and of ranks if the states of all
        ranks are given. Other iterable datasets go on with as many only.

        Args:
            state_dict: This rank's, or a list of those of all ranks, saved at the same step, in any
                order. Of a list of as many ranks as there are now each takes its own.

        Raises:
            ValueError: As `state_dict`; this is no state of a loader, or that of one which was made
                otherwise, so that the order would be another; or a rank's is missing.
        """
        state = parting.choose_state(self, parting.read_states(state_dict))
        self._check_resumable(state)
        order.take_over(self, state)
        self.close()
        self._epoch_state = state
        self._resumes = state.begin is not None

    def _check_resumable(self, state: EpochState) -> None:
        is_map = self._dataset_kind == torch_internals.DatasetKind.Map
        is_lost = torch_internals.is_data_pipe(self.dataset) or (
            not is_map and state.num_taken > 0 and not state.datasets
        )
        reasons = {
            "dataset: got an iterable one that has no state_dict, nor has its iterator, expected "
            "one that has it, or one with positions": is_lost,
            "in_order: got False, expected True": not self.in_order,
            "fetch_impl: got 'vanilla', expected 'threaded' or 'asyncio'": (
                self.fetch_impl == "vanilla"
            ),
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"{reason}, to resume an epoch")

    def _get_iterator(self) -> Any:
        if self.on_error != "raise":
            epoch = 0 if self._failures is None else self._failures.epoch + 1
            budget = self.error_budget or ErrorBudget()
            self._failures = EpochFailures(self.on_error, budget, self.quarantine_file, epoch)
        if self._resumes:
            self._resumes = False
            # What the sampler draws to come to where it was must not show outside.
            with generators_at(read_generators()):
                iterator = self._make_iterator(resumes=True)
        else:
            loaded = self._epoch_state.sampler if self._epoch_state.begin is None else None
            self._epoch_state = EpochState(sampler=loaded)
            iterator = self._make_iterator(resumes=False)
        _open_iterators.setdefault(self, weakref.WeakSet()).add(iterator)
        return iterator

    def _make_iterator(self, resumes: bool) -> Any:
        settings, state = self._choose_settings(), self._epoch_state
        if settings.sends_states and self.batch_size is not None:
            order.tell_batch_size(self.dataset, self.batch_size)
        if self.num_workers > 0:
            self.check_worker_number_rationality()
            return WorkersIter(self, settings, state, resumes)
        if not settings.sends_states:
            return PlainMainProcessIter(self)
        is_map = self._dataset_kind == torch_internals.DatasetKind.Map
        return (MainProcessIter if is_map else MainStreamIter)(self, settings, state, resumes)

    def _choose_settings(self) -> FetchSettings:
        num_fetch_workers = self.num_fetch_workers or DEFAULT_NUM_FETCH_WORKERS
        max_fetch_workers = None if self.num_fetch_workers else MAX_CHOSEN_FETCH_WORKERS
        batch_pool, max_batch_pool = self.batch_pool, None
        is_map = self._dataset_kind == torch_internals.DatasetKind.Map
        if not is_map or self.fetch_impl == "vanilla":
            batch_pool = 0
        elif batch_pool is None:
            batch_pool = self._choose_batch_pool(num_fetch_workers)
            if max_fetch_workers is not None:
                max_batch_pool = self._choose_batch_pool(max_fetch_workers)
        return FetchSettings(
            fetch_impl=self.fetch_impl,
            num_fetch_workers=num_fetch_workers,
            max_fetch_workers=max_fetch_workers,
            batch_pool=batch_pool,
            max_batch_pool=max_batch_pool,
            prefetch_factor=self.prefetch_factor or 0,
            takes_counted=is_map and self.fetch_impl != "vanilla",
            on_error=self.on_error,
            timeout_s=self.timeout,
            sends_states=(
                self.fetch_impl != "vanilla" and not torch_internals.is_data_pipe(self.dataset)
            ),
        )

    def _choose_batch_pool(self, num_fetch_workers: int) -> int:
        if self.batch_sampler is None:
            batch_size, sampler = 1, self.sampler
        else:
            batch_size = getattr(self.batch_sampler, "batch_size", None)
            batch_size = batch_size if isinstance(batch_size, int) else None
            sampler = self.batch_sampler
            if type(sampler) is torch.utils.data.BatchSampler:
                sampler = sampler.sampler
        if self.num_workers == 0 and type(sampler) not in _SAMPLERS_THAT_DRAW_AT_ONCE:
            # It may draw from the same global generators as the transforms, and then has to draw
            # between two batches, as with torch.
            return 0
        return choose_batch_pool(num_fetch_workers, batch_size)
