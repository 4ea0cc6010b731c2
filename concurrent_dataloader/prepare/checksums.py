"""MD5s of many files: computed at once, put together, written down and compared."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from concurrent_dataloader.errors import IndexFormatError
from concurrent_dataloader.files import write_whole
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


def digest_object(store: Store, key: str, size_bytes: int) -> str:
    """Read an object part by part, and give its MD5 in hex."""
    digest = hashlib.md5(usedforsecurity=False)
    for start in range(0, size_bytes, _PART_BYTES):
        digest.update(store.get(key, ByteRange(start, min(start + _PART_BYTES, size_bytes))))
    return digest.hexdigest()


def digest_objects(
    store: Store,
    infos: Iterable[ObjectInfo],
    *,
    concurrency: int,
    on_file: Callable[[str, int], None] = lambda key, size_bytes: None,
) -> dict[str, FileFacts]:
    """Compute the MD5s of objects, several at once.

    Args:
        store: Where they lie.
        infos: Their keys and sizes.
        concurrency: How many at once.
        on_file: Told of each that is done, in this thread.

    Raises:
        StoreError: One cannot be read.
    """

    def digest(info: ObjectInfo) -> tuple[ObjectInfo, str]:
        return info, digest_object(store, info.key, info.size_bytes)

    found: dict[str, FileFacts] = {}
    with contextlib.closing(call_concurrently(digest, infos, concurrency)) as results:
        for info, md5 in results:
            found[info.key] = FileFacts(info.size_bytes, md5)
            on_file(info.key, info.size_bytes)
    return found


def compare_files(
    expected: Mapping[str, FileFacts], found: Mapping[str, FileFacts], *, by: str
) -> list[Finding]:
    """Say what is wrong with the files that were found; pure.

    A file counts as renamed, or as swapped with another, if its content says so.

    Args:
        expected: By name; a size or MD5 of None is not compared.
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
        elif facts.md5 is not None and extra_of.get(facts.md5):
            other = extra_of[facts.md5].popleft()
            del extra[other]
            findings.append(Finding(key, "renamed", f"its content lies in {other}"))
        else:
            findings.append(Finding(key, "missing", f"{by} names it"))
    for key, facts in sorted(extra.items()):
        same = names_of.get(facts.md5) if facts.md5 is not None else None
        detail = f"the same content as {same[0]}; " if same else ""
        findings.append(Finding(key, "extra", f"{detail}{by} does not name it"))
    return findings


def _names_by_content(files: Mapping[str, FileFacts]) -> dict[str, collections.deque[str]]:
    names: dict[str, collections.deque[str]] = {}
    for key, facts in sorted(files.items()):
        if facts.md5 is not None:
            names.setdefault(facts.md5, collections.deque()).append(key)
    return names


def _compare_file(
    key: str,
    expected: FileFacts,
    found: FileFacts,
    names_of: Mapping[str, collections.deque[str]],
) -> Iterator[Finding]:
    is_size_wrong = None not in (expected.size_bytes, found.size_bytes) and (
        expected.size_bytes != found.size_bytes
    )
    is_content_wrong = None not in (expected.md5, found.md5) and expected.md5 != found.md5
    if not is_size_wrong and not is_content_wrong:
        return
    other = names_of.get(found.md5) if found.md5 is not None else None
    if other:
        yield Finding(key, "swapped", f"it holds the content of {other[0]}")
    elif is_size_wrong:
        detail = f"got {found.size_bytes} bytes, expected {expected.size_bytes}"
        yield Finding(key, "size", detail)
    else:
        yield Finding(key, "content", f"got MD5 {found.md5}, expected {expected.md5}")


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
