"""Samples of shards, each shard read from front to back: an iterable data set."""

from __future__ import annotations

import hashlib
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info
from typing_extensions import override

from concurrent_dataloader.datasets import _rest, _stream_state
from concurrent_dataloader.datasets._items import DEFAULT_FIELDS, Fields, ItemMaker
from concurrent_dataloader.datasets._rest import Part
from concurrent_dataloader.datasets._shard_list import find_shards
from concurrent_dataloader.datasets._shard_reader import RawSample, ReadSettings, ShardReader
from concurrent_dataloader.datasets._split import (
    Reader,
    Segment,
    ShardTable,
    Uneven,
    draw_order,
    plan_segments,
    plan_whole_shards,
    rank_span,
)
from concurrent_dataloader.datasets.contract import Loss, ReaderState
from concurrent_dataloader.datasets.indexed import Decode
from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.shard_index import NO_LABEL, ShardIndex
from concurrent_dataloader.shard_names import Split
from concurrent_dataloader.stores.base import Store

__all__ = ["ReadSettings", "StreamedShards"]

_NUM_COUNTS = 256
"""Places for counts that workers keep; each has its own, so that none is lost."""


class _Epoch(NamedTuple):
    """What an epoch's order is drawn with."""

    split: int
    """The order of the shards: the same on all ranks, since they part it."""

    local: int
    """Everything else: the same in all workers of a loader."""


class _Iteration(NamedTuple):
    """Whose iteration it is, and what it reads."""

    epoch: _Epoch
    reader: Reader
    part: Part | None


