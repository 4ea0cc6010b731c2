"""Where the frames of an array lie in an HDF5 or npy file, and how they are taken out of its bytes.

A frame is what the first axis counts. Nothing here reads a file: `read_layout` is given what is
known of it, and says what it needs besides. What it finds is an `ArrayLayout`: for any frames, the
byte ranges that hold them (`plan`), and the array that is in these bytes (`take`).

HDF5 itself interprets its files: it is given a file that consists of the ranges that were read.
"""

from __future__ import annotations

import abc
import bisect
import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer, override

from concurrent_dataloader.errors import MissingDependencyError, ShardFormatError
from concurrent_dataloader.ranges import ByteRange

ArrayFormat = Literal["hdf5", "npy"]

_BLOCK_BYTES = 16 << 10
"""What is asked for at a time while a layout is read. The objects that HDF5 looks at, headers and
nodes of trees, lie side by side as a rule."""

_CHUNK_CACHE_BYTES = 64 << 20
_NPY_MAGIC_BYTES = 12


def find_format(name: str) -> ArrayFormat:
    """Tell the format of a file by its name: npy if it ends so, HDF5 otherwise."""
    return "npy" if name.lower().endswith(".npy") else "hdf5"


class MissingBytesError(Exception):
    """Bytes that are needed are not among those that are known; never leaves this package."""

    def __init__(self, byte_range: ByteRange) -> None:
        super().__init__(f"bytes [{byte_range.start}, {byte_range.stop}) are needed")
        self.byte_range = byte_range


