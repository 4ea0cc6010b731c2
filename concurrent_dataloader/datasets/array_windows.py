"""Samples that are windows of frames: some to learn from, some to foretell, out of array files.

```text
file of 288 frames    0 1 2 ... 11 | 12 13 14 . . 17 . . . . . 20 ... 23 ... 287
window 0              inputs         targets
window 1                inputs ->      targets ->
```

The original traffic data has 12 frames of five minutes in, and those 5, 10, 15, 30, 45 and 60
minutes later out; any offsets will do.
"""

from __future__ import annotations

import asyncio
import fnmatch
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from numpy.typing import NDArray
from typing_extensions import Buffer, override

from concurrent_dataloader.datasets.contract import StagedDataset
from concurrent_dataloader.errors import IndexFormatError, KeyNotFoundError, ShardFormatError
from concurrent_dataloader.files import write_whole
from concurrent_dataloader.formats.arrays import (
    ArrayLayout,
    KnownBytes,
    MissingBytesError,
    find_format,
    read_layout,
)
from concurrent_dataloader.index import Index
from concurrent_dataloader.ranges import ByteRange, cover, merge_near
from concurrent_dataloader.stores import Store, WritableStore, open_store
from concurrent_dataloader.stores.base import PerProcess, SizedStore

Mode = Literal["download", "ranged", "streaming"]
"""How a window comes from its file.

- ``"ranged"``: by requests for the bytes that hold it; where they lie is found out once a file.
- ``"download"``: the file is copied to a folder of this machine once, and read there.
- ``"streaming"``: the whole file is read into memory for each request, and nothing is kept.
"""

DEFAULT_INPUT_OFFSETS = tuple(range(12))
DEFAULT_TARGET_OFFSETS = (12, 13, 14, 17, 20, 23)

_MAX_GAP_BYTES = 64 << 10
"""Read over rather than asked for apart; as long as 0.5 ms at 1 Gbit/s."""

_MAX_REQUEST_BYTES = 16 << 20

Pair = tuple[NDArray[Any], NDArray[Any]]
"""Inputs and targets, frames first."""


class Window(NamedTuple):
    """Where a window begins."""

    file_number: int
    first_frame: int


class _File(NamedTuple):
    size_bytes: int
    layout: ArrayLayout


class _Known:
    """What one process found out about the files: where the frames lie in each."""

    def __init__(self) -> None:
        self.files: dict[str, _File] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()  # guards `_locks`

    def lock_of(self, key: str) -> threading.Lock:
        """Give the lock under which a file is downloaded, or its layout is read."""
        with self._lock:
            return self._locks.setdefault(key, threading.Lock())


