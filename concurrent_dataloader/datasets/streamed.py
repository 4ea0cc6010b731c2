"""Samples of shards, each shard read from front to back: an iterable data set."""

from __future__ import annotations

import atexit
import inspect
import os
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info
from typing_extensions import override

from concurrent_dataloader.datasets._items import DEFAULT_FIELDS, Fields, ItemMaker
from concurrent_dataloader.datasets._shard_list import find_shards
from concurrent_dataloader.datasets._shard_reader import RawSample, ReadSettings, ShardReader
from concurrent_dataloader.datasets._split import Uneven, rank_span
from concurrent_dataloader.datasets._stream_bookmark import Bookmark
from concurrent_dataloader.datasets._stream_choices import (
    choose_labels,
    choose_length,
    find_label_base,
)
from concurrent_dataloader.datasets._stream_place import EpochCounter, Place
from concurrent_dataloader.datasets._stream_plan import StreamPlan
from concurrent_dataloader.datasets.contract import Loss, ReaderState
from concurrent_dataloader.datasets.indexed import Decode
from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.shard_index import NO_LABEL, ShardIndex
from concurrent_dataloader.shard_names import Split
from concurrent_dataloader.stores.base import Store

__all__ = ["ReadSettings", "StreamedShards"]

_NUM_COUNTS = 256
"""Places for counts that workers keep; each has its own, so that none is lost."""

