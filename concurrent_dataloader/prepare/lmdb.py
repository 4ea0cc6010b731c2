"""Write the samples of a source to an LMDB database, and measure how fast one is read."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
from typing_extensions import Buffer

from concurrent_dataloader.errors import LoaderError, ShardFormatError
from concurrent_dataloader.formats.lmdb_file import LmdbFile
from concurrent_dataloader.formats.lmdb_record import (
    DatabaseMetadata,
    Order,
    Record,
    pack_labels,
    pack_record,
)
from concurrent_dataloader.formats.lmdb_writer import COMMIT_BYTES, DEFAULT_MAP_BYTES, LmdbWriter
from concurrent_dataloader.prepare.made_folders import make_folders
from concurrent_dataloader.prepare.plan import shuffle_positions
from concurrent_dataloader.prepare.source import Source
from concurrent_dataloader.threads import FutureThreads

DEFAULT_CONCURRENCY = 8
"""Samples of the source that are read at once."""

_END_TIMEOUT_S = 10.0


class Written(NamedTuple):
    """What became of a database."""

    num_records: int
    num_found: int
    """Those of them that an earlier run had written."""

    size_bytes: int


def database_name(split: str) -> str:
    """Give the usual name of a split's database; an older system's."""
    return f"ILSVRC-{split}.lmdb"


def write_lmdb(
    source: Source,
    path: Path,
    *,
    split: str,
    order: Order,
    seed: int = 0,
    concurrency: int = DEFAULT_CONCURRENCY,
    map_bytes: int = DEFAULT_MAP_BYTES,
    commit_bytes: int = COMMIT_BYTES,
    on_record: Callable[[str], None] | None = None,
) -> Written:
    """Write a database; files are stored as they are, with their names and labels.

    The same source, split, order and seed give the same records in the same order anywhere. The
    database has its name only when it is complete. Until then it is called ``.NAME.partial``; a
    run that finds one of its own goes on with it, and replaces any other.

    Args:
        source: The samples; not closed here.
        path: The database's file; its folder is made if need be.
        split: What the database says that it is, such as "train".
        order: "shuffled" by the seed, as for training, or "list", as the source has them.
        seed: 0 to 2**32 - 1; not looked at for "list".
        concurrency: Samples that are read at once.
        map_bytes: Address space to begin with; grows by itself.
        commit_bytes: What is held in memory until it is written, and what a killed run loses.
        on_record: Called with the name of each record, those of an earlier run included.

    Raises:
        ValueError: A setting is out of its range, or the source has no samples.
        FileExistsError: There is another database, or something else, at the path.
        StoreError: A sample cannot be read.
        OSError: The database cannot be written, the disk is full, or another process writes it.
        MissingDependencyError: lmdb is not installed.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency: got {concurrency}, expected 1 or more")
    if not len(source):
        raise ValueError(f"{path}: got a source without samples, expected at least one")
    positions = shuffle_positions(len(source), seed if order == "shuffled" else None).tolist()
    metadata = DatabaseMetadata(
        num_records=len(positions),
        order=order,
        seed=seed if order == "shuffled" else None,
        split=split,
        classes=None if source.classes is None else list(source.classes),
        label_space=source.label_space,
        plan="",
        complete=False,
    )
    metadata = metadata._replace(plan=_digest_plan(source, positions, metadata))
    if path.exists():
        return _check_same(path, metadata)
    partial = path.with_name(f".{path.name}.partial")
    with (
        make_folders(path.parent),
        _open_partial(partial, metadata, map_bytes, commit_bytes) as writer,
        _removing_if_empty(partial, writer),
    ):
        num_found = writer.count_records()
        if on_record is not None:
            for position in positions[:num_found]:
                on_record(source.name(position))
        missing = positions[num_found:]
        for number, raw in enumerate(_read_in_order(source, missing, concurrency), num_found):
            position = positions[number]
            record = Record(source.name(position), source.label(position), raw)
            writer.put_record(number, pack_record(record))
            if on_record is not None:
                on_record(record.name)
        labels = pack_labels([source.label(position) for position in positions])
        writer.put_metadata(metadata._replace(complete=True), labels)
        os.replace(partial, path)
    return Written(len(positions), num_found, path.stat().st_size)


