"""Samples in tar files: flat, with class folders, a tar of class tars, shards, compressed or not.

Nothing is extracted: a member's bytes lie at a fixed place of the outer file, also those of an
inner tar, so that reading a sample is one ranged read. A compressed tar is unpacked to a temporary
file first, as a whole.
"""

from __future__ import annotations

import array
import bz2
import concurrent.futures
import contextlib
import fcntl
import glob
import gzip
import lzma
import os
import re
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.boxes import BoxTable, parse_boxes
from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.files import is_hidden
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.formats.tar import read_members, split_name
from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.sources.found import Found, Sieve, clean_name
from concurrent_dataloader.prepare.sources.places import RangePlaces
from concurrent_dataloader.prepare.sources.read_ahead import ReadAheadFile
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import Store

T = TypeVar("T")

NO_LABEL = -1
TAR_SUFFIX = ".tar"
_REMOTE_SCANNERS = 16
_MAX_ANNOTATION_BYTES = 1 << 20
_MAX_LABEL_DIGITS = 9  # below 2**31
_COPY_BYTES = 1 << 20
_UNPACKED_PREFIX = "concurrent-dataloader-unpacked-"

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
        return cast(BinaryIO, ReadAheadFile(self.store, key, stop, is_remote=self.is_remote))


class _InnerTar(NamedTuple):
    """A tar in a tar."""

    name: str
    data: ByteRange


