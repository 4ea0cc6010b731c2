"""What each reader of a stream reads in an epoch, or in what is left of one: pure."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import warnings
from typing import Any

from concurrent_dataloader.datasets import _rest
from concurrent_dataloader.datasets._rest import Part
from concurrent_dataloader.datasets._shard_samples import ShardList
from concurrent_dataloader.datasets._split import (
    Reader,
    Segment,
    ShardTable,
    Uneven,
    draw_order,
    plan_segments,
    plan_whole_shards,
)
from concurrent_dataloader.datasets._stream_place import Epoch


@dataclasses.dataclass(kw_only=True, slots=True)
class StreamPlan:
    """All that the order of samples depends on, but for epoch and reader. Pickles."""

    shards: ShardList
    table: ShardTable | None
    """None without an index."""

    seed: int
    shuffles: bool
    buffer_size: int
    num_open: int
    uneven: Uneven
    batch_size: int | None = None
    """The loader's; None as long as it is not known."""

    def where(self) -> str:
        """Name the shards for a person."""
        return self.shards.describe(0)

    def name_draws(self, what: str, reader: Reader, epoch: Epoch, part: Part | None) -> str:
        """Give what seeds the draws of a reader."""
        seed = f"{what} {self.seed} {epoch.local} {reader.rank} {reader.worker}"
        return seed if part is None else f"{seed} {self._count_left(part)}"

    def plan(
        self, reader: Reader, epoch: Epoch, part: Part | None, batch_size: int | None
    ) -> list[Segment]:
        """Plan what a reader reads in an epoch, or in a part of it.

        Raises:
            ValueError: The ranks cannot be given what was promised.
        """
        order = draw_order(len(self.shards), self.seed, epoch.split if self.shuffles else None)
        if self.table is None:
            self._check_whole_shards(reader)
            return plan_whole_shards(order, reader)
        if part is None:
            self._check_enough(reader.world_size)
            row = self.table.whole_row(order)
        else:
            if self.shuffles:
                drawn = f"rest {self.seed} {epoch.split} {self._count_left(part)}"
                random.Random(drawn).shuffle(order)
            left = _rest.unpack(part.left, self.table.num_samples)
            row = _rest.cut_at_shards(self.table, left, order)
        shuffle = None
        if self.shuffles:
            shuffle = random.Random(self.name_draws("segments", reader, epoch, part))
        if part is not None and not part.is_shared:
            reader = reader._replace(rank=0, world_size=1)
        return plan_segments(
            self.table,
            row,
            reader,
            uneven=self.uneven,
            batch_size=batch_size,
            shuffle=shuffle,
            num_open=self.num_open,
        )

    def describe(self, reader: Reader) -> dict[str, Any]:
        """Give all that the order depends on."""
        names = hashlib.sha256("\0".join(self.shards.keys).encode("utf-8", "surrogateescape"))
        return {
            "shards": names.hexdigest(),
            "has_index": self.table is not None,
            "seed": self.seed,
            "shuffle": self.shuffles,
            "shuffle_buffer": self.buffer_size,
            "num_open": self.num_open,
            "batch_size": self.batch_size,
            "uneven": self.uneven,
            **reader._asdict(),
        }

    def _count_left(self, part: Part) -> int:
        assert self.table is not None, "only an index tells parts"
        return _rest.count(_rest.unpack(part.left, self.table.num_samples))

    def _check_enough(self, world_size: int) -> None:
        assert self.table is not None
        num_samples = self.table.num_samples
        if self.uneven == "drop" and num_samples < world_size:
            raise ValueError(
                f"{self.where()}: got {num_samples} samples for {world_size} ranks, expected one "
                "for each; take uneven='pad' or 'exact'"
            )

    def _check_whole_shards(self, reader: Reader) -> None:
        """Refuse what would leave a rank without batches, on all ranks alike."""
        num_shards, world_size = len(self.shards), reader.world_size
        how = "write one with `concurrent-dataloader index`"
        if world_size > 1 and self.uneven != "exact":
            raise ValueError(
                f"{self.where()}: no index, expected one to give {world_size} ranks equally many "
                f"samples (uneven={self.uneven!r}); {how}, or take uneven='exact'"
            )
        if num_shards < world_size:
            raise ValueError(
                f"{self.where()}: got {num_shards} shards without an index for {world_size} "
                f"ranks, expected one for each; {how}"
            )
        if num_shards < world_size * reader.num_workers and reader.worker == 0:
            warnings.warn(
                f"{self.where()}: got {num_shards} shards without an index for {world_size} ranks "
                f"of {reader.num_workers} workers, expected one for each; some workers idle; {how}",
                stacklevel=2,
            )
