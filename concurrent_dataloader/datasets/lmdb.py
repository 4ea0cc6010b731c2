"""Samples in an LMDB database: by position, or front to back for disks on which a seek is dear.

```text
LmdbDataset      any order           position -> record -> (image, label)
SequentialLmdb   keys rise           records -> cache (local shuffle) -> (image, label)
```

`SequentialLmdb` reads in the order of the keys and shuffles within a cache. Which sample comes when
is planned before the epoch begins, and is the same for any number of workers:

```text
ranks     each a span of keys that lie side by side
order     the span, each record moved forward by chance, so far that the cache never overflows
workers   every so many-th batch of that order; each reads its own records, keys rising
```

So all workers together read their rank's span once from front to back, a loader's batches come in
the planned order, and the one batch that is not full is the last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info
from typing_extensions import Buffer, override

from concurrent_dataloader.datasets._split import Span, Uneven, rank_span
from concurrent_dataloader.datasets.contract import SampleLocation
from concurrent_dataloader.datasets.indexed import (
    MISSING_LABEL,
    Decode,
    choose_decode,
)
from concurrent_dataloader.datasets.labelled import DecodedImage, LabelledDataset, SampleMetadata
from concurrent_dataloader.errors import LoaderError, ShardFormatError
from concurrent_dataloader.formats.lmdb_file import LmdbFile
from concurrent_dataloader.formats.lmdb_record import NO_LABEL, Record
from concurrent_dataloader.index import choose_positions
from concurrent_dataloader.labels import Classes, LabelSpace, convert_ids, imagenet_classes

DEFAULT_CACHE_RECORDS = 5000
"""Half a gigabyte of ImageNet. Databases are written in a random order, so that a local shuffle of
this size only has to change which samples meet in a batch."""


class LmdbDataset(LabelledDataset):
    """A map-style dataset over a database; items are ``(image, label)``.

    It pickles if its decoder and its transforms do. The database is opened at the first sample, in
    each process for itself. Positions count from 0, or from the end if negative.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | LmdbFile,
        *,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        decode: Decode = "pillow",
        limit: int | None = None,
        sample_seed: int | None = None,
        classes: Classes | None = None,
        classes_file: str | os.PathLike[str] | None = None,
        label_space: LabelSpace | None = None,
        missing_label: int | None = MISSING_LABEL,
        with_metadata: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        """Look at a database.

        Args:
            path: Its file, its folder, or the open file.
            transform: Makes the item's first element of the decoded image; may be random.
            target_transform: Makes the item's second element of the label.
            decode: "pillow" (an RGB image of Pillow), "torchvision" (a uint8 RGB tensor), a pure
                function of the raw bytes, or None for these bytes themselves.
            limit: Number of samples; the first ones, or a sample by ``sample_seed``.
            sample_seed: Draws the limited samples from all, the same for the same seed.
            classes: Those of another split, so that both have the same labels; matched by name.
            classes_file: JSON object of classes, likewise. Without either, the database's own.
            label_space: What its labels mean, where it does not say; those of the older system are
                taken to be in the order of the WordNet ids.
            missing_label: The label of samples that have none; when None, items are images alone.
            with_metadata: Whether items have a last element more, a `SampleMetadata`.
            allow_pickle: Also read databases of the older system; as in `LmdbFile`.

        Raises:
            ValueError: There is no such decoder or limit, or the label space is another.
            FileNotFoundError: There is no such database.
            ShardFormatError: It is cut short, not complete, empty, or none of ours.
            ClassesFormatError: The classes file is malformed.
            UnknownClassError: A class of the database is not among those given.
            MissingDependencyError: lmdb, or the decoder, is not installed.
        """
        super().__init__(transform, target_transform)
        self.file = _open_file(path, readahead=False, allow_pickle=allow_pickle)
        self._decode_raw = choose_decode(decode)
        self._missing_label = missing_label
        self._with_metadata = with_metadata
        self._positions = choose_positions(len(self.file), limit, sample_seed)
        self._labels: NDArray[np.int32] | None = None
        self.classes = _name_classes(self.file, label_space)
        """Those of the labels; None where there are none, or nothing is known of them."""
        self._new_labels: NDArray[np.int32] | None = None
        if classes_file is not None:
            classes = Classes.load(classes_file)
        if classes is not None:
            self._new_labels = _match_labels(self.file, self.classes, classes)
            self.classes = classes

    def __len__(self) -> int:
        return len(self.file) if self._positions is None else len(self._positions)

    @override
    def __repr__(self) -> str:
        num_classes = "no" if self.classes is None else self.classes.count
        return (
            f"{type(self).__name__}({len(self)} samples, {num_classes} classes, {self.file.path})"
        )

    # -- the three stages

    @override
    def fetch(self, position: int) -> Buffer:
        """Read the record of the sample at ``position``.

        Raises:
            IndexError: There is no such position.
            ShardFormatError: The record is not there.
        """
        return self.file.read_raw(self.record_number(position))

    @override
    def decode(self, position: int, raw: Buffer) -> DecodedImage:
        """Check a record, and decode its image.

        Raises:
            ShardFormatError: The record is damaged.
            SampleDecodeError: It holds no image; says which one.
        """
        number = self.record_number(position)
        record = self.file.parse(number, cast(bytes, raw))
        label = self._missing_label if record.label is None else self._relabel(number, record.label)
        metadata = None
        if self._with_metadata:
            size_bytes = memoryview(record.payload).nbytes
            metadata = SampleMetadata(record.name, size_bytes, self.file.describe(number))
        return DecodedImage(self._decode_image(position, number, record), label, metadata)

    # -- around them

    @property
    def labels(self) -> NDArray[np.int32] | None:
        """The label of each sample, (N,) int32, -1 for none; None for an older system's data."""
        if self._labels is None:
            labels = self.file.labels()
            if labels is not None and self._positions is not None:
                labels = labels[self._positions]
            self._labels = labels
        if self._labels is None or self._new_labels is None:
            return self._labels
        return np.append(self._new_labels, np.int32(NO_LABEL))[self._labels]

    def convert_labels(self, label_space: LabelSpace) -> None:
        """Number ImageNet's classes as in another label space, such as torchvision's weights do.

        Raises:
            ValueError: There are no classes, or they are not known to be ImageNet's.
        """
        if self.classes is None:
            raise ValueError(f"{self.file.path}: no classes, expected ImageNet's to convert them")
        source = self.classes.label_space
        converted = self.classes.converted(label_space)
        if source is not label_space:
            count = self.classes.count if self._new_labels is None else len(self._new_labels)
            labels = np.arange(count) if self._new_labels is None else self._new_labels
            ids = convert_ids(labels + source.first_id, source, label_space)
            self._new_labels = (ids - label_space.first_id).astype(np.int32)
        self.classes = converted

    @override
    def locate_sample(self, position: int) -> SampleLocation:
        """Say which record of the database the sample is."""
        number = self.record_number(position)
        return SampleLocation(self.file.path.name, sample=str(number), kind="lmdb")

    def record_number(self, position: int) -> int:
        """Give the number of a sample's record in the database.

        Raises:
            IndexError: There is no such position.
        """
        count = len(self)
        if not -count <= position < count:
            raise IndexError(
                f"{self.file.path}: got position {position}, expected {-count} to {count - 1}"
            )
        position %= count
        return position if self._positions is None else int(self._positions[position])

    def close(self) -> None:
        """Give the database back; the next sample opens it again. May be called twice."""
        self.file.close()

    def _relabel(self, number: int, label: int) -> int:
        if self._new_labels is None:
            return label
        if label >= len(self._new_labels):
            raise ShardFormatError(
                f"{self.file.describe(number)}: got label {label}, expected less than the"
                f" {len(self._new_labels)} classes of the database"
            )
        return int(self._new_labels[label])

    def _decode_image(self, position: int, number: int, record: Record) -> Any:
        try:
            return self._decode_raw(record.payload)
        except LoaderError as error:
            raise type(error)(f"{self._place(position, number, record)}: {error}") from error
        except Exception as error:
            error.add_note(self._place(position, number, record))
            raise

    def _place(self, position: int, number: int, record: Record) -> str:
        named = f" ({record.name!r})" if record.name else ""
        asked = "" if position == number else f", asked for as position {position}"
        return f"{self.file.describe(number)}{named}{asked}"


