"""Samples in tar files: flat, with class folders, a tar of class tars, shards, compressed or not.

Nothing is extracted: a member's bytes lie at a fixed place of the outer file, also those of an
inner tar, so that reading a sample is one ranged read. A compressed tar is unpacked to a temporary
file first, as a whole.
"""

from __future__ import annotations

import bz2
import concurrent.futures
import gzip
import io
import lzma
import os
import re
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import orjson

from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.formats.tar import Member, read_members, split_name
from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.source import Box
from concurrent_dataloader.prepare.sources.boxes import BoxTable, check_box
from concurrent_dataloader.prepare.sources.found import Found, Sieve, clean_name
from concurrent_dataloader.prepare.sources.places import RangePlaces
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import RangedFile, Store

TAR_SUFFIX = ".tar"
_LOCAL_BUFFER_BYTES = 4096
# Members of 100 kB lie closer together than what is read in the time that a request takes.
_REMOTE_BUFFER_BYTES = 8 << 20
_REMOTE_SCANNERS = 16
_MAX_ANNOTATION_BYTES = 1 << 20
_COPY_BYTES = 1 << 20

_DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".tgz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".tbz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".txz": lzma.LZMAFile,
}
_COMPRESSED = re.compile(r"(\.tar(\.gz|\.bz2|\.xz)|\.tgz|\.tbz2|\.txz)$", re.IGNORECASE)


def is_tar(name: str) -> bool:
    """Tell by its name whether a file is a plain tar."""
    return name.casefold().endswith(TAR_SUFFIX)


def is_compressed_tar(name: str) -> bool:
    """Tell by its name whether a file is a compressed tar."""
    return _COMPRESSED.search(name) is not None


def tar_stem(name: str) -> str:
    """Give the file name of a tar, compressed or not, without folder and ending."""
    base = name[name.rfind("/") + 1 :]
    found = _COMPRESSED.search(base)
    return base[: found.start()] if found else base[: -len(TAR_SUFFIX)]


class Archives(NamedTuple):
    """Tars of one store."""

    store: Store
    keys: tuple[str, ...]
    is_remote: bool

    def open_file(self, key: str, stop: int | None = None) -> BinaryIO:
        """Open a tar to be read front to back, as if it ended at ``stop``."""
        raw = RangedFile(self.store, key, stop)
        size = _REMOTE_BUFFER_BYTES if self.is_remote else _LOCAL_BUFFER_BYTES
        return cast(BinaryIO, io.BufferedReader(raw, size))


class _Entry(NamedTuple):
    """A sample in a tar."""

    name: str
    data: ByteRange


class _Scan(NamedTuple):
    """What a tar holds."""

    entries: list[_Entry]
    inner: list[_Entry]
    strays: list[str]
    labels: dict[str, int]
    """By key, of shards."""

    boxes: dict[str, tuple[Box, ...]]


def find_in_archives(archives: Archives, sieve: Sieve, prefixes: Sequence[str]) -> Found:
    """Take the samples of some tars, and of the tars in them.

    Those of shards, which hold labels in ``.cls`` members, stand in the order of the tars; others
    are sorted by name. Folders and links are left out; a member of an inner tar is named
    ``<inner tar>/<member>``.

    Args:
        archives: The tars.
        sieve: Counts what is no sample.
        prefixes: What the names of each tar's members begin with.

    Raises:
        ShardFormatError: A tar is damaged, a name unsafe, or one stands there twice.
    """
    numbered = list(enumerate(archives.keys))
    where = [archives.store.describe(key) for key in archives.keys]
    whole = _map(
        archives, lambda item: _scan_tar(archives, item[1], None, sieve, where[item[0]]), numbered
    )
    nested = [(number, tar) for number, scan in enumerate(whole) for tar in scan.inner]
    inside = _map(
        archives,
        lambda item: _scan_tar(archives, archives.keys[item[0]], item[1], sieve, where[item[0]]),
        nested,
    )
    parts = [(number, prefixes[number], scan) for number, scan in enumerate(whole)]
    for (number, tar), scan in zip(nested, inside, strict=True):
        stem = tar.name[: -len(TAR_SUFFIX)]
        parts.append((number, f"{prefixes[number]}{stem}/", scan))
    return _join(archives, parts, sieve)