class _Scan:
    """What a tar holds; flat arrays, since a million samples go through here."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.ranges = array.array("q")
        """Start and stop of each sample, one after the other."""
        self.labels = array.array("i")
        """Of each sample, -1 where there is none; empty if no sample has one."""
        self.boxes: dict[int, tuple[Box, ...]] = {}
        """By number of the sample."""
        self.inner: list[_InnerTar] = []
        self.strays: list[str] = []
        # By name without ending; whether there is such a sample is known at the end of the tar, and
        # only then whether what is wrong matters.
        self._labels_by_stem: dict[str, int | ShardFormatError] = {}
        self._boxes_by_stem: dict[str, tuple[Box, ...] | ShardFormatError] = {}

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.ranges) // 2

    def read_annotation(self, file: BinaryIO, name: str, data: ByteRange, where: str) -> bool:
        """Read a label or boxes, if the member is that."""
        stem, _, field = name.rpartition(".")
        field, length = field.lower(), data.stop - data.start
        is_known = field in ("cls", "json") and split_name(name) is not None
        if not is_known or length > _MAX_ANNOTATION_BYTES:
            return False
        file.seek(data.start)
        content = file.read(length)
        where = f"{where}: {name!r}"
        if field == "cls":
            _add_once(self._labels_by_stem, stem, _parse_label(content, where), where)
        else:
            _add_once(self._boxes_by_stem, stem, _parse_boxes(content, where), where)
        return True

    def finish(self) -> None:
        """Give the annotations to the samples; those of no sample are stray.

        Raises:
            ShardFormatError: That of a sample cannot be read, or is there twice.
        """
        labels, boxes = self._labels_by_stem, self._boxes_by_stem
        names = self.names if labels else []
        label_stems, box_stems = _match_stems(labels, names), _match_stems(boxes, names)
        is_shard = any(label_stems)
        for field, found, stems in (("cls", labels, label_stems), ("json", boxes, box_stems)):
            used = set(stems) if is_shard else set[str]()
            self.strays += [f"{stem}.{field}" for stem in found if stem not in used]
        if is_shard:
            for number, stem in enumerate(label_stems):
                self.labels.append(_checked(labels.get(stem, NO_LABEL)))
                if has_boxes := _checked(boxes.get(box_stems[number], ())):
                    self.boxes[number] = has_boxes
        labels.clear()
        boxes.clear()


def _match_stems(found: Collection[str], names: Sequence[str]) -> list[str]:
    """Give for each sample the annotation that is its, by name without ending; "" if there is none.

    That is the one of its own name, ``a.1.cls`` for ``a.1.jpg``. Where there is none, that of the
    same key, which ends at the first dot: ``a.cls``, unless it is another sample's own.
    """
    if not found:
        return [""] * len(names)
    own = {name.rpartition(".")[0] for name in names}
    by_key: dict[str, str] = {}
    for stem in found:
        if stem not in own:
            key = _key_of(f"{stem}.x")
            by_key[key] = "" if key in by_key else stem
    stems: list[str] = []
    for name in names:
        stem = name.rpartition(".")[0]
        stems.append(stem if stem in found else by_key.get(_key_of(name), ""))
    return stems


def _key_of(name: str) -> str:
    return (split_name(name) or (name,))[0]


def _add_once(
    found: dict[str, T | ShardFormatError], key: str, value: T | ShardFormatError, where: str
) -> None:
    twice = ShardFormatError(f"{where} stands there twice, expected each sample once")
    found[key] = twice if key in found else value


def _checked(value: T | ShardFormatError) -> T:
    if isinstance(value, ShardFormatError):
        raise value
    return value


class _Part(NamedTuple):
    """What was found in a tar."""

    archive: int
    prefix: str
    """What its names begin with."""

    scan: _Scan


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
    whole = map_archives(
        archives, lambda item: _scan_tar(archives, item[1], None, sieve, where[item[0]]), numbered
    )
    nested = [(number, tar) for number, scan in enumerate(whole) for tar in scan.inner]
    inside = map_archives(
        archives,
        lambda item: _scan_tar(archives, archives.keys[item[0]], item[1], sieve, where[item[0]]),
        nested,
    )
    parts = [_Part(number, prefixes[number], scan) for number, scan in enumerate(whole)]
    for (number, tar), scan in zip(nested, inside, strict=True):
        stem = tar.name[: -len(TAR_SUFFIX)]
        parts.append(_Part(number, f"{prefixes[number]}{stem}/", scan))
    return _join(archives, parts, sieve)


def map_archives(archives: Archives, function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """Call a function for each item, several at once where archives lie behind a network."""
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
    archives: Archives, key: str, inner: _InnerTar | None, sieve: Sieve, where: str
) -> _Scan:
    """Look through a tar, or through the one that lies in it."""
    scan = _Scan()
    start, stop = (0, None) if inner is None else inner.data
    if inner is not None:
        where = f"{where}, {inner.name}"
    with archives.open_file(key, stop) as file:
        file.seek(start)
        for member in read_members(file, where):
            name = clean_name(member.name, where)
            data = ByteRange(start + member.data.start, start + member.data.stop)
            if inner is None and is_tar(name) and not is_hidden(name):
                scan.inner.append(_InnerTar(name, data))
            elif sieve.keeps(name):
                scan.names.append(name)
                scan.ranges.extend(data)
            elif not scan.read_annotation(file, name, data, where):
                scan.strays.append(name)
    scan.finish()
    return scan


def _parse_label(content: bytes, where: str) -> int | ShardFormatError:
    if content.strip().isdigit() and len(content.strip()) <= _MAX_LABEL_DIGITS:
        return int(content)
    return ShardFormatError(
        f"{where} holds {content[:40]!r}, expected a label in decimal, of {_MAX_LABEL_DIGITS}"
        " digits at most"
    )


def _parse_boxes(content: bytes, where: str) -> tuple[Box, ...] | ShardFormatError:
    try:
        return parse_boxes(content, where)
    except ShardFormatError as error:
        return error


def _join(archives: Archives, parts: list[_Part], sieve: Sieve) -> Found:
    """Put together what the tars hold."""
    for part in parts:
        for name in part.scan.strays:
            sieve.count_stray(part.prefix + name)
    names: list[str] = []
    for prefix, scan in ((part.prefix, part.scan) for part in parts):
        names += [name if name.startswith(prefix) else prefix + name for name in scan.names]
        scan.names.clear()  # they are there twice otherwise
    archive = np.repeat(
        np.array([part.archive for part in parts], np.int32),
        [part.scan.count for part in parts],
    )
    ranges = np.concatenate([np.array(part.scan.ranges, np.int64) for part in parts])
    ranges = ranges.reshape(-1, 2)
    order = sorted(range(len(names)), key=names.__getitem__)
    labels: NDArray[np.int32] | None = None
    boxes: BoxTable | None = None
    if any(part.scan.labels for part in parts):
        labels, boxes = _join_annotations(parts)
        if any(names[a] == names[b] and archive[a] != archive[b] for a, b in pairwise(order)):
            stems = [tar_stem(key) for key in archives.keys]
            numbers = archive.tolist()
            names = [f"{stems[n]}/{name}" for n, name in zip(numbers, names, strict=True)]
            order.sort(key=names.__getitem__)
    _refuse_twice(archives, names, order, archive, ranges)
    if labels is None:
        archive, ranges = archive[order], ranges[order]
        names = [names[position] for position in order]
    return Found(
        where=sieve.where,
        names=Index.from_keys(names, (ranges[:, 1] - ranges[:, 0]).tolist()),
        places=RangePlaces(
            store=archives.store, keys=archives.keys, archive=archive, ranges=ranges
        ),
        num_stray=sieve.num_stray,
        strays=tuple(sieve.strays),
        labels=labels,
        boxes=boxes,
    )


def _join_annotations(parts: list[_Part]) -> tuple[NDArray[np.int32], BoxTable | None]:
    """Put labels and boxes of shards together; a tar without labels has none."""
    labels = [part.scan.labels or array.array("i", [NO_LABEL]) * part.scan.count for part in parts]
    boxes: BoxTable | None = None
    if any(part.scan.boxes for part in parts):
        boxes = BoxTable.of(
            part.scan.boxes.get(number, ()) for part in parts for number in range(part.scan.count)
        )
    return np.concatenate([np.array(one, np.int32) for one in labels]), boxes


def _refuse_twice(
    archives: Archives,
    names: list[str],
    order: list[int],
    archive: NDArray[np.int32],
    ranges: NDArray[np.int64],
) -> None:
    for pair in pairwise(order):
        if names[pair[0]] == names[pair[1]]:
            first, again = (
                f"{archives.store.describe(archives.keys[int(archive[position])])} at offset"
                f" {int(ranges[position, 0])}"
                for position in pair
            )
            raise ShardFormatError(
                f"{first}: {names[pair[0]]!r} stands there, and again in {again}; expected each"
                " sample once"
            )


# -- compressed ones


class UnpackedTar:
    """A tar in a temporary file.

    The file belongs to the process that unpacked it, and goes when that closes it, forgets it or
    ends. If it is killed, the next one that unpacks into the same folder removes the file: it is
    locked as long as its owner, or a process forked from it, lives. A pickled twin reads it and
    leaves it alone.
    """

    def __init__(self, path: str, lock_file: int | None) -> None:
        """Refer to a file; ``lock_file`` is its locked descriptor, which the owner has."""
        self.path = path
        self._finalizer = (
            None
            if lock_file is None
            else weakref.finalize(self, _remove, path, lock_file, os.getpid())
        )

    def close(self) -> None:
        """Remove the file, if it is this process's."""
        if self._finalizer is not None:
            self._finalizer()

    def __reduce__(self) -> tuple[Callable[[str, None], UnpackedTar], tuple[str, None]]:
        return UnpackedTar, (self.path, None)