class KnownBytes:
    """Parts of a file, which may overlap."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._starts: list[int] = []
        self._parts: list[memoryview] = []

    def add(self, start: int, raw: Buffer) -> None:
        """Add the bytes from ``start`` on."""
        place = bisect.bisect_right(self._starts, start)
        self._starts.insert(place, start)
        self._parts.insert(place, memoryview(raw).cast("B"))

    def parts(self) -> list[tuple[int, memoryview]]:
        """Give all parts, by where they begin."""
        return list(zip(self._starts, self._parts, strict=True))

    def read(self, start: int, stop: int) -> bytes:
        """Put the bytes from ``start`` to ``stop`` together.

        Raises:
            MissingBytesError: Some are not known; gives those from the first one on, by blocks.
        """
        stop = min(stop, self.size_bytes)
        pieces: list[memoryview] = []
        at = start
        while at < stop:
            piece = self._find(at, stop)
            if piece is None:
                first = at - at % _BLOCK_BYTES
                last = min(-(-stop // _BLOCK_BYTES) * _BLOCK_BYTES, self.size_bytes)
                raise MissingBytesError(ByteRange(first, last))
            pieces.append(piece)
            at += piece.nbytes
        return b"".join(pieces)

    def _find(self, at: int, stop: int) -> memoryview | None:
        # The part that begins last may be a short one inside of another; look at earlier ones too.
        place = bisect.bisect_right(self._starts, at)
        for number in range(place - 1, -1, -1):
            offset = at - self._starts[number]
            part = self._parts[number]
            if offset < part.nbytes:
                return part[offset : stop - self._starts[number]]
        return None


class ArrayLayout(abc.ABC):
    """Where the frames of an array lie. Pure."""

    def __init__(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype

    @property
    def num_frames(self) -> int:
        """Length of the first axis."""
        return self.shape[0]

    @abc.abstractmethod
    def plan(self, frames: Sequence[int]) -> list[ByteRange]:
        """Give the ranges that hold some frames, in the order of the file.

        Args:
            frames: From 0 to ``num_frames - 1``, rising.
        """

    @abc.abstractmethod
    def take(self, frames: Sequence[int], known: KnownBytes) -> NDArray[Any]:
        """Take frames out of the bytes of the file.

        Args:
            frames: As in `plan`.
            known: Holds the ranges that `plan` gives.

        Returns:
            A new array.

        Raises:
            MissingBytesError: More bytes are needed.
            ShardFormatError: The bytes are damaged.

        Shapes:
            Returns: (len(frames), ...), as the file has it.
        """


def read_layout(
    known: KnownBytes, array_format: ArrayFormat, dataset_name: str, where: str
) -> ArrayLayout:
    """Find out where the frames lie.

    Args:
        known: What is known of the file.
        array_format: What the file is.
        dataset_name: Path of the array in an HDF5 file.
        where: Names the file in errors.

    Raises:
        MissingBytesError: More bytes are needed: add them to ``known``, and call again.
        ShardFormatError: It is no such file, has no such array, or one that cannot be read by
            ranges.
        MissingDependencyError: h5py is not installed.
    """
    if array_format == "npy":
        return _read_npy_layout(known, where)
    return _read_hdf5_layout(known, dataset_name, where)


# -- npy


class _NpyLayout(ArrayLayout):
    def __init__(self, shape: Sequence[int], dtype: np.dtype[Any], start: int) -> None:
        super().__init__(shape, dtype)
        self._start = start
        self._frame_bytes = dtype.itemsize * math.prod(self.shape[1:])

    @override
    def plan(self, frames: Sequence[int]) -> list[ByteRange]:
        return [
            ByteRange(
                self._start + first * self._frame_bytes, self._start + stop * self._frame_bytes
            )
            for first, stop in _runs(frames)
        ]

    @override
    def take(self, frames: Sequence[int], known: KnownBytes) -> NDArray[Any]:
        raw = bytearray().join(known.read(*byte_range) for byte_range in self.plan(frames))
        return np.frombuffer(raw, self.dtype).reshape(len(frames), *self.shape[1:])


def _read_npy_layout(known: KnownBytes, where: str) -> ArrayLayout:
    # Source: numpy.lib.format, "Format Version 1.0" and "2.0".
    head = known.read(0, _NPY_MAGIC_BYTES)
    if not head.startswith(b"\x93NUMPY") or len(head) < _NPY_MAGIC_BYTES:
        raise ShardFormatError(f"{where}: got {head[:6]!r} at its begin, expected an npy file")
    version = (head[6], head[7])
    if version not in ((1, 0), (2, 0)):
        raise ShardFormatError(
            f"{where}: got version {version[0]}.{version[1]} of npy, expected 1.0 or 2.0; "
            "write it anew with numpy.save"
        )
    length = int.from_bytes(head[8:10] if version == (1, 0) else head[8:12], "little")
    start = length + (10 if version == (1, 0) else 12)
    if start > known.size_bytes:
        raise ShardFormatError(f"{where}: cut short: its header alone has {start} bytes")
    file = io.BytesIO(known.read(0, start)[8:])
    reader = np.lib.format.read_array_header_1_0
    if version == (2, 0):
        reader = np.lib.format.read_array_header_2_0
    try:
        shape, is_fortran, dtype = reader(file)
    except ValueError as error:
        raise ShardFormatError(f"{where}: no npy header: {error}") from error
    if dtype.hasobject or is_fortran or not shape:
        raise ShardFormatError(
            f"{where}: got {dtype} {shape}{' in Fortran order' if is_fortran else ''}, expected "
            "numbers in C order with a first axis; write it anew with numpy.ascontiguousarray"
        )
    expected = start + dtype.itemsize * math.prod(shape)
    if known.size_bytes < expected:
        raise ShardFormatError(
            f"{where}: cut short: got {known.size_bytes} bytes, expected {expected}"
        )
    return _NpyLayout(shape, dtype, start)


# -- HDF5


class _SparseFile(io.RawIOBase):
    """A file of which only some bytes are known; remembers which were read."""

    def __init__(self, known: KnownBytes) -> None:
        super().__init__()
        self._known = known
        self._position = 0
        self.reads: list[ByteRange] = []

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        bases = (0, self._position, self._known.size_bytes)
        self._position = bases[whence] + offset
        return self._position

    @override
    def readinto(self, buffer: Buffer, /) -> int:
        with memoryview(buffer).cast("B") as target:
            stop = min(self._position + target.nbytes, self._known.size_bytes)
            raw = self._known.read(self._position, stop)
            target[: len(raw)] = raw
        self.reads.append(ByteRange(self._position, self._position + len(raw)))
        self._position += len(raw)
        return len(raw)


class _Hdf5Layout(ArrayLayout):
    def __init__(
        self,
        dataset: Any,
        dataset_name: str,
        where: str,
        first_frames: NDArray[np.int64],
        extents: NDArray[np.int64],
        frames_per_piece: int,
    ) -> None:
        super().__init__(dataset.shape, dataset.dtype)
        self._dataset_name = dataset_name
        self._where = where
        self._first_frames = first_frames
        self._extents = extents
        self._frames_per_piece = frames_per_piece
        self._metadata: list[tuple[int, bytes]] = []

    def keep(self, known: KnownBytes, reads: Sequence[ByteRange]) -> None:
        """Keep what was read to find the array, to find it again when frames are taken."""
        self._metadata = [(start, known.read(start, stop)) for start, stop in sorted(set(reads))]

    @override
    def plan(self, frames: Sequence[int]) -> list[ByteRange]:
        wanted = np.asarray(frames, np.int64)
        before = np.searchsorted(wanted, self._first_frames)
        behind = np.searchsorted(wanted, self._first_frames + self._frames_per_piece)
        extents = self._extents[behind > before]
        return [ByteRange(*extent) for extent in sorted(map(tuple, extents.tolist()))]

    @override
    def take(self, frames: Sequence[int], known: KnownBytes) -> NDArray[Any]:
        for start, raw in self._metadata:
            known.add(start, raw)
        file = _SparseFile(known)
        array = np.empty((len(frames), *self.shape[1:]), self.dtype)
        h5py = _h5py()
        try:
            with h5py.File(file, "r", rdcc_nbytes=_CHUNK_CACHE_BYTES) as opened:
                dataset = opened[self._dataset_name]
                done = 0
                for first, stop in _runs(frames):
                    dataset.read_direct(array, np.s_[first:stop], np.s_[done : done + stop - first])
                    done += stop - first
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise ShardFormatError(
                f"{self._where}: frames {frames[0]} to {frames[-1]} cannot be read ({error}); "
                "the file is damaged, fetch it anew"
            ) from error
        return array


def _read_hdf5_layout(known: KnownBytes, dataset_name: str, where: str) -> ArrayLayout:
    h5py = _h5py()
    file = _SparseFile(known)
    try:
        with h5py.File(file, "r") as opened:
            # Nothing of another file is read: its path would be the writer's to choose.
            leads_elsewhere = _leads_elsewhere(opened, dataset_name)
            dataset: Any = None if leads_elsewhere else opened.get(dataset_name)
            if not isinstance(dataset, h5py.Dataset):
                names = ", ".join(map(repr, sorted(opened)))
                elsewhere = " (it is a link to another file)" if leads_elsewhere else ""
                raise ShardFormatError(
                    f"{where}: no dataset {dataset_name!r}{elsewhere}, expected one in this file; "
                    f"its names are {names or 'none'}"
                )
            is_foreign = (
                bool(dataset.external)
                or dataset.is_virtual
                or _file_number(dataset) != _file_number(opened)  # by a link to a link
            )
            if is_foreign or not dataset.shape or dataset.dtype.hasobject:
                raise ShardFormatError(
                    f"{where}: dataset {dataset_name!r}: got {dataset.dtype} {dataset.shape}"
                    f"{' of other files' if is_foreign else ''}, expected numbers in this file, "
                    "with a first axis"
                )
            layout = _Hdf5Layout(dataset, dataset_name, where, *_find_pieces(dataset))
            if dataset.chunks is not None and dataset.shape[0]:
                # As `take` will look it up, which may read more than listing all chunks did.
                dataset.id.get_chunk_info_by_coord((0,) * len(dataset.shape))
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        if isinstance(error, ShardFormatError):
            raise
        raise ShardFormatError(f"{where}: no HDF5 file that can be read: {error}") from error
    layout.keep(known, file.reads)
    return layout


def _leads_elsewhere(opened: Any, name: str) -> bool:
    """Whether a name, or a group on its way, is a link to another file. HDF5 1.14 follows those."""
    parts = name.strip("/").split("/")
    ways = ("/".join(parts[:num]) for num in range(1, len(parts) + 1))
    external = _h5py().ExternalLink
    return any(isinstance(opened.get(way, getlink=True), external) for way in ways)


def _file_number(place: Any) -> int:
    """Tell open files apart, whatever they are called."""
    return _h5py().h5o.get_info(place.id).fileno


def _find_pieces(dataset: Any) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Give the first frame and the extent of each chunk, and how many frames a chunk holds."""
    if dataset.chunks is not None:
        found: list[Any] = []
        dataset.id.chunk_iter(found.append)
        firsts = np.array([chunk.chunk_offset[0] for chunk in found], np.int64)
        extents = np.array(
            [(chunk.byte_offset, chunk.byte_offset + chunk.size) for chunk in found], np.int64
        )
        return firsts, extents.reshape(-1, 2), dataset.chunks[0]
    start = dataset.id.get_offset()
    if start is None:  # within the header, or never written
        return np.zeros(0, np.int64), np.zeros((0, 2), np.int64), 1
    frame_bytes = dataset.dtype.itemsize * math.prod(dataset.shape[1:])
    firsts = np.arange(dataset.shape[0], dtype=np.int64)
    starts = start + firsts * frame_bytes
    return firsts, np.stack([starts, starts + frame_bytes], axis=1), 1


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(
            f"HDF5: {error}; install it with `pip install h5py`, or use npy files"
        ) from error
    return h5py


def _runs(frames: Sequence[int]) -> list[tuple[int, int]]:
    """Join frames that follow each other: first one, and the one behind the last."""
    runs: list[tuple[int, int]] = []
    for frame in frames:
        if runs and runs[-1][1] == frame:
            runs[-1] = (runs[-1][0], frame + 1)
        else:
            runs.append((frame, frame + 1))
    return runs