class WindowDataset(StagedDataset[Pair, Any]):
    """A map-style dataset of windows of frames; items are ``(inputs, targets)``, numpy arrays.

    Positions count the windows of the first file, then those of the second, and so on; or from the
    end if negative. Windows that overlap and are begun together come in one request. It pickles if
    its store and its transform do.
    """

    def __init__(
        self,
        index: Index,
        store: Store,
        *,
        dataset_name: str = "array",
        input_offsets: Sequence[int] = DEFAULT_INPUT_OFFSETS,
        target_offsets: Sequence[int] = DEFAULT_TARGET_OFFSETS,
        num_frames: int | None = None,
        num_windows: int | None = None,
        mode: Mode = "ranged",
        download_folder: str | os.PathLike[str] | None = None,
        transform: Callable[[Pair], Any] | None = None,
        index_name: str = "the index",
    ) -> None:
        """Join files of arrays and a store.

        Args:
            index: The files; those that end in ``.npy`` are numpy's, all others HDF5.
            store: Where they lie; for "ranged" and "download" it must tell sizes, unless the index
                does.
            dataset_name: Path of the array in HDF5 files.
            input_offsets: Frames of the first array, counted from the window's first frame.
            target_offsets: Frames of the second array, likewise.
            num_frames: Frames of each file. None: the first file is asked now, which makes
                requests; another number in another file is an error when it is read.
            num_windows: Windows of each file, those that begin at its first frames; None: all that
                fit.
            mode: See `Mode`.
            download_folder: Where "download" keeps the files; made if it is not there. A file
                that is in it already is taken as it is. Removing it is the caller's.
            transform: Makes the item of both arrays; may be random.
            index_name: What errors call the index.

        Raises:
            IndexFormatError: The index is empty.
            ValueError: Offsets, mode or numbers cannot be used, or do not fit each other.
            StoreError: The first file cannot be read.
            ShardFormatError: The first file is damaged, or has no such array.
            MissingDependencyError: h5py is not installed.
        """
        if not len(index):
            raise IndexFormatError(f"{index_name}: no files, expected at least one")
        for name, offsets in (("input_offsets", input_offsets), ("target_offsets", target_offsets)):
            if not offsets or min(offsets) < 0:
                raise ValueError(f"{name}: got {list(offsets)}, expected numbers from 0 on")
        if mode not in get_args(Mode):
            raise ValueError(f"mode: got {mode!r}, expected 'download', 'ranged' or 'streaming'")
        if (download_folder is None) == (mode == "download"):
            raise ValueError(
                f"download_folder: got {download_folder!r} for mode {mode!r}, expected a folder "
                "for 'download' and None otherwise"
            )
        self.index = index
        self.store = store
        self.transform = transform
        self.mode: Mode = mode
        self._dataset_name = dataset_name
        self._input_offsets = tuple(input_offsets)
        self._target_offsets = tuple(target_offsets)
        self._offsets = sorted({*input_offsets, *target_offsets})
        self._input_places = _find_places(input_offsets, self._offsets)
        self._target_places = _find_places(target_offsets, self._offsets)
        if not set(input_offsets).isdisjoint(target_offsets):
            # Views would share memory, and what is done to one in place would be done to both.
            self._target_places = list(self._target_places)
            self._input_places = list(self._input_places)
        self._folder = None if download_folder is None else Path(download_folder).expanduser()
        self._local: Store | None = None if self._folder is None else open_store(self._folder)
        self._index_name = index_name
        self._known = PerProcess(_Known, _forget)
        self.num_frames = self._count_frames() if num_frames is None else num_frames
        self.num_windows = self._count_windows(num_windows)

    def __len__(self) -> int:
        return len(self.index) * self.num_windows

    @override
    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} windows in {len(self.index)} files, "
            f"{self.store.describe('')}, {self.mode!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._known = PerProcess(_Known, _forget)

    def set_transform(self, transform: Callable[[Pair], Any] | None) -> None:
        """Replace the transform. Workers that have started keep the one before."""
        self.transform = transform

    def locate(self, position: int) -> Window:
        """Say in which file of the index the window at ``position`` lies, and where it begins.

        Raises:
            IndexError: There is no such position.
        """
        count = len(self)
        if not -count <= position < count:
            raise IndexError(f"position: got {position}, expected {-count} to {count - 1}")
        return Window(*divmod(position % count, self.num_windows))

    # -- the three stages

    @override
    def fetch(self, position: int) -> Buffer:
        """Read the bytes that hold a window; of the whole file in mode "streaming".

        Raises:
            IndexError: There is no such position.
            StoreError: The store does not give them.
            ShardFormatError: The file is damaged, or is not like the first one.
        """
        return self.fetch_many([position])[0]

    @override
    def plan_requests(self, positions: Sequence[int]) -> list[list[int]]:
        """Put windows together that overlap; in mode "streaming" all of one file."""
        windows = [self.locate(position) for position in positions]
        by_file: dict[int, list[int]] = {}
        for number, window in enumerate(windows):
            by_file.setdefault(window.file_number, []).append(number)
        if self.mode == "streaming":
            return list(by_file.values())
        span = self._offsets[-1] + 1
        groups: list[list[int]] = []
        for numbers in by_file.values():
            # Of frames, not of bytes: the plan is the same.
            frames = [
                ByteRange(windows[number].first_frame, windows[number].first_frame + span)
                for number in numbers
            ]
            merged = merge_near(frames, max_gap_bytes=0, max_length_bytes=4 * span)
            groups += [[numbers[place] for place in group] for group in merged]
        return sorted(groups)

    @override
    def fetch_many(self, positions: Sequence[int]) -> Sequence[Buffer]:
        """Read the bytes of windows of one file, as `plan_requests` groups them.

        Raises:
            ValueError: They are of several files.
            StoreError: The store does not give them.
        """
        windows = [self.locate(position) for position in positions]
        number = windows[0].file_number
        if any(window.file_number != number for window in windows):
            raise ValueError(
                f"positions: got {list(positions)!r} of several files, expected windows of one, as "
                "plan_requests groups them"
            )
        key = self.index.key(number)
        if self.mode == "streaming":
            return [self.store.get(key)] * len(windows)
        size_bytes, layout = self._file(number)
        known = KnownBytes(size_bytes)
        plans = [layout.plan(self._frames(window)) for window in windows]
        ranges = sorted({byte_range for plan in plans for byte_range in plan})
        store = self._readable
        for group in merge_near(
            ranges, max_gap_bytes=_MAX_GAP_BYTES, max_length_bytes=_MAX_REQUEST_BYTES
        ):
            whole = cover([ranges[place] for place in group])
            known.add(whole.start, store.get(key, whole))
        return [b"".join(known.read(*byte_range) for byte_range in plan) for plan in plans]

    @override
    async def fetch_many_async(self, positions: Sequence[int]) -> Sequence[Buffer]:
        """Read as `fetch_many` does, in a thread."""
        return await asyncio.to_thread(self.fetch_many, positions)

    @override
    def decode(self, position: int, raw: Buffer) -> Pair:
        """Take the frames of a window out of its bytes.

        Raises:
            ShardFormatError: They are damaged.
        """
        window = self.locate(position)
        frames = self._frames(window)
        view = memoryview(raw).cast("B")
        if self.mode == "streaming":
            known = KnownBytes(view.nbytes)
            known.add(0, view)
            layout = self._read_layout(window.file_number, known)
        else:
            size_bytes, layout = self._file(window.file_number)
            known = KnownBytes(size_bytes)
            at = 0
            for start, stop in layout.plan(frames):
                known.add(start, view[at : at + stop - start])
                at += stop - start
        while True:
            try:
                array = layout.take(frames, known)
                break
            except MissingBytesError as missing:
                # Of HDF5's own structures, which it may look up by other ways than before.
                self._supply(window.file_number, known, missing)
        return _pick(array, self._input_places), _pick(array, self._target_places)

    @override
    def apply_transform(self, decoded: Pair) -> Any:
        """Transform inputs and targets together."""
        return decoded if self.transform is None else self.transform(decoded)

    # -- files

    def _frames(self, window: Window) -> list[int]:
        return [window.first_frame + offset for offset in self._offsets]

    def _count_frames(self) -> int:
        if self.mode != "streaming":
            return self._file(0).layout.num_frames
        raw = memoryview(self.store.get(self.index.key(0))).cast("B")
        known = KnownBytes(raw.nbytes)
        known.add(0, raw)
        return self._read_layout(0, known).num_frames

    def _count_windows(self, num_windows: int | None) -> int:
        fitting = self.num_frames - self._offsets[-1]
        if fitting < 1:
            raise ValueError(
                f"num_frames: got {self.num_frames}, expected {self._offsets[-1] + 1} or more for "
                "these offsets"
            )
        if num_windows is None:
            return fitting
        if not 1 <= num_windows <= fitting:
            raise ValueError(f"num_windows: got {num_windows}, expected 1 to {fitting}")
        return num_windows

    def _file(self, number: int) -> _File:
        """Give where the frames of a file lie; finds it out once in each process."""
        key = self.index.key(number)
        known = self._known.get()
        file = known.files.get(key)
        if file is None:
            # Held while the file is read, so that of many threads that want it one does.
            with known.lock_of(key):
                file = known.files.get(key)
                if file is None:
                    if self._folder is not None:
                        self._download(key, self._folder)
                    size_bytes = self._ask_size(number)
                    file = _File(size_bytes, self._read_layout(number, KnownBytes(size_bytes)))
                    known.files[key] = file
        return file

    def _read_layout(self, number: int, known: KnownBytes) -> ArrayLayout:
        key = self.index.key(number)
        where = self.store.describe(key)
        while True:
            try:
                layout = read_layout(known, find_format(key), self._dataset_name, where)
                break
            except MissingBytesError as missing:
                self._supply(number, known, missing)
        # Before the first file was asked, it cannot differ from itself.
        expected = getattr(self, "num_frames", layout.num_frames)
        if layout.num_frames != expected:
            raise ShardFormatError(
                f"{where}: got {layout.num_frames} frames, expected {expected} as in the other "
                f"files of {self._index_name}; leave it out"
            )
        return layout

    def _supply(self, number: int, known: KnownBytes, missing: MissingBytesError) -> None:
        wanted = missing.byte_range
        known.add(wanted.start, self._readable.get(self.index.key(number), wanted))

    @property
    def _readable(self) -> Store:
        return self.store if self._local is None else self._local

    def _ask_size(self, number: int) -> int:
        key = self.index.key(number)
        if self._folder is not None:
            return (self._folder / key).stat().st_size
        size_bytes = self.index.size_bytes(number)
        if size_bytes is not None:
            return size_bytes
        if not isinstance(self.store, SizedStore):
            raise TypeError(
                f"store: got a {type(self.store).__name__} without head(), and an index without "
                "sizes, expected one of the two; or take mode 'streaming'"
            )
        return self.store.head(key).size_bytes

    def _download(self, key: str, folder: Path) -> None:
        path = folder / key
        if folder.resolve() not in path.resolve().parents:
            raise KeyNotFoundError(f"{key!r}: leads out of {folder}, expected a key below it")
        if not path.exists():
            write_whole(path, [self.store.get(key)])


