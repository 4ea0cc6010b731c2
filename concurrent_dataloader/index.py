"""Which samples exist: an ordered list of keys, held so that a million of them weigh nothing.

An index file is a JSON list of keys, ``["train/n01440764/n01440764_10026.JPEG", ...]``. In memory
the keys are one run of UTF-8 with the offset of each, not a Python object each, so that forked
workers do not copy pages by counting references. A large index is packed into a file, once, beside
its JSON, and mapped from there by each process that needs it (layout in `packed`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from concurrent_dataloader.errors import IndexFormatError
from concurrent_dataloader.files import is_link_to_nothing, write_whole
from concurrent_dataloader.packed import (
    MAGIC,
    NO_SOURCE,
    MappedFile,
    PackedKeys,
    PackedSource,
    digest_file,
    digest_keys,
    map_packed,
    pack,
    packed_pieces,
)

log = logging.getLogger(__name__)

PACK_ABOVE_KEYS = 50_000
"""A JSON index with more keys is packed when it is first loaded; fewer are parsed in 20 ms."""

_CHUNK_KEYS = 8192
# A file written twice within a tick of its file system's clock looks the same: see `_is_fresh`.
_CLOCK_TICK_NS = 2_000_000_000


class Index:
    """Which samples exist, in order. Immutable; a key may stand in it more than once.

    Two indexes are equal if they hold the same keys in the same order, wherever these are kept. It
    pickles: as the path of its packed file if it has one, else with its keys.
    """

    __hash__ = None  # pyright: ignore[reportAssignmentType]: equal by content, which is large

    def __init__(self, keys: PackedKeys, positions: NDArray[np.int64] | None = None) -> None:
        """Not for callers: use `from_keys`, `from_listing`, `from_folder` or `load`."""
        self._keys = keys
        self._positions = positions
        self._checksum: bytes | None = None

    # -- making one

    @classmethod
    def from_keys(cls, keys: Iterable[str], sizes: Iterable[int] | None = None) -> Self:
        """Make an index of ``keys``, in the order given.

        Args:
            keys: Names of the samples' objects or files.
            sizes: Size of each object in bytes, where known.

        Raises:
            IndexFormatError: An entry is no string, is empty, or cannot be written as UTF-8.
        """
        return cls(pack(list(keys), None if sizes is None else list(sizes), "index"))

    @classmethod
    def from_listing(
        cls,
        objects: Iterable[tuple[str, int]],
        *,
        suffixes: Sequence[str] = (),
        ignore_case: bool = False,
    ) -> Self:
        """Make an index of a store's listing, sorted by key; markers of folders are left out.

        Args:
            objects: Key and size in bytes of each, as ``store.list(prefix)`` yields them.
            suffixes: Endings to keep, such as ``(".JPEG", ".png")``; all when empty.
            ignore_case: Whether ``.jpeg`` also keeps ``.JPEG``.
        """
        wanted = _suffix_filter(suffixes, ignore_case)
        found = sorted(
            (key, size) for key, size in objects if not key.endswith("/") and wanted(key)
        )
        return cls.from_keys((key for key, _ in found), (size for _, size in found))

    @classmethod
    def from_folder(
        cls,
        root: str | os.PathLike[str],
        *,
        suffixes: Sequence[str] = (),
        ignore_case: bool = False,
    ) -> Self:
        """Make an index of all files below ``root``: paths relative to it, with ``/``, sorted.

        Links to folders are followed, but not into one that holds them.

        Args:
            root: Folder to walk.
            suffixes: Endings to keep, such as ``(".JPEG", ".png")``; all when empty.
            ignore_case: Whether ``.jpeg`` also keeps ``.JPEG``.

        Raises:
            FileNotFoundError: There is no such folder.
            IndexFormatError: A file's name is not UTF-8.
        """
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; give the root of the samples' files")
        wanted = _suffix_filter(suffixes, ignore_case)
        return cls.from_keys(sorted(key for key in _walk(root) if wanted(key)))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, pack_above_keys: int = PACK_ABOVE_KEYS) -> Self:
        """Read an index file, JSON or packed.

        A JSON file of more than ``pack_above_keys`` keys is packed as ``<name>.packed`` beside it,
        for the next time and the other processes; if that cannot be written, the keys stay in
        memory. A packed file that is damaged, or not made of this JSON, is made anew.

        Args:
            path: The file.
            pack_above_keys: From which number of keys on packing pays.

        Raises:
            FileNotFoundError: There is no such file.
            IndexFormatError: It is no index, or holds no key.
        """
        path = Path(path)
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path}: no such index file; write it with `concurrent-dataloader index`"
            ) from error
        with file:
            if file.read(len(MAGIC)) == MAGIC:
                index = cls(map_packed(path))
            else:
                index = cls(_load_json(path, file, pack_above_keys))
        if not len(index):
            raise IndexFormatError(f"{path}: the index holds no keys, expected at least one")
        return index

    # -- reading it

    def __len__(self) -> int:
        if self._positions is not None:
            return len(self._positions)
        return len(self._keys.offsets) - 1

    def key(self, position: int) -> str:
        """Give the key at ``position``, which counts from 0, or from the end if negative.

        Raises:
            IndexError: There is no such position.
            IndexFormatError: The packed file is damaged at this place.
        """
        row = self._row(position)
        blob, offsets, _, file = self._keys
        try:
            key = str(blob[offsets[row] : offsets[row + 1]], "utf-8")
        except UnicodeDecodeError as error:
            raise self._damage(row) from error
        if file is not None:
            file.count_look_up()
        return key

    def keys(self) -> Iterator[str]:
        """Yield all keys, in order, holding a few thousand of them at a time."""
        for first in range(0, len(self), _CHUNK_KEYS):
            yield from self._decode(first, min(first + _CHUNK_KEYS, len(self)))

    def size_bytes(self, position: int) -> int | None:
        """Give the size of an object when the index was made, or None if it is not known."""
        row = self._row(position)
        _, _, sizes, file = self._keys
        if sizes is None:
            return None
        size_bytes = int(sizes[row])
        if file is not None:
            file.count_look_up()
        return size_bytes

    def checksum(self) -> str:
        """Name the content in 32 hexadecimal digits: the same for the same keys in this order."""
        if self._checksum is None:
            if self._positions is None and self._keys.file is not None:
                self._checksum = self._keys.file.checksum
            else:
                self._checksum = digest_keys(*self._gather()[:2])
        return self._checksum.hex()

    def verify(self) -> None:
        """Read the packed file whole and compare it with its checksum; keys in memory are right.

        Raises:
            IndexFormatError: It is damaged.
        """
        self._keys.verify()

    @property
    def packed_file(self) -> Path | None:
        """The packed file that the keys are mapped from, or None if they are in memory."""
        return None if self._keys.file is None else self._keys.file.path

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Index):
            return NotImplemented
        return len(self) == len(other) and self.checksum() == other.checksum()

    def __repr__(self) -> str:
        where = "in memory" if self._keys.file is None else f"{str(self._keys.file.path)!r}"
        return f"Index({len(self)} keys, {where})"

    # -- a part of it

    def select(self, positions: Iterable[int] | NDArray[np.integer[Any]]) -> Self:
        """Give a view of some positions, in the order given, over the same keys.

        Args:
            positions: Each from 0 to ``len(self) - 1``; one may come more than once.

        Raises:
            TypeError: A position is no integer.
            IndexError: There is no such position.
        """
        chosen = np.asarray(
            positions if isinstance(positions, np.ndarray | Sequence) else list(positions)
        )
        if len(chosen) and chosen.dtype.kind not in "iu":
            raise TypeError(f"positions: got {chosen.dtype}, expected integers")
        chosen = chosen.astype(np.int64)
        outside = np.flatnonzero((chosen < 0) | (chosen >= len(self)))
        if len(outside):
            raise IndexError(
                f"positions: got {int(chosen[outside[0]])}, expected 0 to {len(self) - 1}"
            )
        return type(self)(
            self._keys, chosen if self._positions is None else self._positions[chosen]
        )

    def limit(self, n: int | None, sample_seed: int | None = None) -> Self:
        """Give a view of at most ``n`` samples.

        The head of an index that is sorted by class holds few classes: 15,000 images of ImageNet
        are twelve. A seed takes a sample of all of them instead, in the order of the index, and the
        same one for the same seed on every machine.

        Args:
            n: Number of samples; all when None, or when there are no more.
            sample_seed: Seed of the sample, 0 to 2**32 - 1; the head when None.

        Raises:
            TypeError: One of them is no whole number.
            ValueError: ``n`` is less than 1, or the seed is out of range.
        """
        chosen = choose_positions(len(self), n, sample_seed)
        return self if chosen is None else self.select(chosen)

    # -- writing it

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the keys as a JSON list, whole or not at all."""
        write_whole(Path(path), self._json_pieces())

    def save_packed(
        self, path: str | os.PathLike[str], *, json_path: str | os.PathLike[str] | None = None
    ) -> None:
        """Write the packed form, with the object sizes if they are known, whole or not at all.

        Args:
            path: File to write; `load` looks for ``<name of the JSON file>.packed``.
            json_path: The JSON file of the same keys, so that `load` of that one may use this.
        """
        source = NO_SOURCE
        if json_path is not None:
            with open(json_path, "rb") as file:
                status = os.fstat(file.fileno())
                source = PackedSource(status.st_size, status.st_mtime_ns, digest_file(file))
        write_whole(Path(path), packed_pieces(*self._gather(), source))

    def __reduce__(self) -> tuple[Callable[..., Index], tuple[Any, ...]]:
        file = self._keys.file
        if file is not None:
            return _reopen, (str(file.path), file.checksum, self._positions)
        blob, offsets, sizes = self._gather()
        return _rebuild, (bytes(blob), offsets, sizes)

    def _row(self, position: int) -> int:
        count = len(self)
        row = operator.index(position)
        if not -count <= row < count:
            raise IndexError(f"position: got {row}, expected {-count} to {count - 1}")
        row = row + count if row < 0 else row
        return row if self._positions is None else int(self._positions[row])

    def _damage(self, row: int) -> IndexFormatError:
        where = "index" if self._keys.file is None else self._keys.file.path
        return IndexFormatError(
            f"{where}: the key in row {row} is not UTF-8; the file is damaged, remove it"
        )

    def _decode(self, first: int, stop: int) -> Iterator[str]:
        if self._positions is None:
            blob, offsets, _, _ = self._keys
            low, high = int(offsets[first]), int(offsets[stop])
            raw, cuts = bytes(blob[low:high]), (offsets[first : stop + 1] - low).tolist()
        else:
            blob, offsets, _ = self._gather(first, stop)
            raw, cuts = bytes(blob), offsets.tolist()
        self._keys.release()
        if raw.isascii():
            text = raw.decode()
            return (text[low:high] for low, high in itertools.pairwise(cuts))
        try:
            return iter([raw[low:high].decode() for low, high in itertools.pairwise(cuts)])
        except UnicodeDecodeError as error:
            raise self._damage(first) from error

    def _gather(
        self, first: int = 0, stop: int | None = None
    ) -> tuple[memoryview, NDArray[np.int64], NDArray[np.int64] | None]:
        """Give a span of this view as if it were packed alone: keys, their bounds, their sizes."""
        blob, offsets, sizes, _ = self._keys
        if self._positions is None:
            return blob, offsets, sizes
        rows = self._positions[first:stop]
        own_offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(offsets[rows + 1] - offsets[rows], out=own_offsets[1:])
        own_blob = bytearray(int(own_offsets[-1]))
        for row, low, high in zip(
            rows.tolist(), own_offsets.tolist(), own_offsets[1:].tolist(), strict=False
        ):
            start = int(offsets[row])
            own_blob[low:high] = blob[start : start + high - low]
        return memoryview(own_blob), own_offsets, None if sizes is None else sizes[rows]

    def _json_pieces(self) -> Iterator[bytes]:
        yield b"["
        for first in range(0, len(self), _CHUNK_KEYS):
            chunk = list(self._decode(first, min(first + _CHUNK_KEYS, len(self))))
            yield (b"," if first else b"") + orjson.dumps(chunk)[1:-1]
        yield b"]\n"


