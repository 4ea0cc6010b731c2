"""Look at every sample of a data set: each that cannot be used is named."""

from __future__ import annotations

import bz2
import collections
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from concurrent_dataloader.errors import (
    BodyMismatchError,
    KeyNotFoundError,
    LoaderError,
    MissingDependencyError,
    ShardFormatError,
    StoreError,
)
from concurrent_dataloader.formats.crc32c import IS_FAST, crc32c
from concurrent_dataloader.formats.tar import (
    check_members,
    group_members,
    parse_sample,
    read_members,
    read_samples,
)
from concurrent_dataloader.formats.tfrecord import find_records
from concurrent_dataloader.prepare.checksums import Finding
from concurrent_dataloader.prepare.parallel import call_concurrently
from concurrent_dataloader.prepare.samples import (
    BadSample,
    ParsedSample,
    Rules,
    SampleKind,
    Seen,
    check_sample,
    one_line,
    parse_record,
    parse_tar_fields,
    see_sample,
)
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import NO_LABEL, ShardIndex
from concurrent_dataloader.shard_names import find_kind, find_split
from concurrent_dataloader.stores import RangedFile
from concurrent_dataloader.stores.base import ObjectInfo, Store

_READ_BYTES = 8 << 20
_HEADER_BYTES = 64 << 10

_OPENERS: dict[str, Callable[[Any], Any]] = {
    "gz": gzip.open,
    "tgz": gzip.open,
    "bz2": bz2.open,
    "tbz2": bz2.open,
    "xz": lzma.open,
    "txz": lzma.open,
}
"""By the last ending of a name."""

_UNPACK_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


class ShardResult(NamedTuple):
    """What was found in a shard, or in a number of single files."""

    name: str
    seen: list[Seen]
    bad: list[BadSample]
    num_unchecked: int
    """Samples whose payload was not looked into, as it is neither an image file nor a tensor,
    nor pixels of which the size is known."""


# -- one shard


def check_shard(
    store: Store, info: ObjectInfo, rules: Rules, index: ShardIndex | None = None
) -> ShardResult:
    """Look at every sample of a shard, front to back.

    With an index, a damaged sample does not hide those behind it. Without one, those behind damage
    of a tar cannot be found, and the finding says so.

    Args:
        store: Where it lies.
        info: Its key and size.
        rules: What a sample has to satisfy.
        index: Where its samples lie, and of which class they are.

    Raises:
        StoreError: It cannot be read.
        MissingDependencyError: A package that tensors need is not installed.
    """
    result = ShardResult(info.key, [], [], 0)
    num_unchecked = 0
    with _open_shard(store, info) as file:
        kind: SampleKind = "tfrecord" if find_kind(info.key) == "tfrecord" else "tar"
        if index is not None:
            samples = _indexed_samples(file, info, rules, index)
        elif kind == "tar":
            samples = _tar_samples(file, info)
        else:
            samples = _tfrecord_samples(file, info, rules)
        for byte_range, parsed in samples:
            name = parsed.key if isinstance(parsed, ParsedSample) else ""
            try:
                if isinstance(parsed, BadSample):
                    result.bad.append(parsed)
                    continue
                result.seen.append(see_sample(parsed))
                num_unchecked += not check_sample(parsed, rules)
            except MissingDependencyError:  # it is not about this sample
                raise
            except (LoaderError, ValueError) as error:
                result.bad.append(BadSample(info.key, name, byte_range, kind, one_line(error)))
    return result._replace(num_unchecked=num_unchecked)


_Item = tuple[ByteRange | None, ParsedSample | BadSample]


