"""Who reads a stream, and in which epoch: what it asks of torch, and what it is told."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed
from torch.utils.data import get_worker_info

from concurrent_dataloader.datasets._split import Reader


class Epoch(NamedTuple):
    """What an epoch's order is drawn with."""

    split: int
    """The order of the shards: the same on all ranks, since they part it."""

    local: int
    """Everything else: the same in all workers of a loader."""


class Place:
    """Finds out for which rank and worker this process reads. Pickles."""

    def __init__(self, explicit: tuple[int, int] | None) -> None:
        """Take a rank and the number of ranks; None: those of ``torch.distributed``."""
        self._explicit = explicit
        self._found: tuple[int, int] | None = None

    def find_rank(self) -> tuple[int, int]:
        """Give the rank and the number of ranks.

        What was found once stays known, also in a spawned worker, which has no process group.
        """
        if self._explicit is not None:
            return self._explicit
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._found = (torch.distributed.get_rank(), torch.distributed.get_world_size())
        return self._found or (0, 1)

    def find_reader(self) -> Reader:
        """Give the worker of the rank, too."""
        rank, world_size = self.find_rank()
        info = get_worker_info()
        if info is None:
            return Reader(rank, world_size)
        return Reader(rank, world_size, info.id, info.num_workers)

    def __getstate__(self) -> dict[str, Any]:
        """Keep the rank, which a spawned worker could not ask for."""
        self.find_rank()
        return self.__dict__


class EpochCounter:
    """Numbers epochs, as they are set, or by counting. Pickles; all workers hear what is set."""

    def __init__(self) -> None:
        # Shared with workers: the epoch, and how often it was set.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._num_set = 0
        # Of this process: the epoch that was set last, and iterations since.
        self.first: int | None = None
        self.iteration = -1

    def set(self, epoch: int) -> None:
        """Say which epoch the next iteration is, in all processes."""
        self._shared[0] = epoch
        self._shared[1] += 1

    def notice_set(self, *, before_it: bool = False) -> bool:
        """Take over what was set since the last time, in the iteration that begins or before it."""
        num_set = int(self._shared[1])
        if num_set == self._num_set:
            return False
        self._num_set, self.first = num_set, int(self._shared[0])
        self.iteration = -1 if before_it else 0
        return True

    def go_on_at(self, first: int | None, iteration: int) -> None:
        """Count on from where another counter was."""
        self.first, self.iteration = first, iteration

    def pass_over_set(self) -> None:
        """Let what was set so far not count."""
        self._num_set = int(self._shared[1])

    def next(self, world_size: int) -> Epoch:
        """Begin the next epoch, in one of so many ranks."""
        if not self.notice_set():
            self.iteration += 1
        if self.first is not None:
            epoch = self.first + self.iteration
            return Epoch(epoch, epoch)
        info = get_worker_info()
        if info is None:
            return Epoch(self.iteration, self.iteration)
        # A worker that starts anew each time knows an epoch only by the loader's seed, which other
        # ranks need not share.
        drawn = info.seed - info.id + self.iteration
        return Epoch(drawn if world_size == 1 else self.iteration, drawn)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over all, and share what workers share."""
        self.__dict__.update(state)
        self._shared.share_memory_()
