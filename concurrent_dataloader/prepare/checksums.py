"""Checksums of many files: computed at once, put together, written down and compared."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from concurrent_dataloader.errors import IndexFormatError
from concurrent_dataloader.files import write_whole
from concurrent_dataloader.formats.crc32c import CrcTable, crc32c
from concurrent_dataloader.prepare.parallel import call_concurrently
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores.base import ObjectInfo, Store

_PART_BYTES = 8 << 20
"""A file is read in parts of this size; from a disk, 1 to 8 MiB cost the same."""

Problem = Literal[
    "missing",
    "extra",
    "renamed",
    "swapped",
    "duplicate",
    "size",
    "content",
    "metadata",
    "sample",
    "unfinished",
]


class Finding(NamedTuple):
    """Something that is wrong with a data set."""

    where: str
    """The file, relative to the data set."""

    problem: Problem
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}: {self.detail}"


class FileFacts(NamedTuple):
    """What is known of a file; None for what is not."""

    size_bytes: int | None = None
    md5: str | None = None
    crc32c: str | None = None

    @property
    def content(self) -> tuple[int | None, str] | None:
        """What files of the same content share; None where it is not known.

        A CRC alone would take one pair of files in four thousand million for the same.
        """
        if self.md5 is not None:
            return None, self.md5
        return None if self.crc32c is None else (self.size_bytes, self.crc32c)


Algorithm = Literal["md5", "crc32c"]
"""MD5 takes four times as long as all else; it is what older sets and ``md5sum`` have."""


def digest_object(info: ObjectInfo, store: Store, algorithms: Collection[Algorithm]) -> FileFacts:
    """Read an object part by part, and compute its checksums."""
    md5 = hashlib.md5(usedforsecurity=False) if "md5" in algorithms else None
    crcs = CrcTable() if "crc32c" in algorithms else None
    for start in range(0, info.size_bytes, _PART_BYTES):
        stop = min(start + _PART_BYTES, info.size_bytes)
        part = store.get(info.key, ByteRange(start, stop))
        if md5 is not None:
            md5.update(part)
        if crcs is not None:
            crcs.add(crc32c(part), stop - start)
    return FileFacts(
        info.size_bytes,
        None if md5 is None else md5.hexdigest(),
        None if crcs is None else crcs.of_all(),
    )


def digest_objects(
    store: Store,
    infos: Iterable[ObjectInfo],
    *,
    concurrency: int,
    algorithms: Collection[Algorithm] = ("md5",),
    on_file: Callable[[str, int], None] = lambda key, size_bytes: None,
) -> dict[str, FileFacts]:
    """Compute the checksums of objects, several at once.

    Args:
        store: Where they lie.
        infos: Their keys and sizes.
        concurrency: How many at once.
        algorithms: Which checksums.
        on_file: Told of each that is done, in this thread.

    Raises:
        StoreError: One cannot be read.
    """

    def digest(info: ObjectInfo) -> tuple[ObjectInfo, FileFacts]:
        return info, digest_object(info, store, algorithms)

    found: dict[str, FileFacts] = {}
    with contextlib.closing(call_concurrently(digest, infos, concurrency)) as results:
        for info, facts in results:
            found[info.key] = facts
            on_file(info.key, info.size_bytes)
    return found


def compare_files(
    expected: Mapping[str, FileFacts], found: Mapping[str, FileFacts], *, by: str
) -> list[Finding]:
    """Say what is wrong with the files that were found; pure.

    A file counts as renamed, or as swapped with another, if its content says so.

    Args:
        expected: By name; a size or checksum of None is not compared.
        found: By name.
        by: What the expectation comes from, for the findings.
    """
    findings: list[Finding] = []
    names_of = _names_by_content(expected)
    extra = {key: facts for key, facts in found.items() if key not in expected}
    extra_of = _names_by_content(extra)
    for key, facts in sorted(expected.items()):
        if key in found:
            findings += _compare_file(key, facts, found[key], names_of)
        elif facts.content is not None and extra_of.get(facts.content):
            other = extra_of[facts.content].popleft()
            del extra[other]
            findings.append(Finding(key, "renamed", f"its content lies in {other}"))
        else:
            findings.append(Finding(key, "missing", f"{by} names it"))
    for key, facts in sorted(extra.items()):
        same = names_of.get(facts.content) if facts.content is not None else None
        detail = f"the same content as {same[0]}; " if same else ""
        findings.append(Finding(key, "extra", f"{detail}{by} does not name it"))
    return findings


_NamesByContent = dict[tuple[int | None, str], collections.deque[str]]


def _names_by_content(files: Mapping[str, FileFacts]) -> _NamesByContent:
    names: _NamesByContent = {}
    for key, facts in sorted(files.items()):
        if facts.content is not None:
            names.setdefault(facts.content, collections.deque()).append(key)
    return names


def _compare_file(
    key: str,
    expected: FileFacts,
    found: FileFacts,
    names_of: _NamesByContent,
) -> Iterator[Finding]:
    is_size_wrong = None not in (expected.size_bytes, found.size_bytes) and (
        expected.size_bytes != found.size_bytes
    )
    wrong = [
        f"got {what} {got}, expected {wanted}"
        for what, got, wanted in (
            ("MD5", found.md5, expected.md5),
            ("CRC-32C", found.crc32c, expected.crc32c),
        )
        if None not in (got, wanted) and got != wanted
    ]
    if not is_size_wrong and not wrong:
        return
    other = names_of.get(found.content) if found.content is not None else None
    if other:
        yield Finding(key, "swapped", f"it holds the content of {other[0]}")
    elif is_size_wrong:
        detail = f"got {found.size_bytes} bytes, expected {expected.size_bytes}"
        yield Finding(key, "size", detail)
    else:
        yield Finding(key, "content", wrong[0])


def find_duplicates(found: Mapping[str, FileFacts]) -> list[Finding]:
    """Say which files that are not empty have the content of another; pure."""
    return [
        Finding(key, "duplicate", f"the same content as {names[0]}")
        for names in _names_by_content(found).values()
        for key in list(names)[1:]
        if found[key].size_bytes != 0
    ]


# -- written down: what ``md5sum`` writes, and ``md5sum --check`` reads

_LINE = re.compile(r"(\\?)([0-9a-f]{32}) [ *](.+)")
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


def write_checksums(path: str | os.PathLike[str], files: Mapping[str, FileFacts]) -> None:
    """Write the MD5s of files as ``md5sum`` does, sorted by name; whole or not at all."""
    write_whole(Path(path), (_format_line(key, files[key]).encode() for key in sorted(files)))


def _format_line(key: str, facts: FileFacts) -> str:
    escaped = key.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == key else chr(92)}{facts.md5}  {escaped}\n"


def read_checksums(path: str | os.PathLike[str]) -> dict[str, FileFacts]:
    """Read what `write_checksums` or ``md5sum`` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        IndexFormatError: A line is not of this form, or a name comes twice.
    """
    files: dict[str, FileFacts] = {}
    text = Path(path).read_bytes().decode("utf-8", "surrogateescape")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise IndexFormatError(
                f"{os.fspath(path)}, line {number}: got {line[:80]!r}, expected 32 hexadecimal"
                " digits, two spaces and a name; write it anew with `validate --write-checksums`"
            )
        name = match[3]
        if match[1]:
            name = re.sub(r"\\[\\nr]", lambda escape: _ESCAPES[escape[0]], name)
        name = name.removeprefix("./")
        if name in files:
            raise IndexFormatError(
                f"{os.fspath(path)}, line {number}: names {name!r} again, expected each file once"
            )
        files[name] = FileFacts(None, match[2])
    return files
