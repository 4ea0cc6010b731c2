"""The index queue of a worker: begins batches before it hands them out."""

from __future__ import annotations

import collections
import contextlib
import itertools
import queue
from collections.abc import Callable
from typing import Any

from concurrent_dataloader.dataloader_mod.allocator import trim_memory
from concurrent_dataloader.dataloader_mod.fetched import Batch, FetchedDataset
from concurrent_dataloader.dataloader_mod.orphan import CHECK_INTERVAL_S
from concurrent_dataloader.dataloader_mod.settings import FetchSettings


class BatchTaken:
    """Sent on the index queue, as the class itself: the parent handed out a batch from here."""


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
            trim_memory()
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