def choose_positions(
    count: int, n: int | None, sample_seed: int | None
) -> NDArray[np.int64] | None:
    """Choose which of ``count`` samples a limit of ``n`` keeps; None: all of them.

    Raises:
        ValueError: As in `Index.limit`.
    """
    for name, value in (("limit", n), ("sample_seed", sample_seed)):
        if value is not None and not hasattr(value, "__index__"):
            raise TypeError(f"{name}: got {value!r}, expected a whole number, or None")
    if n is not None and n < 1:
        raise ValueError(f"limit: got {n}, expected 1 or more, or None for all")
    if sample_seed is not None and not 0 <= sample_seed < 2**32:
        raise ValueError(f"sample_seed: got {sample_seed}, expected 0 to {2**32 - 1}")
    if n is None or n >= count:
        return None
    if sample_seed is None:
        return np.arange(n)
    # numpy's older generator, because its stream is promised never to change.
    return np.sort(np.random.RandomState(sample_seed).permutation(count)[:n])


def packed_path(json_path: str | os.PathLike[str]) -> Path:
    """Tell where the packed form of a JSON index lies: ``<name>.packed``, beside it."""
    json_path = Path(json_path)
    return json_path.with_name(json_path.name + ".packed")


def _reopen(path: str, checksum: bytes, positions: NDArray[np.int64] | None) -> Index:
    keys = map_packed(Path(path))
    if keys.file is None or keys.file.checksum != checksum:
        raise IndexFormatError(
            f"{path}: the packed index was replaced by another one while it was in use; start again"
        )
    return Index(keys, positions)