def _open_file(
    path: str | os.PathLike[str] | LmdbFile, *, readahead: bool, allow_pickle: bool
) -> LmdbFile:
    file = (
        path
        if isinstance(path, LmdbFile)
        else LmdbFile(path, readahead=readahead, allow_pickle=allow_pickle)
    )
    if not len(file):
        raise ShardFormatError(f"{file.path}: no records, expected at least one")
    return file


def _name_classes(file: LmdbFile, declared: LabelSpace | None) -> Classes | None:
    """Make classes of what a database says of its labels."""
    known, values = LabelSpace.SORTED_WNID, None  # the older system's, by Caffe's list of synsets
    if file.metadata is not None:
        values, given = file.metadata.classes, file.metadata.label_space
        known = None if given is None else LabelSpace(given)
        if declared is not None and known is not None and declared is not known:
            raise ValueError(
                f"label_space: got {declared.value!r}, but {file.path} says {known.value!r}; leave"
                " it out, and convert_labels() later"
            )
    space = declared or known or LabelSpace.CUSTOM
    if values is None:
        return None if space is LabelSpace.CUSTOM else Classes.imagenet(space)
    names = dict(imagenet_classes())
    return Classes(
        {value: label for label, value in enumerate(values)},
        names={label: names.get(value, value) for label, value in enumerate(values)},
        label_space=space,
        id_base=space.first_id,
        where=str(file.path),
    )


