"""Samples in a tar file, in the layout of WebDataset: where they lie, read and written.

The members of a sample stand side by side and share a key: the name up to the first dot after the
last slash. What follows the dot, in lower case, is the field. So ``n01440764/10026.JPEG`` and
``n01440764/10026.cls`` are the fields ``jpeg`` and ``cls`` of the sample ``n01440764/10026``.

Headers are POSIX.1-2001 (pax) and its predecessors: ustar, GNU's long names, sizes in base 256.

Names that are absolute or lead out of their folder (`check_name`) are read as any other: nothing is
extracted here, and a name is but a key. What indexes, packs or copies members refuses such names,
since others may extract what comes of it, and checks call them unsafe.
"""

from __future__ import annotations

import io
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple, Protocol, TypeVar, cast

from typing_extensions import Buffer

from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.ranges import ByteRange

BLOCK_BYTES = 512
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)

_ZEROS = bytes(BLOCK_BYTES)
# Extended headers hold names; one that is longer is damage, and would be read into memory.
_MAX_EXTENDED_BYTES = 1 << 20
_SKIP_BYTES = 1 << 20
_MAX_SIZE_DIGITS = 18  # below 2**63
_RECORD_BYTES = 20 * BLOCK_BYTES  # what others write at once, and fill with zeros
_PAX = (b"x", b"X", b"g")
_LONG_NAME, _LONG_LINK, _SPARSE = b"L", b"K", b"S"
# Of a header: name, size, checksum, type, first byte of the prefix of the name.
_PLAIN_HEADER = struct.Struct("100s 24x 12s 12x 8s c 188x c 166x")


T = TypeVar("T")


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    start: int
    """Offset of its first header, in bytes."""

    data: ByteRange
    """Its content, without padding."""

    crc32c: int | None = None
    """Of its content; None where it was not looked at."""

    @property
    def stop(self) -> int:
        """Offset of what follows its padding."""
        return self.data.stop + -self.data.stop % BLOCK_BYTES


class SampleMembers(NamedTuple):
    """Where a sample lies."""

    key: str
    members: dict[str, Member]
    """By field, in the order of the tar."""

    @property
    def extent(self) -> ByteRange:
        """From its first header to the end of its last padding: a piece of a tar by itself."""
        members = list(self.members.values())
        return ByteRange(members[0].start, members[-1].stop)


class Sample(NamedTuple):
    """A sample with its bytes."""

    key: str
    fields: dict[str, bytes]
    """By field, in the order of the tar."""

    extent: ByteRange
    """As of `SampleMembers`."""


class Readable(Protocol):
    """What is read front to back."""

    def read(self, size: int, /) -> bytes:
        """Read ``size`` bytes, or fewer at the end only."""
        ...