def _remove(path: str, lock_file: int, owner: int) -> None:
    if os.getpid() == owner:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(lock_file)


def _make_unpacked(folder: str | os.PathLike[str] | None) -> tuple[UnpackedTar, int]:
    """Make an empty file, locked; gives its descriptor too, which stays the file's."""
    while True:
        descriptor, path = tempfile.mkstemp(prefix=_UNPACKED_PREFIX, suffix=TAR_SUFFIX, dir=folder)
        _lock(descriptor, wait=True)
        if os.path.exists(path):
            return UnpackedTar(path, descriptor), descriptor
        os.close(descriptor)  # another run took it for left over, just before it was locked


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock a file for this process and its children; False if it is in use, or cannot be locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _remove_left_over(folder: str | os.PathLike[str] | None) -> None:
    """Remove what runs that were killed have left."""
    where = tempfile.gettempdir() if folder is None else folder
    for path in Path(where).glob(f"{glob.escape(_UNPACKED_PREFIX)}*{TAR_SUFFIX}"):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if _lock(descriptor, wait=False):
                    path.unlink()
            finally:
                os.close(descriptor)


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
        _remove_left_over(folder)
        unpacked, descriptor = _make_unpacked(folder)
        try:
            with (
                open(descriptor, "wb", closefd=False) as file,
                _DECOMPRESSORS[ending](packed) as content,
            ):
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
                unpacked.path,
            ) from error
        except BaseException:
            unpacked.close()
            raise
    return unpacked


def _damage(where: str, error: Exception) -> ShardFormatError:
    return ShardFormatError(f"{where}: cannot be unpacked ({error}); fetch it anew")