def _rebuild(blob: bytes, offsets: NDArray[np.int64], sizes: NDArray[np.int64] | None) -> Index:
    return Index(PackedKeys(memoryview(blob), offsets, sizes, None))


def _suffix_filter(suffixes: Sequence[str], ignore_case: bool) -> Callable[[str], bool]:
    if isinstance(suffixes, str):
        raise TypeError(f"suffixes: got {suffixes!r}, expected a tuple such as ('{suffixes}',)")
    if ignore_case:
        folded = tuple(suffix.casefold() for suffix in suffixes)
        return lambda key: not folded or key.casefold().endswith(folded)
    exact = tuple(suffixes)
    return lambda key: not exact or key.endswith(exact)


def _walk(root: Path) -> Iterator[str]:
    """Yield the path of each file below ``root``, relative to it, in no order."""
    status = root.stat()
    # Folders to read: path, prefix of its keys, and the folders that lead to it.
    pending = [(str(root), "", frozenset({(status.st_dev, status.st_ino)}))]
    while pending:
        folder, prefix, above = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                # A link to nothing is named, as by ImageFolder, so that reading it is an error.
                if entry.is_file() or is_link_to_nothing(entry):
                    yield prefix + entry.name
                elif entry.is_dir():
                    status = entry.stat()
                    identity = (status.st_dev, status.st_ino)
                    if identity not in above:
                        pending.append((entry.path, f"{prefix}{entry.name}/", above | {identity}))