def _indexed_samples(
    file: BinaryIO, info: ObjectInfo, rules: Rules, index: ShardIndex
) -> Iterator[_Item]:
    numbers = [number for number, shard in enumerate(index.shards) if shard.name == info.key]
    positions = np.flatnonzero(np.isin(index.shard_numbers, numbers)).tolist()
    labels = index.labels
    for position in sorted(positions, key=lambda position: index.extent(position).start):
        extent, name = index.extent(position), index.names.key(position)
        label = None if labels is None else int(labels[position])
        try:
            file.seek(extent.start)
            raw = file.read(extent.stop - extent.start)
            if len(raw) < extent.stop - extent.start:
                raise ShardFormatError(
                    f"the shard ends at {info.size_bytes}, before the sample does"
                )
            if index.kind == "tfrecord":
                parsed = parse_record(raw, rules, info.key, extent.start)
                parsed = parsed._replace(key=_key_of(name))
            else:
                sample = parse_sample(raw, info.key)
                if _key_of(name) != sample.key:
                    raise ShardFormatError(f"got key {sample.key!r}, expected that of the index")
                parsed = parse_tar_fields(sample.fields, sample.key, info.key)
            if label not in (None, NO_LABEL, parsed.label):
                raise ShardFormatError(f"got class {parsed.label}, expected {label} by the index")
            crc = index.extent_crc(position) if IS_FAST else None
            if crc is not None and crc32c(raw) != crc:
                raise ShardFormatError("got bytes that differ from the checksum of the index")
            yield extent, parsed
        except StoreError:
            raise
        except (LoaderError, ValueError) as error:
            bad = BadSample(info.key, _key_of(name), extent, index.kind, one_line(error))
            yield extent, bad


def _tar_samples(file: BinaryIO, info: ObjectInfo) -> Iterator[_Item]:
    stop = 0
    try:
        for sample in read_samples(file, info.key):
            stop = sample.extent.stop
            try:
                yield sample.extent, parse_tar_fields(sample.fields, sample.key, info.key)
            except (LoaderError, ValueError) as error:
                bad = BadSample(info.key, sample.key, sample.extent, "tar", one_line(error))
                yield sample.extent, bad
    except StoreError:
        raise
    except (ShardFormatError, *_UNPACK_ERRORS) as error:
        rest = ByteRange(stop, max(stop, info.size_bytes))
        text = f"{one_line(error)} (samples behind it could not be read)"
        yield rest, BadSample(info.key, "", rest, "tar", text)


def _tfrecord_samples(file: BinaryIO, info: ObjectInfo, rules: Rules) -> Iterator[_Item]:
    stop = 0
    try:
        for number, extent in enumerate(find_records(file, info.key)):
            stop = extent.stop
            name = f"record {number}"
            try:
                file.seek(extent.start)
                raw = file.read(extent.stop - extent.start)
                parsed = parse_record(raw, rules, info.key, extent.start)
                yield extent, parsed._replace(key=parsed.key or f"{info.key}#{number}")
            except StoreError:
                raise
            except (LoaderError, ValueError) as error:
                bad = BadSample(info.key, name, extent, "tfrecord", one_line(error))
                yield extent, bad
    except ShardFormatError as error:
        rest = ByteRange(stop, max(stop, info.size_bytes))
        text = f"{one_line(error)} (records behind it could not be read)"
        yield rest, BadSample(info.key, "", rest, "tfrecord", text)


