"""Look at every record of an LMDB database: is it whole, and can it be used?"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from concurrent_dataloader.errors import LoaderError, ShardFormatError
from concurrent_dataloader.formats.lmdb_file import LmdbFile
from concurrent_dataloader.formats.lmdb_record import NO_LABEL, Record
from concurrent_dataloader.prepare.deep import ShardResult
from concurrent_dataloader.prepare.samples import (
    BadSample,
    ParsedSample,
    Rules,
    Seen,
    check_sample,
    one_line,
)


def check_database(
    path: Path, rules: Rules, *, is_deep: bool, allow_pickle: bool = False
) -> ShardResult:
    """Read every record and its checksum; decode it too if ``is_deep``.

    Args:
        path: The database.
        rules: What a sample has to satisfy, if ``is_deep``.
        is_deep: Whether images are decoded and classes looked at.
        allow_pickle: Also read databases of the older system; as in `LmdbFile`.

    Raises:
        FileNotFoundError: There is no such database.
        ShardFormatError: It is no complete database.
        MissingDependencyError: lmdb is not installed.
    """
    with contextlib.closing(LmdbFile(path, readahead=True, allow_pickle=allow_pickle)) as file:
        labels = file.labels()
        result = ShardResult(path.name, [], [], 0)
        for position in range(len(file)):
            try:
                record = _read(file, position)
                if labels is not None:
                    _check_label(file, position, record, int(labels[position]))
                digest = hashlib.blake2b(record.payload, digest_size=8, usedforsecurity=False)
                name = record.name or f"record {position}"
                result.seen.append(Seen(name, digest.digest(), record.label))
                if is_deep:
                    check_sample(_parsed(name, record), rules)
            except LoaderError as error:
                bad = BadSample(path.name, str(position), None, "lmdb", one_line(error))
                result.bad.append(bad)
    return result


def check_record_again(
    path: Path, sample: BadSample, rules: Rules, *, allow_pickle: bool = False
) -> BadSample | None:
    """Look at a record of a report again; None if nothing is wrong with it any more.

    Raises:
        FileNotFoundError: There is no such database.
        ShardFormatError: It is no complete database.
    """
    with contextlib.closing(LmdbFile(path, allow_pickle=allow_pickle)) as file:
        try:
            check_sample(_parsed("", _read(file, int(sample.sample))), rules)
        except LoaderError as error:
            return sample._replace(error=one_line(error))
    return None


def _parsed(name: str, record: Record) -> ParsedSample:
    return ParsedSample(name, record.payload, record.payload, record.label)


def _check_label(file: LmdbFile, position: int, record: Record, expected: int) -> None:
    if expected != (NO_LABEL if record.label is None else record.label):
        raise ShardFormatError(
            f"{file.describe(position)}: got class {record.label}, expected {expected} by the"
            " database's list of classes"
        )


def _read(file: LmdbFile, position: int) -> Record:
    try:
        return file.read(position)
    except LoaderError:
        raise
    except Exception as error:  # lmdb's own, of damaged pages; the report says it
        raise ShardFormatError(f"{file.describe(position)}: {error}") from error
