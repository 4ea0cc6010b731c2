"""Find out what kind of data set lies somewhere, and say what is wrong with it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence

from concurrent_dataloader.errors import IndexFormatError, KeyNotFoundError
from concurrent_dataloader.index import Index
from concurrent_dataloader.labels import Classes
from concurrent_dataloader.prepare.check_settings import CheckSettings, Outcome, Place, list_place
from concurrent_dataloader.prepare.checksums import Finding, read_checksums
from concurrent_dataloader.prepare.deep import (
    SampleTally,
    ShardResult,
    check_files,
    check_shard,
)
from concurrent_dataloader.prepare.index import IMAGE_SUFFIXES
from concurrent_dataloader.prepare.parallel import call_concurrently
from concurrent_dataloader.prepare.samples import BadSample, IndexedSamples, Rules, check_again
from concurrent_dataloader.prepare.validate import (
    IMAGENET_TREES,
    Report,
    ShardFiles,
    expect_index,
    find_shard_files,
    is_packed,
    list_files,
    validate_checksum,
    validate_shards,
    validate_tree,
)
from concurrent_dataloader.shard_names import UNFINISHED, find_kind, find_split
from concurrent_dataloader.stores import WritableStore
from concurrent_dataloader.stores.base import ObjectInfo

_NO_EXPECTATION = (
    "nothing says what should be there; give --index, --checksums, --checksum or --imagenet,"
    " decode all with --deep, or record checksums with --write-checksums"
)
_BUILDERS_BASE = 1
_PARTIAL_DATABASE = re.compile(r"\.((?!.*\.\d+-[0-9a-f]{8}\.partial$).+)\.partial")
"""What `write_lmdb` calls a database until it is whole; others are left of `files.write_whole`."""

_TREES = {"train": "train", "validation": "validation", "val": "validation"}
"""Folder below the root -> key of `IMAGENET_TREES`."""


def check_dataset(store: WritableStore, place: Place, settings: CheckSettings) -> Outcome:
    """Check what lies there: single files, shards, or LMDB databases.

    Args:
        store: Opened at the place's root.
        place: Where it lies.
        settings: What to compare it with.

    Raises:
        ValueError: There is nothing to compare it with.
        FileNotFoundError: There is nothing, or a file that the settings name is missing.
        StoreError: It cannot be read.
        ShardFormatError: It is an LMDB database that cannot be opened.
    """
    return _Check(store, place, settings).run()


class _Check:
    """One run: what it works on, and what it has found so far."""

    def __init__(self, store: WritableStore, place: Place, settings: CheckSettings) -> None:
        self._store = store
        self._place = place
        self._settings = settings
        self._infos, self._gone = _part_gone(store, list_place(store, place))
        self._report = Report()
        self._tally = SampleTally()
        self._names: dict[str, Sequence[str]] = {}

    def run(self) -> Outcome:
        unfinished = self._find_unfinished()
        databases = [info for info in self._infos if _is_database(info.key)]
        has_shards = is_packed(self._infos)
        if self._settings.compares_files:
            self._compare_files()
        elif databases or has_shards:
            if has_shards:
                self._check_shards()
            if databases:
                self._check_databases(databases)
        elif self._settings.deep:
            self._report.notes.append("nothing says which files should be there: only decoded")
            self._report.count([info for info in self._infos if _is_image(info.key)])
            self._decode_files()
        elif not unfinished:
            raise ValueError(f"{self._place.source}: {_NO_EXPECTATION}")
        self._report.findings += unfinished
        self._find_gone()
        self._report.findings += self._tally.findings
        if self._tally.num_shared_keys:
            num_shared = self._tally.num_shared_keys
            note = f"{num_shared} keys stand in two splits, for different samples"
            self._report.notes.append(note)
        if self._tally.num_copies:
            note = f"{self._tally.num_copies} samples hold the same bytes as another one"
            self._report.notes.append(note)
        return Outcome(self._report, self._tally, self._names)

    def _find_unfinished(self) -> list[Finding]:
        begun = sorted(
            {info.key.partition("/")[0] for info in self._infos if info.key.startswith(UNFINISHED)}
        )
        findings: list[Finding] = []
        for folder in begun:
            split = folder.removeprefix(UNFINISHED)
            detail = f"a run that writes split {split!r} has not ended; give its command again"
            findings.append(Finding(folder, "unfinished", detail))
        for info in self._infos:
            if match := _PARTIAL_DATABASE.fullmatch(info.key.rpartition("/")[2]):
                detail = f"a run that writes {match[1]} has not ended; give its command again"
                findings.append(Finding(info.key, "unfinished", detail))
        return findings

    def _find_gone(self) -> None:
        """Name links to nothing, unless whatever names the files has said that they are missing."""
        told = {finding.where for finding in self._report.findings}
        for key in self._gone:
            if key not in told and (_is_image(key) or find_kind(key) is not None):
                self._report.findings.append(Finding(key, "missing", "it is a link to nothing"))

    # -- single files

    def _compare_files(self) -> None:
        settings = self._settings
        with settings.steps("reading", None, "files") as advance:

            def on_file(key: str, size_bytes: int) -> None:
                del size_bytes
                advance(key)

            compare = functools.partial(
                validate_tree, self._store, concurrency=settings.concurrency, on_file=on_file
            )
            if settings.index is not None:
                expected = expect_index(Index.load(settings.index))
                by = str(settings.index)
                self._merge(compare(self._infos, expected, by=by, is_complete=False))
            if settings.checksums is not None:
                recorded = read_checksums(settings.checksums)
                itself = settings.checksums.absolute()
                others = [info for info in self._infos if self._place.path(info.key) != itself]
                by = str(settings.checksums)
                self._merge(compare(others, recorded, by=by, is_complete=True))
            for where, expected_checksum, members in self._find_checksums():
                report = validate_checksum(
                    self._store,
                    members,
                    expected_checksum,
                    where=where,
                    concurrency=settings.concurrency,
                    on_file=on_file,
                )
                self._merge(report)
        if settings.deep:
            self._decode_files()

    def _find_checksums(self) -> Iterator[tuple[str, str, list[ObjectInfo]]]:
        if self._settings.checksum is not None:
            yield self._place.source, self._settings.checksum.lower(), self._infos
        if not self._settings.imagenet:
            return
        is_found = False
        for folder, tree in _TREES.items():
            members = [info for info in self._infos if info.key.startswith(f"{folder}/")]
            if members:
                is_found = True
                yield folder, IMAGENET_TREES[tree], members
        if not is_found:
            raise KeyNotFoundError(
                f"{self._place.source}: got no folder train, val or validation, expected one for"
                " --imagenet"
            )

    def _merge(self, other: Report) -> None:
        known = set(self._report.findings)
        self._report.findings += [found for found in other.findings if found not in known]
        self._report.notes += other.notes
        self._report.counted |= other.counted

    def _decode_files(self) -> None:
        settings = self._settings
        keys = [info.key for info in self._infos if _is_image(info.key)]
        if settings.index is not None:
            present = {info.key for info in self._infos}
            named = dict.fromkeys(Index.load(settings.index).keys())
            keys = [key for key in named if key in present]
        classes = (
            _find_classes(keys) if settings.classes is None else Classes.load(settings.classes)
        )
        rules = Rules(num_classes=settings.num_classes, classes=classes)
        with settings.steps("decoding", len(keys), "files") as advance:

            def on_file(result: ShardResult) -> None:
                self._tally.add(_split_of_file(result.name), result)
                advance(result.name)

            check_files(self._store, keys, rules, concurrency=settings.concurrency, on_file=on_file)
        self._report.num_samples = self._tally.num_samples
        if classes is not None:
            names = [classes.name(label) for label in range(classes.count)]
            self._names |= dict.fromkeys(self._tally.counts, names)

    # -- packed data

    def _check_shards(self) -> None:
        files = find_shard_files(self._store, self._infos)
        with self._settings.steps("reading", len(files.shards), "shards") as advance:
            self._report = validate_shards(
                self._store,
                files,
                concurrency=self._settings.concurrency,
                on_file=lambda key, size_bytes: advance(key),
            )
        if self._settings.deep:
            self._decode_shards(files)

    def _decode_shards(self, files: ShardFiles) -> None:
        split_of = _splits_by_shard(files)
        present = files.shards | {
            key: info for key, info in files.others.items() if key in split_of
        }

        def check(info: ObjectInfo) -> tuple[str, ShardResult]:
            split = split_of.get(info.key)
            index = None if split is None else files.indexes[split]
            name = split or find_split(info.key) or ""
            return name, check_shard(self._store, info, self._rules_of(files, name), index)

        work = list(present.values())
        results = call_concurrently(check, work, self._settings.concurrency)
        with (
            self._settings.steps("decoding", len(work), "shards") as advance,
            contextlib.closing(results),
        ):
            for split, result in results:
                self._tally.add(split, result)
                advance(result.name)
        self._report.num_samples = self._tally.num_samples
        self._note_what_was_found(files)

    def _rules_of(self, files: ShardFiles, split: str) -> Rules:
        classes = _class_names(files, split)
        num_classes = self._settings.num_classes
        if num_classes is None and classes is not None:
            num_classes = len(classes)
        known = None if files.metadata is None else files.metadata.splits.get(split)
        label_base = self._settings.label_base
        if label_base is None:
            # The older layout says nothing of it.
            is_told = known is not None and known.kind == "tfrecord"
            label_base = known.label_base if known is not None and is_told else _BUILDERS_BASE
        return Rules(
            num_classes=num_classes, label_base=label_base, raw_bytes=_find_raw_bytes(files, split)
        )

    def _note_what_was_found(self, files: ShardFiles) -> None:
        notes = self._report.notes
        for split, counts in sorted(self._tally.counts.items()):
            classes = _class_names(files, split)
            if classes is not None:
                self._names[split] = classes
                num_empty = sum(label not in counts for label in range(len(classes)))
                if num_empty:
                    notes.append(f"{split}: {num_empty} of {len(classes)} classes have no sample")
        if self._tally.num_unchecked:
            num_unchecked = self._tally.num_unchecked
            notes.append(f"{num_unchecked} samples hold no image file and no tensor: not decoded")

    def _check_databases(self, databases: Sequence[ObjectInfo]) -> None:
        from concurrent_dataloader.prepare.deep_lmdb import check_database

        rules = Rules(num_classes=self._settings.num_classes)
        num_others = self._tally.num_samples
        self._tally.forget_keys()
        with self._settings.steps("reading", len(databases), "databases") as advance:
            for info in databases:
                path = self._place.path(info.key.removesuffix("/data.mdb"))
                if path is None:
                    raise ValueError(
                        f"{self._store.describe(info.key)}: an LMDB database, expected it on a disk"
                        " of this machine; copy it there with `concurrent-dataloader copy`"
                    )
                result = check_database(
                    path,
                    rules,
                    is_deep=self._settings.deep,
                    allow_pickle=self._settings.allow_pickle,
                )
                self._tally.add(find_split(path.name) or path.name, result)
                advance(info.key)
        num_records = self._tally.num_samples - num_others
        if not self._report.counted:
            self._report.num_samples = num_records
        elif self._report.num_samples is not None:
            self._report.num_samples += num_records
        self._report.count(databases)
        num_images = sum(_is_image(info.key) for info in self._infos)
        if num_images:
            self._report.notes.append(f"{num_images} image files beside databases: not looked at")


def check_samples_again(
    store: WritableStore, place: Place, samples: Sequence[BadSample], settings: CheckSettings
) -> list[BadSample]:
    """Look at the samples of a report again; give those with which something still is wrong.

    Raises:
        StoreError: The store cannot be asked.
        IndexFormatError: An index that lies there is damaged.
        ValueError: ``settings.concurrency`` is less than 1.
    """
    classes = None if settings.classes is None else Classes.load(settings.classes)
    label_base = _BUILDERS_BASE if settings.label_base is None else settings.label_base
    rules = Rules(num_classes=settings.num_classes, label_base=label_base, classes=classes)

    files = _find_packed(store, samples)
    indexed = IndexedSamples(() if files is None else files.indexes.values())
    split_of = {} if files is None else _splits_by_shard(files)

    def check(sample: BadSample) -> tuple[BadSample, BadSample | None]:
        path = place.path(sample.key)
        if sample.kind != "lmdb" or path is None:
            raw_bytes = None
            if files is not None:
                split = split_of.get(sample.key) or find_split(sample.key) or ""
                raw_bytes = _find_raw_bytes(files, split)
            sized = dataclasses.replace(rules, raw_bytes=raw_bytes)
            return sample, check_again(store, sample, sized, indexed)
        from concurrent_dataloader.prepare.deep_lmdb import check_record_again

        return sample, check_record_again(path, sample, rules, allow_pickle=settings.allow_pickle)

    bad: list[BadSample] = []
    results = call_concurrently(check, samples, settings.concurrency)
    with (
        settings.steps("reading", len(samples), "samples") as advance,
        contextlib.closing(results),
    ):
        for sample, problem in results:
            advance(sample.key)
            if problem is not None:
                bad.append(problem)
    return bad


def _find_packed(store: WritableStore, samples: Sequence[BadSample]) -> ShardFiles | None:
    """Read what describes the shards of a data set, if a sample lies in one."""
    if all(sample.byte_range is None for sample in samples):
        return None
    files = find_shard_files(store, list_files(store))
    if files.findings:
        raise IndexFormatError(str(files.findings[0]))
    return files


def _splits_by_shard(files: ShardFiles) -> dict[str, str]:
    return {shard.name: split for split, index in files.indexes.items() for shard in index.shards}


def _find_raw_bytes(files: ShardFiles, split: str) -> int | None:
    """Tell how many bytes of pixels each sample of a split has; None if it holds something else."""
    known = None if files.metadata is None else files.metadata.splits.get(split)
    if known is None or known.payload != "raw" or known.image_size is None:
        return None
    return 3 * known.image_size[0] * known.image_size[1]


def _find_classes(keys: Sequence[str]) -> Classes | None:
    """Take the folders of files for their classes, if there are several and all lie in one."""
    folders = {key.rpartition("/")[0].rpartition("/")[2] for key in keys}
    return None if len(folders) < 2 or "" in folders else Classes.from_keys(keys)


def _split_of_file(key: str) -> str:
    """Tell by its top folder of which split a file is, if by anything."""
    top, _, rest = key.partition("/")
    return top if "/" in rest and find_split(top) is not None else ""


def _part_gone(
    store: WritableStore, infos: Sequence[ObjectInfo]
) -> tuple[list[ObjectInfo], list[str]]:
    """Part what is there from links to nothing, which a folder lists with 0 bytes."""
    there: list[ObjectInfo] = []
    gone: list[str] = []
    for info in infos:
        try:
            if info.size_bytes == 0:
                store.head(info.key)
        except KeyNotFoundError:
            gone.append(info.key)
        else:
            there.append(info)
    return there, gone


def _is_image(key: str) -> bool:
    return key.lower().endswith(IMAGE_SUFFIXES)


def _is_database(key: str) -> bool:
    return key.endswith(".lmdb") or key.rpartition("/")[2] == "data.mdb"


def _class_names(files: ShardFiles, split: str) -> Sequence[str] | None:
    """Give the classes of a split whose samples have classes."""
    index = files.indexes.get(split)
    if index is not None:
        return None if index.labels is None else index.classes
    known = None if files.metadata is None else files.metadata.splits.get(split)
    return None if known is None else known.classes
