"""A sampler for many ranks, whose epoch may go on over another number of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch.utils.data import DistributedSampler
from typing_extensions import override

_VERSION = 1


class ElasticDistributedSampler(DistributedSampler[int]):
    """torch's ``DistributedSampler``, but that an epoch can be resumed, also over other ranks.

    From its begin an epoch gives each rank what a ``DistributedSampler`` with the same arguments
    gives it. Its samples stand in one row, permuted by ``seed + epoch``, which ranks take turns to
    read: when each has got ``n`` samples, the first ``n * num_replicas`` of the row are consumed.
    That number is the state. It is the same on all ranks if all are at the same step, so any one of
    them may be saved, and any number of ranks can part the rest of the row: each of its samples
    comes once, but that, as ever, a few of the row's first ones come again to give all ranks
    equally many, or with ``drop_last`` fewer than ``num_replicas`` at the end are left out.

    A `DataLoader` of this package, or ``torchdata``'s, keeps the state in its own, of the last
    batch that was taken. torch's keeps none: save ``sampler.state_dict(num_delivered=...)`` beside
    it. ``len`` is that of a whole epoch.

    Call `set_epoch` before each epoch, as ever, and after a resume with the epoch that goes on.
    Another epoch than that of a loaded state begins at its first sample.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        """Take the arguments of ``DistributedSampler``, with the same meaning.

        Args:
            dataset: Whose positions are given; only its length counts.
            num_replicas: Ranks; None: as ``torch.distributed`` says.
            rank: This one; None: as ``torch.distributed`` says.
            shuffle: Whether the row is permuted.
            seed: Of the permutation, the same on all ranks.
            drop_last: Whether samples that do not suffice for all ranks are left out.
        """
        super().__init__(
            dataset,  # pyright: ignore[reportArgumentType]: torch wants a Dataset, and uses its length
            num_replicas,
            rank,
            shuffle,
            seed,
            drop_last,
        )
        self._num_positions = len(dataset)
        # The iteration under way, or the next one if that was loaded: where in the row it begins,
        # how many samples this rank has got in it, and how many it gets in all.
        self._start = 0
        self._num_given = 0
        self._num_mine: int | None = None
        self._is_loaded = False

    @override
    def __iter__(self) -> Iterator[int]:
        if not self._is_loaded:
            self._start = 0
        self._is_loaded = False
        mine = self._part_rest()
        self._num_given, self._num_mine = 0, len(mine)
        for position in mine:
            self._num_given += 1
            yield position

    def _part_rest(self) -> list[int]:
        """Give this rank's share of what is not consumed."""
        row = torch.arange(self._num_positions)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            row = torch.randperm(self._num_positions, generator=generator)
        rest = row[self._start :]
        missing = -len(rest) % self.num_replicas
        if missing and self.drop_last:
            rest = rest[: len(rest) + missing - self.num_replicas]
        elif missing:
            times = -(-missing // len(row))
            rest = torch.cat([rest, row.repeat(times)[:missing]])
        return rest[self.rank :: self.num_replicas].tolist()

    @override
    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is of; another than before begins at its begin."""
        if epoch != self.epoch:
            self._restart(0)
        super().set_epoch(epoch)

    def _restart(self, start: int) -> None:
        self._start, self._num_given, self._num_mine, self._is_loaded = start, 0, None, start > 0

    def state_dict(self, num_delivered: int | None = None) -> dict[str, Any]:
        """Say how much of the epoch is consumed by all ranks, if they are at the same step.

        Args:
            num_delivered: Samples that this rank has got since the iteration began (batches times
                their size; the last may have been smaller), for a loader that asks ahead and keeps
                no state. None: as many as were asked for.

        Returns:
            Numbers and truth values only.
        """
        num_given = self._num_given if num_delivered is None else num_delivered
        consumed = min(self._start + num_given * self.num_replicas, self._num_positions)
        if self._num_mine is not None and num_given >= self._num_mine:
            consumed = self._num_positions  # what was dropped stays dropped
        return {
            "version": _VERSION,
            "epoch": self.epoch,
            "num_consumed": consumed,
            "num_positions": self._num_positions,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next iteration go on after what was consumed, in the epoch of the state.

        Raises:
            ValueError: It is no state, or that of another row.
        """
        mine = self.state_dict()
        for name, value in mine.items():
            is_fixed = name not in ("epoch", "num_consumed")
            if name not in state_dict or (is_fixed and state_dict[name] != value):
                raise ValueError(
                    f"load_state_dict: {type(self).__name__}: got {name} {state_dict.get(name)!r}, "
                    f"expected {repr(value) if is_fixed else 'a number'}; give it what "
                    "state_dict() gave, of the same dataset, shuffle and seed"
                )
        self.epoch = int(state_dict["epoch"])
        self._restart(int(state_dict["num_consumed"]))
