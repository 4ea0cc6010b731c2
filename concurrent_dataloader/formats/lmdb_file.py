"""LMDB databases of records: opened safely, read by position or front to back.

With `lmdb_environment` and `lmdb_writer` the only module that knows the client library. A database
is one file, or a folder with a ``data.mdb`` in it. It is opened read-only and without a lock file,
at first use in each process, once for all that read it there, since LMDB must not have a file open
twice in one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.formats.lmdb_environment import (
    Lease,
    find_data_file,
    naming_damage,
    open_lease,
)
from concurrent_dataloader.formats.lmdb_record import (
    LABELS_KEY,
    METADATA_KEY,
    OLDER_KEYS_KEY,
    DatabaseMetadata,
    Record,
    older_key,
    parse_labels,
    parse_metadata,
    parse_older_keys,
    parse_older_record,
    parse_record,
    position_of_key,
    record_key,
)

if TYPE_CHECKING:
    import lmdb

READ_AHEAD_BYTES = 16 << 20
"""What is asked for at once where a database is read front to back: at 8 ms a seek and 150 MB/s
a disk then spends a fourteenth of its time on seeks."""

_HINT_BYTES = 128 << 10  # the kernel's own read-ahead; more may be cut off
_PROBE_BYTES = 64
_MAX_PIECE_RECORDS = 4096


# -- reading


@dataclasses.dataclass(slots=True)
class _Piece:
    """Records that lie in one part of the file, ``start`` up to, not including, ``stop``."""

    positions: list[int]
    start: int
    stop: int
    is_asked_for: bool = False

    def may_take(self, start: int) -> bool:
        """Tell whether a record that begins there belongs to it."""
        return (
            self.start <= start <= self.start + READ_AHEAD_BYTES
            and len(self.positions) < _MAX_PIECE_RECORDS
        )


class _FileMap:
    """Where in the file a value lies that is seen through the map, for hints to the kernel."""

    def __init__(self, environment: lmdb.Environment, path: Path) -> None:
        self._page_bytes = environment.stat()["psize"]
        self._base: int | None = None
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._file)

    def locate(self, view: memoryview) -> tuple[int, int]:
        """Give the start and the stop of a value in the file, in bytes; (0, 0) if not known."""
        address = np.frombuffer(view, np.uint8).ctypes.data
        if self._base is None:
            self._base = self._find_base(address, view)
        start = address - self._base
        return (start, start + len(view)) if self._base else (0, 0)

    def ask_for(self, start: int, stop: int) -> None:
        """Have a part read, without waiting for it; in small steps, since the kernel caps each."""
        for at in range(start, stop, _HINT_BYTES):
            os.posix_fadvise(self._file, at, min(_HINT_BYTES, stop - at), os.POSIX_FADV_WILLNEED)

    def _find_base(self, address: int, view: memoryview) -> int:
        """Find where the map begins: each page begins with its number. 0 if that is not so."""
        page = address - address % self._page_bytes
        number = ctypes.c_uint64.from_address(page).value
        start = number * self._page_bytes + address % self._page_bytes
        probe = bytes(view[:_PROBE_BYTES])
        if not 0 <= start < 1 << 62 or os.pread(self._file, len(probe), start) != probe:
            return 0
        return address - start


class LmdbFile:
    """Records of a database, by position or front to back. A value: it pickles by its arguments.

    Threads may share it. What it gives are copies, which stay when the database is closed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        readahead: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        """Look at a database, and close it again.

        Args:
            path: Its file, or its folder.
            readahead: Whether the kernel reads ahead of what is asked for: good front to back, bad
                at random. Whoever opens a file first in a process decides.
            allow_pickle: Also read databases of the older system, which are pickles or msgpack;
                nothing but lists, numbers, bytes and numpy's arrays is taken out of them.

        Raises:
            FileNotFoundError: There is no such database.
            ShardFormatError: It is cut short, not complete, or none of ours.
            ValueError: This process has it open already, by other means than this class.
            MissingDependencyError: lmdb is not installed.
        """
        self.path = Path(path).expanduser()
        self.readahead = readahead
        self.allow_pickle = allow_pickle
        self._kept: tuple[int, Lease] | None = None
        self.metadata: DatabaseMetadata | None = None
        """None for a database of the older system."""
        self._keys: NDArray[np.bytes_] | None = None
        self._num_records = self._read_count()
        self.close()

    def __len__(self) -> int:
        return self._num_records

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} records)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def close(self) -> None:
        """Give the database back; the next read opens it again. May be called twice."""
        self._kept = None

    def read(self, position: int) -> Record:
        """Read a record, and check it.

        Raises:
            ShardFormatError: It is damaged or not there.
        """
        return self.parse(position, self.read_raw(position))

    def read_raw(self, position: int) -> bytes:
        """Read a record as it is stored; `parse` takes it apart.

        Raises:
            ShardFormatError: It is not there.
        """
        lease = self._open()
        with (
            naming_damage(str(self.path)),
            lease.environment.begin(buffers=True) as transaction,
        ):
            view = transaction.get(self._key(position))
            if view is None:
                raise self._missing(position)
            return self._take(view)

    def scan_raw(self, positions: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """Read records by one cursor, in the order given, each when it is asked for.

        With ``readahead`` and rising positions the kernel is asked for the file in large pieces,
        one piece ahead: so several processes that read side by side cost one seek a piece, not one
        a record.

        Raises:
            ShardFormatError: One is not there.
        """
        lease = self._open()
        with (
            naming_damage(str(self.path)),
            lease.environment.begin(buffers=True) as transaction,
            transaction.cursor() as cursor,
        ):
            if self.readahead and hasattr(os, "posix_fadvise"):
                positions = self._read_ahead(lease.environment, transaction, positions)
            for position in positions:
                if not cursor.set_key(self._key(position)):
                    raise self._missing(position)
                yield position, self._take(cursor.value())

    def parse(self, position: int, raw: bytes) -> Record:
        """Take a record apart, and check it; its payload is a view of ``raw``.

        Raises:
            ShardFormatError: It is damaged.
        """
        where = self.describe(position)
        if self.metadata is None:
            return parse_older_record(raw, where)
        return parse_record(raw, where)

    def labels(self) -> NDArray[np.int32] | None:
        """Read all labels, (N,) int32, -1 for none; None where the database does not list them."""
        if self.metadata is None:
            return None
        lease = self._open()
        with lease.environment.begin(buffers=True) as transaction:
            view = transaction.get(LABELS_KEY)
            if view is None:
                raise ShardFormatError(f"{self.path}: has no labels; write the database anew")
            return parse_labels(view, len(self), str(self.path))

    def describe(self, position: int) -> str:
        """Name a record for a person."""
        return f"{self.path}, record {position}"

    def _read_ahead(
        self,
        environment: lmdb.Environment,
        transaction: lmdb.Transaction[memoryview],
        positions: Iterable[int],
    ) -> Iterator[int]:
        """Yield the positions; ask for the next piece of the file when one is begun."""
        with _FileMap(environment, find_data_file(self.path)) as file_map:
            pieces = self._cut(file_map, transaction, positions)
            following = next(pieces, None)
            while following is not None:
                current = following
                following = next(pieces, None)
                for piece in (current, following):
                    if piece is not None and not piece.is_asked_for:
                        self._ask_for(file_map, piece.start, piece.stop)
                        piece.is_asked_for = True
                yield from current.positions

    def _cut(
        self,
        file_map: _FileMap,
        transaction: lmdb.Transaction[memoryview],
        positions: Iterable[int],
    ) -> Iterator[_Piece]:
        """Put positions together whose records lie in one piece of the file."""
        piece: _Piece | None = None
        with transaction.cursor() as cursor:
            for position in positions:
                if not cursor.set_key(self._key(position)):
                    raise self._missing(position)
                start, stop = file_map.locate(cursor.value())
                if piece is not None and not piece.may_take(start):
                    yield piece
                    piece = None
                if piece is None:
                    piece = _Piece([], start, stop)
                piece.positions.append(position)
                piece.stop = max(piece.stop, stop)
        if piece is not None:
            yield piece

    def _ask_for(self, file_map: _FileMap, start: int, stop: int) -> None:
        """Have a part of the file read into memory, without waiting for it."""
        file_map.ask_for(start, stop)

    def _take(self, view: memoryview) -> bytes:
        """Copy a value out of the map, which does not outlive its transaction."""
        return bytes(view)

    def _open(self) -> Lease:
        kept = self._kept
        if kept is None or kept[0] != os.getpid():
            kept = self._kept = os.getpid(), open_lease(self.path, self.readahead)
        return kept[1]

    def _key(self, position: int) -> bytes:
        if not 0 <= position < self._num_records:
            raise IndexError(
                f"{self.path}: got position {position}, expected 0 to {self._num_records - 1}"
            )
        if self.metadata is not None:
            return record_key(position)
        return older_key(position) if self._keys is None else bytes(self._keys[position])

    def _missing(self, position: int) -> ShardFormatError:
        return ShardFormatError(
            f"{self.describe(position)}: not there, although the database says that it is; copy it"
            " again, or write it anew"
        )

    def _read_count(self) -> int:
        lease = self._open()
        with (
            naming_damage(str(self.path)),
            lease.environment.begin(buffers=True) as transaction,
        ):
            ours = transaction.get(METADATA_KEY)
            if ours is None:
                return self._read_older_count(transaction)
            self.metadata = parse_metadata(ours, str(self.path))
            if not self.metadata.complete:
                raise ShardFormatError(
                    f"{self.path}: the run that wrote it did not finish; run it again"
                )
            num_found = _count_records(transaction)
        if num_found != self.metadata.num_records:
            raise ShardFormatError(
                f"{self.path}: got {num_found} records, expected {self.metadata.num_records}; copy"
                " it again, or write it anew"
            )
        return num_found

    def _read_older_count(self, transaction: lmdb.Transaction[memoryview]) -> int:
        where = str(self.path)
        listed = transaction.get(OLDER_KEYS_KEY)
        if listed is None and transaction.get(older_key(0)) is None:
            raise ShardFormatError(
                f"{where}: an LMDB database, but none of ours; expected one that"
                " `concurrent-dataloader lmdb` wrote"
            )
        if not self.allow_pickle:
            raise ShardFormatError(
                f"{where}: written by an older system, as pickles or msgpack; if you trust where"
                " it came from, read it with allow_pickle=True, and better write it anew"
            )
        if listed is None:
            raise ShardFormatError(
                f"{where}: has no key '__keys__', so the run that wrote it did not finish; write"
                " it anew"
            )
        keys = parse_older_keys(listed, where)
        if any(key != older_key(position) for position, key in enumerate(keys)):
            self._keys = np.array(keys, np.bytes_)
        return len(keys)


def _count_records(transaction: lmdb.Transaction[Any]) -> int:
    with transaction.cursor() as cursor:
        position = position_of_key(cursor.key()) if cursor.last() else None
        return 0 if position is None else position + 1
