"""How fast is an LMDB database read front to back, against torch's loader over files in a folder?

Command: ``python -m benchmarking lmdb_read [--only cache seeks]``

Held fixed: photographs of 110 kB in a database in a random order, as `prepare` writes it; our
`ImagenetLoader` with its defaults, shuffled, batch 64, two workers that persist. Torch's loader
takes the same photographs from files, one `open` each, in the same order; before a comparison the
first batches of both are compared bit for bit, and after it the positions of all that came.

Varied: ``cache``: both read from the page cache, decode and augment. ``seeks``: both read from a
simulated disk with one head, which takes 8 ms to move and nothing to read on, and of which nothing
is in memory when an epoch begins. Of a file it charges the contents alone, not the inode; of a
database not the pages between records that say where these are, one in about 140 records. There the
bar is for fetching alone, since no two cores decode nine times as much as 125 seeks a second give;
what both do when they decode and augment is a row without a bar.

The clock starts after four batches a worker, and runs over the ends of epochs.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch.utils.data
from PIL import Image
from typing_extensions import Buffer, override

from benchmarking.effort import Effort
from benchmarking.measure import (
    NUM_WARM_UP_BATCHES,
    Loader,
    OpenLoader,
    Speed,
    check_same_batches,
    column,
    measure_in_turns,
    measure_speed,
)
from benchmarking.results import Bar, Row, make_row
from benchmarking.seek_bound_disk import PAGE_BYTES, SeekBoundDisk
from benchmarking.statistics import Estimate, paired_ratio
from benchmarking.workload import NUM_WORKERS, Photos, describe, read_photos, train_transform
from concurrent_dataloader.datasets.lmdb import SequentialLmdb
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.formats.lmdb_file import LmdbFile
from concurrent_dataloader.imagenet_loader import ImagenetLoader
from concurrent_dataloader.prepare.lmdb import write_lmdb

_SCENARIO = "lmdb_read"
_SEEK_S = 0.008


class PhotoSource:
    """The photographs to be packed; the label of each is its position."""

    def __init__(self, photos: Photos) -> None:
        self._names = list(photos.raw)
        self._raw = photos.raw
        self.classes: Sequence[str] | None = None
        self.label_space: str | None = None

    def __len__(self) -> int:
        """Count them."""
        return len(self._names)

    def name(self, position: int) -> str:
        """Give the file's path."""
        return self._names[position]

    def label(self, position: int) -> int | None:
        """Give the position."""
        return position

    def boxes(self, position: int) -> Sequence[Box]:
        """Give none."""
        return ()

    def size_bytes(self, position: int) -> int | None:
        """Give the file's size."""
        return len(self._raw[self._names[position]])

    def read(self, position: int) -> Buffer:
        """Give the file's bytes."""
        return self._raw[self._names[position]]

    def close(self) -> None:
        """Hold nothing that could be closed."""