def _key_of(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


@contextlib.contextmanager
def _open_shard(
    store: Store, info: ObjectInfo, buffer_bytes: int = _READ_BYTES
) -> Generator[BinaryIO]:
    """Open a shard to be read front to back; a compressed one is unpacked while it is read."""
    raw = RangedFile(store, info.key, info.size_bytes)
    with io.BufferedReader(raw, buffer_bytes) as file:
        opener = _OPENERS.get(info.key.lower().rpartition(".")[2])
        if opener is None:
            yield cast(BinaryIO, file)
            return
        unpacked = opener(file)
        with unpacked:
            yield cast(BinaryIO, _FrontToBack(unpacked))


class _FrontToBack:
    """Hides that a compressed file can seek, since it would unpack it from the begin for that."""

    def __init__(self, file: Any) -> None:
        self.read = file.read


def count_samples(
    store: Store, infos: Sequence[ObjectInfo], findings: list[Finding], *, concurrency: int
) -> dict[str, int]:
    """Count the samples of shards by their headers; what is damaged is added to ``findings``."""

    def count(info: ObjectInfo) -> tuple[str, int | Finding]:
        try:
            with _open_shard(store, info, _HEADER_BYTES) as file:
                if find_kind(info.key) == "tfrecord":
                    return info.key, sum(1 for _ in find_records(file, info.key))
                members = check_members(read_members(file, info.key), info.key)
                samples = group_members(members, info.key)
                return info.key, sum(1 for _ in samples)
        except StoreError:
            raise
        except (ShardFormatError, *_UNPACK_ERRORS) as error:
            return info.key, Finding(info.key, "content", one_line(error))

    counts: dict[str, int] = {}
    with contextlib.closing(call_concurrently(count, infos, concurrency)) as results:
        for name, outcome in results:
            if isinstance(outcome, Finding):
                findings.append(outcome)
            else:
                counts[name] = outcome
    return counts


# -- single files


def check_files(
    store: Store,
    keys: Iterable[str],
    rules: Rules,
    *,
    concurrency: int,
    on_file: Callable[[ShardResult], None],
) -> None:
    """Read and decode single files, several at once; the class of each is what ``rules`` says.

    Args:
        store: Where they lie.
        keys: Which.
        rules: What they have to satisfy.
        concurrency: How many at once.
        on_file: Told of each, in this thread, as a shard of one sample.
    """

    def check(key: str) -> ShardResult:
        try:
            raw = store.get(key)
            label = None
            if rules.classes is not None:
                label = int(rules.classes.labels_of([key])[0])
            parsed = ParsedSample(key, raw, raw, label)
            seen = see_sample(parsed)
            check_sample(parsed, rules)
            return ShardResult(key, [seen], [], 0)
        except (KeyNotFoundError, BodyMismatchError) as error:
            problem = error
        except StoreError:  # it is not about this file
            raise
        except LoaderError as error:
            problem = error
        return ShardResult(key, [], [BadSample(key, "", None, "object", one_line(problem))], 0)

    with contextlib.closing(call_concurrently(check, keys, concurrency)) as results:
        for result in results:
            on_file(result)


# -- all of them together


class _Known(NamedTuple):
    """A sample that was looked at."""

    split: str
    where: str
    """Shard or database."""

    digest: bytes
    key: str


class SampleTally:
    """Puts what was found in shards together: classes, and keys that come again.

    Holds the keys of all samples, about 300 bytes each.
    """

    def __init__(self) -> None:
        self.bad: list[BadSample] = []
        self.findings: list[Finding] = []
        self.counts: dict[str, collections.Counter[int | None]] = {}
        """Samples by split and label."""
        self.num_unchecked = 0
        self.num_shared_keys = 0
        """Keys that stand in two splits, with other content."""
        self.num_copies = 0
        """Samples that hold the same bytes as an earlier one, under another key."""
        self._places: dict[str, _Known] = {}
        """By key, without the folder of the split, which shards have in keys and databases not."""
        self._digests: set[bytes] = set()

    @property
    def num_samples(self) -> int:
        """Samples that were looked at."""
        return sum(count.total() for count in self.counts.values())

    def forget_keys(self) -> None:
        """Forget the keys so far: what comes now is other data, or the same in another form."""
        self._places.clear()
        self._digests.clear()

    def add(self, split: str, result: ShardResult) -> None:
        """Add what was found in a shard of a split."""
        self.bad += result.bad
        self.findings += [bad.to_finding() for bad in result.bad]
        self.num_unchecked += result.num_unchecked
        counts = self.counts.setdefault(split, collections.Counter())
        for key, digest, label in result.seen:
            counts[label] += 1
            name = _without_split(key, split)
            here = _Known(split, result.name, digest, key)
            known = self._places.setdefault(name, here)
            if known.split == split and known.key == key and known is not here:
                detail = f"key {key!r} stands in {known.where} too"
                self.findings.append(Finding(result.name, "duplicate", detail))
            elif known.split != split and known.digest == digest:
                detail = f"sample {name!r} stands in {known.where} of split {known.split!r} too"
                self.findings.append(Finding(result.name, "duplicate", detail))
            elif known.split != split and known.key == key:
                self.num_shared_keys += 1
            else:
                self.num_copies += digest in self._digests
                self._digests.add(digest)


def _without_split(key: str, split: str) -> str:
    """Give the key within its split: ``val/n01/1`` of the split val is ``n01/1``."""
    top, slash, rest = key.partition("/")
    is_split = top == split or (find_split(top) or top) == (find_split(split) or split)
    return rest if slash and is_split else key