def _match_labels(
    file: LmdbFile, own: Classes | None, classes: Classes
) -> NDArray[np.int32] | None:
    """Give for each label of a database that of ``classes``; None where all are the same."""
    values = None if file.metadata is None else file.metadata.classes
    if values is None:
        if own is None or classes.label_space is LabelSpace.CUSTOM:
            return None
        source, target = own.label_space, classes.label_space
        ids = convert_ids(np.arange(own.count) + source.first_id, source, target)
        return (ids - target.first_id).astype(np.int32)
    if classes.label_rule != "parent":
        raise ValueError(
            f"classes: got those by label_rule {classes.label_rule!r}, expected 'parent', since a"
            f" class of {file.path} is known by its name alone"
        )
    # By the rule "parent", a class is known by the folder of its samples.
    return classes.labels_of(f"{value}/*" for value in values)


# -- front to back


def draw_local_order(count: int, cache: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Draw the order in which records come that are read in the order of their keys.

    Pure; the same anywhere for the same arguments. Each record is moved back by a random distance.
    The longest is the largest at which no more than ``cache`` records are held at once, on average
    twice as many as are held; so the first record comes at once.

    Args:
        count: How many records there are.
        cache: How many may be held; if it is ``count`` or more, the order is any permutation.
        seed: 0 to 2**32 - 1.
        epoch: From 0 on.

    Returns:
        A permutation of 0 to ``count`` - 1.
    """
    # numpy's older generator, because its stream is promised never to change.
    generator = np.random.RandomState([seed, epoch])
    if cache >= count:
        return generator.permutation(count).astype(np.int64)
    draws = generator.random_sample(count)
    places = np.arange(count)
    distance = 2.0 * cache
    while distance >= 1.0:
        order = np.argsort(places + draws * distance, kind="stable")
        num_held = count_held(order)
        if num_held <= cache:
            return order.astype(np.int64)
        distance *= 0.99 * cache / num_held
    return places.astype(np.int64)


def count_held(order: NDArray[np.int64]) -> int:
    """Count the records held at most where they are read in order and come in another."""
    if not len(order):
        return 0
    return int((np.maximum.accumulate(order) - np.arange(len(order))).max()) + 1


class SequentialLmdb(IterableDataset[Any]):
    """Reads a database in the order of its keys, and yields ``(image, label)``, each once an epoch.

    For a loader with the same ``batch_size`` and ``drop_last``. Its batches are then the same for
    any number of workers, and its length is right. `set_epoch` is heard by workers that persist.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | LmdbFile,
        *,
        batch_size: int,
        shuffle: bool,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        decode: Decode = "pillow",
        cache: int = DEFAULT_CACHE_RECORDS,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        uneven: Uneven = "pad",
        missing_label: int | None = MISSING_LABEL,
        with_metadata: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        """Look at a database.

        Args:
            path: As in `LmdbDataset`, like all that is not listed here.
            batch_size: That of the loader.
            shuffle: Whether to shuffle within the cache; else samples come in the keys' order.
            transform: Makes the item's first element of the decoded image; may be random.
            target_transform: Makes the item's second element of the label.
            decode: A decoder's name, a pure function of the raw bytes, or None for the bytes.
            cache: Records that are held in memory at once, over all workers; each of several may
                hold a batch more.
            seed: Of the shuffle; 0 to 2**32 - 1.
            drop_last: Whether the loader drops a last batch that is not full: its records are then
                not read. They are others in each epoch if shuffled.
            rank: Which of the processes that train together this is.
            world_size: How many there are; each reads keys that lie side by side.
            uneven: What to do where ranks cannot have equally many records: "pad" (some are read by
                two ranks), "drop" (some by none), or "exact" (some ranks have one more).
            missing_label: The label of samples that have none; when None, items are images alone.
            with_metadata: Whether items have a last element more, a `SampleMetadata`.
            allow_pickle: Also read databases of the older system; as in `LmdbFile`.

        Raises:
            ValueError: A number is out of its range, or there are fewer records than ranks.
            FileNotFoundError: There is no such database.
            ShardFormatError: It is cut short, not complete, empty, or none of ours.
            MissingDependencyError: lmdb, or the decoder, is not installed.
        """
        for name, value in (
            ("batch_size", batch_size),
            ("cache", cache),
            ("world_size", world_size),
        ):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected 1 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank}, expected 0 to {world_size - 1}")
        if not 0 <= seed < 1 << 32:
            raise ValueError(f"seed: got {seed}, expected 0 to {(1 << 32) - 1}")
        self._images = LmdbDataset(
            _open_file(path, readahead=True, allow_pickle=allow_pickle),
            transform=transform,
            target_transform=target_transform,
            decode=decode,
            missing_label=missing_label,
            with_metadata=with_metadata,
        )
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._cache = cache
        self._seed = seed
        self._drop_last = drop_last
        self._span = _find_span(len(self._images), rank, world_size, uneven)
        # In shared memory, so that workers that persist hear of a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        """Count the samples of an epoch on this rank."""
        count = self._span.stop - self._span.start
        return count - count % self._batch_size if self._drop_last else count

    @property
    def num_batches(self) -> int:
        """Batches of an epoch on this rank."""
        return -(-len(self) // self._batch_size)

    @property
    def images(self) -> LmdbDataset:
        """The same samples by position, with the classes and the labels."""
        return self._images

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins next; each has an order of its own.

        Raises:
            ValueError: It is below 0 or above 2**32 - 1.
        """
        if not 0 <= epoch < 1 << 32:
            raise ValueError(f"epoch: got {epoch}, expected 0 to {(1 << 32) - 1}")
        self._epoch.fill_(epoch)

    def plan(self, epoch: int, worker: int = 0, num_workers: int = 1) -> NDArray[np.int64]:
        """Give the records that a worker yields in an epoch, in its order."""
        count = self._span.stop - self._span.start
        order = (
            draw_local_order(count, self._cache, self._seed, epoch)
            if self._shuffle
            else np.arange(count)
        )[: len(self)]
        batches = np.arange(len(order)) // self._batch_size
        return order[batches % num_workers == worker] + self._span.start

    @override
    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        order = self.plan(int(self._epoch), worker, num_workers)
        return self._read(order)

    def _read(self, order: NDArray[np.int64]) -> Iterator[Any]:
        images = self._images
        records = images.file.scan_raw(map(int, np.sort(order)))
        held: dict[int, bytes] = {}
        for number in map(int, order):
            while number not in held:
                read, raw = next(records)
                held[read] = raw
            raw = held.pop(number)
            decoded = images.decode(number, raw)
            try:
                item = images.apply_transform(decoded)
            except Exception as error:
                error.add_note(images.file.describe(number))
                raise
            yield item


def _find_span(count: int, rank: int, world_size: int, uneven: Uneven) -> Span:
    """Give a rank's records. Those that pad stand before its own, so that all lie side by side."""
    if count < world_size:
        raise ValueError(
            f"world_size: got {world_size}, expected {count} at most, the number of records"
        )
    span = rank_span(count, rank, world_size, uneven)
    beyond = max(0, span.stop - count)
    return Span(span.start - beyond, span.stop - beyond)