def _load_json(path: Path, file: BufferedReader, pack_above_keys: int) -> PackedKeys:
    status = os.fstat(file.fileno())
    packed = packed_path(path)
    if (mapped := _map_if_fresh(packed, file, status)) is not None:
        return mapped
    file.seek(0)
    keys = pack(_parse_json(path, file.read()), None, path)
    if len(keys.offsets) - 1 <= pack_above_keys:
        return keys
    source = PackedSource(status.st_size, status.st_mtime_ns, digest_file(file))
    try:
        write_whole(packed, packed_pieces(keys.blob, keys.offsets, keys.sizes, source))
        return map_packed(packed)
    except OSError as error:
        log.info("%s: cannot be written (%s); the index stays in memory", packed, error)
        return keys


def _parse_json(path: Path, raw: bytes) -> list[str]:
    try:
        keys = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise IndexFormatError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg};"
            " expected a JSON list of keys"
        ) from error
    if not isinstance(keys, list):
        raise IndexFormatError(
            f"{path}: got a JSON {type(keys).__name__}, expected a list of keys such as"
            ' ["train/n01440764/n01440764_10026.JPEG"]'
        )
    return cast("list[str]", keys)


def _map_if_fresh(
    packed: Path, file: BufferedReader, json_status: os.stat_result
) -> PackedKeys | None:
    try:
        keys = map_packed(packed)
    except FileNotFoundError:
        return None
    except (IndexFormatError, OSError) as error:
        log.info("%s: made anew, because: %s", packed, error)
        return None
    assert keys.file is not None
    return keys if _is_fresh(keys.file, file, json_status) else None


def _is_fresh(mapped: MappedFile, file: BufferedReader, json_status: os.stat_result) -> bool:
    """Tell whether a packed file was made of the JSON file as it is now.

    Size and time decide, if they can. They cannot where the JSON file was only touched or copied,
    and where it was written so shortly before it was packed that it may have been written again
    within the same tick of the clock. Its content decides then; in the second case once, because
    the packed file is touched.
    """
    source = mapped.source
    if source.size_bytes != json_status.st_size:
        return False
    same_time = source.mtime_ns == json_status.st_mtime_ns
    if same_time and mapped.mtime_ns - source.mtime_ns > _CLOCK_TICK_NS:
        return True
    if digest_file(file) != source.digest:
        return False
    if same_time:
        with contextlib.suppress(OSError):
            os.utime(mapped.path)
    return True