def _map(archives: Archives, function: Callable[[Any], _Scan], items: Sequence[Any]) -> list[_Scan]:
    if not archives.is_remote or len(items) < 2:
        return [function(item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(min(_REMOTE_SCANNERS, len(items))) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _scan_tar(
    archives: Archives, key: str, inner: _Entry | None, sieve: Sieve, where: str
) -> _Scan:
    """Look through a tar, or through the one that lies in it."""
    scan = _Scan([], [], [], {}, {})
    start, stop = (0, None) if inner is None else inner.data
    if inner is not None:
        where = f"{where}, {inner.name}"
    with archives.open_file(key, stop) as file:
        file.seek(start)
        for member in read_members(file, where):
            name = clean_name(member.name, where)
            data = ByteRange(start + member.data.start, start + member.data.stop)
            if inner is None and is_tar(name) and not _is_hidden(name):
                scan.inner.append(_Entry(name, data))
            elif sieve.keeps(name):
                scan.entries.append(_Entry(name, data))
            elif not _read_annotation(file, Member(name, member.start, data), scan, where):
                scan.strays.append(name)
    return scan


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name


def _read_annotation(file: BinaryIO, member: Member, scan: _Scan, where: str) -> bool:
    """Read a label or boxes, if the member is that."""
    parts = split_name(member.name)
    if parts is None or parts[1] not in ("cls", "json"):
        return False
    key, field = parts
    length = member.data.stop - member.data.start
    if length > _MAX_ANNOTATION_BYTES:
        return False
    file.seek(member.data.start)
    content = file.read(length)
    if field == "cls":
        text = content.strip()
        if not text.isdigit():
            raise ShardFormatError(
                f"{where}: {member.name!r} holds {content[:40]!r}, expected a label in decimal"
            )
        scan.labels[key] = int(text)
    else:
        scan.boxes[key] = _parse_boxes(content, f"{where}: {member.name!r}")
    return True


def _parse_boxes(content: bytes, where: str) -> tuple[Box, ...]:
    try:
        table = orjson.loads(content)
        found = table.get("bbox") if isinstance(table, dict) else None
        if not found:
            return ()
        rows = found if isinstance(found[0], list) else [found]
        return tuple(check_box([float(value) for value in row], where) for row in rows)
    except (ValueError, TypeError, KeyError) as error:
        raise ShardFormatError(
            f'{where}: no boxes ({error}), expected {{"bbox": [x1, y1, x2, y2]}} or null'
        ) from error


def _join(archives: Archives, parts: list[tuple[int, str, _Scan]], sieve: Sieve) -> Found:
    is_shards = any(scan.labels for _, _, scan in parts)
    rows: list[tuple[str, int, int, int]] = []
    labels: list[int] = []
    boxes: list[tuple[Box, ...]] = []
    for number, prefix, scan in parts:
        keys: set[str] = set()
        for name, data in scan.entries:
            full = name if name.startswith(prefix) else prefix + name
            rows.append((full, number, data.start, data.stop))
            if is_shards:
                key = (split_name(name) or (name, ""))[0]
                keys.add(key)
                labels.append(scan.labels.get(key, -1))
                boxes.append(scan.boxes.get(key, ()))
        for name in scan.strays:
            sieve.count_stray(prefix + name)
        for field, found in (("cls", scan.labels), ("json", scan.boxes)):
            for key in found if not is_shards else found.keys() - keys:
                sieve.count_stray(f"{prefix}{key}.{field}")
    if is_shards:
        rows = _tell_apart(archives, rows)
    else:
        rows.sort()
    _refuse_twice(archives, rows)
    table = np.array([row[1:] for row in rows], np.int64).reshape(-1, 3)
    names = Index.from_keys((row[0] for row in rows), (stop - start for _, _, start, stop in rows))
    return Found(
        where=sieve.where,
        names=names,
        places=RangePlaces(
            store=archives.store,
            keys=archives.keys,
            archive=table[:, 0].astype(np.int32),
            ranges=np.ascontiguousarray(table[:, 1:]),
        ),
        num_stray=sieve.num_stray,
        strays=tuple(sieve.strays),
        labels=np.array(labels, np.int32) if is_shards else None,
        boxes=BoxTable.of(boxes) if any(boxes) else None,
    )


def _tell_apart(
    archives: Archives, rows: list[tuple[str, int, int, int]]
) -> list[tuple[str, int, int, int]]:
    """Put the shard's name before all names, if some come back in another shard."""
    shards_of: dict[str, int] = {}
    if all(shards_of.setdefault(name, number) == number for name, number, _, _ in rows):
        return rows
    stems = [tar_stem(key) for key in archives.keys]
    return [(f"{stems[number]}/{name}", number, start, stop) for name, number, start, stop in rows]


def _refuse_twice(archives: Archives, rows: list[tuple[str, int, int, int]]) -> None:
    seen: dict[str, tuple[int, int]] = {}
    for name, number, start, _ in rows:
        first = seen.setdefault(name, (number, start))
        if first != (number, start):
            places = [
                f"{archives.store.describe(archives.keys[archive])} at offset {offset}"
                for archive, offset in (first, (number, start))
            ]
            raise ShardFormatError(
                f"{places[0]}: {name!r} stands there, and again in {places[1]}; expected each"
                " sample once"
            )


# -- compressed ones


class UnpackedTar:
    """A tar in a temporary file.

    The file belongs to the process that unpacked it, and goes when that closes it, forgets it or
    ends, unless it is killed. A pickled twin reads it and leaves it alone.
    """

    def __init__(self, path: str, *, is_owner: bool) -> None:
        self.path = path
        self._finalizer = weakref.finalize(self, _remove, path, os.getpid()) if is_owner else None

    def close(self) -> None:
        """Remove the file, if it is this process's."""
        if self._finalizer is not None:
            self._finalizer()

    def __reduce__(self) -> tuple[Callable[[str], UnpackedTar], tuple[str]]:
        return _borrow, (self.path,)


def _borrow(path: str) -> UnpackedTar:
    return UnpackedTar(path, is_owner=False)


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner and os.path.exists(path):
        os.unlink(path)


def unpack_tar(archives: Archives, key: str, folder: str | os.PathLike[str] | None) -> UnpackedTar:
    """Unpack a compressed tar into a temporary file, as a stream.

    Args:
        archives: Where it lies.
        key: Its name.
        folder: Where the file is to be; None: the system's folder for temporary files. It needs
            as much room as the tar unpacked.

    Raises:
        ShardFormatError: It is damaged, or compressed in another way than its name says.
        OSError: The folder cannot be written to, or is full.
    """
    where = archives.store.describe(key)
    ending = os.path.splitext(key)[1].casefold()
    with archives.open_file(key) as packed:
        descriptor, path = tempfile.mkstemp(
            prefix=f"unpacked-{os.getpid()}-", suffix=".tar", dir=folder
        )
        unpacked = UnpackedTar(path, is_owner=True)
        try:
            with open(descriptor, "wb") as file, _DECOMPRESSORS[ending](packed) as content:
                shutil.copyfileobj(content, file, _COPY_BYTES)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            unpacked.close()
            raise _damage(where, error) from error
        except OSError as error:
            unpacked.close()
            # The decompressors say what is wrong with the content without a number.
            if error.errno is None:
                raise _damage(where, error) from error
            raise type(error)(
                error.errno,
                f"{error.strerror}, while {where} was unpacked; give a folder with more room",
                path,
            ) from error
        except BaseException:
            unpacked.close()
            raise
    return unpacked


def _damage(where: str, error: Exception) -> ShardFormatError:
    return ShardFormatError(f"{where}: cannot be unpacked ({error}); fetch it anew")