class StreamedShards(IterableDataset[Any]):
    """The samples of tar shards (or TFRecords), for torch's ``DataLoader`` and ours.

    Several shards are read at once, in large ranged requests that are under way before they are
    needed. Each sample comes once an epoch over all ranks and workers, which part the samples, not
    the shards, where an index of byte ranges lies beside the shards (`ShardIndex`, which
    ``concurrent-dataloader`` writes): then there may be fewer shards than readers, and lengths are
    known. Without one each reader takes whole shards.

    **Order.** Unshuffled, samples come in the order of the shards; given ``batch_size`` and an
    index, the loader's batches are then the same for any number of workers. Shuffled, the order is
    drawn with ``seed`` and the epoch, and never from the global generators: shards are permuted,
    ``num_open`` are read in turn, and the next sample is drawn of ``shuffle_buffer``.

    **Epochs.** Call `set_epoch` before each epoch, as for a ``DistributedSampler``; persistent
    workers hear of it too. An iteration after one that it was called for has the next number. Where
    it was never called, iterations in one process and in persistent workers count from 0; workers
    that are started anew each time draw with the loader's seed, which ``torch.manual_seed`` fixes,
    but for the split between ranks, which then stays.

    **Lengths.** ``len(dataset)`` is the number of samples of this rank. ``len(loader)`` is the
    number of its batches, if there is one worker at most or ``batch_size`` is told, with and
    without ``drop_last``; only the last batch may be smaller. Where ``on_error="skip"`` passes over
    samples, there may be fewer, and the last batch of each worker may be smaller. Where the number
    is not known (no index and no ``length``, or samples may be skipped), ``len`` raises TypeError.

    **Resuming.** `state_dict` and `load_state_dict`, as the `DataLoader` of this package and
    ``torchdata``'s ``StatefulDataLoader`` call them in workers. Bytes of samples that were
    delivered are not fetched again, but those that lie between samples of the buffer; compressed
    shards and commands are read again from their begin, without decoding. With as many ranks and
    workers an epoch goes on as if it had not been left. Where an index tells where samples lie, it
    also goes on with others, and another ``batch_size``: what is left, which all old readers
    together tell, is parted anew among the ranks as ``uneven`` says, and among their workers in
    whole batches; each sample comes once over both parts. Unshuffled, the rest keeps its order;
    shuffled, it has an order of its own, drawn with ``seed``, the epoch and how much is left.
    Give `load_state_dict` a list of the states of all ranks, saved at the same step, for another
    number of ranks; for other workers that of the same rank will do. With "drop" and "pad" the
    bound holds each time that the rest is parted: samples of the rest are left out, or come again,
    less than one a rank. What ``on_error="skip"`` passed over is not tried again. Lengths stay
    those of a whole epoch. Random draws of transforms are kept by the `DataLoader` here for as many
    ranks and workers, and else the caller's to restore; other workers are seeded as new ones.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        split: Split | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        fields: Fields = DEFAULT_FIELDS,
        decode: Decode = "pillow",
        raw_size: tuple[int, int] | None = None,
        decoders: Mapping[str, Callable[[bytes], Any]] | None = None,
        label_base: int | None = None,
        labels: NDArray[np.integer[Any]] | None = None,
        missing: Literal["error", "skip"] = "error",
        shuffle: bool = False,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        batch_size: int | None = None,
        uneven: Uneven | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        index: ShardIndex | str | os.PathLike[str] | None = "auto",
        length: int | None = None,
        reading: ReadSettings | None = None,
        allow_pipe: bool = False,
        store: Store | None = None,
        **store_options: Any,
    ) -> None:
        """Find the shards: one listing, or a HEAD for each where nothing can be listed.

        Args:
            shards: A folder or ``s3://bucket/prefix/``; paths or URLs, with brace ranges
                (``train-{000000..000489}.tar``) or globs; a list of these; ``pipe:COMMAND``, whose
                output is a shard; or ``fake:N``, one photo-like sample repeated ``N`` times,
                without any reading, to measure what comes after it. Endings: ``.tar``,
                ``.tar.gz``, ``.tar.bz2``, ``.tar.xz``, ``.tfrecord`` and
                ``train-00000-of-01024``.
            split: "train", "val" or "test": the shards that have it in their name. None: all, which
                must then be of one.
            transform: Of each decoded image. May be random; called in the order of delivery.
            target_transform: Of each label.
            fields: What items are made of, as `Fields` says; the default gives
                ``(image, label)``.
            decode: Of image fields: "pillow" (an RGB image), "torchvision" (a uint8 RGB tensor), a
                function of the raw bytes, None for these. ``pth`` and pixels without a header
                become what these give, ``cls`` an int, ``json`` what it holds (bytes if None);
                anything else stays bytes.
            raw_size: Height and width of pixels without a header, as of `FieldDecoder`.
            decoders: Functions of the raw bytes for other fields, or instead of these rules.
            label_base: What the field ``cls`` calls the first class; labels count from 0. None:
                labels are those of the index, as for random access; where it has none, 0 in tars,
                1 in TFRecords, as TensorFlow's builder writes them.
            labels: Of each sample of the index, in its order, instead of its own: such as those of
                a `ShardDataset` that were converted. (N,) of integers; -1: as the sample says.
            missing: What to do with a sample that lacks a field: raise, or leave it out and count
                it in `num_skipped`.
            shuffle: Whether to shuffle; the default suits validation.
            shuffle_buffer: Samples of which the next is drawn, as raw bytes in each worker.
            seed: Of the order.
            batch_size: The loader's, so that each worker makes whole batches; the `DataLoader` of
                this package tells it by itself.
            uneven: Where ranks cannot have equally many samples: "drop" leaves out less than one a
                rank (others each epoch), "pad" repeats less than one a rank, "exact" lets ranks
                differ by one sample. None: "drop" if shuffled, "exact" if not.
            rank: This process among ``world_size``; None: as ``torch.distributed`` says if it is
                initialised, else the only one.
            world_size: Give both or none.
            index: "auto": ``<begin of the names>-index.npz`` beside the shards, if it is there;
                an index, its path or URL; None: none.
            length: Samples of all shards, checked against what is there.
            reading: How much is read ahead.
            allow_pipe: Whether ``pipe:`` may run commands in a shell.
            store: Where the shards lie, instead of ``store_options``; shards are then keys in it.
            store_options: As `open_store` takes them, such as ``endpoint_url``.

        Raises:
            ValueError: An argument cannot be used.
            KeyNotFoundError: A shard is not there.
            IndexFormatError: The index is none, or not that of these shards.
        """
        super().__init__()
        if missing not in ("error", "skip"):
            raise ValueError(f"missing: got {missing!r}, expected 'error' or 'skip'")
        if uneven is not None and uneven not in get_args(Uneven):
            raise ValueError(f"uneven: got {uneven!r}, expected 'drop', 'pad' or 'exact'")
        _check_count("shuffle_buffer", shuffle_buffer, 1)
        self._explicit_rank = _check_rank(rank, world_size)
        self._found_rank: tuple[int, int] | None = None
        self._shards, self._table, index_labels = find_shards(
            shards, store, store_options, split=split, index=index, allow_pipe=allow_pipe
        )
        if length is not None:
            _check_count("length", length, 0)
            if self._table is not None and self._table.num_samples != length:
                raise ValueError(
                    f"length: got {length}, expected {self._table.num_samples}, as the index says"
                )
        self._labels = _choose_labels(labels, index_labels, label_base, self._table)
        if label_base is None:
            label_base = int(self._shards.is_records(0))
        self._items = ItemMaker(
            fields,
            decode=decode,
            raw_size=raw_size,
            decoders=decoders or {},
            label_base=label_base,
            transform=transform,
            target_transform=target_transform,
        )
        self._skips = missing == "skip"
        self._shuffles = shuffle
        self._buffer_size = shuffle_buffer if shuffle else 1
        self._seed = seed
        self._uneven: Uneven = uneven or ("drop" if shuffle else "exact")
        self._length = length
        self._reading = reading or ReadSettings()
        self._batch_size: int | None = None
        self.set_batch_size(batch_size)
        # Shared with workers: the epoch, how often it was set, and samples skipped by each worker.
        self._shared = torch.zeros(2 + _NUM_COUNTS, dtype=torch.int64).share_memory_()
        self._num_set = 0
        # Of this process: the epoch that was set last, and iterations since.
        self._first_epoch: int | None = None
        self._iteration = -1
        self._running: tuple[ShardReader, _Iteration] | None = None
        self._last: _Iteration | None = None
        self._state: dict[str, Any] | None = None
        # What was loaded, until a reader is known that goes on there.
        self._loaded: list[dict[str, Any]] | None = None

    @override
    def __repr__(self) -> str:
        known = "" if self._table is None else f"{self._table.num_samples} samples in "
        return f"{type(self).__name__}({known}{len(self._shards)} shards, {self._where()})"

    def _where(self) -> str:
        return self._shards.describe(0)

    # -- what comes

    def __len__(self) -> int:
        """Give the number of samples of this rank in an epoch.

        Raises:
            TypeError: It is not known.
        """
        if self._skips:
            raise TypeError("len: got missing='skip', expected 'error'; the length is not known")
        rank, world_size = self._find_rank()
        if self._table is not None:
            span = rank_span(self._table.num_samples, rank, world_size, self._uneven)
            return span.stop - span.start
        if self._length is None or world_size > 1:
            raise TypeError(
                f"len: {self._where()}: no index, expected one to know the length; write it with "
                "`concurrent-dataloader index`, or give length to a single rank"
            )
        return self._length

    @property
    def num_skipped(self) -> int:
        """Samples left out since the data set was made, in all workers of this machine's rank."""
        return int(self._shared[2:].sum())

    def set_transform(self, transform: Callable[[Any], Any] | None) -> None:
        """Replace the transform. Workers that have started keep the one before."""
        self._items.transform = transform

    def set_batch_size(self, batch_size: int | None) -> None:
        """Say which batches the loader makes, before it starts its workers."""
        if batch_size is not None:
            _check_count("batch_size", batch_size, 1)
        self._batch_size = batch_size

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is; persistent workers hear of it too."""
        _check_count("epoch", epoch, 0)
        self._shared[0] = epoch
        self._shared[1] += 1

    # -- iterating

    def __iter__(self) -> Iterator[Any]:
        """Begin an epoch, or go on with the one that was loaded; this worker's part of it.

        Raises:
            ValueError: The ranks cannot be given what was promised.
        """
        return self._begin(None)

    def iter_skipping(self, report: Callable[[Loss], None]) -> Iterator[Any]:
        """Begin as ``__iter__`` does, but pass over what cannot be had; `SkippingStream`.

        A sample that does not decode, or whose checksum is wrong, is passed over alone. Where a
        shard cannot be opened or read on, or its bytes are no samples any more, what came before is
        delivered, and the rest is passed over as one: of the shard, or of the part of it that this
        worker reads in one piece, where an index tells parts.
        """
        return self._begin(report)

    def _begin(self, report: Callable[[Loss], None] | None) -> Iterator[Any]:
        self._find_rank()
        reader = self._find_reader()
        loaded = self._settle(reader)
        state, part = None, None
        if loaded is not None and _stream_state.resumes(loaded):
            self._check_state(loaded, reader)
            self._notice_set_epoch()
            state, epoch = loaded["reader"], _Epoch(*loaded["epoch"])
            part = None if loaded["part"] is None else Part(*loaded["part"])
        else:
            epoch = self._next_epoch(reader)
        self._state = None
        shard_reader = ShardReader(
            self._shards,
            self._plan(reader, epoch, part, self._batch_size),
            self._reading,
            buffer_size=self._buffer_size,
            seed=self._name_draws("samples", reader, epoch, part),
            state=state,
            report=report,
        )
        self._running = (shard_reader, _Iteration(epoch, reader, part))
        return self._generate(*self._running, report)

    def _name_draws(self, what: str, reader: Reader, epoch: _Epoch, part: Part | None) -> str:
        """Give what seeds the draws of a reader."""
        seed = f"{what} {self._seed} {epoch.local} {reader.rank} {reader.worker}"
        return seed if part is None else f"{seed} {self._count_left(part)}"

    def _generate(
        self,
        shard_reader: ShardReader,
        iteration: _Iteration,
        report: Callable[[Loss], None] | None,
    ) -> Iterator[Any]:
        is_over = False
        try:
            for raw in shard_reader:
                sample = raw.sample
                label = self._label_at(raw.place)
                if self._skips and not self._items.is_whole(sample, label):
                    self._count_skipped()
                    continue
                shard = shard_reader.shard_of(raw)
                try:
                    item = self._items.read(sample, label, self._shards.describe(shard))
                except Exception as error:
                    if report is None:
                        raise
                    report(self._describe_loss(error, shard, raw))
                    continue
                yield item
            if not shard_reader.has_lost and iteration.part is None:
                self._check_length(shard_reader)
            is_over = True
        finally:
            if self._running is not None and self._running[0] is shard_reader:
                self._state = None if is_over else self.state_dict()
                self._running, self._last = None, iteration if is_over else None
            shard_reader.close()

    def _describe_loss(self, error: Exception, shard: int, raw: RawSample) -> Loss:
        sample = raw.sample
        is_checked = self._items.decodes_images
        where = self._shards.locate(shard, sample.extent, sample.key, is_checked=is_checked)
        return Loss(error, where, raw.place, 1)

    def _label_at(self, place: int | None) -> int | None:
        if self._labels is None or place is None:
            return None
        label = int(self._labels[place])
        return None if label == NO_LABEL else label

    def _plan(
        self, reader: Reader, epoch: _Epoch, part: Part | None, batch_size: int | None
    ) -> list[Segment]:
        """Plan what a reader reads in an epoch, or in a part of it."""
        order = draw_order(len(self._shards), self._seed, epoch.split if self._shuffles else None)
        if self._table is None:
            self._check_whole_shards(reader)
            return plan_whole_shards(order, reader)
        if part is None:
            self._check_enough(reader.world_size)
            row = self._table.whole_row(order)
        else:
            if self._shuffles:
                drawn = f"rest {self._seed} {epoch.split} {self._count_left(part)}"
                random.Random(drawn).shuffle(order)
            left = _rest.unpack(part.left, self._table.num_samples)
            row = _rest.cut_at_shards(self._table, left, order)
        shuffle = None
        if self._shuffles:
            shuffle = random.Random(self._name_draws("segments", reader, epoch, part))
        if part is not None and not part.is_shared:
            reader = reader._replace(rank=0, world_size=1)
        return plan_segments(
            self._table,
            row,
            reader,
            uneven=self._uneven,
            batch_size=batch_size,
            shuffle=shuffle,
            num_open=self._reading.num_open,
        )

    def _count_left(self, part: Part) -> int:
        assert self._table is not None, "only an index tells parts"
        return _rest.count(_rest.unpack(part.left, self._table.num_samples))

    def _check_enough(self, world_size: int) -> None:
        assert self._table is not None
        num_samples = self._table.num_samples
        if self._uneven == "drop" and num_samples < world_size:
            raise ValueError(
                f"{self._where()}: got {num_samples} samples for {world_size} ranks, expected one "
                "for each; take uneven='pad' or 'exact'"
            )

    def _check_whole_shards(self, reader: Reader) -> None:
        """Refuse what would leave a rank without batches, on all ranks alike."""
        num_shards, world_size = len(self._shards), reader.world_size
        how = "write one with `concurrent-dataloader index`"
        if world_size > 1 and self._uneven != "exact":
            raise ValueError(
                f"{self._where()}: no index, expected one to give {world_size} ranks equally many "
                f"samples (uneven={self._uneven!r}); {how}, or take uneven='exact'"
            )
        if num_shards < world_size:
            raise ValueError(
                f"{self._where()}: got {num_shards} shards without an index for {world_size} "
                f"ranks, expected one for each; {how}"
            )
        if num_shards < world_size * reader.num_workers and reader.worker == 0:
            warnings.warn(
                f"{self._where()}: got {num_shards} shards without an index for {world_size} ranks "
                f"of {reader.num_workers} workers, expected one for each; some workers idle; {how}",
                stacklevel=2,
            )

    def _check_length(self, shard_reader: ShardReader) -> None:
        """Compare what a single reader has read with what it was told."""
        reader = self._find_reader()
        is_alone = reader.world_size == 1 and reader.num_workers == 1
        if self._length is None or not is_alone or self._length == shard_reader.num_delivered:
            return
        raise ShardFormatError(
            f"{self._where()}: got {shard_reader.num_delivered} samples in {len(self._shards)} "
            f"shards, expected {self._length}, as length said"
        )

    def _count_skipped(self) -> None:
        info = get_worker_info()
        self._shared[2 + (0 if info is None else 1 + info.id % (_NUM_COUNTS - 1))] += 1

    def _find_rank(self) -> tuple[int, int]:
        if self._explicit_rank is not None:
            return self._explicit_rank
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._found_rank = (torch.distributed.get_rank(), torch.distributed.get_world_size())
        return self._found_rank or (0, 1)

    def _find_reader(self) -> Reader:
        rank, world_size = self._find_rank()
        info = get_worker_info()
        if info is None:
            return Reader(rank, world_size)
        return Reader(rank, world_size, info.id, info.num_workers)

    def _notice_set_epoch(self, *, before_it: bool = False) -> bool:
        """Take over what was set since the last time, in the iteration that begins or before it."""
        num_set = int(self._shared[1])
        if num_set == self._num_set:
            return False
        self._num_set, self._first_epoch = num_set, int(self._shared[0])
        self._iteration = -1 if before_it else 0
        return True

    def _next_epoch(self, reader: Reader) -> _Epoch:
        if not self._notice_set_epoch():
            self._iteration += 1
        if self._first_epoch is not None:
            epoch = self._first_epoch + self._iteration
            return _Epoch(epoch, epoch)
        info = get_worker_info()
        if info is None:
            return _Epoch(self._iteration, self._iteration)
        # A worker that starts anew each time knows an epoch only by the loader's seed, which other
        # ranks need not share.
        drawn = info.seed - info.id + self._iteration
        return _Epoch(drawn if reader.world_size == 1 else self._iteration, drawn)

    # -- resuming and travelling

    def find_place(self) -> tuple[int, int]:
        """Give the rank that this process reads for, and the number of ranks."""
        return self._find_rank()

    def state_dict(self) -> dict[str, Any]:
        """Say how far this process's iteration is, in what ``torch.save`` writes safely.

        In a worker, or without workers. Of an iteration that was left it says where; between epochs
        it says which was the last.
        """
        if self._running is not None:
            shard_reader, iteration = self._running
            return self._describe_state(iteration, shard_reader.state())
        loaded = self._settle(self._find_reader(), keep=True)
        if loaded is not None and _stream_state.resumes(loaded):
            return self._take_over(loaded)
        if self._state is not None:
            return self._state
        if self._notice_set_epoch(before_it=True):
            self._last = self._loaded = None
        elif loaded is not None:
            return self._take_over(loaded)
        return self._describe_state(self._last, None)

    def _take_over(self, state: dict[str, Any]) -> dict[str, Any]:
        """Put this reader into a state that is for any of several, or was another's."""
        made_for, mine = state["made_for"], self._describe_settings(self._find_reader())
        if _stream_state.resumes(state) and _stream_state.saved_by(state) is not None:
            return state
        return {
            **state,
            "made_for": made_for | {name: mine[name] for name in _stream_state.FREE_SETTINGS},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Let the next iteration go on where `state_dict` was called, with the same arguments.

        Args:
            state_dict: That of the same reader, a worker of a rank; or a list of those of all
                readers, in any order, which other readers can go on with.

        Raises:
            ValueError: It is no state. Those of another data set, or too few of them, are refused
                when the iteration begins.
        """
        given = [state_dict] if isinstance(state_dict, Mapping) else list(state_dict)
        if not given:
            raise ValueError("state_dict: got no state, expected one or more")
        self._loaded = [_stream_state.read_state(each, type(self).__name__) for each in given]
        self._num_set = int(self._shared[1])
        self._running = self._last = self._state = None
        self._first_epoch = self._loaded[0]["first_epoch"]
        self._iteration = self._loaded[0]["iteration"]

    def _settle(self, reader: Reader, *, keep: bool = False) -> dict[str, Any] | None:
        """Find the state in which a reader goes on; None: nothing was loaded.

        Args:
            reader: Who goes on.
            keep: Whether the iteration does not begin yet.
        """
        if self._loaded is None:
            return None
        state: dict[str, Any]
        mine = [each for each in self._loaded if _stream_state.saved_by(each) in (None, reader)]
        if _stream_state.are_between_epochs(self._loaded):
            state = (mine or self._loaded)[0]
        elif len(mine) == 1:
            state = mine[0]
            if state["is_over"] and _stream_state.number_of(state) == max(
                map(_stream_state.number_of, self._loaded)
            ):
                # Others have not come to the end of this epoch: nothing is left for this one.
                state = {**state, "part": list(Part(_rest.NOTHING, False)), "is_over": False}
        else:
            state = dict(self.merge_states(_stream_state.find_readers(self._loaded)))
        self._loaded = [state] if keep else None
        self._first_epoch, self._iteration = state["first_epoch"], state["iteration"]
        return state

    def merge_states(self, readers: Sequence[ReaderState]) -> Mapping[str, Any]:
        """Part the rest of an epoch anew; `ElasticStream`.

        Returns:
            A state for `load_state_dict`, the same for each reader that goes on.

        Raises:
            ValueError: A reader is missing or came twice, they are in different epochs, were made
                otherwise than this data set, or there is no index.
        """
        place = self._find_rank()
        _stream_state.check_version([each.state for each in readers])
        stands = [_stream_state.describe_stand(each) for each in readers]
        self._check_can_part(stands)
        _stream_state.check_complete([each.reader for each in stands], place)
        is_shared = stands[0].reader.world_size != place[1]
        chosen = [
            (stand, saved.state)
            for stand, saved in zip(stands, readers, strict=True)
            if is_shared or stand.reader.rank == place[0]
        ]
        chosen.sort(key=lambda each: each[0].reader)
        _stream_state.check_same_epoch([stand for stand, _ in chosen])
        for _, state in chosen:
            self._check_settings(state, leaving_out=_stream_state.FREE_SETTINGS)
        begun = [(stand, state) for stand, state in chosen if stand.epoch is not None]
        settings = self._describe_settings(self._find_reader())
        merged: dict[str, Any] = {
            "version": _stream_state.VERSION,
            "made_for": {
                name: settings[name] for name in settings if name not in _stream_state.FREE_SETTINGS
            },
            "first_epoch": chosen[0][1]["first_epoch"],
            "iteration": chosen[0][1]["iteration"],
            "epoch": None,
            "part": None,
            "reader": None,
            "is_over": False,
        }
        if not begun:
            return merged  # nothing was delivered: the epoch begins
        stand, state = begun[0]
        assert stand.epoch is not None
        owed = [self._find_owed(each, _Epoch(*stand.epoch)) for each, _ in chosen]
        part = Part(_rest.pack(_rest.find_left(owed)), is_shared)
        return merged | {
            "first_epoch": state["first_epoch"],
            "iteration": state["iteration"],
            "epoch": list(stand.epoch),
            "part": list(part),
        }

    def _check_can_part(self, stands: Sequence[_stream_state.Stand]) -> None:
        if self._table is None:
            reader = stands[0].reader
            raise ValueError(
                f"{self._where()}: no index of byte ranges, expected one to part the rest of an "
                f"epoch among other ranks or workers than the {reader.world_size} of "
                f"{reader.num_workers} in the state; let it come to its end with as many, and "
                "write an index with `concurrent-dataloader index` for the epochs after it"
            )

    def _find_owed(
        self, stand: _stream_state.Stand, epoch: _Epoch
    ) -> tuple[_rest.Intervals, _rest.Intervals]:
        """Give what a reader was to give, and what of it it owes."""
        assert self._table is not None
        segments = self._plan(
            stand.reader, _Epoch(*(stand.epoch or epoch)), stand.part, stand.batch_size
        )
        planned, owed = _rest.find_owed(self._table, segments, stand.position)
        return planned, owed[:0] if stand.is_over else owed

    def _describe_state(
        self, iteration: _Iteration | None, position: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Describe an iteration; without a position one that is over, None before the first."""
        reader = self._find_reader() if iteration is None else iteration.reader
        part = None if iteration is None else iteration.part
        return {
            "version": _stream_state.VERSION,
            "made_for": self._describe_settings(reader),
            "first_epoch": self._first_epoch,
            "iteration": self._iteration,
            "epoch": None if iteration is None else list(iteration.epoch),
            "part": None if part is None else list(part),
            "reader": position,
            "is_over": iteration is not None and position is None,
        }

    def _describe_settings(self, reader: Reader) -> dict[str, Any]:
        """Give all that the order depends on."""
        names = hashlib.sha256("\0".join(self._shards.keys).encode("utf-8", "surrogateescape"))
        return {
            "shards": names.hexdigest(),
            "has_index": self._table is not None,
            "seed": self._seed,
            "shuffle": self._shuffles,
            "shuffle_buffer": self._buffer_size,
            "num_open": self._reading.num_open,
            "batch_size": self._batch_size,
            "uneven": self._uneven,
            **reader._asdict(),
        }

    def _check_state(self, state: Mapping[str, Any], reader: Reader) -> None:
        is_of_one = _stream_state.saved_by(state) is not None
        self._check_settings(
            state, reader, leaving_out=() if is_of_one else _stream_state.FREE_SETTINGS
        )

    def _check_settings(
        self,
        state: Mapping[str, Any],
        reader: Reader | None = None,
        *,
        leaving_out: Sequence[str],
    ) -> None:
        saved, mine = state["made_for"], self._describe_settings(reader or self._find_reader())
        for name, value in mine.items():
            if name not in leaving_out and saved.get(name) != value:
                raise ValueError(
                    f"state_dict: got one made with {name} {saved.get(name)!r}, expected {value!r};"
                    " load it into a data set and a loader that are made alike"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what runs; keep the rank, which a spawned worker could not ask for."""
        self._find_rank()
        return {**self.__dict__, "_running": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over all, and share what workers share."""
        self.__dict__.update(state)
        self._shared.share_memory_()


def _choose_labels(
    labels: NDArray[np.integer[Any]] | None,
    index_labels: NDArray[np.int32] | None,
    label_base: int | None,
    table: ShardTable | None,
) -> NDArray[np.integer[Any]] | None:
    """Choose the labels to deliver; None: those of the field ``cls``."""
    if labels is None:
        return index_labels if label_base is None else None
    if label_base is not None:
        raise ValueError("labels: got them together with label_base, expected one of the two")
    expected = 0 if table is None else table.num_indexed
    if table is None or labels.shape != (expected,):
        raise ValueError(
            f"labels: got an array of shape {labels.shape}, expected ({expected},), one for each "
            "sample of the index"
        )
    return labels


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: got {value}, expected {least} or more")


def _check_rank(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        raise ValueError(f"rank, world_size: got {rank!r}, {world_size!r}, expected both or none")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank}, expected 0 or more and less than {world_size}")
    return rank, world_size
