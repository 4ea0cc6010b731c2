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

from concurrent_dataloader.datasets._items import DEFAULT_FIELDS, Fields, ItemMaker
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
from concurrent_dataloader.datasets.contract import Loss
from concurrent_dataloader.datasets.indexed import Decode
from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.shard_index import NO_LABEL, ShardIndex
from concurrent_dataloader.shard_names import Split
from concurrent_dataloader.stores.base import Store

__all__ = ["ReadSettings", "StreamedShards"]

_STATE_VERSION = 1
_NUM_COUNTS = 256
"""Places for counts that workers keep; each has its own, so that none is lost."""


class _Epoch(NamedTuple):
    """What an epoch's order is drawn with."""

    split: int
    """The order of the shards: the same on all ranks, since they part it."""

    local: int
    """Everything else: the same in all workers of a loader."""


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
    shards and commands are read again from their begin, without decoding. An epoch goes on with as
    many ranks and workers only, since each has shards open and samples in its buffer; for others
    read shards at random, with `ShardDataset`. Random draws of transforms are kept by the
    `DataLoader` here, and else the caller's to restore.
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
        self._running: tuple[ShardReader, _Epoch, Reader] | None = None
        self._state: dict[str, Any] | None = None
        self._resumes = False

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
        state = None
        if self._resumes and self._state is not None:
            self._check_state(self._state, reader)
            self._notice_set_epoch()
            state, epoch = self._state["reader"], _Epoch(*self._state["epoch"])
        else:
            epoch = self._next_epoch(reader)
        self._resumes, self._state = False, None
        shard_reader = ShardReader(
            self._shards,
            self._plan(reader, epoch),
            self._reading,
            buffer_size=self._buffer_size,
            seed=f"samples {self._seed} {epoch.local} {reader.rank} {reader.worker}",
            state=state,
            report=report,
        )
        self._running = (shard_reader, epoch, reader)
        return self._generate(shard_reader, report)

    def _generate(
        self, shard_reader: ShardReader, report: Callable[[Loss], None] | None
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
            if not shard_reader.has_lost:
                self._check_length(shard_reader)
            is_over = True
        finally:
            if self._running is not None and self._running[0] is shard_reader:
                self._state = None if is_over else self.state_dict()
                self._running = None
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

    def _plan(self, reader: Reader, epoch: _Epoch) -> list[Segment]:
        order = draw_order(len(self._shards), self._seed, epoch.split if self._shuffles else None)
        if self._table is None:
            self._check_whole_shards(reader)
            return plan_whole_shards(order, reader)
        num_samples, world_size = self._table.num_samples, reader.world_size
        if self._uneven == "drop" and num_samples < world_size:
            raise ValueError(
                f"{self._where()}: got {num_samples} samples for {world_size} ranks, expected one "
                "for each; take uneven='pad' or 'exact'"
            )
        shuffle = None
        if self._shuffles:
            shuffle = random.Random(
                f"segments {self._seed} {epoch.local} {reader.rank} {reader.worker}"
            )
        return plan_segments(
            self._table,
            order,
            reader,
            uneven=self._uneven,
            batch_size=self._batch_size,
            shuffle=shuffle,
            num_open=self._reading.num_open,
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

    def state_dict(self) -> dict[str, Any]:
        """Say how far this process's iteration is, in what ``torch.save`` writes safely.

        In a worker, or without workers. Of an iteration that was left it says where; between epochs
        it says which was the last.
        """
        if self._running is None:
            if self._state is not None:
                return self._state
            self._notice_set_epoch(before_it=True)
            return self._describe_state(self._find_reader(), None, None)
        shard_reader, epoch, reader = self._running
        return self._describe_state(reader, epoch, shard_reader.state())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next iteration go on where `state_dict` was called.

        By the same rank and worker, with the same arguments.

        Raises:
            ValueError: It is no state, or that of another data set or reader.
        """
        state = dict(state_dict)
        if state.get("version") != _STATE_VERSION or "made_for" not in state:
            raise ValueError(
                f"state_dict: got version {state.get('version')!r}, expected {_STATE_VERSION} of "
                f"a {type(self).__name__}"
            )
        self._first_epoch, self._iteration = state["first_epoch"], state["iteration"]
        self._num_set = int(self._shared[1])
        self._running = None
        self._resumes = state["reader"] is not None
        self._state = state if self._resumes else None

    def _describe_state(
        self, reader: Reader, epoch: _Epoch | None, position: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {
            "version": _STATE_VERSION,
            "made_for": self._describe_settings(reader),
            "first_epoch": self._first_epoch,
            "iteration": self._iteration,
            "epoch": None if epoch is None else list(epoch),
            "reader": position,
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
        saved, mine = state["made_for"], self._describe_settings(reader)
        for name, value in mine.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"state_dict: got one made with {name} {saved.get(name)!r}, expected {value!r};"
                    " load it into a data set and a loader that are made alike, with as many ranks "
                    "and workers: each reads shards of its own from where it stands"
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