def open_windows(
    path_or_url: str | os.PathLike[str],
    *,
    file_filter: str | Sequence[str] = ("*.h5", "*.hdf5", "*.npy"),
    limit: int | None = None,
    store_options: dict[str, Any] | None = None,
    **options: Any,
) -> WindowDataset:
    """Open the array files of a folder or a bucket.

    Args:
        path_or_url: Folder, or ``s3://bucket[/prefix]``.
        file_filter: Patterns, of which a file's path below it has to fit one: ``*`` stands for
            anything, slashes included, as in ``"*/training/*8ch.h5"``.
        limit: Number of files; the first ones by name.
        store_options: What `open_store` takes besides the URL.
        options: What `WindowDataset` takes besides.

    Raises:
        FileNotFoundError: No file fits.
        StoreError: The files cannot be listed.
    """
    url = os.fspath(path_or_url)
    store = open_store(url, **(store_options or {}))
    if not isinstance(store, WritableStore):
        raise ValueError(f"{url}: cannot be listed; give an index to WindowDataset")
    patterns = [file_filter] if isinstance(file_filter, str) else list(file_filter)
    listed = Index.from_listing(
        (info.key, info.size_bytes)
        for info in store.list()
        if any(fnmatch.fnmatchcase(info.key, pattern) for pattern in patterns)
    )
    if not len(listed):
        raise KeyNotFoundError(f"{url}: no file fits {', '.join(patterns)}; check file_filter")
    options.setdefault("index_name", f"the listing of {url}")
    return WindowDataset(listed.limit(limit), store, **options)


def _find_places(offsets: Sequence[int], among: Sequence[int]) -> range | list[int]:
    """Say where the frames are among those that were read; as a range if side by side."""
    places = [among.index(offset) for offset in offsets]
    together = range(places[0], places[0] + len(places))
    return together if places == list(together) else places


def _pick(array: NDArray[Any], places: range | list[int]) -> NDArray[Any]:
    return array[places.start : places.stop] if isinstance(places, range) else array[places]


def _forget(value: object) -> None:
    del value