class FolderImages(torch.utils.data.Dataset[tuple[Any, int]]):
    """Files as torchvision's ImageFolder reads them; the label is the position."""

    def __init__(self, photos: Photos, disk: SeekBoundDisk | None, *, decodes: bool) -> None:
        self._paths = [photos.folder / key for key in photos.raw]
        pages = [-(-len(raw) // PAGE_BYTES) for raw in photos.raw.values()]
        self._starts = [PAGE_BYTES * before for before in itertools.accumulate(pages, initial=0)]
        self._sizes = [len(raw) for raw in photos.raw.values()]
        self._disk = disk
        self._transform = train_transform() if decodes else None

    def __len__(self) -> int:
        """Count the files."""
        return len(self._paths)

    @override
    def __getitem__(self, position: int) -> tuple[Any, int]:
        """Read a file; decode and augment it, or count its bytes."""
        if self._disk is not None:
            start = self._starts[position]
            self._disk.read(start, start + self._sizes[position])
        with self._paths[position].open("rb") as file:
            if self._transform is None:
                return len(file.read()), position
            with Image.open(file) as image:
                return self._transform(image.convert("RGB")), position


class DiskLmdbFile(LmdbFile):
    """A database on a simulated disk."""

    def __init__(self, path: pathlib.Path, disk: SeekBoundDisk) -> None:
        self._disk = disk
        self._map: Any = None
        super().__init__(path, readahead=True)

    @override
    def _ask_for(self, file_map: Any, start: int, stop: int) -> None:
        # The kernel would not make the caller wait for it.
        self._map = file_map
        self._disk.read(start, stop)
        super()._ask_for(file_map, start, stop)

    @override
    def _take(self, view: memoryview) -> bytes:
        self._disk.read(*self._map.locate(view))
        return super()._take(view)


class PlannedOrder(torch.utils.data.Sampler[int]):
    """The positions of the photographs in the order in which the database gives them."""

    def __init__(self, records: SequentialLmdb) -> None:
        self._records = records
        self._labels = records.images.labels
        self._epoch = 0

    def __len__(self) -> int:
        """Count the samples of an epoch."""
        return len(self._records)

    @override
    def __iter__(self) -> Iterator[int]:
        """Begin the next epoch."""
        if self._labels is None:
            raise RuntimeError("labels: got none, expected those that were written")
        order = self._labels[self._records.plan(self._epoch)]
        self._epoch += 1
        return iter(order.tolist())


class Endless:
    """Epochs of a loader, one after the other; of a disk all is forgotten in between."""

    num_workers = NUM_WORKERS

    def __init__(self, loader: Any, disk: SeekBoundDisk | None) -> None:
        self._loader = loader
        self._disk = disk

    def __iter__(self) -> Iterator[Any]:
        """Begin the first epoch at once, so that its workers are there."""
        first = iter(self._loader)
        return itertools.chain(first, self._read_on())

    def _read_on(self) -> Iterator[Any]:
        while True:
            if self._disk is not None:
                self._disk.forget()
            yield from self._loader


class Sides(NamedTuple):
    """What is compared."""

    ours: OpenLoader
    torch: OpenLoader


@contextlib.contextmanager
def pack_photos(photos: Photos) -> Generator[pathlib.Path]:
    """Write the photographs to a database, in a random order; it is then in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "ILSVRC-train.lmdb"
        write_lmdb(PhotoSource(photos), path, split="train", order="shuffled")
        yield path


def _open_sides(
    photos: Photos, path: pathlib.Path, effort: Effort, *, has_disk: bool, decodes: bool
) -> Sides:
    """Give what opens either side; each has a disk of its own, whose head is at its begin."""
    open_ours = functools.partial(
        ImagenetLoader,
        "train",
        batch_size=effort.batch_size,
        num_workers=NUM_WORKERS,
        persistent_workers=True,
        transform=train_transform() if decodes else None,
        decode="pillow" if decodes else _count_bytes,
    )

    def ours() -> Loader:
        disk = SeekBoundDisk(path.stat().st_size, seek_s=_SEEK_S) if has_disk else None
        return _endless(open_ours(path=path if disk is None else DiskLmdbFile(path, disk)), disk)

    def theirs() -> Loader:
        size_bytes = sum(len(raw) + PAGE_BYTES for raw in photos.raw.values())
        disk = SeekBoundDisk(size_bytes, seek_s=_SEEK_S) if has_disk else None
        loader = torch.utils.data.DataLoader(
            FolderImages(photos, disk, decodes=decodes),
            batch_size=effort.batch_size,
            sampler=PlannedOrder(open_ours(path=path).dataset),
            num_workers=NUM_WORKERS,
            persistent_workers=True,
        )
        return _endless(loader, disk)

    return Sides(ours, theirs)


def _endless(loader: Any, disk: SeekBoundDisk | None) -> Loader:
    endless: Any = Endless(loader, disk)  # a loader as far as measuring needs one
    return endless


def _count_bytes(raw: Buffer) -> int:
    return memoryview(raw).nbytes


def compare_in_cache(effort: Effort) -> list[Row]:
    """Compare both from the page cache."""
    photos = read_photos(effort.num_images)
    with pack_photos(photos) as path:
        sides = _open_sides(photos, path, effort, has_disk=False, decodes=True)
        figures = _measure(sides, effort)
    return [
        make_row(
            _SCENARIO,
            "LMDB front to back, page cache, against torch over files in page cache",
            _describe(photos, effort),
            figures,
            Bar(figure="ratio", bound=1.0),
        )
    ]


def compare_on_disk(effort: Effort) -> list[Row]:
    """Compare both on a simulated disk on which a seek is dear."""
    photos = read_photos(effort.num_images)
    settings = _describe(photos, effort, seek_s=_SEEK_S)
    with pack_photos(photos) as path:
        fetched, decoded = (
            _measure(_open_sides(photos, path, effort, has_disk=True, decodes=decodes), effort)
            for decodes in (False, True)
        )
    return [
        make_row(
            _SCENARIO,
            "LMDB front to back, 8 ms a seek, fetched, against torch over files on such a disk",
            {**settings, "transform": "none, bytes are counted"},
            fetched,
            Bar(figure="ratio", bound=9.0),
        ),
        make_row(
            _SCENARIO,
            "LMDB front to back, 8 ms a seek, decoded and augmented, against torch likewise",
            settings,
            decoded,
        ),
    ]


def _measure(sides: Sides, effort: Effort) -> dict[str, Estimate | list[float]]:
    check_same_batches(sides._asdict(), num_batches=4)
    speeds = measure_in_turns(
        {
            name: functools.partial(_measure_side, open_loader, effort)
            for name, open_loader in sides._asdict().items()
        },
        effort,
    )
    ours, theirs = speeds["ours"], speeds["torch"]
    return {
        "ratio": paired_ratio(column(ours, "images_per_s"), column(theirs, "images_per_s")),
        "ours_images_per_s": column(ours, "images_per_s"),
        "torch_images_per_s": column(theirs, "images_per_s"),
        "ours_client_cpu_ms_per_image": column(ours, "client_cpu_ms_per_image"),
        "torch_client_cpu_ms_per_image": column(theirs, "client_cpu_ms_per_image"),
    }


def _measure_side(open_loader: OpenLoader, effort: Effort) -> Speed:
    return measure_speed(open_loader(), effort.seconds)


def _describe(photos: Photos, effort: Effort, **more: float) -> dict[str, Any]:
    return describe(
        photos,
        effort,
        **{
            "order": "shuffled within the cache of 5000 records, seed 0",
            "num_warm_up_batches": NUM_WARM_UP_BATCHES,
            **more,
        },
    )


CASES: dict[str, Callable[[Effort], list[Row]]] = {
    "cache": compare_in_cache,
    "seeks": compare_on_disk,
}
BARS = tuple(CASES)