def _digest_plan(source: Source, positions: Sequence[int], metadata: DatabaseMetadata) -> str:
    """Tell apart what would be written: whose samples, named and labelled how, in which order."""
    digest = hashlib.sha256(orjson.dumps(metadata._asdict()))
    for position in positions:
        entry = (source.name(position), source.label(position), source.size_bytes(position))
        digest.update(repr(entry).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _check_same(path: Path, metadata: DatabaseMetadata) -> Written:
    """Accept a database that an earlier run of the same plan has finished."""
    try:
        found = LmdbFile(path).metadata
    except (ShardFormatError, OSError):
        found = None
    if found is None or found.plan != metadata.plan:
        raise FileExistsError(
            f"{path}: is there already, and is not what this run would write; remove it, or choose"
            " another name"
        )
    return Written(found.num_records, found.num_records, path.stat().st_size)


def _open_partial(
    partial: Path, metadata: DatabaseMetadata, map_bytes: int, commit_bytes: int
) -> LmdbWriter:
    """Open what an earlier run of the same plan left, or begin anew."""
    open_writer = functools.partial(
        LmdbWriter, partial, map_bytes=map_bytes, commit_bytes=commit_bytes
    )
    try:
        writer = open_writer()
    except ShardFormatError:
        partial.unlink()
        writer = open_writer()
    try:
        if _read_plan(writer) != metadata.plan:
            if partial.stat().st_size:
                writer.close()
                partial.unlink()
                writer = open_writer()
            writer.put_metadata(metadata)
    except BaseException:
        writer.close()
        raise
    return writer


@contextlib.contextmanager
def _removing_if_empty(partial: Path, writer: LmdbWriter) -> Generator[None]:
    """Remove what is written on an error, if there is no record in it to go on after."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(LoaderError, OSError):  # the first error is the one to tell
            if not writer.count_records():
                partial.unlink()
        raise


def _read_plan(writer: LmdbWriter) -> str | None:
    try:
        metadata = writer.read_metadata()
    except ShardFormatError:
        return None
    return None if metadata is None else metadata.plan


def _read_in_order(source: Source, positions: Sequence[int], concurrency: int) -> Iterator[Buffer]:
    """Read samples, several at once; yield them in order."""
    pending: collections.deque[concurrent.futures.Future[Buffer]] = collections.deque()
    threads = FutureThreads(concurrency, "lmdb")
    try:
        for position in positions:
            pending.append(threads.submit(source.read, position))
            if len(pending) >= 2 * concurrency:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.stop(_END_TIMEOUT_S)


# -- how fast is it read?


class ReadSpeed(NamedTuple):
    """How fast records came."""

    num_records: int
    num_bytes: int
    elapsed_s: float

    @property
    def records_per_s(self) -> float:
        """Records a second."""
        return self.num_records / self.elapsed_s

    @property
    def megabytes_per_s(self) -> float:
        """Megabytes of 10^6 bytes a second."""
        return self.num_bytes / self.elapsed_s / 1e6


def measure_sequential(
    file: LmdbFile, *, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> ReadSpeed:
    """Read records in the order of their keys for so long, or up to the end."""
    raws = (raw for _, raw in file.scan_raw(range(len(file))))
    return _measure(raws, seconds, clock)


def measure_random(
    file: LmdbFile,
    *,
    seconds: float,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> ReadSpeed:
    """Read records in a random order, each once at most, for so long."""
    order = np.random.RandomState(seed).permutation(len(file))
    return _measure(map(file.read_raw, map(int, order)), seconds, clock)


def _measure(raws: Iterator[bytes], seconds: float, clock: Callable[[], float]) -> ReadSpeed:
    num_records = num_bytes = 0
    begin_s = clock()
    elapsed_s = 0.0
    for raw in raws:
        num_records += 1
        num_bytes += len(raw)
        elapsed_s = clock() - begin_s
        if elapsed_s >= seconds:
            break
    return ReadSpeed(num_records, num_bytes, max(elapsed_s, 1e-9))


def drop_from_page_cache(path: Path) -> None:
    """Ask the kernel to forget a file, so that the disk is measured, not memory.

    Raises:
        OSError: It cannot be opened, or this system has no such call.
    """
    if not hasattr(os, "posix_fadvise"):
        raise OSError(
            errno.ENOTSUP, "this system cannot forget a file; measure with --keep-cache", str(path)
        )
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