def split_name(name: str) -> tuple[str, str] | None:
    """Part a member's name into key and field.

    Returns:
        ``("a/b.c/d", "tar.gz")`` for ``"a/b.c/d.TAR.gz"``; None for what belongs to no sample: a
        name without a field or a key, or one like ``__this__``.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, field = base.partition(".")
    if not dot or not stem or not field or (base.startswith("__") and base.endswith("__")):
        return None
    return f"{folder}{slash}{stem}", field.lower()


def read_members(file: Readable, where: str, *, offset: int = 0) -> Iterator[Member]:
    """Yield the regular files of a tar, in order; read front to back, skipping over contents.

    Directories and links are left out. Where ``file`` can seek, contents are not read.

    Args:
        file: The tar, at its begin, or at the header of any member.
        where: What errors call it, such as its URL.
        offset: Where in the tar ``file`` stands; added to all offsets.

    Raises:
        ShardFormatError: The tar is cut short, a header is damaged, or a member is sparse.
    """
    source = _Source(file, where, offset)
    for member in _read_headers(source):
        yield member
        source.skip_to(member.stop)


def read_samples(file: Readable, where: str, *, offset: int = 0) -> Iterator[Sample]:
    """Yield the samples of a tar with all their bytes, in order, read front to back.

    Args:
        file: As in `read_members`.
        where: As in `read_members`.
        offset: As in `read_members`.

    Raises:
        ShardFormatError: As in `read_members`; or a sample has a field twice.
    """
    source = _Source(file, where, offset)

    def read_contents() -> Iterator[tuple[Member, bytes]]:
        for member in _read_headers(source):
            content = source.read(member.data.stop - member.data.start)
            source.skip_to(member.stop)
            yield member, content

    for key, fields in _group(read_contents(), where):
        members = {field: member for field, (member, _) in fields.items()}
        contents = {field: content for field, (_, content) in fields.items()}
        yield Sample(key, contents, SampleMembers(key, members).extent)


def parse_sample(raw: Buffer, where: str) -> Sample:
    """Read the one sample of which ``raw`` is the extent.

    Raises:
        ShardFormatError: It is not one whole sample.
    """
    body = bytes(raw) + END_OF_ARCHIVE
    samples = list(read_samples(io.BytesIO(body), where))
    if len(samples) != 1:
        raise ShardFormatError(
            f"{where}: got {len(samples)} samples, expected one; the index does not belong to it"
        )
    return samples[0]


def group_members(members: Iterable[Member], where: str) -> Iterator[SampleMembers]:
    """Put members that stand side by side and share a key together; leave out what has no key.

    A key that comes back after another one is another sample: whether that may be is for the
    caller to say.

    Raises:
        ShardFormatError: A sample has a field twice.
    """
    for key, fields in _group(((member, None) for member in members), where):
        yield SampleMembers(key, {field: member for field, (member, _) in fields.items()})


def check_name(name: str) -> str:
    """Give back a member's name that stays below the folder it is extracted to.

    Raises:
        ShardFormatError: It is absolute, or leads out of the folder.
    """
    if name.startswith("/") or "\0" in name or ".." in name.split("/"):
        raise ShardFormatError(
            f"{name!r}: an unsafe member name, expected one below the folder it lies in"
        )
    return name


def check_members(members: Iterable[Member], where: str) -> Iterator[Member]:
    """Yield members as they come, as long as their names are what `check_name` takes.

    Raises:
        ShardFormatError: One is not.
    """
    for member in members:
        try:
            check_name(member.name)
        except ShardFormatError as error:
            raise ShardFormatError(
                f"{where}: {error}; unpack it with a tar that takes names below a folder only, and"
                " pack it anew"
            ) from error
        yield member


# -- reading


class _Source:
    """A tar being read, and how far."""

    def __init__(self, file: Readable, where: str, offset: int) -> None:
        self._file = file
        self.where = where
        self.offset = offset
        seekable = getattr(file, "seekable", None)
        self._end: int | None = None
        if seekable is not None and seekable():
            self._seek: Callable[[int, int], int] = cast(BinaryIO, file).seek
            here = self._seek(0, 1)
            self._end = self._seek(0, 2)
            self._seek(here, 0)
            self._shift = here - offset

    def read_some(self, size: int) -> bytes:
        """Read ``size`` bytes, or fewer where the tar ends."""
        pieces: list[bytes] = []
        left = size
        while left and (piece := self._file.read(left)):
            pieces.append(piece)
            left -= len(piece)
        self.offset += size - left
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read(self, size: int) -> bytes:
        begin = self.offset
        piece = self.read_some(size)
        if len(piece) < size:
            raise self.damage(
                f"cut short: got {len(piece)} bytes at offset {begin}, expected {size}"
            )
        return piece

    def skip_to(self, offset: int) -> None:
        if self._end is not None:
            if offset + self._shift > self._end:
                got = self._end - self._shift - self.offset
                raise self.damage(
                    f"cut short: got {got} bytes at offset {self.offset}, "
                    f"expected {offset - self.offset}"
                )
            self._seek(offset + self._shift, 0)
            self.offset = offset
            return
        while self.offset < offset:
            self.read(min(offset - self.offset, _SKIP_BYTES))

    def damage(self, what: str) -> ShardFormatError:
        return ShardFormatError(f"{self.where}: {what}; the tar is damaged, fetch or write it anew")


def _read_headers(source: _Source) -> Iterator[Member]:
    """Yield regular files; the source must stand behind the content when the next is asked for."""
    extended: dict[str, str] = {}
    start: int | None = None
    while True:
        begin = source.offset
        block = source.read_some(BLOCK_BYTES)
        if block == _ZEROS:
            _check_tail(source, begin)
            return
        if len(block) < BLOCK_BYTES:
            raise source.damage(
                f"cut short: got {len(block)} bytes at offset {begin}, expected a header or the end"
                " of the archive"
            )
        if start is None:
            plain = _parse_plain_header(block)
            if plain is not None:
                name, size = plain
                yield Member(name, begin, ByteRange(source.offset, source.offset + size))
                continue
            start = begin
        info = _parse_header(source, block)
        if info.type in (*_PAX, _LONG_NAME, _LONG_LINK):
            _read_extended(source, info, extended)
            continue
        if info.type == _SPARSE or any(key.startswith("GNU.sparse") for key in extended):
            raise source.damage(f"sparse member {info.name!r}, expected plain ones")
        name = extended.get("path", info.name)
        size = _parse_size(source, extended["size"]) if "size" in extended else info.size
        member = Member(name, start, ByteRange(source.offset, source.offset + size))
        extended, start = {}, None
        if info.isreg():
            yield member
        elif info.type not in tarfile.SUPPORTED_TYPES:  # of those only regular files have content
            source.skip_to(member.stop)


def _check_tail(source: _Source, end: int) -> None:
    """Look whether the zeros at ``end`` end the archive, or stand where members were.

    Source:
        POSIX.1-2017, pax, "ustar Interchange Format": an archive ends with two blocks of zeros;
        what follows them in the last record may be anything. GNU tar and Python fill records of 20
        blocks with zeros.
    """
    _refuse_bytes(source, end, source.read_some(BLOCK_BYTES))  # some writers leave out the second
    source.read_some(-source.offset % _RECORD_BYTES)
    while piece := source.read_some(_SKIP_BYTES):
        _refuse_bytes(source, end, piece)
    max_bytes = _RECORD_BYTES + len(END_OF_ARCHIVE)
    if source.offset - end > max_bytes:
        warnings.warn(
            f"{source.where}: the tar ends at offset {end} with {source.offset - end} bytes of "
            f"zeros, expected {max_bytes} at most; unless it was written in large records, "
            "samples were there: compare its checksum, or fetch it anew",
            stacklevel=2,
        )


def _refuse_bytes(source: _Source, end: int, piece: bytes) -> None:
    rest = piece.lstrip(b"\0")
    if rest:
        raise source.damage(
            f"zeros at offset {end}, as at the end of a tar, and other bytes from offset "
            f"{source.offset - len(rest)} on, expected none behind the end"
        )


def _parse_plain_header(block: bytes) -> tuple[str, int] | None:
    """Read name and size of a regular file, as nearly all headers are; None is for `_parse_header`.

    A stream has two headers a sample, and `tarfile` takes as long for one as for all else here.
    """
    name, size, checksum, kind, prefix = _PLAIN_HEADER.unpack(block)
    if kind != tarfile.REGTYPE or prefix != b"\0" or not block.isascii():
        return None
    try:
        size_bytes = int(size.partition(b"\0")[0], 8)
        stated = int(checksum.partition(b"\0")[0], 8)
    except ValueError:
        return None
    # Adler-32 begins with 1 and sums modulo 65521, which 512 bytes of ASCII never come to.
    num_summed = (zlib.adler32(block) & 0xFFFF) - 1
    if size_bytes < 0 or num_summed - sum(checksum) + 8 * ord(" ") != stated:
        return None
    return name.partition(b"\0")[0].decode("ascii"), size_bytes


def _parse_header(source: _Source, block: bytes) -> tarfile.TarInfo:
    begin = source.offset - BLOCK_BYTES
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise source.damage(
            f"no header at offset {begin}: got {block[:16]!r}... ({error}), expected the header"
            " of a file"
        ) from error
    if info.size < 0:
        raise source.damage(f"got size {info.size} in the header at offset {begin}")
    return info


def _read_extended(source: _Source, info: tarfile.TarInfo, extended: dict[str, str]) -> None:
    if info.size > _MAX_EXTENDED_BYTES:
        raise source.damage(
            f"got an extended header of {info.size} bytes at offset {source.offset}, expected at "
            f"most {_MAX_EXTENDED_BYTES}"
        )
    body = source.read(info.size)
    source.skip_to(source.offset + -info.size % BLOCK_BYTES)
    if info.type == _LONG_NAME:
        extended["path"] = body.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    elif info.type in (b"x", b"X"):
        extended |= _parse_pax(source, body)


def _parse_pax(source: _Source, body: bytes) -> dict[str, str]:
    r"""Read records ``b"<length> <key>=<value>\n"``, of which the length counts itself."""
    found: dict[str, str] = {}
    while body and body[0]:
        length, space, _ = body.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 10 else 0
        record = body[len(length) + 1 : size]
        key, equals, value = record[:-1].partition(b"=")
        if not space or not equals or not record.endswith(b"\n") or size > len(body):
            raise source.damage(f"malformed extended header before offset {source.offset}")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        body = body[size:]
    return found


def _parse_size(source: _Source, text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > _MAX_SIZE_DIGITS:
        raise source.damage(f"got size {text[:40]!r} in a header before offset {source.offset}")
    return int(text)


def _group(
    members: Iterable[tuple[Member, T]], where: str
) -> Iterator[tuple[str, dict[str, tuple[Member, T]]]]:
    key: str | None = None
    fields: dict[str, tuple[Member, T]] = {}
    for member, content in members:
        parts = split_name(member.name)
        if parts is None:
            continue
        if parts[0] != key:
            if key is not None:
                yield key, fields
            key, fields = parts[0], {}
        if parts[1] in fields:
            raise ShardFormatError(
                f"{where}: sample {key!r} has field {parts[1]!r} twice, again at offset "
                f"{member.start}; expected each once"
            )
        fields[parts[1]] = member, content
    if key is not None:
        yield key, fields