_open_readers: weakref.WeakKeyDictionary[Generator[Any, None, None], weakref.ref[ShardReader]]
_open_readers = weakref.WeakKeyDictionary()
"""By the iterators that are not gone, for `_close_readers`. These hold their readers, nobody else:
whom a reader reports to may hold the iterator."""


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
    is not known, ``len`` raises TypeError: where samples may be skipped, or there is no index, and
    neither ``metadata.json`` nor ``length`` says it, or there are several ranks. Without an index,
    each of several workers may end in a smaller batch, of which ``len(loader)`` does not know.

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
                differ by one sample, so that one may have a batch more: train under torch's
                ``Join``, which `DistributedDataParallel` takes part in. None: "drop" if shuffled,
                "exact" if not.
            rank: This process among ``world_size``; None: as ``torch.distributed`` says if it is
                initialised, else the only one.
            world_size: Give both or none.
            index: "auto": ``<begin of the names>-index.npz`` beside the shards, if it is there;
                an index, its path or URL; None: none. With "auto" ``metadata.json`` beside the
                shards, if it is there, must agree with the index and the shards; where there is no
                index it gives the length, and the size of pixels without a header.
            length: Samples of all shards, checked against what is there; so is what
                ``metadata.json`` says, when a single reader has come to the end.
            reading: How much is read ahead.
            allow_pipe: Whether ``pipe:`` may run commands in a shell.
            store: Where the shards lie, instead of ``store_options``; shards are then keys in it.
            store_options: As `open_store` takes them, such as ``endpoint_url``.

        Raises:
            ValueError: An argument cannot be used.
            KeyNotFoundError: A shard is not there.
            IndexFormatError: The index is none, or not that of these shards; or ``metadata.json``
                is damaged, or speaks of others.
        """
        super().__init__()
        if missing not in ("error", "skip"):
            raise ValueError(f"missing: got {missing!r}, expected 'error' or 'skip'")
        if uneven is not None and uneven not in get_args(Uneven):
            raise ValueError(f"uneven: got {uneven!r}, expected 'drop', 'pad' or 'exact'")
        _check_count("shuffle_buffer", shuffle_buffer, 1)
        self._place = Place(_check_rank(rank, world_size))
        found = find_shards(
            shards, store, store_options, split=split, index=index, allow_pipe=allow_pipe
        )
        self._shards, self._table = found.shards, found.table
        self.classes = found.classes
        """Of the index, else of ``metadata.json``; None where neither says what labels are."""
        self.baked_steps = () if found.facts is None else found.facts.baked_steps
        """What was done to images before they were packed, as ``metadata.json`` says."""
        self._length = choose_length(length, found)
        self._labels = choose_labels(labels, found.labels, label_base, self._table)
        if label_base is None:
            label_base = find_label_base(found)
        if raw_size is None and found.facts is not None:
            raw_size = found.facts.image_size
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
        self._reading = reading or ReadSettings()
        self._plan = StreamPlan(
            shards=self._shards,
            table=self._table,
            seed=seed,
            shuffles=shuffle,
            buffer_size=shuffle_buffer if shuffle else 1,
            num_open=self._reading.num_open,
            uneven=uneven or ("drop" if shuffle else "exact"),
        )
        self.set_batch_size(batch_size)
        self._epochs = EpochCounter()
        self._bookmark = Bookmark(self._plan, self._place, self._epochs)
        # Shared with workers: samples skipped by each.
        self._skipped = torch.zeros(_NUM_COUNTS, dtype=torch.int64).share_memory_()

    @override
    def __repr__(self) -> str:
        known = "" if self._table is None else f"{self._table.num_samples} samples in "
        return f"{type(self).__name__}({known}{len(self._shards)} shards, {self._plan.where()})"

    # -- what comes

    def __len__(self) -> int:
        """Give the number of samples of this rank in an epoch.

        Raises:
            TypeError: It is not known.
        """
        if self._skips:
            raise TypeError("len: got missing='skip', expected 'error'; the length is not known")
        rank, world_size = self._place.find_rank()
        if self._table is not None:
            span = rank_span(self._table.num_samples, rank, world_size, self._plan.uneven)
            return span.stop - span.start
        if self._length is None or world_size > 1:
            raise TypeError(
                f"len: {self._plan.where()}: no index, expected one to know the length; write it "
                "with `concurrent-dataloader index`, or give length to a single rank"
            )
        return self._length.num_samples

    @property
    def num_samples(self) -> int | None:
        """Samples of all ranks, before some are left out or repeated; None where nobody says."""
        if self._table is not None:
            return self._table.num_samples
        return None if self._length is None else self._length.num_samples

    @property
    def num_shards(self) -> int:
        """Shards of all ranks."""
        return len(self._shards)

    @property
    def has_index(self) -> bool:
        """Whether samples are parted among readers, by an index, and not whole shards."""
        return self._table is not None

    @property
    def uneven(self) -> Uneven:
        """What is done where ranks cannot have equally many samples."""
        return self._plan.uneven

    @property
    def num_skipped(self) -> int:
        """Samples left out since the data set was made, in all workers of this machine's rank."""
        return int(self._skipped.sum())

    def set_transform(self, transform: Callable[[Any], Any] | None) -> None:
        """Replace the transform. Workers that have started keep the one before."""
        self._items.transform = transform

    def set_batch_size(self, batch_size: int | None) -> None:
        """Say which batches the loader makes, before it starts its workers."""
        if batch_size is not None:
            _check_count("batch_size", batch_size, 1)
        self._plan.batch_size = batch_size

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is; persistent workers hear of it too."""
        _check_count("epoch", epoch, 0)
        self._epochs.set(epoch)

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
        iteration, position = self._bookmark.begin()
        epoch, reader, part = iteration
        shard_reader = ShardReader(
            self._shards,
            self._plan.plan(reader, epoch, part, self._plan.batch_size),
            self._reading,
            buffer_size=self._plan.buffer_size,
            seed=self._plan.name_draws("samples", reader, epoch, part),
            state=position,
            report=report,
        )
        self._bookmark.follow(shard_reader, iteration)
        items = self._generate(shard_reader, report, is_whole=part is None)
        _open_readers[items] = weakref.ref(shard_reader)
        return items

    def _generate(
        self,
        shard_reader: ShardReader,
        report: Callable[[Loss], None] | None,
        *,
        is_whole: bool,
    ) -> Generator[Any, None, None]:
        """Give the items of an epoch, or of a part of one."""
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
            if not shard_reader.has_lost and is_whole:
                self._check_length(shard_reader)
            is_over = True
        finally:
            self._bookmark.leave(shard_reader, is_over=is_over)
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

    def _check_length(self, shard_reader: ShardReader) -> None:
        """Compare what a single reader has read with what it was told."""
        reader = self._place.find_reader()
        is_alone = reader.world_size == 1 and reader.num_workers == 1
        length = self._length
        if length is None or not is_alone or length.num_samples == shard_reader.num_delivered:
            return
        raise ShardFormatError(
            f"{self._plan.where()}: got {shard_reader.num_delivered} samples in "
            f"{len(self._shards)} shards, expected {length.num_samples}, as {length.source} said"
        )

    def _count_skipped(self) -> None:
        info = get_worker_info()
        self._skipped[0 if info is None else 1 + info.id % (_NUM_COUNTS - 1)] += 1

    # -- resuming and travelling

    def find_place(self) -> tuple[int, int]:
        """Give the rank that this process reads for, and the number of ranks."""
        return self._place.find_rank()

    def state_dict(self) -> dict[str, Any]:
        """Say how far this process's iteration is, in what ``torch.save`` writes safely.

        In a worker, or without workers. Of an iteration that was left it says where; between epochs
        it says which was the last.
        """
        return self._bookmark.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Let the next iteration go on where `state_dict` was called, with the same arguments.

        Args:
            state_dict: That of the same reader, a worker of a rank; or a list of those of all
                readers, in any order, which other readers can go on with.

        Raises:
            ValueError: It is no state. Those of another data set, or too few of them, are refused
                when the iteration begins.
        """
        self._bookmark.load(state_dict, type(self).__name__)

    def merge_states(self, readers: Sequence[ReaderState]) -> Mapping[str, Any]:
        """Part the rest of an epoch anew; `ElasticStream`.

        Returns:
            A state for `load_state_dict`, the same for each reader that goes on.

        Raises:
            ValueError: A reader is missing or came twice, they are in different epochs, were made
                otherwise than this data set, or there is no index.
        """
        return self._bookmark.merge(readers)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over all, and share what workers share."""
        self.__dict__.update(state)
        self._skipped.share_memory_()


@atexit.register
def _close_readers() -> None:
    """End what iterators that are half read have begun, commands among them, at Python's end.

    Those of a script's own variables go only when modules have been taken apart, where their ends
    can call nothing any more.
    """
    for items, reference in list(_open_readers.items()):
        if inspect.getgeneratorstate(items) == inspect.GEN_RUNNING:
            continue  # a thread waits in it, which ends with the process
        shard_reader = reference()
        items.close()
        if shard_reader is not None:  # an iterator that never began has no end of its own
            shard_reader.close()


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
